"""Ways of running many nets are tried against plain modules: in values, gradients, what changes."""

import random
import subprocess
import sys
from types import MethodType

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from toy import Sums, generator, gradients, looped, random_nets

from netspace_lite import Batched, LeNetLike, Nets, Recipe, ResNet, Zoo, initial_rows, train_zoo
from netspace_lite.trial import may_lie_innermost


class Net(nn.Module):
    """Two layers; subclasses do something between them that a trace doesn't see."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def middle(self, h):
        return torch.relu(h)

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.sign(x)

    @staticmethod
    def backward(ctx, g):
        return g


class StraightThrough(Net):
    def middle(self, h):
        return Sign.apply(h)


class NoGradient(Net):
    def forward(self, x):
        with torch.no_grad():
            h = torch.relu(self.first(x))
        return self.last(h)


class Hooked(Net):
    def __init__(self):
        super().__init__()
        self.last.register_full_backward_hook(lambda layer, into, out: (3 * into[0],))


class CentresAll(Net):
    def forward(self, x):
        return super().forward(x - x.mean())


class ScalesAll(Net):
    def forward(self, x):
        return super().forward(x / x.abs().max())


class OneColumn(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 3)

    def forward(self, x):
        return self.linear(x - x.mean(0))


def plain(make, rows, x, per_net):
    """Answers of plain modules with parameters of their own, and the gradient of their squares."""
    answers, found = [], []
    for n, row in enumerate(rows):
        net = make().to(rows.dtype)
        nn.utils.vector_to_parameters(row, net.parameters())
        answers.append(net(x[n] if per_net else x))
        parts = gradients(answers[-1].square().sum(), net)
        found.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(answers).detach(), torch.stack(found)


@pytest.mark.parametrize("per_net", [False, True], ids=["shared", "per net"])
@pytest.mark.parametrize(
    ("make", "way"),
    [
        (StraightThrough, "loop"),
        (NoGradient, "vmap"),
        (Hooked, "loop"),
        (CentresAll, None),
        (ScalesAll, None),
        (OneColumn, None),
    ],
)
def test_what_a_trace_does_not_show_is_found(make, way, per_net):
    """Seen before: interpreted, with other gradients or with the samples of other nets."""
    size = 1 if make is OneColumn else 4
    rows = initial_rows(make, range(3)).requires_grad_()
    x = torch.randn(*[3] * per_net, 16, size, generator=generator()) + 0.3
    batched = Batched(make())
    way = way or ("vmap" if per_net else "interpreted")
    if way != "interpreted":
        with pytest.warns(UserWarning, match="hooks on gradients|turns gradients|draw at random"):
            batched(rows, x, per_net)
    found = batched(rows, x, per_net)
    (gradient,) = torch.autograd.grad(found.square().sum(), rows)
    assert batched.way(per_net=per_net) == way
    answers, expected = plain(make, rows.detach(), x, per_net)
    torch.testing.assert_close(found, answers, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


class Normalises(Net):
    def middle(self, h):
        return h / h.std(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.filterwarnings("ignore:.*which is slower")
def test_mixing_is_found_in_any_dtype(dtype):
    """Seen before: passed in bf16, where the tolerance is a fifth of the largest value."""
    rows = initial_rows(Normalises, range(4)).to(dtype)
    x = torch.randn(32, 4, generator=generator()).to(dtype)
    batched = Batched(Normalises())
    batched(rows, x)
    assert batched.way() == "vmap"


class Drops(Net):
    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def middle(self, h):
        return torch.relu(h) if not self.training or self.draw() < 0.5 else h


DRAWS = {"Python": lambda: random.random(), "NumPy": lambda: np.random.rand()}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.filterwarnings("ignore:.*which is slower")
def test_no_trace_keeps_what_is_drawn_by_others(draw):
    """Seen before: drawn once, by the trace, for all steps."""
    rows, x = initial_rows(lambda: Drops(draw), range(3)), torch.randn(3, 8, 4)
    for seed in range(4):
        random.seed(seed)
        np.random.seed(seed)
        before = random.getstate(), np.random.get_state()[2]
        batched = Batched(Drops(draw))
        mode = batched._mode(rows, True)
        assert (random.getstate(), np.random.get_state()[2]) == before
        assert isinstance(mode.graph, str)
        seen = {float(batched(rows, x, True, torch.empty(3, 0)).sum()) for _ in range(20)}
        assert len(seen) == 2


class Drawn(Net):
    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.first.weight.copy_(torch.from_numpy(np.random.randn(6, 4)))
            self.last.bias.fill_(random.random())


def test_nets_drawn_by_numpy_and_python_follow_their_seeds():
    random.seed(0)
    first = initial_rows(Drawn, [3, 4, 3])
    random.seed(1)
    np.random.seed(1)
    assert torch.equal(initial_rows(Drawn, [3, 4, 3]), first)
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0][:24], first[1][:24])


class Replaces(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x):
        if bool(x.detach().abs().sum() > 0):  # so that it can't be traced
            self.seen = 0.9 * self.seen + 0.1 * x.mean(0)
        return super().forward(x - self.seen)


class Counts(Net):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def middle(self, h):
        self.calls += 1
        return torch.relu(h) * min(1, self.calls / 20)


class Listed(Net):
    def __init__(self):
        super().__init__()
        self.layers = [self.first, self.last]
        self.weights = [self.first.weight]

    def middle(self, h):
        return torch.relu(h) * self.weights[0].sum()


class Recomputes(Net):
    def forward(self, x):
        if float(x.detach().sum()) < -1e9:  # so that it can't be traced
            return super().forward(x)
        run = lambda x: torch.relu(self.first(x))  # noqa: E731
        return self.last(checkpoint(run, x, use_reentrant=False))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (Replaces, "Replaces changes its 'seen' as it runs, one for all nets"),
        (Counts, "Counts changes its 'calls' as it runs, one for all nets: count outside"),
        (Listed, "Listed has other answers or gradients with parameters that it is handed"),
        (Recomputes, "Recomputes has other answers or gradients with parameters"),
    ],
)
def test_what_no_way_gives_is_refused(make, said):
    """Seen before: shared by all nets, counted nine times too far, or the template's weights."""
    nets = Nets(make(), initial_rows(make, range(3)))
    with pytest.raises(ValueError, match=said):
        nets.outputs(torch.randn(8, 4, generator=generator()))


def test_rows_that_asking_would_change_are_refused():
    module = nn.Sequential(nn.Embedding(5, 3, max_norm=0.5), nn.Flatten(), nn.Linear(12, 2))
    nets = random_nets(module, 3)
    before = nets.rows.clone()
    with pytest.raises(ValueError, match="changes its 'parameters' as it runs"):
        nets.outputs(torch.randint(5, (6, 4), generator=generator()))
    assert torch.equal(nets.rows, before)


def test_hooks_on_gradients_of_parameters_are_refused():
    """They would be lost, as parameters are rows."""

    def make():
        net = Net()
        net.first.weight.register_hook(lambda g: g * 0)
        return net

    for given in (make, make()):
        with pytest.raises(ValueError, match="hooks on gradients of a Net's parameters"):
            initial_rows(given, [0])


@pytest.mark.filterwarnings("ignore:.*which is slower")
def test_a_module_that_knows_one_dtype_is_tried_in_that():
    class Short(Net):
        def middle(self, h):
            if h.dtype != torch.float32:
                raise TypeError("float32 only")
            return torch.relu(h)

    nets = Nets(Short(), initial_rows(Short, range(3)))
    found, _ = plain(Short, nets.rows, x := torch.randn(5, 4), False)
    torch.testing.assert_close(nets.outputs(x), found)


def test_steps_without_a_gradient_are_compared_by_their_values():
    class Rounds(Net):
        def forward(self, x):
            return super().forward(x).detach()

    nets = Nets(Rounds(), initial_rows(Rounds, range(3)))
    assert nets.outputs(torch.randn(5, 4)).shape == (3, 5, 3)
    assert nets.batched.way() == "interpreted"


STRIDED = nn.Sequential(nn.Conv2d(4, 8, 1, 2), nn.Flatten(), nn.Linear(8, 2))


@pytest.mark.parametrize(
    ("module", "may"),
    [
        (STRIDED, False),
        (ResNet((3, 32, 32), 10, channels=(4, 4, 8, 8)), False),
        (nn.Sequential(nn.GroupNorm(1, 3), nn.Conv2d(3, 4, 3)), False),
        (ResNet((3, 32, 32), 10, channels=(16, 16, 32, 64)), True),
        (LeNetLike((3, 32, 32), 10), True),
    ],
)
def test_channels_lie_innermost_where_that_ruins_no_memory(module, may):
    assert may_lie_innermost(module) is may


TRAIN = """
import torch
from netspace_lite import *
y = torch.arange(128) % 10
images = Images(torch.randn(128, 3, 32, 32), y)
data = ImageData("noise", images, images[:20], images[20:40], 10)
net = ResNet((3, 32, 32), 10, channels=(4, 4, 8, 8))
zoo = train_zoo(net, ImageTask(data, 128), [Recipe(i, 6) for i in range(2)], progress=False)
assert zoo.losses.isfinite().all()
"""


def test_small_nets_on_large_images_train_in_a_process_that_lives():
    """Seen before: oneDNN's backward wrote beyond its memory, and the process died."""
    done = subprocess.run([sys.executable, "-c", TRAIN], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_one_module_is_a_zoo_of_one_net():
    """Seen before: a Sequential was taken for a list of modules, its layers for nets."""
    zoo = Zoo.from_modules(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    assert (len(zoo), zoo.layout.size) == (1, 40)
    nets = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    assert len(Zoo.from_modules(nets)) == 2


def test_training_equals_plain_pytorch_where_gradients_are_of_the_users_own():
    recipes = [Recipe(seed, 12, 1e-2, 0.0) for seed in range(2)]
    with pytest.warns(UserWarning, match="runs one net after the other"):
        zoo = train_zoo(StraightThrough, Sums(), recipes, progress=False)
    for n, recipe in enumerate(recipes):
        torch.manual_seed(recipe.seed)
        net = StraightThrough()
        adam = torch.optim.AdamW(net.parameters(), recipe.lr, weight_decay=0.0)
        for step in range(recipe.steps):
            x, y = Sums().batch(recipes, None, step)
            adam.zero_grad()
            (net(x[n]) - y[n]).square().mean().backward()
            adam.step()
        wanted = nn.utils.parameters_to_vector(net.parameters()).detach()
        torch.testing.assert_close(zoo.rows[n], wanted, rtol=1e-4, atol=1e-5)


class ZeroHead(NoGradient):
    """As many nets begin: nothing passes the head in the first step."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)


def test_a_head_of_zeros_hides_nothing():
    """Seen before: what lies before it was trained, though it has no gradient."""
    batched, x = Batched(ZeroHead()), torch.randn(3, 7, 4)
    with pytest.warns(UserWarning, match="ZeroHead runs through torch.func.vmap"):
        batched(initial_rows(ZeroHead, range(3)).requires_grad_(), x, per_net=True)
    rows = torch.randn(3, batched.layout.size, requires_grad=True)
    (grad,) = torch.autograd.grad(batched(rows, x, per_net=True).sum(), rows)
    assert not grad[:, : 6 * 4 + 6].any()


class NamesItself(Net):
    def __init__(self):
        super().__init__()
        self.steps = [lambda x: self.first(x), torch.relu]

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return self.last(x)


def test_functions_that_name_the_first_module_are_refused():
    """Seen before: all nets answered with the first layer of one."""
    with pytest.raises(ValueError, match="copies of a NamesItself use parameters of the first"):
        random_nets(NamesItself(), 3).outputs(torch.randn(5, 4))


class Limits(Net):
    """Scales all samples alike, once one of them is large."""

    def middle(self, h):
        return h / h.abs().max().clamp_min(100.0)


def modules_answer(nets, x, per_net=False):
    with torch.no_grad():
        return torch.stack([nets.to_module(n)(x[n] if per_net else x) for n in range(len(nets))])


@pytest.mark.parametrize("per_net", [False, True])
def test_a_threshold_hides_no_mixing_of_samples(per_net):
    """Seen before: interpreted, so that large answers of one net changed the others'."""
    nets, x = random_nets(Limits(), 3), torch.randn(*[3] * per_net, 20, 4, generator=generator())
    with pytest.warns(UserWarning, match="Limits runs through torch.func.vmap"):
        nets(x, per_net)
    for own in (x, 1000 * x):
        found = nets.outputs(own, per_net, samples=6)  # asked whole all the same
        torch.testing.assert_close(found, modules_answer(nets, own, per_net))


class LastRounded(Net):
    """Its last layer in bf16, which nothing shows in fp64."""

    rounded = True

    def forward(self, x):
        h = torch.relu(self.first(x))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.rounded):
            return self.last(h).to(x.dtype)


class LastExact(LastRounded):
    rounded = False


def test_autocast_inside_of_a_forward_counts():
    """Seen before: it vanished in the trace, and with it from the fingerprint."""
    nets, x = random_nets(LastRounded(), 3), torch.randn(20, 4, generator=generator())
    with pytest.warns(UserWarning, match="it turns gradients or autocast on or off"):
        found = nets(x)
    LastExact.__qualname__ = LastRounded.__qualname__
    exact = Nets(LastExact(), nets.rows)
    torch.testing.assert_close(found, modules_answer(nets, x), rtol=2**-6, atol=0.1)
    assert (found - exact(x)).abs().max() > 0.02
    assert nets.fingerprint != exact.fingerprint


class Contrast(Net):
    """Of sequences [B, T, 4] each for itself; of points [B, 4] all together."""

    def forward(self, x):
        return super().forward(x - x.mean(-2, keepdim=True))


@pytest.mark.filterwarnings("ignore:.*which is slower")
def test_inputs_of_other_axes_are_tried_anew():
    """Seen before: points were asked in blocks, since sequences may be."""
    nets = random_nets(Contrast(), 3)
    sequences, points = torch.randn(8, 5, 4), torch.randn(20, 4)
    for x in (sequences, points, sequences):
        torch.testing.assert_close(nets.outputs(x, samples=6), modules_answer(nets, x))


class Bounded(nn.Module):
    """Subclasses bound their answers at 7, which inputs of size 1 don't show."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)


class PartInPlace(Bounded):
    def forward(self, x):
        out = self.layer(x)
        out[:, 2:].clamp_(-7, 7)
        return out


class ViewTakenBefore(Bounded):
    def forward(self, x):
        out = self.layer(x)
        part = out[:, 2:]
        out.clamp_(-7, 7)
        return part


class AsksForTensors(Bounded):
    def forward(self, x):
        return self.layer(x.clamp(-7, 7) if isinstance(x, torch.Tensor) else x)


class Patched(Bounded):
    def __init__(self):
        super().__init__()
        self.layer.forward = MethodType(bounded_linear, self.layer)

    def forward(self, x):
        return self.layer(x)


def bounded_linear(layer, x):
    return nn.functional.linear(x, layer.weight, layer.bias).clamp(-7, 7)


class Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return g.clamp(-2, 2)


class ClipsGradients(Bounded):
    def forward(self, x):
        return Clip.apply(self.layer(x))


@pytest.mark.parametrize(
    "make", [PartInPlace, ViewTakenBefore, AsksForTensors, Patched, ClipsGradients]
)
def test_thresholds_that_the_first_inputs_do_not_reach_count(make):
    """Seen before: interpreted, so that larger inputs had answers or gradients without them."""
    nets, x = random_nets(make(), 3), torch.randn(9, 4, generator=generator())
    with pytest.warns(UserWarning, match=f"{make.__name__} runs"):
        nets(x)
    rows = nets.rows.clone().requires_grad_()
    found = nets.batched(rows, 100 * x)
    answers, expected = plain(make, nets.rows, 100 * x, False)
    torch.testing.assert_close(found, answers, rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(found.square().sum(), rows)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-2)


class OwnStatistics(nn.Module):
    """A batch norm in a plain tensor, which only evaluation reads."""

    def __init__(self, keeps):
        super().__init__()
        self.layer, self.mean, self.keeps = nn.Linear(4, 3), torch.zeros(3), keeps

    def forward(self, x):
        h = self.layer(x)
        if self.training and self.keeps:
            self.mean = 0.9 * self.mean + 0.1 * h.mean(0).detach()
        self.seen = h  # to be looked at; no answer depends on it
        return h - self.mean


def test_statistics_in_plain_tensors_are_refused():
    """Seen before: all nets were scored with the zeros that they started from."""
    x = torch.randn(2, 5, 4, generator=generator())
    for keeps in (False, True):
        batched = Batched(OwnStatistics(keeps))
        rows = random_nets(batched.module, 2).rows
        if keeps:
            with pytest.raises(ValueError, match="changes its 'mean' as it runs"):
                batched(rows, x, True, batched.initial_running(2))
        else:
            out = batched(rows, x, True, batched.initial_running(2))
            torch.testing.assert_close(out, looped(batched.module, rows, x, per_net=True))


class Noisy(Net):
    """Random in training: it can be compared only from the same seed."""

    def middle(self, h):
        h = h + 1e-3 * torch.randn_like(h) if self.training else h
        return self.inner(h)


class NoisyListed(Noisy):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.listed = [self.weight]

    def inner(self, h):
        return torch.tanh(h @ self.listed[0])


class NoisyRecomputed(NoisyListed):
    def inner(self, h):
        return checkpoint(lambda h: torch.tanh(h @ self.weight), h, use_reentrant=False)


class NoisyInner(NoisyListed):
    def inner(self, h):
        return torch.tanh(h @ self.weight)


def test_random_modules_are_compared_from_the_same_seed():
    """Seen before: they weren't, and trained with the weights or gradients of another net."""
    x = torch.randn(2, 9, 4, generator=generator())
    for make, said in ((NoisyListed, "other answers or gradients"), (NoisyRecomputed, "other")):
        batched = Batched(make())
        with pytest.raises(ValueError, match=said):
            batched(random_nets(make(), 2).rows, x, True, batched.initial_running(2))
    batched, rows = Batched(NoisyInner()), random_nets(NoisyInner(), 2).rows
    with pytest.warns(UserWarning, match="NoisyInner runs through torch.func.vmap"):
        out = batched(rows, x, True, batched.initial_running(2))
    torch.testing.assert_close(out, looped(NoisyInner().eval(), rows, x, True), rtol=0.1, atol=0.1)


def test_a_function_that_names_a_tied_weight_is_refused():
    """Seen before: only where the copy's own weight was not used as well."""
    net = Net()
    net.middle = lambda h: torch.tanh(h @ net.first.weight) @ net.first.weight.T
    with pytest.raises(ValueError, match="copies of a Net use parameters of the first"):
        random_nets(net, 3).outputs(torch.randn(5, 4))


class Caches(Net):
    """Keeps what it computed of its weight until it is trained again."""

    kept = None

    def forward(self, x):
        if self.training:
            return x @ self.first.weight.T
        self.kept = self.first.weight.detach() if self.kept is None else self.kept
        return x @ self.kept.T


def test_a_filled_cache_of_weights_is_refused():
    """Seen before: it answered for all nets."""
    net = Caches().eval()
    net(torch.randn(5, 4))
    with pytest.raises(ValueError, match="a Caches answers without its parameters"):
        random_nets(net, 3).outputs(torch.randn(5, 4))


class Uneven(Net):
    """A large value beside a share of the batch."""

    def forward(self, x):
        h = super().forward(x)
        return torch.cat([1e6 * h[:, :1], h[:, 1:].softmax(0)], 1)


def test_small_columns_beside_large_ones_are_compared():
    """Seen before: within rounding of the large ones, so that nets' samples were mixed."""
    nets, x = random_nets(Uneven(), 3), torch.randn(16, 4, generator=generator())
    with pytest.warns(UserWarning, match="Uneven runs through torch.func.vmap"):
        found = nets(x)
    torch.testing.assert_close(found[..., 1:], modules_answer(nets, x)[..., 1:])


@pytest.mark.parametrize("fill", [torch.zeros, torch.ones])
@pytest.mark.filterwarnings("ignore:.*which is slower")
def test_first_inputs_that_are_alike_settle_nothing(fill):
    """Seen before: after a first call on zeros samples were asked in blocks, or mixed nets."""
    norm = nn.BatchNorm1d(6, track_running_stats=False)
    nets = random_nets(nn.Sequential(nn.Linear(4, 6), norm, nn.ReLU(), nn.Linear(6, 3)).eval(), 3)
    nets(fill(8, 4))
    x = torch.randn(20, 4, generator=generator()).cumsum(0)
    torch.testing.assert_close(nets.outputs(x, samples=6), modules_answer(nets, x))
    centred, own = random_nets(Contrast(), 3), torch.randn(3, 8, 4, generator=generator())
    centred(fill(3, 8, 4), per_net=True)
    torch.testing.assert_close(centred(own, per_net=True), modules_answer(centred, own, True))


class Columns(nn.Module):
    """Column 0 is one of 100 users, column 1 one of 3 items."""

    def __init__(self):
        super().__init__()
        self.user, self.item, self.last = nn.Embedding(100, 4), nn.Embedding(3, 4), nn.Linear(8, 2)

    def forward(self, x):
        x = x.long()
        return self.last(torch.cat([self.user(x[:, 0]), self.item(x[:, 1])], 1))


@pytest.mark.parametrize("dtype", [torch.long, torch.float32])
@pytest.mark.filterwarnings("ignore:.*which is slower")
def test_columns_of_categories_stay_in_their_columns(dtype):
    """Seen before: IndexError of inputs that nobody gave."""
    nets = random_nets(Columns(), 2)
    for x in (torch.tensor([[99, 2], [5, 0], [70, 1]]), torch.tensor([[99, 2]])):
        x = x.to(dtype)
        torch.testing.assert_close(nets(x), modules_answer(nets, x))
        own = x.expand(2, *x.shape)
        torch.testing.assert_close(nets(own, per_net=True), modules_answer(nets, own, True))


class Force(Net):
    """Minus the gradient of an energy."""

    def forward(self, x):
        x = x.requires_grad_()
        energy = torch.tanh(self.first(x)).square().sum()
        return -torch.autograd.grad(energy, x, create_graph=True)[0] + 0 * self.last.bias.sum()


@pytest.mark.filterwarnings("ignore:.*which is slower")
def test_nets_that_need_a_gradient_to_answer_run():
    """Seen before: "does not require grad", where their modules run."""
    nets, x = random_nets(Force(), 2), torch.randn(5, 4, generator=generator())
    expected = torch.stack([nets.to_module(n)(x.clone()) for n in range(2)])
    torch.testing.assert_close(nets(x), expected)


class Squeezed(Net):
    def forward(self, x):
        return super().forward(x).squeeze()


@pytest.mark.filterwarnings("ignore:.*which is slower")
def test_no_block_is_one_sample_alone():
    """Seen before: an error where one was left over for the last block."""
    nets, x = random_nets(Squeezed(), 1), torch.randn(13, 4, generator=generator())
    torch.testing.assert_close(nets.outputs(x, samples=6), modules_answer(nets, x))


class Locked(Net):
    """The same units of all samples drop out."""

    def middle(self, h):
        return h * nn.functional.dropout(torch.ones_like(h[:1]), 0.5, self.training)


def test_each_net_drops_units_of_its_own():
    """Seen before: drawn once for all nets."""
    batched, x = Batched(Locked()), torch.randn(5, 4, generator=generator())
    rows = random_nets(Locked(), 1).rows.repeat(4, 1)
    with pytest.warns(UserWarning, match="Locked runs through torch.func.vmap"):
        out = batched(rows, x.expand(4, 5, 4), True, batched.initial_running(4))
    assert not torch.equal(out[0], out[3])


class Moves(Net):
    """A constant moved to where its input is, and statistics that no answer needs."""

    def __init__(self):
        super().__init__()
        self.register_buffer("gain", torch.linspace(1, 2, 6))
        self.places = torch.arange(6.0)

    def middle(self, h):
        self.load, self.loss = h.mean(0), h.abs().mean()
        return torch.relu(h * self.gain.to(h) + self.places.to(h.device))


class Nothing(Net):
    def forward(self, x):
        return super().forward(x)[:, :0]


class Taught(Net):
    """Another net beside it, in a list of each copy's own."""

    def __init__(self):
        super().__init__()
        self.beside = [nn.Linear(4, 6)]

    def middle(self, h):
        return torch.relu(h + self.beside[0].weight.sum())


@pytest.mark.parametrize("per_net", [False, True])
@pytest.mark.filterwarnings("ignore:.*which is slower")
def test_what_is_harmless_runs_as_it_did(per_net):
    """Neither refused nor one by one: constants, statistics, no outputs, nets in lists, steps."""
    x = torch.randn(*[5] * per_net, 7, 4, generator=generator())
    for make in (Moves, Nothing, Taught):
        nets = random_nets(make(), 5)
        torch.testing.assert_close(nets(x, per_net), modules_answer(nets, x, per_net))
        assert nets.batched.way(per_net=per_net) == "interpreted"
    logits = random_nets(nn.Sequential(nn.Linear(4, 3), Least()), 5)
    assert torch.equal(logits(x, per_net), modules_answer(logits, x, per_net))


class Least(nn.Module):
    def forward(self, x):
        return (x > -50).float()
