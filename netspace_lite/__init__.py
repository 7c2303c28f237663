"""The space of deep models, small enough to read in an evening.

Everything notebooks and users type lives here; `netspace_lite.shapes` has what is particular to
nets that are shapes, `netspace_lite.tutorial` what the notebooks share, `netspace_lite.kernels` the
operations underneath.
"""

# ruff: noqa: F401, I001
from types import ModuleType as _Module

from .architectures import (
    LeNetLike, ResNet, Sine, Siren, VanillaCNN, architecture, lite_net, name_of, paper_net,
)  # fmt: skip
from .batching import Batched
from .data import ImageData, Images, blends, few_shot, load_cifar10, load_digits, load_images
from .described import DescribedDecoder, DescribedDistillation, Largest, describe_layers
from .explore import (
    Descent, Gaussian, ImageLoss, LikenessLoss, Search, interpolate, optimise, optimise_weights,
    refine, sample, weight_line,
)  # fmt: skip
from .fingerprint import fingerprint
from .folding import Affine, fold_batchnorm
from .layout import Layout, from_prep, invariants, to_prep
from .metrics import (
    averages, compare, disagreement, line_drop, mean_net, nearest_by_answers, nearest_by_weights,
    noisy_nets, novelty, pca_nets, r_squared, readout, scores,
)  # fmt: skip
from .nets import MixedNets, Nets
from .optimiser import Muon
from .space import NetSpace, SpaceConfig, logit_scale
from .training import (
    ArchitectureClassification, Distillation, Interpolation, MixedZoo, TeacherDistillation,
    combine, fit, kl_divergence, squared_error,
)  # fmt: skip
from .zoo import ImageTask, Recipe, Task, Zoo, draw_recipes
from .zoo_training import fine_tune, initial_rows, train_nets, train_zoo

__all__ = [n for n, v in globals().items() if n[0] != "_" and not isinstance(v, _Module)]
