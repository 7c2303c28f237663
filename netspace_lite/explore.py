"""What to do with a space of networks: walk straight lines in it, and search it.

Everything acts on embeddings ``z: [N, E]`` and leaves the decoder as it is; a batch of embeddings
decodes to a batch of nets, so a hundred searches cost little more than one. Weights are searched by
the same loop, as the baseline: a row is an embedding of P values whose decoder does nothing.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Images
from .functional import Nets
from .mixed import MixedNets
from .progress import progress_bar
from .sampling import Gaussian
from .space import NetSpace
from .training import kl_divergence, learning_rate

Objective = Callable[[Nets, torch.Generator], Tensor]


def interpolate(start: Tensor, end: Tensor, steps: int = 11) -> Tensor:
    """Points on the straight lines between pairs of embeddings (paper section IV-C).

    Args:
        start, end: [M, E], one pair a line, or [E] for a single line.
        steps: S, points on each line, both ends among them; at least 2.

    Returns [M, S, E], or [S, E] for a single line. ``flatten(0, 1)`` makes a batch to decode.

    Example: ``interpolate(torch.zeros(2), torch.ones(2), 3)`` is [[0, 0], [½, ½], [1, 1]].
    """
    if start.shape != end.shape or start.dim() not in (1, 2) or start.numel() == 0:
        raise ValueError(
            f"a line needs two ends of the same shape, [E] or [M, E] for M pairs, "
            f"not {list(start.shape)} and {list(end.shape)}"
        )
    if steps < 2:
        raise ValueError(f"a line has at least 2 points, its ends, not {steps}")
    way = torch.linspace(0, 1, steps, dtype=start.dtype, device=start.device)[:, None]  # [S, 1]
    return torch.lerp(start.unsqueeze(-2), end.unsqueeze(-2), way)


def weight_line(start: Nets, end: Nets, steps: int = 11) -> Nets:
    """Nets on the straight lines between the *weights* of pairs of nets: the baseline.

    Hidden units of independently trained nets don't correspond, so accuracy breaks down halfway.

    Args:
        start, end: M nets each, of one architecture.
        steps: S, nets on each line, both ends among them.

    Returns M·S nets, line by line: ``accuracy(images).view(M, S)``.
    """
    if start.layout != end.layout:
        raise ValueError(f"{start!r} and {end!r} have no line between their weights: they differ")
    return Nets(start.batched, interpolate(start.rows, end.rows, steps).flatten(0, 1))


class OnImages:
    """An objective: how nets should answer labelled images (paper section III-E).

    Args:
        images: x [S, C, H, W] and y [S]; mini-batches are drawn from them.
        teacher: a net (`Nets` of one, or a module) whose softened answers are distilled, or None.
        distil: weight of the teacher's KL, the rest is ``loss``; 0.9 as in the paper's
            several-architecture experiments, 1 for distillation alone.
        loss: (logits [N, B, K], y [B]) -> [N], or a scalar; cross-entropy by default.
        temperature: softens the distillation, whose loss is multiplied by its square.
        samples: B, images drawn in each step; all of them where there are fewer.

    Call it with nets and a generator: the loss of each net, [N].
    """

    def __init__(
        self, images: Images, teacher=None, *, distil=0.9, loss=None, temperature=4.0, samples=256
    ):
        if len(images) == 0:
            raise ValueError("an objective needs images to ask the nets about: there are none")
        if not 0 <= distil <= 1:
            raise ValueError(f"distil is a share of the loss, from 0 to 1, not {distil}")
        self.images, self.loss = images, loss or cross_entropy
        self.distil, self.temperature = (distil if teacher is not None else 0.0), temperature
        self.samples = min(samples, len(images))
        if isinstance(teacher, nn.Module):
            with torch.no_grad():
                self.answers = teacher.eval()(images.x)[None]
        elif teacher is not None:
            self.answers = teacher[0].outputs(images.x)

    def __call__(self, nets: Nets, generator: torch.Generator) -> Tensor:
        s = torch.randperm(len(self.images), generator=generator)[: self.samples]
        logits, total = nets(self.images.x[s]), 0
        if self.distil < 1:
            total = (1 - self.distil) * self.loss(logits, self.images.y[s])
        if self.distil > 0:
            kl = kl_divergence(logits, self.answers[:, s], self.temperature)
            total = total + self.distil * self.temperature**2 * kl
        return total


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each net's logits [N, B, K] against shared labels y [B]: [N]."""
    each = F.cross_entropy(logits.movedim(-1, 1), y.expand(len(logits), -1), reduction="none")
    return each.mean(1)


@dataclass
class Search:
    """What `optimise` found for N starts, and the way there.

    best: [N, E] the embeddings kept, one a start (or [N, P] rows), and nets: what they decode to.
    score: [N] their validation score (accuracy in percent on images).
    reached: [N] whether they stand for the wanted architecture; all True where none was named.
    path: [S, N, E] and scores: [S, N] at each of the S validations; losses: [steps, N].
    stopped: why the search ended before its last step, or "".
    """

    best: Tensor
    score: Tensor
    reached: Tensor
    nets: Nets | MixedNets | None = None
    path: list[Tensor] | Tensor = field(default_factory=list, repr=False)
    scores: list[Tensor] | Tensor = field(default_factory=list, repr=False)
    losses: list[Tensor] | Tensor = field(default_factory=list, repr=False)
    stopped: str = ""

    def visit(self, z: Tensor, score: Tensor, reached: Tensor) -> None:
        """Keep the states that are better: the wanted architecture first, then the score."""
        better = reached & ~self.reached | (reached == self.reached) & (score >= self.score)
        self.path.append(z.clone())
        self.scores.append(score)
        self.best = torch.where(better[:, None], z, self.best)
        self.score = torch.where(better, score, self.score)
        self.reached = self.reached | reached

    def __repr__(self) -> str:
        first, last = self.scores[0].median(), self.score.median()
        return f"Search({len(self.score)} starts, median score {first:.1f} → {last:.1f})"


def optimise(
    space: NetSpace,
    starts,
    objective: Objective,
    validate: Images | Callable[[Nets], Tensor],
    *,
    architecture=None,
    architecture_weight: float = 1.0,
    prior: Gaussian | None = None,
    prior_weight: float = 0.1,
    steps: int = 150,
    lr: float = 1.0,
    every: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> Search:
    """Latent space optimisation: Adam on embeddings, through the frozen decoder (section IV-E).

    Every embedding is an independent search, all run as one batch. Ctrl-C returns the best so far.

    Args:
        starts: embeddings [N, E] or [E]; nets, which are encoded; or a whole number of random
            points drawn from ``prior``.
        objective: (nets, generator) -> loss of each net [N], or their mean; such as `OnImages`, or
            your own ``lambda nets, generator: my_loss(nets(x))`` on logits [N, B, K].
        validate: images to measure accuracy on, or (nets) -> score [N], higher is better. The best
            state of each start is kept, the later one of equals.
        architecture: name or index of the one wanted, in a space of several: its decoder is used
            and ``architecture_weight`` times the classifier's cross-entropy added, so that the
            embedding comes to stand for it. None: whatever each embedding stands for.
        prior: adds ``prior_weight`` times its penalty, which keeps the search near its embeddings.
        steps, lr: of Adam; the rate rises for a twentieth of the steps, then falls to zero.
        every: steps between validations.

    Raises ValueError if the starts or the objective's first answer can't be used. If the objective
    fails later (NaN), the search warns, stops and returns the best so far.
    """
    wanted = None
    if len(space.architectures) > 1 and architecture is not None:
        wanted = space.index(architecture)
    start = _start_points(space, starts, prior, seed)

    def penalty(z):
        total = torch.zeros(len(z)) if prior is None else prior_weight * prior(z)
        if wanted is not None:
            target = torch.full((len(z),), wanted)
            named = F.cross_entropy(space.classify(z), target, reduction="none")
            total = total + architecture_weight * named
        return total

    def reached(z):
        return (
            torch.ones(len(z), dtype=torch.bool) if wanted is None else space.predict(z) == wanted
        )

    def decode(z):
        return space.decode(z, architecture)

    return _descend(
        decode, start, objective, validate, penalty, reached, steps, lr, every, seed, progress
    )


def optimise_weights(
    nets: Nets,
    objective: Objective,
    validate: Images | Callable[[Nets], Tensor],
    *,
    steps: int = 150,
    lr: float = 3e-3,
    every: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> Search:
    """The same search on the weights [N, P] themselves, that is fine-tuning: the baseline.

    Arguments and result as in `optimise`; from freshly initialised nets it is training.
    """
    return _descend(
        lambda rows: Nets(nets.batched, rows),
        nets.rows, objective, validate,
        lambda rows: torch.zeros(len(rows)), lambda rows: torch.ones(len(rows), dtype=torch.bool),
        steps, lr, every, seed, progress,
    )  # fmt: skip


def _start_points(space: NetSpace, starts, prior: Gaussian | None, seed: int) -> Tensor:
    """Whatever a search may start from -> embeddings [N, E]."""
    if isinstance(starts, int):
        if prior is None:
            raise ValueError(
                f"{starts} random starts need a distribution to come from: pass "
                "prior=Gaussian(space.encode(zoo))"
            )
        starts = prior.sample(starts, seed)
    elif isinstance(starts, Tensor):
        starts = starts[None] if starts.dim() == 1 else starts
    elif len(starts) > 0:
        starts = space.encode(starts)
    if len(starts) == 0:
        raise ValueError("no starts: give at least one embedding or net to start from")
    size = space.config.embedding
    if starts.dim() != 2 or starts.shape[1] != size:
        raise ValueError(f"starts should be embeddings [N, {size}], not {list(starts.shape)}")
    if not starts.isfinite().all():
        raise ValueError("starts hold values that are NaN or infinite")
    return starts


def _descend(
    decode, start, objective, validate, penalty, reached, steps, lr, every, seed, progress
) -> Search:
    """Adam on ``start`` [N, E] through ``decode``, the best state of each row kept."""
    z = start.detach().clone().requires_grad_()
    adam = torch.optim.Adam([z], lr)
    generator = torch.Generator().manual_seed(seed)
    search = Search(z.detach(), torch.full((len(z),), -torch.inf), torch.zeros(len(z)).bool())
    with progress_bar(steps, "optimising", progress) as bar:
        try:
            for step in range(steps + 1):
                if step % every == 0 or step == steps:
                    _validate(search, decode, z.detach(), validate, reached)
                    bar.set_postfix(score=f"{float(search.score.median()):.1f}")
                if step == steps:
                    break
                loss = _checked(objective(decode(z), generator), len(z), step)
                (z.grad,) = torch.autograd.grad((loss + penalty(z)).sum(), z)
                adam.param_groups[0]["lr"] = learning_rate(step, steps, lr)
                adam.step()
                search.losses.append(loss.detach())
                bar.update()
        except KeyboardInterrupt:
            search.stopped = f"interrupted at step {len(search.losses)}"
        except ObjectiveError as error:
            if not search.losses:
                raise
            search.stopped = str(error)
            warnings.warn(f"{error}; the best state so far is returned", stacklevel=3)
    if not search.scores:
        raise KeyboardInterrupt("interrupted before there was anything to keep")
    with torch.no_grad():
        search.nets = decode(search.best)
    empty = torch.empty(0, len(z))
    search.path, search.scores = torch.stack(search.path), torch.stack(search.scores)
    search.losses = torch.stack(search.losses) if search.losses else empty
    return search


class ObjectiveError(ValueError):
    """An objective returned something that can't be descended."""


def _checked(loss, nets: int, step: int) -> Tensor:
    """The objective's answer as a loss of each net, [N]."""
    shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
    if shape not in ([], [nets]):
        raise ObjectiveError(
            f"an objective returns one loss a net, [{nets}], or their mean, a scalar; not {shape}"
        )
    if not loss.requires_grad:
        raise ObjectiveError(
            "the objective's loss does not depend on the nets: compute it from nets(x) with "
            "differentiable torch operations (accuracy and .outputs() have no gradient)"
        )
    loss = loss.expand(nets) if shape == [] else loss
    if not loss.isfinite().all():
        bad = (~loss.isfinite()).nonzero()[:, 0].tolist()
        value = float(loss.detach()[bad[0]])
        raise ObjectiveError(f"the objective returned {value} at step {step} for starts {bad}")
    return loss


@torch.no_grad()
def _validate(search: Search, decode, z: Tensor, validate, reached) -> None:
    nets = decode(z)
    score = nets.accuracy(validate) if isinstance(validate, Images) else validate(nets)
    if not isinstance(score, Tensor) or score.shape != (len(z),):
        found = list(score.shape) if isinstance(score, Tensor) else type(score).__name__
        raise ValueError(f"validate returns one score a net, [{len(z)}], not {found}")
    search.visit(z, score.float().nan_to_num(nan=-torch.inf), reached(z))


def few_shot(images: Images, per_class: int, seed: int = 0) -> Images:
    """``per_class`` random images of each class, class by class; ValueError if one has fewer."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in images.y.unique().tolist():
        members = (images.y == label).nonzero()[:, 0]
        if len(members) < per_class:
            raise ValueError(f"class {label} has {len(members)} images, fewer than {per_class}")
        chosen.append(members[torch.randperm(len(members), generator=generator)[:per_class]])
    return images[torch.cat(chosen)]
