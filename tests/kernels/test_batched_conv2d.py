"""batched_conv2d: Triton and the CPU path against the fp64 reference, reference against modules."""

import warnings

import pytest
import torch
from netspace_lite.kernels import backend, batched_conv2d
from netspace_lite.kernels import batched_conv2d as op
from netspace_lite.kernels.batched_conv2d import batched_conv2d_reference
from netspace_lite.kernels.cpu import (
    UnfoldedConv2d,
    channels_last,
    nets_per_block,
    prefers_unfolding,
)
from torch import nn

# nets, samples, channels in and out, height, width, kernel (h, w), stride, padding
CASES = {
    "aligned": (2, 2, 8, 16, 8, 8, (3, 3), 1, 1),
    "odd": (3, 5, 3, 7, 7, 5, (3, 3), 2, 1),
    "ones": (1, 1, 1, 1, 1, 1, (1, 1), 1, 0),
    "lenet": (2, 3, 3, 6, 12, 12, (5, 5), 2, 0),
    "shortcut": (2, 2, 16, 18, 6, 6, (1, 1), 2, 0),
    "uneven": (2, 2, 2, 3, 9, 6, (3, 2), (3, 1), (0, 1)),
    "wide steps": (2, 2, 3, 2, 11, 10, (2, 3), (3, 4), (2, 1)),
}


def rows_for(case, dtype=torch.float32):
    nets, _, inner, out, _, _, (kh, kw), _, _ = case
    return (torch.randn(nets, 5 + out * inner * kh * kw + out) / (inner * kh * kw) ** 0.5).to(dtype)


def apply(conv, x, rows, case, *args, **kwargs):
    nets, _, inner, out, _, _, kernel, stride, padding = case
    end = rows.shape[1] - out
    weight = rows[:, 5:end].view(nets, out, inner, *kernel)
    return conv(x, weight, rows[:, end:], stride, padding, *args, **kwargs)


def images(case, shared, dtype=torch.float32):
    nets, samples, inner, _, height, width = case[:6]
    shape = (samples, inner) if shared else (samples, nets, inner)
    return torch.randn(*shape, height, width).to(dtype)


@pytest.mark.parametrize("activation", [None, "leaky_relu"])
@pytest.mark.parametrize("shared", [False, True], ids=["per_net", "shared"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_reference(assert_matches, case, shared, activation):
    assert_matches(
        lambda x, rows: apply(op, x, rows, case, activation, precision="ieee"),
        lambda x, rows: apply(batched_conv2d_reference, x, rows, case, activation),
        x=images(case, shared),
        rows=rows_for(case),
    )


@pytest.mark.parametrize("shared", [False, True], ids=["per_net", "shared"])
def test_bf16_accumulates_in_fp32(assert_matches, shared):
    case = CASES["odd"]
    assert_matches(
        lambda x, rows: apply(op, x, rows, case, "leaky_relu"),
        lambda x, rows: apply(batched_conv2d_reference, x, rows, case, "leaky_relu"),
        x=images(case, shared, torch.bfloat16),
        rows=rows_for(case, torch.bfloat16),
    )


def test_weight_gradient_in_several_parts(assert_matches):
    """More than 4,096 output pixels, so that two programs sum parts of them."""
    case = (1, 5, 1, 2, 30, 29, (3, 3), 1, 1)
    assert_matches(
        lambda x, rows: apply(op, x, rows, case, precision="ieee"),
        lambda x, rows: apply(batched_conv2d_reference, x, rows, case),
        x=images(case, False),
        rows=rows_for(case),
    )


def test_strided_images_and_no_bias(assert_matches):
    """Images whose channels come last in memory, as a view."""
    assert_matches(
        lambda x, w: op(x.permute(0, 1, 4, 2, 3), w, padding=1, precision="ieee"),
        lambda x, w: batched_conv2d_reference(x.permute(0, 1, 4, 2, 3), w, padding=1),
        x=torch.randn(2, 3, 5, 5, 4),
        w=torch.randn(3, 2, 4, 3, 3),
    )


@pytest.mark.parametrize("activation", [None, "leaky_relu"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_unfolded_product_matches_reference(case, activation):
    x = images(case, False, torch.float64).requires_grad_()
    rows = rows_for(case, torch.float64).requires_grad_()
    _, _, _, _, _, _, _, stride, padding = case
    pair = [(v, v) if isinstance(v, int) else v for v in (stride, padding)]

    def unfolded(x, weight, bias, *_):
        y = UnfoldedConv2d.apply(x, weight, bias, *pair, 0.01 if activation else 1)
        return y.permute(4, 0, 1, 2, 3)

    found, expected = (
        apply(unfolded, x, rows, case),
        apply(batched_conv2d_reference, x, rows, case, activation),
    )
    torch.testing.assert_close(found, expected)
    g = torch.randn_like(expected)
    for name, a, b in zip(
        ("x", "rows"),
        torch.autograd.grad(found, (x, rows), g),
        torch.autograd.grad(expected, (x, rows), g),
        strict=True,
    ):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"gradient of {name}: {m}")


def test_rule_of_the_cpu_path():
    """Channels in eights stay grouped where oneDNN is; so do images that would be blown up."""

    def unfolds(inner, out, stride=2, shared=False, innermost=False):
        x = images((2, 4, inner, out, 8, 8, (3, 3), stride, 1), shared)
        x = x.permute(1, 2, 3, 4, 0).contiguous().permute(4, 0, 1, 2, 3) if innermost else x
        size = (8 // stride, 8 // stride)
        return prefers_unfolding(x, torch.zeros(2, out, inner, 3, 3), size)

    assert unfolds(6, 12)
    assert unfolds(1, 8)
    assert not unfolds(8, 16)
    assert unfolds(8, 16, innermost=True)  # as the layer before it left them
    assert not unfolds(6, 12, stride=1)
    assert not unfolds(6, 12, shared=True)
    with warnings.catch_warnings(action="ignore"), torch.backends.mkldnn.flags(enabled=False):
        assert unfolds(8, 16, stride=1)
        assert channels_last(x := torch.randn(2, 3, 5, 4)) is x
        assert not unfolds(6, 12, shared=True)


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_come_innermost_also_a_single_one(channels):
    """PyTorch takes a single channel for ordered either way, and all layers go on as it lies."""
    x = torch.randn(2, channels, 5, 4)
    found, layer = channels_last(x), nn.Conv2d(channels, 8, 3)
    torch.testing.assert_close(found, x, rtol=0, atol=0)
    assert found.stride() == (20 * channels, 1, 4 * channels, channels)
    assert layer(found).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(found), layer(x))
    flat = torch.randn(2, 3)
    assert channels_last(flat) is flat


def test_nets_per_block():
    """Many small nets share a block, large inputs are one net's own."""
    assert nets_per_block(torch.zeros(64, 1, 8, 8)) == 32
    assert nets_per_block(torch.zeros(128, 3, 32, 32)) == 1
    assert nets_per_block(torch.zeros(64, 1, 28, 28)) == 10


def test_torch_func_composes():
    """vmap over grad where the fast path would be taken outside torch.func."""
    x, w = torch.randn(4, 3, 2, 1, 6, 6), torch.randn(2, 3, 1, 3, 3)

    def loss(w, x):
        return batched_conv2d(x, w, stride=2, padding=1).square().sum()

    with backend("torch"):
        each = torch.func.vmap(torch.func.grad(loss), (None, 0))(w, x)
        w.requires_grad_()
        torch.testing.assert_close(each[1], torch.autograd.grad(loss(w, x[1]), w)[0])


def test_reference_equals_modules():
    nets = [nn.Conv2d(3, 4, 3, 2, 1) for _ in range(3)]
    x = torch.randn(5, 3, 3, 8, 8)
    weight = torch.stack([net.weight for net in nets])
    bias = torch.stack([net.bias for net in nets])
    with backend("torch"):
        y = batched_conv2d(x, weight, bias, 2, 1, "leaky_relu")
    for n, net in enumerate(nets):
        torch.testing.assert_close(y[:, n], nn.functional.leaky_relu(net(x[:, n])))


def test_finite_differences(assert_gradient):
    assert_gradient(
        lambda x, w, b: batched_conv2d(x, w, b, 2, 1, precision="ieee"),
        x=torch.randn(1, 2, 1, 4, 4),
        w=torch.randn(2, 2, 1, 3, 3),
        b=torch.randn(2, 2),
    )


x, w, b = torch.randn(4, 2, 3, 8, 8), torch.randn(2, 5, 3, 3, 3), torch.randn(2, 5)
BAD = {
    "rank": ((x[0, 0], w, b), r"x \[3, 8, 8\] must be \[B, C, H, W\] or \[B, N, C, H, W\]"),
    "nets": ((torch.randn(4, 3, 3, 8, 8), w, b), r"x \[4, 3, 3, 8, 8\] must be .* where N = 2"),
    "channels": ((torch.randn(4, 2, 1, 8, 8), w, b), r"x \[4, 2, 1, 8, 8\] must be .* C = 3"),
    "bias": ((x, w, b[:1]), r"bias \[1, 5\] must be \[N, O\] .* N = 2"),
    "dtype": ((x, w.double(), b), "must be torch.float64 on cpu, .* got torch.float32"),
    "rows": ((x, w.transpose(3, 4), b), "must be contiguous"),
    "no nets": ((x[:, :0], w[:0], b[:0]), "no axis empty"),
    "no samples": ((x[:0], w, b), r"x \[0, 2, 3, 8, 8\] must be .* no axis empty"),
    "too large": (
        (x[..., :2], w, b),
        r"kernel \[3, 3\] .* does not fit images x \[4, 2, 3, 8, 2\]",
    ),
    "stride": ((x, w, b, 0), r"stride \[0, 0\]"),
    "activation": ((x, w, b, 1, 0, "sine"), "activation must be one of"),
}


@pytest.mark.parametrize(("args", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_bad_input(name, args, message):
    with backend(name), pytest.raises(ValueError, match=message):
        batched_conv2d(*args)


def test_opcheck(device):
    x = torch.randn(2, 2, 3, 5, 5, device=device, requires_grad=True)
    w = torch.randn(2, 4, 3, 3, 3, device=device, requires_grad=True)
    b = torch.randn(2, 4, device=device, requires_grad=True)
    args = (x, w, b, [2, 2], [1, 1], 1, 0.1, 1.0, "ieee")
    torch.library.opcheck(torch.ops.netspace_lite.layer.default, args)
