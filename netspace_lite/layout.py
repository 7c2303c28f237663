"""A net is a row: where each parameter of an architecture lives, and the PRep made of rows.

N nets of one architecture are a matrix ``rows: [N, P]``; row n holds all parameters of net n in
module order. The parameter representation (PRep, paper section III-A) is the same row padded with
zeros and cut into T chunks of L values: ``prep: [N, T, L]``. Both directions are views wherever
strides allow, so a layer's weights are read in place from the decoder's output.
"""

from dataclasses import dataclass
from itertools import accumulate
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_kind
from .folding import statistics
from .kernels import chunk_pack


@dataclass(frozen=True)
class Layout:
    """Names and shapes of an architecture's parameters, in module order.

    Example: ``Layout.of(nn.Linear(2, 3))`` has names ("weight", "bias"), offsets (0, 6), size 9.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, module: nn.Module) -> "Layout":
        """The layout of ``module``'s parameters, tied ones once.

        Raises ValueError if it has none, or of several dtypes.
        """
        parameters = dict(module.named_parameters())
        if not parameters:
            raise ValueError(f"{type(module).__name__} has no parameters: there is nothing to pack")
        kinds = {p.dtype for p in parameters.values()}
        if len(kinds) > 1 or not next(iter(kinds)).is_floating_point:
            raise ValueError(f"{type(module).__name__} has parameters of {kinds}: make them alike")
        return cls(tuple(parameters), tuple(tuple(p.shape) for p in parameters.values()))

    @property
    def sizes(self) -> list[int]:
        """Number of values of each parameter."""
        return [prod(shape) for shape in self.shapes]

    @property
    def offsets(self) -> list[int]:
        """Where each parameter starts in a row."""
        return [0, *accumulate(self.sizes)][:-1]

    @property
    def size(self) -> int:
        """P, the number of parameters of one net."""
        return sum(self.sizes)

    def chunks(self, length: int) -> int:
        """T, the number of chunks of ``length`` values that hold one net."""
        return -(-self.size // length)

    def views(self, rows: Tensor) -> dict[str, Tensor]:
        """Each parameter of all nets as a strided view into ``rows``: name -> [N, *shape]."""
        check_rows(rows, self.size)
        # One split, not a slice each: its backward writes the rows' gradient once.
        parts = zip(self.names, rows.split(self.sizes, dim=1), self.shapes, strict=True)
        return {name: part.view(len(rows), *shape) for name, part, shape in parts}

    def pack(self, nets) -> Tensor:
        """Modules or state dicts of this architecture -> rows [N, P], bit-exact.

        Raises ValueError naming the first net and parameter that is missing or has another shape,
        and if dtypes differ.
        """
        tensors = [self._parameters(n, net) for n, net in enumerate(nets)]
        if not tensors:
            raise ValueError("no nets to pack: give at least one module or state dict")
        if len(kinds := {value.dtype for net in tensors for value in net}) > 1:
            raise ValueError(f"nets to pack have parameters of {kinds}: make them alike")
        return chunk_pack(tensors, 1, self.size).flatten(1)

    def _parameters(self, n: int, net) -> list[Tensor]:
        state = net
        if isinstance(net, nn.Module):
            if statistics(net):
                raise ValueError(f"net {n} has batch norms: call fold_batchnorm(module) first")
            state = dict(net.named_parameters(remove_duplicate=False))
        for name, shape in zip(self.names, self.shapes, strict=True):
            found = tuple(state[name].shape) if name in state else "missing"
            if found != shape:
                raise ValueError(f"net {n}: parameter {name!r} should be {shape}, but is {found}")
        return [state[name].detach() for name in self.names]

    def unpack(self, rows: Tensor) -> list[dict[str, Tensor]]:
        """rows [N, P] -> N state dicts whose tensors are views of ``rows``."""
        return one_by_one(self.views(rows))


def one_by_one(views: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """All nets' tensors [N, ...] by name -> N state dicts."""
    nets = zip(*(view.unbind() for view in views.values()), strict=True)
    return [dict(zip(views, tensors, strict=True)) for tensors in nets]


def invariants(layout: Layout, rows: Tensor) -> Tensor:
    """What of N nets' weights stays the same when hidden units change places: [N, F].

    Of every matrix [units, rest] its singular values and the sorted norms of rows and columns, of
    every vector its sorted values. Inputs and outputs keep their places, so that means over the
    units of the first and the last matrix count, their products with each other, and a last bias:
    units' places count too where the first matrix in a row doesn't read the inputs, or the last one
    doesn't write the outputs. F grows with the square of inputs a unit and of outputs.
    """
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    views = list(layout.views(wide).values())
    matrices = [view.flatten(2) for view in views if view.dim() > 2]
    found = [view.reshape(len(rows), -1).sort(1).values for view in views if view.dim() < 3]
    for m in matrices:
        found += [torch.linalg.svdvals(m), *(m.norm(dim=d).sort(1).values for d in (1, 2))]
    for m in (matrices[0].mT, matrices[-1]) if matrices else ():
        upper = torch.triu_indices(m.shape[1], m.shape[1])
        found += [m.mean(2), (m @ m.mT)[:, *upper]]
    return torch.cat(found + [view for view in views[-1:] if view.dim() == 2], 1).to(rows)


def check_rows(rows: Tensor, size: int) -> None:
    """Raise ValueError unless ``rows`` is a matrix [N, size] of floating values with N > 0."""
    check_kind(Tensor, f"rows are a tensor [N, {size}]", rows)
    matrix = rows.dim() == 2 and rows.shape[1] == size and len(rows) > 0
    if not matrix or not rows.is_floating_point():
        given = f"{list(rows.shape)} of {rows.dtype}"
        raise ValueError(f"rows should be [N, {size}] floats of at least one net, not {given}")


def to_prep(rows: Tensor, chunks: int, length: int) -> Tensor:
    """rows [N, P] -> prep [N, T, L], zero-padded; a view where P == T·L.

    Raises ValueError if T·L values can't hold a row.
    """
    room = chunks * length
    if rows.shape[1] > room:
        raise ValueError(f"{rows.shape[1]} parameters don't fit {chunks} chunks of {length}")
    spare = room - rows.shape[1]
    return (F.pad(rows, (0, spare)) if spare else rows).unflatten(1, (chunks, length))


def from_prep(prep: Tensor, size: int) -> Tensor:
    """prep [N, T, L] -> rows [N, P], the first ``size`` values of each net, as a view."""
    rows = prep.flatten(1)
    if rows.shape[1] < size:
        raise ValueError(f"a PRep of {list(prep.shape[1:])} holds fewer than {size} parameters")
    return rows[:, :size]
