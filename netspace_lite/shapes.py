"""Signed distances to train shape nets on: from chairs, the user's meshes, DeepSDF files.

Every source ends as `Samples`: points in the unit ball and their distances, negative inside. As in
the paper half of each shape's samples lie inside and half outside.
"""

import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import trimesh
from torch import Tensor

from .chairs import Chair, chair_sdf, place_in_parts

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


@dataclass(frozen=True)
class Transform:
    """From a mesh's own coordinates to the unit sphere: (x - centre) · scale."""

    centre: tuple[float, float, float]
    scale: float

    def apply(self, points):
        """Points [..., 3] (array or tensor) in the mesh's own units -> in the unit sphere."""
        return (points - self._like(points)) * self.scale

    def invert(self, points):
        """Points [..., 3] (array or tensor) in the unit sphere -> in the mesh's own units."""
        return points / self.scale + self._like(points)

    def _like(self, points):
        if isinstance(points, Tensor):
            return torch.tensor(self.centre, dtype=points.dtype, device=points.device)
        return np.array(self.centre)


def sample_chairs(
    chairs: list[Chair], samples: int = 20_000, seed: int = 0, far: float = 0.25
) -> Samples:
    """Draw ``samples`` points a chair, half inside and half outside.

    Those of chair i depend on ``seed``, i and the chair only.

    Inside points fill the parts evenly, whatever their size, so that thin legs count. Of the
    outside ones about half lie near the surface, the others anywhere in the unit ball; more of them
    do with a larger ``far``, the share of candidates drawn from the ball, which is mostly outside.

    Raises ValueError if ``samples`` is not a positive even number or ``far`` not in 0 to 0.75.
    """
    _check_count(samples)
    if not 0 <= far <= 0.75:
        raise ValueError(f"far should be a share from 0 to 0.75, so that some hit, not {far}")
    seeds = [seed * 100_003 + i for i in range(len(chairs))]
    drawn = [_sample_chair(chair, samples, s, far) for chair, s in zip(chairs, seeds, strict=True)]
    points, sdf = (torch.stack(tensors) for tensors in zip(*drawn, strict=True))
    return Samples(points, sdf)


def _sample_chair(chair: Chair, samples: int, seed: int, far: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    parts = chair.parts()
    count = int(2.25 * samples / (1 - far))  # candidates enough for both halves
    places = 2 * torch.rand(count, 3, generator=generator) - 1
    which = torch.randint(len(parts), (count,), generator=generator)
    near = place_in_parts(parts, places, which)
    near += NOISE * torch.randn(count, 3, generator=generator)
    near[:, 0] *= 2 * torch.randint(2, (count,), generator=generator) - 1  # mirrored or not
    anywhere = torch.rand(count, 1, generator=generator) < far
    points = torch.where(anywhere, _ball(count, generator), near)
    points = points / points.norm(dim=-1, keepdim=True).clamp(min=1)
    sdf = chair_sdf(parts[None], points)[0]
    keep = _halves(sdf < 0, samples)
    return points[keep], sdf[keep]


def _check_count(samples: int) -> None:
    if samples < 2 or samples % 2:
        raise ValueError(f"samples should be an even number of points, half inside, not {samples}")


def _ball(count: int, generator) -> Tensor:
    """Points spread evenly in the unit ball: [count, 3]."""
    direction = torch.randn(count, 3, generator=generator)
    radius = torch.rand(count, 1, generator=generator) ** (1 / 3)
    return direction / direction.norm(dim=-1, keepdim=True) * radius


def _halves(inside: Tensor, samples: int) -> Tensor:
    """Indices [S] of the first S/2 inside and the first S/2 outside of candidates [C]."""
    half = samples // 2
    sides = [side.nonzero()[:half, 0] for side in (inside, ~inside)]
    if min(map(len, sides)) < half:
        raise ValueError(f"too few of {len(inside)} candidate points lie inside or outside")
    return torch.cat(sides)


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
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise ValueError(f"{name} has faces of vertices that it lacks: the file is damaged")
    vertices = vertices[np.unique(faces)]  # stray vertices without a face don't count
    if not np.isfinite(vertices).all():
        bad = int((~np.isfinite(vertices)).any(1).sum())
        raise ValueError(f"{name} has {bad} vertices that are NaN or infinite: repair it first")
    if np.abs(vertices).max() > HUGE:
        raise ValueError(
            f"{name} has coordinates up to {np.abs(vertices).max():.3g}, over {HUGE:.0e}: "
            "scale it or move it to the origin first"
        )
    centre = (vertices.min(0) + vertices.max(0)) / 2
    radius = np.linalg.norm(vertices - centre, axis=1).max()
    if radius < 1e-6 * max(np.abs(centre).max(), 1e-6):
        raise ValueError(f"{name} is a single point as far as its coordinates can tell: no surface")
    transform = Transform(tuple(centre.tolist()), float(1 / radius))
    used, index = np.unique(faces, return_inverse=True)
    placed = trimesh.Trimesh(transform.apply(mesh.vertices[used]), index.reshape(faces.shape))
    placed.update_faces(placed.nondegenerate_faces())
    if len(placed.faces) == 0:
        raise ValueError(f"{name} has only faces without area: it is no surface")
    return placed, transform


def sample_mesh(mesh: trimesh.Trimesh, samples: int = 20_000, seed: int = 0) -> Samples:
    """Draw ``samples`` points of one mesh in the unit sphere, as `sample_chairs` does: N = 1.

    The sign is the generalised winding number's (Jacobson et al. 2013): inside where the surface
    goes round a point by more than a half, either way. It needs no watertight mesh, and a warning
    says so where it had to bridge holes.

    Raises ValueError if the mesh does not fit the unit sphere or encloses next to nothing.
    """
    _check_count(samples)
    if np.linalg.norm(mesh.vertices, axis=1).max() > 1 + 1e-6:
        raise ValueError("the mesh leaves the unit sphere: pass it through normalise_mesh first")
    if not mesh.is_watertight:
        warnings.warn(
            "the mesh is not watertight: inside is where its winding number is over a half, "
            "which closes holes smoothly",
            stacklevel=2,
        )
    points, inside = _both_sides(mesh, samples, seed)
    keep = _halves(inside, samples)
    points, inside = points[keep], inside[keep]
    _, distance, _ = trimesh.proximity.closest_point(mesh, points.double().numpy())
    distance = torch.from_numpy(distance).float()
    return Samples(points[None], torch.where(inside, -distance, distance)[None])


def _both_sides(mesh, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Candidates near the surface, in the box and in the ball, until both sides have enough."""
    generator = torch.Generator().manual_seed(seed)
    low, high = (torch.tensor(edge, dtype=torch.float32) for edge in mesh.bounds)
    all_points, all_inside = [], []
    for attempt in range(20):
        surface, _ = trimesh.sample.sample_surface(mesh, samples, seed=seed + attempt)
        near = torch.from_numpy(np.array(surface)).float()
        near += NOISE * torch.randn(near.shape, generator=generator)
        box = low + (high - low) * torch.rand(samples // 2, 3, generator=generator)
        points = torch.cat([near, box, _ball(samples // 2, generator)])
        points = points / points.norm(dim=-1, keepdim=True).clamp(min=1)
        points = points[torch.randperm(len(points), generator=generator)]
        all_points.append(points)
        all_inside.append(winding_number(mesh, points).abs() > 0.5)
        counts = torch.cat(all_inside).long().bincount(minlength=2)
        if counts.min() >= samples // 2:
            return torch.cat(all_points), torch.cat(all_inside)
    raise ValueError(
        f"only {counts[1]} of {counts.sum()} points lie inside the mesh: it encloses next to "
        "nothing; give its walls some thickness"
    )


def winding_number(mesh: trimesh.Trimesh, points: Tensor, block: int = 2**18) -> Tensor:
    """How often the surface goes round each point: [S, 3] -> [S]; 1 inside, 0 outside if closed.

    Sum over faces of the solid angle by 4π (van Oosterom and Strackee 1983). ``block`` is how many
    pairs of a point and a face are held at once.
    """
    a, b, c = torch.from_numpy(np.array(mesh.triangles)).float().unbind(1)  # 3 of [F, 3]

    # (a - p)·(b - p) = a·b - p·(a + b) + |p|² for a point p: products of matrices, no [S, F, 3].
    def products(u, v):
        return torch.cat([-(u + v), (u * v).sum(1, keepdim=True), torch.ones(len(u), 1)], 1)

    cross = torch.linalg.cross(a, b) + torch.linalg.cross(b, c) + torch.linalg.cross(c, a)
    determinant = (a * torch.linalg.cross(b, c)).sum(1, keepdim=True)
    volumes = torch.cat([-cross, determinant, torch.zeros(len(a), 1)], 1)
    angles = []
    for part in points.float().split(max(1, block // len(a))):
        point = torch.cat([part, torch.ones(len(part), 1), part.square().sum(1, keepdim=True)], 1)
        la, lb, lc = ((point @ products(u, u).T).clamp_(min=0).sqrt_() for u in (a, b, c))
        below = la * lb * lc + (point @ products(a, b).T) * lc
        below += (point @ products(b, c).T) * la + (point @ products(c, a).T) * lb
        angles.append(2 * torch.atan2(point @ volumes.T, below).sum(1))
    return torch.cat(angles) / (4 * torch.pi)


def load_deepsdf(path, samples: int = 20_000, seed: int = 0) -> Samples:
    """Samples of one shape from a DeepSDF ``.npz``: ``pos`` and ``neg``, rows of x, y, z, sdf.

    Rows with NaN are dropped, and a warning counts them. Half of ``samples`` comes from each array,
    rows drawn again only where an array has too few. Returns N = 1.

    Raises ValueError for other contents, pickled objects, or a side without a usable row.
    """
    _check_count(samples)
    arrays = _read_deepsdf(Path(path))
    rng, halves, dropped = np.random.default_rng(seed), [], 0
    for name, rows in arrays.items():
        good = rows[np.isfinite(rows).all(1)]
        dropped += len(rows) - len(good)
        if len(good) == 0:
            raise ValueError(f"{path} has no usable row in {name}: both sides are needed")
        halves.append(good[rng.choice(len(good), samples // 2, replace=len(good) < samples // 2)])
    if dropped:
        warnings.warn(f"{path}: dropped {dropped} rows that hold NaN or infinity", stacklevel=2)
    rows = torch.from_numpy(np.concatenate(halves).astype(np.float32))
    return Samples(rows[None, :, :3], rows[None, :, 3])


def _read_deepsdf(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"no sample file {path}: give a DeepSDF .npz with pos and neg")
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("neg", "pos")}
    except KeyError as error:
        raise ValueError(f"{path} should hold arrays pos and neg: {error}") from error
    except (zipfile.BadZipFile, EOFError, OSError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not a readable .npz file: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} holds pickled or damaged data: {error}") from error
    for name, rows in arrays.items():
        if rows.ndim != 2 or rows.shape[1] != 4 or rows.dtype.kind != "f":
            raise ValueError(
                f"{path}: {name} should be float rows x, y, z, sdf of shape [rows, 4], "
                f"not {rows.dtype} {rows.shape}"
            )
    return arrays
