"""Settings, results and the runner that ``make tutorial`` calls."""

import json

import nbformat
import pytest

from netspace_lite import tutorial
from netspace_lite.tutorial import Settings


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
    ("name", "value"), [("NETSPACE_SEED", "-1"), ("NETSPACE_PRESET", "tiny")], ids=str
)
def test_settings_without_meaning_are_refused(checkout, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name} should be .* not '{value}'"):
        Settings.from_environment()


def test_notebooks_run_in_place_and_print_their_results(checkout, capsys):
    tutorial.main([])
    printed = capsys.readouterr().out
    assert "score" in printed
    assert "10.00" in printed
    done = nbformat.read(checkout / "build" / "notebooks" / "01_small.ipynb", as_version=4)
    assert done.cells[1].outputs[0].text == "hello\n"
    record = json.loads((checkout / "build" / "results" / "01_small.json").read_text())
    assert record == {"seed": 0, "preset": "lite", "data": "default", "score": 10.0, "word": "x"}


def test_several_seeds_give_a_table_with_median_and_range(checkout, capsys):
    tutorial.main(["--seeds=0,5,1", "01"])
    assert "| `score` | 11.00 | 10.00 to 15.00 |" in capsys.readouterr().out


def test_a_failing_notebook_stops_the_run_and_is_kept(checkout):
    from nbclient.exceptions import CellExecutionError

    path = checkout / "notebooks" / "02_broken.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")]), path)
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        tutorial.main(["02"])
    assert (checkout / "build" / "notebooks" / "02_broken.ipynb").exists()
    with pytest.raises(SystemExit, match="no notebook starts with 9"):
        tutorial.main(["9"])
