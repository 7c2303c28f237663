"""Shape nets: their training task, their space, scans of them and search through them."""

import math

import pytest
import torch
from toy import generator, random_nets

from netspace_lite import (
    Descent,
    Distillation,
    Gaussian,
    Layout,
    LikenessLoss,
    Nets,
    NetSpace,
    Siren,
    SpaceConfig,
    Zoo,
    fit,
    optimise,
    optimise_weights,
    refine,
    train_nets,
    train_zoo,
)
from netspace_lite.shapes import (
    Samples,
    ScanLoss,
    ShapeTask,
    agreement,
    chair_parts,
    chair_sdf,
    draw_chairs,
    level_off,
    meshes,
    sample_chairs,
    scan,
    shape_recipes,
    squared_error,
)

SMALL = Siren(hidden=16, omega=15.0)


@pytest.fixture(scope="module")
def samples():
    return sample_chairs(draw_chairs(4), 1024)


@pytest.fixture(scope="module")
def zoo(samples):
    return train_zoo(SMALL, ShapeTask(samples, 128), shape_recipes(4, steps=100), progress=False)


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
    recipes = shape_recipes(4)
    task = ShapeTask(samples, batch=32)
    points, sdf = task.batch(recipes[:2], torch.tensor([2, 0]), step=5)  # any order, any subset
    assert points.shape == (2, 32, 3)
    assert sdf.shape == (2, 32)
    assert (sdf[:, :16] < 0).all()
    assert (sdf[:, 16:] >= 0).all()
    parts = chair_parts([draw_chairs(4)[n] for n in (2, 0)])
    torch.testing.assert_close(chair_sdf(parts, points), sdf)


def test_an_epoch_sees_every_sample_once(samples):
    task, recipes = ShapeTask(samples, batch=256), shape_recipes(4)
    seen = torch.cat([task.batch(recipes, torch.arange(4), step)[1] for step in range(4)], dim=1)
    assert torch.equal(seen.sort(1).values, samples.sdf.sort(1).values)


def test_batches_depend_on_seed_place_and_step_only(samples):
    recipes, members = shape_recipes(4), torch.arange(4)
    first, second = (ShapeTask(samples, batch=32) for _ in range(2))
    first.batch(recipes, members, 0)
    points = first.batch(recipes, members, 40)[0]
    assert torch.equal(points, second.batch(recipes[:], members, 40)[0])
    assert not torch.equal(points, second.batch(shape_recipes(4, seed=1), members, 40)[0])


def test_nets_of_equal_seeds_learn_shapes_of_their_own(samples):
    task, recipes = ShapeTask(samples, batch=32), shape_recipes(1) * 2
    sdf = task.batch(recipes, torch.tensor([0, 3]), 0)[1]
    assert not torch.equal(sdf[0], sdf[1])
    with pytest.raises(ValueError, match="net 4 has no shape: there are 4"):
        task.batch(recipes, torch.tensor([0, 4]), 0)


def test_the_learning_rate_rises_then_falls_to_zero_with_half_a_cosine(samples):
    task = ShapeTask(samples)
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
    assert level_off(samples, math.inf).sdf is samples.sdf
    with pytest.raises(ValueError, match="positive distance, not 0"):
        level_off(samples, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 33}, "even number from 2 to 1024: 33"),
        ({"batch": 2048}, "even number from 2 to 1024: 2048"),
        ({"test": Samples(torch.zeros(1, 2, 3), torch.zeros(1, 2))}, "test samples of 1 shapes"),
    ],
)
def test_a_task_says_what_does_not_fit(samples, arguments, message):
    with pytest.raises(ValueError, match=message):
        ShapeTask(samples, **{"batch": 32, **arguments})


# The zoo.


def test_nets_learn_their_shapes(zoo, samples):
    assert (zoo.losses[:, -10:].mean(1) < zoo.losses[:, :10].mean(1) / 5).all()
    others = ShapeTask(Samples(samples.points, samples.sdf.roll(1, 0)))
    wrong = others.scores(zoo, zoo.members)
    assert (zoo.scores["error"] < 0.04).all()
    assert (zoo.scores["error"] < wrong["error"]).all()


def test_together_is_one_at_a_time(samples):
    recipes, task = shape_recipes(4, steps=8), ShapeTask(samples, 64)
    together = train_nets(SMALL, task, recipes)["rows"]
    pairs = zip(recipes, torch.arange(4).split(1), strict=True)
    alone = [train_nets(SMALL, task, [recipe], members=n)["rows"] for recipe, n in pairs]
    alone = torch.cat(alone)
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


def test_scores_of_a_known_error(zoo, samples):
    shifted = Samples(samples.points, zoo.outputs(samples.points, per_net=True)[..., 0] + 0.005)
    task = ShapeTask(samples, test=shifted)
    scores = task.scores(zoo, zoo.members)
    some = zoo[[3, 1]]
    assert torch.equal(task.scores(some, some.members)["error"], scores["error"][[3, 1]])
    torch.testing.assert_close(scores["error"], torch.full((4,), 0.005), rtol=1e-3, atol=0)
    assert (scores["within_001"] == 100).all()


def test_a_zoo_of_other_shapes_is_refused(tmp_path, samples):
    recipes = shape_recipes(4, steps=2)
    first = train_zoo(SMALL, ShapeTask(samples), recipes, tmp_path, progress=False)
    again = train_zoo(SMALL, ShapeTask(samples), recipes, tmp_path, progress=False)
    assert torch.equal(first.rows, again.rows)
    assert Zoo.load(tmp_path).module.config == {"hidden": 16, "omega": 15.0}
    other = ShapeTask(sample_chairs(draw_chairs(4, seed=1), 1024))
    with pytest.raises(ValueError, match="task"):
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
    objective = Distillation(
        space, zoo, samples.points, per_net=True, loss=squared_error, nets=4, samples=64
    )
    before = objective(space, torch.Generator().manual_seed(0)).item()
    history = fit(
        space, objective, lambda s: {"within": float(agreement(s, zoo, samples.points).mean())},
        150, epoch=50,
    )  # fmt: skip
    assert objective(space, torch.Generator().manual_seed(0)).item() < before / 4
    assert [row["step"] for row in history] == [50, 100, 150]


def test_embeddings_of_shapes_are_refined_on_their_own_points(zoo, space, samples):
    def loss(z):
        return squared_error(space.decode(z)(samples.points, per_net=True), answers).detach()

    answers = zoo.outputs(samples.points, per_net=True)
    torch.nn.init.normal_(space.decoder.heads[0].weight, std=0.02)
    like = LikenessLoss(zoo, samples.points, per_net=True, loss=squared_error)
    z = refine(space, zoo, like, lr=0.02)
    assert (loss(z) < loss(space.encode(zoo))).sum() >= 3
    assert loss(z).mean() < loss(space.encode(zoo)).mean()


def test_the_papers_size_trains_a_step(samples):
    net = Siren()
    assert Layout.of(net).size == 67_073
    recipes = shape_recipes(4, steps=1)
    zoo = train_zoo(net, ShapeTask(samples, 1024), recipes, block=4, progress=False)
    config = SpaceConfig(weights=True, chunk=10_000, embedding=64, probes=32, hidden=16)
    space = NetSpace.for_zoos(zoo, samples.points.flatten(0, 1), config)
    objective = Distillation(
        space, zoo, samples.points, per_net=True, loss=squared_error, nets=2, samples=16
    )
    start = space.decoder.heads[0].weight.clone()
    fit(space, objective, lambda s: {"one": 1.0}, 1)
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


def test_a_scan_from_within_or_in_strides_is_refused():
    """Seen before: short directions began inside the shape, long ones went past it."""
    for length in (0.3, 3):
        with pytest.raises(ValueError, match=r"directions should have length 1, not \["):
            scan(lambda x: x.norm(dim=-1) - 0.5, TOWARDS * length, points=20)


def test_the_true_distance_fits_its_scan_and_others_do_not():
    points = scan(lambda x: x.norm(dim=-1) - 0.5, TOWARDS[[0, 0, 0]], noise=0.0)
    loss_of = ScanLoss(points, TOWARDS[[0, 0, 0]])
    loss = loss_of(Ball(0.5, 0.4, 0.6), torch.Generator().manual_seed(0))
    assert loss[0] < 0.005
    assert (loss[1:] > 0.09).all()  # a tenth off at the surface; too large also fills the way


def test_a_distance_without_a_slope_is_penalised(zoo):
    points = scan(lambda x: x.norm(dim=-1) - 0.5, TOWARDS[:1], noise=0.0)
    flat = Nets(zoo.batched, torch.zeros(1, zoo.layout.size))  # fits any scan: 0 everywhere
    assert ScanLoss(points, TOWARDS[:1]).misfit(flat) == 0
    loss = ScanLoss(points, TOWARDS[:1], eikonal=0.5)(flat, torch.Generator())
    torch.testing.assert_close(loss, torch.tensor([0.5]))


def test_a_scan_expects_the_slope_of_distances_that_level_off():
    points = scan(lambda x: x.norm(dim=-1) - 0.5, TOWARDS[:1], noise=0.0)
    levelled = LevelBall(0.5)
    losses = {
        limit: ScanLoss(points, TOWARDS[:1], eikonal=1.0, limit=limit)(levelled, torch.Generator())
        for limit in (0.2, math.inf)
    }
    assert losses[0.2] < 0.01
    assert losses[math.inf] > 0.2


def test_scans_and_cameras_come_in_pairs():
    with pytest.raises(ValueError, match="2 scans from 1 directions"):
        ScanLoss(torch.zeros(2, 5, 3), TOWARDS[:1])


def test_embeddings_and_weights_can_be_searched_for_a_scan(zoo, space):
    parts = chair_parts(draw_chairs(2))
    points = scan(lambda x: chair_sdf(parts, x), TOWARDS, points=100)
    loss = ScanLoss(points, TOWARDS, samples=8)
    z, config = space.encode(zoo), Descent(steps=20, lr=0.1)

    def score(nets):
        return -loss.misfit(nets)

    quiet, by_weights = {"progress": False}, Descent(steps=20, lr=3e-3)
    searches = [
        optimise(space, z[[2, 3]], loss, score, prior=Gaussian(z), config=config, **quiet),
        optimise_weights(zoo[[2, 3]], loss, score, config=by_weights, **quiet),
    ]
    for search in searches:
        assert (search.score >= search.scores[0]).all()
        assert search.score.mean() > search.scores[0].mean()


def test_a_scan_in_double_precision():
    """Seen before: "inputs are float32, nets are float64", of inputs that nobody gave."""
    net = Siren(8)
    nets = random_nets(net, 2)
    points = 0.5 * torch.randn(2, 5, 3)
    loss, exact = (
        ScanLoss(points.to(kind), TOWARDS[:1].to(kind).expand(2, 3), samples=8)
        for kind in (torch.float32, torch.float64)
    )
    expected = loss(nets, generator())
    found = exact(Nets(net, nets.rows.double()), generator())
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-3)
