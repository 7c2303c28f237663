"""The explorer draws what a space decodes, as a still picture and with sliders."""

import builtins

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

from netspace_lite import Images, Nets, NetSpace, SpaceConfig
from netspace_lite.tutorial.explorer import explorer, inspect

matplotlib.use("agg")


@pytest.fixture
def images():
    return Images(torch.randn(30, 4), torch.arange(30) % 3)


@pytest.fixture
def space(images):
    net = nn.Sequential(nn.Linear(4, 3))
    config = SpaceConfig(embedding=6, probes=8, weights=False, hidden=16)
    return NetSpace.for_zoos(Nets(net, torch.randn(9, 15)), images.x, config)


def test_inspect_names_the_net_its_accuracy_and_what_it_confuses(space, images):
    z = torch.randn(9, 6)
    _, right = inspect(space, z, torch.rand(9) * 100, z[2], images)
    net = space.decode(z[2])
    assert right.get_title() == f"Sequential, accuracy {float(net.accuracy(images)[0]):.1f}%"
    given = net.outputs(images.x)[0].argmax(-1)
    share = [
        100 * float((given[images.y == k] == j).float().mean()) for k in range(3) for j in range(3)
    ]
    assert [text.get_text() for text in right.texts] == [f"{s:.0f}" for s in share]
    plt.close("all")


def test_the_explorer_has_a_slider_for_each_way_to_move(space, images):
    pytest.importorskip("ipywidgets")
    z, values = torch.randn(9, 6), torch.arange(9.0)
    widget = explorer(space, z, values, images)
    move, start, end, position, first, second = widget.children[:-1]
    assert (start.value, end.value, position.value) == (0, 8, 0.5)
    assert move.options == ("on a line", "on the map")
    assert first.min < 0 < first.max
    assert second.min < 0 < second.max
    assert not any(slider.continuous_update for slider in (start, end, position, first, second))
    plt.close("all")


def test_moving_a_slider_draws_another_net(space, images, monkeypatch):
    pytest.importorskip("ipywidgets")
    drawn = []
    monkeypatch.setattr(
        "netspace_lite.tutorial.explorer.inspect",
        lambda space, z, values, at, images: drawn.append(at),
    )
    z = torch.randn(9, 6)
    widget = explorer(space, z, torch.arange(9.0), images)
    move, _, _, position, first, _ = widget.children[:-1]
    position.value = 1.0
    torch.testing.assert_close(drawn[-1], z[8])
    move.value = "on the map"
    first.value = first.max
    assert drawn[-1].shape == (6,)
    assert not torch.equal(drawn[-1], z[8])


def test_without_widgets_the_explorer_says_so(space, images, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "ipywidgets":
            raise ImportError("No module named 'ipywidgets'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="ipywidgets"):
        explorer(space, torch.randn(9, 6), torch.arange(9.0), images)
