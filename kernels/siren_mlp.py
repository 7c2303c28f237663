"""The whole SIREN 3 → h → h → 1 of N nets: w3·sin(ω(W2·sin(ω(W1·p + b1)) + b2)) + b3.

Pointers and strides (in values):
    points [N, B, 3]  strides (pn, pb, pi); pn = 0 if all nets share the points
    rows   [N, P]     strides (rn, 1); a row is W1 [h, 3], b1 [h], W2 [h, h], b2 [h], w3 [h], b3
    out, g [N, B]     contiguous
    parts  [S, N, P]  fp32 gradients of the rows, summed over the points of each split

Forward, grid (N·⌈B/BM⌉,): one program takes BM points through all three layers. The h first-layer
activations are made BK at a time, multiplied into the second layer's sums and forgotten; hidden
activations are never written to memory.

Backward, two kernels that compute the hidden values again instead of having kept them. Grid (N, S):
one program walks every S-th tile of BM points, then back through the first layer in steps of BK.
Grid (N, ⌈h/BO⌉, S): one program holds BO rows of W2's gradient while it walks the same tiles.
Both write to places in `parts` that are theirs alone: no atomics, the same result in every run.

Traffic in bytes for values of s bytes: forward s·N·(P + B·(3 + 1)) against s·N·(P + B·(4 + 4h))
layer by layer. Products: 2·N·B·(h² + 4h) forward, 4 times that backward (the second layer again in
both kernels, its input's gradient, its weights' gradient).
"""

import torch
from torch import Tensor

from .backend import tl, triton, use_triton
from .batched_linear import batched_linear
from .common import autocast, cdiv, check, fp32_precision, joined, register_differentiable
from .tiles import place, product, put, sine_cosine, take

CACHE_VALUES = 1 << 18  # hidden activations, in values, that nets of one block have on a CPU
# A program holds all h sums of its points in registers, and without tensor cores the products' too.
MAX_HIDDEN, MAX_HIDDEN_IEEE = 256, 64


def siren_mlp(points, rows, hidden, omega=30.0, precision=None) -> torch.Tensor:
    """Evaluate N signed distance nets at B points each.

    Args:
        points: `[B, 3]` shared by all nets, or `[N, B, 3]`.
        rows: `[N, P]`, each net's parameters in module order: weight and bias of 3→h, h→h, h→1,
            so P = h² + 6h + 1. Contiguous within a row.
        hidden: h, the width of both hidden layers. The Triton kernel holds up to 256, or 64 in
            fp32 without tf32; wider nets, and points that need a gradient, run layer by layer
            through `batched_linear`.
        omega: frequency ω of the sines.
        precision: of fp32 products in the Triton kernel, "ieee" or "tf32"; None: see
            `common.fp32_precision`.

    Returns:
        Signed distances `[N, B, 1]`, in the rows' dtype, or in `torch.autocast`'s in its region.

    Raises:
        ValueError: on wrong ranks or row lengths, mismatched nets, no nets or points, mixed
            devices or dtypes, or rows that are not contiguous.
    """
    points, rows = autocast(points, rows)
    tensors = {"rows": (rows, "NP"), "points": (points, "BD", "NBD")}
    check("siren_mlp", tensors, rows=("rows",), D=3, P=siren_params(hidden))
    if not use_triton(rows):
        return _in_blocks(points, rows, hidden, omega)
    precision = fp32_precision(precision)
    if hidden > widest(rows.dtype, precision) or (points.requires_grad and torch.is_grad_enabled()):
        w1, b1, w2, b2, w3, b3 = _layers(rows, hidden)
        y = batched_linear(points, w1, b1, "sine", omega=omega, precision=precision)
        y = batched_linear(y, w2, b2, "sine", omega=omega, precision=precision)
        return batched_linear(y, w3, b3, precision=precision)
    return _siren(points, rows, int(hidden), float(omega), precision).unsqueeze(-1)


def widest(dtype, precision) -> int:
    """The largest h that the kernels hold without spilling registers (see `aot`)."""
    return MAX_HIDDEN_IEEE if dtype == torch.float32 and precision == "ieee" else MAX_HIDDEN


def siren_mlp_reference(points, rows, hidden, omega=30.0):
    """The same in PyTorch: one batched product per layer."""
    w1, b1, w2, b2, w3, b3 = _layers(rows, hidden)
    points = points.expand(rows.shape[0], -1, -1)
    scaled = {"beta": omega, "alpha": omega}  # inside the product, not in a pass of its own
    y = torch.sin(torch.baddbmm(b1[:, None], points, w1.mT, **scaled))
    y = torch.sin(torch.baddbmm(b2[:, None], y, w2.mT, **scaled))
    return torch.baddbmm(b3[:, None], y, w3.mT)


def _in_blocks(points, rows, hidden, omega):
    """The PyTorch path, a few nets at a time on a CPU: their activations stay in its caches."""
    step = max(1, CACHE_VALUES // (points.shape[-2] * hidden))
    if rows.device.type != "cpu" or step >= rows.shape[0]:
        return siren_mlp_reference(points, rows, hidden, omega)
    blocks = zip(points.expand(rows.shape[0], -1, -1).split(step), rows.split(step), strict=True)
    return torch.cat([siren_mlp_reference(p, block, hidden, omega) for p, block in blocks])


def siren_params(hidden) -> int:
    """P, the number of parameters of a 3 → h → h → 1 net."""
    return hidden * hidden + 6 * hidden + 1


def _layers(rows, h):
    w1, b1, w2, b2, w3, b3 = rows.split([3 * h, h, h * h, h, h, 1], dim=1)
    return w1.unflatten(1, (h, 3)), b1, w2.unflatten(1, (h, h)), b2, w3.unflatten(1, (1, h)), b3


@triton.jit
def _points(points, m, pb, pi, B):
    """The coordinates of the points m: three fp32 vectors."""
    return [take(points + m.to(tl.int64) * pb + axis * pi, m < B) for axis in (0, 1, 2)]


@triton.jit
def _first_layer(row, p, k, h, omega):
    """ω(W1·p + b1) for the neurons k: [BM, BK] in fp32."""
    z = p[0][:, None] * take(row + k * 3, k < h)[None, :]
    for axis in tl.static_range(1, 3):
        z += p[axis][:, None] * take(row + k * 3 + axis, k < h)[None, :]
    return (z + take(row + 3 * h + k, k < h)[None, :]) * omega


@triton.jit
def _second_layer(row, p, col, h, omega, PRECISION: tl.constexpr, BK: tl.constexpr):
    """ω(W2·sin(first layer) + b2) at the points p for the neurons col, in fp32."""
    acc = tl.zeros((p[0].shape[0], col.shape[0]), tl.float32)
    for start in range(0, h, BK):
        k = start + tl.arange(0, BK)
        hidden = sine_cosine(_first_layer(row, p, k, h, omega))[0]
        inside = (k[:, None] < h) & (col[None, :] < h)
        w = tl.load(row + 4 * h + col[None, :] * h + k[:, None], mask=inside, other=0)
        acc = product(hidden.to(w.dtype), w, acc, PRECISION)
    return (acc + take(row + 4 * h + h * h + col, col < h)[None, :]) * omega


@triton.jit
def _forward_kernel(
    points, rows, out, B, h, pn, pb, pi, rn, omega,
    PRECISION: tl.constexpr, HP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid (N·⌈B/BM⌉,): the outputs of one net at BM points. HP is h up to a power of two."""
    n, m, col = place(B, HP, BM, HP)
    n = n.to(tl.int64)
    row = rows + n * rn
    p = _points(points + n * pn, m, pb, pi, B)
    angle = _second_layer(row, p, col, h, omega, PRECISION, BK)
    last = row + 5 * h + h * h
    y = tl.sum(sine_cosine(angle)[0] * take(last + col, col < h)[None, :], 1)
    y += tl.load(last + h).to(tl.float32)
    put(out + n * B + m, y, m < B)


@triton.jit(do_not_specialize=["nets", "splits"])
def _backward_kernel(
    g, points, rows, parts, B, h, nets, splits, pn, pb, pi, rn, omega,
    PRECISION: tl.constexpr, HP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid (N, S): all gradients but W2's, over every S-th tile of points of one net.

    `parts` comes zeroed; only this program writes these places of parts[split, n].
    """
    n, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    col = tl.arange(0, HP)
    row, size = rows + n * rn, h * h + 6 * h + 1
    part = parts + (split * nets + n) * size
    w3 = take(row + 5 * h + h * h + col, col < h)
    dw3, db2 = tl.zeros((HP,), tl.float32), tl.zeros((HP,), tl.float32)
    db3 = tl.zeros((BM,), tl.float32)
    for tile in range(split, tl.cdiv(B, BM), splits):
        m = tile * BM + tl.arange(0, BM)
        p = _points(points + n * pn, m, pb, pi, B)
        go = take(g + n * B + m, m < B)
        angle = _second_layer(row, p, col, h, omega, PRECISION, BK)
        hidden, slope = sine_cosine(angle)
        g2 = go[:, None] * w3[None, :] * omega * slope
        dw3 += tl.sum(go[:, None] * hidden, 0)
        db2 += tl.sum(g2, 0)
        db3 += go
        g2 = g2.to(rows.dtype.element_ty)
        for start in range(0, h, BK):
            k = start + tl.arange(0, BK)
            inside = (col[:, None] < h) & (k[None, :] < h)
            w = tl.load(row + 4 * h + col[:, None] * h + k[None, :], mask=inside, other=0)
            g1 = product(g2, w, tl.zeros((BM, BK), tl.float32), PRECISION)
            g1 = g1 * omega * sine_cosine(_first_layer(row, p, k, h, omega))[1]
            put(part + 3 * h + k, tl.sum(g1, 0), k < h, True)
            for axis in tl.static_range(3):
                put(part + k * 3 + axis, tl.sum(g1 * p[axis][:, None], 0), k < h, True)
        tl.debug_barrier()  # what this tile added to `part` is there before the next one reads it
    put(part + 4 * h + h * h + col, db2, col < h)
    put(part + 5 * h + h * h + col, dw3, col < h)
    tl.store(part + size - 1, tl.sum(db3, 0))


@triton.jit(do_not_specialize=["nets", "splits"])
def _w2_grad_kernel(
    g, points, rows, parts, B, h, nets, splits, pn, pb, pi, rn, omega,
    PRECISION: tl.constexpr, HP: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Grid (N, ⌈h/BO⌉, S): BO rows of W2's gradient over every S-th tile of points of one net.

    The rows stay in registers from the first tile to the last; the first layer is made again for
    each tile, which costs 3 products a value against the 2·BO it feeds.
    """
    n, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    o, k = tl.program_id(1) * BO + tl.arange(0, BO), tl.arange(0, HP)
    row, size = rows + n * rn, h * h + 6 * h + 1
    inside = (o[:, None] < h) & (k[None, :] < h)
    at = 4 * h + o[:, None] * h + k[None, :]
    w2 = tl.load(row + at, mask=inside, other=0)
    b2, w3 = take(row + 4 * h + h * h + o, o < h), take(row + 5 * h + h * h + o, o < h)
    acc = tl.zeros((BO, HP), tl.float32)
    for tile in range(split, tl.cdiv(B, BM), splits):
        m = tile * BM + tl.arange(0, BM)
        p = _points(points + n * pn, m, pb, pi, B)
        hidden = sine_cosine(_first_layer(row, p, k, h, omega))[0].to(w2.dtype)
        z = product(hidden, tl.trans(w2), tl.zeros((BM, BO), tl.float32), PRECISION)
        g2 = take(g + n * B + m, m < B)[:, None] * w3[None, :] * omega
        g2 = g2 * sine_cosine((z + b2[None, :]) * omega)[1]
        acc = product(tl.trans(g2.to(w2.dtype)), hidden, acc, PRECISION)
    put(parts + (split * nets + n) * size + at, acc, inside)


def _options(hidden, precision, rows, points) -> tuple[dict, int]:
    """How programs of BM points by all neurons run, and how many neurons they take at a time.

    HP is the width up to a power of two. Wide nets and exact products need the registers of eight
    warps. The compiler may use all 255: left to itself it spills some to make do with 128. In one
    stage, as in `common.tile`.
    """
    padded = max(16, triton.next_power_of_2(hidden))
    exact = widest(rows.dtype, precision) < MAX_HIDDEN
    how = {"num_warps": 8 if padded > 64 or exact else 4, "num_stages": 1, "maxnreg": 255}
    how |= {"HP": padded, "PRECISION": precision, "BM": points}
    return how, min(padded, 32 if exact else 64)


def _is_roomy(device) -> bool:
    """Whether a block may use more than 128 kB of shared memory, as on A100, H100 and B200."""
    known = device.type == "cuda" and torch.cuda.get_device_properties(device)
    return known and known.shared_memory_per_block_optin > 1 << 17


def _empty(points, rows, hidden, omega, precision):
    return rows.new_empty(rows.shape[0], points.shape[-2])


def launch_forward(
    points: Tensor, rows: Tensor, hidden: int, omega: float, precision: str
) -> Tensor:
    """Launch the forward kernel; gives the outputs [N, B]."""
    out = _empty(points, rows, hidden, omega, precision)
    nets, samples = out.shape
    options, _ = _options(hidden, precision, rows, 64)
    strides, few = points.expand(nets, -1, -1).stride(), max(16, options["HP"] // 8)
    given = points, rows, out, samples, hidden, *strides, rows.stride(0), omega
    _forward_kernel[(nets * cdiv(samples, options["BM"]),)](*given, BK=few, **options)
    return out


def launch_backward(g, needs, points, rows, hidden, omega, precision, out):
    """The gradient of the rows, after None for that of the points."""
    nets, samples = out.shape
    splits = max(1, min(cdiv(samples, 64), 256 // nets))  # about 256 programs in all
    parts = rows.new_zeros(splits, nets, siren_params(hidden), dtype=torch.float32)
    strides = *points.expand(nets, -1, -1).stride(), rows.stride(0)
    given = g.contiguous(), points, rows, parts, samples, hidden, nets, splits, *strides, omega
    how, some = _options(hidden, precision, rows, 32)
    few = some if hidden <= 64 and rows.dtype == torch.float32 else min(some, 32)  # or it spills
    _backward_kernel[(nets, splits)](*given, BK=few, **how)
    some = 32 if hidden > 128 and rows.element_size() == 4 and not _is_roomy(rows.device) else some
    _w2_grad_kernel[(nets, cdiv(hidden, some), splits)](*given, BO=some, **how)
    return None, joined(parts, rows.dtype)


_siren = register_differentiable("siren_mlp", launch_forward, _empty, launch_backward)
