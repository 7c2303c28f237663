"""What to do with a space of networks: walk it, search it, sample it, read properties from it.

Everything acts on embeddings ``z: [N, E]`` and leaves the decoder as it is; a batch of embeddings
decodes to a batch of nets, so a hundred searches cost little more than one.
"""

import torch
from torch import Tensor

from .functional import Nets


def interpolate(start: Tensor, end: Tensor, steps: int = 11) -> Tensor:
    """Points on the straight lines between pairs of embeddings (paper section IV-C).

    Args:
        start, end: [M, E], one pair a line, or [E] for a single line.
        steps: S, points on each line, both ends among them; at least 2.

    Returns [M, S, E], or [S, E] for a single line. ``flatten(0, 1)`` makes a batch to decode.

    Example: ``interpolate(torch.zeros(2), torch.ones(2), 3)`` is [[0, 0], [½, ½], [1, 1]].
    """
    if start.shape != end.shape or start.dim() not in (1, 2) or start.numel() == 0:
        raise ValueError(
            f"a line needs two ends of the same shape, [E] or [M, E] for M pairs, "
            f"not {list(start.shape)} and {list(end.shape)}"
        )
    if steps < 2:
        raise ValueError(f"a line has at least 2 points, its ends, not {steps}")
    way = torch.linspace(0, 1, steps, dtype=start.dtype, device=start.device)[:, None]  # [S, 1]
    return torch.lerp(start.unsqueeze(-2), end.unsqueeze(-2), way)


def weight_line(start: Nets, end: Nets, steps: int = 11) -> Nets:
    """Nets on the straight lines between the *weights* of pairs of nets: the baseline.

    Hidden units of independently trained nets don't correspond, so accuracy breaks down halfway.

    Args:
        start, end: M nets each, of one architecture.
        steps: S, nets on each line, both ends among them.

    Returns M·S nets, line by line: ``accuracy(images).view(M, S)``.
    """
    if start.layout != end.layout:
        raise ValueError(f"{start!r} and {end!r} have no line between their weights: they differ")
    return Nets(start.batched, interpolate(start.rows, end.rows, steps).flatten(0, 1))
