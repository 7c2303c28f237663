"""What programs of several kernels do with their tiles: place, multiply, activate, load, store."""

from .backend import INTERPRETED, tl, triton


@triton.jit
def place(rows, cols, BM: tl.constexpr, BN: tl.constexpr, index=None):
    """Which of several results [rows, cols] has the tile `index`, and the tile's rows and columns.

    None takes the program's tile. Tiles of one result, and in it of the same rows, run side by side
    and meet in the cache.
    """
    index = tl.program_id(0) if index is None else index
    across = tl.cdiv(cols, BN)
    tiles = tl.cdiv(rows, BM) * across
    share, at = index // tiles, index % tiles
    row = (at // across) * BM + tl.arange(0, BM)
    return share, row, (at % across) * BN + tl.arange(0, BN)


# Triton's interpreter multiplies the bit patterns of bf16 as integers; it is given fp32 instead,
# and it multiplies fp32 exactly under any precision.
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b with fp32 accumulation; fp32 operands are multiplied as PRECISION says."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    elif PRECISION == "tf32" and a.dtype == tl.float32:
        a, b = _nearest_tf32(a), _nearest_tf32(b)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _nearest_tf32(x):
    """fp32 rounded to the nearest tf32. Tensor cores cut the low 13 bits off instead, which makes
    every operand a little smaller, and sums of products 0.07%."""
    return tl.inline_asm_elementwise(
        "cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def sine_cosine(x):
    """sin(x) and cos(x) of fp32 angles up to 2¹⁶ half turns; exact to fp32 rounding of x.

    Both are (−1)^k times a polynomial of r = x − k·π in [−π/2, π/2]; what isn't used the compiler
    leaves out. Triton's own sine carries code for angles of any size, which costs registers, spills
    and a thousand instructions; SIREN's stay below 2¹⁶ half turns. π comes in two parts, the first,
    201/64, with 8 significant bits, so that k · 201/64 is exact. The polynomials, of degrees 9 and
    10, are the best on that interval (Chebyshev fit), 4e-9 and 2e-10 off: below fp32's rounding.
    """
    k = tl.floor(x * 0.3183098861837907 + 0.5)
    r = (x - k * 3.140625) - k * 0.0009676535897932
    sign = tl.where((k.to(tl.int32) & 1) == 1, -1.0, 1.0)
    t = r * r
    p = 0.00833305017067 + t * (-0.000198090174087 + t * 2.60510763533e-6)
    p = 0.999999995699 + t * (-0.166666579478 + t * p)
    q = -0.00138883608425 + t * (2.47601355168e-5 + t * -2.60510763473e-7)
    q = 0.99999999978 + t * (-0.49999999357 + t * (0.0416666362089 + t * q))
    return sign * r * p, sign * q


@triton.jit
def act_forward(z, step: tl.constexpr):
    """The activation of an fp32 tile, as step.act says: none, leaky ReLU, or sin(omega · z)."""
    if step.act == 1:
        z = tl.where(z > 0, z, z * step.slope)
    if step.act == 2:
        z = sine_cosine(z * step.omega)[0]
    return z


@triton.jit
def act_backward(g, saved, at, mask, step: tl.constexpr):
    """The gradient before the activation in fp32, from g, the one after it, at the places `at`.

    `saved` holds the outputs for leaky ReLU (their signs are the inputs') and the inputs for sine.
    """
    grad = take(g + at, mask)
    if step.act == 1:
        grad = tl.where(take(saved + at, mask) > 0, grad, grad * step.slope)
    if step.act == 2:
        grad = grad * step.omega * sine_cosine(take(saved + at, mask) * step.omega)[1]
    return grad


@triton.jit
def take(pointer, mask):
    """Load a tile as fp32, with zeros where the mask is false."""
    return tl.load(pointer, mask=mask, other=0).to(tl.float32)


@triton.jit
def put(pointer, value, mask, ADD: tl.constexpr = False):
    """Store an fp32 tile in the pointer's dtype, or with ADD add it to what is there."""
    if ADD:
        value += take(pointer, mask)
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)
