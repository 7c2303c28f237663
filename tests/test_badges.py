"""Badges: each opens its own notebook, whose first cell installs what is missing, once."""

import importlib.util
import shutil
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

FOLDER = Path(__file__).parents[1] / "notebooks"
SPEC = importlib.util.spec_from_file_location("badges", FOLDER / "badges.py")
badges = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(badges)


@pytest.fixture
def copies(tmp_path):
    for path in FOLDER.glob("[0-9]*.ipynb"):
        shutil.copy(path, tmp_path)
    return tmp_path


def test_each_badge_opens_its_own_notebook_and_the_rest_stays(copies):
    badges.main(["someone/netspace_lite"], copies)
    for path in FOLDER.glob("[0-9]*.ipynb"):
        before, after = (nbformat.read(p, as_version=4) for p in (path, copies / path.name))
        title, badge, *rest = after.cells[0].source.split("\n\n")
        where = f"/github/someone/netspace_lite/blob/main/notebooks/{path.name})"
        assert badge.startswith("[![Open in Colab]")
        assert badge.endswith(where)
        parts = before.cells[0].source.split("\n\n")  # they may have badges already
        assert [title, *rest] == [part for part in parts if badges.BADGE not in part]
        assert after.cells[2:] == [cell for cell in before.cells[1:] if cell.id != "install"]


def test_the_first_cell_installs_only_where_the_package_is_missing(copies, monkeypatch):
    badges.main(["someone/netspace_lite"], copies)
    ran = []
    for path in copies.glob("*.ipynb"):
        cell = nbformat.read(path, as_version=4).cells[1].source
        code = TransformerManager().transform_cell(cell)
        shell = type("Shell", (), {"run_line_magic": lambda self, *magic: ran.append(magic)})
        scope = {"get_ipython": shell}
        exec(code, scope)
        assert ran == []
        with monkeypatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", lambda name: None)
            exec(code, scope)
        assert ran.pop() == ("pip", "install --quiet git+https://github.com/someone/netspace_lite")


def test_again_with_another_address_both_are_replaced(copies):
    badges.main(["someone/netspace_lite"], copies)
    first = {path: path.read_text() for path in copies.iterdir()}
    badges.main(["another/fork"], copies)
    for path in first:
        assert "someone/" not in path.read_text()
    badges.main(["someone/netspace_lite"], copies)
    assert {path: path.read_text() for path in copies.iterdir()} == first


@pytest.mark.parametrize("given", [[], [""], ["owner"], ["https://github.com/a/b"], ["a/b", "c"]])
def test_an_address_of_another_form_is_refused_and_nothing_is_written(copies, given):
    before = {path: path.read_text() for path in copies.iterdir()}
    with pytest.raises(SystemExit, match="owner/name"):
        badges.main(given, copies)
    assert {path: path.read_text() for path in copies.iterdir()} == before
