"""distillation_loss: one pass against the fp64 reference, the reference against torch losses."""

import pytest
import torch
import torch.nn.functional as F
from netspace_lite.kernels import backend, distillation_loss
from netspace_lite.kernels.distillation_loss import distillation_loss_reference

SHAPES = [(2, 64, 16), (3, 5, 7), (1, 1, 1), (2, 130, 10), (1, 9, 200)]


@pytest.mark.parametrize("per_net_temperature", [False, True], ids=["T", "Tn"])
@pytest.mark.parametrize("labelled", ["none", "shared", "per_net"])
@pytest.mark.parametrize("shared", [False, True], ids=["per_net", "shared"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}B{}K{}".format(*s))
def test_matches_reference(assert_matches, device, shape, shared, labelled, per_net_temperature):
    nets, samples, classes = shape
    logits = 3 * torch.randn(samples, nets, classes)
    targets = 3 * torch.randn(samples, classes) if shared else 3 * torch.randn(shape)
    label_shape = {"none": None, "shared": (samples,), "per_net": (nets, samples)}[labelled]
    labels = None if label_shape is None else torch.randint(classes, label_shape)
    temperature = torch.rand(nets) * 4 + 0.5 if per_net_temperature else 4.0

    def found(logits):
        t = temperature.to(device) if per_net_temperature else temperature
        given = None if labels is None else labels.to(device)
        return distillation_loss(logits.transpose(0, 1), targets.to(device), given, t, 0.7)

    def expected(logits):
        t = temperature.double() if per_net_temperature else temperature
        z = logits.transpose(0, 1)
        return distillation_loss_reference(z, targets.double(), labels, t, 0.7)

    if classes == 1:  # one class leaves nothing to learn: exactly zero, without a scale
        logits = logits.to(device).requires_grad_()
        with backend("triton"):
            loss = found(logits)
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        assert (loss == 0).all()
        assert (grad == 0).all()
        return
    assert_matches(found, expected, logits=logits)


def test_bf16(assert_matches, device):
    logits, targets = torch.randn(2, 20, 10).bfloat16(), torch.randn(20, 10).bfloat16()
    labels = torch.randint(10, (20,))
    assert_matches(
        lambda logits: distillation_loss(logits, targets.to(device), labels.to(device)),
        lambda logits: distillation_loss_reference(logits, targets.double(), labels),
        logits=logits,
    )


def test_large_logits_stay_finite(assert_matches, device):
    logits, targets = 1e3 * torch.randn(2, 5, 10), 1e3 * torch.randn(5, 10)
    assert_matches(
        lambda logits: distillation_loss(logits, targets.to(device), temperature=0.5),
        lambda logits: distillation_loss_reference(logits, targets.double(), temperature=0.5),
        logits=logits,
    )


def test_reference_equals_torch_losses():
    z, t, labels = torch.randn(3, 5, 4), torch.randn(5, 4), torch.randint(4, (5,))
    with backend("torch"):
        found = distillation_loss(z, t, labels, temperature=2.0, alpha=0.6)
    for n in range(3):
        kl = F.kl_div(F.log_softmax(z[n] / 2, -1), F.softmax(t / 2, -1), reduction="batchmean")
        expected = 0.6 * 4 * kl + 0.4 * F.cross_entropy(z[n], labels)
        torch.testing.assert_close(found[n], expected)


def test_zero_at_the_target():
    z = torch.randn(2, 5, 4, requires_grad=True)
    loss = distillation_loss(z, z.detach())
    (grad,) = torch.autograd.grad(loss.sum(), z)
    torch.testing.assert_close(loss, torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(grad, torch.zeros_like(z), atol=1e-6, rtol=0)


def test_finite_differences(assert_gradient, device):
    t, labels = torch.randn(3, 4).to(device), torch.randint(4, (3,)).to(device)
    assert_gradient(
        lambda logits: distillation_loss(logits, t, labels, 1.0, 0.5), logits=torch.randn(2, 3, 4)
    )


z, t, labels = torch.randn(2, 3, 4), torch.randn(3, 4), torch.zeros(3, dtype=torch.long)
BAD = {
    "rank": ((z[0], t), r"logits \[3, 4\] must be \[N, B, K\] with no axis empty"),
    "no samples": ((z[:, :0], t[:0]), "no axis empty"),
    "targets": ((z, t[:, :3]), r"targets \[3, 3\] must be \[B, K\] or \[N, B, K\] .* B = 3, K = 4"),
    "labels": ((z, t, labels[:2]), r"labels \[2\] must be \[B\] or \[N, B\] .* N = 2, B = 3"),
    "label dtype": ((z, t, labels.float()), "must be torch.int64 on cpu"),
    "label device": ((z, t, labels.to("meta")), "must be torch.int64 on cpu"),
    "temperature": (
        (z, t, None, torch.ones(3)),
        r"temperature \[3\] must be .* N = 2",
    ),
    "dtype": ((z, t.double()), "must be torch.float32 on cpu"),
}


@pytest.mark.parametrize(("args", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_bad_input(name, args, message):
    with backend(name), pytest.raises(ValueError, match=message):
        distillation_loss(*args)


def test_opcheck(device):
    z = torch.randn(2, 3, 4, device=device, requires_grad=True)
    t = torch.randn(3, 4, device=device)
    labels = torch.zeros(3, dtype=torch.long, device=device)
    args = (z, t, labels, torch.full((2,), 4.0, device=device), 0.9)
    torch.library.opcheck(torch.ops.netspace_lite.distillation_loss.default, args)


def test_labels_beyond_the_classes_are_refused():
    z, t = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    for label in (-100, 3):
        labels = torch.tensor([0, 1, 2, label])
        for name in ("torch", "triton"):
            with backend(name), pytest.raises(RuntimeError):
                distillation_loss(z, t, labels)


def test_the_loss_has_the_logits_dtype(device):
    z, t = torch.randn(2, 2, 4, 3, device=device).bfloat16()
    for temperature in (2.0, torch.full((2,), 2.0, device=device)):
        for name in ("torch", "triton"):
            with backend(name):
                assert distillation_loss(z, t, temperature=temperature).dtype == torch.bfloat16
