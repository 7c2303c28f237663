"""How good a space is, and the baselines every figure stands beside.

Accuracies and agreements are in percent, differences in percentage points.
"""

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from .checks import check_kind, whole
from .data import Images
from .nets import Nets, as_answers, classes, correct
from .space import NetSpace

OF_ONE = "weights are of nets of one architecture, as zoo[mask] or mixed.groups[0]"


def compare(predicted: Tensor, target: Tensor, y: Tensor) -> dict[str, float]:
    """How predicted nets answer beside target nets: logits [N, B, K] of both, labels y [B].

    Or logits [N, B, T, K] and labels [B, T], of T places a sample, such as tokens.

    Returns ``agreement`` (share of samples both put in the same class), ``mae`` and ``r`` (mean
    absolute error and Pearson correlation of the nets' accuracies).
    """
    check_kind(Tensor, "logits are compared, as nets.outputs(x), and labels", predicted, target, y)
    if predicted.shape != target.shape or y.shape != target.shape[1:-1]:
        given = f"{[*predicted.shape]}, {[*target.shape]} and {[*y.shape]} labels"
        raise ValueError(f"answers are [N, B, K] of as many nets each and B labels, not {given}")
    accuracies = [correct(outputs, y).double() for outputs in (predicted, target)]
    found, wanted = classes(predicted), classes(target)
    # all predicted nets alike (the mean net) have no correlation with anything
    constant = any(a.max() == a.min() for a in accuracies)
    return {
        "agreement": float(((found == wanted) & (found >= 0)).float().mean() * 100),
        "mae": float((accuracies[0] - accuracies[1]).abs().mean()),
        "r": 0.0 if constant else float(torch.corrcoef(torch.stack(accuracies))[0, 1]),
    }


def r_squared(predicted: Tensor, target: Tensor) -> Tensor:
    """Share of the variance of target nets' values [N, B, ...] that predicted nets explain: [N].

    1 where both answer alike, 0 for a constant, the mean of the targets, and less for what is
    worse; NaN or -inf where target nets answer the same to all samples. What `compare` is to
    classes: nets that answer values are compared by this.
    """
    check_kind(Tensor, "values are compared, as nets.outputs(x)", predicted, target)
    if predicted.shape != target.shape or target.dim() < 2:
        given = f"{[*predicted.shape]} and {[*target.shape]}"
        raise ValueError(f"values are [N, B, ...] of as many nets each, not {given}")
    predicted, target = (as_answers(t.double(), values=True) for t in (predicted, target))
    around = (target - target.mean(1, keepdim=True)).square().sum((1, 2))
    return (1 - (predicted - target).square().sum((1, 2)) / around).to(torch.float32)


def scores(space: NetSpace, nets: Nets, images) -> dict[str, float]:
    """`compare` the nets with what the space decodes from their embeddings, on ``images``."""
    check_kind(Nets, "nets of one architecture are scored, as zoo[n]", nets)
    images = Images.of(images)
    decoded = space.decode(space.encode(nets), space.index(nets))
    return compare(decoded.outputs(images.x), nets.outputs(images.x), images.y)


def mean_net(zoo: Nets, nets: Nets) -> Nets:
    """Baseline: for each of ``nets`` the mean of the zoo's weights."""
    return Nets(zoo.batched, zoo.rows.mean(0).expand(len(nets), -1))


def nearest_by_weights(zoo: Nets, nets: Nets) -> Nets:
    """Baseline: for each of ``nets`` the zoo's net with the closest weights."""
    rows, others = _alike(zoo, nets)
    others, parts = others.double(), rows.split(4096)  # a zoo in fp64 is twice its size
    distances = [torch.cdist(others, part.double()) for part in parts]
    return Nets(zoo.batched, zoo.rows[torch.cat(distances, 1).argmin(1)])


def _alike(zoo: Nets, nets: Nets) -> tuple[Tensor, Tensor]:
    """Rows of both, if their weights can be compared: by fp64, or close nets are mixed up."""
    check_kind(Nets, OF_ONE, zoo, nets)
    if zoo.batched.fingerprint != nets.batched.fingerprint:
        raise ValueError(f"{nets!r} and {zoo!r} compute something else: no comparing their weights")
    return zoo.rows, nets.rows


def nearest_by_answers(zoo_answers: Tensor, answers: Tensor, zoo: Nets) -> Nets:
    """Baseline: the zoo's net with the closest answers to the probes ([N, M·K + 1] of both).

    It reads the very same as the encoder, and can only give back a net of the zoo.
    """
    if zoo_answers.dim() != 2 or zoo_answers.shape != (len(zoo), *answers.shape[1:]):
        given = f"{[*zoo_answers.shape]} and {[*answers.shape]}"
        raise ValueError(f"answers [N, F] of the zoo's {len(zoo)} nets come first, not {given}")
    distances = torch.cdist(answers.double(), zoo_answers.double())
    return Nets(zoo.batched, zoo.rows[distances.argmin(1)])


def pca_nets(zoo: Nets, nets: Nets, size: int) -> Nets:
    """Baseline: weights squeezed through the zoo's first ``size`` principal components."""
    rows, others = (rows.detach().cpu().double() for rows in _alike(zoo, nets))
    pca = PCA(min(size, *rows.shape), svd_solver="full").fit(rows)
    found = torch.from_numpy(pca.inverse_transform(pca.transform(others)))
    return Nets(nets.batched, found.to(nets.rows))


def noisy_nets(nets: Nets, share: float = 0.1, seed: int = 0) -> Nets:
    """Baseline: each net's weights plus Gaussian noise of ``share`` of their root mean square."""
    rows, generator = check_kind(Nets, OF_ONE, nets).rows, torch.Generator().manual_seed(seed)
    noise = torch.randn(rows.shape, generator=generator).to(rows)
    size = rows.square().mean(1, keepdim=True).sqrt()
    return Nets(nets.batched, rows + share * size * noise)


def line_drop(line: Tensor, ends: Tensor | None = None) -> Tensor:
    """How far accuracies along lines [M, S] fall under the weaker of two nets: [M] points.

    The two are the line's own ends, or nets of accuracies ``ends`` [M, 2]. 0 for a line that never
    falls under the weaker one.
    """
    ends = line[:, [0, -1]] if ends is None else ends
    if ends.shape != (len(line), 2):
        raise ValueError(f"ends of {len(line)} lines are [{len(line)}, 2], not {[*ends.shape]}")
    weaker = ends.min(1).values
    return (weaker - line.min(1).values).clamp_min(0)


def disagreement(a: Tensor, b: Tensor) -> Tensor:
    """Share of samples in percent that two nets class differently, for all pairs.

    Args:
        a, b: logits [N, B, K] and [M, B, K].

    Returns [N, M].
    """
    check_kind(Tensor, "logits are compared, as nets.outputs(x)", a, b)
    if a.shape[1:] != b.shape[1:]:
        given = f"{[*a.shape]} and {[*b.shape]}"
        raise ValueError(f"logits are of the same samples and classes, not {given}")
    a, b = classes(a), classes(b)
    differ = torch.cdist(a.float(), b.where(b >= 0, -2).float(), p=0)  # no choice, -1, is like none
    return differ / a.shape[1] * 100


def novelty(nets: Nets, x: Tensor, zoo: Nets | None = None) -> dict[str, Tensor]:
    """Distance of each net to the nearest net of a zoo, in its answers and in its weights.

    Args:
        nets: N nets.
        x: [B, ...] inputs to compare answers on.
        zoo: the nets they could be copies of; None: each other.

    Returns ``function`` [N], the `disagreement` in percent, and ``weights`` [N], the Euclidean
    distance; on the CPU, as accuracies are. A copy of a zoo net has 0 in both.
    """
    others = nets if zoo is None else zoo
    distances = {"function": disagreement(nets.outputs(x), others.outputs(x))}
    exact = "donot_use_mm_for_euclid_dist"  # products would not give 0 for copies
    rows = (rows.double() for rows in _alike(nets, others))
    distances["weights"] = torch.cdist(*rows, compute_mode=exact)
    if zoo is None:
        for distance in distances.values():
            distance.fill_diagonal_(torch.inf)
    return {name: distance.min(1).values.cpu() for name, distance in distances.items()}


def averages(zoo: Nets, n: int, of: int = 2, seed: int = 0) -> Nets:
    """Baseline: ``n`` nets, each the mean of the weights of ``of`` random zoo nets."""
    if whole(n, "n") < 1 or not 1 <= whole(of, "of") <= len(check_kind(Nets, OF_ONE, zoo)):
        raise ValueError(f"{n} averages of {of} nets each can't be drawn from {len(zoo)}")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(len(zoo), generator=generator)[:of] for _ in range(n)])
    return Nets(zoo.batched, zoo.rows[chosen].mean(1))


def readout(x: Tensor, y: Tensor, held_x: Tensor, held_y: Tensor) -> tuple[Tensor, float]:
    """Predict a property of nets by ridge regression: its values [M] for held-out nets, and R².

    Args:
        x, y: features [N, F] of nets, such as embeddings, and the property [N].
        held_x, held_y: the same of M nets that the regression doesn't see.

    The penalty is chosen by leave-one-out on the N nets.
    """
    model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-3, 5, 17)))
    check_kind(Tensor, "tensors are read, as z and zoo.scores[name]", x, y, held_x, held_y)
    x, y, held_x, held_y = (t.detach().cpu().double().numpy() for t in (x, y, held_x, held_y))
    y, held_y = y.flatten(), held_y.flatten()
    if (len(x), len(held_x)) != (len(y), len(held_y)):
        given = f"{len(y)} and {len(held_y)} for features of {len(x)} and {len(held_x)}"
        raise ValueError(f"a property is one number a net, not {given}")
    if not (held_y != held_y[:1]).any():
        raise ValueError("R² compares held-out nets' values with their mean: give some that differ")
    model.fit(x, y)
    return torch.from_numpy(model.predict(held_x)), model.score(held_x, held_y)
