"""Three tiers: the kernels in Triton's interpreter, compiled without running, and on a real GPU.

Without a GPU the same equivalence tests run in the interpreter, on CPU tensors; with one they run
on it. `TRITON_INTERPRET=1 pytest tests/kernels` runs the interpreter on any machine.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are imported, below

from netspace_lite.kernels import backend
from netspace_lite.kernels.backend import HAS_TRITON, INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"

# Largest and root-mean-square error, relative to the largest value. Operands keep 11 bits in tf32,
# which the interpreter doesn't know: there it is as exact as "ieee". bf16 keeps 8 bits, and the
# interpreter cuts where GPUs round.
TOLERANCE = {"ieee": (2e-5, 4e-6), "tf32": (3e-3, 6e-4), "bf16": (3e-2, 6e-3)}
if INTERPRETED:
    TOLERANCE["tf32"] = TOLERANCE["ieee"]


@pytest.fixture(autouse=True)
def _seed_and_tier(request):
    torch.manual_seed(0)
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if not HAS_TRITON:
        pytest.skip("Triton isn't published for this platform")


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture
def exact():
    """Products of fp32 are exact where no precision is named."""
    setting = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = setting


def nearest_tf32(values):
    """fp32 values with the 11 bits that tf32 keeps; others as they are."""
    if values.dtype != torch.float32:
        return values
    return ((values.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.fixture
def assert_close():
    """`assert_close(name, found, expected)` with the tolerance of its dtype and precision."""

    def check(name, found, expected, precision="ieee"):
        largest, rms = TOLERANCE["bf16" if found.dtype == torch.bfloat16 else precision]
        expected = expected.double().cpu()
        error = found.double().cpu() - expected
        scale = max(expected.abs().max().item(), 1e-6)
        assert found.shape == expected.shape, name
        assert error.isfinite().all(), f"{name} is not finite"
        assert error.abs().max() <= largest * scale, f"{name}: max {error.abs().max() / scale:.2e}"
        assert error.square().mean().sqrt() <= rms * scale, f"{name}: rms"

    return check


@pytest.fixture
def assert_matches(assert_close):
    """`assert_matches(op, reference, leaves)`: outputs and each gradient by name against fp64.

    `op` and `reference` take the leaves (name -> fp32 or bf16 tensor) by keyword; `op` runs on the
    tier's device with Triton, `reference` on the CPU in fp64 on the same values. Each parameter is
    a leaf of its own, so that the tolerance is relative to its own gradient. Values are given as
    tf32 has them where products are in tf32: else their rounding takes a leaky ReLU over its kink.
    """

    def check(op, reference, precision="ieee", **leaves):
        if precision == "tf32":
            leaves = {k: nearest_tf32(v) for k, v in leaves.items()}
        exact = {k: v.double().requires_grad_() for k, v in leaves.items()}
        given = {k: v.to(DEVICE).requires_grad_() for k, v in leaves.items()}
        expected = reference(**exact)
        with backend("triton"):
            found = op(**given)
        assert_close("output", found, expected, precision)
        g = torch.randn(expected.shape).to(found.dtype)
        wanted = torch.autograd.grad(expected, list(exact.values()), g.double())
        grads = torch.autograd.grad(found, list(given.values()), g.to(DEVICE))
        for name, grad, want in zip(leaves, grads, wanted, strict=True):
            assert_close(f"gradient of {name}", grad, want, precision)

    return check


@pytest.fixture
def assert_gradient():
    """`assert_gradient(op, **leaves)`: each gradient against central differences of the op itself.

    Fp32 allows no entrywise check, so each leaf is moved along one random direction.
    """

    def check(op, **leaves):
        leaves = {k: v.to(DEVICE).requires_grad_() for k, v in leaves.items()}
        with backend("triton"):
            y = op(**leaves)
            g = torch.randn_like(y)
            grads = torch.autograd.grad(y, list(leaves.values()), g)
            for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
                step = 5e-3 * torch.randn_like(leaf)
                with torch.no_grad():
                    after = op(**{**leaves, name: leaf + step})
                    before = op(**{**leaves, name: leaf - step})
                found = ((after - before).double() * g).sum().item() / 2
                expected = (grad * step).double().sum().item()
                scale = (grad.double().norm() * step.double().norm()).item()
                assert scale > 0, f"gradient of {name} vanishes"
                assert abs(found - expected) < 2e-3 * scale, f"gradient of {name}"

    return check
