"""Every figure of the notebooks, in colours that colour-blind readers tell apart (Okabe and Ito).

Each function draws on ``ax`` (or on new axes) and returns the axes. Tensors may be on any device.
"""

import sys
from collections.abc import Sequence
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from torch import Tensor

COLOURS = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#7F7F7F"
BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW, GREY = COLOURS
KINDS, MARKS = (BLUE, ORANGE, GREEN, PINK, SKY, RED), "os^DvP"  # one per architecture or curve


def use_style() -> None:
    """Plain axes, readable sizes; in a notebook sharp pictures that are described in words.

    Call it once at the top of a notebook.
    """
    plt.rcParams.update({
        "figure.dpi": 80, "figure.constrained_layout.use": True, "font.size": 11,
        "axes.spines.top": False, "axes.spines.right": False,
        "legend.edgecolor": "none", "axes.prop_cycle": plt.cycler(color=[*KINDS, GREY]),
    })  # fmt: skip
    if "IPython" in sys.modules and (shell := sys.modules["IPython"].get_ipython()):
        plt.switch_backend(plt.get_backend())  # it brings a format of its own, so it goes first
        shell.display_formatter.formatters["image/png"].for_type(Figure, _sharp)


def _sharp(figure: Figure) -> tuple[str, dict]:
    """A PNG of twice the pixels, and its metadata: size on the page, and alt text."""
    png, metadata = sys.modules["IPython"].core.pylabtools.retina_figure(figure, base64=True)
    return png, metadata | {"alt": describe(figure)}


def describe(figure: Figure) -> str:
    """A figure in words, for who can't see it: panels, titles, axes, curves, bars and values."""
    panels = sum(ax.has_data() and ax.get_label() != "<colorbar>" for ax in figure.axes)
    words = [figure.get_label() or f"panels: {panels}"]
    for ax in figure.axes:
        axes = " over ".join(filter(None, (ax.get_ylabel(), ax.get_xlabel())))
        names = cycle([name.get_text() for name in ax.get_yticklabels()] if ax.containers else [])
        bars = [f"{n} {text.get_text().strip()}" for n, text in zip(names, ax.texts, strict=False)]
        shown = ", ".join(ax.get_legend_handles_labels()[1] + bars)
        words.append(": ".join(filter(None, (ax.get_title(), axes, shown))))
    return "; ".join(dict.fromkeys(filter(None, words)))


def _axes(ax: Axes | None, width=5.5, height=3.8, **labels) -> Axes:
    ax = plt.subplots(figsize=(width, height))[1] if ax is None else ax
    ax.set(**labels)
    return ax


def _numpy(values) -> np.ndarray:
    return torch.as_tensor(values).detach().cpu().numpy()


def images(x: Tensor, titles: Sequence = (), columns: int = 10) -> np.ndarray:
    """A row of images x [B, C, H, W], each scaled to its own range, with titles."""
    rows, columns = -(-len(x) // columns), min(columns, len(x))
    figure, axes = plt.subplots(rows, columns, figsize=(0.95 * columns, 1.15 * rows), squeeze=False)
    figure.set_label(f"images: {len(x)}")
    for n, (ax, picture) in enumerate(zip(axes.flat, _numpy(x), strict=False)):
        scaled = (picture - picture.min()) / (np.ptp(picture) + 1e-8)
        ax.imshow(scaled[0] if len(scaled) == 1 else scaled.transpose(1, 2, 0), cmap="gray_r")
        ax.set_title(titles[n] if n < len(titles) else "", fontsize=11)
    for ax in axes.flat:
        ax.axis("off")
    return axes


def preps(preps: Tensor, titles: Sequence[str]) -> np.ndarray:
    """PReps [N, T, L] side by side, each on its own diverging colour scale centred on zero."""
    _, axes = plt.subplots(1, len(preps), figsize=(2.7 * len(preps), 2.7), squeeze=False)
    for ax, prep, title in zip(axes[0], _numpy(preps), titles, strict=True):
        limit = float(np.quantile(abs(prep), 0.99))
        colours = ax.pcolormesh(prep, cmap="RdBu", vmin=-limit, vmax=limit, rasterized=True)
        ax.figure.colorbar(colours, ax=ax, ticks=[-limit, 0, limit], format="%.2g")
        ax.set_title(title, fontsize=10)
        ax.set(xlabel="value in chunk", ylim=(len(prep), 0))
    axes[0, 0].set_ylabel("chunk")
    return axes[0]


def predicted(
    panels: dict[str, tuple[Tensor, Tensor]], ylabel: str = "decoded net: test accuracy (%)"
) -> np.ndarray:
    """A panel a name: accuracies [N] of the nets encoded, and over them what was predicted."""
    size = {"figsize": (3.4 * len(panels), 3.8), "sharex": True, "sharey": True}
    _, axes = plt.subplots(1, len(panels), squeeze=False, **size)
    both = torch.cat([values.cpu() for pair in panels.values() for values in pair])
    low, high = float(both.min()) - 3, max(101.0, float(both.max()) + 1)
    for ax, (name, pair), colour in zip(axes[0], panels.items(), cycle(KINDS), strict=False):
        ax.plot([low, high], [low, high], color=GREY, lw=1)
        ax.scatter(*map(_numpy, pair), s=15, alpha=0.75, color=colour, lw=0)
        ax.set(title=name, aspect="equal", xlabel="encoded net: test accuracy (%)")
    axes[0, 0].set(xlim=(low, high), ylim=(low, high), ylabel=ylabel)
    return axes[0]


def space_map(
    z: Tensor, values: Tensor | None = None, label: str = "test accuracy (%)", ax=None, *,
    path: Tensor | None = None, kinds: Tensor | None = None, names: Sequence[str] = (),
) -> Axes:  # fmt: skip
    """Embeddings [N, E] on their first two principal components.

    Args:
        values: [N] colours, and what they mean; None: a colour for each kind.
        path: [S, M, E], M searches of S points each, drawn from the circle to the star.
        kinds: [N] such as the index of each net's architecture, told apart by markers.
        names: of the kinds.
    """
    pca = PCA(2, random_state=0).fit(_numpy(z))
    share = [f"{100 * part:.0f}% of variance" for part in pca.explained_variance_ratio_]
    ax = _axes(ax, xlabel=f"first component ({share[0]})", ylabel=f"second ({share[1]})")
    kinds = np.zeros(len(z), int) if kinds is None else _numpy(kinds)
    flat, size = pca.transform(_numpy(z)), 9 if len(z) > 500 else 22
    for k in np.unique(kinds):
        look = {"color": KINDS[k]}
        if values is not None:
            look = {"c": _numpy(values)[kinds == k], "vmin": values.min(), "vmax": values.max()}
        drawn = ax.scatter(*flat[kinds == k].T, size, marker=MARKS[k], lw=0, **look)
        if names:  # in the legend large, and grey where colours are values
            colour = KINDS[k] if values is None else GREY
            ax.scatter([], [], 40, color=colour, marker=MARKS[k], label=names[k])
    if values is not None:
        ax.figure.colorbar(drawn, ax=ax, label=label)
    if path is not None:
        way = pca.transform(_numpy(path.flatten(0, 1))).reshape(*path.shape[:2], 2)
        ax.plot(way[..., 0], way[..., 1], color=RED, lw=1, alpha=0.8)
        first, last = ("start", "end") if len(way) > 1 else (None, "net shown")
        ax.plot(*way[0].T, "o", color="white", mec="black", ms=6, label=first)
        ax.plot(*way[-1].T, "*", color=ORANGE, mec="black", ms=11, label=last)
    if names or path is not None:
        ax.legend()
    return ax


def curves(
    x, ys: dict[str, Tensor], xlabel: str, ylabel: str, *, levels: dict[str, float] | None = None,
    kinds: Tensor | None = None, names: Sequence[str] = (), ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Curves over x [S]: y [S], or M thin curves y [M, S] with their median, a colour a name.

    Args:
        levels: heights to compare with, by name.
        kinds: [S] such as the index of the architecture at each point, told apart by markers.
        names: of the kinds.
    """
    ax, colours, x = _axes(ax, xlabel=xlabel, ylabel=ylabel), cycle(KINDS), _numpy(x)
    for (name, y), colour in zip(ys.items(), cycle([GREY]) if names else colours, strict=False):
        y = np.atleast_2d(_numpy(y))
        if len(y) > 1:
            ax.plot(x, y.T, color=colour, lw=0.8, alpha=0.3)
        middle = np.median(y, 0)
        ax.plot(x, middle, "-" if names else "o-", color=colour, ms=4, label=name)
        for k, kind in enumerate(names):
            at = _numpy(kinds) == k
            ax.scatter(x[at], middle[at], 48, KINDS[k], marker=MARKS[k], label=kind, zorder=3)
    for (name, height), colour in zip((levels or {}).items(), colours, strict=False):
        ax.axhline(height, color=colour, ls="--", label=f"{name}: {height:.1f}")
    ax.legend()
    return ax


def history(rows: Sequence[dict[str, float]], names: Sequence[str], ylabel="validation score"):
    """Validation scores over the steps of a fit (the dicts `fit` returns)."""
    ys = {name: [row[name] for row in rows] for name in names}
    return curves([row["step"] for row in rows], ys, "training step of the space", ylabel)


def bars(
    values: dict[str, float], xlabel: str, highlight: Sequence[str] = (), *,
    labels: Sequence[str] = ("",), spans: dict[str, tuple] | None = None, low: float | None = None,
    ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Horizontal bars with their numbers: name -> value, or one value per label of a group.

    Names in ``highlight`` are coloured, others grey; ``spans``: name -> (low, high), its interval.
    Where the axis goes from ``low`` to 100 dots stand for bars, whose lengths would say nothing.
    """
    rows = np.array([np.atleast_1d(value) for value in values.values()])  # [names, labels]
    width = 5 + 0.08 * max(map(len, values))  # inches for bars, and for their names
    ax = _axes(ax, width, 0.25 * len(rows) * (len(labels) + 0.7) + 1, xlabel=xlabel)
    ends = np.array([(spans or {}).get(name, (np.nan, np.nan)) for name in values]).T
    ax.hlines(range(len(rows)), *ends, color="k", zorder=3)
    colours, height = [BLUE if name in highlight else GREY for name in values], 0.8 / len(labels)
    for i, label in enumerate(labels):
        look = {"color": colours} if len(labels) == 1 else {"color": KINDS[i], "label": label}
        places = np.arange(len(rows)) + (i - (len(labels) - 1) / 2) * height
        ax.barh(places, rows[:, i], height, alpha=float(low is None), **look)
        for place, value, end in zip(places, rows[:, i], np.fmax(rows[:, i], ends[1]), strict=True):
            ax.text(end, place, f" {value:.1f}", va="center", fontsize=10)
    ax.set_yticks(range(len(rows)), list(values))
    ax.invert_yaxis()
    if low is not None:
        ax.scatter(rows[:, 0], range(len(rows)), 50, colours, zorder=4)
        ax.set_xlim(low, 100)
    if len(labels) > 1:
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(labels))
    return ax


def matrix(
    values: Tensor, names: Sequence, xlabel: str, ylabel: str, label: str, ax=None, low: float = 0
) -> Axes:
    """A square table [A, A] of percentages, from ``low`` on, as colours and numbers."""
    ax = _axes(ax, 5.6, 4.4, xlabel=xlabel, ylabel=ylabel)
    picture = ax.imshow(_numpy(values), cmap="cividis", vmin=low, vmax=100)
    for (i, j), value in np.ndenumerate(_numpy(values)):
        colour, size = "k" if picture.norm(value) > 0.55 else "w", 11 if len(names) < 8 else 8
        ax.text(j, i, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=size)
    ax.set_xticks(range(len(names)), names, rotation=20 if len(names) < 8 else 0)
    ax.set_yticks(range(len(names)), names)
    ax.figure.colorbar(picture, ax=ax, label=label)
    return ax
