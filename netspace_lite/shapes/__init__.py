"""Networks that are shapes: chairs by formula, samples of meshes, their nets, scans and meshes."""

# ruff: noqa: F401, I001
from .chairs import RANGES, STYLES, Chair, chair_parts, chair_sdf, draw_chairs
from .meshes import Slider, compare_meshes, draw_meshes, mesh_from_grid, mesh_health
from .meshes import sample_surface, within
from .nets import ScanLoss, ShapeTask, agreement, level_off, meshes, scan, shape_recipes
from .nets import squared_error
from .samples import Samples, Transform, load_deepsdf, load_mesh, normalise_mesh
from .samples import sample_chairs, sample_mesh, winding_number
