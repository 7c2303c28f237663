"""Nets as data: parts of them, plain modules out of them, several architectures side by side."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from toy import generator, mlp, random_nets, small_nets, toy_data

from netspace_lite.architectures import lite_net
from netspace_lite.batching import samples_per_block
from netspace_lite.nets import MixedNets, Nets, classes


class Tied(nn.Module):
    """Tied weights, and a buffer that is a setting of the architecture."""

    def __init__(self, shift=0.5):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.full((4,), shift))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x) + self.shift))


@pytest.fixture(scope="module")
def nets():
    return random_nets(lite_net("LeNetLike", (1, 8, 8), 10), 5, scale=0.1)


@pytest.fixture(scope="module")
def mixed():
    groups = [random_nets(net, 3, seed, scale=0.1) for seed, net in enumerate(small_nets()[:3])]
    return MixedNets(groups, torch.randperm(9, generator=generator()).split(3))


def test_blocks_of_nets_and_samples_change_nothing():
    nets = random_nets(lite_net("LeNetLike", (1, 8, 8), 10), 40, scale=0.1)
    x, per_net = torch.randn(11, 1, 8, 8), torch.randn(40, 11, 1, 8, 8)
    torch.testing.assert_close(nets.outputs(x, samples=4), nets(x).detach(), rtol=1e-4, atol=1e-5)
    found = nets.outputs(per_net, per_net=True, samples=4)
    torch.testing.assert_close(found, nets(per_net, True).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="should start with 32 nets"):  # a whole block of them
        nets[:32].outputs(per_net, per_net=True)


def test_a_net_leaves_the_batch_as_a_plain_module_and_as_a_file(nets, tmp_path):
    x = torch.randn(6, 1, 8, 8)
    together = nets.outputs(x)
    torch.testing.assert_close(nets.to_module(3)(x), together[3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(nets[-1].to_module()(x), together[4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(nets.to_module(-1)(x), together[4], rtol=1e-4, atol=1e-5)
    nets.export(tmp_path / "deep" / "net.safetensors", 2)
    module = lite_net("LeNetLike", (1, 8, 8), 10)
    module.load_state_dict(load_file(tmp_path / "deep" / "net.safetensors"))
    torch.testing.assert_close(module(x), together[2], rtol=1e-4, atol=1e-5)


def test_modules_with_buffers_and_tied_weights_leave_too(tmp_path):
    nets, x = random_nets(Tied(), 3), torch.randn(6, 4)
    assert nets.layout.size == 16 + 4 + 4
    module = nets.to_module(1)
    torch.testing.assert_close(module(x), nets.outputs(x)[1])
    assert module.second.weight is module.first.weight
    assert not module.training
    nets.export(tmp_path / "net.safetensors", 1)
    other = Tied(shift=7.0)
    other.load_state_dict(load_file(tmp_path / "net.safetensors"))
    torch.testing.assert_close(other(x), nets.outputs(x)[1])


def test_a_module_taken_out_is_its_own(nets):
    before = nets.rows.clone()
    with torch.no_grad():
        for parameter in nets.to_module(1).parameters():
            parameter.zero_()
        for value in nets.state_dict(1).values():
            value.zero_()
    assert torch.equal(nets.rows, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_modules_have_the_dtype_of_their_nets(dtype):
    nets = random_nets(Tied(), 2)
    nets = Nets(nets.batched, nets.rows.to(dtype))
    assert nets.to_module(0)(torch.ones(1, 4, dtype=dtype)).dtype == dtype


def test_accuracy_counts_right_answers():
    class Images:
        x = torch.eye(3)
        y = torch.tensor([0, 1, 0])

    nets = Nets(nn.Sequential(nn.Linear(3, 3, bias=False)), torch.eye(3).flatten()[None])
    assert nets.accuracy(Images).item() == pytest.approx(200 / 3)


INDICES = {
    "number": (2, [2]),
    "from the end": (-1, [4]),
    "slice": (slice(1, 4), [1, 2, 3]),
    "list": ([4, 0], [4, 0]),
    "mask": (torch.tensor([True, False, True, False, False]), [0, 2]),
    "places": (torch.tensor([3, 3]), [3, 3]),
    "one place": (torch.tensor(3), [3]),
}


@pytest.mark.parametrize("case", INDICES)
def test_parts_of_nets_are_nets(nets, case):
    index, expected = INDICES[case]
    assert torch.equal(nets[index].rows, nets.rows[expected])
    assert nets[index].batched is nets.batched


@pytest.mark.parametrize("index", [True, torch.tensor(False), np.bool_(True), np.array(True)])
def test_a_single_truth_is_no_mask(nets, index):
    """Seen before: zoo[zoo.scores["val_accuracy"].mean() > 90] was all nets."""
    with pytest.raises(ValueError, match="whole numbers or a mask, not a single"):
        nets[index]


def test_parts_pass_gradients_on(nets):
    rows = nets.rows.clone().requires_grad_()
    Nets(nets.batched, rows)[1:3](torch.ones(1, 1, 8, 8)).sum().backward()
    assert (rows.grad.abs().sum(1) > 0).tolist() == [False, True, True, False, False]


def test_nets_iterate_as_nets_of_one(nets):
    assert [len(net) for net in nets] == [1] * 5
    assert torch.equal(torch.cat([net.rows for net in nets]), nets.rows)


def test_any_nets_split_into_disjoint_parts(nets):
    parts = nets.split(1, 1, seed=3)
    assert [len(part) for part in parts] == [3, 1, 1]
    together = torch.cat([part.rows for part in parts])
    assert torch.equal(together.sort(0).values, nets.rows.sort(0).values)
    assert torch.equal(parts[1].rows, nets.split(1, 1, seed=3)[1].rows)
    with pytest.raises(ValueError, match=r"can't hold out 3 \+ 2 of 5"):
        nets.split(3, 2)
    with pytest.raises(ValueError, match="can't hold out -1"):
        nets.split(-1, 2)
    with pytest.raises(ValueError, match="can't hold out 0"):  # a group without nets is none
        nets.split(0, 2)


def test_finite_nets_are_told_from_others(nets):
    rows = nets.rows.clone()
    rows[1, 7], rows[3, 0] = torch.nan, torch.inf
    assert Nets(nets.batched, rows).finite().tolist() == [True, False, True, False, True]


def test_the_fingerprint_knows_weights_and_architecture(nets):
    again = Nets(lite_net("LeNetLike", (1, 8, 8), 10), nets.rows.clone())
    assert again.fingerprint == nets.fingerprint
    assert nets[:2].fingerprint != nets[1:3].fingerprint
    relu, tanh = (random_nets(mlp(f), 2) for f in (nn.ReLU(), nn.Tanh()))
    assert relu.fingerprint != tanh.fingerprint


def test_nets_say_what_they_are(nets, mixed):
    assert repr(nets) == "Nets(5 × LeNetLike, 5,750 parameters each)"
    assert repr(mixed) == "MixedNets(3 × LeNetLike, 3 × VanillaCNN, 3 × ResNet8)"


def test_rows_of_another_size_are_refused(nets):
    with pytest.raises(ValueError, match=r"should be \[N, 5750\]"):
        Nets(nets.module, torch.zeros(2, 7))


def test_mixed_nets_keep_their_order(mixed):
    images = toy_data().val
    outputs, accuracy = mixed.outputs(images.x), mixed.accuracy(images)
    for n, net in enumerate(mixed):
        torch.testing.assert_close(outputs[n], net.outputs(images.x)[0])
        torch.testing.assert_close(mixed(images.x)[n], net(images.x)[0])
        assert accuracy[n] == net.accuracy(images)[0]
        assert mixed.architectures[n] in repr(net)
        torch.testing.assert_close(mixed.to_module(n)(images.x), net.outputs(images.x)[0])
    assert len(mixed) == 9
    assert torch.equal(mixed[-1].rows, mixed[8].rows)
    with pytest.raises(IndexError):
        mixed[9]


@pytest.mark.parametrize(
    "index",
    [slice(2, 7), [8, 0, -3], torch.arange(9) % 2 == 0, torch.tensor([1]), np.array([4, 4])],
    ids=["slice", "list", "mask", "one", "twice"],
)
def test_a_part_of_mixed_nets_is_mixed_nets(mixed, index):
    part, rows = mixed[index], [net.rows for net in mixed]
    expected = [rows[n] for n in torch.arange(9)[index].tolist()]
    assert isinstance(part, MixedNets)
    assert len(part) == len(expected)
    assert all(torch.equal(net.rows, row) for net, row in zip(part, expected, strict=True))


def test_mixed_nets_need_every_place_once(mixed):
    with pytest.raises(ValueError, match="need as many places each"):
        MixedNets(mixed.groups[:2], [torch.arange(3), torch.arange(3)])
    for none in (lambda: MixedNets([]), lambda: mixed[:0]):
        with pytest.raises(ValueError, match="at least one group"):
            none()


def test_answers_that_are_not_finite_are_wrong_answers(nets):
    """Seen before: the largest of NaNs was class 0, a net of them as good as that class."""
    data = toy_data()
    overflowing = Nets(nets.batched, nets.rows * 1e25)
    assert not overflowing.outputs(data.test.x).isfinite().all()
    given = overflowing.outputs(data.test.x).isfinite().all(-1)
    assert (classes(overflowing.outputs(data.test.x))[~given] == -1).all()
    assert (overflowing.accuracy(data.test) <= 100 * given.float().mean(1)).all()


def test_answers_come_in_blocks_that_fit_the_caches():
    """Digits all at once, as far as 4,096 of them; large images by the dozen; the same answers."""
    sizes = {(1, 8, 8): 4096, (3,): 4096, (3, 32, 32): 85, (3, 512, 512): 32}
    for shape, expected in sizes.items():
        assert samples_per_block(torch.empty(1).expand(2, *shape)) == expected
    nets = random_nets(nn.Sequential(nn.Flatten(), nn.Linear(3072, 3)), 3)
    x = torch.randn(200, 3, 32, 32, generator=generator())
    torch.testing.assert_close(nets.outputs(x), nets.outputs(x, samples=1000))
    own = torch.stack([x, -x, x / 2])
    torch.testing.assert_close(nets.outputs(own, per_net=True), nets(own, per_net=True))


def test_copies_on_both_sides_of_a_split_are_told():
    """Seen before: best and last checkpoints of one run, on both sides of it, flatter figures."""
    nets = random_nets(mlp(nn.ReLU()), 6)
    twice = Nets(nets.module, nets.rows.repeat(2, 1))
    with pytest.warns(UserWarning, match=r"nets \[[0-9, ]+\], held out, are copies") as said:
        learned, val, test = twice.split(1, 2, seed=1)
    held = torch.cat([val.rows, test.rows])
    count = sum(any(torch.equal(row, known) for known in learned.rows) for row in held)
    assert count == str(said[0].message).split("]")[0].count(",") + 1
    nets.split(1, 2)  # warnings are errors


def test_nets_are_split_at_random_by_the_seed():
    nets = Nets(nn.Linear(1, 1, bias=False), torch.arange(60.0)[:, None])
    parts = [[part.rows[:, 0].tolist() for part in nets.split(10, 20, seed=s)] for s in (0, 0, 1)]
    assert [len(part) for part in parts[0]] == [30, 10, 20]
    assert parts[0] == parts[1]
    assert all(set(one) != set(other) for one, other in zip(parts[0], parts[2], strict=True))
    assert all(max(part) - min(part) > 30 for part in parts[0])  # not one stretch after the other
