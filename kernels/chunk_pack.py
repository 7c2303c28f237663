"""Parameters to PRep and back: prep[n, t, l] = (θ_n[t·L + l] − mean[t, l]) / std[t, l], or 0.

θ_n is the concatenation of net n's parameter tensors in module order; positions past its end are
zero in the PRep and ignored on the way back.
"""

import math

import torch


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
    return chunk_pack_reference(tensors, T, L, mean, std, dtype)


def chunk_unpack(prep, shapes, mean=None, std=None):
    """Cut chunks back into parameter tensors: the inverse of `chunk_pack`.

    Args:
        prep: `[N, T, L]`.
        shapes: a list over nets of lists of shapes; or one flat list of shapes if all nets share
            an architecture.
        mean, std: `[T, L]`, as given to `chunk_pack`.

    Returns:
        A list over nets of lists of tensors; or, for a flat list of shapes, a list of stacked
        tensors `[N, *shape]`, which without `mean` and `std` are views of `prep`.

    Raises:
        ValueError: if the shapes need more than T·L values or don't match the number of nets.
    """
    return chunk_unpack_reference(prep, shapes, mean, std)


def chunk_pack_reference(tensors, T, L, mean=None, std=None, dtype=None):
    """`chunk_pack` in PyTorch: one concatenation of all tensors and their padding."""
    if isinstance(tensors, torch.Tensor):
        tensors = [tensors]
    if isinstance(tensors[0], torch.Tensor):  # stacked: [N, *shape] each
        dtype = dtype or tensors[0].dtype
        rows = torch.cat([t.reshape(t.shape[0], -1).to(dtype) for t in tensors], dim=1)
        used = rows.shape[1]
        rows = torch.nn.functional.pad(rows, (0, T * L - used))
        sizes = [used] * rows.shape[0]
    else:
        dtype = dtype or tensors[0][0].dtype
        sizes = [sum(t.numel() for t in net) for net in tensors]
        parts = []
        for net, used in zip(tensors, sizes, strict=True):
            parts += [t.reshape(-1).to(dtype) for t in net]
            parts.append(net[0].new_zeros(T * L - used, dtype=dtype))
        rows = torch.cat(parts)
    prep = rows.view(len(sizes), T, L)
    if mean is None and std is None:
        return prep
    prep = prep if mean is None else prep - mean
    prep = prep if std is None else prep / std
    position = torch.arange(T * L, device=prep.device).view(T, L)
    inside = position < torch.tensor(sizes, device=prep.device).view(-1, 1, 1)
    return torch.where(inside, prep, 0).to(dtype)


def chunk_unpack_reference(prep, shapes, mean=None, std=None):
    """`chunk_unpack` in PyTorch: one split per net, or one for all."""
    dtype = prep.dtype
    prep = prep if std is None else prep * std
    prep = prep if mean is None else prep + mean
    rows = prep.to(dtype).reshape(prep.shape[0], -1)
    if not shapes or not isinstance(shapes[0], list):
        return _split(rows, shapes, 1, (rows.shape[0],))
    return [_split(row, net, 0, ()) for row, net in zip(rows, shapes, strict=True)]


def _split(row, shapes, dim, lead):
    sizes = [math.prod(shape) for shape in shapes]
    rest = row.shape[dim] - sum(sizes)
    parts = row.split([*sizes, rest], dim)
    return [part.view(*lead, *shape) for part, shape in zip(parts, shapes, strict=False)]
