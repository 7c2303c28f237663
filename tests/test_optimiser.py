"""The optimiser beside torch's own Muon and AdamW, and beside the singular value decomposition."""

import torch
from torch import nn

from netspace_lite import optimiser
from netspace_lite.optimiser import Muon, inverse_root


def test_the_inverse_root_gives_the_orthogonal_part_of_the_svd():
    torch.manual_seed(0)
    x = torch.randn(40, 17, dtype=torch.double)
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(x @ inverse_root(x, floor=0.0), left @ right)
    torch.testing.assert_close(x @ inverse_root(x), left @ right, rtol=0, atol=1e-4)


def test_directions_lost_in_rounding_stay_small():
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(60, 20), full_matrices=False)
    values = torch.logspace(0, -9, 20)
    x = (left * values) @ right
    found = torch.linalg.svdvals(x @ inverse_root(x))
    assert found[0] > 0.9
    assert found[-1] < 0.1
    assert found.max() < 1.01
    assert inverse_root(torch.zeros(5, 3)).isfinite().all()


def steps(make, module, count=3):
    optimisers, generator = make(module), torch.Generator().manual_seed(1)
    for _ in range(count):
        for p in module.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for one in optimisers:
            one.step()
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


def test_a_matrix_over_512_on_its_shorter_side_steps_as_torchs_adamw():
    def wide():
        torch.manual_seed(0)
        return nn.Linear(513, 516)

    ours = steps(lambda m: [Muon(m, 1e-2)], wide()).weight
    expected = steps(lambda m: [torch.optim.AdamW(m.parameters(), 1e-2)], wide()).weight
    torch.testing.assert_close(ours, expected)


def test_wide_matrices_step_nearly_as_torchs_muon(monkeypatch):
    """Torch's has singular values between 0.7 and 1.2 from its iteration, ours have 1."""
    monkeypatch.setattr(optimiser, "LOOK", 1)
    start = layers()[0].weight.detach().clone()
    options = {"lr": 1e-2, "weight_decay": 1e-2, "adjust_lr_fn": "match_rms_adamw"}
    ours = steps(lambda m: [Muon(m, 1e-2)], layers())[0].weight - start
    theirs = steps(lambda m: [torch.optim.Muon([m[0].weight], **options)], layers())[0].weight
    ours, theirs = ours.detach(), theirs.detach() - start
    assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), 0) > 0.98
    assert 1 / 1.2 < (ours.norm() / theirs.norm()).item() < 1 / 0.7


def test_between_two_looks_directions_stay_and_steps_are_as_long():
    torch.manual_seed(0)
    layer, roots = nn.Linear(32, 48, bias=False), []
    muon = Muon(layer, 1e-2, weight_decay=0.0)
    for _ in range(optimiser.LOOK + 2):
        before = layer.weight.detach().clone()
        layer.weight.grad = torch.randn(48, 32)
        muon.step()
        moved = layer.weight.detach() - before
        torch.testing.assert_close(moved.square().mean().sqrt().item(), 0.2 * 1e-2)
        roots.append(muon.state[layer.weight]["root"].clone())
    assert all(torch.equal(root, roots[0]) for root in roots[: optimiser.LOOK])
    assert (roots[optimiser.LOOK] - roots[0]).norm() > 0.1 * roots[0].norm()
    assert torch.equal(roots[-1], roots[-2])


def test_a_matrix_and_its_transpose_step_alike():
    torch.manual_seed(0)
    tall, wide = nn.Linear(20, 50, bias=False), nn.Linear(50, 20, bias=False)
    wide.weight.data.copy_(tall.weight.T)
    optimisers = Muon(tall, 1e-2), Muon(wide, 1e-2)
    for _ in range(3):
        tall.weight.grad = torch.randn(50, 20)
        wide.weight.grad = tall.weight.grad.T.contiguous()
        for one in optimisers:
            one.step()
    torch.testing.assert_close(tall.weight.T, wide.weight, rtol=1e-4, atol=1e-5)


def test_scalars_empty_and_half_parameters_step():
    torch.manual_seed(0)
    module = nn.Linear(20, 30)
    module.scalar, module.empty = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.ones(0, 3))
    for kind in (torch.float32, torch.bfloat16):
        module = module.to(kind)
        before = module.weight.detach().clone()
        steps(lambda m: [Muon(m, 1e-1)], module)
        assert module.scalar.isfinite()
        assert (module.weight - before).abs().max() > 0.01


def test_blocks_of_rows_step_as_the_whole(monkeypatch):
    expected = steps(lambda m: [Muon(m, 1e-2)], layers(torch.double))
    monkeypatch.setattr(optimiser, "BLOCK", 100)
    found = steps(lambda m: [Muon(m, 1e-2)], layers(torch.double))
    for p, q in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_gradient_of_zeros_at_a_look_does_not_stop_what_follows():
    layer = nn.Linear(32, 48, bias=False)
    muon = Muon(layer, 1e-2, weight_decay=0.0)
    layer.weight.grad = torch.zeros(48, 32)
    muon.step()
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.randn(48, 32)
    muon.step()
    moved = (layer.weight.detach() - before).square().mean().sqrt().item()
    torch.testing.assert_close(moved, 0.2 * 1e-2)


def test_a_step_inside_autocast_keeps_its_precision():
    """Directions of bf16 are a percent off; scripts may keep a whole fit in mixed precision."""
    expected = steps(lambda m: [Muon(m, 1e-2)], layers())
    with torch.autocast("cpu"):
        found = steps(lambda m: [Muon(m, 1e-2)], layers())
    for p, q in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_closure_computes_the_gradients():
    """As loops of other libraries call an optimiser."""
    layers = [nn.Linear(20, 20) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    x, found = torch.randn(5, 20), []
    for layer, by_closure in zip(layers, (True, False), strict=True):
        muon = Muon(layer, 1e-2)

        def closure(layer=layer):
            loss = layer(x).square().mean()
            loss.backward()
            return loss

        found.append(muon.step(closure) if by_closure else (closure(), muon.step())[0])
    assert torch.equal(*found)
    assert torch.equal(layers[0].weight, layers[1].weight)
