"""A model of how fast each kernel can be: bytes and products counted, datasheets for the GPU.

Nothing here is measured. For each kernel it counts, from shapes alone,

    needed bytes    every input read once, every output written once (DRAM traffic at its least)
    loaded bytes    what the programs' loads and stores ask for; caches serve the repeats
    needed products multiplications and additions of the formula
    issued products those of whole tiles, masked or zero entries included

and bounds the time by needed bytes / bandwidth and by issued products / peak, whichever is longer.
`tests/kernels/test_roofline.py` checks the counts against the interpreter.
"""

from dataclasses import dataclass
from math import ceil

# Bytes per second of memory and TF32 products per second on tensor cores (dense), from NVIDIA's
# datasheets of the A100 80 GB SXM and the H100 SXM.
GPUS = {"A100": (2.039e12, 156e12), "H100": (3.35e12, 494.7e12)}


@dataclass(frozen=True)
class Count:
    """Bytes and products of one kernel launch."""

    needed_bytes: int
    loaded_bytes: int
    needed_products: int
    issued_products: int

    @property
    def intensity(self) -> float:
        """Products a needed byte: where the kernel stands on the roofline's horizontal axis."""
        return self.needed_products / self.needed_bytes

    def modelled_seconds(self, gpu: str) -> float:
        """The model's time: memory (each byte once) or tensor cores (whole tiles), the slower."""
        bandwidth, peak = GPUS[gpu]
        return max(self.needed_bytes / bandwidth, self.issued_products / peak)

    def of_roofline(self, gpu: str) -> float:
        """Modelled speed as a share of the roofline: below 1 where tiles are padded."""
        bandwidth, peak = GPUS[gpu]
        ideal = max(self.needed_bytes / bandwidth, self.needed_products / peak)
        return ideal / self.modelled_seconds(gpu)


def _tiled(rows, cols, inner, tile):
    """Tiles of rows and cols, and the products they issue for one net."""
    m, n, k = (ceil(a / b) for a, b in zip((rows, cols, inner), tile, strict=True))
    return m, n, 2 * m * tile[0] * n * tile[1] * k * tile[2]


def linear_forward(nets, samples, inner, out, tile=(32, 32, 32), shared=False, size=4) -> Count:
    """The forward kernel of `batched_linear` with bias and without a sine."""
    m, n, issued = _tiled(samples, out, inner, tile)
    x, w, y = samples * inner, out * inner, samples * out
    return Count(
        needed_bytes=size * (x * (1 if shared else nets) + nets * (w + out + y)),
        loaded_bytes=size * nets * (x * n + (w + out) * m + y),
        needed_products=2 * nets * samples * inner * out,
        issued_products=nets * issued,
    )


def linear_weight_grad(nets, samples, inner, out, tile=(32, 32, 32), size=4) -> Count:
    """The weight gradient of `batched_linear` with bias and leaky ReLU, inputs per net."""
    m, n, issued = _tiled(out, inner, samples, tile)
    x, w, y = samples * inner, out * inner, samples * out
    return Count(
        needed_bytes=size * nets * (2 * y + x + w + out),
        loaded_bytes=size * nets * (2 * y * n + x * m + w + out),
        needed_products=2 * nets * samples * inner * out,
        issued_products=nets * issued,
    )


def conv_forward(
    nets, samples, inner, out, image, kernel, stride, tile=(64, 16, 32), shared=False, size=4
) -> Count:
    """The forward kernel of `batched_conv2d` on square images, bias, no padding."""
    side = (image - kernel) // stride + 1
    pixels, window = samples * side * side, inner * kernel * kernel
    m, n, issued = _tiled(pixels, out, window, tile)
    x, w, y = samples * inner * image * image, out * window, pixels * out
    return Count(
        needed_bytes=size * (x * (1 if shared else nets) + nets * (w + out + y)),
        loaded_bytes=size * nets * (pixels * window * n + (w + out) * m + y),
        needed_products=2 * nets * pixels * window * out,
        issued_products=nets * issued,
    )


def siren_forward(nets, points, hidden, tile=(64, 16), shared=False, size=4) -> Count:
    """The forward kernel of `siren_mlp`; `tile` is (points, neurons at a time).

    Products are those of the second layer, which alone run on tensor cores.
    """
    h, padded = hidden, max(16, 1 << (hidden - 1).bit_length())
    tiles, steps = ceil(points / tile[0]), ceil(hidden / tile[1])
    row = h * h + 6 * h + 1
    return Count(
        needed_bytes=size * (3 * points * (1 if shared else nets) + nets * (row + points)),
        loaded_bytes=size * nets * (4 * points + tiles * row),
        needed_products=2 * nets * points * h * h,
        issued_products=2 * nets * tiles * tile[0] * steps * tile[1] * padded,
    )


def loss(nets, samples, classes, rows, size=4) -> Count:
    """`distillation_loss` with per-net targets and labels, `rows` samples a program."""
    values, programs = nets * samples * classes, nets * ceil(samples / rows)
    return Count(
        needed_bytes=3 * size * values + 8 * samples + 4 * nets,
        loaded_bytes=3 * size * values + 8 * nets * samples + 8 * programs,
        needed_products=0,
        issued_products=0,
    )


def pack(nets, parameters, chunks, length, size=4) -> Count:
    """`chunk_pack` of rows without standardisation: values read, PRep written."""
    moved = size * nets * (parameters + chunks * length)
    return Count(moved, moved, 0, 0)


def paper_cases() -> dict[str, Count]:
    """The tutorial's kernels at the paper's sizes: 8 nets × 128 images, 4 SIRENs × 20,000."""
    return {
        "LeNetLike conv 1 (shared images)": conv_forward(8, 128, 3, 6, 32, 5, 2, shared=True),
        "LeNetLike conv 2": conv_forward(8, 128, 6, 16, 14, 5, 2),
        "LeNetLike linear 1": linear_forward(8, 128, 400, 120),
        "linear 1, weight gradient": linear_weight_grad(8, 128, 400, 120),
        "ResNet8 conv 64 to 64": conv_forward(8, 128, 64, 64, 10, 3, 1, tile=(64, 64, 32)),
        "SIREN 256, one kernel": siren_forward(4, 20_000, 256),
        "distillation loss": loss(8, 128, 10, 64),
        "chunk packing (LeNetLike)": pack(8, 62_006, 7, 10_000),
    }
