"""Nets that are shapes: train a SIREN per shape, ask how alike two are, complete a partial scan.

A signed distance net answers points with distances, negative inside. Zoo, space and search are the
ones that classifiers use; what is particular to shapes is here (paper section IV, 3D shape).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batching import BLOCK
from ..nets import Nets
from ..training import squared_error as scaled_error
from ..zoo import Orders, Recipe
from .meshes import mesh_from_grid, within
from .samples import Samples

TOLERANCE = 0.01  # distances count as equal up to this, as in the paper


def level_off(samples: Samples, limit: float) -> Samples:
    """Samples whose distances d level off far from the surface: limit · tanh(d / limit).

    What lies beyond ``limit`` is only far, as in DeepSDF (Park et al. 2019), which cuts at 0.1;
    smoothly, since a net of sines has no corners. Distances up to a quarter of the limit change by
    about 2% at most, and the surface stays where it is. Infinite: nothing changes.
    """
    if limit <= 0:
        raise ValueError(f"limit should be a positive distance, not {limit}")
    levelled = samples.sdf if math.isinf(limit) else limit * torch.tanh(samples.sdf / limit)
    return Samples(samples.points, levelled)


def shape_recipes(count: int, seed: int = 0, steps: int = 600, lr: float = 3e-3) -> list[Recipe]:
    """One recipe a shape: own initialisation and data order, the same length, no weight decay."""
    return [Recipe(seed * 100_003 + i, steps, lr, weight_decay=0.0) for i in range(count)]


class ShapeTask:
    """A `Task`: fit each net to the signed distances of its own shape by mean squared error.

    Net n of the zoo learns shape n. A mini-batch is half inside and half outside, as in the paper;
    the learning rate rises over the first tenth of the training, which frequencies as high as the
    paper's need on few steps, and falls with half a cosine.

    Args:
        samples: [N, S] samples, the first half of each shape's inside and the rest outside.
        batch: points of a net and step, even and at most S.
        test: other samples of the same shapes, to score nets on; None scores on ``samples``.
    """

    def __init__(self, samples: Samples, batch: int = 512, test: Samples | None = None):
        if test is not None and len(test) != len(samples):
            raise ValueError(f"test samples of {len(test)} shapes can't score {len(samples)} nets")
        self.samples, self.test, self.batch_size = samples, test or samples, batch
        self._half = samples.sdf.shape[1] // 2  # inside, and as many outside
        self._orders = Orders(self._half)
        if batch % 2 or not 2 <= batch <= 2 * self._half:
            raise ValueError(f"batch should be an even number from 2 to {2 * self._half}: {batch}")

    device = property(lambda self: self.samples.points.device, doc="Where nets are trained.")

    def batch(self, recipes: list[Recipe], members: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Step ``step`` of each net's own shuffled epochs: points [N, B, 3] and sdf [N, B].

        ``members`` [N] are the nets' places in the zoo, and so their shapes'.
        """
        if members.max() >= len(self.samples):
            raise ValueError(f"net {members.max()} has no shape: there are {len(self.samples)}")
        inside = self._orders(recipes, step, self.batch_size // 2)
        shape = members.to(self.device)[:, None]
        index = torch.cat([inside, inside + self._half], dim=1).to(self.device)  # [N, B]
        return self.samples.points[shape, index], self.samples.sdf[shape, index]

    def schedule(self, progress: Tensor) -> Tensor:
        """Factor on each net's learning rate at ``progress`` [N] (0 to 1): up, then a cosine."""
        return (10 * progress + 0.02).clamp(max=1) * 0.5 * (1 + torch.cos(torch.pi * progress))

    def loss(self, outputs: Tensor, sdf: Tensor) -> Tensor:
        """Mean squared error of distances [N, B, 1] against sdf [N, B]: [N]."""
        return (outputs[..., 0] - sdf).square().mean(1)

    def scores(self, nets: Nets, members: Tensor) -> dict[str, Tensor]:
        """``error``: mean absolute distance error [N], ``within_001``: share of points in percent
        whose distance is within 0.01 of the true one [N]."""
        test = self.test[members]
        error = (nets.outputs(test.points, per_net=True)[..., 0] - test.sdf).abs().cpu()
        return {"error": error.mean(1), "within_001": (error <= 0.01).float().mean(1) * 100}


def squared_error(outputs: Tensor, answers: Tensor, scale=None) -> Tensor:
    """Mean squared difference of distances, both [N, B, 1], in units of 0.01: [N].

    The paper's loss for shapes (section III-C), as a ``loss`` of `Distillation`; ``scale`` is not
    used, since all shapes lie in the unit sphere.
    """
    return scaled_error(outputs, answers, TOLERANCE)


@torch.no_grad()
def agreement(space, nets: Nets, points: Tensor) -> Tensor:
    """Share of points in percent where decoded and encoded nets differ by at most 0.01: [N].

    points: [N, B, 3], each net's own, or [B, 3]. The paper's accuracy of shape nets.
    """
    per_net = points.dim() == 3
    decoded = space.decode(space.encode(nets), nets).outputs(points, per_net)[..., 0]
    return within(decoded, nets.outputs(points, per_net)[..., 0], TOLERANCE).cpu() * 100


def meshes(nets: Nets, resolution: int = 64) -> list:
    """Meshes of all nets, None where one has no surface; see `mesh_from_grid`."""
    found, device = [], nets.rows.device
    for part in (nets[start : start + BLOCK] for start in range(0, len(nets), BLOCK)):
        found += mesh_from_grid(lambda x, part=part: part(x)[..., 0], resolution, device=device)
    return found


def scan(sdf, towards: Tensor, points: int = 300, noise: float = 0.01, seed: int = 0) -> Tensor:
    """What a depth camera at infinity sees of N shapes: points on the side that faces it.

    Parallel rays are followed by sphere tracing: a point can always move on by its distance.

    Args:
        sdf: points [N, S, 3] -> signed distances [N, S], such as `chair_sdf` of some parts.
        towards: [N, 3] directions of unit length from each shape to its camera.
        points: how many of a shape; the rays that hit are drawn at random over the disc.
        noise: spread of the points about the surface, in units of the unit sphere.

    Returns [N, points, 3]. Raises ValueError if too few rays hit a shape, and for other lengths.
    """
    if ((towards.norm(dim=-1) - 1).abs() > 1e-3).any():
        raise ValueError(f"directions should have length 1, not {towards.norm(dim=-1).tolist()}")
    generator, rays, towards = torch.Generator().manual_seed(seed), 12 * points, towards[:, None]
    turn, area = torch.rand(2, len(towards), rays, 1, generator=generator).to(towards.device)
    side = F.normalize(torch.linalg.cross(towards, towards.new_tensor([[[0, 1, 0.1]]])), dim=-1)
    other, angle = torch.linalg.cross(towards, side), 2 * torch.pi * turn
    x = towards + area.sqrt() * (angle.cos() * side + angle.sin() * other)  # a disc of rays
    for _ in range(64):
        x = x - sdf(x).clamp(min=0)[..., None] * towards
    hit = (sdf(x).abs() < 2e-3) & (x.norm(dim=-1) < 1)
    if hit.sum(1).min() < points:
        raise ValueError(f"only {hit.sum(1).min()} of {rays} rays hit a shape, not {points}")
    x = torch.stack([seen[mask][:points] for seen, mask in zip(x, hit, strict=True)])
    return x + noise * torch.randn(x.shape, generator=generator).to(x.device)


class ScanLoss:
    """A loss of nets for `optimise` and `optimise_weights`: shapes that a scan could be of.

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

    def __init__(self, points, towards, *, eikonal=0.1, samples: int = 64, limit=math.inf):
        if len(points) != len(towards):
            raise ValueError(f"{len(points)} scans from {len(towards)} directions: give one each")
        self.points, self.towards = points, towards
        self.eikonal, self.samples, self.limit = eikonal, samples, limit

    def __call__(self, nets: Nets, generator: torch.Generator) -> Tensor:
        return self.misfit(nets, generator) + self.eikonal * self._eikonal(nets, generator)

    def misfit(self, nets: Nets, generator: torch.Generator | None = None) -> Tensor:
        """Mean distance at the scan, plus the mean depth of the free way inside the shape: [N]."""
        generator = generator or torch.Generator().manual_seed(0)
        way = torch.rand(*self.points.shape[:2], 1, generator=generator).to(self.points.device)
        free = self.points + (way + 0.03) * self.towards[:, None]
        free = free / free.norm(dim=-1, keepdim=True).clamp(min=1)
        on, before = nets(torch.cat([self.points, free], 1), per_net=True)[..., 0].chunk(2, dim=1)
        return on.abs().mean(1) + (-before).clamp(min=0).mean(1)

    def _eikonal(self, nets: Nets, generator: torch.Generator, step: float = 1e-2) -> Tensor:
        """Mean squared deviation of the slope from what it should be, by central differences."""
        x = 2 * torch.rand(len(nets), self.samples, 1, 3, generator=generator) - 1
        x = x + step * torch.cat([torch.eye(3), -torch.eye(3)])  # [N, samples, 6, 3]
        answers = nets(x.flatten(1, 2).to(self.points), per_net=True)
        ahead, behind = answers.view(*x.shape[:2], 2, 3).unbind(2)
        slope = ((ahead - behind) / (2 * step)).norm(dim=-1)
        expected = 1 - ((ahead + behind).mean(-1) / (2 * self.limit)).square()
        return (slope - expected).square().mean(1)
