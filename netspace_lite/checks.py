"""What functions say of arguments that they can't take: the same sentences everywhere."""

import operator

import numpy as np
import torch
from torch import Tensor

PICKS = (int, np.generic, np.ndarray, slice, range, list, tuple, Tensor)  # what indexes samples


def check_kind(kinds, wanted: str, *given):
    """The first of those given; ValueError saying what is wanted unless all are of the kinds."""
    for one in given:
        if not isinstance(one, kinds):
            kind = one.__name__ if isinstance(one, type) else f"a {type(one).__name__}"
            raise ValueError(f"{wanted}, not {kind}")
    return given[0] if given else None


def shape_of(given) -> list[int] | str:
    """The shape of a tensor, what kind of thing anything else is."""
    return list(given.shape) if isinstance(given, Tensor) else f"a {type(given).__name__}"


def whole(given, what: str) -> int:
    """A whole number, NumPy's too, as Python's; ValueError for any other."""
    try:
        return operator.index(given)
    except TypeError:
        raise ValueError(f"{what} should be a whole number, not {given!r}") from None


def check_pick(index):
    """An index of samples or nets; ValueError for anything else, of which PyTorch makes its own.

    It takes a net for a sequence of sequences without an end.
    """
    parts = index if isinstance(index, list | tuple) else ()
    if isinstance(index.item() if getattr(index, "ndim", 1) == 0 else index, bool):
        raise ValueError(f"an index is whole numbers or a mask, not a single {index!r}")
    for one in (index, *parts):  # PyTorch would cut an array's numbers to whole ones
        if isinstance(one, np.ndarray | np.generic) and one.dtype.kind not in "biu":
            raise ValueError(f"an index is whole numbers or a mask, not {one.dtype}")
    return check_kind(PICKS, "an index is a number, a slice, a mask or a list", index, *parts)


def finite(values: Tensor) -> Tensor:
    """Which of values [..., M] have no NaN and no infinity among their M, without a copy: [...]."""
    if values.shape[-1] == 0:
        return torch.ones(values.shape[:-1], dtype=torch.bool, device=values.device)
    low, high = values.aminmax(dim=-1)  # of NaN they are NaN
    return low.isfinite() & high.isfinite()


def check_finite(values: Tensor, what: str = "nets") -> None:
    """Raise ValueError naming those of N, [N, ...], with NaN or infinity: they would spoil all."""
    values = values.detach().flatten(1) if values.dim() > 1 else values.detach()[..., None]
    if bad := (~finite(values)).nonzero()[:, 0].tolist():
        bad = bad if len(bad) <= 50 else f"{bad[:50]} and {len(bad) - 50} more"
        raise ValueError(f"{what} {bad} are not finite: leave them out, by zoo[mask] or a list")
