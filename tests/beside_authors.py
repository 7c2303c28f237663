"""One training step of the authors' code beside ours, at the paper's sizes, on this machine.

    git clone https://github.com/CVLAB-Unibo/netspace authors
    pip install torchvision tensorboard  # which it imports; torchvision as fits torch
    python tests/beside_authors.py authors

Their encoder, decoder, loss and Adam as their trainer calls them (8 nets on 128 images, PRep of
8 × 10,000), then ours on as many nets and images, then ours as we fit (48 nets on 24 images).
Prints medians in milliseconds, taken in turns.
"""

import sys
import time
from statistics import median

import torch

import netspace_lite as ns
from netspace_lite import training

NETS, IMAGES, ROUNDS = 8, 128, 7
THEIRS = {
    "LeNetLike": ("lenetlike",),
    "VanillaCNN": ("vanilla_cnn",),
    "ResNet8": ("resnet_fusedbn", 8),
}


def theirs(name: str, images: torch.Tensor):
    """A step of the authors' single-architecture training."""
    from models.decoder import Decoder
    from models.encoder import Encoder
    from models.netfactory import NetFactory
    from trainers.single_arch import SingleArchTrainer

    kind, *depth = THEIRS[name]
    nets = [NetFactory.get_net_builder(kind)(n, 0, *depth, "cifar10") for n in range(NETS)]
    prep = torch.stack([net.get_prep((8, 10_000)).detach() for net in nets])
    encoder, decoder = Encoder(4096), Decoder([nets[0]], 4096, (8, 10_000))
    adam = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 1e-4)

    def step():
        adam.zero_grad()
        decoded = decoder(encoder(prep))
        loss = SingleArchTrainer.compute_loss(None, nets, decoded, images, decoder)
        loss.backward()
        adam.step()
        loss.item()

    return step


def ours(name: str, images: torch.Tensor, nets: int, samples: int):
    """The very step of `netspace_lite.fit`, answers of the targets looked up as there."""
    net = ns.paper_net(name)
    zoo = ns.Nets(net, ns.initial_rows(net, range(100)))
    space = ns.NetSpace.for_zoos(zoo, images, ns.SpaceConfig(chunk=500))
    objective = ns.Distillation(space, zoo, images, nets=nets, samples=samples, analogies=0)
    optimiser, generator = ns.Muon(space, 2e-3), torch.Generator().manual_seed(0)

    return lambda: training._descend(space, objective, generator, optimiser, 0)


def main(folder: str) -> None:
    """Time all three architectures."""
    sys.path.insert(0, folder)
    images = torch.randn(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, ms a step (median)")
    for name in THEIRS:
        steps = {
            "authors": theirs(name, images),
            f"ours, {NETS} × {IMAGES}": ours(name, images, NETS, IMAGES),
            "ours, 48 × 24": ours(name, images, 48, 24),
        }
        times = {kind: [] for kind in steps}
        for _ in range(ROUNDS + 1):
            for kind, step in steps.items():
                started = time.perf_counter()
                step()
                times[kind].append(1000 * (time.perf_counter() - started))
        found = {kind: median(values[1:]) for kind, values in times.items()}  # the first warms up
        base = found["authors"]
        row = (f"{kind} {value:.0f} ({base / value:.1f})" for kind, value in found.items())
        print(f"{name}: {', '.join(row)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
