"""chunk_pack and chunk_unpack: bit-exact, inverse of each other, each the other's backward."""

import pytest
import torch
from netspace_lite.kernels import backend, chunk_pack, chunk_unpack
from netspace_lite.kernels.chunk_pack import chunk_pack_reference, chunk_unpack_reference
from torch import nn

T, L = 3, 1000
SCALES = {
    "plain": (False, False),
    "both": (True, True),
    "mean": (True, False),
    "std": (False, True),
}


def scale(kind, device):
    has_mean, has_std = SCALES[kind]
    mean, std = torch.randn(T, L, device=device), torch.rand(T, L, device=device) + 0.5
    return {"mean": mean if has_mean else None, "std": std if has_std else None}


def some_nets(device):
    """Three nets of different architectures: odd sizes, a scalar, one that fills the PRep."""
    shapes = [[(30, 40), (5,), ()], [(7, 7), (3, 1, 2)], [(T * L,)]]
    return [[torch.randn(s, device=device, requires_grad=True) for s in net] for net in shapes]


def leaves_of(value):
    return [value] if isinstance(value, torch.Tensor) else [t for v in value for t in leaves_of(v)]


def assert_same(op, reference, leaves):
    """Outputs and gradients of both, bit by bit."""
    with backend("triton"):
        found = leaves_of(op())
    expected = leaves_of(reference())
    gs = [torch.randn_like(t) for t in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    for a, b in zip(
        torch.autograd.grad(found, leaves, gs),
        torch.autograd.grad(expected, leaves, gs),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", SCALES)
def test_pack_nets(device, kind):
    nets, scales = some_nets(device), scale(kind, device)
    assert_same(
        lambda: chunk_pack(nets, T, L, **scales),
        lambda: chunk_pack_reference(nets, T, L, **scales),
        leaves_of(nets),
    )


@pytest.mark.parametrize("kind", SCALES)
def test_pack_stacked_views_of_rows(device, kind):
    rows, scales = torch.randn(4, 2500, device=device, requires_grad=True), scale(kind, device)
    stacked = [rows[:, 3:9].view(4, 2, 3), rows[:, 20:2020].view(4, 8, 250), rows[:, 2100]]
    assert_same(
        lambda: chunk_pack(stacked, T, L, **scales),
        lambda: chunk_pack_reference(stacked, T, L, **scales),
        [rows],
    )


def test_pack_rows(device):
    rows = torch.randn(5, 2999, device=device, requires_grad=True)
    assert_same(lambda: chunk_pack(rows, T, L), lambda: chunk_pack_reference(rows, T, L), [rows])


@pytest.mark.parametrize("kind", SCALES)
def test_unpack_nets(device, kind):
    prep, scales = torch.randn(3, T, L, device=device, requires_grad=True), scale(kind, device)
    shapes = [[t.shape for t in net] for net in some_nets(device)]
    assert_same(
        lambda: chunk_unpack(prep, shapes, **scales),
        lambda: chunk_unpack_reference(prep, shapes, **scales),
        [prep],
    )


@pytest.mark.parametrize("kind", SCALES)
def test_unpack_stacked(device, kind):
    prep, scales = torch.randn(4, T, L, device=device, requires_grad=True), scale(kind, device)
    shapes = [(3, 5), (1000, 2), (1,)]
    assert_same(
        lambda: chunk_unpack(prep, shapes, **scales),
        lambda: chunk_unpack_reference(prep, shapes, **scales),
        [prep],
    )


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_round_trip_keeps_every_bit(device, name):
    nets = some_nets(device)
    nets[0][0].data.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), -0.0])
    with backend(name):
        prep = chunk_pack(nets, T, L)
        back = chunk_unpack(prep, [[t.shape for t in net] for net in nets])
    for net, found in zip(nets, back, strict=True):
        for a, b in zip(net, found, strict=True):
            assert a.shape == b.shape
            bits = a.detach().view(torch.int32) if a.ndim else a.detach()
            assert torch.equal(bits, b.detach().view(torch.int32) if a.ndim else b.detach())
    sizes = [sum(t.numel() for t in net) for net in nets]
    for row, used in zip(prep.flatten(1), sizes, strict=True):
        assert (row[used:] == 0).all()


def test_mixed_dtypes_and_cast(device):
    """bf16 and fp32 tensors into one fp32 PRep, and fp32 tensors into a bf16 one."""
    mixed = [[torch.randn(40, device=device).bfloat16(), torch.randn(2000, device=device)]]
    with backend("triton"):
        prep = chunk_pack(mixed, T, L, dtype=torch.float32)
        small = chunk_pack([[t.float() for t in mixed[0]]], T, L, dtype=torch.bfloat16)
    assert torch.equal(prep, chunk_pack_reference(mixed, T, L, dtype=torch.float32))
    assert torch.equal(small, prep.bfloat16())


def test_gradients_keep_each_dtype(device):
    mixed = [[torch.randn(4, device=device).bfloat16().requires_grad_(),
              torch.randn(5, device=device, requires_grad=True)]]  # fmt: skip
    with backend("triton"):
        prep = chunk_pack(mixed, 1, 10, dtype=torch.float32)
    prep.backward(torch.ones_like(prep))
    assert [t.grad.dtype for t in mixed[0]] == [torch.bfloat16, torch.float32]
    assert all((t.grad == 1).all() for t in mixed[0])


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_standardisation_is_undone(device, name):
    rows, scales = torch.randn(3, T * L - 7, device=device), scale("both", device)
    with backend(name):
        prep = chunk_pack(rows, T, L, **scales)
        (back,) = chunk_unpack(prep, [(T * L - 7,)], **scales)
    torch.testing.assert_close(back, rows, atol=1e-6, rtol=1e-5)


def test_expanded_gradients(device):
    """`sum` hands back one value for all: a gradient of stride 0 must not be read as rows."""
    prep = torch.randn(2, T, L, device=device, requires_grad=True)
    with backend("triton"):
        parts = chunk_unpack(prep, [[(700, 2)], [(50,), (3, 3)]])
    (2 * parts[0][0].sum() + 3 * parts[1][0].sum()).backward()
    expected = torch.zeros(2, T * L)
    expected[0, :1400], expected[1, :50] = 2, 3
    assert torch.equal(prep.grad.cpu().flatten(1), expected)


def test_module_order():
    nets = [nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))]
    prep = chunk_pack([list(net.parameters()) for net in nets], 2, 10)
    for row, net in zip(prep.flatten(1), nets, strict=True):
        vector = nn.utils.parameters_to_vector(net.parameters())
        assert torch.equal(row[: len(vector)], vector)


def test_stacked_unpack_is_a_view():
    prep = torch.randn(2, T, L)
    assert chunk_unpack(prep, [(3, 5)])[0].data_ptr() == prep.data_ptr()


def test_fp64_is_standardised_in_fp64():
    rows, mean = torch.rand(2, 25).double(), torch.rand(3, 10).double()
    prep = chunk_pack(rows, 3, 10, mean, mean + 1)
    expected = (rows - mean.flatten()[:25]) / (mean.flatten()[:25] + 1)
    assert torch.equal(prep.flatten(1)[:, :25], expected)
    back = chunk_unpack(prep, [(25,)], mean, mean + 1)[0]
    torch.testing.assert_close(back, rows, rtol=1e-14, atol=1e-14)


row = torch.zeros(2, 25)
BAD_PACK = {
    "too small": (([[torch.zeros(25)]], 2, 10), r"25 parameters does not fit 2 chunks of 10.* 3"),
    "no nets": (([], 2, 10), "nothing to pack"),
    "empty net": (([[torch.zeros(3)], []], 2, 10), "nothing to pack in 2 nets"),
    "zero rows": ((row[:0], 3, 10), "same number of nets, at least one"),
    "uneven stack": (([row, row[:1]], 6, 10), r"same number of nets.* \[2, 1\]"),
    "integers": (([[torch.zeros(3, dtype=torch.long)]], 2, 10), "must be floating"),
    "devices": (([[torch.zeros(3), torch.zeros(3, device="meta")]], 2, 10), "on one device"),
    "mean": ((row, 3, 10, torch.zeros(30)), r"mean \[30\] must be \[T, L\] .* T = 3, L = 10"),
    "dtype": ((row, 3, 10, torch.zeros(3, 10).double()), "mean .* must be torch.float32 on cpu"),
    "device": ((row, 3, 10, None, torch.zeros(3, 10, device="meta")), "std .* on cpu, .* on meta"),
}


@pytest.mark.parametrize(("args", "message"), BAD_PACK.values(), ids=BAD_PACK.keys())
def test_bad_pack(args, message):
    with pytest.raises(ValueError, match=message):
        chunk_pack(*args)


prep = torch.zeros(2, 3, 10)
BAD_UNPACK = {
    "too many values": ((prep, [(31,)]), r"31 parameters does not fit 3 chunks of 10.* 4"),
    "nets": ((prep, [[(3,)]]), r"shapes of 1 nets for prep \[2, 3, 10\]"),
    "no shapes": ((prep, []), "shapes of 0 nets"),
    "rank": ((prep[0], [(3,)]), r"prep \[3, 10\] must be \[N, T, L\]"),
    "strides": ((prep.mT, [(3,)]), "must be contiguous; only the stride between nets is free"),
    "device": ((prep, [(3,)], torch.zeros(3, 10, device="meta")), "mean .* on cpu, .* on meta"),
}


@pytest.mark.parametrize(("args", "message"), BAD_UNPACK.values(), ids=BAD_UNPACK.keys())
def test_bad_unpack(args, message):
    with pytest.raises(ValueError, match=message):
        chunk_unpack(*args)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_scales_of_any_strides(device, name):
    rows, wide = torch.randn(2, T * L, device=device), torch.rand(L, 2 * T, device=device) + 0.5
    std = wide[:, ::2].T
    assert std.stride() == (2, 2 * T)
    with backend(name):
        found = chunk_pack(rows, T, L, std, std)
        back = chunk_unpack(found, [(T * L,)], std, std)[0]
    assert torch.equal(found, chunk_pack(rows, T, L, std.contiguous(), std.contiguous()))
    assert torch.equal(back, chunk_unpack(found, [(T * L,)], std.clone(), std.clone())[0])


def test_second_derivatives(device):
    """Standardising is linear in the chunks: its gradient can be differentiated, and is zero."""
    rows = torch.randn(2, T * L, device=device, requires_grad=True)
    std = torch.rand(T, L, device=device) + 0.5
    with backend("triton"):
        prep = chunk_pack(rows, T, L, None, std)
        (grad,) = torch.autograd.grad(prep.square().sum(), rows, create_graph=True)
        (second,) = torch.autograd.grad(grad.sum(), rows)
    torch.testing.assert_close(second, (2 / std.square()).flatten().expand(2, -1))


def test_opcheck(device):
    op, std = torch.ops.netspace_lite.chunk_scale.default, torch.rand(2, 3, device=device) + 1
    prep = torch.randn(2, 2, 3, device=device, requires_grad=True)
    used = torch.tensor([4, 6], device=device)
    torch.library.opcheck(op, (prep, used, None, std, torch.float32))
    torch.library.opcheck(op, (prep, None, std, std, torch.float32))


def test_scales_that_are_learned_have_gradients(device):
    rows = torch.randn(3, 7, device=device)
    mean, std = torch.randn(2, 2, 4, device=device).exp().requires_grad_()
    found = []
    for name in ("torch", "triton"):
        with backend(name):
            prep = chunk_pack(rows, 2, 4, mean, std)
            found.append(torch.autograd.grad(prep.square().sum(), [mean, std], retain_graph=True))
    torch.testing.assert_close(*found)
