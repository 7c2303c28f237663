"""Mutation: without any one ``.to()``, ``.cpu()`` or ``device=`` a test of devices turns red.

    python tests/mutate_device.py zoo.py shapes  # or `make mutate`: all, a quarter of an hour

Every mutant is a fork that imports the library with one of them left out and runs the tests until
the first failure. Prints who survives; exits with 1 if anyone does.
"""

import ast
import os
import signal
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest
import scipy.optimize  # noqa: F401 (what the library imports, so that forks have it already)
import skimage.measure  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch
import trimesh  # noqa: F401

HERE = Path(__file__).parent
LIBRARY = HERE.parent / "netspace_lite"
SECONDS = 240  # more, and a mutant counts as caught


class Removal(ast.NodeTransformer):
    """Removes the ``at``-th move of a module; ``line`` is where it was, None if there is none."""

    def __init__(self, at: int):
        self.at, self.line = at, None

    def _is_next(self, node: ast.AST) -> bool:
        self.at -= 1
        self.line = node.lineno if self.at == -1 else self.line
        return self.at == -1

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        moves = isinstance(node.func, ast.Attribute) and node.func.attr in ("to", "cpu")
        if moves and self._is_next(node.func.value):
            return node.func.value
        for keyword in [k for k in node.keywords if k.arg == "device"]:
            if self._is_next(keyword.value):
                node.keywords.remove(keyword)
        return node


def mutants(path: Path):
    """Each (line, tree) of a module with one move left out."""
    for at in range(1000):
        removal = Removal(at)
        tree = ast.fix_missing_locations(removal.visit(ast.parse(path.read_text("utf-8"))))
        if removal.line is None:
            return
        yield removal.line, tree


def survives(path: Path, tree: ast.Module, tests: str) -> bool:
    """Whether all tests pass with ``tree`` as the module at ``path``."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    signal.alarm(SECONDS)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    get_code = SourceFileLoader.get_code
    SourceFileLoader.get_code = lambda loader, name: (
        compile(tree, path, "exec") if loader.path == str(path) else get_code(loader, name)
    )
    os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", tests]))


def check(tests: str) -> None:
    """What is caught means something as long as the tests pass with nothing left out."""
    if not survives(Path(), ast.Module([], []), tests):
        sys.exit(f"{tests} fails with nothing left out")


def main(names: list[str]) -> int:
    torch.set_num_threads(1)
    files = [p for p in sorted(LIBRARY.rglob("*.py")) if "tutorial" not in p.parts]
    alive, used = 0, set()
    for path in (p for p in files if not names or {p.name, p.parent.name} & set(names)):
        of_shapes = path.parent.name == "shapes"
        tests = str(HERE / ("test_shapes_device.py" if of_shapes else "test_device.py"))
        lines = path.read_text("utf-8").splitlines()
        for line, tree in mutants(path):
            if tests not in used:
                check(tests)
            used.add(tests)
            lives = survives(path, tree, tests)
            alive += lives
            said = f"{path.relative_to(LIBRARY)}:{line}: {lines[line - 1].strip()}"
            print("SURVIVES" if lives else "caught  ", said, flush=True)
    for tests in used:  # nobody has changed anything meanwhile
        check(tests)
    print(f"{alive} survive")
    return min(alive, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
