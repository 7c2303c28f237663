"""A short hash of what something computes, to recognise it again: nets, data, tasks, objectives.

Zoos, spaces and fits on disk are matched by it, never by a shape or a name alone: the same layers
with another activation, the same images in another order, an objective with another weight all
have another fingerprint.
"""

import copy
import dis
import enum
import functools
import hashlib
import sys
import types
from collections.abc import Iterator
from dataclasses import is_dataclass

import numpy as np
import torch
from torch import Tensor, fx, nn

from .folding import statistics

PLAIN = (
    type(None), type(...), bool, int, float, complex, str, bytes, slice, range, enum.Enum,
    np.generic, torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip


def fingerprint(*things) -> str:
    """16 hex digits of the content of numbers, tensors, modules, functions and objects of them.

    Objects count with their public attributes (those without a leading underscore), functions with
    their code, what they close over and the globals they read. An object may say itself what it is
    by an attribute ``fingerprint``.
    """
    digest = hashlib.blake2b(digest_size=8)
    _feed(digest.update, things, {})
    return digest.hexdigest()


def structure(module: nn.Module) -> str:
    """Fingerprint of the function a module computes of its parameters, not of their values.

    Covers layout, the traced graph in training and in evaluation, settings of all layers, and
    constants such as buffers. Where a module can't be traced the code of its forwards stands in.
    """
    module = copy.deepcopy(module)  # tracing leaves constants behind
    parts = [(n, type(m).__qualname__, _settings(m)) for n, m in module.named_modules()]
    parameters = module.named_parameters(remove_duplicate=False)
    shapes = {name: (tuple(p.shape), id(p)) for name, p in parameters}
    owners = {number: name for name, (_, number) in reversed(shapes.items())}  # tied ones share one
    layout = [(name, shape, owners[number]) for name, (shape, number) in shapes.items()]
    constants = dict(module.named_buffers())
    for norm in statistics(module):
        for statistic in ("running_mean", "running_var", "num_batches_tracked"):
            constants.pop(f"{norm}.{statistic}".lstrip("."), None)
    return fingerprint(parts, layout, constants, _graphs(module))


def _graphs(module: nn.Module):
    """The steps of the traced graph in both modes, or the forwards' code if there is no graph."""
    try:
        graphs = [fx.Tracer().trace(module.train(mode)) for mode in (True, False)]
    except Exception:  # tracing runs the user's code on proxies: anything can be raised
        parts = (type(m) for m in module.modules())
        return [cls.forward for cls in dict.fromkeys(parts) if not _of_library(cls.__module__)]
    return [_steps(graph, module) for graph in graphs]


def _steps(graph: fx.Graph, module: nn.Module) -> list:
    number, steps = {node: f"%{i}" for i, node in enumerate(graph.nodes)}, []
    for node in graph.nodes:
        target = getattr(node.target, "__name__", node.target)
        if node.op == "get_attr" and not isinstance(_get(module, target), nn.Parameter):
            target = _get(module, target)  # a constant counts with its values
        steps.append((node.op, target, fx.map_arg((node.args, node.kwargs), number.get)))
    return steps


def _get(module, path: str):
    return functools.reduce(getattr, path.split("."), module)


def _settings(module: nn.Module) -> dict:
    """Plain attributes of a layer (strides, slopes, numbers of heads) and its functions."""
    kinds = (*PLAIN, tuple, list, Tensor, types.FunctionType, types.BuiltinFunctionType)
    found = {k: v for k, v in vars(module).items() if k[0] != "_" and k != "training"}
    return {k: v for k, v in found.items() if isinstance(v, kinds) or is_dataclass(v)}


def _of_library(name: str) -> bool:
    """Whether a module of this name is installed, so that its code is known by its name."""
    top = name.partition(".")[0]
    file = getattr(sys.modules.get(top), "__file__", None) or ""
    known = top in sys.stdlib_module_names or top == __package__.partition(".")[0]
    return known or "site-packages" in file


def _feed(update, thing, seen: dict) -> None:
    """Write what ``thing`` is made of; ``seen`` holds objects met before, so that cycles end."""
    update(f"<{type(thing).__qualname__}".encode())
    if isinstance(thing, PLAIN):
        return update(repr(thing).encode())
    if isinstance(thing, Tensor | np.ndarray):
        values = torch.as_tensor(thing).detach().cpu().contiguous()
        update(f"{values.dtype}{list(values.shape)}".encode())
        return update(values.flatten().view(torch.uint8).numpy())
    if id(thing) in seen:
        return update(f"again {seen[id(thing)][0]}".encode())
    seen[id(thing)] = len(seen), thing
    for part in _parts(thing):
        _feed(update, part, seen)
    update(b">")


def _parts(thing) -> list:
    """What an object that is no number and no tensor is made of."""
    if isinstance(thing, dict):
        return sorted(thing.items(), key=lambda item: repr(item[0]))
    if isinstance(thing, set | frozenset):
        return sorted(fingerprint(item) for item in thing)
    if isinstance(thing, list | tuple):
        return list(thing)
    if isinstance(thing, types.FunctionType):
        return _parts_of_function(thing)
    if isinstance(thing, types.MethodType):
        return [thing.__func__, thing.__self__]
    if isinstance(thing, functools.partial):
        return [thing.func, thing.args, thing.keywords]
    if isinstance(thing, type | types.ModuleType | types.BuiltinFunctionType):
        return [getattr(thing, "__module__", ""), getattr(thing, "__qualname__", thing.__name__)]
    own = getattr(thing, "fingerprint", None)
    if isinstance(own, str):
        return [own]
    if isinstance(thing, nn.Module):
        return [structure(thing), dict(thing.state_dict())]
    if not hasattr(thing, "__dict__"):
        return _parts_of_native(thing)
    public = {k: v for k, v in vars(thing).items() if k[0] != "_"}
    classes = [c for c in type(thing).__mro__ if not _of_library(c.__module__)]
    methods = [f for c in classes for f in vars(c).values() if isinstance(f, types.FunctionType)]
    return [type(thing).__qualname__, public, methods]


def _parts_of_native(thing) -> list:
    """What an object without attributes would be pickled as."""
    try:
        parts = thing.__reduce_ex__(2)
    except TypeError as error:
        raise ValueError(
            f"there is no telling what a {type(thing).__name__} holds, so it can't be recognised "
            "again: give what uses it an attribute fingerprint"
        ) from error
    return [list(part) if isinstance(part, Iterator) else part for part in parts]


def _parts_of_function(function) -> list:
    if _of_library(function.__module__ or ""):
        captured = [cell.cell_contents for cell in function.__closure__ or ()]
        return [function.__module__, function.__qualname__, captured]
    codes = [function.__code__]
    for code in codes:  # grows while it is read: nested functions and comprehensions
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    names = {i.argval for code in codes for i in dis.get_instructions(code) if "GLOBAL" in i.opname}
    constants = [[c for c in code.co_consts if not isinstance(c, types.CodeType)] for code in codes]
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    reads = {name: function.__globals__[name] for name in names if name in function.__globals__}
    body = [(code.co_code, code.co_names) for code in codes]
    return [body, constants, function.__defaults__, function.__kwdefaults__, cells, reads]
