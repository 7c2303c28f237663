"""Labelled images in memory: digits (embedded), your own ``.npz``, CIFAR-10.

Images stay one tensor; mini-batches are drawn by index. Nothing here unpickles anything.
"""

import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pooch
import torch
from sklearn.datasets import load_digits as sklearn_digits
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from . import store
from .checks import check_finite, check_kind, check_pick, whole
from .randomness import own_randomness

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "md5:c32a1d4ab5d03f1284b67883e8d87530"


@dataclass
class Images:
    """Images x: [B, C, H, W] float32 and their labels y: [B] int64 in 0..K-1.

    Where nothing but a loss of your own reads them, y may be [B] of floats.
    """

    x: Tensor
    y: Tensor

    def __post_init__(self):
        check_kind(Tensor, "images and labels are tensors: torch.from_numpy(a)", self.x, self.y)
        one = self.y.dim() == 0 and self.x.dim() < 4  # an image and its label
        if not one and self.y.shape != self.x.shape[:1]:
            given = f"images {list(self.x.shape)} with labels {list(self.y.shape)}"
            raise ValueError(f"{given}: each image needs one label, y should be [B]")
        self.y = self.y if self.y.is_floating_point() else self.y.long()

    @classmethod
    def of(cls, given) -> "Images":
        """Images themselves, or those of a pair (x, y), or of a data set or loader of such pairs.

        Data sets are read to their ends: what they draw at random, such as crops, is drawn once. Of
        a loader it is what it gives, in its order: give the data set in place of one that shuffles
        or drops. Raises ValueError for what holds no pairs of tensors and numbers.
        """
        pairs = given
        try:
            if isinstance(given, Dataset | DataLoader):
                batches = given if isinstance(given, DataLoader) else DataLoader(given, 1000)
                with own_randomness():
                    pairs = map(torch.cat, zip(*batches, strict=True))
            elif hasattr(given, "x"):
                return given
            x, y = pairs
        except Exception as error:  # a data set is the user's code
            what = f"a {type(given).__name__} gives no images ({str(error) or repr(error)})"
            cure = "give Images(x, y), such as data.test, or a data set or loader of such pairs"
            raise ValueError(f"{what}: {cure}") from error
        return cls(x, y)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index) -> "Images":
        return Images(self.x[check_pick(index)], self.y[index])

    def __getattr__(self, name: str):
        raise AttributeError(f"Images have .x and .y and no {name!r}: does it take an ImageData?")

    def to(self, device) -> "Images":
        """The same images on another device, or of another precision, which labels don't take."""
        x = self.x.to(device)
        return Images(x, self.y.to(x.device))


@dataclass
class ImageData:
    """A data set split three ways, standardised by the training images' mean and spread.

    ``train`` fits nets and the space, ``val`` picks the best state, ``test`` is only reported on.
    Made of your own, anything that `Images.of` takes will do; standardise it yourself.
    """

    name: str
    train: Images
    val: Images
    test: Images
    classes: int

    def __post_init__(self):
        self.train, self.val, self.test = map(Images.of, (self.train, self.val, self.test))
        self.classes = whole(self.classes, "the number of classes")
        if len(self.shape) == 3 and self.shape[0] == self.shape[1] > 3 >= self.shape[2]:
            given = f"images of {[*self.shape]} have their channels last"
            raise ValueError(f"{given}, and should be [C, H, W]: pass x.permute(0, 3, 1, 2)")
        for name in ("train", "val", "test"):
            part = getattr(self, name)
            if len(part) == 0 or part.x.shape[1:] != self.train.x.shape[1:]:
                given = f"{name} images are {list(part.x.shape)}, those to train {[*self.shape]}"
                raise ValueError(f"{given}: each part needs some, all of one size")
            check_labels(part.y, self.classes)
            check_finite(part.x, f"{name} images")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return tuple(self.train.x.shape[1:])

    def __getattr__(self, name: str):
        what = f"ImageData has .train, .val and .test, which have .x and .y, and no {name!r}"
        raise AttributeError(f"{what}: give one of them, or ImageTask(data) where a task is wanted")

    def to(self, device) -> "ImageData":
        """The same data on another device; zoos and spaces are trained where their images are."""
        parts = (part.to(device) for part in (self.train, self.val, self.test))
        return ImageData(self.name, *parts, self.classes)


def check_labels(y: Tensor, classes: int) -> None:
    """Raise ValueError unless labels y [B] are whole numbers 0..classes-1."""
    if y.is_floating_point() or y.min() < 0 or y.max() >= classes:
        given = f"{y.dtype} from {y.min().item()} to {y.max().item()}"
        raise ValueError(f"labels of {classes} classes are numbers 0..{classes - 1}, not {given}")


def load_digits(seed: int = 0) -> ImageData:
    """scikit-learn's 1,797 handwritten digits, 8×8 grey: 60% train, 15% validation, 25% test."""
    digits = sklearn_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    x, y = digits.images[order, None] / 16, digits.target[order]
    cut = round(0.75 * len(y))
    return _split("digits", x[:cut], y[:cut], x[cut:], y[cut:], seed)


def load_images(path, seed: int = 0, val: float = 0.2) -> ImageData:
    """Your own images from an ``.npz`` with ``x_train, y_train, x_test, y_test``.

    Args:
        path: file with x of shape [B, H, W] (grey), [B, H, W, 3] or [B, 3, H, W] (RGB),
            uint8 in 0..255 or float; y of shape [B], whole numbers 0..K-1 without gaps.
        seed: decides which training images become the validation set.
        val: share of the training images to validate on.

    Raises ValueError saying which array is wrong, and how, before anything is kept.
    """
    names = "x_train", "y_train", "x_test", "y_test"
    x, y, x_test, y_test = store.load_arrays(path, names).values()
    alike = x.dtype.kind == x_test.dtype.kind
    x, y = _check("train", x, y)
    x_test, y_test = _check("test", x_test, y_test)
    if not alike and (min(x.min(), x_test.min()) < 0 or max(x.max(), x_test.max()) > 1):
        raise ValueError("x_train and x_test: one is uint8, one float beyond 0..1; save both alike")
    if x.shape[1:] != x_test.shape[1:]:
        raise ValueError(f"x_train is {x.shape} but x_test is {x_test.shape}: sizes differ")
    small, large = sorted(np.abs(part).max() for part in (x, x_test))
    if 0 < 50 * small < large:
        raise ValueError(f"x_train and x_test are of two scales, up to {small} and {large}")
    known = np.unique(y)
    if known[-1] != len(known) - 1 or y_test.max() > known[-1]:
        held = f"{len(known)} classes up to {known[-1]}, y_test up to {y_test.max()}"
        cure = "np.unique(y, return_inverse=True)[1] numbers any labels"
        raise ValueError(f"y_train should hold every class 0..K-1, and holds {held}: {cure}")
    return _split(Path(path).stem, x, y, x_test, y_test, seed, val)


def _check(part: str, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Any accepted arrays -> images float32 [B, C, H, W], uint8 scaled to 0..1, and labels."""
    given, byte = x.shape, x.dtype == np.uint8
    if not byte and x.dtype.kind != "f":
        raise ValueError(f"x_{part} should be uint8 or float, not {x.dtype}")
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    if x.ndim != 4 or x.shape[1] not in (1, 3) or x.size == 0:
        known = "grey or RGB images, [B, H, W] or [B, H, W, 3]"
        raise ValueError(f"x_{part} should be {known}, not {given}")
    x = x.astype(np.float32) / (255 if byte else 1)
    if bad := np.sum(~np.isfinite(x)):
        raise ValueError(f"x_{part} holds {bad} values that are NaN or infinite")
    if y.shape != (len(x),):
        raise ValueError(f"y_{part} should be one label an image, [{len(x)}], not {y.shape}")
    if y.dtype.kind not in "iu" or y.astype(np.int64).min() < 0:
        raise ValueError(f"y_{part} should be whole numbers from 0, not {y.dtype} from {min(y)}")
    return x, y.astype(np.int64)


def load_cifar10(folder=None, seed: int = 0, val: int = 5000) -> ImageData:
    """CIFAR-10 from its official *binary* files (data_batch_1.bin ... test_batch.bin).

    Args:
        folder: where the .bin files lie. Without it the archive is fetched once and its hash
            checked; ``NETSPACE_CIFAR10`` names a folder too.
        seed: decides which training images become the validation set.
        val: number of validation images.
    """
    folder = Path(folder or os.environ.get("NETSPACE_CIFAR10") or _fetch_cifar10())
    train = [_read_cifar10(folder / f"data_batch_{i}.bin") for i in range(1, 6)]
    x, y = (np.concatenate(parts) for parts in zip(*train, strict=True))
    x_test, y_test = _read_cifar10(folder / "test_batch.bin")
    return _split("cifar10", x, y, x_test, y_test, seed, val / len(x))


def _fetch_cifar10() -> Path:
    archive = pooch.retrieve(CIFAR10_URL, CIFAR10_MD5, "cifar-10-binary.tar.gz", progressbar=True)
    folder = Path(archive).parent / "cifar-10-batches-bin"
    if not (folder / "test_batch.bin").exists():
        with tarfile.open(archive) as tar:
            tar.extractall(folder.parent, filter="data")
    return folder


def _read_cifar10(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """One file of records of 1 label byte and 3·32·32 pixel bytes."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: unpack cifar-10-binary.tar.gz there")
    raw = np.fromfile(path, np.uint8)
    if raw.size == 0 or raw.size % 3073:
        raise ValueError(f"{path} has {raw.size} bytes, no multiple of 3,073: download it again")
    records = raw.reshape(-1, 3073)
    if records[:, 0].max() > 9:
        raise ValueError(f"{path} has labels over 9: it is not a CIFAR-10 binary file")
    return records[:, 1:].reshape(-1, 3, 32, 32).astype(np.float32) / 255, records[:, 0]


def _split(name, x, y, x_test, y_test, seed, val=0.2) -> ImageData:
    """Draw the validation set from the training images and standardise all by the rest."""
    order = np.random.default_rng(seed + 1).permutation(len(y))
    held = max(1, round(val * len(y)))
    if val < 0 or held >= len(y):
        raise ValueError(f"{name}: {len(y)} training images can't spare {held} to validate on")
    train, held_out = order[held:], order[:held]
    if lost := set(y.tolist()) - set(y[train].tolist()):
        what = f"all images of classes {sorted(lost)} went to validation"
        raise ValueError(f"{name}: {what}: give more of them, or take another seed")
    mean = x[train].mean((0, 2, 3), np.float64, keepdims=True).astype(x.dtype)  # fp32 would drift
    std = x[train].std() + 1e-8
    if not np.isfinite(std) or x[train].min() == x[train].max():
        raise ValueError(f"{name}: training images with a spread of {std:.2g} show nothing")

    def images(x, y):
        x = torch.from_numpy(np.ascontiguousarray((x - mean) / std, np.float32))
        return Images(x, torch.from_numpy(y.astype(np.int64)))

    parts = images(x[train], y[train]), images(x[held_out], y[held_out]), images(x_test, y_test)
    return ImageData(name, *parts, classes=int(y.max()) + 1)


def blends(x: Tensor, seed: int = 0) -> Tensor:
    """The inputs [S, ...], and as many mixtures of two of them each in random shares: [2·S, ...].

    For comparing what nets answer, which takes no labels, on more than their training images
    (mixup, Zhang et al. 2018, without its mixed labels).
    """
    check_kind(Tensor, "inputs to blend are a tensor, as data.train.x", x)
    generator = torch.Generator().manual_seed(seed)
    others = torch.randperm(len(x), generator=generator)
    share = torch.rand(len(x), *[1] * (x.dim() - 1), generator=generator).to(x)
    return torch.cat([x, torch.lerp(x, x[others], share)])


def few_shot(images: Images, per_class: int, seed: int = 0) -> Images:
    """``per_class`` random images of each class, class by class; ValueError if one has fewer."""
    images, per_class = Images.of(images), whole(per_class, "images a class")
    generator, chosen = torch.Generator().manual_seed(seed), []
    for label in images.y.unique().tolist():
        members = (images.y == label).nonzero()[:, 0]
        if not 1 <= per_class <= len(members):
            raise ValueError(f"class {label} has {len(members)} images, not {per_class} to draw")
        chosen.append(members[torch.randperm(len(members), generator=generator)[:per_class]])
    return images[torch.cat(chosen)]
