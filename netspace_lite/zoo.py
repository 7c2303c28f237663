"""A zoo: trained nets with how each was trained, for what, and how well it does, kept on disk.

What a batch is, what the loss is and how the learning rate falls belongs to a *task*, such as
`ImageTask`; length, rate, weight decay and randomness are a net's own, its `Recipe`. Zoos are made
by `netspace_lite.zoo_training`, or of nets trained elsewhere.
"""

import copy
import re
import warnings
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Protocol

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from . import store
from .architectures import build, name_of
from .batching import Batched
from .checks import check_kind, whole
from .data import ImageData
from .fingerprint import fingerprint
from .folding import fold_batchnorm, unwrapped
from .nets import Nets, cross_entropy, packed

SUFFIXES = (".safetensors", ".pt", ".pth", ".th", ".ckpt")


@dataclass(frozen=True)
class Recipe:
    """How one net is trained: its own randomness and hyperparameters.

    ``seed`` decides the initialisation and the order of the data; ``steps`` is the number of
    mini-batches, at least 1; ``lr`` and ``weight_decay`` are AdamW's.
    """

    seed: int
    steps: int
    lr: float = 3e-3
    weight_decay: float = 1e-2

    def __post_init__(self):  # NumPy's numbers, too
        vars(self).update(seed=whole(self.seed, "seed"), steps=whole(self.steps, "steps"))
        vars(self).update(lr=float(self.lr), weight_decay=float(self.weight_decay))
        if self.steps < 1 or not (self.lr >= 0 and self.weight_decay >= 0):
            raise ValueError(f"steps are at least 1, rates and decay at least 0, not as in {self}")


def draw_recipes(
    count: int, seed: int = 0, steps=(2, 300), lr=(2e-3, 8e-3), weight_decay=(1e-3, 1e-1), stream=""
) -> list[Recipe]:
    """``count`` recipes, every range (low, high), or a number, drawn log-uniformly.

    Log-uniform lengths spread accuracy from chance to convergence, as the paper's zoos of nets
    trained for 1 to 600 epochs do (section IV-A). ``stream`` names draws of one seed apart, such
    as those of several architectures, whose nets would share their data order otherwise.
    """
    steps, lr, weight_decay = (np.broadcast_to(given, 2) for given in (steps, lr, weight_decay))
    for low, high in (steps, lr, weight_decay):
        if not 0 < low <= high and (low, high) != (0, 0):
            raise ValueError(f"a range is (low, high) with 0 < low ≤ high, not ({low}, {high})")
    rng = np.random.default_rng([seed, zlib.crc32(stream.encode())] if stream else seed)

    def draw(low, high):
        return np.exp(rng.uniform(*np.log([low or 1, high or 1]), count)) * (high > 0)

    columns = rng.integers(2**31, size=count), draw(*steps).round(), draw(*lr), draw(*weight_decay)
    return [Recipe(int(s), int(n), float(r), float(w)) for s, n, r, w in zip(*columns, strict=True)]


class Task(Protocol):
    """What nets are trained for: write these four methods and `train_zoo` trains nets on yours.

    A task is recognised by its attributes and its code (see `netspace_lite.fingerprint`); an
    attribute ``device`` says where its batches are, the CPU if there is none.
    """

    def batch(self, recipes: Sequence[Recipe], members: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Inputs [N, B, ...] and targets of N nets in one step, from nothing but the arguments.

        A loss that differentiates answers by inputs gives the inputs as targets, too: ``return
        x.requires_grad_(), x``.

        ``members`` [N] are the nets' places in the zoo, for tasks where each has data of its own.
        """

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of each net, [N], of outputs [N, B, ...].

        Answers of one value are [N, B, 1]: compare ``outputs[..., 0]`` with targets [N, B], or they
        are spread to [N, B, B].
        """

    def schedule(self, progress: Tensor) -> Tensor:
        """Factor on each net's learning rate at ``progress`` [N], 0 to 1, of its training."""

    def scores(self, nets: Nets, members: Tensor) -> dict[str, Tensor]:
        """Figures of trained nets, each [N] on the CPU; ``val_accuracy`` picks a zoo's best.

        `train_zoo` asks for those of a block once it is trained, in the process that trained it.
        """


class Orders:
    """Mini-batches of ``count`` samples in shuffled orders, one per seed and epoch.

    An order depends on nothing else, so that training can resume; those of the current epoch are
    kept.
    """

    def __init__(self, count: int):
        self.count, self._kept = count, {}

    def __call__(self, recipes: Sequence[Recipe], step: int, size: int) -> Tensor:
        """The samples of ``step`` in each net's own epochs of batches: [N, size], on the CPU."""
        epoch, position = divmod(step, self.count // size)
        orders = [self._order(recipe.seed, epoch) for recipe in recipes]
        return torch.stack([order[position * size :][:size] for order in orders])

    def _order(self, seed: int, epoch: int) -> Tensor:
        if (seed, epoch) not in self._kept:
            self._kept = {k: v for k, v in self._kept.items() if k[1] == epoch}
            generator = torch.Generator().manual_seed((seed * 100_003 + epoch) % 2**63)
            self._kept[seed, epoch] = torch.randperm(self.count, generator=generator)
        return self._kept[seed, epoch]


class ImageTask:
    """Classify images: mini-batches of ``batch`` training images, cross-entropy."""

    def __init__(self, data: ImageData, batch: int = 64):
        if not hasattr(getattr(data, "train", None), "x"):
            what = f"an ImageTask wants ImageData, not a {type(data).__name__}"
            raise ValueError(f"{what}: ImageData(name, train, val, test, classes) makes one")
        self.data, self.batch_size = data, min(whole(batch, "batch"), len(data.train))
        if batch < 1:
            raise ValueError(f"a batch is at least one image, not {batch}")
        self._orders = Orders(len(data.train))

    device = property(lambda self: self.data.train.x.device, doc="Where nets are trained.")

    def batch(self, recipes: Sequence[Recipe], members: Tensor, step: int):
        """Step ``step`` of each net's own shuffled epochs: x [N, B, C, H, W] and y [N, B].

        x is a transposed view of sample-major memory, which is what evaluation wants.
        """
        index = self._orders(recipes, step, self.batch_size).T.contiguous().to(self.device)
        return self.data.train.x[index].transpose(0, 1), self.data.train.y[index].T

    def schedule(self, progress: Tensor) -> Tensor:
        """Factor on each net's learning rate at ``progress`` [N] (0 to 1) of its training."""
        return torch.ones_like(progress)

    loss = staticmethod(cross_entropy)

    def scores(self, nets: Nets, members: Tensor) -> dict[str, Tensor]:
        """Accuracies in percent of each net: {"val_accuracy": [N], "test_accuracy": [N]}."""
        parts = {"val_accuracy": self.data.val, "test_accuracy": self.data.test}
        return {name: nets.accuracy(images) for name, images in parts.items()}


class Zoo(Nets):
    """Trained nets of one architecture with how each was trained and how well it does.

    Args:
        module, rows: as for `Nets`.
        scores: name -> [N], such as ``test_accuracy`` in percent; kept in fp32.
        recipes: N `Recipe`s, or None where they aren't known.
        losses: [N, S] training loss of each step, NaN after a net's last; None where not known.
        members: [N] places of the nets in the zoo they were made in, 0..N-1 unless given.
        about: JSON values on how the zoo was made, such as ``seconds``.

    Indexing with a slice, a mask or a list gives a smaller zoo. Nets that are not finite are named
    in a warning and left out; ValueError if none is left.
    """

    def __init__(
        self, module, rows, scores=None, recipes=None, losses=None, members=None, about=None
    ):  # fmt: skip
        super().__init__(module, rows)
        given = (scores or {}).items()
        self.scores = {n: torch.atleast_1d(torch.as_tensor(of)).float().cpu() for n, of in given}
        self.losses = losses if losses is None else torch.as_tensor(losses)
        self.recipes = recipes
        self.members = torch.arange(len(rows)) if members is None else torch.as_tensor(members)
        self.about = about or {}
        parts = *self.scores.values(), recipes, losses, members
        flat = all(values.dim() == 1 for values in self.scores.values())
        if not flat or any(part is not None and len(part) != len(rows) for part in parts):
            raise ValueError(f"scores, recipes, losses or members are not of {len(rows)} nets each")
        if not (good := self.finite()).all():
            said = f"nets {self.members[~good].tolist()} are not finite"
            said += "" if losses is None else f", since steps {diverged_at(losses[~good])}"
            if not good.any():
                raise ValueError(f"{said}: no net is left, train with a lower learning rate")
            warnings.warn(f"{said}: they are left out", stacklevel=3)
            self.__dict__.update(self[good].__dict__ | {"about": self.about})

    @property
    def fingerprint(self) -> str:
        """What the nets compute and how they were scored, for objectives that read scores."""
        return fingerprint(super().fingerprint, self.scores, self.members)

    @property
    def seconds(self) -> float:
        """How long training took; 0 where it isn't known."""
        return self.about.get("seconds", 0.0)

    def _at(self, n: Tensor) -> "Zoo":
        scores = {name: values[n] for name, values in self.scores.items()}
        recipes = None if self.recipes is None else [self.recipes[i] for i in n.tolist()]
        losses = None if self.losses is None else self.losses[n]
        about = {k: v for k, v in self.about.items() if k != "recipes"}  # those are of the whole
        return Zoo(self.batched, self.rows[n], scores, recipes, losses, self.members[n], about)

    def scored(self, task: Task) -> "Zoo":
        """The same nets, where the task's data is, with the scores that ``task`` gives them."""
        zoo = self.to(device_of(task))
        scores = task.scores(zoo, zoo.members)
        check_kind(dict, "a task's scores are a dict of [N] each, as {'val_accuracy': ...}", scores)
        about = zoo.about | ({"task": fingerprint(task)} if "task" in zoo.about else {})
        return Zoo(zoo.batched, zoo.rows, scores, zoo.recipes, zoo.losses, zoo.members, about)

    def _contents(self) -> tuple[dict, dict[str, Tensor]]:
        record, tensors = super()._contents()
        tensors |= {"members": self.members}
        tensors |= {} if self.losses is None else {"losses": self.losses}
        recipes = None if self.recipes is None else [asdict(recipe) for recipe in self.recipes]
        return record | {"about": self.about, "nets": recipes, "scores": self.scores}, tensors

    @classmethod
    def load(cls, folder, module: nn.Module | None = None) -> "Zoo":
        """Read a zoo back; ``module`` is needed for an architecture that isn't registered.

        Raises ValueError naming the file and the reason if it was truncated, edited, or holds nets
        that compute something else than ``module``, even where all shapes agree.
        """
        record, tensors = store.load(folder, "zoo")
        with store.reading(folder):
            known, rows = record["architecture"], tensors["rows"]
            batched = Batched(fold_batchnorm(build(known) if module is None else module))
            if batched.fingerprint != known["fingerprint"]:
                what = f"{folder} holds nets of {rows.shape[1]} parameters that compute something"
                given = f"{name_of(batched.module)} of {batched.layout.size}"
                raise ValueError(f"{what} else than this {given}: pass the module they are of")
            recipes = record.get("nets") and [Recipe(**net) for net in record["nets"]]
            rest = record.get("scores", {}), recipes, tensors.get("losses"), tensors.get("members")
            return cls(batched, rows, *rest, dict(record.get("about", {})))

    @classmethod
    def from_modules(cls, modules: Iterable[nn.Module], task: Task | None = None) -> "Zoo":
        """A zoo of nets you trained yourself, batch norms folded on the way, scored by ``task``.

        Raises ValueError naming the first module that computes another function of its weights
        than module 0: other layers, settings, activations or constant buffers.
        """
        zoo = cls(*packed(modules))
        return zoo if task is None else zoo.scored(task)

    @classmethod
    def from_files(cls, files, module: nn.Module, task: Task | None = None) -> "Zoo":
        """A zoo of checkpoints: state dicts of ``module``, one file a net.

        Args:
            files: a folder, a file, or a list of .safetensors, .pt, .pth, .th or .ckpt files; in
                order of their names for a folder, net-2 before net-10. Only tensors are read, with
                ``weights_only=True``.
            module: a module that every file fits, once what all its names begin with is left out
                ("module.", "_orig_mod.", "model."), as trained or as `Nets.export` leaves it.
                Values take its dtype.

        Raises FileNotFoundError, or ValueError naming the file and why it doesn't fit.
        """
        unwrapped(module)  # says so if it is none
        if isinstance(files, str | Path):
            folder = Path(files)
            files = sorted((f for f in folder.glob("*") if f.suffix in SUFFIXES), key=_in_numbers)
            files = [folder] if folder.is_file() else files
            if not files:
                raise FileNotFoundError(f"{folder} holds no file that ends in {SUFFIXES}")
        return cls.from_modules((_read_checkpoint(Path(f), module) for f in files), task)


def _in_numbers(file: Path) -> list:
    """What sorts names by the numbers in them."""
    return [int(p) if n % 2 else p for n, p in enumerate(re.split(r"(\d+)", file.name))]


def _read_checkpoint(path: Path, module: nn.Module) -> nn.Module:
    """A copy of ``module`` with the state dict in a file."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    loaded = copy.deepcopy(module)
    first = next(iter(loaded.state_dict()), "")
    try:
        safe = path.suffix == ".safetensors"
        state = load_file(path) if safe else torch.load(path, "cpu", weights_only=True)
        for key in ("state_dict", "model_state_dict", "model", "net"):  # how scripts wrap it
            state = state[key] if isinstance(state.get(key), dict) else state
        wrapped = (k.removesuffix(first) for k in state if k.endswith(f".{first}"))
        wrapper = "" if first in state else next(wrapped, "")  # "module.", "module._orig_mod."
        for part in wrapper.split(".")[:-1]:
            consume_prefix_in_state_dict_if_present(state, f"{part}.")
        if wrapper:
            state.pop("n_averaged", None)  # of torch.optim.swa_utils.AveragedModel
        if not any("running_" in k for k in state):
            loaded = fold_batchnorm(loaded)
        loaded.load_state_dict(state)  # which takes the whole numbers of quantised nets as they are
        floats = [name for name, own in loaded.state_dict().items() if own.is_floating_point()]
        if quantised := [name for name in floats if not state[name].is_floating_point()]:
            raise ValueError(f"{quantised[0]} holds whole numbers: dequantise it")
    except Exception as error:  # readers and modules fail in many ways, each on its own terms
        why = str(error) or repr(error)
        if isinstance(error, UnpicklingError):  # PyTorch's own advice would be to load it
            kinds = ", ".join(re.findall(r"GLOBAL (\S+)", why)) or "of some kind"
            why = f"it holds pickled objects, never loaded ({kinds}): save its state dict alone"
        raise ValueError(f"{path} is no state dict of {name_of(module)}: {why}") from error
    return loaded


def diverged_at(losses: Tensor) -> list[int]:
    """The step of each net [N, S] since which its loss is not finite, S if it is to the end."""
    return losses.isfinite().long().cumprod(1).sum(1).tolist()


def device_of(task: Task) -> torch.device:
    """Nets are trained where the data of their task is. ValueError for what is no task."""
    if not (hasattr(task, "batch") or hasattr(task, "scores")):
        raise ValueError(f"a {type(task).__name__} is no task: ImageTask(data) is one, see Task")
    return torch.device(getattr(task, "device", "cpu"))
