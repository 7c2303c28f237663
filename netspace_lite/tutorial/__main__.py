"""The runner: ``python -m netspace_lite.tutorial 02 --seeds=0,1,2``, or ``make tutorial``."""

import json
import os
import sys
from argparse import ArgumentParser
from pathlib import Path
from statistics import median

import nbformat
from nbclient import NotebookClient
from tqdm import tqdm

from . import Settings, root, seconds


def execute(notebook: Path, output: Path) -> None:
    """Run a notebook from the first cell to the last into ``output``, which is kept if it fails."""
    book = nbformat.read(notebook, as_version=4)
    code = sum(cell.cell_type == "code" for cell in book.cells)
    quiet = ["--IPKernelApp.log_level=ERROR"]
    with tqdm(total=code, desc=notebook.stem, unit="cell", file=sys.stdout, miniters=1) as bar:
        client = NotebookClient(book, extra_arguments=quiet, timeout=None, coalesce_streams=True)
        client.kernel_name, client.startup_timeout = "python3", 300
        client.resources = {"metadata": {"path": str(notebook.parent)}}
        client.on_cell_executed = lambda **_: bar.update()
        # No answers for widgets: to write to a kernel while its reply is awaited may lose the reply
        # and hang (nbclient, issue 312).
        client.comm_open_handlers["jupyter.widget"] = lambda message: None
        try:
            client.execute()
        finally:
            output.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(book, output)


def table(folders: list[Path], notebook: str) -> str:
    """Markdown table of a notebook's numbers: their median over seeds, smallest to largest."""
    records = [json.loads((folder / f"{notebook}.json").read_text()) for folder in folders]
    lines = [f"\n### {notebook}, seed {', '.join(str(r['seed']) for r in records)}\n"]
    lines += ["| figure | median | range |", "|---|---|---|"]
    for key in list(records[0])[1:]:  # without the seed
        values = [record.get(key) for record in records]
        if all(isinstance(value, float | int) for value in values):
            low, high = f"{min(values):,.2f}", f"{max(values):,.2f}"
            lines.append(f"| `{key}` | {median(values):,.2f} | {low} to {high} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Execute notebooks in order, once a seed, and print what they found."""
    parser = ArgumentParser("python -m netspace_lite.tutorial", description=main.__doc__)
    parser.add_argument("names", nargs="*", help='how notebooks start ("02"); none means all')
    seed = os.environ.get("NETSPACE_SEED", "0")
    parser.add_argument("--seeds", default=seed, help="such as 0,1,2")
    given, found = parser.parse_args(arguments), sorted((root() / "notebooks").glob("[0-9]*.ipynb"))
    notebooks = [n for n in found if n.name.startswith(tuple(given.names) or "")]
    if unknown := [m for m in given.names or [""] if not any(n.name.startswith(m) for n in found)]:
        parser.error(f"no notebook starts with {' or '.join(unknown)} in {root()}/notebooks")
    folders, seeds = [], given.seeds.split(",")
    if not all(seed.isdigit() for seed in seeds):
        parser.error(f"--seeds should be whole numbers such as 0,1,2, not {given.seeds!r}")
    for seed in seeds:
        os.environ["NETSPACE_SEED"] = seed
        folders.append(Settings.from_environment().folder("results"))
        for notebook in notebooks:
            took = seconds(lambda n=notebook: execute(n, root() / "build/notebooks" / n.name))[1]
            print(f"{notebook.stem}, seed {seed}: {took:.0f} s")
    print(*(table(folders, notebook.stem) for notebook in notebooks), sep="\n")


if __name__ == "__main__":
    main()
