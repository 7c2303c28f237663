"""Time the kernels beside what users would write: a loop over modules, vmap, torch.compile.

    python -m netspace_lite.kernels.bench            # or `make bench`; the same command on a GPU
    python -m netspace_lite.kernels.bench --quick    # fewer cases and repetitions, a minute

Every case is a set of N nets of one architecture on B inputs of their own, forward alone and
forward with backward into the packed rows. Candidates are timed in turns, round by round, so that
a busy machine slows all of them. Prints a table with median and 20/80 quantiles in milliseconds,
says where ours loses.
"""

import argparse
import platform
import time
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from . import batched_conv2d, batched_linear, chunk_pack, siren_mlp
from .cpu import nets_per_block


class Sine(nn.Module):
    """sin(30 · x)."""

    def forward(self, x):
        return torch.sin(30 * x)


def siren(hidden):
    """3 → hidden → hidden → 1."""
    layers = nn.Linear(3, hidden), Sine(), nn.Linear(hidden, hidden), Sine(), nn.Linear(hidden, 1)
    return nn.Sequential(*layers)


def cnn(image, convolutions, *linear):
    """(inputs, outputs, kernel, stride, padding) a convolution; widths of linear layers from 2."""
    layers = [layer for c in convolutions for layer in (nn.Conv2d(*c), nn.LeakyReLU())]
    features = nn.Sequential(*layers, nn.Flatten())(torch.zeros(1, *image)).shape[1]
    layers.append(nn.Flatten())
    for inputs, outputs in pairwise((features, *linear)):
        layers += [nn.Linear(inputs, outputs), nn.LeakyReLU()]
    return nn.Sequential(*layers[:-1])


DIGITS, CIFAR = (1, 8, 8), (3, 32, 32)
QUICK = {  # name -> (make one module, input, nets, samples): lite sizes, then the paper's
    "LeNetLike lite": (
        lambda: cnn(DIGITS, [(1, 6, 3, 2, 1), (6, 16, 3, 2, 1)], 64, 10), DIGITS, 160, 64),
    "LeNetLike, 16 and 16 channels": (
        lambda: cnn(DIGITS, [(1, 16, 3, 2, 1), (16, 16, 3, 2, 1)], 64, 10), DIGITS, 160, 64),
    "SIREN lite, 64": (lambda: siren(64), (3,), 64, 1024),
}  # fmt: skip
CASES = QUICK | {
    "LeNetLike paper": (
        lambda: cnn(CIFAR, [(3, 6, 5, 2), (6, 16, 5, 2)], 120, 84, 10), CIFAR, 8, 128),
    "SIREN paper, 256": (lambda: siren(256), (3,), 4, 5000),
}  # fmt: skip


def ours(module, rows, x):
    """The nets with packed rows `[N, P]` on x `[N, B, ...]`, through the kernels' public ops."""
    if isinstance(module[1], Sine):
        return siren_mlp(x, rows, module[0].out_features)
    x, start, layers = x.transpose(0, 1), 0, list(module)
    for layer, after in zip(layers, [*layers[1:], None], strict=True):
        if isinstance(layer, nn.Flatten):
            x = x.flatten(2).transpose(0, 1)
        if isinstance(layer, nn.Conv2d | nn.Linear):
            end = start + layer.weight.numel()
            w = rows[:, start:end].unflatten(1, layer.weight.shape)
            b, start = rows[:, end : end + len(layer.bias)], end + len(layer.bias)
            act = "leaky_relu" if after else None
            conv = isinstance(layer, nn.Conv2d)
            x = (batched_conv2d(x, w, b, layer.stride, layer.padding, act) if conv
                 else batched_linear(x, w, b, act))  # fmt: skip
    return x


def ways_of(make, size, nets, samples, device, backward, compiled):
    """name -> function: the same N nets on the same inputs, run in each of the ways."""
    modules, x = [make() for _ in range(nets)], torch.randn(nets, samples, *size, device=device)
    rows = torch.stack([nn.utils.parameters_to_vector(m.parameters()) for m in modules])
    rows, module = rows.detach().to(device), modules[0].to(device)
    params = stack_module_state([m.to(device) for m in modules])[0]
    block = nets_per_block(x[0]) if device.type == "cpu" else nets

    def finish(y):
        if backward:
            y.square().mean().backward()

    def fresh(values):
        return values.detach().clone().requires_grad_(backward)

    def loop():
        for n in range(nets):
            net = {k: fresh(v[n]) for k, v in params.items()}
            finish(functional_call(module, net, (x[n],)))

    def blocks():
        for row, part in zip(rows.split(block), x.split(block), strict=True):
            finish(ours(module, fresh(row), part))

    def with_all(call):
        return lambda: finish(call({k: fresh(v) for k, v in params.items()}, x))

    call = vmap(lambda p, x: functional_call(module, p, (x,)))
    ways = {"loop": loop, "vmap": with_all(call), "ours": blocks}
    return ways | ({"compiled": with_all(torch.compile(call))} if compiled else {})


class Timing(NamedTuple):
    """One way's time in one case, in milliseconds: median and 20/80 quantiles."""

    case: str
    way: str
    backward: bool
    median: float
    low: float
    high: float


def time_in_turns(case, backward, ways, repeats, device):
    """A `Timing` for each way; every round runs each way once, after one that isn't timed."""
    times = torch.empty(repeats + 1, len(ways))
    for round in times:
        for k, way in enumerate(ways.values()):
            torch.accelerator.synchronize() if device.type == "cuda" else None
            start = time.perf_counter()
            way()
            torch.accelerator.synchronize() if device.type == "cuda" else None
            round[k] = 1e3 * (time.perf_counter() - start)
    found = times[1:].quantile(torch.tensor((0.5, 0.2, 0.8)), 0).T.tolist()
    return [Timing(case, way, backward, *three) for way, three in zip(ways, found, strict=True)]


def bench_nets(device, repeats, quick=False, compiled=False):
    """Timings of every architecture in every way, forward and with backward."""
    found = []
    for name, (make, size, nets, samples) in (QUICK if quick else CASES).items():
        for backward in (False, True):
            ways = ways_of(make, size, nets, samples, device, backward, compiled)
            case = f"{name} (N={nets}, B={samples})"
            with torch.set_grad_enabled(backward):
                found += time_in_turns(case, backward, ways, repeats, device)
    return found


def bench_packing(device, repeats):
    """chunk_pack of 100 nets against a plain copy of as many bytes, and a loop over nets."""
    shapes = [(16, 3, 5, 5), (16,), (120, 400), (120,), (84, 120), (84,), (10, 84), (10,)]
    nets = [[torch.randn(s, device=device) for s in shapes] for _ in range(100)]
    prep = chunk_pack(nets, 7, 10_000)

    def loop():
        out = torch.zeros_like(prep).flatten(1)
        for row, net in zip(out, nets, strict=True):
            values = torch.cat([t.flatten() for t in net])
            row[: len(values)] = values

    ways = {"copy": prep.clone, "loop": loop, "ours": lambda: chunk_pack(nets, 7, 10_000)}
    return time_in_turns("packing 100 nets of 240 kB", False, ways, repeats, device)


def report(timings):
    """The table as Markdown, a line for each case, and a line for each case that ours loses."""
    ways = [*sorted({t.way for t in timings} - {"ours"}), "ours"]
    lines, losses = [f"| case | pass | {' | '.join(ways)} | best other / ours |"], []
    lines.append("|---|---|" + "---:|" * (len(ways) + 1))
    for case, backward in dict.fromkeys((t.case, t.backward) for t in timings):
        here = {t.way: t for t in timings if (t.case, t.backward) == (case, backward)}
        ratio = min(t.median for t in here.values() if t.way != "ours") / here["ours"].median
        cells = ["{3:.2f} ({4:.2f} to {5:.2f})".format(*here[w]) if w in here else "" for w in ways]
        step = "forward + backward" if backward else "forward"
        lines.append(f"| {case} | {step} | {' | '.join(cells)} | {ratio:.2f} |")
        if ratio < 1:
            losses.append(f"Ours loses: {case}, {step}, at {ratio:.2f} of the best other way.")
    return "\n".join([*lines, "", *(losses or ["Ours loses nowhere."])])


def machine(device) -> str:
    """Device, threads and versions, for the record."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def main():
    """Run all benchmarks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer cases and repetitions")
    parser.add_argument("--compile", action="store_true", help="torch.compile too (slow start)")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    repeats = 5 if options.quick else 15
    timings = bench_nets(device, repeats, options.quick, options.compile)
    timings += bench_packing(device, 3 * repeats)
    print(f"{machine(device)}\n\n{report(timings)}")


if __name__ == "__main__":
    main()
