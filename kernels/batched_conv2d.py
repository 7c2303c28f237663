"""One convolution of N nets at once, each net with its own weights.

    y[b, n, o, u, v] = act(Σ_{c,i,j} x[b, n, c, s·u + i − p, s·v + j − p] · w[n, o, c, i, j] + bias)

Implicit matrix product: a sample's pixels are rows, output channels are columns, and the window
values (c, i, j) are summed over. The unfolded image is never written; its entries are addressed.
Three kernels: outputs, gradient of the images, gradients of weights and bias.

Pointers and strides (in values):
    x    [B, N, C, H, W]     strides (xb, xn, xc, xh, xw); xn = 0 if all nets share the images
    w    [N, O, C, kh, kw]   strides (wn, C·kh·kw, kh·kw, kw, 1): a view into packed rows
    bias [N, O]              strides (bn, 1), likewise
    y, g [B, N, O, H', W']   contiguous, sample-major; y is kept for the sign of the leaky ReLU

Each program owns one tile of one net's result. The weight gradient sums over all B·H'·W' pixels
into few values, so that axis is cut into `splits` parts, written apart and added by PyTorch:
without atomics results are the same in every run.

Traffic at its least, in bytes for values of s bytes: s·(B·N·C·H·W + P + B·N·O·H'·W') forward
(images once, not N times, if shared). Products: 2·B·N·O·H'·W'·C·kh·kw forward, twice backward.
With a stride above 1 the image gradient multiplies by zeros too: s² times the products it needs.
"""

import torch
import torch.nn.functional as F

from .backend import tl, triton, use_triton
from .common import (
    ACTIVATIONS,
    act_backward,
    act_forward,
    activate,
    check_layer,
    check_precision,
    configs,
    convolution_precision,
    places,
    product,
    shape,
)
from .cpu import UnfoldedConv2d, prefers_unfolding


def batched_conv2d(
    x, weight, bias=None, stride=1, padding=0, activation=None, slope=0.01, precision=None
) -> torch.Tensor:
    """Convolve the images of N nets, each with its own weights read in place from packed rows.

    Args:
        x: images `[B, N, C, H, W]`, sample-major, one set per net, or `[B, C, H, W]` shared.
        weight: `[N, O, C, kh, kw]`, a view into packed rows: contiguous within a net.
        bias: `[N, O]`, likewise, or None.
        stride: step in pixels, an int or a pair.
        padding: zeros added on each side in pixels, an int or a pair.
        activation: None or "leaky_relu" (negative `slope`, at least 0).
        precision: of fp32 products in the Triton kernels, "ieee" or "tf32"; None follows
            `torch.backends.cudnn.allow_tf32`.

    Returns:
        `[B, N, O, H', W']` with H' = ⌊(H + 2·padding − kh) / stride⌋ + 1 and W' likewise.

    Raises:
        ValueError: on wrong ranks, mismatched nets or channels, no nets or samples, mixed devices
            or dtypes, weights not contiguous within a net, or a kernel larger than the image.
    """
    check_layer("batched_conv2d", x, weight, bias, 4, activation, slope, (None, "leaky_relu"))
    stride, padding = _pair(stride), _pair(padding)
    if (
        min(stride) < 1
        or min(padding) < 0
        or min(size := _output_size(x, weight, stride, padding)) < 1
    ):
        raise ValueError(
            f"batched_conv2d: a kernel {list(weight.shape[3:])} with stride {list(stride)} and "
            f"padding {list(padding)} does not fit images x {shape(x)}."
        )
    if use_triton(x):
        precision = check_precision(precision)
        act = ACTIVATIONS.index(activation)
        return _conv2d(x, weight, bias, stride, padding, act, float(slope), precision)
    if prefers_unfolding(x, weight, size):
        slope = float(slope) if activation == "leaky_relu" else 1.0
        return UnfoldedConv2d.apply(x, weight, bias, stride, padding, slope)
    return batched_conv2d_reference(x, weight, bias, stride, padding, activation, slope)


def batched_conv2d_reference(
    x, weight, bias=None, stride=1, padding=0, activation=None, slope=0.01, dilation=1, groups=1
):
    """The same in PyTorch, as one grouped convolution (one dense convolution if x is shared)."""
    nets, out = weight.shape[:2]
    kernel = weight.reshape(nets * out, *weight.shape[2:])
    flat_bias = None if bias is None else bias.reshape(nets * out)
    if x.ndim == 4 and groups == 1:  # shared images: one convolution to N·O channels
        y = F.conv2d(x, kernel, flat_bias, stride, padding, dilation)
    else:
        if x.ndim == 4:
            x = x.unsqueeze(1).expand(-1, nets, -1, -1, -1)
        x = x.reshape(x.shape[0], nets * x.shape[2], *x.shape[3:])
        y = F.conv2d(x, kernel, flat_bias, stride, padding, dilation, nets * groups)
    y = activate(y, activation, slope)
    return y.view(y.shape[0], nets, out, *y.shape[2:])


_TILES = configs(
    ({"BM": 64, "BN": 16, "BK": 32}, 4, 3),
    ({"BM": 128, "BN": 32, "BK": 32}, 8, 3),
)
_GRAD_TILES = configs(
    ({"BM": 16, "BN": 32, "BK": 32}, 4, 3),
    ({"BM": 32, "BN": 64, "BK": 32}, 4, 3),
)


@triton.autotune(_TILES, key=["C", "O", "W", "KW", "PRECISION"], cache_results=True)
@triton.jit
def _forward_kernel(
    x, w, bias, y, nets, B, C, H, W, O, U, V, xb, xn, xc, xh, xw, wn, bn, slope,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid (⌈B·U·V/BM⌉, ⌈O/BN⌉, N): BM output pixels by BN channels of one net; (U, V) = (H', W').

    Pixels are counted b·U·V + u·V + v, window values c·KH·KW + i·KW + j.
    """
    n = tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0) * BM + tl.arange(0, BM)
    col = tl.program_id(1) * BN + tl.arange(0, BN)
    sample, place = (pixel // (U * V)).to(tl.int64), pixel % (U * V)
    top, left = (place // V) * SH - PH, (place % V) * SW - PW
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
    acc = act_forward(acc, slope, 1.0, ACT)
    at = ((sample * nets + n)[:, None] * O + col[None, :]) * (U * V) + place[:, None]
    inside = (pixel[:, None] < B * U * V) & (col[None, :] < O)
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=inside)


@triton.autotune(_TILES, key=["C", "O", "W", "KW", "PRECISION"], cache_results=True)
@triton.jit
def _image_grad_kernel(
    g, y, w, dx, nets, summed, B, C, H, W, O, U, V, wn, slope,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, ACT: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid (⌈B·H·W/BM⌉, ⌈C/BN⌉, N or 1 if shared): BM image pixels by BN channels.

    An image pixel (h, w) met the window value (i, j) of output pixel ((h + p − i)/s, (w + p − j)/s)
    where that division is exact. Sums over window values and over `summed` nets (1, or all N).
    """
    first = tl.program_id(2).to(tl.int64)
    images = nets // summed
    pixel = tl.program_id(0) * BM + tl.arange(0, BM)
    col = tl.program_id(1) * BN + tl.arange(0, BN)
    sample, place = (pixel // (H * W)).to(tl.int64), pixel % (H * W)
    bottom, right = place // W + PH, place % W + PW
    window = O * KH * KW
    steps = tl.cdiv(window, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(0, summed * steps):
        n = first + step // steps
        k = (step % steps) * BK + tl.arange(0, BK)
        o, i, j = k // (KH * KW), (k // KW) % KH, k % KW
        down, over = bottom[:, None] - i[None, :], right[:, None] - j[None, :]
        u, v = tl.maximum(down, 0) // SH, tl.maximum(over, 0) // SW
        met = (u * SH == down) & (u < U) & (v * SW == over) & (v < V)
        g_in = (pixel[:, None] < B * H * W) & (k[None, :] < window) & met
        w_in = (k[:, None] < window) & (col[None, :] < C)
        at = ((sample * nets + n)[:, None] * O + o[None, :]) * (U * V) + u * V + v
        a = tl.load(g + at, mask=g_in, other=0)
        if ACT > 0:
            s = tl.load(y + at, mask=g_in, other=0)
            a = act_backward(a.to(tl.float32), s.to(tl.float32), slope, 1.0, ACT).to(a.dtype)
        at_w = (o[:, None] * C + col[None, :]) * (KH * KW) + (k % (KH * KW))[:, None]
        b = tl.load(w + n * wn + at_w, mask=w_in, other=0)
        acc = product(a, b, acc, PRECISION)
    at = ((sample * images + first)[:, None] * C + col[None, :]) * (H * W) + place[:, None]
    inside = (pixel[:, None] < B * H * W) & (col[None, :] < C)
    tl.store(dx + at, acc.to(dx.dtype.element_ty), mask=inside)


@triton.autotune(_GRAD_TILES, key=["C", "O", "W", "KW", "PRECISION"], cache_results=True)
@triton.jit
def _weight_grad_kernel(
    g, y, x, dw, db, nets, part, B, C, H, W, O, U, V, xb, xn, xc, xh, xw, slope,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, ACT: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid (N, ⌈O/BM⌉·⌈C·KH·KW/BN⌉, splits): BM channels by BN window values over `part` pixels.

    dw [splits, N, O, C·KH·KW] and db [splits, N, O] hold fp32 sums over each part.
    """
    n = tl.program_id(0).to(tl.int64)
    window = C * KH * KW
    tiles = tl.cdiv(window, BN)
    row = (tl.program_id(1) // tiles) * BM + tl.arange(0, BM)
    col = (tl.program_id(1) % tiles) * BN + tl.arange(0, BN)
    i, j = (col // KW) % KH, col % KW
    step = (col // (KH * KW)) * xc + i * xh + j * xw
    begin = tl.program_id(2) * part
    end = tl.minimum(begin + part, B * U * V)
    acc = tl.zeros((BM, BN), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for start in range(begin, end, BK):
        pixel = start + tl.arange(0, BK)
        sample, place = (pixel // (U * V)).to(tl.int64), pixel % (U * V)
        top, left = (place // V) * SH - PH, (place % V) * SW - PW
        g_in = (row[:, None] < O) & (pixel[None, :] < end)
        at = ((sample * nets + n)[None, :] * O + row[:, None]) * (U * V) + place[None, :]
        a = tl.load(g + at, mask=g_in, other=0)
        grad = a.to(tl.float32)
        if ACT > 0:
            s = tl.load(y + at, mask=g_in, other=0)
            grad = act_backward(grad, s.to(tl.float32), slope, 1.0, ACT)
        total += tl.sum(grad, 1)
        row_in = (top[:, None] + i[None, :] >= 0) & (top[:, None] + i[None, :] < H)
        col_in = (left[:, None] + j[None, :] >= 0) & (left[:, None] + j[None, :] < W)
        x_in = (pixel[:, None] < end) & (col[None, :] < window) & row_in & col_in
        x_pixel = x + n * xn + sample * xb + top * xh + left * xw
        b = tl.load(x_pixel[:, None] + step[None, :], mask=x_in, other=0)
        acc = product(grad.to(a.dtype), b, acc, PRECISION)
    at = (tl.program_id(2) * nets + n) * O + row
    inside = (row[:, None] < O) & (col[None, :] < window)
    tl.store(dw + at[:, None] * window + col[None, :], acc, mask=inside)
    if tl.program_id(1) % tiles == 0:
        tl.store(db + at, total, mask=row < O)


def _pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


def _output_size(x, weight, stride, padding):
    sides = zip(x.shape[-2:], weight.shape[-2:], stride, padding, strict=True)
    return tuple(places(*side) for side in sides)


def _window(weight, stride, padding):
    return dict(zip(("SH", "SW", "PH", "PW", "KH", "KW"),
                    (*stride, *padding, *weight.shape[3:]), strict=True))  # fmt: skip


def _image_strides(x):
    return x.stride() if x.ndim == 5 else (x.stride(0), 0, *x.stride()[1:])


def launch_forward(x, weight, bias, stride, padding, act, slope, precision):
    """Allocate y and launch the forward kernel."""
    nets, out, channels = weight.shape[:3]
    samples, (height, width) = x.shape[0], x.shape[-2:]
    u, v = _output_size(x, weight, stride, padding)
    y = x.new_empty(samples, nets, out, u, v)
    _forward_kernel[
        lambda meta: (triton.cdiv(samples * u * v, meta["BM"]), triton.cdiv(out, meta["BN"]), nets)
    ](
        x, weight, weight if bias is None else bias, y, nets, samples, channels, height, width,
        out, u, v, *_image_strides(x), weight.stride(0), 0 if bias is None else bias.stride(0),
        slope, **_window(weight, stride, padding), HAS_BIAS=bias is not None, ACT=act,
        PRECISION=precision,
    )  # fmt: skip
    return y


def launch_backward(
    g, y, x, weight, stride, padding, has_bias, need_x, need_w, act, slope, precision
):
    """Gradients (dx, dw, db); an empty tensor stands for each one that isn't needed."""
    nets, out, channels = weight.shape[:3]
    samples, (height, width), (u, v) = x.shape[0], x.shape[-2:], y.shape[-2:]
    sizes = (samples, channels, height, width, out, u, v)
    options = {**_window(weight, stride, padding), "ACT": act, "PRECISION": precision}
    g, shared = g.contiguous(), x.ndim == 4
    dx, dw, db = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    if need_x:
        dx = x.new_empty(x.shape)
        pixels = samples * height * width
        _image_grad_kernel[
            lambda meta: (
                triton.cdiv(pixels, meta["BM"]),
                triton.cdiv(channels, meta["BN"]),
                1 if shared else nets,
            )
        ](g, y, weight, dx, nets, nets if shared else 1, *sizes, weight.stride(0), slope, **options)
    if need_w:
        window, pixels = weight[0, 0].numel(), samples * u * v
        splits = max(1, min(64, pixels // 2048))  # parts long enough to hide their start
        part = triton.cdiv(pixels, splits)
        dw = x.new_empty(splits, nets, out, window, dtype=torch.float32)
        db = x.new_empty(splits, nets, out, dtype=torch.float32)
        _weight_grad_kernel[
            lambda meta: (
                nets,
                triton.cdiv(out, meta["BM"]) * triton.cdiv(window, meta["BN"]),
                splits,
            )
        ](g, y, x, dw, db, nets, part, *sizes, *_image_strides(x), slope, **options)
        dw = dw.sum(0).view(weight.shape).to(x.dtype)
        db = db.sum(0).to(x.dtype) if has_bias else x.new_empty(0)
    return dx, dw, db


@torch.library.custom_op("netspace_lite::batched_conv2d", mutates_args=())
def _conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
    stride: list[int], padding: list[int], act: int, slope: float, precision: str,
) -> torch.Tensor:  # fmt: skip
    precision = convolution_precision(precision)
    return launch_forward(x, weight, bias, stride, padding, act, slope, precision)


@_conv2d.register_fake
def _(x, weight, bias, stride, padding, act, slope, precision):
    return x.new_empty(x.shape[0], *weight.shape[:2], *_output_size(x, weight, stride, padding))


@torch.library.custom_op("netspace_lite::batched_conv2d_backward", mutates_args=())
def _conv2d_backward(
    g: torch.Tensor, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor,
    stride: list[int], padding: list[int], has_bias: bool, need_x: bool, need_w: bool,
    act: int, slope: float, precision: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    precision = convolution_precision(precision)
    return launch_backward(
        g, y, x, weight, stride, padding, has_bias, need_x, need_w, act, slope, precision
    )


@_conv2d_backward.register_fake
def _(g, y, x, weight, stride, padding, has_bias, need_x, need_w, act, slope, precision):
    return (
        x.new_empty(x.shape if need_x else 0),
        x.new_empty(weight.shape if need_w else 0),
        x.new_empty(weight.shape[:2] if need_w and has_bias else 0),
    )


def _setup_context(ctx, inputs, output):
    x, weight, bias, *ctx.options = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(output, x, weight)


def _backward(ctx, g):
    y, x, weight = ctx.saved_tensors
    stride, padding, *rest = ctx.options
    need_x, need_w = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
    dx, dw, db = _conv2d_backward(
        g, y, x, weight, stride, padding, ctx.has_bias, need_x, need_w, *rest
    )
    has_db = ctx.has_bias and need_w
    grads = dx if need_x else None, dw if need_w else None, db if has_db else None
    return *grads, None, None, None, None, None


_conv2d.register_autograd(_backward, setup_context=_setup_context)
