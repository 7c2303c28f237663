"""Random damage to files of shapes: they load, or a sentence says why not, in one of two errors."""

import io
import warnings

import numpy as np
import pytest
import trimesh

from netspace_lite.shapes import load_deepsdf, load_mesh, sample_mesh

DAMAGES = 60  # of each kind of file


def mesh_files():
    ball = trimesh.creation.icosphere(1, radius=0.8)
    files = {f"binary.{kind}": ball.export(file_type=kind) for kind in ("obj", "off", "ply", "stl")}
    files["ascii.ply"] = trimesh.exchange.ply.export_ply(ball, encoding="ascii")
    files["ascii.stl"] = ball.export(file_type="stl_ascii")
    return {k: v.encode() if isinstance(v, str) else v for k, v in files.items()}


def archive(save):
    rows = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 50, 4)).astype(np.float32)
    save(buffer := io.BytesIO(), pos=rows[0], neg=rows[1])
    return buffer.getvalue()


FILES = mesh_files() | {"plain.npz": archive(np.savez), "packed.npz": archive(np.savez_compressed)}


def damaged(content, seed):
    """Bytes flipped, zeroed, taken out or repeated, noise put in, or the rest cut off."""
    rng = np.random.default_rng(seed)
    start, length = rng.integers(len(content)), rng.integers(1, 40)
    before, piece, after = np.split(np.frombuffer(content, np.uint8), [start, start + length])
    noise = rng.integers(256, size=length, dtype=np.uint8)
    flipped = np.where(rng.random(len(piece)) < 0.2, noise[: len(piece)], piece)
    inserted = np.concatenate([noise, piece])
    middles = [flipped, 0 * piece, piece[:0], np.tile(piece, 3), inserted, None]
    middle = middles[rng.integers(len(middles))]
    parts = [before] if middle is None else [before, middle, after]
    return np.concatenate(parts).astype(np.uint8).tobytes()


def load(path):
    is_archive = path.suffix == ".npz"
    return load_deepsdf(path, 20) if is_archive else sample_mesh(load_mesh(path)[0], 20)


def loads_or_explains(path):
    """Whether a file loads; any other error than the two fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # holes and dropped rows are told, and no error
        try:
            found, why = load(path), ""
        except (ValueError, FileNotFoundError) as error:
            found, why = None, str(error)
    if found is None:
        assert len(why) > 20  # a sentence
        return False
    assert found.points.isfinite().all()
    assert found.sdf.isfinite().all()
    return True


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_load_or_explain(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    assert loads_or_explains(path)
    found = []
    for seed in range(DAMAGES):
        path.write_bytes(damaged(FILES[name], seed))
        found.append(loads_or_explains(path))
    assert not all(found)


@pytest.mark.parametrize(
    "flags_and_method",
    [b"\x00\x00\x63\x00", b"\x01\x00\x08\x00"],
    ids=["compression", "encryption"],
)
def test_archives_that_python_cannot_open(tmp_path, flags_and_method):
    path = tmp_path / "a.npz"
    path.write_bytes(FILES["packed.npz"].replace(b"\x00\x00\x08\x00", flags_and_method))
    with pytest.raises(ValueError, match="is damaged"):
        load_deepsdf(path)


def test_a_mesh_of_flat_coordinates_is_refused(tmp_path):
    (tmp_path / "a.obj").write_text("v 0 0\nv 1 0\nv 0 1\nf 1 2 3\n")
    with pytest.raises(ValueError, match="or not x, y, z"):
        load_mesh(tmp_path / "a.obj")
