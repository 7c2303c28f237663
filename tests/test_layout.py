"""Rows and PReps: exact round trips, views, and errors that name the shapes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toy import mlp, random_nets

from netspace_lite.architectures import LeNetLike, lite_net
from netspace_lite.layout import Layout, from_prep, invariants, to_prep
from netspace_lite.nets import Nets


def nets(count=3):
    return [lite_net("LeNetLike", (1, 8, 8), 10) for _ in range(count)]


def test_layout_names_every_parameter_in_module_order():
    net = nets(1)[0]
    layout = Layout.of(net)
    assert layout.names == tuple(name for name, _ in net.named_parameters())
    assert layout.size == nn.utils.parameters_to_vector(net.parameters()).numel()


def test_pack_is_torchs_own_flattening_bit_for_bit():
    modules = nets()
    rows = Layout.of(modules[0]).pack(modules)
    for row, module in zip(rows, modules, strict=True):
        assert torch.equal(row, nn.utils.parameters_to_vector(module.parameters()).detach())


def test_modules_state_dicts_and_rows_are_one():
    modules = nets()
    layout = Layout.of(modules[0])
    rows = layout.pack(modules)
    assert torch.equal(rows, layout.pack([m.state_dict() for m in modules]))
    assert torch.equal(rows, layout.pack(layout.unpack(rows)))


def test_views_share_the_rows_memory():
    layout = Layout.of(nets(1)[0])
    rows = torch.zeros(2, layout.size)
    layout.views(rows)["layers.5.bias"].fill_(7)
    offset = layout.offsets[layout.names.index("layers.5.bias")]
    assert (rows[:, offset : offset + 64] == 7).all()
    assert rows.sum() == 2 * 64 * 7


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 300), st.integers(1, 70), st.integers(0, 3))
def test_prep_round_trip_is_exact_for_any_size(n, size, length, spare):
    rows = torch.randn(n, size)
    chunks = -(-size // length) + spare
    prep = to_prep(rows, chunks, length)
    assert prep.shape == (n, chunks, length)
    assert torch.equal(from_prep(prep, size), rows)
    assert prep.flatten(1)[:, size:].eq(0).all()


def test_prep_of_a_full_grid_and_its_rows_are_views():
    rows = torch.randn(2, 12)
    prep = to_prep(rows, 3, 4)
    assert prep.data_ptr() == rows.data_ptr()
    assert from_prep(prep, 10).data_ptr() == rows.data_ptr()


def test_wrong_nets_are_refused_by_name():
    layout = Layout.of(nets(1)[0])
    other = lite_net("LeNetLike", (1, 8, 8), 7)
    with pytest.raises(
        ValueError, match=r"net 1: parameter 'layers.7.weight' should be \(10, 64\)"
    ):
        layout.pack([*nets(1), other])
    with pytest.raises(ValueError, match="no nets to pack"):
        layout.pack([])
    with pytest.raises(ValueError, match=r"should be \[N, 5750\]"):
        layout.views(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="at least one net"):
        layout.views(torch.zeros(0, layout.size))
    module = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    with pytest.raises(ValueError, match="fold_batchnorm"):
        Layout.of(module).pack([module])
    with pytest.raises(ValueError, match="nothing to pack"):
        Layout.of(nn.ReLU())


def test_grids_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match="10 parameters don't fit 2 chunks of 4"):
        to_prep(torch.zeros(1, 10), 2, 4)
    with pytest.raises(ValueError, match="fewer than 10"):
        from_prep(torch.zeros(1, 2, 4), 10)


def test_invariants_do_not_change_with_the_order_of_hidden_units():
    net = LeNetLike((1, 8, 8), 10, (4, 6), (12,), kernel=3)
    layout, generator = Layout.of(net), torch.Generator().manual_seed(0)
    (state,) = layout.unpack(torch.randn(1, layout.size, generator=generator))
    other = {name: value.clone() for name, value in state.items()}
    for units, layer, following in ((4, 0, 2), (6, 2, 5), (12, 5, 7)):
        order = torch.randperm(units, generator=generator)
        for name in (f"layers.{layer}.weight", f"layers.{layer}.bias"):
            other[name] = other[name][order]
        seen = other[f"layers.{following}.weight"]
        shape = len(seen), units, -1
        other[f"layers.{following}.weight"] = seen.reshape(shape)[:, order].reshape(seen.shape)
    rows = layout.pack([state, other])
    x = torch.randn(5, 1, 8, 8, generator=generator)
    a, b = Nets(net, rows)(x)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)  # the same function ...
    assert (rows[0] - rows[1]).abs().max() > 1  # ... of other weights
    found = invariants(layout, rows)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    # another net has others, and NumPy finds the same singular values
    third = invariants(layout, torch.cat([rows, rows[:1].flip(1)]))[2]
    assert (third - found[0]).abs().max() > 0.1
    weight = state["layers.5.weight"].numpy()
    values = torch.from_numpy(np.linalg.svd(weight, compute_uv=False))
    assert torch.isclose(found[0][:, None], values, rtol=1e-4).any(0).all()


def test_chunks_are_as_many_as_hold_a_net_and_no_more():
    layout = Layout(("weight",), ((3, 4),))
    assert [layout.chunks(length) for length in (1, 4, 5, 12, 13)] == [12, 3, 3, 1, 1]


def test_invariants_hold_what_they_say():
    net = mlp(nn.ReLU())
    nets = random_nets(net, 2)
    (state, _) = nets.layout.unpack(nets.rows)
    first, last = state["0.weight"], state["2.weight"]
    expected = [state[f"{layer}.bias"].sort().values for layer in (0, 2)]
    for w in (first, last):
        expected += [torch.linalg.svd(w).S, *(w.norm(dim=d).sort().values for d in (0, 1))]
    for w in (first.T, last):  # of inputs and outputs, which keep their places
        products = w @ w.T
        expected += [w.mean(1), torch.cat([row[i:] for i, row in enumerate(products)])]
    expected = torch.cat([*expected, state["2.bias"]])
    torch.testing.assert_close(invariants(nets.layout, nets.rows)[0], expected)
    half = invariants(nets.layout, nets.rows.bfloat16())[0]
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.05)
