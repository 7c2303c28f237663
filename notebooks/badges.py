"""Give every notebook a badge that opens it in Colab, from where this repository lies on GitHub.

``python notebooks/badges.py owner/name`` (``make badges REPO=owner/name``) writes the badge under
each title, and a first cell that installs the package where it isn't there yet. Run again, with
another address, it replaces both.
"""

import re
import sys
from pathlib import Path

import nbformat

BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
INSTALL = """import importlib.util

if importlib.util.find_spec("netspace_lite") is None:  # such as in Colab
    %pip install --quiet git+https://github.com/{repository}"""


def add(notebook: Path, repository: str) -> None:
    """Write badge and first cell into ``notebook``; ``repository`` is ``owner/name`` on GitHub."""
    book = nbformat.read(notebook, as_version=4)
    place = f"{repository}/blob/main/notebooks/{notebook.name}"
    badge = f"{BADGE}(https://colab.research.google.com/github/{place})"
    title, *rest = book.cells[0].source.split("\n\n")
    book.cells[0].source = "\n\n".join([title, badge, *(p for p in rest if BADGE not in p)])
    cells = [cell for cell in book.cells if cell.id != "install"]
    install = INSTALL.format(repository=repository)
    book.cells = [cells[0], nbformat.v4.new_code_cell(install, id="install"), *cells[1:]]
    nbformat.write(book, notebook)


def main(arguments: list[str], folder: Path) -> None:
    """Add badges to the notebooks of ``folder``."""
    if len(arguments) != 1 or not re.fullmatch(r"[\w-]+/[\w.-]+", arguments[0]):
        sys.exit(f"the repository on GitHub should be given as owner/name, not {arguments}")
    for notebook in sorted(folder.glob("[0-9]*.ipynb")):
        add(notebook, arguments[0])


if __name__ == "__main__":
    main(sys.argv[1:], Path(__file__).parent)
