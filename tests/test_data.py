"""Images from every source, and a sentence for every way they can be wrong."""

import tarfile

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits as sklearn_digits
from torch.utils.data import DataLoader, Dataset, TensorDataset
from toy import random_nets

from netspace_lite import Descent, ImageLoss, MixedNets, NetSpace, SpaceConfig, optimise
from netspace_lite import data as data_module
from netspace_lite.architectures import lite_net
from netspace_lite.data import (
    ImageData,
    Images,
    blends,
    few_shot,
    load_cifar10,
    load_digits,
    load_images,
)
from netspace_lite.fingerprint import fingerprint
from netspace_lite.zoo import ImageTask


def arrays(shape=(8, 8), count=30, dtype=np.uint8, classes=3):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (count, *shape)).astype(dtype)
    y = np.arange(count) % classes
    return {"x_train": x, "y_train": y, "x_test": x[:9], "y_test": y[:9]}


def saved(tmp_path, **changes):
    path = tmp_path / "images.npz"
    np.savez(path, **{**arrays(), **changes})
    return path


def test_digits_are_all_there_split_and_standardised():
    digits = load_digits()
    sizes = [len(part) for part in (digits.train, digits.val, digits.test)]
    assert sum(sizes) == len(sklearn_digits().target) == 1797
    assert digits.shape == (1, 8, 8)
    assert digits.train.x.mean().item() == pytest.approx(0, abs=1e-4)
    assert digits.train.x.std().item() == pytest.approx(1, abs=1e-3)
    again = load_digits()
    assert torch.equal(again.test.x, digits.test.x)
    assert not torch.equal(load_digits(seed=1).test.y, digits.test.y)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((8, 8), np.uint8),
        ((12, 12, 3), np.uint8),
        ((3, 12, 12), np.float32),
        ((1, 9, 9), np.float64),
        ((8, 13), np.uint8),
        ((6, 12, 3), np.float16),
    ],
    ids=str,
)
def test_grey_and_rgb_images_of_any_size(tmp_path, shape, dtype):
    path = tmp_path / "own.npz"
    np.savez(path, **arrays(shape, dtype=dtype))
    images = load_images(path)
    sides = [side for side in shape if side not in (1, 3)]
    channels = 3 if 3 in shape else 1
    assert images.shape == (channels, *sides)
    assert images.train.x.dtype == torch.float32
    assert (images.name, images.classes, len(images.test)) == ("own", 3, 9)


WRONG = {
    "rank": ({"x_train": np.zeros((30, 64), np.uint8)}, "should be grey or RGB"),
    "four channels": (
        {"x_train": np.zeros((30, 8, 8, 4), np.uint8)},
        r"grey or RGB images, .* not \(30, 8, 8, 4\)",
    ),
    "dtype": ({"x_train": np.zeros((30, 8, 8), np.int32)}, "x_train should be uint8 or float"),
    "scale": ({"x_test": np.full((9, 8, 8), 255.0)}, "one is uint8, one float beyond 0..1"),
    "nan": ({"x_test": np.full((9, 8, 8), np.nan)}, "x_test holds 576 values that are NaN"),
    "sizes differ": ({"x_test": np.zeros((9, 4, 4), np.uint8)}, "sizes differ"),
    "label count": ({"y_train": np.zeros(29, int)}, r"y_train should be one label an image"),
    "float labels": ({"y_train": np.zeros(30)}, "whole numbers from 0, not float64"),
    "words": ({"y_train": np.array(["cat", "dog", "ox"] * 10)}, "whole numbers from 0.*from cat"),
    "negative label": ({"y_test": np.full(9, -1)}, "whole numbers from 0, not int64 from -1"),
    "label gap": ({"y_train": np.arange(30) % 3 * 2}, "class 0..K-1, and holds 3 classes up to 4"),
    "unknown class": ({"y_test": np.full(9, 7)}, "3 classes up to 2, y_test up to 7"),
    "pickled": ({"x_train": np.array([{}] * 30, object)}, "pickled objects, which are never"),
    "empty": ({"x_test": np.zeros((0, 8, 8), np.uint8)}, "x_test should be grey or RGB"),
    "no pixels": ({"x_train": np.zeros((30, 0, 8), np.uint8)}, "x_train should be grey or RGB"),
    "huge labels": ({"y_train": np.full(30, 2**63, np.uint64)}, "whole numbers from 0"),
    "one image": (
        {"x_train": np.zeros((1, 8, 8), np.uint8), "y_train": [0], "y_test": np.zeros(9, int)},
        "1 training images can't spare 1",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arrays_are_refused_in_a_sentence(tmp_path, case):
    changes, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        load_images(saved(tmp_path, **changes))


def test_bytes_and_floats_from_0_to_1_are_of_one_scale(tmp_path):
    given = arrays()
    mixed = load_images(saved(tmp_path, x_test=given["x_test"].astype(np.float32) / 255))
    torch.testing.assert_close(mixed.test.x, load_images(saved(tmp_path)).test.x)


def test_wrong_files_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"give an \.npz"):
        load_images(tmp_path / "nothing.npz")
    np.savez(tmp_path / "part.npz", x_train=np.zeros((3, 8, 8)))
    with pytest.raises(ValueError, match="lacks y_train, x_test, y_test"):
        load_images(tmp_path / "part.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.npz (holds pickled|is damaged)"):
        load_images(tmp_path / "text.npz")
    whole = saved(tmp_path).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut.npz is damaged"):
        load_images(tmp_path / "cut.npz")


def test_few_shot_takes_so_many_of_each_class():
    images = Images(torch.arange(60.0)[:, None], torch.arange(60) % 3)
    few = few_shot(images, 4)
    assert few.y.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len(few.x.unique()) == 12
    assert torch.equal(few.x[:, 0].long() % 3, few.y)
    assert torch.equal(few_shot(images, 4).x, few.x)
    assert not torch.equal(few_shot(images, 4, seed=1).x, few.x)
    for count in (50, 0, -1):
        with pytest.raises(ValueError, match=f"not {count} to draw"):
            few_shot(images, count)


def cifar_folder(tmp_path, records=20):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        raw = rng.integers(0, 256, (records, 3073), dtype=np.uint8)
        raw[:, 0] = np.arange(records) % 10
        raw.tofile(folder / f"{name}.bin")
    return folder


def test_cifar10_is_read_from_its_binary_files(tmp_path):
    folder = cifar_folder(tmp_path)
    images = load_cifar10(folder, val=10)
    assert images.shape == (3, 32, 32)
    assert (len(images.train), len(images.val), len(images.test)) == (90, 10, 20)
    first = np.fromfile(folder / "test_batch.bin", np.uint8)[1:3073].reshape(3, 32, 32)
    x = images.test.x[0].flatten().numpy()
    assert np.corrcoef(x, first.flatten())[0, 1] > 0.99  # same picture, standardised


def test_damaged_cifar10_files_are_refused(tmp_path):
    folder = cifar_folder(tmp_path)
    file = folder / "data_batch_3.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="no multiple of 3,073"):
        load_cifar10(folder)
    np.full(3073, 11, np.uint8).tofile(file)
    with pytest.raises(ValueError, match="labels over 9"):
        load_cifar10(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_3.bin is missing"):
        load_cifar10(folder)


def test_a_fetched_archive_is_unpacked_once(tmp_path, monkeypatch):
    folder = cifar_folder(tmp_path)
    archive = tmp_path / "cache" / "cifar-10-binary.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)

    def retrieve(url, known_hash, name, progressbar):
        assert known_hash == data_module.CIFAR10_MD5
        return str(archive)

    monkeypatch.setattr(data_module.pooch, "retrieve", retrieve)
    monkeypatch.delenv("NETSPACE_CIFAR10", raising=False)
    assert len(load_cifar10(val=10).test) == 20
    archive.unlink()  # the second time nothing is unpacked
    assert len(load_cifar10(val=10).test) == 20


def test_blends_are_mixtures_of_two_after_the_inputs_themselves():
    x = torch.randn(7, 2, 3)
    found = blends(x, seed=3)
    torch.testing.assert_close(found[:7], x)
    assert torch.equal(found, blends(x, seed=3))
    assert not torch.equal(found, blends(x, seed=4))
    for own, mixed in zip(x, found[7:], strict=True):
        # the share of each other input that would give this mixture, if one does
        towards = (x - own).flatten(1)
        share = ((mixed - own).flatten() * towards).sum(1) / towards.square().sum(1).clamp_min(1e-9)
        left = (share[:, None] * towards - (mixed - own).flatten()).abs().amax(1)
        assert left.min() < 1e-5
        assert 0 <= share[left.argmin()] <= 1


def test_a_mean_does_not_drift_with_the_order_in_memory():
    x = np.random.default_rng(0).integers(100, 256, (20_000, 16, 16, 3)).astype(np.uint8)
    x, y = data_module._check("train", x, np.arange(20_000) % 10)
    data = data_module._split("many", x, y, x[:1], y[:1], 0)
    assert data.train.x.double().mean((0, 2, 3)).abs().max() < 1e-5


@pytest.mark.parametrize("shift", [1, -1, 0.5])
def test_labels_beyond_the_classes_are_refused(shift):
    data = load_digits()
    wrong = Images(data.val.x, data.val.y + shift)
    with pytest.raises(ValueError, match=r"labels of 10 classes are numbers 0..9"):
        ImageData("wrong", data.train, wrong, data.test, 10)
    with pytest.raises(ValueError, match=r"labels of 10 classes are numbers 0..9"):
        random_nets(lite_net("LeNetLike", data.shape, 10), 2).accuracy(wrong)


def test_images_are_tensors_and_whole_labels_become_int64():
    x, y = torch.zeros(3, 1, 2, 2), torch.tensor([0, 1, 2])
    assert Images(x, y.int()).y.dtype == torch.int64
    with pytest.raises(ValueError, match=r"torch\.from_numpy"):
        Images(x.numpy(), y.numpy())


@pytest.mark.parametrize("value", [np.float32(0.1), np.float32(0)])
def test_images_that_are_all_alike_are_refused(tmp_path, value):
    """Seen before: zeros to train on, and test images of millions."""
    same = np.full((30, 8, 8), value)
    with pytest.raises(ValueError, match="training images with a spread of .* show nothing"):
        load_images(saved(tmp_path, x_train=same))


def test_images_too_large_for_float32_are_refused(tmp_path):
    huge = np.random.default_rng(0).random((30, 8, 8), dtype=np.float32) * 1e30
    with np.errstate(over="ignore"), pytest.raises(ValueError, match="spread of inf"):
        load_images(saved(tmp_path, x_train=huge, x_test=huge[:9]))


def test_a_class_that_would_only_be_validated_on_is_refused(tmp_path):
    y = np.arange(30) % 2
    y[7] = 2
    path, found = saved(tmp_path, y_train=y), set()
    for seed in range(20):
        try:
            found.add(tuple(load_images(path, seed=seed).train.y.unique().tolist()))
        except ValueError as error:
            found.add(str(error).partition(": ")[2])
    lost = "all images of classes [2] went to validation: give more of them, or take another seed"
    assert found == {(0, 1, 2), lost}


class Pairs(Dataset):
    """A data set as PyTorch's users have them: x as it is stored, transformed when it is read."""

    def __init__(self, images):
        self.x, self.y = images.x * 2, images.y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, n):
        return self.x[n] / 2, int(self.y[n])


class Augmented(Pairs):
    """One that draws, and counts how often it is read."""

    read = 0

    def __getitem__(self, n):
        self.read += 1
        x, y = super().__getitem__(n)
        return x + np.random.standard_normal(), y


@pytest.mark.parametrize(
    "given",
    [
        lambda images: images,
        lambda images: (images.x, images.y),
        Pairs,
        lambda images: TensorDataset(images.x, images.y),
        lambda images: DataLoader(Pairs(images), batch_size=100),
    ],
    ids=["images", "pair", "data set", "tensors", "loader"],
)
def test_images_are_read_of_whatever_holds_them(given):
    data, before = load_digits(), torch.get_rng_state()
    found = Images.of(given(data.test))
    assert torch.equal(found.x, data.test.x)
    assert torch.equal(found.y, data.test.y)
    assert torch.equal(torch.get_rng_state(), before)  # loaders draw, even in order
    nets = random_nets(lite_net("LeNetLike", data.shape, data.classes), 2)
    assert torch.equal(nets.accuracy(given(data.test)), nets.accuracy(data.test))
    own = ImageData("own", given(data.train), given(data.val), given(data.test), 10)
    assert fingerprint(ImageTask(own)) != fingerprint(ImageTask(data))  # of another name
    own.name = data.name
    assert fingerprint(ImageTask(own)) == fingerprint(ImageTask(data))


def test_images_that_are_drawn_are_drawn_once_and_leave_randomness_alone():
    data, before = load_digits(), np.random.get_state()[1].tolist()
    given, moved = Augmented(data.val), random_nets(lite_net("LeNetLike", data.shape, 10), 2)
    space = NetSpace.for_zoos(moved, data.train.x, SpaceConfig(probes=4))
    config = Descent(steps=4, every=1)
    optimise(space, moved, ImageLoss(data.train), given, config=config, progress=False)
    MixedNets([moved, moved]).accuracy(given)
    assert given.read == 2 * len(data.val)
    assert np.random.get_state()[1].tolist() == before


def test_what_holds_no_images_says_so():
    """Seen before: an attribute that it lacks, and no word on what to give instead."""
    data = load_digits()
    nets = random_nets(lite_net("LeNetLike", data.shape, data.classes), 2)
    pictures = [({"image": 0}, 1), ({"image": 1}, 0)]
    for given in (data, data.test.x, None, [str(n) for n in range(9)], DataLoader(pictures)):
        kind = type(given).__name__
        with pytest.raises(ValueError, match=rf"a {kind} gives no images .*: give Images\(x, y\)"):
            nets.accuracy(given)
    downloaded = Pairs(data.train)
    downloaded.train = True  # as torchvision's say which part they are
    for given in (data.train, downloaded, DataLoader(downloaded), nets.module, None):
        with pytest.raises(ValueError, match=r"wants ImageData, not .*: ImageData\(name"):
            ImageTask(given)


def test_images_lie_in_order_so_that_modules_can_view_them(tmp_path):
    """Seen before: x.view(len(x), -1) failed on RGB images given as [B, H, W, 3]."""
    x, y = np.random.default_rng(0).random((40, 5, 7, 3), np.float32), np.arange(40) % 2
    np.savez(tmp_path / "rgb.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    data = load_images(tmp_path / "rgb.npz")
    assert data.train.x.view(len(data.train), -1).shape[1] == 3 * 5 * 7


def test_labels_keep_their_type_when_images_change_theirs():
    data = load_digits()
    moved = data.to(torch.float64)
    assert moved.test.x.dtype == torch.float64
    assert torch.equal(moved.test.y, data.test.y)
    assert moved.test.y.dtype == torch.int64


def test_digits_are_split_as_they_say():
    digits = load_digits()
    assert [len(part) for part in (digits.train, digits.val, digits.test)] == [1078, 270, 449]


def test_a_fifth_of_the_images_is_validated_on_unless_told(tmp_path):
    assert [len(load_images(saved(tmp_path), val=v).val) for v in (0.2, 0.5)] == [6, 15]
    assert len(load_images(saved(tmp_path)).val) == 6


def test_all_parts_are_standardised_by_the_training_images(tmp_path):
    """The test images are among the others, one of which is far brighter than the rest."""
    x = np.random.default_rng(0).random((30, 8, 8), np.float32)
    x[0] *= 20
    for seed in range(6):
        given = {"x_train": x, "x_test": x[:9]}
        data = load_images(saved(tmp_path, **given), seed=seed)
        assert float(data.train.x.mean()) == pytest.approx(0, abs=1e-5)
        assert float(data.train.x.std(correction=0)) == pytest.approx(1, abs=1e-4)
        known = torch.cat([data.train.x, data.val.x]).flatten(1)
        assert all((known == one.flatten()).all(1).any() for one in data.test.x)


def test_shares_of_blends_are_random():
    x = torch.tensor([[0.0], [1.0]]).repeat(500, 1)
    mixed = blends(x)[1000:, 0]
    mixed = mixed[(mixed > 0) & (mixed < 1)]  # of a 0 and a 1
    assert mixed.mean().item() == pytest.approx(0.5, abs=0.05)
    assert mixed.std().item() == pytest.approx(12**-0.5, abs=0.03)
