"""Train many nets at once, each on its own terms, and keep them as a zoo on disk.

A block of nets is one matrix of rows. Every net has its own initialisation, data order, learning
rate, weight decay and training length; a net that reaches its length leaves the block. What a
batch is, what the loss is and how the learning rate falls belongs to a *task*, such as `ImageTask`.
"""

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import store
from .architectures import build, describe
from .data import ImageData
from .functional import BLOCK, Batched, Nets
from .layout import Layout
from .progress import progress_bar

CHECKPOINT_SECONDS = 60  # an interruption loses at most this much training


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
    count: int, seed: int = 0, steps=(2, 300), lr=(2e-3, 8e-3), weight_decay=(1e-3, 1e-1)
) -> list[Recipe]:
    """``count`` recipes, every range (low, high) drawn log-uniformly.

    Log-uniform lengths spread accuracy from chance to convergence, as the paper's zoos of nets
    trained for 1 to 600 epochs do (section IV-A).
    """
    rng = np.random.default_rng(seed)

    def draw(low, high):
        return np.exp(rng.uniform(np.log(low), np.log(high), count))

    columns = rng.integers(2**31, size=count), draw(*steps).round(), draw(*lr), draw(*weight_decay)
    return [Recipe(int(s), int(n), float(r), float(w)) for s, n, r, w in zip(*columns, strict=True)]


class ImageTask:
    """Classify images: mini-batches of ``batch`` training images, cross-entropy."""

    def __init__(self, data: ImageData, batch: int = 64):
        self.data, self.batch_size = data, min(batch, len(data.train))
        self.device = data.train.x.device
        self._orders: dict[tuple[int, int], Tensor] = {}

    def describe(self) -> dict:
        """What the zoo's record says of the data; a hash tells other images apart."""
        data, train = self.data, self.data.train
        sizes = {"train": len(data.train), "val": len(data.val), "test": len(data.test)}
        return {
            "task": "images",
            "data": data.name,
            "image": list(data.shape),
            "classes": data.classes,
            "batch": self.batch_size,
            "images": sizes,
            "hash": store.fingerprint(train.x, train.y, data.test.x),
        }

    def batch(self, recipes: list[Recipe], step: int) -> tuple[Tensor, Tensor]:
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
            self._orders[seed, epoch] = order
        return self._orders[seed, epoch]

    def schedule(self, progress: Tensor) -> Tensor:
        """Factor on each net's learning rate at ``progress`` [N] (0 to 1) of its training."""
        return torch.ones_like(progress)

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of logits [N, B, K] against y [N, B]: [N]."""
        return F.cross_entropy(outputs.movedim(-1, 1), y, reduction="none").mean(1)

    def scores(self, nets: Nets) -> dict[str, Tensor]:
        """Accuracies in percent of each net: {"val_accuracy": [N], "test_accuracy": [N]}."""
        return {
            "val_accuracy": nets.accuracy(self.data.val),
            "test_accuracy": nets.accuracy(self.data.test),
        }


class Zoo(Nets):
    """Trained nets of one architecture with how each was trained and how well it does.

    Args:
        module: the architecture.
        rows: [N, P].
        recipes: N `Recipe`s.
        scores: name -> [N], such as ``test_accuracy`` in percent.
        losses: [N, S] training loss of each step, NaN after a net's last.
        task: the record of the data the nets were trained on.
        seconds: how long training took.

    Indexing with a slice, a mask or a list gives a smaller zoo.
    """

    def __init__(self, module, rows, recipes, scores, losses, task, seconds=0.0):
        super().__init__(module, rows)
        self.recipes, self.scores, self.losses = recipes, scores, losses
        self.task, self.seconds = task, seconds

    def __getitem__(self, index) -> "Zoo":
        n = torch.atleast_1d(torch.arange(len(self))[index])
        recipes = [self.recipes[i] for i in n.tolist()]
        scores = {name: values[n] for name, values in self.scores.items()}
        return Zoo(
            self.batched, self.rows[n], recipes, scores, self.losses[n], self.task, self.seconds
        )

    def split(self, val: int, test: int, seed: int = 0) -> tuple["Zoo", "Zoo", "Zoo"]:
        """Disjoint zoos of the remaining, of ``val`` and of ``test`` nets, drawn by ``seed``."""
        if not 0 < val + test < len(self):
            raise ValueError(f"can't hold out {val} + {test} of {len(self)} nets and train on some")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self[order[val + test :]], self[order[:val]], self[order[val : val + test]]

    def save(self, folder) -> None:
        """Write ``zoo.json`` (readable) and the tensors to ``folder``, atomically."""
        record = {
            "architecture": describe(self.module),
            "task": self.task,
            "seconds": self.seconds,
            "nets": [asdict(recipe) for recipe in self.recipes],
            "scores": {name: values.tolist() for name, values in self.scores.items()},
        }
        store.save(folder, "zoo", record, {"rows": self.rows, "losses": self.losses})

    @classmethod
    def load(cls, folder, module: nn.Module | None = None) -> "Zoo":
        """Read a zoo back; ``module`` is needed for an architecture that isn't registered.

        Raises ValueError naming the file and the reason if it was truncated, edited, or holds nets
        of another architecture than ``module``.
        """
        record, tensors = store.load(folder, "zoo")
        module = module or build(record["architecture"])
        size = Layout.of(module).size
        if tensors["rows"].shape[1] != size:
            raise ValueError(
                f"{folder} holds nets of {tensors['rows'].shape[1]} parameters, but "
                f"{type(module).__name__} has {size}: pass the module they were made of"
            )
        scores = {name: torch.tensor(values) for name, values in record["scores"].items()}
        recipes = [Recipe(**net) for net in record["nets"]]
        losses, task, seconds = tensors["losses"], record["task"], record["seconds"]
        return cls(module, tensors["rows"], recipes, scores, losses, task, seconds)


def adamw_step(rows, grad, momentum, variance, step, lr, weight_decay, betas=(0.9, 0.999)):
    """AdamW in place on rows [N, P], with lr and weight_decay [N, 1] (Loshchilov & Hutter 2019).

    ``step`` counts from 1. Equal to ``torch.optim.AdamW`` on each net alone.
    """
    momentum.lerp_(grad, 1 - betas[0])
    variance.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    rows.mul_(1 - lr * weight_decay)
    scale = (variance.sqrt() / (1 - betas[1] ** step) ** 0.5).add_(1e-8)
    rows.sub_(lr / (1 - betas[0] ** step) * momentum / scale)


def initial_rows(module: nn.Module, seeds: Iterable[int]) -> Tensor:
    """Rows [N, P] of nets initialised as PyTorch would with ``torch.manual_seed(seed)`` each.

    Registered architectures are built anew. Any other module is copied and each layer's
    ``reset_parameters`` called; ValueError if a layer with parameters has none.
    """
    description, nets = describe(module), []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            torch.manual_seed(seed)
            nets.append(build(description) if description["config"] is not None else _reset(module))
    return Layout.of(module).pack(nets)


def _reset(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    for name, layer in module.named_modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
        elif next(layer.parameters(recurse=False), None) is not None:
            raise ValueError(
                f"layer {name or type(layer).__name__!r} has parameters but no reset_parameters(), "
                "so it can't be initialised anew: add one, or decorate the class @architecture"
            )
    return module


def train_nets(
    module: nn.Module | Batched,
    task,
    recipes: list[Recipe],
    state: dict[str, Tensor] | None = None,
    on_step: Callable[[dict[str, Tensor]], None] = lambda state: None,
) -> dict[str, Tensor]:
    """Train one net per recipe, all together: each step is one batched forward and backward.

    Args:
        module: the architecture.
        task: gives ``batch(recipes, step)``, ``loss(outputs, targets)``, ``schedule(progress)``.
        recipes: one a net, the longest training first, so that those who finish leave the end.
        state: what an earlier call reached, to go on from.
        on_step: called with the state after every step; the next step changes it in place.

    Returns ``rows`` [N, P], ``losses`` [N, S], AdamW's ``momentum`` and ``variance``,
    ``step`` and the ``seconds`` it took.
    """
    batched = module if isinstance(module, Batched) else Batched(module)
    lengths = [recipe.steps for recipe in recipes]
    if lengths != sorted(lengths, reverse=True) or lengths[-1] < 1:
        raise ValueError("recipes should be sorted by steps, the longest first and none under 1")
    device = getattr(task, "device", "cpu")  # nets are trained where their data is
    state = state or _initial_state(batched.module, recipes)
    state |= {key: state[key].to(device) for key in ("rows", "momentum", "variance", "losses")}
    hyper = [[recipe.lr, recipe.weight_decay, recipe.steps] for recipe in recipes]
    lr, decay, ends = torch.tensor(hyper, device=device).split(1, dim=1)
    started = time.perf_counter() - state["seconds"].item()
    for step in range(int(state["step"]), lengths[0]):
        n = sum(length > step for length in lengths)  # nets still in training
        rows, momentum, variance = (state[k][:n] for k in ("rows", "momentum", "variance"))
        weights = rows.detach().requires_grad_()
        x, y = task.batch(recipes[:n], step)
        loss = task.loss(batched(weights, x, per_net=True), y)
        (grad,) = torch.autograd.grad(loss.sum(), weights)
        rate = lr[:n] * task.schedule(step / ends[:n])
        adamw_step(rows, grad, momentum, variance, step + 1, rate, decay[:n])
        state["losses"][:n, step] = loss.detach()
        state["step"].fill_(step + 1)
        state["seconds"].fill_(time.perf_counter() - started)
        on_step(state)
    return state


def fine_tune(nets: Nets, task, recipes: list[Recipe]) -> Nets:
    """Train nets further, one recipe each with equal steps; ``nets`` themselves stay as they are.

    A recipe's seed decides the order of the data only.
    """
    if len(recipes) != len(nets) or len({recipe.steps for recipe in recipes}) != 1:
        raise ValueError(f"{len(nets)} nets need as many recipes of equal steps: {len(recipes)}")
    state = _initial_state(nets.module, recipes) | {"rows": nets.rows.detach().clone()}
    return Nets(nets.batched, train_nets(nets.batched, task, recipes, state)["rows"])


def _initial_state(module: nn.Module, recipes: list[Recipe]) -> dict[str, Tensor]:
    rows = initial_rows(module, [recipe.seed for recipe in recipes])
    losses = torch.full((len(recipes), recipes[0].steps), torch.nan)
    zeros = torch.zeros_like
    return {
        "rows": rows,
        "momentum": zeros(rows),
        "variance": zeros(rows),
        "losses": losses,
        "step": torch.zeros((), dtype=torch.long),
        "seconds": torch.zeros((), dtype=torch.double),
    }


def train_zoo(
    module: nn.Module,
    task,
    recipes: list[Recipe],
    folder=None,
    block: int = BLOCK,
    progress: bool = True,
) -> Zoo:
    """Train a net per recipe, ``block`` at a time, and score them all.

    With ``folder`` the work can be interrupted: finished blocks, and the block in training once
    every CHECKPOINT_SECONDS, are kept there and the same call goes on from them, bit for bit. A
    folder that already holds this very zoo is loaded.

    Args:
        module: the architecture, as any module of it.
        task: `ImageTask`, `ShapeTask`, or an object with their methods.
        recipes: one a net.
        folder: where the zoo is kept, or None to keep nothing.
        block: nets trained together; 32 fits a CPU's caches, a GPU takes more.
        progress: show a bar that counts training steps.

    Raises ValueError if ``folder`` holds another zoo, naming what differs.
    """
    if not recipes:
        raise ValueError("no recipes: give one per net, for example draw_recipes(500)")
    plan = {
        "architecture": describe(module),
        "task": task.describe(),
        "nets": [asdict(recipe) for recipe in recipes],
        "block": block,
    }
    if folder is not None and store.exists(folder, "zoo"):
        _same_plan(folder, store.load(folder, "zoo")[0], plan)
        zoo = Zoo.load(folder, module)
        zoo.rows = zoo.rows.to(getattr(task, "device", "cpu"))
        return zoo
    batched = Batched(module)
    order = sorted(range(len(recipes)), key=lambda n: -recipes[n].steps)
    blocks = [order[i : i + block] for i in range(0, len(order), block)]
    total, states = sum(recipe.steps for recipe in recipes), []
    with progress_bar(total, "training nets", progress) as bar:
        for number, members in enumerate(blocks):
            chosen = [recipes[n] for n in members]
            states.append(_train_block(batched, task, chosen, folder, f"block-{number}", plan, bar))
    back = torch.tensor(order).argsort()  # from longest first to the order of the recipes
    rows = torch.cat([state["rows"] for state in states])[back]
    longest = states[0]["losses"].shape[1]
    losses = [s["losses"].cpu() for s in states]
    losses = [F.pad(x, (0, longest - x.shape[1]), value=torch.nan) for x in losses]
    scores, seconds = task.scores(Nets(batched, rows)), sum(s["seconds"].item() for s in states)
    zoo = Zoo(batched, rows, recipes, scores, torch.cat(losses)[back], plan["task"], seconds)
    if folder is not None:
        zoo.save(folder)
        for number in range(len(blocks)):
            store.delete(folder, f"block-{number}")
    return zoo


def _train_block(batched, task, recipes, folder, name, plan, bar) -> dict[str, Tensor]:
    """Train one block, from its checkpoint in ``folder`` if there is one."""
    state, saved = None, time.monotonic()
    if folder is not None and store.exists(folder, name):
        record, state = store.load(folder, name)
        _same_plan(folder, record, plan)
        bar.update(sum(min(recipe.steps, int(state["step"])) for recipe in recipes))

    def on_step(state):
        nonlocal saved
        bar.update(sum(recipe.steps >= int(state["step"]) for recipe in recipes))
        done = int(state["step"]) == recipes[0].steps
        if folder is not None and (done or time.monotonic() - saved > CHECKPOINT_SECONDS):
            store.save(folder, name, plan, state)
            saved = time.monotonic()

    return train_nets(batched, task, recipes, state, on_step)


def _same_plan(folder, found: dict, wanted: dict) -> None:
    """Raise ValueError unless what lies in ``folder`` is what is to be trained."""
    shared = {key: value for key, value in wanted.items() if key in found}
    differs = [k for k, v in shared.items() if store.as_json(found[k]) != store.as_json(v)]
    if differs:
        raise ValueError(
            f"{folder} holds a zoo with another {' and '.join(differs)}: choose another folder, "
            "or delete this one to train anew"
        )
