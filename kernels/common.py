"""What several ops share on the host: checks, precision, the rule of tiles, registration."""

import functools
from itertools import compress

import torch
import torch.nn.functional as F

ACTIVATIONS = (None, "leaky_relu", "sine")
NONE, LEAKY, SINE = 0, 1, 2  # how kernels know the activations, in the order of ACTIVATIONS
_PLAIN = {torch.Tensor, torch.nn.Parameter}


def activate(y, activation=None, slope=0.01, omega=1.0):
    """None, leaky ReLU with a negative `slope`, or sin(omega · y), elementwise."""
    if activation == "leaky_relu":
        return F.leaky_relu(y, slope)
    return torch.sin(omega * y) if activation == "sine" else y


def check(op, tensors, kind=None, rows=(), **sizes):
    """Check tensors against the shapes that an op declares.

    Args:
        op: its name, for messages.
        tensors: name -> (tensor or None, pattern, ...), a letter for each axis: "NOI". The pattern
            with as many axes counts; a letter means the same size everywhere, at least 1.
        kind: (device, dtype) of all tensors; None takes the first's, which must be floating.
        rows: names of tensors `[N, ...]` that must be contiguous within a net.
        sizes: letters known beforehand.

    Returns:
        sizes with all letters found.

    Raises:
        ValueError: saying what was given, what it must be, and which sizes were known.
    """
    for name, (tensor, *patterns) in tensors.items():
        if tensor is None:
            continue
        pattern = next((p for p in patterns if len(p) == tensor.ndim), None)
        axes = zip(pattern or "", tensor.shape, strict=False)
        found, wrong = (tensor.device, tensor.dtype), None
        if pattern is None or any(n < 1 or sizes.setdefault(a, n) != n for a, n in axes):
            allowed = " or ".join(f"[{', '.join(p)}]" for p in patterns)
            where = ", ".join(f"{axis} = {size}" for axis, size in sizes.items())
            wrong = f"must be {allowed} with no axis empty, where {where}."
        elif kind is None and not tensor.is_floating_point():
            wrong = f"must be floating, got {found[1]}."
        elif found != (kind := kind or found):
            wrong = f"must be {kind[1]} on {kind[0]}, as the others, got {found[1]} on {found[0]}."
        elif name in rows and not tensor[0].is_contiguous():
            wrong = f"(strides {tensor.stride()}) must be contiguous; only the stride between nets "
            wrong += "is free. Call .contiguous()."
        if wrong:
            raise ValueError(f"{op}: {name} {list(tensor.shape)} {wrong}")
    return sizes


def check_activation(op, activation, slope, activations=ACTIVATIONS):
    """Raise ValueError for an unknown activation or a slope that loses the input's sign.

    Returns:
        How kernels know the activation.
    """
    if activation not in activations:
        raise ValueError(f"{op}: activation must be one of {activations}, not {activation!r}.")
    if slope < 0:
        raise ValueError(f"{op}: the slope of leaky_relu must not be negative, got {slope}.")
    return ACTIVATIONS.index(activation)


def autocast(*tensors, dtype=None):
    """The tensors as `torch.autocast` wants them: in its dtype, or in `dtype`, inside its region.

    Matrix products take autocast's dtype and losses fp32, as PyTorch's own do; fp64 stays.
    """
    kind = tensors[0].device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = dtype or torch.get_autocast_dtype(kind)
    keep = (None, torch.float64)
    return [t if getattr(t, "dtype", None) in keep else t.to(dtype) for t in tensors]


def fp32_precision(precision=None) -> str:
    """How the kernels multiply fp32 values: the one rule of linear layers, convolutions and SIRENs.

    A named precision is taken as it is. None follows the setting that PyTorch has for neural
    networks, cuDNN's: "tf32" (operands rounded to 11 bits, sums in fp32, on tensor cores) unless
    `torch.backends.cudnn.allow_tf32` was set to False, then "ieee". `torch.compile` reads the
    setting once, when it compiles. Other dtypes have one way only.

    Raises:
        ValueError: for a name other than these two.
    """
    if precision not in (None, "ieee", "tf32"):
        raise ValueError(f"precision must be None, 'ieee' or 'tf32', not {precision!r}.")
    setting = torch.backends.cudnn.conv.fp32_precision if precision is None else precision
    return "tf32" if setting == "tf32" else "ieee"


# As torch.compiler.assume_constant_result does, whose import is a quarter of this package's:
# torch.compile can't follow the settings of cuDNN.
fp32_precision._dynamo_marked_constant = True


def register(name, launch, empty, schema=None):
    """Make an op of a launcher, which autograd and `torch.compile` then see as one node.

    Args:
        name: of the op in `torch.ops.netspace_lite`.
        launch: function of tensors and options, run on the device of its first tensor: Triton
            launches on the current one.
        empty: of the same arguments, gives the results' shapes, dtypes and strides.
        schema: the arguments' and results' types; None takes the annotations of `launch`.

    Returns:
        The op, and what it does without being one.
    """

    @functools.wraps(launch)
    def launcher(*args):
        with torch.cuda.device_of(next(a for a in args if isinstance(a, torch.Tensor))):
            return launch(*args)

    op = torch.library.custom_op(f"netspace_lite::{name}", launcher, mutates_args=(), schema=schema)
    op.register_fake(empty)
    return op, launcher


def register_differentiable(name, launch, empty, launch_backward):
    """`register` an op whose first result has a gradient, by an op of its own: `<name>_backward`.

    What is returned calls the op where it is traced, compiled, transformed or given tensors of a
    special kind; elsewhere the launches themselves, since its wrapping takes as long as they do.

    Args:
        name, launch, empty: see `register`; `launch` is annotated.
        launch_backward: of the first result's gradient, which arguments need theirs, all arguments
            and all results; gives the gradients of the first arguments, contiguous.
    """
    op, on_device = register(name, launch, empty)
    backward, gradients = _backward_op(name, launch, launch_backward)

    def keep(ctx, inputs, output):
        values = *inputs, *(output if isinstance(output, tuple) else (output,))
        ctx.mark_non_differentiable(*values[len(inputs) + 1 :])
        ctx.set_materialize_grads(False)  # or each backward fills zeros as large as those
        ctx.save_for_backward(*(v if isinstance(v, torch.Tensor) else None for v in values))
        ctx.options = [None if isinstance(v, torch.Tensor) else v for v in values]

    def differentiate(ctx, g, *_, run=backward):
        kept, needs = zip(ctx.saved_tensors, ctx.options, strict=True), [*ctx.needs_input_grad]
        grads = iter(() if g is None else run(g, needs, *(o if t is None else t for t, o in kept)))
        return tuple(next(grads, None) if need else None for need in needs)

    op.register_autograd(differentiate, setup_context=keep)

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            keep(ctx, args, results := on_device(*args))
            return results

        @staticmethod
        def backward(ctx, g, *_):  # one that is to be differentiated is the op's, which refuses
            as_an_op = torch.is_grad_enabled() or torch.compiler.is_compiling() or _is_watched(g)
            return differentiate(ctx, g, run=backward if as_an_op else gradients)

    def call(*args):
        return (op if torch.compiler.is_compiling() or _is_watched(*args) else Direct.apply)(*args)

    return call


def _is_watched(*args) -> bool:
    """Whether someone waits for ops to pass, or an argument is no plain memory that can be read.

    To be asked after `is_compiling`: torch.compile can't follow it.
    """
    modes = torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active()
    special = any(type(a) not in _PLAIN or a.is_neg() for a in args if isinstance(a, torch.Tensor))
    return bool(special or modes or torch.jit.is_tracing())


def _backward_op(name, launch, launch_backward):
    """The op of the gradient, which arguments need theirs, and arguments and results of `launch`.

    It gives the gradients that are needed and no others. Its own gradient raises. As `register`
    returns it: the op, and what it does without being one.
    """
    arguments, _, results = torch.library.infer_schema(launch, mutates_args=()).partition(") -> ")
    kept = "".join(f", Tensor result{i}" for i in range(results.count("Tensor")))
    schema = f"(Tensor g, bool[] needs, {arguments[1:]}{kept}) -> Tensor[]"

    def compute(g, needs, *values):
        return list(compress(launch_backward(g, needs, *values), needs))

    def empty_gradients(g, needs, *values):
        return [v.new_empty(v.shape) for v in compress(values, needs)]

    def refuse(ctx, *grads):
        instead = 'For second derivatives compute the first ones under backend("torch").'
        raise RuntimeError(f"{name}: the Triton kernels are differentiable once. {instead}")

    backward, gradients = register(f"{name}_backward", compute, empty_gradients, schema)
    backward.register_autograd(refuse)
    return backward, gradients


def in_parts(values, splits) -> torch.Tensor:
    """Memory for a gradient of `values` in parts, [splits, ...], that programs write apart."""
    dtype = values.dtype if splits == 1 else torch.float32
    return values.new_empty(splits, *values.shape, dtype=dtype)


def joined(parts, dtype) -> torch.Tensor:
    """The sum of the parts. Without atomics it is the same in every run."""
    return (parts[0].detach() if len(parts) == 1 else parts.sum(0)).to(dtype)


def tile(rows, cols, exact=False, sums=False) -> dict:
    """Tile of a matrix product with a result [rows, cols]: BM, BN, BK and how the program runs.

    A tile that sticks out of the result multiplies zeros, a small one reads its operands more
    often. So its one side is as long as the result's shorter axis, from 16, the tensor cores'
    least, to 64, and the other is 64; a step along the summed axis is as long as the first side.
    With `sums`, of many values into few, the other side is 128 beside one of less than 64, and a
    step is 32. Exact fp32 products have their operands in registers too, and larger tiles than
    32×32 would spill. Eight warps share a tile of 64×64, four any other. One stage: loading
    ahead of use through shared memory took an H200 two to five times as long. For large and for
    tall tiles the compiler may use all 255 registers: left to itself it spills a few values to fit
    one block more on a multiprocessor. Of some eighty tiles tried there for each kernel of the
    paper's layers the rule's come close to the best.
    """
    side = 16 if min(rows, cols) <= 16 else 32 if min(rows, cols) <= 32 or exact else 64
    other, step = (128, 32) if sums and side < 64 else (64, 32 if sums else side)
    if exact:
        other, step = 64 if side == 16 else 32, 32
    bm, bn = (other, side) if cols <= rows else (side, other)
    how = {"maxnreg": 255 if bm * bn == 64 * 64 or bm == 128 else None, "num_stages": 1}
    return {"BM": bm, "BN": bn, "BK": step, "num_warps": 8 if side == 64 else 4, **how}


def cdiv(a, b) -> int:
    """⌈a / b⌉, without the detour that Triton's own takes through its compiler's types."""
    return -(-a // b)


def pair(value):
    """An option of a window along both axes of an image."""
    return (int(value),) * 2 if isinstance(value, int) else tuple(map(int, value))


def output_size(image, kernel, stride, padding):
    """(H', W'): how many places a window has along each axis of an image (H, W)."""
    sides = zip(image, kernel, stride, padding, strict=True)
    return tuple((size + 2 * p - k) // s + 1 for size, k, s, p in sides)
