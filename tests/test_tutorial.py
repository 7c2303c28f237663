"""Settings, sizes, claims, figures and the runner that ``make tutorial`` calls."""

import json
import math
from itertools import pairwise

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from toy import toy_data

from netspace_lite.data import ImageData, Images
from netspace_lite.tutorial import PRESETS, Settings, bootstrap, chapters, figures, seconds
from netspace_lite.tutorial.__main__ import main

matplotlib.use("agg")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A small checkout of its own, with one notebook."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").touch()
    code = (
        "from netspace_lite.tutorial import Settings\n"
        "s = Settings.from_environment()\n"
        "s.write_results('01_small', {'score': 10.0 + s.seed, 'word': 'x'})\n"
        "print('hello')"
    )
    cells = [nbformat.v4.new_markdown_cell("# hello"), nbformat.v4.new_code_cell(code)]
    book = nbformat.v4.new_notebook(cells=cells)
    nbformat.write(book, tmp_path / "notebooks" / "01_small.ipynb")
    for name in ("NETSPACE_SEED", "NETSPACE_PRESET", "NETSPACE_DATA"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path / "notebooks")
    return tmp_path


def test_settings_come_from_the_environment(checkout, monkeypatch):
    assert Settings.from_environment() == Settings(0, "lite", "")
    monkeypatch.setenv("NETSPACE_SEED", "7")
    monkeypatch.setenv("NETSPACE_PRESET", "paper")
    monkeypatch.setenv("NETSPACE_DATA", "some/own.npz")
    settings = Settings.from_environment()
    assert settings == Settings(7, "paper", "some/own.npz")
    assert settings.folder("zoo") == checkout / "build" / "paper-own-seed7" / "zoo"


@pytest.mark.parametrize(
    ("name", "value"),
    [("NETSPACE_SEED", "-1"), ("NETSPACE_SEED", "²"), ("NETSPACE_PRESET", "tiny")],
    ids=str,
)
def test_settings_without_meaning_are_refused(checkout, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name} should be .* not '{value}'"):
        Settings.from_environment()


@pytest.mark.parametrize("preset", ["smoke", "paper"])
def test_presets_change_sizes_of_lite_and_add_none(preset):
    for part, values in PRESETS[preset].items():
        assert values.keys() <= PRESETS["lite"][part].keys()
    sizes = Settings(preset=preset).sizes
    assert vars(sizes).keys() == PRESETS["lite"].keys()
    assert sizes.zoo.nets == PRESETS[preset]["zoo"]["nets"]
    assert sizes.explore.searches > 0


def test_a_preset_trains_with_as_many_chances_as_architectures():
    for preset in PRESETS:
        several = Settings(preset=preset).sizes.several
        assert len(several.chances) == len(several.nets)
        assert all(sum(several.held_out) < count for count in several.nets.values())


def test_claims_are_asserted_for_lite_digits_and_only_reported_elsewhere(capsys):
    Settings().claim("one is one", 1 == 1)
    with pytest.raises(AssertionError, match="one is two"):
        Settings().claim("one is two", 1 == 2)
    for settings in (Settings(preset="smoke"), Settings(preset="paper"), Settings(data="own.npz")):
        settings.claim("one is two", torch.tensor(False))
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["holds: one is one"] + 3 * ["does not hold here: one is two"]


def test_larger_images_are_announced():
    images = Images(torch.zeros(30, 3, 16, 16), torch.zeros(30, dtype=torch.long))
    said = Settings().describe(ImageData("own", images, images[:5], images[:7], classes=2))
    assert "30 train, 5 val, 7 test images of 3 × 16 × 16 values, 2 classes" in said
    assert "12 times the minutes" in said


def test_noise_is_of_the_size_of_images_and_knows_nothing_else_of_them():
    images = Images(torch.rand(9, 3, 6, 8), torch.zeros(9, dtype=torch.long))
    dark = Images(torch.zeros_like(images.x), images.y)
    bright, other = (ImageData("own", part, part, part, 2) for part in (images, dark))
    noise = chapters.noise(bright, 0, 50)
    assert noise.shape == (50, 3, 6, 8)
    assert noise.std() == pytest.approx(1)
    assert torch.equal(noise, chapters.noise(other, 0, 50))
    assert not torch.equal(noise, chapters.noise(bright, 1, 50))


def test_seconds_gives_the_result_and_the_time():
    result, took = seconds(lambda: "done")
    assert result == "done"
    assert 0 <= took < 1


def test_bootstrap_matches_the_standard_error_of_a_mean():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    low, high = bootstrap(torch.mean, values)
    assert low < values.mean() < high
    expected = 2 * 1.96 * float(values.std()) / math.sqrt(400)
    assert high - low == pytest.approx(expected, rel=0.15)


def test_bootstrap_draws_the_same_nets_and_images_of_all_tables():
    table = torch.rand(20, 30)
    assert bootstrap(lambda a, b: (a - b).abs().max(), table, table, draws=20) == (0, 0)
    by_nets = torch.rand(20, 1).expand(20, 30)  # all images agree: only nets make a spread
    low, high = bootstrap(torch.mean, by_nets, draws=300)
    assert high - low > 0.1
    assert bootstrap(torch.mean, torch.ones(4, 5), draws=20) == (1, 1)


def test_bootstrap_draws_images_also_where_another_table_has_none():
    of_nets, of_images = torch.zeros(20), torch.randn(5).expand(20, 5)
    found = bootstrap(lambda a, b: b.mean() - a.mean(), of_nets, of_images)
    assert found == bootstrap(lambda b, a: b.mean() - a.mean(), of_images, of_nets)
    assert found[0] < found[1]
    one_by_one = of_images[..., None].repeat(1, 1, 7)  # of each image's values none is drawn anew
    one_by_one[..., 0] += 5
    assert bootstrap(lambda a: a.argmax(-1).float().mean(), one_by_one, draws=20) == (0, 0)


def test_all_curves_levels_and_panels_are_drawn_however_many():
    """Seen before: there were six colours, and what came after the sixth was left out."""
    ys = {f"net {n}": torch.arange(3.0) + n for n in range(8)}
    ax = figures.curves(range(3), ys, "step", "score", levels={"chance": 10.0})
    assert ax.get_legend_handles_labels()[1] == [*ys, "chance: 10.0"]
    pairs = {name: (y, y) for name, y in ys.items()}
    assert all(len(panel.collections) == 1 for panel in figures.predicted(pairs))
    plt.close("all")


def test_notebooks_run_in_place_and_print_their_results(checkout, capsys):
    main([])
    printed = capsys.readouterr().out
    assert "| `score` | 10.00 | 10.00 to 10.00 |" in printed
    done = nbformat.read(checkout / "build" / "notebooks" / "01_small.ipynb", as_version=4)
    assert done.cells[1].outputs[0].text == "hello\n"
    record = json.loads((checkout / "build/lite-digits-seed0/results/01_small.json").read_text())
    assert record == {"seed": 0, "preset": "lite", "data": "default", "score": 10.0, "word": "x"}


def test_several_seeds_give_a_table_with_median_and_range(checkout, capsys):
    main(["--seeds=0,5,1", "01"])
    printed = capsys.readouterr().out
    assert "### 01_small, seed 0, 5, 1" in printed
    assert "| `score` | 11.00 | 10.00 to 15.00 |" in printed


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--seeds=0,1,"], "--seeds should be whole numbers such as 0,1,2, not '0,1,'"),
        (["--seeds=0, 1"], "not '0, 1'"),
        (["01", "o2", "3"], "no notebook starts with o2 or 3"),
    ],
    ids=str,
)
def test_what_can_not_be_run_is_refused_before_anything_runs(checkout, capsys, given, said):
    """Seen before: a name of none was passed over, a seed of none ended the run without tables."""
    with pytest.raises(SystemExit):
        main(given)
    printed = capsys.readouterr()
    assert said in printed.err
    assert not printed.out


def test_a_failing_notebook_stops_the_run_and_is_kept(checkout, capsys):
    from nbclient.exceptions import CellExecutionError

    path = checkout / "notebooks" / "02_broken.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")]), path)
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        main(["02"])
    assert (checkout / "build" / "notebooks" / "02_broken.ipynb").exists()
    with pytest.raises(SystemExit):
        main(["9"])
    assert "no notebook starts with 9" in capsys.readouterr().err


def test_a_bar_is_kept_as_its_last_state(checkout):
    code = (
        "from netspace_lite.progress import progress_bar\n"
        "with progress_bar(3, 'counting') as bar:\n"
        "    for _ in range(3):\n"
        "        bar.update()"
    )
    path = checkout / "notebooks" / "01_small.ipynb"
    book = nbformat.read(path, as_version=4)
    book.cells[1].source += "\n" + code
    nbformat.write(book, path)
    main([])
    done = nbformat.read(checkout / "build" / "notebooks" / "01_small.ipynb", as_version=4)
    text = "".join(output.get("text", "") for output in done.cells[1].outputs)
    assert "counting: 100%" in text
    assert "0%|" not in text.replace("100%|", "")


@pytest.fixture
def closed():
    yield
    plt.close("all")


@pytest.mark.usefixtures("closed")
class TestFigures:
    def test_style_is_set(self):
        with plt.rc_context():
            figures.use_style()
            assert plt.rcParams["figure.dpi"] == 80

    def test_images_fill_rows_and_leave_the_rest_blank(self):
        axes = figures.images(torch.rand(13, 3, 4, 4), titles=["a"])
        assert axes.shape == (2, 10)
        assert [len(ax.images) for ax in axes.flat] == [1] * 13 + [0] * 7
        assert axes[0, 0].get_title() == "a"
        assert figures.images(torch.zeros(1, 1, 4, 4))[0, 0].images[0].get_array().shape == (4, 4)
        assert figures.images(torch.zeros(1, 3, 1, 5))[0, 0].images[0].get_array().shape == (
            1,
            5,
            3,
        )
        assert figures.images(torch.zeros(1, 1, 1, 5))[0, 0].images[0].get_array().shape == (1, 5)

    def test_preps_have_scales_of_their_own(self):
        axes = figures.preps(torch.randn(2, 5, 7).requires_grad_(), ["one", "two"])
        limits = [ax.collections[0].get_clim() for ax in axes]
        assert limits[0] != limits[1]
        assert all(low == -high for low, high in limits)
        assert axes[0].yaxis_inverted()  # the first chunk on top

    def test_predicted_has_a_panel_a_name_on_equal_axes(self):
        pair = torch.tensor([20.0, 90]), torch.tensor([30.0, 80])
        axes = figures.predicted({"a": pair, "b": pair})
        assert [ax.get_title() for ax in axes] == ["a", "b"]
        assert axes[1].get_xlim() == axes[1].get_ylim() == (17, 101)
        beyond = torch.tensor([30.0, 130])
        assert figures.predicted({"a": (pair[0], beyond)})[0].get_ylim() == (17, 131)

    def test_a_map_draws_kinds_and_searches(self):
        z, kinds = torch.randn(20, 4), torch.arange(20) % 3
        ax = figures.space_map(z, kinds=kinds, names=["a", "b", "c"])
        assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b", "c"]
        ax = figures.space_map(z, torch.rand(20), path=torch.randn(5, 3, 4), kinds=kinds)
        assert len(ax.lines) == 3 + 2  # three searches, their starts and ends
        limits = {dots.get_clim() for dots in ax.collections}
        assert len(limits) == 1  # all kinds share one scale
        assert figures.space_map(z, torch.rand(20)).get_legend() is None

    def test_curves_draw_medians_levels_and_kinds(self):
        many = torch.tensor([[0.0, 1, 2], [0, 5, 7], [0, 3, 9]])
        ax = figures.curves(range(3), {"m": many, "one": [1, 2, 3]}, "x", "y", levels={"best": 8.0})
        assert len(ax.lines) == 3 + 1 + 1 + 1
        np.testing.assert_array_equal(ax.lines[3].get_ydata(), [0, 3, 7])
        assert ax.get_legend().get_texts()[-1].get_text() == "best: 8.0"
        kinds = torch.tensor([0, 0, 1])
        ax = figures.curves([0, 1, 2], {"": [5.0, 6, 7]}, "x", "y", kinds=kinds, names=["a", "b"])
        assert [len(dots.get_offsets()) for dots in ax.collections] == [2, 1]
        ax = figures.curves(range(3), {"": many}, "x", "y", kinds=kinds, names=["a", "b"])
        np.testing.assert_allclose(ax.collections[1].get_offsets(), [[2, 7]])  # on the median

    def test_history_draws_scores_over_steps(self):
        rows = [{"step": 10, "r": 0.5, "mae": 3}, {"step": 20, "r": 0.7, "mae": 2}]
        ax = figures.history(rows, ["r"])
        np.testing.assert_allclose(ax.lines[0].get_xydata(), [[10, 0.5], [20, 0.7]])

    def test_bars_highlight_span_and_group(self):
        ax = figures.bars({"ours": 80.0, "theirs": 70.0}, "%", ["ours"], spans={"ours": (75, 82)})
        assert [text.get_text().strip() for text in ax.texts] == ["80.0", "70.0"]
        first, second = (bar.get_facecolor() for bar in ax.patches)
        assert first != second
        segments = [s for lines in ax.collections for s in lines.get_segments()]
        np.testing.assert_allclose(segments[0][:, 0], [75, 82])
        ax = figures.bars({"a": 5.0}, "%", spans={"a": (6, 8)})  # not about the value
        np.testing.assert_allclose(ax.collections[0].get_segments()[0][:, 0], [6, 8])
        ax = figures.bars({"a": [1, 2], "b": [3, 4]}, "%", labels=["x", "y"])
        assert len(ax.patches) == 4
        heights = sorted((bar.get_y(), bar.get_y() + bar.get_height()) for bar in ax.patches)
        assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(heights))

    def test_dots_stand_for_bars_on_an_axis_that_begins_elsewhere(self):
        ax = figures.bars({"ours": 98.0, "theirs": 97.0}, "%", ["ours"], low=95)
        assert ax.get_xlim() == (95, 100)
        assert all(bar.get_alpha() == 0 for bar in ax.patches)
        np.testing.assert_allclose(ax.collections[-1].get_offsets(), [[98, 0], [97, 1]])
        assert "ours 98.0, theirs 97.0" in figures.describe(ax.figure)

    def test_a_matrix_writes_its_numbers(self):
        ax = figures.matrix(torch.tensor([[100.0, 0], [25, 75]]), ["a", "b"], "x", "y", "%")
        assert [text.get_text() for text in ax.texts] == ["100", "0", "25", "75"]
        ax = figures.matrix(
            torch.tensor([[100.0, 60], [80, 90]]), ["a", "b"], "x", "y", "%", low=60
        )
        assert ax.images[0].get_clim() == (60, 100)
        assert [text.get_color() for text in ax.texts] == ["k", "w", "w", "k"]

    def test_a_single_net_on_the_map_is_no_way(self):
        ax = figures.space_map(torch.randn(9, 4), torch.rand(9), path=torch.randn(1, 1, 4))
        assert [text.get_text() for text in ax.get_legend().get_texts()] == ["net shown"]


def test_the_papers_nets_are_not_for_other_images():
    data = toy_data()
    assert Settings().net("LeNetLike", data)(data.val.x).shape == (60, 3)
    with pytest.raises(ValueError, match="evening is for 3×32×32 images of 10 classes: take lite"):
        Settings(preset="evening").net("LeNetLike", data)
