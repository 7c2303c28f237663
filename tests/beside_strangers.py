"""Nets that strangers trained, in a space of our nets and in one of theirs.

PyTorch's tutorial "Training a Classifier" ends with a file ``cifar_net.pth``, and many who followed
it have published theirs. tests/strangers.txt lists those of this run: repository, commit, path and
SHA-256 of each file, which are fetched into the second folder where they are not there yet.

    python tests/beside_strangers.py cifar-10-batches-bin build/strangers

Trains 480 nets of the same module, standardised as in the tutorial, fits a space on 400 of them and
prints how our held-out nets and all strangers' come back from it; then how held-out strangers' come
back from spaces that know nothing but other strangers' nets, three splits. All is kept in the
second folder; ``torchrun --standalone --nproc-per-node=2`` in front trains the zoo on both cores.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pooch
import torch
import torch.nn.functional as F
from torch import nn

import netspace_lite as ns
from netspace_lite.data import _read_cifar10
from netspace_lite.processes import rank, together
from netspace_lite.tutorial import figures

SOURCE = "https://raw.githubusercontent.com"
STEPS, EPOCH, REFINE = 2500, 250, 100  # of a fit on our zoo; of a refinement
ASKED, TESTED = 12_000, 4000  # images to compare answers on, while fitting and after
ALONE = 800  # steps of a fit on strangers' nets, who are few
NETS, VAL, TEST = 480, 40, 40


class Net(nn.Module):
    """The tutorial's: 62,006 parameters, ReLU and max pooling."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x):
        """x: [B, 3, 32, 32] -> logits [B, 10]."""
        for layer in (self.conv1, self.conv2):
            x = F.max_pool2d(F.relu(layer(x)), 2)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))


def images(folder: Path) -> ns.ImageData:
    """CIFAR-10, pixels from -1 to 1 as in the tutorial: 45,000, 5,000 and 10,000 images."""
    files = [*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]
    parts = [map(torch.from_numpy, _read_cifar10(folder / name)) for name in files]
    x, y = (torch.cat(part) for part in zip(*parts, strict=True))
    all_of = ns.Images(2 * x - 1, y)
    cuts = slice(45_000), slice(45_000, 50_000), slice(50_000, None)
    return ns.ImageData("cifar10", *(all_of[cut] for cut in cuts), classes=10)


def strangers(folder: Path) -> ns.Zoo:
    """Every net of the list, in its order; a file that is there, and the one listed, stays."""
    files = []
    for line in Path(__file__).with_name("strangers.txt").read_text("utf-8").splitlines():
        repository, commit, path, known = line.split("\t")
        url, name = f"{SOURCE}/{repository}/{commit}/{path}", f"{repository}/{path}"
        files.append(pooch.retrieve(url, f"sha256:{known}", name.replace("/", "--"), folder))
    return ns.Zoo.from_files(files, Net())


def told(kind: str, found: dict[str, float]) -> None:
    """Print one line of the table."""
    numbers = f"{found['agreement']:.1f} | {found['mae']:.1f} | {found['r']:.3f}"
    print(f"| {kind} | {numbers} |", flush=True)


def judge(space: ns.NetSpace, known: ns.Zoo, nets: ns.Zoo, data: ns.ImageData, who: str) -> dict:
    """How ``nets`` come back from a space of the nets ``known``, beside the baselines.

    Returns the agreement of each net in percent, [N], by kind.
    """
    test = data.test[:TESTED]
    own, z = nets.outputs(test.x), space.encode(nets)
    refined = ns.refine(space, nets, data.train.x[:ASKED], REFINE)
    answers = [space.features(zoo.rows).answers for zoo in (known, nets)]
    best = known.rows[known.scores["val_accuracy"].argmax()].expand(len(nets), -1)
    rows = {
        "**encoded**": space.decode(z),
        "**refined**": space.decode(refined),
        "nearest net by answers": ns.nearest_by_answers(*answers, known),
        "best net, whatever is asked": ns.Nets(nets.batched, best),
        "nearest net by weights": ns.nearest_by_weights(known, nets),
        "PCA of weights, as many values": ns.pca_nets(known, nets, z.shape[1]),
        "mean net": ns.mean_net(known, nets),
    }
    agreement = {}
    for kind, decoded in rows.items():
        outputs = decoded.outputs(test.x)
        told(f"{who}: {kind}", ns.compare(outputs, own, test.y))
        agreement[kind.strip("*")] = 100 * (outputs.argmax(-1) == own.argmax(-1)).float().mean(1)
    return agreement


def picture(accuracy: torch.Tensor, agreement: dict, path: Path) -> None:
    """How much of each stranger's net came back, over how good it is."""
    figures.use_style()
    _, ax = plt.subplots(figsize=(6.5, 4))
    kinds = {"refined": "D", "encoded": "o", "nearest net by answers": "s"}
    for (kind, mark), colour in zip(kinds.items(), figures.KINDS, strict=False):
        ax.scatter(accuracy, agreement[kind], 16, colour, marker=mark, label=kind)
    ax.set(xlabel="test accuracy of a stranger's net (%)", ylabel="agreement with it (%)")
    ax.legend(loc="lower right")
    plt.savefig(path, dpi=160)


def lines(space: ns.NetSpace, nets: ns.Zoo, data: ns.ImageData) -> None:
    """Straight lines between 24 pairs of nets: between embeddings and between weights."""
    pairs = torch.randperm(len(nets), generator=torch.Generator().manual_seed(0))[:48].view(2, -1)
    start, end = (nets[n] for n in pairs)
    way = ns.interpolate(space.encode(start), space.encode(end), 11).flatten(0, 1)
    walks = {"embeddings": space.decode(way), "weights": ns.weight_line(start, end, 11)}
    for kind, walk in walks.items():
        drop = ns.line_drop(walk.accuracy(data.test[:1000]).view(-1, 11))
        print(f"lines between {kind}: {drop.median():.1f} points under the weaker end", flush=True)


def fitted(known: ns.Zoo, val: ns.Zoo, data: ns.ImageData, folder: Path, steps: int, seed=0):
    """A space of the nets ``known``, as notebook 2 fits it, that reads answers only.

    Strangers' weights are of other optimisers, rates and batches than those it would know.
    """
    config = ns.SpaceConfig(weights=False, probes=256, components=256 * (len(known) > 256))
    space = ns.NetSpace.for_zoos(known, data.train.x, config, seed)
    inputs = ns.blends(data.train.x[:ASKED])
    objective = ns.Distillation(space, known, inputs, nets=48, consensus=0.5)
    validate = lambda space: ns.scores(space, val, data.val)  # noqa: E731
    ns.fit(space, objective, validate, steps, epoch=EPOCH, folder=folder)
    return space


def main(cifar10: str, folder: str) -> None:
    """Print the tables."""
    folder, data = Path(folder), images(Path(cifar10))
    task = ns.ImageTask(data)
    with together():
        recipes = ns.draw_recipes(NETS, steps=(30, 2500), lr=(5e-4, 4e-3))
        zoo = ns.train_zoo(Net, task, recipes, folder / "zoo")
        if rank():
            return
    theirs = strangers(folder).scored(task)
    ours = zoo.scores["test_accuracy"], theirs.scores["test_accuracy"]
    for who, accuracy in zip(("ours", "theirs"), ours, strict=True):
        low, middle, high = accuracy.quantile(torch.tensor([0.0, 0.5, 1.0])).tolist()
        print(f"{len(accuracy)} nets, {who}: {low:.1f} to {high:.1f}% right, median {middle:.1f}")
    answers = theirs.outputs(data.test.x[:TESTED])
    alike = 100 - ns.disagreement(answers, answers)[~torch.eye(len(theirs), dtype=torch.bool)]
    print(f"two strangers' nets agree on {alike.mean():.1f}% of images, at most {alike.max():.1f}%")
    known, val, test = zoo.split(VAL, TEST)
    space = fitted(known, val, data, folder / "space", STEPS)
    print("| | agreement (%) | MAE of accuracy (points) | correlation r |\n|---|---|---|---|")
    judge(space, known, test, data, "our nets held out")
    agreement = judge(space, known, theirs, data, "strangers' nets")
    picture(theirs.scores["test_accuracy"], agreement, folder / "strangers.png")
    best = zoo.scores["test_accuracy"].max()
    beyond = theirs.scores["test_accuracy"] > best
    for who, some in (("up to", ~beyond), ("beyond", beyond)):
        medians = (f"{kind} {of[some].median():.1f}" for kind, of in agreement.items())
        print(f"{int(some.sum())} {who} our best net's {best:.1f}%, medians: {', '.join(medians)}")
    lines(space, theirs, data)
    for seed in range(3):
        known, val, test = theirs.split(8, 16, seed)
        space = fitted(known, val, data, folder / f"space-of-theirs-{seed}", ALONE, seed)
        judge(space, known, test, data, f"strangers alone, split {seed}")


if __name__ == "__main__":
    main(*sys.argv[1:])
