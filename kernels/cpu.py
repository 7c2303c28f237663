"""What is fast on a CPU: how many nets at once, and convolutions with samples innermost.

PyTorch's grouped convolution is fast on a CPU where oneDNN can block the channels: in and out in
multiples of 8. Otherwise it is up to 6 times slower than a plain product, as long as unfolding
doesn't blow the images up too far (strided convolutions mostly), and without oneDNN always. Then

    cols[n, (c, i, j), (u, v, b)] = x[b, n, c, s·u + i − p, s·v + j − p]
    y[n, o, (u, v, b)] = Σ_k w[n, o, k] · cols[n, k, (u, v, b)] + bias[n, o]

with the sample as the innermost axis: unfolding copies whole runs of B values, the product is one
batched matrix product, and the result `[N, O, H', W', B]` is what the next layer unfolds again. It
is returned as a view `[B, N, O, H', W']`, so nobody else has to know.
"""

from math import prod

import torch
import torch.nn.functional as F

from .common import output_size

CHANNELS = 8  # fp32 channels in the blocks of oneDNN's layouts (nChw8c, nChw16c)
GROWTH = 4  # unfolding may make images this many times larger before moving them costs the gain
BLOCK_BYTES = 4 << 20  # unfolded images of this many bytes stay in the second-level caches

BLOCK_INPUTS = 2 << 20  # bytes of inputs that the nets of one block have between them
ALONE = 320 << 10  # bytes of inputs from which one net fills the caches
MOST_NETS = 32


def nets_per_block(inputs) -> int:
    """How many nets to evaluate together on a CPU, given the inputs [B, ...] of one net.

    32 nets on 64 digits of 8×8 pixels share what a single call costs, and their activations stay
    in the caches. One net on a hundred CIFAR images fills the caches alone, and PyTorch's dense
    convolution is faster than its grouped one: then the answer is 1, a loop.
    """
    size = inputs.numel() * inputs.element_size()
    return 1 if size > ALONE else min(MOST_NETS, BLOCK_INPUTS // size)


def has_onednn() -> bool:
    """Whether PyTorch convolves through oneDNN, as on x86; on Macs it doesn't."""
    return torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled


def channels_last(x):
    """Images [B, C, H, W] on a CPU with their channels innermost, which oneDNN convolves fastest.

    What is anything else stays as it is.
    """
    if x.ndim != 4 or x.device.type != "cpu" or not has_onednn():
        return x
    pixels = x.movedim(1, -1).flatten(1)  # no `contiguous`: it sees no order in a single channel
    return pixels.unflatten(1, (*x.shape[2:], -1)).movedim(-1, 1)


def prefers_unfolding(x, weight, output_size) -> bool:
    """Whether the unfolded product is the faster way on this CPU tensor.

    True for images per net whose channels, in or out, aren't a multiple of 8, or that have samples
    innermost already, if unfolding makes them at most 4 times larger; for all images per net where
    there is no oneDNN (as on Macs), since grouped convolutions take 1.5 to 10 times as long.
    Always false for what the unfolded product does not support: shared images (one dense
    convolution is faster), transforms of torch.func, torch.compile, and dtypes other than fp32 and
    fp64.
    """
    plain = x.ndim == 5 and x.dtype in (torch.float32, torch.float64) and x.device.type == "cpu"
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if not plain or traced or torch.autograd.forward_ad._current_level >= 0:
        return False
    if not has_onednn():
        return True
    growth = weight[0, 0, 0].numel() * output_size[0] * output_size[1] / x[0, 0, 0].numel()
    blocked = weight.shape[1] % CHANNELS == 0 and weight.shape[2] % CHANNELS == 0
    return (not blocked or x.stride(0) == 1) and growth <= GROWTH


class UnfoldedConv2d(torch.autograd.Function):
    """`batched_conv2d` for images per net, answers as [N, O, H', W', B]; `slope` 1: no activation.

    Turned by whoever calls it: of a view made inside steps in place would be refused.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, slope):
        ctx.given, inputs = (stride, padding, "leaky_relu", slope), (x, weight, bias)
        x = x.permute(1, 2, 3, 4, 0)  # [N, C, H, W, B]
        window = _Window(x.shape, weight.shape, stride, padding)
        y = x.new_empty(*weight.shape[:2], *window.size, x.shape[-1])
        ctx.window, ctx.slope, ctx.blocks, columns = window, slope, window.blocks(x), []
        b, beta = (x.new_zeros(len(weight), 1), 0) if bias is None else (bias, 1)
        for at in ctx.blocks:
            cols = window.unfold(x[at])
            w, y_block = weight[at].flatten(2), y[at].flatten(2)
            torch.baddbmm(b[at].unsqueeze(-1), w, cols, beta=beta, out=y_block)
            if slope != 1:
                F.leaky_relu_(y_block, slope)
            columns.append(cols)
        ctx.save_for_backward(*inputs, y if slope != 1 else y.new_empty(0), *columns)
        return y

    @staticmethod
    def backward(ctx, g):
        x, weight, bias, y, *columns = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again: as PyTorch does it
            from .batched_conv2d import batched_conv2d_reference  # which imports this file

            out, needs = batched_conv2d_reference(x, weight, bias, *ctx.given), ctx.needs_input_grad
            wanted = [t for t, need in zip((x, weight, bias), needs, strict=False) if need]
            g = g.permute(4, 0, 1, 2, 3)
            found = iter(torch.autograd.grad(out, wanted, g, create_graph=True))
            return *(next(found) if need else None for need in needs[:3]), None, None, None
        need_x, _, need_bias, *_ = ctx.needs_input_grad
        dx = g.new_empty(ctx.window.images) if need_x else None
        dw, scratch = weight.new_empty(weight.shape), torch.empty_like(columns[0])
        db = g.new_empty(weight.shape[:2]) if need_bias else None
        for at, cols in zip(ctx.blocks, columns, strict=True):  # each while it lies in the cache
            g_block = g[at]
            if ctx.slope != 1:
                g_block = torch.ops.aten.leaky_relu_backward(g_block, y[at], ctx.slope, True)
            g_block = g_block.flatten(2)
            torch.bmm(g_block, cols.mT, out=dw[at].flatten(2))
            if need_bias:
                torch.sum(g_block, -1, out=db[at])
            if need_x:
                w = weight[at].flatten(2)
                grad = torch.bmm(w.mT, g_block, out=scratch[: len(cols)])
                ctx.window.fold(grad, dx[at])
        dx = dx.permute(4, 0, 1, 2, 3) if need_x else None
        return dx, dw, db, None, None, None


class _Window:
    """Where a kernel's window meets the images; unfolds images and folds gradients back."""

    def __init__(self, images, weight, stride, padding):
        self.images, self.kernel, self.padded = images, weight[3:], any(padding)
        self.size = output_size(images[2:4], self.kernel, stride, padding)
        sides = zip(images[2:4], self.size, self.kernel, stride, padding, strict=True)
        rows, columns = (list(_meetings(*side)) for side in sides)
        self.meetings = [
            ((slice(None), slice(None), i, j, u, v), (slice(None), slice(None), h, w))
            for i, (u, h) in enumerate(rows)
            for j, (v, w) in enumerate(columns)
        ]

    def blocks(self, x):
        """Slices of nets whose unfolded images fit BLOCK_BYTES, at least one net each."""
        net = x.shape[1] * prod((*self.kernel, *self.size)) * x.shape[-1] * x.element_size()
        step = max(1, BLOCK_BYTES // net)
        return [slice(n, n + step) for n in range(0, len(x), step)]

    def unfold(self, x):
        """[n, C, H, W, B] -> [n, C·kh·kw, H'·W'·B]."""
        x = x.contiguous()  # turned once here, not again in every place of the window
        new = x.new_zeros if self.padded else x.new_empty
        cols = new(*x.shape[:2], *self.kernel, *self.size, x.shape[-1])
        for in_window, in_image in self.meetings:
            cols[in_window] = x[in_image]
        return cols.flatten(4).flatten(1, 3)

    def fold(self, cols, out):
        """The transpose of `unfold`: adds [n, C·kh·kw, H'·W'·B] up into `out` [n, C, H, W, B]."""
        cols = cols.view(*out.shape[:2], *self.kernel, *self.size, out.shape[-1])
        out.zero_()
        for in_window, in_image in self.meetings:
            out[in_image] += cols[in_window]


def _meetings(size, places, kernel, stride, padding):
    """For each value i of the window: the places u where it lies in the image, and its pixels."""
    for i in range(kernel):
        first = max(0, -((i - padding) // stride))  # s·u + i − p ≥ 0
        last = max(first, min(places, (size - 1 - i + padding) // stride + 1))
        pixel = first * stride + i - padding
        yield slice(first, last), slice(pixel, pixel + (last - first) * stride, stride)
