"""Meshes of signed distance nets: extract, compare, draw and export them.

A mesh is a `trimesh.Trimesh`; `mesh.export("chair.ply")` (or ``.obj``) writes it. Where a net has
no surface there is no mesh, and None stands in its place.
"""

import base64
import io

import matplotlib.pyplot as plt
import numpy as np
import torch
import trimesh
from matplotlib.collections import PolyCollection
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation
from skimage.measure import marching_cubes
from torch import Tensor

MAX_FACES = 60_000  # drawn as polygons; a mesh of more is made coarser first


@torch.no_grad()
def mesh_from_grid(evaluate, resolution: int = 64, block: int = 2**10, device="cpu") -> list:
    """Marching cubes on the zero level of N signed distance functions at once.

    Args:
        evaluate: points [B, 3] -> signed distances [N, B] of N shapes, negative inside.
        resolution: grid points along each edge of the cube -1..1, at least 4.
        block: B, the points evaluated at once: bounds memory, and about a thousand fits caches.
        device: where ``evaluate`` wants its points.

    Returns: N meshes, None where a shape has no surface. Only what lies in the unit ball counts,
    where the nets were trained: a solid that leaves it is cut there, so every mesh is closed.

    Raises ValueError if ``evaluate`` gives another shape than [N, B], NaN or infinite values.
    """
    if resolution < 4:
        raise ValueError(f"resolution should be at least 4 grid points, not {resolution}")
    points = torch.cartesian_prod(*[torch.linspace(-1, 1, resolution)] * 3)
    values = torch.cat([evaluate(x).float().cpu() for x in points.to(device).split(block)], dim=-1)
    if values.ndim != 2 or values.shape[1] != len(points):
        raise ValueError(f"evaluate should give [N, B] distances: {list(values.shape)} on the grid")
    if not values.isfinite().all():
        raise ValueError("evaluate gave NaN or infinite distances; the net diverged in training")
    # A grid point exactly on the surface would make faces without area; move it a little outside.
    values = values.masked_fill_(values.abs() < 1e-6, 1e-6)
    # 0.999: the ball itself touches the grid's border, where a cut could not be closed.
    values = torch.maximum(values, points.norm(dim=1) - 0.999)
    return [_extract(v.reshape((resolution,) * 3).numpy()) for v in values]


def _extract(values: np.ndarray) -> trimesh.Trimesh | None:
    if values.min() >= 0:
        return None
    vertices, faces, *_ = marching_cubes(values, 0.0, gradient_direction="descent")
    return trimesh.Trimesh(vertices.astype(float) * (2 / (len(values) - 1)) - 1, faces)


def within(predicted: Tensor, target: Tensor, tolerance: float = 0.01) -> Tensor:
    """Share in 0..1 of points whose two distances differ by at most ``tolerance``.

    [..., B] -> [...]. The paper's measure of how well a decoded shape net answers like its target.
    """
    if predicted.shape[-1] != target.shape[-1]:
        given = f"{[*predicted.shape]} and {[*target.shape]}"
        raise ValueError(f"distances are of as many points, [..., B], not {given}")
    return ((predicted - target).abs() <= tolerance).float().mean(-1)


def compare_meshes(a, b, samples: int = 10_000, seed: int = 0) -> dict[str, float]:
    """How far apart two surfaces are.

    With A and B points drawn evenly, ``samples`` to ask from and ten times as many to find:

    - ``chamfer`` = ½ mean over A of the distance to the nearest of B + ½ the same from B to A.
      Two draws from one surface give about ½ sqrt(area / (10 samples)), not 0.
    - ``normal_consistency`` = the same mean of the cosine between normals of nearest points; 1 is
      best, 0.5 the mean for unrelated surfaces. Absolute value, so orientation does not count.

    Raises ValueError for a mesh that is None or has no faces.
    """
    if not (_has_surface(a) and _has_surface(b)):
        raise ValueError("compare_meshes needs two meshes with faces; count shapes without apart")
    a, b = (sample_surface(mesh, 11 * samples, seed + i) for i, mesh in enumerate((a, b)))
    chamfer, cosine = np.mean([_directed(a, b, samples), _directed(b, a, samples)], axis=0)
    return {"chamfer": float(chamfer), "normal_consistency": float(cosine)}


def _directed(source, target, samples: int) -> tuple[float, float]:
    """Mean distance and cosine from the first points of ``source`` to the rest of ``target``."""
    points, normals = (array[:samples] for array in source)
    found_points, found_normals = (array[samples:] for array in target)
    distance, nearest = cKDTree(found_points).query(points)
    return distance.mean(), np.abs((normals * found_normals[nearest]).sum(1)).mean()


def sample_surface(mesh, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """``count`` points drawn evenly on the surface, and their normals: two arrays [count, 3]."""
    points, faces = trimesh.sample.sample_surface(mesh, count, seed=seed)
    return np.asarray(points), mesh.face_normals[faces]


def _has_surface(mesh) -> bool:
    return mesh is not None and len(mesh.faces) > 0


def mesh_health(mesh) -> dict:
    """``exists``, ``watertight`` and the number of ``components`` of a mesh (None: no surface)."""
    if not _has_surface(mesh):
        return {"exists": False, "watertight": False, "components": 0}
    return {"exists": True, "watertight": mesh.is_watertight, "components": mesh.body_count}


def draw_meshes(meshes, titles=None, columns=None, color="#5b8db8", size=2.0, turn=35.0, tilt=22.0):
    """Draw meshes side by side, all from one camera under one light; returns the figure.

    Args:
        meshes: list of meshes in the unit sphere, y up, z to the front; None leaves an empty place.
        titles: a text for each, or none.
        columns: how many to a row; all in one row if not given.
        color: one for all, or a list with one for each, where one may be a color a face, [F, 3].
        size: inches a mesh.
        turn, tilt: the camera's degrees about the y axis and above the floor.
    """
    columns, titles = columns or len(meshes), titles or [""] * len(meshes)
    rows = -(-len(meshes) // columns)
    colors = [color] * len(meshes) if isinstance(color, str) else color
    if not len(titles) == len(colors) == len(meshes):
        raise ValueError(f"{len(meshes)} meshes but {len(titles)} titles and {len(colors)} colors")
    shape = columns * size, rows * (size + 0.25 * any(titles))
    figure = plt.figure(figsize=shape, layout="constrained")
    # Rows are the directions right, up and towards the viewer.
    camera = Rotation.from_euler("yx", [-turn, tilt], degrees=True).as_matrix()
    for n, (mesh, title, one_color) in enumerate(zip(meshes, titles, colors, strict=True)):
        axis = figure.add_subplot(rows, columns, n + 1, xlim=(-1, 1), ylim=(-1, 1), aspect="equal")
        axis.set_title(title, fontsize=9)
        axis.axis("off")
        if _has_surface(mesh):
            _draw(axis, mesh, one_color, camera)
        else:
            axis.text(0, 0, "no surface", ha="center", color="grey")
    return figure


def _draw(axis, mesh, color, camera):
    """Painter's algorithm: faces seen from the front, farthest first, in Lambert shades."""
    rgb = np.broadcast_to(plt.matplotlib.colors.to_rgba_array(color)[:, :3], mesh.faces.shape)
    if len(mesh.faces) > MAX_FACES:  # vertices up to 0.025 apart become one: enough to draw
        mesh = mesh.copy().apply_scale(0.4)
        mesh.merge_vertices(merge_norm=True, digits_vertex=2)
        mesh.update_faces(kept := mesh.nondegenerate_faces())
        mesh, rgb = mesh.apply_scale(2.5), rgb[kept]
    light = np.array([-0.1, 0.9, 0.42])  # a unit vector: from above, in front, a little left
    height = (mesh.vertices[:, 1:2] - mesh.bounds[0, 1]) / light[1]
    shadow = (mesh.vertices - height * light) @ camera.T  # slid along the light to the floor
    _fill(axis, shadow[mesh.faces[mesh.face_normals @ light > 0]], np.full((1, 3), 0.88))

    corners = (mesh.vertices @ camera.T)[mesh.faces]  # [F, 3, 3]
    front = np.flatnonzero(mesh.face_normals @ camera[2] > 0)
    front = front[np.argsort(corners[front, :, 2].mean(1))]
    shade = 0.4 + 0.75 * (mesh.vertex_normals[mesh.faces[front]].mean(1) @ light).clip(0)
    _fill(axis, corners[front], (shade[:, None] * rgb[front]).clip(0, 1))


def _fill(axis, faces, colors):
    # Antialiased neighbours let what lies behind them shine through a hairline: leave it off.
    style = {"facecolors": colors, "antialiaseds": False, "rasterized": True}
    axis.add_collection(PolyCollection(faces[..., :2], **style))


class Slider:
    """Pictures one at a time with a slider below: rich display in Jupyter, no kernel needed.

    The pictures are part of the page. Where a viewer shows no interactive output, draw the same
    meshes side by side with `draw_meshes`.
    """

    def __init__(self, figures):
        self.pictures = []
        for figure in figures:
            figure.savefig(buffer := io.BytesIO(), format="png")
            plt.close(figure)
            picture = base64.b64encode(buffer.getvalue()).decode()
            self.pictures.append(f"data:image/png;base64,{picture}")

    def _repr_html_(self) -> str:
        slider = f'type="range" min="0" max="{len(self.pictures) - 1}" value="0" aria-label="step"'
        show = f"this.previousElementSibling.src = {self.pictures}[this.value]"
        return (
            f'<div><img alt="the chosen step" style="display:block" src="{self.pictures[0]}">'
            f'<input {slider} style="width:320px" oninput="{show}"></div>'
        )
