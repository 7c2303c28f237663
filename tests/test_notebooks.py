"""What every notebook keeps to: its parts, links, short cells, pictures in words, true progress."""

import copy
import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
BOOKS = {path.stem: nbformat.read(path, as_version=4) for path in NOTEBOOKS}
for stem, notebook in BOOKS.items():
    notebook.metadata.stem = stem
EACH = pytest.mark.parametrize("book", BOOKS.values(), ids=BOOKS)


def texts(book):
    return [cell.source for cell in book.cells if cell.cell_type == "markdown"]


def code(book):
    cells = [cell for cell in book.cells if cell.id != "install"]  # what `make badges` writes
    return [cell for cell in cells if cell.cell_type == "code" and cell.source.strip()]


def number(book):
    return int(book.metadata.stem[:2])


def outputs(cell):
    """The text of every output of a cell, whatever its kind."""
    for output in cell.outputs:
        yield output.get("text", "")
        yield from (t for kind, t in output.get("data", {}).items() if kind.startswith("text/"))
        yield "\n".join(output.get("traceback", ()))


def pictures(cell):
    return [o for o in cell.get("outputs", ()) if "image/png" in o.get("data", {})]


def headings(book):
    """Titles of the numbered parts: [("3.1", "A mixed zoo is a list of zoos"), ...]."""
    return re.findall(r"^## (\d+\.\d+) (.+)$", "\n".join(texts(book)), re.MULTILINE)


def test_they_are_numbered_from_one():
    assert [int(name[:2]) for name in BOOKS] == list(range(1, len(BOOKS) + 1))


@EACH
def test_the_title_has_the_number(book):
    assert re.match(rf"# {number(book)} · \S", book.cells[0].source)


@EACH
def test_parts_are_numbered_in_order(book):
    expected = [f"{number(book)}.{part}" for part in range(1, len(headings(book)) + 1)]
    assert [part for part, _ in headings(book)] == expected
    assert expected


@EACH
def test_the_first_text_says_what_to_know_and_what_is_to_come(book):
    first = book.cells[0].source
    for part in ("**Question.**", "**You need to know**", "| word | meaning |"):
        assert part in first
    assert re.search(r"\*\*You will( build)?\*\*", first)
    assert re.search(r"\*\*Contents\*\*.*minutes.*two processor cores", first)
    rows = re.findall(r"^\| (\d+\.\d+) \| (.+) \| (?:< 0\.1|\d+\.\d) \|$", first, re.MULTILINE)
    assert rows == headings(book)


@EACH
def test_readers_are_asked_to_predict_before_they_see(book):
    asked = r"\*\*(Before you (run|read) [^*]+|Predict first):\*\* [^\n]*\?"
    assert re.search(asked, "\n".join(texts(book)))


@EACH
def test_the_last_text_sums_up_and_sets_exercises_with_folded_hints(book):
    last = texts(book)[-1]
    assert last.startswith("## Remember this\n\n- ")
    exercises, rest = last.split("**Exercises.**")[1].split("<details><summary>Hints</summary>")
    hints, rest = rest.split("</details>")
    asked, answered = (re.findall(r"^(\d)\. ", part, re.MULTILINE) for part in (exercises, hints))
    assert asked == answered == [str(n) for n in range(1, len(asked) + 1)]
    assert asked
    assert "**References.**" in rest


@EACH
def test_the_last_text_leads_on(book):
    stems = list(BOOKS)
    following = stems[(stems.index(book.metadata.stem) + 1) % len(stems)]
    word = "Next" if following != stems[0] else "Back to the start"
    links = re.findall(rf"\*\*{word}:\*\* \[(\d) · ([^\]]+)\]\(([^)]+)\)$", texts(book)[-1])
    title = BOOKS[following].cells[0].source.splitlines()[0].split(" · ")[1]
    assert links == [(str(number(BOOKS[following])), title, f"{following}.ipynb")]


@EACH
def test_links_within_the_repository_resolve(book):
    for text in texts(book):
        for words, link in re.findall(r"\[([^\]]*)\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if not link.startswith(("http://", "https://", "attachment:")):
                assert (ROOT / "notebooks" / link).exists(), link
                named = re.fullmatch(r"notebook (\d)", words)
                assert not named or link.startswith(f"0{named[1]}_"), (words, link)


@EACH
def test_no_text_names_a_notebook_that_is_not_there(book):
    for text in texts(book):
        assert {int(n) for n in re.findall(r"notebooks? (\d+)", text)} <= {
            *map(number, BOOKS.values())
        }


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
def test_every_picture_has_alt_text(book):
    for cell in code(book):
        for picture in pictures(cell):
            assert len(picture.metadata.get("image/png", {}).get("alt", "")) > 10, cell.source
        for image in re.findall(r"<img[^>]*>", "\n".join(outputs(cell))):
            assert re.search(r'alt="[^"]+', image), cell.source


@EACH
def test_diagrams_are_files_with_alt_text_that_any_viewer_shows(book):
    text = "\n".join(texts(book))
    assert "```mermaid" not in text  # which GitHub leaves as it is in notebooks
    for words, _ in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", text):
        assert len(words) > 10, words


@EACH
def test_pictures_are_followed_by_what_to_see_in_them(book):
    for cell, following in zip(book.cells, book.cells[1:], strict=False):
        if pictures(cell):
            assert following.cell_type == "markdown", cell.source
            assert following.source.startswith("*What to see.* "), cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=BOOKS)
def test_a_notebook_is_small_enough_to_open_anywhere(path):
    assert path.stat().st_size < 2_500_000


def replaced(old, new):
    """What breaks a notebook: ``old`` written as ``new`` in every text."""

    def break_it(book):
        for cell in book.cells:
            cell.source = cell.source.replace(old, new)

    return break_it


def said(kind, data=None, **more):
    """What breaks a notebook: a cell that put this out."""

    def break_it(book):
        output = new_output(kind, data, **more)
        count = len(code(book)) + 1
        book.cells.append(new_code_cell("1", outputs=[output], execution_count=count))
        book.cells.append(new_markdown_cell("A picture, and nothing about it."))

    return break_it


@pytest.mark.parametrize(
    ("rule", "break_it"),
    [
        (test_the_title_has_the_number, replaced("# 5 · ", "# 4 · ")),
        (test_parts_are_numbered_in_order, replaced("## 5.3 ", "## 5.4 ")),
        (test_the_first_text_says_what_to_know_and_what_is_to_come, replaced("You need", "Have")),
        (test_the_first_text_says_what_to_know_and_what_is_to_come, replaced("| < 0.1 |", "| |")),
        (
            test_the_first_text_says_what_to_know_and_what_is_to_come,
            replaced("## 5.2 F", "## 5.2 f"),
        ),
        (
            test_the_last_text_sums_up_and_sets_exercises_with_folded_hints,
            replaced("Remember", "Mind"),
        ),
        (
            test_the_last_text_sums_up_and_sets_exercises_with_folded_hints,
            replaced("\n4. ", "\n5. "),
        ),
        (test_readers_are_asked_to_predict_before_they_see, replaced("?", ".")),
        (test_the_last_text_leads_on, replaced("**Next:** [6", "**Next:** [7")),
        (test_links_within_the_repository_resolve, replaced("(02_embed", "(02_imbed")),
        (test_links_within_the_repository_resolve, replaced("[notebook 2](", "[notebook 3](")),
        (test_no_text_names_a_notebook_that_is_not_there, replaced("notebook 2", "notebook 8")),
        (test_cells_have_at_most_twenty_lines, replaced("results", "(\n" * 20 + "results")),
        (test_every_cell_was_run_once_and_in_order, lambda book: book.cells.reverse()),
        (test_no_cell_ended_in_an_error_or_a_warning, said("stream", name="stderr", text="!")),
        (test_no_cell_ended_in_an_error_or_a_warning, said("error", ename="E", evalue="")),
        (test_progress_is_shown_as_it_ended, said("stream", text="fitting:   0%|   | 0/9")),
        (test_outputs_name_no_place_on_a_machine, said("stream", text="/home/me/zoo")),
        (test_every_picture_has_alt_text, said("display_data", {"image/png": ""})),
        (test_every_picture_has_alt_text, said("display_data", {"text/html": "<img src='x'>"})),
        (
            test_diagrams_are_files_with_alt_text_that_any_viewer_shows,
            replaced("## 5.1", "![](diagrams/training.svg)\n\n## 5.1"),
        ),
        (
            test_pictures_are_followed_by_what_to_see_in_them,
            said("display_data", {"image/png": ""}),
        ),
    ],
)
def test_each_rule_can_be_broken(rule, break_it):
    book = copy.deepcopy(BOOKS["05_latent_optimisation"])
    break_it(book)
    with pytest.raises((AssertionError, ValueError)):
        rule(book)
