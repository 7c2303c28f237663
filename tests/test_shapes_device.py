"""Nothing about shapes forgets its device: the same answers on a pretended CUDA device."""

import pytest
import torch

from netspace_lite import Nets, NetSpace, Siren, SpaceConfig, train_zoo
from netspace_lite.shapes import (
    ScanLoss,
    ShapeTask,
    agreement,
    chair_parts,
    chair_sdf,
    draw_chairs,
    level_off,
    meshes,
    sample_chairs,
    scan,
    shape_recipes,
    winding_number,
)

pretended = pytest.importorskip("pretend_cuda", reason="there is no pretence of a CUDA device")
NET = Siren(hidden=8, omega=15.0)


def results(device):
    """Everything that computes with tensors, with what was given on ``device``."""
    chairs = draw_chairs(3)
    parts, samples = chair_parts(chairs).to(device), sample_chairs(chairs, 256).to(device)
    samples = level_off(samples, 0.1)
    towards = torch.tensor([[0.0, 0.6, 0.8]]).expand(3, 3).to(device)
    scans = scan(lambda x: chair_sdf(parts, x), towards, points=50)
    task = ShapeTask(samples, 64)
    zoo = train_zoo(NET, task, shape_recipes(3, steps=30), progress=False)
    config = SpaceConfig(embedding=4, probes=16, weights=False, hidden=8)
    space = NetSpace.for_zoos(zoo, samples.points.flatten(0, 1), config)
    nets = Nets(zoo.batched, zoo.rows.clone().requires_grad_())
    loss = ScanLoss(scans, towards, limit=0.1, samples=8)(nets, torch.Generator().manual_seed(0))
    loss.sum().backward()
    found = {
        "sdf": samples.sdf,
        "scans": scans,
        "rows": zoo.rows,
        "loss": loss.detach(),
        "gradient": nets.rows.grad,
        "agreement": agreement(space, zoo, samples.points),
        "winding": winding_number(meshes(zoo, 16)[0], samples.points[0]),
    }
    return found | zoo.scores


def test_results_are_the_same_on_another_device(monkeypatch):
    monkeypatch.setenv("NETSPACE_BACKEND", "torch")  # Triton needs a device that is real
    expected = results("cpu")
    with pretended.pretend_cuda():
        found = results("cuda")
        devices = {name: value.device.type for name, value in found.items()}
        found = {name: value.cpu() for name, value in found.items()}
    on_cpu = {"agreement", "error", "within_001"}
    assert devices == {name: "cpu" if name in on_cpu else "cuda" for name in expected}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_batches_are_copied_once_and_scores_lie_on_the_cpu(monkeypatch):
    monkeypatch.setenv("NETSPACE_BACKEND", "torch")
    recipes, members = shape_recipes(3, steps=2), torch.arange(3)
    with pretended.pretend_cuda():
        task = ShapeTask(sample_chairs(draw_chairs(3), 64).to("cuda"), 16)
        nets = train_zoo(NET, task, recipes, progress=False)
        assert not any(score.is_cuda for score in task.scores(nets, members).values())
    with pretended.pretend_cuda(strict=True):
        assert all(part.is_cuda for part in task.batch(recipes, members, 0))
