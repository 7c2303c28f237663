"""One layer of N nets, linear or convolutional: the kernels and the op that both share.

    y[b, n, o, u, v] = act(Σ_{c,i,j} x[b, n, c, s·u + i − p, s·v + j − p] · w[n, o, c, i, j] + bias)

Implicit matrix product: a sample's pixels are rows, output channels are columns, and the window
values (c, i, j) are summed over. The unfolded image is never written; its entries are addressed. A
linear layer is a convolution of images of one pixel. Three kernels: outputs, gradient of the
inputs, gradients of weights and bias.

Pointers and strides (in values):
    x    [B, N, C, H, W]     strides (xb, xn, H·W, W, 1); xn = 0 if all nets share the inputs
    w    [N, O, C, kh, kw]   strides (wn, C·kh·kw, kh·kw, kw, 1): a view into packed rows
    bias [N, O]              strides (bn, 1), likewise
    y, g [B, N, O, H', W']   contiguous, sample-major
    saved                    like y: the output (leaky ReLU) or the value before the sine

Each program owns one tile of one net's result and walks the summed axis in steps of BK. Launched, a
kernel takes the tile of its program; `net.py` calls it as a function of a tile's `index`, for one
tile after the other. What the compiler knows is in `step`, a `Layer`: with the image's sizes known,
divisions become products, neighbours in memory are seen as such, and of a linear layer all that is
about windows is dropped. So each size of layer is compiled, once. The weight gradient sums over all
B·H'·W' pixels into few values, so that axis is cut into `splits` parts, written apart and added by
PyTorch: without atomics results are the same in every run.

Traffic at its least, in bytes for values of s bytes: s·(B·N·C·H·W + P + B·N·O·H'·W') forward
(inputs once, not N times, if shared), about twice that backward. Products: 2·B·N·O·H'·W'·C·kh·kw
forward, twice backward.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .backend import tl, triton
from .common import NONE, SINE, cdiv, in_parts, joined, output_size, register_differentiable, tile
from .tiles import act_backward, act_forward, place, product, put, take


@dataclass(frozen=True)
class Layer:
    """What the compiler knows of a layer: sizes of images [C, H, W] and results [O, U, V]; stride,
    padding and kernel; the activation after it."""

    C: int
    H: int
    W: int
    O: int
    U: int
    V: int
    SH: int = 1
    SW: int = 1
    PH: int = 0
    PW: int = 0
    KH: int = 1
    KW: int = 1
    act: int = NONE
    slope: float = 0.0
    omega: float = 1.0

    area = property(lambda self: self.KH * self.KW)
    window = property(lambda self: self.C * self.area)
    pixels = property(lambda self: self.U * self.V)


@triton.jit
def _met(x, pixel, k, end, xb, step: tl.constexpr):
    """What output pixels meet through the window, [pixels, window values]: 0 in the padding.

    Pixels are counted b·U·V + u·V + v, window values c·KH·KW + i·KW + j, with (U, V) = (H', W').
    """
    sample, spot = (pixel // step.pixels).to(tl.int64), pixel % step.pixels
    top, left = spot // step.V * step.SH - step.PH, spot % step.V * step.SW - step.PW
    i, j = k // step.KW % step.KH, k % step.KW
    row_in = (top[:, None] + i[None, :] >= 0) & (top[:, None] + i[None, :] < step.H)
    col_in = (left[:, None] + j[None, :] >= 0) & (left[:, None] + j[None, :] < step.W)
    inside = (pixel < end)[:, None] & (k < step.window)[None, :] & row_in & col_in
    of_pixel = x + sample * xb + top * step.W + left
    of_window = k // step.area * (step.H * step.W) + i * step.W + j
    return tl.load(of_pixel[:, None] + of_window[None, :], mask=inside, other=0)


# Sizes of layers are the compiler's, those of batches not: code for each would take as long again.
@triton.jit(do_not_specialize=["nets", "B"])
def forward_kernel(
    x, w, bias, y, saved, nets, B, xb, xn, wn, bn, step: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, index=None,
):  # fmt: skip
    """BM output pixels by BN channels of one net."""
    n, pixel, col = place(B * step.pixels, step.O, BM, BN, index)
    n = n.to(tl.int64)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, step.window, BK):
        k = start + tl.arange(0, BK)
        a = _met(x + n * xn, pixel, k, B * step.pixels, xb, step)
        w_in = (k[:, None] < step.window) & (col[None, :] < step.O)
        b = tl.load(w + n * wn + col[None, :] * step.window + k[:, None], mask=w_in, other=0)
        acc = product(a, b, acc, PRECISION)
    if bias is not None:
        acc += take(bias + n * bn + col, col < step.O)[None, :]
    sample, spot = (pixel // step.pixels).to(tl.int64), pixel % step.pixels
    at = (sample * nets + n) * step.O * step.pixels + spot
    at = at[:, None] + (col * step.pixels)[None, :]
    inside = (pixel[:, None] < B * step.pixels) & (col[None, :] < step.O)
    if step.act == 2:
        put(saved + at, acc, inside)
    put(y + at, act_forward(acc, step), inside)


@triton.jit(do_not_specialize=["nets", "B"])
def input_grad_kernel(
    g, saved, w, dx, nets, summed, B, wn, step: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ADD: tl.constexpr = False, index=None,
):  # fmt: skip
    """BM image pixels of one phase by BN channels, summed over `summed` nets (1, or all N).

    Pixel (y, x) met the window value (i, j) at output (y + p − i, x + p − j) / s where that is
    whole, so i is one of every s values, the same for every s-th pixel: such pixels are a phase,
    and nothing is multiplied that the stride left out. With ADD the sums join what dx holds.
    """
    tall, wide = tl.cdiv(step.H, step.SH), tl.cdiv(step.W, step.SW)
    part, pixel, col = place(B * tall * wide, step.C, BM, BN, index)
    first = (part // (step.SH * step.SW)).to(tl.int64)
    down, over = part // step.SW % step.SH, part % step.SW
    sample, spot = (pixel // (tall * wide)).to(tl.int64), pixel % (tall * wide)
    y = (down + step.PH * (step.SH - 1)) % step.SH + spot // wide * step.SH
    x = (over + step.PW * (step.SW - 1)) % step.SW + spot % wide * step.SW
    bottom, right = (y + step.PH - down) // step.SH, (x + step.PW - over) // step.SW
    in_image = (pixel < B * tall * wide) & (y < step.H) & (x < step.W)
    corner = sample * nets * step.O * step.pixels + bottom * step.V + right  # i = j = 0 there
    rows: tl.constexpr = (step.KH + step.SH - 1) // step.SH
    cols: tl.constexpr = (step.KW + step.SW - 1) // step.SW
    turns = tl.cdiv(step.O * rows * cols, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for turn in range(0, summed * turns):
        n = first + turn // turns
        k = (turn % turns) * BK + tl.arange(0, BK)
        o, i, j = k // (rows * cols), k // cols % rows, k % cols
        u, v = bottom[:, None] - i[None, :], right[:, None] - j[None, :]
        at = (corner + n * step.O * step.pixels)[:, None]
        at += (o * step.pixels - i * step.V - j)[None, :]
        i, j = i * step.SH + down, j * step.SW + over
        in_window = (o < step.O) & (i < step.KH) & (j < step.KW)
        met = (u >= 0) & (u < step.U) & (v >= 0) & (v < step.V)
        g_in = in_image[:, None] & in_window[None, :] & met
        w_in = in_window[:, None] & (col[None, :] < step.C)
        a = act_backward(g, saved, at, g_in, step).to(g.dtype.element_ty)
        at_w = (o * step.window + i * step.KW + j)[:, None] + (col * step.area)[None, :]
        b = tl.load(w + n * wn + at_w, mask=w_in, other=0)
        acc = product(a, b, acc, PRECISION)
    at = (sample * (nets // summed) + first) * step.C * (step.H * step.W) + y * step.W + x
    at = at[:, None] + (col * (step.H * step.W))[None, :]
    put(dx + at, acc, in_image[:, None] & (col[None, :] < step.C), ADD)


@triton.jit(do_not_specialize=["nets", "B"])
def weight_grad_kernel(
    g, saved, x, dw, db, nets, part, B, xb, xn, step: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, index=None,
):  # fmt: skip
    """BM channels by BN window values of one net, summed over one split: `part` pixels.

    dw [splits, N, O, C·KH·KW] and db [splits, N, O] hold the sums over each part.
    """
    share, row, col = place(step.O, step.window, BM, BN, index)
    n, begin = (share % nets).to(tl.int64), (share // nets) * part
    end = tl.minimum(begin + part, B * step.pixels)
    acc = tl.zeros((BM, BN), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for start in range(begin, end, BK):
        pixel = start + tl.arange(0, BK)
        sample, spot = (pixel // step.pixels).to(tl.int64), pixel % step.pixels
        g_in = (row[:, None] < step.O) & (pixel[None, :] < end)
        at = (sample * nets + n) * step.O * step.pixels + spot
        at = at[None, :] + (row * step.pixels)[:, None]
        grad = act_backward(g, saved, at, g_in, step)
        if db is not None:
            total += tl.sum(grad, 1)
        b = _met(x + n * xn, pixel, col, end, xb, step)
        acc = product(grad.to(g.dtype.element_ty), b, acc, PRECISION)
    at = share.to(tl.int64) * step.O + row
    inside = (row[:, None] < step.O) & (col[None, :] < step.window)
    put(dw + (at[:, None] * step.window + col[None, :]), acc, inside)
    if db is not None:  # the same sums in all tiles of these rows: the first one writes them
        put(db + at, total, (row < step.O) & (tl.min(col, 0) == 0))


PART = 256  # pixels that one program of the weight gradient adds at least: hides its start
PROGRAMS = 1024  # of them, where pixels suffice: eight for each of an H100's 132 multiprocessors


_known = cache(Layer)  # one object for all calls: to make it takes as long as a launch


def _arguments(x, weight, y, stride, padding, *activation):
    """What kernels are told: images in one piece each, their first two strides, and the `Layer`."""
    step = _known(*x.shape[-3:], *y.shape[2:], *stride, *padding, *weight.shape[3:], *activation)
    x = x if (x[0, 0] if x.ndim == 5 else x[0]).is_contiguous() else x.contiguous()
    return x, (x.stride(0), x.stride(1) if x.ndim == 5 else 0), step


def _tiles(rows, cols, x, precision, sums=False):
    """The tile of results [rows, cols], and how many it takes."""
    shape = tile(rows, cols, x.dtype == torch.float32 and precision == "ieee", sums)
    return shape, cdiv(rows, shape["BM"]) * cdiv(cols, shape["BN"])


def _empty(x, weight, bias, stride, padding, act, slope, omega, precision):
    size = output_size(x.shape[-2:], weight.shape[3:], stride, padding)
    y = x.new_empty(len(x), *weight.shape[:2], *size)
    return y, torch.empty_like(y) if act == SINE else x.new_empty(0)


def launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int],
    act: int, slope: float, omega: float, precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the forward kernel; gives y and what a sine's backward needs besides."""
    y, saved = _empty(x, weight, bias, stride, padding, act, slope, omega, precision)
    x, strides, step = _arguments(x, weight, y, stride, padding, act, slope, omega)
    samples, nets = y.shape[:2]
    shape, tiles = _tiles(samples * step.pixels, step.O, x, precision)
    rows = weight.stride(0), 0 if bias is None else bias.stride(0)
    given = x, weight, bias, y, saved, nets, samples, *strides, *rows, step, precision
    # One program a tile, on the grid's first axis, which takes 2³¹ − 1; others stop at 65,535.
    forward_kernel[(nets * tiles,)](*given, **shape)
    return y, saved


def launch_backward(
    g, needs, x, weight, bias, stride, padding, act, slope, omega, precision, y, saved
):
    """Gradients (dx, dw, db), None for those that aren't needed."""
    x, strides, step = _arguments(x, weight, y, stride, padding, act, slope, omega)
    g, saved, (samples, nets) = g.contiguous(), saved if act == SINE else y, y.shape[:2]
    dx = dw = db = None
    if needs[0]:
        images, (sh, sw) = nets if x.ndim == 5 else 1, stride
        pixels = samples * cdiv(step.H, sh) * cdiv(step.W, sw)
        dx = x.new_empty(x.shape)
        shape, tiles = _tiles(pixels, step.C, x, precision)
        given = g, saved, weight, dx, nets, nets // images, samples, weight.stride(0)
        input_grad_kernel[(images * sh * sw * tiles,)](*given, step, precision, **shape)
    if any(needs[1:3]):
        pixels = samples * step.pixels
        shape, tiles = _tiles(step.O, step.window, x, precision, sums=True)
        splits = max(1, min(pixels // PART, cdiv(PROGRAMS, nets * tiles)))
        parts = [t if t is None else in_parts(t, splits) for t in (weight, bias)]
        given = g, saved, x, *parts, nets, cdiv(pixels, splits), samples, *strides
        weight_grad_kernel[(splits * nets * tiles,)](*given, step, precision, **shape)
        dw, db = (t if t is None else joined(t, x.dtype) for t in parts)
    return dx, dw, db


layer = register_differentiable("layer", launch_forward, _empty, launch_backward)
