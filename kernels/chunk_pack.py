"""Parameters to PRep and back: prep[n, t, l] = (θ_n[t·L + l] − mean[t, l]) / std[t, l], or 0.

θ_n is the concatenation of net n's parameter tensors in module order; positions past its end are
zero in the PRep and ignored on the way back.

Packing is a copy, one `torch.cat`, and unpacking gives views: neither has a kernel. Standardisation
has one, which does either direction, chosen at compile time, in one pass instead of four. Pointers:
    x, out    [N, T·L]  contiguous
    mean, std [T·L]     fp32, contiguous, or None
    used      [N]       int64, how many values of a net are parameters; None to unpack

Grid: (N·⌈T·L/1024⌉,). One program does 1,024 values of one net. Packing divides and unpacking
multiplies, in fp32, rounded after each step as PyTorch's is. Each direction's gradient is the same
kernel again without the mean.

Traffic at its least, in bytes for values of s bytes: 2·s·N·T·L, read and written once.
"""

import math

import torch
from torch import Tensor

from .backend import backend, tl, triton, use_triton
from .common import cdiv, check, register
from .tiles import place, put, take

BLOCK = 1024


def chunk_pack(tensors, T, L, mean=None, std=None, dtype=None) -> torch.Tensor:
    """Pack the parameters of N nets into chunks `[N, T, L]`, zero-padded.

    Args:
        tensors: the parameters in module order, in one of three forms: a list over nets of lists
            of tensors (architectures and dtypes may differ); a list of stacked tensors
            `[N, *shape]` (one architecture, typically views of rows); or packed rows `[N, P]`.
        T, L: number and length of the chunks; T·L must hold the largest net.
        mean, std: `[T, L]` standardisation per position, of any strides, or None; fp32, or fp64
            if all is.
        dtype: of the result; None takes the first tensor's.

    Returns:
        prep `[N, T, L]`.

    Raises:
        ValueError: if a net doesn't fit, there are no nets, devices are mixed, dtypes aren't
            floating, or `mean`/`std` have another shape or lie on another device.
    """
    nets = _flatten(tensors)
    flat, used = [t for net in nets for t in net], [sum(t.shape[-1] for t in net) for net in nets]
    if len({t.device for t in flat}) > 1 or not all(t.is_floating_point() for t in flat):
        kinds = sorted({f"{t.dtype} on {t.device}" for t in flat})
        raise ValueError(f"chunk_pack: tensors must be floating and on one device, got {kinds}.")
    _check_fits("chunk_pack", max(used), T, L)
    dtype, scaled = dtype or flat[0].dtype, mean is not None or std is not None
    between = torch.promote_types(dtype, torch.float32) if scaled else dtype
    zeros = flat[0].new_zeros(()).expand(*flat[0].shape[:-1], T * L - min(used))
    padded = [(*net, zeros[..., : T * L - size]) for net, size in zip(nets, used, strict=True)]
    pieces = [t if t.dtype == between else t.to(between) for net in padded for t in net]
    prep = torch.cat(pieces, -1).view(-1, T, L)
    return _standardise("chunk_pack", prep, used, mean, std, dtype)


def chunk_unpack(prep, shapes, mean=None, std=None):
    """Cut chunks back into parameter tensors: the inverse of `chunk_pack`.

    Args:
        prep: `[N, T, L]`, contiguous within a net.
        shapes: a list over nets of lists of shapes (each a tuple or torch.Size); or one flat list
            of shapes if all nets share an architecture.
        mean, std: `[T, L]`, as given to `chunk_pack`.

    Returns:
        A list over nets of lists of tensors; or, for a flat list of shapes, a list of stacked
        tensors `[N, *shape]`. Without `mean` and `std` all are views of `prep`.

    Raises:
        ValueError: if the shapes need more than T·L values or don't match the number of nets, or
            `mean`/`std` have another shape or lie on another device.
    """
    check("chunk_unpack", {"prep": (prep, "NTL")}, rows=("prep",))
    one_a_net = bool(shapes) and isinstance(shapes[0], list)
    if not shapes or (one_a_net and len(shapes) != len(prep)):
        given = f"got shapes of {len(shapes)} nets for prep {list(prep.shape)}"
        wanted = "give one list for each net, or one flat list of tuples for all"
        raise ValueError(f"chunk_unpack: {given}; {wanted}.")
    used = [sum(map(math.prod, net)) for net in (shapes if one_a_net else [shapes])]
    _check_fits("chunk_unpack", max(used), *prep.shape[1:])
    rows = _standardise("chunk_unpack", prep, None, mean, std, prep.dtype).flatten(1)
    if one_a_net:
        return [_split(row, net) for row, net in zip(rows, shapes, strict=True)]
    return _split(rows, shapes)


# The same without the kernel, for any dtype: what the kernel is held against.
chunk_pack_reference = backend("torch")(chunk_pack)
chunk_unpack_reference = backend("torch")(chunk_unpack)


def _standardise(op, prep, used, mean, std, dtype):
    """Standardise nets with `used` values, a list for each or of one for all; undo it for None."""
    if mean is None and std is None:
        return prep
    wide = all(t is None or t.dtype == torch.float64 for t in (prep, mean, std))  # has no kernel
    kind = prep.device, torch.float64 if wide else torch.float32
    check(op, {"mean": (mean, "TL"), "std": (std, "TL")}, kind, T=prep.shape[1], L=prep.shape[2])
    if used is not None and len(used) == 1:
        used = torch.full((len(prep),), used[0], device=prep.device)  # a fill: no copy to wait for
    elif used is not None:
        used = torch.tensor(used, device=prep.device)
    learned = any(t is not None and t.requires_grad for t in (mean, std))  # no kernel, either
    scale = _scale if use_triton(prep) and not (wide or learned) else _standardise_reference
    return scale(prep, used, mean, std, dtype)


def _standardise_reference(prep, used, mean, std, dtype):
    shift, scale = 0 if mean is None else mean, 1 if std is None else std
    if used is None:
        return (prep * scale + shift).to(dtype)
    prep = (prep - shift) / scale
    position = torch.arange(prep[0].numel(), device=prep.device).view(prep.shape[1:])
    return torch.where(position < used.view(-1, 1, 1), prep, 0).to(dtype)


def _split(row, shapes):
    """Views of these shapes into [..., T·L], whose last values may be left over."""
    sizes = [math.prod(shape) for shape in shapes]
    parts = row.split([*sizes, row.shape[-1] - sum(sizes)], -1)
    return [p.view((*row.shape[:-1], *s)) for p, s in zip(parts, shapes, strict=False)]


@triton.jit
def _scale_kernel(x, out, mean, std, used, size, BLOCK: tl.constexpr):
    """Grid (N·⌈size/BLOCK⌉,): one block of one net; `size` is T·L."""
    n, _, at = place(1, size, 1, BLOCK)
    n = n.to(tl.int64)
    value = take(x + n * size + at, at < size)
    shift = 0.0 if mean is None else take(mean + at, at < size)
    scale = 1.0 if std is None else tl.load(std + at, mask=at < size, other=1)
    if used is not None:
        value = tl.div_rn(value - shift, scale)
        value = tl.where(at < tl.load(used + n), value, 0.0)  # padding stays zero
    else:
        value = value * scale + shift
    put(out + n * size + at, value, at < size)


def _empty(prep, used, mean, std, dtype):
    return prep.new_empty(prep.shape, dtype=dtype)


def launch(
    prep: Tensor, used: Tensor | None, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Standardise the chunks [N, T, L] in one pass, or undo it where `used` is None."""
    out, size = _empty(prep, used, mean, std, dtype), prep[0].numel()
    prep, mean, std = (t if t is None else t.contiguous() for t in (prep, mean, std))
    grid, how = (len(prep) * cdiv(size, BLOCK),), {"BLOCK": BLOCK, "enable_fp_fusion": False}
    _scale_kernel[grid](prep, out, mean, std, used, size, **how)
    return out


_scale, _ = register("chunk_scale", launch, _empty)


def _context(ctx, inputs, output):
    prep, ctx.used, _, ctx.std, _ = inputs
    ctx.dtype = prep.dtype


def _backward(ctx, g):  # the same op again, so differentiable as often as one likes
    return _scale(g, ctx.used, None, ctx.std, ctx.dtype), None, None, None, None


_scale.register_autograd(_backward, setup_context=_context)


def _flatten(tensors):
    """Lists of tensors: one of stacked ones, as [N, size], or one for each net, as [size]."""
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    stacked = bool(tensors) and isinstance(tensors[0], Tensor)
    if not tensors or not (stacked or all(tensors)):
        raise ValueError(f"chunk_pack: there is nothing to pack in {len(tensors)} nets.")
    if not stacked:
        return [[t.reshape(-1) for t in net] for net in tensors]
    nets = [len(t) for t in tensors]
    if len(set(nets)) > 1 or nets[0] == 0:
        same = "stacked tensors must hold the same number of nets, at least one"
        raise ValueError(f"chunk_pack: {same}, got {nets}.")
    return [[t.reshape(len(t), -1) for t in tensors]]


def _check_fits(op, used, T, L):
    if used > T * L:
        small = f"a net of {used} parameters does not fit {T} chunks of {L} values ({T * L})"
        raise ValueError(f"{op}: {small}; use at least {math.ceil(used / L)} chunks.")
