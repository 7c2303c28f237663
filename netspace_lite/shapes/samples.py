"""Signed distances to train shape nets on: from chairs, the user's meshes, DeepSDF files.

Every source ends as `Samples`: points in the unit ball and their distances, negative inside. As in
the paper half of each shape's samples lie inside, and come first, and half outside.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import trimesh
from torch import Tensor

from ..store import load_arrays
from .chairs import Chair, chair_parts, chair_sdf, place_in_parts

SUFFIXES = (".obj", ".ply", ".off", ".stl")
NOISE = 0.05  # spread around surfaces and parts, in units of the unit sphere
HUGE = 1e9  # coordinates beyond this are taken for damage


@dataclass
class Samples:
    """points: [N, S, 3] in the unit ball; sdf: [N, S], negative inside; both float32."""

    points: Tensor
    sdf: Tensor

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index) -> "Samples":
        """The samples of some shapes: a slice, a mask or a list."""
        return Samples(self.points[index], self.sdf[index])

    def to(self, device) -> "Samples":
        """The same samples on another device."""
        return Samples(self.points.to(device), self.sdf.to(device))


class Transform(NamedTuple):
    """From a mesh's own coordinates to the unit sphere: (x - centre) · scale."""

    centre: tuple[float, float, float]
    scale: float

    def apply(self, points):
        """Points [..., 3] (array or tensor) in the mesh's own units -> in the unit sphere."""
        return (points - self._centre(points)) * self.scale

    def invert(self, points):
        """Points [..., 3] (array or tensor) in the unit sphere -> in the mesh's own units."""
        return points / self.scale + self._centre(points)

    def _centre(self, points):
        return (points / 1).new_tensor(self.centre) if isinstance(points, Tensor) else self.centre


def sample_chairs(chairs, samples: int = 20_000, seed: int = 0, far: float = 0.25) -> Samples:
    """Draw ``samples`` points for each of a list of chairs, half inside and half outside.

    Those of chair i depend on ``seed``, i and the chair only.

    Inside points fill the parts evenly, whatever their size, so that thin legs count. Of the
    outside ones about half lie near the surface, the others anywhere in the unit ball; more of them
    do with a larger ``far``, the share of candidates drawn from the ball, which is mostly outside.

    Raises ValueError if ``samples`` is not a positive even number or ``far`` not in 0 to 0.75.
    """
    if not 0 <= far <= 0.75:
        raise ValueError(f"far should be a share from 0 to 0.75, so that some hit, not {far}")
    drawn = [_chair_points(c, samples, seed * 100_003 + i, far) for i, c in enumerate(chairs)]
    points = torch.stack(drawn)
    return Samples(points, chair_sdf(chair_parts(chairs), points))


def _chair_points(chair: Chair, samples: int, seed: int, far: float) -> Tensor:
    generator, parts = torch.Generator().manual_seed(seed), chair.parts()
    count = int(2.25 * samples / (1 - far))  # candidates enough for both halves

    def draw(attempt):
        places = 2 * torch.rand(count, 3, generator=generator) - 1
        which = torch.randint(len(parts), (count,), generator=generator)
        near = place_in_parts(parts[which], places)
        near += NOISE * torch.randn(count, 3, generator=generator)
        near[:, 0] *= 2 * torch.randint(2, (count,), generator=generator) - 1  # mirrored or not
        anywhere = torch.rand(count, 1, generator=generator) < far
        return torch.where(anywhere, _ball(count, generator), near)

    return _both_sides(draw, lambda points: chair_sdf(parts[None], points)[0] < 0, samples)


def _both_sides(draw, is_inside, samples: int) -> Tensor:
    """The first S/2 points inside and the first S/2 outside of those drawn, in the ball: [S, 3].

    ``draw(attempt)`` gives candidates [C, 3] and is asked up to 20 times.
    """
    _check_count(samples)
    points, inside = torch.empty(0, 3), torch.empty(0, dtype=torch.bool)
    for attempt in range(20):
        drawn = draw(attempt)
        drawn = drawn / drawn.norm(dim=-1, keepdim=True).clamp(min=1)
        points, inside = torch.cat([points, drawn]), torch.cat([inside, is_inside(drawn)])
        halves = [points[side][: samples // 2] for side in (inside, ~inside)]
        if min(map(len, halves)) == samples // 2:
            return torch.cat(halves)
    raise ValueError(f"the shape encloses next to nothing: {inside.sum()} points of {len(inside)}")


def _check_count(samples: int) -> None:
    if samples < 2 or samples % 2:
        raise ValueError(f"samples should be an even number of points, half inside, not {samples}")


def _ball(count: int, generator: torch.Generator) -> Tensor:
    """Points spread evenly in the unit ball: [count, 3]."""
    direction = F.normalize(torch.randn(count, 3, generator=generator), dim=-1)
    return direction * torch.rand(count, 1, generator=generator) ** (1 / 3)


def load_mesh(path) -> tuple[trimesh.Trimesh, Transform]:
    """Read an .obj, .ply, .off or .stl file and move it into the unit sphere.

    Returns: the mesh, its bounding box centred on the origin and its farthest vertex at 1, and the
    `Transform` that did it; ``transform.invert`` brings results back to the file's units.

    Raises FileNotFoundError, and ValueError for other suffixes, files that cannot be read, no
    faces, NaN, infinite or huge coordinates, and meshes without extent.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no mesh file {path}: give an {', '.join(SUFFIXES)} file")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path.name} is none of {', '.join(SUFFIXES)}: convert it first")
    try:
        with np.errstate(all="ignore"):  # damaged coordinates are reported below
            mesh = trimesh.load(path, force="mesh", process=False, skip_materials=True)
    except Exception as error:  # each of trimesh's readers fails in its own ways
        raise ValueError(f"{path} cannot be read as a mesh: {error!r}") from error
    return normalise_mesh(mesh, path.name)


def normalise_mesh(mesh: trimesh.Trimesh, name="the mesh") -> tuple[trimesh.Trimesh, Transform]:
    """`load_mesh` for a mesh in memory: [V, 3] vertices, [F, 3] faces; the input stays as it is."""
    vertices = np.asarray(getattr(mesh, "vertices", ()), dtype=float)
    faces = np.asarray(getattr(mesh, "faces", ()), dtype=int)
    if len(vertices) == 0 or len(faces) == 0:
        raise ValueError(f"{name} has no faces: a shape needs a surface, not only points")
    if vertices.shape[1:] != (3,) or faces.min() < 0 or faces.max() >= len(vertices):
        raise ValueError(f"{name} has faces of vertices that it lacks, or not x, y, z: repair it")
    used, index = np.unique(faces, return_inverse=True)
    vertices = vertices[used]  # stray vertices without a face don't count
    if bad := int((~(np.abs(vertices) <= HUGE)).any(1).sum()):
        raise ValueError(f"{name} has {bad} vertices that are NaN, infinite or beyond {HUGE:.0e}")
    centre = (vertices.min(0) + vertices.max(0)) / 2
    radius = np.linalg.norm(vertices - centre, axis=1).max()
    if radius < 1e-6 * max(np.abs(centre).max(), 1e-6):
        raise ValueError(f"{name} is a single point as far as its coordinates can tell: no surface")
    transform = Transform(tuple(centre.tolist()), float(1 / radius))
    placed = trimesh.Trimesh(transform.apply(vertices), index.reshape(faces.shape))
    trimesh.repair.fix_normals(placed, multibody=False)  # faces may be wound both ways
    placed.update_faces(placed.nondegenerate_faces())
    if len(placed.faces) == 0:
        raise ValueError(f"{name} has only faces without area: it is no surface")
    if len(placed.faces) < len(faces):  # those without area may have been the farthest out
        placed, again = normalise_mesh(placed, name)
        centre = transform.invert(np.array(again.centre))
        transform = Transform(tuple(centre.tolist()), transform.scale * again.scale)
    return placed, transform


def sample_mesh(mesh: trimesh.Trimesh, samples: int = 20_000, seed: int = 0) -> Samples:
    """Draw ``samples`` points of one mesh in the unit sphere, as `sample_chairs` does: N = 1.

    The sign is the generalised winding number's (Jacobson et al. 2013): inside where the surface
    goes round a point by more than a half, either way. It needs no watertight mesh, and a warning
    says so where it had to bridge holes.

    Raises ValueError if the mesh does not fit the unit sphere or encloses next to nothing.
    """
    if np.linalg.norm(mesh.vertices, axis=1).max() > 1 + 1e-6:
        raise ValueError("the mesh leaves the unit sphere: pass it through normalise_mesh first")
    if not mesh.is_watertight:
        warnings.warn("not watertight: inside is where the winding number exceeds ½", stacklevel=2)
    generator, count = torch.Generator().manual_seed(seed), samples // 2
    low, high = (torch.tensor(edge, dtype=torch.float32) for edge in mesh.bounds)

    def draw(attempt):  # near the surface, in the box and in the ball
        surface, _ = trimesh.sample.sample_surface(mesh, samples, seed=seed + attempt)
        near = torch.from_numpy(np.array(surface)).float()
        near += NOISE * torch.randn(near.shape, generator=generator)
        box = low + (high - low) * torch.rand(count, 3, generator=generator)
        points = torch.cat([near, box, _ball(count, generator)])
        return points[torch.randperm(len(points), generator=generator)]

    points = _both_sides(draw, lambda points: winding_number(mesh, points).abs() > 0.5, samples)
    _, distance, _ = trimesh.proximity.closest_point(mesh, points.double().numpy())
    distance[:count] *= -1
    return Samples(points[None], torch.from_numpy(distance).float()[None])


def winding_number(mesh: trimesh.Trimesh, points: Tensor, block: int = 2**18) -> Tensor:
    """How often the surface goes round each point: [S, 3] -> [S]; 1 inside, 0 outside if closed.

    Sum over faces of the solid angle by 4π (van Oosterom and Strackee 1983). ``block`` is how many
    pairs of a point and a face are held at once.
    """
    a, b, c = torch.from_numpy(np.array(mesh.triangles)).to(points.device).double().unbind(1)

    # All that is needed of a point p is linear in (p, |p|², 1): products of matrices, no [S, F, 3].
    # In fp64, as small details far from the origin are differences of large numbers.
    def linear(vector, square, constant):
        return torch.cat([vector, torch.full_like(constant, square), constant], dim=1).T  # [5, F]

    pairs = (a, a), (b, b), (c, c), (a, b), (b, c), (c, a)  # (u - p)·(v - p) of each
    dots = [linear(-(u + v), 1.0, (u * v).sum(1, keepdim=True)) for u, v in pairs]
    determinant = (a * torch.linalg.cross(b, c)).sum(1, keepdim=True)
    volume = linear(-torch.linalg.cross(b - a, c - a), 0.0, determinant)
    angles = []
    for part in points.double().split(max(1, block // len(a))):
        point = F.pad(torch.cat([part, part.square().sum(1, keepdim=True)], 1), (0, 1), value=1.0)
        aa, bb, cc, ab, bc, ca = (point @ dot for dot in dots)
        la, lb, lc = (length.clamp_(min=0).sqrt_() for length in (aa, bb, cc))
        below = la * lb * lc + ab * lc + bc * la + ca * lb
        angles.append(torch.atan2(point @ volume, below).sum(1))
    return (torch.cat(angles) / (2 * torch.pi)).to(torch.result_type(points, 1.0))


@np.errstate(over="ignore")  # what float32 can't hold becomes infinite
def load_deepsdf(path, samples: int = 20_000, seed: int = 0) -> Samples:
    """Samples of one shape from a DeepSDF ``.npz``: ``pos`` and ``neg``, rows of x, y, z, sdf.

    Rows with NaN, a distance of the other sign, or a value beyond ±2, in other units than those of
    the unit sphere, are dropped, and a warning counts them. Half of ``samples`` comes from each
    array, rows drawn again only where an array has too few. Returns N = 1; DeepSDF's points fill
    the cube -1..1 about the ball.

    Raises FileNotFoundError, and ValueError for damaged files, other contents, pickled objects, or
    a side without a usable row.
    """
    _check_count(samples)
    rng, half, halves = np.random.default_rng(seed), samples // 2, []
    for name, rows in load_arrays(path, ("neg", "pos")).items():
        if np.shape(rows)[1:] != (4,) or rows.dtype.kind != "f":
            raise ValueError(f"{path}: {name} should be floats x, y, z, sdf, not {np.shape(rows)}")
        sign = -1 if name == "neg" else 1
        good = rows[sign * rows[:, 3] >= 0]
        good = good[(np.abs(good.astype(np.float32)) <= 2).all(1)]  # DeepSDF's own fill -1..1
        if len(good) == 0:
            raise ValueError(f"{path} has no usable row in {name}: both sides are needed")
        if dropped := len(rows) - len(good):
            why = "NaN, beyond ±2 or of the other sign"
            warnings.warn(f"{path}: dropped {dropped} rows, {why}", stacklevel=3)
        halves.append(good[rng.choice(len(good), half, replace=len(good) < half)])
    rows = torch.from_numpy(np.concatenate(halves).astype(np.float32))[None]
    return Samples(rows[..., :3], rows[..., 3])
