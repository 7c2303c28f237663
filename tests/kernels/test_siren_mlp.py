"""siren_mlp: the fused kernels against the fp64 reference, and the reference against a module."""

import importlib

import numpy as np
import pytest
import torch
from netspace_lite.kernels import backend, siren_mlp
from netspace_lite.kernels.siren_mlp import siren_mlp_reference, siren_params
from torch import nn

# nets, points, hidden: aligned, odd, ones, several tiles of points and of neurons with a tail
SHAPES = [(2, 64, 32), (3, 7, 11), (1, 1, 1), (2, 150, 40)]


def siren_rows(nets, hidden, pad=3):
    """Rows with `pad` values before each net, initialised as SIRENs are for ω = 30."""
    h = hidden
    bounds = [(3 * h + h, 1 / 3), (h * h + h + h + 1, (6 / h) ** 0.5 / 30)]
    parts = [torch.empty(nets, size).uniform_(-bound, bound) for size, bound in bounds]
    return torch.cat([torch.randn(nets, pad), *parts], 1)


def parameters(nets, hidden):
    """name -> parameter of all nets, flat, so that each is compared by its own scale."""
    h, names = hidden, ("w1", "b1", "w2", "b2", "w3", "b3")
    parts = siren_rows(nets, hidden, 0).split([3 * h, h, h * h, h, h, 1], 1)
    return dict(zip(names, parts, strict=True))


@pytest.fixture
def assert_siren(assert_matches, device):
    """Answers and the gradients of rows, given in parts, at points that need none: the kernels."""

    def check(points, hidden, omega=30.0, precision="ieee", seen=lambda given: given, **parts):
        assert_matches(
            lambda **p: siren_mlp(
                seen(points.to(device)), torch.cat([*p.values()], 1), hidden, omega, precision
            ),
            lambda **p: siren_mlp_reference(
                seen(points.double()), torch.cat([*p.values()], 1), hidden, omega
            ),
            precision,
            **parts,
        )

    return check


@pytest.mark.parametrize("shared", [False, True], ids=["per_net", "shared"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}B{}h{}".format(*s))
def test_matches_reference(assert_siren, shape, shared):
    nets, samples, hidden = shape
    points = torch.randn(samples, 3) if shared else torch.randn(nets, samples, 3)
    assert_siren(points, hidden, **parameters(nets, hidden))


def test_rows_inside_longer_rows(assert_matches, device):
    points = torch.randn(7, 3)
    assert_matches(
        lambda rows: siren_mlp(points.to(device), rows[:, 3:], 11, precision="ieee"),
        lambda rows: siren_mlp_reference(points.double(), rows[:, 3:], 11),
        rows=siren_rows(3, 11),
    )


@pytest.mark.parametrize("hidden", [16, 20, 40, 100, 130])
def test_every_width_on_tensor_cores(assert_siren, hidden):
    """HP 16, 32, 64, 128 and 256 in tf32, with a small ω: tf32 rounds angles too."""
    assert_siren(torch.randn(1, 35, 3), hidden, 2.0, "tf32", **parameters(1, hidden))


def test_bf16_accumulates_in_fp32(assert_siren):
    points, rows = torch.randn(2, 40, 3).bfloat16(), siren_rows(2, 20, 0).bfloat16()
    assert_siren(points, 20, 3.0, rows=rows)


def test_strided_points(assert_siren):
    """Points as columns: `[3, B]` seen as `[B, 3]`."""
    assert_siren(torch.randn(3, 9), 8, seen=lambda points: points.mT, rows=siren_rows(2, 8, 0))


@pytest.mark.parametrize("shared", [False, True], ids=["per_net", "shared"])
def test_points_that_need_a_gradient_run_layer_by_layer(assert_matches, shared):
    assert_matches(
        lambda points, rows: siren_mlp(points, rows, 11, precision="ieee"),
        lambda points, rows: siren_mlp_reference(points, rows, 11),
        points=torch.randn(7, 3) if shared else torch.randn(2, 7, 3),
        rows=siren_rows(2, 11, 0),
    )


@pytest.mark.parametrize("hidden", [65, 260])
def test_wide_nets_run_layer_by_layer(assert_matches, hidden):
    assert_matches(
        lambda points, rows: siren_mlp(points, rows, hidden, precision="ieee"),
        lambda points, rows: siren_mlp_reference(points, rows, hidden),
        points=torch.randn(1, 3, 3),
        rows=siren_rows(1, hidden, 0),
    )


@pytest.fixture
def runs(monkeypatch):
    """What the one kernel was called with, each time."""
    module, runs = importlib.import_module("netspace_lite.kernels.siren_mlp"), []
    real = module._siren
    monkeypatch.setattr(module, "_siren", lambda *args: runs.append(args) or real(*args))
    return runs


@pytest.mark.parametrize(
    ("hidden", "dtype", "precision", "fused"),
    [
        (64, torch.float32, "ieee", True),
        (65, torch.float32, "ieee", False),  # would spill registers
        (256, torch.float32, None, True),  # the default is tf32: the paper's nets in one kernel
        (65, torch.float32, "tf32", True),
        (65, torch.bfloat16, "ieee", True),
        (257, torch.bfloat16, "tf32", False),
    ],
)
def test_one_kernel_takes_what_its_registers_hold(runs, device, hidden, dtype, precision, fused):
    rows = siren_rows(1, hidden, 0).to(device, dtype)
    with backend("triton"):
        siren_mlp(torch.randn(2, 3, dtype=dtype, device=device), rows, hidden, precision=precision)
    assert bool(runs) == fused


def test_one_kernel_where_no_gradient_can_come(runs, device):
    points, rows = torch.randn(5, 3, device=device), siren_rows(2, 8, 0).to(device)
    with backend("triton"), torch.no_grad():
        siren_mlp(points.requires_grad_(), rows, np.int64(8))
    assert runs


def test_large_angles(assert_close, device):
    """Angles of hundreds of radians: the kernel reduces them itself."""
    points, rows = torch.randn(1, 200, 3) * 20, siren_rows(1, 16, 0)
    with backend("triton"):
        found = siren_mlp(points.to(device), rows.to(device), 16, precision="ieee")
    exact = siren_mlp_reference(points.double(), rows.double(), 16)
    # An angle of 300 radians is itself rounded to 3e-5 in fp32.
    assert (found.cpu() - exact).abs().max() < 1e-4 * exact.abs().max()


def test_reference_equals_module():
    class Sine(nn.Module):
        def forward(self, x):
            return torch.sin(30 * x)

    nets = [
        nn.Sequential(nn.Linear(3, 8), Sine(), nn.Linear(8, 8), Sine(), nn.Linear(8, 1))
        for _ in range(3)
    ]
    rows = torch.stack([nn.utils.parameters_to_vector(net.parameters()) for net in nets])
    points = torch.randn(5, 3)
    with backend("torch"):
        found = siren_mlp(points, rows, 8)
    torch.testing.assert_close(
        found, torch.stack([net(points) for net in nets]), rtol=1e-4, atol=1e-5
    )


def test_finite_differences(assert_gradient, device):
    points = torch.randn(2, 4, 3, device=device)
    assert_gradient(
        lambda rows: siren_mlp(points, rows, 3, omega=2.0, precision="ieee"),
        rows=siren_rows(2, 3, 0) * 5,
    )


points, rows = torch.randn(5, 3), torch.randn(2, siren_params(4))
BAD = {
    "rank": (
        (points[0], rows, 4),
        r"points \[3\] must be \[B, D\] or \[N, B, D\] .* P = 41",
    ),
    "coordinates": ((torch.randn(5, 2), rows, 4), r"points \[5, 2\] must be .* D = 3"),
    "no points": ((points[:0], rows, 4), r"points \[0, 3\] must be .* no axis empty"),
    "no nets": ((points, rows[:0], 4), r"rows \[0, 41\] must be .* no axis empty"),
    "row length": ((points, rows, 5), r"rows \[2, 41\] must be \[N, P\] .* P = 56"),
    "nets": ((torch.randn(3, 5, 3), rows, 4), r"points \[3, 5, 3\] must be .* N = 2"),
    "dtype": ((points.double(), rows, 4), "must be torch.float32 on cpu"),
    "strides": ((points, torch.randn(41, 2).T, 4), "must be contiguous"),
}


@pytest.mark.parametrize(("args", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_bad_input(name, args, message):
    with backend(name), pytest.raises(ValueError, match=message):
        siren_mlp(*args)


def test_opcheck(device):
    points = torch.randn(5, 3, device=device)  # no gradient reaches them there
    rows = siren_rows(2, 4, 0).to(device).requires_grad_()
    args = (points, rows, 4, 30.0, "ieee")
    torch.library.opcheck(torch.ops.netspace_lite.siren_mlp.default, args)
