"""Modules and tasks of one's own that once gave a wrong answer without a word."""

import copy
import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from netspace_lite.kernels import batched_conv2d
from torch import nn
from torch.optim.swa_utils import AveragedModel
from toy import Sums, looped, random_nets

from netspace_lite import (
    Batched,
    LeNetLike,
    Nets,
    Recipe,
    Zoo,
    architecture,
    fingerprint,
    fold_batchnorm,
    initial_rows,
    train_nets,
    train_zoo,
)
from netspace_lite.fingerprint import structure


class Drops(nn.Module):
    """Leaves a layer out at random, as stochastic depth does."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x):
        kept = not (self.training and torch.rand(1).item() < 0.2)
        return self.last(x + torch.relu(self.first(x)) if kept else x)


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.layer(x) * self.calls


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.last = nn.Embedding(5, 3, padding_idx=0), nn.Linear(3, 1)

    def forward(self, x):
        return self.last(self.embed(x.long()).mean(1))


class Activated(nn.BatchNorm1d):
    def forward(self, x):
        return F.relu(super().forward(x))


class Listed(nn.Module):
    """Holds its layers in a plain list, too, and runs that."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.Linear(8, 1)
        self.steps = [self.conv, self.norm, nn.ReLU(), nn.Flatten(), self.last]

    def forward(self, x):
        x = x[:, None]
        for step in self.steps:
            x = step(x)
        return x


class ReadsItsConv(nn.Module):
    """A convolution that feeds a norm, and whose weight is read beside it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.Linear(8, 1)

    def forward(self, x):
        beside = F.conv1d(x[:, None], self.conv.weight)
        return self.last((self.norm(self.conv(x[:, None])) + beside).flatten(1))


class Remembers(nn.Module):
    """Keeps what it made in the first call."""

    def __init__(self):
        super().__init__()
        self.layer, self.shift = nn.Linear(4, 2), None

    def forward(self, x):
        if self.shift is None:
            self.shift = torch.zeros_like(x[:1])
        return self.layer(x + self.shift)


def test_second_derivatives_through_many_convolutions():
    net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.LeakyReLU(0.1), nn.Conv2d(3, 2, 3))
    net = nn.Sequential(net, nn.Tanh(), nn.Flatten()).double()
    rows = random_nets(net, 3, scale=0.3).rows.double().requires_grad_()
    x, found = torch.randn(6, 1, 5, 5, dtype=torch.double), []
    for answers in (Batched(net)(rows, x), looped(net, rows, x)):
        (first,) = torch.autograd.grad(answers.square().sum(), rows, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), rows)[0])
    torch.testing.assert_close(*found)


def test_the_padding_of_embeddings_is_not_trained():
    rows = initial_rows(Tokens, [0, 1]).requires_grad_()
    x = torch.tensor([[0.0, 0, 1, 2], [0, 3, 4, 0], [0, 0, 1, 1]])
    batched = Batched(Tokens())
    with pytest.warns(UserWarning, match="slower"):
        answers = batched(rows, x.expand(2, 3, 4), True)
    assert batched.way(False, True) == "loop"
    (gradient,) = torch.autograd.grad(answers.sum(), rows)
    assert torch.equal(gradient[:, :3], torch.zeros(2, 3))
    assert gradient[:, 3:].any(1).all()


@pytest.mark.parametrize("used", [True, False])
def test_norms_with_a_forward_of_their_own_are_refused(used):
    net = nn.Sequential(nn.Linear(4, 8), Activated(8), nn.Linear(8, 1))
    with pytest.raises(ValueError, match="a Activated, has a forward of its own"):
        Zoo.from_modules([net]) if used else train_zoo(net, Sums(), [Recipe(0, 2)])


def test_inputs_are_kept_though_the_first_samples_hide_the_change():
    nets = random_nets(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2)), 3)
    x = torch.rand(8, 4)
    x[3:] -= 1
    before = x.clone()
    answers = nets.outputs(x)
    assert torch.equal(x, before)
    torch.testing.assert_close(answers, looped(nets.module, nets.rows, x.clone()))


def test_what_is_drawn_at_random_is_not_kept_by_the_trace():
    for _ in range(4):
        before = torch.get_rng_state()
        batched = Batched(Drops())
        torch.set_rng_state(before)
        with pytest.warns(UserWarning, match="slower"):
            train_nets(batched, Sums(), [Recipe(seed, 2) for seed in range(3)])
        assert batched.way(True, True) != "interpreted"
        assert torch.equal(before, torch.get_rng_state())


def test_buffers_that_a_module_changes_are_refused():
    with pytest.raises(ValueError, match="Counts changes its 'calls' as it runs, one for all nets"):
        Zoo.from_modules([Counts()] * 3).outputs(torch.randn(5, 4))


@pytest.mark.parametrize("net", [Listed, ReadsItsConv])
def test_folding_keeps_what_modules_compute(net):
    nets = [net() for _ in range(3)]
    for module in nets:
        for _ in range(5):
            module(torch.randn(32, 4) * 2 + 1)
        module.eval()
    x = torch.randn(9, 4)
    with pytest.warns(UserWarning, match="through torch.func.vmap"):
        answers = Zoo.from_modules(nets).outputs(x)
    torch.testing.assert_close(answers, torch.stack([m(x) for m in nets]), rtol=1e-4, atol=1e-5)


def test_new_nets_do_not_start_from_the_statistics_of_the_one_given():
    used = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    new = copy.deepcopy(used)
    for _ in range(50):
        used(torch.randn(64, 4) * 5 + 10)
    zoos = [train_zoo(net, Sums(), [Recipe(1, 5)], progress=False) for net in (new, used)]
    assert torch.equal(zoos[0].rows, zoos[1].rows)
    assert used[1].running_mean.abs().max() > 1  # which stays as it is


def test_frozen_parameters_are_refused():
    def make():
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        net[0].requires_grad_(False)
        return net

    with pytest.raises(ValueError, match="some parameters are frozen"):
        train_nets(make, Sums(), [Recipe(1, 3)])


def test_a_loss_for_all_nets_together_is_refused(monkeypatch):
    monkeypatch.setattr(Sums, "loss", lambda self, outputs, y: F.mse_loss(outputs, y))
    with pytest.raises(
        ValueError, match=r"loss of 3 nets should be \[3\] with a gradient, not \[\]"
    ):
        train_nets(nn.Linear(4, 1), Sums(), [Recipe(seed, 2) for seed in range(3)])


def test_a_score_for_all_nets_together_is_refused_before_it_is_kept(monkeypatch, tmp_path):
    one = {"mean": torch.zeros(1)}
    monkeypatch.setattr(Sums, "scores", lambda self, nets, members: one)
    with pytest.raises(ValueError, match="scores, .* are not of 2 nets each"):
        train_zoo(nn.Linear(4, 1), Sums(), [Recipe(seed, 2) for seed in range(3)], tmp_path)
    assert not list(tmp_path.iterdir())  # before any training


def test_objects_of_libraries_count_with_what_they_keep_to_themselves():
    assert fingerprint(random.Random(1)) == fingerprint(random.Random(1))
    assert fingerprint(random.Random(1)) != fingerprint(random.Random(2))


def test_a_factory_may_give_one_module_each_time():
    net = nn.Linear(4, 1)

    def again():
        return net.apply(lambda layer: nn.init.normal_(layer.weight))

    rows = initial_rows(again, range(3))
    assert len(rows.unique(dim=0)) == 3


def test_numbers_of_numpy_and_keys_that_are_numbers_come_back(tmp_path):
    recipes = [Recipe(np.int64(0), np.int64(3), np.float32(1e-3)), Recipe(1, 2)]
    nets = Nets(LeNetLike((1, 8, 8), np.int64(3), (4,), (8,), 3), torch.randn(2, 587))
    zoo = Zoo(nets.module, nets.rows, recipes=recipes, about={"steps": dict.fromkeys(range(12), 0)})
    zoo.save(tmp_path)
    found = Zoo.load(tmp_path)
    assert found.recipes == recipes
    assert found.about == {"steps": {str(key): 0 for key in range(12)}}
    assert torch.equal(found.rows, zoo.rows)
    with pytest.raises(ValueError, match=r"steps should be a whole number, not 3\.5"):
        Recipe(0, 3.5)


def test_a_list_in_a_config_stays_the_callers(tmp_path):
    hidden = [8]
    net = LeNetLike((1, 8, 8), 3, (4,), hidden, 3)
    hidden.append(8)
    random_nets(net, 2).save(tmp_path)
    assert Zoo.load(tmp_path).module.config["hidden"] == [8]


def test_an_architecture_may_be_given_what_is_no_json():
    @architecture
    class OwnActivation(nn.Module):
        def __init__(self, activation=nn.ReLU):
            super().__init__()
            self.steps = nn.Sequential(nn.Linear(4, 2), activation())

        def forward(self, x):
            return self.steps(x)

    assert OwnActivation(nn.Tanh).config == {"activation": nn.Tanh}


def test_what_a_module_makes_in_its_first_call_is_no_proxy():
    nets = random_nets(Remembers(), 2)
    x = torch.randn(6, 4)
    torch.testing.assert_close(nets.outputs(x), looped(Remembers(), nets.rows, x))


def test_one_sample_does_not_settle_how_more_are_run():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)
            self.register_buffer("point", torch.ones(4))

        def forward(self, x):
            return self.layer(x) + self.layer(self.point[None])

    nets = random_nets(Beside(), 2)
    x = torch.randn(6, 4)
    with pytest.warns(UserWarning, match="slower"):
        nets.outputs(x[:1])
    torch.testing.assert_close(nets.outputs(x), looped(Beside(), nets.rows, x))


def test_threads_run_modules_while_another_traces_one():
    """Seen before: "module is not installed as a submodule" in the thread that traced nothing."""
    traced, done = Event(), Event()

    class Waits(nn.Linear):
        def forward(self, x):
            traced.set()
            assert done.wait(60)
            return super().forward(x)

    nets, x = random_nets(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), 2), torch.randn(6, 4)
    module, expected = nets.to_module(0), nets.outputs(x)  # by now nothing of theirs is traced
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(structure, Waits(4, 2))
        assert traced.wait(60)
        found = nets.outputs(x), module(x), module[0].weight
        done.set()
        assert waiting.result() == structure(Waits(4, 2))
    torch.testing.assert_close(found, (expected, expected[0], module[0].weight))


@pytest.mark.parametrize("kind", ["loop", "vmap", "innermost"])
def test_threads_share_nets(kind):
    """Seen before: nets answered with the weights that another thread had handed to the module."""

    class Branches(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else -super().forward(x)

    class Reads(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    large = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
    module = {"loop": Branches(64, 4), "vmap": Reads(64, 4), "innermost": large}[kind]
    x = torch.randn(80, *((3, 32, 32) if kind == "innermost" else (64,)))
    nets = random_nets(module, 6)
    if kind != "innermost":
        with pytest.warns(UserWarning, match="slower"):
            nets.outputs(x)
    expected = looped(module, nets.rows, x)
    flags = torch.backends.mha.get_fastpath_enabled(), list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: nets.outputs(x), range(40)))
    for outputs in found:
        torch.testing.assert_close(outputs, expected)
    assert (torch.backends.mha.get_fastpath_enabled(), list(warnings.filters)) == flags


def test_folding_freezes_nothing():
    """Seen before: a convolution without a bias was given one that never moved."""
    module = nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3))
    assert all(p.requires_grad for p in fold_batchnorm(module).parameters())
    frozen = fold_batchnorm(module.requires_grad_(False))
    assert not any(p.requires_grad for p in frozen.parameters())


def test_averaged_modules_are_the_modules_themselves(tmp_path):
    """Seen before: how often they were averaged made them another architecture."""
    modules = [nn.Linear(4, 2) for _ in range(2)]
    averaged = [AveragedModel(module) for module in modules]
    averaged[0].update_parameters(modules[0])
    zoo = Zoo.from_modules(averaged)
    torch.testing.assert_close(zoo.rows, Zoo.from_modules(modules).rows)
    torch.save(averaged[0].state_dict(), tmp_path / "ema.pt")
    assert torch.equal(Zoo.from_files(tmp_path, nn.Linear(4, 2)).rows, zoo.rows[:1])


def test_copies_made_in_inference_mode_have_gradients():
    class Scales(nn.Linear):
        def __init__(self):
            super().__init__(4, 2)
            self.register_buffer("scale", torch.arange(1.0, 3.0))

        def forward(self, x):
            return super().forward(x) * (self.scale if x.sum() > 0 else -self.scale)

    nets, x = random_nets(Scales(), 2), torch.randn(5, 4)
    with pytest.warns(UserWarning, match="slower"):
        nets.outputs(x)
    rows = nets.rows.bfloat16().requires_grad_()
    with torch.inference_mode():
        expected = nets.batched(rows.detach().clone(), x.bfloat16())
    found = nets.batched(rows, x.bfloat16())
    torch.testing.assert_close(found, expected)
    assert torch.autograd.grad(found.sum(), rows)[0].abs().sum() > 0


HOOKED = {
    "linear": (nn.Linear(4, 4), "register_forward_hook"),
    "activation": (nn.LeakyReLU(), "register_forward_hook"),
    "flatten": (nn.Flatten(), "register_forward_hook"),
    "gradient": (nn.Linear(4, 4), "register_full_backward_hook"),
}


@pytest.mark.parametrize(("layer", "kind"), HOOKED.values(), ids=HOOKED)
def test_hooks_that_seldom_change_anything_are_called(layer, kind):
    """Seen before: what a hook cuts off was not, where the first inputs were too small for it."""
    module = nn.Sequential(nn.Linear(4, 4), copy.deepcopy(layer), nn.Linear(4, 1))
    plain = Batched(module).fingerprint
    backward = "backward" in kind
    cut = (lambda m, i, o: (i[0].clamp(-1, 1),)) if backward else lambda m, i, o: o.clamp(-3, 3)
    getattr(module[1], kind)(cut)
    batched, rows = Batched(module), random_nets(module, 3).rows
    assert batched.fingerprint != plain
    with pytest.warns(match="has hooks"):
        batched(rows, torch.randn(5, 4) / 100)
    assert batched.way() == ("loop" if backward else "vmap")
    x, own = 1e4 * torch.randn(5, 4), rows.clone().requires_grad_()
    expected = torch.autograd.grad(looped(module, own, x).sum() * 1e4, own)
    found = batched(rows.requires_grad_(), x)
    torch.testing.assert_close(found, looped(module, rows, x), rtol=1e-4, atol=1e-4)
    gradient = torch.autograd.grad(found.sum() * 1e4, rows)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-2)


class Standardised(nn.Module):
    """Norms by the samples that it is asked about, of which one alone has no spread."""

    def __init__(self):
        super().__init__()
        self.norm, self.last = nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.norm(x))


class Centred(Standardised):
    def forward(self, x):
        return self.last(x - x.mean(0))


class Scaled(Standardised):
    """By one sample of all, so that part of them may have the same answers alone."""

    def forward(self, x):
        return self.last(x / x.max())


@pytest.mark.parametrize("kind", [Standardised, Centred, Scaled])
@pytest.mark.parametrize("per_net", [False, True])
def test_samples_that_are_asked_together_stay_together(kind, per_net):
    """Seen before: answers came in blocks, each normed by itself, and so did accuracies."""
    nets = random_nets(kind(), 3)
    x = torch.randn(*[3] * per_net, 90, 4).cumsum(-2)
    x = x.sort(-2, descending=True).values if kind is Scaled else x  # the first half is as ever
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it runs through vmap
        found = nets.outputs(x, per_net, samples=40)
        torch.testing.assert_close(found, nets(x, per_net))
    assert nets.batched.mixes_samples(nets.rows, x, per_net)
    torch.testing.assert_close(found, looped(nets.module, nets.rows, x, per_net))
    plain = random_nets(nn.Linear(4, 2), 3)
    assert not plain.batched.mixes_samples(plain.rows, x, per_net)


class Spectral(nn.Module):
    """Filters in another domain: a buffer of complex numbers."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(8, 3)
        self.register_buffer("turn", torch.polar(torch.ones(5), torch.arange(5.0)))

    def forward(self, x):
        return self.last(torch.fft.irfft(torch.fft.rfft(x) * self.turn, n=8))


class Fourier(nn.Module):
    """Frequencies too high for single precision."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(8, 3)
        self.frequency = 2.0 ** torch.arange(20, 28, dtype=torch.float64) * torch.pi + 0.1

    def forward(self, x):
        return self.last((x.double() * self.frequency).sin().to(x.dtype))


@pytest.mark.parametrize("kind", [Spectral, Fourier])
@pytest.mark.filterwarnings("ignore:.*which is slower")
def test_buffers_of_another_dtype_keep_it(kind):
    """Seen before: cast to the weights' dtype, half of a complex number lost."""
    module, x = kind().eval(), torch.randn(6, 8)
    zoo = Zoo.from_modules([module])
    torch.testing.assert_close(zoo.outputs(x)[0], module(x))
    torch.testing.assert_close(zoo.to_module()(x), module(x))


class Optional(nn.Module):
    """With an option that nobody gives, which a trace would take for given."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.last = nn.Linear(4, 3)

    def forward(self, x, features=None):
        h = self.first(x)
        y = self.norm(h)
        if features is not None:
            return y
        return self.last((y.relu() + h).mean((2, 3)))


def test_norms_are_folded_as_the_module_is_called():
    """Seen before: into a convolution whose answers were asked for without the norm, too."""
    module, x = Optional(), torch.randn(4, 3, 8, 8)
    for _ in range(9):
        module(torch.randn(16, 3, 8, 8) * 2 + 1)
    torch.testing.assert_close(fold_batchnorm(module)(x), module.eval()(x))


def changed(function):
    """A module whose code alone says what it computes."""

    class Changed(nn.Module):
        def forward(self, x):
            return function(x)

    return Changed()


def private(slope):
    """What it computes stands in a private attribute of its class; no trace can follow it."""

    class Private(nn.Module):
        _slope = slope

        def __init__(self):
            super().__init__()
            self.last = nn.Linear(8, 3)

        def forward(self, x):
            return self.last(x) * (self._slope if x.sum() > 0 else 1)

    return Private()


def parametrised(function):
    layer = nn.Linear(8, 3)
    nn.utils.parametrize.register_parametrization(layer, "weight", changed(function))
    return layer


def container(function):
    return nn.TransformerEncoder(changed(function), 1, enable_nested_tensor=False)


def attending(activation):
    return nn.TransformerEncoderLayer(8, 2, 16, activation=activation)


TWINS = {
    "in a parametrised layer": (parametrised(torch.tanh), parametrised(torch.exp)),
    "in a container": (container(torch.tanh), container(torch.exp)),
    "an activation": (
        attending(partial(F.leaky_relu, negative_slope=0.1)),
        attending(partial(F.leaky_relu, negative_slope=0.5)),
    ),
    "private": (private(0.1), private(0.9)),
}


@pytest.mark.parametrize("twins", TWINS.values(), ids=TWINS)
def test_code_inside_of_layers_counts(twins):
    one, other = twins
    assert structure(one) == structure(copy.deepcopy(one)) != structure(other)


class InPlace(nn.Module):
    """Scales its inputs where they are, unless they have to be converted first."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        h = x.float()
        h.sub_(0.5).div_(0.5)
        return self.last(h.to(x.dtype))


def test_inputs_changed_in_one_precision_only_stay_as_they_are():
    """Seen before: looked for in double precision, where they are copied on the way."""
    nets, x = random_nets(InPlace(), 70), torch.randn(9, 8)
    kept = x.clone()
    with torch.no_grad():
        found = nets(x)
        assert torch.equal(x, kept)
        torch.testing.assert_close(found, nets.outputs(kept.clone(), samples=2))
    for n in (0, 40, 69):
        torch.testing.assert_close(found[n], nets.to_module(n)(kept.clone()))


def test_a_module_of_a_net_has_its_constants_in_the_dtype_of_the_net():
    """Seen before: nets asked together had them so, a net's own module did not."""
    module = nn.Sequential(nn.Linear(4, 4))
    module[0].register_buffer("kept", torch.ones(2, dtype=torch.float64))
    module.level = torch.tensor(0.1)
    nets = random_nets(module, 3)
    own = Nets(nets.batched, nets.rows.bfloat16()).to_module(1)
    assert (own.level.dtype, own[0].kept.dtype) == (torch.bfloat16, torch.float64)
    assert module.level.dtype == nets.module.level.dtype == torch.float32


@pytest.mark.parametrize("channels", [5, 8])
def test_answers_of_many_convolutions_can_be_changed_in_place(channels):
    """Seen before: refused where images are unfolded, "a view created inside a custom Function"."""
    x, weight = torch.randn(3, 2, 8, 6, 6), torch.randn(2, channels, 8, 3, 3, requires_grad=True)
    (found,) = torch.autograd.grad(batched_conv2d(x, weight).relu_().sum(), weight)
    (wanted,) = torch.autograd.grad(batched_conv2d(x, weight).relu().sum(), weight)
    torch.testing.assert_close(found, wanted)
