"""A procedural family of chairs with signed distances, so shape nets need no download.

A chair is a union of *parts*, and every part is the same primitive: a slab with rounded corners
and edges, leaning about the x axis. A cylinder is a slab whose corners are as round as it is wide.
Chairs are symmetric, so one part stands for its mirror image too: points are folded to x ≥ 0.

Axes: x to the side, y up, z to the front; a chair's bounding box is centred on the origin.
"""

import math
from collections import namedtuple

import numpy as np
import torch
from torch import Tensor

RADIUS = 0.95  # of the sphere that every chair fits in, so that its surroundings fit in 1
PAIRS_PER_BLOCK = 2**17  # of a part and a point, evaluated at once; what fits caches is fastest


# Where each measure is drawn from, before the chair is scaled to fit its sphere.
RANGES = {
    "width": (0.85, 1.15), "depth": (0.8, 1.05), "seat_height": (0.55, 0.8),
    "back_height": (0.6, 0.95), "arm_height": (0.3, 0.42), "thickness": (0.14, 0.19),
    "lean": (0.0, 0.25), "roundness": (0.2, 1.0),
}  # fmt: skip


class Chair(namedtuple("Chair", ("style", *RANGES))):
    """What one chair looks like: its style and the measures of `RANGES`, in units of the sphere.

    ``lean`` is the back's angle in radians, 0 upright; ``roundness`` goes from 0 (sharp edges) to
    1 (as round as a part is thick); ``arm_height`` is above the seat, 0 without arms.
    """

    def parts(self) -> Tensor:
        """The parts: [K, 9], columns centre (3), half sizes (3), lean, corner and edge radius."""
        parts = torch.tensor(STYLES[self.style](self))
        corners = _corners(parts)
        # x needs no centring: chairs are symmetric.
        parts[:, 1:3] -= ((corners.amin(0) + corners.amax(0)) / 2)[1:]
        return parts


def draw_chairs(count: int, seed: int = 0) -> list[Chair]:
    """Draw ``count`` chairs; chair i depends on ``seed`` and i only.

    Every style of `STYLES` is equally likely. Chairs are scaled to touch the sphere of radius 0.95.
    """
    if count < 1:
        raise ValueError(f"count should be at least 1 chair, not {count}")
    return [_draw(np.random.default_rng([seed, i])) for i in range(count)]


def _draw(rng: np.random.Generator) -> Chair:
    style = list(STYLES)[rng.integers(len(STYLES))]
    measures = {name: float(rng.uniform(*span)) for name, span in RANGES.items()}
    measures["arm_height"] *= style in ("armchair", "lounge")
    measures["seat_height"] *= 0.7 if style == "lounge" else 1.0
    fit = RADIUS / _corners(Chair(style, **measures).parts()).norm(dim=-1).max().item()
    # Parts are sums and multiples of lengths, so scaling the lengths scales the chair.
    lengths = {n: fit * v for n, v in measures.items() if n not in ("lean", "roundness")}
    return Chair(style, **(measures | lengths))


def chair_parts(chairs: list[Chair]) -> Tensor:
    """The parts of several chairs: [N, K, 9]; chairs of fewer parts repeat their first one."""
    parts = [chair.parts() for chair in chairs]
    most = max(map(len, parts))
    return torch.stack([torch.cat([p, p[:1].expand(most - len(p), -1)]) for p in parts])


def chair_sdf(parts: Tensor, points: Tensor) -> Tensor:
    """Signed distances to N chairs, negative inside.

    Exact outside; inside, where parts overlap, no deeper than the true distance. Never steeper
    than 1: |sdf(a) - sdf(b)| ≤ |a - b|.

    Args:
        parts: [N, K, 9] from `chair_parts`.
        points: [N, S, 3], each chair's own, or [S, 3], the same for all.

    Returns: [N, S].
    """
    points = points.expand(len(parts), *points.shape[-2:])
    blocks = points.split(max(1, PAIRS_PER_BLOCK // parts[..., 0].numel()), dim=1)
    return torch.cat([_slabs(parts, block[:, None]).amin(1) for block in blocks], dim=1)


def _slabs(parts: Tensor, points: Tensor) -> Tensor:
    """Exact distances to parts and their mirror images: [N, K, 9], [N, 1, S, 3] -> [N, K, S].

    A rounded rectangle in x and z, extruded along y, its edges rounded: Quilez's 2D box and
    extrusion (iquilezles.org/articles/distfunctions), both exact.
    """
    cx, cy, cz, hx, hy, hz, lean, corner, edge = parts[..., None].unbind(2)
    x, y, z = points[..., 0].abs() - cx, points[..., 1] - cy, points[..., 2] - cz
    y, z = y * lean.cos() - z * lean.sin(), y * lean.sin() + z * lean.cos()
    inner = edge + corner  # the sharp core is smaller by both roundings
    flat = _corner_distance(x.abs() - (hx - inner), z.abs() - (hz - inner)) - corner
    return _corner_distance(flat, y.abs() - (hy - edge)) - edge


def _corner_distance(a: Tensor, b: Tensor) -> Tensor:
    """Distance to the quadrant a ≤ 0, b ≤ 0."""
    return torch.hypot(a.clamp(min=0), b.clamp(min=0)) + torch.maximum(a, b).clamp(max=0)


def place_in_parts(parts: Tensor, places: Tensor) -> Tensor:
    """Points in the boxes of parts, on the drawn side and not in the mirror image.

    parts [..., 9], places [..., 3] in -1..1 of each part's box -> [..., 3]. The turn here is the
    inverse of the one in `_slabs`.
    """
    x, y, z = (parts[..., 3:6] * places).unbind(-1)
    cos, sin = parts[..., 6].cos(), parts[..., 6].sin()
    return torch.stack([x, y * cos + z * sin, z * cos - y * sin], dim=-1) + parts[..., :3]


def _corners(parts: Tensor) -> Tensor:
    """All corners of the boxes of parts [K, 9]: [8 K, 3]."""
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    return place_in_parts(parts[:, None], signs).flatten(0, 1)


# The styles. Each function lists its parts; the floor is y = 0 and the seat's middle x = z = 0.


def _part(centre, size, lean=0.0, corner=0.0, edge=0.0) -> list[float]:
    """One part from its full sizes; radii larger than the part allows are cut to fit."""
    hx, hy, hz = (length / 2 for length in size)
    edge = min(edge, hx, hy, hz)
    corner = min(corner, hx - edge, hz - edge)
    return [*centre, hx, hy, hz, lean, corner, edge]


def _edge(c: Chair) -> float:
    return c.roundness * c.thickness / 2


def _seat(c: Chair, bottom: float) -> list[float]:
    size = c.width, c.seat_height - bottom, c.depth
    return _part((0, (c.seat_height + bottom) / 2, 0), size, edge=_edge(c))


def _on_back(c: Chair, x: float, width: float, low: float, high: float, thick=1.0) -> list[float]:
    """A piece of the leaning back, from ``low`` to ``high`` along it, measured from the seat."""
    middle, thickness = (low + high) / 2, thick * c.thickness
    y = c.seat_height + middle * math.cos(c.lean)
    z = (thickness - c.depth) / 2 - middle * math.sin(c.lean)
    return _part((x, y, z), (width, high - low, thickness), c.lean, edge=_edge(c))


def _back(c: Chair, thick=1.0) -> list[float]:
    return _on_back(c, 0, c.width, -c.thickness, c.back_height, thick)


def _legs(c: Chair) -> list[list[float]]:
    t, top = c.thickness, c.seat_height - c.thickness / 2  # they end inside the seat
    x, z = (c.width - t) / 2, (c.depth - t) / 2
    return [_part((x, top / 2, s * z), (t, top, t), corner=_edge(c)) for s in (-1, 1)]


def _dining(c: Chair) -> list[list[float]]:
    return [_seat(c, c.seat_height - c.thickness), _back(c), *_legs(c)]


def _ladder(c: Chair) -> list[list[float]]:
    t, b = c.thickness, c.back_height
    upright = _on_back(c, (c.width - t) / 2, t, -t, b)
    rails = [_on_back(c, 0, c.width, high - t, high) for high in (b, 0.55 * b)]
    return [_seat(c, c.seat_height - t), upright, *rails, *_legs(c)]


def _armchair(c: Chair) -> list[list[float]]:
    t, x, reach = c.thickness, (c.width - c.thickness) / 2, c.arm_height * math.sin(c.lean)
    y = c.seat_height + c.arm_height
    rest = _part((x, y - t / 2, -reach / 2), (t, t, c.depth + reach), edge=_edge(c))
    post = _part((x, y - (c.arm_height + t) / 2, c.depth / 2 - t), (t, c.arm_height, t))
    return [*_dining(c), rest, post]


def _pedestal(c: Chair) -> list[list[float]]:
    t, w = c.thickness, c.depth  # round, so as wide as deep
    seat = _part((0, c.seat_height - t / 2, 0), (w, t, w), corner=w, edge=_edge(c))
    # The column reaches into the seat and stays above the floor.
    column = _part((0, c.seat_height / 2, 0), (1.2 * t, c.seat_height - t / 2, 1.2 * t), corner=t)
    base = _part((0, t / 2, 0), (0.8 * w, t, 0.8 * w), corner=w, edge=_edge(c))
    back = _on_back(c, 0, 0.7 * w, -t, 0.7 * c.back_height)
    return [seat, column, base, back]


def _lounge(c: Chair) -> list[list[float]]:
    t, top = 1.3 * c.thickness, c.seat_height + c.arm_height
    arm = _part(((c.width + t) / 2, top / 2, 0), (1.5 * t, top, c.depth), edge=_edge(c))
    return [_seat(c, 0.0), _back(c, thick=1.5), arm]


STYLES = {f.__name__.strip("_"): f for f in (_dining, _ladder, _armchair, _pedestal, _lounge)}
