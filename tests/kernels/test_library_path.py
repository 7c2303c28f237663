"""All ops in one step, as the library chains them: chunks, nets, distillation, gradients."""

import pytest
import torch
from netspace_lite.kernels import (
    backend,
    batched_conv2d,
    batched_linear,
    chunk_pack,
    chunk_unpack,
    distillation_loss,
)
from torch import nn

import netspace_lite as ns

SHAPES = [(2, 1, 3, 3), (2,), (3, 2, 3, 3), (3,), (5, 12), (5,), (3, 5), (3,)]
T, L = 11, 16


def step(rows, images, targets, mean, std):
    """Losses [N] of LeNet-like nets whose rows [N, P] went through standardised chunks."""
    prep = chunk_pack(rows, T, L, mean, std)
    w1, b1, w2, b2, w3, b3, w4, b4 = chunk_unpack(prep, SHAPES, mean, std)
    exact = {"precision": "ieee"}
    x = batched_conv2d(images, w1, b1, 2, 1, "leaky_relu", **exact)
    x = batched_conv2d(x, w2, b2, 2, 1, "leaky_relu", **exact)
    x = batched_linear(x.flatten(2).transpose(0, 1), w3, b3, "leaky_relu", **exact)
    return distillation_loss(batched_linear(x, w4, b4, **exact), targets, temperature=2.0)


@pytest.mark.parametrize("per_net", [False, True], ids=["shared", "per_net"])
def test_one_training_step(assert_close, device, per_net):
    size = sum(torch.Size(s).numel() for s in SHAPES)
    images = torch.randn(6, *((4,) if per_net else ()), 1, 7, 7)
    constants = images, torch.randn(6, 3)
    rows, scales = torch.randn(4, size) / 3, (torch.randn(T, L) / 3, torch.rand(T, L) + 0.5)
    found, exact = rows.to(device).requires_grad_(), rows.double().requires_grad_()
    with backend("triton"):
        loss = step(found, *(t.to(device) for t in (*constants, *scales)))
    # Standardising and its inverse cancel; the reference has no such thing in fp64.
    with backend("torch"):
        expected = step(exact, *(t.double() for t in constants), None, None)
    assert_close("loss", loss, expected)
    grads = [torch.autograd.grad(y.sum(), x)[0] for y, x in ((loss, found), (expected, exact))]
    sizes = [torch.Size(s).numel() for s in SHAPES]
    for number, (a, b) in enumerate(zip(*(g.split(sizes, 1) for g in grads), strict=True)):
        assert_close(f"gradient of parameter {number}", a, b)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Hardtanh, nn.SiLU])
@pytest.mark.parametrize("nets", [1, 3])
def test_steps_in_place_on_what_a_kernel_wrote(assert_close, exact, device, activation, nets):
    """Kernels keep their outputs for the backward pass, so such a step gets a copy."""
    layers = nn.Conv2d(1, 4, 3), activation(inplace=True), nn.MaxPool2d(2), nn.Flatten()
    net = nn.Sequential(*layers, nn.Linear(36, 3), activation(inplace=True))
    rows, x = ns.initial_rows(net, range(nets)), torch.randn(5, 1, 8, 8)
    wanted, found = rows.double().requires_grad_(), rows.to(device).requires_grad_()
    with backend("triton"):
        out = ns.Batched(net)(found, x.to(device))
    expected = ns.Batched(net.double())(wanted, x.double())
    assert_close("outputs", out, expected)
    for y in (out, expected):
        y.square().sum().backward()
    assert_close("gradients", found.grad, wanted.grad)
