"""Nets of several architectures side by side: a mixed zoo is a list of zoos.

Nothing is padded to the largest architecture: nets of one architecture stay one matrix and are
evaluated together, and only what all nets share, answers and embeddings, is put in one order.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import store
from .architectures import name_of
from .functional import Nets
from .zoo import Zoo


class MixedNets:
    """Nets of several architectures in one order.

    Args:
        groups: `Nets`, one per architecture.
        members: the places of each group's nets in the order, a permutation of 0..N-1 in all;
            None: one group after the other.

    Answers, accuracies and names come in that order; ``mixed[n]`` is one net (`Nets` of one).
    """

    def __init__(self, groups: Sequence[Nets], members: Sequence[Tensor] | None = None):
        self.groups = list(groups)
        if not self.groups:
            raise ValueError("no nets: give at least one group")
        sizes = [len(group) for group in self.groups]
        if members is None:
            members = torch.arange(sum(sizes)).split(sizes)
        self.members = list(members)
        places = torch.cat(self.members)
        if [len(m) for m in self.members] != sizes or not bool(
            (places.sort().values.cpu() == torch.arange(sum(sizes))).all()
        ):
            raise ValueError(
                f"groups of {sizes} nets need as many places each, all of 0..{sum(sizes) - 1} once"
            )

    def __len__(self) -> int:
        return sum(len(group) for group in self.groups)

    def __repr__(self) -> str:
        parts = ", ".join(f"{len(g)} × {name_of(g.module)}" for g in self.groups)
        return f"MixedNets({parts})"

    def __getitem__(self, n: int) -> Nets:
        n = range(len(self))[n]
        for group, places in zip(self.groups, self.members, strict=True):
            at = (places == n).nonzero()
            if len(at):
                return group[int(at)]
        raise AssertionError("unreachable: members were checked")

    def __iter__(self) -> Iterator[Nets]:
        return (self[n] for n in range(len(self)))

    @property
    def architectures(self) -> list[str]:
        """The architecture's name of each net, [N]."""
        names = [""] * len(self)
        for group, places in zip(self.groups, self.members, strict=True):
            for n in places.tolist():
                names[n] = name_of(group.module)
        return names

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Values of each group's nets, [N_g, ...] each, in the common order: [N, ...]."""
        order = torch.cat(self.members)
        joined = torch.cat(list(parts))
        return joined[order.argsort().to(joined.device)]

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs [N, B, ...] of all nets on shared x [B, ...], differentiable."""
        return self.join([group(x) for group in self.groups])

    def outputs(self, x: Tensor) -> Tensor:
        """Outputs [N, B, ...] without gradients."""
        return self.join([group.outputs(x) for group in self.groups])

    logits = outputs

    def accuracy(self, images) -> Tensor:
        """Accuracy in percent of each net on ``images``: [N]."""
        return self.join([group.accuracy(images) for group in self.groups])


def save_zoos(zoos: Sequence[Zoo], folder) -> None:
    """Write a mixed zoo: one readable folder per zoo and ``zoos.json`` with their order."""
    names = [f"{a}-{name_of(zoo.module)}" for a, zoo in enumerate(zoos)]
    for name, zoo in zip(names, zoos, strict=True):
        zoo.save(Path(folder) / name)
    store.save(folder, "zoos", {"zoos": names}, {})


def load_zoos(folder, modules: Sequence | None = None) -> list[Zoo]:
    """Read what `save_zoos` wrote.

    Args:
        modules: one per zoo, None for architectures that are registered; only needed for zoos of
            your own unregistered modules.

    Raises FileNotFoundError or ValueError naming the file that is missing, damaged or of another
    architecture.
    """
    names = store.load(folder, "zoos")[0]["zoos"]
    modules = modules or [None] * len(names)
    if len(modules) != len(names):
        raise ValueError(f"{folder} holds {len(names)} zoos, but {len(modules)} modules were given")
    return [Zoo.load(Path(folder) / n, m) for n, m in zip(names, modules, strict=True)]
