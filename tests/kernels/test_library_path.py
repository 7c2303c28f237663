"""The library's own path, end to end: a training step of a small space, Triton against PyTorch."""

import pytest
import torch
from netspace_lite.kernels import backend, chunk_pack, distillation_loss

from netspace_lite.architectures import LeNetLike, Siren
from netspace_lite.functional import Batched, Nets
from netspace_lite.layout import Layout, to_prep
from netspace_lite.space import NetSpace, SpaceConfig
from netspace_lite.training import InstanceDistillation


def tiny_net():
    return LeNetLike((1, 6, 6), 3, channels=(2, 3), hidden=(5,), kernel=3)


def tiny_zoo(make, nets=4):
    modules = [make() for _ in range(nets)]
    return Nets(modules[0], Layout.of(modules[0]).pack(modules).detach())


def one_step(name, device):
    """A space after one step of SGD on instance distillation, and the loss of that step."""
    torch.manual_seed(1)
    images = torch.randn(8, 1, 6, 6)
    zoo = tiny_zoo(tiny_net)
    config = SpaceConfig(embedding=6, chunk=16, chunk_features=4, probes=3, hidden=8)
    space = NetSpace.for_zoos(zoo, images, config).to(device)
    zoo = Nets(zoo.module, zoo.rows.to(device))

    def loss(outputs, answers, scale):
        return distillation_loss(outputs, answers, temperature=scale.flatten())

    with backend(name):
        objective = InstanceDistillation(
            space, zoo, images.to(device), loss=loss, nets=3, samples=5
        )
        value = objective(space, torch.Generator().manual_seed(0))
        value.backward()
    with torch.no_grad():
        for p in space.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad
    return value.item(), {k: v.detach().cpu() for k, v in space.named_parameters()}


def test_one_training_step(device):
    before = dict(one_step("torch", device)[1])
    loss, triton = one_step("triton", device)
    reference_loss, reference = one_step("torch", device)
    assert loss == pytest.approx(reference_loss, rel=1e-4)
    for name, value in reference.items():
        torch.testing.assert_close(value, before[name])  # the step itself is deterministic
        torch.testing.assert_close(
            triton[name], value, atol=2e-5, rtol=2e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("make", [tiny_net, lambda: Siren(6)], ids=["LeNetLike", "Siren"])
@pytest.mark.parametrize("per_net", [False, True], ids=["shared", "per_net"])
def test_batched_nets(assert_close, device, make, per_net):
    """Outputs and gradients of the functional evaluation against a loop over modules in fp64."""
    zoo = tiny_zoo(make)
    size = (3,) if make is not tiny_net else (1, 6, 6)
    x = torch.randn(*((4,) if per_net else ()), 5, *size)
    batched, rows = Batched(zoo.module), zoo.rows.to(device).requires_grad_()
    with backend("triton"):
        found = batched(rows, x.to(device), per_net)
    (grad,) = torch.autograd.grad(found.square().sum(), rows)
    outputs, gradients = [], []
    for n in range(4):
        module = zoo.to_module(n).double()
        y = module((x[n] if per_net else x).double())
        y.square().sum().backward()
        outputs.append(y.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
    assert_close("outputs", found, torch.stack(outputs))
    assert_close("gradient of rows", grad, torch.stack(gradients))


def test_packing_agrees_with_the_layout(device):
    rows = tiny_zoo(tiny_net).rows.to(device)
    layout = Layout.of(tiny_net())
    chunks = layout.chunks(16)
    stacked = list(layout.views(rows).values())
    with backend("triton"):
        assert torch.equal(chunk_pack(stacked, chunks, 16), to_prep(rows, chunks, 16))
        assert torch.equal(chunk_pack(rows, chunks, 16), to_prep(rows, chunks, 16))
