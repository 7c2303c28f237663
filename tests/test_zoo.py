"""Zoos: each net as torch.optim.AdamW would train it alone; interruption, resumption, damage."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from netspace_lite import zoo as zoo_module
from netspace_lite.architectures import build, describe, lite_net
from netspace_lite.data import load_digits
from netspace_lite.layout import Layout
from netspace_lite.zoo import (
    ImageTask,
    Recipe,
    Zoo,
    draw_recipes,
    initial_rows,
    train_nets,
    train_zoo,
)

NET = lite_net("LeNetLike", (1, 8, 8), 10)
RECIPES = [
    Recipe(seed=3, steps=7, lr=5e-3, weight_decay=0.1),
    Recipe(seed=1, steps=3, lr=2e-3, weight_decay=1e-3),
    Recipe(seed=9, steps=7, lr=1e-3, weight_decay=0.0),
    Recipe(seed=4, steps=1),
]


@pytest.fixture(scope="module")
def task():
    return ImageTask(load_digits(), batch=32)


def train_alone(recipe, task):
    torch.manual_seed(recipe.seed)
    module = build(describe(NET))
    adamw = torch.optim.AdamW(module.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    losses = []
    for step in range(recipe.steps):
        x, y = task.batch([recipe], step)
        loss = F.cross_entropy(module(x[0]), y[0])
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        losses.append(loss.item())
    return module, losses


def test_together_is_the_same_as_alone_with_torchs_adamw(task):
    zoo = train_zoo(NET, task, RECIPES, block=3, progress=False)
    for n, recipe in enumerate(RECIPES):
        module, losses = train_alone(recipe, task)
        row = zoo.layout.pack([module])[0]
        torch.testing.assert_close(zoo.rows[n], row, rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(
            zoo.losses[n, : recipe.steps], torch.tensor(losses), rtol=1e-3, atol=1e-4
        )
        assert zoo.losses[n, recipe.steps :].isnan().all()


def test_scores_are_those_of_the_plain_modules(task):
    zoo = train_zoo(NET, task, RECIPES, progress=False)
    test = task.data.test
    for n in range(len(zoo)):
        right = (zoo.to_module(n)(test.x).argmax(1) == test.y).float().mean() * 100
        assert zoo.scores["test_accuracy"][n].item() == pytest.approx(right.item(), abs=0.3)


def test_an_epoch_visits_every_image_once(task):
    batches = len(task.data.train) // 32
    seen = torch.cat([task.batch([RECIPES[0]], step)[0][0].flatten(1) for step in range(batches)])
    assert len(seen.unique(dim=0)) == len(seen)
    again = task.batch([RECIPES[0]], batches)[0]
    assert not torch.equal(again[0].flatten(1), seen[:32])


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


def test_recipes_are_seeded_and_in_range():
    recipes = draw_recipes(200, seed=1, steps=(2, 50))
    assert recipes == draw_recipes(200, seed=1, steps=(2, 50))
    assert recipes != draw_recipes(200, seed=2, steps=(2, 50))
    steps = [r.steps for r in recipes]
    assert min(steps) >= 2
    assert max(steps) <= 50
    assert sum(s < 10 for s in steps) == pytest.approx(100, abs=30)  # log-uniform: 10 is the middle


class Interrupted(Exception):
    pass


def interrupting(task, at):
    """The task, raising in its ``at``-th batch, as Ctrl-C would."""
    count = 0

    class Task(ImageTask):
        def batch(self, recipes, step):
            nonlocal count
            count += 1
            if count == at:
                raise Interrupted
            return super().batch(recipes, step)

    return Task(task.data, task.batch_size)


@pytest.mark.parametrize("at", [2, 6, 9], ids=lambda n: f"batch {n}")
def test_an_interrupted_zoo_resumes_bit_for_bit(task, at, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo_module, "CHECKPOINT_SECONDS", 0)
    whole = train_zoo(NET, task, RECIPES, block=2, progress=False)
    with pytest.raises(Interrupted):
        train_zoo(NET, interrupting(task, at), RECIPES, tmp_path, block=2, progress=False)
    resumed = train_zoo(NET, task, RECIPES, tmp_path, block=2, progress=False)
    assert torch.equal(resumed.rows, whole.rows)
    assert torch.equal(resumed.losses.nan_to_num(-1), whole.losses.nan_to_num(-1))
    assert {f.suffix for f in tmp_path.iterdir()} == {".json", ".safetensors"}
    assert len(list(tmp_path.iterdir())) == 2  # no checkpoint is left behind


def test_a_finished_zoo_is_loaded_and_another_one_refused(task, tmp_path):
    first = train_zoo(NET, task, RECIPES, tmp_path, progress=False)
    broken = interrupting(task, 1)  # would raise if it trained anything
    assert torch.equal(train_zoo(NET, broken, RECIPES, tmp_path, progress=False).rows, first.rows)
    with pytest.raises(ValueError, match="another nets: choose another folder"):
        train_zoo(NET, task, RECIPES[:2], tmp_path, progress=False)
    with pytest.raises(ValueError, match="no recipes"):
        train_zoo(NET, task, [])


def test_saved_and_loaded_it_is_the_same_zoo(task, tmp_path):
    zoo = train_zoo(NET, task, RECIPES, progress=False)
    zoo.save(tmp_path)
    again = Zoo.load(tmp_path)
    assert torch.equal(again.rows, zoo.rows)
    assert again.recipes == zoo.recipes
    assert again.task == json.loads(json.dumps(zoo.task))
    torch.testing.assert_close(again.scores["test_accuracy"], zoo.scores["test_accuracy"])
    with pytest.raises(ValueError, match="pass the module they were made of"):
        Zoo.load(tmp_path, nn.Sequential(nn.Linear(2, 2)))


def test_zoos_split_into_disjoint_parts(task):
    zoo = train_zoo(NET, task, RECIPES, progress=False)
    parts = zoo.split(1, 1, seed=0)
    assert [len(part) for part in parts] == [2, 1, 1]
    assert {r.seed for part in parts for r in part.recipes} == {r.seed for r in RECIPES}
    with pytest.raises(ValueError, match="can't hold out 2 \\+ 2 of 4"):
        zoo.split(2, 2)


def test_recipes_have_to_be_sorted_for_one_block(task):
    with pytest.raises(ValueError, match="longest first"):
        train_nets(NET, task, RECIPES)
