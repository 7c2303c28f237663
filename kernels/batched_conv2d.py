"""One convolution of N nets at once, each net with its own weights.

    y[b, n, o, u, v] = act(Σ_{c,i,j} x[b, n, c, s·u + i − p, s·v + j − p] · w[n, o, c, i, j] + bias)

The kernels are in `layer.py`, what is fast on a CPU in `cpu.py`.
"""

import torch
import torch.nn.functional as F

from .backend import use_triton
from .common import activate, autocast, check, check_activation, fp32_precision, output_size, pair
from .cpu import UnfoldedConv2d, prefers_unfolding
from .layer import layer


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
        precision: of fp32 products in the Triton kernels, "ieee" or "tf32"; None: see
            `common.fp32_precision`.

    Returns:
        `[B, N, O, H', W']` with H' = ⌊(H + 2·padding − kh) / stride⌋ + 1 and W' likewise, in the
        images' dtype, or in `torch.autocast`'s inside its region.

    Raises:
        ValueError: on wrong ranks, mismatched nets or channels, no nets or samples, mixed devices
            or dtypes, weights not contiguous within a net, or a kernel larger than the image.
    """
    x, weight, bias = autocast(x, weight, bias)
    tensors = {"weight": (weight, "NOCij"), "x": (x, "BCHW", "BNCHW"), "bias": (bias, "NO")}
    check("batched_conv2d", tensors, rows=("weight", "bias"))
    act = check_activation("batched_conv2d", activation, slope, (None, "leaky_relu"))
    stride, padding = pair(stride), pair(padding)
    window, fits = (weight.shape[3:], stride, padding), min(stride) > 0 and min(padding) >= 0
    if not fits or min(size := output_size(x.shape[-2:], *window)) < 1:
        given = f"a kernel {list(weight.shape[3:])} with stride {list(stride)} and padding "
        given += f"{list(padding)} does not fit images x {list(x.shape)}."
        raise ValueError(f"batched_conv2d: {given}")
    if use_triton(x):
        how = act, float(slope), 1.0, fp32_precision(precision)
        return layer(x, weight, bias, stride, padding, *how)[0]
    if prefers_unfolding(x, weight, size):
        slope = float(slope) if activation == "leaky_relu" else 1.0
        return UnfoldedConv2d.apply(x, weight, bias, stride, padding, slope).permute(4, 0, 1, 2, 3)
    return batched_conv2d_reference(x, weight, bias, stride, padding, activation, slope)


def batched_conv2d_reference(
    x, weight, bias=None, stride=1, padding=0, activation=None, slope=0.01
):
    """The same in PyTorch: a grouped convolution, or if x is shared a dense one to N·O channels."""
    nets, bias = len(weight), None if bias is None else bias.flatten()
    images, groups = (x, 1) if x.ndim == 4 else (x.flatten(1, 2), nets)
    y = F.conv2d(images, weight.flatten(0, 1), bias, stride, padding, groups=groups)
    return activate(y, activation, slope).unflatten(1, (nets, -1))
