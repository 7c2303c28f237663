"""One linear layer of N nets at once.

    y[n, b, o] = act(Σ_i x[n, b, i] · w[n, o, i] + bias[n, o])

The kernels are those of `layer.py`, which see a convolution of images of one pixel.
"""

import torch
import torch.nn.functional as F

from .backend import use_triton
from .common import activate, autocast, check, check_activation, fp32_precision
from .layer import layer


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
        precision: of fp32 products in the Triton kernels, "ieee" or "tf32"; None: see
            `common.fp32_precision`.

    Returns:
        `[N, B, O]`, in the inputs' dtype, or in `torch.autocast`'s inside its region.

    Raises:
        ValueError: on wrong ranks, mismatched nets, no nets, mixed devices or dtypes, or weights
            that are not contiguous within a net.
    """
    x, weight, bias = autocast(x, weight, bias)
    tensors = {"weight": (weight, "NOI"), "x": (x, "BI", "NBI"), "bias": (bias, "NO")}
    check("batched_linear", tensors, rows=("weight", "bias"))
    act = check_activation("batched_linear", activation, slope)
    if use_triton(x):
        pixels = (x if x.ndim == 2 else x.transpose(0, 1))[..., None, None]
        how = act, float(slope), float(omega), fp32_precision(precision)
        y = layer(pixels, weight[..., None, None], bias, [1, 1], [0, 0], *how)[0]
        return y.flatten(2).transpose(0, 1)
    return batched_linear_reference(x, weight, bias, activation, slope, omega)


def batched_linear_reference(x, weight, bias=None, activation=None, slope=0.01, omega=1.0):
    """The same in PyTorch: any device and dtype, differentiable, composes with torch.func."""
    b, beta = (x.new_zeros(1, 1), 0) if bias is None else (bias, 1)  # 0: no pass that adds nothing
    if x.ndim == 2:  # all nets read the same inputs: one dense product with N·O outputs
        y = F.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
        y = y.unflatten(1, (len(weight), -1)).transpose(0, 1)
    elif x.stride(1) == 1:  # samples innermost, as `cpu.py` leaves them: outputs and gradients too
        y = torch.baddbmm(b.unsqueeze(-1), weight, x.mT, beta=beta).mT
    else:
        y = torch.baddbmm(b.unsqueeze(1), x, weight.mT, beta=beta)
    return activate(y, activation, slope, omega)
