"""One linear layer of N nets at once.

    y[n, b, o] = act(Σ_i x[n, b, i] · w[n, o, i] + bias[n, o])

Three kernels, one per product: outputs, gradient of the inputs, gradients of weights and bias.

Pointers and strides (in values):
    x     [N, B, I]  strides (xn, xb, xi); xn = 0 if all nets share the inputs
    w     [N, O, I]  strides (wn, I, 1): a view into packed rows, wn is the length of a row
    bias  [N, O]     strides (bn, 1), likewise
    y, g  [N, B, O]  strides (yn, yb, 1); sample-major, y[n, b] lies beside y[n + 1, b]
    saved [N, B, O]  like y: the output (leaky ReLU) or the value before the sine, for backward

Each program owns one tile of one net's result and loops over the summed axis in steps of BK, so
nothing is added to memory twice and results don't depend on the order programs run in.

Traffic at its least, in bytes for values of s bytes: s·N·(B·I + O·I + O + B·O) forward (B·I once,
not N times, if shared), about twice that backward. Products: 2·N·B·O·I forward, twice backward.
"""

import torch
import torch.nn.functional as F

from .backend import tl, triton, use_triton
from .common import (
    ACTIVATIONS,
    SINE,
    act_backward,
    act_forward,
    activate,
    check_layer,
    check_precision,
    configs,
    matmul_precision,
    product,
)


def batched_linear(
    x, weight, bias=None, activation=None, slope=0.01, omega=1.0, precision=None
) -> torch.Tensor:
    """Apply N linear layers, one per net, with weights read in place from packed rows.

    Args:
        x: inputs `[N, B, I]` of any strides (typically a transposed view of sample-major
            `[B, N, I]`), or `[B, I]` shared by all nets.
        weight: `[N, O, I]`, a view into packed rows: contiguous within a net, any stride between.
        bias: `[N, O]`, likewise, or None.
        activation: None, "leaky_relu" (negative `slope`, at least 0) or "sine" (sin(omega · y)).
        precision: of fp32 products in the Triton kernels, "ieee" or "tf32"; None follows
            `torch.get_float32_matmul_precision()`.

    Returns:
        `[N, B, O]`, in the inputs' dtype.

    Raises:
        ValueError: on wrong ranks, mismatched nets, no nets, mixed devices or dtypes, or weights
            that are not contiguous within a net.
    """
    check_layer("batched_linear", x, weight, bias, 2, activation, slope)
    if use_triton(x):
        precision = check_precision(precision)
        act = ACTIVATIONS.index(activation)
        return _linear(x, weight, bias, act, float(slope), float(omega), precision)[0]
    return batched_linear_reference(x, weight, bias, activation, slope, omega)


def batched_linear_reference(x, weight, bias=None, activation=None, slope=0.01, omega=1.0):
    """The same in PyTorch: any device and dtype, differentiable, composes with torch.func."""
    nets, out, inner = weight.shape
    if x.ndim == 2:  # all nets read the same inputs: one dense product with N·O outputs
        flat_bias = None if bias is None else bias.reshape(nets * out)
        y = F.linear(x, weight.reshape(nets * out, inner), flat_bias)
        y = y.view(-1, nets, out).transpose(0, 1)
    elif bias is None:
        y = torch.bmm(x, weight.transpose(1, 2))
    else:
        y = torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))
    return activate(y, activation, slope, omega)


_TUNE_KEY = ["B", "O", "I", "PRECISION"]
_TILES = configs(
    ({"BM": 32, "BN": 32, "BK": 32}, 4, 3),
    ({"BM": 64, "BN": 64, "BK": 32}, 8, 3),
)


@triton.autotune(_TILES, key=_TUNE_KEY, cache_results=True)
@triton.jit
def _forward_kernel(
    x, w, bias, y, saved, B, O, I, xn, xb, xi, wn, bn, yn, yb, slope, omega,
    HAS_BIAS: tl.constexpr, ACT: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid (N, ⌈B/BM⌉·⌈O/BN⌉): y[n, rows, cols], BM samples by BN outputs of net n."""
    n = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(O, BN)
    row = (tl.program_id(1) // tiles) * BM + tl.arange(0, BM)
    col = (tl.program_id(1) % tiles) * BN + tl.arange(0, BN)
    x_row = x + n * xn + row.to(tl.int64) * xb
    w_col = w + n * wn + col * I
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, I, BK):
        k = start + tl.arange(0, BK)
        x_in = (row[:, None] < B) & (k[None, :] < I)
        w_in = (k[:, None] < I) & (col[None, :] < O)
        a = tl.load(x_row[:, None] + k[None, :] * xi, mask=x_in, other=0)
        b = tl.load(w_col[None, :] + k[:, None], mask=w_in, other=0)
        acc = product(a, b, acc, PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + n * bn + col, mask=col < O, other=0).to(tl.float32)[None, :]
    inside = (row[:, None] < B) & (col[None, :] < O)
    at = n * yn + row.to(tl.int64)[:, None] * yb + col[None, :]
    if SAVE:
        tl.store(saved + at, acc.to(saved.dtype.element_ty), mask=inside)
    acc = act_forward(acc, slope, omega, ACT)
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=inside)


@triton.autotune(_TILES, key=_TUNE_KEY, cache_results=True)
@triton.jit
def _input_grad_kernel(
    g, saved, w, dx, nets, B, O, I, gn, gb, yn, yb, wn, xn, xb, slope, omega,
    ACT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid (N or 1 if shared, ⌈B/BM⌉·⌈I/BN⌉): dx[n, rows, cols] = Σ over `nets` nets of g·w."""
    first = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(I, BN)
    row = (tl.program_id(1) // tiles) * BM + tl.arange(0, BM)
    col = (tl.program_id(1) % tiles) * BN + tl.arange(0, BN)
    steps = tl.cdiv(O, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(0, nets * steps):
        n = first + step // steps
        k = (step % steps) * BK + tl.arange(0, BK)
        g_in = (row[:, None] < B) & (k[None, :] < O)
        w_in = (k[:, None] < O) & (col[None, :] < I)
        rows = row.to(tl.int64)[:, None]
        a = tl.load(g + n * gn + rows * gb + k[None, :], mask=g_in, other=0)
        if ACT > 0:
            s = tl.load(saved + n * yn + rows * yb + k[None, :], mask=g_in, other=0)
            grad = act_backward(a.to(tl.float32), s.to(tl.float32), slope, omega, ACT)
            a = grad.to(a.dtype)
        b = tl.load(w + n * wn + k[:, None] * I + col[None, :], mask=w_in, other=0)
        acc = product(a, b, acc, PRECISION)
    inside = (row[:, None] < B) & (col[None, :] < I)
    at = first * xn + row.to(tl.int64)[:, None] * xb + col[None, :]
    tl.store(dx + at, acc.to(dx.dtype.element_ty), mask=inside)


@triton.autotune(_TILES, key=_TUNE_KEY, cache_results=True)
@triton.jit
def _weight_grad_kernel(
    g, saved, x, dw, db, B, O, I, gn, gb, yn, yb, xn, xb, xi, slope, omega,
    HAS_BIAS: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid (N, ⌈O/BM⌉·⌈I/BN⌉): dw[n, rows, cols] = Σ_b g[n, b, rows]·x[n, b, cols], and db."""
    n = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(I, BN)
    row = (tl.program_id(1) // tiles) * BM + tl.arange(0, BM)
    col = (tl.program_id(1) % tiles) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for start in range(0, B, BK):
        k = start + tl.arange(0, BK)
        samples = k.to(tl.int64)
        g_in = (row[:, None] < O) & (k[None, :] < B)
        x_in = (k[:, None] < B) & (col[None, :] < I)
        a = tl.load(g + n * gn + samples[None, :] * gb + row[:, None], mask=g_in, other=0)
        grad = a.to(tl.float32)
        if ACT > 0:
            s = tl.load(saved + n * yn + samples[None, :] * yb + row[:, None], mask=g_in, other=0)
            grad = act_backward(grad, s.to(tl.float32), slope, omega, ACT)
        total += tl.sum(grad, 1)
        b = tl.load(x + n * xn + samples[:, None] * xb + col[None, :] * xi, mask=x_in, other=0)
        acc = product(grad.to(a.dtype), b, acc, PRECISION)
    inside = (row[:, None] < O) & (col[None, :] < I)
    at = (n * O + row[:, None]) * I + col[None, :]
    tl.store(dw + at, acc.to(dw.dtype.element_ty), mask=inside)
    if HAS_BIAS:  # noqa: SIM102 - known at compile time, the other only in the program
        if tl.program_id(1) % tiles == 0:
            tl.store(db + n * O + row, total.to(db.dtype.element_ty), mask=row < O)


def _sample_major(like, nets, samples, width):
    return like.new_empty(samples, nets, width).transpose(0, 1)


def _per_net_strides(x):
    return x.stride() if x.ndim == 3 else (0, *x.stride())


def launch_forward(x, weight, bias, act, slope, omega, precision):
    """Allocate y (and what a sine's backward needs) and launch the forward kernel."""
    (nets, out, inner), samples = weight.shape, x.shape[-2]
    y = _sample_major(x, nets, samples, out)
    saved = _sample_major(x, nets, samples, out) if act == SINE else x.new_empty(0)

    def grid(meta):
        return nets, triton.cdiv(samples, meta["BM"]) * triton.cdiv(out, meta["BN"])

    _forward_kernel[grid](
        x, weight, weight if bias is None else bias, y, saved, samples, out, inner,
        *_per_net_strides(x), weight.stride(0), 0 if bias is None else bias.stride(0),
        y.stride(0), y.stride(1), slope, omega,
        HAS_BIAS=bias is not None, ACT=act, SAVE=act == SINE, PRECISION=precision,
    )  # fmt: skip
    return y, saved


def launch_backward(g, saved, x, weight, has_bias, need_x, need_w, act, slope, omega, precision):
    """Gradients (dx, dw, db); an empty tensor stands for each one that isn't needed."""
    (nets, out, inner), samples = weight.shape, x.shape[-2]
    g = g if g.stride(2) == 1 else g.contiguous()
    dx, dw, db = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    strides = (g.stride(0), g.stride(1), *(saved.stride()[:2] if act else (0, 0)))
    if need_x:
        shared = x.ndim == 2
        dx = x.new_empty(x.shape) if shared else _sample_major(x, nets, samples, inner)
        xn, xb, _ = _per_net_strides(dx)
        _input_grad_kernel[
            lambda meta: (
                1 if shared else nets,
                triton.cdiv(samples, meta["BM"]) * triton.cdiv(inner, meta["BN"]),
            )
        ](
            g, saved, weight, dx, nets if shared else 1, samples, out, inner,
            *strides, weight.stride(0), xn, xb, slope, omega, ACT=act, PRECISION=precision,
        )  # fmt: skip
    if need_w:
        dw = x.new_empty(nets, out, inner)
        db = x.new_empty(nets, out) if has_bias else db
        _weight_grad_kernel[
            lambda meta: (nets, triton.cdiv(out, meta["BM"]) * triton.cdiv(inner, meta["BN"]))
        ](
            g, saved, x, dw, db, samples, out, inner, *strides, *_per_net_strides(x),
            slope, omega, HAS_BIAS=has_bias, ACT=act, PRECISION=precision,
        )  # fmt: skip
    return dx, dw, db


@torch.library.custom_op("netspace_lite::batched_linear", mutates_args=())
def _linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
    act: int, slope: float, omega: float, precision: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return launch_forward(x, weight, bias, act, slope, omega, matmul_precision(precision))


@_linear.register_fake
def _(x, weight, bias, act, slope, omega, precision):
    y = _sample_major(x, weight.shape[0], x.shape[-2], weight.shape[1])
    return y, torch.empty_like(y) if act == SINE else x.new_empty(0)


@torch.library.custom_op("netspace_lite::batched_linear_backward", mutates_args=())
def _linear_backward(
    g: torch.Tensor, saved: torch.Tensor, x: torch.Tensor, weight: torch.Tensor,
    has_bias: bool, need_x: bool, need_w: bool,
    act: int, slope: float, omega: float, precision: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    precision = matmul_precision(precision)
    return launch_backward(
        g, saved, x, weight, has_bias, need_x, need_w, act, slope, omega, precision
    )


@_linear_backward.register_fake
def _(g, saved, x, weight, has_bias, need_x, need_w, act, slope, omega, precision):
    nets, out, inner = weight.shape
    like_x = x.new_empty(x.shape) if x.ndim == 2 else _sample_major(x, nets, x.shape[1], inner)
    return (
        like_x if need_x else x.new_empty(0),
        x.new_empty(nets, out, inner) if need_w else x.new_empty(0),
        x.new_empty(nets, out) if need_w and has_bias else x.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    x, weight, bias, *ctx.options = inputs
    y, saved = output
    ctx.has_bias = bias is not None
    ctx.save_for_backward(saved if ctx.options[0] == SINE else y, x, weight)
    ctx.mark_non_differentiable(saved)


def _backward(ctx, g, _):
    saved, x, weight = ctx.saved_tensors
    need_x, need_w = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
    dx, dw, db = _linear_backward(g, saved, x, weight, ctx.has_bias, need_x, need_w, *ctx.options)
    has_db = ctx.has_bias and need_w
    grads = dx if need_x else None, dw if need_w else None, db if has_db else None
    return *grads, None, None, None, None


_linear.register_autograd(_backward, setup_context=_setup_context)
