"""What the compiler makes of the kernels, on a machine without a GPU.

`recorded_launches()` runs an op's launcher without running its kernels and keeps every launch:
kernel, grid, arguments and options. Given tensors on the "meta" device no memory is needed either,
so launches can be recorded at any size. `compile_launch` then compiles one of them for a named GPU
with the compiler and assembler that ship with Triton, specialised as a launch on that GPU would be,
and reports registers, spills, shared memory and tensor cores.

    python -m netspace_lite.kernels.aot 80 86 89        # a JSON line for each, all archs if none
    python -m netspace_lite.kernels.aot 90 --quick      # see `recorded`
"""

import importlib
import io
import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from contextlib import contextmanager, redirect_stdout
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import torch

from ..architectures import lite_net
from ..batching import Batched
from .backend import INTERPRETED, triton

# By name: the package's attributes of these names are the public functions, not the modules.
layer, net, pack, siren, loss = (
    importlib.import_module(f"{__package__}.{name}")
    for name in ("layer", "net", "chunk_pack", "siren_mlp", "distillation_loss")
)

ARCHS = (80, 86, 89, 90, 100, 120)  # compute capabilities: A100, A40, L40, H100, B200, RTX 5090
TENSOR_CORE = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)[\w.:]*")
PLAIN_DOT = re.compile(r"\btt\.dot .*-> tensor<[^>]*#blocked\d*>")  # a product on ordinary cores
SAID = re.compile(  # in the assembler's log, in this order
    r"(?P<stack>\d+) bytes stack frame, (?P<spill_stores>\d+) bytes spill stores, "
    r"(?P<spill_loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)
MODES = {
    "tf32": (torch.float32, "tf32"),
    "ieee": (torch.float32, "ieee"),
    "bf16": (torch.bfloat16, "ieee"),
}


class Launch(NamedTuple):
    """One recorded launch: the kernel's name, the kernel, its grid, and arguments with options."""

    name: str
    kernel: object
    grid: tuple
    args: dict


@contextmanager
def recorded_launches():
    """Inside the block kernels aren't run; the list it gives fills with their `Launch`es."""
    from triton.runtime.jit import JITFunction

    if INTERPRETED:
        raise RuntimeError("Launches are compiled, so unset TRITON_INTERPRET before Python starts.")
    launches = []

    def record(self, *args, grid, warmup=False, **kwargs):
        named = dict(zip(self.arg_names, args, strict=False))
        launches.append(Launch(self.__name__, self, grid, named | kwargs))

    with patch.object(JITFunction, "run", record):
        yield launches


def compile_launch(launch: Launch, archs) -> dict:
    """Compile one launch for compute capabilities (80 is an A100) and say what came out of each.

    86 and 89 run the code made for 80, if they come after it, assembled for them: they have the
    same instructions for these kernels, and less shared memory.

    Returns:
        arch -> registers and spilled bytes a thread, stack bytes, shared bytes a block, tensor_core
        instruction counts by name, plain_dots that run without them, rounded operands, and the
        launch's constants.
    """
    reports, ptx, kernel = {}, "", launch.kernel
    constants = [(k, v) for k, v in launch.args.items() if len(k) > 1 and k.isupper()]
    triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
    for arch in archs:
        if arch in (86, 89) and 80 in reports:
            log = _assemble(ptx.replace(".target sm_80", f".target sm_{arch}"), arch)
        else:
            # Kept apart, or a GPU that is there would be given what was made for another.
            caches = patch.object(kernel, "device_caches", defaultdict(kernel.create_binder))
            with redirect_stdout(io.StringIO()) as printed, _pretended(arch), caches:
                binary = kernel.run(**launch.args, grid=launch.grid, warmup=True)
            ptx, log = binary.asm["ptx"], printed.getvalue()
        found = [m.group(0) for m in TENSOR_CORE.finditer(ptx)]
        reports[arch] = {
            "kernel": launch.name,
            "config": {k: v for k, v in constants if k != "PLAN"},
            "shared": binary.metadata.shared,
            **{name: int(number) for name, number in SAID.search(log).groupdict().items()},
            "tensor_core": {name: found.count(name) for name in sorted(set(found))},
            "plain_dots": len(PLAIN_DOT.findall(binary.asm["ttgir"])),
            "rounded": ptx.count("cvt.rna.tf32"),
        }
    return reports


def _pretended(arch):
    """Inside the block Triton takes the machine for one with such a GPU, as far as it compiles."""
    from triton.backends.compiler import GPUTarget

    driver = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0)
    driver.get_current_target = lambda: GPUTarget("cuda", arch, 32)
    return patch.object(triton.runtime.driver, "_active", driver)


def _assemble(ptx, arch):
    from triton.backends.nvidia.compiler import get_ptxas

    command = [get_ptxas(arch).path, "-v", "--regAllocOptLevel=2", f"--gpu-name=sm_{arch}"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command += [file.name, "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def meta(*shape, dtype=torch.float32):
    """A tensor without memory."""
    return torch.empty(*shape, device="meta", dtype=dtype)


def launch_layer(samples, weight, side, options, bias, shared, mode, nets=8):
    """Forward and backward of a layer of shape `weight` [O, C, kh, kw] on images [C, side, side].

    `options` are stride, padding and activation; a linear layer has images of one pixel.
    """
    dtype, precision = MODES[mode]
    rows, size = meta(nets, 4 + weight.numel() + len(weight), dtype=dtype), weight.numel()
    w = rows[:, 4 : 4 + size].view(nets, *weight.shape)
    x = meta(samples, *() if shared else (nets,), weight.shape[1], side, side, dtype=dtype)
    stride, padding, act = (options[0],) * 2, (options[1],) * 2, options[2]
    given = x, w, rows[:, 4 + size :] if bias else None
    given += stride, padding, act, 0.01, 30.0, precision
    y, saved = layer.launch_forward(*given)
    layer.launch_backward(y, (True, True, bias), *given, y, saved)


def _layer(samples, inner, out, side=1, kernel=1, stride=1, padding=0, act=1):
    options = meta(out, inner, kernel, kernel), side, (stride, padding, act)
    return partial(launch_layer, samples, *options)


def _siren(hidden, bias, shared, mode):
    dtype, precision = MODES[mode]
    if shared == (hidden in (128, 32)) and hidden <= siren.widest(dtype, precision):
        rows = meta(4, siren.siren_params(hidden), dtype=dtype)
        points = meta(*() if shared else (4,), 20_000, 3, dtype=dtype)
        given = points, rows, hidden, 30.0, precision
        out = siren.launch_forward(*given)
        siren.launch_backward(out, (False, True), *given, out)


def _net(name, bias, shared, mode):
    """A lite net on digits, inputs shared or per net alike; ResNets in tf32."""
    if shared or (name != "LeNetLike" and mode != "tf32"):
        return
    (dtype, precision), image = MODES[mode], (1, 8, 8)
    batched = Batched(lite_net(name, image, 10))
    plan = batched._mode(torch.zeros(1), False).plan(batched.layout, torch.Size(image))
    x, rows = meta(8, 128, plan.inputs, dtype=dtype), meta(8, plan.parameters, dtype=dtype)
    given = x, rows, plan.text, True, precision
    out, scratch = net.launch_forward(*given)
    net.launch_backward(out, (False, True), *given, out, scratch)


def _loss(classes, bias, shared, mode):
    if mode != "ieee":  # nothing to multiply, so tf32 said it
        logits = meta(8, 128, classes, dtype=MODES[mode][0])
        labels = meta(128, dtype=torch.int64) if bias else None
        loss.launch(logits, logits[0] if shared else logits, labels, meta(8), 0.9)


def _pack(bias, shared, mode):
    if mode != "ieee":
        dtype, scale = MODES[mode][0], meta(7, 10_000)
        prep, used = meta(8, 7, 10_000, dtype=dtype), meta(8, dtype=torch.int64)
        pack.launch(prep, None if shared else used, scale if bias else None, scale, dtype)


# Between them every tile of `common.tile` for each kernel of linear layers and of convolutions, and
# every width of `siren_mlp`; the paper's sizes first; and of whole nets one without sums and pools
# and one with them. A case launches for (bias, shared, mode).
CASES = {
    "linear 256 to 256, sine": _layer(128, 256, 256, act=2),
    "linear 24 to 24": _layer(128, 24, 24),
    "linear 3 to 64, sine": _layer(128, 3, 64, act=2),
    "linear 84 to 10": _layer(128, 84, 10, act=0),
    "linear 120 to 84, 8 samples": _layer(8, 120, 84),
    "linear 120 to 24, 20 samples": _layer(20, 120, 24),
    "convolution 3 to 6, 5x5": _layer(128, 3, 6, 32, 5, 2),
    "convolution 24 to 32, 3x3": _layer(128, 24, 32, 16, 3, 1, 1),
    "convolution 64 to 64, 3x3": _layer(128, 64, 64, 16, 3, 2, 1),
    **{f"convolution of {side**2} pixels": _layer(1, 64, 64, side, 3, 1, 1) for side in (4, 5)},
    "convolution 1 to 32, 3x3": _layer(128, 1, 32, 8, 3, 1, 1),
    "convolution 3 to 64, 3x3": _layer(128, 3, 64, 8, 3, 1, 1),
    **{f"siren of width {hidden}": partial(_siren, hidden) for hidden in (256, 128, 64, 32, 16)},
    **{f"distillation loss of {classes}": partial(_loss, classes) for classes in (10, 200, 1000)},
    "chunk packing": _pack,
    **{f"net {name}": partial(_net, name) for name in ("LeNetLike", "ResNet8")},
}


def recorded(quick=False):
    """Configurations, each once: (case, mode, bias, shared, launch).

    Every tile of every kernel with a bias and inputs per net, and without and shared: both in tf32;
    in the other modes linear layers the one way and convolutions the other. `quick` takes each
    kernel once, in tf32, with a bias and inputs per net.
    """
    seen, ways = set(), ((True, False), (False, True))
    for case, (mode, (bias, shared)) in product(CASES, product(MODES, ways)):
        kind = case.split()[0]
        pairs = mode == "tf32" or kind not in ("linear", "convolution")
        if not (pairs or bias == (kind == "linear")) or (quick and (mode, bias) != ("tf32", True)):
            continue
        with recorded_launches() as launches:
            CASES[case](bias, shared, mode)
        for launch in launches:
            tiles = [launch.args.get(k) for k in ("BM", "BN", "HP", "KP", "PLAN")]
            key = (kind, launch.name) + (() if quick else (mode, bias, shared, *tiles))
            if key not in seen:
                seen.add(key)
                yield case, mode, bias, shared, launch


def main(*words):
    """Compile everything `recorded` and print a report a line, with what was launched added."""
    archs = [int(word) for word in words if word.isdigit()] or ARCHS
    for case, mode, bias, shared, launch in recorded(quick="--quick" in words):
        how = {"case": case, "mode": mode, "bias": bias, "shared_input": shared}
        for arch, report in compile_launch(launch, archs).items():
            print(json.dumps({**how, "arch": arch, **report}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
