"""The authors' encoder and decoder: published sizes, and a space built of them."""

import pytest
import torch

import netspace_lite as ns
from netspace_lite.paper import ConvDecoder, ConvEncoder

CONFIG = ns.SpaceConfig(embedding=4096, chunk=64, probes=0, parts="paper")


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.fixture
def zoo():
    net = ns.lite_net("LeNetLike", (1, 8, 8), 10)
    return ns.Zoo(net, ns.initial_rows(net, range(4)))


def test_parts_have_the_published_sizes():
    assert round(count(ConvEncoder(4096)) / 1e6, 2) == 6.79
    decoder = ConvDecoder(4096, 8, 10_000, torch.randn(80_000))
    assert round(count(decoder) / 1e6, 1) == 2.9
    assert decoder(torch.randn(2, 4096)).shape == (2, 80_000)


def test_a_space_of_them_fits_saves_and_loads(zoo, tmp_path):
    x = torch.randn(16, 1, 8, 8)
    space = ns.NetSpace.for_zoos(zoo, x, CONFIG)
    before = ns.Distillation(space, zoo, x, nets=4, samples=16)
    losses = []
    ns.fit(
        space,
        before,
        lambda s: {"score": 0.0},
        6,
        epoch=1,
        log=lambda row: losses.append(row["loss"]),
    )
    assert min(losses[3:]) < losses[0]
    space.save(tmp_path)
    again = ns.NetSpace.load(tmp_path)
    z = space.encode(zoo)
    torch.testing.assert_close(again.encode(zoo), z)
    torch.testing.assert_close(again.decode(z).outputs(x), space.decode(z).outputs(x))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (ns.SpaceConfig(parts="paper", embedding=4096, chunk=64), "probes=0"),
        (ns.SpaceConfig(parts="paper", embedding=128, chunk=64, probes=0), "4096"),
        (ns.SpaceConfig(parts="paper", embedding=4096, chunk=60, probes=0), "eights"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(zoo, config, said):
    with pytest.raises(ValueError, match=said):
        ns.NetSpace.for_zoos(zoo, torch.randn(16, 1, 8, 8), config)


def test_parts_of_nobodys_are_refused():
    with pytest.raises(ValueError, match="parts should be one of .*, not 'theirs'"):
        ns.SpaceConfig(parts="theirs")
