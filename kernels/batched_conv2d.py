"""One convolution of N nets at once, each net with its own kernel."""

import torch
import torch.nn.functional as F

from .common import activate, check_layer


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
        activation: None or "leaky_relu" (negative `slope`).
        precision: of fp32 products in the Triton kernels, "ieee" or "tf32"; None follows
            `torch.backends.cudnn.allow_tf32`.

    Returns:
        `[B, N, O, H', W']` with H' = ⌊(H + 2·padding − kh) / stride⌋ + 1 and W' likewise.

    Raises:
        ValueError: on wrong ranks, mismatched nets or channels, no nets or samples, mixed devices
            or dtypes, weights not contiguous within a net, or a kernel larger than the image.
    """
    check_layer("batched_conv2d", x, weight, bias, 4, activation, (None, "leaky_relu"))
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
