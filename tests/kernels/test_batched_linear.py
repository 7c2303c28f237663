"""batched_linear: Triton against the fp64 reference, and the reference against modules."""

import pytest
import torch
from netspace_lite.kernels import backend, batched_linear
from netspace_lite.kernels import batched_linear as op
from netspace_lite.kernels.batched_linear import batched_linear_reference
from torch import nn

SHAPES = [(2, 32, 32, 32), (3, 7, 5, 11), (1, 1, 1, 1), (2, 37, 70, 41), (2, 3, 1, 33)]
ACTIVATIONS = [None, "leaky_relu", "sine"]


def rows_for(nets, inner, out, pad=3, dtype=torch.float32):
    return torch.randn(nets, pad + out * inner + out).to(dtype)


def views(rows, inner, out, pad=3):
    nets, end = len(rows), pad + out * inner
    return rows[:, pad:end].view(nets, out, inner), rows[:, end : end + out]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shared", [False, True], ids=["per_net", "shared"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}B{}I{}O{}".format(*s))
def test_matches_reference(assert_matches, shape, shared, activation):
    nets, samples, inner, out = shape

    def apply(linear, x, rows):
        x = x if shared else x.transpose(0, 1)
        return linear(x, *views(rows, inner, out), activation, 0.1, 2.0)

    x = torch.randn(samples, inner) if shared else torch.randn(samples, nets, inner)
    assert_matches(
        lambda x, rows: apply(lambda *a: op(*a, precision="ieee"), x, rows),
        lambda x, rows: apply(batched_linear_reference, x, rows),
        x=x,
        rows=rows_for(nets, inner, out) / inner**0.5,
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bf16_accumulates_in_fp32(assert_matches, activation):
    x = torch.randn(3, 40, 70).bfloat16()
    rows = rows_for(3, 70, 20, dtype=torch.bfloat16) / 16

    def apply(linear, x, rows):
        return linear(x, *views(rows, 70, 20), activation)

    assert_matches(
        lambda x, rows: apply(op, x, rows),
        lambda x, rows: apply(batched_linear_reference, x, rows),
        x=x,
        rows=rows,
    )


def test_without_bias(assert_matches):
    assert_matches(
        lambda x, w: op(x, w, precision="ieee"),
        lambda x, w: batched_linear_reference(x, w),
        x=torch.randn(2, 5, 7),
        w=torch.randn(2, 3, 7),
    )


def test_samples_innermost(assert_matches):
    """Inputs `[N, I, B]` in memory, seen as `[N, B, I]`: as convolutions on a CPU leave them."""
    assert_matches(
        lambda x, w: op(x.mT, w, activation="leaky_relu", precision="ieee"),
        lambda x, w: batched_linear_reference(x.mT, w, activation="leaky_relu"),
        x=torch.randn(2, 7, 40),
        w=torch.randn(2, 3, 7),
    )


def test_reference_equals_modules():
    nets = [nn.Linear(7, 5) for _ in range(3)]
    x = torch.randn(3, 4, 7)
    weight = torch.stack([net.weight for net in nets])
    bias = torch.stack([net.bias for net in nets])
    with backend("torch"):
        y = batched_linear(x, weight, bias, "leaky_relu", slope=0.2)
    for n, net in enumerate(nets):
        torch.testing.assert_close(y[n], nn.functional.leaky_relu(net(x[n]), 0.2))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_what_lies_samples_innermost_stays_so(bias):
    """As `cpu.py` leaves images: outputs and gradients lie alike, and nobody turns them."""
    x, weight = torch.randn(3, 7, 5).double(), torch.randn(3, 4, 7).double()
    bias = torch.randn(3, 4).double() if bias else None
    inner, outer = x.mT.detach().requires_grad_(), x.mT.contiguous().requires_grad_()
    found, expected = (batched_linear_reference(x, weight, bias) for x in (inner, outer))
    torch.testing.assert_close(found, expected)
    grad, wanted = (
        torch.autograd.grad(y.sum(), x)[0] for y, x in ((found, inner), (expected, outer))
    )
    torch.testing.assert_close(grad, wanted)
    assert found.stride(1) == grad.stride(1) == 1


def test_finite_differences(assert_gradient):
    """The kernel's own gradient against differences of its own outputs."""
    assert_gradient(
        lambda x, w, b: batched_linear(x, w, b, "sine", precision="ieee"),
        x=torch.randn(2, 3, 4),
        w=torch.randn(2, 2, 4),
        b=torch.randn(2, 2),
    )


def test_result_is_sample_major(device):
    with backend("triton"):
        y = batched_linear(torch.randn(3, 5, 7, device=device), torch.randn(3, 4, 7, device=device))
    assert y.transpose(0, 1).is_contiguous()


x, w, b = torch.randn(2, 3, 4), torch.randn(2, 5, 4), torch.randn(2, 5)
BAD = {
    "rank": (
        (x[0, 0], w, b),
        r"x \[4\] must be \[B, I\] or \[N, B, I\] .* where N = 2",
    ),
    "nets": ((torch.randn(3, 3, 4), w, b), r"x \[3, 3, 4\] must be .* where N = 2, O = 5, I = 4"),
    "inner": ((torch.randn(2, 3, 7), w, b), r"x \[2, 3, 7\] must be .* I = 4"),
    "bias": ((x, w, b[:, :4]), r"bias \[2, 4\] must be \[N, O\] .* N = 2, O = 5"),
    "dtype": (
        (x.double(), w, b),
        "must be torch.float32 on cpu, .* got torch.float64",
    ),
    "integers": (
        (x.long(), w.long(), b.long()),
        r"weight .* must be floating, got torch.int64",
    ),
    "device": ((x.to("meta"), w, b), "x .* must be torch.float32 on cpu, .* on meta"),
    "rows": ((x, w.mT.contiguous().mT, b), r"weight \[2, 5, 4\] \(strides .* must be contiguous"),
    "no nets": ((x[:0], w[:0], b[:0]), r"weight \[0, 5, 4\] .* no axis empty"),
    "no samples": ((x[:, :0], w, b), r"x \[2, 0, 4\] .* no axis empty"),
    "activation": ((x, w, b, "relu"), "activation must be one of .* not 'relu'"),
    "slope": ((x, w, b, "leaky_relu", -1), "must not be negative"),
}


@pytest.mark.parametrize(("args", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_bad_input(name, args, message):
    with backend(name), pytest.raises(ValueError, match=message):
        batched_linear(*args)


def test_unknown_precision(device):
    with backend("triton"), pytest.raises(ValueError, match="'ieee' or 'tf32', not 'fp8'"):
        batched_linear(x.to(device), w.to(device), precision="fp8")


@pytest.mark.parametrize("activation", ["leaky_relu", "sine"])
def test_opcheck(device, activation):
    """The op sees a convolution of images of one pixel."""
    x = torch.randn(3, 2, 4, 1, 1, device=device, requires_grad=True)
    w = torch.randn(2, 5, 4, 1, 1, device=device, requires_grad=True)
    b = torch.randn(2, 5, device=device, requires_grad=True)
    args = (x, w, b, [1, 1], [0, 0], ACTIVATIONS.index(activation), 0.1, 2.0, "ieee")
    torch.library.opcheck(torch.ops.netspace_lite.layer.default, args)


def test_torch_func_composes():
    """Per-sample gradients through the PyTorch path: vmap over grad."""
    x, w = torch.randn(6, 2, 3, 4), torch.randn(2, 5, 4)

    def loss(w, x):
        return batched_linear(x, w, activation="sine").square().sum()

    with backend("torch"):
        each = torch.func.vmap(torch.func.grad(loss), (None, 0))(w, x)
        torch.testing.assert_close(each[2], torch.func.grad(loss)(w, x[2]))
