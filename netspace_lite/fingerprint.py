"""A short hash of what something computes, to recognise it again: nets, data, tasks, objectives.

Zoos, spaces and fits on disk are matched by it, never by a shape or a name alone: the same layers
with another activation, the same images in another order, an objective with another weight all
have another fingerprint.
"""

import contextlib
import copy
import copyreg
import dis
import enum
import functools
import hashlib
import importlib
import inspect
import io
import operator
import pickle
import sys
import types
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, fx, nn

from .folding import STATISTICS, Tracer, hooks, statistics
from .randomness import own_randomness

PLAIN = (
    type(None), type(...), bool, int, float, complex, str, bytes, slice, range,
    np.generic, torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
_METHODS = (types.FunctionType, staticmethod, classmethod, property, functools.cached_property)
_CONTAINERS = (dict, list, tuple, set, frozenset)
_LEAVES = (*PLAIN, enum.Enum, Tensor, np.ndarray, tuple, list)
_VALUES = (*_METHODS, *_LEAVES)
_PICKLED = ("__getstate__", "__reduce__", "__reduce_ex__")  # how objects say what to keep of them
_MADE_OF = {  # kinds of objects, and the attributes that say what they are
    types.MethodType: ("__func__", "__self__"), functools.partial: ("func", "args", "keywords"),
    property: ("fget", "fset", "fdel"), functools.cached_property: ("func",),
    (staticmethod, classmethod, functools._lru_cache_wrapper): ("__wrapped__",),
}  # fmt: skip


def fingerprint(*things, known=()) -> str:
    """16 hex digits of the content of numbers, tensors, modules, functions and objects of them.

    Objects count with their class and their attributes, but for what a ``cached_property`` keeps
    and private ones that methods set later, classes and functions with their code, what they close
    over and the globals they read; what is installed is known by its name. An object may say itself
    what it is by an attribute ``fingerprint``. Modules that are ``known``, and their parts, count
    as there, whatever they are.
    """
    known = [part for m in known for part in (*m.modules(), *m.parameters(), *m.buffers())]
    memo = {id(part): (f"known {i}".encode(), part) for i, part in enumerate(known)}
    return _digest(things, memo).hex()


def structure(module: nn.Module) -> str:
    """Fingerprint of the function a module computes of its parameters, not of their values.

    Covers layout, the traced graph in training and in evaluation, settings of all layers, and
    constants such as buffers. Where a module can't be traced the code of its classes stands in.
    """
    parts = [(n, type(m).__qualname__, _settings(m)) for n, m in module.named_modules()]
    first, named = {}, module.named_parameters(remove_duplicate=False)
    # a parameter with another's name behind its shape is tied to it
    layout = [(n, tuple(p.shape), first.setdefault(id(p), n)) for n, p in named]
    norms = statistics(module)
    constants = {n: b for n, b in module.named_buffers() if n.rpartition(".")[0] not in norms}
    own = enumerate([*module.modules(), *module.parameters()])  # in a list: which one, no values
    memo = {id(part): (f"part {i}".encode(), part) for i, part in own}
    return _digest((parts, layout, constants, _graphs(module)), memo).hex()


def template(module: nn.Module) -> bytes | None:
    """All that a module holds but its parameters' values and its norms' statistics.

    Modules of one process with the same template have the same `structure`, which is a hundred
    times as slow to tell. None where pickling, which nothing reads, can't tell.
    """
    norms = statistics(module).values()
    own = [id(norm._buffers[name]) for norm in norms for name in STATISTICS]
    template = io.BytesIO()
    try:
        _Template(template, {id(norm) for norm in norms}).dump(module)
    except Exception:  # each kind of object fails on its own terms
        return None
    return template.getvalue() if len(set(own)) == len(own) else None  # norms may share them


class _Template(pickle.Pickler):
    """Writes of parameters the kind, of code and classes which they are, norms less statistics."""

    def __init__(self, file, norms: set[int]):
        super().__init__(file)
        self.norms = norms

    def reducer_override(self, thing):
        if isinstance(thing, nn.Parameter):
            return str, (f"{thing.shape}{thing.dtype}{thing.requires_grad}",)
        if isinstance(thing, Tensor):
            return str, (fingerprint(thing),)
        if id(thing) in self.norms:
            left = {k: v for k, v in thing._buffers.items() if k not in STATISTICS}
            return tuple, ([type(thing), vars(thing) | {"_buffers": left}],)
        if isinstance(thing, types.MethodType):
            return tuple, ([thing.__func__, thing.__self__],)
        kind = thing if isinstance(thing, type) else type(thing)
        if _of_library(kind.__module__) and not isinstance(thing, types.FunctionType):
            return NotImplemented  # by its name, or as it says itself
        if isinstance(thing, type | types.FunctionType):
            return str, (str(id(thing)),)
        methods = (getattr(kind, name) for name in _PICKLED)
        if not all(_of_library(getattr(m, "__module__", "builtins")) for m in methods):
            raise pickle.PicklingError("it says itself what counts")
        return NotImplemented


def _settings(module: nn.Module) -> dict:
    """Plain attributes of a layer (strides, slopes, numbers of heads) and its functions."""

    def counts(value) -> bool:
        called = callable(value) and not isinstance(value, nn.Module)
        return called or is_dataclass(value) or isinstance(value, (*_LEAVES, dict, set))

    found = {k: v for k, v in vars(module).items() if k[0] != "_" and k != "training"}
    return hooks(module) | {k: v for k, v in found.items() if counts(v)}


def difference(module: nn.Module, other: nn.Module) -> str:
    """What first sets two modules of different `structure` apart, in words."""
    for (name, one), (_, two) in zip(module.named_modules(), other.named_modules(), strict=False):
        where = f"layer {name!r}" if name else "it"
        if type(one).__qualname__ != type(two).__qualname__:
            return f"{where} is a {type(two).__name__}, not a {type(one).__name__}"
        a, b = _settings(one), _settings(two)
        for key in sorted(a.keys() | b.keys()):
            if fingerprint(a.get(key)) != fingerprint(b.get(key)):
                return f"{where} has {key} = {b.get(key)!r}, not {a.get(key)!r}"
    return "in shapes, ties, buffers or the steps of forward"


def _graphs(module: nn.Module) -> list:
    """The steps of the traced graph in both modes; if there is no graph the classes' code."""
    # a root calls it with the input alone: options have their defaults; traces leave things behind
    roots = [nn.Sequential(copy.deepcopy(module)).train(mode) for mode in (True, False)]
    try:
        with own_randomness(0):  # numbers drawn on the way become constants
            graphs = [(Tracer().trace(root), root) for root in roots]
    except Exception:  # tracing runs the user's code on proxies: anything can be raised
        return _code(_own_parts(module))
    leaves = [m for m in module.modules() if Tracer().is_leaf_module(m, "")]  # PyTorch's
    inside = {id(part): part for leaf in leaves for part in _own_parts(leaf)}
    return [_steps(*pair) for pair in graphs] + _code(inside.values())


def _code(modules) -> list:
    hidden = vars(nn.Module()).keys()
    return [(type(m), {k: v for k, v in vars(m).items() if k not in hidden}) for m in modules]


def _own_parts(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if not _of_library(type(part).__module__)]


def _steps(graph: fx.Graph, root: nn.Module) -> list:
    number, steps = {node: f"%{i}" for i, node in enumerate(graph.nodes)}, []
    for node in graph.nodes:
        target = node.target
        if node.op == "get_attr":  # a constant counts with its values
            value = operator.attrgetter(target)(root)
            target = target if isinstance(value, nn.Parameter) else value
        elif not isinstance(target, str | types.FunctionType):
            target = getattr(target, "__name__", repr(target))
        steps.append((node.op, target, fx.map_arg((node.args, node.kwargs), number.get)))
    return steps


def _of_library(name: str | None) -> bool:
    """Whether a module of this name is installed, so that its code is known by its name."""
    top = (name or "").partition(".")[0]
    return _is_installed(top, getattr(sys.modules.get(top), "__file__", None))


@functools.cache
def _is_installed(top: str, file: str | None) -> bool:
    if top == __package__.partition(".")[0]:
        return True
    if top in sys.stdlib_module_names:  # or a user's file of that name
        return file is None or Path(file).is_relative_to(Path(dis.__file__).parent)
    return not {"site-packages", "dist-packages"}.isdisjoint(Path(file or "").parts)


def _digest(thing, memo: dict) -> bytes:
    """Hash of a thing; ``memo`` has what was met before, by id, so that cycles end."""
    thing = thing.item() if isinstance(thing, np.generic) else thing  # NumPy's numbers as any
    if isinstance(thing, np.ndarray):
        plain = thing.astype(thing.dtype.newbyteorder("="))
        of_numbers = plain.dtype.kind in "biufc"
        thing = torch.from_numpy(plain) if of_numbers else [str(plain.dtype), plain.tolist()]
    if id(thing) in memo:
        return memo[id(thing)][0]
    kind = list if isinstance(thing, tuple) else type(thing)  # JSON makes lists of tuples
    digest = hashlib.blake2b(kind.__qualname__.encode(), digest_size=8)
    if isinstance(thing, PLAIN) and not isinstance(thing, enum.Enum):
        digest.update(repr(thing).encode())
    elif isinstance(thing, Tensor):
        values = thing.detach().cpu().contiguous()
        digest.update(f"{values.dtype}{list(values.shape)}".encode())
        digest.update(values.flatten().view(torch.uint8).numpy())
    else:
        memo[id(thing)] = b"cycle", thing
        digests = [_digest(part, memo) for part in _parts(thing)]
        ordered = not isinstance(thing, dict | set | frozenset)
        digest.update(b"".join(digests if ordered else sorted(digests)))
    memo[id(thing)] = digest.digest(), thing
    return digest.digest()


def _parts(thing) -> list:
    """What an object that is no number and no tensor is made of."""
    if isinstance(thing, _CONTAINERS):
        plain = next(base for base in _CONTAINERS if isinstance(thing, base))
        if type(thing) is plain:
            return list(thing.items() if plain is dict else thing)
        return [plain(thing), type(thing), _held(thing), getattr(thing, "default_factory", None)]
    if isinstance(thing, types.FunctionType):
        return _parts_of_function(thing)
    for kinds, names in _MADE_OF.items():
        if isinstance(thing, kinds):
            return [part for part in (getattr(thing, name) for name in names) if part is not None]
    if isinstance(thing, type) and not _of_library(thing.__module__):
        own = {k: v for k, v in vars(thing).items() if k[0] != "_" or _counts(k, v)}
        return [thing.__qualname__, thing.__bases__, own]
    named = inspect.isroutine(thing) and hasattr(thing, "__name__")  # also Cython's functions
    named = named and _of_library(getattr(thing, "__module__", None))
    if named or isinstance(thing, type | types.ModuleType | types.BuiltinFunctionType):
        bound = getattr(thing, "__self__", None)  # of a method, which may be an object's
        named = [getattr(thing, "__module__", ""), getattr(thing, "__qualname__", thing.__name__)]
        return named if isinstance(bound, type | types.ModuleType | None) else [*named, bound]
    own = getattr(thing, "fingerprint", None)
    if isinstance(own, str):
        return [own]
    if isinstance(thing, nn.Module):
        kinds = [type(part) for part in _own_parts(thing)]  # they may have more than a forward
        return [structure(thing), dict(thing.state_dict()), kinds]
    home = type(thing).__module__  # other libraries keep what counts in private attributes
    if not hasattr(thing, "__dict__") or (_of_library(home) and not home.startswith(__package__)):
        return _parts_of_native(thing)
    return [type(thing), _held(thing)]


def _counts(name: str, value) -> bool:
    """Whether a private attribute of a class counts: methods and values, not what Python keeps."""
    if name[:2] == "__":
        return isinstance(value, _METHODS)
    if not isinstance(value, dict | set | frozenset):
        return isinstance(value, _VALUES)
    leaves = list(value.values() if isinstance(value, dict) else value)
    own = bool(leaves) and name[-1] != "_" and name != "_field_defaults"
    return own and all(isinstance(leaf, _LEAVES) for leaf in leaves)


def _held(thing) -> dict:
    """The attributes of an object, without what is computed once and kept.

    That is what a ``cached_property`` keeps, and private ones that methods set after ``__init__``.
    Private ones of a library's that can't be told apart, such as locks, count as their kind.
    """
    kind, first = type(thing), ("__init__", "__post_init__")
    functions = [f for k in kind.__mro__ for n, f in vars(k).items() if n not in first]
    methods = (inspect.unwrap(f) for f in functions if isinstance(f, types.FunctionType))
    left_out = {name for f in methods for name in _sets(f.__code__) if name[0] == "_"}
    slots = {k: getattr(thing, k) for k in copyreg._slotnames(kind) if hasattr(thing, k)}
    held = getattr(thing, "__dict__", {}) | slots
    left_out |= {k for k in held if isinstance(getattr(kind, k, None), functools.cached_property)}
    return {k: _told(v) if k[0] == "_" else v for k, v in held.items() if k not in left_out}


@functools.cache
def _sets(code: types.CodeType) -> set[str]:
    """The attributes that a function sets, of anything."""
    return {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_ATTR"}


def _told(value):
    """A private value; of a library's where there is no telling what it holds, its kind."""
    plain = (*PLAIN, *_CONTAINERS, Tensor, np.ndarray, type, nn.Module)
    if isinstance(value, plain) or callable(value) or not _of_library(type(value).__module__):
        return value
    try:
        _parts_of_native(value)
    except ValueError:
        return type(value)
    return value


def _parts_of_native(thing) -> list:
    """What an object without attributes would be pickled as."""
    reduce = copyreg.dispatch_table.get(type(thing), operator.methodcaller("__reduce_ex__", 2))
    try:
        parts = reduce(thing)
    except Exception as error:  # each kind of object fails on its own terms
        what = f"there is no telling what a {type(thing).__name__} holds"
        raise ValueError(f"{what}: give what uses it an attribute fingerprint") from error
    return [list(part) if isinstance(part, Iterator) else part for part in parts]


def _parts_of_function(function) -> list:
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    if _of_library(function.__module__):
        return [function.__module__, function.__qualname__, cells]
    codes, known = [function.__code__], function.__globals__
    for code in codes:  # grows while it is read: nested functions and comprehensions
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    steps = [i for code in codes for i in dis.get_instructions(code)]
    names = {i.argval for i in steps if "GLOBAL" in i.opname or i.opname == "LOAD_NAME"}
    names -= {"__name__"}  # which every body of a class reads
    constants = [[c for c in code.co_consts if not isinstance(c, types.CodeType)] for code in codes]
    constants[0] = [None if c == function.__doc__ else c for c in constants[0]]  # where it stood
    attributes = {name for code in codes for name in code.co_names}
    # in order, or cycles would be cut elsewhere in the next run
    reads = {name: _read(known[name], attributes) for name in sorted(names & known.keys())}
    for name in sorted({i.argval for i in steps if i.opname == "IMPORT_NAME"}):
        reads[f"import {name}"] = _read(_imported(name, known.get("__package__")), attributes)
    body = [(code.co_code, code.co_names, code.co_argcount, code.co_flags) for code in codes]
    defaults = function.__defaults__, function.__kwdefaults__
    public = {k: v for k, v in vars(function).items() if k[0] != "_"}
    return [body, constants, defaults, cells, reads, public]


def _imported(name: str, package: str | None):
    """The module that a function imports as it runs; None if there is none to be had."""
    for dots in ("", "."):  # how many dots stood before the name isn't told apart
        with contextlib.suppress(Exception):  # whatever a user's module raises, it raises later
            return importlib.import_module(dots + name, package)
    return None


def _read(value, names: set):
    """A global that a function reads; of a user's own module what goes by the function's names."""
    if not isinstance(value, types.ModuleType) or _of_library(value.__name__):
        return value
    found = sorted(name for name in names if hasattr(value, name))
    return {name: _read(getattr(value, name), names - {name}) for name in found}
