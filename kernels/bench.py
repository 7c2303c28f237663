"""Time the kernels beside what users would write: a loop over modules, vmap, torch.compile.

    python -m netspace_lite.kernels.bench            # or `make bench`; the same command on a GPU
    python -m netspace_lite.kernels.bench --quick    # fewer cases and repetitions, a minute

Every case is a set of N nets of one architecture on B inputs of their own, forward alone and
forward with backward into the packed rows. Candidates are timed in turns, round by round, so that
a busy machine slows all of them. Prints a table with median and 20/80 quantiles in milliseconds,
says where ours loses, and writes build/bench/bench.csv and bench.png.
"""

import argparse
import csv
import platform
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import quantiles

import torch
from torch.func import functional_call, stack_module_state, vmap

from netspace_lite.architectures import LeNetLike, ResNet, Siren, VanillaCNN, lite_net
from netspace_lite.functional import BLOCK, Batched

from . import chunk_pack, chunk_unpack, distillation_loss
from .distillation_loss import distillation_loss_reference

DIGITS, CIFAR = ((1, 8, 8), 10), ((3, 32, 32), 10)


@dataclass
class Timing:
    """One line of the table; times in milliseconds."""

    case: str
    way: str
    backward: bool
    median: float
    low: float
    high: float


def cases(quick=False):
    """name -> (make one module, nets, samples): lite sizes on 8×8 digits, the paper's on CIFAR."""
    lite = {
        "LeNetLike lite": (lambda: lite_net("LeNetLike", *DIGITS), 160, 64),
        "LeNetLike, 16 and 16 channels": (
            lambda: LeNetLike(*DIGITS, (16, 16), (64,), kernel=3), 160, 64,
        ),
        "SIREN lite, 64": (lambda: Siren(64), 64, 1024),
    }  # fmt: skip
    more = {
        "VanillaCNN lite": (lambda: lite_net("VanillaCNN", *DIGITS), 64, 64),
        "ResNet8 lite": (lambda: lite_net("ResNet8", *DIGITS), 32, 64),
        "LeNetLike paper": (lambda: LeNetLike(*CIFAR), 8, 128),
        "VanillaCNN paper": (lambda: VanillaCNN(*CIFAR), 8, 128),
        "ResNet8 paper": (lambda: ResNet(*CIFAR, 8), 4, 32),
        "SIREN paper, 256": (lambda: Siren(256), 4, 5000),
    }
    return lite if quick else lite | more


class Contest:
    """The same N nets on the same inputs, run in each of the ways."""

    def __init__(self, make, nets, samples, device):
        self.module = make().to(device)
        modules = [make().to(device) for _ in range(nets)]
        vectors = [torch.nn.utils.parameters_to_vector(m.parameters()) for m in modules]
        self.rows = torch.stack(vectors).detach()
        self.params = {k: v.detach() for k, v in stack_module_state(modules)[0].items()}
        self.batched = Batched(self.module)
        size = (3,) if isinstance(self.module, Siren) else self.module.config["image"]
        self.x = torch.randn(nets, samples, *size, device=device)

    def loop(self, backward):
        """One functional call a net."""
        for n in range(len(self.x)):
            params = {k: v[n].clone().requires_grad_(backward) for k, v in self.params.items()}
            self._finish(functional_call(self.module, params, (self.x[n],)), backward)

    def vmap(self, backward):
        """All nets in one torch.func.vmap."""
        params = {k: v.clone().requires_grad_(backward) for k, v in self.params.items()}
        call = vmap(lambda p, x: functional_call(self.module, p, (x,)), randomness="different")
        self._finish(call(params, self.x), backward)

    def ours(self, backward):
        """Packed rows through the library, in blocks that fit the caches of a CPU."""
        block = BLOCK if self.x.device.type == "cpu" else len(self.x)
        for start in range(0, len(self.x), block):
            rows = self.rows[start : start + block].clone().requires_grad_(backward)
            self._finish(self.batched(rows, self.x[start : start + block], per_net=True), backward)

    def compiled(self, backward):
        """The vmap under torch.compile; the first call compiles."""
        if not hasattr(self, "_compiled"):

            def call(params, x):
                return vmap(lambda p, x: functional_call(self.module, p, (x,)))(params, x)

            self._compiled = torch.compile(call)
        params = {k: v.clone().requires_grad_(backward) for k, v in self.params.items()}
        self._finish(self._compiled(params, self.x), backward)

    @staticmethod
    def _finish(y, backward):
        if backward:
            y.square().mean().backward()


def time_in_turns(ways, repeats, device):
    """Milliseconds of each way: name -> list, every round running each way once."""
    times = {name: [] for name in ways}
    for name in list(ways):
        try:
            ways[name]()
        except Exception as error:  # torch.compile fails in many ways; the table says that it did
            print(f"  {name} does not run here: {type(error).__name__}")
            del times[name]
    for _ in range(repeats):
        for name in times:
            _synchronise(device)
            start = time.perf_counter()
            ways[name]()
            _synchronise(device)
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def _synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def summarise(case, backward, times):
    """A `Timing` for each way, with median and 20/80 quantiles."""
    found = []
    for way, values in times.items():
        low, _, _, high = quantiles(values, n=5, method="inclusive")
        median = sorted(values)[len(values) // 2]
        found.append(Timing(case, way, backward, median, low, high))
    return found


def bench_nets(device, repeats, quick=False, compile=False):
    """Timings of every architecture in every way, forward and with backward."""
    found = []
    for name, (make, nets, samples) in cases(quick).items():
        contest = Contest(make, nets, samples, device)
        names = ["loop", "vmap", "ours"] + (["compiled"] if compile else [])
        for backward in (False, True):
            ways = {way: lambda way=way: getattr(contest, way)(backward) for way in names}  # noqa: B023
            with torch.set_grad_enabled(backward):
                times = time_in_turns(ways, repeats, device)
            found += summarise(f"{name} (N={nets}, B={samples})", backward, times)
    return found


def bench_packing(device, repeats):
    """chunk_pack and chunk_unpack against a plain copy of as many bytes, and a loop over nets."""
    shapes = [(16, 3, 5, 5), (16,), (120, 400), (120,), (84, 120), (84,), (10, 84), (10,)]
    nets = [[torch.randn(s, device=device) for s in shapes] for _ in range(100)]
    size = sum(t.numel() for t in nets[0])
    chunks, length = -(-size // 10_000), 10_000
    prep = chunk_pack(nets, chunks, length)
    rows = prep.flatten(1)[:, :size].contiguous()

    def loop():
        out = torch.zeros_like(prep).flatten(1)
        for row, net in zip(out, nets, strict=True):
            row[:size] = torch.cat([t.flatten() for t in net])
        return out

    lists = [[t.shape for t in net] for net in nets]
    ways = {
        "copy": prep.clone,
        "loop": loop,
        "ours": lambda: chunk_pack(nets, chunks, length),
    }
    found = summarise(
        f"packing 100 nets of {4 * size // 1000} kB", False, time_in_turns(ways, repeats, device)
    )
    ways = {"copy": prep.clone, "ours": lambda: chunk_pack(rows, chunks, length)}
    found += summarise("packing their rows", False, time_in_turns(ways, repeats, device))
    ways = {"copy": prep.clone, "ours": lambda: chunk_unpack(prep, lists)}
    return found + summarise("unpacking them", False, time_in_turns(ways, repeats, device))


def bench_loss(device, repeats):
    """The distillation loss with its gradient: PyTorch's functions net by net, and ours."""
    nets, samples, classes = 64, 128, 10
    logits = torch.randn(nets, samples, classes, device=device, requires_grad=True)
    targets = torch.randn(samples, classes, device=device)
    labels = torch.randint(classes, (samples,), device=device)

    def loop():
        losses = [
            distillation_loss_reference(logits[n : n + 1], targets, labels) for n in range(nets)
        ]
        torch.cat(losses).sum().backward()

    ways = {
        "loop": loop,
        "ours": lambda: distillation_loss(logits, targets, labels).sum().backward(),
    }
    return summarise("distillation loss (N=64, B=128)", True, time_in_turns(ways, repeats, device))


def report(timings):
    """The table as Markdown, a line for each case, and a line for each case that ours loses."""
    ways = ["loop", "vmap", "compiled", "copy", "ours"]
    ways = [way for way in ways if any(t.way == way for t in timings)]
    lines = ["| case | pass | " + " | ".join(ways) + " | best other / ours |"]
    lines.append("|---|---|" + "---:|" * (len(ways) + 1))
    losses = []
    for case, backward in dict.fromkeys((t.case, t.backward) for t in timings):
        here = {t.way: t for t in timings if (t.case, t.backward) == (case, backward)}
        best = min(t.median for t in here.values() if t.way != "ours")
        ratio = best / here["ours"].median
        cells = [
            f"{here[w].median:.2f} ({here[w].low:.2f} to {here[w].high:.2f})" if w in here else ""
            for w in ways
        ]
        step = "forward + backward" if backward else "forward"
        lines.append(f"| {case} | {step} | " + " | ".join(cells) + f" | {ratio:.2f} |")
        if ratio < 1:
            losses.append(f"Ours loses: {case}, {step}, at {ratio:.2f} of the best other way.")
    return "\n".join([*lines, "", *(losses or ["Ours loses nowhere."])])


def plot(timings, path):
    """Horizontal bars of forward with backward, in multiples of our time; log scale."""
    import matplotlib.pyplot as plt

    chosen = [t for t in timings if t.backward]
    names = list(dict.fromkeys(t.case for t in chosen))
    colours = {"loop": "#D55E00", "vmap": "#0072B2", "compiled": "#CC79A7", "ours": "#009E73"}
    ways = [way for way in colours if any(t.way == way for t in chosen)]
    figure, axes = plt.subplots(figsize=(8, 1 + 0.55 * len(names)), layout="constrained")
    for k, way in enumerate(ways):
        for row, name in enumerate(names):
            here = {t.way: t.median for t in chosen if t.case == name}
            if way in here:
                at, height = row + 0.8 * (k + 0.5) / len(ways) - 0.4, 0.75 / len(ways)
                axes.barh(at, here[way] / here["ours"], height, color=colours[way],
                          label=way if row == 0 else None)  # fmt: skip
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(yticks=range(len(names)), yticklabels=names, xscale="log")
    axes.set_xlabel("time of forward and backward, in multiples of ours (log scale)")
    axes.invert_yaxis()
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(ways))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return figure


def machine(device) -> str:
    """Device, threads and versions, for the record."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else _processor()
    return (
        f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main():
    """Run all benchmarks, print the table, write CSV and plot."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer cases and repetitions")
    parser.add_argument(
        "--compile", action="store_true", help="time torch.compile too (slow start)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--repeats", type=int, default=15, help="rounds; every way runs in each")
    options = parser.parse_args()
    device = torch.device(options.device)
    repeats = min(options.repeats, 5) if options.quick else options.repeats
    print(machine(device), flush=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch.compile's advice on precision
        timings = bench_nets(device, repeats, options.quick, options.compile)
    timings += bench_packing(device, 3 * repeats) + bench_loss(device, repeats)
    print(report(timings))
    plot(timings, options.out / "bench.png")
    with open(options.out / "bench.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["machine", *asdict(timings[0])])
        writer.writeheader()
        writer.writerows({"machine": machine(device), **asdict(t)} for t in timings)
    print(f"\nWrote {options.out / 'bench.csv'} and bench.png.")


if __name__ == "__main__":
    main()
