"""The size of the house: lines of code, lengths of functions, numbers of parameters."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY, KERNELS = ROOT / "netspace_lite", ROOT / "kernels"
STUDIES = ("aot", "bench", "roofline", "trace")  # what compiles, times, models and watches kernels
SKIPPED = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def lines_of_code(source: str) -> int:
    """Lines with code on them: no blanks, comments or docstrings."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SKIPPED:
            lines.update(range(token.start[0], token.end[0] + 1))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def functions(path: Path):
    """Every function of a file by name."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node


def test_lines_are_counted_as_said():
    source = (
        '"""Doc."""\n\nx = 1  # why\n# only a comment\n\n\ndef f():\n    """Doc\n\n    of f."""\n'
    )
    source += '    return """a\n    b"""\n'
    assert lines_of_code(source) == 1 + 1 + 2


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        # 1,600 is the aim; processes took 135, Muon 53, the paper's parts 57, analogies and
        # principal components 44, answers that are values 11, sizes refused by a sentence 21,
        # axes alike for any number of threads 2,
        # channels innermost 7, memory spared by activations 15, zoos and their training in a file
        # each 12, threads 43, PyTorch's data sets and loaders, and sentences for what is none of
        # these, 42, how often nets choose what most of the zoo do 28, arguments in each other's
        # place, and what was compared though it doesn't belong together, 98, samples in blocks 8,
        # answers of a whole zoo in half the memory 8, zoos without spaces 5, nets that were
        # quantised 3, scores by whoever trained the nets 17, hooks, samples asked together and
        # floats for places 26, buffers, code in layers, backbones and answers without an axis 22,
        # samples mixed behind a threshold, autocast, other axes and private attributes 24, what
        # first inputs, other seeds and traces hide 48, encoders left alone, state dicts of other
        # modules, searches and fits that were stopped, and mixed precision 47, caches, locks and
        # constants told from what counts 49, copies held out, one start for all nets and losses of
        # another shape 13, tables of classes 9, modules traced once for all that hold the same 74,
        # values and places 32, what all nets of a zoo share 12, transposed convolutions, constants
        # and statistics in vmap 18, numbers that mean nothing 10, what else gave wrong answers
        # without a word 350
        (list(LIBRARY.glob("*.py")), 3611),
        (list((LIBRARY / "shapes").rglob("*.py")), 465),
        (list((LIBRARY / "tutorial").rglob("*.py")), 405),
        ([p for p in KERNELS.glob("*.py") if p.stem not in STUDIES], 1200),
        ([p for p in KERNELS.glob("*.py") if p.stem in STUDIES], 400),
    ],
    ids=["core", "shapes", "tutorial", "kernels", "studies of kernels"],
)
def test_a_part_is_short_enough_to_read(files, limit):
    counted = {path.name: lines_of_code(path.read_text("utf-8")) for path in files}
    assert files
    assert sum(counted.values()) <= limit, counted


def test_no_function_is_longer_than_fifty_lines():
    files = [*LIBRARY.rglob("*.py"), *KERNELS.rglob("*.py")]
    long = {
        name: node.end_lineno - node.lineno + 1
        for path in files
        for name, node in functions(path)
        if node.end_lineno - node.lineno + 1 > 50
    }
    assert not long


def test_no_function_has_more_than_eight_parameters():
    many = {}
    for path in LIBRARY.rglob("*.py"):  # kernels take strides, and are counted apart
        for name, node in functions(path):
            given = node.args
            named = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            named += [a.arg for a in (given.vararg, given.kwarg) if a]
            count = len([a for a in named if a not in ("self", "cls")])
            if count > 8:
                many[name] = count
    assert not many
