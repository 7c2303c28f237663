"""What a space of several architectures is trained for (paper sections III-D and IV-D).

Like everything in `netspace_lite.training`, an objective is a callable
``objective(space, generator) -> loss``; `combine` adds them up. How decoded nets should answer is
itself an argument, ``answering(nets, generator) -> [N]``, such as `netspace_lite.explore.OnImages`
with any teacher.
"""

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import Nets
from .space import NetSpace
from .training import kl_divergence, spread

Objective = Callable[[NetSpace, torch.Generator], Tensor]
Answering = Callable[[Nets, torch.Generator], Tensor]


def combine(*objectives: Objective, weights: Sequence[float] | None = None) -> Objective:
    """The weighted sum of objectives, all weights 1 unless given."""
    weights = [1.0] * len(objectives) if weights is None else weights
    if not objectives or len(weights) != len(objectives):
        raise ValueError(f"{len(objectives)} objectives need as many weights, not {len(weights)}")

    def total(space: NetSpace, generator: torch.Generator) -> Tensor:
        return sum(w * f(space, generator) for w, f in zip(weights, objectives, strict=True))

    return total


class Pool:
    """The nets of a mixed zoo under one numbering, with what the encoder reads of each.

    Args:
        space: the space to be trained; features are computed once, here.
        zoos: `Nets` of one or several of its architectures.

    ``architecture``: [N] index of each net's architecture in the space.
    """

    def __init__(self, space: NetSpace, zoos):
        self.zoos = [zoos] if isinstance(zoos, Nets) else list(zoos)
        if space.config.learn_probes:
            raise ValueError(
                "learned probes change every step: use SpaceConfig(learn_probes=False)"
            )
        self.present = [space.index(zoo) for zoo in self.zoos]
        with torch.no_grad():
            pairs = zip(self.zoos, self.present, strict=True)
            self.features = [space.features(zoo.rows, a) for zoo, a in pairs]
        sizes = [len(zoo) for zoo in self.zoos]
        self.group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        self.within = torch.cat([torch.arange(size) for size in sizes])
        self.architecture = torch.tensor(self.present)[self.group]

    def __len__(self) -> int:
        return len(self.group)

    def draw(self, count: int, generator: torch.Generator, group=None) -> Tensor:
        """Numbers [count] of random nets: of one zoo, of a zoo each [count], or of any zoo.

        All zoos have equal chances, whatever their sizes.
        """
        groups = torch.randint(len(self.zoos), (count,), generator=generator)
        if group is not None:
            groups = torch.as_tensor(group).expand(count)
        sizes = torch.tensor([len(zoo) for zoo in self.zoos])
        first = sizes.cumsum(0) - sizes
        within = (torch.rand(count, generator=generator) * sizes[groups]).long()
        return first[groups] + within

    def encode(self, space: NetSpace, n: Tensor, target: int | None = None) -> Tensor:
        """Embeddings [len(n), E] of nets n, moved to architecture ``target`` if there is one."""
        parts, places = [], []
        for g, (a, features) in enumerate(zip(self.present, self.features, strict=True)):
            at = (self.group[n] == g).nonzero()[:, 0]
            if len(at):
                z = space.encoder(features[self.within[n[at]]], a)
                parts.append(z if target is None else space.translate(z, a, target))
                places.append(at)
        return torch.cat(parts)[torch.cat(places).argsort()]


def decoded_loss(
    space: NetSpace, z: Tensor, architecture: Tensor, answering: Answering, generator
) -> Tensor:
    """Mean loss of nets decoded from z [N, E], each as its own ``architecture`` [N]."""
    losses = []
    for a in architecture.unique().tolist():
        losses.append(answering(space.decode(z[architecture == a], a), generator))
    return torch.cat(losses).mean()


class TeacherDistillation:
    """All decoded nets answer like one strong teacher, whatever was encoded (section III-D).

    Args:
        space: the space to be trained.
        zoos: the nets whose embeddings are decoded.
        answering: how they should answer; the paper's is ``OnImages(images, teacher,
            distil=0.9, temperature=4)``: 0.9·T²·KL + 0.1·cross-entropy.
        nets: decoded of each architecture in a step.
    """

    def __init__(self, space: NetSpace, zoos, answering: Answering, nets: int = 2):
        self.pool, self.answering, self.nets = Pool(space, zoos), answering, nets

    def __call__(self, space: NetSpace, generator: torch.Generator) -> Tensor:
        groups = range(len(self.pool.zoos))
        n = torch.cat([self.pool.draw(self.nets, generator, group) for group in groups])
        z, architecture = self.pool.encode(space, n), self.pool.architecture[n]
        return decoded_loss(space, z, architecture, self.answering, generator)


class ArchitectureClassification:
    """The space says which architecture an embedding stands for: cross-entropy (section III-D).

    Args:
        nets: classified in a step.
        translated: classify embeddings moved to random architectures as those, too; for spaces
            trained to translate.
    """

    def __init__(self, space: NetSpace, zoos, nets: int = 64, translated: bool = False):
        self.pool, self.nets, self.translated = Pool(space, zoos), nets, translated

    def __call__(self, space: NetSpace, generator: torch.Generator) -> Tensor:
        n = self.pool.draw(self.nets, generator)
        z, architecture = self.pool.encode(space, n), self.pool.architecture[n]
        if self.translated:
            chosen = torch.randint(len(self.pool.present), (self.nets,), generator=generator)
            target = torch.tensor(self.pool.present)[chosen]
            offset = space.encoder.offset
            z = torch.cat([z, z - offset[architecture] + offset[target]])
            architecture = torch.cat([architecture, target])
        return F.cross_entropy(space.classify(z), architecture)


class Interpolation:
    """Between embeddings far apart lie the architectures in between, trained (section III-D).

    Architectures are ordered by their index. Two embeddings whose indices differ by d > ``apart``
    span a line; around k/d of the way it should decode to the k-th architecture on the way, and
    that net should answer well. An architecture without a zoo learns from nothing else.

    Args:
        answering: how nets in between should answer.
        nets: decoded in between in each step.
        named: points classified in each step, at all places 0/d to d/d, which costs little.
        apart: the paper's rule is max(1, A − 2): only the longest lines.
        jitter: points lie up to this share of a segment beside k/d; 0 as in the paper. Some
            jitter keeps borders away from the places k/d.
    """

    def __init__(
        self, space: NetSpace, zoos, answering: Answering, nets: int = 4, named: int = 64,
        apart: int | None = None, jitter: float = 0.3,
    ):  # fmt: skip
        self.pool, self.answering = Pool(space, zoos), answering
        self.nets, self.named, self.jitter = nets, named, jitter
        self.apart = max(1, len(space.architectures) - 2) if apart is None else apart
        present = self.pool.present
        self.ends = [
            (i, j) if present[i] < present[j] else (j, i)
            for i, j in combinations(range(len(present)), 2)
            if abs(present[i] - present[j]) > self.apart
        ]
        if not self.ends:
            raise ValueError(
                f"no two zoos are more than {self.apart} architectures apart: there is nothing "
                "in between to learn; pass apart="
            )

    def __call__(self, space: NetSpace, generator: torch.Generator) -> Tensor:
        z, architecture = self.points(space, generator, self.nets)
        loss = decoded_loss(space, z, architecture, self.answering, generator)
        z, architecture = self.points(space, generator, self.named, ends=True)
        return loss + F.cross_entropy(space.classify(z), architecture)

    def points(
        self, space: NetSpace, generator: torch.Generator, count: int, ends: bool = False
    ) -> tuple[Tensor, Tensor]:
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
        way = (k + (beside * 2 - 1) * self.jitter) / (last - first)
        start, end = self.pool.encode(space, low), self.pool.encode(space, high)
        return torch.lerp(start, end, way.clamp(0, 1)[:, None]), first + k


class MixedDistillation:
    """Decoded nets answer like the very nets encoded, in their own or in another architecture.

    Answers have no architecture, so every net of the mixed zoo can teach every decoder head: its
    embedding is moved to the target architecture and the net decoded there should answer the
    same. Small heads lend their many cheap nets to large ones.

    Args:
        space: the space to be trained.
        zoos: the nets to learn from.
        inputs: [S, ...] shared by all nets.
        nets, samples: drawn in each step, all decoded as one architecture.
        crossing: share of nets drawn from all zoos; the rest are of the target architecture.
        chances: of each zoo's architecture to be the target, equal unless given.
    """

    def __init__(
        self, space: NetSpace, zoos, inputs: Tensor, *, nets: int = 48, samples: int = 24,
        crossing: float = 0.5, chances: Sequence[float] | None = None, loss=kl_divergence,
    ):  # fmt: skip
        self.pool, self.inputs, self.loss = Pool(space, zoos), inputs, loss
        self.nets, self.samples, self.crossing = nets, samples, crossing
        self.chances = torch.tensor(chances or [1.0] * len(self.pool.zoos)).float()
        self.answers = torch.cat([zoo.outputs(inputs) for zoo in self.pool.zoos])
        self.scale = spread(self.answers)

    def __call__(self, space: NetSpace, generator: torch.Generator) -> Tensor:
        group = int(torch.multinomial(self.chances, 1, generator=generator))
        n = self.pool.draw(self.nets, generator, group)
        crossed = round(self.nets * self.crossing)
        n[:crossed] = self.pool.draw(crossed, generator)
        s = torch.randint(len(self.inputs), (self.samples,), generator=generator)
        target = self.pool.present[group]
        outputs = space.decode(self.pool.encode(space, n, target), target)(self.inputs[s])
        return self.loss(outputs, self.answers[n[:, None], s], self.scale[n]).mean()
