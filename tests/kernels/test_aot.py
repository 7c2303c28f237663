"""Compile-only tier: what the compiler makes of every configuration for six GPUs; and grids.

Runs in processes of its own, because kernels imported for the interpreter can't be compiled.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
from netspace_lite.kernels.backend import HAS_TRITON

# Grouped by process: 86 and 89 run the code made for 80. Kilobytes of shared memory a block may use
# are from the table of compute capabilities in the CUDA C++ Programming Guide.
ARCHS = (("80", "86", "89"), ("90",), ("100",), ("120",))
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
LAYER = {"forward_kernel", "input_grad_kernel", "weight_grad_kernel"}
MATRIX = {
    "linear": LAYER,
    "convolution": LAYER,
    "siren": {"_forward_kernel", "_backward_kernel", "_w2_grad_kernel"},
    "net": {"_forward_kernel", "_backward_kernel"},
}
EXACT = {(64, 16), (16, 64), (32, 32)}  # all tiles that common.tile can answer
TILES = {(64, 16), (16, 64), (64, 32), (32, 64), (64, 64)}
SUMS = {(128, 16), (16, 128), (128, 32), (32, 128), (64, 64)}


def python(*command):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def reports():
    if not HAS_TRITON:
        pytest.skip("Triton isn't published for this platform")
    with ThreadPoolExecutor(min(len(ARCHS), os.cpu_count())) as pool:
        found = pool.map(lambda archs: python("-m", "netspace_lite.kernels.aot", *archs), ARCHS)
        return [report for each in found for report in each]


def kind(report):
    return report["case"].split()[0]


def named(report):
    return "sm_{arch} {case} {kernel} {mode} bias={bias} {config}".format(**report)


@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_every_configuration_is_there(reports, arch):
    """Tiles, precisions, with and without bias, inputs shared and per net, widths of SIRENs."""
    here = [r for r in reports if r["arch"] == arch]
    found = {
        (kind(r), r["kernel"], r["mode"], r["bias"], r["config"]["BM"], r["config"]["BN"])
        for r in here
        if "BN" in r["config"]
    }
    for layer, kernel in product(("linear", "convolution"), LAYER):
        tiles, linear = SUMS if kernel == "weight_grad_kernel" else TILES, layer == "linear"
        modes = {("tf32", True): tiles, ("tf32", False): tiles, ("bf16", linear): tiles}
        for way, wanted in (modes | {("ieee", linear): EXACT}).items():
            assert {each[4:] for each in found if each[:4] == (layer, kernel, *way)} == wanted
    assert all(r["shared_input"] != r["bias"] for r in here)
    widths = {(r["kernel"], r["mode"], r["config"]["HP"]) for r in here if kind(r) == "siren"}
    for kernel, mode, width in product(MATRIX["siren"], ("tf32", "bf16"), (16, 32, 64, 128, 256)):
        assert (kernel, mode, width) in widths
    assert {w for k, m, w in widths if m == "ieee"} == {16, 32, 64}
    nets = {(r["case"].split()[1], r["kernel"], r["mode"]) for r in here if kind(r) == "net"}
    assert nets == {
        *product(["LeNetLike"], MATRIX["net"], ("tf32", "ieee", "bf16")),
        *product(["ResNet8"], MATRIX["net"], ("tf32",)),
    }
    assert {kind(r) for r in here} == {*MATRIX, "distillation", "chunk"}


def test_spills_are_a_few_bytes_at_most(reports):
    """None in SIRENs, losses and packing; in layers what the assembler trades for one block more.

    That is one or two addresses on tensor cores, and some sums in exact products; and in whole nets
    a dozen addresses, for three blocks.
    """

    def spilled(r):
        return max(r["spill_stores"], r["spill_loads"], r["stack"])

    def allowed(r):
        layers = 64 if r["mode"] == "ieee" else 16
        return {"linear": layers, "convolution": layers, "net": 64}.get(kind(r), 0)

    assert [(named(r), spilled(r)) for r in reports if spilled(r) > allowed(r)] == []


def test_shared_memory_fits(reports):
    assert [named(r) for r in reports if r["shared"] > SHARED_LIMIT[r["arch"]] * 1024] == []


def test_every_product_is_on_tensor_cores(reports):
    """In tf32 and in bf16, with operands of that type, rounded to it; in exact fp32 none is."""
    for report in (r for r in reports if kind(r) in MATRIX):
        name, cores = named(report), " ".join(report["tensor_core"])
        if report["mode"] == "ieee":
            assert not cores, name
            assert report["plain_dots"], name
            continue
        assert cores, name
        assert not report["plain_dots"], name
        assert (report["rounded"] > 0) == (report["mode"] == "tf32"), name
        tcgen = "kind::f16" if report["mode"] == "bf16" else "kind::tf32"
        wanted = "bf16" if report["mode"] == "bf16" else "tf32"
        assert wanted in cores or tcgen in cores, name


def test_newer_instructions_where_tiles_are_large(reports):
    """Hopper's wgmma and Blackwell's tcgen05 appear for the tiles that allow them."""
    for arch, instruction in ((90, "wgmma"), (100, "tcgen05")):
        names = {n for r in reports if r["arch"] == arch for n in r["tensor_core"]}
        assert any(n.startswith(instruction) for n in names), names


GRIDS = """
import json
from netspace_lite.kernels import aot
def show(launch):
    with aot.recorded_launches() as launches:
        launch()
    for each in launches:
        print(json.dumps([each.name, each.grid]))
show(lambda: aot.launch_layer(262_144, aot.meta(256, 256, 1, 1), 1, (1, 0, 2), True, False, "tf32"))
show(lambda: aot.launch_layer(2, aot.meta(4, 3, 3, 3), 8, (2, 1, 1), True, False, "tf32", nets=70_000))
points, rows = aot.meta(2_097_153, 3), aot.meta(2, aot.siren.siren_params(64))
out = aot.meta(2, len(points))
show(lambda: aot.siren.launch_forward(points, rows, 64, 30.0, "tf32"))
show(lambda: aot.siren.launch_backward(out, (False, True), points, rows, 64, 30.0, "tf32", out))
z = aot.meta(70_000, 640, 1000)
show(lambda: aot.loss.launch(z, z, None, aot.meta(70_000), 0.9))
show(lambda: aot.pack.launch(aot.meta(2, 7, 20_000_000), aot.meta(2), None, aot.meta(7, 20_000_000), z.dtype))
"""  # noqa: E501


@pytest.mark.skipif(not HAS_TRITON, reason="Triton isn't published for this platform")
def test_large_grids_are_on_the_first_axis():
    """Where a GPU stops at 65,535 blocks (axes 2 and 3) no size of the problem may stand."""
    launches = python("-c", GRIDS)
    assert len(launches) == 3 + 3 + 1 + 2 + 1 + 1
    for name, (first, *others) in launches:
        assert first < 2**31, name
        assert all(n <= 256 for n in others), name
    grids = {(name, i): grid[0] for i, (name, grid) in enumerate(launches)}
    assert grids["forward_kernel", 0] == 8 * 4096 * 4
    assert grids["forward_kernel", 3] == 70_000
    assert grids["_forward_kernel", 6] == 2 * 32_769


APART = """
import json
from netspace_lite.kernels import aot
*_, launch = next(aot.recorded())
caches = launch.kernel.device_caches
tensor_cores = [r["tensor_core"] for r in aot.compile_launch(launch, (80, 90)).values()]
print(json.dumps([launch.kernel.device_caches is caches, len(caches), tensor_cores]))
"""


@pytest.mark.skipif(not HAS_TRITON, reason="Triton isn't published for this platform")
def test_what_is_compiled_for_other_gpus_is_not_left_for_the_one_that_is_there():
    ((kept, entries, tensor_cores),) = python("-c", APART)
    assert (kept, entries, len(tensor_cores)) == (True, 0, 2)


ROOMY = """
import json
from netspace_lite.kernels import aot
aot.siren._is_roomy = lambda device: True
with aot.recorded_launches() as launches:
    aot.CASES["siren of width 256"](True, False, "tf32")
for arch, report in aot.compile_launch(launches[-1], (80, 90, 100)).items():
    print(json.dumps({"arch": arch, **report}))
"""


@pytest.mark.skipif(not HAS_TRITON, reason="Triton isn't published for this platform")
def test_more_shared_memory_where_there_is_more():
    """The widest SIREN's W2 gradient: 64 rows a program fit an A100, not a card of 99 kB."""
    for report in python("-c", ROOMY):
        assert (report["kernel"], report["config"]["BO"]) == ("_w2_grad_kernel", 64)
        assert SHARED_LIMIT[86] * 1024 < report["shared"] <= SHARED_LIMIT[report["arch"]] * 1024
        assert report["spill_stores"] == report["spill_loads"] == report["stack"] == 0
        assert report["tensor_core"]


KNOWN = """
import json
import torch
from netspace_lite import lite_net
from netspace_lite.batching import Batched
from netspace_lite.kernels import aot
batched, image = Batched(lite_net("LeNetLike", (1, 8, 8), 10)), torch.Size([1, 8, 8])
plan = batched._mode(torch.zeros(1), False).plan(batched.layout, image)
def net(nets, samples, keep):
    given = aot.meta(nets, samples, 64), aot.meta(nets, plan.parameters), plan.text, keep, "tf32"
    out, scratch = aot.net.launch_forward(*given)
    if keep:
        aot.net.launch_backward(out, (False, True), *given, out, scratch)
def layer(nets, samples):
    weight, options = aot.meta(32, 16, 3, 3), (1, 1, 1)
    aot.launch_layer(samples, weight, 8, options, True, False, "tf32", nets=nets)
def siren(nets, points):
    rows, points = aot.meta(nets, aot.siren.siren_params(64)), aot.meta(nets, points, 3)
    out = aot.siren.launch_forward(points, rows, 64, 30.0, "tf32")
    aot.siren.launch_backward(out, (False, True), points, rows, 64, 30.0, "tf32", out)
def known(case, *sizes):
    with aot.recorded_launches() as launches, aot._pretended(90):
        case(*sizes)
        for each in launches:
            *_, bind = each.kernel.create_binder()
            print(json.dumps([case.__name__, each.name, repr(bind(**each.args)[1:])]))
for sizes in ((8, 128, True), (1, 100, True), (3, 7, False), (8, 449, False)):
    known(net, *sizes)
for sizes in ((8, 128), (2, 128), (3, 50)):
    known(layer, *sizes)
for nets in (8, 3, 1):
    known(siren, nets, 1024)
"""


@pytest.mark.skipif(not HAS_TRITON, reason="Triton isn't published for this platform")
def test_other_numbers_of_nets_and_samples_run_the_same_code():
    """Or a notebook would wait for the compiler at each; a layer's sizes are what it knows."""
    found = {}
    for case, kernel, how in python("-c", KNOWN):
        found.setdefault((case, kernel), []).append(how)
    kernels = {name for names in MATRIX.values() for name in names}
    assert {kernel for _, kernel in found} == kernels
    assert {len(ways) for ways in found.values()} == {2, 3, 4}
    several = {name for name, ways in found.items() if len(set(ways)) > 1}
    assert several <= {("layer", "weight_grad_kernel")}  # reads more at once of parts of 16
