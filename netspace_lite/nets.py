"""Trained nets as data: N nets of one architecture, or of several side by side."""

import copy
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from . import store
from .architectures import describe, listed, name_of
from .batching import BLOCK, Batched, check_inputs, samples_per_block
from .checks import check_pick, finite, whole
from .data import Images, check_labels
from .fingerprint import difference, fingerprint, structure, template
from .folding import Folding, fill, fold_batchnorm, moved, unwrapped
from .layout import check_rows


class Nets:
    """N trained nets of one architecture: packed rows that run as they are.

    Args:
        module: the architecture, as any module of it; its own parameters are not used.
        rows: [N, P], parameters of each net in module order.

    ``nets[2:5]`` or ``nets[mask]`` are nets again, ``nets[0]`` is one net (N = 1). ``nets.module``
    is a module of the architecture whose parameters are nobody's, ``nets.layout`` says where each
    parameter lives in a row.
    """

    def __init__(self, module: nn.Module | Batched, rows: Tensor):
        self.batched = module if isinstance(module, Batched) else Batched(module)
        self.module, self.layout = self.batched.module, self.batched.layout
        check_rows(rows, self.layout.size)
        self.rows = rows

    @property
    def fingerprint(self) -> str:
        """What the nets compute, weights included, see `netspace_lite.fingerprint`."""
        return fingerprint(self.batched.fingerprint, self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def _at(self, n: Tensor) -> "Nets":
        return Nets(self.batched, self.rows[n])

    def __getitem__(self, index) -> "Nets":
        return self._at(_places(index, len(self)).flatten())

    def __repr__(self) -> str:
        name = name_of(self.module)
        return f"{type(self).__name__}({len(self)} × {name}, {self.layout.size:,} parameters each)"

    def __call__(self, x: Tensor, per_net: bool = False) -> Tensor:
        """Outputs [N, B, ...] of all nets on x, differentiable; see `Batched`."""
        return self.batched(self.rows, x, per_net)

    @torch.no_grad()
    def outputs(self, x: Tensor, per_net: bool = False, samples: int | None = None) -> Tensor:
        """Outputs [N, B, ...] without gradients, in blocks of nets and of ``samples``.

        Samples stay together where answers depend on what else is asked.
        """
        check_inputs(self.rows, x, per_net)
        samples = samples_per_block(x[0] if per_net else x) if samples is None else samples
        if whole(samples, "samples") < 1:
            raise ValueError(f"samples are asked at least one at a time, not {samples}")
        if samples < x.shape[per_net] and self.batched.mixes_samples(self.rows, x, per_net):
            samples = x.shape[per_net]  # all together, as a call asks them
        blocks = -(-x.shape[per_net] // samples)  # alike: one sample alone is easily squeezed
        for first in range(0, len(self), BLOCK):
            n = slice(first, first + BLOCK)
            parts = (x[n] if per_net else x).tensor_split(blocks, int(per_net))
            block = torch.cat([self.batched(self.rows[n], part, per_net) for part in parts], dim=1)
            if first == 0:  # all of it at once: a zoo's answers may be a gigabyte
                out = block.new_empty(len(self), *block.shape[1:])
            out[n] = block
        return out

    def accuracy(self, images) -> Tensor:
        """Accuracy in percent of each net on ``images`` (or what `Images.of` takes): [N].

        The result is on the CPU, wherever the nets are. Raises ValueError for labels that are no
        whole numbers 0..K-1.
        """
        images = Images.of(images)
        parts = (Nets(self.batched, rows) for rows in self.rows.split(8 * BLOCK))
        return torch.cat([correct(part.outputs(images.x), images.y) for part in parts]).cpu()

    def finite(self) -> Tensor:
        """Which nets hold no NaN and no infinite value: [N], on the CPU."""
        return finite(self.rows).cpu()

    def to(self, device) -> "Nets":
        """The same nets on another device."""
        same = copy.copy(self)
        same.rows = self.rows.to(device)
        return same

    def split(self, val: int, test: int, seed: int = 0) -> tuple["Nets", "Nets", "Nets"]:
        """Disjoint groups of the remaining, of ``val`` and of ``test`` nets, drawn by ``seed``.

        Warns of nets held out that are copies of nets to learn from.
        """
        if min(whole(val, "val"), whole(test, "test"), len(self) - val - test) < 1:
            raise ValueError(f"can't hold out {val} + {test} of {len(self)}: each part needs a net")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        held, learned = order.split([val + test, len(self) - val - test])
        rows = [fingerprint(row) for row in self.rows]
        known = {rows[n] for n in learned.tolist()}
        if copies := sorted(n for n in held.tolist() if rows[n] in known):
            what = f"nets {copies}, held out, are copies of nets to learn from"
            warnings.warn(f"{what}: figures of them would be too good", stacklevel=2)
        return self[learned], self[held[:val]], self[held[val:]]

    def save(self, folder) -> None:
        """Write the nets to ``folder``, atomically; `netspace_lite.Zoo.load` reads them back."""
        store.save(folder, "zoo", *self._contents())

    def _contents(self) -> tuple[dict, dict[str, Tensor]]:
        """The readable record and the tensors that `save` writes."""
        about = describe(self.module) | {"fingerprint": self.batched.fingerprint}
        return {"architecture": about}, {"rows": self.rows}

    def to_module(self, n: int = 0) -> nn.Module:
        """Net n as a plain ``nn.Module`` of its own, in evaluation mode, where the nets are."""
        module = moved(copy.deepcopy(self.module), self.rows).eval()
        fill(module, self.state_dict(n))
        return module

    def state_dict(self, n: int = 0) -> dict[str, Tensor]:
        """Net n's parameters, copied out of the packed row.

        With buffers, and tied weights under all their names, it is ``to_module(n).state_dict()``.
        """
        (state,) = self.layout.unpack(self[n].rows)
        return {name: value.detach().clone() for name, value in state.items()}

    def export(self, path, n: int = 0) -> None:
        """Write net n as a safetensors file that ``module.load_state_dict`` takes back.

        Of nets that were trained with batch norms it is ``fold_batchnorm(module)`` that takes it.
        """
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        state = self.to_module(n).state_dict()  # tied parameters under each of their names
        save_file({name: value.clone().contiguous() for name, value in state.items()}, path)


def packed(modules: Iterable[nn.Module]) -> tuple[Batched, Tensor]:
    """The architecture of modules, and their rows [N, P], batch norms folded on the way.

    Raises ValueError naming the first module that computes another function of its weights than
    module 0.
    """
    modules = [unwrapped(module) for module in listed(modules)]
    if not modules:
        raise ValueError("no modules: give at least one trained net")
    folding, first = Folding(modules[0]), template(modules[0]) if len(modules) > 1 else None
    batched, nets = Batched(folding.module), []
    for n, module in enumerate(modules):
        if n == 0 or (first is not None and template(module) == first):
            nets.append(folding(dict(module.named_parameters()) | dict(module.named_buffers())))
            continue
        nets.append(folded := fold_batchnorm(module))
        if structure(folded) != batched.fingerprint:
            what = f"module {n}, a {name_of(folded)}, computes another function of its weights"
            why = difference(batched.module, folded)
            cure = "set alike what answers don't depend on, or read state dicts by from_files"
            raise ValueError(f"{what} than module 0 ({why}): take each architecture apart; {cure}")
    return batched, batched.layout.pack(nets)


def _places(index, count: int) -> Tensor:
    """What an index picks of ``count`` places: of a number one, else a list of them."""
    index = index.cpu().numpy() if isinstance(check_pick(index), Tensor) else index
    return torch.as_tensor(np.arange(count)[index].copy())  # as NumPy picks: backwards, too


def members_of(group: Tensor) -> list[tuple[int, Tensor]]:
    """The groups that occur in [N], in order, each with the places of its members."""
    return [(k, (group == k).nonzero()[:, 0]) for k in group.unique().tolist()]


class MixedNets:
    """Nets of several architectures in one order.

    Args:
        groups: `Nets`, one per architecture.
        members: the places of each group's nets in the order, a permutation of 0..N-1 in all;
            None: one group after the other.

    Answers, accuracies and names come in that order; ``mixed[n]`` is one net (`Nets` of one), and
    a slice, a mask or a list gives `MixedNets` again.
    """

    def __init__(self, groups: Sequence[Nets], members: Sequence[Tensor] | None = None):
        self.groups, sizes = list(groups), [len(group) for group in groups]
        if not sizes:
            raise ValueError("no nets: give at least one group")
        members = torch.arange(sum(sizes)).split(sizes) if members is None else members
        self.members = [torch.as_tensor(places).cpu() for places in members]
        places, taken = torch.cat(self.members), [len(places) for places in self.members]
        if taken != sizes or not torch.equal(places.sort().values, torch.arange(sum(sizes))):
            raise ValueError(f"groups of {sizes} nets need as many places each, all of them once")
        self._order = places.argsort()
        # which group each net is of, and its place in that
        self._group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[self._order]
        self._place = torch.cat([torch.arange(size) for size in sizes])[self._order]

    def __len__(self) -> int:
        return len(self._order)

    def __repr__(self) -> str:
        parts = ", ".join(f"{len(g)} × {name_of(g.module)}" for g in self.groups)
        return f"MixedNets({parts})"

    def __getitem__(self, index) -> "Nets | MixedNets":
        picked = _places(index, len(self))
        group, place = self._group[picked], self._place[picked]
        if picked.dim() == 0:
            return self.groups[group][place]
        parts = [(self.groups[k][place[n]], n) for k, n in members_of(group)]
        return MixedNets(*zip(*parts, strict=True) if parts else [()])

    def to_module(self, n: int = 0) -> nn.Module:
        """Net n as a plain ``nn.Module`` of its own, see `Nets.to_module`."""
        return self[n].to_module()

    @property
    def architectures(self) -> list[str]:
        """The architecture's name of each net, [N]."""
        return [name_of(self.groups[k].module) for k in self._group]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Values of each group's nets, [N_g, ...] each, in the common order: [N, ...]."""
        return torch.cat(list(parts))[self._order]

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs [N, B, ...] of all nets on shared x [B, ...], differentiable."""
        return self.join([group(x) for group in self.groups])

    def outputs(self, x: Tensor) -> Tensor:
        """Outputs [N, B, ...] without gradients."""
        return self.join([group.outputs(x) for group in self.groups])

    def accuracy(self, images) -> Tensor:
        """Accuracy in percent of each net on ``images``: [N]."""
        images = Images.of(images)
        return self.join([group.accuracy(images) for group in self.groups])


def as_answers(outputs: Tensor, values: bool = False) -> Tensor:
    """What nets answer as [N, B, K], K logits or values to each sample.

    Logits [N, B, T, K] are of T places a sample, such as tokens, which count as samples: [N, B·T,
    K]. Values may have any shape [N, B, ...]. Raises ValueError for other shapes.
    """
    if values and outputs.dim() > 1:
        return outputs.reshape(*outputs.shape[:2], -1)
    if outputs.dim() not in (3, 4):
        what = f"answers of shape {list(outputs.shape)} are not [N, B, K], or [N, B, T, K]"
        cure = "let the module give [B, K], classes last, or say SpaceConfig(values=True)"
        raise ValueError(f"{what}: {cure}")
    return outputs.flatten(1, -2)


def classes(outputs: Tensor) -> Tensor:
    """The class that each answer stands for: logits [N, B, K] -> [N, B]; -1 if not finite.

    Logits of several places a sample, [N, B, T, K], give [N, B·T]. Raises ValueError for answers
    that are no logits of two classes or more: the largest of one value is always the first, and all
    nets would agree.
    """
    outputs = as_answers(outputs)
    if outputs.shape[-1] < 2:
        given = f"answers of shape {list(outputs.shape)}"
        raise ValueError(f"{given} are no logits of 2 classes or more: measure them yourself")
    return outputs.argmax(-1).where(finite(outputs), -1)  # or NaN would be class 0


def correct(outputs: Tensor, y: Tensor) -> Tensor:
    """Share in percent of each net's logits [N, B, K] that are largest for the class y [B]: [N].

    Of logits [N, B, T, K] for the classes y [B, T].
    """
    found = classes(outputs)
    check_labels(y, outputs.shape[-1])
    if y.numel() != found.shape[1]:
        raise ValueError(f"{found.shape[1]} answers need as many labels, not {[*y.shape]}")
    return (found == y.flatten()).float().mean(1) * 100


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each net's logits [N, B, K] against labels y, [B] or [N, B]: [N].

    Of logits [N, B, T, K] against y [B, T] or [N, B, T].
    """
    labels = y.expand(logits.shape[:-1])
    return F.cross_entropy(logits.movedim(-1, 1), labels, reduction="none").flatten(1).mean(1)
