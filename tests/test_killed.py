"""Work that is killed, without any chance to tidy up, resumes bit for bit."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy import small_nets, toy_data

from netspace_lite import (
    Distillation,
    ImageTask,
    NetSpace,
    Recipe,
    SpaceConfig,
    fit,
    train_zoo,
    zoo_training,
)

TASK, RECIPES = ImageTask(toy_data(), 16), [Recipe(seed, 6 - seed) for seed in range(4)]


def work(folder):
    """A zoo and a space, both kept."""
    zoo = train_zoo(small_nets()[0], TASK, RECIPES, folder / "zoo", block=3, progress=False)
    config = SpaceConfig(embedding=4, probes=4, hidden=4, chunk=64)
    space = NetSpace.for_zoos(zoo, TASK.data.train.x, config)
    objective = Distillation(space, zoo, TASK.data.train.x, nets=3, samples=4)
    validate = lambda space: {"score": float(space.encode(zoo).sum())}  # noqa: E731
    history = fit(space, objective, validate, 6, epoch=1, folder=folder / "fit")
    return zoo.rows, space.state_dict(), [row["loss"] for row in history]


SCRIPT = """
import os, signal, sys
from itertools import count
from pathlib import Path
import netspace_lite
sys.path.insert(0, sys.argv[1])
from test_killed import work, zoo_training

_, _, folder, owner, name, at = sys.argv
owner, calls = getattr(netspace_lite, owner), count(1)
method = getattr(owner, name)

def killing(*args):
    if next(calls) == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
    return method(*args)

setattr(owner, name, killing)
zoo_training.CHECKPOINT_SECONDS = 0
work(Path(folder))
"""


@pytest.mark.parametrize(
    ("owner", "name", "at"), [("ImageTask", "batch", 8), ("Distillation", "__call__", 4)]
)
def test_killed_work_resumes_bit_for_bit(owner, name, at, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo_training, "CHECKPOINT_SECONDS", 0)
    here, folder = str(Path(__file__).parent), str(tmp_path / "killed")
    command = [sys.executable, "-c", SCRIPT, here, folder, owner, name, str(at)]
    done = subprocess.run(command, timeout=100, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list((tmp_path / "killed").rglob("*.json"))
    rows, state, losses = work(tmp_path / "whole")
    rows_again, state_again, losses_again = work(tmp_path / "killed")
    assert torch.equal(rows, rows_again)
    assert losses == losses_again
    for name, value in state.items():
        assert torch.equal(value, state_again[name]), name
