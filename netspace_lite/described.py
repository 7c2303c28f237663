"""Decode modules the space never met: each layer is described to the decoder, not numbered.

A head per architecture (`netspace_lite.space.Decoder`) knows its architectures by index and can't
be asked for another. Here one generator makes every layer of every module from the embedding and a
description that any layout gives: kind, shape, depth (in the spirit of graph hypernetworks,
Knyazev et al. 2021). Smaller layers are cut from the corner of a largest one, so widths share
weights like nested dolls.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import cos, log2, pi, prod, sin

import torch
from torch import Tensor, nn

from .batching import Batched
from .layout import Layout
from .nets import Nets
from .randomness import own_randomness

KINDS = ("convolution", "pointwise", "linear", "bias")


@dataclass(frozen=True)
class Largest:
    """The largest layers that can be asked for: convolution channels and window, linear sizes."""

    channels: int = 32
    kernel: int = 3
    outputs: int = 64
    inputs: int = 128

    @classmethod
    def of(cls, modules: Iterable[nn.Module]) -> "Largest":
        """Just large enough for these modules."""
        shapes = [shape for module in modules for shape in Layout.of(module).shapes]
        convolutions = [s for s in shapes if len(s) == 4] or [(1, 1, 1, 1)]
        outputs, inputs = zip(*([s for s in shapes if len(s) == 2] or [(1, 1)]), strict=True)
        channels, kernel = (max(max(s[i : i + 2]) for s in convolutions) for i in (0, 2))
        return cls(channels, kernel, max(outputs), max(inputs))


def kind_of(shape: Sequence[int]) -> str:
    """The kind of layer that a parameter of this shape belongs to, one of ``KINDS``."""
    if len(shape) == 4:
        return "pointwise" if tuple(shape[2:]) == (1, 1) else "convolution"
    return {2: "linear", 1: "bias"}.get(len(shape), "unknown")


def describe_layers(layout: Layout) -> Tensor:
    """One row per parameter tensor: [R, D] of kind, shape, and depth from both ends.

    Raises ValueError for a parameter that is neither a weight of a layer nor a bias.
    """
    kinds = [kind_of(shape) for shape in layout.shapes]
    last = max(sum(kind != "bias" for kind in kinds) - 1, 1)
    rows, depth = [], -1
    for name, shape, kind in zip(layout.names, layout.shapes, kinds, strict=True):
        if kind not in KINDS or (kind == "bias" and name.split(".")[-1] == "weight"):  # a norm's
            raise ValueError(f"parameter {name!r} of shape {shape} is no layer: can't describe it")
        depth += kind != "bias"
        share = max(depth, 0) / last
        row = [float(kind == k) for k in KINDS] + [log2(n) / 6 for n in (*shape, 1)[:2]]
        row += [share, depth / 10, (last - depth) / 10, float(depth == 0), float(depth == last)]
        rows.append(row + [wave(share * pi * k) for k in (1, 2, 4) for wave in (sin, cos)])
    if len(set(map(tuple, rows))) < len(rows):
        raise ValueError(f"several of {layout.names} are described alike: can't tell them apart")
    return torch.tensor(rows)


class DescribedDecoder(nn.Module):
    """Embeddings [N, E] and any module's layout -> nets of that module.

    Args:
        embedding: E.
        hidden: width of the layer codes.
        largest: bounds on the layers.
        seed: of the initialisation, and of `fit`.
    """

    def __init__(self, embedding: int, hidden: int = 128, largest: Largest | None = None, seed=0):
        super().__init__()
        self.embedding, self.largest, self.seed = embedding, largest or Largest(), seed
        c, k, outputs = self.largest.channels, self.largest.kernel, self.largest.outputs
        self.shapes = {
            "convolution": (c, c, k, k), "pointwise": (c, c, 1, 1),
            "linear": (outputs, self.largest.inputs), "bias": (max(c, outputs),),
        }  # fmt: skip
        width = describe_layers(Layout(("weight",), ((1, 1),))).shape[1]
        with own_randomness(self.seed):
            self.read = nn.Linear(embedding, hidden)
            self.layer = nn.Sequential(nn.Linear(width, hidden), nn.LeakyReLU())
            self.code = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.LeakyReLU())
            self.mix = nn.Sequential(nn.Linear(hidden, hidden), nn.LeakyReLU())
            make = {kind: nn.Linear(hidden, prod(shape)) for kind, shape in self.shapes.items()}
            self.make = nn.ModuleDict(make)

    def forward(self, z: Tensor, layout: Layout) -> Tensor:
        """z: [N, E] -> rows [N, P]."""
        about = self.layer(describe_layers(layout).to(z))  # [R, hidden]
        read = self.read(z)[:, None].expand(-1, len(about), -1)
        code = self.code(torch.cat([read, about.expand(len(z), -1, -1)], -1))  # [N, R, hidden]
        code = code + self.mix(code)
        code = code / code.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)
        parts = []
        for r, (name, shape) in enumerate(zip(layout.names, layout.shapes, strict=True)):
            kind = kind_of(shape)
            bound = self.shapes[kind]
            if any(size > b for size, b in zip(shape, bound, strict=True)):
                what = f"parameter {name!r} of shape {tuple(shape)} is larger than {bound}"
                raise ValueError(f"{what}: build the decoder with a larger Largest(...)")
            full = self.make[kind](code[:, r]).unflatten(1, bound)
            cut = full[(slice(None), *(slice(size) for size in shape))].flatten(1)
            parts.append(cut * ((6 / prod(shape[1:])) ** 0.5 if kind != "bias" else 0.1))
        return torch.cat(parts, 1)

    def decode(self, z: Tensor, module: nn.Module | Batched) -> Nets:
        """Nets of any module, one per embedding z [N, E] (or one, [E]).

        Raises ValueError if a layer is larger than the decoder was built for.
        """
        batched = module if isinstance(module, Batched) else Batched(module)
        return Nets(batched, self(torch.atleast_2d(z), batched.layout))


class DescribedDistillation:
    """Decoded modules answer well, whichever module is described and wherever in the space.

    Args:
        modules: the modules named in training; others can be asked for later.
        z: [S, E] embeddings to decode from.
        loss: of decoded nets, ``(nets, generator) -> [N]``.
        nets, kinds: embeddings and modules drawn in each step.
    """

    def __init__(self, modules, z: Tensor, loss, nets: int = 2, kinds: int = 3):
        self.batched = [Batched(module) for module in modules]
        self.z, self.loss, self.nets, self.kinds = z.detach(), loss, nets, kinds

    def __call__(self, decoder: DescribedDecoder, generator: torch.Generator) -> Tensor:
        total = 0
        for a in torch.randperm(len(self.batched), generator=generator)[: self.kinds].tolist():
            n = torch.randint(len(self.z), (self.nets,), generator=generator)
            nets = decoder.decode(self.z[n.to(self.z.device)], self.batched[a])
            total = total + self.loss(nets, generator).mean() / min(self.kinds, len(self.batched))
        return total
