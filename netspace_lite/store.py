"""Tensors and their readable record on disk: atomic to write, checked when read, never pickled.

A folder holds ``NAME.json``, which a person can read, and ``NAME-HASH.safetensors``, which it
points to. The JSON file is replaced last and in one step, so an interrupted save leaves the old
version whole, and a file that was cut short or edited is refused.
"""

import hashlib
import json
import os
from contextlib import contextmanager
from operator import methodcaller
from pathlib import Path
from threading import get_ident

import numpy as np
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor


def save(folder, name: str, record: dict, tensors: dict[str, Tensor]) -> None:
    """Write ``record`` (JSON values) and ``tensors`` under ``name`` in ``folder``, atomically."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    payload = save_tensors({key: value.detach().contiguous() for key, value in tensors.items()})
    digest = hashlib.sha256(payload).hexdigest()
    file = f"{name}-{digest[:12]}.safetensors"
    record = json.loads(json.dumps(record, default=methodcaller("tolist")))  # as it will be read
    full = {**record, "tensors": {"file": file, "sha256": digest}}
    text = json.dumps({**full, "checksum": _checksum(full)}, indent=1)
    _replace(folder / file, payload)
    _replace(folder / f"{name}.json", text.encode())
    for old in _tensor_files(folder, name) - {folder / file}:
        old.unlink(missing_ok=True)


def load(folder, name: str) -> tuple[dict, dict[str, Tensor]]:
    """Read what `save` wrote.

    Raises FileNotFoundError if there is none, and ValueError naming the file and the reason if one
    was truncated, edited or replaced.
    """
    path = Path(folder) / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: nothing was saved under that name")
    try:
        record = json.loads(path.read_bytes())
        checksum, _ = record.pop("checksum"), record["tensors"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): restore it or save again") from error
    if checksum != _checksum(record):
        raise ValueError(f"{path} was edited after it was saved: restore it or save again")
    stored = record.pop("tensors")
    file = path.with_name(Path(stored["file"]).name)
    if not file.is_file():
        raise ValueError(f"{file} is missing, though {path.name} names it")
    payload = file.read_bytes()
    if hashlib.sha256(payload).hexdigest() != stored["sha256"]:
        raise ValueError(f"{file} was truncated or edited: restore it or save again")
    return record, load_tensors(payload)


@contextmanager
def reading(folder):
    """ValueError naming ``folder`` where what `load` gave turns out to be another version's."""
    try:
        yield
    except (TypeError, AttributeError, LookupError, RuntimeError, OverflowError) as error:
        what = f"{folder} holds a record that this version can't read ({error!r})"
        raise ValueError(f"{what}: make it anew") from error


def exists(folder, name: str) -> bool:
    """Whether `save` has completed for ``name``."""
    return (Path(folder) / f"{name}.json").is_file()


def delete(folder, name: str) -> None:
    """Remove what `save` wrote, if it is there."""
    for file in [Path(folder) / f"{name}.json", *_tensor_files(Path(folder), name)]:
        file.unlink(missing_ok=True)


def check_plan(folder, found: dict, wanted: dict) -> None:
    """Raise ValueError unless what lies in ``folder`` is what is to be made."""
    differs = [key for key, value in wanted.items() if found.get(key) != value]
    if differs:
        what = f"{folder} holds work with another {' and '.join(differs)}"
        raise ValueError(f"{what}: choose another folder, or delete this one to start anew")


def load_arrays(path, names) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` file by name; nothing in it is unpickled.

    Raises FileNotFoundError, or ValueError saying what is missing, damaged or pickled.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no {path}: give an .npz with {', '.join(names)}")
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            found = {name: np.asarray(file[name]) for name in names if name in file}
    except Exception as error:  # zip, zlib and headers fail in many ways, each on its own terms
        pickled = "pickle" in str(error).lower()
        why = "holds pickled objects, which are never loaded" if pickled else "is damaged"
        raise ValueError(f"{path} {why}: save plain arrays with np.savez ({error!r})") from error
    if absent := [name for name in names if name not in found]:
        raise ValueError(f"{path} lacks {', '.join(absent)}; it should hold {', '.join(names)}")
    return found


def _checksum(record: dict) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _tensor_files(folder: Path, name: str) -> set[Path]:
    return set(folder.glob(f"{name}-{'?' * 12}.safetensors"))


def _replace(path: Path, payload: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{get_ident()}.part")  # nobody else's
    try:
        with open(temporary, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
