"""A model of how fast each kernel can be: bytes and products counted, datasheets for the GPU.

Nothing here is measured. For each kernel it counts, from shapes alone,

    needed bytes    every input read once, every output written once (DRAM traffic at its least)
    loaded bytes    what the programs' loads and stores ask for; caches serve the repeats
    needed products multiplications and additions of the formula
    issued products those of whole tiles, masked or zero entries included

for values of 4 bytes, and bounds the time by needed bytes / bandwidth and by issued products /
peak, whichever is longer.
`tests/kernels/test_roofline.py` checks the counts against the interpreter.
"""

from dataclasses import dataclass, replace
from math import ceil

from .common import tile

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
        ideal = replace(self, issued_products=self.needed_products)
        return ideal.modelled_seconds(gpu) / self.modelled_seconds(gpu)


def _product(rows, cols, inner, sums=False):
    """Tiles of rows and cols, products of the formula and those of whole tiles, for one net."""
    t = tile(rows, cols, sums=sums)
    m, n, k = ceil(rows / t["BM"]), ceil(cols / t["BN"]), ceil(inner / t["BK"])
    return m, n, 2 * rows * cols * inner, 2 * m * t["BM"] * n * t["BN"] * k * t["BK"]


def conv_forward(nets, samples, inner, out, image, kernel, stride, shared=False) -> Count:
    """The forward kernel of a layer on square images, with bias, no padding, without a sine."""
    side = (image - kernel) // stride + 1
    pixels, window = samples * side * side, inner * kernel * kernel
    m, n, needed, issued = _product(pixels, out, window)
    x, w, y = samples * inner * image * image, out * window, pixels * out
    needed_bytes = 4 * (x * (1 if shared else nets) + nets * (w + out + y))
    loaded_bytes = 4 * nets * (pixels * window * n + (w + out) * m + y)
    return Count(needed_bytes, loaded_bytes, nets * needed, nets * issued)


def linear_forward(nets, samples, inner, out, shared=False) -> Count:
    """The same for a linear layer: images of one pixel."""
    return conv_forward(nets, samples, inner, out, 1, 1, 1, shared)


def linear_weight_grad(nets, samples, inner, out) -> Count:
    """The weight gradient of `batched_linear` with bias and leaky ReLU, inputs per net."""
    m, n, needed, issued = _product(out, inner, samples, sums=True)
    x, w, y = samples * inner, out * inner, samples * out
    needed_bytes = 4 * nets * (2 * y + x + w + out)
    loaded_bytes = 4 * nets * (2 * y * n + x * m + w + out)
    return Count(needed_bytes, loaded_bytes, nets * needed, nets * issued)


def siren_forward(nets, points, hidden, shared=False) -> Count:
    """The forward kernel of `siren_mlp`; products are the second layer's, on tensor cores."""
    padded, row = max(16, 1 << (hidden - 1).bit_length()), hidden * hidden + 6 * hidden + 1
    tiles, steps = ceil(points / 64), ceil(hidden / (step := max(16, padded // 8)))
    needed_bytes = 4 * (3 * points * (1 if shared else nets) + nets * (row + points))
    loaded_bytes = 4 * nets * (4 * points + tiles * row)
    needed, issued = 2 * points * hidden * hidden, 2 * tiles * 64 * steps * step * padded
    return Count(needed_bytes, loaded_bytes, nets * needed, nets * issued)


def loss(nets, samples, classes, rows) -> Count:
    """`distillation_loss` with per-net targets and labels, `rows` samples a program."""
    moved, programs = 12 * nets * samples * classes, nets * ceil(samples / rows)
    needed_bytes = moved + 8 * samples + 4 * (nets + programs)
    return Count(needed_bytes, moved + 8 * nets * samples + 8 * programs, 0, 0)


def standardise(nets, chunks, length) -> Count:
    """The one pass over [N, T, L] that packing with mean and std adds to the copy."""
    values, programs = chunks * length, nets * ceil(chunks * length / 1024)
    moved, scale = 8 * nets * values, 8 * values
    return Count(moved + scale + 8 * nets, moved + nets * scale + 8 * programs, 0, 0)


def paper_cases() -> dict[str, Count]:
    """The tutorial's kernels at the paper's sizes: 8 nets × 128 images, 4 SIRENs × 20,000."""
    return {
        "LeNetLike conv 1 (shared images)": conv_forward(8, 128, 3, 6, 32, 5, 2, shared=True),
        "LeNetLike conv 2": conv_forward(8, 128, 6, 16, 14, 5, 2),
        "LeNetLike linear 1": linear_forward(8, 128, 400, 120),
        "linear 1, weight gradient": linear_weight_grad(8, 128, 400, 120),
        "ResNet8 conv 64 to 64": conv_forward(8, 128, 64, 64, 10, 3, 1),
        "SIREN 256, one kernel": siren_forward(4, 20_000, 256),
        "distillation loss": loss(8, 128, 10, 64),
        "standardising (LeNetLike)": standardise(8, 7, 10_000),
    }
