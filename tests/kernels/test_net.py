"""A whole small net in one kernel: against plain modules in fp64; what is left to the layers."""

import importlib

import pytest
import torch
from netspace_lite.kernels import backend
from netspace_lite.kernels.backend import INTERPRETED
from netspace_lite.kernels.net import net
from netspace_lite.kernels.plan import NOTHING, plan_of
from netspace_lite.kernels.trace import traced
from torch import nn
from toy import looped

from netspace_lite import Batched, batching
from netspace_lite.architectures import Sine, lite_net

kernels = importlib.import_module("netspace_lite.kernels.net")
DIGIT = (1, 8, 8)


class Branches(nn.Module):
    """Sums of two and three values, one of them the inputs, and an activation on its own."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.activation = nn.ReLU()

    def forward(self, x):
        y = self.one(x) + x
        z = self.activation(y)
        return self.last(self.two(z) + y + z)


def pooled(pool, sides):
    """An odd image, a window of two strides and two paddings, no bias, a pool that cuts off."""
    convolution = nn.Conv2d(2, 5, (3, 2), (2, 1), (1, 0), bias=False)
    return nn.Sequential(
        nn.AvgPool2d(1), convolution, nn.ReLU(), pool, nn.Flatten(), nn.Linear(5 * sides, 3)
    )


def nets():
    """Name -> module and shape of a sample; the same weights whichever tests run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            "one layer": (nn.Linear(5, 3), (5,)),
            "mlp": (
                nn.Sequential(nn.Linear(5, 40), nn.LeakyReLU(), nn.Linear(40, 3), nn.ReLU()),
                (5,),
            ),
            "sines": (
                nn.Sequential(nn.Linear(2, 20), Sine(3.0), nn.Linear(20, 4), Sine(2.0)),
                (2,),
            ),
            "branches": (Branches(), (6,)),
            "pool": (pooled(nn.AvgPool2d((2, 3)), 2 * 2), (2, 9, 8)),
            "mean": (pooled(nn.AdaptiveAvgPool2d(1), 1), (2, 7, 5)),
            "image": (
                nn.Sequential(nn.Conv2d(1, 2, 3), nn.LeakyReLU(0.2), nn.Conv2d(2, 3, 2)),
                (1, 6, 5),
            ),
            **{n: (lite_net(n, DIGIT, 10), DIGIT) for n in ("LeNetLike", "VanillaCNN", "ResNet8")},
            "ResNet14": (lite_net("ResNet14", DIGIT, 10), DIGIT),
        }


NETS = nets()


def plan_for(module, image):
    batched = Batched(module)
    return batched._mode(torch.zeros(1), False).plan(batched.layout, torch.Size(image))


def rows_for(module, nets):
    """Nets near the module as it was initialised, within longer rows."""
    row = torch.cat([p.detach().flatten() for p in module.parameters()])
    return torch.cat([torch.randn(nets, 3), row + 0.1 * row.std() * torch.randn(nets, len(row))], 1)


@pytest.fixture
def assert_equal_loop(assert_close, device):
    """Answers and each parameter's gradient against a loop over the plain modules in fp64."""

    def check(module, image, nets, samples, per_net, dtype=torch.float32, precision="ieee"):
        rows = rows_for(module, nets).to(dtype)
        x = torch.randn(*(nets,) * per_net, samples, *image).to(dtype)
        plan, layout = plan_for(module, image), Batched(module).layout
        given = rows.to(device).requires_grad_()
        found = net(x.to(device).flatten(1 + per_net), given[:, 3:], plan, precision)
        exact = rows.double().requires_grad_()
        expected = looped(module.double(), exact[:, 3:], x.double(), per_net)
        module.float()
        mode = "bf16" if dtype == torch.bfloat16 else precision
        assert_close("answers", found, expected, mode)
        g = torch.randn(expected.shape).to(dtype)
        (grad,) = torch.autograd.grad(found, given, g.to(device))
        (wanted,) = torch.autograd.grad(expected, exact, g.double())
        assert (grad[:, :3] == 0).all()
        for name, view in layout.views(grad[:, 3:]).items():
            assert_close(f"gradient of {name}", view, layout.views(wanted[:, 3:])[name], mode)

    return check


@pytest.mark.parametrize("per_net", [False, True], ids=["shared", "per_net"])
@pytest.mark.parametrize("name", NETS)
def test_equals_plain_modules(assert_equal_loop, name, per_net):
    assert_equal_loop(*NETS[name], 2, 5, per_net)


@pytest.mark.parametrize("samples", [1, 16, 37])
@pytest.mark.parametrize("programs", [1, 384], ids=["one a net", "many"])
def test_samples_of_several_programs(assert_equal_loop, monkeypatch, samples, programs):
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    assert_equal_loop(*NETS["LeNetLike"], 3, samples, False)
    assert_equal_loop(*NETS["branches"], 2, samples, True)


@pytest.mark.parametrize(
    ("nets", "samples", "part"),
    [
        (1, 1, 1),
        (1, 100, 15),  # 7 programs: fewer than 384, but a tensor core's rows each
        (192, 128, 64),
        (384, 128, 128),
        (1000, 5000, 1000),  # offsets in 32 bits
    ],
)
def test_samples_of_a_program(nets, samples, part):
    assert kernels._part(nets, samples) == part


@pytest.mark.parametrize("name", ["mlp", "sines"])
def test_tf32_and_bf16(assert_equal_loop, name):
    assert_equal_loop(*NETS[name], 2, 19, False, precision="tf32")
    assert_equal_loop(*NETS[name], 2, 19, True, torch.bfloat16)


@pytest.mark.parametrize("name", ["mlp", "sines", "LeNetLike", "VanillaCNN", "ResNet8"])
def test_bf16_rounds_where_the_layers_do(assert_close, monkeypatch, device, name):
    """In deep nets fp64 meets other signs of leaky ReLU; the layers' kernels don't."""
    (module, image), batched = NETS[name], Batched(NETS[name][0])
    rows, x = rows_for(module, 2)[:, 3:].bfloat16(), torch.randn(2, 7, *image).bfloat16()
    rows, found = rows.to(device).requires_grad_(), []
    for _ in range(2):
        with backend("triton"):
            y = batched(rows, x.to(device), True)
            found.append((y, *torch.autograd.grad(y.float().square().sum(), rows)))
        monkeypatch.setattr(batching, "translate", lambda *args: None)
        batched._modes.clear()
    for part, whole, layers in zip(("answers", "gradient"), *found, strict=True):
        assert_close(part, whole, layers.cpu().float())


def test_values_are_kept_only_for_a_gradient(monkeypatch, device):
    """The same answers, with a scratch of 16 samples for each program."""
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    module, image = NETS["ResNet8"]
    rows, x = rows_for(module, 1)[:, 3:].to(device), torch.randn(19, 64, device=device)
    plan = plan_for(module, image)
    kept, few = (kernels.launch_forward(x, rows, plan.text, k, "ieee") for k in (True, False))
    torch.testing.assert_close(kept[0], few[0])
    assert kept[1].shape == (1, 19, plan.values)
    assert few[1].shape == (1, 16, plan.values)


# ------------------------------------------------------------------------------------ in `Batched`


@pytest.fixture
def calls(monkeypatch):
    """Arguments of each call of `net` by `Batched`."""
    seen = []
    monkeypatch.setattr(batching, "net", lambda *args: seen.append(args) or net(*args))
    return seen


@pytest.mark.parametrize("per_net", [False, True], ids=["shared", "per_net"])
def test_batched_takes_it(assert_close, device, calls, per_net):
    module, image = NETS["LeNetLike"]
    batched, rows = Batched(module), rows_for(module, 2)[:, 3:].to(device)
    x = torch.randn(*(2,) * per_net, 5, *image, device=device)
    with backend("triton"):
        found = batched(rows, x, per_net)
    assert_close("answers", found, looped(module, rows, x, per_net).cpu(), "tf32")
    assert len(calls) == 1
    assert batched.way(False, per_net) == "interpreted"


class Twice(nn.Module):
    """One layer's weights in two places."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(self.layer(x))


class Branch(nn.Module):
    """A value changed in place that another step reads."""

    def __init__(self):
        super().__init__()
        self.layer, self.activation = nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.layer(x)
        return self.activation(y) + y


OUTSIDE = {
    "activation": (nn.Sequential(nn.Linear(4, 4), nn.Tanh()), (4,)),
    "norm": (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), (4,)),
    "maximum": (nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2)), (1, 6, 6)),
    "overlap": (nn.Sequential(nn.Conv2d(1, 2, 3), nn.AvgPool2d(3, 1)), (1, 6, 6)),
    "groups": (nn.Conv2d(2, 2, 3, groups=2), (2, 6, 6)),
    "tokens": (nn.Linear(4, 3), (2, 4)),
    "weights in two places": (Twice(), (4,)),
    "in place": (Branch(), (4,)),
    "wide": (nn.Linear(4, 2045), (4,)),
    "long": (nn.Sequential(*(nn.Linear(2, 2) for _ in range(33))), (2,)),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_others_run_layer_by_layer(assert_close, device, calls, name):
    module, image = OUTSIDE[name]
    rows, x = rows_for(module, 2)[:, 3:].to(device), torch.randn(3, *image, device=device)
    assert plan_for(module, image) is None
    with backend("triton"):
        found = Batched(module)(rows, x)
    assert_close("answers", found, looped(module, rows, x).cpu(), "tf32")
    assert not calls


def test_limits_are_within_reach():
    assert plan_for(nn.Linear(4, 2044), (4,)) is not None
    deep = nn.Sequential(*(nn.Linear(2, 2) for _ in range(32)))
    assert len(plan_for(deep, (2,)).steps) == 32


def test_inputs_with_a_gradient_run_layer_by_layer(assert_close, device, calls):
    module, image = NETS["mlp"]
    rows, x = rows_for(module, 2)[:, 3:], torch.randn(3, *image)
    given, exact = (x.clone().to(d).requires_grad_() for d in (device, torch.float64))
    with backend("triton"):
        Batched(module)(rows.to(device), given).square().sum().backward()
    looped(module.double(), rows.double(), exact).square().sum().backward()
    module.float()
    assert_close("gradient of x", given.grad, exact.grad, "tf32")
    assert not calls


def test_cpu_stays_as_it_is(calls):
    module, image = NETS["mlp"]
    Batched(module)(rows_for(module, 2)[:, 3:], torch.randn(3, *image))
    assert not calls


@pytest.mark.skipif(not INTERPRETED, reason="programs are seen in the interpreter")
@pytest.mark.parametrize(("name", "before"), [("LeNetLike", (4, 7)), ("ResNet8", (10, 19))])
def test_one_launch_forward_and_one_backward(monkeypatch, name, before):
    """The layers' kernels take one a layer forward, and two backward but for the first."""
    module, image = NETS[name]
    rows, x = rows_for(module, 2)[:, 3:].requires_grad_(), torch.randn(5, *image)

    def launches():
        with backend("triton"):
            with traced() as forward:
                y = Batched(module)(rows, x)
            with traced() as backward:
                y.sum().backward()
        return tuple(sum(p.index == (0, 0, 0) for p in each) for each in (forward, backward))

    assert launches() == (1, 1)
    monkeypatch.setattr(batching, "translate", lambda *args: None)
    assert launches() == before


# --------------------------------------------------------------------------------- plans and the op


def test_plan_of_a_residual_net():
    plan = plan_for(*NETS["ResNet8"])
    kinds = [step.kind for step in plan.steps]
    assert (kinds.count("layer"), kinds.count("sum"), kinds.count("pool")) == (10, 3, 1)
    assert plan.inputs == 64
    assert plan.answer == (10,)
    assert all(step.act for step in plan.steps if step.kind == "sum")
    assert sum(step.add or step.add_other for step in plan.steps) == 3  # where a branch began
    assert all((step.other != NOTHING) == (step.kind == "sum") for step in plan.steps)


def test_a_plan_is_known_by_its_text():
    plan = plan_for(*NETS["pool"])
    assert plan_of(plan.text) is plan
    assert plan_for(*NETS["pool"]) is plan
    assert plan_for(*NETS["mean"]) is not plan


def operands(device, name="mlp"):
    module, image = NETS[name]
    rows = rows_for(module, 2)[:, 3:].to(device).requires_grad_()
    return torch.randn(5, *image, device=device), rows, plan_for(module, image)


def test_differentiable_once(device):
    x, rows, plan = operands(device)
    (grad,) = torch.autograd.grad(net(x, rows, plan).square().sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match=r'differentiable once.*under backend\("torch"\)'):
        grad.sum().backward()


def test_bad_input(device):
    x, rows, plan = operands(device)
    with pytest.raises(ValueError, match=r"x \[5, 4\] must be .* I = 5"):
        net(x[:, 1:], rows, plan)
    with pytest.raises(ValueError, match=r"rows \[2, 362\] must be \[N, P\] .* P = 363"):
        net(x, rows[:, 1:], plan)
    with pytest.raises(ValueError, match="must be contiguous"):
        net(x, rows.detach().T.contiguous().T, plan)
    with pytest.raises(ValueError, match=r"must be torch.float32 on"):
        net(x.double(), rows, plan)


def test_fp64_is_not_for_the_kernels(device):
    module, image = NETS["mlp"]
    rows, x = rows_for(module, 2)[:, 3:].double().to(device), torch.randn(3, *image, device=device)
    with backend("triton"), pytest.raises(RuntimeError, match="chosen for fp64.*add in fp32"):
        Batched(module)(rows, x.double())


def test_autocast(device):
    x, rows, plan = operands(device)
    with torch.autocast(device, torch.bfloat16):
        y = net(x, rows, plan)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert rows.grad.dtype == torch.float32


def test_torch_compile(device):
    x, rows, plan = operands(device)

    def loss(rows):
        return net(x, rows, plan, "ieee").square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found, expected = (torch.autograd.grad(f(rows), rows)[0] for f in (compiled, loss))
    torch.testing.assert_close(found, expected)


def test_opcheck(device):
    x, rows, plan = operands(device)
    torch.library.opcheck(torch.ops.netspace_lite.net.default, (x, rows, plan.text, True, "ieee"))


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_called(assert_close, exact, device, hook):
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).to(device)

    def doubled(layer, given, out=None):
        return given[0] * 2 if out is None else out * 2

    getattr(module[1], hook)(doubled)
    batched = Batched(module)
    rows, x = torch.randn(2, batched.layout.size, device=device), torch.randn(5, 3, device=device)
    with backend("triton"), pytest.warns(match="it has hooks"):
        assert_close(hook, batched(rows, x), looped(module, rows, x))


def test_a_value_may_be_added_to_itself_flattened(assert_close, exact, device):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            y = self.first(x)
            return self.last(y + y.flatten(1))

    batched, x = Batched(Twice().to(device)), torch.randn(5, 3, device=device)
    rows, found = torch.randn(2, batched.layout.size, device=device, requires_grad=True), []
    for name in ("torch", "triton"):
        with backend(name):
            found += torch.autograd.grad(batched(rows, x).square().sum(), rows)
    assert_close("gradient", *found)
