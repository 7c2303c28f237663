"""The paper's networks as plain ``nn.Module``s, sized from the image and the number of classes.

Nothing here knows about batches of nets: `netspace_lite.batching` runs any of these classes, or
yours, for many nets at once. A class decorated with `architecture` remembers its arguments, so a
saved zoo can build it again from its JSON file.
"""

import copy
import inspect
import math
from functools import partial, wraps

import torch
from torch import nn

from .randomness import own_randomness

ARCHITECTURES: dict[str, type[nn.Module]] = {}


def listed(modules) -> list[nn.Module]:
    """One module or several as a list: of modules only a ``ModuleList`` holds several."""
    alone = isinstance(modules, nn.Module) and not isinstance(modules, nn.ModuleList)
    return [modules] if alone else list(modules)


def architecture(cls):
    """Class decorator: register ``cls`` by name and keep constructor arguments in ``.config``.

    The arguments have to be plain JSON values (numbers, strings, lists of those). Decorate your own
    modules with it and zoos of them save and load like the built-in ones. Raises TypeError for a
    constructor with ``*args``, which have no names to keep them by.
    """
    init = cls.__init__
    signature = inspect.signature(init)
    _, *names = signature.parameters
    if any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()):
        raise TypeError(f"{cls.__name__} takes *args, which can't be kept: give them names")

    @wraps(init)
    def remember(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        # a copy: lists stay the caller's, who may change them
        config = copy.deepcopy(dict(zip(names, bound.args[1:], strict=False)) | bound.kwargs)
        init(self, *args, **kwargs)
        self.config = config

    cls.__init__ = remember
    ARCHITECTURES[cls.__name__] = cls
    return cls


def describe(module: nn.Module) -> dict:
    """What `build` needs to make ``module`` again: ``{"name": str, "config": dict or None}``.

    ``config`` is None for a module whose class is not registered; only its user can build it.
    """
    name = type(module).__name__
    config = getattr(module, "config", None) if name in ARCHITECTURES else None  # not anyone's own
    return {"name": name, "config": config}


def build(description: dict) -> nn.Module:
    """Make the module that `describe` described, freshly initialised.

    Raises ValueError for a class that is not registered.
    """
    name, config = description["name"], description["config"]
    if name not in ARCHITECTURES or config is None:
        cure = "pass your own module (or modules) of it, or decorate its class with @architecture"
        raise ValueError(f"{name!r} is none of {', '.join(ARCHITECTURES)}: {cure}")
    with own_randomness():
        return ARCHITECTURES[name](**config)


def is_registered(module: nn.Module) -> bool:
    """Whether `build` makes a module of this very class from its arguments."""
    return ARCHITECTURES.get(type(module).__name__) is type(module)


def name_of(module: nn.Module) -> str:
    """What an architecture is called: its class, and for a `ResNet` the depth ("ResNet14")."""
    depth = module.config["depth"] if isinstance(module, ResNet) else ""
    return f"{type(module).__name__}{depth}"


def _classifier(image, classes: int, convolutions, hidden=()) -> nn.Sequential:
    """Convolutions (width, kernel, stride, padding), then linear layers, with leaky ReLU."""
    layers, depth = [], image[0]
    for width, *window in convolutions:
        layers += [nn.Conv2d(depth, width, *window), nn.LeakyReLU()]
        depth = width
    layers.append(nn.Flatten())
    try:
        features = nn.Sequential(*layers)(torch.zeros(1, *image)).shape[1]
    except RuntimeError as error:
        raise ValueError(f"images of {tuple(image)} are too small: {error}") from error
    for width in hidden:
        layers += [nn.Linear(features, width), nn.LeakyReLU()]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, classes))


class _Chain(nn.Module):
    """Passes what it is given through its ``layers``, one after the other."""

    def forward(self, x):
        return self.layers(x)


@architecture
class LeNetLike(_Chain):
    """Strided convolutions, then linear layers, with leaky ReLU (paper section IV).

    Images [B, C, H, W] -> logits [B, K].

    Args:
        image: (C, H, W) of one image.
        classes: number of classes K.
        channels: output channels of each stride-2 convolution. The paper's CIFAR-10 net is
            (6, 16); its TinyImageNet count of 79,612 parameters comes out with (4, 8, 16).
        hidden: widths of the linear layers before the last.
        kernel: side of the convolution window; 5 without padding as in the paper, 3 (padded
            by 1) suits 8×8 digits.
    """

    def __init__(self, image, classes, channels=(6, 16), hidden=(120, 84), kernel=5):
        super().__init__()
        windows = [(width, kernel, 2, 0 if kernel == 5 else kernel // 2) for width in channels]
        self.layers = _classifier(image, classes, windows, hidden)


@architecture
class VanillaCNN(_Chain):
    """3×3 convolutions with leaky ReLU and one linear layer (paper section IV).

    Images [B, C, H, W] -> logits [B, K].

    Args:
        image: (C, H, W) of one image.
        classes: number of classes K.
        channels, strides: one entry per convolution. Defaults are the paper's CIFAR-10 net; its
            TinyImageNet count of 112,856 comes out with (8, 16, 32, 64, 64), all strides 2.
    """

    def __init__(self, image, classes, channels=(8, 8, 32, 64, 64), strides=(2, 1, 2, 1, 2)):
        super().__init__()
        windows = [(width, 3, stride, 1) for width, stride in zip(channels, strides, strict=True)]
        self.layers = _classifier(image, classes, windows)


def _norm(channels: int, batch_norm: bool) -> nn.Module:
    return nn.BatchNorm2d(channels) if batch_norm else nn.Identity()


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut, 1×1 convolved where the shape changes."""

    def __init__(self, inputs, outputs, stride, batch_norm):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.norm1 = _norm(outputs, batch_norm)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.norm2 = _norm(outputs, batch_norm)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if changes else nn.Identity()
        self.norm3 = _norm(outputs, batch_norm and changes)
        self.activation = nn.LeakyReLU()

    def forward(self, x):
        y = self.activation(self.norm1(self.conv1(x)))
        return self.activation(self.norm2(self.conv2(y)) + self.norm3(self.shortcut(x)))


@architecture
class ResNet(nn.Module):
    """CIFAR-style residual net of depth 6n+2 (paper section IV; He et al. 2016, section 4.2).

    Args:
        image: (C, H, W) of one image.
        classes: number of classes K.
        depth: 6n+2, that is 8, 14, 20, 32, 56 ...
        channels: stem, then the three stages.
        strides: of the three stages; (2, 1, 2) spares small images the costly full-size stage.
        batch_norm: with normalisation layers, for training one net. Packed nets are weights and
            biases only: use `fold_batchnorm` first, or train without.
    """

    def __init__(
        self, image, classes, depth=8, channels=(16, 16, 32, 64), batch_norm=False,
        strides=(1, 2, 2),
    ):  # fmt: skip
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"a ResNet's depth is 6n+2 (8, 14, 20, ...), not {depth}")
        width, *stages = channels
        self.stem = nn.Conv2d(image[0], width, 3, 1, 1)
        self.norm = _norm(width, batch_norm)
        self.activation = nn.LeakyReLU()
        blocks = []
        for channel, first in zip(stages, strides, strict=True):
            for stride in (first, *(1,) * ((depth - 2) // 6 - 1)):
                blocks.append(Block(width, channel, stride, batch_norm))
                width = channel
        self.blocks = nn.Sequential(*blocks)
        sides = [-(-side // math.prod(strides)) for side in image[1:]]
        windows = [min(8, side) for side in sides]  # the paper's 8×8, or all of a smaller image
        self.pool = nn.AvgPool2d(windows)
        places = math.prod(side // window for side, window in zip(sides, windows, strict=True))
        self.linear = nn.Linear(width * places, classes)

    def forward(self, x):
        """x: [B, C, H, W] -> logits [B, K]."""
        x = self.blocks(self.activation(self.norm(self.stem(x))))
        return self.linear(self.pool(x).flatten(1))


class Sine(nn.Module):
    """sin(omega · x), the activation of a SIREN (Sitzmann et al. 2020)."""

    def __init__(self, omega):
        super().__init__()
        self.omega = omega

    def forward(self, x):
        return torch.sin(self.omega * x)


@architecture
class Siren(_Chain):
    """Signed distance net 3→hidden→hidden→1 with sine activations (paper section IV).

    Points [B, 3] in the unit sphere -> signed distances [B, 1].

    Args:
        hidden: width of both hidden layers; the paper's 256 gives 67,073 parameters.
        omega: frequency inside the sines, the paper's 30.
    """

    def __init__(self, hidden=256, omega=30.0):
        super().__init__()
        first, second, last = nn.Linear(3, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 1)
        self.layers = nn.Sequential(first, Sine(omega), second, Sine(omega), last)
        with torch.no_grad():  # Sitzmann et al. 2020, section 3.2
            deep = math.sqrt(6 / hidden) / omega
            for layer, bound in ((first, 1 / 3), (second, deep), (last, deep)):
                layer.weight.uniform_(-bound, bound)


# name -> what makes the net of (image, classes)
_CIFAR = {"LeNetLike": LeNetLike, "VanillaCNN": VanillaCNN}
_CIFAR |= {f"ResNet{depth}": partial(ResNet, depth=depth) for depth in (8, 32, 56)}
_TINY = _CIFAR | {  # channels and strides that give the published TinyImageNet counts
    "LeNetLike": partial(LeNetLike, channels=(4, 8, 16)),
    "VanillaCNN": partial(VanillaCNN, channels=(8, 16, 32, 64, 64), strides=(2,) * 5),
}
PAPER_NETS = {"cifar10": (_CIFAR, (3, 32, 32), 10), "tinyimagenet": (_TINY, (3, 64, 64), 200)}

# Small enough to train hundreds on a laptop; channels in multiples of 8 are fast on a CPU.
_SMALL = partial(ResNet, channels=(8, 16, 16, 16), strides=(2, 1, 2))
LITE_NETS = {
    "LeNetLike": partial(LeNetLike, channels=(6, 16), hidden=(64,), kernel=3),
    "VanillaCNN": partial(VanillaCNN, channels=(8, 16, 16, 32), strides=(2, 1, 2, 1)),
    "ResNet8": partial(_SMALL, depth=8),
    "ResNet14": partial(_SMALL, depth=14),
}


def paper_net(name: str, dataset: str = "cifar10") -> nn.Module:
    """One of the paper's classifiers at its published size.

    Args:
        name: "LeNetLike", "VanillaCNN", "ResNet8", "ResNet32" or "ResNet56".
        dataset: "cifar10" (3×32×32, 10 classes) or "tinyimagenet" (3×64×64, 200 classes).
    """
    nets, *sizes = _find(PAPER_NETS, dataset)
    return _find(nets, name)(*sizes)


def lite_net(name: str, image, classes: int) -> nn.Module:
    """A small net of the paper's families, sized from the image (C, H, W) and the classes.

    Args:
        name: "LeNetLike", "VanillaCNN", "ResNet8" or "ResNet14".
    """
    if not hasattr(image, "__len__") or len(image) != 3:
        raise ValueError(f"an image is (channels, height, width), as data.shape, not {image!r}")
    return _find(LITE_NETS, name)(image, classes)


def _find(table: dict, name: str):
    if name not in table:
        raise ValueError(f"there is no {name!r}: choose from {', '.join(table)}")
    return table[name]
