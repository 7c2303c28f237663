"""The explorer draws what a space decodes, as a still picture and with sliders."""

import builtins

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

from netspace_lite import plots
from netspace_lite.data import Images
from netspace_lite.explorer import confusion, explorer, inspect
from netspace_lite.functional import Nets
from netspace_lite.space import NetSpace, SpaceConfig

matplotlib.use("agg")


@pytest.fixture
def images():
    return Images(torch.randn(30, 4), torch.arange(30) % 3)


@pytest.fixture
def space(images):
    net = nn.Sequential(nn.Linear(4, 3))
    config = SpaceConfig(embedding=6, probes=8, weights=False, hidden=16)
    return NetSpace.for_zoos(Nets(net, torch.randn(9, 15)), images.x, config)


def test_confusion_counts_pairs_of_classes():
    logits = torch.eye(3)[[0, 1, 1, 2]]  # given: 0, 1, 1, 2
    found = confusion(logits, torch.tensor([0, 0, 1, 2]))
    assert found.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]


def test_inspect_names_the_net_and_its_accuracy(space, images):
    z = torch.randn(9, 6)
    _, right = inspect(space, z, torch.rand(9) * 100, z[2], images)
    accuracy = float(space.decode(z[2]).accuracy(images)[0])
    assert right.get_title() == f"Sequential, accuracy {accuracy:.1f}%"
    plt.close("all")


def test_the_explorer_has_a_slider_for_each_way_to_move(space, images):
    pytest.importorskip("ipywidgets")
    z, values = torch.randn(9, 6), torch.arange(9.0)
    widget = explorer(space, z, values, images)
    start, end, position = widget.children[1].children[0].children
    assert (start.value, end.value, position.value) == (0, 8, 0.5)
    plt.close("all")


def test_without_widgets_the_explorer_says_so(space, images, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "ipywidgets":
            raise ImportError("No module named 'ipywidgets'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="ipywidgets"):
        explorer(space, torch.randn(9, 6), torch.arange(9.0), images)


def test_searches_are_drawn_from_start_to_end():
    ax = plots.trajectories(torch.randn(20, 4), torch.rand(20), torch.randn(5, 3, 4), "accuracy")
    assert len(ax.lines) == 3 + 2
    ax = plots.search_history(range(5), torch.rand(5, 3) * 100, {"zoo's best": 98.0})
    assert len(ax.lines) == 3 + 1 + 1
    plt.close("all")
