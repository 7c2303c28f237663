"""What every notebook keeps to: links, short cells, outputs of one run, progress that is true."""

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
BOOKS = {path.stem: nbformat.read(path, as_version=4) for path in NOTEBOOKS}
EACH = pytest.mark.parametrize("book", BOOKS.values(), ids=BOOKS)


def texts(book):
    return [cell.source for cell in book.cells if cell.cell_type == "markdown"]


def code(book):
    return [cell for cell in book.cells if cell.cell_type == "code" and cell.source.strip()]


def outputs(cell):
    """The text of every output of a cell, whatever its kind."""
    for output in cell.outputs:
        yield output.get("text", "")
        yield from (t for kind, t in output.get("data", {}).items() if kind.startswith("text/"))
        yield "\n".join(output.get("traceback", ()))


def test_they_are_numbered_from_one():
    assert [int(name[:2]) for name in BOOKS] == list(range(1, len(BOOKS) + 1))


@EACH
def test_the_title_has_the_number(book):
    number = int(next(name for name in BOOKS if BOOKS[name] is book)[:2])
    assert re.match(rf"# {number} · \S", book.cells[0].source)


@pytest.mark.parametrize("name", list(BOOKS)[:-1])
def test_the_last_text_leads_to_the_next_notebook(name):
    following = list(BOOKS)[list(BOOKS).index(name) + 1]
    links = re.findall(r"Next:?\W*\[(\d)[^\]]*\]\(([^)]+)\)", texts(BOOKS[name])[-1])
    assert links == [(following[1], f"{following}.ipynb")]


@EACH
def test_links_within_the_repository_resolve(book):
    for text in texts(book):
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            if not link.startswith(("http://", "https://", "attachment:")):
                assert (ROOT / "notebooks" / link).exists(), link


@EACH
def test_cells_have_at_most_twenty_lines(book):
    long = {cell.source.splitlines()[0]: n for cell in code(book) if (n := lines(cell)) > 20}
    assert not long


def lines(cell):
    return len(cell.source.strip().splitlines())


@EACH
def test_every_cell_was_run_once_and_in_order(book):
    assert [cell.execution_count for cell in code(book)] == list(range(1, len(code(book)) + 1))


@EACH
def test_no_cell_ended_in_an_error_or_a_warning(book):
    for cell in code(book):
        assert not any(output.output_type == "error" for output in cell.outputs)
        assert not any(output.get("name") == "stderr" for output in cell.outputs), cell.source


@EACH
def test_progress_is_shown_as_it_ended(book):
    for cell in code(book):
        for text in outputs(cell):
            assert not re.search(r"(?<!\d)0%\|", text), text


@EACH
def test_outputs_name_no_place_on_a_machine(book):
    place = re.compile(r"(/home/|/root/|/tmp/|/work/|/Users/|[A-Z]:\\\\)")
    for cell in code(book):
        assert not place.search(cell.source)
        for text in outputs(cell):
            assert not place.search(text), text


@EACH
def test_a_picture_stands_beside_words(book):
    cells = [cell for cell in book.cells if cell.source.strip()]
    for n, cell in enumerate(cells):
        drawn = any("image/png" in output.get("data", {}) for output in cell.get("outputs", ()))
        beside = cells[max(0, n - 1) : n + 2]
        assert not drawn or any(c.cell_type == "markdown" for c in beside), cell.source
