"""What the notebooks share: settings from the environment, sizes, zoos, spaces and figures.

``python -m netspace_lite.tutorial`` (``make tutorial``) executes the notebooks in order.
"""

import json
import os
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ..architectures import lite_net, paper_net
from ..data import ImageData, load_cifar10, load_digits, load_images

PRESETS = tomllib.loads(Path(__file__).with_name("presets.toml").read_text("utf-8"))


def root() -> Path:
    """The checkout that the working directory lies in, or the working directory itself."""
    here = Path.cwd()
    checkouts = (p for p in (here, *here.parents) if (p / "notebooks").is_dir())
    return next((p for p in checkouts if (p / "pyproject.toml").is_file()), here)


@dataclass(frozen=True)
class Settings:
    """What a run of the tutorial depends on.

    seed: of everything random (``NETSPACE_SEED``); preset: "lite" for a laptop, "smoke" to see in
    a minute that all runs, "evening" for the paper's nets on CIFAR-10 with zoos and trainings that
    two cores manage in an evening, "paper" for the authors' sizes (``NETSPACE_PRESET``);
    data: path of an .npz of your own images, or "" for the preset's (``NETSPACE_DATA``).
    What a preset's sizes are stands in ``presets.toml``.
    """

    seed: int = 0
    preset: str = "lite"
    data: str = ""

    @classmethod
    def from_environment(cls) -> "Settings":
        """Read the three variables; ValueError says which has no meaning."""
        seed = os.environ.get("NETSPACE_SEED", "0")
        preset = os.environ.get("NETSPACE_PRESET", "lite")
        if not (seed.isascii() and seed.isdigit()):
            raise ValueError(f"NETSPACE_SEED should be a whole number from 0, not {seed!r}")
        if preset not in PRESETS:
            raise ValueError(f"NETSPACE_PRESET should be {', '.join(PRESETS)}, not {preset!r}")
        return cls(int(seed), preset, os.environ.get("NETSPACE_DATA", ""))

    @property
    def sizes(self) -> SimpleNamespace:
        """All sizes of the preset by part and name, ``sizes.zoo.nets``; see ``presets.toml``."""
        parts, own = PRESETS["lite"].items(), PRESETS[self.preset]
        return SimpleNamespace(**{k: SimpleNamespace(**v | own.get(k, {})) for k, v in parts})

    @property
    def lite(self) -> bool:
        """Whether nets and images are those for a laptop."""
        return self.preset in ("lite", "smoke")

    def claim(self, sentence: str, holds) -> None:
        """Assert what is claimed of a lite run on the digits; elsewhere say whether it holds."""
        if not holds and self.preset == "lite" and not self.data:
            raise AssertionError(f"this claim no longer holds: {sentence}")
        print(f"{'holds' if holds else 'does not hold here'}: {sentence}")

    def load_data(self) -> ImageData:
        """Your own images, else the preset's: digits, or CIFAR-10 for evening and paper.

        All seeds see the same split, so that figures over seeds spread by training alone. They go
        to the GPU if there is one, and with them all that is trained on them.
        """
        own = Path(self.data).expanduser()
        data = load_images(own) if self.data else load_digits() if self.lite else load_cifar10()
        return data.to("cuda" if torch.cuda.is_available() else "cpu")

    def describe(self, data: ImageData) -> str:
        """What the images are and, if larger than the digits, how much longer a run may take."""
        times = torch.Size(data.shape).numel() / 64
        longer = f"; up to {times:.0f} times the minutes that digits take" if times > 1 else ""
        counts = f"{len(data.train):,} train, {len(data.val):,} val, {len(data.test):,} test"
        size = " × ".join(map(str, data.shape))
        return f"{data.name}: {counts} images of {size} values, {data.classes} classes{longer}"

    def net(self, name: str, data: ImageData) -> nn.Module:
        """The architecture of that name, small for a laptop or as the paper's for CIFAR-10."""
        if not self.lite and (*data.shape, data.classes) != (3, 32, 32, 10):
            raise ValueError(f"{self.preset} is for 3×32×32 images of 10 classes: take lite")
        return lite_net(name, data.shape, data.classes) if self.lite else paper_net(name)

    def folder(self, name: str) -> Path:
        """Where a notebook keeps what later ones use: ``build/<preset>-<data>-seed<n>/<name>``."""
        data = Path(self.data).stem if self.data else ("digits" if self.lite else "cifar10")
        return root() / "build" / f"{self.preset}-{data}-seed{self.seed}" / name

    def write_results(self, notebook: str, results: dict[str, float]) -> None:
        """Keep a notebook's headline numbers as flat JSON, beside what else this seed left."""
        rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in results.items()}
        record = {"seed": self.seed, "preset": self.preset, "data": self.data or "default"}
        path = self.folder("results") / f"{notebook}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record | rounded, indent=1))


def seconds(run: Callable) -> tuple:
    """What ``run()`` returns, and how many seconds it took."""
    started = time.perf_counter()
    return run(), time.perf_counter() - started


def bootstrap(statistic: Callable, *tables: Tensor, draws: int = 1000, seed: int = 0) -> tuple:
    """95% interval (low, high) of ``statistic(*tables)``, each [N] or [N, B, ...], nets by images.

    Nets are drawn anew with replacement, and so are images, the same of every table: how far would
    the figure move with other nets and images of the same kind (Efron 1979)?
    """
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(draws):
        drawn = [table.cpu() for table in tables]
        for axis, size in enumerate(max((table.shape[:2] for table in tables), key=len)):
            again = torch.randint(size, (size,), generator=generator)
            drawn = [t.index_select(axis, again) if axis < t.dim() else t for t in drawn]
        found.append(float(statistic(*drawn)))
    return tuple(torch.tensor(found).quantile(torch.tensor([0.025, 0.975])).tolist())
