"""What all ops share: precision, autocast, devices, fp64, and derivatives of derivatives."""

import contextlib
import importlib

import numpy as np
import pytest
import torch
from netspace_lite.kernels import (
    backend,
    batched_conv2d,
    batched_linear,
    chunk_pack,
    common,
    distillation_loss,
    siren_mlp,
)
from netspace_lite.kernels.siren_mlp import siren_params
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


def ops(device="cpu", dtype=torch.float32):
    """name -> (op of one tensor, that tensor): each op on small tensors."""
    weights = [torch.randn(s, device=device, dtype=dtype) for s in ((2, 5, 4), (2, 5, 4, 3, 3))]
    points = torch.randn(6, 3, device=device, dtype=dtype)
    targets = torch.randn(3, 7, device=device, dtype=dtype)
    std = torch.rand(2, 10, device=device) + 0.5
    return {
        "linear": (lambda x: batched_linear(x, weights[0]), torch.randn(2, 3, 4)),
        "conv2d": (lambda x: batched_conv2d(x, weights[1]), torch.randn(3, 2, 4, 5, 5)),
        "siren": (
            lambda rows: siren_mlp(points, rows, 4, 1.0),
            torch.randn(2, siren_params(4)) / 3,
        ),
        "loss": (lambda z: distillation_loss(z, targets), torch.randn(2, 3, 7)),
        "pack": (lambda rows: chunk_pack(rows, 2, 10, std, std), torch.randn(2, 17)),
    }


NAMES = list(ops())


@pytest.fixture
def named_op(request, device):
    op, x = ops(device)[request.param]
    return request.param, op, x.to(device)


def test_default_precision_is_one_rule(exact):
    """cuDNN's setting, which the fixture puts back, for all layers; a name is taken as it is."""
    for chosen, expected in (("tf32", "tf32"), ("ieee", "ieee"), ("none", "ieee")):
        torch.backends.cudnn.conv.fp32_precision = chosen
        assert common.fp32_precision() == expected
        assert common.fp32_precision("ieee") == "ieee"
        assert common.fp32_precision("tf32") == "tf32"
    with pytest.raises(ValueError, match="None, 'ieee' or 'tf32', not 'fp8'"):
        common.fp32_precision("fp8")


@pytest.mark.parametrize("name", ["linear", "conv2d", "siren"])
def test_every_layer_asks_the_rule(monkeypatch, device, name):
    names = {"linear": "batched_linear", "conv2d": "batched_conv2d", "siren": "siren_mlp"}
    owner, asked = importlib.import_module(f"netspace_lite.kernels.{names[name]}"), []
    monkeypatch.setattr(owner, "fp32_precision", lambda p=None: asked.append(p) or "ieee")
    op, x = ops(device)[name]
    with backend("triton"):
        op(x.to(device))
    assert asked
    assert set(asked) <= {None, "ieee"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("named_op", ["linear", "conv2d", "siren"], indirect=True)
def test_autocast(device, named_op, name, dtype):
    """Layers run in autocast's dtype, and their gradients come back in the leaves'."""
    _, op, x = named_op
    x.requires_grad_()
    with backend(name), torch.autocast(device, dtype):
        y = op(x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert x.grad.dtype == torch.float32
    with backend(name):
        torch.testing.assert_close(y.float(), op(x), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_autocast_of_losses_and_mixed_inputs(device, name):
    """The loss is computed in fp32; a layer takes what the layer before it made."""
    z, t = torch.randn(2, 3, 4, device=device).bfloat16(), torch.randn(3, 4, device=device)
    x, w = torch.randn(2, 3, 4, device=device).bfloat16(), torch.randn(2, 5, 4, device=device)
    with backend(name), torch.autocast(device, torch.bfloat16):
        assert distillation_loss(z, t).dtype == torch.float32
        assert batched_linear(x, w).dtype == torch.bfloat16


@pytest.mark.parametrize("named_op", NAMES, indirect=True)
def test_launches_on_the_device_of_its_inputs(monkeypatch, named_op):
    """With several GPUs the current one may be another than the tensors'."""
    _, op, x = named_op
    guarded, device_of = [], torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda t: guarded.append(t) or device_of(t))
    with backend("triton"):
        op(x.requires_grad_()).sum().backward()
    assert len(guarded) == 2  # forward and backward
    assert all(t.device == x.device for t in guarded)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", NAMES)
def test_second_gpu(name):
    op, x = ops("cuda:1")[name]
    with torch.cuda.device(0), backend("triton"):
        assert op(x.to("cuda:1")).device.index == 1


def test_fp64_is_not_for_the_kernels(device):
    """`auto` gives fp64 to PyTorch, and asking for Triton says that it would lose digits."""
    x, w = (
        torch.randn(2, 3, 4, device=device).double(),
        torch.randn(2, 5, 4, device=device).double(),
    )
    torch.testing.assert_close(batched_linear(x, w), torch.bmm(x, w.mT))
    with backend("triton"), pytest.raises(RuntimeError, match="chosen for fp64.*add in fp32"):
        batched_linear(x, w)


@pytest.mark.parametrize("named_op", [n for n in NAMES if n != "pack"], indirect=True)
def test_once_differentiable(named_op):
    """A second derivative through the kernels is an error, never a number that lacks a part."""
    _, op, x = named_op
    x.requires_grad_()
    with backend("triton"):
        (grad,) = torch.autograd.grad(op(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='are differentiable once.*under backend."torch"'):
        (grad.square().sum() + x.square().sum()).backward()
    with backend("torch"):  # the references can be differentiated as often as one likes
        (grad,) = torch.autograd.grad(op(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()


def test_default_precision_under_torch_compile(device):
    """The rule is read when the graph is compiled; it breaks no graph."""
    x, rows = torch.randn(5, 3, device=device), torch.randn(2, siren_params(4), device=device) / 3
    with backend("triton"):
        compiled = torch.compile(siren_mlp, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, rows, 4), siren_mlp(x, rows, 4))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # jvp's own use of it
@pytest.mark.parametrize("named_op", [n for n in NAMES if n != "pack"], indirect=True)
def test_forward_derivatives(named_op):
    """The kernels have none, so PyTorch gives them, not zeros."""
    _, op, x = named_op
    way, found = torch.linspace(-1, 2, x.numel()).to(x).view_as(x), []
    for name in ("torch", "triton"):
        with backend(name):
            found.append(torch.func.jvp(op, (x,), (way,))[1])
    assert found[0].abs().max() > 0
    torch.testing.assert_close(*found)


class Seen(TorchDispatchMode):
    """The ops of this package that pass through PyTorch's dispatcher inside the block."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops += [op] if op.namespace == "netspace_lite" else []
        return op(*args, **(kwargs or {}))


def steps_back(y):
    """Names of all that autograd would go through from here."""
    names, nodes = set(), [y.grad_fn]
    while nodes:
        node = nodes.pop()
        names.add(node.name())
        nodes += [before for before, _ in node.next_functions if before is not None]
    return names


@pytest.mark.parametrize("named_op", [n for n in NAMES if n != "pack"], indirect=True)
def test_launched_directly_or_as_an_op(named_op):
    """Calls that nobody watches go round the op: the same answers and gradients, bit for bit."""
    _, op, x = named_op
    found = []
    for watch in (contextlib.nullcontext(), Seen()):
        with backend("triton"), watch:
            y = op(x.requires_grad_())
            found += [y, *torch.autograd.grad(y.square().sum(), x, retain_graph=True)]
        assert ("DirectBackward" in steps_back(y)) == (type(watch) is not Seen)
    assert len(watch.ops) == 2  # forward and backward
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


class Unmoved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, g):
        return None


@pytest.mark.parametrize("watch", [contextlib.nullcontext, lambda: Seen()], ids=["direct", "op"])
@pytest.mark.parametrize("named_op", ["linear", "conv2d", "loss"], indirect=True)
def test_no_zeros_for_results_without_a_gradient(named_op, watch):
    """They can be as large as all of a net's values, and would be filled in each backward."""
    _, op, x = named_op
    with backend("triton"), watch():
        y = op(x.requires_grad_())
        with torch.profiler.profile() as profile:
            y.backward(torch.ones_like(y))
    made = {event.name for event in profile.events()}
    assert any("backward" in name.lower() for name in made)
    assert not [name for name in made if name.startswith("aten::zero")]
    x.grad = None
    with backend("triton"), watch():
        Unmoved.apply(op(x)).sum().backward()
    assert x.grad is None


def test_memory_that_is_not_what_it_says(device):
    """A tensor may be the negative of what lies in its memory, and yet count as contiguous."""
    x, w = torch.randn(2, 4, 1, device=device), torch.randn(2, 5, 1, device=device)
    negative = torch.complex(torch.zeros_like(x), x).conj().imag
    assert negative.is_neg()
    with backend("triton"):
        assert torch.equal(batched_linear(negative, w), batched_linear(-x, w))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of a loop, which it is
def test_vmap_over_kernels(device):
    x, w = torch.randn(3, 2, 4, 6, device=device), torch.randn(2, 5, 6, device=device)
    with backend("triton"):
        found = torch.func.vmap(lambda x: batched_linear(x, w))(x)
        assert torch.equal(found, torch.stack([batched_linear(one, w) for one in x]))


def test_numbers_of_numpy(device):
    """They leave nothing behind for calls with plain numbers, which count as equal."""
    x, w = torch.randn(1, 2, 3, 7, 7, device=device), torch.randn(2, 4, 3, 3, 3, device=device)
    with backend("triton"):
        found = [batched_conv2d(x, w, stride=s) for s in (tuple(np.array([2, 2])), 2, (2, 2))]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("named_op", [n for n in NAMES if n != "pack"], indirect=True)
def test_tensors_without_values(named_op):
    """Fake tensors have shapes only: the op answers them, and nothing is launched."""
    _, op, x = named_op
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, backend("triton"):
        y = op(mode.from_tensor(x))
    assert y.shape == op(x).shape
