"""Compile-only tier: what the compiler makes of every kernel for A100, H100 and B200.

Runs in a process of its own, because kernels imported for the interpreter can't be compiled.
"""

import json
import os
import subprocess
import sys
import threading

import pytest
from netspace_lite.kernels.backend import HAS_TRITON

ARCHS = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MATRIX_KERNELS = {"linear": 3, "convolution": 3, "siren": 3}
MODES = ("tf32", "ieee", "bf16")


@pytest.fixture(scope="module")
def reports():
    if not HAS_TRITON:
        pytest.skip("Triton isn't published for this platform")
    found = {}

    def compile_for(arch):
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "netspace_lite.kernels.aot", str(arch)]
        found[arch] = subprocess.run(command, capture_output=True, text=True, env=environment)

    threads = [threading.Thread(target=compile_for, args=(arch,)) for arch in ARCHS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for arch, done in found.items():
        assert done.returncode == 0, f"sm_{arch}: {done.stderr[-2000:]}"
    return [json.loads(line) for done in found.values() for line in done.stdout.splitlines()]


def named(report):
    return "sm_{arch} {case} {kernel} {mode} {config}".format(**report)


def test_every_kernel_is_there(reports):
    for arch in ARCHS:
        compiled = {(r["case"], r["kernel"]) for r in reports if r["arch"] == arch}
        for case in {case for case, _ in compiled}:
            kernels = {kernel for c, kernel in compiled if c == case}
            assert len(kernels) == MATRIX_KERNELS.get(case.split()[0], 1), case
    assert len({r["case"] for r in reports}) == 6


def test_no_spills(reports):
    spilled = [named(r) for r in reports if r["spill_stores"] or r["spill_loads"] or r["stack"]]
    assert spilled == []


def test_shared_memory_fits(reports):
    assert [named(r) for r in reports if r["shared"] > SHARED_LIMIT[r["arch"]]] == []


def test_matrix_kernels_use_tensor_cores(reports):
    """In tf32 and in bf16, with the instruction of the architecture or its forerunner's."""
    matrix = [r for r in reports if r["case"].split()[0] in MATRIX_KERNELS]
    assert {r["mode"] for r in matrix} == set(MODES)
    assert not any(r["tensor_core"] for r in matrix if r["mode"] == "ieee")
    matrix = [r for r in matrix if r["mode"] != "ieee"]
    for report in matrix:
        kind = "bf16|f16" if report["mode"] == "bf16" else "tf32"
        found = report["tensor_core"]
        assert any(k in name for name in found for k in kind.split("|")), named(report)


def test_newer_instructions_where_tiles_are_large(reports):
    """Hopper's wgmma and Blackwell's tcgen05 appear for the tiles that allow them."""
    for arch, instruction in ((90, "wgmma"), (100, "tcgen05")):
        names = {n for r in reports if r["arch"] == arch for n in r["tensor_core"]}
        assert any(n.startswith(instruction) for n in names), names
