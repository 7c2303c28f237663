"""Train many nets at once, each on its own terms: blocks of rows that become a zoo.

A block of nets is one matrix of rows. Every net has its own initialisation, data order, learning
rate, weight decay and training length; a net that reaches its length leaves the block.
"""

import copy
import time
import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from . import store
from .architectures import build, describe, is_registered, name_of
from .batching import BLOCK, Batched
from .checks import finite, shape_of, whole
from .fingerprint import fingerprint, structure
from .folding import Folding, statistics, unwrapped
from .layout import Layout, one_by_one
from .nets import Nets
from .processes import portion, rank, wait, world
from .progress import progress_bar
from .randomness import follow, own_draws, own_randomness
from .zoo import Recipe, Task, Zoo, device_of, diverged_at

CHECKPOINT_SECONDS = 60  # an interruption loses at most this much training
ON_GPU = 1 << 16  # inputs of a step that keep a GPU busy for as long as launching it takes
LOG_STEPS = 50  # steps between rows of numbers for a logger
SCORE = "score/"  # begins the names of scores among what is kept of a block
Make = nn.Module | Callable[[], nn.Module]
State = dict[str, Tensor]  # of nets in training, see `train_nets`, or what is kept of them


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
    if not callable(make):
        what = f"a {type(make).__name__} makes no net"
        raise ValueError(f"{what}: give a module, or a factory such as lambda: MyNet(...)")
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
        if all(map(torch.equal, make.parameters(), other.parameters())):
            what = f"{name_of(make)}s of the factory start from the same values, whatever the seed"
            warnings.warn(f"{what}: nets will differ by their data alone", stacklevel=3)
    elif isinstance(make, nn.Module):  # as `_make` leaves it
        make = Batched(make)
        for norm in statistics(make.module).values():
            norm.reset_running_stats()
    batched = make if isinstance(make, Batched) else Batched(make)
    batched.check_trainable()
    return batched


@torch.inference_mode(False)  # gradients are needed, whatever the caller does
def train_nets(
    make: Make | Batched, task: Task, recipes: list[Recipe], state: State | None = None,
    on_step: Callable[[State], None] = lambda state: None, members: Tensor | None = None,
) -> State:  # fmt: skip
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
    batched, device = _template(make), device_of(task)
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
        own = {name: values[:n] for name, values in state.items() if values.dim()}
        weights = own["rows"].detach().requires_grad_()
        # of dropout, also after a resume
        with own_draws(seeds[0] + 1_000_003 * step, [device] * (device.type == "cuda")):
            x, y = task.batch(recipes[:n], members[:n], step)
            loss = task.loss(batched(weights, x, True, own["running"]), y)
        if (shape := shape_of(loss)) != [n] or not loss.requires_grad:
            shape = f"{shape} without a gradient" if shape == [n] else shape
            raise ValueError(f"the loss of {n} nets should be [{n}] with a gradient, not {shape}")
        (grad,) = torch.autograd.grad(loss.sum(), weights)
        rate, adam = lr[:n] * task.schedule(step / ends[:n]), (own["momentum"], own["variance"])
        adamw_step(own["rows"], grad, *adam, step + 1, rate[:, None], decay[:n, None])
        own["losses"][:, step] = loss.detach()
        state["step"].fill_(step + 1)
        state["seconds"].fill_(time.perf_counter() - started)
        on_step(state)
    return state


def _state(batched: Batched, given: dict, steps: int, device="cpu") -> State:
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
    state, members = {"rows": nets.rows.detach()}, getattr(nets, "members", None)
    state = train_nets(nets.batched, task, recipes, state, members=members)
    tuned = Nets(nets.batched, state["rows"])
    if not (good := tuned.finite()).all():
        bad, since = (~good).nonzero()[:, 0].tolist(), diverged_at(state["losses"][~good])
        raise ValueError(f"nets {bad} diverged at steps {since}: fine-tune at a lower rate")
    return tuned


@torch.inference_mode(False)
def train_zoo(
    make: Make, task: Task, recipes: list[Recipe], folder=None, block: int | None = None,
    progress: bool = True, log: Callable[[dict[str, float]], None] | None = None,
) -> Zoo:  # fmt: skip
    """Train a net per recipe and score it, ``block`` of them at a time.

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

    Raises ValueError if ``folder`` holds another zoo (and how), or several processes have none.
    """
    known = isinstance(recipes, Sequence) and all(isinstance(r, Recipe) for r in recipes)
    block = block and whole(block, "a block")
    if not (known and recipes) or (block is not None and block < 1):
        raise ValueError("no recipes, or none in a block: give one per net, as draw_recipes(500)")
    if folder is None and world() > 1:
        raise ValueError("no folder: several processes train a zoo in one that all of them see")
    batched = _template(make)
    plan = {"architecture": batched.fingerprint, "task": fingerprint(task)}
    plan |= {} if block is None else {"block": block}  # what a GPU chose is loaded on a CPU, too
    first = initial_rows(make, [recipes[0].seed])
    plan |= {"initialisation": fingerprint(first), "recipes": fingerprint(recipes)}
    if folder is None or not store.exists(folder, "zoo"):
        together = plan | {"block": block or _fitting(task, recipes)}
        blocks = _Blocks(make, batched, task, recipes, folder, together, log)
        # two untrained nets are scored first, or it fails after training
        blocks.end(_state(batched, {"rows": first.repeat(2, 1)}, 0), torch.tensor([0, 0]))
        ended = blocks.train(portion(blocks.costs), progress)
        wait()  # until every block is in the folder
        if rank() == 0:
            zoo = blocks.finish(ended if world() == 1 else blocks.train(range(len(blocks.costs))))
        wait()  # until the zoo is
        if rank() == 0:
            return zoo
    with store.reading(folder):
        store.check_plan(folder, store.load(folder, "zoo")[0]["about"], plan)
    return Zoo.load(folder, batched.module).to(device_of(task))


def _fitting(task: Task, recipes: list[Recipe]) -> int:
    """How many nets to train together, where that isn't said."""
    if device_of(task).type == "cpu":
        return BLOCK
    inputs = task.batch(recipes[:1], torch.arange(1), 0)[0].numel()
    return BLOCK * min(16, max(1, ON_GPU // inputs))


class _Blocks:
    """The blocks of a zoo, each in training or trained; kept in ``folder`` if there is one."""

    def __init__(self, make: Make, batched: Batched, task: Task, recipes, folder, plan: dict, log):
        self.make, self.batched, self.task, self.recipes = make, batched, task, recipes
        self.folder, self.plan, self.log = folder, plan, log
        steps = torch.tensor([recipe.steps for recipe in recipes])
        self.order = steps.argsort(descending=True, stable=True)
        self.members = self.order.split(plan["block"])
        self.costs = [int(steps[n].sum()) for n in self.members]
        self.folding = Folding(batched.module) if batched.running.size else None
        self.folded = Batched(self.folding.module) if self.folding else batched

    def train(self, numbers: Sequence[int], progress: bool = False) -> list[State]:
        """These blocks as they `end`, each trained from where it is."""
        with progress_bar(sum(self.costs[n] for n in numbers), "training nets", progress) as bar:
            return [self.train_one(number, bar) for number in numbers]

    def train_one(self, number: int, bar) -> State:
        """A block as it `end`s; after each step the bar, the log, at times a checkpoint."""
        name, members = f"block-{number}", self.members[number]
        recipes, found = [self.recipes[n] for n in members], {}
        if self.folder and store.exists(self.folder, name):
            record, found = store.load(self.folder, name)
            store.check_plan(self.folder, record, self.plan)
        if found and "running" not in found:  # it has ended, and its norms are folded
            bar.update(self.costs[number])
            return found
        seeds, saved = [recipe.seed for recipe in recipes], time.monotonic()
        state = self.resumed(found, recipes) if found else {"rows": initial_rows(self.make, seeds)}
        bar.update(sum(min(recipe.steps, int(state.get("step", 0))) for recipe in recipes))

        def on_step(state):
            nonlocal saved
            step = int(state["step"])
            nets = sum(recipe.steps >= step for recipe in recipes)
            bar.update(nets)
            if self.log is not None and (step == recipes[0].steps or step % LOG_STEPS == 0):
                row = {"block": number, "step": step, "nets": nets}
                row["loss"] = state["losses"][:nets, step - 1].mean().item()
                self.log(row | {"seconds": state["seconds"].item()})
            if self.folder and time.monotonic() - saved > CHECKPOINT_SECONDS:
                store.save(self.folder, name, self.plan, state)
                saved = time.monotonic()

        state = train_nets(self.batched, self.task, recipes, state, on_step, members)
        ended = self.end(state, members)
        if self.folder:
            store.save(self.folder, name, self.plan, ended)
        return ended

    def resumed(self, found: State, recipes: list[Recipe]) -> State:
        """The state of a block in training."""
        with store.reading(self.folder):
            rows = found["rows"].view(len(recipes), self.batched.layout.size)
            start = _state(self.batched, {"rows": rows}, recipes[0].steps)
            state = {k: found[k].reshape(v.shape).to(v.dtype) for k, v in start.items()}
        if not 0 <= state["step"] <= recipes[0].steps:
            what = f"{self.folder} holds a block at step {state['step']} of {recipes[0].steps}"
            raise ValueError(f"{what}: delete it")
        return state

    def end(self, state: State, members: Tensor) -> State:
        """What is kept of trained nets, on the CPU: folded rows, losses, seconds and scores."""
        rows = state["rows"]
        if self.folding is not None:
            nets = one_by_one(self.batched.views(rows, state["running"]))
            rows = self.folded.layout.pack(map(self.folding, nets))
        sound = rows.where(finite(rows)[:, None], 0)  # the others will be left out
        scores = Zoo(self.folded, sound, members=members).scored(self.task).scores
        kept = {"rows": rows.cpu(), "losses": state["losses"].cpu(), "seconds": state["seconds"]}
        return kept | {SCORE + name: values for name, values in scores.items()}

    def finish(self, blocks: list[State]) -> Zoo:
        """The zoo of blocks that ended; it takes their place in the folder."""
        order, names = self.order.argsort(), [n for n in blocks[0] if n.startswith(SCORE)]
        with store.reading(self.folder):
            losses = [net for block in blocks for net in block["losses"]]  # longer and shorter
            losses = nn.utils.rnn.pad_sequence(losses, True, torch.nan)[order]
            rows, *of = (torch.cat([b[n] for b in blocks])[order] for n in ("rows", *names))
        scores = {name.removeprefix(SCORE): values for name, values in zip(names, of, strict=True)}
        zoo = Zoo(self.folded, rows.to(device_of(self.task)), scores, self.recipes, losses)
        zoo.about = self.plan | {"seconds": sum(block["seconds"].item() for block in blocks)}
        if self.folder is not None:
            zoo.save(self.folder)
            for number in range(len(blocks)):
                store.delete(self.folder, f"block-{number}")
        return zoo
