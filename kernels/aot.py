"""What the compiler makes of the kernels, on a machine without a GPU.

`recorded_launches()` runs an op's launcher without running its kernels and keeps every launch:
kernel, grid, arguments and meta-parameters. Given tensors on the "meta" device no memory is needed
either, so launches can be recorded at the paper's sizes. `compile_launch` then compiles one of
them for a named GPU with the compiler and assembler that ship with Triton, specialised exactly as
a launch on that GPU would be, and reports registers, spills, shared memory and tensor cores.

    python -m netspace_lite.kernels.aot 80 90 100        # a JSON line per kernel and target
"""

import json
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch

from . import batched_conv2d, batched_linear, chunk_pack, distillation_loss, siren_mlp
from .backend import INTERPRETED, triton

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
