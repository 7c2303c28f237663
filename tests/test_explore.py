"""Lines, searches and samples, against the formulas, torch's Adam and scikit-learn."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from sklearn.mixture import GaussianMixture
from torch import nn
from toy import generator, mlp, random_nets, toy_data

from netspace_lite.data import Images
from netspace_lite.explore import (
    Descent,
    Gaussian,
    ImageLoss,
    LikenessLoss,
    cross_entropy,
    interpolate,
    optimise,
    optimise_weights,
    refine,
    sample,
    weight_line,
)
from netspace_lite.nets import Nets
from netspace_lite.space import NetSpace, SpaceConfig
from netspace_lite.training import (
    Distillation,
    fit,
    kl_divergence,
    learning_rate,
    logit_scale,
    squared_error,
)

QUIET = {"progress": False}


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


def test_a_line_needs_nets_that_compute_alike():
    relu, tanh = (random_nets(mlp(f), 2) for f in (nn.ReLU(), nn.Tanh()))
    with pytest.raises(ValueError, match="they differ"):
        weight_line(relu, tanh)


def test_lines_say_what_is_wrong(nets):
    with pytest.raises(ValueError, match=r"same shape.*\[3\] and \[4\]"):
        interpolate(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match="at least 2 points"):
        interpolate(torch.zeros(3), torch.ones(3), 1)
    with pytest.raises(ValueError, match="they differ"):
        weight_line(nets, Nets(nn.Linear(2, 3), torch.zeros(12, 9)))


def test_the_loss_is_the_papers_formula(nets, images):
    teacher = nn.Linear(4, 3)
    found = ImageLoss(images, teacher, distil=0.9, temperature=4.0, samples=1000)(nets, generator())
    for n, net in enumerate(nets):
        logits = net.to_module()(images.x)
        kl = F.kl_div(
            F.log_softmax(logits / 4, -1), F.softmax(teacher(images.x) / 4, -1), reduction="none"
        )
        expected = 0.9 * 16 * kl.sum(-1).mean() + 0.1 * F.cross_entropy(logits, images.y)
        torch.testing.assert_close(found[n], expected)


def test_a_net_can_teach_and_a_callable_can_be_the_loss(nets, images):
    own = ImageLoss(images, nets[3], distil=1.0, samples=1000)(nets, generator())
    assert own[3].abs() < 1e-5
    assert own.sum() > 0.1
    used = ImageLoss(images, loss=lambda logits, y: logits.square().mean((1, 2)))
    assert used(nets, generator()).shape == (12,)


def test_a_zoo_is_no_teacher(nets, images):
    """Seen before: its first net taught, whichever was the best."""
    for teacher in (nets, lambda x: x):
        with pytest.raises(ValueError, match=r"a teacher is one net, zoo\[n\] or a module, not"):
            ImageLoss(images, teacher)


def test_optimise_weights_is_adam_on_each_net_alone(nets, images):
    def closeness(nets):
        return -cross_entropy(nets.outputs(images.x), images.y)

    loss, config = ImageLoss(images, samples=1000), Descent(20, 0.1, every=1)
    search = optimise_weights(nets[:3], loss, closeness, config=config, **QUIET)
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

    def loss(decoded, generator):
        return (decoded.rows - rows).square().sum(1)

    def closeness(decoded):
        return -(decoded.rows - rows).square().sum(1)

    prior = Gaussian(space.encode(nets))
    for starts in (torch.zeros(2, 6), nets[:4], 5):
        search = optimise(
            space, starts, loss, closeness, prior=prior, config=Descent(300, 0.1, prior_weight=0),
            **QUIET,
        )  # fmt: skip
        assert (search.score > 0.01 * search.scores[0]).all()
        torch.testing.assert_close(search.nets.rows, space.decode(search.best).rows.detach())


def test_the_best_state_is_kept_and_the_space_stays_as_it_is(space, images):
    before = {k: v.clone() for k, v in space.state_dict().items()}
    climb = ImageLoss(images, loss=lambda logits, y: -cross_entropy(logits, y))  # away from good
    search = optimise(space, torch.randn(5, 6, generator=generator()), climb, images, **QUIET)
    assert torch.equal(search.score, search.scores.max(0).values)
    torch.testing.assert_close(search.nets.accuracy(images), search.score)
    assert all(torch.equal(v, before[k]) for k, v in space.state_dict().items())
    assert all(p.grad is None for p in space.parameters())


def test_a_scalar_loss_and_one_loss_a_net_give_the_same_search(space, images):
    starts, each = torch.randn(3, 6, generator=generator()), ImageLoss(images)
    searches = [
        optimise(space, starts, loss, images, config=Descent(10), **QUIET)
        for loss in (each, lambda nets, g: each(nets, g).mean())
    ]
    torch.testing.assert_close(searches[0].path, searches[1].path)


def test_the_prior_pulls_towards_the_zoo(space, nets, images):
    prior, starts = Gaussian(space.encode(nets)), torch.full((2, 6), 20.0)
    free, held = (
        optimise(
            space,
            starts,
            ImageLoss(images),
            images,
            prior=prior,
            config=Descent(prior_weight=w),
            **QUIET,
        )
        for w in (0.0, 10.0)
    )
    assert prior(held.path[-1]).max() < prior(free.path[-1]).min()


def test_a_wanted_architecture_is_reached_from_any_start(two, images):
    starts = torch.randn(6, 6, generator=generator())
    for a, name in enumerate(two.architectures):
        search = optimise(two, starts, ImageLoss(images), images, architecture=name, **QUIET)
        assert search.reached.all()
        assert (two.predict(search.best) == a).all()
        assert search.nets.layout == two.batched[a].layout
    unnamed = optimise(two, starts, ImageLoss(images), images, config=Descent(20), **QUIET)
    assert len(unnamed.nets.architectures) == 6


def test_bad_starts_are_refused(space, two, images, nets):
    def run(starts, space=space, **options):
        optimise(space, starts, ImageLoss(images), images, **options, **QUIET)

    for starts, message in (
        (torch.zeros(2, 5), r"embeddings should be \[N, 6\] of .*, not \[2, 5\]"),
        (torch.zeros(0, 6), "no starts"),
        ([], "no starts"),
        (torch.full((1, 6), torch.nan), r"starts \[0\] are not finite"),
        (3, "prior="),
        (
            Nets(nn.Sequential(nn.Linear(2, 3)), torch.zeros(1, 9)),
            "is not one of this space",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(starts)
    with pytest.raises(ValueError, match="'ResNet8'"):
        run(torch.zeros(2, 6), space=two, architecture="ResNet8")
    with pytest.raises(ValueError, match="'ResNet8'"):
        run(torch.zeros(2, 6), architecture="ResNet8")


def test_bad_losses_are_refused_at_once(space, images):
    starts = torch.zeros(2, 6)
    for loss, message in (
        (lambda nets, g: nets(images.x), r"one number a net, \[2\].*not \[2, 60, 3\]"),
        (lambda nets, g: 1.0, "not a float"),
        (lambda nets, g: nets.accuracy(images), "does not depend on the nets"),
        (lambda nets, g: nets.rows.sum(1) * torch.nan, r"nan at step 0 for starts \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            optimise(space, starts, loss, images, **QUIET)
    with pytest.raises(ValueError, match=r"one score a net, \[2\], not a float"):
        optimise(space, starts, ImageLoss(images), lambda nets: 1.0, **QUIET)


def test_whole_data_are_no_images(space, images):
    """Seen before: "object of type 'ImageData' has no len()", and "is not callable"."""
    data = toy_data()
    with pytest.raises(ValueError, match="ImageData gives no images .*such as data.test"):
        ImageLoss(data)
    with pytest.raises(ValueError, match="ImageData gives no images .*such as data.test"):
        optimise(space, torch.zeros(2, 6), ImageLoss(images), data, **QUIET)


def test_several_searches_for_one_net(space, nets, images):
    """Seen before: its temperature was one net's, and the kernel's sentence was all one read."""
    search = optimise(space, torch.zeros(3, 6), LikenessLoss(nets[0], images.x), **QUIET)
    assert search.losses.shape[1] == 3


def failing(loss, at, failure):
    calls = iter(range(1000))

    def wrapped(nets, generator):
        value = loss(nets, generator)
        return failure(value) if next(calls) == at else value

    return wrapped


def interrupt(loss):
    raise KeyboardInterrupt


def test_nan_and_ctrl_c_return_the_best_so_far(space, images):
    starts = torch.randn(4, 6, generator=generator())
    options = {"config": Descent(30, every=1), **QUIET}
    whole = optimise(space, starts, ImageLoss(images), images, **options)
    interrupted = failing(ImageLoss(images), 12, interrupt)
    search = optimise(space, starts, interrupted, images, **options)
    assert search.stopped == "interrupted at step 12"
    assert torch.equal(search.scores, whole.scores[:13])
    assert torch.equal(search.score, search.scores.max(0).values)
    nan = failing(ImageLoss(images), 12, lambda loss: loss * torch.tensor([1, 1, torch.nan, 1]))
    told = r"nan at step 12 for starts \[2\]; the best state so far"
    with pytest.warns(UserWarning, match=told) as said:
        search = optimise(space, starts, nan, images, **options)
    assert said[0].filename == __file__  # where it was called from
    assert torch.equal(search.scores, whole.scores[:13])
    nan = failing(ImageLoss(images), 20, lambda loss: loss * torch.nan)
    every = Descent(30, every=10)
    with pytest.warns(UserWarning, match="nan at step 20"):  # of no score the last state is kept
        search = optimise(space, starts, nan, config=every, **QUIET)
    sound = optimise(space, starts, ImageLoss(images), config=every, **QUIET)
    assert torch.equal(search.path, sound.path[:2])  # none of the state that failed
    assert torch.equal(search.best, sound.path[1])
    with warnings.catch_warnings(), pytest.raises(KeyboardInterrupt):
        optimise(space, starts, ImageLoss(images), interrupt, **options)


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
    for alike in (z[:1], z[:1].repeat(5, 1), z[0]):  # else the prior of a search is 0 / 0
        with pytest.raises(ValueError, match="at least 2 embeddings that differ"):
            Gaussian(alike)


def test_sample_follows_the_density_that_scikit_learn_fits():
    z = torch.cat([torch.randn(100, 4, generator=generator()) + c for c in (-20, 20)])
    for density in (None, GaussianMixture(2, random_state=0)):
        drawn = sample(z, 400, density, bandwidth=0.05, seed=3)
        assert drawn.shape == (400, 4)
        assert 0.4 < float((drawn.mean(1) > 0).float().mean()) < 0.6
        assert drawn.mean(1).abs().min() > 15  # nothing between the two clusters
    copies = sample(z, 50, bandwidth=1e-6)
    assert torch.cdist(copies, z).min(1).values.max() < 1
    with pytest.raises(ValueError, match="n ≥ 1"):
        sample(z, 0)


def test_a_seed_draws_the_same_from_an_estimator_that_has_none():
    """Seen before: two calls with one seed gave other embeddings."""
    z, density = torch.randn(40, 4, generator=generator()), GaussianMixture(2)
    first, same, other = (sample(z, 5, density, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert density.random_state is None


class Drawing:
    """A density whose `sample` returns the array itself, as many estimators do."""

    def fit(self, x):
        self.x = x
        return self

    def sample(self, n):
        return self.x[:n] + 100


def test_sample_takes_estimators_that_return_an_array():
    """Seen before: the array's first row was taken for all of them."""
    z = torch.randn(30, 4, generator=generator())
    drawn = sample(z, 20, Drawing())
    assert drawn.shape == (20, 4)
    assert len(drawn.unique(dim=0)) == 20


def test_samples_keep_the_dtype():
    z = torch.randn(30, 4, dtype=torch.double)
    assert sample(z, 3).dtype == Gaussian(z).sample(3).dtype == torch.double


def test_likeness_is_the_divergence_from_each_net(nets, images):
    others = random_nets(nets.batched.module, 12, seed=5)
    found = LikenessLoss(nets, images.x, samples=1000)(others, generator())
    s = torch.randint(60, (1000,), generator=generator())
    targets = nets.outputs(images.x)
    expected = kl_divergence(others(images.x[s]), targets[:, s], logit_scale(targets))
    torch.testing.assert_close(found, expected)
    assert LikenessLoss(nets, images.x)(nets, generator()).abs().max() < 1e-5
    own = images.x[torch.stack([torch.randperm(60, generator=generator())[:20]] * 12)]
    each = LikenessLoss(nets, own, per_net=True)
    assert each(nets, generator()).abs().max() < 1e-5
    assert each(others, generator()).min() > 0


def test_refining_brings_decoded_nets_closer_and_leaves_the_space(nets, images):
    config = SpaceConfig(embedding=6, probes=8, hidden=16, chunk=8)
    space = NetSpace.for_zoos(nets, images.x, config)
    objective = Distillation(space, nets, images.x, nets=6, samples=8)
    fit(space, objective, lambda space: {"score": 0.0}, 60, epoch=60)
    before = {name: value.clone() for name, value in space.state_dict().items()}
    z, x = refine(space, nets, images.x, 100), torch.randn(60, 4, generator=generator(9))
    targets = nets.outputs(x)
    start, end = (
        kl_divergence(space.decode(e).outputs(x), targets, logit_scale(targets))
        for e in (space.encode(nets), z)
    )
    assert (end / start).mean() < 0.9
    assert all(torch.equal(space.state_dict()[name], value) for name, value in before.items())
    again = refine(space, nets, images.x, 100, z=space.encode(nets))
    assert torch.equal(again, z)


def test_values_are_refined_as_values():
    """Seen before: as logits, whatever the space was fitted by, and so the worse the longer."""
    nets, x = random_nets(mlp(nn.Tanh(), 4, 8, 2), 12), torch.randn(60, 4, generator=generator())
    space = NetSpace.for_zoos(nets, x, SpaceConfig(embedding=6, probes=8, hidden=16, chunk=8))
    targets, z = nets.outputs(x), {}
    for name, loss in (("values", {"loss": squared_error}), ("logits", {})):
        z[name] = refine(space, nets, x, 30, **loss)
    errors = {k: (space.decode(v).outputs(x) - targets).square().mean() for k, v in z.items()}
    like = LikenessLoss(nets, x, loss=squared_error)
    assert torch.equal(z["values"], refine(space, nets, like, 30))
    assert errors["values"] < errors["logits"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_search_has_gradients_where_the_caller_has_none(space, nets, images, mode):
    """Seen before: the loss, it was said, did not depend on the nets."""
    config, loss = Descent(3), ImageLoss(images, nets[0])
    options = {"prior": Gaussian(space.encode(nets)), "config": config} | QUIET
    searches = [
        lambda: refine(space, nets, images.x, 3),
        lambda: optimise(space, nets, loss, images, **options).best,
        lambda: optimise_weights(nets, loss, config=config, **QUIET).best,
    ]
    for search in searches:
        with mode():
            found = search()
        assert torch.equal(found, search())


def test_without_validation_the_last_state_is_kept(space, images):
    starts = torch.randn(3, 6, generator=generator())
    search = optimise(space, starts, ImageLoss(images), config=Descent(7, every=2), **QUIET)
    assert torch.equal(search.best, search.path[-1])
    assert search.losses.shape == (7, 3)
    assert not torch.equal(search.best, starts)


def test_a_search_that_never_validates_is_refused():
    with pytest.raises(ValueError, match="validates every 0"):
        Descent(every=0)


def test_draws_from_a_prior_do_not_depend_on_the_order_of_nets():
    z = torch.randn(4, 6, generator=generator())
    drawn = Gaussian(z).sample(5, seed=1)
    torch.testing.assert_close(Gaussian(z.flip(0)).sample(5, seed=1), drawn, rtol=1e-3, atol=1e-4)
    wide = Gaussian(z.double()).sample(5, seed=1)
    torch.testing.assert_close(wide.float(), drawn, rtol=1e-3, atol=1e-4)


def test_a_frozen_backbone_is_not_searched():
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    net[0].requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        optimise_weights(random_nets(net, 2), lambda nets, g: nets(torch.ones(1, 4)).mean((1, 2)))


def test_refine_keeps_its_last_state_whatever_the_classifier_says_of_it(two, nets, images):
    """Seen before: nets came back as they went in where the classifier named another on the way."""
    z = two.encode(nets)
    with torch.no_grad():
        kept = two.classifier.weight.clone(), two.classifier.bias.clone()
        two.classifier.weight.zero_()
        two.classifier.bias.copy_(torch.tensor([0.0, 1.0]))  # all is the other architecture
    found = refine(two, nets, images.x, 60)
    with torch.no_grad():
        two.classifier.weight.copy_(kept[0])
        two.classifier.bias.copy_(kept[1])
    assert torch.equal(found, refine(two, nets, images.x, 60))
    like = LikenessLoss(nets, images.x, samples=len(images))
    losses = [like(two.decode(at, 0), generator()) for at in (z, found)]
    assert (losses[1] < losses[0]).all()


def test_refinement_is_whole_or_none(space, nets, images):
    """Seen before: after Ctrl-C the starts came back as if they were refined."""
    like = failing(LikenessLoss(nets[:4], images.x), 7, interrupt)
    with pytest.raises(KeyboardInterrupt):
        refine(space, nets[:4], like, 10)


def test_an_interrupted_search_without_validation_keeps_where_it_came(space, images):
    """Seen before: the state of the last validation, which may be the start."""
    starts = torch.randn(4, 6, generator=generator())
    search = optimise(
        space,
        starts,
        failing(ImageLoss(images), 7, interrupt),
        config=Descent(30, every=30),
        **QUIET,
    )
    sound = optimise(space, starts, ImageLoss(images), config=Descent(30, every=1), **QUIET)
    assert search.stopped == "interrupted at step 7"
    assert torch.equal(search.best, sound.path[7])


def test_scores_in_double_precision_are_compared_in_it(space, images):
    seen = []

    def validate(nets):
        best = -123456.789 - (len(seen) - 2) ** 2 * 1e-3
        seen.append(torch.full((4,), best, dtype=torch.double))
        return seen[-1]

    starts = torch.randn(4, 6, generator=generator())
    search = optimise(
        space, starts, ImageLoss(images), validate, config=Descent(6, every=1), **QUIET
    )
    assert torch.equal(search.best, search.path[2])


def test_a_prior_is_as_exact_in_mixed_precision_and_takes_one_embedding():
    z = torch.randn(50, 8, generator=generator())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = Gaussian(z)
    assert torch.equal(mixed.spread, Gaussian(z).spread)
    assert torch.equal(mixed(z[0]), mixed(z[:1]))


def test_a_loss_on_images_is_as_in_the_papers_experiments_unless_told(nets):
    x = torch.randn(300, 4, generator=generator(6))
    images, teacher = Images(x, (x[:, 0] > 0).long()), nn.Linear(4, 3)
    given = {"distil": 0.9, "temperature": 4.0, "samples": 256}
    losses = [ImageLoss(images, teacher, **o)(nets, generator()) for o in ({}, given)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("share", [0.3, 0.97])
def test_a_distilled_share_is_the_teachers_and_the_rest_is_the_labels(nets, images, share):
    teacher = nn.Linear(4, 3)
    own, labels, both = (
        ImageLoss(images, teacher, distil=d)(nets, generator()) for d in (1, 0, share)
    )
    torch.testing.assert_close(both, share * own + (1 - share) * labels)


def test_a_teacher_answers_in_evaluation_mode_and_is_left_in_its_own(images):
    teacher = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).train()
    torch.testing.assert_close(ImageLoss(images, teacher).targets[0], teacher[0](images.x))
    assert teacher.training


def test_each_step_draws_images_anew_and_none_twice(nets, images):
    seen, random = [], generator()
    numbered = Images(images.x, torch.arange(60))
    loss = ImageLoss(numbered, loss=lambda logits, y: seen.append(y.tolist()) or 0, samples=30)
    for _ in range(2):
        loss(nets, random)
    assert [len(set(y)) for y in seen] == [30, 30]
    assert set(seen[0]) != set(seen[1])


def test_a_search_for_an_architecture_descends_its_cross_entropy_and_the_prior(two, nets):
    starts, prior = 3 * torch.randn(3, 6, generator=generator()), Gaussian(two.encode(nets))
    config = Descent(20, 0.1, prior_weight=0.3, architecture_weight=2.0)
    options = {"architecture": 1, "prior": prior, "config": config} | QUIET
    search = optimise(two, starts, lambda nets, _: 0 * nets.rows.sum(1), **options)
    z = starts.clone().requires_grad_()
    adam, wanted = torch.optim.Adam([z], 0.1), torch.ones(3).long()
    for step in range(20):
        adam.param_groups[0]["lr"] = learning_rate(step, 20, 0.1)
        named = F.cross_entropy(two.classify(z), wanted, reduction="sum")
        (z.grad,) = torch.autograd.grad(2 * named + 0.3 * prior(z).sum(), z)
        adam.step()
    torch.testing.assert_close(search.path[-1], z.detach())


@pytest.mark.parametrize("scores", ["rising", "falling", "nan"])
def test_of_a_wanted_architecture_the_best_state_is_one_that_stands_for_it(two, scores):
    """Whatever states before and after score: searches that leave it, and one never there."""
    offset = two.encoder.offset.detach()
    starts = torch.cat([offset[:1], offset[1:] + 3 * (offset[1:] - offset[:1])])
    given = {"rising": range(99), "falling": range(99, 0, -1), "nan": [torch.nan] * 99}[scores]
    scored = iter(given)
    search = optimise(
        two, starts, lambda nets, _: 0 * nets.rows.sum(1),
        lambda nets: torch.full((2,), float(next(scored))), architecture=0,
        config=Descent(40, every=1, architecture_weight=-1.0), **QUIET,
    )  # fmt: skip
    there = torch.stack([two.predict(z) == 0 for z in search.path])
    left = int(there[:, 0].sum())
    assert 1 < left < 41
    assert not there[:, 1].any()
    assert search.reached.tolist() == [True, False]
    kept = (0, 0) if scores == "falling" else (left - 1, 40)
    for n, step in enumerate(kept):
        assert torch.equal(search.best[n], search.path[step, n])


def test_a_state_whose_score_is_nan_is_not_kept(space, images):
    scored = iter([-5.0, torch.nan, -7.0])
    search = optimise(
        space, torch.zeros(1, 6), ImageLoss(images), lambda nets: torch.tensor([next(scored)]),
        config=Descent(2, every=1), **QUIET,
    )  # fmt: skip
    assert search.score == -5
    assert torch.equal(search.best, search.path[0])


def test_random_starts_and_mini_batches_follow_the_seed(space, nets, images):
    prior, loss = Gaussian(space.encode(nets)), ImageLoss(images, samples=5)
    first, other = (
        optimise(space, 4, loss, prior=prior, config=Descent(3, seed=seed), **QUIET)
        for seed in (0, 1)
    )
    assert torch.equal(other.path[0], prior.sample(4, 1))
    assert not torch.equal(first.path[0], other.path[0])
    starts = torch.zeros(2, 6)
    losses = [
        optimise(space, starts, loss, config=Descent(3, seed=seed), **QUIET).losses[0]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


def test_the_last_state_is_kept_however_seldom_states_are_looked_at(space, images):
    starts, loss = torch.randn(3, 6, generator=generator()), ImageLoss(images)
    often, seldom = (
        optimise(space, starts, loss, config=Descent(7, every=every), **QUIET) for every in (1, 4)
    )
    assert len(seldom.path) == 3  # of steps 0, 4 and 7
    assert torch.equal(seldom.best, often.best)


def test_refining_begins_where_it_is_told_and_draws_by_its_seed(space, nets, images):
    assert torch.equal(refine(space, nets, images.x, 0), space.encode(nets))
    z = torch.randn(12, 6, generator=generator())
    assert torch.equal(refine(space, nets, images.x, 0, z=z), z)
    first, same, other = (refine(space, nets, images.x, 5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_an_axis_without_spread_counts_as_a_tenth_of_the_widest():
    z = torch.randn(50, 3, generator=generator()) * torch.tensor([3.0, 1.0, 0.0])
    gaussian = Gaussian(z)
    widest = gaussian.axes[-1]
    off = gaussian.mean + torch.stack([widest, torch.tensor([0.0, 0.0, 1.0])])
    assert float(gaussian(off)[1] / gaussian(off)[0]) == pytest.approx(100, rel=1e-3)
    full = Gaussian(z[:4, :2])  # the spread is of a sample, as torch.std's
    assert float(full(z[:4, :2]).mean()) == pytest.approx(3 / 4, rel=1e-4)


@pytest.mark.parametrize("bandwidth", [None, 2.0])
def test_samples_wander_by_the_bandwidth_in_standard_deviations(bandwidth):
    z = torch.randn(200, 2, generator=generator()) * torch.tensor([3.0, 1.0])
    options = {} if bandwidth is None else {"bandwidth": bandwidth}
    wider = sample(z, 8000, **options).var(0) / z.var(0)
    expected = 1 + (bandwidth or 0.5) ** 2  # of the zoo's and the kernel's variance
    torch.testing.assert_close(wider, torch.full((2,), expected), rtol=0.1, atol=0)


def test_draws_follow_the_seed_and_come_in_no_order():
    z = torch.cat([torch.randn(100, 4, generator=generator()) + c for c in (-20, 20)])
    first, same, other = (sample(z, 5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    drawn = sample(z, 400, GaussianMixture(2, random_state=0))
    assert 0.3 < float((drawn[:200].mean(1) > 0).float().mean()) < 0.7  # not cluster by cluster


def test_searches_are_as_long_and_as_fast_as_the_readmes_unless_told(space, nets, images):
    assert Descent() == Descent(150, 1.0, 10, 0, prior_weight=0.1, architecture_weight=1.0)
    z, same = refine(space, nets, images.x), refine(space, nets, images.x, steps=50, lr=0.2)
    assert torch.equal(z, same)
    searches = [
        optimise_weights(nets, ImageLoss(images), config=config, **QUIET)
        for config in (None, Descent(150, 3e-3))
    ]
    assert torch.equal(searches[0].path, searches[1].path)
