"""Nets that answer values, or at several places a sample; and what all nets of a zoo share."""

import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from netspace_lite.kernels.plan import translate
from sklearn.metrics import r2_score
from torch import nn
from toy import generator, random_nets, toy_data

from netspace_lite import (
    Batched,
    Descent,
    Distillation,
    Gaussian,
    ImageTask,
    LeNetLike,
    LikenessLoss,
    Nets,
    NetSpace,
    Recipe,
    SpaceConfig,
    Zoo,
    averages,
    compare,
    disagreement,
    fit,
    kl_divergence,
    logit_scale,
    nearest_by_weights,
    novelty,
    optimise,
    r_squared,
    refine,
    squared_error,
    train_zoo,
)
from netspace_lite.batching import samples_per_block
from netspace_lite.nets import classes, correct, cross_entropy

SMALL = SpaceConfig(embedding=8, chunk=32, probes=16, hidden=16)
VALUES = replace(SMALL, values=True)
X = torch.randn(64, 3, generator=generator(1))


class Repeated(nn.Module):
    """One value, K times."""

    def __init__(self, times):
        super().__init__()
        self.net, self.times = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)), times

    def forward(self, x):
        return self.net(x).expand(-1, self.times)


class Speaks(nn.Module):
    """Tokens [B, T] -> logits [B, T, 5]."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 6), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(torch.tanh(self.embed(x)).cumsum(1))


TOKENS = torch.randint(5, (20, 4), generator=generator(2))


def speakers(count=12):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*which is slower")
        nets = random_nets(Speaks(), count)
        nets.outputs(TOKENS)
        return nets


# --- several values -------------------------------------------------------------------


def test_an_encoder_of_values_sees_their_mean():
    """Seen before: it saw nothing of nets whose values are all alike, as of Q(s, a) = V(s)."""
    nets = Nets(Repeated(3).double(), random_nets(Repeated(3), 6).rows.double())
    seen = {}
    for values in (False, True):
        config = SpaceConfig(embedding=8, probes=16, hidden=16, weights=False, values=values)
        seen[values] = NetSpace.for_zoos(nets, X.double(), config).encode(nets)
    torch.testing.assert_close(seen[False], seen[False][:1].expand(6, -1))
    assert torch.cdist(seen[True], seen[True]).fill_diagonal_(1).min() > 1e-2


@pytest.mark.filterwarnings("ignore:.*less their mean")
def test_values_given_three_times_are_learned():
    """Seen before: no better than their mean, by an encoder that reads answers alone."""
    nets, found = random_nets(Repeated(3), 60, seed=3), {}
    for values in (True, False):
        space = NetSpace.for_zoos(nets, X, replace(SMALL, weights=False, values=values))
        objective = Distillation(space, nets, X, loss=squared_error)
        fit(space, objective, lambda s: {"score": 0.0}, 400, epoch=400)
        decoded = space.decode(space.encode(nets))
        found[values] = r_squared(decoded.outputs(X), nets.outputs(X)).median()
    assert found[False] < 0.2 < 0.5 < found[True]


def test_a_space_of_values_compares_them_by_squared_error():
    nets = random_nets(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), 5)
    space = NetSpace.for_zoos(nets, X, VALUES)
    own, given = Distillation(space, nets, X), Distillation(space, nets, X, loss=squared_error)
    assert own(space, generator()) == given(space, generator())
    z = [refine(space, nets, X, 3, **how) for how in ({}, {"loss": squared_error})]
    assert torch.equal(*z)
    logits = NetSpace.for_zoos(nets, X, SMALL)
    z = [refine(logits, nets, X, 3, **how) for how in ({}, {"loss": kl_divergence})]
    assert torch.equal(*z)


def test_the_scale_of_values_is_their_root_mean_square():
    """Seen before: of their differences from the mean over values, a thousandth of it."""
    nets = random_nets(Repeated(3), 4)
    answers = nets.outputs(X)
    rms = answers.square().mean((1, 2), keepdim=True).sqrt()
    torch.testing.assert_close(LikenessLoss(nets, X, loss=squared_error).scale, rms)
    torch.testing.assert_close(logit_scale(answers, values=True), rms)
    assert LikenessLoss(nets, X, values=False).scale.equal(torch.ones(4, 1, 1))  # nothing said


def test_values_of_any_shape_are_compared():
    picture = nn.Sequential(nn.Linear(3, 8), nn.Unflatten(1, (2, 2, 2)))
    nets = random_nets(picture, 4)
    space = NetSpace.for_zoos(nets, X, VALUES)
    fit(space, Distillation(space, nets, X), lambda s: {"score": 0.0}, 2, epoch=2)
    assert refine(space, nets, X, 2).shape == (4, 8)
    found, wanted = nets.outputs(X), nets.outputs(X).roll(1, 0)
    error = squared_error(found, wanted, 2.0)
    torch.testing.assert_close(error, ((found - wanted) / 2).square().flatten(1).mean(1))
    with pytest.raises(ValueError, match="values have no classes"):
        Distillation(space, nets, X, consensus=0.1)
    loss = LikenessLoss(nets, X, values=True, loss=squared_error)
    assert loss(nets, generator()).equal(torch.zeros(4))


def test_several_values_in_a_space_of_logits_are_told():
    nets = random_nets(Repeated(3), 4)
    space = NetSpace.for_zoos(nets, X, SMALL)
    with pytest.warns(UserWarning, match=r"3 values less their mean: SpaceConfig\(values=True\)"):
        Distillation(space, nets, X, loss=squared_error)(space, generator())


def test_r_squared_is_scikit_learns():
    target, predicted = torch.randn(2, 3, 20, 4, generator=generator())
    expected = [
        r2_score(t, p, multioutput="variance_weighted")
        for p, t in zip(predicted.numpy(), target.numpy(), strict=True)
    ]
    torch.testing.assert_close(r_squared(predicted, target), torch.tensor(expected).float())
    assert r_squared(target, target).equal(torch.ones(3))
    with pytest.raises(ValueError, match="as many nets each"):
        r_squared(predicted, target[:, :5])


# --- several places a sample ----------------------------------------------------------


def test_places_of_a_sample_count_as_samples():
    nets = speakers()
    logits, y = nets.outputs(TOKENS), TOKENS.roll(-1, 1)
    flat, labels = logits.flatten(1, 2), y.flatten()
    assert logits.shape == (12, 20, 4, 5)
    assert classes(logits).equal(classes(flat))
    assert correct(logits, y).equal(correct(flat, labels))
    torch.testing.assert_close(cross_entropy(logits, y), cross_entropy(flat, labels))
    assert compare(logits[1:], logits[:-1], y) == compare(flat[1:], flat[:-1], labels)
    assert disagreement(logits, logits).equal(disagreement(flat, flat))
    assert logit_scale(logits).equal(logit_scale(flat))
    scale = logit_scale(logits)
    kl = kl_divergence(logits[1:], logits[:-1], scale[:-1])
    soft, own = (part / scale[:-1, ..., None] for part in (logits[:-1], logits[1:]))
    soft, own = soft.log_softmax(-1), own.log_softmax(-1)
    expected = F.kl_div(own, soft, reduction="none", log_target=True).sum(-1).mean((1, 2))
    torch.testing.assert_close(kl, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="B labels"):
        compare(logits[1:], logits[:-1], y[:, :2])
    with pytest.raises(ValueError, match=r"80 answers need as many labels, not \[20\]"):
        nets.accuracy((TOKENS, y[:, 0]))


@pytest.mark.filterwarnings("ignore:.*which is slower")
def test_a_space_of_nets_that_answer_at_every_place():
    nets = speakers()
    space = NetSpace.for_zoos(nets, TOKENS, SMALL)

    def score(space):
        found = space.decode(space.encode(nets)).outputs(TOKENS)
        return compare(found, nets.outputs(TOKENS), TOKENS)

    before = score(space)["agreement"]
    objective = Distillation(space, nets, TOKENS, nets=12, samples=8, consensus=0.1)
    fit(space, objective, score, 150, epoch=150)
    assert score(space)["agreement"] > before + 20
    loss = LikenessLoss(nets, TOKENS)
    z, polished = space.encode(nets), refine(space, nets, TOKENS, 20)
    pairs = [loss(space.decode(at), generator()).mean() for at in (z, polished)]
    assert pairs[1] < pairs[0]
    assert novelty(nets, TOKENS)["function"].min() > 0


def test_the_consensus_of_places_is_that_of_samples():
    nets = speakers(5)
    loss = LikenessLoss(nets, TOKENS, consensus=1.0)
    chosen = nets.outputs(TOKENS).argmax(-1)  # [N, S, T]
    votes = F.one_hot(chosen, 5).sum(0).argmax(-1)
    assert loss.choice.equal(votes)
    assert loss(nets, generator()).abs().max() < 1e-5
    other = loss(Nets(nets.batched, nets.rows.flip(0)), generator())
    assert other.min() > 1e-3 or other.argmin() == 2  # the middle one stays itself


@pytest.mark.filterwarnings("ignore:.*which is slower")
@pytest.mark.parametrize(
    ("shape", "said"),
    [((2, 2, 2), "classes last"), ((), "let the module give"), ("merged", "one answer to each")],
)
def test_answers_that_can_not_be_read_are_refused_at_once(shape, said):
    """Seen before: a space was built, and its first fit or its first encoding failed."""
    after = [nn.Unflatten(1, shape)] if isinstance(shape, tuple) and shape else [nn.Flatten(0)]
    after = [nn.Unflatten(1, (2, 4)), nn.Flatten(0, 1)] if shape == "merged" else after
    nets = random_nets(nn.Sequential(nn.Linear(3, 8 if shape else 1), *after), 3)
    with pytest.raises(ValueError, match=said):
        LikenessLoss(nets, X)
    if shape != "merged":
        with pytest.raises(ValueError, match=said):
            NetSpace.for_zoos(nets, X, SMALL)


def test_tokens_are_asked_few_at_a_time():
    found = [samples_per_block(x) for x in (torch.zeros(9, 64).long(), torch.zeros(9, 64))]
    assert found == [64, 4096]


# --- what all nets share --------------------------------------------------------------


def frozen_zoo(count=8):
    """Nets of one first layer, trained elsewhere, and a padding row that nothing trains."""
    torch.manual_seed(0)
    first = nn.Linear(3, 6)
    nets = []
    for _ in range(count):
        own = nn.Linear(3, 6)
        own.load_state_dict(first.state_dict())
        nets.append(nn.Sequential(own.requires_grad_(False), nn.Tanh(), nn.Linear(6, 4)))
    return Zoo.from_modules(nets), first


def test_what_all_nets_share_is_decoded_as_it_is(tmp_path):
    """Seen before: with noise of half its spread."""
    zoo, first = frozen_zoo()
    space = NetSpace.for_zoos(zoo, X, SMALL)
    fit(space, Distillation(space, zoo, X), lambda s: {"score": 0.0}, 20, epoch=20)
    z = torch.randn(5, 8, generator=generator(), requires_grad=True)
    for found in (space, NetSpace.load(save(space, tmp_path), zoo.module)):
        nets = found.decode(z)
        views = nets.layout.views(nets.rows)
        assert views["0.weight"].equal(first.weight.expand(5, -1, -1))
        assert views["0.bias"].equal(first.bias.expand(5, -1))
        assert not views["2.weight"].equal(views["2.weight"][:1].expand(5, -1, -1))
    nets(X).sum().backward()
    assert z.grad.abs().sum() > 0
    loss = lambda nets, generator: nets(X).square().mean((1, 2))  # noqa: E731
    search = optimise(space, z.detach(), loss, progress=False)
    assert search.nets.to_module(2)[0].weight.equal(first.weight)


def save(space, folder):
    space.save(folder)
    return folder


def test_only_zoos_say_what_is_shared():
    zoo, _ = frozen_zoo()
    state = NetSpace.for_zoos(zoo, X, SMALL).state_dict()
    shared = {name for name, values in state.items() if values.isnan().any()}
    assert shared == {"constant0"}
    copies = Nets(zoo.batched, zoo.rows[:1].expand(3, -1))
    for nets in (zoo[:1], copies, random_nets(zoo.module, 8)):  # of one net nothing is known
        assert "constant0" not in NetSpace.for_zoos(nets, X, SMALL).state_dict()


def test_states_of_spaces_fit_each_other_whatever_is_shared():
    zoo, _ = frozen_zoo()
    with torch.inference_mode():
        shared = NetSpace.for_zoos(zoo, X, SMALL)
    other = NetSpace.for_zoos(random_nets(zoo.module, 8), X, SMALL)
    state = {name: value.clone() for name, value in other.state_dict().items()}
    other.load_state_dict(shared.state_dict())
    z = torch.randn(2, 8, generator=generator())
    assert other.decode(z).rows.equal(shared.decode(z).rows)
    other.load_state_dict(state)
    assert other.constant0 is None
    fit(shared, Distillation(shared, zoo, X), lambda s: {"score": 0.0}, 2, epoch=1)


class Backbone(nn.Module):
    """A layer whose weights are constants, between two that learn."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 4)
        self.frozen = nn.Linear(6, 6)
        held = [torch.linspace(-1, 1, 36).view(6, 6), torch.full((6,), 0.3)]
        del self.frozen.weight, self.frozen.bias
        for name, value in zip(("weight", "bias"), held, strict=True):
            self.frozen.register_buffer(name, value)

    def forward(self, x):
        return self.last(torch.relu(self.frozen(torch.relu(self.first(x)))))


@pytest.mark.parametrize("per_net", [False, True])
def test_layers_of_constants_are_interpreted(per_net):
    """Seen before: "'NoneType' object has no attribute 'mT'", and the slower way."""
    torch.manual_seed(0)
    nets, batched = [Backbone() for _ in range(5)], Batched(Backbone())
    x = torch.randn(5, 7, 3) if per_net else X
    rows = batched.layout.pack(nets).requires_grad_()
    found = batched(rows, x, per_net)
    assert batched.way(per_net=per_net) == "interpreted"
    inputs = x if per_net else x.expand(5, *x.shape)
    expected = torch.stack([net(own) for net, own in zip(nets, inputs, strict=True)])
    torch.testing.assert_close(found, expected)
    (grad,) = torch.autograd.grad(found.square().sum(), rows)
    losses = expected.square().sum()
    wanted = torch.autograd.grad(losses, [p for net in nets for p in net.parameters()])
    torch.testing.assert_close(grad.flatten(), torch.cat([g.flatten() for g in wanted]))


def test_a_whole_nets_kernel_leaves_layers_of_constants_alone():
    """It would take their weights for none."""
    module = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 4))
    for name in ("weight", "bias"):
        value = getattr(module[1], name).detach()
        delattr(module[1], name)
        module[1].register_buffer(name, value)
    batched = Batched(module)
    rows = torch.randn(2, batched.layout.size)
    batched(rows, X)
    (mode,) = batched._modes.values() if len(batched._modes) == 1 else [batched._mode(rows, False)]
    at = dict(zip(batched.layout.names, batched.layout.offsets, strict=True))
    weights = {name: at.get(view) for name, view in mode.names.items()}
    assert translate(mode.graph, mode.parts, weights, batched.layout.size, (3,)) is None


# --- ways -----------------------------------------------------------------------------


class Upward(nn.Module):
    """Transposed convolutions as generators and segmenters have them."""

    def __init__(self):
        super().__init__()
        self.down, self.norm = nn.Conv2d(2, 4, 3, 2, 1), nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2)
        self.last = nn.ConvTranspose2d(6, 3, 3, dilation=2, bias=False)

    def forward(self, x):
        return self.last(torch.relu(self.up(torch.relu(self.norm(self.down(x))))))


@pytest.mark.parametrize("per_net", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_transposed_convolutions_are_interpreted(per_net, training):
    torch.manual_seed(0)
    made = [Upward() for _ in range(3)]
    x = torch.randn(3, 5, 2, 6, 6) if per_net else torch.randn(5, 2, 6, 6)
    inputs = x if per_net else x.expand(3, *x.shape)
    zoo = Zoo.from_modules(made)
    if not training:
        expected = torch.stack([net.eval()(own) for net, own in zip(made, inputs, strict=True)])
        torch.testing.assert_close(zoo.outputs(x, per_net), expected, rtol=1e-4, atol=1e-5)
        assert zoo.batched.way(per_net=per_net) == "interpreted"
        return
    batched, rows = (
        Batched(made[0]),
        torch.stack([torch.cat([p.detach().flatten() for p in net.parameters()]) for net in made]),
    )
    running = batched.initial_running(3)
    found = batched(rows, x, per_net, running)
    assert batched.way(True, per_net) == "interpreted"
    expected = torch.stack([net.train()(own) for net, own in zip(made, inputs, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    means = torch.stack([net.norm.running_mean for net in made])
    torch.testing.assert_close(batched.running.views(running)["norm.running_mean"], means)


class Untraced(nn.Module):
    """A batch norm among steps that can't be interpreted."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.slope = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.PReLU()

    def forward(self, x):
        return self.slope(self.norm(self.layer(x)))


def test_batch_norms_train_together_beside_steps_that_are_not_interpreted():
    """Seen before: vmap lost their statistics, so that they trained one by one."""
    torch.manual_seed(0)
    made, x = [Untraced() for _ in range(3)], torch.randn(3, 16, 3)
    batched = Batched(made[0])
    rows = torch.stack([torch.cat([p.detach().flatten() for p in m.parameters()]) for m in made])
    running = batched.initial_running(3)
    with pytest.warns(UserWarning, match="through torch.func.vmap"):
        found = batched(rows, x, True, running)
    assert batched.way(True, True) == "vmap"
    expected = torch.stack([net(own) for net, own in zip(made, x, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    views = batched.running.views(running)
    for name in ("running_mean", "running_var"):
        own = torch.stack([getattr(net.norm, name) for net in made])
        torch.testing.assert_close(views[f"norm.{name}"], own)


# --- many nets, and what is said ------------------------------------------------------


def test_many_nets_are_taken_in_parts():
    nets, data = random_nets(LeNetLike((1, 8, 8), 3, (4,), (8,), kernel=3), 300), toy_data()
    found = [nets[n].outputs(data.val.x)[0].argmax(1) == data.val.y for n in (0, 299)]
    alone = torch.stack([one.float().mean() for one in found])
    torch.testing.assert_close(nets.accuracy(data.val)[[0, 299]], 100 * alone)
    many = Nets(nn.Linear(3, 1), torch.randn(5000, 4, generator=generator()))
    near = nearest_by_weights(many, Nets(many.batched, many.rows[[4999, 3]] + 1e-4))
    assert near.rows.equal(many.rows[[4999, 3]])
    space = NetSpace.for_zoos(many[:50], X, SMALL)
    z = space.encode(many)
    alone = torch.cat([space.encode(many[n]) for n in (0, 4500)])
    torch.testing.assert_close(z[[0, 4500]], alone)


def test_no_choice_disagrees_with_all():
    logits = torch.randn(4, 9, 3, generator=generator())
    logits[1, :3] = torch.nan
    found = disagreement(logits, logits)
    chosen = logits.argmax(-1).where(logits.isfinite().all(-1), -1)
    for n, one in enumerate(chosen):
        for m, other in enumerate(chosen):
            differs = (one != other) | (one < 0)
            torch.testing.assert_close(found[n, m], differs.float().mean() * 100)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x, y):
        return self.layer(x + y)


@pytest.mark.filterwarnings("ignore:.*which is slower")
def test_what_can_not_be_asked_or_trained_is_said():
    with pytest.raises(ValueError, match="can't take inputs .*missing 1 required positional"):
        random_nets(TwoInputs(), 2).outputs(X)
    with pytest.raises(ValueError, match="and tokens to int64"):
        random_nets(nn.Linear(3, 2), 2).outputs(torch.ones(4, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="not of 2 nets each"):
        Zoo(nn.Linear(3, 2), torch.randn(2, 8), {"val_accuracy": torch.ones(2, 2)})
    for loss, said in (
        (lambda outputs, y: 1.0, r"\[2\] with a gradient, not a float"),
        (lambda outputs, y: outputs.detach().mean((1, 2)), r"not \[2\] without a gradient"),
    ):
        task = ImageTask(toy_data())
        task.loss = loss
        net = LeNetLike((1, 8, 8), 3, (4,), (8,), kernel=3)
        with pytest.raises(ValueError, match=said):
            train_zoo(net, task, [Recipe(0, 1), Recipe(1, 1)], progress=False)


def test_numbers_that_mean_nothing_are_refused():
    """Seen before: ZeroDivisionError, foreign errors, or all of it NaN."""
    nets = random_nets(nn.Linear(3, 2), 6)
    z = torch.randn(5, 4, generator=generator())
    for call, said in (
        (lambda: nets.outputs(X, samples=0), "at least one at a time"),
        (lambda: nets.split(1.5, 1), "val should be a whole number"),
        (lambda: averages(nets, 2.0), "n should be a whole number"),
        (lambda: averages(nets, 2, 1.5), "of should be a whole number"),
        (lambda: Gaussian(z).sample(-1), "at least one is drawn"),
        (lambda: Descent(lr=torch.nan), "a rate is at least 0"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
