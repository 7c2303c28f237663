"""Many nets at once against a loop over plain modules, in fp64, values and gradients."""

import copy
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toy import MixesSamples, check_training_step, generator, looped, mlp, random_nets

from netspace_lite.architectures import ResNet, Siren, lite_net
from netspace_lite.batching import Batched, _Mode
from netspace_lite.folding import fold_batchnorm
from netspace_lite.layout import Layout


class UserResidual(nn.Module):
    """A user's own module: functions, methods, skips, concatenation, tokens, depthwise layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=6)
        self.mix = nn.Conv2d(8, 5, 1)
        self.tokens = nn.Linear(5, 4)
        self.head = nn.Linear(4 * 9, 3)
        self.register_buffer("shift", torch.tensor([0.5]))

    def forward(self, x):
        y = F.relu(self.stem(x) + self.shift)
        y = y + torch.tanh(self.depthwise(y))
        y = self.mix(torch.cat([x, y], dim=1))
        y = F.adaptive_avg_pool2d(y, 3).flatten(2).transpose(1, 2)  # [B, 9, 5]
        return self.head(self.tokens(y).mul(2).flatten(1))


class UsesBatchSize(nn.Module):
    """Reshapes with the batch size of the shared input."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.linear = nn.Linear(12, 3)

    def forward(self, x):
        return self.linear(self.conv(x).view(x.shape[0], -1))


class Attention(nn.Module):
    """Has parameters outside the layers that carry many nets."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2).repeat(1, 1, 2) + self.token
        return self.head(self.attention(x, x, x)[0].mean(1))


class Decides(nn.Module):
    """Data-dependent control flow on what the nets answer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        y = self.first(x)
        return y if y.sum() > 0 else self.second(x)


class OwnSiren(Siren):
    """A SIREN that answers something else."""

    def forward(self, points):
        return self.layers(points).abs()


CASES = {
    "LeNetLike": (lambda: lite_net("LeNetLike", (1, 8, 8), 10), (1, 8, 8)),
    "VanillaCNN": (lambda: lite_net("VanillaCNN", (1, 8, 8), 10), (1, 8, 8)),
    "ResNet8": (lambda: ResNet((3, 8, 8), 5, channels=(4, 4, 8, 8)), (3, 8, 8)),
    "user module": (UserResidual, (2, 7, 7)),
    "linear": (lambda: nn.Sequential(nn.Linear(4, 3)), (4,)),
    "a bare layer": (lambda: nn.Linear(4, 3), (4,)),
    "a bare convolution": (lambda: nn.Conv2d(2, 3, 3), (2, 5, 5)),
    "Siren": (lambda: Siren(16), (3,)),
    "Siren's subclass": (lambda: OwnSiren(16), (3,)),
    "Siren, points in groups": (lambda: Siren(16), (4, 3)),  # not each net's own
    "sine after a convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), Siren(4).layers[1]),
        (2, 5, 5),
    ),
}
WAYS = {
    "attention": (Attention, (2, 3, 3), "vmap", "can't be traced"),
    "mixes samples": (MixesSamples, (4,), "vmap", "mix samples"),
    "uses the batch size": (UsesBatchSize, (2, 4, 4), "vmap", "batch size|sizes"),
    "decides": (Decides, (4,), "loop", "data-dependent|control flow"),
}


def check_against_loop(module, shape, per_net, nets=3, samples=5):
    torch.manual_seed(0)
    module = module.double()
    rows = torch.randn(nets, Layout.of(module).size, dtype=torch.double) * 0.3
    x = torch.randn(*([nets] if per_net else []), samples, *shape, dtype=torch.double)
    found, expected = [], []
    batched = Batched(module)
    for results, run in ((found, batched), (expected, lambda *args: looped(module, *args))):
        r, inputs = rows.clone().requires_grad_(), x.clone().requires_grad_()
        out = run(r, inputs, per_net)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.double).view_as(out)
        results += [out, *torch.autograd.grad((out * weight).sum(), (r, inputs))]
    for name, f, e in zip(("outputs", "rows' grad", "inputs' grad"), found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    return batched


@pytest.mark.parametrize("per_net", [False, True], ids=["shared", "per net"])
@pytest.mark.parametrize("case", CASES)
def test_equals_a_loop_over_modules(case, per_net):
    make, shape = CASES[case]
    batched = check_against_loop(make(), shape, per_net)  # warnings are errors: none falls back
    way = batched.way(per_net=per_net)
    assert way == ("interpreted" if case != "Siren" else None)  # a kernel of its own


@pytest.mark.parametrize("per_net", [False, True], ids=["shared", "per net"])
@pytest.mark.parametrize("case", WAYS)
def test_what_cannot_be_interpreted_goes_on_and_says_why(case, per_net):
    make, shape, way, reason = WAYS[case]
    if case == "uses the batch size" and per_net:  # where it is the size of the folded batch
        assert check_against_loop(make(), shape, per_net).way(per_net=True) == "interpreted"
        return
    with pytest.warns(UserWarning, match="slower") as said:
        batched = check_against_loop(make(), shape, per_net)
    assert batched.way(per_net=per_net) == way
    (text,) = (str(warning.message) for warning in said)
    assert ("through torch.func.vmap" in text) == (way == "vmap")
    assert ("one net after the other" in text) == (way == "loop")
    assert re.search(reason, text)


@pytest.mark.parametrize("per_net", [False, True], ids=["shared", "per net"])
@pytest.mark.parametrize("step", [1, 2])
def test_few_nets_at_a_time_equal_a_loop_too(monkeypatch, step, per_net):
    monkeypatch.setattr("netspace_lite.batching.nets_per_block", lambda inputs: step)
    check_against_loop(lite_net("ResNet8", (1, 8, 8), 10), (1, 8, 8), per_net)


@pytest.mark.filterwarnings("ignore:Attention runs")
@pytest.mark.parametrize("per_net", [False, True], ids=["shared", "per net"])
def test_vmap_takes_few_nets_at_a_time(monkeypatch, per_net):
    """Seen before: 32 nets on 1,500 images of 196 tokens took all of 24 GB, and the kernel died."""
    monkeypatch.setattr("netspace_lite.batching.VMAPPED", 2 * 5 * 2 * 3 * 3)  # two nets' inputs
    seen, vmapped = [], _Mode.vmap
    monkeypatch.setattr(
        _Mode, "vmap", lambda mode, views, *x: seen.append(views) or vmapped(mode, views, *x)
    )
    check_against_loop(Attention(), (2, 3, 3), per_net)
    sizes = [len(next(iter(views.values()))) for views in seen]
    assert sizes == [2, 2, 1]  # two to choose a way, three in two blocks


class Viewed(nn.Module):
    """A user's flatten without parameters, which takes memory as a convolution left it."""

    def forward(self, x):
        return x.view(len(x), -1)


class Strided(nn.Module):
    """Reads memory as it lies, which is wrong without a word where it lies otherwise."""

    def forward(self, x):
        return torch.as_strided(x, (len(x), x[0].numel()), (x.stride(0), 1))


@pytest.mark.parametrize("per_net", [False, True], ids=["shared", "per net"])
@pytest.mark.parametrize("flatten", [nn.Flatten, Viewed, Strided])
def test_a_net_alone_has_channels_innermost_where_its_steps_allow_it(flatten, per_net):
    """One net on these images fills the caches: it is run as its module, and so must equal it."""
    layers = nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 6, 3), flatten(), nn.Linear(1014, 4)
    module, seen = nn.Sequential(*layers), []
    batched, rows = Batched(module), random_nets(module, 2, scale=0.1).rows
    mode = batched._mode(rows, False)
    mode.module[1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    x = torch.randn(2, 30, 3, 32, 32) if per_net else torch.randn(30, 3, 32, 32)
    rows.requires_grad_()
    found, expected = batched(rows, x, per_net), looped(module, rows, x, per_net)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    grads = (torch.autograd.grad(y.square().sum(), rows)[0] for y in (found, expected))
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)
    assert batched.way(False, per_net) == "interpreted"
    innermost = seen[-1].is_contiguous(memory_format=torch.channels_last)
    assert innermost == (flatten is nn.Flatten)


class Rereads(nn.Module):
    """Activations of which some give what nothing else reads, and others what is read again."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
        self.only, self.again, self.of_sum = nn.LeakyReLU(), nn.ReLU(), nn.ReLU()
        self.twice, self.flat, self.of_power = nn.ReLU(), nn.LeakyReLU(0), nn.ReLU()

    def forward(self, x):
        y = self.flat(self.two(self.only(self.one(x))))
        y = self.two(self.twice(y)[..., 2:, 2:] + self.twice(self.two(y)))
        y = self.of_sum(self.again(y) + y)
        return self.out(self.of_power((self.two(y) / 9).exp()).mean((2, 3)))


def test_activations_overwrite_only_what_nothing_else_reads():
    """A net alone on large images: written over, what a sum or a gradient needs would be wrong."""
    module = Rereads()
    batched, rows = Batched(module), random_nets(module, 2, scale=0.2).rows.requires_grad_()
    x = torch.randn(30, 3, 32, 32)
    kept = x.clone()
    found, expected = batched(rows, x), looped(module, rows, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    grads = (torch.autograd.grad(y.square().sum(), rows)[0] for y in (found, expected))
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)
    mode = batched._mode(rows, False)
    assert mode.may_reorder
    assert mode.overwriting == ["only", "of_sum"]
    assert torch.equal(copy.deepcopy(batched)(rows, x), batched(rows, x))
    assert torch.equal(x, kept)
    assert not any(getattr(part, "inplace", False) for part in mode.module.modules())


def test_what_dropout_writes_over_is_nobody_elses():
    """Seen before: no gradient, as an activation in place keeps its result for that."""
    layers = nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.1), nn.Dropout(0.1, inplace=True)
    module = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))
    batched, rows = Batched(module), random_nets(module, 2).rows.requires_grad_()
    out = batched(rows, torch.randn(2, 64, 3, 32, 32), True, torch.empty(2, 0))
    assert torch.autograd.grad(out.sum(), rows)[0].isfinite().all()
    assert batched._mode(rows, True).may_reorder


def test_one_net_and_one_sample():
    check_against_loop(lite_net("ResNet8", (1, 8, 8), 10), (1, 8, 8), False, nets=1, samples=1)


def test_the_warning_comes_once():
    batched, nets = Batched(Attention()), random_nets(Attention(), 2)
    x = torch.randn(2, 2, 3, 3)
    with pytest.warns(UserWarning, match="vmap"):
        batched(nets.rows, x)
    batched(nets.rows, x)  # warnings are errors


def test_rows_may_be_strided():
    module = lite_net("LeNetLike", (1, 8, 8), 10)
    size = Layout.of(module).size
    rows = torch.randn(4, size + 13)[:, :size]
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(Batched(module)(rows, x), Batched(module)(rows.contiguous(), x))


@pytest.mark.parametrize("training", [False, True], ids=["evaluated", "training"])
@pytest.mark.parametrize("case", [*CASES, *WAYS])
def test_the_module_is_left_in_its_mode(case, training):
    """Seen before: a failing self-check left it in evaluation mode."""
    make, shape, *_ = {**CASES, **WAYS}[case]
    module = make().train(training)
    batched = Batched(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batched(random_nets(module, 2).rows, torch.randn(2, *shape))
    assert all(part.training == training for part in module.modules())
    assert not any(part.training for part in batched.module.modules())


@pytest.mark.parametrize("case", [*CASES, *WAYS])
def test_every_dtype_takes_the_same_way(case):
    make, shape, *_ = {**CASES, **WAYS}[case]
    module, ways = make(), {}
    rows, x = random_nets(module, 3, scale=0.3).rows, torch.randn(4, *shape, generator=generator())
    exact = looped(copy.deepcopy(module).double(), rows.double(), x.double())
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if case in WAYS else "error")
            batched = Batched(module)
            out = batched(rows.to(dtype), x.to(dtype))
        assert out.dtype == dtype
        ways[dtype] = batched.way()
        if case != "decides":  # rounding may decide otherwise
            alone = looped(copy.deepcopy(module).to(dtype), rows.to(dtype), x.to(dtype))
            error, usual = ((y.double() - exact).square().mean().sqrt() for y in (out, alone))
            assert error <= 3 * usual + 1e-13, (dtype, error, usual)
    assert len(set(ways.values())) == 1, ways


def test_one_batched_takes_every_dtype_in_turn():
    batched, rows = Batched(UserResidual()), random_nets(UserResidual(), 2, scale=0.3).rows
    x = torch.randn(3, 2, 7, 7)
    outputs = [batched(rows.to(t), x.to(t)).double() for t in (torch.float32, torch.float64)]
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)


def batch_normed():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4, momentum=0.3),
        nn.Flatten(), nn.Linear(36, 5), nn.BatchNorm1d(5, affine=False),
    )  # fmt: skip


@pytest.mark.parametrize("per_net", [False, True], ids=["shared", "per net"])
@pytest.mark.parametrize("step", [1, 2, 32])
def test_batch_norms_train_like_modules_in_training_mode(monkeypatch, per_net, step):
    """Outputs, gradients and running statistics, each net its own, over two steps."""
    monkeypatch.setattr("netspace_lite.batching.nets_per_block", lambda inputs: step)
    module = batch_normed().double()
    batched, rows = Batched(module), random_nets(module, 3).rows.double()
    running = batched.initial_running(3).double()
    modules = [copy.deepcopy(module).train() for _ in rows]
    for net, state in zip(modules, Layout.of(module).unpack(rows), strict=True):
        net.load_state_dict(state, strict=False)
    for step in range(2):
        x = torch.randn(*([3] if per_net else []), 6, 2, 5, 5, dtype=torch.double)
        weights = rows.clone().requires_grad_()
        found = batched(weights, x, per_net, running)
        (grad,) = torch.autograd.grad(found.square().sum(), weights)
        for n, net in enumerate(modules):
            net.zero_grad()
            expected = net(x[n] if per_net else x)
            expected.square().sum().backward()
            torch.testing.assert_close(found[n], expected)
            wanted = torch.cat([p.grad.flatten() for p in net.parameters()])
            torch.testing.assert_close(grad[n], wanted, rtol=1e-6, atol=1e-8)
            statistics = dict(net.named_buffers())
            for name, view in batched.running.views(running).items():
                torch.testing.assert_close(view[n], statistics[name], msg=f"{name} at {step}")
    assert batched.way(training=True, per_net=per_net) == "interpreted"


ACTIVATIONS = nn.ReLU(), nn.LeakyReLU(0.3), nn.Tanh(), nn.GELU(), nn.Softplus(), Siren(4).layers[1]


@st.composite
def stacks(draw):
    """A module of random layers on images of 2×7×6."""
    layers, shape = [], (2, 7, 6)
    for kind in draw(
        st.lists(st.sampled_from(["convolution", "norm", "activation", "pool"]), max_size=6)
    ):
        c, whole = shape[0], draw(st.booleans())
        if kind == "convolution":
            groups = c if draw(st.booleans()) else 1
            outputs, window, dilation = (
                groups * draw(st.integers(1, 3)),
                draw(st.integers(1, 3)),
                draw(st.integers(1, 2)),
            )
            sizes = window, draw(st.integers(1, 2)), dilation, dilation  # stride, padding
            layers.append(nn.Conv2d(c, outputs, *sizes, groups=groups, bias=whole))
        elif kind == "norm":
            norms = [nn.BatchNorm2d(c, affine=whole), nn.GroupNorm(c if whole else 1, c)]
            norms += [nn.InstanceNorm2d(c, affine=whole), nn.LayerNorm(shape[2 - whole * 2 :])]
            layers.append(draw(st.sampled_from(norms[: 4 if min(shape[1:]) > 1 else 2])))
        elif kind == "activation":
            layers.append(draw(st.sampled_from(ACTIVATIONS)))
        else:
            layers.append(nn.AdaptiveAvgPool2d(2) if whole else nn.Upsample(scale_factor=2))
        shape = nn.Sequential(*layers).eval()(torch.zeros(1, 2, 7, 6)).shape[1:]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(shape.numel() if layers else 84, 3))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(stacks(), st.booleans())
def test_random_stacks_of_layers_equal_loops(module, per_net):
    for norm in [m for m in module if isinstance(m, nn.BatchNorm2d)]:
        nn.init.normal_(norm.running_mean)
    batched = check_against_loop(fold_batchnorm(module), (2, 7, 6), per_net)
    assert batched.way(per_net=per_net) == "interpreted"
    batched = check_training_step(module, torch.randn(*[3] * per_net, 5, 2, 7, 6), per_net)
    assert batched.way(training=True, per_net=per_net) == "interpreted"


def test_batch_norms_cannot_answer_from_rows_alone():
    module = batch_normed()
    with pytest.raises(ValueError, match=r"fold_batchnorm\(module\) first"):
        Batched(module)(random_nets(module, 2).rows, torch.zeros(3, 2, 5, 5))
    folded = fold_batchnorm(module)
    check_against_loop(folded, (2, 5, 5), per_net=False)


@pytest.mark.parametrize("per_net", [False, True], ids=["shared", "per net"])
def test_dropout_drops_in_training_and_only_there(per_net):
    module = nn.Sequential(nn.Linear(50, 40, bias=False), nn.Dropout(0.25)).train()
    batched, rows = Batched(module), torch.ones(8, 2000)
    x = torch.full((8, 6, 50) if per_net else (6, 50), 0.02)
    torch.testing.assert_close(batched(rows, x, per_net), torch.ones(8, 6, 40))
    torch.manual_seed(0)
    trained = batched(rows, x, per_net, running=torch.empty(8, 0))
    dropped = trained == 0
    torch.testing.assert_close(trained[~dropped], torch.full_like(trained[~dropped], 4 / 3))
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=0.04)
    assert len(dropped.flatten(0, 1).unique(dim=0)) == 48  # each sample of each net its own
    assert batched.way(training=True, per_net=per_net) == "interpreted"


def test_each_net_drops_shared_inputs_its_own_way():
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(50, 50, bias=False))
    rows = torch.eye(50).flatten().expand(4, -1)
    trained = Batched(module)(rows, torch.ones(3, 50), running=torch.empty(4, 0))
    assert len(trained.flatten(0, 1).unique(dim=0)) == 12


class CentresAndDrops(MixesSamples):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return super().forward(self.dropout(x))


def test_dropout_hides_no_mixing_of_samples():
    """Random answers can't be compared, but the way is still found out."""
    nets, x = random_nets(CentresAndDrops(), 3), torch.randn(3, 6, 4)
    batched = Batched(CentresAndDrops())
    with pytest.warns(UserWarning, match="slower"):
        trained = batched(nets.rows, x, True, torch.empty(3, 0))
    assert batched.way(training=True, per_net=True) == "vmap"
    torch.testing.assert_close(trained.mean(1), torch.zeros(3, 3), atol=1e-6, rtol=0)


def test_choosing_a_way_draws_nothing():
    """The first call tries out ways, and leaves random numbers as they were."""
    module, drawn = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)), []
    batched, rows, x = Batched(module), random_nets(module, 3).rows, torch.randn(5, 4)
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append(batched(rows, x, running=torch.empty(3, 0)))
    assert torch.equal(*drawn)


def test_a_nan_net_does_not_decide_the_way():
    module = mlp(nn.ReLU())
    batched, rows, x = Batched(module), random_nets(module, 3).rows.clone(), torch.randn(2, 4)
    rows[0] = torch.nan
    out = batched(rows, x)
    assert batched.way() == "interpreted"
    assert out.isnan().flatten(1).any(1).tolist() == [True, False, False]


def test_a_module_of_several_outputs_is_refused():
    with pytest.raises(ValueError, match="returns a tuple, not one tensor"):
        Batched(nn.GRU(4, 3))(random_nets(nn.GRU(4, 3), 2).rows, torch.zeros(2, 5, 4))


def test_bad_input_is_refused_in_a_sentence():
    batched = Batched(nn.Sequential(nn.Linear(4, 3)))
    rows = torch.zeros(2, 15)
    with pytest.raises(ValueError, match=r"should be \[N, 15\]"):
        batched(torch.zeros(2, 14), torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"inputs are torch.float64.*convert one"):
        batched(rows, torch.zeros(1, 4, dtype=torch.double))
    with pytest.raises(ValueError, match="should start with 2 nets"):
        batched(rows, torch.zeros(3, 1, 4), per_net=True)
    with pytest.raises(ValueError, match="hold no samples"):
        batched(rows, torch.zeros(0, 4))


class MixesLate(MixesSamples):
    """Its answers depend on each other in large batches only."""

    def forward(self, x):
        y = self.linear(x)
        return y.clamp(max=y.mean() + 2.8 * y.std())  # out of reach of nine values


def test_what_mixes_samples_is_found_where_few_samples_hide_it():
    module, x = MixesLate(), torch.randn(300, 4, generator=generator(3))
    nets = random_nets(module, 5)
    with pytest.warns(UserWarning, match="mix samples"):
        answers = nets.outputs(x)
    torch.testing.assert_close(answers, looped(module, nets.rows, x))


def test_tokens_are_inputs_and_arrays_are_not():
    module = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 3))
    nets, tokens = random_nets(module, 3), torch.randint(7, (5, 3), generator=generator())
    with pytest.warns(UserWarning, match="slower"):
        answers = nets.outputs(tokens)
    torch.testing.assert_close(answers, looped(module, nets.rows, tokens))
    with pytest.raises(ValueError, match="inputs are a ndarray: give a tensor"):
        nets.outputs(tokens.numpy())
