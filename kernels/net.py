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

import torch
from torch import Tensor

from .backend import tl, triton
from .common import autocast, cdiv, check, fp32_precision, in_parts, joined, register_differentiable
from .layer import forward_kernel, input_grad_kernel, weight_grad_kernel
from .plan import INPUTS, NOTHING, SAMPLES, plan_of
from .tiles import act_backward, act_forward, put, take

PROGRAMS = 384  # at least: three for each of an H100's 132 multiprocessors
MOST = 1024  # samples of a program: offsets in 32 bits
# Three programs share a multiprocessor's registers. That hides more than loading ahead would in
# loops of a few steps, which takes registers besides.
HOW = {"num_warps": 4, "num_stages": 1, "maxnreg": 168}
# As kernels read them: values that a program adds or pools at a time, and places.
_BLOCK, _INPUTS, _NOTHING = map(tl.constexpr, (512, INPUTS, NOTHING))


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
    out = _net(x.detach().contiguous(), rows, plan.text, keep, fp32_precision(precision))[0]
    return out.unflatten(2, plan.answer)


@triton.jit
def _at(place: tl.constexpr, values, b):
    """Where the values of a program's b samples start that lie at `place`.

    `values` are those of scratch, outputs and inputs, or their gradients; OUTPUTS and INPUTS are
    places from the end of the three.
    """
    return values[place] if place < 0 else values[0] + place * b


@triton.jit
def _tiles(rows, cols, shape):
    """How many tiles of this shape a result [rows, cols] has."""
    return tl.cdiv(rows, shape.BM) * tl.cdiv(cols, shape.BN)


@triton.jit
def _forward_step(row, values, b, i, PLAN: tl.constexpr, PRECISION: tl.constexpr):
    """Step i for b samples of one net."""
    step: tl.constexpr = PLAN.steps[i]  # taken here: Triton 3.6 knows a constant by its annotation
    source, y = _at(step.source, values, b), _at(step.out, values, b)
    if step.kind == "layer":
        bias = row + step.bias if step.bias >= 0 else None
        for index in range(0, _tiles(b * step.pixels, step.O, step.forward_tile())):
            forward_kernel(
                source, row + step.weight, bias, y, _at(step.saved, values, b), 1, b,
                step.inputs, 0, 0, 0, step, PRECISION, *step.forward_tile(), index,
            )  # fmt: skip
    else:
        size = b * step.O * step.pixels
        for start in range(0, size, _BLOCK):
            at = start + tl.arange(0, _BLOCK)
            corner, z = at, tl.zeros((_BLOCK,), tl.float32)
            if step.kind == "pool":
                u, v = at // step.V % step.U, at % step.V
                corner = at // step.pixels * (step.H * step.W)
                corner += u * (step.KH * step.W) + v * step.KW
            for k in range(0, step.area):
                z += take(source + corner + k // step.KW * step.W + k % step.KW, at < size)
            z = z / step.area
            if step.other != _NOTHING:
                z += take(_at(step.other, values, b) + at, at < size)
            put(y + at, act_forward(z, step), at < size)


@triton.jit
def _backward_step(row, values, grads, parts, b, i, PLAN: tl.constexpr, PRECISION: tl.constexpr):
    """Gradients of step i's weights, and of what it took unless that is the net's inputs."""
    step: tl.constexpr = PLAN.steps[i]
    gradient, saved = _at(step.out, grads, b), _at(step.saved, values, b)
    if step.kind == "layer":
        db = parts + step.bias if step.bias >= 0 else None
        for index in range(0, _tiles(step.O, step.window, step.weight_tile())):
            weight_grad_kernel(
                gradient, saved, _at(step.source, values, b), parts + step.weight, db, 1,
                b * step.pixels, b, step.inputs, 0, step, PRECISION, *step.weight_tile(), index,
            )  # fmt: skip
        if step.source != _INPUTS:
            phase = b * tl.cdiv(step.H, step.SH) * tl.cdiv(step.W, step.SW)
            for index in range(0, step.SH * step.SW * _tiles(phase, step.C, step.input_tile())):
                input_grad_kernel(
                    gradient, saved, row + step.weight, _at(step.source, grads, b), 1, 1, b,
                    0, step, PRECISION, *step.input_tile(), step.add, index,
                )  # fmt: skip
    else:
        size = b * step.inputs
        for start in range(0, size, _BLOCK):
            at = start + tl.arange(0, _BLOCK)
            pixel, inside = at, at < size
            if step.kind == "pool":
                u, v = at // step.W % step.H // step.KH, at % step.W // step.KW
                pixel = at // (step.H * step.W) * step.pixels + u * step.V + v
                inside = inside & (u < step.U) & (v < step.V)
            z = act_backward(gradient, saved, pixel, inside, step) / step.area
            if step.source != _INPUTS:
                put(_at(step.source, grads, b) + at, z, at < size, step.add)
            if step.other != _NOTHING and step.other != _INPUTS:
                put(_at(step.other, grads, b) + at, z, at < size, step.add_other)


# A whole net takes seconds to compile: no other code for other numbers of nets and samples.
@triton.jit(do_not_specialize=["B", "part", "few", "keep"])
def _forward_kernel(
    x, rows, out, scratch, B, part, few, keep, xn, rn, PLAN: tl.constexpr, PRECISION: tl.constexpr
):
    """Grid (N·⌈B/part⌉,): the answers of one net to `part` samples, `few` of them at a time."""
    splits = tl.cdiv(B, part)
    n, begin = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits * part
    end = tl.minimum(begin + part, B)
    for start in range(begin, end, few):
        b, sample = tl.minimum(few, end - start), n * B + start
        kept = tl.where(keep > 0, sample, tl.program_id(0).to(tl.int64) * few)
        inputs = x + n * xn + tl.cast(start, tl.int64) * PLAN.inputs
        values = scratch + kept * PLAN.values, out + sample * PLAN.outputs, inputs
        for i in tl.static_range(len(PLAN.steps)):
            _forward_step(rows + n * rn, values, b, i, PLAN, PRECISION)
            tl.debug_barrier()  # what this step wrote is there before the next one reads it


@triton.jit(do_not_specialize=["nets", "B", "part"])
def _backward_kernel(
    g, x, rows, out, scratch, grads, parts, nets, B, part, xn, rn,
    PLAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (N·⌈B/part⌉,): the gradient of one net's row over `part` samples."""
    splits = tl.cdiv(B, part)
    n, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    start = split * part
    b, sample = tl.minimum(part, B - start), n * B + start
    inputs = x + n * xn + tl.cast(start, tl.int64) * PLAN.inputs
    values = scratch + sample * PLAN.values, out + sample * PLAN.outputs, inputs
    grads = grads + sample * PLAN.values, g + sample * PLAN.outputs, inputs
    parts += (split * nets + n) * PLAN.parameters
    for i in tl.static_range(len(PLAN.steps) - 1, -1, -1):
        _backward_step(rows + n * rn, values, grads, parts, b, i, PLAN, PRECISION)
        tl.debug_barrier()  # what this step wrote is there before the one before it reads it


def _part(nets, samples):
    """Samples of a program: as many as leave work for the whole device, within SAMPLES and MOST."""
    splits = min(cdiv(samples, SAMPLES), cdiv(PROGRAMS, nets))
    return cdiv(samples, max(splits, cdiv(samples, MOST)))


def _empty(x, rows, plan, keep, precision):
    plan, nets, samples = plan_of(plan), len(rows), x.shape[-2]
    part = _part(nets, samples)
    kept = samples if keep else cdiv(samples, part) * min(part, SAMPLES)
    out = rows.new_empty(nets, samples, plan.outputs)
    return out, rows.new_empty(nets, kept, plan.values)


def launch_forward(
    x: Tensor, rows: Tensor, plan: str, keep: bool, precision: str
) -> tuple[Tensor, Tensor]:
    """The answers [N, B, K], and scratch [N, B, A], which the backward takes if `keep`."""
    out, scratch = _empty(x, rows, plan, keep, precision)
    (nets, samples, _), part = out.shape, _part(len(rows), x.shape[-2])
    few = part if keep else min(part, SAMPLES)
    known = {"PLAN": plan_of(plan), "PRECISION": precision, **HOW}
    given = x, rows, out, scratch, samples, part, few, int(keep), x.expand(nets, -1, -1).stride(0)
    _forward_kernel[(nets * cdiv(samples, part),)](*given, rows.stride(0), **known)
    return out, scratch


def launch_backward(g, needs, x, rows, plan, keep, precision, out, scratch):
    """The gradient [N, P] of the rows, after None for that of x."""
    if not keep:
        raise RuntimeError("net: rows that need no gradient were given, so no values were kept.")
    (nets, samples, _), part = g.shape, _part(len(rows), x.shape[-2])
    parts = in_parts(rows, cdiv(samples, part))
    given = g.contiguous(), x, rows, out, scratch, torch.empty_like(scratch), parts, nets, samples
    given += part, x.expand(nets, -1, -1).stride(0), rows.stride(0)
    known = {"PLAN": plan_of(plan), "PRECISION": precision, **HOW}
    _backward_kernel[(nets * len(parts),)](*given, **known)
    return None, joined(parts, rows.dtype)


_net = register_differentiable("net", launch_forward, _empty, launch_backward)
