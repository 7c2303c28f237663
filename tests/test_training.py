"""What a space is trained for, and its fit: losses against torch, resumption bit for bit."""

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import softmax
from torch import nn
from toy import (
    Interrupted,
    generator,
    interrupted,
    mlp,
    random_nets,
    small_nets,
    small_zoos,
    toy_data,
)

from netspace_lite.architectures import paper_net
from netspace_lite.data import Images
from netspace_lite.explore import ImageLoss
from netspace_lite.fingerprint import fingerprint
from netspace_lite.metrics import scores
from netspace_lite.nets import Nets
from netspace_lite.space import NetSpace, SpaceConfig
from netspace_lite.training import (
    ArchitectureClassification,
    Distillation,
    Interpolation,
    LikenessLoss,
    MixedZoo,
    TeacherDistillation,
    combine,
    decoded_loss,
    fit,
    kl_divergence,
    learning_rate,
    logit_scale,
    squared_error,
)
from netspace_lite.zoo import ImageTask, draw_recipes
from netspace_lite.zoo_training import initial_rows, train_zoo

CONFIG = SpaceConfig(embedding=16, probes=8, weights=False, hidden=16)
SMALL = SpaceConfig(embedding=8, probes=6, hidden=16, chunk=64)
CONFIGS = {
    "weights and probes": SMALL,
    "weights only": SpaceConfig(embedding=8, probes=0, hidden=16, chunk=64),
    "probes only": SpaceConfig(embedding=8, probes=6, hidden=16, weights=False),
    "components": SpaceConfig(embedding=8, probes=6, hidden=16, components=12),
    "learned probes": SpaceConfig(embedding=8, probes=6, hidden=16, learn_probes=True),
}


@pytest.fixture(scope="module")
def data():
    return toy_data()


@pytest.fixture(scope="module")
def zoos(data):
    return small_zoos(data)


@pytest.fixture(scope="module")
def zoo(data):
    task, recipes = ImageTask(data, 16), draw_recipes(24, steps=(2, 60))
    return train_zoo(small_nets()[0], task, recipes, progress=False)


@pytest.fixture
def space(zoos, data):
    return NetSpace.for_zoos(zoos, data.train.x, CONFIG)


def make(zoo, data, config=SMALL, seed=0):
    return NetSpace.for_zoos(zoo, data.train.x, config, seed)


def distillation(space, zoo, data, **options):
    return Distillation(space, zoo, data.train.x, **{"nets": 6, "samples": 8} | options)


def validation(zoo, images):
    return lambda space: scores(space, zoo[:8], images)


def fitted(zoo, data, steps=6, config=SMALL, seed=0, **options):
    space = make(zoo, data, config, seed)
    objective, validate = distillation(space, zoo, data), validation(zoo, data.val)
    return space, fit(space, objective, validate, steps, **{"epoch": 2} | options)


def test_kl_is_torchs_own():
    torch.manual_seed(0)
    a, b, t = torch.randn(3, 5, 4), torch.randn(3, 5, 4), torch.tensor([0.5, 1.0, 2.0])
    found, shared = kl_divergence(a, b, t[:, None, None]), kl_divergence(a, b[:1], 2.0)
    for n in range(3):
        expected = F.kl_div(
            F.log_softmax(a[n] / t[n], -1), F.softmax(b[n] / t[n], -1), reduction="batchmean"
        )
        torch.testing.assert_close(found[n], expected)
        log_softmax, softmax = F.log_softmax(a[n] / 2, -1), F.softmax(b[0] / 2, -1)
        expected = F.kl_div(log_softmax, softmax, reduction="batchmean")
        torch.testing.assert_close(shared[n], expected)
    assert logit_scale(torch.tensor([[[2.0, 4.0]]])).item() == pytest.approx(1.0)
    assert logit_scale(a + 100).shape == (3, 1, 1)
    torch.testing.assert_close(logit_scale(a + 100), logit_scale(a))


def test_the_objectives_gradient_is_that_of_finite_differences(zoo, data):
    space = make(zoo, data, CONFIGS["probes only"]).double()
    double = Nets(zoo.batched, zoo.rows[:4].double())
    objective = Distillation(space, double, data.train.x.double(), nets=4, samples=3)
    parameter = space.decoder.bias[0]

    def loss():
        return objective(space, generator(1))

    (gradient,) = torch.autograd.grad(loss(), parameter)
    with torch.no_grad():
        for n in (0, 100, len(parameter) - 1):
            value, step = parameter[n].item(), 1e-6
            parameter[n] = value + step
            up = loss().item()
            parameter[n] = value - step
            down = loss().item()
            parameter[n] = value
            assert (up - down) / (2 * step) == pytest.approx(gradient[n].item(), abs=1e-7)


def test_distillation_is_zero_for_a_space_that_gives_every_net_back(zoo, data):
    """A decoder that knows the zoo by heart: nothing is left to learn."""
    space = make(zoo[:1], data)  # the decoder's bias is the only net
    with torch.no_grad():
        space.decoder.heads[0].weight.zero_()
    objective = distillation(space, zoo[:1], data)
    assert objective(space, generator()).detach().abs() < 1e-6


def test_an_analogy_asks_for_answers_moved_as_two_nets_differ(zoo, data):
    """Net by net and sample by sample in fp64, from the nets' own answers."""
    seen = {}

    def loss(outputs, targets, scale):
        seen.update(targets=targets, scale=scale)
        return (outputs - targets).square().mean((1, 2))

    x, n, p, q = data.train.x[:1], *torch.tensor([[3, 0, 5], [1, 7, 5], [2, 2, 4]])
    share = torch.tensor([0.5, 0.25, 0.0])
    likeness = LikenessLoss(zoo, x, loss=loss, samples=2)
    likeness(zoo[n], generator(), n, (share, p, q))
    answers = zoo.outputs(x)[:, 0].double()  # [N, K]
    scale = (answers - answers.mean(1, keepdim=True)).square().mean(1).sqrt()
    for i, (a, b, c) in enumerate(zip(n, p, q, strict=True)):
        moved = answers[a] / scale[a] + share[i] * (answers[b] / scale[b] - answers[c] / scale[c])
        level = scale[a] * (scale[b] / scale[c]) ** share[i]
        assert seen["scale"][i].item() == pytest.approx(level.item(), rel=1e-4)
        for found in seen["targets"][i].double():  # both samples are the only input
            torch.testing.assert_close(found, moved * level, rtol=1e-4, atol=1e-5)


def test_a_consensus_compares_how_often_nets_side_with_most(zoo, data):
    """With SciPy's softmax and a vote counted by hand; nets that side alike lose nothing."""
    votes = zoo.outputs(data.train.x).argmax(-1).T.numpy()  # [S, N]
    split = min(range(len(votes)), key=lambda s: np.bincount(votes[s]).max())  # most divided on it
    x, like = data.train.x[split : split + 1], torch.tensor([3, 0, 5])
    answers, winner = zoo.outputs(x)[:, 0].double().numpy(), np.bincount(votes[split]).argmax()
    level = np.sqrt(np.square(answers - answers.mean(1, keepdims=True)).mean(1, keepdims=True))
    plain, more = (LikenessLoss(zoo, x, samples=2, consensus=c) for c in (0.0, 2.0))
    nets = torch.tensor([1, 2, 5])
    found = more(zoo[nets], generator(), like) - plain(zoo[nets], generator(), like)
    for i, (net, other) in enumerate(zip(nets, like, strict=True)):  # both in the target's scale
        own, wanted = (softmax(10 * answers[n] / level[other])[winner] for n in (net, other))
        assert found[i].item() == pytest.approx(2 * (own - wanted) ** 2, abs=1e-5)
    assert found[2] == 0
    assert found[:2].max() > 0.01


def test_a_consensus_moves_nets_and_is_part_of_what_an_objective_is(zoo, data):
    """Down its gradient alone a net of middling accuracy comes to side like a good one."""
    order = zoo.scores["val_accuracy"].argsort()
    one, best = zoo[order[len(order) // 2]], order[-1:]
    none = torch.tensor(0.0)
    like = LikenessLoss(zoo, data.train.x, loss=lambda *_: none, samples=200, consensus=1.0)
    rows, losses = one.rows.clone().requires_grad_(), []
    adam = torch.optim.Adam([rows], 3e-3)
    for _ in range(40):
        (loss,) = like(Nets(zoo.batched, rows), generator(), best)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
    found = {}
    for weight in (0, 0.0, 1, np.float32(1), 2.0):
        space = NetSpace.for_zoos(zoo, data.train.x, SMALL)
        objective = Distillation(space, zoo, data.train.x, consensus=weight, analogies=0)
        found[fingerprint(objective, known=[space])] = objective(space, generator()).item()
    assert len(found) == 3
    none, once, twice = found.values()
    assert twice - once == pytest.approx(once - none, rel=1e-3)
    assert once > none


def test_a_consensus_of_several_zoos_is_that_of_all_their_nets(zoos, data):
    space = NetSpace.for_zoos(zoos, data.train.x, CONFIG)
    objective = Distillation(space, zoos, data.train.x, nets=6, analogies=0, consensus=1.0)
    assert objective(space, generator()).isfinite()
    answers = torch.cat([zoo.outputs(data.train.x).argmax(-1) for zoo in zoos])
    votes = [np.bincount(answers[:, s].numpy()).argmax() for s in range(len(data.train))]
    assert objective._likeness().choice.tolist() == votes


def test_a_consensus_is_of_classes_that_all_were_asked_for(zoo, data):
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="consensus is a weight from 0, not"):
            LikenessLoss(zoo, data.train.x, consensus=weight)
    own = data.train.x[:5].expand(len(zoo), 5, *data.shape)
    with pytest.raises(ValueError, match="asked different things have no consensus"):
        Distillation(NetSpace.for_zoos(zoo, own[0], SMALL), zoo, own, per_net=True, consensus=1.0)
    values = random_nets(nn.Sequential(nn.Linear(4, 1)), 2)
    with pytest.raises(ValueError, match="no logits"):
        LikenessLoss(values, torch.randn(5, 4), loss=squared_error, consensus=1.0)


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_what_is_decoded_is_moved_as_its_answers_are(zoos, data, several, monkeypatch):
    chosen = zoos if several else zoos[0]
    space, seen = NetSpace.for_zoos(chosen, data.train.x, CONFIG), {}
    options = {"nets": 40, "samples": 4, "chances": (0, 1, 0, 0) if several else None}
    objective = Distillation(space, chosen, data.train.x, **options)
    decode = space.decode
    monkeypatch.setattr(space, "decode", lambda z, a: (seen.update(z=z, a=a), decode(z, a))[1])

    def likeness(nets, generator, like, analogy):
        seen.update(n=like, analogy=analogy)
        return nets.rows.sum(1)

    monkeypatch.setattr(objective, "_likeness", lambda: likeness)
    objective(space, generator())
    share, p, q = seen["analogy"]
    still = share == 0
    assert 4 <= still.sum() <= 20
    assert share.min() >= 0
    assert 0.4 < share.max() <= 0.5
    z, apart, back = (objective.pool.encode(space, m, seen["a"]) for m in (seen["n"], p, q))
    torch.testing.assert_close(seen["z"], z + share[:, None] * (apart - back))
    assert (seen["z"] - z).abs().amax(1)[~still & (p != q)].min() > 0
    objective = Distillation(space, chosen, data.train.x, analogies=0, **options)
    monkeypatch.setattr(objective, "_likeness", lambda: likeness)
    objective(space, generator())
    assert seen["analogy"] is None
    torch.testing.assert_close(seen["z"], objective.pool.encode(space, seen["n"], seen["a"]))


def test_nets_whose_answers_overflow_are_named(zoo, data):
    rows = zoo.rows[:4].clone()
    rows[2] *= 1e30
    with pytest.raises(ValueError, match=r"nets \[2\] are not finite"):
        LikenessLoss(Nets(zoo.batched, rows), data.train.x)


def test_distillation_on_inputs_of_each_nets_own_with_another_loss(zoo, data):
    own = torch.stack([data.train.x[torch.randperm(120)[:20]] for _ in range(24)])
    space, seen = make(zoo, data), []

    def squared(outputs, targets, scale):
        seen.append(targets)
        return (outputs - targets).square().mean((1, 2))

    options = {"per_net": True, "loss": squared, "nets": 6, "samples": 8}
    Distillation(space, zoo, own, **options)(space, generator()).backward()
    assert space.decoder.hidden.weight.grad.abs().sum() > 0
    Distillation(space, zoo[4:5], own[4:5], **options)(space, generator())
    answers = zoo[4].outputs(own[4])[0]
    assert seen[1].shape == (6, 8, 3)
    distances = (seen[1].flatten(0, 1)[:, None] - answers).abs().amax(-1)  # [48, 20]
    assert distances.min(1).values.max() < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_fitting_lowers_the_loss(zoo, data, name):
    _, history = fitted(zoo, data, steps=120, config=CONFIGS[name])
    losses = [row["loss"] for row in history]  # of two steps each, and so far from smooth
    assert sum(losses[-20:]) < 0.3 * sum(losses[:20])


def test_a_fit_in_mixed_precision_learns(zoo, data):
    """Seen before: embeddings of bf16 were refused by the space that had made them."""
    with torch.autocast("cpu"):
        space, history = fitted(zoo, data, steps=40)
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    z = space.encode(zoo)
    assert torch.equal(space.decode(z.double()).rows, space.decode(z).rows)


def test_the_best_state_is_kept(zoo, data):
    space, history = fitted(zoo, data, steps=8)
    best = max(row["agreement"] for row in history)
    assert scores(space, zoo[:8], data.val)["agreement"] == pytest.approx(best, abs=0.1)


def test_history_and_log_are_rows_of_numbers(zoo, data):
    rows = []
    _, history = fitted(zoo, data, steps=5, log=rows.append)
    assert rows == history
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert {"step", "seconds", "loss", "agreement", "mae", "r"} <= rows[0].keys()
    json.dumps(rows)


def test_a_last_partial_epoch_has_its_own_mean(zoo, data):
    """Seen before: its sum was divided by a whole epoch."""
    space, losses = make(zoo, data), []
    inner = distillation(space, zoo, data)

    def objective(space, generator):
        losses.append(inner(space, generator))
        return losses[-1]

    history = fit(space, objective, validation(zoo, data.val), 5, epoch=3)
    assert [row["step"] for row in history] == [3, 5]
    assert history[1]["loss"] == pytest.approx(float(sum(losses[3:]).detach()) / 2, rel=1e-5)


@pytest.mark.parametrize("at", [2, 4, 6])
def test_an_interrupted_fit_resumes_bit_for_bit(zoo, data, at, tmp_path, monkeypatch):
    whole, history = fitted(zoo, data)
    with monkeypatch.context() as patch:
        patch.setattr(Distillation, "__call__", interrupted(Distillation.__call__, at))
        with pytest.raises(Interrupted):
            fitted(zoo, data, folder=tmp_path)
    resumed, again = fitted(zoo, data, folder=tmp_path)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert [r["loss"] for r in again] == [r["loss"] for r in history]
    finished, _ = fitted(zoo, data, folder=tmp_path)  # loaded, not trained again
    assert torch.equal(finished.encode(zoo), whole.encode(zoo))
    with pytest.raises(ValueError, match="choose another folder"):
        fitted(zoo, data, steps=7, folder=tmp_path)


def test_a_fit_stopped_before_an_epoch_was_saved_is_not_begun_from_where_it_was(
    zoo, data, tmp_path
):
    """Seen before: the same call began at step 0 from weights that had trained already."""
    space = make(zoo, data)
    objective, validate = distillation(space, zoo, data), validation(zoo, data.val)
    options = {"steps": 4, "epoch": 2, "folder": tmp_path}
    for at in (1, 2):  # nothing has moved yet in the first step, so that the same space begins
        with pytest.raises(Interrupted):
            fit(space, interrupted(objective, at), validate, **options)
    with pytest.raises(ValueError, match="build the space anew"):
        fit(space, objective, validate, **options)
    history = fit(make(zoo, data), objective, validate, **options)
    assert [row["loss"] for row in history] == [row["loss"] for row in fitted(zoo, data, 4)[1]]


def test_a_finished_fit_is_loaded_without_asking_its_nets(zoos, data, tmp_path, monkeypatch):
    """Seen before: a whole zoo answered all images, minutes at 28×28, for a fit only loaded."""

    def run():
        space = NetSpace.for_zoos(zoos, data.train.x, CONFIG)
        objective = distillation(space, zoos, data)
        naming = ArchitectureClassification(space, zoos)
        known = fingerprint(objective)
        total, few = combine(objective, naming), validation(zoos[0], data.val)
        history = fit(space, total, few, 2, epoch=2, folder=tmp_path)
        assert fingerprint(objective) == known  # whatever was asked meanwhile
        return history

    history = run()
    for kind, method in ((Nets, "outputs"), (NetSpace, "features")):
        monkeypatch.setattr(kind, method, lambda *_: pytest.fail("a net was asked"))
    assert run() == history


def test_a_longer_fit_of_more_is_not_resumed_from_a_part(zoo, data, tmp_path):
    fitted(zoo, data, folder=tmp_path)
    for changed in ({"lr": 1e-3}, {"seed": 1}, {"epoch": 3}, {"config": CONFIGS["probes only"]}):
        with pytest.raises(ValueError, match="choose another folder"):
            fitted(zoo, data, folder=tmp_path, **changed)


def test_another_starting_state_is_refused(zoo, data, tmp_path):
    """A second stage of training is not loaded where the first was another."""
    space, objective = make(zoo, data), distillation(make(zoo, data), zoo, data)
    options = {"steps": 2, "epoch": 2, "folder": tmp_path}
    fit(space, objective, validation(zoo, data.val), **options)
    other = make(zoo, data)
    with torch.no_grad():
        other.decoder.hidden.bias.add_(1)
    with pytest.raises(ValueError, match="choose another folder"):
        fit(other, objective, validation(zoo, data.val), **options)


def test_the_same_seed_gives_the_same_fit(zoo, data):
    one, two, other = (fitted(zoo, data, seed=s)[0].encode(zoo) for s in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_a_fit_does_not_touch_random_numbers(zoo, data):
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    fitted(zoo, data)
    assert torch.equal(torch.rand(2), expected)


def test_a_loss_that_is_not_finite_stops_and_names_the_step(zoo, data, tmp_path):
    space, calls = make(zoo, data), iter(range(100))
    inner = distillation(space, zoo, data)

    def objective(space, generator):
        return inner(space, generator) * (math.nan if next(calls) == 3 else 1)

    with pytest.raises(ValueError, match=r"(?i)step \b[34]\b"):
        fit(space, objective, validation(zoo, data.val), 6, epoch=2, folder=tmp_path)
    assert all(value.isfinite().all() for value in space.state_dict().values())


def test_scores_that_are_nan_never_win(zoo, data):
    """Seen before: a first NaN score was kept for good."""
    space, given = make(zoo, data), iter([math.nan, 1.0, 3.0, math.nan, 2.0])
    states = []

    def validate(space):
        states.append(space.encode(zoo).clone())
        return {"score": next(given)}

    fit(space, distillation(space, zoo, data), validate, 5, epoch=1)
    assert torch.equal(space.encode(zoo), states[2])


def test_the_learning_rate_warms_up_and_falls_to_zero():
    rates = [learning_rate(step, 100, 2.0) for step in range(100)]
    assert rates[0] < rates[4] <= 2.0
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] < 0.002


def test_bad_fits_are_refused_in_a_sentence(zoo, data):
    space = make(zoo, data)
    objective, validate = distillation(space, zoo, data), validation(zoo, data.val)
    for options in ({"steps": 0}, {"epoch": 0}):
        with pytest.raises(ValueError, match="step|epoch"):
            fit(space, objective, validate, **{"steps": 2} | options)
    with pytest.raises(ValueError, match=r"step 0: the loss is \[.*one finite number is needed"):
        fit(space, lambda space, generator: space.encode(zoo).mean(1), validate, 2)
    for found in ({}, 1.0, {"loss": 1.0}, {"accuracy": 1.0, "step": 3}):
        with pytest.raises(ValueError, match="scores are a dict, none .* not " + repr(found)[:5]):
            fit(space, objective, lambda space, found=found: found, 2)


def test_a_mixed_zoo_encodes_like_the_space(space, zoos):
    mixed = MixedZoo(space, zoos)
    n = torch.tensor([20, 3, 9, 0, 23])
    torch.testing.assert_close(mixed.encode(space, n), space.encode(zoos)[n])
    torch.testing.assert_close(
        mixed.encode(space, n[:1], 1), space.translate(space.encode(zoos)[n[:1]], 3, 1)
    )
    assert len(mixed) == 24
    assert mixed.architecture[n].tolist() == [3, 0, 1, 0, 3]
    drawn = mixed.draw(200, generator(), 2)
    assert set(drawn.tolist()) == set(range(12, 18))
    assert set(mixed.draw(400, generator()).tolist()) == set(range(24))
    assert MixedZoo(space, zoos[1]).present == [1]


def test_nets_are_read_anew_once_the_space_was_given_other_probes(zoo, data):
    """Seen before: what the first probes had been answered was encoded by the second space."""
    space, other = (make(zoo, data, seed=seed) for seed in (0, 1))
    mixed, n = MixedZoo(space, zoo), torch.arange(len(zoo))
    mixed.encode(space, n)
    space.load_state_dict(other.state_dict())
    assert torch.equal(mixed.encode(space, n), other.encode(zoo))


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_chances_may_be_an_array(zoos, data, kind):
    space = make(zoos, data)
    shares = [0.1, 0.2, 0.3, 0.4]
    given = (distillation(space, zoos, data, chances=c) for c in (shares, kind(shares)))
    plain, array = (objective(space, generator()) for objective in given)
    assert torch.equal(plain, array)


def test_learned_probes_ask_nets_that_were_decoded(zoo, data):
    """Seen before: the second step went back through the graph that the nets came from."""
    nets = make(zoo, data).decode(make(zoo, data).encode(zoo))
    space = make(nets, data, CONFIGS["learned probes"])
    history = fit(space, distillation(space, nets, data), validation(zoo, data.val), 3)
    assert math.isfinite(history[-1]["loss"])


def test_combine_is_a_weighted_sum(space):
    parts = [lambda space, generator, v=v: torch.tensor(v) for v in (1.0, 10.0)]
    assert float(combine(*parts, weights=(0.5, 2))(space, generator())) == 20.5
    assert float(combine(*parts)(space, generator())) == 11
    with pytest.raises(ValueError, match="2 objectives need as many weights"):
        combine(*parts, weights=(1,))
    with pytest.raises(ValueError, match="objectives"):
        combine()


def test_teacher_distillation_is_the_papers_loss(space, zoos, data):
    """0.9·T²·KL + 0.1·cross-entropy, from the formula."""
    teacher = zoos[0].to_module(0)
    loss = ImageLoss(data.train, teacher, distil=0.9, temperature=4, samples=len(data.train))
    nets = space.decode(space.encode(zoos[1]), 1)
    logits, wanted = nets(data.train.x), teacher(data.train.x)
    kl = F.kl_div(
        F.log_softmax(logits[0] / 4, -1), F.softmax(wanted / 4, -1), reduction="batchmean"
    )
    expected = 0.9 * 16 * kl + 0.1 * F.cross_entropy(logits[0], data.train.y)
    torch.testing.assert_close(loss(nets, generator())[0], expected, rtol=1e-4, atol=1e-5)
    TeacherDistillation(space, zoos, loss)(space, generator()).backward()
    assert all(head.weight.grad is not None for head in space.decoder.heads)


def test_a_mean_loss_of_nets_teaches_as_the_loss_of_each(space, zoos, data):
    """Seen before: the scalar losses that `ImageLoss` takes could not be joined."""
    each, mean = (
        ImageLoss(data.train, loss=lambda logits, y, dims=dims: logits.square().mean(dims))
        for dims in ((1, 2), None)
    )
    for make in (TeacherDistillation, Interpolation):
        found = [make(space, zoos, loss)(space, generator()) for loss in (each, mean)]
        torch.testing.assert_close(*found)


def test_nets_with_inputs_of_their_own_are_not_moved(zoo, data, monkeypatch):
    """Answers to different inputs can't be compared, or added up."""
    own = data.train.x[torch.randint(len(data.train.x), (len(zoo), 9), generator=generator())]
    objective, seen = Distillation(make(zoo, data), zoo, own, per_net=True, nets=6, samples=4), []
    like = lambda nets, g, n, analogy: (seen.append(analogy), nets.rows.sum(1))[1]  # noqa: E731
    monkeypatch.setattr(objective, "_likeness", lambda: like)
    objective(make(zoo, data), generator())
    assert seen == [None]


@pytest.mark.parametrize(
    ("spread", "kind"),
    [
        (lambda x: x.square(), r"\[48, 24, 3\]"),
        (lambda x: x.square().mean((0, 2)), r"\[24\]"),
        (lambda x: 1.0, "a float"),
    ],
)
def test_a_loss_of_answers_is_one_number_a_net(zoo, data, spread, kind):
    """Seen before: what it gave was averaged, however it was spread."""
    space = make(zoo, data)
    objective = Distillation(space, zoo, data.train.x, loss=lambda o, t, scale: spread(o - t))
    with pytest.raises(ValueError, match=f"a loss of 48 nets is a tensor of as many, not {kind}"):
        objective(space, generator())


def test_an_epoch_is_kept_whatever_the_log_raises(zoo, data, tmp_path):
    space = make(zoo, data)
    objective = distillation(space, zoo, data)
    options = {"epoch": 2, "folder": tmp_path, "log": interrupted(lambda row: None, 1)}
    with pytest.raises(Interrupted):
        fit(space, objective, lambda _: {"x": 0.0}, 4, **options)
    rows = []
    fit(space, objective, lambda _: {"x": 0.0}, 4, **options | {"log": rows.append})
    assert [row["step"] for row in rows] == [4]


def rows_loss(nets, generator):
    return nets.rows.sum(1)


def test_interpolation_follows_the_distance_rule(space, zoos, data):
    objective = Interpolation(space, zoos, rows_loss, jitter=0)
    assert objective.apart == 2  # the paper's max(1, A - 2): only the ends
    assert objective.ends == [(0, 3)]
    with torch.no_grad():
        z, wanted = objective.points(space, generator(), 30)
    assert set(wanted.tolist()) == {1, 2}
    ends = space.encode(zoos)
    for point, k in zip(z, wanted.tolist(), strict=True):
        places = torch.lerp(ends[:6, None], ends[None, 18:], k / 3).flatten(0, 1)
        assert (point - places).abs().amax(1).min() < 1e-5
    assert set(objective.points(space, generator(), 60, ends=True)[1].tolist()) == {0, 1, 2, 3}
    assert len(Interpolation(space, zoos, rows_loss, apart=1).ends) == 3
    with pytest.raises(ValueError, match="no zoos over 2 apart, nothing in between"):
        Interpolation(space, zoos[:2], rows_loss)
    two = NetSpace.for_zoos(zoos[:2], data.train.x, CONFIG)
    with pytest.raises(ValueError, match="no zoos over 1 apart, nothing in between"):
        Interpolation(two, zoos[:2], rows_loss)


def test_unseen_architectures_learn_from_the_line_alone(zoos, data):
    ends = [zoos[3], zoos[0]]  # any order: each finds its module
    space = NetSpace.for_zoos(ends, data.train.x, CONFIG, modules=small_nets())
    loss = ImageLoss(data.train, samples=16)
    Interpolation(space, ends, loss)(space, generator()).backward()
    heads = space.decoder.heads
    assert [head.weight.grad is not None for head in heads] == [False, True, True, False]


def test_distillation_across_architectures_teaches_one_head_with_all_nets(space, zoos, data):
    objective = Distillation(
        space, zoos, data.train.x, nets=8, samples=4, crossing=1.0, chances=(0, 0, 1, 0)
    )
    loss = objective(space, generator())
    loss.backward()
    heads = [head.weight.grad is not None for head in space.decoder.heads]
    assert heads == [False, False, True, False]
    assert (space.encoder.offset.grad.abs().sum(1) > 0).tolist() == [False, False, True, False]
    assert loss > 0


def test_classification_separates_architectures(space, zoos):
    """A few steps suffice, for embeddings as they are and moved to other architectures."""
    objective = ArchitectureClassification(space, zoos, translated=True)
    adam = torch.optim.Adam(space.parameters(), 1e-2)
    for step in range(50):
        adam.zero_grad()
        objective(space, generator(step)).backward()
        adam.step()
    z = space.encode(zoos)
    assert torch.equal(space.predict(z), torch.arange(4).repeat_interleave(6))
    assert (space.predict(space.translate(z[:6], 0, 3)) == 3).all()


def test_the_papers_sizes_take_a_training_step():
    image = torch.randn(2, 3, 32, 32)
    modules = [paper_net(n) for n in ("LeNetLike", "VanillaCNN", "ResNet8", "ResNet32")]
    nets = [Nets(net, initial_rows(net, [0])) for net in modules]
    assert [zoo.layout.size for zoo in nets] == [62_006, 68_818, 77_706, 465_674]
    config = SpaceConfig(embedding=4, probes=1, weights=False, hidden=4)
    space = NetSpace.for_zoos(nets, image, config)
    loss = ImageLoss(Images(image, torch.arange(2)), paper_net("ResNet56"))
    objective = combine(
        TeacherDistillation(space, nets, loss, nets=1),
        ArchitectureClassification(space, nets),
        Interpolation(space, nets, loss, nets=1),
    )
    value = objective(space, generator())
    value.backward()
    assert torch.isfinite(value)
    assert all(head.weight.grad is not None for head in space.decoder.heads)


def test_a_users_module_joins_a_mixed_zoo(zoos, data):
    own = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1, groups=4), nn.ReLU())
    own = nn.Sequential(*own, nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 3))
    own = Nets(own, initial_rows(own, range(4)))
    space = NetSpace.for_zoos([zoos[0], own], data.train.x, CONFIG)
    assert space.architectures == ["LeNetLike", "Sequential"]
    for target in range(2):  # each head learns from the other's nets
        chances = [1 - target, target]
        objective = Distillation(space, [zoos[0], own], data.train.x, chances=chances)
        objective(space, generator()).backward()
    assert all(head.weight.grad.abs().sum() > 0 for head in space.decoder.heads)


def test_an_objective_made_for_another_space_is_refused():
    relu, tanh = (random_nets(mlp(act), 6) for act in (nn.ReLU(), nn.Tanh()))
    x = torch.randn(20, 4, generator=generator())
    spaces = [NetSpace.for_zoos(zoo, x, SMALL) for zoo in (relu, tanh)]
    with pytest.raises(ValueError, match="is not one of this space"):
        Distillation(spaces[0], relu, x)(spaces[1], generator())


def test_gradients_left_on_frozen_parameters_change_nothing(zoos, data):
    def fitted(used):
        space = NetSpace.for_zoos(zoos[0], data.train.x, CONFIG)
        if used:
            space.decode(space.encode(zoos[0]) * 50)(data.train.x).square().sum().backward()
        space.decoder.requires_grad_(False)
        fit(space, Distillation(space, zoos[0], data.train.x), lambda s: {"score": 0.0}, 2)
        return space.encode(zoos[0])

    assert torch.equal(fitted(True), fitted(False))


def test_a_fit_is_found_again_by_another_spelling_of_its_folder(tmp_path, monkeypatch, zoos, data):
    monkeypatch.chdir(tmp_path)
    space = NetSpace.for_zoos(zoos[0], data.train.x, CONFIG)
    objective = Distillation(space, zoos[0], data.train.x)

    def validate(space):
        return {"score": 0.0}

    log = interrupted(lambda row: None, 2)
    with pytest.raises(Interrupted):
        fit(space, objective, validate, 4, epoch=2, folder="fit", log=log)
    assert len(fit(space, objective, validate, 4, epoch=2, folder=tmp_path / "fit")) == 2


def test_a_finished_fit_is_loaded_with_any_optimiser(monkeypatch, tmp_path, zoos, data):
    adamw = lambda module, lr: torch.optim.AdamW(module.parameters(), lr)  # noqa: E731
    monkeypatch.setattr("netspace_lite.training.Muon", adamw)
    for _ in range(2):
        space = NetSpace.for_zoos(zoos[0], data.train.x, CONFIG)
        objective = Distillation(space, zoos[0], data.train.x)
        history = fit(space, objective, lambda s: {"score": 0.0}, 2, folder=tmp_path)
    assert history[-1]["step"] == 2


def test_answers_without_classes_and_of_other_classes_are_refused():
    single = random_nets(nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), 2)
    with pytest.raises(ValueError, match="let the module give"):
        LikenessLoss(single, torch.randn(5, 4))
    for targets in (torch.zeros(1, 5, 4), torch.zeros(4, 5, 3)):
        with pytest.raises(ValueError, match="differ in nets or classes"):
            kl_divergence(torch.zeros(2, 5, 3), targets, 1.0)


def test_a_validation_that_names_the_space_itself_can_be_resumed(zoos, data, tmp_path):
    """Seen before: a space that had learned was another one, and its fit another fit."""
    space = NetSpace.for_zoos(zoos[0], data.train.x, CONFIG)
    objective = Distillation(space, zoos[0], data.train.x, nets=4, samples=4)
    fits = {"steps": 4, "epoch": 2, "folder": tmp_path}
    first = fit(space, objective, lambda _: scores(space, zoos[0], data.val), **fits)
    again = fit(space, objective, lambda _: scores(space, zoos[0], data.val), **fits)
    assert again == first
    other = NetSpace.for_zoos(zoos[0], data.train.x, CONFIG, seed=1)
    with pytest.raises(ValueError, match="validation"):
        fit(space, objective, lambda _: scores(other, zoos[0], data.val), **fits)


class Dropping(nn.Module):
    """A space of one's own, with dropout and tied weights, which share memory."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 4), nn.Linear(4, 1))
        self.layers[2].weight = self.layers[0].weight

    def forward(self, x):
        return self.layers(x)


def test_a_space_with_dropout_and_tied_weights_resumes_bit_for_bit(tmp_path):
    """Seen before: a fit that went on drew as if it had begun, and two of one seed differed."""
    x = torch.randn(8, 4, generator=generator())

    def objective(space, _):
        return space(x).square().mean()

    def losses(others, **options):
        torch.manual_seed(0)
        space = Dropping()
        torch.manual_seed(others)
        history = fit(space, objective, lambda _: {"x": 0.0}, 6, epoch=2, **options)
        return [row["loss"] for row in history]

    whole = losses(1)
    assert losses(2) == whole
    with pytest.raises(Interrupted):
        losses(3, folder=tmp_path, log=interrupted(lambda row: None, 2))
    assert losses(4, folder=tmp_path) == whole


def test_parts_of_the_space_may_be_named_by_objective_and_validation(zoo, data, tmp_path):
    """Seen before: once they had learned they were others, and the same fit was refused."""
    space = make(zoo, data)
    weights, decoder = list(space.decoder.parameters()), space.decoder
    small = lambda space, _: 1e-4 * sum(p.square().sum() for p in weights)  # noqa: E731
    objective = combine(distillation(space, zoo, data), small)
    size = lambda _: {"x": float(decoder.hidden.weight.detach().norm())}  # noqa: E731
    first = fit(space, objective, size, 4, epoch=2, folder=tmp_path)
    assert fit(space, objective, size, 4, epoch=2, folder=tmp_path) == first


@pytest.mark.parametrize("loss", [1.0, None, torch.zeros(2)], ids=["float", "none", "two"])
def test_an_objective_gives_one_number_as_a_tensor(zoo, data, loss):
    with pytest.raises(ValueError, match="step 0: the loss is .*, where a tensor of one finite"):
        fit(make(zoo, data), lambda space, _: loss, lambda _: {"x": 0.0}, 2)


def test_an_objective_in_half_precision_is_that_in_single(zoo, data):
    losses = []
    for kind in (torch.float32, torch.bfloat16):
        inputs, nets = data.train.x.to(kind), Nets(zoo.batched, zoo.rows.to(kind))
        space = NetSpace.for_zoos(nets, inputs, SMALL)
        losses.append(Distillation(space, nets, inputs)(space, generator()))
    assert losses[1].dtype == torch.bfloat16
    torch.testing.assert_close(losses[1].float(), losses[0], rtol=0.05, atol=0)


def test_an_objective_that_leaves_the_encoder_alone_is_told(zoo, data):
    """Seen before: whoever encoded by space.encode kept the encoder of the first step."""

    def objective(space, generator, encode):
        n = torch.randint(len(zoo), (6,), generator=generator)
        nets = space.decode(encode(space, n))
        return (nets(data.train.x) - zoo[n].outputs(data.train.x)).square().mean()

    def by_space(space, generator):
        return objective(space, generator, lambda space, n: space.encode(zoo[n]))

    space, validate = make(zoo, data), validation(zoo, data.val)
    with pytest.warns(UserWarning, match="the loss does not depend on the encoder"):
        fit(space, by_space, validate, 2)
    space, before = make(zoo, data), make(zoo, data)
    mixed = MixedZoo(space, zoo)
    fit(space, lambda space, g: objective(space, g, mixed.encode), validate, 2)
    assert not torch.equal(space.encode(zoo), before.encode(zoo))


def test_a_space_changed_after_an_interrupted_fit_is_not_resumed(zoo, data, tmp_path, monkeypatch):
    """Seen before: other weights loaded into it, or trained in between, were gone."""
    space = make(zoo, data)
    objective, validate = distillation(space, zoo, data), validation(zoo, data.val)
    options, whole = {"steps": 6, "epoch": 2, "folder": tmp_path}, Distillation.__call__

    def stopped(space, at, **options):
        monkeypatch.setattr(Distillation, "__call__", interrupted(whole, at))
        with pytest.raises(Interrupted):
            fit(space, objective, validate, **options)
        monkeypatch.setattr(Distillation, "__call__", whole)

    stopped(space, 6, **options)
    stopped(space, 2, **options)  # it goes on from where it was, with the same space
    with torch.no_grad():
        space.decoder.hidden.bias.add_(1)
    with pytest.raises(ValueError, match="another space: choose another folder"):
        fit(space, objective, validate, **options)
    again = make(zoo, data)
    stopped(again, 2, **options)
    stopped(again, 3, steps=9)
    with pytest.raises(ValueError, match="another space: choose another folder"):
        fit(again, objective, validate, **options)


def test_an_objective_may_be_asked_in_mixed_precision_first(zoo, data):
    """Seen before: it kept answers in bf16, which none outside could be compared with."""
    space = make(zoo, data)
    objective, plain = (distillation(space, zoo, data) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        objective(space, generator())
    assert torch.equal(objective(space, generator()), plain(space, generator()))


def test_zoos_of_other_sizes_have_equal_chances_and_each_of_their_nets(space, zoos):
    mixed = MixedZoo(space, [zoos[0][:2], zoos[1], zoos[2][:3]])
    found = mixed.draw(6000, generator()).bincount(minlength=11).float()
    expected = torch.tensor([1000.0] * 2 + [2000 / 6] * 6 + [2000 / 3] * 3)
    torch.testing.assert_close(found, expected, rtol=0.2, atol=0)
    torch.testing.assert_close(mixed.encode(space, torch.arange(11)), space.encode(mixed.zoos))


def test_zoos_in_another_order_than_the_spaces_teach_their_own_heads(space, zoos, data):
    distillation(space, zoos[::-1], data, chances=(1, 0, 0, 0))(space, generator()).backward()
    taught = [head.weight.grad is not None for head in space.decoder.heads]
    assert taught == [False, False, False, True]


def test_what_is_classified_is_moved_among_the_zoos_there_are(space, zoos, monkeypatch):
    seen, classify = [], space.classify
    monkeypatch.setattr(space, "classify", lambda z: (seen.append(z), classify(z))[1])
    ArchitectureClassification(space, [zoos[1], zoos[3]], translated=True)(space, generator())
    nearest = torch.cdist(seen[0], space.encoder.offset).argmin(1)
    own, moved = nearest.split(64)
    for found in (own, moved):
        assert found.unique().tolist() == [1, 3]
    assert 16 < (own != moved).sum() < 48


def test_a_step_draws_as_many_nets_and_samples_as_it_says(zoo, data):
    space, seen = make(zoo, data), []

    def loss(outputs, targets, scale):
        seen.append(tuple(outputs.shape[:2]))
        return 0 * outputs.sum((1, 2)) + 3

    for options in ({}, {"nets": 5, "samples": 7}):  # the loss is the mean of all nets'
        assert Distillation(space, zoo, data.train.x, loss=loss, **options)(space, generator()) == 3
    assert seen == [(48, 24), (5, 7)]


@pytest.mark.parametrize(("count", "crossing"), [(4, 0.0), (4, 0.25), (2, None), (4, 1.0)])
def test_a_share_of_nets_is_drawn_from_all_zoos(space, zoos, data, count, crossing, monkeypatch):
    seen, options = {}, {} if crossing is None else {"crossing": crossing}
    options |= {"nets": 2000, "chances": (0, 1, 0, 0)[:count]}
    objective = Distillation(space, zoos[:count], data.train.x, **options)

    def likeness(nets, generator, like, analogy):
        seen.update(group=objective.pool.group[like], far=analogy[0])
        return nets.rows.sum(1)

    monkeypatch.setattr(objective, "_likeness", lambda: likeness)
    objective(space, generator())
    crossed = 0.5 if crossing is None else crossing
    others = (seen["group"] != 1).float().mean().item()
    assert others == pytest.approx(crossed * (count - 1) / count, abs=0.03)
    assert (seen["far"] > 0).float().mean().item() == pytest.approx(0.7, abs=0.04)


def test_the_loss_of_decoded_nets_is_the_mean_of_nets_not_of_architectures(space, zoos):
    def loss(nets, generator):
        return 0 * nets.rows.sum(1) + (8.0 if nets.batched is space.batched[1] else 0.0)

    architecture = torch.tensor([0] * 7 + [1])
    assert decoded_loss(space, space.encode(zoos)[:8], architecture, loss, generator()) == 1


def test_a_teacher_has_as_many_nets_of_each_architecture(space, zoos):
    seen = []

    def loss(nets, generator):
        seen.append((space.index(nets), len(nets)))
        return nets.rows.sum(1)

    for options in ({}, {"nets": 5}):
        TeacherDistillation(space, zoos, loss, **options)(space, generator())
    assert seen == [(a, count) for count in (2, 5) for a in range(4)]


def test_points_lie_on_both_sides_of_their_places_and_within_the_line(space, zoos):
    one, other = zoos[0][:1], zoos[3][:1]
    objective = Interpolation(space, [one, other], rows_loss)
    with torch.no_grad():
        z, wanted = objective.points(space, generator(), 4000, ends=True)
    start, line = space.encode(one), space.encode(other) - space.encode(one)
    places = 3 * ((z - start) @ line.T / line.square().sum()).flatten()
    assert places.min() > -1e-4
    assert places.max() < 3 + 1e-4
    beside = (places - wanted)[(wanted > 0) & (wanted < 3)]
    assert beside.min().item() == pytest.approx(-0.3, abs=0.01)
    assert beside.max().item() == pytest.approx(0.3, abs=0.01)
    assert beside.mean().item() == pytest.approx(0, abs=0.02)
    shares = wanted.bincount() / len(wanted)
    torch.testing.assert_close(shares, torch.full((4,), 0.25), rtol=0, atol=0.03)


def test_interpolation_is_the_loss_in_between_and_the_cross_entropy_all_along(space, zoos):
    objective, random = Interpolation(space, zoos, rows_loss), generator()
    z, architecture = objective.points(space, random, 4)
    expected = decoded_loss(space, z, architecture, rows_loss, random)
    z, architecture = objective.points(space, random, 64, ends=True)
    expected = expected + F.cross_entropy(space.classify(z), architecture)
    torch.testing.assert_close(objective(space, generator()), expected)


def test_the_learning_rate_is_its_formula():
    """A twentieth of the steps up, and all of them down along half a cosine."""
    rates = [learning_rate(step, 100, 2.0) for step in (0, 3, 4, 25, 50, 75)]
    down = [1 + math.cos(math.pi * share) for share in (0, 0.03, 0.04, 0.25, 0.5, 0.75)]
    assert rates == pytest.approx([down[0] / 5, down[1] * 4 / 5, *down[2:]])
    assert learning_rate(0, 3, 2.0) == 2


def test_a_fit_is_a_loop_of_clipped_steps_at_the_scheduled_rate(monkeypatch):
    """With SGD in the optimiser's place, which shows how large a gradient is."""
    sgd = lambda module, lr: torch.optim.SGD(module.parameters(), lr)  # noqa: E731
    monkeypatch.setattr("netspace_lite.training.Muon", sgd)
    net = nn.Linear(3, 1)
    net.seed = 3  # of the draws
    alone, random = copy.deepcopy(net), generator(3)

    def objective(net, generator):
        return 50 * (net(torch.randn(8, 3, generator=generator)) - 1).square().mean()

    fit(net, objective, lambda _: {"x": 0.0}, 6, lr=0.1, epoch=6)
    optimiser = sgd(alone, 0.1)
    for step in range(6):
        optimiser.param_groups[0]["lr"] = learning_rate(step, 6, 0.1)
        optimiser.zero_grad()
        objective(alone, random).backward()
        assert nn.utils.clip_grad_norm_(alone.parameters(), 1.0) > 1
        optimiser.step()
    for found, expected in zip(net.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(found, expected)


def test_other_draws_of_a_step_follow_the_seed_and_the_step():
    def drawn(seed):
        net, seen = nn.Linear(1, 1), []
        net.seed = seed
        draw = lambda net, _: (seen.append(torch.rand(()).item()), net.weight.sum())[1]  # noqa: E731
        fit(net, draw, lambda _: {"x": 0.0}, 3)
        return seen

    assert drawn(1) == drawn(1)
    assert len({*drawn(0), *drawn(1)}) == 6


@pytest.mark.parametrize(
    ("given", "kept"),
    [([1.0, 3.0, 2.0], 1), ([1.0, 3.0, 3.0], 1), ([math.nan] * 3, 0)],
    ids=["best", "equals", "nan"],
)
@pytest.mark.parametrize("saved", [False, True])
def test_a_fit_ends_in_the_first_state_of_the_highest_first_score(
    zoo, data, given, kept, saved, tmp_path
):
    space, found, states = make(zoo, data), iter(given), []

    def validate(space):
        states.append(space.encode(zoo))
        return {"first": next(found), "second": float(len(states))}

    folder = tmp_path if saved else None
    fit(space, distillation(space, zoo, data), validate, 3, epoch=1, folder=folder)
    assert torch.equal(space.encode(zoo), states[kept])


def test_a_fit_goes_on_from_its_last_state_not_its_best_one(zoo, data, tmp_path):
    def run(**options):
        space = make(zoo, data)
        falling = lambda space: {"x": -float(space.decoder.hidden.weight.detach().norm())}  # noqa: E731
        rising = lambda space: {"x": float(space.decoder.hidden.weight.detach().norm())}  # noqa: E731
        objective = distillation(space, zoo, data)
        way = falling if options.pop("falls") else rising
        return fit(space, objective, way, 6, epoch=2, **options)

    for falls in (True, False):  # by one of the two the first state is the best
        folder = tmp_path / str(falls)
        with pytest.raises(Interrupted):
            run(falls=falls, folder=folder, log=interrupted(lambda row: None, 3))
        again, whole = run(falls=falls, folder=folder), run(falls=falls)
        assert [row["loss"] for row in again] == [row["loss"] for row in whole]
        seconds = [row["seconds"] for row in again]
        assert seconds == sorted(seconds)


def test_squared_errors_are_means_in_units_of_the_scale():
    outputs, targets = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    scale = torch.tensor([1.0, 10.0])
    found = squared_error(outputs, targets, scale[:, None, None])
    for n in range(2):
        expected = F.mse_loss(outputs[n], targets[n]) / scale[n] ** 2
        torch.testing.assert_close(found[n], expected)
