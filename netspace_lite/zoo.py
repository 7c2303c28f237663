"""Train many nets at once, each on its own terms, and keep them as a zoo on disk.

A block of nets is one matrix of rows. Every net has its own initialisation, data order, learning
rate, weight decay and training length; a net that reaches its length leaves the block. What a
batch is, what the loss is and how the learning rate falls belongs to a *task*, such as `ImageTask`.
"""

import copy
import time
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from operator import index
from pathlib import Path
from pickle import UnpicklingError
from typing import Protocol

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from . import store
from .architectures import build, describe, is_registered, listed, name_of
from .batching import BLOCK, Batched
from .data import ImageData
from .fingerprint import difference, fingerprint, structure
from .folding import fold_batchnorm, statistics, unwrapped
from .layout import Layout, fill
from .nets import Nets, cross_entropy
from .processes import portion, rank, wait, world
from .progress import progress_bar
from .randomness import follow, own_draws, own_randomness

CHECKPOINT_SECONDS = 60  # an interruption loses at most this much training
ADAM = ("momentum", "variance")  # AdamW's part of a state
ON_GPU = 1 << 16  # inputs of a step that keep a GPU busy for as long as launching it takes
LOG_STEPS = 50  # steps between rows of numbers for a logger
SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt")
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

    def __post_init__(self):  # NumPy's numbers, too
        kinds = {"seed": index, "steps": index, "lr": float, "weight_decay": float}
        for name, kind in kinds.items():
            object.__setattr__(self, name, kind(getattr(self, name)))
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
        if not 0 < low <= high:
            raise ValueError(f"a range is (low, high) with 0 < low ≤ high, not {(low, high)}")
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


class Orders:
    """Shuffled orders of ``count`` samples, one per seed and epoch.

    An order depends on nothing else, so that training can resume; those of the current epoch are
    kept.
    """

    def __init__(self, count: int):
        self.count, self._kept = count, {}

    def __call__(self, seed: int, epoch: int) -> Tensor:
        """[count], on the CPU."""
        if (seed, epoch) not in self._kept:
            self._kept = {k: v for k, v in self._kept.items() if k[1] == epoch}
            generator = torch.Generator().manual_seed((seed * 100_003 + epoch) % 2**63)
            self._kept[seed, epoch] = torch.randperm(self.count, generator=generator)
        return self._kept[seed, epoch]


class ImageTask:
    """Classify images: mini-batches of ``batch`` training images, cross-entropy."""

    def __init__(self, data: ImageData, batch: int = 64):
        self.data, self.batch_size = data, min(batch, len(data.train))
        if batch < 1:
            raise ValueError(f"a batch is at least one image, not {batch}")
        self._orders = Orders(len(data.train))

    device = property(lambda self: self.data.train.x.device, doc="Where nets are trained.")

    def batch(self, recipes: Sequence[Recipe], members: Tensor, step: int):
        """Step ``step`` of each net's own shuffled epochs: x [N, B, C, H, W] and y [N, B].

        x is a transposed view of sample-major memory, which is what evaluation wants.
        """
        epoch, position = divmod(step, len(self.data.train) // self.batch_size)
        first = position * self.batch_size
        orders = [self._orders(recipe.seed, epoch) for recipe in recipes]
        index = torch.stack([o[first : first + self.batch_size] for o in orders], dim=1)
        index = index.to(self.device)
        return self.data.train.x[index].transpose(0, 1), self.data.train.y[index].T

    def schedule(self, progress: Tensor) -> Tensor:
        """Factor on each net's learning rate at ``progress`` [N] (0 to 1) of its training."""
        return torch.ones_like(progress)

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of logits [N, B, K] against y [N, B]: [N]."""
        return cross_entropy(outputs, y)

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
        self.scores = {name: torch.as_tensor(of).float() for name, of in (scores or {}).items()}
        self.losses, self.recipes = losses, recipes
        self.members = torch.arange(len(rows)) if members is None else members
        self.about = about or {}
        parts = *self.scores.values(), recipes, losses, members
        if any(part is not None and len(part) != len(rows) for part in parts):
            raise ValueError(f"scores, recipes, losses or members are not of {len(rows)} nets each")
        if not (good := self.finite()).all():
            said = f"nets {self.members[~good].tolist()} are not finite"
            said += "" if losses is None else f", since steps {_began(losses[~good])}"
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
        zoo = self.to(_device(task))
        scores = dict(task.scores(zoo, zoo.members)).items()
        scores = {name: torch.atleast_1d(torch.as_tensor(of)).cpu() for name, of in scores}
        return Zoo(zoo.batched, zoo.rows, scores, zoo.recipes, zoo.losses, zoo.members, zoo.about)

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
            scores = {n: torch.tensor(values) for n, values in record.get("scores", {}).items()}
            recipes = record.get("nets") and [Recipe(**net) for net in record["nets"]]
            history = recipes, tensors.get("losses"), tensors.get("members")
            return cls(batched, rows, scores, *history, dict(record.get("about", {})))

    @classmethod
    def from_modules(cls, modules: Iterable[nn.Module], task: Task | None = None) -> "Zoo":
        """A zoo of nets you trained yourself, batch norms folded on the way, scored by ``task``.

        Raises ValueError naming the first module that computes another function of its weights
        than module 0: other layers, settings, activations or constant buffers.
        """
        modules = [fold_batchnorm(module) for module in listed(modules)]
        if not modules:
            raise ValueError("no modules: give at least one trained net")
        batched = Batched(modules[0])
        for n, module in enumerate(modules):
            if structure(module) != batched.fingerprint:
                what = f"module {n}, a {name_of(module)}, computes another function of its weights"
                why = difference(modules[0], module)
                raise ValueError(f"{what} than module 0 ({why}): one zoo holds one architecture")
        zoo = cls(batched, batched.layout.pack(modules))
        return zoo if task is None else zoo.scored(task)

    @classmethod
    def from_files(cls, files, module: nn.Module, task: Task | None = None) -> "Zoo":
        """A zoo of checkpoints: state dicts of ``module``, one file a net.

        Args:
            files: a folder, a file, or a list of .safetensors, .pt, .pth or .ckpt files; in order
                of their names for a folder. Only tensors are read, with ``weights_only=True``.
            module: a module that every file fits, once what all its names begin with is left out
                ("module.", "_orig_mod.", "model."). Values take its dtype.

        Raises FileNotFoundError, or ValueError naming the file and why it doesn't fit.
        """
        if isinstance(files, str | Path):
            folder = Path(files)
            files = sorted(f for f in folder.glob("*") if f.suffix in SUFFIXES)
            files = [folder] if folder.is_file() else files
            if not files:
                raise FileNotFoundError(f"{folder} holds no file that ends in {SUFFIXES}")
        return cls.from_modules((_read_checkpoint(Path(f), module) for f in files), task)


def _read_checkpoint(path: Path, module: nn.Module) -> nn.Module:
    """A copy of ``module`` with the state dict in a file."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    loaded = copy.deepcopy(module)
    first = next(iter(loaded.state_dict()), "")
    try:
        safe = path.suffix == ".safetensors"
        state = load_file(path) if safe else torch.load(path, "cpu", weights_only=True)
        for key in ("state_dict", "model_state_dict", "model"):  # how training scripts wrap it
            state = state[key] if isinstance(state.get(key), dict) else state
        versions = getattr(state, "_metadata", {})  # by which modules migrate older files
        wrapped = (k.removesuffix(first) for k in state if k.endswith(f".{first}"))
        wrapper = "" if first in state else next(wrapped, "")  # "module.", "_orig_mod."
        state = OrderedDict((k.removeprefix(wrapper), v) for k, v in state.items())
        state._metadata = {f"{k}.".removeprefix(wrapper)[:-1]: v for k, v in versions.items()}
        loaded.load_state_dict(state)
    except Exception as error:  # readers and modules fail in many ways, each on its own terms
        pickled = isinstance(error, UnpicklingError)  # PyTorch's own advice would be to load it
        why = "it holds pickled objects, never loaded" if pickled else str(error) or repr(error)
        raise ValueError(f"{path} is no state dict of {name_of(module)}: {why}") from error
    return loaded


def _began(losses: Tensor) -> list[int]:
    """The step of each net [N, S] since which its loss is not finite, S if it is to the end."""
    return losses.isfinite().long().cumprod(1).sum(1).tolist()


def _device(task: Task) -> torch.device:
    """Nets are trained where the data of their task is."""
    return torch.device(getattr(task, "device", "cpu"))


def adamw_step(rows, grad, momentum, variance, step, lr, weight_decay, betas=(0.9, 0.999)):
    """AdamW in place on rows [N, P], with lr and weight_decay [N, 1] (Loshchilov & Hutter 2019).

    ``step`` counts from 1. Equal to ``torch.optim.AdamW`` on each net alone, but for parameters
    that a step does not use: their gradient is 0 here, and PyTorch would leave them out.
    """
    momentum.lerp_(grad, 1 - betas[0])
    variance.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    rows.mul_(1 - lr * weight_decay)
    scale = variance.sqrt().div_((1 - betas[1] ** step) ** 0.5).add_(1e-8)
    rows.addcdiv_(momentum, scale.div_(lr / (1 - betas[0] ** step)), value=-1)


def initial_rows(make: Make | Batched, seeds: Iterable[int]) -> Tensor:
    """Rows [N, P] of nets initialised as PyTorch would with ``torch.manual_seed(seed)`` each.

    Args:
        make: a factory of modules; or a module, built anew if its class is registered, else copied
            and each layer's ``reset_parameters`` called. What its class does besides is lost then:
            a warning names the parameters whose size shows it.

    Raises ValueError naming a layer that has parameters but no ``reset_parameters``.
    """
    make = make.module if isinstance(make, Batched) else make
    with own_randomness():
        nets = [_make(make, seed) for seed in seeds]
    if isinstance(make, nn.Module) and not is_registered(make):
        pairs = zip(make.named_parameters(), nets[0].parameters(), strict=True)
        if lost := [name for (name, given), found in pairs if _unlike(given, found)]:
            what = f"{name_of(make)}: {', '.join(lost)} start as reset_parameters() leaves them"
            cure = "if their initialisation counts pass a factory, such as lambda: MyNet(...)"
            warnings.warn(f"{what}, not as given; {cure}", stacklevel=2)
    return Layout.of(nets[0]).pack(dict(net.named_parameters()) for net in nets)


def _unlike(given: Tensor, found: Tensor) -> bool:
    """Whether two parameters were drawn differently: only one varies, or far more than the other.

    Of 64 values drawn alike, 1.5 times the spread would be five standard deviations.
    """
    small, large = sorted(p.detach().double().std(correction=0).item() for p in (given, found))
    return small == 0 < large or (given.numel() >= 64 and large > 1.5 * small)


def _make(make: Make, seed: int) -> nn.Module:
    """A net of its own, initialised by ``seed``."""
    follow(seed)
    made = unwrapped(make if isinstance(make, nn.Module) else make())
    if any(p._backward_hooks for p in made.parameters()):
        raise ValueError(f"hooks on gradients of a {name_of(made)}'s parameters would be lost")
    if not isinstance(make, nn.Module):
        return copy.deepcopy(made)  # it may be the same one each time
    if is_registered(made):
        built = build(describe(made)).to(next(made.parameters()).dtype)
        if Layout.of(built) == Layout.of(made):  # it may have been changed since it was made
            return built
    module = copy.deepcopy(made).cpu()  # random numbers are the CPU's
    layers = sorted(module.named_modules(), key=lambda layer: -layer[0].count(".") - bool(layer[0]))
    for name, layer in layers:  # in order, but parents have the last word
        reset = getattr(layer, "reset_parameters", getattr(layer, "_reset_parameters", None))
        if reset is not None:
            reset()
        elif next(layer.parameters(recurse=False), None) is not None:
            what = f"layer {name or type(layer).__name__!r} has parameters, no reset_parameters()"
            raise ValueError(f"{what}: pass a factory, such as lambda: MyNet(...)")
    return module


def _template(make: Make | Batched) -> Batched:
    """The architecture, whatever its values."""
    if not isinstance(make, nn.Module | Batched):
        with own_randomness():
            make, other = (_make(make, seed) for seed in (0, 1))
        if structure(make) != structure(other):
            what = f"two {name_of(make)}s of the factory differ in more than their parameters"
            raise ValueError(f"{what}: draw its constants, such as buffers, from a fixed seed")
    elif isinstance(make, nn.Module):  # as `_make` leaves it
        make = Batched(make)
        for norm in statistics(make.module).values():
            norm.reset_running_stats()
    batched = make if isinstance(make, Batched) else Batched(make)
    batched.check_trainable()
    return batched


@torch.inference_mode(False)  # gradients are needed, whatever the caller does
def train_nets(
    make: Make | Batched, task: Task, recipes: list[Recipe],
    state: dict[str, Tensor] | None = None,
    on_step: Callable[[dict[str, Tensor]], None] = lambda state: None,
    members: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
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
    batched, device = _template(make), _device(task)
    lengths, seeds = [recipe.steps for recipe in recipes], [recipe.seed for recipe in recipes]
    if not lengths or lengths != sorted(lengths, reverse=True):
        raise ValueError("recipes should be sorted by steps, the longest first")
    members = torch.arange(len(recipes)) if members is None else members
    state = _state(batched, state or {"rows": initial_rows(make, seeds)}, lengths[0], device)
    hyper = [[recipe.lr, recipe.weight_decay, recipe.steps] for recipe in recipes]
    exact = torch.promote_types(state["rows"].dtype, torch.float32)
    lr, decay, ends = torch.tensor(hyper, dtype=exact, device=device).T
    started = time.perf_counter() - state["seconds"].item()
    for step in range(int(state["step"]), lengths[0]):
        n = sum(length > step for length in lengths)  # nets still in training
        rows, running, *adam = (state[name][:n] for name in ("rows", "running", *ADAM))
        weights = rows.detach().requires_grad_()
        # of dropout, also after a resume
        with own_draws(seeds[0] + 1_000_003 * step, [device] * (device.type == "cuda")):
            x, y = task.batch(recipes[:n], members[:n], step)
            loss = task.loss(batched(weights, x, True, running), y)
        if loss.shape != (n,):
            raise ValueError(f"the loss of {n} nets should be [{n}], not {list(loss.shape)}")
        (grad,) = torch.autograd.grad(loss.sum(), weights)
        rate = lr[:n] * task.schedule(step / ends[:n])
        adamw_step(rows, grad, *adam, step + 1, rate[:, None], decay[:n, None])
        state["losses"][:n, step] = loss.detach()
        state["step"].fill_(step + 1)
        state["seconds"].fill_(time.perf_counter() - started)
        on_step(state)
    return state


def _state(batched: Batched, given: dict, steps: int, device="cpu") -> dict[str, Tensor]:
    """The whole state of training nets, of which at least the rows are given, in memory of its own.

    Single numbers stay on the CPU.
    """
    rows, scalar = given["rows"], torch.zeros((), dtype=torch.double)
    start = {"losses": torch.full((len(rows), steps), torch.nan), "seconds": scalar}
    start |= {"momentum": torch.zeros_like(rows), "variance": torch.zeros_like(rows)}
    start |= {"running": batched.initial_running(len(rows)), "step": scalar.long()} | given
    return {k: v.to(device if v.dim() else "cpu", copy=True) for k, v in start.items()}


def fine_tune(nets: Nets, task: Task, recipes: list[Recipe]) -> Nets:
    """Train nets further, one recipe each with equal steps; ``nets`` themselves stay as they are.

    A recipe's seed decides the order of the data only. Raises ValueError naming nets that diverge.
    """
    if len(recipes) != len(nets) or len({recipe.steps for recipe in recipes}) != 1:
        raise ValueError(f"{len(nets)} nets need as many recipes of equal steps: {len(recipes)}")
    state, members = {"rows": nets.rows.detach().clone()}, getattr(nets, "members", None)
    state = train_nets(nets.batched, task, recipes, state, members=members)
    tuned = Nets(nets.batched, state["rows"])
    if not (good := tuned.finite()).all():
        bad, began = (~good).nonzero()[:, 0].tolist(), _began(state["losses"][~good])
        raise ValueError(f"nets {bad} diverged at steps {began}: fine-tune at a lower rate")
    return tuned


@torch.inference_mode(False)
def train_zoo(
    make: Make, task: Task, recipes: list[Recipe], folder=None, block: int | None = None,
    progress: bool = True, log: Callable[[dict[str, float]], None] | None = None,
) -> Zoo:  # fmt: skip
    """Train a net per recipe, ``block`` at a time, and score them all.

    With ``folder`` the work can be interrupted: blocks, the one in training every
    CHECKPOINT_SECONDS, are kept there and the same call goes on, bit for bit. A folder that holds
    this very zoo is loaded. Batch norms see each net's own batches and are folded at the end.
    Several processes (`netspace_lite.processes`) train blocks each, bit for bit the same zoo; its
    ``seconds`` are added up over them.

    Args:
        make: a module, or a factory such as ``lambda: MyNet(10)``, see `initial_rows`.
        task: `ImageTask`, `netspace_lite.shapes.ShapeTask`, or your own `Task`.
        recipes: one a net.
        folder: where the zoo is kept, or None to keep nothing.
        block: nets trained together. None: 32, which fit a CPU's caches, and on a GPU up to 512 of
            small inputs, or it would wait for Python most of the time.
        progress: show a bar that counts training steps.
        log: called with ``block``, ``step``, ``nets``, ``loss`` and ``seconds`` every 50 steps.

    Raises ValueError if ``folder`` holds another zoo, naming what differs, and if several processes
    are given none.
    """
    if not recipes or (block is not None and block < 1):
        raise ValueError("no recipes, or none in a block: give one per net, as draw_recipes(500)")
    if folder is None and world() > 1:
        raise ValueError("no folder: several processes train a zoo in one that all of them see")
    batched = _template(make)
    plan = {"architecture": batched.fingerprint, "task": fingerprint(task)}
    plan |= {} if block is None else {"block": block}  # what a GPU chose is loaded on a CPU, too
    first = initial_rows(make, [recipes[0].seed])
    plan |= {"initialisation": fingerprint(first), "recipes": fingerprint(recipes)}
    if folder is None or not store.exists(folder, "zoo"):
        twice = _folded(batched, first.repeat(2, 1), batched.initial_running(2))
        Zoo(*twice, members=torch.tensor([0, 0])).scored(task)  # or it fails after all training
        together = plan | {"block": block or _fitting(task, recipes)}
        blocks = _Blocks(make, batched, task, recipes, folder, together, log)
        states = blocks.train(portion(blocks.costs), progress)
        wait()  # until every block is in the folder
        if rank() == 0:
            zoo = blocks.finish(states if world() == 1 else blocks.train(range(len(blocks.costs))))
        wait()  # until the zoo is
        if rank() == 0:
            return zoo
    with store.reading(folder):
        store.check_plan(folder, store.load(folder, "zoo")[0]["about"], plan)
    return Zoo.load(folder, batched.module).to(_device(task))


def _fitting(task: Task, recipes: list[Recipe]) -> int:
    """How many nets to train together, where that isn't said."""
    if _device(task).type == "cpu":
        return BLOCK
    inputs = task.batch(recipes[:1], torch.arange(1), 0)[0].numel()
    return BLOCK * min(16, max(1, ON_GPU // inputs))


@dataclass
class _Blocks:
    """The blocks of a zoo, each in training or trained; kept in ``folder`` if there is one."""

    make: Make
    batched: Batched
    task: Task
    recipes: list[Recipe]
    folder: Path | str | None
    plan: dict
    log: Callable | None

    def __post_init__(self):
        steps = torch.tensor([recipe.steps for recipe in self.recipes])
        self.order = steps.argsort(descending=True, stable=True)
        self.members = self.order.split(self.plan["block"])
        self.costs = [int(steps[n].sum()) for n in self.members]

    def train(self, numbers: Sequence[int], progress: bool = False) -> list[dict[str, Tensor]]:
        """The final states of these blocks, each trained from where it is."""
        with progress_bar(sum(self.costs[n] for n in numbers), "training nets", progress) as bar:
            return [self.train_one(number, bar) for number in numbers]

    def train_one(self, number: int, bar) -> dict[str, Tensor]:
        """The final state of a block; after each step the bar, the log, at times a checkpoint."""
        name, members = f"block-{number}", self.members[number]
        recipes = [self.recipes[n] for n in members]
        state, saved = self.begin(name, recipes), time.monotonic()
        bar.update(sum(min(recipe.steps, int(state.get("step", 0))) for recipe in recipes))

        def on_step(state):
            nonlocal saved
            step = int(state["step"])
            nets, done = sum(recipe.steps >= step for recipe in recipes), step == recipes[0].steps
            bar.update(nets)
            if self.log is not None and (done or step % LOG_STEPS == 0):
                row = {"block": number, "step": step, "nets": nets}
                row["loss"] = state["losses"][:nets, step - 1].mean().item()
                self.log(row | {"seconds": state["seconds"].item()})
            if self.folder and (done or time.monotonic() - saved > CHECKPOINT_SECONDS):
                store.save(self.folder, name, self.plan, _without_adam(state) if done else state)
                saved = time.monotonic()

        return _without_adam(train_nets(self.batched, self.task, recipes, state, on_step, members))

    def begin(self, name: str, recipes: list[Recipe]) -> dict[str, Tensor]:
        """The state that a block starts from: new nets, or its checkpoint."""
        if self.folder is None or not store.exists(self.folder, name):
            return {"rows": initial_rows(self.make, [recipe.seed for recipe in recipes])}
        record, found = store.load(self.folder, name)
        store.check_plan(self.folder, record, self.plan)
        with store.reading(self.folder):
            rows = found["rows"].view(len(recipes), self.batched.layout.size)
            start = _state(self.batched, {"rows": rows}, recipes[0].steps)
            found = {name: start[name] for name in ADAM} | found
            state = {k: found[k].reshape(v.shape).to(v.dtype) for k, v in start.items()}
        if not 0 <= state["step"] <= recipes[0].steps:
            what = f"{self.folder} holds a block at step {state['step']} of {recipes[0].steps}"
            raise ValueError(f"{what}: delete it")
        return state

    def finish(self, states: list[dict[str, Tensor]]) -> Zoo:
        """The zoo of all blocks' final states, scored; it takes their place in the folder."""
        order = self.order.argsort()
        rows, running = (torch.cat([s[key] for s in states])[order] for key in ("rows", "running"))
        losses = [net for s in states for net in s["losses"].cpu()]  # of longer and shorter blocks
        losses = nn.utils.rnn.pad_sequence(losses, True, torch.nan)[order]
        batched, rows = _folded(self.batched, rows, running)
        about = self.plan | {"seconds": sum(state["seconds"].item() for state in states)}
        zoo = Zoo(batched, rows, None, self.recipes, losses, None, about).scored(self.task)
        if self.folder is not None:
            zoo.save(self.folder)
            for number in range(len(states)):
                store.delete(self.folder, f"block-{number}")
        return zoo


def _without_adam(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of a block's state counts once it is trained, a third of the bytes."""
    return {name: value for name, value in state.items() if name not in ADAM}


def _folded(batched: Batched, rows: Tensor, running: Tensor) -> tuple[Batched, Tensor]:
    """Architecture and rows of nets whose batch norms, if any, are folded away."""
    if not batched.running.size:
        return batched, rows
    module, nets = copy.deepcopy(batched.module), []
    states = zip(batched.layout.unpack(rows), batched.running.unpack(running), strict=True)
    for parameters, running in states:
        fill(module, parameters)
        for name, values in running.items():
            module.get_buffer(name).copy_(values)
        nets.append(fold_batchnorm(module))
    folded = Batched(nets[0])
    return folded, folded.layout.pack(nets)
