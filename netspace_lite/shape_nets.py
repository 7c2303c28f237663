"""Nets that are shapes: train a SIREN per shape, ask how alike two are, complete a partial scan.

A signed distance net answers points with distances, negative inside. Zoo, space and search are the
ones that classifiers use; what is particular to shapes is here (paper section IV, 3D shape).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import store
from .functional import BLOCK, Nets
from .meshes import mesh_from_grid, within
from .shapes import Samples
from .space import NetSpace
from .zoo import Recipe

TOLERANCE = 0.01  # distances count as equal up to this, as in the paper


@dataclass(frozen=True)
class ShapeSize:
    """How large the zoo of notebook 5 is: chairs, samples of each, the net, and its training.

    ``far`` is what `sample_chairs` takes; distances level off at ``limit``, see `level_off`.
    """

    shapes: int
    samples: int
    far: float
    limit: float
    hidden: int
    omega: float
    steps: int
    batch: int
    lr: float


# Lite nets are small and quickly trained, and err far from a chair, each in a way of its own that
# no space can know: they see more far points, and distances that level off have no creases there.
SHAPES = {
    "lite": ShapeSize(
        360, 32_768, far=0.5, limit=0.1, hidden=64, omega=30.0, steps=1600, batch=128, lr=2e-3
    ),
    "paper": ShapeSize(
        1000, 40_000, far=0.25, limit=math.inf, hidden=256, omega=30.0, steps=10_000,
        batch=20_000, lr=1e-4,
    ),
}  # fmt: skip


def level_off(samples: Samples, limit: float) -> Samples:
    """Samples whose distances d level off far from the surface: limit · tanh(d / limit).

    What lies beyond ``limit`` is only far, as in DeepSDF (Park et al. 2019), which cuts at 0.1;
    smoothly, since a net of sines has no corners. Distances up to a quarter of the limit change by
    about 2% at most, and the surface stays where it is. Infinite: nothing changes.
    """
    if limit <= 0:
        raise ValueError(f"limit should be a positive distance, not {limit}")
    if math.isinf(limit):
        return samples
    return Samples(samples.points, limit * torch.tanh(samples.sdf / limit))


def shape_recipes(count: int, seed: int = 0, steps: int = 600, lr: float = 3e-3) -> list[Recipe]:
    """One recipe a shape: own initialisation and data order, the same length, no weight decay."""
    first = seed * 100_003
    return [Recipe(first + i, steps, lr, weight_decay=0.0) for i in range(count)]


class ShapeTask:
    """Fit each net to the signed distances of its own shape by mean squared error.

    A mini-batch is half inside and half outside, as in the paper; the learning rate rises
    over the first tenth of the training, which frequencies as high as the paper's need on few
    steps, and falls with half a cosine.

    Args:
        samples: [N, S] samples, the first half of each shape's inside and the rest outside.
        recipes: N recipes with N different seeds; net n learns shape n.
        batch: points of a net and step, even and at most S.
        test: other samples of the same shapes, to score nets on; None scores on ``samples``.
    """

    def __init__(
        self, samples: Samples, recipes: list[Recipe], batch: int = 512, test: Samples | None = None
    ):
        self.shape = {recipe.seed: n for n, recipe in enumerate(recipes)}
        if not len(samples) == len(recipes) == len(self.shape):
            raise ValueError(
                f"{len(samples)} shapes need as many recipes with different seeds, not "
                f"{len(recipes)} recipes with {len(self.shape)} seeds"
            )
        if test is not None and len(test) != len(samples):
            raise ValueError(f"test samples of {len(test)} shapes can't score {len(samples)} nets")
        half = samples.sdf.shape[1] // 2
        if batch % 2 or not 2 <= batch <= 2 * half:
            raise ValueError(f"batch should be an even number from 2 to {2 * half}, not {batch}")
        self.samples, self.test, self.batch_size = samples, test or samples, batch
        self._orders: dict[tuple[int, int], Tensor] = {}

    def describe(self) -> dict:
        """What the zoo's record says of the shapes; a hash tells other samples apart."""
        samples = self.samples
        return {
            "task": "shapes",
            "shapes": len(samples),
            "samples": samples.sdf.shape[1],
            "batch": self.batch_size,
            "hash": store.fingerprint(samples.points, samples.sdf),
        }

    def batch(self, recipes: list[Recipe], step: int) -> tuple[Tensor, Tensor]:
        """Step ``step`` of each net's own shuffled epochs: points [N, B, 3] and sdf [N, B]."""
        size, half = self.batch_size // 2, self.samples.sdf.shape[1] // 2
        epoch, position = divmod(step, half // size)
        part = slice(position * size, (position + 1) * size)
        inside = torch.stack([self._order(recipe.seed, epoch)[part] for recipe in recipes])
        index = torch.cat([inside, inside + half], dim=1)  # [N, B]
        shape = torch.tensor([self.shape[recipe.seed] for recipe in recipes])[:, None]
        return self.samples.points[shape, index], self.samples.sdf[shape, index]

    def _order(self, seed: int, epoch: int) -> Tensor:
        """The order of a half of the samples in one epoch, so that training can resume."""
        if (seed, epoch) not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k[1] == epoch}
            generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
            half = self.samples.sdf.shape[1] // 2
            self._orders[seed, epoch] = torch.randperm(half, generator=generator)
        return self._orders[seed, epoch]

    def schedule(self, progress: Tensor) -> Tensor:
        """Factor on each net's learning rate at ``progress`` [N] (0 to 1): up, then a cosine."""
        rise = (10 * progress + 0.02).clamp(max=1)
        return rise * 0.5 * (1 + torch.cos(torch.pi * progress))

    def loss(self, outputs: Tensor, sdf: Tensor) -> Tensor:
        """Mean squared error of distances [N, B, 1] against sdf [N, B]: [N]."""
        return (outputs[..., 0] - sdf).square().mean(1)

    def scores(self, nets: Nets) -> dict[str, Tensor]:
        """``error``: mean absolute distance error [N], ``within_001``: share of points in percent
        whose distance is within 0.01 of the true one [N]."""
        error = (nets.outputs(self.test.points, per_net=True)[..., 0] - self.test.sdf).abs()
        return {"error": error.mean(1), "within_001": (error <= 0.01).float().mean(1) * 100}


def squared_error(outputs: Tensor, answers: Tensor, scale=None) -> Tensor:
    """Mean squared difference of distances, both [N, B, 1], in units of 0.01: [N].

    The paper's loss for shapes (section III-C), as a ``loss`` of `InstanceDistillation`; ``scale``
    is not used, since all shapes lie in the unit sphere.
    """
    return ((outputs - answers) / TOLERANCE).square().mean((1, 2))


@torch.no_grad()
def agreement(space: NetSpace, nets: Nets, points: Tensor) -> Tensor:
    """Share of points in percent where decoded and encoded nets differ by at most 0.01: [N].

    points: [N, B, 3], each net's own, or [B, 3]. The paper's accuracy of shape nets.
    """
    per_net = points.dim() == 3
    decoded = space.decode(space.encode(nets)).outputs(points, per_net)[..., 0]
    return within(decoded, nets.outputs(points, per_net)[..., 0], TOLERANCE) * 100


def meshes(nets: Nets, resolution: int = 64) -> list:
    """Meshes of all nets, None where one has no surface; see `mesh_from_grid`."""
    found = []
    for start in range(0, len(nets), BLOCK):
        part = nets[start : start + BLOCK]
        found += mesh_from_grid(lambda points, part=part: part(points)[..., 0], resolution)
    return found


def scan(sdf, towards: Tensor, points: int = 300, noise: float = 0.01, seed: int = 0) -> Tensor:
    """What a depth camera at infinity sees of N shapes: points on the side that faces it.

    Parallel rays are followed by sphere tracing: a point can always move on by its distance.

    Args:
        sdf: points [N, S, 3] -> signed distances [N, S], such as `chair_sdf` of some parts.
        towards: [N, 3] directions of unit length from each shape to its camera.
        points: how many of a shape; the rays that hit are drawn at random over the disc.
        noise: spread of the points about the surface, in units of the unit sphere.

    Returns [N, points, 3]. Raises ValueError if too few rays hit a shape.
    """
    generator = torch.Generator().manual_seed(seed)
    rays = 12 * points
    angle = 2 * torch.pi * torch.rand(len(towards), rays, 1, generator=generator)
    radius = torch.rand(len(towards), rays, 1, generator=generator).sqrt()
    side = torch.linalg.cross(towards, torch.tensor([[0.0, 1.0, 0.1]]).expand_as(towards))
    side = side / side.norm(dim=1, keepdim=True)
    other = torch.linalg.cross(towards, side)
    disc = radius * (angle.cos() * side[:, None] + angle.sin() * other[:, None])
    x = disc + towards[:, None]
    for _ in range(64):
        x = x - sdf(x).clamp(min=0)[..., None] * towards[:, None]
    hit = (sdf(x).abs() < 2e-3) & (x.norm(dim=-1) < 1)
    if hit.sum(1).min() < points:
        raise ValueError(f"only {hit.sum(1).min()} of {rays} rays hit a shape, not {points}")
    x = torch.stack([x[n, hit[n].nonzero()[:points, 0]] for n in range(len(x))])
    return x + noise * torch.randn(x.shape, generator=generator)


class OnScan:
    """An objective for `optimise` and `optimise_weights`: shapes that a partial scan could be of.

    Distances are 0 at the scan's points and positive on the way from there to the camera, and
    change by one per unit of length everywhere (the eikonal equation, Gropp et al. 2020). For nets
    that `level_off` the slope at a distance f is 1 - (f / limit)² instead.

    Args:
        points: [N, M, 3] from `scan`, one scan a net.
        towards: [N, 3] directions to the cameras.
        eikonal: weight of the last term.
        samples: points where it is asked for, in each step and net.
        limit: where the nets' distances level off; infinite for plain distances.
    """

    def __init__(
        self, points: Tensor, towards: Tensor, eikonal: float = 0.1, samples: int = 64,
        limit: float = math.inf,
    ):  # fmt: skip
        if len(points) != len(towards):
            raise ValueError(f"{len(points)} scans from {len(towards)} directions: give one each")
        self.points, self.towards = points, towards
        self.eikonal, self.samples, self.limit = eikonal, samples, limit

    def __call__(self, nets: Nets, generator: torch.Generator) -> Tensor:
        loss = self.misfit(nets, generator)
        if self.eikonal:
            loss = loss + self.eikonal * self._eikonal(nets, generator)
        return loss

    def misfit(self, nets: Nets, generator: torch.Generator | None = None) -> Tensor:
        """Mean distance at the scan, plus the mean depth of the free way inside the shape: [N]."""
        generator = generator or torch.Generator().manual_seed(0)
        way = 0.03 + torch.rand(*self.points.shape[:2], 1, generator=generator)
        free = self.points + way * self.towards[:, None]
        free = free / free.norm(dim=-1, keepdim=True).clamp(min=1)
        count = self.points.shape[1]
        distance = nets(torch.cat([self.points, free], dim=1), per_net=True)[..., 0]
        return distance[:, :count].abs().mean(1) + (-distance[:, count:]).clamp(min=0).mean(1)

    def _eikonal(self, nets: Nets, generator: torch.Generator, step: float = 1e-2) -> Tensor:
        """Mean squared deviation of the slope from what it should be, by central differences."""
        x = 2 * torch.rand(len(nets), self.samples, 1, 3, generator=generator) - 1
        moves = step * torch.eye(3)
        both = torch.cat([x + moves, x - moves], dim=2)  # [N, samples, 6, 3]
        ahead, behind = nets(both.flatten(1, 2), per_net=True).view(*x.shape[:2], 2, 3).unbind(2)
        slope = ((ahead - behind) / (2 * step)).norm(dim=-1)
        expected = 1 - ((ahead + behind).mean(-1) / (2 * self.limit)).square()
        return (slope - expected).square().mean(1)
