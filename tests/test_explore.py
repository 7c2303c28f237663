import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from sklearn.mixture import GaussianMixture
from torch import nn

from netspace_lite.data import Images
from netspace_lite.explore import (
    OnImages,
    cross_entropy,
    few_shot,
    interpolate,
    optimise,
    optimise_weights,
    weight_line,
)
from netspace_lite.functional import Nets
from netspace_lite.sampling import (
    Gaussian,
    averages,
    disagreement,
    novelty,
    readout,
    sample,
    weight_statistics,
)
from netspace_lite.space import NetSpace, SpaceConfig
from netspace_lite.training import learning_rate

QUIET = {"progress": False}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def images():
    x = torch.randn(60, 4, generator=generator(1))
    return Images(x, (x[:, 0] > 0).long() + (x[:, 1] > 0))  # 3 classes


@pytest.fixture(scope="module")
def nets():
    return Nets(nn.Sequential(nn.Linear(4, 3)), torch.randn(12, 15, generator=generator(2)))


@pytest.fixture(scope="module")
def space(nets, images):
    """A space whose decoder is a fixed random map; what matters is that gradients flow."""
    config = SpaceConfig(embedding=6, probes=8, weights=False, hidden=16)
    return NetSpace.for_zoos(nets, images.x, config)


@pytest.fixture(scope="module")
def two(nets, images):
    """A space of two architectures."""
    other = nn.Sequential(nn.Linear(4, 5), nn.LeakyReLU(), nn.Linear(5, 3))
    zoo = Nets(other, torch.randn(12, 43, generator=generator(3)))
    config = SpaceConfig(embedding=6, probes=8, weights=False, hidden=16)
    return NetSpace.for_zoos([nets, zoo], images.x, config)


def test_interpolate_is_the_line_computed_by_hand():
    start, end = torch.tensor([[0.0, 4.0], [1.0, 1.0]]), torch.tensor([[2.0, 0.0], [1.0, 5.0]])
    expected = [[[0, 4], [1, 2], [2, 0]], [[1, 1], [1, 3], [1, 5]]]
    assert interpolate(start, end, 3).tolist() == expected
    assert interpolate(start[0], end[0], 3).tolist() == expected[0]


def test_weight_line_mixes_the_parameters_pair_by_pair(nets):
    line = weight_line(nets[:2], nets[2:4], 5)
    assert len(line) == 10
    torch.testing.assert_close(line.rows[5 + 1], 0.75 * nets.rows[1] + 0.25 * nets.rows[3])
    assert torch.equal(line.rows[[0, 4]], nets.rows[[0, 2]])


def test_lines_say_what_is_wrong(nets):
    with pytest.raises(ValueError, match=r"same shape.*\[3\] and \[4\]"):
        interpolate(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match="at least 2 points"):
        interpolate(torch.zeros(3), torch.ones(3), 1)
    with pytest.raises(ValueError, match="they differ"):
        weight_line(nets, Nets(nn.Linear(2, 3), torch.zeros(12, 9)))


def test_the_objective_is_the_papers_formula(nets, images):
    teacher, s = nn.Linear(4, 3), slice(None)
    objective = OnImages(images, teacher, distil=0.9, temperature=4.0, samples=1000)
    found = objective(nets, generator())
    for n, net in enumerate(nets):
        logits = net.to_module()(images.x[s])
        kl = F.kl_div(
            F.log_softmax(logits / 4, -1), F.softmax(teacher(images.x) / 4, -1), reduction="none"
        )
        expected = 0.9 * 16 * kl.sum(-1).mean() + 0.1 * F.cross_entropy(logits, images.y)
        torch.testing.assert_close(found[n], expected)


def test_a_net_can_teach_and_a_callable_can_be_the_loss(nets, images):
    own = OnImages(images, nets[3], distil=1.0, samples=1000)(nets, generator())
    assert own[3].abs() < 1e-5
    assert own.sum() > 0.1
    used = OnImages(images, loss=lambda logits, y: logits.square().mean((1, 2)))
    assert used(nets, generator()).shape == (12,)


def test_optimise_weights_is_adam_on_each_net_alone(nets, images):
    objective = OnImages(images, samples=1000)
    search = optimise_weights(
        nets[:3], objective, lambda nets: -cross_entropy(nets.outputs(images.x), images.y),
        steps=20, lr=0.1, every=1, **QUIET,
    )  # fmt: skip
    for n in range(3):
        net = nets.to_module(n)
        adam = torch.optim.Adam(net.parameters(), 0.1)
        for step in range(20):
            adam.param_groups[0]["lr"] = learning_rate(step, 20, 0.1)
            adam.zero_grad()
            F.cross_entropy(net(images.x), images.y).backward()
            adam.step()
        expected = nets.layout.pack([net])[0]
        torch.testing.assert_close(search.path[-1, n], expected, atol=1e-4, rtol=1e-4)
    assert (search.score > search.scores[0]).all()


def test_a_quadratic_is_solved_from_embeddings_nets_and_random_points(space, nets):
    space = copy.deepcopy(space)
    with torch.no_grad():
        space.decoder.hidden.bias.add_(30)  # every hidden unit active: the decoder is linear
    goal = torch.randn(1, 6, generator=generator(4))
    rows = space.decode(goal).rows.detach()

    def objective(decoded, generator):
        return (decoded.rows - rows).square().sum(1)

    def closeness(decoded):
        return -(decoded.rows - rows).square().sum(1)

    prior = Gaussian(space.encode(nets))
    for starts in (torch.zeros(2, 6), nets[:4], 5):
        search = optimise(
            space, starts, objective, closeness, prior=prior, prior_weight=0, steps=300, lr=0.1,
            **QUIET,
        )  # fmt: skip
        assert (search.score > 0.01 * search.scores[0]).all()
        torch.testing.assert_close(search.nets.rows, space.decode(search.best).rows.detach())


def test_the_best_state_is_kept_and_the_space_stays_as_it_is(space, images):
    before = {k: v.clone() for k, v in space.state_dict().items()}
    climb = OnImages(images, loss=lambda logits, y: -cross_entropy(logits, y))  # away from good
    search = optimise(space, torch.randn(5, 6, generator=generator()), climb, images, **QUIET)
    assert torch.equal(search.score, search.scores.max(0).values)
    torch.testing.assert_close(search.nets.accuracy(images), search.score)
    assert all(torch.equal(v, before[k]) for k, v in space.state_dict().items())
    assert all(p.grad is None for p in space.parameters())


def test_a_scalar_objective_and_one_loss_a_net_give_the_same_search(space, images):
    starts, each = torch.randn(3, 6, generator=generator()), OnImages(images)
    searches = [
        optimise(space, starts, objective, images, steps=10, **QUIET)
        for objective in (each, lambda nets, g: each(nets, g).mean())
    ]
    torch.testing.assert_close(searches[0].path, searches[1].path)


def test_the_prior_pulls_towards_the_zoo(space, nets, images):
    prior, starts = Gaussian(space.encode(nets)), torch.full((2, 6), 20.0)
    free, held = (
        optimise(space, starts, OnImages(images), images, prior=prior, prior_weight=w, **QUIET)
        for w in (0.0, 10.0)
    )
    assert prior(held.path[-1]).max() < prior(free.path[-1]).min()


def test_a_wanted_architecture_is_reached_from_any_start(two, images):
    starts = torch.randn(6, 6, generator=generator())
    for a, name in enumerate(two.architectures):
        search = optimise(two, starts, OnImages(images), images, architecture=name, **QUIET)
        assert search.reached.all()
        assert (two.predict(search.best) == a).all()
        assert search.nets.layout == two.batched[a].layout
    unnamed = optimise(two, starts, OnImages(images), images, steps=20, **QUIET)
    assert len(unnamed.nets.architectures) == 6


def test_bad_starts_are_refused(space, two, images, nets):
    def run(starts, space=space, **options):
        optimise(space, starts, OnImages(images), images, **options, **QUIET)

    for starts, message in (
        (torch.zeros(2, 5), r"embeddings \[N, 6\], not \[2, 5\]"),
        (torch.zeros(0, 6), "no starts"),
        ([], "no starts"),
        (torch.full((1, 6), torch.nan), "NaN"),
        (3, "prior="),
        (
            Nets(nn.Sequential(nn.Linear(2, 3)), torch.zeros(1, 9)),
            "not in this space|can't be encoded",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(starts)
    with pytest.raises(ValueError, match="'ResNet8'"):
        run(torch.zeros(2, 6), space=two, architecture="ResNet8")
    with pytest.raises(ValueError, match="'ResNet8'"):
        run(torch.zeros(2, 6), architecture="ResNet8")


def test_bad_objectives_are_refused_at_once(space, images):
    starts = torch.zeros(2, 6)
    for objective, message in (
        (lambda nets, g: nets(images.x), r"one loss a net, \[2\].*not \[2, 60, 3\]"),
        (lambda nets, g: 1.0, "not float"),
        (lambda nets, g: nets.accuracy(images), "does not depend on the nets"),
        (lambda nets, g: nets.rows.sum(1) * torch.nan, r"nan at step 0 for starts \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            optimise(space, starts, objective, images, **QUIET)
    with pytest.raises(ValueError, match=r"one score a net, \[2\], not float"):
        optimise(space, starts, OnImages(images), lambda nets: 1.0, **QUIET)


def failing(objective, at, failure):
    calls = iter(range(1000))

    def wrapped(nets, generator):
        loss = objective(nets, generator)
        return failure(loss) if next(calls) == at else loss

    return wrapped


def interrupt(loss):
    raise KeyboardInterrupt


def test_nan_and_ctrl_c_return_the_best_so_far(space, images):
    starts = torch.randn(4, 6, generator=generator())
    options = {"every": 1, "steps": 30, **QUIET}
    whole = optimise(space, starts, OnImages(images), images, **options)
    interrupted = failing(OnImages(images), 12, interrupt)
    search = optimise(space, starts, interrupted, images, **options)
    assert search.stopped == "interrupted at step 12"
    assert torch.equal(search.scores, whole.scores[:13])
    assert torch.equal(search.score, search.scores.max(0).values)
    nan = failing(OnImages(images), 12, lambda loss: loss * torch.tensor([1, 1, torch.nan, 1]))
    with pytest.warns(UserWarning, match=r"nan at step 12 for starts \[2\]; the best state so far"):
        search = optimise(space, starts, nan, images, **options)
    assert torch.equal(search.scores, whole.scores[:13])
    with warnings.catch_warnings(), pytest.raises(KeyboardInterrupt):
        optimise(space, starts, OnImages(images), interrupt, **options)


def test_few_shot_takes_so_many_of_each_class(images):
    few = few_shot(images, 4)
    assert few.y.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    with pytest.raises(ValueError, match="fewer than 50"):
        few_shot(images, 50)


def test_the_gaussian_scores_and_draws_like_its_embeddings():
    z = torch.randn(2000, 3, generator=generator()) * torch.tensor([3.0, 1.0, 0.5]) + 7
    gaussian = Gaussian(z)
    assert abs(float(gaussian(z).mean()) - 1) < 1e-3
    drawn = gaussian.sample(4000, seed=1)
    torch.testing.assert_close(drawn.mean(0), z.mean(0), atol=0.2, rtol=0)
    torch.testing.assert_close(drawn.T.cov(), z.T.cov(), atol=0.5, rtol=0)
    flat = Gaussian(z * torch.tensor([1.0, 1.0, 0.0]))  # no spread along the last axis
    off = flat.mean + torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert flat(off)[0] > 5 * flat(off)[1]
    with pytest.raises(ValueError, match="at least 2 embeddings"):
        Gaussian(z[:1])


def test_sample_follows_the_density_that_scikit_learn_fits():
    z = torch.cat([torch.randn(100, 4, generator=generator()) + c for c in (-20, 20)])
    for density in ("kernel", "mixture", GaussianMixture(2, random_state=0)):
        drawn = sample(z, 400, density, bandwidth=0.05, components=2, seed=3)
        assert drawn.shape == (400, 4)
        assert 0.4 < float((drawn.mean(1) > 0).float().mean()) < 0.6
        assert drawn.mean(1).abs().min() > 15  # nothing between the two clusters
    copies = sample(z, 50, bandwidth=1e-6)
    assert torch.cdist(copies, z).min(1).values.max() < 1
    with pytest.raises(ValueError, match="choose from kernel, mixture"):
        sample(z, 3, "flow")
    with pytest.raises(ValueError, match="n ≥ 1"):
        sample(z, 0)


def test_novelty_is_zero_for_copies_and_finds_the_nearest(nets, images):
    copies = novelty(nets[[2, 5]], images.x, nets)
    assert copies["function"].tolist() == [0, 0]
    assert copies["weights"].max() < 1e-2
    within = novelty(nets, images.x)
    by_hand = min(float((nets.rows[0] - row).norm()) for row in nets.rows[1:])
    assert float(within["weights"][0]) == pytest.approx(by_hand, rel=1e-4)
    classes = [net.to_module()(images.x).argmax(-1) for net in nets]
    by_hand = min(float((classes[0] != c).float().mean() * 100) for c in classes[1:])
    assert float(within["function"][0]) == pytest.approx(by_hand)
    assert disagreement(nets.logits(images.x), nets.logits(images.x)).diagonal().sum() == 0


def test_averages_of_all_nets_are_the_mean_net(nets):
    found = averages(nets, 3, of=12)
    torch.testing.assert_close(found.rows, nets.rows.mean(0).expand(3, -1))


def test_weight_statistics_are_numpys(nets):
    found = weight_statistics(nets)
    weight = nets.rows[3, :12].numpy()
    expected = [weight.mean(), weight.std(), *np.quantile(weight, [0, 0.25, 0.5, 0.75, 1])]
    assert found.shape == (12, 14)
    np.testing.assert_allclose(found[3, :7], expected, rtol=1e-4, atol=1e-5)


def test_readout_finds_a_linear_property():
    x = torch.randn(80, 5, generator=generator())
    y = x @ torch.arange(5.0) + 3
    predicted, r2 = readout(x[:60], y[:60], x[60:], y[60:])
    assert r2 > 0.9999
    expected = Ridge(1e-3).fit(x[:60].numpy(), y[:60].numpy()).predict(x[60:].numpy())
    np.testing.assert_allclose(predicted, expected, atol=1e-2)
