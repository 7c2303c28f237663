"""Two processes: one zoo bit for bit, one fit within rounding, also when one of them is killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from torch import nn
from toy import small_nets, toy_data

from netspace_lite import (
    ArchitectureClassification,
    Distillation,
    Images,
    ImageTask,
    Nets,
    NetSpace,
    SpaceConfig,
    Zoo,
    combine,
    draw_recipes,
    fit,
    processes,
    scores,
    store,
    train,
    train_zoo,
    zoo_training,
)
from netspace_lite.processes import portion, rank, share, together

HERE = Path(__file__)
DATA = toy_data()
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def work(folder):
    """Two zoos and their space, kept in the folder: zoos, state of the space, history.

    The space is fitted in fp64: Muon magnifies rounding along directions that gradients hardly
    have, and what else two processes might do differently is to be seen.
    """
    zoos = []
    for name, net in zip(("small", "large"), small_nets(), strict=False):
        recipes = draw_recipes(8, steps=(2, 12), stream=name)
        zoos.append(
            train_zoo(net, ImageTask(DATA, 16), recipes, folder / name, block=3, progress=False)
        )
    config = SpaceConfig(embedding=4, probes=4, hidden=4, chunk=64)
    nets, x = [Nets(zoo.batched, zoo.rows.double()) for zoo in zoos], DATA.train.x.double()
    space = NetSpace.for_zoos(nets, x, config)
    likeness = Distillation(space, nets, x, nets=4, samples=8)
    objective = combine(likeness, ArchitectureClassification(space, nets, nets=5, translated=True))
    images = Images(DATA.val.x.double(), DATA.val.y)
    validate = lambda space: scores(space, nets[0], images)  # noqa: E731
    history = fit(space, objective, validate, 8, epoch=2, folder=folder)
    return zoos, space.state_dict(), history


def run(folder, *options, **more):
    done = subprocess.run(
        [*TORCHRUN, *options], cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"} | more,
        timeout=100, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As torchrun gives each process; another number of threads rounds otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return work(tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What two processes leave in a folder."""
    folder = tmp_path_factory.mktemp("pair")
    run(folder, str(HERE), "whole")
    return folder


def loaded(folder, monkeypatch):
    """The work in a folder, of which nothing is left to do."""
    with monkeypatch.context() as patch:
        patch.setattr(ImageTask, "batch", None)
        patch.setattr(Distillation, "__call__", None)
        return work(folder)


def assert_same_zoos(one, other):
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.rows, b.rows)
        assert torch.equal(a.losses.nan_to_num(-1), b.losses.nan_to_num(-1))
        assert torch.equal(a.scores["test_accuracy"], b.scores["test_accuracy"])
        assert torch.equal(a.members, b.members)


def test_two_processes_train_the_zoo_of_one_bit_for_bit(alone, pair, monkeypatch):
    zoos, *_ = loaded(pair, monkeypatch)
    assert_same_zoos(alone[0], zoos)
    seen = [json.loads((pair / f"seen-{n}.json").read_text()) for n in range(2)]
    trained, scored = ([of[key] for of in seen] for key in ("batches", "scored"))
    longest = [max(recipe.steps for recipe in zoo.recipes) for zoo in zoos]
    assert all(sum(longest) / 2 < steps < 4 * sum(longest) for steps in trained)  # neither idles
    assert all(len(nets) >= 3 for nets in scored)  # a block, by whoever trained it
    assert sorted([*scored[0], *scored[1]]) == sorted(2 * [*range(8)])  # each net once
    assert not list(pair.rglob("block-*"))


def test_two_processes_fit_the_space_of_one_within_rounding(alone, pair, monkeypatch):
    _, state, history = loaded(pair, monkeypatch)
    for name, value in alone[1].items():
        torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-9, msg=name)
    for row, wanted in zip(history, alone[2], strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-9)
    for n in range(2):  # each decodes half of the nets
        assert json.loads((pair / f"seen-{n}.json").read_text())["decoded"] == [2] * 8


def test_killed_processes_are_started_again_and_leave_the_same(pair, tmp_path, monkeypatch):
    run(tmp_path, "--max-restarts=2", str(HERE), "killed")
    assert sorted(path.name for path in tmp_path.glob("killed-*")) == ["killed-0", "killed-1"]
    one, other = loaded(pair, monkeypatch), loaded(tmp_path, monkeypatch)
    assert_same_zoos(one[0], other[0])
    assert [row["loss"] for row in one[2]] == [row["loss"] for row in other[2]]
    for name, value in one[1].items():
        assert torch.equal(other[1][name], value), name


def killing(method, attempt, victim, at):
    """``method``, in whose call number ``at`` one process is gone, once."""
    calls = 0

    def call(*args):
        nonlocal calls
        calls += 1
        now = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        if (now, rank(), calls) == (attempt, victim, at):
            Path(f"killed-{attempt}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*args)

    return call


def main(kind):
    """What each process that the tests start does."""
    zoo_training.CHECKPOINT_SECONDS, batches, scored, decoded = 0, [], [], []
    batch, score, decode = ImageTask.batch, ImageTask.scores, NetSpace.decode
    ImageTask.batch = lambda *args: batches.append(args[-1]) or batch(*args)
    ImageTask.scores = lambda *args: scored.append(args[-1].tolist()) or score(*args)
    NetSpace.decode = lambda space, z, a: decoded.append(len(z)) or decode(space, z, a)
    with together():
        if kind == "killed":
            ImageTask.batch = killing(ImageTask.batch, 0, 1, 9)
            Distillation.__call__ = killing(Distillation.__call__, 1, 0, 6)
        work(Path.cwd())
        seen = {"batches": len(batches), "decoded": [n for n in decoded if n < 8]}  # 8: validation
        seen["scored"] = [n for nets in scored if nets != [0, 0] for n in nets]  # a try
        Path(f"seen-{rank()}.json").write_text(json.dumps(seen))


class TestAlone:
    """The pieces, in one process or one that believes to be one of several."""

    @pytest.fixture
    def three(self, monkeypatch):
        """This is process 1 of three."""
        monkeypatch.setattr(processes, "world", lambda: 3)
        monkeypatch.setattr(processes, "rank", lambda: 1)

    def test_one_process_has_all_the_work(self):
        assert portion([5, 1, 1]) == [0, 1, 2]
        assert torch.equal(share(torch.arange(5)), torch.arange(5))

    @pytest.mark.usefixtures("three")
    def test_jobs_go_to_whoever_has_least_to_do(self):
        assert portion([10, 6, 5, 4, 4, 1]) == [1, 4]  # the others: 10, 1 and 5, 4

    @pytest.mark.usefixtures("three")
    def test_nets_are_shared_where_all_get_as_many(self):
        assert share(torch.arange(6)).tolist() == [1, 4]
        assert share(torch.arange(7)).tolist() == list(range(7))

    @pytest.mark.parametrize("loss", [torch.ones(1), torch.ones((), dtype=torch.double)], ids=str)
    def test_losses_of_other_shapes_and_precisions_are_averaged(self, loss, monkeypatch):
        monkeypatch.setattr(processes, "world", lambda: 2)
        monkeypatch.setattr(processes.dist, "all_reduce", lambda flat: flat.mul_(2))
        p = nn.Parameter(torch.zeros(3))
        p.grad = torch.full((3,), 5.0)
        assert processes.average(loss, [p]) == 1
        assert torch.equal(p.grad, torch.full((3,), 5.0))

    def test_several_processes_need_a_folder(self, monkeypatch):
        monkeypatch.setattr(zoo_training, "world", lambda: 2)
        with pytest.raises(ValueError, match="no folder: several processes"):
            train_zoo(small_nets()[0], ImageTask(DATA, 16), draw_recipes(2))


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").touch()
    for name, value in {"SEED": "0", "PRESET": "smoke", "DATA": ""}.items():
        monkeypatch.setenv(f"NETSPACE_{name}", value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_trains_once_what_notebooks_load(checkout, monkeypatch, capsys):
    run(checkout, "-m", "netspace_lite.train", "single")
    monkeypatch.setattr(ImageTask, "batch", None)
    monkeypatch.setattr(Distillation, "__call__", None)
    train.main(["single"])
    said = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("['LeNetLike']: step 40") for line in said) == 2
    build = checkout / "build" / "smoke-digits-seed0"
    for folder, name in (("zoo", "zoo"), ("space", "fit"), ("space-blind", "fit")):
        assert store.exists(build / folder, name)
    assert len(Zoo.load(build / "zoo")) == 48


def test_the_command_trains_the_zoos_alone(checkout, monkeypatch):
    run(checkout, "-m", "netspace_lite.train", "zoos")
    build = checkout / "build" / "smoke-digits-seed0"
    names = "zoo", *(f"mixed/{name}" for name in ("LeNetLike", "VanillaCNN", "ResNet8", "ResNet14"))
    assert {p.parent for p in build.rglob("zoo.json")} == {build / name for name in names}
    assert not list(build.rglob("fit.json"))
    monkeypatch.setattr(ImageTask, "batch", None)
    train.main(["zoos"])  # loads them


def test_the_shapes_notebook_loads_what_the_command_trained(checkout, monkeypatch):
    train.main(["shapes"])
    monkeypatch.setattr("netspace_lite.shapes.ShapeTask.batch", None)
    monkeypatch.setattr(Distillation, "__call__", None)
    (path,) = (HERE.parents[1] / "notebooks").glob("*_implicit_shapes.ipynb")
    code = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    needed = ("import ", "draw_chairs(", "sample_chairs(", "Siren(", "ShapeTask(", "train_zoo(")
    needed += ("Distillation(", "fit(")
    names = {"__name__": "__main__"}
    for source in code:
        if any(word in source for word in needed) and "races" not in source:
            exec(source, names)
        if ".fit(" in source:
            break
    assert len(names["history"]) == 2


def test_bad_arguments_are_refused_in_a_sentence(checkout, monkeypatch, capsys):
    for arguments, preset, said in (
        (["everything"], "smoke", "invalid choice: 'everything'"),
        ([], "smoke", "required: what"),
        (["single"], "tiny", "NETSPACE_PRESET should be"),
    ):
        monkeypatch.setenv("NETSPACE_PRESET", preset)
        with pytest.raises(SystemExit):
            train.main(arguments)
        assert said in capsys.readouterr().err


if __name__ == "__main__":
    main(sys.argv[1])
