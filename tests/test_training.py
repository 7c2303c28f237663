"""The space and its fit: round trips, gradients, losses against torch, resumption bit for bit."""

import pytest
import torch
import torch.nn.functional as F

from netspace_lite.architectures import lite_net
from netspace_lite.data import load_digits
from netspace_lite.functional import Nets
from netspace_lite.layout import Layout
from netspace_lite.metrics import scores
from netspace_lite.space import NetSpace, SpaceConfig, normalised_answers
from netspace_lite.training import (
    InstanceDistillation,
    fit,
    kl_divergence,
    learning_rate,
    refine,
    spread,
)
from netspace_lite.zoo import ImageTask, draw_recipes, initial_rows, train_zoo

NET = lite_net("LeNetLike", (1, 8, 8), 10)
SMALL = SpaceConfig(embedding=8, probes=6, hidden=16)
CONFIGS = {
    "weights and probes": SMALL,
    "weights only": SpaceConfig(embedding=8, probes=0, hidden=16),
    "probes only": SpaceConfig(embedding=8, probes=6, hidden=16, weights=False),
    "learned probes": SpaceConfig(embedding=8, probes=6, hidden=16, learn_probes=True),
}


@pytest.fixture(scope="module")
def data():
    return load_digits()


@pytest.fixture(scope="module")
def zoo(data):
    return train_zoo(NET, ImageTask(data), draw_recipes(24, steps=(2, 60)), progress=False)


def make(zoo, data, config=SMALL, seed=0):
    return NetSpace.for_zoos(zoo, data.train.x, config, seed)


def fitted(zoo, data, steps=6, config=SMALL, **options):
    space = make(zoo, data, config)
    objective = InstanceDistillation(space, zoo, data.train.x, nets=6, samples=8)
    history = fit(
        space, objective, lambda s: scores(s, zoo[:8], data.val), steps, epoch=2, progress=False,
        **options,
    )  # fmt: skip
    return space, history


@pytest.mark.parametrize("name", CONFIGS)
def test_every_encoder_takes_nets_rows_modules_and_state_dicts_alike(zoo, data, name):
    space = make(zoo, data, CONFIGS[name])
    z = space.encode(zoo[:3])
    assert z.shape == (3, 8)
    modules = [zoo.to_module(n) for n in range(3)]
    for nets in (zoo.rows[:3], modules, [m.state_dict() for m in modules]):
        torch.testing.assert_close(space.encode(nets), z)
    torch.testing.assert_close(space.encode(modules[1]), z[1:2])


def test_a_decoded_net_answers_the_same_in_the_batch_and_as_a_module(zoo, data):
    space = make(zoo, data)
    nets = space.decode(space.encode(zoo[:4]))
    x = data.test.x[:20]
    together = nets.logits(x)
    for n in range(4):
        torch.testing.assert_close(nets.to_module(n)(x), together[n], rtol=1e-4, atol=1e-4)


def test_the_decoder_starts_near_the_best_net_of_the_zoo(zoo, data):
    space = make(zoo, data)
    best = int(zoo.scores["val_accuracy"].argmax())
    assert torch.equal(space.decoder.bias[0], zoo.rows[best])


def test_probe_answers_ignore_permuted_hidden_units_and_shifted_logits(zoo, data):
    state = zoo.state_dict(0)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    state["layers.5.weight"] = state["layers.5.weight"][order]
    state["layers.5.bias"] = state["layers.5.bias"][order]
    state["layers.7.weight"] = state["layers.7.weight"][:, order]
    state["layers.7.bias"] = state["layers.7.bias"] + 3
    probing = make(zoo, data, CONFIGS["probes only"])
    torch.testing.assert_close(probing.encode(state), probing.encode(zoo[0]), rtol=1e-3, atol=1e-4)
    reading = make(zoo, data, CONFIGS["weights only"])
    assert (reading.encode(state) - reading.encode(zoo[0])).abs().max() > 1e-2


def test_answers_are_normalised_by_hand():
    outputs = torch.tensor([[[1.0, 3.0], [10.0, 12.0]]])  # centred: ∓1 twice, spread 1
    expected = torch.tensor([[-1.0, 1.0, -1.0, 1.0, 0.0]])
    torch.testing.assert_close(normalised_answers(outputs), expected)
    scaled = normalised_answers(5 * outputs)
    torch.testing.assert_close(scaled[:, :-1], expected[:, :-1])
    assert scaled[0, -1].item() == pytest.approx(torch.tensor(5.0).log().item())


def test_kl_is_torchs_own():
    torch.manual_seed(0)
    a, b, t = torch.randn(3, 5, 4), torch.randn(3, 5, 4), torch.tensor([0.5, 1.0, 2.0])
    found = kl_divergence(a, b, t[:, None, None])
    for n in range(3):
        expected = F.kl_div(
            F.log_softmax(a[n] / t[n], -1), F.softmax(b[n] / t[n], -1), reduction="batchmean"
        )
        torch.testing.assert_close(found[n], expected)
    assert spread(torch.tensor([[[2.0, 4.0]]])).item() == pytest.approx(1.0)


def test_the_objectives_gradient_is_that_of_finite_differences(zoo, data):
    space = make(zoo, data, CONFIGS["probes only"]).double()
    double = Nets(NET.double(), zoo.rows[:4].double())
    try:
        objective = InstanceDistillation(space, double, data.train.x.double(), nets=4, samples=3)
        parameter = space.decoder.bias[0]

        def loss():
            return objective(space, torch.Generator().manual_seed(1))

        (gradient,) = torch.autograd.grad(loss(), parameter)
        with torch.no_grad():
            for n in (0, 500, 5749):
                value, step = parameter[n].item(), 1e-6
                parameter[n] = value + step
                up = loss().item()
                parameter[n] = value - step
                down = loss().item()
                parameter[n] = value
                assert (up - down) / (2 * step) == pytest.approx(gradient[n].item(), abs=1e-7)
    finally:
        NET.float()


@pytest.mark.parametrize("name", CONFIGS)
def test_fitting_lowers_the_loss(zoo, data, name):
    _, history = fitted(zoo, data, steps=30, config=CONFIGS[name])
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]


def test_the_best_state_is_kept(zoo, data):
    space, history = fitted(zoo, data, steps=8)
    best = max(row["agreement"] for row in history)
    assert scores(space, zoo[:8], data.val)["agreement"] == pytest.approx(best, abs=0.1)


def test_refining_embeddings_brings_decoded_nets_closer_and_leaves_the_space(zoo, data):
    space, _ = fitted(zoo, data, steps=60)
    before = {name: value.clone() for name, value in space.state_dict().items()}
    z = refine(space, zoo[:8], data.train.x, 150)
    answers = zoo[:8].outputs(data.test.x)
    scale = spread(answers)
    start, end = (
        kl_divergence(space.decode(e).outputs(data.test.x), answers, scale)
        for e in (space.encode(zoo[:8]), z)
    )
    assert (end < start).all()
    assert (end / start).mean() < 0.9
    assert all(torch.equal(space.state_dict()[name], value) for name, value in before.items())


class Interrupted(Exception):
    pass


def test_an_interrupted_fit_resumes_bit_for_bit(zoo, data, tmp_path):
    whole, history = fitted(zoo, data)
    space = make(zoo, data)
    objective = InstanceDistillation(space, zoo, data.train.x, nets=6, samples=8)
    calls = 0

    def interrupting(space, generator):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise Interrupted
        return objective(space, generator)

    def validate(space):
        return scores(space, zoo[:8], data.val)

    with pytest.raises(Interrupted):
        fit(space, interrupting, validate, 6, epoch=2, folder=tmp_path, progress=False)
    resumed, again = fitted(zoo, data, folder=tmp_path)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert [r["loss"] for r in again] == [r["loss"] for r in history]
    finished, _ = fitted(zoo, data, folder=tmp_path)  # loaded, not trained again
    assert torch.equal(finished.encode(zoo), whole.encode(zoo))
    with pytest.raises(ValueError, match="choose another folder"):
        fitted(zoo, data, steps=7, folder=tmp_path)


def test_a_space_saves_and_loads(zoo, data, tmp_path):
    space = make(zoo, data)
    space.save(tmp_path)
    again = NetSpace.load(tmp_path)
    assert torch.equal(again.encode(zoo), space.encode(zoo))
    z = space.encode(zoo[:2])
    assert torch.equal(again.decode(z).rows, space.decode(z).rows)


def test_the_same_seed_gives_the_same_space(zoo, data):
    one, two, other = (fitted(zoo, data, seed=s)[0].encode(zoo) for s in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_the_learning_rate_warms_up_and_falls_to_zero():
    rates = [learning_rate(step, 100, 2.0) for step in range(100)]
    assert rates[0] < rates[4] <= 2.0
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] < 0.002


def test_wrong_input_is_refused_in_a_sentence(zoo, data):
    space = make(zoo, data)
    other = lite_net("LeNetLike", (1, 8, 8), 7)
    with pytest.raises(ValueError, match="this space was built for other nets"):
        space.encode(Nets(other, initial_rows(other, [0])))
    with pytest.raises(ValueError, match=rf"rows should be \[N, {Layout.of(NET).size}\]"):
        space.encode(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"embeddings should be \[N, 8\], not \[2, 9\]"):
        space.decode(torch.zeros(2, 9))
    with pytest.raises(ValueError, match="weights=True, or probes > 0"):
        NetSpace([NET], data.train.x, SpaceConfig(probes=0, weights=False))
