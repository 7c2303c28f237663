"""Triton kernels and their PyTorch references.

The operations are registered with `torch.library.custom_op`, so that autograd and `torch.compile`
see one node each; calls that nothing traces go round that, as its wrapping takes Python longer than
a launch. `triton_op`, which would let the compiler look inside, runs eagerly in Triton's
interpreter but not under `torch.compile` there, so what runs everywhere was kept.

    backend.py            which implementation runs
    common.py  tiles.py   what ops share on the host, and what their kernels share
    batched_linear.py     batched_conv2d.py       layer.py    the kernels of both
    net.py     plan.py    a whole small net in one kernel
    chunk_pack.py         siren_mlp.py            distillation_loss.py
    cpu.py                the fast convolution on a CPU
    aot.py  trace.py  roofline.py  bench.py    compile, watch, model and time the kernels
"""

# ruff: noqa: F401
from .backend import backend
from .batched_conv2d import batched_conv2d
from .batched_linear import batched_linear
from .chunk_pack import chunk_pack, chunk_unpack
from .distillation_loss import distillation_loss
from .siren_mlp import siren_mlp

__all__ = [name for name, op in globals().items() if callable(op)]
