"""A whole small net as one kernel forward and one backward, for N nets at once.

Layer by layer a small net is a score of launches that each take longer to start than to run. Here
one program takes its samples through all layers of its net. What it does is a `Plan`, which the
compiler knows: steps (layers, sums, mean pools) unrolled one after the other, each a loop over the
tiles of `layer.py`. Between two steps values go through memory, to be read by the program that
wrote them, so a barrier of its threads suffices, and a small net's values stay in the caches.

Pointers and strides (in values), with A values a sample that steps hand on:
    x        [N, B, I]     strides (xn, I, 1); xn = 0 if all nets share the inputs
    rows     [N, P]        strides (rn, 1)
    out, g   [N, B, K]     contiguous
    scratch  [N, B, A]     a piece for each program, where one step's values follow another's
    grads                  like scratch, for the gradients of its values
    parts    [S, N, P]     gradients of the rows over the samples of each split

Grid (N·S,): one program takes the s-th part of the samples of one net. Backward it writes its own
places of `parts`, added by PyTorch: no atomics, the same result in every run. Forward without a
gradient to come, programs go through their samples a few at a time, in the same scratch.

Traffic in bytes for values of s bytes: s·N·(P + B·(I + A + K)) forward if inputs are per net, twice
that backward, and 4·N·P for each of several splits; what is read again is in the caches.
"""

import functools
import json
import operator
from dataclasses import asdict, dataclass, replace
from math import prod

import torch
from torch import Tensor, nn

from .backend import tl, triton
from .common import (
    ACTIVATIONS,
    LEAKY,
    NONE,
    SINE,
    act_backward,
    act_forward,
    autocast,
    check,
    fp32_precision,
    places,
    register,
    tile,
)
from .layer import forward_tile, input_grad_tile, weight_grad_tile

PROGRAMS = 512  # at least: four for each of an H100's 132 multiprocessors
LEAST, MOST = 16, 1024  # samples of a program: a tensor core's rows; offsets in 32 bits
# Values that a step reads and writes for one sample: those of 512 programs with 16 samples each,
# 50 MB in fp32, are what an H100's second-level cache holds. And steps: code grows with each.
WIDEST, LONGEST = 1536, 32
INPUTS, OUTPUTS, NOTHING = -1, -2, -3  # where values lie that are not in scratch
HOW = {"BLOCK": 512, "num_warps": 4, "num_stages": 2}


@dataclass(frozen=True)
class Step:
    """One step for images [C, H, W], with results [O, U, V]; a vector is an image of one pixel.

    Places of values count from the start of a sample's scratch, those of weights from the row's.

    Args:
        kind: "layer" (linear or convolution), "sum" (of one or two values), "pool" (mean).
        SH to KW: stride, padding and kernel of its window.
        source, other: places of what it reads; `other` is a sum's second value or NOTHING.
        out, saved: places of its results and of what `act_backward` takes, else the same.
        weight, bias: places in the row; NOTHING if it has none.
        act, slope, omega: the activation after it.
        add, add_other: whether gradients of `source` and `other` join those of later steps.
    """

    kind: str
    C: int
    H: int
    W: int
    O: int
    U: int
    V: int
    source: int
    out: int
    saved: int
    SH: int = 1
    SW: int = 1
    PH: int = 0
    PW: int = 0
    KH: int = 1
    KW: int = 1
    other: int = NOTHING
    weight: int = NOTHING
    bias: int = NOTHING
    act: int = NONE
    slope: float = 0.0
    omega: float = 1.0
    add: bool = False
    add_other: bool = False

    @property
    def forward_tile(self):
        return _small(LEAST * self.U * self.V, self.O, self.C * self.KH * self.KW)

    @property
    def input_tile(self):
        return _small(LEAST * self.H * self.W, self.C, self.O * self.KH * self.KW)

    @property
    def weight_tile(self):
        return _small(self.O, self.C * self.KH * self.KW, LEAST * self.U * self.V)


def _small(rows, cols, inner):
    """BM, BN and BK of a product [rows, inner] @ [inner, cols]: a tile for four warps."""
    shape = tile(rows, cols, exact=True)
    return shape["BM"], shape["BN"], 16 if inner <= 16 else shape["BK"]


@dataclass(frozen=True, eq=False)  # compared by identity, at every launch: `_plan` makes each once
class Plan:
    """All steps of a net of P parameters that takes I values a sample and hands on A."""

    steps: tuple[Step, ...]
    inputs: int
    values: int
    parameters: int
    answer: tuple[int, ...]

    @property
    def outputs(self) -> int:
        """K, the values of one answer."""
        return prod(self.answer)

    @functools.cached_property
    def text(self) -> str:
        """What an op can be told."""
        return json.dumps(asdict(self))


@functools.cache
def _plan(text: str) -> Plan:
    def frozen(values):
        return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}

    plan = json.loads(text)
    return Plan(**frozen(plan | {"steps": [Step(**frozen(step)) for step in plan["steps"]]}))


def net(x, rows, plan, precision=None) -> torch.Tensor:
    """The answers of N nets, forward and backward one launch each.

    Args:
        x: samples `[B, ...]` shared by all nets or `[N, B, ...]`, of `plan.inputs` values each. No
            gradient reaches them.
        rows: `[N, P]`, contiguous within a row.
        plan: see `translate`.
        precision: of fp32 products, "ieee" or "tf32"; None: see `common.fp32_precision`.

    Returns:
        `[N, B, ...]` in the rows' dtype, or in `torch.autocast`'s in its region. Differentiable
        once.

    Raises:
        ValueError: on wrong sizes, mixed devices or dtypes, or rows that are not contiguous.
    """
    x, rows = autocast(x, rows)
    tensors = {"rows": (rows, "NP"), "x": (x, "BI", "NBI")}
    check("net", tensors, rows=("rows",), P=plan.parameters, I=plan.inputs)
    keep = torch.is_grad_enabled() and rows.requires_grad
    out = _net(x.contiguous(), rows, plan.text, keep, fp32_precision(precision))[0]
    return out.unflatten(2, plan.answer)


# ------------------------------------------------------------------------------------------ plans


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
    values, steps, used, size = {}, [], {}, 0  # node -> place and shape; where in a row -> how much
    for node in graph.nodes:
        part = parts[node.target] if node.op == "call_module" else None
        sources = [values.get(source) for source in node.all_input_nodes]
        if node.op == "placeholder":
            values[node] = INPUTS, tuple(image)
            continue
        if not sources or None in sources:
            return None
        (source, shape), *others = sources
        if node.op == "output":
            covered = sum(used.values()) == parameters
            return _finished(steps, (source, shape), prod(image), parameters) if covered else None
        if _flattens(node, part):
            values[node] = source, (prod(shape),)
            continue
        does, result = _does(node, part, shape, [other for _, other in others])
        if does is None:
            return None
        follows = steps and steps[-1].out == source and len(node.all_input_nodes[0].users) == 1
        if does["kind"] == "sum" and not others and follows and steps[-1].act == NONE:
            steps[-1] = replace(steps[-1], act=does["act"], slope=does["slope"])
            values[node] = source, shape
            continue
        for name, parameter in part.named_parameters() if does["kind"] == "layer" else ():
            does[name] = weights.get(f"{node.target}.{name}")
            if does[name] is None or does[name] in used:
                return None
            used[does[name]] = parameter.numel()
        out = size + prod(result) * (does.get("act") == SINE)  # a sine's angles lie before it
        steps.append(Step(source=source, out=out, saved=size, **does))
        if others:
            steps[-1] = replace(steps[-1], other=others[0][0])
        values[node], size = (out, result), out + prod(result)
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
    """What a step does, as fields of `Step`, and its result's shape; (None, None) if unknown."""
    channels, height, width = shape if len(shape) == 3 else (prod(shape), 1, 1)
    does = {"kind": "layer", "C": channels, "H": height, "W": width}
    fused = node.meta.get("fused", {})
    does["act"] = ACTIVATIONS.index(fused.get("activation"))
    does |= {name: float(fused[name]) for name in ("slope", "omega") if name in fused}
    if type(part) is nn.Linear and len(shape) == 1:
        return does | {"O": part.out_features, "U": 1, "V": 1}, (part.out_features,)
    if len(shape) == 3 and (window := _window(part, height, width)):
        out = part.out_channels if is_plain(part) else channels
        u, v = (places(*side) for side in zip((height, width), *window, strict=True))
        names = "KH", "KW", "SH", "SW", "PH", "PW"
        does |= dict(zip(names, (n for pair in window for n in pair), strict=True))
        kind = "layer" if is_plain(part) else "pool"
        return does | {"kind": kind, "O": out, "U": u, "V": v}, (out, u, v)
    does |= {"kind": "sum", "O": channels, "U": height, "V": width}
    if type(part) in (nn.LeakyReLU, nn.ReLU):
        slope = getattr(part, "negative_slope", 0.0)
        return (does | {"act": LEAKY, "slope": slope}, shape) if slope >= 0 else (None, None)
    if node.target in (operator.add, torch.add) and others == [shape] and not node.kwargs:
        return does, shape
    return None, None


def _window(part, height, width):
    """Kernel, stride and padding of a convolution or of a mean pool without overlap; else None."""
    if is_plain(part):
        return part.kernel_size, part.stride, part.padding
    if type(part) is nn.AdaptiveAvgPool2d and part.output_size in (1, (1, 1)):
        return (height, width), (height, width), (0, 0)
    if type(part) is nn.AvgPool2d and not part.ceil_mode and not part.divisor_override:
        kernel, stride, padding = (
            (n, n) if isinstance(n, int) else tuple(n)
            for n in (part.kernel_size, part.stride, part.padding)
        )
        return (kernel, stride, padding) if kernel == stride and padding == (0, 0) else None
    return None


def _finished(steps, result, inputs, parameters) -> Plan | None:
    """The plan of these steps, whose last one makes the result; None if it's none or too large."""
    place, shape = result
    read = {s.source for s in steps} | {s.other for s in steps}
    unread = {s.out for s in steps} - read
    widest = max((s.C * s.H * s.W + s.O * s.U * s.V for s in steps), default=0)
    if unread != {place} or len(steps) > LONGEST or widest > WIDEST:
        return None
    last = steps.pop()
    steps.append(replace(last, out=OUTPUTS, saved=OUTPUTS if last.saved == place else last.saved))
    later = set()
    for i, step in reversed(list(enumerate(steps))):
        add, add_other = step.source in later, step.other in later
        steps[i] = replace(step, add=add, add_other=add_other)
        later |= {step.source, step.other}
    return Plan(tuple(steps), inputs, place, parameters, shape)


# ---------------------------------------------------------------------------------------- kernels


@triton.jit
def _at(place: tl.constexpr, x, out, scratch, b):
    """Where the values of a program's b samples start that lie at `place`."""
    if place == -1:
        return x
    elif place == -2:
        return out
    else:
        return scratch + place * b


@triton.jit
def _forward_step(
    x, row, out, scratch, b, step: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr
):
    """One step for b samples of one net."""
    source, y = _at(step.source, x, out, scratch, b), _at(step.out, x, out, scratch, b)
    saved = _at(step.saved, x, out, scratch, b)
    if step.kind == "layer":
        BM: tl.constexpr = step.forward_tile[0]
        BN: tl.constexpr = step.forward_tile[1]
        for index in range(0, tl.cdiv(b * step.U * step.V, BM) * tl.cdiv(step.O, BN)):
            forward_tile(
                index, source, row + step.weight, row + step.bias, y, saved, 1, b,
                step.C, step.H, step.W, step.O, step.U, step.V,
                step.C * step.H * step.W, 0, step.H * step.W, step.W, 1, 0, 0,
                step.slope, step.omega, step.SH, step.SW, step.PH, step.PW, step.KH, step.KW,
                step.bias >= 0, step.act, PRECISION, BM, BN, step.forward_tile[2],
            )  # fmt: skip
    else:
        size = b * step.O * step.U * step.V
        for start in range(0, size, BLOCK):
            at = start + tl.arange(0, BLOCK)
            z = tl.zeros((BLOCK,), tl.float32)
            if step.kind == "pool":
                u, v = at // step.V % step.U, at % step.V
                corner = at // (step.U * step.V) * (step.H * step.W)
                corner += u * (step.KH * step.W) + v * step.KW
                for k in range(0, step.KH * step.KW):
                    pixel = source + corner + k // step.KW * step.W + k % step.KW
                    z += tl.load(pixel, mask=at < size, other=0).to(tl.float32)
                z = z / (step.KH * step.KW)
            else:
                z += tl.load(source + at, mask=at < size, other=0).to(tl.float32)
                if step.other != -3:
                    other = _at(step.other, x, out, scratch, b)
                    z += tl.load(other + at, mask=at < size, other=0).to(tl.float32)
            if step.act == 2:
                tl.store(saved + at, z.to(y.dtype.element_ty), mask=at < size)
            z = act_forward(z, step.slope, step.omega, step.act)
            tl.store(y + at, z.to(y.dtype.element_ty), mask=at < size)


@triton.jit
def _layer_backward(
    x, row, out, scratch, g, grads, parts, b, step: tl.constexpr, PRECISION: tl.constexpr
):
    """Gradients of a layer's weights, and of its inputs unless they are the net's."""
    gradient, saved = _at(step.out, x, g, grads, b), _at(step.saved, x, out, scratch, b)
    source = _at(step.source, x, out, scratch, b)
    pixels = b * step.U * step.V
    MM: tl.constexpr = step.weight_tile[0]
    MN: tl.constexpr = step.weight_tile[1]
    for index in range(0, tl.cdiv(step.O, MM) * tl.cdiv(step.C * step.KH * step.KW, MN)):
        weight_grad_tile(
            index, gradient, saved, source, parts + step.weight, parts + step.bias, 1, pixels, b,
            step.C, step.H, step.W, step.O, step.U, step.V,
            step.C * step.H * step.W, 0, step.H * step.W, step.W, 1, step.slope, step.omega,
            step.SH, step.SW, step.PH, step.PW, step.KH, step.KW,
            step.bias >= 0, step.act, PRECISION, MM, MN, step.weight_tile[2],
        )  # fmt: skip
    if step.source != -1:
        BM: tl.constexpr = step.input_tile[0]
        BN: tl.constexpr = step.input_tile[1]
        phase = b * tl.cdiv(step.H, step.SH) * tl.cdiv(step.W, step.SW)
        tiles = step.SH * step.SW * tl.cdiv(phase, BM) * tl.cdiv(step.C, BN)
        for index in range(0, tiles):
            input_grad_tile(
                index, gradient, saved, row + step.weight, _at(step.source, x, g, grads, b), 1, 1,
                b, step.C, step.H, step.W, step.O, step.U, step.V, 0, step.slope, step.omega,
                step.SH, step.SW, step.PH, step.PW, step.KH, step.KW,
                step.act, step.add, PRECISION, BM, BN, step.input_tile[2],
            )  # fmt: skip


@triton.jit
def _other_backward(x, out, scratch, g, grads, b, step: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients of what a sum or a pool took, unless it is the net's inputs."""
    gradient, saved = _at(step.out, x, g, grads, b), _at(step.saved, x, out, scratch, b)
    size = b * step.C * step.H * step.W
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        pixel, inside = at, at < size
        if step.kind == "pool":
            u, v = at // step.W % step.H // step.KH, at % step.W // step.KW
            pixel = at // (step.H * step.W) * (step.U * step.V) + u * step.V + v
            inside = inside & (u < step.U) & (v < step.V)
        z = tl.load(gradient + pixel, mask=inside, other=0).to(tl.float32) / (step.KH * step.KW)
        s = tl.load(saved + pixel, mask=inside, other=0).to(tl.float32)
        z = act_backward(z, s, step.slope, step.omega, step.act)
        if step.source != -1:
            _put(_at(step.source, x, g, grads, b) + at, z, at < size, step.add)
        if step.other > -1:
            _put(_at(step.other, x, g, grads, b) + at, z, at < size, step.add_other)


@triton.jit
def _put(pointer, value, mask, ADD: tl.constexpr):
    if ADD:
        value += tl.load(pointer, mask=mask, other=0).to(tl.float32)
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _forward_kernel(
    x, rows, out, scratch, B, part, few, xn, rn,
    PLAN: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (N·⌈B/part⌉,): the answers of one net to `part` samples, `few` of them at a time."""
    splits = tl.cdiv(B, part)
    n = (tl.program_id(0) // splits).to(tl.int64)
    begin = tl.program_id(0) % splits * part
    end = tl.minimum(begin + part, B)
    for start in range(begin, end, few):
        b = tl.minimum(few, end - start)
        sample = n * B + start
        kept = sample if KEEP else tl.program_id(0).to(tl.int64) * few
        for i in tl.static_range(len(PLAN.steps)):
            _forward_step(
                x + n * xn + tl.cast(start, tl.int64) * PLAN.inputs, rows + n * rn,
                out + sample * PLAN.outputs, scratch + kept * PLAN.values,
                b, PLAN.steps[i], PRECISION, BLOCK,
            )  # fmt: skip
            tl.debug_barrier()  # what this step wrote is there before the next one reads it


@triton.jit
def _backward_kernel(
    g, x, rows, out, scratch, grads, parts, nets, B, part, xn, rn,
    PLAN: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (N·⌈B/part⌉,): the gradient of one net's row over `part` samples."""
    splits = tl.cdiv(B, part)
    n, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    start = split * part
    b = tl.minimum(part, B - start)
    sample = n * B + start
    x += n * xn + tl.cast(start, tl.int64) * PLAN.inputs
    parts += (split * nets + n) * PLAN.parameters
    for i in tl.static_range(len(PLAN.steps) - 1, -1, -1):
        if PLAN.steps[i].kind == "layer":
            _layer_backward(
                x, rows + n * rn, out + sample * PLAN.outputs, scratch + sample * PLAN.values,
                g + sample * PLAN.outputs, grads + sample * PLAN.values, parts,
                b, PLAN.steps[i], PRECISION,
            )  # fmt: skip
        else:
            _other_backward(
                x, out + sample * PLAN.outputs, scratch + sample * PLAN.values,
                g + sample * PLAN.outputs, grads + sample * PLAN.values, b, PLAN.steps[i], BLOCK,
            )  # fmt: skip
        tl.debug_barrier()  # what this step wrote is there before the one before it reads it


# --------------------------------------------------------------------------------------- launches


def _part(nets, samples):
    """Samples of a program: as many as leave work for the whole device, within LEAST and MOST."""
    splits = min(triton.cdiv(samples, LEAST), triton.cdiv(PROGRAMS, nets))
    return triton.cdiv(samples, max(splits, triton.cdiv(samples, MOST)))


def _few(part, keep):
    """Samples that a program takes through the net at a time."""
    return part if keep else min(part, LEAST)


def _empty(x, rows, plan, keep, precision):
    plan, nets, samples = _plan(plan), len(rows), x.shape[-2]
    part = _part(nets, samples)
    kept = samples if keep else triton.cdiv(samples, part) * _few(part, keep)
    out = rows.new_empty(nets, samples, plan.outputs)
    return out, rows.new_empty(nets, kept, plan.values)


def launch_forward(
    x: Tensor, rows: Tensor, plan: str, keep: bool, precision: str
) -> tuple[Tensor, Tensor]:
    """The answers [N, B, K], and scratch [N, B, A], which the backward takes if `keep`."""
    out, scratch = _empty(x, rows, plan, keep, precision)
    (nets, samples, _), part = out.shape, _part(len(rows), x.shape[-2])
    _forward_kernel[(nets * triton.cdiv(samples, part),)](
        x, rows, out, scratch, samples, part, _few(part, keep), x.stride(0) if x.ndim == 3 else 0,
        rows.stride(0), PLAN=_plan(plan), KEEP=keep, PRECISION=precision, **HOW,
    )  # fmt: skip
    return out, scratch


def _empty_backward(g, x, rows, out, scratch, plan, precision):
    return rows.new_empty(rows.shape)


def launch_backward(
    g: Tensor, x: Tensor, rows: Tensor, out: Tensor, scratch: Tensor, plan: str, precision: str
) -> Tensor:
    """The gradient [N, P] of the rows."""
    (nets, samples, _), part = g.shape, _part(len(rows), x.shape[-2])
    drows, splits = rows.new_empty(rows.shape), triton.cdiv(samples, part)
    parts = drows if splits == 1 else rows.new_empty(splits, *rows.shape, dtype=torch.float32)
    _backward_kernel[(nets * splits,)](
        g.contiguous(), x, rows, out, scratch, torch.empty_like(scratch), parts, nets, samples,
        part, x.stride(0) if x.ndim == 3 else 0, rows.stride(0),
        PLAN=_plan(plan), PRECISION=precision, **HOW,
    )  # fmt: skip
    return drows if splits == 1 else parts.sum(0).to(rows.dtype)


_net_backward = register("net_backward", launch_backward, _empty_backward)


def _context(ctx, inputs, output):
    x, rows, ctx.plan, _, ctx.precision = inputs
    ctx.save_for_backward(x, rows, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, g, _):
    return None, _net_backward(g, *ctx.saved_tensors, ctx.plan, ctx.precision), None, None, None


_net = register("net", launch_forward, _empty, _context, _backward)
