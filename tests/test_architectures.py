"""Architectures against the published parameter counts and torch's own layers."""

import pytest
import torch
from torch import nn

from netspace_lite.architectures import (
    ARCHITECTURES,
    LITE_NETS,
    LeNetLike,
    ResNet,
    Siren,
    architecture,
    build,
    describe,
    lite_net,
    name_of,
    paper_net,
)
from netspace_lite.layout import Layout

# After folding batch norm: Berardi et al. 2022 and the authors' public code.
PUBLISHED = {
    ("LeNetLike", "cifar10"): 62_006,
    ("VanillaCNN", "cifar10"): 68_818,
    ("ResNet8", "cifar10"): 77_706,
    ("ResNet32", "cifar10"): 465_674,
    ("ResNet56", "cifar10"): 853_642,
    ("LeNetLike", "tinyimagenet"): 79_612,
    ("VanillaCNN", "tinyimagenet"): 112_856,
    ("ResNet8", "tinyimagenet"): 128_456,
    ("ResNet32", "tinyimagenet"): 516_424,
    ("ResNet56", "tinyimagenet"): 904_392,
}


@pytest.mark.parametrize(("name", "dataset"), PUBLISHED, ids="-".join)
def test_published_parameter_counts(name, dataset):
    net = paper_net(name, dataset)
    assert sum(p.numel() for p in net.parameters()) == PUBLISHED[name, dataset]


def test_siren_has_the_published_count():
    assert Layout.of(Siren()).size == 67_073


@pytest.mark.parametrize("name", LITE_NETS)
@pytest.mark.parametrize("image", [(1, 8, 8), (3, 16, 16), (1, 28, 28), (2, 8, 13)], ids=str)
def test_lite_nets_fit_any_image(name, image):
    net = lite_net(name, image, 7)
    assert net(torch.randn(2, *image)).shape == (2, 7)


def test_paper_nets_answer_images_of_their_size():
    assert paper_net("LeNetLike", "tinyimagenet")(torch.randn(1, 3, 64, 64)).shape == (1, 200)
    assert paper_net("VanillaCNN", "cifar10")(torch.randn(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize("name", LITE_NETS)
def test_built_from_its_description_it_is_the_same_architecture(name):
    net = lite_net(name, (1, 8, 8), 10)
    again = build(describe(net))
    again.load_state_dict(net.state_dict())
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(again(x), net(x))


def test_names_tell_depths_apart():
    names = [name_of(net) for net in (ResNet((1, 8, 8), 3, 14), nn.Linear(2, 3))]
    assert names == ["ResNet14", "Linear"]


def test_bad_requests_say_what_there_is():
    with pytest.raises(ValueError, match="6n\\+2"):
        ResNet((1, 8, 8), 10, depth=9)
    with pytest.raises(ValueError, match="too small"):
        LeNetLike((1, 8, 8), 10)
    with pytest.raises(ValueError, match="choose from LeNetLike"):
        lite_net("AlexNet", (1, 8, 8), 10)
    with pytest.raises(ValueError, match="choose from cifar10"):
        paper_net("ResNet8", "mnist")
    with pytest.raises(ValueError, match="decorate its class"):
        build({"name": "MyNet", "config": None})


def test_options_are_kept_by_name_and_arguments_without_names_refused():
    @architecture
    class Optional(nn.Module):
        def __init__(own, classes, **options):
            super().__init__()
            own.layers = nn.Linear(options.get("width", 4), classes)

    try:
        module = build(describe(Optional(3, width=7)))
        assert module.layers.weight.shape == (3, 7)
        assert module.config == {"classes": 3, "width": 7}
        with pytest.raises(TypeError, match="give them names"):

            @architecture
            class Listed(nn.Module):
                def __init__(self, *widths):
                    super().__init__()
    finally:
        ARCHITECTURES.pop("Optional")
