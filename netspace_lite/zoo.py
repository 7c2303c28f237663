"""Train many nets at once, each on its own terms, and keep them as a zoo on disk.

A block of nets is one matrix of rows. Every net has its own initialisation, data order, learning
rate, weight decay and training length; a net that reaches its length leaves the block. What a
batch is, what the loss is and how the learning rate falls belongs to a *task*, such as `ImageTask`.
"""

import copy
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from . import store
from .architectures import build, describe, name_of
from .batching import BLOCK, Batched
from .data import ImageData
from .fingerprint import fingerprint, structure
from .folding import fold_batchnorm
from .layout import Layout
from .nets import Nets
from .progress import progress_bar

CHECKPOINT_SECONDS = 60  # an interruption loses at most this much training
LOG_STEPS = 50  # steps between rows of numbers for a logger
SUFFIXES = (".safetensors", ".pt", ".pth")
Make = nn.Module | Callable[[], nn.Module]


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


def draw_recipes(
    count: int, seed: int = 0, steps=(2, 300), lr=(2e-3, 8e-3), weight_decay=(1e-3, 1e-1), stream=""
) -> list[Recipe]:
    """``count`` recipes, every range (low, high) drawn log-uniformly.

    Log-uniform lengths spread accuracy from chance to convergence, as the paper's zoos of nets
    trained for 1 to 600 epochs do (section IV-A). ``stream`` names draws of one seed apart, such
    as those of several architectures, whose nets would share their data order otherwise.
    """
    rng = np.random.default_rng([seed, zlib.crc32(stream.encode())] if stream else seed)

    def draw(low, high):
        return np.exp(rng.uniform(np.log(low), np.log(high), count))

    columns = rng.integers(2**31, size=count), draw(*steps).round(), draw(*lr), draw(*weight_decay)
    return [Recipe(int(s), int(n), float(r), float(w)) for s, n, r, w in zip(*columns, strict=True)]


class Task(Protocol):
    """What nets are trained for: write these four methods and `train_zoo` trains nets on yours.

    A task is recognised by its public attributes and its code (see `netspace_lite.fingerprint`); an
    attribute ``device`` says where its batches are, the CPU if there is none.
    """

    def batch(self, recipes: Sequence[Recipe], members: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Inputs [N, B, ...] and targets of N nets in one step, from nothing but the arguments.

        ``members`` [N] are the nets' places in the zoo, for tasks where each has data of its own.
        """

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of each net, [N], of outputs [N, B, ...]."""

    def schedule(self, progress: Tensor) -> Tensor:
        """Factor on each net's learning rate at ``progress`` [N], 0 to 1, of its training."""

    def scores(self, nets: Nets, members: Tensor) -> dict[str, Tensor]:
        """Figures of trained nets, each [N] on the CPU; ``val_accuracy`` picks a zoo's best."""


class ImageTask:
    """Classify images: mini-batches of ``batch`` training images, cross-entropy."""

    def __init__(self, data: ImageData, batch: int = 64):
        self.data, self.batch_size = data, min(batch, len(data.train))
        self._orders: dict[tuple[int, int], Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where the images are, and so where nets are trained."""
        return self.data.train.x.device

    def batch(self, recipes: Sequence[Recipe], members: Tensor, step: int):
        """Step ``step`` of each net's own shuffled epochs: x [N, B, C, H, W] and y [N, B].

        x is a transposed view of sample-major memory, which is what evaluation wants.
        """
        epoch, position = divmod(step, len(self.data.train) // self.batch_size)
        first = position * self.batch_size
        orders = [self._order(recipe.seed, epoch) for recipe in recipes]
        index = torch.stack([o[first : first + self.batch_size] for o in orders], dim=1)
        return self.data.train.x[index].transpose(0, 1), self.data.train.y[index].T

    def _order(self, seed: int, epoch: int) -> Tensor:
        """The order of the data in one epoch; depends on nothing else, so training can resume."""
        if (seed, epoch) not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k[1] == epoch}
            generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
            order = torch.randperm(len(self.data.train), generator=generator)
            self._orders[seed, epoch] = order.to(self.device)
        return self._orders[seed, epoch]

    def schedule(self, progress: Tensor) -> Tensor:
        """Factor on each net's learning rate at ``progress`` [N] (0 to 1) of its training."""
        return torch.ones_like(progress)

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of logits [N, B, K] against y [N, B]: [N]."""
        return F.cross_entropy(outputs.movedim(-1, 1), y, reduction="none").mean(1)

    def scores(self, nets: Nets, members: Tensor) -> dict[str, Tensor]:
        """Accuracies in percent of each net: {"val_accuracy": [N], "test_accuracy": [N]}."""
        return {
            "val_accuracy": nets.accuracy(self.data.val),
            "test_accuracy": nets.accuracy(self.data.test),
        }


class Zoo(Nets):
    """Trained nets of one architecture with how each was trained and how well it does.

    Args:
        module, rows: as for `Nets`.
        scores: name -> [N], such as ``test_accuracy`` in percent.
        recipes: N `Recipe`s, or None where they aren't known.
        losses: [N, S] training loss of each step, NaN after a net's last; None where not known.
        members: [N] places of the nets in the zoo they were made in, 0..N-1 unless given.
        about: JSON values on how the zoo was made, such as ``seconds``.

    Indexing with a slice, a mask or a list gives a smaller zoo. Nets that are not finite are named
    in a warning and left out; ValueError if none is left.
    """

    def __init__(
        self, module, rows, scores=None, recipes=None, losses=None, members=None, about=None
    ):
        super().__init__(module, rows)
        self.scores, self.losses, self.recipes = scores or {}, losses, recipes
        self.members = torch.arange(len(rows)) if members is None else members
        self.about = about or {}
        if not (good := self.finite()).all():
            _name_diverged(self, good)
            self.__dict__.update(self._at(good.nonzero()[:, 0]).__dict__)

    @property
    def seconds(self) -> float:
        """How long training took; 0 where it isn't known."""
        return self.about.get("seconds", 0.0)

    def _at(self, n: Tensor) -> "Zoo":
        scores = {name: values[n] for name, values in self.scores.items()}
        recipes = None if self.recipes is None else [self.recipes[i] for i in n.tolist()]
        losses = None if self.losses is None else self.losses[n]
        rows = self.rows[n.to(self.rows.device)]
        return Zoo(self.batched, rows, scores, recipes, losses, self.members[n], self.about)

    def scored(self, task: Task) -> "Zoo":
        """The same nets with the scores that ``task`` gives them."""
        zoo = copy.copy(self)
        zoo.scores = task.scores(self, self.members)
        return zoo

    def _contents(self) -> tuple[dict, dict[str, Tensor]]:
        record, tensors = super()._contents()
        tensors |= {"members": self.members}
        tensors |= {} if self.losses is None else {"losses": self.losses}
        recipes = None if self.recipes is None else [asdict(recipe) for recipe in self.recipes]
        scores = {name: values.tolist() for name, values in self.scores.items()}
        return record | {"about": self.about, "nets": recipes, "scores": scores}, tensors

    @classmethod
    def load(cls, folder, module: nn.Module | None = None) -> "Zoo":
        """Read a zoo back; ``module`` is needed for an architecture that isn't registered.

        Raises ValueError naming the file and the reason if it was truncated, edited, or holds nets
        that compute something else than ``module``, even where all shapes agree.
        """
        record, tensors = store.load(folder, "zoo")
        batched = Batched(fold_batchnorm(module or build(record["architecture"])))
        if batched.fingerprint != record["architecture"]["fingerprint"]:
            raise ValueError(
                f"{folder} holds nets of {tensors['rows'].shape[1]} parameters that compute "
                f"something else than this {name_of(batched.module)} of {batched.layout.size}: "
                "pass the very architecture they were made of, settings and activations included"
            )
        scores = {n: torch.tensor(values) for n, values in record.get("scores", {}).items()}
        nets, rows = record.get("nets"), tensors["rows"]
        recipes = None if nets is None else [Recipe(**net) for net in nets]
        losses, members = tensors.get("losses"), tensors.get("members")
        return cls(batched, rows, scores, recipes, losses, members, record.get("about"))

    @classmethod
    def from_modules(cls, modules: Iterable[nn.Module], task: Task | None = None) -> "Zoo":
        """A zoo of nets you trained yourself, batch norms folded on the way, scored by ``task``.

        Raises ValueError naming the first module that computes another function of its weights
        than module 0: other layers, settings, activations or constant buffers.
        """
        modules = [fold_batchnorm(module) for module in modules]
        if not modules:
            raise ValueError("no modules: give at least one trained net")
        batched = Batched(modules[0])
        for n, module in enumerate(modules):
            if structure(module) != batched.fingerprint:
                raise ValueError(
                    f"module {n}, a {name_of(module)}, computes another function of its weights "
                    f"than module 0, a {name_of(modules[0])}: one zoo holds one architecture"
                )
        with torch.no_grad():
            zoo = cls(batched, batched.layout.pack(modules))
        zoo = zoo.to(getattr(task, "device", zoo.rows.device))
        return zoo if task is None else zoo.scored(task)

    @classmethod
    def from_files(cls, files, module: nn.Module, task: Task | None = None) -> "Zoo":
        """A zoo of checkpoints: state dicts of ``module``, one file a net.

        Args:
            files: a folder, or a list of .safetensors, .pt or .pth files; in order of their names
                for a folder. Only tensors are read, with ``weights_only=True``.
            module: a module that every file fits.

        Raises FileNotFoundError, or ValueError naming the file and why it doesn't fit.
        """
        if isinstance(files, str | Path):
            folder = Path(files)
            files = sorted(f for f in folder.glob("*") if f.suffix in SUFFIXES)
            if not files:
                raise FileNotFoundError(f"{folder} holds no file that ends in {SUFFIXES}")
        return cls.from_modules((_read_checkpoint(Path(f), module) for f in files), task)


def _read_checkpoint(path: Path, module: nn.Module) -> nn.Module:
    """A copy of ``module`` with the state dict in a file."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    read = load_file if path.suffix == ".safetensors" else _load_pickled_tensors
    try:
        state = read(path)
        for key in ("state_dict", "model_state_dict", "model"):  # how training scripts wrap it
            state = state[key] if isinstance(state.get(key), dict) else state
        state = {name.removeprefix("module."): value for name, value in state.items()}
        loaded = copy.deepcopy(module)
        loaded.load_state_dict(state)
    except Exception as error:  # readers and modules fail in many ways, each on its own terms
        raise ValueError(
            f"{path} is no state dict of {name_of(module)}: {str(error) or repr(error)}"
        ) from error
    return loaded


def _load_pickled_tensors(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


def _name_diverged(zoo: Zoo, good: Tensor) -> None:
    """Warn of nets that are not finite, naming them and where it began."""
    bad = (~good).nonzero()[:, 0].tolist()
    began = "" if zoo.losses is None else f", since steps {[_began(zoo.losses[n]) for n in bad]}"
    what = f"nets {zoo.members[~good].tolist()} are not finite{began}"
    if len(bad) == len(zoo):
        raise ValueError(f"{what}: no net is left, train with a lower learning rate")
    warnings.warn(f"{what}: they are left out", stacklevel=4)


def _began(losses: Tensor) -> int:
    """The first step whose loss is not finite, or the number of steps."""
    return int((~losses.isfinite()).nonzero()[0]) if not losses.isfinite().all() else len(losses)


def adamw_step(rows, grad, momentum, variance, step, lr, weight_decay, betas=(0.9, 0.999)):
    """AdamW in place on rows [N, P], with lr and weight_decay [N, 1] (Loshchilov & Hutter 2019).

    ``step`` counts from 1. Equal to ``torch.optim.AdamW`` on each net alone.
    """
    momentum.lerp_(grad, 1 - betas[0])
    variance.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    rows.mul_(1 - lr * weight_decay)
    scale = (variance.sqrt() / (1 - betas[1] ** step) ** 0.5).add_(1e-8)
    rows.sub_(lr / (1 - betas[0] ** step) * momentum / scale)


def initial_rows(make: Make, seeds: Iterable[int]) -> Tensor:
    """Rows [N, P] of nets initialised as PyTorch would with ``torch.manual_seed(seed)`` each.

    Args:
        make: a factory of modules; or a module, built anew if its class is registered, else copied
            and each layer's ``reset_parameters`` called.

    Raises ValueError naming a layer that has parameters but no ``reset_parameters``.
    """
    fresh, nets = _factory(make), []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            torch.manual_seed(seed)
            nets.append(fresh())
    return Layout.of(nets[0]).pack(dict(net.named_parameters()) for net in nets)


def _rows_of(make: Make | Batched, recipes: list[Recipe]) -> Tensor:
    make = make.module if isinstance(make, Batched) else make
    return initial_rows(make, [recipe.seed for recipe in recipes])


def _factory(make: Make) -> Callable[[], nn.Module]:
    if not isinstance(make, nn.Module):
        return make
    description = describe(make)
    if description["config"] is not None:
        return lambda: build(description)
    return lambda: _reset(make)


def _reset(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    for name, layer in reversed(list(module.named_modules())):  # parents have the last word
        names = ("reset_parameters", "_reset_parameters")
        reset = next((getattr(layer, n) for n in names if hasattr(layer, n)), None)
        if reset is not None:
            reset()
        elif next(layer.parameters(recurse=False), None) is not None:
            raise ValueError(
                f"layer {name or type(layer).__name__!r} has parameters but no reset_parameters(), "
                "so it can't be initialised anew: pass a factory, such as lambda: MyNet(...)"
            )
    return module


def _template(make: Make) -> nn.Module:
    if isinstance(make, nn.Module):
        return make
    with torch.random.fork_rng(devices=[]):
        return make()


def train_nets(
    make: Make | Batched,
    task: Task,
    recipes: list[Recipe],
    state: dict[str, Tensor] | None = None,
    on_step: Callable[[dict[str, Tensor]], None] = lambda state: None,
    members: Tensor | None = None,
) -> dict[str, Tensor]:
    """Train one net per recipe, all together: each step is one batched forward and backward.

    Args:
        make: the architecture, see `initial_rows`.
        task: gives batches, losses and the schedule.
        recipes: one a net, the longest training first, so that those who finish leave the end.
        state: what an earlier call reached, to go on from.
        on_step: called with the state after every step; the next step changes it in place.
        members: [N] places of the nets in their zoo, 0..N-1 unless given.

    Returns ``rows`` [N, P], ``running`` [N, Q] statistics of batch norms, ``losses`` [N, S],
    AdamW's ``momentum`` and ``variance``, ``step`` and the ``seconds`` it took.
    """
    batched = make if isinstance(make, Batched) else Batched(_template(make))
    lengths = [recipe.steps for recipe in recipes]
    if lengths != sorted(lengths, reverse=True) or lengths[-1] < 1:
        raise ValueError("recipes should be sorted by steps, the longest first and none under 1")
    members = torch.arange(len(recipes)) if members is None else members
    device = torch.device(getattr(task, "device", "cpu"))  # nets are trained where their data is
    state = state or _initial_state(batched, _rows_of(make, recipes), recipes)
    state |= {k: v.to(device) for k, v in state.items() if k not in ("step", "seconds")}
    hyper = [[recipe.lr, recipe.weight_decay, recipe.steps] for recipe in recipes]
    lr, decay, ends = torch.tensor(hyper, device=device).split(1, dim=1)
    started = time.perf_counter() - state["seconds"].item()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for step in range(int(state["step"]), lengths[0]):
            torch.manual_seed(recipes[0].seed + 1_000_003 * step)  # dropout's, also after a resume
            n = sum(length > step for length in lengths)  # nets still in training
            rows, running, *adam = (
                state[key][:n] for key in ("rows", "running", "momentum", "variance")
            )
            weights = rows.detach().requires_grad_()
            x, y = task.batch(recipes[:n], members[:n], step)
            loss = task.loss(batched(weights, x, True, running), y)
            (grad,) = torch.autograd.grad(loss.sum(), weights)
            rate = lr[:n] * task.schedule(step / ends[:n])
            adamw_step(rows, grad, *adam, step + 1, rate, decay[:n])
            state["losses"][:n, step] = loss.detach()
            state["step"].fill_(step + 1)
            state["seconds"].fill_(time.perf_counter() - started)
            on_step(state)
    return state


def _initial_state(batched: Batched, rows: Tensor, recipes: list[Recipe]) -> dict[str, Tensor]:
    return {
        "rows": rows,
        "running": batched.initial_running(len(recipes)),
        "momentum": torch.zeros_like(rows),
        "variance": torch.zeros_like(rows),
        "losses": torch.full((len(recipes), recipes[0].steps), torch.nan),
        "step": torch.zeros((), dtype=torch.long),
        "seconds": torch.zeros((), dtype=torch.double),
    }


def fine_tune(nets: Nets, task: Task, recipes: list[Recipe]) -> Nets:
    """Train nets further, one recipe each with equal steps; ``nets`` themselves stay as they are.

    A recipe's seed decides the order of the data only. Raises ValueError naming nets that diverge.
    """
    if len(recipes) != len(nets) or len({recipe.steps for recipe in recipes}) != 1:
        raise ValueError(f"{len(nets)} nets need as many recipes of equal steps: {len(recipes)}")
    state = _initial_state(nets.batched, nets.rows.detach().clone(), recipes)
    members = getattr(nets, "members", None)
    state = train_nets(nets.batched, task, recipes, state, members=members)
    tuned = Nets(nets.batched, state["rows"])
    if not (good := tuned.finite()).all():
        bad = (~good).nonzero()[:, 0].tolist()
        began = [_began(state["losses"][n].cpu()) for n in bad]
        raise ValueError(f"nets {bad} diverged at steps {began}: fine-tune at a lower rate")
    return tuned


def train_zoo(
    make: Make, task: Task, recipes: list[Recipe], folder=None, block: int = BLOCK,
    progress: bool = True, log: Callable[[dict[str, float]], None] | None = None,
) -> Zoo:  # fmt: skip
    """Train a net per recipe, ``block`` at a time, and score them all.

    With ``folder`` the work can be interrupted: finished blocks, and the block in training once
    every CHECKPOINT_SECONDS, are kept there and the same call goes on from them, bit for bit. A
    folder that already holds this very zoo is loaded. Batch norms train on each net's own batches
    and are folded away at the end, so the zoo's module has none.

    Args:
        make: the architecture: a module, or a factory such as ``lambda: MyNet(10)``, see
            `initial_rows`.
        task: `ImageTask`, `netspace_lite.shapes.ShapeTask`, or your own `Task`.
        recipes: one a net.
        folder: where the zoo is kept, or None to keep nothing.
        block: nets trained together; 32 fits a CPU's caches, a GPU takes more.
        progress: show a bar that counts training steps.
        log: called with ``block``, ``step``, ``nets``, ``loss`` and ``seconds`` every 50 steps.

    Raises ValueError if ``folder`` holds another zoo, naming what differs.
    """
    if not recipes:
        raise ValueError("no recipes: give one per net, for example draw_recipes(500)")
    batched = Batched(_template(make))
    plan = {"architecture": batched.fingerprint, "task": fingerprint(task), "block": block}
    plan["recipes"] = fingerprint(recipes)
    if folder is not None and store.exists(folder, "zoo"):
        store.check_plan(folder, store.load(folder, "zoo")[0]["about"], plan)
        return Zoo.load(folder, batched.module).to(getattr(task, "device", "cpu"))
    order = torch.tensor([recipe.steps for recipe in recipes]).argsort(descending=True, stable=True)
    states = []
    with progress_bar(sum(recipe.steps for recipe in recipes), "training nets", progress) as bar:
        for number, members in enumerate(order.split(block)):
            chosen, state = [recipes[n] for n in members], None
            if folder is not None and store.exists(folder, f"block-{number}"):
                record, state = store.load(folder, f"block-{number}")
                store.check_plan(folder, record, plan)
                bar.update(sum(min(recipe.steps, int(state["step"])) for recipe in chosen))
            state = state or _initial_state(batched, _rows_of(make, chosen), chosen)
            on_step = _watcher(chosen, folder, number, plan, bar, log)
            states.append(train_nets(batched, task, chosen, state, on_step, members))
    back, longest = order.argsort(), states[0]["losses"].shape[1]
    rows, running = (torch.cat([s[key] for s in states]) for key in ("rows", "running"))
    losses = (s["losses"].cpu() for s in states)
    losses = torch.cat([F.pad(x, (0, longest - x.shape[1]), value=torch.nan) for x in losses])
    about = plan | {"seconds": sum(s["seconds"].item() for s in states)}
    batched, rows = _without_batchnorm(batched, rows[back.to(rows.device)], running[back])
    zoo = Zoo(batched, rows, None, recipes, losses[back], None, about).scored(task)
    if folder is not None:
        zoo.save(folder)
        for number in range(len(states)):
            store.delete(folder, f"block-{number}")
    return zoo


def _watcher(recipes, folder, number: int, plan: dict, bar, log) -> Callable:
    """What happens after each step of a block: the bar, the log, now and then a checkpoint."""
    saved = time.monotonic()

    def on_step(state):
        nonlocal saved
        step = int(state["step"])
        nets, done = sum(recipe.steps >= step for recipe in recipes), step == recipes[0].steps
        bar.update(nets)
        if log is not None and (done or step % LOG_STEPS == 0):
            row = {"block": number, "step": step, "nets": nets, "seconds": state["seconds"].item()}
            log(row | {"loss": state["losses"][:nets, step - 1].mean().item()})
        if folder is not None and (done or time.monotonic() - saved > CHECKPOINT_SECONDS):
            store.save(folder, f"block-{number}", plan, state)
            saved = time.monotonic()

    return on_step


def _without_batchnorm(batched: Batched, rows: Tensor, running: Tensor) -> tuple[Batched, Tensor]:
    """Trained nets with their batch norms folded away."""
    if not batched.running.size:
        return batched, rows
    nets = []
    states = zip(batched.layout.unpack(rows), batched.running.unpack(running), strict=True)
    for parameters, statistics in states:
        module = copy.deepcopy(batched.module)
        module.load_state_dict(parameters | statistics, strict=False)
        nets.append(fold_batchnorm(module))
    folded = Batched(nets[0])
    return folded, folded.layout.pack(nets).to(rows)
