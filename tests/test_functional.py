"""Many nets at once against a loop over plain modules, in fp64, values and gradients."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from netspace_lite.architectures import ResNet, Siren, lite_net
from netspace_lite.functional import Batched, Nets
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


class Attention(nn.Module):
    """Has parameters outside Linear and Conv2d, so it has to fall back."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2).repeat(1, 1, 2) + self.token
        return self.head(self.attention(x, x, x)[0].mean(1))


class MixesSamples(nn.Module):
    """Centres each batch: traceable, but no longer per sample."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        y = self.linear(x)
        return y - y.mean(0)


class UsesBatchSize(nn.Module):
    """Reshapes with the batch size of the shared input."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.linear = nn.Linear(12, 3)

    def forward(self, x):
        return self.linear(self.conv(x).view(x.shape[0], -1))


CASES = {
    "LeNetLike": (lambda: lite_net("LeNetLike", (1, 8, 8), 10), (1, 8, 8)),
    "VanillaCNN": (lambda: lite_net("VanillaCNN", (1, 8, 8), 10), (1, 8, 8)),
    "ResNet8": (lambda: ResNet((3, 8, 8), 5, channels=(4, 4, 8, 8)), (3, 8, 8)),
    "user module": (UserResidual, (2, 7, 7)),
    "linear": (lambda: nn.Sequential(nn.Linear(4, 3)), (4,)),
    "Siren": (lambda: Siren(16), (3,)),
}
FALLBACKS = {
    "attention": (Attention, (2, 3, 3)),
    "mixes samples": (MixesSamples, (4,)),
    "uses the batch size": (UsesBatchSize, (2, 4, 4)),
}


def looped(module, rows, x, per_net):
    """The oracle: one functional call of the plain module after the other."""
    states = Layout.of(module).unpack(rows)
    return torch.stack(
        [functional_call(module, s, (x[n] if per_net else x,)) for n, s in enumerate(states)]
    )


def check_against_loop(module, shape, per_net, nets=3, samples=5):
    torch.manual_seed(0)
    module = module.double()
    layout = Layout.of(module)
    rows = torch.randn(nets, layout.size, dtype=torch.double) * 0.3
    x = torch.randn(*([nets] if per_net else []), samples, *shape, dtype=torch.double)
    found, expected = [], []
    for results, run in ((found, Batched(module)), (expected, None)):
        r, inputs = rows.clone().requires_grad_(), x.clone().requires_grad_()
        out = run(r, inputs, per_net) if run else looped(module, r, inputs, per_net)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.double).view_as(out)
        results += [out, *torch.autograd.grad((out * weight).sum(), (r, inputs))]
    for name, f, e in zip(("outputs", "rows' grad", "inputs' grad"), found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("per_net", [False, True], ids=["shared", "per net"])
@pytest.mark.parametrize("case", CASES)
def test_equals_a_loop_over_modules(case, per_net):
    make, shape = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none of these may fall back
        check_against_loop(make(), shape, per_net)


@pytest.mark.parametrize("case", FALLBACKS)
def test_what_cannot_be_batched_falls_back_and_says_so(case):
    make, shape = FALLBACKS[case]
    with pytest.warns(UserWarning, match="runs through torch.func.vmap"):
        check_against_loop(make(), shape, per_net=False)


@pytest.mark.parametrize("per_net", [False, True], ids=["shared", "per net"])
@pytest.mark.parametrize("step", [1, 2])
def test_few_nets_at_a_time_equal_a_loop_too(monkeypatch, step, per_net):
    monkeypatch.setattr("netspace_lite.functional.nets_per_block", lambda inputs: step)
    check_against_loop(lite_net("ResNet8", (1, 8, 8), 10), (1, 8, 8), per_net)


def test_one_net_and_one_sample():
    check_against_loop(lite_net("ResNet8", (1, 8, 8), 10), (1, 8, 8), False, nets=1, samples=1)


def test_the_warning_comes_once():
    batched, rows = Batched(Attention()), torch.randn(2, Layout.of(Attention()).size)
    x = torch.randn(2, 2, 3, 3)
    with pytest.warns(UserWarning, match="vmap"):
        batched(rows, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batched(rows, x)


def test_rows_may_be_strided():
    module = lite_net("LeNetLike", (1, 8, 8), 10)
    layout = Layout.of(module)
    wide = torch.randn(4, layout.size + 13)
    x = torch.randn(3, 1, 8, 8)
    rows = wide[:, : layout.size]
    torch.testing.assert_close(Batched(module)(rows, x), Batched(module)(rows.contiguous(), x))


def zoo_of(count=40):
    torch.manual_seed(0)
    module = lite_net("LeNetLike", (1, 8, 8), 10)
    layout = Layout.of(module)
    return Nets(module, layout.pack([copy.deepcopy(module) for _ in range(count)]))


def test_blocks_of_nets_and_samples_change_nothing():
    module = lite_net("LeNetLike", (1, 8, 8), 10)
    nets = Nets(module, torch.randn(40, Layout.of(module).size) * 0.1)
    x = torch.randn(11, 1, 8, 8)
    torch.testing.assert_close(nets.outputs(x, samples=4), nets(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_net_leaves_the_batch_as_a_plain_module_and_as_a_file(tmp_path):
    module = lite_net("LeNetLike", (1, 8, 8), 10)
    nets = Nets(module, torch.randn(5, Layout.of(module).size) * 0.1)
    x = torch.randn(6, 1, 8, 8)
    together = nets.logits(x)
    torch.testing.assert_close(nets.to_module(3)(x), together[3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(nets[-1].to_module()(x), together[4], rtol=1e-4, atol=1e-5)
    nets.export(tmp_path / "net.safetensors", 2)
    from safetensors.torch import load_file

    module.load_state_dict(load_file(tmp_path / "net.safetensors"))
    torch.testing.assert_close(module(x), together[2], rtol=1e-4, atol=1e-5)


def test_accuracy_counts_right_answers():
    class Images:
        x = torch.eye(3)
        y = torch.tensor([0, 1, 0])

    nets = Nets(nn.Sequential(nn.Linear(3, 3, bias=False)), torch.eye(3).flatten()[None])
    assert nets.accuracy(Images).item() == pytest.approx(200 / 3)


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
