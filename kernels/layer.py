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

Each program owns one tile of one net's result and walks the summed axis in steps of BK. Launched, a
kernel takes the tile of its program; `net.py` calls it as a function of a tile's `index`, for one
tile after the other. What the compiler knows is in `step`, a `Layer`. The weight gradient sums over
all B·H'·W' pixels into few values, so that axis is cut into `splits` parts, written apart and added
by PyTorch: without atomics results are the same in every run.

Traffic at its least, in bytes for values of s bytes: s·(B·N·C·H·W + P + B·N·O·H'·W') forward
(inputs once, not N times, if shared), about twice that backward. Products: 2·B·N·O·H'·W'·C·kh·kw
forward, twice backward.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .backend import tl, triton
from .common import NONE, SINE, in_parts, joined, output_size, register_differentiable, tile
from .tiles import act_backward, act_forward, place, product, put, take


@dataclass(frozen=True)
class Layer:
    """What the compiler knows of a layer: stride, padding and kernel; the activation after it."""

    SH: int = 1
    SW: int = 1
    PH: int = 0
    PW: int = 0
    KH: int = 1
    KW: int = 1
    act: int = NONE
    slope: float = 0.0
    omega: float = 1.0


@triton.jit
def _met(x, pixel, k, end, C, H, W, U, V, xb, xc, xh, xw, step: tl.constexpr):
    """What output pixels meet through the window, [pixels, window values]: 0 in the padding.

    Pixels are counted b·U·V + u·V + v, window values c·KH·KW + i·KW + j, with (U, V) = (H', W').
    """
    sample, spot = (pixel // (U * V)).to(tl.int64), pixel % (U * V)
    top, left = spot // V * step.SH - step.PH, spot % V * step.SW - step.PW
    i, j = k // step.KW % step.KH, k % step.KW
    row_in = (top[:, None] + i[None, :] >= 0) & (top[:, None] + i[None, :] < H)
    col_in = (left[:, None] + j[None, :] >= 0) & (left[:, None] + j[None, :] < W)
    inside = (pixel < end)[:, None] & (k < C * step.KH * step.KW)[None, :] & row_in & col_in
    of_pixel = x + sample * xb + top * xh + left * xw
    of_window = k // (step.KH * step.KW) * xc + i * xh + j * xw
    return tl.load(of_pixel[:, None] + of_window[None, :], mask=inside, other=0)


@triton.jit
def forward_kernel(
    x, w, bias, y, saved, nets, B, C, H, W, O, U, V, xb, xn, xc, xh, xw, wn, bn,
    step: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, index=None,
):  # fmt: skip
    """BM output pixels by BN channels of one net."""
    n, pixel, col = place(B * U * V, O, BM, BN, index)
    n, window = n.to(tl.int64), C * step.KH * step.KW
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, window, BK):
        k = start + tl.arange(0, BK)
        a = _met(x + n * xn, pixel, k, B * U * V, C, H, W, U, V, xb, xc, xh, xw, step)
        w_in = (k[:, None] < window) & (col[None, :] < O)
        b = tl.load(w + n * wn + col[None, :] * window + k[:, None], mask=w_in, other=0)
        acc = product(a, b, acc, PRECISION)
    if bias is not None:
        acc += take(bias + n * bn + col, col < O)[None, :]
    sample, spot = (pixel // (U * V)).to(tl.int64), pixel % (U * V)
    at = ((sample * nets + n) * O * (U * V) + spot)[:, None] + (col * (U * V))[None, :]
    inside = (pixel[:, None] < B * U * V) & (col[None, :] < O)
    if step.act == 2:
        put(saved + at, acc, inside)
    put(y + at, act_forward(acc, step), inside)


@triton.jit
def input_grad_kernel(
    g, saved, w, dx, nets, summed, B, C, H, W, O, U, V, wn,
    step: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ADD: tl.constexpr = False, index=None,
):  # fmt: skip
    """BM image pixels of one phase by BN channels, summed over `summed` nets (1, or all N).

    Pixel (y, x) met the window value (i, j) at output (y + p − i, x + p − j) / s where that is
    whole, so i is one of every s values, the same for every s-th pixel: such pixels are a phase,
    and nothing is multiplied that the stride left out. With ADD the sums join what dx holds.
    """
    area: tl.constexpr = step.KH * step.KW
    tall, wide = tl.cdiv(H, step.SH), tl.cdiv(W, step.SW)
    part, pixel, col = place(B * tall * wide, C, BM, BN, index)
    first = (part // (step.SH * step.SW)).to(tl.int64)
    down, over = part // step.SW % step.SH, part % step.SW
    sample, spot = (pixel // (tall * wide)).to(tl.int64), pixel % (tall * wide)
    y = (down + step.PH * (step.SH - 1)) % step.SH + spot // wide * step.SH
    x = (over + step.PW * (step.SW - 1)) % step.SW + spot % wide * step.SW
    bottom, right = (y + step.PH - down) // step.SH, (x + step.PW - over) // step.SW
    in_image = (pixel < B * tall * wide) & (y < H) & (x < W)
    corner = sample * nets * O * (U * V) + bottom * V + right  # i = j = 0 there
    rows: tl.constexpr = (step.KH + step.SH - 1) // step.SH
    cols: tl.constexpr = (step.KW + step.SW - 1) // step.SW
    turns = tl.cdiv(O * rows * cols, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for turn in range(0, summed * turns):
        n = first + turn // turns
        k = (turn % turns) * BK + tl.arange(0, BK)
        o, i, j = k // (rows * cols), k // cols % rows, k % cols
        u, v = bottom[:, None] - i[None, :], right[:, None] - j[None, :]
        at = (corner + n * O * (U * V))[:, None] + (o * (U * V) - i * V - j)[None, :]
        i, j = i * step.SH + down, j * step.SW + over
        in_window = (o < O) & (i < step.KH) & (j < step.KW)
        met = (u >= 0) & (u < U) & (v >= 0) & (v < V)
        g_in = in_image[:, None] & in_window[None, :] & met
        w_in = in_window[:, None] & (col[None, :] < C)
        a = act_backward(g, saved, at, g_in, step).to(g.dtype.element_ty)
        at_w = (o * C * area + i * step.KW + j)[:, None] + (col * area)[None, :]
        b = tl.load(w + n * wn + at_w, mask=w_in, other=0)
        acc = product(a, b, acc, PRECISION)
    at = (sample * (nets // summed) + first) * C * (H * W) + y * W + x
    at = at[:, None] + (col * (H * W))[None, :]
    put(dx + at, acc, in_image[:, None] & (col[None, :] < C), ADD)


@triton.jit
def weight_grad_kernel(
    g, saved, x, dw, db, nets, part, B, C, H, W, O, U, V, xb, xn, xc, xh, xw,
    step: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, index=None,
):  # fmt: skip
    """BM channels by BN window values of one net, summed over one split: `part` pixels.

    dw [splits, N, O, C·KH·KW] and db [splits, N, O] hold the sums over each part.
    """
    window = C * step.KH * step.KW
    share, row, col = place(O, window, BM, BN, index)
    n, begin = (share % nets).to(tl.int64), (share // nets) * part
    end = tl.minimum(begin + part, B * U * V)
    acc = tl.zeros((BM, BN), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for start in range(begin, end, BK):
        pixel = start + tl.arange(0, BK)
        sample, spot = (pixel // (U * V)).to(tl.int64), pixel % (U * V)
        g_in = (row[:, None] < O) & (pixel[None, :] < end)
        at = ((sample * nets + n) * O * (U * V) + spot)[None, :] + (row * (U * V))[:, None]
        grad = act_backward(g, saved, at, g_in, step)
        if db is not None:
            total += tl.sum(grad, 1)
        b = _met(x + n * xn, pixel, col, end, C, H, W, U, V, xb, xc, xh, xw, step)
        acc = product(grad.to(g.dtype.element_ty), b, acc, PRECISION)
    at = share.to(tl.int64) * O + row
    inside = (row[:, None] < O) & (col[None, :] < window)
    put(dw + (at[:, None] * window + col[None, :]), acc, inside)
    if db is not None:  # the same sums in all tiles of these rows: the first one writes them
        put(db + at, total, (row < O) & (tl.min(col, 0) == 0))


PART = 512  # pixels that one program of the weight gradient adds at least: hides its start
MOST_SPLITS = 64


def _arguments(x, weight, y, stride, padding, *activation):
    """What all kernels are told: sizes (B, C, H, W, O, U, V), strides of x, and the `Layer`."""
    images = x if x.ndim == 5 else x.unsqueeze(1).expand(-1, len(weight), -1, -1, -1)
    sizes = len(x), *x.shape[-3:], *y.shape[2:]
    return sizes, images.stride(), Layer(*stride, *padding, *weight.shape[3:], *activation)


def _launch(kernel, sets, rows, cols, precision, x, *args):
    """Launch a kernel for `sets` results [rows, cols], one program for each tile of each.

    All are on the grid's first axis, which takes 2³¹ − 1 blocks; the others stop at 65,535.
    """
    shape = tile(rows, cols, x.dtype == torch.float32 and precision == "ieee")
    grid = sets * triton.cdiv(rows, shape["BM"]) * triton.cdiv(cols, shape["BN"])
    kernel[(grid,)](*args, PRECISION=precision, **shape)


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
    sizes, strides, step = _arguments(x, weight, y, stride, padding, act, slope, omega)
    samples, nets, out, u, v = y.shape
    _launch(
        forward_kernel, nets, samples * u * v, out, precision,
        x, x, weight, bias, y, saved, nets, *sizes, *strides, weight.stride(0),
        0 if bias is None else bias.stride(0), step,
    )  # fmt: skip
    return y, saved


def launch_backward(
    g, needs, x, weight, bias, stride, padding, act, slope, omega, precision, y, saved
):
    """Gradients (dx, dw, db), None for those that aren't needed."""
    sizes, strides, step = _arguments(x, weight, y, stride, padding, act, slope, omega)
    samples, channels, height, width, out, u, v = sizes
    g, saved, nets = g.contiguous(), saved if act == SINE else y, len(weight)
    dx = dw = db = None
    if needs[0]:
        images, (sh, sw) = nets if x.ndim == 5 else 1, stride
        pixels = samples * triton.cdiv(height, sh) * triton.cdiv(width, sw)
        dx = x.new_empty(x.shape)
        _launch(
            input_grad_kernel, images * sh * sw, pixels, channels, precision,
            x, g, saved, weight, dx, nets, nets // images, *sizes, weight.stride(0), step,
        )  # fmt: skip
    if any(needs[1:3]):
        inner, pixels = weight[0, 0].numel(), samples * u * v
        splits = max(1, min(MOST_SPLITS, pixels // PART))
        parts = [t if t is None else in_parts(t, splits) for t in (weight, bias)]
        _launch(
            weight_grad_kernel, splits * nets, out, inner, precision,
            x, g, saved, x, *parts, nets, triton.cdiv(pixels, splits), *sizes, *strides, step,
        )  # fmt: skip
        dw, db = (t if t is None else joined(t, x.dtype) for t in parts)
    return dx, dw, db


layer = register_differentiable("layer", launch_forward, _empty, launch_backward)
