"""A net under every point: look at what a space decodes, with sliders where widgets can run."""

import matplotlib.pyplot as plt
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from . import plots
from .architectures import name_of
from .data import Images
from .space import NetSpace


def confusion(logits: Tensor, y: Tensor) -> Tensor:
    """Counts [K, K] of images by true class (row) and class given (column): logits [B, K]."""
    classes = logits.shape[-1]
    pairs = y * classes + logits.argmax(-1)
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def inspect(space: NetSpace, z: Tensor, values: Tensor, at: Tensor, images: Images):
    """Draw where ``at`` [E] lies on the map of z [N, E], and how the net decoded there answers.

    In a space of several architectures it is decoded as the one it stands for.
    """
    with torch.no_grad():
        net = space.decode(at[None])[0]
    logits = net.logits(images.x)[0]
    accuracy = float((logits.argmax(-1) == images.y).float().mean() * 100)
    title = f"{name_of(net.module)}, accuracy {accuracy:.1f}%"
    return plots.inspect_net(z, values, at, confusion(logits, images.y), title)


def explorer(space: NetSpace, z: Tensor, values: Tensor, images: Images):
    """Sliders to move along a line between two embeddings, or freely on the map.

    Args:
        z: [N, E] embeddings that make the map, values: [N] their colours.
        images: what accuracy and confusion are measured on.

    Returns the widget. Raises ImportError without ipywidgets; `inspect` draws the same picture.
    """
    import ipywidgets as widgets

    pca = PCA(2, random_state=0).fit(z)
    flat = pca.transform(z)
    last, (low, high) = len(z) - 1, (flat.min(0), flat.max(0))

    def draw(move, start, end, position, x, y):
        at = torch.lerp(z[start], z[end], position)
        if move == "on the map":
            at = torch.from_numpy(pca.inverse_transform([[x, y]])[0]).to(z.dtype)
        inspect(space, z, values, at, images)
        plt.show()

    controls = {
        "move": widgets.ToggleButtons(options=["on a line", "on the map"]),
        "start": widgets.IntSlider(int(values.argmin()), 0, last, description="from net"),
        "end": widgets.IntSlider(int(values.argmax()), 0, last, description="to net"),
        "position": widgets.FloatSlider(0.5, min=0, max=1, step=0.05, description="position"),
        "x": widgets.FloatSlider(0, min=low[0], max=high[0], description="first axis"),
        "y": widgets.FloatSlider(0, min=low[1], max=high[1], description="second axis"),
    }
    for control in controls.values():
        control.continuous_update = False
    picture = widgets.interactive_output(draw, controls)
    line, plane = (
        widgets.VBox([controls[name] for name in names])
        for names in (("start", "end", "position"), ("x", "y"))
    )
    return widgets.VBox([controls["move"], widgets.HBox([line, plane]), picture])
