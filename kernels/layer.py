"""One layer of N nets, linear or convolutional: the kernels and the op that both share.

    y[b, n, o, u, v] = act(Σ_{c,i,j} x[b, n, c, s·u + i − p, s·v + j − p] · w[n, o, c, i, j] + bias)

Implicit matrix product: a sample's pixels are rows, output channels are columns, and the window
values (c, i, j) are summed over. The unfolded image is never written; its entries are addressed. A
linear layer is a convolution of images of one pixel: sizes of 1 are constants to the compiler,
which drops all that is about windows. Three kernels: outputs, gradient of the inputs, gradients of
weights and bias.

Pointers and strides (in values):
    x    [B, N, C, H, W]     strides (xb, xn, xc, xh, xw); xn = 0 if all nets share the inputs
    w    [N, O, C, kh, kw]   strides (wn, C·kh·kw, kh·kw, kw, 1): a view into packed rows
    bias [N, O]              strides (bn, 1), likewise
    y, g [B, N, O, H', W']   contiguous, sample-major
    saved                    like y: the output (leaky ReLU) or the value before the sine

Each program owns one tile of one net's result and walks the summed axis in steps of BK. What it
does there is a function of the tile's index, which `net.py` calls for one tile after the other. The
weight gradient sums over all B·H'·W' pixels into few values, so that axis is cut into `splits`
parts, written apart and added by PyTorch: without atomics results are the same in every run.

Traffic at its least, in bytes for values of s bytes: s·(B·N·C·H·W + P + B·N·O·H'·W') forward
(inputs once, not N times, if shared), about twice that backward. Products: 2·B·N·O·H'·W'·C·kh·kw
forward, twice backward.
"""

import torch
from torch import Tensor

from .backend import tl, triton
from .common import (
    SINE,
    act_backward,
    act_forward,
    place,
    places,
    product,
    programs,
    register,
    tile,
)


@triton.jit
def forward_tile(
    index, x, w, bias, y, saved, nets, B, C, H, W, O, U, V, xb, xn, xc, xh, xw, wn, bn,
    slope, omega,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BM output pixels by BN channels of one net; (U, V) = (H', W').

    Pixels are counted b·U·V + u·V + v, window values c·KH·KW + i·KW + j.
    """
    n, pixel, col = place(index, B * U * V, O, BM, BN)
    n = n.to(tl.int64)
    sample, spot = (pixel // (U * V)).to(tl.int64), pixel % (U * V)
    top, left = (spot // V) * SH - PH, (spot % V) * SW - PW
    x_pixel = x + n * xn + sample * xb + top * xh + left * xw
    window = C * KH * KW
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, window, BK):
        k = start + tl.arange(0, BK)
        i, j = (k // KW) % KH, k % KW
        row_in = (top[:, None] + i[None, :] >= 0) & (top[:, None] + i[None, :] < H)
        col_in = (left[:, None] + j[None, :] >= 0) & (left[:, None] + j[None, :] < W)
        x_in = (pixel[:, None] < B * U * V) & (k[None, :] < window) & row_in & col_in
        w_in = (k[:, None] < window) & (col[None, :] < O)
        step = (k // (KH * KW)) * xc + i * xh + j * xw
        a = tl.load(x_pixel[:, None] + step[None, :], mask=x_in, other=0)
        b = tl.load(w + n * wn + col[None, :] * window + k[:, None], mask=w_in, other=0)
        acc = product(a, b, acc, PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + n * bn + col, mask=col < O, other=0).to(tl.float32)[None, :]
    at = ((sample * nets + n) * O * (U * V) + spot)[:, None] + (col * (U * V))[None, :]
    inside = (pixel[:, None] < B * U * V) & (col[None, :] < O)
    if ACT == 2:
        tl.store(saved + at, acc.to(saved.dtype.element_ty), mask=inside)
    acc = act_forward(acc, slope, omega, ACT)
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _forward_kernel(
    x, w, bias, y, saved, nets, B, C, H, W, O, U, V, xb, xn, xc, xh, xw, wn, bn, slope, omega,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    forward_tile(
        tl.program_id(0), x, w, bias, y, saved, nets, B, C, H, W, O, U, V, xb, xn, xc, xh, xw,
        wn, bn, slope, omega, SH, SW, PH, PW, KH, KW, HAS_BIAS, ACT, PRECISION, BM, BN, BK,
    )  # fmt: skip


@triton.jit
def input_grad_tile(
    index, g, saved, w, dx, nets, summed, B, C, H, W, O, U, V, wn, slope, omega,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, ACT: tl.constexpr, ADD: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BM image pixels of one phase by BN channels, summed over `summed` nets (1, or all N).

    Pixel (y, x) met the window value (i, j) at output (y + p − i, x + p − j) / s where that is
    whole, so i is one of every s values, the same for every s-th pixel: such pixels are a phase,
    and nothing is multiplied that the stride left out. With ADD the sums join what dx holds.
    """
    tall, wide = tl.cdiv(H, SH), tl.cdiv(W, SW)
    part, pixel, col = place(index, B * tall * wide, C, BM, BN)
    first, down, over = (part // (SH * SW)).to(tl.int64), part // SW % SH, part % SW
    sample, spot = (pixel // (tall * wide)).to(tl.int64), pixel % (tall * wide)
    y = (down + PH * (SH - 1)) % SH + spot // wide * SH
    x = (over + PW * (SW - 1)) % SW + spot % wide * SW
    bottom, right = (y + PH - down) // SH, (x + PW - over) // SW
    in_image = (pixel < B * tall * wide) & (y < H) & (x < W)
    corner = sample * nets * O * (U * V) + bottom * V + right  # i = j = 0 there
    rows: tl.constexpr = (KH + SH - 1) // SH
    cols: tl.constexpr = (KW + SW - 1) // SW
    window = O * rows * cols
    steps = tl.cdiv(window, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(0, summed * steps):
        n = first + step // steps
        k = (step % steps) * BK + tl.arange(0, BK)
        o, i, j = k // (rows * cols), k // cols % rows, k % cols
        u, v = bottom[:, None] - i[None, :], right[:, None] - j[None, :]
        at = (corner + n * O * (U * V))[:, None] + (o * (U * V) - i * V - j)[None, :]
        i, j = i * SH + down, j * SW + over
        in_window = (k < window) & (i < KH) & (j < KW)
        met = (u >= 0) & (u < U) & (v >= 0) & (v < V)
        g_in = in_image[:, None] & in_window[None, :] & met
        w_in = in_window[:, None] & (col[None, :] < C)
        a = tl.load(g + at, mask=g_in, other=0)
        if ACT > 0:
            s = tl.load(saved + at, mask=g_in, other=0)
            a = act_backward(a.to(tl.float32), s.to(tl.float32), slope, omega, ACT).to(a.dtype)
        at_w = (o * C * (KH * KW) + i * KW + j)[:, None] + (col * (KH * KW))[None, :]
        b = tl.load(w + n * wn + at_w, mask=w_in, other=0)
        acc = product(a, b, acc, PRECISION)
    at = (sample * (nets // summed) + first) * C * (H * W) + y * W + x
    at = at[:, None] + (col * (H * W))[None, :]
    inside = in_image[:, None] & (col[None, :] < C)
    if ADD:
        acc += tl.load(dx + at, mask=inside, other=0).to(tl.float32)
    tl.store(dx + at, acc.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _input_grad_kernel(
    g, saved, w, dx, nets, summed, B, C, H, W, O, U, V, wn, slope, omega,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, ACT: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    input_grad_tile(
        tl.program_id(0), g, saved, w, dx, nets, summed, B, C, H, W, O, U, V, wn, slope, omega,
        SH, SW, PH, PW, KH, KW, ACT, False, PRECISION, BM, BN, BK,
    )  # fmt: skip


@triton.jit
def weight_grad_tile(
    index, g, saved, x, dw, db, nets, part, B, C, H, W, O, U, V, xb, xn, xc, xh, xw,
    slope, omega,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BM channels by BN window values of one net, summed over one split: `part` pixels.

    dw [splits, N, O, C·KH·KW] and db [splits, N, O] hold the sums over each part.
    """
    window = C * KH * KW
    share, row, col = place(index, O, window, BM, BN)
    n, begin = (share % nets).to(tl.int64), (share // nets) * part
    i, j = (col // KW) % KH, col % KW
    step = (col // (KH * KW)) * xc + i * xh + j * xw
    end = tl.minimum(begin + part, B * U * V)
    acc = tl.zeros((BM, BN), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for start in range(begin, end, BK):
        pixel = start + tl.arange(0, BK)
        sample, spot = (pixel // (U * V)).to(tl.int64), pixel % (U * V)
        top, left = (spot // V) * SH - PH, (spot % V) * SW - PW
        g_in = (row[:, None] < O) & (pixel[None, :] < end)
        at = ((sample * nets + n) * O * (U * V) + spot)[None, :] + (row * (U * V))[:, None]
        a = tl.load(g + at, mask=g_in, other=0)
        grad = a.to(tl.float32)
        if ACT > 0:
            s = tl.load(saved + at, mask=g_in, other=0)
            grad = act_backward(grad, s.to(tl.float32), slope, omega, ACT)
        if HAS_BIAS:
            total += tl.sum(grad, 1)
        row_in = (top[:, None] + i[None, :] >= 0) & (top[:, None] + i[None, :] < H)
        col_in = (left[:, None] + j[None, :] >= 0) & (left[:, None] + j[None, :] < W)
        x_in = (pixel[:, None] < end) & (col[None, :] < window) & row_in & col_in
        x_pixel = x + n * xn + sample * xb + top * xh + left * xw
        b = tl.load(x_pixel[:, None] + step[None, :], mask=x_in, other=0)
        acc = product(grad.to(a.dtype), b, acc, PRECISION)
    at = share.to(tl.int64) * O + row
    inside = (row[:, None] < O) & (col[None, :] < window)
    at_w = at[:, None] * window + col[None, :]
    tl.store(dw + at_w, acc.to(dw.dtype.element_ty), mask=inside)
    if HAS_BIAS:  # noqa: SIM102 - known at compile time, the other only in the program
        if index % tl.cdiv(window, BN) == 0:
            tl.store(db + at, total.to(db.dtype.element_ty), mask=row < O)


@triton.jit
def _weight_grad_kernel(
    g, saved, x, dw, db, nets, part, B, C, H, W, O, U, V, xb, xn, xc, xh, xw, slope, omega,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    weight_grad_tile(
        tl.program_id(0), g, saved, x, dw, db, nets, part, B, C, H, W, O, U, V, xb, xn, xc, xh, xw,
        slope, omega, SH, SW, PH, PW, KH, KW, HAS_BIAS, ACT, PRECISION, BM, BN, BK,
    )  # fmt: skip


PART = 2048  # pixels that one program of the weight gradient adds at least: hides its start
MOST_SPLITS = 64


def output_size(x, weight, stride, padding):
    """(H', W') of a convolution."""
    sides = zip(x.shape[-2:], weight.shape[-2:], stride, padding, strict=True)
    return tuple(places(*side) for side in sides)


def _geometry(x, weight, stride, padding):
    """Sizes (B, C, H, W, O, U, V), strides of x, and the window, of either kind of layer."""
    out, channels = weight.shape[1:3]
    if weight.ndim == 3:
        sizes = (x.shape[-2], channels, 1, 1, out, 1, 1)
        xn, xb, xc = x.stride() if x.ndim == 3 else (0, *x.stride())
        strides, kernel = (xb, xn, xc, 0, 0), (1, 1)
    else:
        (height, width), kernel = x.shape[-2:], weight.shape[3:]
        places = output_size(x, weight, stride, padding)
        sizes = (x.shape[0], channels, height, width, out, *places)
        strides = x.stride() if x.ndim == 5 else (x.stride(0), 0, *x.stride()[1:])
    window = dict(zip(("SH", "SW", "PH", "PW", "KH", "KW"), (*stride, *padding, *kernel),
                      strict=True))  # fmt: skip
    return sizes, strides, window


def _exact(x, precision):
    return x.dtype == torch.float32 and precision == "ieee"


def _empty(x, weight, bias, stride, padding, act, slope, omega, precision):
    nets, out = weight.shape[:2]
    if weight.ndim == 3:
        y = x.new_empty(x.shape[-2], nets, out).transpose(0, 1)
    else:
        y = x.new_empty(x.shape[0], nets, out, *output_size(x, weight, stride, padding))
    return y, torch.empty_like(y) if act == SINE else x.new_empty(0)


def launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int],
    act: int, slope: float, omega: float, precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the forward kernel; gives y and what a sine's backward needs besides."""
    y, saved = _empty(x, weight, bias, stride, padding, act, slope, omega, precision)
    sizes, strides, window = _geometry(x, weight, stride, padding)
    samples, _, _, _, out, u, v = sizes
    nets, shape = len(weight), tile(samples * u * v, out, _exact(x, precision))
    _forward_kernel[programs(nets, samples * u * v, out, shape)](
        x, weight, weight if bias is None else bias, y, saved, nets, *sizes, *strides,
        weight.stride(0), 0 if bias is None else bias.stride(0), slope, omega,
        **window, HAS_BIAS=bias is not None, ACT=act, PRECISION=precision, **shape,
    )  # fmt: skip
    return y, saved


def _empty_backward(g, saved, x, weight, stride, padding, has_bias, need_x, need_w, *options):
    if weight.ndim == 3 and x.ndim == 3:
        dx = x.new_empty(x.shape[1], x.shape[0], x.shape[2]).transpose(0, 1)
    else:
        dx = x.new_empty(x.shape)
    return (
        dx if need_x else x.new_empty(0),
        x.new_empty(weight.shape if need_w else 0),
        x.new_empty(weight.shape[:2] if need_w and has_bias else 0),
    )


def launch_backward(
    g: Tensor, saved: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int],
    has_bias: bool, need_x: bool, need_w: bool, act: int, slope: float, omega: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients (dx, dw, db); an empty tensor stands for each one that isn't needed."""
    dx, dw, db = _empty_backward(g, saved, x, weight, stride, padding, has_bias, need_x, need_w)
    sizes, strides, window = _geometry(x, weight, stride, padding)
    samples, channels, height, width, out, u, v = sizes
    options, nets = {**window, "ACT": act, "PRECISION": precision}, len(weight)
    if weight.ndim == 3:
        g, saved = (t.transpose(0, 1) if t.ndim == 3 else t for t in (g, saved))
    g = g.contiguous()
    if need_x:
        images, (sh, sw) = 1 if x.ndim < weight.ndim else nets, stride
        pixels = samples * triton.cdiv(height, sh) * triton.cdiv(width, sw)
        shape = tile(pixels, channels, _exact(x, precision))
        _input_grad_kernel[programs(images * sh * sw, pixels, channels, shape)](
            g, saved, weight, dx, nets, nets // images, *sizes, weight.stride(0), slope, omega,
            **options, **shape,
        )  # fmt: skip
    if need_w:
        inner, pixels = weight[0, 0].numel(), samples * u * v
        splits = max(1, min(MOST_SPLITS, pixels // PART))
        shape, part = tile(out, inner, _exact(x, precision)), triton.cdiv(pixels, splits)
        parts = [
            t[None] if splits == 1 else t.new_empty(splits, *t.shape, dtype=torch.float32)
            for t in (dw, db)
        ]
        _weight_grad_kernel[programs(splits * nets, out, inner, shape)](
            g, saved, x, *parts, nets, part, *sizes, *strides, slope, omega, HAS_BIAS=has_bias,
            **options, **shape,
        )  # fmt: skip
        if splits > 1:
            dw, db = (p.sum(0).to(x.dtype) for p in parts)
    return dx, dw, db


_layer_backward = register("layer_backward", launch_backward, _empty_backward)


def _context(ctx, inputs, output):
    x, weight, bias, *ctx.options = inputs
    y, saved = output
    ctx.has_bias, act = bias is not None, ctx.options[2]
    ctx.save_for_backward(saved if act == SINE else y, x, weight)
    ctx.mark_non_differentiable(saved)


def _backward(ctx, g, _):
    (saved, x, weight), (stride, padding, *options) = ctx.saved_tensors, ctx.options
    need_x, need_w = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
    dx, dw, db = _layer_backward(
        g, saved, x, weight, stride, padding, ctx.has_bias, need_x, need_w, *options
    )
    has_db = ctx.has_bias and need_w
    grads = dx if need_x else None, dw if need_w else None, db if has_db else None
    return *grads, *[None] * 6


layer = register("layer", launch_forward, _empty, _context, _backward)
