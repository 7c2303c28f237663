"""Shape nets: their training task, their space, scans of them and search through them."""

import math

import pytest
import torch

from netspace_lite.architectures import Siren
from netspace_lite.chairs import chair_parts, chair_sdf, draw_chairs
from netspace_lite.explore import Gaussian, optimise, optimise_weights
from netspace_lite.functional import Nets
from netspace_lite.layout import Layout
from netspace_lite.shape_nets import (
    OnScan,
    ShapeTask,
    agreement,
    level_off,
    meshes,
    scan,
    shape_recipes,
    squared_error,
)
from netspace_lite.shapes import Samples, sample_chairs
from netspace_lite.space import NetSpace, SpaceConfig
from netspace_lite.training import InstanceDistillation, fit, refine
from netspace_lite.zoo import Zoo, train_nets, train_zoo

SMALL = Siren(hidden=16, omega=15.0)


@pytest.fixture(scope="module")
def samples():
    return sample_chairs(draw_chairs(4), 1024)


@pytest.fixture(scope="module")
def zoo(samples):
    recipes = shape_recipes(4, steps=100)
    return train_zoo(SMALL, ShapeTask(samples, recipes, 128), recipes, progress=False)


@pytest.fixture
def space(zoo, samples):
    config = SpaceConfig(embedding=8, probes=32, weights=False, hidden=16)
    return NetSpace.for_zoos(zoo, samples.points.flatten(0, 1), config)


class Ball:
    """Stands in for N nets: exact distances to spheres of some radii about the origin."""

    def __init__(self, *radii):
        self.radii = torch.tensor(radii)[:, None, None]

    def __len__(self):
        return len(self.radii)

    def __call__(self, points, per_net=False):
        return points.norm(dim=-1, keepdim=True) - self.radii


class LevelBall(Ball):
    """The same, levelling off at 0.2."""

    def __call__(self, points, per_net=False):
        return 0.2 * torch.tanh(super().__call__(points) / 0.2)


# The task.


def test_a_batch_is_half_inside_and_half_outside_of_each_nets_own_shape(samples):
    recipes = shape_recipes(4, seed=3)
    task = ShapeTask(samples, recipes, batch=32)
    points, sdf = task.batch([recipes[2], recipes[0]], step=5)  # any order, any subset
    assert points.shape == (2, 32, 3)
    assert sdf.shape == (2, 32)
    assert (sdf[:, :16] < 0).all()
    assert (sdf[:, 16:] >= 0).all()
    parts = chair_parts([draw_chairs(4)[n] for n in (2, 0)])
    torch.testing.assert_close(chair_sdf(parts, points), sdf)


def test_an_epoch_sees_every_sample_once(samples):
    recipes = shape_recipes(4)
    task = ShapeTask(samples, recipes, batch=256)
    seen = torch.cat([task.batch(recipes, step)[1] for step in range(4)], dim=1)
    assert torch.equal(seen.sort(1).values, samples.sdf.sort(1).values)


def test_batches_depend_on_seed_and_step_only(samples):
    recipes = shape_recipes(4)
    first, second = (ShapeTask(samples, recipes, batch=32) for _ in range(2))
    first.batch(recipes, 0)
    assert torch.equal(first.batch(recipes, 40)[0], second.batch(recipes[:], 40)[0])


def test_the_learning_rate_rises_then_falls_to_zero_with_half_a_cosine(samples):
    task = ShapeTask(samples, shape_recipes(4))
    factors = task.schedule(torch.tensor([0.0, 0.05, 0.5, 1.0]))
    expected = torch.tensor([0.02, 0.52 * 0.993844, 0.5, 0.0])
    torch.testing.assert_close(factors, expected, atol=1e-6, rtol=0)


def test_distances_level_off_far_away_only(samples):
    near = samples.sdf.abs() <= 0.05
    found = level_off(samples, 0.2)
    assert found.points is samples.points
    assert torch.equal(found.sdf.sign(), samples.sdf.sign())
    assert ((found.sdf - samples.sdf).abs()[near] <= 0.021 * samples.sdf.abs()[near]).all()
    assert 0.19 < found.sdf.max() < 0.2 < samples.sdf.max()
    assert level_off(samples, math.inf) is samples
    with pytest.raises(ValueError, match="positive distance, not 0"):
        level_off(samples, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipes": shape_recipes(3)}, "4 shapes need as many recipes"),
        ({"recipes": shape_recipes(2) * 2}, "2 seeds"),
        ({"batch": 33}, "even number from 2 to 1024, not 33"),
        ({"batch": 2048}, "even number from 2 to 1024, not 2048"),
        ({"test": Samples(torch.zeros(1, 2, 3), torch.zeros(1, 2))}, "test samples of 1 shapes"),
    ],
)
def test_a_task_says_what_does_not_fit(samples, arguments, message):
    with pytest.raises(ValueError, match=message):
        ShapeTask(**{"samples": samples, "recipes": shape_recipes(4), "batch": 32, **arguments})


# The zoo.


def test_nets_learn_their_shapes(zoo, samples):
    assert (zoo.losses[:, -10:].mean(1) < zoo.losses[:, :10].mean(1) / 5).all()
    wrong = ShapeTask(Samples(samples.points, samples.sdf.roll(1, 0)), zoo.recipes).scores(zoo)
    assert (zoo.scores["error"] < 0.04).all()
    assert (zoo.scores["error"] < wrong["error"]).all()


def test_together_is_one_at_a_time(samples):
    recipes = shape_recipes(4, steps=8)
    task = ShapeTask(samples, recipes, 64)
    together = train_nets(SMALL, task, recipes)["rows"]
    alone = torch.cat([train_nets(SMALL, task, [recipe])["rows"] for recipe in recipes])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


def test_scores_of_a_known_error(zoo, samples):
    shifted = Samples(samples.points, zoo.outputs(samples.points, per_net=True)[..., 0] + 0.005)
    scores = ShapeTask(samples, zoo.recipes, test=shifted).scores(zoo)
    torch.testing.assert_close(scores["error"], torch.full((4,), 0.005), rtol=1e-3, atol=0)
    assert (scores["within_001"] == 100).all()


def test_a_zoo_of_other_shapes_is_refused(tmp_path, samples):
    recipes = shape_recipes(4, steps=2)
    first = train_zoo(SMALL, ShapeTask(samples, recipes), recipes, tmp_path, progress=False)
    again = train_zoo(SMALL, ShapeTask(samples, recipes), recipes, tmp_path, progress=False)
    assert torch.equal(first.rows, again.rows)
    assert Zoo.load(tmp_path).module.config == {"hidden": 16, "omega": 15.0}
    other = ShapeTask(sample_chairs(draw_chairs(4, seed=1), 1024), recipes)
    with pytest.raises(ValueError, match="another task"):
        train_zoo(SMALL, other, recipes, tmp_path, progress=False)


# The space.


def test_squared_error_is_in_hundredths():
    outputs = torch.tensor([[[0.0], [0.0]], [[0.01], [0.03]]])
    loss = squared_error(outputs, torch.zeros(2, 2, 1))
    torch.testing.assert_close(loss, torch.tensor([0.0, 5.0]))


def test_agreement_counts_points_within_a_hundredth(zoo, space, samples):
    with torch.no_grad():  # a decoder that always gives the first net
        space.decoder.heads[0].weight.zero_()
        space.decoder.bias[0].copy_(zoo.rows[0])
    found = agreement(space, zoo, samples.points)
    assert found[0] == 100
    assert (found[1:] < 70).all()
    distance = zoo.outputs(samples.points[0])[..., 0]
    expected = ((distance - distance[0]).abs() <= 0.01).float().mean(1) * 100
    torch.testing.assert_close(agreement(space, zoo, samples.points[0]), expected)


def test_the_space_of_classifiers_is_the_space_of_shapes(zoo, space, samples):
    objective = InstanceDistillation(
        space, zoo, samples.points, per_net=True, loss=squared_error, nets=4, samples=64
    )
    before = objective(space, torch.Generator().manual_seed(0)).item()
    history = fit(
        space, objective, lambda s: {"within": float(agreement(s, zoo, samples.points).mean())},
        150, epoch=50, progress=False,
    )  # fmt: skip
    assert objective(space, torch.Generator().manual_seed(0)).item() < before / 4
    assert [row["step"] for row in history] == [50, 100, 150]


def test_embeddings_of_shapes_are_refined_on_their_own_points(zoo, space, samples):
    def loss(z):
        return squared_error(space.decode(z)(samples.points, per_net=True), answers).detach()

    answers = zoo.outputs(samples.points, per_net=True)
    torch.nn.init.normal_(space.decoder.heads[0].weight, std=0.02)
    z = refine(space, zoo, samples.points, per_net=True, loss=squared_error, lr=0.02)
    assert (loss(z) < loss(space.encode(zoo))).sum() >= 3
    assert loss(z).mean() < loss(space.encode(zoo)).mean()


def test_the_papers_size_trains_a_step(samples):
    net = Siren()
    assert Layout.of(net).size == 67_073
    recipes = shape_recipes(4, steps=1)
    zoo = train_zoo(net, ShapeTask(samples, recipes, 1024), recipes, block=4, progress=False)
    config = SpaceConfig(weights=True, chunk=10_000, embedding=64, probes=32, hidden=16)
    space = NetSpace.for_zoos(zoo, samples.points.flatten(0, 1), config)
    objective = InstanceDistillation(
        space, zoo, samples.points, per_net=True, loss=squared_error, nets=2, samples=16
    )
    start = space.decoder.heads[0].weight.clone()
    fit(space, objective, lambda s: {"one": 1.0}, 1, progress=False)
    assert not torch.equal(start, space.decoder.heads[0].weight)


def test_meshes_come_in_order_and_may_be_missing(zoo):
    empty = zoo.rows[:1].clone()
    empty[:, -1] = 5.0  # the last bias: 5 away from everything
    found = meshes(Nets(zoo.batched, torch.cat([zoo.rows[:2], empty])), resolution=24)
    assert [mesh is None for mesh in found] == [False, False, True]


# Scans.

TOWARDS = torch.tensor([[0.0, 0.6, 0.8], [1.0, 0.0, 0.0]])


def test_a_scan_lies_on_the_side_that_faces_the_camera():
    points = scan(lambda x: x.norm(dim=-1) - 0.5, TOWARDS, points=200, noise=0.0)
    assert points.shape == (2, 200, 3)
    torch.testing.assert_close(points.norm(dim=-1), torch.full((2, 200), 0.5), atol=0.01, rtol=0)
    assert ((points * TOWARDS[:, None]).sum(-1) > -0.05).all()


def test_noise_of_a_scan_has_the_spread_asked_for():
    clean, noisy = (scan(lambda x: x.norm(dim=-1) - 0.5, TOWARDS, noise=s) for s in (0.0, 0.02))
    assert float((noisy - clean).std()) == pytest.approx(0.02, rel=0.1)
    assert torch.equal(noisy, scan(lambda x: x.norm(dim=-1) - 0.5, TOWARDS, noise=0.02))


def test_a_scan_of_next_to_nothing_is_refused():
    with pytest.raises(ValueError, match="rays hit a shape, not 300"):
        scan(lambda x: x.norm(dim=-1) - 0.02, TOWARDS)


def test_the_true_distance_fits_its_scan_and_others_do_not():
    points = scan(lambda x: x.norm(dim=-1) - 0.5, TOWARDS[[0, 0, 0]], noise=0.0)
    objective = OnScan(points, TOWARDS[[0, 0, 0]])
    loss = objective(Ball(0.5, 0.4, 0.6), torch.Generator().manual_seed(0))
    assert loss[0] < 0.005
    assert (loss[1:] > 0.09).all()  # a tenth off at the surface; too large also fills the way


def test_a_distance_without_a_slope_is_penalised(zoo):
    points = scan(lambda x: x.norm(dim=-1) - 0.5, TOWARDS[:1], noise=0.0)
    flat = Nets(zoo.batched, torch.zeros(1, zoo.layout.size))  # fits any scan: 0 everywhere
    assert OnScan(points, TOWARDS[:1]).misfit(flat) == 0
    loss = OnScan(points, TOWARDS[:1], eikonal=0.5)(flat, torch.Generator())
    torch.testing.assert_close(loss, torch.tensor([0.5]))


def test_a_scan_expects_the_slope_of_distances_that_level_off():
    points = scan(lambda x: x.norm(dim=-1) - 0.5, TOWARDS[:1], noise=0.0)
    levelled = LevelBall(0.5)
    losses = {
        limit: OnScan(points, TOWARDS[:1], eikonal=1.0, limit=limit)(levelled, torch.Generator())
        for limit in (0.2, math.inf)
    }
    assert losses[0.2] < 0.01
    assert losses[math.inf] > 0.2


def test_scans_and_cameras_come_in_pairs():
    with pytest.raises(ValueError, match="2 scans from 1 directions"):
        OnScan(torch.zeros(2, 5, 3), TOWARDS[:1])


def test_embeddings_and_weights_can_be_searched_for_a_scan(zoo, space):
    parts = chair_parts(draw_chairs(2))
    points = scan(lambda x: chair_sdf(parts, x), TOWARDS, points=100)
    objective = OnScan(points, TOWARDS, samples=8)
    z = space.encode(zoo)
    searches = [
        optimise(
            space, z[[2, 3]], objective, lambda nets: -objective.misfit(nets),
            prior=Gaussian(z), steps=20, lr=0.1, progress=False,
        ),
        optimise_weights(
            zoo[[2, 3]], objective, lambda nets: -objective.misfit(nets), steps=20, progress=False
        ),
    ]  # fmt: skip
    for search in searches:
        assert (search.score >= search.scores[0]).all()
        assert search.score.mean() > search.scores[0].mean()
