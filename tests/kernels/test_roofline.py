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
from netspace_lite.kernels.siren_mlp import siren_params
from netspace_lite.kernels.trace import traced

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="counts are taken in the interpreter")


def counted(run):
    with backend("triton"), traced() as programs:
        run()
    moved = sum(p.loaded_bytes + p.stored_bytes for p in programs)
    return moved, sum(p.products for p in programs)


@pytest.mark.parametrize("shared", [False, True], ids=["per_net", "shared"])
def test_linear(shared):
    x = torch.randn(37, 50) if shared else torch.randn(3, 37, 50)
    w, b = torch.randn(3, 70, 50), torch.randn(3, 70)
    count = roofline.linear_forward(3, 37, 50, 70, shared=shared)
    found = counted(lambda: batched_linear(x, w, b, precision="tf32"))
    assert found == (count.loaded_bytes, count.issued_products)


def test_linear_weight_gradient():
    x, w, b = torch.randn(2, 37, 50), torch.randn(2, 70, 50), torch.randn(2, 70)
    with backend("triton"):
        y = batched_linear(x, w.requires_grad_(), b, "leaky_relu", precision="tf32")
    count = roofline.linear_weight_grad(2, 37, 50, 70)
    found = counted(lambda: y.backward(torch.ones_like(y)))
    # The bias doesn't ask for its gradient, which is written all the same.
    assert found == (count.loaded_bytes, count.issued_products)


def test_convolution():
    x, w, b = torch.randn(4, 2, 3, 9, 9), torch.randn(2, 20, 3, 3, 3), torch.randn(2, 20)
    count = roofline.conv_forward(2, 4, 3, 20, 9, 3, 2)
    assert counted(lambda: batched_conv2d(x, w, b, 2, precision="tf32")) == (
        count.loaded_bytes,
        count.issued_products,
    )


def test_siren():
    points, rows = torch.randn(2, 70, 3), torch.randn(2, siren_params(20))
    count = roofline.siren_forward(2, 70, 20)
    found = counted(lambda: siren_mlp(points, rows, 20, precision="tf32"))
    assert found == (count.loaded_bytes, count.issued_products)


def test_loss():
    z, t, labels = torch.randn(2, 70, 10), torch.randn(2, 70, 10), torch.zeros(70).long()
    count = roofline.loss(2, 70, 10, rows=64)
    assert counted(lambda: distillation_loss(z, t, labels))[0] == count.loaded_bytes


def test_packing():
    rows = torch.randn(3, 2900)
    mean, std = torch.randn(3, 1000), torch.rand(3, 1000) + 1
    assert counted(lambda: chunk_pack(rows, 3, 1000))[0] == 0  # a copy, no kernel
    count = roofline.standardise(3, 3, 1000)
    assert counted(lambda: chunk_pack(rows, 3, 1000, mean, std))[0] == count.loaded_bytes


def test_paper_cases_are_consistent():
    for name, count in roofline.paper_cases().items():
        assert count.loaded_bytes >= count.needed_bytes * 0.99, name
        assert count.issued_products >= count.needed_products, name
        for gpu in roofline.GPUS:
            assert 0 < count.of_roofline(gpu) <= 1, name


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
