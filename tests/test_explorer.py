"""The explorer draws what a space decodes, still and with sliders; pictures come with words."""

import base64
import builtins

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from nbclient import NotebookClient
from torch import nn

from netspace_lite import Images, Nets, NetSpace, SpaceConfig
from netspace_lite.tutorial import figures
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


@pytest.mark.parametrize("absent", [1, 2])
def test_the_table_keeps_classes_in_place_where_images_lack_one(space, images, absent):
    """Seen before: rows after it bore the name of the class before; without the last, an error."""
    z, few = torch.randn(9, 6), images[images.y != absent]
    _, whole = inspect(space, z, torch.rand(9), z[2], images)
    _, right = inspect(space, z, torch.rand(9), z[2], few)
    rows = [[text.get_text() for text in ax.texts] for ax in (whole, right)]
    assert [rows[1][3 * k : 3 * k + 3] for k in range(3) if k != absent] == [
        rows[0][3 * k : 3 * k + 3] for k in range(3) if k != absent
    ]
    assert rows[1][3 * absent : 3 * absent + 3] == ["nan"] * 3
    assert [tick.get_text() for tick in right.get_yticklabels()] == ["0", "1", "2"]
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


def test_pictures_say_in_words_what_they_show():
    ax = figures.bars({"ours": 86.9, "mean net": 8.46}, "agreement (%)")
    assert figures.describe(ax.figure) == "panels: 1; agreement (%): ours 86.9, mean net 8.5"
    z, values = torch.randn(9, 6), torch.arange(9.0)
    axes = plt.subplots(1, 2)[1]
    figures.space_map(z, values, "accuracy", axes[0]).set_title("map")
    figures.curves(range(3), {"a": torch.rand(3), "b": torch.rand(3)}, "step", "loss", ax=axes[1])
    found = figures.describe(axes[0].figure).split("; ")
    assert (found[0], found[2], found[3]) == ("panels: 2", "loss over step: a, b", "accuracy")
    assert found[1].startswith("map: second (")
    pictures = figures.images(torch.rand(3, 1, 4, 4), ["x", "y", "z"], columns=2)
    assert figures.describe(pictures[0, 0].figure) == "images: 3; x; y; z"
    plt.close("all")


def test_in_a_notebook_pictures_are_sharp_and_have_alt_text():
    drawn = "figures.bars({'ours': 86.94}, 'agreement (%)');"
    lines = "from netspace_lite.tutorial import figures", "figures.use_style()", drawn
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("\n".join(lines))])
    NotebookClient(book, kernel_name="python3", extra_arguments=["--log-level=ERROR"]).execute()
    (output,) = book.cells[0].outputs
    about = output.metadata["image/png"]
    width = int.from_bytes(base64.b64decode(output.data["image/png"])[16:20])
    assert about["alt"] == "panels: 1; agreement (%): ours 86.9"
    assert width // 2 == about["width"]
