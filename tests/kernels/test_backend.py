"""Who decides which implementation runs, and what a wrong decision says."""

import os
import subprocess
import sys

import pytest
import torch
from netspace_lite.kernels import backend
from netspace_lite.kernels.backend import INTERPRETED, current_backend, use_triton

import netspace_lite as ns
from netspace_lite import kernels


def test_auto_takes_torch_on_the_cpu():
    assert current_backend() == "auto"
    assert not use_triton(torch.zeros(1))


def test_innermost_wins(monkeypatch):
    monkeypatch.setenv("NETSPACE_BACKEND", "triton")
    assert current_backend() == "triton"
    with backend("torch"):
        assert current_backend() == "torch"
        with backend("auto"):
            assert current_backend() == "auto"
        assert current_backend() == "torch"
    assert current_backend() == "triton"


def test_unknown_names(monkeypatch):
    message = "backend must be one of auto, torch, triton, not 'cuda'"
    with pytest.raises(ValueError, match=message), backend("cuda"):
        pass
    monkeypatch.setenv("NETSPACE_BACKEND", "gpu")
    with pytest.raises(ValueError, match="NETSPACE_BACKEND must be one of .* not 'gpu'"):
        current_backend()


@pytest.mark.skipif(not INTERPRETED, reason="fp64 in Triton is for the interpreter")
def test_interpreter_takes_triton():
    with backend("triton"):
        assert use_triton(torch.zeros(1))


def python(code, **environment):
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET",)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=inherited | environment
    )


def test_cpu_tensor_outside_the_interpreter():
    done = python(
        "import torch\nfrom netspace_lite.kernels import backend, batched_linear\n"
        "with backend('triton'): batched_linear(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))"
    )
    assert done.returncode != 0
    assert "RuntimeError: The triton backend was chosen for a tensor on cpu." in done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr


def test_everything_imports_without_triton():
    """On platforms without Triton the PyTorch path works and asking for Triton says why not."""
    done = python(
        "import sys\nsys.modules['triton'] = None\nimport torch\n"
        "from netspace_lite.kernels import backend, batched_linear, siren_mlp\n"
        "x = torch.ones(1, 2, 3)\nassert (batched_linear(x, x) == 3).all()\n"
        "with backend('triton'): batched_linear(x, x)"
    )
    assert "RuntimeError: The triton backend was chosen but the triton package isn't" in done.stderr


def test_public_names():
    packing, others = {"chunk_pack", "chunk_unpack"}, {"siren_mlp", "distillation_loss", "backend"}
    assert set(kernels.__all__) == {"batched_linear", "batched_conv2d"} | packing | others
    for name in kernels.__all__:
        assert getattr(kernels, name).__doc__, name


@pytest.mark.gpu
def test_interpreter_tier_on_a_machine_with_a_gpu():
    """With a GPU the tests of this folder run on it; this runs them in the interpreter too."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", os.path.dirname(__file__), "-q", "-m", "not gpu"],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.gpu
def test_auto_takes_triton_on_a_gpu():
    x = torch.randn(2, 3, 4, device="cuda")
    assert use_triton(x)
    torch.testing.assert_close(
        kernels.batched_linear(x, x, precision="ieee"), torch.bmm(x, x.mT), rtol=1e-5, atol=1e-5
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("net", ["LeNetLike", "VanillaCNN", "ResNet8"])
def test_a_cuda_graph_of_a_step_gives_what_the_step_gives(name, net):
    """What a step would wait for is looked for without a GPU, too: tests/test_device.py."""
    batched = ns.Batched(ns.lite_net(net, (1, 8, 8), 10))
    rows = 0.1 * torch.randn(4, batched.layout.size, device="cuda")
    x, rows = torch.randn(8, 1, 8, 8, device="cuda"), rows.requires_grad_()

    def step():
        return torch.autograd.grad(batched(rows, x).square().sum(), rows)[0]

    with backend(name):
        aside = torch.cuda.Stream()
        with torch.cuda.stream(aside):
            step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            grad = step()
        with torch.no_grad():
            rows.mul_(1.5)  # the graph reads the same memory
        graph.replay()
        torch.testing.assert_close(grad, step(), rtol=1e-4, atol=1e-4)


def test_torch_compile(device):
    """The op is one node of the compiled graph, forward and backward."""
    w = torch.randn(2, 5, 4, device=device, requires_grad=True)

    def loss(x, w):
        return kernels.batched_linear(2 * x, w, None, "sine", precision="ieee").square().sum()

    x = torch.randn(2, 3, 4, device=device)
    with backend("triton"):
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        found, expected = compiled(x, w), loss(x, w)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(found, w)[0], torch.autograd.grad(expected, w)[0]
        )
