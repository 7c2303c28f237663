"""The roofline's counts against what the interpreter sees the kernels do."""

import pytest
import torch
from netspace_lite.kernels import (
    backend,
    batched_conv2d,
    batched_linear,
    chunk_pack,
    distillation_loss,
    roofline,
    siren_mlp,
)
from netspace_lite.kernels.backend import INTERPRETED
from netspace_lite.kernels.batched_conv2d import batched_conv2d_reference
from netspace_lite.kernels.batched_linear import batched_linear_reference
from netspace_lite.kernels.siren_mlp import siren_mlp_reference, siren_params
from netspace_lite.kernels.trace import traced
from torch.utils.flop_counter import FlopCounterMode

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="counts are taken in the interpreter")


def counted(run):
    """Bytes at distinct addresses, bytes that loads and stores ask for, products of tiles."""
    with backend("triton"), traced() as programs:
        run()
    sizes = {a: size for p in programs for at, size in p.loads + p.stores for a in at.tolist()}
    moved = sum(p.loaded_bytes + p.stored_bytes for p in programs)
    return sum(sizes.values()), moved, sum(p.products for p in programs)


def expected(count):
    return count.needed_bytes, count.loaded_bytes, count.issued_products


@pytest.mark.parametrize("shared", [False, True], ids=["per_net", "shared"])
def test_linear(shared):
    x = torch.randn(37, 50) if shared else torch.randn(3, 37, 50)
    w, b = torch.randn(3, 70, 50), torch.randn(3, 70)
    count = roofline.linear_forward(3, 37, 50, 70, shared=shared)
    found = counted(lambda: batched_linear(x, w, b, precision="tf32"))
    assert found == expected(count)


def test_linear_weight_gradient():
    x, w, b = torch.randn(2, 37, 50), torch.randn(2, 70, 50), torch.randn(2, 70)
    with backend("triton"):
        y = batched_linear(x, w.requires_grad_(), b, "leaky_relu", precision="tf32")
    count = roofline.linear_weight_grad(2, 37, 50, 70)
    found = counted(lambda: y.backward(torch.ones_like(y)))
    # The bias doesn't ask for its gradient, which is written all the same.
    assert found == expected(count)


def test_convolution():
    x, w, b = torch.randn(4, 2, 3, 9, 9), torch.randn(2, 20, 3, 3, 3), torch.randn(2, 20)
    count = roofline.conv_forward(2, 4, 3, 20, 9, 3, 2)
    assert counted(lambda: batched_conv2d(x, w, b, 2, precision="tf32")) == expected(count)


@pytest.mark.parametrize("hidden", [20, 130])
def test_siren(hidden):
    points, rows = torch.randn(2, 70, 3), torch.randn(2, siren_params(hidden))
    count = roofline.siren_forward(2, 70, hidden)
    found = counted(lambda: siren_mlp(points, rows, hidden, precision="tf32"))
    assert found == expected(count)


def test_loss():
    z, t, labels = torch.randn(2, 70, 10), torch.randn(2, 70, 10), torch.zeros(70).long()
    count = roofline.loss(2, 70, 10, rows=64)
    assert counted(lambda: distillation_loss(z, t, labels)) == expected(count)


def test_packing():
    rows = torch.randn(3, 2900)
    mean, std = torch.randn(3, 1000), torch.rand(3, 1000) + 1
    assert counted(lambda: chunk_pack(rows, 3, 1000)) == (0, 0, 0)  # a copy, no kernel
    count = roofline.standardise(3, 3, 1000)
    assert counted(lambda: chunk_pack(rows, 3, 1000, mean, std)) == expected(count)


def least(run, *inputs):
    """Bytes of inputs and result, and PyTorch's own count of what its way multiplies."""
    with FlopCounterMode(display=False) as counter:
        y = run(*inputs)
    tensors = {id(t): t.numel() * t.element_size() for t in (*inputs, y)}
    return sum(tensors.values()), counter.get_total_flops()


def meta(*shape):
    return torch.empty(*shape, device="meta")


SIREN = siren_params(256)
PAPER = {  # reference, its inputs at the paper's sizes, and how far tiles may be from ideal
    "LeNetLike conv 1 (shared images)": (
        lambda x, w, b: batched_conv2d_reference(x, w, b, 2),
        (meta(128, 3, 32, 32), meta(8, 6, 3, 5, 5), meta(8, 6)), 1.3),
    "LeNetLike conv 2": (
        lambda x, w, b: batched_conv2d_reference(x, w, b, 2),
        (meta(128, 8, 6, 14, 14), meta(8, 16, 6, 5, 5), meta(8, 16)), 1.1),
    "LeNetLike linear 1": (
        batched_linear_reference, (meta(8, 128, 400), meta(8, 120, 400), meta(8, 120)), 1.1),
    "ResNet8 conv 64 to 64": (
        batched_conv2d_reference,
        (meta(128, 8, 64, 10, 10), meta(8, 64, 64, 3, 3), meta(8, 64)), 1.1),
    "SIREN 256, one kernel": (
        lambda x, rows: siren_mlp_reference(x, rows, 256, 30.0),
        (meta(4, 20_000, 3), meta(4, SIREN)), 1.05),
}  # fmt: skip


@pytest.mark.parametrize("gpu", roofline.GPUS)
@pytest.mark.parametrize("name", PAPER)
def test_modelled_time_lies_between_bounds_that_are_not_its_own(name, gpu):
    """No less than tensors' bytes and PyTorch's products take, and not much more."""
    run, inputs, slack = PAPER[name]
    moved, products = least(run, *inputs)
    bandwidth, peak = roofline.GPUS[gpu]
    bound = max(moved / bandwidth, products / peak)
    seconds = roofline.paper_cases()[name].modelled_seconds(gpu)
    assert 0.98 * bound <= seconds <= slack * bound  # first and last layers of SIRENs: under 2%


def test_programs_cover_the_result_once():
    """Every program stores its own tile; together they store every value exactly once."""
    x, w = torch.randn(2, 37, 5), torch.randn(2, 40, 5)
    with backend("triton"), traced() as programs:
        y = batched_linear(x, w)
    stored = torch.cat([torch.from_numpy(p.touched(y)) for p in programs])
    assert torch.equal(stored.sort().values, torch.arange(y.numel()))


def test_siren_reads_only_its_tensors():
    """11 neurons in tiles of 16: what a dropped mask would read lies outside the row's memory."""
    points, rows = torch.randn(1, 5, 3), torch.randn(1, siren_params(11))
    with backend("triton"), traced() as programs:
        siren_mlp(points, rows, 11)
    read = torch.cat([torch.from_numpy(a) for p in programs for a, _ in p.loads])
    inside = torch.zeros_like(read, dtype=torch.bool)
    for tensor in (points, rows):
        first = tensor.data_ptr()
        inside |= (read >= first) & (read < first + 4 * tensor.numel())
    assert inside.all()
