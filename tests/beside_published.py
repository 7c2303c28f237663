"""ResNets of CIFAR-10 that others trained and published, read by `Zoo.from_files`.

    git clone https://github.com/akamaster/pytorch_resnet_cifar10 published
    python tests/beside_published.py published cifar-10-batches-bin

Their modules, their files, their standardisation. Prints each net's accuracy on the official test
images beside the one that their README states, and how far its answers are from their module's.
"""

import re
import sys
from pathlib import Path

import torch

import netspace_lite as ns
from netspace_lite.data import _read_cifar10

ROW = re.compile(r"\|\[ResNet(\d+)\]\(\S+/(resnet\S+\.th)\).*\*\*([\d.]+)%\*\*")
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # as their trainer standardises


def main(published: str, cifar10: str) -> None:
    """Check every file that their README names and that is there."""
    sys.path.insert(0, published)
    import resnet  # theirs

    x, y = map(torch.from_numpy, _read_cifar10(Path(cifar10) / "test_batch.bin"))
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    test = ns.Images((x - mean) / std, y)
    for depth, name, error in ROW.findall((Path(published) / "README.md").read_text("utf-8")):
        file = Path(published) / "pretrained_models" / name
        if not (file.is_file() and file.stat().st_size):
            continue
        net = getattr(resnet, f"resnet{depth}")()
        zoo = ns.Zoo.from_files(file, net)
        state = torch.load(file, "cpu", weights_only=True)["state_dict"]
        torch.nn.DataParallel(net).load_state_dict(state)
        with torch.no_grad():
            own = net.eval()(test.x[:256])
        apart = (zoo.outputs(test.x[:256])[0] - own).abs().max()
        found, said = zoo.accuracy(test).item(), 100 - float(error)
        kind = f"ResNet{depth}, {zoo.layout.size:,} parameters once folded"
        print(f"{kind}: {found:.2f}% of {len(test):,} images, published {said:.2f}%; {apart:.0e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
