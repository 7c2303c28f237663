"""New nets from a density on embeddings, how new they are, and what an embedding tells.

Generative models of weights tend to give back what they were trained on (Zeng et al. 2025), so
`novelty` measures how far a net is from the nearest one of the zoo, in its answers and its weights.
"""

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeCV
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from .functional import Nets


class Gaussian:
    """The embeddings of a zoo as one normal distribution: the simplest idea of "in the space".

    Called on embeddings it is their mean squared z-score along the distribution's axes, about 1
    for a typical member. Axes along which the zoo hardly spreads, or not at all, count as a tenth
    of the widest, so that leaving the zoo's subspace costs much, but not everything.

    Args:
        embeddings: [N, E], at least two.
    """

    def __init__(self, embeddings: Tensor):
        if embeddings.dim() != 2 or len(embeddings) < 2:
            raise ValueError(
                f"a distribution needs at least 2 embeddings [N, E], not {list(embeddings.shape)}"
            )
        self.mean = embeddings.mean(0)
        centred = embeddings - self.mean
        variance, axes = torch.linalg.eigh(centred.T @ centred / (len(embeddings) - 1))
        self.axes = axes.T  # [E, E], from the narrowest to the widest
        spread = variance.clamp_min(0).sqrt()
        self.spread = spread.clamp_min(spread[-1] / 10)

    def __call__(self, z: Tensor) -> Tensor:
        """Mean squared z-score of embeddings z [N, E]: [N]."""
        return (((z - self.mean) @ self.axes.T) / self.spread).square().mean(1)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Random embeddings [n, E]."""
        noise = torch.randn(n, len(self.axes), generator=torch.Generator().manual_seed(seed))
        return self.mean + (noise.to(self.mean) * self.spread) @ self.axes


def sample(
    embeddings: Tensor, n: int, density="kernel", *, bandwidth: float = 0.5, components: int = 4,
    seed: int = 0,
) -> Tensor:  # fmt: skip
    """New embeddings [n, E] from a simple density of those given, [N, E].

    The density is fitted on whitened principal components that hold 99% of the variance.

    Args:
        density: "kernel" (a Gaussian of width ``bandwidth``, in standard deviations, around every
            embedding: small values copy, large ones wander), "mixture" (a Gaussian mixture of
            ``components``), or any scikit-learn estimator with ``fit`` and ``sample``.
    """
    if n < 1 or embeddings.dim() != 2 or len(embeddings) < 2:
        raise ValueError(
            f"sampling needs n ≥ 1 and at least 2 embeddings [N, E], not n = {n} and "
            f"{list(embeddings.shape)}"
        )
    known = {
        "kernel": KernelDensity(bandwidth=bandwidth),
        "mixture": GaussianMixture(components, reg_covar=1e-3, random_state=seed),
    }
    if isinstance(density, str) and density not in known:
        raise ValueError(f"no density {density!r}: choose from {', '.join(known)}")
    model = known[density] if isinstance(density, str) else density
    pca = PCA(0.99, whiten=True, svd_solver="full").fit(embeddings.double().numpy())
    model.fit(pca.transform(embeddings.double().numpy()))
    if isinstance(model, KernelDensity):
        drawn = model.sample(n, random_state=seed)
    else:  # a mixture returns its points sorted by component, and their labels
        drawn = np.random.default_rng(seed).permutation(model.sample(n)[0])
    return torch.from_numpy(pca.inverse_transform(drawn)).to(embeddings.dtype)


def disagreement(a: Tensor, b: Tensor) -> Tensor:
    """Share of samples in percent that two nets class differently, for all pairs.

    Args:
        a, b: logits [N, B, K] and [M, B, K].

    Returns [N, M].
    """
    a, b = a.argmax(-1), b.argmax(-1)
    return torch.stack([(net != b).float().mean(1) * 100 for net in a])


def novelty(nets: Nets, x: Tensor, zoo: Nets | None = None) -> dict[str, Tensor]:
    """Distance of each net to the nearest net of a zoo, in its answers and in its weights.

    Args:
        nets: N nets.
        x: [B, ...] inputs to compare answers on.
        zoo: the nets they could be copies of; None: each other.

    Returns ``function`` [N], the `disagreement` in percent, and ``weights`` [N], the Euclidean
    distance. A copy of a zoo net has 0 in both.
    """
    others = nets if zoo is None else zoo
    distances = {
        "function": disagreement(nets.logits(x), others.logits(x)),
        "weights": torch.cdist(nets.rows, others.rows),
    }
    if zoo is None:
        for distance in distances.values():
            distance.fill_diagonal_(torch.inf)
    return {name: distance.min(1).values for name, distance in distances.items()}


def averages(zoo: Nets, n: int, of: int = 2, seed: int = 0) -> Nets:
    """Baseline: ``n`` nets, each the mean of the weights of ``of`` random zoo nets."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(len(zoo), generator=generator)[:of] for _ in range(n)])
    return Nets(zoo.batched, zoo.rows[chosen].mean(1))


def weight_statistics(nets: Nets) -> Tensor:
    """Mean, spread and five quantiles of every parameter tensor (Unterthiner et al. 2020).

    Returns [N, 7 · number of tensors].
    """
    quantiles = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    columns = []
    for view in nets.layout.views(nets.rows).values():
        flat = view.flatten(1)
        moments = torch.stack([flat.mean(1), flat.std(1, correction=0)])
        columns.append(torch.cat([moments, flat.quantile(quantiles.to(flat), dim=1)]))
    return torch.cat(columns).T


def readout(x: Tensor, y: Tensor, held_x: Tensor, held_y: Tensor) -> tuple[Tensor, float]:
    """Predict a property of nets by ridge regression: its values [M] for held-out nets, and R².

    Args:
        x, y: features [N, F] of nets, such as embeddings, and the property [N].
        held_x, held_y: the same of M nets that the regression doesn't see.

    The penalty is chosen by leave-one-out on the N nets.
    """
    model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-3, 5, 17)))
    model.fit(x.double().numpy(), y.double().numpy())
    predicted = torch.from_numpy(model.predict(held_x.double().numpy()))
    error = (predicted - held_y).square().sum() / (held_y - held_y.mean()).square().sum()
    return predicted, 1 - float(error)
