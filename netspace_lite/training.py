"""What a space is trained for, and the loop that trains it.

An *objective* is a callable ``objective(space, generator) -> loss``: it draws nets and inputs with
the generator, encodes (by `MixedZoo`), decodes, and compares what the decoded nets answer with what
they should.
`combine` adds objectives up. Where decoded nets should simply do well, how is a *loss of nets*,
``loss(nets, generator) -> [N]``, such as `netspace_lite.explore.ImageLoss` with any teacher.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import cos, inf, isfinite, isnan, nan, pi
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import store
from .checks import check_finite, check_kind, shape_of, whole
from .fingerprint import fingerprint
from .kernels import distillation_loss
from .nets import MixedNets, Nets, as_answers, classes, members_of
from .optimiser import Muon
from .processes import agreed, average, rank, share, wait
from .progress import progress_bar
from .randomness import own_randomness
from .space import NetSpace, logit_scale

Objective = Callable[[NetSpace, torch.Generator], Tensor]
NetsLoss = Callable[[Nets, torch.Generator], Tensor]
INPUTS = "inputs are a tensor, as data.train.x"
SHARP = 10.0  # logits in units of their spread times this make a softmax that nearly is a choice


def kl_divergence(outputs: Tensor, targets: Tensor, temperature) -> Tensor:
    """KL of softened predictions from softened targets, mean over samples: [N, B, K] -> [N].

    Logits [N, B, T, K] are of T places a sample, which count as samples.
    ``targets`` are [N, B, K], or [1, B, K] for all nets; ``temperature`` is a number or [N, 1, 1].
    Raises ValueError for K = 1: one value's softmax is 1, whatever it is.
    """
    if outputs.shape[-1] == 1:
        cure = "SpaceConfig(values=True), or pass loss=squared_error to this loss"
        raise ValueError(f"answers of one value have no softmax to compare: {cure}")
    targets, outputs = as_answers(_as_many(targets, outputs)), as_answers(outputs)
    if isinstance(temperature, Tensor):
        temperature = temperature.flatten().expand(len(outputs))
    return distillation_loss(outputs, targets, temperature=temperature) / temperature**2


def squared_error(outputs: Tensor, targets: Tensor, scale) -> Tensor:
    """Mean squared difference of answers [N, B, ...] in units of ``scale``: [N].

    A ``loss`` for nets whose answers are values instead of logits, and that of spaces with
    ``SpaceConfig(values=True)``. Their scale is their root mean square: standardise targets far
    from 0, and values of different units, before training.
    """
    apart = as_answers(outputs - _as_many(targets, outputs), values=True)
    return (apart / scale).square().mean((1, 2))


def compared(space: NetSpace, loss=None) -> dict:
    """How a `LikenessLoss` compares answers of a space's nets: by ``loss``, or its own if None."""
    if space.config.values:
        return {"loss": loss or squared_error, "values": True}
    return {"loss": loss or kl_divergence}


def _as_many(targets: Tensor, outputs: Tensor) -> Tensor:
    """Targets [N, B, K], or [1, B, K] of all nets, as those of outputs [N, B, K]."""
    if targets.shape[1:] != outputs.shape[1:] or len(targets) not in (1, len(outputs)):
        given = f"answers {list(outputs.shape)} and targets {list(targets.shape)}"
        raise ValueError(f"{given} differ in nets or classes, or in samples: can't be compared")
    return targets.expand_as(outputs)


class LikenessLoss:
    """How differently nets answer from ``nets``, one by one.

    Args:
        nets: N `Nets` (or `MixedNets`, on shared inputs) to be like.
        inputs: [S, ...] shared, or with ``per_net`` [N, S, ...], each net's own.
        loss: (outputs, targets, scale) -> [N], as in `Distillation`.
        values: whether answers are values, whose scale is their root mean square. None: with
            `squared_error`.
        samples: B, inputs drawn in each step.
        consensus: weight of a second term: how often a net chooses the class that ``nets`` choose
            most, less how often its like does, squared. What an encoder is unsure of is decoded to
            an average of nets, which is right more often than each; this makes it as good as they.
            Shares are of the inputs drawn, so the weight that is best depends on ``samples``.

    Call it with nets and a generator: the loss of each net, [N]. ``like`` [N] says which of the
    nets each should be like, all in their order unless given; ``analogy``, (far, p, q) of [N]
    each, that it should answer as its net does and, by a share ``far``, as nets p do and q do not.
    """

    def __init__(
        self, nets, inputs: Tensor, *, per_net=False, loss=kl_divergence, samples=64,
        consensus=0.0, values: bool | None = None,
    ):  # fmt: skip
        self.consensus = _consensus(consensus, per_net, values)
        kinds = Nets if per_net else Nets | MixedNets
        check_kind(kinds, "a loss of likeness is to nets, as zoo[n]", nets)
        check_finite(check_kind(Tensor, INPUTS, inputs), "inputs")
        self.inputs, self.per_net, self.loss, self.samples = inputs, per_net, loss, samples
        with torch.autocast(inputs.device.type, enabled=False):  # it may be used outside of one
            self.targets = nets.outputs(inputs, True) if per_net else nets.outputs(inputs)
        check_finite(self.targets, "the answers of nets")
        asked, found = inputs.shape[per_net], [*self.targets.shape[1:2]]
        if found != [asked]:
            raise ValueError(f"nets give one answer to each of {asked} inputs, not {found}")
        self.values = loss is squared_error if values is None else values
        self.scale = logit_scale(self.targets, self.values)
        if self.consensus:
            chosen, count = classes(self.targets), self.targets.shape[-1]
            votes = torch.stack([(chosen == k).sum(0) for k in range(count)])
            self.choice = votes.argmax(0).view(len(inputs), -1)  # of equals the first

    def __call__(self, nets: Nets, generator: torch.Generator, like=None, analogy=None) -> Tensor:
        s = torch.randint(self.targets.shape[1], (self.samples,), generator=generator)
        n = torch.arange(len(self.targets)) if like is None else like
        n, s = n.to(self.targets.device), s.to(self.targets.device)
        outputs = nets(self.inputs[n[:, None], s], True) if self.per_net else nets(self.inputs[s])
        outputs, targets, scale = as_answers(outputs, self.values), self._goal(n, s), self.scale[n]
        if analogy is not None:  # in each net's own scale, and in the scales' logarithms
            far, p, q = (part.to(n.device) for part in analogy)
            far = far.to(scale).view(-1, *[1] * (scale.dim() - 1))
            up, down = (self._goal(m, s) / self.scale[m] for m in (p, q))
            own, scale = targets / scale, scale * (self.scale[p] / self.scale[q]) ** far
            targets = scale * (own + far * (up - down))
        losses = self.loss(outputs, targets, scale)
        if (found := shape_of(losses)) not in ([], [len(outputs)]):  # or their mean
            raise ValueError(f"a loss of {len(outputs)} nets is a tensor of as many, not {found}")
        if self.consensus:
            own, wanted = (_sides(x / scale, self.choice[s].flatten()) for x in (outputs, targets))
            losses = losses + self.consensus * (own - wanted).square()
        return losses

    def _goal(self, n: Tensor, s: Tensor) -> Tensor:
        """What nets n answer to the inputs s."""
        return as_answers(self.targets[n[:, None], s], self.values)


def _sides(logits: Tensor, choice: Tensor) -> Tensor:
    """How often nets' logits [N, B, K] in their own scale are largest for the classes [B]: [N].

    Softly, so that there is a gradient: of inputs where another class is not far ahead.
    """
    sure, at = (SHARP * logits).softmax(-1), choice[None, :, None]
    return sure.gather(-1, at.expand(len(sure), -1, 1)).mean((1, 2))


def _consensus(weight, per_net: bool, values: bool | None) -> float:
    """The weight of a consensus as a number; ValueError where there can be none."""
    if not 0 <= weight < inf:
        raise ValueError(f"consensus is a weight from 0, not {weight}")
    if weight and per_net:
        raise ValueError("nets that are asked different things have no consensus: consensus=0")
    if weight and values:
        raise ValueError("values have no classes that most nets choose: consensus=0")
    return float(weight)


def combine(*objectives: Objective, weights: Sequence[float] | None = None) -> Objective:
    """The weighted sum of objectives, all weights 1 unless given."""
    weights = [1.0] * len(objectives) if weights is None else weights
    if not objectives or len(weights) != len(objectives):
        raise ValueError(f"{len(objectives)} objectives need as many weights, not {len(weights)}")

    def total(space: NetSpace, generator: torch.Generator) -> Tensor:
        return sum(w * f(space, generator) for w, f in zip(weights, objectives, strict=True))

    return total


def _versions(*tensors: Tensor) -> dict[Tensor, int]:
    """How often each tensor was written to; inference tensors don't count that."""
    return {t: 0 if t.is_inference() else t._version for t in tensors}


class MixedZoo:
    """The nets of one or several zoos under one numbering, with what the encoder reads of each.

    Args:
        space: the space to be trained; it reads the nets once, when a step first needs them,
            unless it learns probes.
        zoos: `Nets` of one or several of its architectures.

    ``architecture``: [N] index of each net's architecture in the space, on the CPU.
    """

    def __init__(self, space: NetSpace, zoos):
        self.zoos = list(zoos) if isinstance(zoos, list | tuple) else [zoos]
        wanted = "objectives are of a space and zoos, as Zoo.from_modules(modules)"
        check_kind(Nets, wanted, *self.zoos or [None])
        check_kind(NetSpace, wanted, space)
        self.present = [space.index(zoo) for zoo in self.zoos]
        self.sizes = torch.tensor([len(zoo) for zoo in self.zoos])
        self.group = torch.arange(len(self.sizes)).repeat_interleave(self.sizes)
        self.first = self.sizes.cumsum(0) - self.sizes
        self.architecture = torch.tensor(self.present)[self.group]
        self._read_of, self._features = None, []

    @torch.no_grad()
    def _read(self, space: NetSpace) -> None:
        """Keep what this space reads of the nets, unless that changes while it learns."""
        constant = (t for t in (*space.buffers(), *space.parameters()) if not t.requires_grad)
        read_of = space, _versions(*constant, *(zoo.rows for zoo in self.zoos))
        if read_of != self._read_of:
            if [space.index(zoo) for zoo in self.zoos] != self.present:
                raise ValueError("the space has these zoos elsewhere: make the objective for it")
            pairs = () if space.config.learn_probes else zip(self.zoos, self.present, strict=True)
            with torch.autocast(self.zoos[0].rows.device.type, enabled=False):  # kept beyond it
                features = [space.features(zoo.rows, a) for zoo, a in pairs]
            self._read_of, self._features = read_of, features

    def __len__(self) -> int:
        return len(self.group)

    def draw(self, count: int, generator: torch.Generator, group=None) -> Tensor:
        """Numbers [count] of random nets: of one zoo, of a zoo each [count], or of any zoo.

        All zoos have equal chances, whatever their sizes.
        """
        groups = torch.randint(len(self.zoos), (count,), generator=generator)
        if group is not None:
            groups = torch.as_tensor(group).expand(count)
        within = (torch.rand(count, generator=generator) * self.sizes[groups]).long()
        return self.first[groups] + within

    def encode(self, space: NetSpace, n: Tensor, target: int | None = None) -> Tensor:
        """Embeddings [len(n), E] of nets n, moved to architecture ``target`` if there is one."""
        self._read(space)
        parts, places = [], members_of(self.group[n])
        for group, at in places:
            a, rows = self.present[group], self.zoos[group].rows.detach()
            i = (n[at] - self.first[group]).to(rows.device)
            features = self._features[group][i] if self._features else space.features(rows[i], a)
            z = space.encoder(features, a)
            parts.append(z if target is None else space.translate(z, a, target))
        return torch.cat(parts)[torch.cat([at for _, at in places]).argsort().to(z.device)]


@dataclass(frozen=True)
class Draw:
    """What a step of `Distillation` draws.

    nets, samples: all decoded as one architecture; many nets on few samples learn fastest.
    crossing: share of nets drawn from all zoos; the rest are of the target architecture.
    chances: of each zoo's architecture to be the target, equal unless given.
    analogies: share of nets that are moved as one random net differs from another, by up to half
        of that, in the space as in what they should answer. Zoos are small; so a space learns what
        lies about their nets, too. Not with inputs per net, whose answers can't be compared.
    """

    nets: int = 48
    samples: int = 24
    crossing: float = 0.5
    chances: Sequence[float] | None = None
    analogies: float = 0.7

    def __post_init__(self):
        if min(whole(self.nets, "nets"), whole(self.samples, "samples")) < 1:
            raise ValueError(f"a step needs nets and samples, not {self.nets} and {self.samples}")
        if not (0 <= self.crossing <= 1 and 0 <= self.analogies <= 1):
            raise ValueError(f"crossing and analogies are shares, 0 to 1, not as in {self}")


class Distillation:
    """Decoded nets answer like the very nets encoded, in their own or in another architecture.

    With one zoo and no analogies this is the paper's objective (section III-C). Answers have no
    architecture, so with several zoos every net can teach every decoder head: its embedding is
    moved to the target architecture and the net decoded there should answer the same.

    Args:
        space: the space to be trained.
        zoos: the nets to learn from, a zoo or a list of one per architecture.
        inputs: [S, ...] shared by all nets, or with ``per_net`` (one zoo only) [N, S, ...].
        loss: (outputs, targets, scale) -> [N]; None: ``kl_divergence`` for logits, with the scale
            as temperature, or ``squared_error`` in a space of ``values``.
        consensus: see `LikenessLoss`.
        draw: what a step draws: ``nets=48, samples=24, crossing=0.5, chances=None,
            analogies=0.7``, see `netspace_lite.training.Draw`.
    """

    def __init__(
        self, space: NetSpace, zoos, inputs: Tensor, *, per_net=False, loss=None, consensus=0.0,
        **draw,
    ):  # fmt: skip
        self.pool, self.draw = MixedZoo(space, zoos), Draw(**draw)
        check_kind(Tensor, INPUTS, inputs)
        self.inputs, zoos = inputs, self.pool.zoos
        self.options = {"per_net": per_net} | compared(space, loss)
        # without one it is the objective of before
        if weight := _consensus(consensus, per_net, space.config.values):
            self.options["consensus"] = weight
        self._asked = self._like = None
        if per_net and len(zoos) > 1:
            raise ValueError(f"inputs per net need one zoo, not {len(zoos)}: share the inputs")
        chances = [1.0] * len(zoos) if self.draw.chances is None else self.draw.chances
        self.chances = torch.as_tensor(chances).float()
        if len(self.chances) != len(zoos) or not (self.chances.min() >= 0 < self.chances.max()):
            given = f"not {self.draw.chances} for {len(zoos)} zoos"
            raise ValueError(f"chances should be one of each zoo, none under 0, {given}")

    def _likeness(self) -> LikenessLoss:
        """Asks the nets when a step needs it: a fit that is loaded takes none."""
        asked = _versions(self.inputs, *(zoo.rows for zoo in self.pool.zoos))
        if asked != self._asked:
            nets = MixedNets(self.pool.zoos) if len(self.pool.zoos) > 1 else self.pool.zoos[0]
            like = LikenessLoss(nets, self.inputs, samples=self.draw.samples, **self.options)
            count = like.targets.shape[2:].numel()
            if like.values and count > 1 and "values" not in self.options:
                what = f"probes show {count} values less their mean"
                warnings.warn(f"{what}: SpaceConfig(values=True) shows all", stacklevel=3)
            self._asked, self._like = asked, like
        return self._like

    def __call__(self, space: NetSpace, generator: torch.Generator) -> Tensor:
        group = int(torch.multinomial(self.chances, 1, generator=generator))
        n, target = self.pool.draw(self.draw.nets, generator, group), self.pool.present[group]
        if len(self.pool.zoos) > 1:
            crossed = round(self.draw.nets * self.draw.crossing)
            n[:crossed] = self.pool.draw(crossed, generator)
        z, analogy = self.pool.encode(space, n, target), None
        if self.draw.analogies and not self.options["per_net"]:
            far, moved = torch.rand(2, len(n), generator=generator)
            far = far / 2 * (moved < self.draw.analogies)
            z = z + far[:, None].to(z) * (z.roll(1, 0) - z.roll(2, 0))
            analogy = [share(part) for part in (far, n.roll(1), n.roll(2))]
        n, z = share(n), share(z)
        losses = self._likeness()(space.decode(z, target), generator, n, analogy)
        if not (good := losses.isfinite().cpu()).all():
            raise ValueError(f"the losses of nets {n[~good].unique().tolist()} are not finite")
        return losses.mean()


def decoded_loss(space: NetSpace, z: Tensor, architecture: Tensor, loss, generator) -> Tensor:
    """Mean loss of nets decoded from z [N, E], each as its own ``architecture`` [N]."""
    groups = [(a, z[n.to(z.device)]) for a, n in members_of(architecture)]
    losses = [loss(space.decode(own, a), generator).expand(len(own)) for a, own in groups]
    return torch.cat(losses).mean()


class TeacherDistillation:
    """All decoded nets answer like one strong teacher, whatever was encoded (section III-D).

    Args:
        space: the space to be trained.
        zoos: the nets whose embeddings are decoded.
        loss: of the decoded nets; the paper's is ``ImageLoss(images, teacher, distil=0.9,
            temperature=4)``: 0.9·T²·KL + 0.1·cross-entropy.
        nets: decoded of each architecture in a step.
    """

    def __init__(self, space: NetSpace, zoos, loss: NetsLoss, nets: int = 2):
        self.pool, self.loss, self.nets = MixedZoo(space, zoos), loss, nets

    def __call__(self, space: NetSpace, generator: torch.Generator) -> Tensor:
        n = torch.cat([self.pool.draw(self.nets, generator, g) for g in range(len(self.pool.zoos))])
        z, architecture = self.pool.encode(space, n), self.pool.architecture[n]
        return decoded_loss(space, z, architecture, self.loss, generator)


class ArchitectureClassification:
    """The space says which architecture an embedding stands for: cross-entropy (section III-D).

    Args:
        nets: classified in a step.
        translated: classify embeddings moved to random architectures as those, too; for spaces
            trained to translate.

    Raises ValueError if embeddings don't move because the encoder isn't told architectures.
    """

    def __init__(self, space: NetSpace, zoos, nets: int = 64, translated: bool = False):
        if translated and space.encoder.offset is None:
            raise ValueError("embeddings of this space move to no architecture: translated=False")
        self.pool, self.nets, self.translated = MixedZoo(space, zoos), nets, translated

    def __call__(self, space: NetSpace, generator: torch.Generator) -> Tensor:
        n = self.pool.draw(self.nets, generator)
        z = self.pool.encode(space, n)
        architecture = self.pool.architecture[n].to(z.device)
        if self.translated:
            chosen = torch.randint(len(self.pool.present), (self.nets,), generator=generator)
            target = torch.tensor(self.pool.present)[chosen].to(z.device)
            offset = space.encoder.offset
            z = torch.cat([z, z - offset[architecture] + offset[target]])
            architecture = torch.cat([architecture, target])
        return F.cross_entropy(space.classify(z), architecture)


class Interpolation:
    """Between embeddings far apart lie the architectures in between, trained (section III-D).

    Architectures are ordered by their index. Two embeddings whose indices differ by d > ``apart``
    span a line; around k/d of the way it should decode to the k-th architecture on the way, and
    that net should do well. An architecture without a zoo learns from nothing else.

    Args:
        loss: of the nets in between.
        nets: decoded in between in each step.
        named: points classified in each step, at all places 0/d to d/d, which costs little.
        apart: the paper's rule is max(1, A − 2): only the longest lines.
        jitter: points lie up to this share of a segment beside k/d; 0 as in the paper. Some
            jitter keeps borders away from the places k/d.
    """

    def __init__(
        self, space: NetSpace, zoos, loss: NetsLoss, nets: int = 4, named: int = 64,
        apart: int | None = None, jitter: float = 0.3,
    ):  # fmt: skip
        self.pool, self.loss = MixedZoo(space, zoos), loss
        self.nets, self.named, self.jitter = nets, named, jitter
        self.apart = max(1, len(space.architectures) - 2) if apart is None else apart
        index = self.pool.present
        order = sorted(range(len(index)), key=index.__getitem__)
        self.ends = [(i, j) for i in order for j in order if index[j] - index[i] > self.apart]
        if self.apart < 1 or not self.ends:
            raise ValueError(f"no zoos over {self.apart} apart, nothing in between: pass apart=")

    def __call__(self, space: NetSpace, generator: torch.Generator) -> Tensor:
        z, architecture = self.points(space, generator, self.nets)
        loss = decoded_loss(space, z, architecture, self.loss, generator)
        z, architecture = self.points(space, generator, self.named, ends=True)
        return loss + F.cross_entropy(space.classify(z), architecture.to(z.device))

    def points(self, space: NetSpace, generator, count: int, ends=False) -> tuple[Tensor, Tensor]:
        """Random points on random lines [count, E], and the architectures wanted there [count].

        Places k/d with k from 1 to d − 1, or from 0 to d with ``ends``.
        """
        picked = torch.randint(len(self.ends), (count,), generator=generator)
        low, high = torch.tensor(self.ends)[picked].T
        low, high = (self.pool.draw(count, generator, group) for group in (low, high))
        first, last = self.pool.architecture[low], self.pool.architecture[high]
        inner = last - first - 1
        chance, beside = torch.rand(2, count, generator=generator)
        k = (chance * (inner + 2)).long() if ends else 1 + (chance * inner).long()
        way = ((k + (beside * 2 - 1) * self.jitter) / (last - first)).clamp(0, 1)
        start, end = self.pool.encode(space, low), self.pool.encode(space, high)
        return torch.lerp(start, end, way[:, None].to(start)), first + k


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first twentieth of the steps, then half a cosine to zero."""
    warmup = max(1, steps // 20)
    return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + cos(pi * step / steps))


@torch.inference_mode(False)  # gradients are needed, whatever the caller does
def fit(
    space: NetSpace, objective: Objective, validate: Callable[[NetSpace], dict[str, float]],
    steps: int = 4000, *, lr: float = 2e-3, epoch: int = 250, folder=None,
    log: Callable[[dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:  # fmt: skip
    """Train ``space`` in place and leave it in its best state.

    After every ``epoch`` steps ``validate`` scores the space, ``log`` is given the row of numbers,
    and the state with the highest *first* score is kept (NaN counts as the lowest; of an error give
    the negative). With ``folder`` every epoch is saved there and the same call resumes, bit for
    bit; a finished fit is loaded. Draws follow ``space.seed``; several `processes` share each step.

    Returns the history: one dict of step, seconds, mean loss of the epoch and scores per epoch.
    Raises ValueError naming the step whose loss is not finite, and what differs if ``folder`` holds
    another fit. What changes itself, such as a validation that fills a list, is another each time.
    """
    plan = _plan(space, objective, validate, steps, lr, epoch)
    optimiser = Muon(space, lr)
    generator, history, best = torch.Generator().manual_seed(plan["seed"]), [], {}
    if folder is not None:
        folder = Path(folder).resolve()
        for name, asked in {"objective": objective, "validation": validate}.items():
            plan[name] = fingerprint(asked, known=[space])  # either may name the space itself
        history, best = _resume(folder, plan, space, optimiser, generator)
    last = history[-1] if history else {"step": 0, "seconds": 0.0}
    first, started = last["step"], time.monotonic() - last["seconds"]
    with _begun(space, folder), progress_bar(steps, "fitting the space", first=first) as bar:
        for start in range(first, steps, epoch):
            losses = []
            for step in range(start, min(start + epoch, steps)):
                optimiser.param_groups[0]["lr"] = learning_rate(step, steps, lr)
                losses.append(_descend(space, objective, generator, optimiser, step))
                bar.update()
            if start == 0:
                _warn_unless_reached(space, optimiser)
            found = _scored(space, validate)
            row = {"step": step + 1, "seconds": time.monotonic() - started, "loss": fmean(losses)}
            name, score = next(iter(found.items()))
            bar.set_postfix(loss=f"{row['loss']:.4f}", **{name: f"{score:.4g}"})
            earlier = (past[name] for past in history if not isnan(past.get(name, nan)))
            if not best or score > max(earlier, default=-inf):
                best = {k: v.detach().clone() for k, v in space.state_dict().items()}
            history.append(row | found)
            if step + 1 == steps:
                space.load_state_dict(best)
            _checkpoint(folder, plan, space, optimiser, generator, history, best)
            if log is not None:  # the epoch is kept, whatever it raises
                log(history[-1])
    return history


@contextmanager
def _begun(space, folder):
    """Where a fit that is left before its end began stays known, with the state it leaves."""
    try:
        yield
    except BaseException:
        if folder is not None:
            space._begun = *space._begun[:2], fingerprint(space)
        raise
    space._begun = None


def _warn_unless_reached(space, optimiser) -> None:
    """Warn of an encoder that is to be trained, and of which no step so far had a gradient."""
    learned = [p for p in getattr(space, "encoder", nn.Module()).parameters() if p.requires_grad]
    if learned and optimiser.state.keys().isdisjoint(learned):
        how = "encode by MixedZoo(space, zoo).encode(space, n): space.encode has no gradient"
        what = "the loss does not depend on the encoder, which stays as it is"
        warnings.warn(f"{what}: {how}", stacklevel=4)


def _plan(space, objective, validate, steps, lr, epoch) -> dict[str, float | str]:
    """The numbers that a fit is recognised by; ValueError for arguments that make none."""
    check_kind(nn.Module, "a fit trains a space, or another module", space)
    if min(whole(steps, "steps"), whole(epoch, "epoch")) < 1 or not lr > 0:
        raise ValueError(f"steps, epoch and lr should be over 0, not {steps}, {epoch} and {lr}")
    if not (callable(objective) and callable(validate)):
        example = "such as a Distillation, and lambda space: scores(space, val, data.val)"
        raise ValueError(f"a fit calls an objective and a validation, {example}")
    plan = {"steps": int(steps), "lr": float(lr), "epoch": int(epoch)}  # of NumPy's, too
    return plan | {"seed": int(getattr(space, "seed", 0)), "optimiser": Muon.__name__}


def _scored(space, validate) -> dict[str, float]:
    """What ``validate`` found, by names that leave those of a row of the history alone."""
    found = validate(space)
    if not (isinstance(found, dict) and found) or found.keys() & {"step", "seconds", "loss"}:
        raise ValueError(f"scores are a dict, none of them step, seconds or loss, not {found!r}")
    return agreed({k: float(v) for k, v in found.items()})


def _descend(space, objective, generator, optimiser, step: int) -> float:
    """One step of training; returns the loss. Dropout follows the seed and the step."""
    seed, first = getattr(space, "seed", 0), optimiser.param_groups[0]["params"][0]
    try:
        with own_randomness(seed + 1_000_003 * step, [first.device] * first.is_cuda):
            loss = objective(space, generator)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.isfinite():
            given = getattr(loss, "tolist", lambda: loss)()
            raise ValueError(f"the loss is {given}, where a tensor of one finite number is needed")
        if not loss.requires_grad:
            raise ValueError("the loss does not depend on what is trained: it has no gradient")
    except ValueError as error:
        raise ValueError(f"step {step}: {error}") from error
    optimiser.zero_grad()
    loss.backward()
    learned = optimiser.param_groups[0]["params"]
    loss = average(loss, learned)
    norm = nn.utils.get_total_norm([p.grad for p in learned if p.grad is not None])
    if not norm.isfinite():
        raise ValueError(f"step {step}: the gradient is not finite")
    if norm + 1e-6 > 1:  # or all of it would be multiplied by 1
        nn.utils.clip_grads_with_norm_(learned, 1.0, norm)
    optimiser.step()
    return loss.item()


def _checkpoint(folder, plan, space, optimiser, generator, history, best) -> None:
    if folder is not None and rank() == 0:
        own = {k: v.clone() for k, v in space.state_dict().items()}  # tied ones share memory
        parts = {"space": own, "best": best, "random": {"state": generator.get_state()}}
        parts |= optimiser.state_dict()["state"]  # of each parameter, by number
        tensors = {f"{part}/{k}": v for part, state in parts.items() for k, v in state.items()}
        result = fingerprint(space) if history[-1]["step"] == plan["steps"] else ""
        store.save(folder, "fit", {"plan": plan, "history": history, "result": result}, tensors)
    wait()  # until it is in the folder


def _resume(folder, plan, space, optimiser, generator) -> tuple[list, dict[str, Tensor]]:
    """History and best state of what lies in the folder, if anything; says where the fit began."""
    # by a fit that was interrupted, from what it began, and what it left
    begun, origin, left = getattr(space, "_begun", None) or ("", "", "")
    found, now = store.exists(folder, "fit"), fingerprint(space)
    plan["space"] = origin if found and (begun, left) == (str(folder), now) else now
    plan["learned"] = fingerprint([n for n, p in space.named_parameters() if p.requires_grad])
    if begun == str(folder) and not found and now != origin:
        raise ValueError(f"{folder}: a fit stopped before it saved an epoch: build the space anew")
    space._begun = str(folder), plan["space"], now
    if not found:
        return [], {}
    record, tensors = store.load(folder, "fit")

    def part(name) -> dict[str, Tensor]:
        start = f"{name}/"
        return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}

    with store.reading(folder):
        if plan["space"] == record["result"]:  # the very space that this fit left
            plan["space"] = record["plan"]["space"]
        store.check_plan(folder, record["plan"], plan)
        history = record["history"]
        if not all(isfinite(row[k]) for row in history for k in ("step", "seconds", "loss")):
            raise ValueError(f"{folder} holds a history with numbers that are not finite")
        for name in ("best", "space"):
            space.load_state_dict(part(name))
        generator.set_state(part("random")["state"])
        if history[-1]["step"] < plan["steps"]:  # or no step will be taken
            for number, p in enumerate(optimiser.param_groups[0]["params"]):
                if given := part(number):
                    wanted = optimiser.initial(p).items()
                    optimiser.state[p] = {k: given[k].to(v).reshape(v.shape) for k, v in wanted}
    return history, part("best")
