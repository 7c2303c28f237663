"""What several ops share: activations, launch configurations and the checks of arguments."""

import torch
import torch.nn.functional as F

from .backend import INTERPRETED, tl, triton

ACTIVATIONS = (None, "leaky_relu", "sine")
NONE, LEAKY, SINE = 0, 1, 2  # how kernels know the activations, in the order of ACTIVATIONS


def activate(y, activation=None, slope=0.01, omega=1.0):
    """None, leaky ReLU with a negative `slope`, or sin(omega · y), elementwise."""
    if activation is None:
        return y
    if activation == "leaky_relu":
        return F.leaky_relu(y, slope)
    return torch.sin(omega * y)


@triton.jit
def _sine_of(x, turns):
    """(−1)^k · sin(r) for r = x − turns·π in [−π/2, π/2], where k is `turns` rounded up.

    Triton's own sine carries code for angles of any size, which costs registers, spills and a
    thousand instructions; SIREN's stay below 2¹⁶ half turns. π comes in two parts, the first,
    201/64, with 8 significant bits, so that turns · 201/64 is exact. The polynomial is the best of
    degree 9 on that interval (Chebyshev fit), 4e-9 off: below fp32's rounding.
    """
    r = (x - turns * 3.140625) - turns * 0.0009676535897932
    odd = (tl.floor(turns + 0.5).to(tl.int32) & 1) == 1
    t = r * r
    p = 0.00833305017067 + t * (-0.000198090174087 + t * 2.60510763533e-6)
    p = 0.999999995699 + t * (-0.166666579478 + t * p)
    return tl.where(odd, -r, r) * p


@triton.jit
def sine(x):
    """sin(x) of fp32 angles up to 2¹⁶ half turns; exact to fp32 rounding of x."""
    return _sine_of(x, tl.floor(x * 0.3183098861837907 + 0.5))


@triton.jit
def cosine(x):
    """cos(x) = sin(x + π/2), the quarter turn taken in the reduction, so without rounding."""
    return _sine_of(x, tl.floor(x * 0.3183098861837907 + 1.0) - 0.5)


@triton.jit
def act_forward(z, slope, omega, ACT: tl.constexpr):
    """The activation of an fp32 tile: 0 none, 1 leaky ReLU, 2 sin(omega · z)."""
    if ACT == 1:
        z = tl.where(z > 0, z, z * slope)
    if ACT == 2:
        z = sine(z * omega)
    return z


@triton.jit
def act_backward(g, saved, slope, omega, ACT: tl.constexpr):
    """The gradient before the activation, from the one after it, in fp32.

    `saved` is the output for leaky ReLU (its sign is the input's) and the input for sine.
    """
    if ACT == 1:
        g = tl.where(saved > 0, g, g * slope)
    if ACT == 2:
        g = g * omega * cosine(saved * omega)
    return g


# Triton's interpreter multiplies the bit patterns of bf16 as integers; it is given fp32 instead.
_UPCAST = tl.constexpr(INTERPRETED)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b with fp32 accumulation; fp32 operands are multiplied as PRECISION says."""
    if _UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


def configs(*choices):
    """Launch configurations to tune over; the interpreter, where time says nothing, gets one.

    Each choice is (meta-parameters, warps, pipeline stages).
    """
    if INTERPRETED:
        choices = choices[:1]
    return [triton.Config(meta, num_warps=w, num_stages=s) for meta, w, s in choices]


def check_precision(precision) -> str:
    """The name that ops know a precision by: "ieee", "tf32", or "default" for None.

    Raises:
        ValueError: for anything else.
    """
    if precision not in (None, "ieee", "tf32"):
        raise ValueError(f"precision must be None, 'ieee' or 'tf32', not {precision!r}.")
    return precision or "default"


def matmul_precision(precision) -> str:
    """What "default" stands for where kernels run: PyTorch's setting for matrix products."""
    if precision != "default":
        return precision
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def places(size, kernel, stride, padding):
    """How many places a window has along one axis of an image."""
    return (size + 2 * padding - kernel) // stride + 1


def convolution_precision(precision) -> str:
    """What "default" stands for in convolutions: cuDNN's setting."""
    if precision != "default":
        return precision
    return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"


def shape(tensor) -> str:
    """The shape of a tensor as error messages print it."""
    return str(list(tensor.shape))


def check_layer(op, x, weight, bias, shared_rank, activation, slope, activations=ACTIVATIONS):
    """Check what a batched layer is given; `shared_rank` is the rank of an input shared by nets.

    Raises:
        ValueError: naming the shapes at fault and what to pass instead.
    """
    nets_axis = 0 if shared_rank == 2 else 1
    weight_rank = shared_rank + 1
    if weight.ndim != weight_rank or x.ndim not in (shared_rank, shared_rank + 1):
        raise ValueError(
            f"{op}: expected a weight of rank {weight_rank} and an input of rank {shared_rank} "
            f"(shared) or {shared_rank + 1} (per net), got x {shape(x)} and weight {shape(weight)}."
        )
    if x.numel() == 0 or weight.numel() == 0:
        raise ValueError(
            f"{op}: x {shape(x)} and weight {shape(weight)} must hold at least one net, one "
            "sample and one value on every axis."
        )
    if x.ndim > shared_rank and x.shape[nets_axis] != weight.shape[0]:
        raise ValueError(
            f"{op}: x {shape(x)} holds {x.shape[nets_axis]} nets but weight {shape(weight)} holds "
            f"{weight.shape[0]}; pass one input per net, or one of rank {shared_rank} for all."
        )
    inner_axis = -1 if shared_rank == 2 else -3
    if x.shape[inner_axis] != weight.shape[2]:
        raise ValueError(
            f"{op}: x {shape(x)} has {x.shape[inner_axis]} values on axis {inner_axis} but weight "
            f"{shape(weight)} takes {weight.shape[2]}."
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0], weight.shape[1]):
        raise ValueError(
            f"{op}: bias {shape(bias)} must be {list(weight.shape[:2])} to match weight "
            f"{shape(weight)}."
        )
    check_same_kind(op, x=x, weight=weight, bias=bias)
    if not weight[0].is_contiguous() or (bias is not None and not bias[0].is_contiguous()):
        raise ValueError(
            f"{op}: the weights {shape(weight)} (strides {weight.stride()}) of one net must lie "
            "contiguously in its row; only the stride between nets is free. Call .contiguous()."
        )
    if activation not in activations:
        raise ValueError(f"{op}: activation must be one of {activations}, not {activation!r}.")
    if slope < 0:
        raise ValueError(f"{op}: the slope of leaky_relu must not be negative, got {slope}.")


def check_same_kind(op, **tensors):
    """Check that all tensors given share one device and one floating dtype."""
    present = {name: t for name, t in tensors.items() if t is not None}
    kinds = {(t.device, t.dtype) for t in present.values()}
    if len(kinds) > 1 or not next(iter(kinds))[1].is_floating_point:
        listing = ", ".join(f"{k} {shape(t)} {t.dtype} on {t.device}" for k, t in present.items())
        raise ValueError(f"{op}: tensors must share one device and one floating dtype: {listing}.")
