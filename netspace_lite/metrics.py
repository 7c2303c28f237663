"""How good a space is, and the baselines every figure stands beside.

Accuracies and agreements are in percent, differences in percentage points.
"""

import torch
from sklearn.decomposition import PCA
from torch import Tensor

from .functional import Nets
from .space import NetSpace


def compare(predicted: Tensor, target: Tensor, y: Tensor) -> dict[str, float]:
    """How predicted nets answer beside target nets: logits [N, B, K] of both, labels y [B].

    Returns ``agreement`` (share of samples both put in the same class), ``mae`` and ``r`` (mean
    absolute error and Pearson correlation of the nets' accuracies).
    """
    predicted, target = predicted.argmax(-1), target.argmax(-1)
    accuracies = [(p == y).float().mean(1) * 100 for p in (predicted, target)]
    # all predicted nets alike (the mean net) have no correlation with anything
    constant = any(a.max() == a.min() for a in accuracies)
    return {
        "agreement": float((predicted == target).float().mean() * 100),
        "mae": float((accuracies[0] - accuracies[1]).abs().mean()),
        "r": 0.0 if constant else float(torch.corrcoef(torch.stack(accuracies))[0, 1]),
    }


def scores(space: NetSpace, nets: Nets, images, architecture: int = 0) -> dict[str, float]:
    """`compare` the nets with what the space decodes from their embeddings, on ``images``."""
    decoded = space.decode(space.encode(nets, architecture), architecture)
    return compare(decoded.logits(images.x), nets.logits(images.x), images.y)


def mean_net(zoo: Nets, nets: Nets) -> Nets:
    """Baseline: for each of ``nets`` the mean of the zoo's weights."""
    return Nets(nets.batched, zoo.rows.mean(0).expand(len(nets), -1))


def nearest_by_weights(zoo: Nets, nets: Nets) -> Nets:
    """Baseline: for each of ``nets`` the zoo's net with the closest weights."""
    return Nets(nets.batched, zoo.rows[torch.cdist(nets.rows, zoo.rows).argmin(1)])


def nearest_by_answers(zoo_answers: Tensor, answers: Tensor, zoo: Nets) -> Nets:
    """Baseline: the zoo's net with the closest answers to the probes ([N, M·K + 1] of both).

    It reads the very same as the encoder, and can only give back a net of the zoo.
    """
    return Nets(zoo.batched, zoo.rows[torch.cdist(answers, zoo_answers).argmin(1)])


def pca_nets(zoo: Nets, nets: Nets, size: int) -> Nets:
    """Baseline: weights squeezed through the zoo's first ``size`` principal components."""
    pca = PCA(min(size, len(zoo)), random_state=0).fit(zoo.rows.cpu())
    rows = pca.inverse_transform(pca.transform(nets.rows.cpu()))
    return Nets(nets.batched, torch.from_numpy(rows).to(nets.rows))


def noisy_nets(nets: Nets, share: float = 0.1, seed: int = 0) -> Nets:
    """Baseline: each net's weights plus Gaussian noise of ``share`` of their root mean square."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(nets.rows.shape, generator=generator).to(nets.rows)
    size = nets.rows.square().mean(1, keepdim=True).sqrt()
    return Nets(nets.batched, nets.rows + share * size * noise)


def line_drop(line: Tensor, ends: Tensor | None = None) -> Tensor:
    """How far accuracies along lines [M, S] fall under the weaker of two nets: [M] points.

    The two are the line's own ends, or nets of accuracies ``ends`` [M, 2]. 0 for a line that never
    falls under the weaker one.
    """
    ends = line[:, [0, -1]] if ends is None else ends
    weaker = ends.min(1).values
    return (weaker - line.min(1).values).clamp_min(0)
