"""The space of deep models, small enough to read in an evening.

What notebooks and users type most; everything else is imported from its module.
"""

from .architectures import LeNetLike, ResNet, Siren, VanillaCNN, architecture, lite_net, paper_net
from .data import load_cifar10, load_digits, load_images
from .explore import interpolate, optimise, weight_line
from .functional import Batched, Nets
from .layout import Layout, from_prep, to_prep
from .metrics import compare, scores
from .space import NetSpace, SpaceConfig
from .training import InstanceDistillation, fit, refine
from .zoo import ImageTask, Recipe, Zoo, draw_recipes, train_zoo

__all__ = [
    "Batched",
    "ImageTask",
    "InstanceDistillation",
    "Layout",
    "LeNetLike",
    "NetSpace",
    "Nets",
    "Recipe",
    "ResNet",
    "Siren",
    "SpaceConfig",
    "VanillaCNN",
    "Zoo",
    "architecture",
    "compare",
    "draw_recipes",
    "fit",
    "from_prep",
    "interpolate",
    "lite_net",
    "load_cifar10",
    "load_digits",
    "load_images",
    "optimise",
    "paper_net",
    "refine",
    "scores",
    "to_prep",
    "train_zoo",
    "weight_line",
]
