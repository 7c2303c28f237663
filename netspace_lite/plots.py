"""Every figure of the notebooks, in colours that colour-blind readers tell apart (Okabe and Ito).

Each function draws on ``ax`` (or on new axes) and returns the axes.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from sklearn.decomposition import PCA
from torch import Tensor

BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#7F7F7F",
)  # fmt: skip

_KINDS, _MARKS = (BLUE, ORANGE, GREEN, PINK, SKY, RED), "os^DvP"  # one per architecture


def use_style() -> None:
    """Plain axes, readable sizes, small files; call it once at the top of a notebook."""
    plt.rcParams.update(
        {
            "figure.dpi": 80,
            "savefig.dpi": 80,
            "figure.constrained_layout.use": True,
            "font.size": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, PINK, SKY, RED, GREY]),
            "legend.frameon": False,
        }
    )


def _axes(ax: Axes | None, width=5.5, height=3.8) -> Axes:
    return plt.subplots(figsize=(width, height))[1] if ax is None else ax


def images(x: Tensor, titles: Sequence = (), columns: int = 10) -> np.ndarray:
    """A row of images x [B, C, H, W], each scaled to its own range, with titles."""
    x = x.cpu()
    rows = -(-len(x) // columns)
    _, axes = plt.subplots(rows, columns, figsize=(0.95 * columns, 1.15 * rows), squeeze=False)
    for n, ax in enumerate(axes.flat):
        ax.axis("off")
        if n < len(x):
            low, high = x[n].min(), x[n].max()
            picture = ((x[n] - low) / (high - low + 1e-8)).permute(1, 2, 0)
            ax.imshow(picture.squeeze(-1), cmap="gray_r")
            ax.set_title(titles[n] if n < len(titles) else "", fontsize=11)
    return axes


def learning_curves(zoo, count: int = 12, ax: Axes | None = None) -> Axes:
    """Training loss of ``count`` nets of a zoo, smoothed, a dot where each one stopped."""
    ax = _axes(ax)
    lengths = torch.tensor([recipe.steps for recipe in zoo.recipes])
    order = lengths.argsort()[torch.linspace(0, len(zoo) - 1, count).long()]
    colours = plt.cm.viridis(np.linspace(0, 0.9, count))
    for n, colour in zip(order.tolist(), colours, strict=True):
        loss = zoo.losses[n, : lengths[n]].numpy()
        width = min(5, len(loss))
        smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
        ax.plot(np.arange(len(smooth)) + width, smooth, color=colour, lw=1)
        ax.plot(len(loss), smooth[-1], "o", color=colour, ms=4)
    ax.set(xscale="log", xlabel="training step (log scale)", ylabel="training loss (cross-entropy)")
    return ax


def accuracy_spread(zoo, ax: Axes | None = None) -> Axes:
    """Training length against test accuracy, one dot a net."""
    ax = _axes(ax)
    steps = [recipe.steps for recipe in zoo.recipes]
    ax.scatter(steps, zoo.scores["test_accuracy"], s=6, alpha=0.5, color=BLUE, linewidths=0)
    ax.set(xscale="log", xlabel="training steps (log scale)", ylabel="test accuracy (%)")
    return ax


def preps(preps: Tensor, titles: Sequence[str]) -> np.ndarray:
    """PReps [N, T, L] side by side, each on its own diverging colour scale centred on zero."""
    preps = preps.detach().cpu()
    _, axes = plt.subplots(1, len(preps), figsize=(2.7 * len(preps), 2.7), squeeze=False)
    for n, ax in enumerate(axes[0]):
        limit = float(preps[n].abs().quantile(0.99))
        picture = ax.imshow(
            preps[n], cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
        )
        ax.set_title(titles[n], fontsize=10)
        ax.set_xlabel("value in chunk")
        bar = ax.figure.colorbar(picture, ax=ax, ticks=[-limit, 0, limit], format="%.1f")
        bar.ax.tick_params(labelsize=8)
    axes[0, 0].set_ylabel("chunk")
    return axes


def predicted_vs_target(target: Tensor, predicted: Tensor, title: str = "", ax=None) -> Axes:
    """Accuracy of decoded nets over accuracy of the nets that were encoded, both [N] in percent."""
    ax = _axes(ax, 4.2, 4.2)
    low = float(min(target.min(), predicted.min())) - 3
    ax.plot([low, 100], [low, 100], color=GREY, lw=1, label="equal")
    ax.scatter(target, predicted, s=14, alpha=0.7, color=BLUE, linewidths=0, label="one net")
    ax.set(
        xlabel="target net: test accuracy (%)", ylabel="predicted net: test accuracy (%)",
        title=title, aspect="equal", xlim=(low, 101), ylim=(low, 101),
    )  # fmt: skip
    ax.legend(loc="upper left")
    return ax


def space_map(z: Tensor, values: Tensor, label: str, ax: Axes | None = None) -> Axes:
    """Embeddings [N, E] on their first two principal components, coloured by ``values`` [N]."""
    ax = _axes(ax)
    pca = PCA(2, random_state=0).fit(z.cpu())
    x, y = pca.transform(z.cpu()).T
    dots = ax.scatter(x, y, c=values, cmap="viridis", s=9, linewidths=0)
    share = pca.explained_variance_ratio_ * 100
    ax.set(
        xlabel=f"first principal component ({share[0]:.0f}% of variance)",
        ylabel=f"second ({share[1]:.0f}%)",
    )
    ax.figure.colorbar(dots, ax=ax, label=label)
    return ax


def lines(curves: dict[str, Tensor], ylabel: str = "test accuracy (%)", ax=None) -> Axes:
    """Curves [M, S] along M lines of S points: mean, and the band from the 10th to the 90th
    percentile, one colour a name."""
    ax = _axes(ax)
    for (name, values), colour in zip(curves.items(), (BLUE, ORANGE, GREEN, PINK), strict=False):
        way = np.linspace(0, 1, values.shape[1])
        low, high = (values.quantile(q, dim=0) for q in (0.1, 0.9))
        ax.fill_between(way, low, high, color=colour, alpha=0.2, linewidth=0)
        ax.plot(way, values.mean(0), "o-", color=colour, ms=4, label=name)
    ax.set(xlabel="position between the two nets (0: first, 1: second)", ylabel=ylabel)
    ax.legend()
    return ax


def bars(values: dict[str, float], xlabel: str, highlight: Sequence[str] = (), ax=None) -> Axes:
    """Horizontal bars with their numbers; names in ``highlight`` are coloured, baselines grey."""
    ax = _axes(ax, 6.5, 0.42 * len(values) + 1)
    names = list(values)
    colours = [BLUE if name in highlight else GREY for name in names]
    drawn = ax.barh(names, list(values.values()), color=colours)
    ax.bar_label(drawn, fmt="%.1f", padding=3)
    ax.invert_yaxis()
    ax.set(xlabel=xlabel)
    return ax


def history(rows: Sequence[dict[str, float]], names: Sequence[str], ax: Axes | None = None) -> Axes:
    """Validation scores over the steps of a fit (the dicts `fit` returns)."""
    ax = _axes(ax)
    for name in names:
        ax.plot([r["step"] for r in rows], [r[name] for r in rows], "o-", ms=4, label=name)
    ax.set(xlabel="training step of the space", ylabel="validation score")
    ax.legend()
    return ax


def predicted_by_architecture(
    names: Sequence[str], targets: Sequence[Tensor], predictions: Sequence[Tensor]
) -> np.ndarray:
    """`predicted_vs_target` for each architecture, lists of accuracies [N] in percent."""
    _, axes = plt.subplots(1, len(names), figsize=(3.1 * len(names), 3.4), sharex=True, sharey=True)
    low = float(min(accuracy.min() for accuracy in (*targets, *predictions))) - 3
    columns = zip(axes, names, targets, predictions, _KINDS, strict=False)
    for ax, name, target, predicted, colour in columns:
        ax.plot([low, 100], [low, 100], color=GREY, lw=1)
        ax.scatter(target, predicted, s=16, alpha=0.8, color=colour, linewidths=0)
        ax.set(title=name, aspect="equal", xlim=(low, 101), ylim=(low, 101))
        ax.set_xlabel("target: test accuracy (%)")
    axes[0].set_ylabel("predicted: test accuracy (%)")
    return axes


def architecture_map(
    z: Tensor, architecture: Tensor, names: Sequence[str], accuracy: Tensor, offset: Tensor
) -> np.ndarray:
    """Embeddings [N, E] by architecture [N]; and, without each one's offset [A, E], by accuracy."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    x, y = PCA(2, random_state=0).fit_transform(z.numpy()).T
    for a, name in enumerate(names):
        at = (architecture == a).numpy()
        left.scatter(x[at], y[at], s=22, color=_KINDS[a], marker=_MARKS[a], label=name, lw=0)
    left.legend()
    left.set(title="embeddings, by architecture")
    x, y = PCA(2, random_state=0).fit_transform((z - offset[architecture]).numpy()).T
    for a in range(len(names)):
        at = (architecture == a).numpy()
        dots = right.scatter(
            x[at], y[at], c=accuracy[at], s=22, cmap="viridis", marker=_MARKS[a], lw=0,
            vmin=float(accuracy.min()), vmax=100,
        )  # fmt: skip
    right.set(title="without the architecture's vector, by accuracy")
    figure.colorbar(dots, ax=right, label="test accuracy (%)")
    for ax in (left, right):
        ax.set(xlabel="first principal component", ylabel="second principal component")
    return np.array([left, right])


def matrix(values: Tensor, names: Sequence[str], xlabel: str, ylabel: str, label: str, ax=None):
    """A square table [A, A] of percentages as colours and numbers."""
    ax = _axes(ax, 5.6, 4.4)
    picture = ax.imshow(values, cmap="cividis", vmin=0, vmax=100)
    for (i, j), value in np.ndenumerate(values.numpy()):
        ax.text(j, i, f"{value:.0f}", ha="center", va="center", color="k" if value > 55 else "w")
    places = range(len(names))
    ax.set_xticks(places, names, rotation=20)
    ax.set_yticks(places, names)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.figure.colorbar(picture, ax=ax, label=label)
    return ax


def walk(architecture: Tensor, accuracy: Tensor, names: Sequence[str], ax=None) -> Axes:
    """Along one line: the architecture [S] named at each point and its accuracy [S] in percent."""
    ax = _axes(ax, 8, 3.6)
    way = np.linspace(0, 1, len(accuracy))
    ax.plot(way, accuracy, color=GREY, lw=1, zorder=1)
    for a, name in enumerate(names):
        at = (architecture == a).numpy()
        ax.scatter(way[at], accuracy[at], s=48, color=_KINDS[a], marker=_MARKS[a], label=name)
    low = min(90.0, float(accuracy.min()) - 2)
    ax.set(
        xlabel=f"position on the line (0: a {names[0]}, 1: a {names[-1]})",
        ylabel="test accuracy (%)", ylim=(low, 100.5),
    )  # fmt: skip
    ax.legend(ncols=len(names), loc="lower center")
    return ax


def trajectories(z: Tensor, values: Tensor, path: Tensor, label: str, ax=None) -> Axes:
    """The map of the space (`space_map`) with searches drawn on it.

    Args:
        z, values: [N, E] embeddings and their [N] colours.
        path: [S, M, E], M searches of S points each, from the circle to the star.
    """
    ax = space_map(z, values, label, ax)
    pca = PCA(2, random_state=0).fit(z.cpu())
    points = pca.transform(path.flatten(0, 1).cpu()).reshape(*path.shape[:2], 2)
    for m in range(path.shape[1]):
        ax.plot(*points[:, m].T, color=RED, lw=1, alpha=0.8)
    ends = {"mec": "black", "mew": 0.8, "ls": ""}
    ax.plot(*points[0].T, "o", color="white", ms=6, label="start", **ends)
    ax.plot(*points[-1].T, "*", color=ORANGE, ms=11, label="end", **ends)
    ax.legend(loc="best")
    return ax


def search_history(steps: Sequence[int], scores: Tensor, lines: dict[str, float], ax=None) -> Axes:
    """Accuracy [S, M] of M searches at ``steps``, and horizontal lines to compare with."""
    ax = _axes(ax)
    ax.plot(steps, scores, color=BLUE, lw=1, alpha=0.5)
    ax.plot(steps, scores.median(1).values, color=BLUE, lw=2.5, label="median of all starts")
    for (name, height), colour in zip(lines.items(), (ORANGE, GREEN, PINK), strict=False):
        ax.axhline(height, color=colour, ls="--", label=f"{name}: {height:.1f}%")
    ax.set(xlabel="step of the search", ylabel="accuracy (%)", ylim=(None, 101))
    ax.legend(loc="lower right")
    return ax


def inspect_net(z: Tensor, values: Tensor, at: Tensor, confusion: Tensor, title: str) -> np.ndarray:
    """Where a point lies on the map, and what its net confuses.

    Args:
        z, values: [N, E] and [N], the map; at: [E], the point.
        confusion: [K, K], images of each class (rows) by the class the net gave (columns).
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    trajectories(z, values, at[None, None], "test accuracy (%)", left)
    left.get_legend().remove()
    share = confusion / confusion.sum(1, keepdim=True).clamp_min(1) * 100
    picture = right.imshow(share.numpy(), cmap="cividis", vmin=0, vmax=100)
    figure.colorbar(picture, ax=right, label="share of the class (%)")
    right.set(xlabel="class given by the net", ylabel="true class", title=title)
    return np.array([left, right])


def grouped_bars(
    rows: dict[str, Sequence[float]], labels: Sequence[str], xlabel: str, ax: Axes | None = None
) -> Axes:
    """Horizontal bars in groups: name -> one value per label."""
    ax = _axes(ax, 8.5, 0.2 * len(rows) * (len(labels) + 1) + 1)
    height = 1 / (len(labels) + 1)
    for i, (label, colour) in enumerate(zip(labels, (BLUE, SKY, GREY), strict=False)):
        places = np.arange(len(rows)) + i * height
        drawn = ax.barh(
            places, [row[i] for row in rows.values()], height, label=label, color=colour
        )
        ax.bar_label(drawn, fmt="%.0f", padding=3, fontsize=9)
    ax.set_yticks(np.arange(len(rows)) + height, list(rows))
    ax.invert_yaxis()
    ax.set(xlabel=xlabel, xlim=(0, 115))
    ax.legend(loc="upper center", bbox_to_anchor=(0.4, 1.15), ncols=len(labels))
    return ax
