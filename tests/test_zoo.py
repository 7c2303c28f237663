"""Zoos: each net as torch.optim.AdamW would train it alone; your own nets; interruptions."""

import copy
import json
import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from toy import Interrupted, generator, interrupted, mlp, random_nets, toy_data

from netspace_lite import zoo_training
from netspace_lite.architectures import build, describe, lite_net
from netspace_lite.data import load_digits
from netspace_lite.folding import fold_batchnorm
from netspace_lite.layout import Layout
from netspace_lite.nets import Nets
from netspace_lite.zoo import ImageTask, Recipe, Zoo, diverged_at, draw_recipes
from netspace_lite.zoo_training import fine_tune, initial_rows, train_nets, train_zoo

NET = lite_net("LeNetLike", (1, 8, 8), 10)
RECIPES = [
    Recipe(seed=3, steps=7, lr=5e-3, weight_decay=0.1),
    Recipe(seed=1, steps=3, lr=2e-3, weight_decay=1e-3),
    Recipe(seed=9, steps=7, lr=1e-3, weight_decay=0.0),
    Recipe(seed=4, steps=1),
]
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def task():
    return ImageTask(load_digits(), batch=32)


@pytest.fixture(scope="module")
def zoo(task):
    return train_zoo(NET, task, RECIPES, block=3, **QUIET)


def train_alone(recipe, task):
    torch.manual_seed(recipe.seed)
    module = build(describe(NET))
    adamw = torch.optim.AdamW(module.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    losses = []
    for step in range(recipe.steps):
        x, y = task.batch([recipe], torch.tensor([0]), step)
        loss = F.cross_entropy(module(x[0]), y[0])
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        losses.append(loss.item())
    return module, losses


def test_together_is_the_same_as_alone_with_torchs_adamw(zoo, task):
    for n, recipe in enumerate(RECIPES):
        module, losses = train_alone(recipe, task)
        row = zoo.layout.pack([module])[0]
        torch.testing.assert_close(zoo.rows[n], row, rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(
            zoo.losses[n, : recipe.steps], torch.tensor(losses), rtol=1e-3, atol=1e-4
        )
        assert zoo.losses[n, recipe.steps :].isnan().all()


def test_scores_are_those_of_the_plain_modules(zoo, task):
    test = task.data.test
    for n in range(len(zoo)):
        right = (zoo.to_module(n)(test.x).argmax(1) == test.y).float().mean() * 100
        assert zoo.scores["test_accuracy"][n].item() == pytest.approx(right.item(), abs=0.3)


def test_an_epoch_visits_every_image_once(task):
    def batch(step):
        return task.batch([RECIPES[0]], torch.tensor([0]), step)[0][0].flatten(1)

    batches = len(task.data.train) // 32
    seen = torch.cat([batch(step) for step in range(batches)])
    assert len(seen.unique(dim=0)) == len(seen)
    assert not torch.equal(batch(batches), seen[:32])


def test_nets_of_one_seed_start_alike_and_others_do_not():
    rows = initial_rows(NET, [5, 5, 6])
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    torch.manual_seed(5)
    assert torch.equal(rows[0], Layout.of(NET).pack([build(describe(NET))])[0])


def test_modules_that_are_not_registered_are_reset_layer_by_layer():
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    rows = initial_rows(plain, [1, 2, 1])
    assert torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[0], rows[1])
    plain.register_parameter("scale", nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match="no reset_parameters"):
        initial_rows(plain, [1])


def test_a_factory_initialises_what_cannot_be_reset():
    def make():
        net = nn.Linear(4, 3)
        net.register_parameter("scale", nn.Parameter(torch.randn(3)))
        return net

    rows = initial_rows(make, [1, 2])
    for row, seed in zip(rows, (1, 2), strict=True):
        torch.manual_seed(seed)
        assert torch.equal(row, nn.utils.parameters_to_vector(make().parameters()).detach())


def test_initialising_leaves_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    initial_rows(NET, [7])
    assert torch.equal(torch.rand(3), expected)


def test_there_may_be_no_weight_decay():
    assert {recipe.weight_decay for recipe in draw_recipes(9, weight_decay=0)} == {0}
    with pytest.raises(
        ValueError, match=r"a range is \(low, high\) with 0 < low ≤ high, not \(0, 1"
    ):
        draw_recipes(9, weight_decay=(0, 1))


def test_a_schedule_may_be_a_number(task):
    class Constant(ImageTask):
        def schedule(self, progress):
            return 0.5

    class Each(ImageTask):
        def schedule(self, progress):
            return torch.full_like(progress, 0.5)

    one, each = (train_zoo(NET, t(toy_data()), RECIPES, **QUIET) for t in (Constant, Each))
    assert torch.equal(one.rows, each.rows)


def test_a_factory_that_gives_one_start_for_all_is_told(task):
    net = mlp(nn.ReLU(), 64, 5, 10)
    flat = nn.Sequential(nn.Flatten(), net)
    with pytest.warns(UserWarning, match="start from the same values, whatever the seed"):
        train_zoo(lambda: flat, task, draw_recipes(2, steps=2), progress=False)


def test_recipes_are_seeded_and_in_range():
    recipes = draw_recipes(200, seed=1, steps=(2, 50))
    assert recipes == draw_recipes(200, seed=1, steps=(2, 50))
    assert recipes != draw_recipes(200, seed=2, steps=(2, 50))
    steps = [r.steps for r in recipes]
    assert min(steps) >= 2
    assert max(steps) <= 50
    assert sum(s < 10 for s in steps) == pytest.approx(100, abs=30)  # log-uniform: 10 is the middle


def test_the_readmes_zoos_are_still_drawn_alike():
    assert [r.seed for r in draw_recipes(3)] == [1826701615, 1367864807, 1097657232]
    assert [r.steps for r in draw_recipes(3)] == [2, 2, 118]


@pytest.mark.parametrize("at", [2, 6, 8], ids=lambda n: f"batch {n}")
def test_an_interrupted_zoo_resumes_bit_for_bit(zoo, task, at, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo_training, "CHECKPOINT_SECONDS", 0)
    with monkeypatch.context() as patch:
        patch.setattr(ImageTask, "batch", interrupted(ImageTask.batch, at))
        with pytest.raises(Interrupted):
            train_zoo(NET, task, RECIPES, tmp_path, block=3, **QUIET)
    resumed = train_zoo(NET, task, RECIPES, tmp_path, block=3, **QUIET)
    assert torch.equal(resumed.rows, zoo.rows)
    assert torch.equal(resumed.losses.nan_to_num(-1), zoo.losses.nan_to_num(-1))
    assert {f.suffix for f in tmp_path.iterdir()} == {".json", ".safetensors"}
    assert len(list(tmp_path.iterdir())) == 2  # no checkpoint is left behind


def test_a_block_is_scored_once_it_is_trained(zoo, task, tmp_path, monkeypatch):
    """Each call tries the scores before anything is trained."""
    asked, scores = [], ImageTask.scores

    def watched(self, nets, members):
        asked.append(members.tolist())
        return scores(self, nets, members)

    monkeypatch.setattr(ImageTask, "scores", watched)
    with monkeypatch.context() as patch:
        patch.setattr(ImageTask, "batch", interrupted(ImageTask.batch, 8))
        with pytest.raises(Interrupted):
            train_zoo(NET, task, RECIPES, tmp_path, block=3, **QUIET)
    assert asked == [[0, 0], [0, 2, 1]]
    resumed = train_zoo(NET, task, RECIPES, tmp_path, block=3, **QUIET)
    assert asked[2:] == [[0, 0], [3]]
    for name, values in zoo.scores.items():
        assert torch.equal(resumed.scores[name], values)


def test_dropout_and_batch_norm_resume_bit_for_bit_too(tmp_path, monkeypatch):
    """Whatever else draws random numbers in between, and wherever the blocks are cut."""
    monkeypatch.setattr(zoo_training, "CHECKPOINT_SECONDS", 0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(),
        nn.Linear(144, 3),
    )  # fmt: skip
    task, recipes = ImageTask(toy_data(), 16), [Recipe(seed, 4) for seed in range(3)]
    torch.manual_seed(0)
    whole = train_zoo(net, task, recipes, block=2, **QUIET)
    torch.manual_seed(1)
    with monkeypatch.context() as patch:
        patch.setattr(ImageTask, "batch", interrupted(ImageTask.batch, 3))
        with pytest.raises(Interrupted):
            train_zoo(net, task, recipes, tmp_path, block=2, **QUIET)
    torch.manual_seed(2)
    resumed = train_zoo(net, task, recipes, tmp_path, block=2, **QUIET)
    assert torch.equal(resumed.rows, whole.rows)
    assert describe(resumed.module) == describe(fold_batchnorm(net))


def test_a_finished_zoo_is_loaded_and_another_one_refused(task, tmp_path, monkeypatch):
    first = train_zoo(NET, task, RECIPES, tmp_path, **QUIET)
    monkeypatch.setattr(ImageTask, "batch", interrupted(ImageTask.batch, 1))  # nothing is trained
    again = train_zoo(NET, task, RECIPES, tmp_path, **QUIET)
    assert torch.equal(again.rows, first.rows)
    assert again.recipes == RECIPES
    with pytest.raises(ValueError, match="no recipes"):
        train_zoo(NET, task, [])


CHANGES = {
    "recipes": lambda task: (NET, task, RECIPES[:2], {}),
    "seed": lambda task: (NET, task, [Recipe(0, 7), *RECIPES[1:]], {}),
    "images": lambda task: (NET, ImageTask(load_digits(seed=1), 32), RECIPES, {}),
    "batch": lambda task: (NET, ImageTask(task.data, 16), RECIPES, {}),
    "module": lambda task: (lite_net("VanillaCNN", (1, 8, 8), 10), task, RECIPES, {}),
    "block": lambda task: (NET, task, RECIPES, {"block": 2}),
}


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "checkpoint"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_of_another_zoo_is_refused(task, change, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo_training, "CHECKPOINT_SECONDS", 0)
    with monkeypatch.context() as patch:
        if not finished:
            patch.setattr(ImageTask, "batch", interrupted(ImageTask.batch, 3))
            with pytest.raises(Interrupted):
                train_zoo(NET, task, RECIPES, tmp_path, **QUIET)
        else:
            train_zoo(NET, task, RECIPES, tmp_path, **QUIET)
    net, other, recipes, options = CHANGES[change](task)
    with pytest.raises(ValueError, match="choose another folder"):
        train_zoo(net, other, recipes, tmp_path, **options, **QUIET)


@pytest.mark.parametrize("part", [slice(2), [1, 0, 2]], ids=["fewer", "another order"])
def test_a_part_of_a_zoo_is_not_loaded_for_the_whole(task, part, tmp_path):
    """Seen before: two nets for three recipes, without a word."""
    train_zoo(NET, task, RECIPES[:3], **QUIET)[part].save(tmp_path)
    with pytest.raises(ValueError, match="with another recipes: choose another folder"):
        train_zoo(NET, task, RECIPES[:3], tmp_path, **QUIET)


def test_saved_and_loaded_it_is_the_same_zoo(zoo, tmp_path):
    zoo[[2, 0]].save(tmp_path)
    again = Zoo.load(tmp_path)
    assert torch.equal(again.rows, zoo.rows[[2, 0]])
    assert again.recipes == [RECIPES[2], RECIPES[0]]
    assert again.members.tolist() == [2, 0]
    kept = {name: value for name, value in zoo.about.items() if name != "recipes"}
    assert again.about == json.loads(json.dumps(kept))
    assert again.seconds == zoo.seconds > 0
    assert torch.equal(again.losses.nan_to_num(-1), zoo.losses[[2, 0]].nan_to_num(-1))
    torch.testing.assert_close(again.scores["test_accuracy"], zoo.scores["test_accuracy"][[2, 0]])
    assert again.fingerprint == zoo[[2, 0]].fingerprint
    with pytest.raises(ValueError, match="Sequential|module"):
        Zoo.load(tmp_path, nn.Sequential(nn.Linear(2, 2)))


def test_nets_without_a_history_save_and_load(tmp_path):
    nets = random_nets(mlp(nn.ReLU()), 3)
    nets.save(tmp_path)
    again = Zoo.load(tmp_path, mlp(nn.ReLU()))
    assert torch.equal(again.rows, nets.rows)
    assert again.recipes is None
    assert again.losses is None
    assert again.scores == {}
    assert again.members.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="decorate its class"):
        Zoo.load(tmp_path)


class OwnConfig(nn.Module):
    """A module with settings of its own, no JSON values, under the name that ours are kept by."""

    def __init__(self):
        super().__init__()
        self.config, self.layer = SimpleNamespace(width=10), nn.Linear(64, 10)

    def forward(self, x):
        return self.layer(x.flatten(1))


def test_a_module_may_have_a_config_of_its_own(task, tmp_path):
    zoo = Zoo.from_modules([OwnConfig(), OwnConfig()], task)
    zoo.save(tmp_path)
    assert torch.equal(Zoo.load(tmp_path, OwnConfig()).rows, zoo.rows)
    with pytest.raises(ValueError, match="decorate its class"):
        Zoo.load(tmp_path)


def test_members_stay_with_their_nets(zoo):
    parts = zoo.split(1, 1, seed=0)
    assert [len(part) for part in parts] == [2, 1, 1]
    assert sorted(n for part in parts for n in part.members.tolist()) == [0, 1, 2, 3]
    for part in parts:
        assert isinstance(part, Zoo)
        assert torch.equal(part.rows, zoo.rows[part.members])
        assert part.recipes == [RECIPES[n] for n in part.members]
        assert torch.equal(part.scores["val_accuracy"], zoo.scores["val_accuracy"][part.members])
    assert parts[0][-1].members.tolist() == parts[0].members[-1:].tolist()
    with pytest.raises(ValueError, match=r"can't hold out 2 \+ 2 of 4"):
        zoo.split(2, 2)


def test_a_zoo_moves_and_iterates_whole(zoo):
    assert [net.recipes[0] for net in zoo.to("cpu")] == RECIPES


def test_recipes_have_to_be_sorted_for_one_block(task):
    with pytest.raises(ValueError, match="longest first"):
        train_nets(NET, task, RECIPES)


def test_a_schedule_is_asked_for_one_factor_a_net(task):
    seen = []

    class Halving(ImageTask):
        def schedule(self, progress):
            seen.append(progress.tolist())
            return torch.tensor([0.5**p for p in progress.tolist()])

    train_nets(NET, Halving(task.data), [Recipe(0, 4), Recipe(1, 2)])
    assert seen == [[0, 0], [0.25, 0.5], [0.5], [0.75]]


def test_fine_tuning_is_training_from_where_nets_are(zoo, task):
    """Two steps from given weights equal AdamW on the plain module."""
    recipe, before = Recipe(3, 2, 1e-2, 0.1), zoo.rows.clone()
    tuned = fine_tune(zoo[:2], task, [recipe] * 2)
    module = zoo.to_module(1)
    adam = torch.optim.AdamW(module.parameters(), 1e-2, weight_decay=0.1)
    for step in range(2):
        x, y = task.batch([recipe], torch.tensor([1]), step)
        adam.zero_grad()
        F.cross_entropy(module(x[0]), y[0]).backward()
        adam.step()
    torch.testing.assert_close(tuned.rows[1:], tuned.layout.pack([module]), rtol=1e-3, atol=2e-5)
    assert torch.equal(zoo.rows, before)
    with pytest.raises(ValueError, match="4 nets need as many recipes"):
        fine_tune(zoo, task, [recipe])


def test_a_net_that_diverges_is_named_and_left_out(task, tmp_path):
    wild = [*RECIPES[:2], Recipe(5, 6, lr=1e30), RECIPES[3]]
    with pytest.warns(UserWarning, match=r"nets \[2\] are not finite, since steps \[\d\]") as said:
        zoo = train_zoo(NET, task, wild, tmp_path, **QUIET)
    assert len([w for w in said if "step" in str(w.message)]) == 1
    assert zoo.members.tolist() == [0, 1, 3]
    assert zoo.recipes == [wild[0], wild[1], wild[3]]
    assert zoo.finite().all()
    assert all(values.isfinite().all() for values in zoo.scores.values())
    assert torch.equal(Zoo.load(tmp_path).members, zoo.members)
    assert torch.equal(train_zoo(NET, task, wild, tmp_path, **QUIET).rows, zoo.rows)
    with pytest.raises(ValueError, match=r"nets \[1\] diverged at steps \[\d\]"):
        fine_tune(zoo[:2], task, [Recipe(0, 3), Recipe(0, 3, lr=1e30)])
    with pytest.raises(ValueError, match=r"nets \[0\] are not finite.*no net is left"):
        train_zoo(NET, task, [Recipe(5, 6, lr=1e30)], **QUIET)


def test_a_callback_gets_rows_of_numbers(task):
    rows = []
    recipes = [Recipe(seed, 101) for seed in range(3)]
    train_zoo(mlp_images(), task, recipes, block=2, log=rows.append, **QUIET)
    assert {"block", "step", "nets", "loss", "seconds"} <= rows[0].keys()
    assert [(row["block"], row["step"], row["nets"]) for row in rows if row["step"] % 50 == 0] == [
        (0, 50, 2), (0, 100, 2), (1, 50, 1), (1, 100, 1),
    ]  # fmt: skip
    assert all(math.isfinite(row["loss"]) for row in rows)
    json.dumps(rows)  # plain numbers


def mlp_images():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


class Regression:
    """The smallest task: y = x·w, with inputs of each member of the zoo."""

    def __init__(self, slopes):
        self.slopes = slopes

    def batch(self, recipes, members, step):
        seeds = [recipe.seed * 1000 + step for recipe in recipes]
        x = torch.stack([torch.randn(8, 1, generator=generator(seed)) for seed in seeds])
        return x, x * self.slopes[members, None, None]

    def loss(self, outputs, targets):
        return (outputs - targets).square().mean((1, 2))

    def schedule(self, progress):
        return 1 - progress

    def scores(self, nets, members):
        return {"slope": nets.rows[:, 0].cpu(), "wanted": self.slopes[members]}


def test_a_task_of_your_own_finds_its_members():
    task, recipes = Regression(torch.tensor([-2.0, 0.5, 3.0])), [Recipe(0, 200, 0.1, 0.0)] * 3
    zoo = train_zoo(nn.Linear(1, 1), task, recipes, block=2, **QUIET)
    torch.testing.assert_close(zoo.scores["slope"], task.slopes, atol=0.05, rtol=0)
    assert torch.equal(zoo.scores["wanted"], task.slopes)
    longer = [Recipe(0, 1), Recipe(1, 3), Recipe(2, 2)]  # sorted within blocks: members follow
    zoo = train_zoo(nn.Linear(1, 1), task, longer, block=2, **QUIET)
    assert torch.equal(zoo.scores["wanted"], task.slopes)


def batch_normed():
    layers = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 3)
    return nn.Sequential(*layers)


def trained(net, seed):
    net = copy.deepcopy(net)
    torch.manual_seed(seed)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    net(torch.randn(16, 1, 8, 8))  # moves running statistics
    return net.eval()


def test_a_zoo_of_your_own_modules():
    data, modules = toy_data(), [trained(batch_normed(), seed) for seed in range(4)]
    zoo = Zoo.from_modules(modules, ImageTask(data))
    for n, module in enumerate(modules):
        torch.testing.assert_close(
            zoo.outputs(data.test.x)[n], module(data.test.x), rtol=1e-4, atol=1e-4
        )
        right = (module(data.test.x).argmax(1) == data.test.y).float().mean() * 100
        assert zoo.scores["test_accuracy"][n].item() == pytest.approx(right.item(), abs=0.1)
    assert zoo.members.tolist() == [0, 1, 2, 3]
    assert Zoo.from_modules(modules).scores == {}


def test_a_zoo_of_your_own_files(tmp_path):
    modules = [trained(batch_normed(), seed) for seed in range(3)]
    save_file(modules[0].state_dict(), tmp_path / "a.safetensors")
    torch.save(modules[1].state_dict(), tmp_path / "b.pt")
    save_file(modules[2].state_dict(), tmp_path / "c.safetensors")
    x = toy_data().test.x
    expected = torch.stack([module(x) for module in modules])
    zoo = Zoo.from_files(tmp_path, batch_normed(), ImageTask(toy_data()))  # in order of the names
    torch.testing.assert_close(zoo.outputs(x), expected.detach(), rtol=1e-4, atol=1e-4)
    listed = Zoo.from_files([tmp_path / "c.safetensors", str(tmp_path / "b.pt")], batch_normed())
    torch.testing.assert_close(listed.outputs(x), expected[[2, 1]].detach(), rtol=1e-4, atol=1e-4)
    listed.save(tmp_path / "zoo")
    again = Zoo.load(tmp_path / "zoo", listed.module)
    assert torch.equal(again.rows, listed.rows)


class Payload:
    def __reduce__(self):
        return print, ("this code must never run",)


def test_files_that_are_no_nets_are_refused(tmp_path, capsys):
    def refused(name, match, error=ValueError):
        with pytest.raises(error, match=match):
            Zoo.from_files([tmp_path / name], batch_normed())

    refused("nothing.pt", "nothing.pt", FileNotFoundError)
    torch.save(batch_normed(), tmp_path / "module.pt")  # a pickled module, not its state
    refused("module.pt", "module.pt.*holds pickled objects, never loaded")
    torch.save({"weight": Payload()}, tmp_path / "code.pt")
    refused("code.pt", "code.pt")
    assert "never run" not in capsys.readouterr().out
    (tmp_path / "text.safetensors").write_text("hello")
    refused("text.safetensors", "text.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    refused("list.pt", "list.pt")
    torch.save({1: torch.zeros(2)}, tmp_path / "numbers.pt")
    refused("numbers.pt", "numbers.pt")
    save_file(mlp(nn.ReLU()).state_dict(), tmp_path / "other.safetensors")
    refused("other.safetensors", "other.safetensors|net 0")
    state = batch_normed().state_dict()
    del state["1.running_mean"]
    save_file(state, tmp_path / "part.safetensors")
    refused("part.safetensors", "running_mean")
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match="empty"):
        Zoo.from_files(tmp_path / "empty", batch_normed())


def test_modules_that_compute_something_else_are_refused():
    relu, tanh = mlp(nn.ReLU()), mlp(nn.Tanh())
    with pytest.raises(ValueError, match=r"(?s)1"):
        Zoo.from_modules([relu, tanh])
    with pytest.raises(ValueError, match="module|nets"):
        Zoo.from_modules([])


def test_own_nets_that_are_not_finite_are_named_and_left_out():
    modules = [trained(batch_normed(), seed) for seed in range(3)]
    with torch.no_grad():
        modules[1][0].weight[0] = torch.nan
    with pytest.warns(UserWarning, match="1"):
        zoo = Zoo.from_modules(modules, ImageTask(toy_data()))
    assert zoo.members.tolist() == [0, 2]
    assert zoo.finite().all()
    with pytest.raises(ValueError, match="finite"):
        Zoo.from_modules(modules[1:2])


def test_training_on_nets_of_a_given_batched_module(task):
    """`train_nets` goes on from a state, in place, and counts its steps."""
    recipes = [RECIPES[0], RECIPES[2]]
    steps = []
    state = train_nets(NET, task, recipes, on_step=lambda s: steps.append(int(s["step"])))
    assert steps == list(range(1, 8))
    assert state["rows"].shape == (2, Layout.of(NET).size)
    assert state["losses"].shape == (2, 7)
    assert float(state["seconds"]) > 0
    assert Nets(NET, state["rows"]).finite().all()


class Own(nn.Module):
    """Initialised by its class, not by its layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 4)
        nn.init.constant_(self.b.bias, -4.6)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def test_an_initialisation_that_is_lost_is_named():
    with pytest.warns(UserWarning, match=r"Own: b.bias start as .* pass a factory"):
        initial_rows(Own(), [0])
    assert (initial_rows(Own, [0])[0, -4:] == torch.tensor(-4.6)).all()


def test_a_chain_of_layers_is_initialised_as_if_it_were_made():
    def make():
        return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))

    assert torch.equal(initial_rows(make(), [7]), initial_rows(make, [7]))


def test_a_state_that_is_given_stays_as_it_is(task):
    state = {"rows": initial_rows(NET, [0])}
    before = state["rows"].clone()
    first, second = (train_nets(NET, task, RECIPES[:1], state)["rows"] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(state["rows"], before)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"lr": -1e-2}, {"lr": math.nan}])
def test_recipes_that_train_nothing_or_uphill_are_refused(wrong):
    with pytest.raises(ValueError, match="steps are at least 1, rates and decay at least 0"):
        Recipe(**{"seed": 0, "steps": 3} | wrong)


def test_a_range_may_be_one_number():
    assert all(recipe.lr == pytest.approx(1e-3) for recipe in draw_recipes(5, lr=1e-3))


@pytest.mark.parametrize("surrounding", [torch.no_grad, torch.inference_mode])
def test_zoos_are_trained_whatever_the_caller_does(surrounding, task, zoo):
    with surrounding():
        again = train_zoo(NET, task, RECIPES, block=3, **QUIET)
    assert torch.equal(again.rows, zoo.rows)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_checkpoints_of_wrapped_modules_are_read(tmp_path, wrapper):
    net = mlp(nn.ReLU())
    state = {wrapper + name: value for name, value in net.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    zoo = Zoo.from_files(tmp_path, mlp(nn.ReLU()))
    assert torch.equal(zoo.rows, Layout.of(net).pack([net]))


def test_checkpoints_of_quantised_nets_are_refused(tmp_path):
    """Seen before: whole numbers became weights without their scale."""
    state = mlp(nn.ReLU()).state_dict()
    state["2.weight"] = (100 * state["2.weight"]).round().to(torch.int8)
    torch.save(state, tmp_path / "net.th")
    with pytest.raises(ValueError, match=r"net.th is no state dict .*2.weight holds whole numbers"):
        Zoo.from_files(tmp_path, mlp(nn.ReLU()))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inside torch.compile
def test_modules_are_taken_out_of_their_wrappers():
    nets = [mlp(nn.ReLU()) for _ in range(2)]
    zoo = Zoo.from_modules([torch.compile(nets[0]), nn.DataParallel(nets[1])])
    assert torch.equal(zoo.rows, Layout.of(nets[0]).pack(nets))
    assert zoo.batched.fingerprint == Zoo.from_modules(nets).batched.fingerprint


def test_loading_leaves_the_callers_random_numbers(tmp_path, zoo):
    zoo.save(tmp_path)
    before = torch.get_rng_state()
    Zoo.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_threads_draw_as_one_alone():
    expected = initial_rows(NET, range(12))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: initial_rows(NET, range(12)), range(8)))
    assert all(torch.equal(rows, expected) for rows in found)


def test_zoos_trained_in_threads_are_those_trained_alone(task):
    """Seen before: what one thread's training drew came into what another's nets began with."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, 10))
    recipes = draw_recipes(6, steps=(2, 30))
    expected = train_zoo(net, task, recipes, **QUIET).rows
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: train_zoo(net, task, recipes, **QUIET).rows, range(6)))
    assert all(torch.equal(rows, expected) for rows in found)


def test_a_batch_of_no_images_is_refused():
    with pytest.raises(ValueError, match="a batch is at least one image, not 0"):
        ImageTask(toy_data(), 0)


def test_compiled_modules_are_the_modules_themselves(task, tmp_path):
    """Seen before: the second, same call could not read what the first had written."""
    for _ in range(2):
        zoo = train_zoo(torch.compile(NET), task, RECIPES, tmp_path, **QUIET)
    assert torch.equal(zoo.rows, train_zoo(NET, task, RECIPES, tmp_path, **QUIET).rows)
    made = train_zoo(lambda: torch.compile(build(describe(NET))), task, RECIPES[:1], **QUIET)
    assert made.batched.fingerprint == zoo.batched.fingerprint
    assert len(Zoo.load(tmp_path, torch.compile(NET))) == len(RECIPES)


def test_a_class_is_no_module(zoo, tmp_path):
    """Seen before: "make it anew" was said of a sound zoo."""
    zoo.save(tmp_path)
    for call in (
        lambda: Zoo.load(tmp_path, type(NET)),
        lambda: Zoo.from_modules([type(NET)]),
        lambda: Nets(type(NET), zoo.rows),
    ):
        with pytest.raises(ValueError, match="LeNetLike'> is no module: make one"):
            call()


class Migrates(nn.Linear):
    """Files of its first version held weights of half the size."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        if metadata.get("version", 1) < 2:
            state[f"{prefix}weight"] = 2 * state[f"{prefix}weight"]
        super()._load_from_state_dict(state, prefix, metadata, *rest)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_versions_of_checkpoints_are_kept(prefix, tmp_path):
    """Seen before: every file was taken for one of the first version."""
    net = nn.Sequential(nn.Flatten(), Migrates(4, 3))
    saved = nn.ModuleDict({"module": net}) if prefix else net
    torch.save(saved.state_dict(), tmp_path / "net.pt")
    read = Zoo.from_files(tmp_path / "net.pt", net)  # a file by itself
    assert torch.equal(read.rows[0], nn.utils.parameters_to_vector(net.parameters()).detach())


def test_scores_in_double_precision_are_the_same_when_loaded(tmp_path):
    class Doubles(ImageTask):
        def scores(self, nets, members):
            return {"val_accuracy": nets.rows.double().std(1) / 3}

    task = Doubles(load_digits(), 32)
    first, again = (train_zoo(NET, task, RECIPES, tmp_path, **QUIET) for _ in range(2))
    assert torch.equal(first.scores["val_accuracy"], again.scores["val_accuracy"])
    assert first.fingerprint == again.fingerprint


def test_seeds_may_be_as_large_as_they_come(task):
    zoo = train_zoo(NET, task, [Recipe(2**60, 1), Recipe(2**60 + 1, 1)], **QUIET)
    assert (zoo.rows[0] != zoo.rows[1]).any()


def test_files_are_in_the_order_of_their_numbers(tmp_path):
    """Seen before: net-10 came before net-2, and one's own list of them was of other nets."""
    nets = random_nets(nn.Linear(4, 2), 12)
    for n in range(len(nets)):
        nets.export(tmp_path / f"net-{n}.safetensors", n)
    assert torch.equal(Zoo.from_files(tmp_path, nn.Linear(4, 2)).rows, nets.rows)


def test_exported_nets_of_norms_go_back_into_the_module_they_were_made_of(tmp_path):
    def make():
        return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 4))

    zoo = Zoo.from_modules([make()])
    zoo.export(tmp_path / "net.safetensors")
    assert torch.equal(Zoo.from_files(tmp_path, make()).rows, zoo.rows)


def test_what_is_pickled_in_a_checkpoint_is_named(tmp_path):
    torch.save({"model": NET.state_dict(), "args": SimpleNamespace(lr=1)}, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"loaded \(types.SimpleNamespace\): save its state dict"):
        Zoo.from_files(tmp_path, NET)


def test_a_state_dict_for_a_module_is_not_printed():
    with pytest.raises(ValueError, match="^a OrderedDict is no module") as error:
        Zoo.from_modules([NET.state_dict()])
    assert len(str(error.value)) < 100


def test_a_task_that_changes_as_it_scores_is_known_by_what_it_was(tmp_path):
    class Counts(ImageTask):
        scored = 0

        def scores(self, nets, members):
            self.scored += 1
            return super().scores(nets, members)

    zoo = train_zoo(NET, Counts(load_digits(), 32), RECIPES, tmp_path, **QUIET)
    again = train_zoo(NET, Counts(load_digits(), 32), RECIPES, tmp_path, **QUIET)
    assert torch.equal(again.rows, zoo.rows)


def test_no_two_seeds_see_the_same_order_in_other_epochs(task):
    batches = len(task.data.train) // 32
    orders = [
        tuple(task.batch([Recipe(seed, 99)], torch.tensor([0]), epoch * batches)[1][0].tolist())
        for seed in range(4)
        for epoch in range(4)
    ]
    assert len(set(orders)) == 16


def test_a_batch_is_at_most_all_images():
    task = ImageTask(toy_data(), 1000)
    for step in (0, 1):
        x, y = task.batch(RECIPES[:2], torch.arange(2), step)
        assert x.shape == (2, 120, 1, 8, 8)
        assert y.sort(1).values.tolist() == [task.data.train.y.tolist()] * 2


def test_the_fingerprint_of_a_zoo_knows_scores_and_members():
    nets = random_nets(mlp(nn.ReLU()), 3)
    zoos = [
        Zoo(nets.batched, nets.rows, {"val_accuracy": torch.tensor(scores)}, members=members)
        for scores, members in (
            ([1.0, 2, 3], None), ([1.0, 2, 3], [0, 1, 2]), ([1.0, 2, 4], None),
            ([1.0, 2, 3], [2, 1, 0]),
        )
    ]  # fmt: skip
    assert zoos[0].fingerprint == zoos[1].fingerprint
    assert len({zoo.fingerprint for zoo in zoos}) == 3


def test_a_net_diverged_at_the_first_loss_that_was_not_finite():
    losses = torch.tensor([[1, math.nan, 1, math.inf], [1, 1, 1, 1], [math.nan, 1, 1, 1]])
    assert diverged_at(losses) == [1, 4, 0]


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net"])
def test_checkpoints_under_any_usual_key_are_read(tmp_path, key):
    net = mlp(nn.ReLU())
    torch.save({key: net.state_dict(), "epoch": 3}, tmp_path / "last.pt")
    assert torch.equal(Zoo.from_files(tmp_path, net).rows, Layout.of(net).pack([net]))


def test_checkpoints_of_averaged_weights_are_read(tmp_path):
    net = mlp(nn.ReLU())
    torch.save(AveragedModel(net).state_dict(), tmp_path / "average.pt")
    assert torch.equal(Zoo.from_files(tmp_path, net).rows, Layout.of(net).pack([net]))


def test_recipes_are_drawn_log_uniformly_from_the_usual_ranges():
    recipes = draw_recipes(2000)
    usual = {"steps": (2, 300), "lr": (2e-3, 8e-3), "weight_decay": (1e-3, 1e-1)}
    for name, (low, high) in usual.items():
        values = sorted(getattr(recipe, name) for recipe in recipes)
        assert low <= values[0] < 1.1 * low
        assert 0.9 * high < values[-1] <= high
        assert values[1000] == pytest.approx((low * high) ** 0.5, rel=0.15)
    assert Recipe(0, 1) == Recipe(0, 1, lr=3e-3, weight_decay=1e-2)
