"""What lies on disk: whole or refused, by name and reason."""

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from netspace_lite import store

TENSORS = {"rows": torch.arange(12.0).view(3, 4), "count": torch.tensor(3)}


@pytest.fixture
def folder(tmp_path):
    store.save(tmp_path, "zoo", {"note": "hello"}, TENSORS)
    return tmp_path


def tensor_file(folder):
    return next(folder.glob("zoo-*.safetensors"))


def test_round_trip_is_exact(folder):
    record, tensors = store.load(folder, "zoo")
    assert record == {"note": "hello"}
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[k], v) for k, v in TENSORS.items())


def test_saving_again_replaces_and_leaves_nothing_behind(folder):
    store.save(folder, "zoo", {"note": "again"}, {"rows": torch.zeros(2)})
    assert store.load(folder, "zoo")[0] == {"note": "again"}
    assert len(list(folder.iterdir())) == 2


def test_an_interrupted_save_leaves_the_old_version_whole(folder, monkeypatch):
    replace = store.os.replace

    def fail_at_the_record(source, target):
        if str(target).endswith(".json"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(store.os, "replace", fail_at_the_record)
    with pytest.raises(KeyboardInterrupt):
        store.save(folder, "zoo", {"note": "new"}, {"rows": torch.zeros(2)})
    monkeypatch.undo()
    record, tensors = store.load(folder, "zoo")
    assert record == {"note": "hello"}
    assert torch.equal(tensors["rows"], TENSORS["rows"])


def test_truncated_tensors_are_refused(folder):
    file = tensor_file(folder)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=f"{file.name} was truncated or edited"):
        store.load(folder, "zoo")


def test_one_flipped_bit_is_refused(folder):
    file = tensor_file(folder)
    payload = bytearray(file.read_bytes())
    payload[-1] ^= 1
    file.write_bytes(payload)
    with pytest.raises(ValueError, match="truncated or edited"):
        store.load(folder, "zoo")


def test_missing_tensors_are_refused(folder):
    tensor_file(folder).unlink()
    with pytest.raises(ValueError, match="is missing, though zoo.json names it"):
        store.load(folder, "zoo")


def test_an_edited_record_is_refused(folder):
    path = folder / "zoo.json"
    path.write_text(path.read_text().replace("hello", "hullo"))
    with pytest.raises(ValueError, match="zoo.json was edited"):
        store.load(folder, "zoo")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"note": 1}', "\x00\xff"], ids=repr)
def test_a_record_that_is_no_record_is_refused(folder, text):
    (folder / "zoo.json").write_text(text)
    with pytest.raises(ValueError, match="zoo.json is damaged"):
        store.load(folder, "zoo")


def test_a_record_cannot_point_outside_its_folder(folder, tmp_path_factory):
    record = json.loads((folder / "zoo.json").read_text())
    record["tensors"]["file"] = "../../secret.safetensors"
    del record["checksum"]
    record["checksum"] = store._checksum(record)
    (folder / "zoo.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=str(folder / "secret.safetensors")):
        store.load(folder, "zoo")


def test_nothing_there_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing was saved"):
        store.load(tmp_path, "zoo")
    assert not store.exists(tmp_path, "zoo")
    store.delete(tmp_path, "zoo")  # deleting nothing is fine


def test_names_that_share_a_beginning_are_told_apart(tmp_path):
    for name in ("block-1", "block-10"):
        store.save(tmp_path, name, {"name": name}, {"x": torch.ones(1) * len(name)})
    store.delete(tmp_path, "block-1")
    assert store.load(tmp_path, "block-10")[0] == {"name": "block-10"}


def test_several_that_save_the_same_do_not_meet(tmp_path):
    """Seen before: one took away the half-written file of another, which died of it."""
    with ThreadPoolExecutor(8) as pool:
        saved = [pool.submit(store.save, tmp_path, "zoo", {}, TENSORS) for _ in range(64)]
        assert all(each.result() is None for each in saved)
    assert torch.equal(store.load(tmp_path, "zoo")[1]["rows"], TENSORS["rows"])
    assert len(list(tmp_path.iterdir())) == 2


def test_what_could_not_be_written_leaves_nothing(tmp_path, monkeypatch):
    """Seen before: halves of files kept a full disk full."""

    def full(_):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        store.save(tmp_path, "zoo", {}, TENSORS)
    assert not list(tmp_path.iterdir())
