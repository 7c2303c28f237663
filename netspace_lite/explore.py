"""What to do with a space of networks: walk straight lines in it, search it, draw from it.

Everything acts on embeddings ``z: [N, E]`` and leaves the decoder as it is; a batch of embeddings
decodes to a batch of nets, so a hundred searches cost little more than one. Weights are searched by
the same loop, as the baseline: a row is an embedding of P values whose decoder does nothing.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import methodcaller

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.neighbors import KernelDensity
from torch import Tensor, nn

from .batching import samples_per_block
from .checks import check_finite, check_kind, shape_of, whole
from .data import Images, check_labels
from .nets import MixedNets, Nets, cross_entropy
from .progress import progress_bar
from .space import NetSpace
from .training import LikenessLoss, NetsLoss, compared, kl_divergence, learning_rate

Validation = Images | Callable[[Nets], Tensor] | None
CONFIG = "a config is a Descent, as Descent(steps=50)"


def interpolate(start: Tensor, end: Tensor, steps: int = 11) -> Tensor:
    """Points on the straight lines between pairs of embeddings (paper section IV-C).

    Args:
        start, end: [M, E], one pair a line, or [E] for a single line.
        steps: S, points on each line, both ends among them; at least 2.

    Returns [M, S, E], or [S, E] for a single line. ``flatten(0, 1)`` makes a batch to decode.

    Example: ``interpolate(torch.zeros(2), torch.ones(2), 3)`` is [[0, 0], [½, ½], [1, 1]].
    """
    wanted = "a line is one of embeddings, by space.encode; weight_line of nets"
    check_kind(Tensor, wanted, start, end)
    if start.dtype != end.dtype or not start.is_floating_point():
        raise ValueError(f"ends of a line are floats alike, not {start.dtype} and {end.dtype}")
    if start.shape != end.shape or start.dim() not in (1, 2) or start.numel() == 0:
        found = f"{list(start.shape)} and {list(end.shape)}"
        raise ValueError(f"a line needs two ends of the same shape, [E] or [M, E], not {found}")
    if whole(steps, "points of a line") < 2:
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
    check_kind(Nets, "this line is between nets (interpolate: between embeddings)", start, end)
    if start.batched.fingerprint != end.batched.fingerprint:
        raise ValueError(f"{start!r} and {end!r} have no line between their weights: they differ")
    return Nets(start.batched, interpolate(start.rows, end.rows, steps).flatten(0, 1))


class ImageLoss:
    """How far nets are from answering labelled images well (paper section III-E).

    Args:
        images: x [S, C, H, W] and y [S], see `Images.of`; mini-batches are drawn from them.
        teacher: a net (`Nets` of one, or a module) whose softened answers are distilled, or None.
        distil: weight of the teacher's KL, the rest is ``loss``; 0.9 as in the paper's
            several-architecture experiments, 1 for distillation alone.
        loss: (logits [N, B, K], y [B]) -> [N], or a scalar; cross-entropy by default. Of answers of
            one value, [N, B, 1], compare ``outputs[..., 0]`` with y, or they spread to [N, B, B].
        temperature: softens the distillation, whose loss is multiplied by its square.
        samples: B, images drawn in each step; all of them where there are fewer.

    Call it with nets and a generator: the loss of each net, [N].
    """

    def __init__(
        self, images: Images, teacher=None, *, distil=0.9, loss=None, temperature=4.0, samples=256
    ):
        images, samples = Images.of(images), whole(samples, "samples")
        if min(samples, len(images)) < 1:
            raise ValueError(f"a loss on images needs some to draw, not {samples} of {len(images)}")
        if not 0 <= distil <= 1:
            raise ValueError(f"distil is a share of the loss, from 0 to 1, not {distil}")
        self.images, self.loss = images, loss or cross_entropy
        self.distil, self.temperature = (distil if teacher is not None else 0.0), temperature
        self.samples, self._checked = min(samples, len(images)), False
        if isinstance(teacher, nn.Module):
            teacher = copy.deepcopy(teacher).eval()
            with torch.no_grad():  # in parts, or a deep teacher's activations fill the memory
                parts = images.x.split(samples_per_block(images.x))
                self.targets = torch.cat([teacher(x.clone()) for x in parts])[None]
        elif teacher is not None:
            if not isinstance(teacher, Nets | MixedNets) or len(teacher) != 1:
                raise ValueError(f"a teacher is one net, zoo[n] or a module, not {teacher!r}")
            self.targets = teacher[0].outputs(images.x)

    def __call__(self, nets: Nets, generator: torch.Generator) -> Tensor:
        s = torch.randperm(len(self.images), generator=generator)[: self.samples]
        s = s.to(self.images.x.device)
        logits, total = nets(self.images.x[s]), 0
        if self.loss is cross_entropy and not self._checked:  # once: a GPU would wait
            check_labels(self.images.y, logits.shape[-1])
            self._checked = True
        if self.distil < 1:
            total = (1 - self.distil) * self.loss(logits, self.images.y[s])
        if self.distil > 0:
            kl = kl_divergence(logits, self.targets[:, s], self.temperature)
            total = total + self.distil * self.temperature**2 * kl
        return total


@dataclass
class Search:
    """What `optimise` found for N starts, and the way there.

    best: [N, E] the embeddings kept, one a start (or [N, P] rows), and nets: what they decode to.
    score: [N] their validation score (accuracy in percent on images), on the CPU.
    reached: [N] whether they stand for the wanted architecture; all True where none was named.
    path: [S, N, E] and scores: [S, N] at each of the S validations; losses: [steps, N].
    stopped: why the search ended before its last step, or "".
    """

    best: Tensor
    score: Tensor
    reached: Tensor
    nets: Nets | MixedNets
    path: Tensor
    scores: Tensor
    losses: Tensor
    stopped: str = ""

    def __repr__(self) -> str:
        first, last = self.scores[0].median(), self.score.median()
        return f"Search({len(self.score)} starts, median score {first:.4g} → {last:.4g})"


@dataclass(frozen=True)
class Descent:
    """How a search goes: Adam whose rate rises for a twentieth of the steps, then falls to zero.

    steps, lr: of Adam; every: steps between validations; seed: of random starts and mini-batches;
    prior_weight, architecture_weight: of those terms in the loss.
    """

    steps: int = 150
    lr: float = 1.0
    every: int = 10
    seed: int = 0
    prior_weight: float = 0.1
    architecture_weight: float = 1.0

    def __post_init__(self):
        for name in ("steps", "every", "seed"):
            object.__setattr__(self, name, whole(getattr(self, name), name))
        if self.steps < 0 or self.every < 1:
            raise ValueError(f"no search of {self.steps} steps validates every {self.every}")
        if not self.lr >= 0:
            raise ValueError(f"a rate is at least 0, not {self.lr}")


def optimise(
    space: NetSpace, starts, loss: NetsLoss, validate: Validation = None, *, architecture=None,
    prior: "Gaussian | None" = None, config: Descent | None = None, progress: bool = True,
) -> Search:  # fmt: skip
    """Latent space optimisation: Adam on embeddings, through the frozen decoder (section IV-E).

    Every embedding is an independent search, all run as one batch. Ctrl-C returns the best so far.

    Args:
        starts: embeddings [N, E] or [E]; nets or a module, which are encoded; or a whole number of
            random points drawn from ``prior``.
        loss: (nets, generator) -> loss of each net [N], or their mean; such as `ImageLoss`, or your
            own ``lambda nets, generator: my_loss(nets(x))`` on logits [N, B, K].
        validate: images (see `Images.of`) to measure accuracy on, or (nets) -> score [N], higher is
            better. The best state of each start is kept, the later one of equals. None: the last
            (with ``architecture`` the last of those that stand for it, if any does).
        architecture: name or index of the one wanted, in a space of several: its decoder is used
            and the classifier's cross-entropy added, so that the embedding comes to stand for it.
            None: whatever each embedding stands for.
        prior: adds its penalty, which keeps the search near its embeddings.
        config: steps, rates, weights.

    Raises ValueError if the starts or the first loss can't be used. If the loss fails later (NaN),
    the search warns, stops and returns the best so far.
    """
    config, several = check_kind(Descent, CONFIG, config or Descent()), len(space.batched) > 1
    decode = partial(space.decode, architecture=architecture)
    start = _start_points(space, starts, prior, config.seed)
    wanted = space.index(architecture) if several and architecture is not None else None

    def goal(z):
        penalty = 0.0 if prior is None else config.prior_weight * prior(z)
        if wanted is None:
            return penalty, True
        named = space.classify(z)
        penalty = penalty - config.architecture_weight * named.log_softmax(1)[:, wanted]
        return penalty, named.argmax(1) == wanted

    return _descend(decode, start, loss, validate, goal, config, progress)


def optimise_weights(
    nets: Nets, loss: NetsLoss, validate: Validation = None, *, config: Descent | None = None,
    progress: bool = True,
) -> Search:  # fmt: skip
    """The same search on the weights [N, P] themselves, that is fine-tuning: the baseline.

    Arguments and result as in `optimise`; from freshly initialised nets it is training.
    """
    check_kind(Nets, "nets are trained, as zoo[n]", nets).batched.check_trainable()
    config = check_kind(Descent, CONFIG, config or Descent(lr=3e-3))
    decode = partial(Nets, nets.batched)
    return _descend(decode, nets.rows, loss, validate, lambda rows: (0.0, True), config, progress)


@torch.inference_mode(False)
def refine(
    space: NetSpace, nets: Nets, like, steps: int = 50, *, z: Tensor | None = None, lr=0.2, seed=0,
    loss=None,
) -> Tensor:  # fmt: skip
    """Embeddings [N, E] polished until the decoded nets answer more like ``nets``.

    A search from the encoder's embeddings (or ``z``) whose last state is kept: what an encoder
    misses of a net it has never seen is won back in a few steps, as auto-decoders do (DeepSDF, Park
    et al. 2019, section 4). Nets say themselves which architecture they are decoded as.

    Args:
        nets: N `Nets` of one architecture.
        like: inputs [S, ...] whose answers are compared, or a loss such as a `LikenessLoss`.
        loss: how answers to inputs are compared, as in the `Distillation` that the space was fitted
            by, whose default is this one's. Values taken for logits come out worse.
    """
    loss = LikenessLoss(nets, like, **compared(space, loss)) if isinstance(like, Tensor) else like
    config = Descent(steps, lr, every=max(1, steps), seed=seed)
    decode = partial(space.decode, architecture=space.index(nets))
    start = _start_points(space, nets if z is None else z, None, seed)
    found = _descend(decode, start, loss, None, lambda z: (0.0, True), config, False)
    if found.stopped.startswith("interrupted"):  # embeddings alone would not say so
        raise KeyboardInterrupt
    return found.best


def _start_points(space: NetSpace, starts, prior, seed: int) -> Tensor:
    """Whatever a search may start from -> embeddings [N, E]."""
    if isinstance(starts, int | np.integer):
        if prior is None:
            raise ValueError("random starts need prior=, such as Gaussian(space.encode(zoo))")
        starts = prior.sample(starts, seed)
    if not isinstance(starts, nn.Module) and len(starts) == 0:
        raise ValueError("no starts: give at least one embedding or net to start from")
    z = space.check(starts if isinstance(starts, Tensor) else space.encode(starts))
    check_finite(z, "starts")
    return z


@torch.inference_mode(False)  # gradients are needed, whatever the caller does
def _descend(decode, start, loss, validate, goal, config, progress) -> Search:
    """Adam on ``start`` [N, E] through ``decode``, the best state of each row kept.

    ``goal`` says of z what is added to its loss, and whether it is what was wanted, [N] each.
    """
    check_kind(Callable, "a loss of nets is a function, as ImageLoss(images)", loss)
    if not (validate is None or callable(validate)):
        validate = methodcaller("accuracy", Images.of(validate))
    z, stopped = start.detach().clone().requires_grad_(), ""
    adam, generator = torch.optim.Adam([z], config.lr), torch.Generator().manual_seed(config.seed)
    path, losses = [], []  # states (z, score, whether it is what was wanted), losses of steps
    with progress_bar(config.steps, "optimising", progress) as bar:
        try:
            for step in range(config.steps + 1):
                if step % config.every == 0 or step == config.steps:
                    path.append(_visit(decode, z.detach().clone(), validate, goal))
                    bar.set_postfix(score=f"{float(path[-1][1].median()):.4g}")
                if step == config.steps:
                    break
                found = _checked(loss(decode(z), generator), len(z), step)
                (z.grad,) = torch.autograd.grad((found + goal(z)[0]).sum(), z)
                if not z.grad.isfinite().all():
                    raise LossError(f"the loss's gradient is not finite at step {step}")
                adam.param_groups[0]["lr"] = learning_rate(step, config.steps, config.lr)
                adam.step()
                losses.append(found.detach())
                bar.update()
        except KeyboardInterrupt:
            if not path:
                raise
            if validate is None:  # of which the last state is kept
                path.append(_visit(decode, z.detach().clone(), validate, goal))
            stopped = f"interrupted at step {len(losses)}"
        except LossError as error:
            if not losses:
                raise
            if validate is None and len(losses) % config.every == 0:  # the state that failed
                path.pop()
            stopped = str(error)
            warnings.warn(f"{error}; the best state so far is returned", stacklevel=4)
    z, scores, there = (torch.stack(part) for part in zip(*path, strict=True))
    # Which state to keep, [N]: what was wanted first, then the score, then the latest.
    order = scores.clamp_min(torch.finfo(scores.dtype).min).where(there == there.any(0), -torch.inf)
    best = len(scores) - 1 - order.flip(0).argmax(0)
    score, n = scores.gather(0, best[None])[0], torch.arange(len(start))
    kept = z[best, n]
    with torch.no_grad():
        nets = decode(kept)
    losses = torch.stack(losses) if losses else z.new_empty(0, len(start))
    return Search(kept, score, there.any(0), nets, z, scores, losses, stopped)


class LossError(ValueError):
    """A loss of nets returned something that can't be descended."""


def _checked(loss, nets: int, step: int) -> Tensor:
    """What a loss returned, as a loss of each net, [N]."""
    if (shape := shape_of(loss)) not in ([], [nets]):
        raise LossError(f"a loss of nets is one number a net, [{nets}], or their mean; not {shape}")
    if not loss.requires_grad:
        cure = "compute it from nets(x); accuracy and .outputs() have no gradient"
        raise LossError(f"the loss does not depend on the nets: {cure}")
    loss = loss.expand(nets)
    if not (good := loss.isfinite()).all():
        bad = (~good).nonzero()[:, 0].tolist()
        raise LossError(f"the loss is {loss[bad[0]].item()} at step {step} for starts {bad}")
    return loss


@torch.no_grad()
def _visit(decode, z: Tensor, validate: Callable | None, goal) -> tuple[Tensor, Tensor, Tensor]:
    """A state of the search: z [N, E], its scores [N] and whether it is what was wanted [N]."""
    # without validation all states are equal: the last one is kept
    score = torch.zeros(len(z)) if validate is None else validate(decode(z))
    if (found := shape_of(score)) != [len(z)]:
        raise ValueError(f"validate returns one score a net, [{len(z)}], not {found}")
    there = torch.as_tensor(goal(z)[1]).cpu().expand(len(z))
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    return z, score.cpu().nan_to_num(nan=-torch.inf), there


class Gaussian:
    """The embeddings of a zoo as one normal distribution: the simplest idea of "in the space".

    Called on embeddings it is their mean squared z-score along the distribution's axes: 1 for a
    typical member of many, less of fewer nets than axes. Axes along which the zoo hardly spreads,
    or not at all, count as a tenth of the widest, so that leaving the zoo's subspace costs much,
    but not everything.

    Args:
        embeddings: [N, E], at least two that differ.
    """

    @torch.inference_mode(False)  # or searches could not have gradients
    def __init__(self, embeddings: Tensor):
        check_kind(Tensor, "embeddings are a tensor, as space.encode(zoo)", embeddings)
        if embeddings.dim() != 2 or not (embeddings != embeddings[:1]).any():
            raise ValueError(f"give at least 2 embeddings that differ, not {[*embeddings.shape]}")
        check_finite(embeddings, "embeddings")
        self.mean = embeddings.mean(0)
        centred = (embeddings - self.mean).to(torch.promote_types(embeddings.dtype, torch.float32))
        with torch.autocast(centred.device.type, enabled=False):
            variance, axes = torch.linalg.eigh(centred.T @ centred / (len(embeddings) - 1))
        self.axes = axes.T.to(embeddings)  # [E, E], from the narrowest to the widest
        spread = variance.clamp_min(0).sqrt()
        self.spread = spread.clamp_min(spread[-1] / 10).to(embeddings)

    def __call__(self, z: Tensor) -> Tensor:
        """Mean squared z-score of embeddings z [N, E] (or [E]): [N]."""
        return (((torch.atleast_2d(z) - self.mean) @ self.axes.T) / self.spread).square().mean(1)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Random embeddings [n, E]."""
        if whole(n, "n") < 1:
            raise ValueError(f"at least one is drawn, not {n}")
        noise = torch.randn(n, len(self.axes), generator=torch.Generator().manual_seed(seed))
        return self.mean + ((noise.to(self.mean) @ self.axes.T) * self.spread) @ self.axes


def sample(embeddings: Tensor, n: int, density=None, bandwidth=0.5, seed: int = 0) -> Tensor:
    """New embeddings [n, E] from a simple density of those given, [N, E].

    The density is fitted on whitened principal components that hold 99% of the variance.

    Args:
        density: any scikit-learn estimator with ``fit`` and ``sample``, such as a
            ``GaussianMixture``; None: a Gaussian of width ``bandwidth``, in standard deviations,
            around every embedding: small values copy, large ones wander.
        seed: of the draws, and of an estimator whose ``random_state`` is None.
    """
    check_kind(Tensor, "embeddings are a tensor, as space.encode(zoo)", embeddings)
    if whole(n, "n") < 1 or embeddings.dim() != 2 or not (embeddings != embeddings[:1]).any():
        found = f"n = {n} and {list(embeddings.shape)}"
        raise ValueError(f"sampling needs n ≥ 1 and 2 embeddings [N, E] that differ, not {found}")
    model = KernelDensity(bandwidth=bandwidth) if density is None else copy.copy(density)
    if getattr(model, "random_state", seed) is None:
        model.random_state = seed
    z = embeddings.detach().cpu().double().numpy()
    pca = PCA(0.99, whiten=True, svd_solver="full").fit(z)
    model.fit(pca.transform(z))
    seeded = {"random_state": seed} if isinstance(model, KernelDensity) else {}
    drawn = model.sample(n, **seeded)
    if isinstance(drawn, tuple):  # a mixture: its points sorted by component, and their labels
        drawn = np.random.default_rng(seed).permutation(drawn[0])
    return torch.from_numpy(pca.inverse_transform(drawn)).to(embeddings)
