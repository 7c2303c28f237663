"""Modules described to the decoder by their layout."""

import math

import pytest
import torch
from torch import nn
from toy import generator

from netspace_lite.architectures import LeNetLike, ResNet, VanillaCNN
from netspace_lite.described import (
    DescribedDecoder,
    DescribedDistillation,
    Largest,
    describe_layers,
)
from netspace_lite.layout import Layout
from netspace_lite.training import fit

IMAGE = (1, 8, 8)


def resnet(depth):
    return ResNet(IMAGE, 3, depth, (4, 4, 4, 4), strides=(2, 1, 2))


def test_a_description_tells_all_layers_apart():
    rows = describe_layers(Layout.of(resnet(14)))
    assert len(rows) == len(list(resnet(14).parameters()))
    assert len(torch.unique(rows.mul(1e4).round(), dim=0)) == len(rows)


def test_depth_is_told_from_both_ends():
    shallow, deep = (describe_layers(Layout.of(resnet(depth))) for depth in (8, 20))
    torch.testing.assert_close(shallow[0][:7], deep[0][:7])  # the stem: same kind, shape, depth 0
    assert not torch.allclose(shallow[0], deep[0])  # but further from the end


def test_every_module_within_bounds_can_be_asked_for():
    decoder = DescribedDecoder(16, hidden=8)
    z = torch.randn(2, 16)
    for module in (resnet(8), resnet(26), VanillaCNN(IMAGE, 3, (4, 8), (2, 2)), nn.Linear(5, 3)):
        nets = decoder.decode(z, module)
        assert nets.rows.shape == (2, Layout.of(module).size)
        assert torch.isfinite(nets.rows).all()
    assert len(decoder.decode(z[0], resnet(8))) == 1


def test_narrow_layers_are_corners_of_wide_ones_of_the_same_description():
    decoder = DescribedDecoder(16, hidden=8)
    row = decoder(torch.randn(1, 16), Layout(("weight",), ((6, 5),)))
    assert row.shape == (1, 30)
    big = decoder(torch.zeros(1, 16), Layout(("w",), ((64, 128),))).view(64, 128)
    assert float(big.detach().std()) * 128**0.5 == pytest.approx(
        2**0.5, rel=0.5
    )  # starts at a usual scale


def test_what_cannot_be_made_is_named():
    decoder = DescribedDecoder(16, largest=Largest(channels=4))
    with pytest.raises(ValueError, match=r"'0.weight' of shape \(8, 1, 3, 3\) is larger than"):
        decoder.decode(torch.zeros(16), nn.Sequential(nn.Conv2d(1, 8, 3)))
    with pytest.raises(ValueError, match="'in_proj' of shape .* is no layer"):
        describe_layers(Layout(("in_proj",), ((2, 3, 4),)))
    for layer in (nn.LayerNorm(6), nn.PReLU()):  # seen before: the same as a bias, near 0
        with pytest.raises(ValueError, match=r"parameter '1\.weight' of shape .* is no layer"):
            decoder.decode(torch.zeros(16), nn.Sequential(nn.Linear(5, 6), layer))


def test_largest_of_modules_holds_them():
    modules = [resnet(8), LeNetLike((1, 28, 28), 3, hidden=(200,))]
    largest = Largest.of(modules)
    assert largest == Largest(channels=16, kernel=5, outputs=200, inputs=256)
    for module in modules:
        DescribedDecoder(4, hidden=4, largest=largest).decode(torch.zeros(4), module)


def test_few_modules_weigh_as_much_as_many():
    """Seen before: with more kinds asked for than there are, the loss was a share of itself."""
    loss, z = (lambda nets, generator: torch.ones(len(nets))), torch.randn(5, 16)
    for count, kinds in ((1, 3), (2, 3), (2, 2), (2, 1)):
        objective = DescribedDistillation([resnet(8), resnet(14)][:count], z, loss, kinds=kinds)
        found = objective(DescribedDecoder(16, hidden=4), torch.Generator())
        assert float(found) == pytest.approx(1)


def test_training_lowers_the_loss_of_every_module_named():
    lenet = LeNetLike(IMAGE, 3, channels=(4,), hidden=(8,), kernel=3)
    decoder, random = DescribedDecoder(16, hidden=16), generator()
    x, z = torch.randn(30, *IMAGE, generator=random), torch.randn(5, 16, generator=random)
    wanted = (x[:, 0, 0, 0] > 0).long()

    def loss(nets, generator):
        logits = nets(x).transpose(1, 2)
        return nn.functional.cross_entropy(
            logits, wanted.expand(len(logits), -1), reduction="none"
        ).mean(1)

    objective = DescribedDistillation([lenet, resnet(8)], z, loss, kinds=2)
    before = objective(decoder, torch.Generator().manual_seed(0)).detach()
    fit(decoder, objective, lambda d: {"score": 0.0}, 30, lr=5e-3, epoch=30)
    assert objective(decoder, torch.Generator().manual_seed(0)).detach() < before / 2


def test_a_description_is_what_it_says():
    """Kind, shape, and depth from both ends, of a pointwise convolution in the middle of three."""
    shapes = (8, 1, 3, 3), (8,), (4, 8, 1, 1), (2, 4)
    rows = describe_layers(Layout(tuple(f"{n}.p" for n in range(4)), shapes))
    half = math.pi / 2
    expected = [0, 1, 0, 0, 2 / 6, 3 / 6, 0.5, 0.1, 0.1, 0, 0]
    expected += [wave(k * half) for k in (1, 2, 4) for wave in (math.sin, math.cos)]
    torch.testing.assert_close(rows[2], torch.tensor(expected))
    assert rows[:, :4].argmax(1).tolist() == [0, 3, 1, 2]
    assert rows[:, 6].tolist() == [0, 0, 0.5, 1]
    assert rows[:, 9:11].tolist() == [[1, 0], [1, 0], [0, 0], [0, 1]]


def test_the_largest_layer_is_as_wide_and_as_high_on_every_side():
    net = nn.Sequential(nn.Conv2d(9, 2, (1, 5)), nn.Flatten(), nn.Linear(3, 7), nn.Linear(7, 2))
    assert Largest.of([net]) == Largest(channels=9, kernel=5, outputs=7, inputs=7)


@pytest.mark.parametrize(
    ("small", "large", "fan_in"),
    [
        ((6, 5), (64, 128), (5, 128)),
        ((2, 3, 3, 3), (32, 32, 3, 3), (27, 288)),
        ((2, 3, 1, 2), (32, 32, 3, 3), (6, 288)),
        ((4, 3, 1, 1), (32, 32, 1, 1), (3, 32)),
        ((7,), (64,), (1, 1)),
    ],
    ids=["linear", "convolution", "window", "pointwise", "bias"],
)
def test_a_smaller_layer_is_the_corner_of_the_largest_in_its_own_scale(small, large, fan_in):
    decoder = DescribedDecoder(16, hidden=8)
    with torch.no_grad():
        for parameter in decoder.layer.parameters():
            parameter.zero_()  # all layers are described alike
    z = torch.randn(2, 16, generator=generator())
    cut, full = (decoder(z, Layout(("w",), (s,))).view(2, *s) for s in (small, large))
    corner = full[(slice(None), *(slice(size) for size in small))]
    torch.testing.assert_close(cut * fan_in[0] ** 0.5, corner * fan_in[1] ** 0.5)


def test_layers_start_at_a_usual_scale():
    """Weights as He's, that keep the size of what goes through; biases close to 0."""
    decoder, z = DescribedDecoder(16, hidden=64), torch.randn(8, 16, generator=generator())
    for shape, usual in (((64, 128), (2 / 128) ** 0.5), ((32, 32, 3, 3), (2 / 288) ** 0.5)):
        found = decoder(z, Layout(("w",), (shape,))).std().item()
        assert found == pytest.approx(usual, rel=0.2)
    assert decoder(z, Layout(("b",), ((64,),))).std().item() == pytest.approx(0.058, rel=0.2)


def test_a_decoder_follows_its_seed():
    z = torch.ones(1, 16)
    first, same, other = (
        DescribedDecoder(16, hidden=4, seed=seed).decode(z, nn.Linear(5, 3)).rows
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_a_step_draws_modules_and_embeddings_at_random():
    seen, z = [], torch.arange(20.0)[:, None].expand(-1, 16)
    modules = [resnet(8), resnet(14), VanillaCNN(IMAGE, 3, (4, 8), (2, 2))]
    objective = DescribedDistillation(modules, z, lambda nets, _: nets.rows.sum(1), kinds=1)
    decoder = DescribedDecoder(16, hidden=4)
    decode = decoder.decode
    decoder.decode = lambda z, batched: (seen.append((batched, z[:, 0])), decode(z, batched))[1]
    for step in range(20):
        objective(decoder, generator(step))
    assert len({id(batched) for batched, _ in seen}) == 3
    assert torch.stack([drawn for _, drawn in seen]).unique().numel() > 10
    assert {len(drawn) for _, drawn in seen} == {2}
