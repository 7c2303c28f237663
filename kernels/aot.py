"""What the compiler makes of the kernels, on a machine without a GPU.

`recorded_launches()` runs an op's launcher without running its kernels and keeps every launch:
kernel, grid, arguments and meta-parameters. Given tensors on the "meta" device no memory is needed
either, so launches can be recorded at the paper's sizes. `compile_launch` then compiles one of
them for a named GPU with the compiler and assembler that ship with Triton, specialised exactly as
a launch on that GPU would be, and reports registers, spills, shared memory and tensor cores.

    python -m netspace_lite.kernels.aot 80 90 100         # a JSON line per kernel and target
    python -m netspace_lite.kernels.aot 90 --quick        # tf32, the first configuration only
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from .backend import INTERPRETED, triton

# By name: the package's attributes of these names are the public functions, not the modules.
linear, conv2d, pack, siren, loss = (
    importlib.import_module(f"{__package__}.{name}")
    for name in (
        "batched_linear", "batched_conv2d", "chunk_pack", "siren_mlp", "distillation_loss"
    )
)  # fmt: skip

# Shared memory a block may use, in bytes (CUDA C++ Programming Guide, compute capabilities table).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORE = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)[\w.:]*")


@dataclass
class Launch:
    """One recorded kernel launch; `kernel` is the jitted function, `args` name -> value."""

    kernel: object
    grid: tuple
    args: dict
    configs: list = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.kernel.__name__


@contextmanager
def recorded_launches():
    """Inside the block kernels aren't run; the list it gives fills with their `Launch`es."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    if INTERPRETED:
        raise RuntimeError("Launches are compiled, so unset TRITON_INTERPRET before Python starts.")
    launches = []
    runs = Autotuner.run, JITFunction.run

    def record(self, *args, grid, warmup=False, **kwargs):
        kernel, configs = (self.fn, self.configs) if isinstance(self, Autotuner) else (self, [])
        options = {"num_warps": kwargs.pop("num_warps", 4), "num_stages": 3}
        options["num_stages"] = kwargs.pop("num_stages", 3)
        options["enable_fp_fusion"] = kwargs.pop("enable_fp_fusion", True)
        named = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
        choices = [
            (c.kwargs, {"num_warps": c.num_warps, "num_stages": c.num_stages}) for c in configs
        ]
        choices = choices or [({}, options)]
        shape = grid({**named, **choices[0][0]}) if callable(grid) else grid
        launches.append(Launch(kernel, tuple(shape), named, choices))

    Autotuner.run = JITFunction.run = record
    try:
        yield launches
    finally:
        Autotuner.run, JITFunction.run = runs


def compile_launch(launch: Launch, arch: int, choice: int = 0) -> dict:
    """Compile one launch for compute capability `arch` and say what came out.

    Args:
        launch: from `recorded_launches`.
        arch: 80 (A100), 90 (H100) or 100 (B200).
        choice: which of the launch's configurations.

    Returns:
        registers a thread, spill_bytes, shared bytes a block, tensor_core instruction counts by
        name, stack bytes, and the configuration.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    meta, options = launch.configs[choice]
    signature, constants, attributes = _specialise(launch.kernel, {**launch.args, **meta})
    source = ASTSource(launch.kernel, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = binary.asm["ptx"]
    found = [m.group(0) for m in TENSOR_CORE.finditer(ptx)]
    return {
        "kernel": launch.name,
        "arch": arch,
        "config": {**meta, **options},
        "shared": binary.metadata.shared,
        **_assembler_report(ptx, arch),
        "tensor_core": {name: found.count(name) for name in sorted(set(found))},
    }


def _specialise(kernel, values):
    """Types, constants and alignment of arguments, as Triton's launcher would see them."""
    signature, constants, attributes = {}, {}, {}
    for index, (name, param) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = values[name]
        if param.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return signature, constants, attributes


_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
}


def _assembler_report(ptx, arch):
    """Registers, stack and spills, from the verbose output of the bundled ptxas."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={sm_arch_from_capability(arch)}"]
        done = subprocess.run(
            [*command, file.name, "-o", "/dev/null"], capture_output=True, text=True, check=True
        )
    numbers = {
        "registers": r"Used (\d+) registers",
        "stack": r"(\d+) bytes stack frame",
        "spill_stores": r"(\d+) bytes spill stores",
        "spill_loads": r"(\d+) bytes spill loads",
    }
    return {k: int(re.search(pattern, done.stderr).group(1)) for k, pattern in numbers.items()}


# The tutorial's layers at the paper's sizes: 8 nets × 128 CIFAR images, 4 SIRENs × 20,000 points.


def _linear_case(inner, out, act):
    def launches(dtype, precision):
        rows = torch.empty(8, 4 + inner * out + out, device="meta", dtype=dtype)
        w = rows[:, 4 : 4 + inner * out].view(8, out, inner)
        x = torch.empty(128, 8, inner, device="meta", dtype=dtype).transpose(0, 1)
        y, saved = linear.launch_forward(x, w, rows[:, -out:], act, 0.01, 30.0, precision)
        linear.launch_backward(
            y,
            saved if act == linear.SINE else y,
            x,
            w,
            True,
            True,
            True,
            act,
            0.01,
            30.0,
            precision,
        )

    return launches


def _conv_case(inner, out, size, kernel, stride, padding):
    def launches(dtype, precision):
        window = inner * kernel * kernel
        rows = torch.empty(8, out * window + out, device="meta", dtype=dtype)
        w = rows[:, : out * window].view(8, out, inner, kernel, kernel)
        x = torch.empty(128, 8, inner, size, size, device="meta", dtype=dtype)
        step = (stride, stride), (padding, padding)
        y = conv2d.launch_forward(x, w, rows[:, -out:], *step, 1, 0.01, precision)
        conv2d.launch_backward(y, y, x, w, *step, True, True, True, 1, 0.01, precision)

    return launches


def _siren_case(dtype, precision):
    hidden = siren.widest(dtype, precision)
    rows = torch.empty(4, siren.siren_params(hidden), device="meta", dtype=dtype)
    points = torch.empty(4, 20_000, 3, device="meta", dtype=dtype)
    out = siren.launch_forward(points, rows, hidden, 30.0, precision)
    siren.launch_backward(out, points, rows, hidden, 30.0, True, precision)


def _loss_case(dtype, precision):
    logits = torch.empty(8, 128, 200, device="meta", dtype=dtype)
    labels = torch.empty(128, device="meta", dtype=torch.int64)
    loss.launch(logits, logits, labels, torch.empty(8, device="meta"), 0.9)


def _pack_case(dtype, precision):
    rows = torch.empty(8, 62_006, device="meta", dtype=dtype)
    prep, scale = torch.empty(8, 7, 10_000, device="meta"), torch.empty(7, 10_000, device="meta")
    pack.launch([rows], pack.STACKED, prep, scale, scale, True, True)
    pack.launch([rows], pack.STACKED, prep, None, None, False, False)


CASES: dict[str, Callable] = {
    "linear 256 to 256, sine": _linear_case(256, 256, 2),
    "convolution 3 to 6, 5x5": _conv_case(3, 6, 32, 5, 2, 0),
    "convolution 16 to 32, 3x3": _conv_case(16, 32, 32, 3, 2, 1),
    "siren at its widest": _siren_case,
    "distillation loss": _loss_case,
    "chunk packing": _pack_case,
}
MODES = {
    "tf32": (torch.float32, "tf32"),
    "ieee": (torch.float32, "ieee"),
    "bf16": (torch.bfloat16, "ieee"),
}


def reports(archs, modes=("tf32", "ieee", "bf16"), first=False):
    """Compile every case for every target: all configurations in tf32, else the first one.

    Args:
        archs: compute capabilities, of 80, 90 and 100.
        modes: of "tf32", "ieee" and "bf16".
        first: compile the first configuration only, in tf32 too.

    Yields the dictionaries of `compile_launch` with the case and mode added.
    """
    for case, launch_all in CASES.items():
        for mode in modes:
            with recorded_launches() as launches:
                launch_all(*MODES[mode])
            for launch in launches:
                for choice in range(len(launch.configs) if mode == "tf32" and not first else 1):
                    for arch in archs:
                        report = compile_launch(launch, arch, choice)
                        yield {"case": case, "mode": mode, "choice": choice, **report}


if __name__ == "__main__":
    chosen = [int(arch) for arch in sys.argv[1:] if arch.isdigit()] or list(SHARED_LIMIT)
    quick = {"modes": ["tf32"], "first": True} if "--quick" in sys.argv else {}
    for report in reports(chosen, **quick):
        print(json.dumps(report), flush=True)
