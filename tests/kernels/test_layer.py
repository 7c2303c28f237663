"""The kernels of linear layers and convolutions in every configuration that their rule gives."""

import pytest
import torch
from netspace_lite.kernels import batched_conv2d, batched_linear
from netspace_lite.kernels.backend import INTERPRETED
from netspace_lite.kernels.batched_conv2d import batched_conv2d_reference
from netspace_lite.kernels.batched_linear import batched_linear_reference
from netspace_lite.kernels.common import tile

# nets, samples, inputs, outputs, activation
LINEAR = {
    "64x64": (2, 40, 45, 70, "sine"),
    "32x32": (2, 37, 24, 30, "leaky_relu"),
    "64x16": (2, 70, 3, 40, "sine"),
    "10 classes": (2, 70, 40, 10, None),
    "few samples": (3, 8, 50, 30, "leaky_relu"),
    "20 samples": (2, 20, 40, 36, "leaky_relu"),
}
# nets, samples, channels in and out, side, kernel, stride, padding
CONV = {
    "lenet": (2, 3, 3, 6, 12, 5, 2, 0),
    "32x32": (2, 2, 18, 20, 7, 3, 1, 1),
    "64x64": (2, 3, 34, 35, 8, 3, 2, 1),
    "16 pixels": (2, 1, 34, 40, 4, 3, 1, 1),
    "25 pixels": (2, 1, 34, 40, 5, 3, 1, 1),
    "one channel": (2, 5, 1, 24, 6, 3, 1, 1),
    "27 window values": (2, 2, 3, 34, 6, 3, 1, 1),
}
MODES = {"tf32": torch.float32, "ieee": torch.float32, "bf16": torch.bfloat16}
WAYS = {"bias": (True, False), "shared": (False, True)}  # bias, shared inputs


def tiles_of(linear, conv, exact=False):
    """The tiles of each kernel for these cases."""
    shapes = {"forward": set(), "inputs": set(), "weights": set()}
    for _, b, i, o, _ in linear:
        for kernel, results in zip(shapes, ((b, o), (b, i), (o, i)), strict=True):
            shapes[kernel].add(("linear", *results))
    for _, b, i, o, side, kernel, stride, padding in conv:
        places, phase = (side + 2 * padding - kernel) // stride + 1, -(-side // stride)
        results = (b * places**2, o), (b * phase**2, i), (o, i * kernel**2)
        for name, result in zip(shapes, results, strict=True):
            shapes[name].add(("conv", *result))
    return {
        (kernel, kind, *tile(*result, exact, kernel == "weights").values())
        for kernel, results in shapes.items()
        for kind, *result in results
    }


@pytest.mark.parametrize(("exact", "tiles"), [(False, 5), (True, 3)])
def test_cases_cover_every_tile(exact, tiles):
    found = tiles_of(LINEAR.values(), CONV.values(), exact)
    for sums in (False, True):
        sides = range(1, 200)
        assert len({tuple(tile(m, n, exact, sums).values()) for m in sides for n in sides}) == tiles
    assert len(found) == 3 * 2 * tiles


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", LINEAR.values(), ids=LINEAR.keys())
def test_linear(assert_matches, case, mode, way):
    (nets, samples, inner, out, act), (bias, shared) = case, WAYS[way]
    precision = "ieee" if mode == "ieee" else "tf32"
    leaves = {
        "x": torch.randn(*((samples,) if shared else (nets, samples)), inner),
        "weight": torch.randn(nets, out, inner) / inner**0.5,
    }
    leaves |= {"bias": torch.randn(nets, out)} if bias else {}

    def op(activation=act, **given):
        return batched_linear(**given, activation=act, omega=2.0, precision=precision)

    assert_matches(
        op,
        lambda **given: batched_linear_reference(**given, activation=act, omega=2.0),
        mode,
        **{k: v.to(MODES[mode]) for k, v in leaves.items()},
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CONV.values(), ids=CONV.keys())
def test_convolution(assert_matches, case, mode, way):
    (nets, samples, inner, out, side, kernel, stride, padding), (bias, shared) = case, WAYS[way]
    precision = "ieee" if mode == "ieee" else "tf32"
    leaves = {
        "x": torch.randn(samples, *(() if shared else (nets,)), inner, side, side),
        "weight": torch.randn(nets, out, inner, kernel, kernel) / (inner * kernel**2) ** 0.5,
    }
    leaves |= {"bias": torch.randn(nets, out)} if bias else {}
    window = {"stride": stride, "padding": padding}
    assert_matches(
        lambda **given: batched_conv2d(**given, **window, precision=precision),
        lambda **given: batched_conv2d_reference(**given, **window),
        mode,
        **{k: v.to(MODES[mode]) for k, v in leaves.items()},
    )


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="the interpreter multiplies tf32 exactly")
def test_tf32_does_not_shrink(device):
    """Products of positive numbers: cut off, operands would lose 0.035% each on average."""
    x, w = torch.rand(2, 64, 512, device=device) + 0.5, torch.rand(2, 64, 512, device=device) + 0.5
    ratio = batched_linear(x, w, precision="tf32").double() / torch.bmm(x.double(), w.double().mT)
    assert abs(ratio.mean() - 1) < 3e-5
