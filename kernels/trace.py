"""What each program of a kernel loads, stores and multiplies, seen in Triton's interpreter.

with traced() as programs:
    batched_linear(...)          # under backend("triton") and TRITON_INTERPRET=1
programs[0].loaded_bytes, programs[0].stored, programs[0].products
"""

from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import numpy as np

from .backend import INTERPRETED


@dataclass
class Program:
    """One program of a launch: where it stands in the grid, and what it did.

    `loads` and `stores` hold, for each instruction, the byte addresses of its unmasked values and
    the bytes of a value; `products` counts 2·M·N·K for each tile product.
    """

    index: tuple[int, int, int]
    loads: list[tuple[np.ndarray, int]] = field(default_factory=list)
    stores: list[tuple[np.ndarray, int]] = field(default_factory=list)
    products: int = 0

    @property
    def loaded_bytes(self) -> int:
        """Bytes asked for by loads; a value asked for twice counts twice."""
        return sum(len(addresses) * size for addresses, size in self.loads)

    @property
    def stored_bytes(self) -> int:
        """Bytes written by stores."""
        return sum(len(addresses) * size for addresses, size in self.stores)

    def touched(self, tensor) -> np.ndarray:
        """Positions in `tensor`'s memory (in values from its first) that this program stored to."""
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.untyped_storage().nbytes()
        found = [a for a, _ in self.stores if len(a) and first <= a.min() and a.max() < last]
        at = np.concatenate(found) if found else np.zeros(0, dtype=np.int64)
        return np.unique((at - first) // tensor.element_size())


@contextmanager
def traced():
    """Collect a `Program` for each program that runs inside the block, in order.

    Raises:
        RuntimeError: outside Triton's interpreter.
    """
    if not INTERPRETED:
        raise RuntimeError("Programs are traced in the interpreter: set TRITON_INTERPRET=1 first.")
    from triton.runtime.interpreter import interpreter_builder as builder

    programs: list[Program] = []
    load, store = builder.create_masked_load, builder.create_masked_store
    begin, dot = builder.set_grid_idx, builder.create_dot

    def seen(pointers, mask):
        at = np.atleast_1d(pointers.data)[np.atleast_1d(mask.data).astype(bool)].astype(np.int64)
        return at, max(8, pointers.get_element_ty().primitive_bitwidth) // 8

    def traced_begin(x, y, z):
        programs.append(Program((x, y, z)))
        return begin(x, y, z)

    def traced_load(pointers, mask, *args):
        programs[-1].loads.append(seen(pointers, mask))
        return load(pointers, mask, *args)

    def traced_store(pointers, value, mask, *args):
        programs[-1].stores.append(seen(pointers, mask))
        return store(pointers, value, mask, *args)

    def traced_dot(a, b, *args):
        programs[-1].products += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return dot(a, b, *args)

    traced_steps = {"create_masked_load": traced_load, "create_masked_store": traced_store}
    with patch.multiple(builder, set_grid_idx=traced_begin, create_dot=traced_dot, **traced_steps):
        yield programs
