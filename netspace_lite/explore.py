"""What to do with a space of networks: walk it, search it, draw new nets from it.

Everything acts on embeddings ``z: [N, E]`` and leaves the decoder as it is; a batch of embeddings
decodes to a batch of nets, so a hundred searches cost little more than one. Weights are searched by
the same loop, as the baseline: a row is an embedding of P values whose decoder does nothing.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity
from torch import Tensor, nn
from tqdm.auto import tqdm

from .data import Images
from .functional import Nets
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
    return F.cross_entropy(logits.movedim(-1, 1), y.expand(len(logits), -1), reduction="none").mean(
        1
    )


class Gaussian:
    """The embeddings of a zoo as one normal distribution: the simplest idea of "in the space".

    As a penalty it is the mean squared z-score along the distribution's axes, 1 for a typical
    embedding of the zoo. Axes along which the zoo hardly spreads are floored at a hundredth of the
    widest, so that leaving the zoo's subspace costs much but not everything.
    """

    def __init__(self, embeddings: Tensor):
        if embeddings.dim() != 2 or len(embeddings) < 2:
            raise ValueError(f"at least 2 embeddings [N, E], not {list(embeddings.shape)}")
        self.mean = embeddings.mean(0)
        _, spread, axes = torch.linalg.svd(embeddings - self.mean, full_matrices=False)
        self.axes = axes  # [min(N, E), E]
        self.spread = (spread / (len(embeddings) - 1) ** 0.5).clamp_min(spread[0] / 100)

    def __call__(self, z: Tensor) -> Tensor:
        """Mean squared z-score of embeddings z [N, E]: [N]."""
        return (((z - self.mean) @ self.axes.T) / self.spread).square().mean(1)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Random embeddings [n, E]."""
        noise = torch.randn(n, len(self.axes), generator=torch.Generator().manual_seed(seed))
        return self.mean + (noise * self.spread) @ self.axes


@dataclass
class Search:
    """What `optimise` found for N starts, and the way there.

    best: [N, E] the embeddings kept (or [N, P] rows), nets: what they decode to, score: [N] their
    validation score. path: [S, N, E] and scores: [S, N] at each of the S validations, losses:
    [steps, N]. stopped: why the search ended early, or "".
    """

    best: Tensor
    nets: Nets
    score: Tensor
    path: list[Tensor] | Tensor = field(default_factory=list, repr=False)
    scores: list[Tensor] | Tensor = field(default_factory=list, repr=False)
    losses: list[Tensor] | Tensor = field(default_factory=list, repr=False)
    stopped: str = ""


def optimise(
    space: NetSpace,
    starts,
    objective: Objective,
    validate: Images | Callable[[Nets], Tensor],
    *,
    architecture: int = 0,
    prior: Gaussian | None = None,
    prior_weight: float = 0.01,
    steps: int = 100,
    lr: float = 0.1,
    every: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> Search:
    """Latent space optimisation: Adam on embeddings through the frozen decoder (section IV-E)."""
    start = _start_points(space, starts, architecture, prior, seed)
    penalty = None if prior is None else lambda z: prior_weight * prior(z)
    return _descend(
        lambda z: space.decode(z, architecture),
        start, objective, validate, penalty, steps, lr, every, seed, progress,
    )  # fmt: skip


def optimise_weights(
    nets: Nets, objective: Objective, validate, *, steps=100, lr=3e-3, every=5, seed=0,
    progress=True,
) -> Search:  # fmt: skip
    """The same search on the weights themselves: fine-tuning, the baseline of `optimise`."""
    return _descend(
        lambda rows: Nets(nets.batched, rows),
        nets.rows, objective, validate, None, steps, lr, every, seed, progress,
    )  # fmt: skip


def _start_points(space, starts, architecture, prior, seed):
    if isinstance(starts, int):
        return prior.sample(starts, seed)
    if isinstance(starts, Nets):
        return space.encode(starts, architecture)
    return starts


def _descend(decode, start, objective, validate, penalty, steps, lr, every, seed, progress):
    if isinstance(validate, Images):
        images = validate

        def validate(nets):
            return nets.accuracy(images)

    z = start.detach().clone().requires_grad_()
    adam = torch.optim.Adam([z], lr)
    generator = torch.Generator().manual_seed(seed)
    best, top, path, scores, losses, stopped = z.detach().clone(), None, [], [], [], ""
    with tqdm(total=steps, disable=not progress, unit="step", desc="optimising") as bar:
        try:
            for step in range(steps + 1):
                if step % every == 0 or step == steps:
                    with torch.no_grad():
                        score = validate(decode(z))
                    better = torch.ones(len(z), dtype=bool) if top is None else score > top
                    top = score if top is None else torch.maximum(score, top)
                    best[better] = z.detach()[better]
                    path.append(z.detach().clone())
                    scores.append(score)
                    bar.set_postfix(score=float(top.mean()))
                if step == steps:
                    break
                loss = objective(decode(z), generator)
                total = loss.sum()
                if penalty is not None:
                    total = total + penalty(z).sum()
                (z.grad,) = torch.autograd.grad(total, z)
                for group in adam.param_groups:
                    group["lr"] = learning_rate(step, steps, lr)
                adam.step()
                losses.append(loss.detach())
                bar.update()
        except KeyboardInterrupt:
            stopped = "interrupted"
    with torch.no_grad():
        nets = decode(best)
    return Search(best, nets, top, torch.stack(path), torch.stack(scores), torch.stack(losses), stopped)
