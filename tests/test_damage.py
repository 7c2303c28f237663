"""Random damages of whatever lies on disk: it loads, or a sentence says why not.

NETSPACE_DAMAGES=3000 pytest tests/test_damage.py runs as many; each is named by its seed.
"""

import functools
import json
import math
import os
import random
import shutil
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from toy import CLASSES, IMAGE, Interrupted, interrupted, small_nets, toy_data

from netspace_lite import (
    Distillation,
    ImageTask,
    NetSpace,
    Recipe,
    SpaceConfig,
    Zoo,
    fit,
    load_cifar10,
    load_images,
    store,
    train_zoo,
    zoo_training,
)

DAMAGES = int(os.environ.get("NETSPACE_DAMAGES", 300))
DATA, NET = toy_data(per_class=8), small_nets()[0]
TASK, RECIPES = ImageTask(DATA, 8), [Recipe(seed, 3) for seed in range(3)]
CONFIG = SpaceConfig(embedding=4, probes=4, hidden=4, chunk=64, chunk_features=2)


def trained(folder=None):
    return train_zoo(NET, TASK, RECIPES, folder, block=2, progress=False)


@functools.cache
def zoo_in_memory():
    return trained()


def fitted(folder=None):
    zoo = zoo_in_memory()
    space = NetSpace.for_zoos(zoo, DATA.train.x, CONFIG)
    objective = Distillation(space, zoo, DATA.train.x, nets=2, samples=2)
    history = fit(space, objective, lambda space: {"score": 0.0}, 2, epoch=1, folder=folder)
    assert all(math.isfinite(row["loss"]) for row in history)
    space.encode(zoo)


def use_zoo(folder):
    zoo = Zoo.load(folder)
    zoo.outputs(DATA.test.x)
    assert zoo.finite().all()
    assert [len(net.recipes) for net in zoo if zoo.recipes] == [1] * len(zoo) or not zoo.recipes
    zoo.split(1, 1)


def use_space(folder):
    space = NetSpace.load(folder)
    space.decode(torch.zeros(1, space.config.embedding), 0).outputs(DATA.test.x)


def write_checkpoint(folder):
    """A zoo in training, stopped in its second block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo_training, "CHECKPOINT_SECONDS", 0)
        patch.setattr(ImageTask, "batch", interrupted(ImageTask.batch, 5))
        with pytest.raises(Interrupted):
            trained(folder)


def write_images(folder):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (12, 4, 5), np.uint8), np.arange(12) % 3
    np.savez_compressed(folder / "images.npz", x_train=x, y_train=y, x_test=x[:6], y_test=y[:6])


def write_cifar(folder):
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        records = np.zeros((2, 3073), np.uint8)
        records[:, 1::2] = 255
        records.tofile(folder / f"{name}.bin")


def write_own(folder):
    for n, net in enumerate(small_nets()[:1] * 2):
        save_file(net.state_dict(), folder / f"{n}.safetensors")
        torch.save(net.state_dict(), folder / f"{n}.pt")


KINDS = {  # how a folder comes about, and how it is used
    "zoo": (lambda folder: trained(folder), use_zoo),
    "finished zoo": (lambda folder: trained(folder), trained),
    "checkpoint": (write_checkpoint, trained),
    "space": (
        lambda folder: NetSpace.for_zoos(trained(), DATA.train.x, CONFIG).save(folder),
        use_space,
    ),
    "fit": (fitted, fitted),
    "images": (write_images, lambda folder: load_images(folder / "images.npz")),
    "cifar": (write_cifar, lambda folder: load_cifar10(folder, val=2)),
    "own nets": (write_own, lambda folder: Zoo.from_files(folder, NET, TASK)),
}
VALUES = [None, -1, 0, 1, 10**20, 0.5, math.nan, "", "x", "ResNet", [], [1], {}, {"a": 1}, True]


def damage_bytes(file, rng):
    """Cut, flip, blank, insert, repeat or remove bytes; or the file is gone, empty or another."""
    content = bytearray(file.read_bytes())
    start = rng.randrange(len(content) + 1)
    end = min(len(content), start + rng.choice([1, 4, 100, 4000]))
    noise = rng.randbytes(rng.choice([1, 8, 300]))
    others = sorted(f for f in file.parent.iterdir() if f.is_file())
    match rng.randrange(8):
        case 0:
            del content[start:]
        case 1:
            content[start:end] = bytes(b ^ (1 << rng.randrange(8)) for b in content[start:end])
        case 2:
            content[start:end] = bytes(end - start)
        case 3:
            content[start:start] = noise
        case 4:
            content[start:start] = content[start:end]
        case 5:
            del content[start:end]
        case 6:
            content[start : start + len(noise)] = noise
        case 7:
            return rng.choice(
                [file.unlink, lambda: shutil.copy(rng.choice(others), file.with_suffix(".x"))]
            )()
    file.write_bytes(content)


def damage_json(value, rng):
    """``value`` with one entry, at any depth, lost, added or replaced."""
    if isinstance(value, dict | list) and value and rng.random() < 0.8:
        changed = value.copy()
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        if rng.random() < 0.3:
            del changed[key]
        else:
            changed[key] = damage_json(value[key], rng)
        return changed
    return rng.choice(VALUES)


def damage_tensors(tensors, rng):
    """One tensor lost, added, or of another shape, type or content."""
    name = rng.choice(sorted(tensors))
    tensor, rest = tensors[name], {k: v for k, v in tensors.items() if k != name}
    changes = [
        lambda t: t.double() if t.dtype != torch.double else t.long(),
        lambda t: t.long(),
        lambda t: t.bool(),
        lambda t: t.flatten()[:-1],
        lambda t: t[None],
        lambda t: torch.zeros(0),
        lambda t: torch.cat([t.flatten(), t.flatten()]),
        lambda t: t * torch.nan if t.is_floating_point() else t - 10**6,
        lambda t: t * 1e30 if t.is_floating_point() else t + 1,
    ]
    if rng.random() < 0.2:
        return rest
    if rng.random() < 0.1:
        return tensors | {"more": torch.zeros(2)}
    return rest | {name: rng.choice(changes)(tensor)}


def damage(folder, rng):
    """Bytes of a file; or what another version or a script might have written, resealed."""
    records = sorted(folder.glob("*.json"))
    if not records or rng.random() < 0.5:
        return damage_bytes(rng.choice(sorted(folder.iterdir())), rng)
    name = rng.choice(records).stem
    record, tensors = store.load(folder, name)
    if rng.random() < 0.6:
        record = damage_json(record, rng)
        record = record if isinstance(record, dict) else {"value": record}
    else:
        tensors = damage_tensors(tensors, rng)
    store.save(folder, name, json.loads(json.dumps(record)), tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_load_or_say_why_not(kind, tmp_path):
    write, use = KINDS[kind]
    (tmp_path / "whole").mkdir()
    write(tmp_path / "whole")
    use(shutil.copytree(tmp_path / "whole", tmp_path / "used"))
    refused, failures = 0, []
    for n in range(math.ceil(DAMAGES / len(KINDS))):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / str(n))
        damage(folder, random.Random(f"{kind} {n}"))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # nets that are not finite are named and left out
                use(folder)
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            if len(str(error).split()) < 4:
                failures.append(f"{n}: no sentence: {error!r}")
        except Exception as error:
            failures.append(f"{n}: {error!r:.150}")
        shutil.rmtree(folder)
    assert not failures, f"{len(failures)} of {n + 1}\n" + "\n".join(failures)
    assert refused > n / 4  # most damages do matter


def test_an_older_versions_zoo_is_refused_in_a_sentence(tmp_path):
    """Records as the first version wrote them: no fingerprints, other names."""
    record = {
        "architecture": {"name": "LeNetLike", "config": NET.config}, "task": {"task": "images"},
        "seconds": 1.0, "nets": [{"seed": 1, "steps": 2, "lr": 0.1, "weight_decay": 0.1}],
        "scores": {"test_accuracy": [50.0]},
    }  # fmt: skip
    rows = torch.zeros(1, sum(p.numel() for p in NET.parameters()))
    store.save(tmp_path, "zoo", record, {"rows": rows, "losses": torch.zeros(1, 2)})
    space = {"config": {"embedding": 4}, "architectures": [record["architecture"]]}
    store.save(tmp_path, "space", space, {"probes": torch.zeros(2, *IMAGE)})
    plan = {"steps": 2, "lr": 2e-3, "epoch": 1, "seed": 0}
    store.save(tmp_path, "fit", {"plan": plan, "history": []}, {"generator": torch.zeros(3)})
    for read in (Zoo.load, NetSpace.load, trained, fitted):
        with pytest.raises(ValueError, match=r"\w+ \w+ \w+"):
            read(tmp_path)


ARGUMENTS = {
    "scores of another length": lambda zoo: Zoo(NET, zoo.rows, {"a": torch.zeros(2)}),
    "recipes of another length": lambda zoo: Zoo(NET, zoo.rows, recipes=RECIPES[:1]),
    "losses of another length": lambda zoo: Zoo(NET, zoo.rows, losses=torch.zeros(2, 4)),
    "members of another length": lambda zoo: Zoo(NET, zoo.rows, members=torch.arange(5)),
    "no zoos": lambda zoo: NetSpace.for_zoos([], DATA.train.x),
    "rows of integers": lambda zoo: Zoo(NET, zoo.rows.long()),
    "inputs of another shape": lambda zoo: zoo.outputs(torch.zeros(2, 3)),
    "inputs of another kind": lambda zoo: zoo.outputs(torch.zeros(2, *IMAGE, dtype=torch.long)),
    "no recipes": lambda zoo: train_zoo(NET, TASK, []),
    "no steps": lambda zoo: train_zoo(NET, TASK, [Recipe(0, 0)], progress=False),
    "no block": lambda zoo: train_zoo(NET, TASK, RECIPES, block=0, progress=False),
    "too many held out": lambda zoo: zoo.split(2, 2),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_wrong_arguments_are_refused_in_a_sentence(case):
    with pytest.raises(ValueError, match=r"\w+ \w+ \w+"):
        ARGUMENTS[case](zoo_in_memory())


def test_inputs_of_every_wrong_shape_and_kind_are_refused():
    """Random tensors where embeddings and rows are asked for."""
    zoo, rng = zoo_in_memory(), random.Random(0)
    space = NetSpace.for_zoos(zoo, DATA.train.x, CONFIG)
    calls = {"encode": space.encode, "decode": space.decode, "rows": lambda t: Zoo(NET, t)}
    failures = []
    for _ in range(30):
        shape = [rng.choice([0, 1, 2, 4, 7, CLASSES]) for _ in range(rng.randrange(4))]
        given = torch.zeros(shape, dtype=rng.choice([torch.float32, torch.long, torch.bool]))
        for name, call in calls.items():
            try:
                call(given)
            except ValueError as error:
                if len(str(error).split()) < 4:
                    failures.append(f"{name} {shape}: {error!r}")
            except Exception as error:
                failures.append(f"{name} of {given.dtype} {shape}: {error!r:.120}")
    assert not failures, "\n".join(failures)
