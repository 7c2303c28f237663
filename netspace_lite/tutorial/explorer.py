"""A net under every point: look at what a space decodes, with sliders where widgets can run."""

import matplotlib.pyplot as plt
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from .. import Images, NetSpace, name_of
from .figures import matrix, space_map


def inspect(space: NetSpace, z: Tensor, values: Tensor, at: Tensor, images: Images):
    """Draw where ``at`` [E] lies on the map of z [N, E], and how the net decoded there answers.

    The table holds, of each true class (row), the share in percent given each class (column), NaN
    where there are no images of a class. In a space of several architectures the net is decoded as
    the one that ``at`` stands for.
    """
    axes = plt.subplots(1, 2, figsize=(11, 4.2))[1]
    net = space.decode(at[None])[0]
    logits = net.outputs(images.x)[0]
    given = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits)
    share = torch.stack([100 * given[images.y == k].mean(0) for k in range(given.shape[-1])])
    space_map(z, values, ax=axes[0], path=at[None, None])
    matrix(share, range(len(share)), "class given", "true class", "share (%)", axes[1])
    axes[1].set_title(f"{name_of(net.module)}, accuracy {net.accuracy(images)[0]:.1f}%")
    return axes


def explorer(space: NetSpace, z: Tensor, values: Tensor, images: Images):
    """Sliders to move along a line between two embeddings, or freely on the map.

    Args:
        z: [N, E] embeddings that make the map, values: [N] their colours.
        images: what accuracy and confusion are measured on.

    Returns the widget. Raises ImportError without ipywidgets; `inspect` draws the same picture.
    """
    from ipywidgets import interactive

    pca, nets = PCA(2, random_state=0).fit(z.cpu().numpy()), (0, len(z) - 1)
    flat = pca.transform(z.cpu().numpy())
    first, second = zip(flat.min(0).tolist(), flat.max(0).tolist(), strict=True)
    worst, best = int(values.argmin()), int(values.argmax())

    def draw(move, from_net=worst, to_net=best, position=0.5, first_axis=0.0, second_axis=0.0):
        at = torch.lerp(z[from_net], z[to_net], position)
        if move == "on the map":
            at = torch.from_numpy(pca.inverse_transform([[first_axis, second_axis]])[0]).to(z)
        inspect(space, z, values, at, images)
        plt.show()

    sliders = {"from_net": nets, "to_net": nets, "position": (0.0, 1.0, 0.05), "first_axis": first}
    widget = interactive(draw, move=["on a line", "on the map"], **sliders, second_axis=second)
    for slider in widget.children[1:-1]:
        slider.continuous_update = False
    return widget
