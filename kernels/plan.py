"""What a small net does, as a plan that a compiler can unroll: steps, and where their values lie.

`translate` makes the plan of a traced module; the kernels of `net.py` walk it.
"""

import functools
import json
import operator
from collections import namedtuple
from dataclasses import asdict, dataclass, replace
from math import prod

import torch
from torch import nn

from .common import ACTIVATIONS, LEAKY, NONE, SINE, output_size, pair, tile
from .layer import Layer

SAMPLES = 16  # that a program has at least: the rows of a tensor core
# Values that a step reads and writes for one sample: those of 384 programs with 16 samples each,
# 50 MB in fp32, are what an H100's second-level cache holds. And steps: the code grows with each.
WIDEST, LONGEST = 2048, 32
INPUTS, OUTPUTS, NOTHING = -1, -2, -3  # where values lie that are not in scratch
# What kernels are called with; of tuples they take only named ones as arguments with a star.
Tile = namedtuple("Tile", "BM BN BK")


@dataclass(frozen=True, kw_only=True)
class Step(Layer):
    """One step of a net, on images; a vector is an image of one pixel.

    Places of values count from the start of a sample's scratch, those of weights from the row's.

    Args:
        kind: "layer" (linear or convolution), "sum" (of one or two values), "pool" (mean).
        source, other: places of what it reads; `other` is a sum's second value or NOTHING.
        out, saved: places of its results and of what `act_backward` takes, else the same.
        weight, bias: places in the row; NOTHING if it has none.
        add, add_other: whether gradients of `source` and `other` join those of later steps.
    """

    kind: str
    source: int
    out: int
    saved: int
    other: int = NOTHING
    weight: int = NOTHING
    bias: int = NOTHING
    add: bool = False
    add_other: bool = False

    inputs = property(lambda self: self.C * self.H * self.W)

    def forward_tile(self):
        return _small(SAMPLES * self.pixels, self.O, self.window)

    def input_tile(self):
        return _small(SAMPLES * self.H * self.W, self.C, self.O * self.area)

    def weight_tile(self):
        return _small(self.O, self.window, SAMPLES * self.pixels)


def _small(rows, cols, inner):
    """A product [rows, inner] @ [inner, cols] by four warps."""
    shape = tile(rows, cols, exact=True)
    return Tile(shape["BM"], shape["BN"], 16 if inner <= 16 else shape["BK"])


class Plan:
    """All steps of a net of P parameters that takes I values a sample, hands on A and answers K.

    Its `text` is what an op can be told, and how the compiler's caches know it.
    """

    def __init__(self, text: str):
        steps, self.inputs, self.values, self.parameters, answer = json.loads(text)
        self.text, self.steps = text, tuple(Step(**step) for step in steps)
        self.answer, self.outputs = tuple(answer), prod(answer)

    def __repr__(self):
        return self.text


plan_of = functools.cache(Plan)  # one object for a text: quick to compare


def translate(graph, parts, weights, parameters, image) -> Plan | None:
    """The plan of a traced module, or None where it has none: then it runs layer by layer.

    A plan knows linear layers, convolutions as `is_plain` says, leaky ReLU and ReLU, what the graph
    fuses into layers, sums of two values, mean pools without overlap, and flattening. Each
    parameter takes part once, and sizes stay within WIDEST and LONGEST.

    Args:
        graph: an `fx.Graph` of one input, with activations fused in `node.meta["fused"]`.
        parts: its modules by name.
        weights: name of a parameter in the graph -> where it starts in a row.
        parameters: P.
        image: shape of one sample.
    """
    first, *nodes = graph.nodes
    values = {first: (INPUTS, tuple(image))}  # node -> place, shape
    steps, used, size, last = [], {}, 0, None
    for node in nodes:
        part = parts[node.target] if node.op == "call_module" else None
        sources = [values.get(source) for source in node.all_input_nodes]
        if not sources or None in sources:
            return None
        (source, shape), *others = sources
        if node.op == "output":
            covered = sum(used.values()) == parameters
            return _finished(steps, source, prod(image), parameters, shape) if covered else None
        if _flattens(node, part):
            values[node] = source, (prod(shape),)
            continue
        does, result = _does(node, part, shape, [other for _, other in others])
        follows = node.all_input_nodes == [last] and len(last.users) == 1
        unsafe = getattr(part, "inplace", False) and not follows
        unsafe |= part is not None and next(part.buffers(), None) is not None  # a constant weight
        if does is None or unsafe or min(result, default=0) < 1 or does.get("slope", 0) < 0:
            return None
        if does["kind"] == "sum" and follows and steps[-1].act == NONE:
            steps[-1] = replace(steps[-1], act=does["act"], slope=does["slope"])
            values[node], last = (source, shape), node
            continue
        for name, parameter in part.named_parameters() if does["kind"] == "layer" else ():
            does[name] = weights.get(f"{node.target}.{name}")
            if does[name] is None or does[name] in used:
                return None
            used[does[name]] = parameter.numel()
        does["other"] = others[0][0] if others else NOTHING
        out = size + prod(result) * (does["act"] == SINE)  # a sine's angles lie before it
        steps.append(Step(source=source, out=out, saved=size, **does))
        values[node], size, last = (out, result), out + prod(result), node
    return None


def is_plain(part: nn.Module | None) -> bool:
    """Whether the kernels know this convolution."""
    plain = type(part) is nn.Conv2d and type(part.padding) is tuple
    return plain and part.groups == 1 and set(part.dilation) == {1}


def _flattens(node, part) -> bool:
    """Whether a step only says that a sample's values are now a vector."""
    if type(part) is nn.Flatten:
        return (part.start_dim, part.end_dim) == (1, -1)
    return node.target in ("flatten", torch.flatten) and node.args[1:] == (1,) and not node.kwargs


def _does(node, part, shape, others):
    """What a step does, as fields of `Step`, and its result's shape; None for what is unknown."""
    channels, height, width = shape if len(shape) == 3 else (prod(shape), 1, 1)
    does = {"kind": "layer", "C": channels, "H": height, "W": width}
    fused = node.meta.get("fused", {})
    does["act"] = ACTIVATIONS.index(fused.get("activation"))
    does |= {name: float(fused[name]) for name in ("slope", "omega") if name in fused}
    if type(part) is nn.Linear and shape == (part.in_features,):
        return does | {"O": part.out_features, "U": 1, "V": 1}, (part.out_features,)
    if len(shape) == 3 and (window := _window(part, shape)):
        kind, out = ("layer", part.out_channels) if is_plain(part) else ("pool", channels)
        u, v = output_size(shape[1:], *window)
        names = "KH", "KW", "SH", "SW", "PH", "PW"
        does |= dict(zip(names, (n for pair in window for n in pair), strict=True))
        return does | {"kind": kind, "O": out, "U": u, "V": v}, (out, u, v)
    does |= {"kind": "sum", "O": channels, "U": height, "V": width}
    if type(part) in (nn.LeakyReLU, nn.ReLU):
        return does | {"act": LEAKY, "slope": getattr(part, "negative_slope", 0.0)}, shape
    if node.target in (operator.add, torch.add) and others == [shape] and not node.kwargs:
        return does, shape
    return None, ()


def _window(part, image):
    """Kernel, stride and padding of a convolution or of a mean pool without overlap; else None."""
    if is_plain(part) and part.in_channels == image[0]:
        return part.kernel_size, part.stride, part.padding
    if type(part) is nn.AdaptiveAvgPool2d and part.output_size in (1, (1, 1)):
        return image[1:], image[1:], (0, 0)
    if type(part) is nn.AvgPool2d and not part.ceil_mode and not part.divisor_override:
        kernel, stride, padding = map(pair, (part.kernel_size, part.stride, part.padding))
        return (kernel, stride, padding) if kernel == stride and padding == (0, 0) else None
    return None


def _finished(steps, place, inputs, parameters, answer) -> Plan | None:
    """The plan of these steps, whose last one makes the answer at `place`; None if it doesn't, and
    where there are too many or one is too large."""
    unread = {s.out for s in steps} - {read for s in steps for read in (s.source, s.other)}
    widest = max((s.C * s.H * s.W + s.O * s.U * s.V for s in steps), default=0)
    if unread != {place} or len(steps) > LONGEST or widest > WIDEST:
        return None
    last = steps.pop()
    steps.append(replace(last, out=OUTPUTS, saved=OUTPUTS if last.saved == place else last.saved))
    later = set()
    for i, step in reversed(list(enumerate(steps))):
        twice = later | {step.source}  # a value may be added to itself
        steps[i] = replace(step, add=step.source in later, add_other=step.other in twice)
        later |= {step.source, step.other} - {NOTHING}
    fields = [asdict(step) for step in steps]
    return plan_of(json.dumps([fields, inputs, place, parameters, answer]))
