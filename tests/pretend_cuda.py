"""A CUDA device where there is none, to find code that forgets which device it is on.

Inside ``with pretend_cuda():`` tensors sent to "cuda" compute on the CPU, say that they are on
cuda:0, and fail where real ones fail: beside CPU tensors, in NumPy, with a CPU generator, as an
index into a CPU tensor, written into one. Random numbers are the CPU's, so results are the same to
the bit. Triton can't run on it: choose ``backend("torch")``.

A wrapper subclass whose C++ device is "meta" (of which every build of PyTorch knows) holds the
values; one mode renames devices in the arguments of functions, another checks and runs operations.
"""

import contextlib
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
CUDA, META = torch.device("cuda:0"), torch.device("meta")
PRETENDED = ("cuda", "meta")
MOVES = {aten.copy_.default, aten.copy.default, aten._to_copy.default, aten.fill_.Tensor}
INDEXING = {aten.index.Tensor, aten._unsafe_index.Tensor}
INDEXING |= {aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
JOINS = {aten.cat.default, aten.stack.default}  # no scalar of another device is let in
_strict = False
MIXED = (
    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
)


class CudaTensor(torch.Tensor):
    """Says cuda:0; its values are in ``.values_on_cpu``."""

    __qualname__ = "Tensor"
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(),
            dtype=values.dtype, layout=values.layout, device=META,
        )  # fmt: skip

    def __init__(self, values):
        self.values_on_cpu = values

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    def get_device(self):
        return 0

    def numpy(self, *args, **kwargs):
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
            "to host memory first."
        )

    __array__ = numpy

    def tolist(self):
        return self.values_on_cpu.tolist()

    def __format__(self, how):
        return format(self.values_on_cpu.detach(), how) if self.dim() == 0 else repr(self)

    def __repr__(self, **options):
        return f"{self.values_on_cpu!r} on a pretended cuda:0"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def inner(value):
    """What a pretended tensor or device is in truth."""
    if isinstance(value, CudaTensor):
        return value.values_on_cpu
    return (
        torch.device("cpu")
        if isinstance(value, torch.device) and value.type in PRETENDED
        else value
    )


def check(func, args, kwargs, to_cuda: bool) -> None:
    """Raise what CUDA raises for these arguments."""
    leaves = tree_leaves((args, kwargs))
    if to_cuda and any(isinstance(g, torch.Generator) and g.device.type == "cpu" for g in leaves):
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' in {func}")
    if func in MOVES:
        return
    tensors = [t for t in leaves if isinstance(t, torch.Tensor)]
    if func in INDEXING:  # CPU indices may point into CUDA tensors, not the other way round
        if not isinstance(args[0], CudaTensor) and any(isinstance(t, CudaTensor) for t in args[1]):
            raise RuntimeError(
                f"indices should be either on cpu or on the device of {func}'s tensor"
            )
        places = [t for t in args[1] if isinstance(t, torch.Tensor) and t.dim()]
        if _strict and isinstance(args[0], CudaTensor) and not all(t.is_cuda for t in places):
            raise RuntimeError("a CPU index into a cuda tensor is copied there each time")
        tensors = [args[0], *(t for t in args[2:3] if isinstance(t, torch.Tensor))]
    written = func._schema.is_mutable and tensors and tensors[0].dim() == 0  # into a CPU scalar
    strict = func in JOINS or (written and not isinstance(tensors[0], CudaTensor))
    on_cuda = {isinstance(t, CudaTensor) for t in tensors if strict or t.dim() or t.is_cuda}
    if len(on_cuda) == 2:
        raise RuntimeError(f"{MIXED} (in {func})")


def run(func, args, kwargs):
    """Check an operation, run it on the CPU and say where its results are."""
    if func is torch.ops.prim.device.default:
        return CUDA
    device = kwargs.get("device")
    given = any(isinstance(t, CudaTensor) for t in tree_leaves((args, kwargs)))
    to_cuda = given if device is None else torch.device(device).type in PRETENDED
    check(func, args, kwargs, to_cuda)
    out = func(*tree_map(inner, args), **tree_map(inner, kwargs))
    if func is aten.copy_.default:
        return args[0]
    if not to_cuda:
        return out
    out = tree_map(lambda t: CudaTensor(t) if isinstance(t, torch.Tensor) else t, out)
    if given and func not in MOVES:
        with contextlib.suppress(Exception):  # operations whose schema names no aliases
            return return_and_correct_aliasing(func, args, kwargs, out)
    return out


class Operations(TorchDispatchMode):
    """Sees operations that make tensors on "cuda" out of none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        pretended = device is not None and torch.device(device).type in PRETENDED
        if pretended or any(isinstance(t, CudaTensor) for t in tree_leaves((args, kwargs))):
            return run(func, args, kwargs)
        return func(*args, **kwargs)


class Names(TorchFunctionMode):
    """Turns "cuda" in arguments into what C++ can take."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if func is torch.device or name in ("__get__", "is_floating_point"):
            return func(*args, **kwargs)
        if name == "cuda":
            return args[0].to(META)
        if name in ("__getitem__", "__setitem__"):
            args = args[0], _index(args[1]), *args[2:]
        if name in ("tensor", "as_tensor", "new_tensor") and len(args) <= 2:
            source = args[0] if name == "new_tensor" else None
            device = kwargs.pop("device", source.device if source is not None else None)
            data = args[-1]
            made = (
                data
                if isinstance(data, torch.Tensor)
                else torch.tensor(tree_map(_item, data), **kwargs)
            )
            return made if device is None else made.to(_meta(device))
        return func(*map(_meta, args), **{key: _meta(value) for key, value in kwargs.items()})


def _index(value):
    """Lists as tensors on the CPU, which C++ would send to the tensor's own device."""
    if isinstance(value, tuple):
        return tuple(map(_index, value))
    return torch.tensor(value) if isinstance(value, list) else value


def _item(value):
    return value.item() if isinstance(value, CudaTensor) else value


def _meta(value):
    if isinstance(value, str):
        return META if value.split(":")[0] == "cuda" else value
    return META if isinstance(value, torch.device) and value.type == "cuda" else value


@contextlib.contextmanager
def pretend_cuda(strict=False):
    """Inside the block there is one CUDA device.

    It allows what CUDA allows; a ``strict`` one refuses CPU indices into CUDA tensors, too, for
    which CUDA makes a copy in every operation that is given them.
    """
    global _strict
    answers = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "synchronize": lambda device=None: None, "_lazy_init": lambda: None,
        "manual_seed_all": lambda seed: None, "manual_seed": lambda seed: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    }  # fmt: skip
    no_cudnn = mock.patch("torch.backends.cudnn.is_acceptable", return_value=False)
    before, _strict = _strict, strict
    # Assigning a wrapper's .data would leave its values as they were.
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with mock.patch.multiple(torch.cuda, **answers), no_cudnn, Names(), Operations():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
        _strict = before
