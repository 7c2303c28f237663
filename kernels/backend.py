"""Which implementation runs: the Triton kernels, or the PyTorch references.

`auto` (the default) takes Triton for CUDA tensors and PyTorch for all others. The environment
variable `NETSPACE_BACKEND` overrides the default, and `with backend("torch"):` overrides both.

The kernels add in fp32, so fp64 tensors are PyTorch's: `auto` gives them to the references, on a
GPU too, and asking for "triton" with them is an error, not a silent loss of digits.
"""

import os
from contextlib import contextmanager
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton is published for Linux; elsewhere the PyTorch references do the work
    # so that files import anywhere
    triton = tl = SimpleNamespace(jit=lambda *fn, **how: fn[0] if fn else triton.jit, constexpr=int)

HAS_TRITON = hasattr(triton, "compile")
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
NAMES = ("auto", "torch", "triton")

_chosen: str | None = None  # a plain global: torch.compile can follow and guard it


@contextmanager
def backend(name: str):
    """Choose the backend of every op called inside the `with` block, in all threads.

    Args:
        name: "auto" (Triton for CUDA tensors, else PyTorch), "torch" or "triton".

    Raises:
        ValueError: for any other name.

    Example:
        >>> with backend("torch"):
        ...     y = batched_linear(x, weight, bias)
    """
    global _chosen
    before, _chosen = _chosen, _valid(name, "backend")
    try:
        yield
    finally:
        _chosen = before


def current_backend() -> str:
    """The backend in force here: the innermost `backend(...)`, `NETSPACE_BACKEND`, or "auto"."""
    return _chosen or _valid(os.environ.get("NETSPACE_BACKEND", "auto"), "NETSPACE_BACKEND")


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether an op on `tensor` should launch its Triton kernel.

    Raises:
        RuntimeError: if "triton" was asked for and cannot run: not installed, or a CPU tensor
            outside Triton's interpreter, or a tensor of fp64.
    """
    if torch.autograd.forward_ad._current_level >= 0:  # the ops have no forward derivative
        return False
    name, double = current_backend(), tensor.dtype == torch.float64
    if name == "torch" or (name == "auto" and (double or not (tensor.is_cuda and HAS_TRITON))):
        return False
    if HAS_TRITON and not double and (tensor.is_cuda or INTERPRETED):
        return True
    move = "Move it to a CUDA device, or set TRITON_INTERPRET=1 before Python starts to run"
    wrong = f"for a tensor on {tensor.device}. {move} the kernels in Triton's interpreter."
    if double:
        wrong = 'for fp64, but the kernels add in fp32. Use backend("auto") or backend("torch").'
    elif not HAS_TRITON:
        wrong = "but the triton package isn't installed."
    raise RuntimeError(f"The triton backend was chosen {wrong}")


def _valid(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(NAMES)}, not {name!r}.")
    return name
