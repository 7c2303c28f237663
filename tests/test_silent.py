"""Inputs that once gave a wrong answer without a word: each is right now, or refused."""

import warnings
from math import nan

import numpy as np
import pytest
import torch
from torch import nn
from toy import MixesSamples, generator, looped, mlp, random_nets, small_nets, toy_data

from netspace_lite import (
    Batched,
    Descent,
    Distillation,
    Gaussian,
    ImageData,
    ImageLoss,
    Images,
    ImageTask,
    Interpolation,
    Layout,
    LeNetLike,
    LikenessLoss,
    Nets,
    NetSpace,
    Recipe,
    Siren,
    SpaceConfig,
    Zoo,
    compare,
    describe_layers,
    disagreement,
    draw_recipes,
    fit,
    initial_rows,
    kl_divergence,
    line_drop,
    lite_net,
    load_digits,
    load_images,
    nearest_by_answers,
    novelty,
    optimise_weights,
    readout,
    refine,
    sample,
    scores,
    train_zoo,
)

CONFIG = SpaceConfig(embedding=6, probes=8, hidden=8, chunk=32)
DATA = toy_data()
RECIPES = [Recipe(seed, 3) for seed in range(4)]


def flat(activation):
    return nn.Sequential(nn.Flatten(), *mlp(activation, 64))


def zoo_of(net, folder=None, task=None, recipes=RECIPES):
    return train_zoo(net, task or ImageTask(DATA, 16), recipes, folder, progress=False)


@pytest.fixture(scope="module")
def zoo():
    return zoo_of(flat(nn.ReLU()))


def test_a_zoo_of_relu_nets_is_not_loaded_for_tanh(tmp_path):
    zoo_of(flat(nn.ReLU()), tmp_path)
    with pytest.raises(ValueError, match="choose another folder"):
        zoo_of(flat(nn.Tanh()), tmp_path)
    with pytest.raises(ValueError, match="compute something else"):
        Zoo.load(tmp_path, flat(nn.Tanh()))


def fitted(zoo, folder, *, inputs=DATA.train.x, images=DATA.val, seed=0, **options):
    space = NetSpace.for_zoos(zoo, DATA.train.x, CONFIG, seed)
    objective = Distillation(space, zoo, inputs, **{"nets": 4, "samples": 4} | options)
    fit(space, objective, lambda space: scores(space, zoo, images), 2, epoch=1, folder=folder)


FITS = {
    "another zoo": lambda zoo: {"zoo": zoo_of(flat(nn.ReLU()), recipes=draw_recipes(4, seed=9))},
    "fewer of its nets": lambda zoo: {"zoo": zoo[:3]},
    "other inputs": lambda zoo: {"inputs": DATA.train.x + 1},
    "another setting": lambda zoo: {"samples": 5},
    "no analogies": lambda zoo: {"analogies": 0},
    "another loss": lambda zoo: {"loss": lambda outputs, targets, scale: outputs.mean((1, 2))},
    "other images to validate on": lambda zoo: {"images": DATA.test},
    "another seed of the space": lambda zoo: {"seed": 1},
}


@pytest.mark.parametrize("change", FITS)
def test_a_fit_of_something_else_is_not_loaded(zoo, change, tmp_path):
    fitted(zoo, tmp_path)
    fitted(zoo, tmp_path)  # the very same is
    with pytest.raises(ValueError, match="choose another folder"):
        fitted(**{"zoo": zoo, "folder": tmp_path} | FITS[change](zoo))


def test_dropout_is_off_in_every_answer():
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3), nn.Dropout(0.5)).train()
    rows = initial_rows(net, [1, 2])
    nets, plain = Nets(net, rows), Nets(nn.Sequential(*net[::2]), rows)
    torch.testing.assert_close(nets.outputs(DATA.val.x), plain.outputs(DATA.val.x))
    torch.testing.assert_close(nets(DATA.val.x), plain(DATA.val.x))
    assert torch.equal(nets.accuracy(DATA.val), plain.accuracy(DATA.val))
    spaces = [NetSpace.for_zoos(n, DATA.train.x, CONFIG) for n in (nets, plain)]
    torch.testing.assert_close(spaces[0].encode(nets), spaces[1].encode(plain))
    torch.testing.assert_close(spaces[0].encode([net, net]), spaces[0].encode([net.eval()] * 2))


def test_two_architectures_of_one_layout_are_told_apart():
    relu, tanh = (random_nets(flat(f), 3, scale=0.3) for f in (nn.ReLU(), nn.Tanh()))
    space = NetSpace.for_zoos([relu, tanh], DATA.train.x, CONFIG)
    assert [space.index(nets) for nets in (relu, tanh)] == [0, 1]
    assert [space.index(nets.to_module()) for nets in (relu, tanh)] == [0, 1]
    torch.testing.assert_close(space.encode(tanh), space.encode(tanh.rows, 1))
    assert (space.encode(tanh) - space.encode(tanh.rows, 0)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="compute something else|architecture"):
        space.encode(relu, 1)
    with pytest.raises(ValueError, match="not one of this space"):
        NetSpace.for_zoos(relu, DATA.train.x, CONFIG).encode(tanh)


def test_one_nan_net_does_not_spoil_the_embeddings_of_others(zoo):
    rows = zoo.rows.clone()
    rows[2, 5] = torch.nan
    with pytest.raises(ValueError, match=r"nets \[2\] are not finite"):
        NetSpace.for_zoos(Nets(zoo.batched, rows), DATA.train.x, CONFIG)
    space = NetSpace.for_zoos(zoo, DATA.train.x, CONFIG)
    with pytest.raises(ValueError, match=r"nets \[2\] are not finite"):
        space.encode(rows)
    with pytest.warns(UserWarning, match=r"nets \[2\] are not finite.*left out"):
        assert Zoo(zoo.batched, rows).members.tolist() == [0, 1, 3]


def test_a_nan_score_is_never_the_best(zoo):
    space = NetSpace.for_zoos(zoo, DATA.train.x, CONFIG)
    given, states = iter([float("nan"), 1.0, 0.5]), []

    def validate(space):
        states.append(space.encode(zoo))
        return {"score": next(given)}

    objective = Distillation(space, zoo, DATA.train.x, nets=4, samples=4)
    fit(space, objective, validate, 3, epoch=1)
    assert torch.equal(space.encode(zoo), states[1])


def test_refining_decodes_nets_as_the_architecture_they_are():
    zoos = [random_nets(net, 4, scale=0.3) for net in small_nets()[:2]]
    space = NetSpace.for_zoos(zoos, DATA.train.x, CONFIG)
    before = scores(space, zoos[1], DATA.val)["agreement"]
    z = refine(space, zoos[1], DATA.train.x, 60)
    decoded = space.decode(z, 1)
    agreement = (
        (decoded.outputs(DATA.val.x).argmax(-1) == zoos[1].outputs(DATA.val.x).argmax(-1))
        .float()
        .mean()
    )
    assert float(agreement) * 100 > before
    torch.testing.assert_close(z, refine(space, zoos[1], DATA.train.x, 60, z=space.encode(zoos[1])))


def test_a_siren_with_its_own_forward_is_not_run_by_the_stock_kernel():
    class Scaled(Siren):
        def forward(self, points):
            return 10 * self.layers(points)

    x, rows = torch.randn(5, 3), initial_rows(Siren(8), [1, 2])
    torch.testing.assert_close(Batched(Scaled(8))(rows, x), 10 * Batched(Siren(8))(rows, x))
    changed = Siren(8)
    changed.layers[1].omega = 5.0
    expected = torch.stack([changed_answer(changed, row, x) for row in rows])
    torch.testing.assert_close(Batched(changed)(rows, x), expected)


def changed_answer(module, row, x):
    nn.utils.vector_to_parameters(row, module.parameters())
    return module(x).detach()


def test_modules_with_buffers_leave_a_zoo():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)
            self.register_buffer("shift", torch.ones(3))

        def forward(self, x):
            return self.linear(x) + self.shift

    nets, x = random_nets(Shifted(), 2), torch.randn(5, 4)
    torch.testing.assert_close(nets.to_module(1)(x), nets.outputs(x)[1])


@pytest.mark.filterwarnings("ignore:Raises runs")
def test_a_failing_self_check_leaves_the_module_in_training_mode():
    class Raises(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            if x.sum() > 0:
                raise RuntimeError("no such inputs")
            return self.linear(x)

    module = Raises().train()
    with pytest.raises(ValueError, match="Raises can't take inputs .* no such inputs"):
        Batched(module)(random_nets(module, 2).rows, torch.ones(2, 4))
    assert module.training


def test_a_partial_epoch_is_averaged_over_its_own_steps(zoo):
    space = NetSpace.for_zoos(zoo, DATA.train.x, CONFIG)

    def objective(space, generator):
        return sum(p.sum() for p in space.parameters()) * 0 + 4.0

    history = fit(space, objective, lambda space: {"score": 0.0}, 5, epoch=4)
    assert [row["loss"] for row in history] == [4.0, 4.0]


def test_sampling_takes_all_that_an_estimator_draws():
    class Copies:
        def fit(self, x):
            self.x = x

        def sample(self, n):
            return self.x[:n]

    z = torch.randn(9, 4, generator=generator())
    torch.testing.assert_close(sample(z, 5, Copies()), z[:5], rtol=1e-4, atol=1e-4)


def test_zoos_of_several_architectures_share_no_seeds():
    streams = [draw_recipes(100, seed=0, stream=name) for name in ("LeNetLike", "ResNet8", "")]
    assert len({recipe.seed for recipes in streams for recipe in recipes}) == 300
    assert draw_recipes(5, stream="LeNetLike") == draw_recipes(5, stream="LeNetLike")
    assert draw_recipes(5, seed=1, stream="x") != draw_recipes(5, seed=2, stream="x")


def test_held_out_nets_share_neither_start_nor_order_with_training_nets():
    """One architecture twice: another stream is another initialisation and order."""
    net = LeNetLike((1, 8, 8), 3, channels=(4,), hidden=(8,), kernel=3)
    one, other = (draw_recipes(20, stream=name) for name in ("a", "b"))
    starts = [initial_rows(net, [r.seed for r in recipes]) for recipes in (one, other)]
    assert torch.cdist(*starts).min() > 0.1


class MixesInputs(MixesSamples):
    """Centres each batch before any weight tells nets apart."""

    def forward(self, x):
        return self.linear(x - x.mean(0))


@pytest.mark.parametrize("first", ["one net", "equal nets", "equal inputs"])
def test_how_nets_run_does_not_depend_on_what_was_asked_first(first):
    torch.manual_seed(0)
    per_net, rows, x = first == "equal inputs", torch.randn(5, 15), torch.randn(5, 7, 4)
    module, equal = MixesInputs() if per_net else MixesSamples(), x[:1].expand(5, -1, -1)
    batched = Batched(module)
    asked = {
        "one net": (rows[:1], x[0]),
        "equal nets": (rows[:1].expand(3, -1), x[0]),
        "equal inputs": (rows, equal, True),
    }
    x = x if per_net else x[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batched(*asked[first])
        found = batched(rows, x, per_net)
    torch.testing.assert_close(found, looped(module, rows, x, per_net), rtol=1e-4, atol=1e-4)


def learns_as_looped(net, rows, x, **tolerance):
    """The gradient of nets with inputs of their own, which goes back through all layers."""
    answers = Batched(net)(rows.requires_grad_(), x, True), looped(net, rows, x, True)
    found, expected = (torch.autograd.grad(y.tanh().square().sum(), rows)[0] for y in answers)
    torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("nets", [1, 2])
def test_steps_in_place_after_unfolded_convolutions_learn(nets):
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 6, 3, 2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(54, 4)
    net, x = nn.Sequential(*layers), torch.randn(nets, 5, 1, 8, 8)
    learns_as_looped(net, initial_rows(net, range(nets)), x, rtol=1e-4, atol=1e-4)


def test_an_instance_norm_of_one_channel_before_an_unfolded_convolution_learns():
    """PyTorch's backward of it reads a gradient with samples innermost wrongly."""
    torch.manual_seed(0)
    layers = nn.InstanceNorm2d(1, affine=True), nn.Conv2d(1, 3, 3, 2), nn.Flatten()
    net, x = nn.Sequential(*layers).double(), torch.randn(1, 3, 1, 8, 8, dtype=torch.double)
    learns_as_looped(net, initial_rows(net, [0]), x)


class Centres(nn.Module):
    """A user's own layer without parameters; changes its input."""

    def forward(self, x):
        x -= 0.5
        return x


class Looks(nn.Linear):
    """Looks at values, which neither a trace nor vmap can."""

    def forward(self, x):
        y = super().forward(x)
        return y if float(y.detach().abs().sum()) > 0 else -y


@pytest.mark.filterwarnings("ignore:.*which is slower")
@pytest.mark.parametrize("per_net", [False, True], ids=["shared", "per net"])
@pytest.mark.parametrize("way", ["interpreted", "vmap", "loop"])
@pytest.mark.parametrize("first", [nn.LeakyReLU(0.5, inplace=True), Centres()])
def test_steps_in_place_leave_the_callers_inputs_alone(first, way, per_net):
    """Every net, block and call after the first was given inputs that were changed already."""
    last = {"interpreted": nn.Linear(4, 3), "vmap": MixesSamples(), "loop": Looks(4, 3)}[way]
    net = nn.Sequential(first, last)
    nets, x = random_nets(net, 70), torch.randn(70, 5, 4) if per_net else torch.randn(5, 4)
    kept, found = x.clone(), torch.stack([nets(x, per_net), nets.outputs(x, per_net)])
    assert nets.batched.way(False, per_net) == way
    assert torch.equal(x, kept)
    alone = [nets.to_module(n)((x[n] if per_net else x).clone()) for n in range(70)]
    torch.testing.assert_close(found, torch.stack(alone).expand_as(found))


def test_nets_of_several_dtypes_are_not_packed_as_one():
    with pytest.raises(ValueError, match="make them alike"):
        Zoo.from_modules([nn.Linear(3, 2).bfloat16(), nn.Linear(3, 2)])


def test_a_factory_of_random_constants_is_refused_and_a_changed_net_kept():
    class Drawn(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("drawn", torch.randn(64, 6))
            self.last = nn.Linear(6, 10)

        def forward(self, x):
            return self.last(x.flatten(1) @ self.drawn)

    data = load_digits()
    with pytest.raises(ValueError, match="from a fixed seed"):
        train_zoo(Drawn, ImageTask(data), [Recipe(0, 2)])
    net = lite_net("LeNetLike", data.shape, 10)
    net.layers[-1] = nn.Linear(64, 5)
    assert initial_rows(net, [0]).shape == (1, Layout.of(net).size)


def test_a_copy_has_no_novelty_in_a_zoo_of_any_size():
    net = nn.Linear(300, 2)
    nets = Nets(net, initial_rows(net, range(40)))
    assert novelty(nets[:30], torch.randn(3, 300), nets)["weights"].max() == 0


def test_a_fit_of_other_parameters_is_not_taken_for_this_one(tmp_path):
    zoo = random_nets(small_nets()[0], 5)

    def fitted(frozen):
        space = NetSpace.for_zoos(zoo, DATA.train.x, CONFIG)
        space.decoder.requires_grad_(not frozen)
        fit(space, Distillation(space, zoo, DATA.train.x), lambda s: {"none": 0.0}, 2, epoch=2,
            folder=tmp_path)  # fmt: skip

    fitted(frozen=False)
    fitted(frozen=False)
    with pytest.raises(ValueError, match="another learned"):
        fitted(frozen=True)


def test_nets_that_answer_one_value_are_not_compared_by_class():
    nets = random_nets(nn.Linear(3, 1), 4)
    x, y = torch.randn(9, 3), torch.zeros(9, dtype=torch.long)
    answers, asked = nets.outputs(x), Images(x, y)
    for compared in (
        lambda: nets.accuracy(asked),
        lambda: compare(answers, answers, y),
        lambda: disagreement(answers, answers),
        lambda: scores(NetSpace.for_zoos(nets, x, CONFIG), nets, asked),
    ):
        with pytest.raises(ValueError, match="no logits"):
            compared()
    space = NetSpace.for_zoos(nets, x, CONFIG)
    with pytest.raises(ValueError, match="pass loss=squared_error"):
        fit(space, Distillation(space, nets, x), lambda s: {"score": 0.0}, 1)
    with pytest.raises(ValueError, match="pass loss=squared_error"):
        refine(space, nets, x, 1)


@pytest.mark.parametrize("values", [1, 3])
def test_nets_that_answer_values_are_learned(values):
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, values))
    nets = Nets(net, initial_rows(net, range(12)))
    x = torch.randn(64, 3, generator=generator(1))
    space = NetSpace.for_zoos(nets, x, SpaceConfig(chunk=32, values=True))

    def error(space):
        difference = space.decode(space.encode(nets)).outputs(x) - nets.outputs(x)
        return {"score": -float(difference.square().mean())}

    fit(space, Distillation(space, nets, x), error, 200, epoch=200)
    assert error(space)["score"] > -nets.outputs(x).var(0).mean() / 20


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"chances": (0.5, 0.5)}, "one of each zoo"),  # the second has no zoo: sometimes an error
        ({"chances": (-1,)}, "none under 0"),
        ({"chances": (0,)}, "none under 0"),
        ({"analogies": 2}, "shares, 0 to 1"),
        ({"crossing": -0.5}, "shares, 0 to 1"),
        ({"nets": 0}, "needs nets and samples"),
        ({"samples": 0}, "needs nets and samples"),
    ],
)
def test_a_step_that_can_not_be_drawn_is_refused_before_the_first(zoo, given, said):
    space = NetSpace.for_zoos(zoo, DATA.train.x, CONFIG)
    with pytest.raises(ValueError, match=said):
        Distillation(space, zoo, DATA.train.x, **given)


def test_sizes_rates_and_ranges_that_mean_nothing_are_refused(zoo):
    for name in ("embedding", "chunk", "hidden", "probes", "components"):
        with pytest.raises(ValueError, match=f"{name} is a number from"):
            SpaceConfig(**{name: -1})
    SpaceConfig(probes=0, components=0)
    space = NetSpace.for_zoos(zoo, DATA.train.x, CONFIG)
    with pytest.raises(ValueError, match="should be over 0"):
        fit(space, Distillation(space, zoo, DATA.train.x), lambda s: {"score": 0.0}, 1, lr=-1e-3)
    for ranges in ({"steps": (0, 2)}, {"lr": (-1, 2)}, {"weight_decay": (2, 1)}):
        with pytest.raises(ValueError, match="0 < low ≤ high"):
            draw_recipes(3, **ranges)


def test_labels_that_would_be_compared_crosswise_are_refused():
    with pytest.raises(ValueError, match="each image needs one label"):
        Images(DATA.val.x, DATA.val.y[:, None])
    with pytest.raises(ValueError, match="each image needs one label"):
        Images(DATA.val.x, DATA.val.y[1:])
    assert Images(DATA.val.x, DATA.val.y)[0].y == DATA.val.y[0]


def test_state_dicts_of_another_architecture_are_refused(zoo):
    space = NetSpace.for_zoos(zoo, DATA.train.x, CONFIG)
    same = zoo.to_module(0).state_dict()
    torch.testing.assert_close(space.encode(same), space.encode(zoo[0]))
    with pytest.raises(ValueError, match="state dicts hold .*running_mean.*, too"):
        space.encode(same | {"norm.running_mean": torch.zeros(3)})


def test_a_teacher_that_works_in_place_leaves_images_alone():
    images = Images(DATA.val.x.clone(), DATA.val.y)
    ImageLoss(images, nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 3)))
    assert torch.equal(images.x, DATA.val.x)


def spoiled(loss, at):
    """A loss whose gradient, not its value, is NaN from the ``at``-th call."""
    calls = []

    def changed(*arguments):
        calls.append(1)
        value = loss(*arguments)
        return value if len(calls) < at else value + (value - value.detach()).square().sqrt()

    return changed


def test_gradients_that_are_not_finite_stop_searches_and_fits(zoo):
    space = NetSpace.for_zoos(zoo, DATA.train.x, CONFIG)
    like = Distillation(space, zoo, DATA.train.x)
    with pytest.raises(ValueError, match="step 2: the gradient is not finite"):
        fit(space, spoiled(like, 3), lambda s: {"score": 0.0}, 3)
    assert all(p.isfinite().all() for p in space.parameters())

    def small(nets, generator):
        return nets(DATA.val.x).square().mean((1, 2))

    with pytest.warns(UserWarning, match="gradient is not finite at step 4"):
        z = refine(space, zoo, spoiled(small, 5), 5)
    assert z.isfinite().all()


def test_two_zoos_of_one_architecture_are_not_one_over_the_other(zoo):
    with pytest.raises(ValueError, match="several zoos of one architecture"):
        NetSpace.for_zoos([zoo, zoo], DATA.train.x, CONFIG, modules=[zoo.module])


def test_a_score_that_is_nan_is_no_best_one(zoo):
    scored = Zoo(zoo.batched, zoo.rows[:3], {"val_accuracy": torch.tensor([50.0, nan, 90.0])})
    space = NetSpace.for_zoos(scored, DATA.train.x, CONFIG)
    assert torch.equal(space.decoder.bias[0], scored.rows[2])


def test_columns_are_read_out_as_vectors_are():
    x = torch.randn(30, 5, generator=generator())
    y = x[:, :1] * 2 + 0.1 * torch.randn(30, 1, generator=generator(1))
    column, vector = (readout(x[:20], y_[:20], x[20:], y_[20:])[1] for y_ in (y, y[:, 0]))
    assert column == vector > 0.9


def test_answers_of_other_axes_are_refused():
    net = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))  # one number a sample, no axis of classes
    with pytest.raises(ValueError, match=r"answers of shape \[1, 8\] are not \[N, B, K\]"):
        NetSpace.for_zoos(random_nets(net, 4), torch.randn(20, 4), CONFIG).encode(
            random_nets(net, 4)
        )


def test_features_are_read_again_for_other_probes(zoo):
    space = NetSpace.for_zoos(zoo, DATA.train.x, CONFIG)
    pool, n = Distillation(space, zoo, DATA.train.x).pool, torch.arange(4)
    torch.testing.assert_close(pool.encode(space, n), space.encode(zoo))
    space.probes = nn.Parameter(torch.randn(8, 1, 8, 8), requires_grad=False)
    torch.testing.assert_close(pool.encode(space, n), space.encode(zoo))


def test_images_of_two_scales_are_refused(tmp_path):
    x, y = DATA.train.x[:, 0].sigmoid().numpy(), DATA.train.y.numpy()
    np.savez(tmp_path / "two.npz", x_train=255 * x, y_train=y, x_test=x, y_test=y)
    with pytest.raises(ValueError, match="of two scales, up to"):
        load_images(tmp_path / "two.npz")


def test_parameters_described_alike_are_refused():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
            self.gamma, self.beta = nn.Parameter(torch.ones(5)), nn.Parameter(torch.zeros(5))

        def forward(self, x):
            return self.last(torch.relu(self.first(x)) * self.gamma + self.beta)

    with pytest.raises(ValueError, match="gamma.* are described alike"):
        describe_layers(Layout.of(Scaled()))


def test_randomness_of_a_gpu_is_left_alone(monkeypatch, zoo):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    NetSpace.for_zoos(zoo, DATA.train.x, CONFIG)
    initial_rows(flat(nn.ReLU()), [0, 1])
    assert seeded == []


def test_embeddings_that_are_all_alike_are_not_sampled():
    with pytest.raises(ValueError, match="2 embeddings .* that differ"):
        sample(torch.ones(3, 4), 2)


def test_a_prior_is_measured_in_any_dtype_and_of_finite_values():
    z = torch.randn(9, 4, generator=generator())
    rounded = Gaussian(z.bfloat16())(z.bfloat16())
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), Gaussian(z)(z), rtol=0.1, atol=0.1)
    with pytest.raises(ValueError, match="not finite"):
        Gaussian(z * nan)


def test_nets_first_asked_in_inference_mode_can_be_searched():
    class Scales(nn.Module):
        def __init__(self):
            super().__init__()
            self.steps = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
            self.register_buffer("by", torch.tensor([1.0, 2, 3]))

        def forward(self, x):
            return self.steps(x) * self.by

    nets = random_nets(Scales(), 3)
    with torch.inference_mode():
        nets.accuracy(DATA.val)
    found = optimise_weights(nets, ImageLoss(DATA.val), config=Descent(2), progress=False)
    assert found.nets.finite().all()


def test_counts_that_mean_nothing_are_refused(zoo):
    with pytest.raises(ValueError, match="needs some"):
        ImageLoss(DATA.val, samples=-5)
    space = NetSpace.for_zoos([zoo], DATA.train.x, CONFIG)
    with pytest.raises(ValueError, match="pass apart="):
        Interpolation(space, zoo, ImageLoss(DATA.val), apart=0)


def test_a_fit_needs_gradients_whatever_its_caller_does(zoo):
    space = NetSpace.for_zoos(zoo, DATA.train.x, CONFIG)
    before = space.decoder.hidden.weight.clone()
    with torch.no_grad():
        fit(space, Distillation(space, zoo, DATA.train.x), lambda s: {"score": 0.0}, 1)
    assert not torch.equal(before, space.decoder.hidden.weight)


@pytest.mark.parametrize("changed", ["nets", "inputs"])
def test_nets_and_inputs_that_change_are_asked_again(zoo, changed):
    """Seen before: steps on what they were, kept under the fingerprint of what they are."""
    nets, x = zoo[:], DATA.train.x.clone()
    space = NetSpace.for_zoos(nets, x, CONFIG)
    objective = Distillation(space, nets, x, nets=4, samples=8)
    objective(space, generator())
    {"nets": nets.rows, "inputs": x}[changed].mul_(-0.5)
    expected = Distillation(space, nets, x, nets=4, samples=8)(space, generator())
    assert torch.equal(objective(space, generator()), expected)


def test_a_zoo_scored_by_another_task_is_not_the_one_that_was_trained(tmp_path):
    """Seen before: the other task's scores were loaded as this one's."""
    net, other = flat(nn.ReLU()), ImageTask(DATA, 8)
    zoo = zoo_of(net, tmp_path)
    zoo.scored(ImageTask(DATA, 16)).save(tmp_path)
    assert torch.equal(zoo_of(net, tmp_path).rows, zoo.rows)
    zoo.scored(other).save(tmp_path)
    with pytest.raises(ValueError, match="holds work with another task"):
        zoo_of(net, tmp_path)


def test_a_space_that_reads_weights_only_names_its_precision(zoo):
    space = NetSpace.for_zoos(zoo, DATA.train.x, SpaceConfig(probes=0, chunk=32)).double()
    with pytest.raises(ValueError, match="nets are torch.float32, the space is torch.float64"):
        space.encode(zoo)


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_images_that_are_not_finite_are_named(zoo, part):
    """Seen before: nets that diverged were told to learn more slowly, and accuracies fell."""
    parts = {name: getattr(DATA, name) for name in ("train", "val", "test")}
    x = parts[part].x.clone()
    x[3, 0, 0, 0] = nan
    parts[part] = Images(x, parts[part].y)
    with pytest.raises(ValueError, match=rf"{part} images \[3\] are not finite"):
        ImageData("toy", **parts, classes=DATA.classes)
    with pytest.raises(ValueError, match=r"inputs \[3\] are not finite"):
        LikenessLoss(zoo, x)


def test_one_label_is_not_that_of_many_images(zoo):
    with pytest.raises(ValueError, match="each image needs one label"):
        zoo.accuracy((DATA.val.x, torch.tensor(1)))
    one = DATA.val[0]
    assert (one.x.shape, one.y.shape) == (DATA.shape, ())


@pytest.mark.parametrize("wrong", [-100, 1])
def test_labels_that_are_no_classes_have_no_loss(zoo, wrong):
    """Seen before: PyTorch leaves −100 out of the mean, and of nothing but that the loss was 0."""
    pair = Images(DATA.val.x, DATA.val.y * (wrong > 0) + wrong)
    with pytest.raises(ValueError, match="labels of 3 classes are numbers 0..2"):
        ImageLoss(pair)(zoo, generator())
    own = ImageLoss(pair, loss=lambda logits, y: logits.square().mean((1, 2)))
    assert own(zoo, generator()).shape == (len(zoo),)  # a loss of your own reads them as it likes


def test_answers_in_each_others_place_have_no_nearest_net(zoo):
    answers = zoo.outputs(DATA.val.x).flatten(1)
    asked = answers[[2, 1]]
    assert torch.equal(nearest_by_answers(answers, asked, zoo).rows, zoo.rows[[2, 1]])
    for swapped in ((asked, answers), (answers, asked[:, 1:]), (answers[None], asked[None])):
        with pytest.raises(ValueError, match="of the zoo's 4 nets come first"):
            nearest_by_answers(*swapped, zoo)


def test_what_does_not_belong_together_is_not_compared(zoo):
    logits = zoo.outputs(DATA.val.x)
    for other in (logits[..., :2], logits[:, :3], logits[:, :1]):
        with pytest.raises(ValueError, match="same samples and classes"):
            disagreement(logits, other)
        with pytest.raises(ValueError, match="differ in nets or classes, or in samples"):
            kl_divergence(logits, other, 1.0)
    with pytest.raises(ValueError, match=r"ends of 2 lines are \[2, 2\]"):
        line_drop(torch.rand(2, 9), torch.rand(2, 5))


def test_a_property_is_one_number_a_net():
    """Seen before: one prediction was compared with the values of eight nets."""
    z, y = torch.randn(8, 4), torch.randn(8)
    for wrong in ((z, y, z[:1], y), (z, y, z, y[:1]), (z, y[:3], z, y)):
        with pytest.raises(ValueError, match="one number a net"):
            readout(*wrong)


def test_parts_of_other_sizes_are_no_data_set():
    with pytest.raises(ValueError, match="val images are .* all of one size"):
        ImageData("toy", DATA.train, Images(DATA.val.x[..., 1:], DATA.val.y), DATA.test, 3)
    with pytest.raises(ValueError, match="test images are .* each part needs some"):
        ImageData("toy", DATA.train, DATA.val, DATA.test[:0], 3)


def test_places_run_backwards_as_in_a_list(zoo):
    assert torch.equal(zoo[::-1].rows, zoo.rows.flip(0))
    assert torch.equal(zoo[2:0:-1].rows, zoo.rows[[2, 1]])


def test_numbers_of_numpy_are_sizes(zoo):
    """Seen before: a batch of np.int64(8) overflowed in the data's order."""
    two = np.int64(2)
    found = train_zoo(flat(nn.ReLU()), ImageTask(DATA, np.int64(8)), RECIPES[:3], block=two)
    expected = train_zoo(flat(nn.ReLU()), ImageTask(DATA, 8), RECIPES[:3], block=2)
    assert torch.equal(found.rows, expected.rows)
    assert Descent(steps=two, seed=two).seed == 2


def test_wrappers_in_wrappers_are_taken_off():
    net = mlp(nn.ReLU())
    wrapped = nn.DataParallel(torch.compile(nn.DataParallel(net), backend="eager"))
    assert torch.equal(Zoo.from_modules([wrapped]).rows, Zoo.from_modules([net]).rows)
