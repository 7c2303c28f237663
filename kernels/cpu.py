"""What is fast on a CPU: how many nets at once, and convolutions with samples innermost.

PyTorch's grouped convolution is fast on a CPU where oneDNN can block the channels: in and out in
multiples of 8. Otherwise it is up to 6 times slower than a plain product, as long as unfolding
doesn't blow the images up too far (strided convolutions mostly). Then

    cols[n, (c, i, j), (u, v, b)] = x[b, n, c, s·u + i − p, s·v + j − p]
    y[n, o, (u, v, b)] = Σ_k w[n, o, k] · cols[n, k, (u, v, b)] + bias[n, o]

with the sample as the innermost axis: unfolding copies whole runs of B values, the product is one
batched matrix product, and the result `[N, O, H', W', B]` is what the next layer unfolds again. It
is returned as a view `[B, N, O, H', W']`, so nobody else has to know.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

CHANNELS = 8  # fp32 channels in the blocks of oneDNN's layouts (nChw8c, nChw16c)
GROWTH = 4  # unfolding may make images this many times larger before moving them costs the gain
BLOCK_BYTES = 2 << 20  # unfolded images of this many bytes stay in a core's second-level cache

BLOCK_INPUTS = 512 << 10  # bytes of inputs that the nets of one block have between them
MOST_NETS = 32


def nets_per_block(inputs) -> int:
    """How many nets to evaluate together on a CPU, given the inputs [B, ...] of one net.

    32 nets on 64 digits of 8×8 pixels share what a single call costs, and their activations stay
    in the caches. One net on a hundred CIFAR images fills the caches alone, and PyTorch's dense
    convolution is faster than its grouped one: then the answer is 1, a loop.
    """
    return max(1, min(MOST_NETS, BLOCK_INPUTS // (inputs.numel() * inputs.element_size())))


def prefers_unfolding(x, weight, output_size) -> bool:
    """Whether the unfolded product is the faster way on this CPU tensor.

    True for images per net whose channels, in or out, aren't a multiple of 8, or that have samples
    innermost already, if unfolding makes them at most 4 times larger. Always false for what the
    unfolded product does not support: shared images (one dense convolution is faster), transforms
    of torch.func, torch.compile, and dtypes other than fp32 and fp64.
    """
    if x.ndim == 4 or x.dtype not in (torch.float32, torch.float64) or x.device.type != "cpu":
        return False
    if torch.compiler.is_compiling() or any(
        torch._C._functorch.is_functorch_wrapped_tensor(t) for t in (x, weight)
    ):
        return False
    growth = weight[0, 0, 0].numel() * output_size[0] * output_size[1] / x[0, 0, 0].numel()
    blocked = weight.shape[1] % CHANNELS == 0 and weight.shape[2] % CHANNELS == 0
    return (not blocked or x.stride(0) == 1) and growth <= GROWTH


class UnfoldedConv2d(torch.autograd.Function):
    """`batched_conv2d` for images per net; once differentiable. `slope` 1: no activation."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, slope):
        x = x.permute(1, 2, 3, 4, 0)  # [N, C, H, W, B]
        nets, out = weight.shape[:2]
        window = _Window(x.shape, weight.shape, stride, padding)
        y = x.new_empty(nets, out, window.height, window.width, x.shape[-1])
        columns = []
        for at in window.blocks(x):
            cols = window.unfold(x[at])
            w = weight[at].reshape(len(cols), out, -1)
            y_block = y[at].view(len(cols), out, -1)
            if bias is None:
                torch.bmm(w, cols, out=y_block)
            else:
                torch.baddbmm(bias[at].unsqueeze(-1), w, cols, out=y_block)
            columns.append(cols)
        if slope != 1:
            F.leaky_relu_(y, slope)
        ctx.window, ctx.slope, ctx.has_bias = window, slope, bias is not None
        ctx.save_for_backward(weight, y if slope != 1 else y.new_empty(0), *columns)
        return y.permute(4, 0, 1, 2, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        weight, y, *columns = ctx.saved_tensors
        nets, out = weight.shape[:2]
        g = g.permute(1, 2, 3, 4, 0)
        if ctx.slope != 1:
            g = torch.ops.aten.leaky_relu_backward(g, y, ctx.slope, True)
        g = g.reshape(nets, out, -1)
        need_x = ctx.needs_input_grad[0]
        dx = g.new_empty(ctx.window.images) if need_x else None
        dw = g.new_empty(weight.shape)
        start = 0
        for cols in columns:
            at = slice(start, start + len(cols))
            start = at.stop
            torch.bmm(g[at], cols.mT, out=dw[at].view(len(cols), out, -1))
            if need_x:
                ctx.window.fold(weight[at].reshape(len(cols), out, -1).mT @ g[at], dx[at])
        db = g.sum(-1) if ctx.has_bias else None
        return dx.permute(4, 0, 1, 2, 3) if need_x else None, dw, db, None, None, None


class _Window:
    """Where a kernel's window meets the images; unfolds images and folds gradients back."""

    def __init__(self, images, weight, stride, padding):
        self.images, self.stride, self.padding = images, stride, padding
        self.kernel = weight[3:]
        _, self.channels, height, width, self.samples = images
        self.padded = height + 2 * padding[0], width + 2 * padding[1]
        self.height = (self.padded[0] - self.kernel[0]) // stride[0] + 1
        self.width = (self.padded[1] - self.kernel[1]) // stride[1] + 1

    def blocks(self, x):
        """Slices of nets whose unfolded images fit BLOCK_BYTES, at least one net each."""
        window = self.channels * self.kernel[0] * self.kernel[1]
        net = window * self.height * self.width * self.samples * x.element_size()
        step = max(1, BLOCK_BYTES // net)
        return [slice(n, n + step) for n in range(0, len(x), step)]

    def unfold(self, x):
        """[n, C, H, W, B] -> [n, C·kh·kw, H'·W'·B]."""
        inner = self._inner(padded := x.new_zeros(len(x), self.channels, *self.padded, x.shape[-1]))
        inner.copy_(x)
        n, c, h, w, b = padded.stride()
        size = (len(x), self.channels, *self.kernel, self.height, self.width, self.samples)
        strides = (n, c, h, w, h * self.stride[0], w * self.stride[1], b)
        return padded.as_strided(size, strides).reshape(
            len(x), self.channels * self.kernel[0] * self.kernel[1], -1
        )

    def fold(self, cols, out):
        """The transpose of `unfold`: adds [n, C·kh·kw, H'·W'·B] up into `out` [n, C, H, W, B]."""
        kh, kw = self.kernel
        cols = cols.view(len(cols), self.channels, kh, kw, self.height, self.width, self.samples)
        padded = cols.new_zeros(len(cols), self.channels, *self.padded, self.samples)
        sh, sw = self.stride
        for i in range(kh):
            for j in range(kw):
                rows = slice(i, i + sh * self.height - sh + 1, sh)
                columns = slice(j, j + sw * self.width - sw + 1, sw)
                padded[:, :, rows, columns] += cols[:, :, i, j]
        out.copy_(self._inner(padded))

    def _inner(self, padded):
        (ph, pw), (height, width) = self.padding, self.images[2:4]
        return padded[:, :, ph : ph + height, pw : pw + width]
