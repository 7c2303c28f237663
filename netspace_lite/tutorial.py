"""What the notebooks share: settings from the environment, the data, and the table of results.

``python -m netspace_lite.tutorial`` (``make tutorial``) executes the notebooks in order.
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from .data import ImageData, load_cifar10, load_digits, load_images


@dataclass(frozen=True)
class ZooSize:
    """How large the zoo of notebook 1 is: nets, range of training steps, images a step, L."""

    nets: int
    steps: tuple[int, int]
    batch: int
    chunk: int


ZOO = {
    "lite": ZooSize(nets=2400, steps=(4, 400), batch=32, chunk=128),
    "paper": ZooSize(nets=132, steps=(350, 210_000), batch=128, chunk=10_000),
}


@dataclass(frozen=True)
class FitSize:
    """How the space of notebook 2 is fitted: nets held out, steps, steps between validations."""

    val: int
    test: int
    steps: int
    steps_weights_only: int
    epoch: int


FIT = {
    "lite": FitSize(val=60, test=100, steps=5000, steps_weights_only=2000, epoch=250),
    "paper": FitSize(val=16, test=16, steps=60_000, steps_weights_only=60_000, epoch=1000),
}


@dataclass(frozen=True)
class MultiSize:
    """Notebook 3: nets per architecture, how they and the spaces are trained.

    held_out: validation and test nets of each zoo; converged: nets per architecture trained to
    convergence for comparison; chances: how often each architecture is the target of instance
    distillation; fine_tuning: steps for decoded nets, steps from scratch.
    """

    nets: dict[str, int]
    steps: tuple[int, int]
    batch: int
    held_out: tuple[int, int]
    converged: int
    converged_recipe: dict
    teacher: dict
    teachers: int
    teacher_recipe: dict
    chances: tuple[float, ...]
    instance_steps: int
    teacher_steps: int
    hidden: int
    hidden_teacher: int
    epoch: int
    fine_tuning: tuple[int, int]
    described_steps: int
    own_nets: int
    own_steps: int


MULTI = {
    "lite": MultiSize(
        nets={"LeNetLike": 340, "VanillaCNN": 260, "ResNet8": 200, "ResNet14": 190},
        steps=(30, 300), batch=32, held_out=(12, 30),
        converged=4, converged_recipe={"steps": 600, "lr": 2e-3},
        teacher={"depth": 14, "channels": (16, 32, 32, 32), "strides": (2, 1, 2)},
        teachers=2, teacher_recipe={"steps": 600, "lr": 1e-3, "weight_decay": 5e-2},
        chances=(0.18, 0.2, 0.3, 0.32), instance_steps=800, teacher_steps=500,
        hidden=256, hidden_teacher=64, epoch=200, fine_tuning=(20, 200),
        described_steps=600, own_nets=120, own_steps=300,
    ),
    "paper": MultiSize(
        nets={"LeNetLike": 90, "VanillaCNN": 80, "ResNet8": 90, "ResNet32": 130},
        steps=(350, 210_000), batch=128, held_out=(15, 15),
        converged=4, converged_recipe={"steps": 210_000, "lr": 1e-3},
        teacher={"depth": 56}, teachers=1,
        teacher_recipe={"steps": 70_000, "lr": 1e-3, "weight_decay": 5e-2},
        chances=(0.15, 0.2, 0.25, 0.4), instance_steps=60_000, teacher_steps=60_000,
        hidden=128, hidden_teacher=64, epoch=1000, fine_tuning=(400, 4000),
        described_steps=10_000, own_nets=90, own_steps=20_000,
    ),
}  # fmt: skip


def root() -> Path:
    """The checkout that the working directory lies in, or the working directory itself."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "notebooks").is_dir() and (folder / "pyproject.toml").is_file():
            return folder
    return here


@dataclass(frozen=True)
class Settings:
    """What a run of the tutorial depends on.

    seed: of everything random (``NETSPACE_SEED``); preset: "lite" for a laptop or "paper" for the
    authors' sizes on CIFAR-10 (``NETSPACE_PRESET``); data: path of an .npz of your own images, or
    "" for the preset's (``NETSPACE_DATA``).
    """

    seed: int = 0
    preset: str = "lite"
    data: str = ""

    @classmethod
    def from_environment(cls) -> "Settings":
        """Read the three variables; ValueError says which has no meaning."""
        seed = os.environ.get("NETSPACE_SEED", "0")
        preset = os.environ.get("NETSPACE_PRESET", "lite")
        if not seed.isdigit():
            raise ValueError(f"NETSPACE_SEED should be a whole number from 0, not {seed!r}")
        if preset not in ("lite", "paper"):
            raise ValueError(f"NETSPACE_PRESET should be lite or paper, not {preset!r}")
        return cls(int(seed), preset, os.environ.get("NETSPACE_DATA", ""))

    @property
    def lite(self) -> bool:
        """Whether sizes are for a laptop."""
        return self.preset == "lite"

    def load_data(self) -> ImageData:
        """Your own images, else digits (lite) or CIFAR-10 (paper); the split is by seed 0 always.

        All seeds see the same images, so that figures over seeds spread by training alone. They go
        to the GPU if there is one, and with them all that is trained on them.
        """
        if self.data:
            data = load_images(Path(self.data).expanduser())
        else:
            data = load_digits() if self.lite else load_cifar10()
        return data.to("cuda" if torch.cuda.is_available() else "cpu")

    def folder(self, name: str) -> Path:
        """Where a notebook keeps what later ones use: ``build/<preset>-<data>-seed<n>/<name>``."""
        data = Path(self.data).stem if self.data else ("digits" if self.lite else "cifar10")
        return root() / "build" / f"{self.preset}-{data}-seed{self.seed}" / name

    def write_results(self, notebook: str, results: dict[str, float]) -> None:
        """Keep a notebook's headline numbers as flat JSON.

        They go to ``build/results/<notebook>.json``, the latest run, and beside what else this seed
        left in ``build``, where the table over seeds is made from.
        """
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in results.items()}
        record = {"seed": self.seed, "preset": self.preset, "data": self.data or "default"}
        text = json.dumps({**record, **rounded}, indent=1)
        for folder in (root() / "build" / "results", self.folder("results")):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{notebook}.json").write_text(text)


def execute(notebook: Path, output: Path) -> float:
    """Run a notebook from the first cell to the last into ``output``; returns seconds."""
    import nbformat
    from nbclient import NotebookClient
    from tqdm import tqdm

    started = time.monotonic()
    book = nbformat.read(notebook, as_version=4)
    code = sum(cell.cell_type == "code" for cell in book.cells)
    with tqdm(total=code, desc=notebook.stem, unit="cell", file=sys.stdout, miniters=1) as bar:
        client = NotebookClient(
            book,
            kernel_name="python3",
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
            timeout=None,
            startup_timeout=300,
            resources={"metadata": {"path": str(notebook.parent)}},
            on_cell_executed=lambda **_: bar.update(),
        )
        try:
            client.execute()
        finally:  # what ran so far is kept, so that an error can be looked at in place
            output.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(book, output)
    return time.monotonic() - started


def print_results(folder: Path) -> None:
    """Print every number the notebooks recorded in ``folder``."""
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        head = ", ".join(f"{key} {record.pop(key)}" for key in ("preset", "data", "seed"))
        print(f"\n{path.stem}  ({head})")
        for key, value in record.items():
            text = f"{value:,.2f}" if isinstance(value, float) else str(value)
            print(f"  {key:<36} {text:>12}")


def seeds_table(folders: list[Path], notebook: str) -> str:
    """Markdown table of a notebook's numbers over seeds: median, and smallest to largest."""
    records = [json.loads((folder / f"{notebook}.json").read_text()) for folder in folders]
    lines = ["| figure | median | range |", "|---|---|---|"]
    for key in records[0]:
        values = [r.get(key) for r in records]
        if key == "seed" or not all(isinstance(v, float | int) for v in values):
            continue
        low, high = min(values), max(values)
        lines.append(f"| `{key}` | {median(values):,.2f} | {low:,.2f} to {high:,.2f} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Execute notebooks in order and print what they found.

    Names choose notebooks by how they start ("02"), none means all. ``--seeds=0,1,2`` runs them
    once a seed and prints a table over the seeds.
    """
    names = [a for a in arguments if not a.startswith("--seeds=")]
    chosen = [a.removeprefix("--seeds=").split(",") for a in arguments if a.startswith("--seeds=")]
    seeds = chosen[0] if chosen else [os.environ.get("NETSPACE_SEED", "0")]
    base = root()
    notebooks = sorted((base / "notebooks").glob("[0-9]*.ipynb"))
    notebooks = [n for n in notebooks if not names or n.name.startswith(tuple(names))]
    if not notebooks:
        sys.exit(f"no notebook starts with {' or '.join(names)} in {base / 'notebooks'}")
    folders = []
    for seed in seeds:
        os.environ["NETSPACE_SEED"] = seed
        folders.append(Settings.from_environment().folder("results"))
        for notebook in notebooks:
            seconds = execute(notebook, base / "build" / "notebooks" / notebook.name)
            print(f"{notebook.stem}, seed {seed}: {seconds:.0f} s")
    if len(seeds) == 1:
        return print_results(base / "build" / "results")
    for notebook in notebooks:
        print(f"\n### {notebook.stem}, seeds {', '.join(seeds)}\n")
        print(seeds_table(folders, notebook.stem))


if __name__ == "__main__":
    main(sys.argv[1:])
