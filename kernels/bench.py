"""Time the kernels beside what users would write: a loop over modules, vmap, torch.compile.

    python -m netspace_lite.kernels.bench            # or `make bench`; the same command on a GPU
    python -m netspace_lite.kernels.bench paper      # the cases with this word in their names

Every case is a set of N nets of one architecture on B inputs of their own, forward alone and
forward with backward into the packed rows. On a GPU there is a fourth way, "grouped": what the
library does without Triton, PyTorch's own grouped convolutions and products; and that and ours are
also replayed as CUDA graphs, where no launch waits for Python. Ways are timed in turns, round by
round, so that a busy machine slows all of them. Prints a table with median and 20/80 quantiles in
milliseconds, a line as soon as it is timed, and says where ours loses.
"""

import argparse
import itertools
import platform
import time
from collections import namedtuple

import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from netspace_lite import Batched, LeNetLike, Siren, lite_net, paper_net

from . import backend, chunk_pack

DIGITS, CIFAR = (1, 8, 8), (3, 32, 32)
QUICK = {  # name -> (make one module, input, nets, samples): lite sizes, then the paper's
    "LeNetLike lite": (lambda: lite_net("LeNetLike", DIGITS, 10), DIGITS, 160, 64),
    "LeNetLike, 16 and 16 channels": (
        lambda: LeNetLike(DIGITS, 10, (16, 16), (64,), 3), DIGITS, 160, 64),
    "SIREN lite, 64": (lambda: Siren(64), (3,), 64, 1024),
}  # fmt: skip
CASES = QUICK | {
    "VanillaCNN lite": (lambda: lite_net("VanillaCNN", DIGITS, 10), DIGITS, 64, 64),
    "ResNet8 lite": (lambda: lite_net("ResNet8", DIGITS, 10), DIGITS, 32, 64),
    "LeNetLike paper": (lambda: paper_net("LeNetLike"), CIFAR, 8, 128),
    "VanillaCNN paper": (lambda: paper_net("VanillaCNN"), CIFAR, 8, 128),
    "ResNet8 paper": (lambda: paper_net("ResNet8"), CIFAR, 4, 32),
    "SIREN paper, 256": (lambda: Siren(256), (3,), 4, 5000),
}


def ways_of(make, size, nets, samples, device, backward, compiled):
    """name -> function: the same N nets on the same inputs, run in each of the ways."""
    modules, x = [make() for _ in range(nets)], torch.randn(nets, samples, *size, device=device)
    rows = torch.stack([nn.utils.parameters_to_vector(m.parameters()) for m in modules])
    rows, module = rows.detach().to(device), modules[0].to(device)
    params = stack_module_state([m.to(device) for m in modules])[0]
    batched = Batched(module)

    def finish(y):
        if backward:
            y.square().mean().backward()

    def fresh(values):
        return values.detach().clone().requires_grad_(backward)

    def loop():
        for n in range(nets):
            net = {k: fresh(v[n]) for k, v in params.items()}
            finish(functional_call(module, net, (x[n],)))

    def with_all(call):
        return lambda: finish(call({k: fresh(v) for k, v in params.items()}, x))

    call = vmap(lambda p, x: functional_call(module, p, (x,)))
    ways = {"loop": loop, "vmap": with_all(call)}
    ways["ours"] = lambda: finish(batched(fresh(rows), x, per_net=True))
    if device.type == "cuda":  # elsewhere this is ours
        ways["grouped"] = backend("torch")(ways["ours"])
        ways |= {f"{way}, graph": captured(ways[way]) for way in ("grouped", "ours")}
    return ways | ({"compiled": with_all(torch.compile(call))} if compiled else {})


def captured(way):
    """A function that replays what `way` launches, captured as a CUDA graph."""
    graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # once before, where nothing is captured yet
        way()
    with torch.cuda.graph(graph, stream=aside):
        way()
    return graph.replay


# One way's time in one case, in milliseconds: median and 20/80 quantiles.
Timing = namedtuple("Timing", "case way backward median low high")


def time_in_turns(case, backward, ways, repeats, device):
    """A `Timing` for each way; every round runs each way once, after one that isn't timed."""
    times = torch.empty(repeats + 1, len(ways))
    finish = torch.accelerator.synchronize if device.type == "cuda" else lambda: None
    for round in times:
        for k, way in enumerate(ways.values()):
            finish()
            start = time.perf_counter()
            with torch.set_grad_enabled(backward):
                way()
            finish()
            round[k] = 1e3 * (time.perf_counter() - start)
    found = times[1:].quantile(torch.tensor((0.5, 0.2, 0.8)), 0).T.tolist()
    return [Timing(case, way, backward, *three) for way, three in zip(ways, found, strict=True)]


def bench(device, repeats, quick=False, compiled=False, word=""):
    """Timings of every architecture in every way, forward and with backward, and of packing.

    Of those, the architectures with `word` in their names.
    """
    cases = {name: case for name, case in (QUICK if quick else CASES).items() if word in name}
    for name, (make, size, nets, samples) in cases.items():
        for backward in (False, True):
            ways = ways_of(make, size, nets, samples, device, backward, compiled)
            yield time_in_turns(f"{name} (N={nets}, B={samples})", backward, ways, repeats, device)
    yield time_in_turns("packing 100 nets of 240 kB", False, packing(device), 3 * repeats, device)


def packing(device):
    """Ways to pack 100 nets: a plain copy of as many bytes, a loop over nets, chunk_pack."""
    shapes = [(16, 3, 5, 5), (16,), (120, 400), (120,), (84, 120), (84,), (10, 84), (10,)]
    nets = [[torch.randn(s, device=device) for s in shapes] for _ in range(100)]
    prep = chunk_pack(nets, 7, 10_000)

    def loop():
        for row, net in zip(torch.zeros_like(prep).flatten(1), nets, strict=True):
            row[: sum(t.numel() for t in net)] = nn.utils.parameters_to_vector(net)

    return {"copy": prep.clone, "loop": loop, "ours": lambda: chunk_pack(nets, 7, 10_000)}


def report(cases):
    """The table as lines of Markdown, each as soon as its case is timed; then where ours loses."""
    first, losses = next(cases := iter(cases)), []
    ways = [*sorted({t.way for t in first} - {"ours"} | {"copy"}), "ours"]
    yield f"| case | pass | {' | '.join(ways)} | best other / ours |"
    yield "|---|---|" + "---:|" * (len(ways) + 1)
    for timings in itertools.chain([first], cases):
        here, (case, _, backward, *_) = {t.way: t for t in timings}, timings[0]
        others = [t.median for t in timings if t.way != "ours" and "graph" not in t.way]
        ratio = min(others) / here["ours"].median
        cells = ["{3:.2f} ({4:.2f} to {5:.2f})".format(*here[w]) if w in here else "" for w in ways]
        step = "forward + backward" if backward else "forward"
        yield f"| {case} | {step} | {' | '.join(cells)} | {ratio:.2f} |"
        if ratio < 1:
            losses.append(f"Ours loses: {case}, {step}, at {ratio:.2f} of the best other way.")
    yield from ["", *(losses or ["Ours loses nowhere."])]


def machine(device) -> str:
    """Device, threads and versions, for the record."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def main():
    """Run all benchmarks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("word", nargs="?", default="", help='of cases\' names, such as "paper"')
    parser.add_argument("--compile", action="store_true", help="torch.compile too (slow start)")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(machine(device), end="\n\n")
    for line in report(bench(device, 15, compiled=options.compile, word=options.word)):
        print(line, flush=True)


if __name__ == "__main__":
    main()
