"""The optimiser beside torch's own Muon and AdamW, and beside the singular value decomposition."""

import pytest
import torch
from torch import nn

from netspace_lite.optimiser import Muon, orthogonal


@pytest.mark.parametrize("shape", [(40, 17), (17, 40)])
def test_the_orthogonal_part_is_that_of_the_svd(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.double)
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(orthogonal(x, floor=0.0), left @ right)
    torch.testing.assert_close(orthogonal(x), left @ right, rtol=0, atol=1e-4)


def test_directions_lost_in_rounding_stay_small():
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(60, 20), full_matrices=False)
    values = torch.logspace(0, -9, 20)
    found = torch.linalg.svdvals(orthogonal((left * values) @ right))
    assert found[0] > 0.9
    assert found[-1] < 0.1
    assert found.max() < 1.01
    assert orthogonal(torch.zeros(5, 3)).isfinite().all()


def steps(make, module, count=3):
    optimisers, generator = make(module), torch.Generator().manual_seed(1)
    for _ in range(count):
        for p in module.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for optimiser in optimisers:
            optimiser.step()
    return module


def layers(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.LayerNorm(48), nn.Linear(48, 4)).to(dtype)


def test_what_is_no_wide_matrix_steps_as_torchs_adamw():
    ours = steps(lambda m: [Muon(m, 1e-2)], layers())
    expected = steps(lambda m: [torch.optim.AdamW(m.parameters(), 1e-2)], layers())
    for (name, p), q in zip(ours.named_parameters(), expected.parameters(), strict=True):
        if name == "0.weight":
            assert (p - q).abs().max() > 1e-3
        else:
            torch.testing.assert_close(p, q)


def test_a_matrix_over_256_on_its_shorter_side_steps_as_torchs_adamw():
    def wide():
        torch.manual_seed(0)
        return nn.Linear(257, 260)

    ours = steps(lambda m: [Muon(m, 1e-2)], wide()).weight
    expected = steps(lambda m: [torch.optim.AdamW(m.parameters(), 1e-2)], wide()).weight
    torch.testing.assert_close(ours, expected)


def test_wide_matrices_step_nearly_as_torchs_muon():
    """Torch's has singular values between 0.7 and 1.2 from its iteration, ours have 1."""
    start = layers()[0].weight.detach().clone()
    options = {"lr": 1e-2, "weight_decay": 1e-2, "adjust_lr_fn": "match_rms_adamw"}
    ours = steps(lambda m: [Muon(m, 1e-2)], layers())[0].weight - start
    theirs = steps(lambda m: [torch.optim.Muon([m[0].weight], **options)], layers())[0].weight
    ours, theirs = ours.detach(), theirs.detach() - start
    assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), 0) > 0.98
    assert 1 / 1.2 < (ours.norm() / theirs.norm()).item() < 1 / 0.7
