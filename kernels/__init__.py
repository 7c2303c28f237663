"""Triton kernels and their PyTorch references, one operation a file."""

from .backend import backend
from .batched_conv2d import batched_conv2d
from .batched_linear import batched_linear
from .chunk_pack import chunk_pack, chunk_unpack
from .distillation_loss import distillation_loss
from .siren_mlp import siren_mlp

__all__ = [
    "backend",
    "batched_conv2d",
    "batched_linear",
    "chunk_pack",
    "chunk_unpack",
    "distillation_loss",
    "siren_mlp",
]
