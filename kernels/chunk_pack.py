"""Parameters to PRep and back: prep[n, t, l] = (θ_n[t·L + l] − mean[t, l]) / std[t, l], or 0.

θ_n is the concatenation of net n's parameter tensors in module order; positions past its end are
zero in the PRep and ignored on the way back.

One kernel does both directions, chosen at compile time. It works on *segments*, one for each
parameter tensor of each net, and one for the padding of each net. Pointers:
    table [S, 4]    int64 a segment: address of its first value (0 for padding), where it starts in
                    the PRep, its length, and how many blocks the segments before it take
    prep  [N, T, L] contiguous
    mean, std [T, L] fp32, contiguous

Grid: (total blocks,). One program copies one block of 1,024 values: it finds its segment by
bisection in the table's prefix sums, then gathers (tensors -> PRep) or scatters (PRep -> tensors).
Each direction is the other's backward. Without standardisation every bit is kept; with it the
arithmetic is fp32, rounded after each step as PyTorch's is.

Traffic in bytes: what is read plus what is written, N·P·(s_in + s_out), and the padding written.
"""

import functools
import itertools
import math

import torch

from .backend import tl, triton, use_triton
from .common import shape

BLOCK = 1024
STACKED = [0]  # stands for the tensor counts of the nets where tensors are stacked [N, size]


def chunk_pack(tensors, T, L, mean=None, std=None, dtype=None) -> torch.Tensor:
    """Pack the parameters of N nets into chunks `[N, T, L]`, zero-padded.

    Args:
        tensors: the parameters in module order, in one of three forms: a list over nets of lists
            of tensors (architectures and dtypes may differ); a list of stacked tensors
            `[N, *shape]` (one architecture, typically views of rows); or packed rows `[N, P]`.
        T, L: number and length of the chunks; T·L must hold the largest net.
        mean, std: `[T, L]` fp32 standardisation per position, or None.
        dtype: of the result; None takes the first tensor's.

    Returns:
        prep `[N, T, L]`.

    Raises:
        ValueError: if a net doesn't fit, there are no nets, devices are mixed, dtypes aren't
            floating, or `mean`/`std` have another shape.
    """
    flat, counts = _flatten(tensors)
    _check(flat, counts, T, L, mean, std)
    dtype = dtype or flat[0].dtype
    if not use_triton(flat[0]):
        return _concatenate(flat, counts, T, L, mean, std, dtype)
    return _gather(flat, counts, T, L, mean, std, True, dtype)


def chunk_unpack(prep, shapes, mean=None, std=None):
    """Cut chunks back into parameter tensors: the inverse of `chunk_pack`.

    Args:
        prep: `[N, T, L]`, contiguous within a net.
        shapes: a list over nets of lists of shapes (each a tuple or torch.Size); or one flat list
            of shapes if all nets share an architecture.
        mean, std: `[T, L]`, as given to `chunk_pack`.

    Returns:
        A list over nets of lists of tensors; or, for a flat list of shapes, a list of stacked
        tensors `[N, *shape]`, which without `mean` and `std` are views of `prep`.

    Raises:
        ValueError: if the shapes need more than T·L values or don't match the number of nets.
    """
    _check_unpack(prep, shapes, mean, std)
    stacked = not isinstance(shapes[0], list)
    if not use_triton(prep) or (stacked and mean is None and std is None):
        return chunk_unpack_reference(prep, shapes, mean, std)
    nets = [shapes] if stacked else shapes
    sizes = [math.prod(s) for net in nets for s in net]
    counts = STACKED if stacked else [len(net) for net in nets]
    flat = iter(_scatter(prep, sizes, counts, mean, std, False))
    if stacked:
        return [next(flat).view(prep.shape[0], *s) for s in shapes]
    return [[next(flat).view(s) for s in net] for net in nets]


def chunk_pack_reference(tensors, T, L, mean=None, std=None, dtype=None):
    """`chunk_pack` in PyTorch: one concatenation of all tensors and their padding."""
    flat, counts = _flatten(tensors)
    return _concatenate(flat, counts, T, L, mean, std, dtype or flat[0].dtype)


def _concatenate(flat, counts, T, L, mean, std, dtype):
    scaled = mean is not None or std is not None
    between = torch.promote_types(dtype, torch.float32) if scaled else dtype
    parts = [t if t.dtype == between else t.to(between) for t in flat]
    used = _used(flat, counts)
    if counts == STACKED:
        nets = flat[0].shape[0]
        parts.append(parts[0].new_zeros(1).expand(nets, T * L - used[0]))
        rows, used = torch.cat(parts, dim=1), used * nets
    else:
        zeros, ends = parts[0].new_zeros(T * L - min(used)), list(itertools.accumulate(counts))
        pieces = []
        for count, end, size in zip(counts, ends, used, strict=True):
            pieces += [*parts[end - count : end], zeros[: T * L - size]]
        rows = torch.cat(pieces)
    prep = rows.view(len(used), T, L)
    if not scaled:
        return prep
    prep = prep if mean is None else prep - mean
    prep = prep if std is None else prep / std
    position = torch.arange(T * L, device=prep.device).view(T, L)
    inside = position < torch.tensor(used, device=prep.device).view(-1, 1, 1)
    return torch.where(inside, prep, 0).to(dtype)


def chunk_unpack_reference(prep, shapes, mean=None, std=None):
    """`chunk_unpack` in PyTorch: one split per net, or one for all."""
    dtype = prep.dtype
    prep = prep if std is None else prep * std
    prep = prep if mean is None else prep + mean
    rows = prep.to(dtype).flatten(1)
    if not isinstance(shapes[0], list):
        return _split(rows, shapes, 1, (rows.shape[0],))
    return [_split(row, net, 0, ()) for row, net in zip(rows, shapes, strict=True)]


def _split(row, shapes, dim, lead):
    sizes = [math.prod(shape) for shape in shapes]
    rest = row.shape[dim] - sum(sizes)
    parts = row.split([*sizes, rest], dim)
    return [part.view((*lead, *shape)) for part, shape in zip(parts, shapes, strict=False)]


@triton.jit
def _copy_kernel(
    table, like, prep, mean, std, segments, size,
    GATHER: tl.constexpr, DIVIDE: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_STD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (total blocks,): one block of one segment; `size` is T·L, `like` carries the dtype."""
    block = tl.program_id(0).to(tl.int64)
    low, high = 0, segments
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(table + middle * 4 + 3) <= block
        low, high = tl.where(before, middle, low), tl.where(before, high, middle)
    entry = table + low * 4
    address, start, length = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    offset = (block - tl.load(entry + 3)) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < length
    tensor = address.to(like.dtype) + offset
    if GATHER:
        value = tl.load(tensor, mask=inside & (address != 0), other=0)
    else:
        value = tl.load(prep + start + offset, mask=inside, other=0)
    if HAS_MEAN or HAS_STD:
        value = value.to(tl.float32)
        position = (start + offset) % size
        if HAS_MEAN and GATHER:
            value = value - tl.load(mean + position, mask=inside, other=0)
        if HAS_STD:
            scale = tl.load(std + position, mask=inside, other=1)
            value = tl.div_rn(value, scale) if DIVIDE else value * scale
        if HAS_MEAN and not GATHER:
            value = value + tl.load(mean + position, mask=inside, other=0)
        value = tl.where(address != 0, value, 0.0)  # padding stays zero
    if GATHER:
        tl.store(prep + start + offset, value.to(prep.dtype.element_ty), mask=inside)
    else:
        tl.store(tensor, value.to(like.dtype.element_ty), mask=inside)


def launch(flat, counts, prep, mean, std, gather, divide):
    """Copy between the tensors `flat` and `prep` [N, T, L], one launch for each dtype in `flat`.

    `flat` holds 1-D tensors net after net, `counts` of them a net; or, if `counts` is STACKED,
    tensors [N, size] of all nets.
    """
    nets, size = prep.shape[0], prep.shape[1] * prep.shape[2]
    segments = _segments(flat, counts, nets, size)
    padding = _padding(flat, counts, nets, size)
    for dtype in dict.fromkeys(t.dtype for t in flat):
        parts = [s for s, t in zip(segments, flat, strict=True) if t.dtype == dtype]
        if gather and dtype == flat[0].dtype:
            parts.append(padding)
        part = torch.cat(parts)
        blocks = (part[:, 2] + BLOCK - 1) // BLOCK
        table = torch.cat([part, (blocks.cumsum(0) - blocks)[:, None]], 1).to(prep.device)
        like = next(t for t in flat if t.dtype == dtype)
        _copy_kernel[(int(blocks.sum()),)](
            table, like, prep, prep if mean is None else mean, prep if std is None else std,
            table.shape[0], size, GATHER=gather, DIVIDE=divide, HAS_MEAN=mean is not None,
            HAS_STD=std is not None, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def _segments(flat, counts, nets, size):
    """For each tensor its segments [K, 3]: address, start in the PRep, length."""
    if counts != STACKED:
        starts, at = [], 0
        for net, count in enumerate(counts):
            offset = net * size
            for tensor in flat[at : at + count]:
                starts.append(offset)
                offset += tensor.numel()
            at += count
        rows = zip(flat, starts, strict=True)
        return [torch.tensor([[t.data_ptr(), start, t.numel()]]) for t, start in rows]
    net, offset, out = torch.arange(nets), 0, []
    for t in flat:
        address = t.data_ptr() + net * (t.stride(0) * t.element_size())
        out.append(torch.stack([address, net * size + offset, torch.full_like(net, t.shape[1])], 1))
        offset += t.shape[1]
    return out


def _used(flat, counts):
    """Values of each net: a list, or one number for stacked tensors."""
    if counts == STACKED:
        return [sum(t.shape[1] for t in flat)]
    sizes = iter(t.numel() for t in flat)
    return [sum(next(sizes) for _ in range(count)) for count in counts]


def _padding(flat, counts, nets, size):
    used = torch.tensor(_used(flat, counts)).expand(nets)
    zero = torch.zeros(nets, dtype=torch.int64)
    return torch.stack([zero, torch.arange(nets) * size + used, size - used], 1)


def _empty_prep(flat, counts, T, L, dtype):
    nets = flat[0].shape[0] if counts == STACKED else len(counts)
    return flat[0].new_empty(nets, T, L, dtype=dtype)


def _empty_tensors(prep, sizes, counts):
    lead = (prep.shape[0],) if counts == STACKED else ()
    return [prep.new_empty(*lead, size) for size in sizes]


@torch.library.custom_op("netspace_lite::chunk_gather", mutates_args=())
def _gather(
    flat: list[torch.Tensor], counts: list[int], T: int, L: int,
    mean: torch.Tensor | None, std: torch.Tensor | None, divide: bool, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    prep = _empty_prep(flat, counts, T, L, dtype)
    flat = [t if t.stride(-1) == 1 else t.contiguous() for t in flat]  # expanded gradients, mostly
    launch(flat, counts, prep, mean, std, True, divide)
    return prep


@_gather.register_fake
def _(flat, counts, T, L, mean, std, divide, dtype):
    return _empty_prep(flat, counts, T, L, dtype)


@torch.library.custom_op("netspace_lite::chunk_scatter", mutates_args=())
def _scatter(
    prep: torch.Tensor, sizes: list[int], counts: list[int],
    mean: torch.Tensor | None, std: torch.Tensor | None, divide: bool,
) -> list[torch.Tensor]:  # fmt: skip
    flat = _empty_tensors(prep, sizes, counts)
    launch(flat, counts, prep.contiguous(), mean, std, False, divide)
    return flat


@_scatter.register_fake
def _(prep, sizes, counts, mean, std, divide):
    return _empty_tensors(prep, sizes, counts)


def _gather_context(ctx, inputs, output):
    flat, ctx.counts, _, _, _, ctx.std, ctx.divide, _ = inputs
    ctx.dtypes = [t.dtype for t in flat]
    ctx.sizes = [t.shape[-1] for t in flat]


def _gather_backward(ctx, g):
    g = g.to(functools.reduce(torch.promote_types, ctx.dtypes))
    flat = _scatter(g, ctx.sizes, ctx.counts, None, ctx.std, ctx.divide)
    grads = [t.to(dtype) for t, dtype in zip(flat, ctx.dtypes, strict=True)]
    return grads, None, None, None, None, None, None, None


def _scatter_context(ctx, inputs, output):
    prep, _, ctx.counts, _, ctx.std, ctx.divide = inputs
    ctx.prep_shape, ctx.dtype = prep.shape, prep.dtype


def _scatter_backward(ctx, grads):
    _, T, L = ctx.prep_shape
    g = _gather(list(grads), ctx.counts, T, L, None, ctx.std, ctx.divide, ctx.dtype)
    return g, None, None, None, None, None


_gather.register_autograd(_gather_backward, setup_context=_gather_context)
_scatter.register_autograd(_scatter_backward, setup_context=_scatter_context)


def _flatten(tensors):
    """All tensors as 1-D, net after net, and how many a net has; or stacked ones as [N, size]."""
    tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
    if not tensors or (not isinstance(tensors[0], torch.Tensor) and not all(tensors)):
        raise ValueError(f"chunk_pack: there is nothing to pack in {len(tensors)} nets.")
    if isinstance(tensors[0], torch.Tensor):
        return [t.reshape(t.shape[0], math.prod(t.shape[1:])) for t in tensors], STACKED
    return [t.reshape(-1) for net in tensors for t in net], [len(net) for net in tensors]


def _check(flat, counts, T, L, mean, std):
    if counts == STACKED and (len({t.shape[0] for t in flat}) > 1 or flat[0].shape[0] == 0):
        raise ValueError(
            "chunk_pack: stacked tensors must hold the same number of nets, at least one, got "
            f"{[t.shape[0] for t in flat]}."
        )
    if len({t.device for t in flat}) > 1 or not all(t.is_floating_point() for t in flat):
        kinds = sorted({f"{t.dtype} on {t.device}" for t in flat})
        raise ValueError(f"chunk_pack: tensors must be floating and on one device, got {kinds}.")
    used = max(_used(flat, counts))
    if used > T * L:
        raise ValueError(
            f"chunk_pack: a net of {used} parameters does not fit {T} chunks of {L} values "
            f"({T * L}); use at least {math.ceil(used / L)} chunks."
        )
    _check_scale("chunk_pack", T, L, mean, std)


def _check_unpack(prep, shapes, mean, std):
    if prep.ndim != 3 or prep.numel() == 0 or not prep[0].is_contiguous():
        raise ValueError(
            f"chunk_unpack: prep must be [N, T, L], not empty and contiguous within a net, got "
            f"{shape(prep)} with strides {prep.stride()}."
        )
    nets, T, L = prep.shape
    if not shapes or (isinstance(shapes[0], list) and len(shapes) != nets):
        raise ValueError(
            f"chunk_unpack: got shapes of {len(shapes)} nets for prep {shape(prep)}; give one list "
            "for each net, or one flat list of tuples for all."
        )
    lists = shapes if isinstance(shapes[0], list) else [shapes]
    used = max(sum(math.prod(s) for s in net) for net in lists)
    if used > T * L:
        raise ValueError(
            f"chunk_unpack: the shapes of a net hold {used} values but prep {shape(prep)} has only "
            f"{T * L} for each."
        )
    _check_scale("chunk_unpack", T, L, mean, std)


def _check_scale(op, T, L, mean, std):
    for name, tensor in (("mean", mean), ("std", std)):
        if tensor is not None and (tuple(tensor.shape) != (T, L) or tensor.dtype != torch.float32):
            raise ValueError(
                f"{op}: {name} {shape(tensor)} {tensor.dtype} must be {[T, L]} in torch.float32."
            )
