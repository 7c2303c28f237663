"""The space: what it embeds and decodes, its architectures, round trips through a folder."""

import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from threadpoolctl import threadpool_limits
from torch import nn
from toy import CLASSES, IMAGE, Looks, generator, mlp, random_nets, small_nets, small_zoos, toy_data

from netspace_lite.architectures import LeNetLike, lite_net
from netspace_lite.layout import Layout
from netspace_lite.nets import Nets
from netspace_lite.space import NetSpace, SpaceConfig, logit_scale, normalised_answers
from netspace_lite.training import ArchitectureClassification, Distillation, fit
from netspace_lite.zoo import Zoo
from netspace_lite.zoo_training import initial_rows

CONFIG = SpaceConfig(embedding=16, probes=8, weights=False, hidden=16)
CONFIGS = {
    "weights and probes": SpaceConfig(embedding=16, probes=6, hidden=16, chunk=64),
    "weights only": SpaceConfig(embedding=16, probes=0, hidden=16, chunk=64),
    "invariants": SpaceConfig(embedding=16, probes=0, hidden=16, weights="invariants"),
    "probes only": SpaceConfig(embedding=16, probes=6, hidden=16, weights=False),
    "components": SpaceConfig(embedding=16, probes=6, hidden=16, components=5),
    "learned probes": SpaceConfig(embedding=16, probes=6, hidden=16, learn_probes=True),
}


@pytest.fixture(scope="module")
def data():
    return toy_data()


@pytest.fixture(scope="module")
def zoos(data):
    return small_zoos(data)


@pytest.fixture
def space(zoos, data):
    return NetSpace.for_zoos(zoos, data.train.x, CONFIG)


def one(zoos, data, config=CONFIG):
    return NetSpace.for_zoos(zoos[0], data.train.x, config)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_encoder_takes_nets_rows_modules_and_state_dicts_alike(zoos, data, name):
    space, zoo = one(zoos, data, CONFIGS[name]), zoos[0]
    z = space.encode(zoo[:3])
    assert z.shape == (3, 16)
    modules = [zoo.to_module(n) for n in range(3)]
    for nets in (zoo.rows[:3], modules, [m.state_dict() for m in modules]):
        torch.testing.assert_close(space.encode(nets), z)
    torch.testing.assert_close(space.encode(modules[1]), z[1:2])
    torch.testing.assert_close(space.encode(modules[1].state_dict()), z[1:2])


def test_a_decoded_net_answers_the_same_in_the_batch_and_as_a_module(zoos, data):
    space = one(zoos, data)
    nets, x = space.decode(space.encode(zoos[0][:4])), data.test.x[:20]
    together = nets.outputs(x)
    for n in range(4):
        torch.testing.assert_close(nets.to_module(n)(x), together[n], rtol=1e-4, atol=1e-4)


def test_the_decoder_starts_near_the_best_net_of_the_zoo(space, zoos):
    for bias, zoo in zip(space.decoder.bias, zoos, strict=True):
        assert torch.equal(bias, zoo.rows[int(zoo.scores["val_accuracy"].argmax())])


def test_probe_answers_ignore_permuted_hidden_units_and_shifted_logits(zoos, data):
    state = zoos[0].state_dict(0)
    order = torch.randperm(8, generator=generator())
    state["layers.3.weight"] = state["layers.3.weight"][order]
    state["layers.3.bias"] = state["layers.3.bias"][order]
    state["layers.5.weight"] = state["layers.5.weight"][:, order]
    state["layers.5.bias"] = state["layers.5.bias"] + 3
    probing, reading = (one(zoos, data, CONFIGS[f"{what} only"]) for what in ("probes", "weights"))
    torch.testing.assert_close(
        probing.encode(state), probing.encode(zoos[0][0]), rtol=1e-3, atol=1e-4
    )
    assert (reading.encode(state) - reading.encode(zoos[0][0])).abs().max() > 1e-2


def test_answers_are_normalised_by_hand():
    outputs = torch.tensor([[[1.0, 3.0], [10.0, 12.0]]])  # centred: ∓1 twice, scale 1
    expected = torch.tensor([[-1.0, 1.0, -1.0, 1.0, 0.0]])
    torch.testing.assert_close(normalised_answers(outputs), expected)
    scaled = normalised_answers(5 * outputs)
    torch.testing.assert_close(scaled[:, :-1], expected[:, :-1])
    assert scaled[0, -1].item() == pytest.approx(torch.tensor(5.0).log().item())


def test_answers_are_read_along_what_sets_a_zoo_apart():
    """Beside the singular vectors of fp64: directions, their gains and the size of what is read."""
    config = SpaceConfig(embedding=4, probes=20, components=40, weights=False, hidden=8)
    nets, x = (
        random_nets(mlp(nn.Tanh(), 6, 8, 3), 160, scale=1.0),
        torch.randn(30, 6, generator=generator()),
    )
    space = NetSpace.for_zoos(nets, x, config)
    answers, encoder = space.features(nets.rows).answers.double(), space.encoder
    assert answers.shape == (160, 61)
    centred = answers - answers.mean(0)
    _, spread, directions = torch.linalg.svd(centred, full_matrices=False)
    axes = encoder.axes.double()
    read = (answers - encoder.centre.double()) @ axes
    assert read.square().mean().item() == pytest.approx(1, abs=1e-4)
    gains = (directions[:40] @ axes).abs()
    expected = torch.diag(spread[:40].rsqrt() / (spread[:40].mean() / 160) ** 0.5)
    torch.testing.assert_close(gains, expected, rtol=1e-3, atol=1e-4 * float(expected.max()))


@pytest.mark.skipif(os.cpu_count() < 2, reason="one processor has one thread")
def test_axes_do_not_depend_on_how_many_threads_look_for_them():
    config = SpaceConfig(embedding=4, probes=128, components=256, weights=False, hidden=8)
    nets = random_nets(mlp(nn.Tanh(), 6, 8, 10), 2000)
    x = torch.randn(200, 6, generator=generator())
    found = []
    for threads in (1, 2):  # as OMP_NUM_THREADS would; torchrun sets it to 1
        with threadpool_limits(threads):
            found.append(NetSpace.for_zoos(nets, x, config).encoder.axes)
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_nets_that_answer_alike_are_read_along_any_axes():
    net = random_nets(mlp(nn.Tanh(), 6, 8, 3), 1, scale=1.0)
    alike = Nets(net.batched, net.rows.expand(5, -1))
    x, config = torch.randn(30, 6, generator=generator()), replace(CONFIG, components=10)
    fresh = NetSpace([net.module], x, config)
    for nets in (net, alike):
        space = NetSpace.for_zoos(nets, x, config)
        assert torch.equal(space.encoder.axes, fresh.encoder.axes)
        assert space.encode(nets).isfinite().all()
    others = random_nets(mlp(nn.Tanh(), 6, 8, 3), 5, scale=1.0)
    read = NetSpace.for_zoos(others, x, config).encoder.axes
    assert read.isfinite().all()
    assert read[:, :4].abs().amin(0).max() > 0
    assert (read[:, 5:] == 0).all()  # five nets have no more components
    assert NetSpace.for_zoos(others, x, CONFIG).encoder.axes is None


def test_names_tell_depths_and_repeats_apart(space):
    assert space.architectures == ["LeNetLike", "VanillaCNN", "ResNet8", "ResNet14"]
    wider = LeNetLike(IMAGE, CLASSES, channels=(8,), hidden=(8,), kernel=3)
    twice = NetSpace([small_nets()[0], wider], torch.randn(8, *IMAGE), CONFIG)
    assert twice.architectures == ["LeNetLike", "LeNetLike-2"]


def test_index_finds_architectures_in_every_form(space, zoos):
    for a, (name, net, zoo) in enumerate(zip(space.architectures, small_nets(), zoos, strict=True)):
        numbers = np.int64(a), torch.tensor(a)
        assert [space.index(form) for form in (a, name, net, zoo, *numbers)] == [a] * 6


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (None, r"architecture None, .* this space, which holds LeNetLike \(\d+\), VanillaCNN"),
        ("AlexNet", "architecture 'AlexNet'"),
        (7, "architecture 7"),
        (-1, "architecture -1"),
        (torch.tensor([1, 0]), r"architecture tensor\(\[1, 0\]\)"),
        (nn.Linear(2, 3), "a Linear of 9 parameters.* is not one of this space"),
    ],
)
def test_index_says_what_there_is(space, architecture, message):
    with pytest.raises(ValueError, match=message):
        space.index(architecture)


def test_a_second_architecture_leaves_the_first_initialisation_alone(zoos, data):
    state = one(zoos, data).state_dict()
    assert not [key for key in state if "offset" in key or "classifier" in key]
    two = NetSpace.for_zoos([zoos[0], zoos[1]], data.train.x, CONFIG)
    assert torch.equal(state["encoder.answers.weight"], two.encoder.answers.weight)


def test_one_architecture_has_nothing_to_classify(zoos, data):
    space = one(zoos, data)
    assert isinstance(space.decode(torch.zeros(2, 16)), Nets)
    with pytest.raises(ValueError, match="one architecture only, LeNetLike"):
        space.classify(torch.zeros(2, 16))


def test_encode_takes_mixed_zoos_in_order(space, zoos):
    z = space.encode(zoos)
    assert z.shape == (24, 16)
    torch.testing.assert_close(z[6:12], space.encode(zoos[1], "VanillaCNN"))
    torch.testing.assert_close(z[18:20], space.encode([zoos[3].to_module(n) for n in (0, 1)]))
    torch.testing.assert_close(z[:6], space.encode(zoos[0].rows, 0))
    with pytest.raises(ValueError, match="take each architecture apart"):
        space.encode([zoos[2].to_module(1), zoos[0].to_module(4)])


@pytest.mark.parametrize("weights", [False, True])
def test_decode_by_prediction_equals_decode_by_name(zoos, data, weights):
    config = SpaceConfig(embedding=16, probes=8, weights=weights, hidden=16)
    space = NetSpace.for_zoos(zoos, data.train.x, config)
    z = torch.randn(40, 16, generator=generator()) * 5
    with torch.no_grad():
        mixed, predicted = space.decode(z), space.predict(z)
        assert len(predicted.unique()) > 1
        outputs = mixed(data.val.x)
        for n, a in enumerate(predicted.tolist()):
            expected = space.decode(z[n], a)
            assert mixed.architectures[n] == space.architectures[a]
            torch.testing.assert_close(mixed[n].rows, expected.rows)
            torch.testing.assert_close(outputs[n], expected(data.val.x)[0])
    torch.testing.assert_close(mixed.outputs(data.val.x), outputs)
    again = space.encode(mixed)  # in the mixed order, not group by group
    torch.testing.assert_close(again[0], space.encode(mixed[0])[0])
    assert mixed.accuracy(data.val).shape == (40,)


def test_decoding_passes_gradients_to_every_embedding(space, data):
    z = (torch.randn(10, 16, generator=generator()) * 5).requires_grad_()
    space.decode(z)(data.val.x).square().sum().backward()
    assert (z.grad.abs().sum(1) > 0).all()


def test_translation_keeps_answers_apart_from_form(space, zoos):
    z = space.encode(zoos[0])
    moved = space.translate(z, "LeNetLike", "ResNet8")
    with torch.no_grad():
        torch.testing.assert_close(moved, space.encoder(space.features(zoos[0].rows, 0), 2))
    torch.testing.assert_close(space.translate(moved, 2, 0), z)
    assert torch.equal(space.translate(z, 1, 1), z)


def test_a_space_that_is_not_told_knows_nets_by_their_answers_alone(zoos, data, tmp_path):
    space = NetSpace.for_zoos(zoos, data.train.x, replace(CONFIG, told=False))
    z, answers = space.encode(zoos[0]), space.features(zoos[0].rows, 0)
    assert torch.equal(space.encoder(answers, 0), space.encoder(answers, 3))
    assert torch.equal(space.translate(z, 0, 3), z)
    rows = (space.decode(z, a).rows.shape[1] for a in range(4))
    assert list(rows) == [zoo.layout.size for zoo in zoos]
    space.save(tmp_path)
    assert torch.equal(NetSpace.load(tmp_path).encode(zoos), space.encode(zoos))
    objective = ArchitectureClassification(space, zoos)
    objective(space, generator()).backward()
    assert space.encoder.answers.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="translated=False"):
        ArchitectureClassification(space, zoos, translated=True)


def test_a_new_space_has_its_architectures_in_a_row(space):
    offset = space.encoder.offset.detach()
    assert torch.equal(space.predict(offset), torch.arange(4))
    way = torch.lerp(offset[:1], offset[3:], torch.linspace(0, 1, 100)[:, None])
    assert space.predict(way).diff().sum() == 3
    assert (space.predict(way).diff() >= 0).all()


def test_unseen_architectures_start_at_their_modules_own_values(zoos, data):
    modules = small_nets()
    ends = [zoos[3], zoos[0]]  # any order: each finds its module
    space = NetSpace.for_zoos(ends, data.train.x, CONFIG, modules=modules)
    best = zoos[3].rows[zoos[3].scores["val_accuracy"].argmax()]
    assert torch.equal(space.decoder.bias[3], best)
    row = Layout.of(modules[1]).pack([modules[1]])[0]
    assert torch.equal(space.decoder.bias[1], row)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_space_saves_and_loads(zoos, data, name, tmp_path):
    space = one(zoos, data, CONFIGS[name])
    space.save(tmp_path)
    again = NetSpace.load(tmp_path)
    z = space.encode(zoos[0])
    assert torch.equal(again.encode(zoos[0]), z)
    assert torch.equal(again.decode(z).rows, space.decode(z).rows)


def test_a_space_of_numpys_numbers_fits_saves_and_loads(zoos, data, tmp_path):
    """Seen before: an epoch was trained, and only then JSON did not take them."""
    size, seed = np.arange(16, 18)
    space = NetSpace.for_zoos(zoos[0], data.train.x, SpaceConfig(size, probes=size), seed)
    plain = NetSpace.for_zoos(zoos[0], data.train.x, SpaceConfig(16, probes=16), 17)
    for fitted, steps, lr in ((space, seed, np.float32(0.25)), (plain, 17, 0.25)):
        objective = Distillation(fitted, zoos[0], data.train.x, nets=2, samples=4)
        options = {"lr": lr, "epoch": steps, "folder": tmp_path / "fit"}
        fit(fitted, objective, lambda space: {"score": 0.0}, steps, **options)
    fitted.save(tmp_path)
    assert torch.equal(NetSpace.load(tmp_path).encode(zoos[0]), space.encode(zoos[0]))


def test_mixed_spaces_come_back(space, zoos, tmp_path):
    space.save(tmp_path)
    loaded = NetSpace.load(tmp_path)
    assert torch.equal(loaded.predict(space.encode(zoos)), space.predict(space.encode(zoos)))


def test_unregistered_modules_come_back_with_their_modules(data, tmp_path):
    relu, tanh = (nn.Sequential(nn.Flatten(), *mlp(f, 64)) for f in (nn.ReLU(), nn.Tanh()))
    space = NetSpace([relu, tanh], data.train.x, CONFIG)
    space.save(tmp_path)
    z = torch.randn(2, 16)
    again = NetSpace.load(tmp_path, modules=[relu, tanh])
    assert torch.equal(again.decode(z, 1).rows, space.decode(z, 1).rows)
    with pytest.raises(ValueError, match="decorate its class"):
        NetSpace.load(tmp_path)
    for modules in ([tanh, relu], [relu], [relu, tanh, relu]):
        with pytest.raises(ValueError, match="space|module|architecture"):
            NetSpace.load(tmp_path, modules=modules)


@pytest.mark.parametrize("weights", [False, True], ids=["probes", "weights and probes"])
def test_a_users_module_joins(zoos, data, weights):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(64), nn.Linear(64, CLASSES)

        def forward(self, x):
            return self.linear(self.norm(x.flatten(1)))

    own = Nets(Own(), initial_rows(Own(), range(4)))
    config = SpaceConfig(embedding=16, probes=8, weights=weights, hidden=16)
    space = NetSpace.for_zoos([zoos[0], own], data.train.x, config)
    assert space.architectures == ["LeNetLike", "Own"]
    assert space.decode(space.encode([zoos[0], own])).outputs(data.val.x).isfinite().all()


def test_the_same_seed_gives_the_same_space(zoos, data):
    spaces = [NetSpace.for_zoos(zoos[0], data.train.x, CONFIG, seed=s) for s in (0, 0, 1)]
    one, two, other = (space.encode(zoos[0]) for space in spaces)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_nets_that_are_not_finite_are_named(zoos, data):
    space, rows = one(zoos, data), zoos[0].rows.clone()
    rows[[1, 4], 3] = torch.nan
    broken = Nets(zoos[0].batched, rows)
    modules = [broken.to_module(n) for n in range(6)]
    for nets in (broken, rows, modules, [m.state_dict() for m in modules]):
        with pytest.raises(ValueError, match=r"1, 4"):
            space.encode(nets)
    with pytest.raises(ValueError, match=r"1, 4"):
        NetSpace.for_zoos(broken, data.train.x, CONFIG)


def test_a_zoo_of_one_net_makes_a_space(zoos, data):
    space = NetSpace.for_zoos(zoos[0][:1], data.train.x, CONFIGS["weights and probes"])
    z = space.encode(zoos[0][:1])
    assert z.isfinite().all()
    assert space.decode(z[0]).outputs(data.val.x).isfinite().all()


def test_wrong_input_is_refused_in_a_sentence(zoos, data):
    space, net = one(zoos, data), small_nets()[0]
    other = lite_net("LeNetLike", IMAGE, 7)
    with pytest.raises(ValueError, match="is not one of this space, which holds LeNetLike"):
        space.encode(random_nets(other, 2))
    with pytest.raises(ValueError, match=rf"\[N, {Layout.of(net).size}\] .*not \[2, 5\]"):
        space.encode(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"embeddings should be \[N, 16\] of .*, not \[2, 9\]"):
        space.decode(torch.zeros(2, 9))
    with pytest.raises(ValueError, match=r"embeddings are a Nets: space.encode\(nets\)"):
        space.decode(random_nets(net, 2))
    with pytest.raises(ValueError, match="weights=True, or probes > 0"):
        NetSpace([net], data.train.x, SpaceConfig(probes=0, weights=False))
    with pytest.raises(ValueError, match="weights should be one of .*'invariants'.*, not 'chunks'"):
        NetSpace([net], data.train.x, SpaceConfig(weights="chunks"))
    with pytest.raises(ValueError, match="no nets|at least one"):
        space.encode([])
    with pytest.raises(ValueError, match="no inputs|at least one|inputs"):
        NetSpace([net], data.train.x[:0], CONFIG)
    with pytest.raises(ValueError, match="inputs should be floats.*uint8"):
        NetSpace([net], data.train.x.to(torch.uint8), CONFIG)
    with pytest.raises(ValueError, match="answer|output|classes"):
        NetSpace([net, LeNetLike(IMAGE, 4, (4,), (8,), 3)], data.train.x, CONFIG)


@pytest.mark.parametrize("net", [small_nets()[0], nn.Sequential(nn.Flatten(), *mlp(nn.ReLU(), 64))])
def test_a_single_module_is_an_architecture_of_its_own(data, tmp_path, net):
    """Seen before: a net has no len(), and of a Sequential each layer was one."""
    space = NetSpace(net, data.train.x, CONFIG)
    space.save(tmp_path)
    for modules in (net, nn.ModuleList([net]), iter([net])):
        assert torch.equal(NetSpace.load(tmp_path, modules).encode(net), space.encode(net))


def test_modules_of_batch_norms_are_folded_on_the_way_in(data, tmp_path):
    """What is encoded as a module is what a zoo of it holds."""
    layers = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(108, CLASSES)
    net = nn.Sequential(*layers)
    net(torch.randn(9, *IMAGE))
    zoo = Zoo.from_modules([net.eval()])
    space = NetSpace.for_zoos(zoo, data.train.x, CONFIG)
    torch.testing.assert_close(space.encode(net), space.encode(zoo))
    assert NetSpace([net], data.train.x, CONFIG).index(zoo) == space.index(net) == 0
    space.save(tmp_path)
    assert torch.equal(NetSpace.load(tmp_path, [net]).encode(net), space.encode(net))


def test_inputs_that_are_not_finite_are_refused(zoos, data):
    """Seen before: embeddings of NaN."""
    x = data.train.x.clone()
    x[3] = torch.nan
    with pytest.raises(ValueError, match=r"inputs \[3\] are not finite"):
        NetSpace.for_zoos(zoos[0], x, CONFIG)


def test_nets_of_one_parameter_decode_to_numbers():
    """Seen before: the spread of one number is NaN, and so was every decoded net."""
    nets = random_nets(nn.Linear(1, 1, bias=False), 5)
    space = NetSpace.for_zoos(nets, torch.randn(20, 1, generator=generator()), CONFIG)
    assert space.decode(space.encode(nets)).rows.isfinite().all()


def test_a_net_that_answers_nothing_weighs_no_more_than_others(zoos, data):
    """Seen before: its temperature of a millionth made its loss that of a million nets."""
    rows = torch.cat([zoos[0].rows, torch.zeros(1, zoos[0].layout.size)])
    mute = Nets(zoos[0].batched, rows)
    space = NetSpace.for_zoos(mute, data.train.x, CONFIG)
    assert Distillation(space, mute, data.train.x)(space, generator()) < 100
    scale = logit_scale(mute.outputs(data.train.x)).flatten()
    assert scale[-1] == 1
    assert torch.equal(scale[:-1], logit_scale(zoos[0].outputs(data.train.x)).flatten())


def test_a_space_made_or_loaded_in_inference_mode_can_be_fitted(zoos, data, tmp_path):
    with torch.inference_mode():
        made = NetSpace(zoos[0].module, data.train.x, CONFIG)
        made.save(tmp_path)
        loaded = NetSpace.load(tmp_path, [zoos[0].module])
    for space in (made, loaded):
        objective = Distillation(space, zoos[0], data.train.x, nets=4, samples=4)
        (row,) = fit(space, objective, lambda s: {"score": 0.0}, 1)
        assert row["loss"] > 0


@pytest.mark.filterwarnings("ignore:Looks runs through")
def test_nets_that_read_tokens_have_a_space(tmp_path):
    nets, tokens = random_nets(Looks(), 6), torch.randint(11, (20, 5), generator=generator())
    space = NetSpace.for_zoos(nets, tokens, CONFIGS["weights and probes"])
    objective = Distillation(space, nets, tokens, nets=4, samples=8)

    def score(space):
        return {"score": -objective(space, generator()).item()}

    before = score(space)["score"]
    assert fit(space, objective, score, 300)[-1]["score"] > before / 2
    space.save(tmp_path)
    again = NetSpace.load(tmp_path, Looks())
    assert torch.equal(again.encode(nets), space.encode(nets))
    assert torch.equal(again.probes, space.probes)


@pytest.mark.parametrize("weights", [True, "invariants"])
def test_what_a_zoo_shares_is_not_magnified(data, weights):
    """Seen before: heads on one backbone; another backbone's nets lay 100,000 times as far out."""
    shared, others = nn.Linear(64, 32), nn.Linear(64, 32)

    def head(backbone):
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
        net[1].load_state_dict(backbone.state_dict())
        return net

    zoo, far = Zoo.from_modules([head(shared) for _ in range(20)]), head(others)
    config = SpaceConfig(embedding=16, hidden=16, probes=0, weights=weights)
    space = NetSpace.for_zoos(zoo, data.train.x, config)
    usual = space.encode(zoo).norm(dim=1).max()
    assert space.encode(head(shared)).norm() < 2 * usual
    assert space.encode(far).norm() < 10 * usual
    rounded = space.encode(Nets(zoo.batched, zoo.rows.bfloat16().float()))
    torch.testing.assert_close(rounded, space.encode(zoo), rtol=0.1, atol=float(0.05 * usual))


class Shifted(nn.Module):
    """A constant of the architecture, and a weight under two names."""

    def __init__(self, mean):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(torch.relu(self.first(x - self.mean)))


def test_state_dicts_of_another_module_are_refused():
    """Seen before: a state dict's buffers and tied weights were passed over."""
    x = torch.randn(20, 4, generator=generator())
    zoo = Zoo.from_modules([Shifted(5.0) for _ in range(5)])
    space = NetSpace.for_zoos(zoo, x, SpaceConfig(embedding=8, probes=5, hidden=16))
    state = Shifted(5.0).state_dict()
    assert space.encode(state).shape == (1, 8)
    untied = dict(state, **{"last.weight": torch.randn(4, 4)})
    for name, other in (("mean", Shifted(0.0).state_dict()), ("last.weight", untied)):
        with pytest.raises(ValueError, match=f"another '{name}' than a Shifted"):
            space.encode([state, other])


def test_a_module_list_is_a_list_of_modules(zoos, space):
    modules = [zoos[0].to_module(n) for n in range(3)]
    assert torch.equal(space.encode(nn.ModuleList(modules)), space.encode(modules))


def test_probes_that_are_tokens_are_not_learned():
    tokens, module = torch.randint(0, 3, (5, 4)), Looks()
    with pytest.raises(ValueError, match="pass learn_probes=False"):
        NetSpace(module, tokens, SpaceConfig(learn_probes=True))


def test_an_encoder_of_weights_is_its_formula(zoos, data):
    """Standardised by the zoo's mean and spread at each place, padded, cut into chunks."""
    space, rows = one(zoos, data, CONFIGS["weights only"]), zoos[0].rows
    encoder, standard = space.encoder, (rows - rows.mean(0)) / rows.std(0)
    prep = F.pad(standard, (0, -rows.shape[1] % 64)).view(6, -1, 64)
    h = F.leaky_relu(encoder.chunk(prep) + encoder.position[0])
    expected = encoder.gather[0](h.flatten(1))
    torch.testing.assert_close(space.encode(zoos[0]), expected.detach(), rtol=1e-3, atol=1e-3)
    assert encoder.position[0].std().item() == pytest.approx(0.02, rel=0.2)


def test_an_encoder_of_components_reads_what_differs_from_the_zoos_mean(zoos, data):
    space = NetSpace.for_zoos(zoos, data.train.x, replace(CONFIG, components=5))
    answers = [space.features(zoo.rows, a).answers for a, zoo in enumerate(zoos)]
    mean = torch.cat(answers).mean(0)  # of all zoos
    for a, (zoo, own) in enumerate(zip(zoos, answers, strict=True)):
        read = space.encoder.answers((own - mean) @ space.encoder.axes)
        expected = space.encoder.offset[a] + read
        torch.testing.assert_close(space.encode(zoo), expected.detach(), rtol=1e-4, atol=1e-4)


def test_a_decoder_starts_as_its_formula(zoos, data):
    """What is added to the best net is in units of that net's own spread."""
    space, z = one(zoos, data), torch.randn(5, 16, generator=generator())
    best = zoos[0].rows[zoos[0].scores["val_accuracy"].argmax()]
    hidden = F.leaky_relu(space.decoder.hidden(z))
    expected = best + best.std() * space.decoder.heads[0](hidden)
    torch.testing.assert_close(space.decode(z).rows, expected)
    net = small_nets()[0]  # and of an architecture without a zoo in units of the module's own
    (row,) = Layout.of(net).pack([net])
    scale = NetSpace(net, data.train.x, CONFIG).decoder.scale[0]
    torch.testing.assert_close(scale, row.std().expand(len(row)))


def test_architectures_begin_eight_apart_and_the_nearest_is_named(space):
    offset = space.encoder.offset.detach()
    torch.testing.assert_close(offset.diff(dim=0).norm(dim=1), torch.full((3,), 8.0))
    torch.testing.assert_close(offset.mean(0), torch.zeros(16), rtol=0, atol=1e-5)
    z = 5 * torch.randn(40, 16, generator=generator())
    squares = torch.cdist(z, offset).square()
    found = space.classify(z).softmax(1).detach()
    torch.testing.assert_close(found, (-squares / 8).softmax(1), rtol=1e-3, atol=1e-4)


def test_probes_are_random_inputs_by_the_seed(zoos, data):
    x = torch.arange(200.0)[:, None, None, None].expand(-1, *IMAGE)
    spaces = [NetSpace(small_nets()[0], x, CONFIG, seed) for seed in (0, 0, 1)]
    first, same, other = (space.probes[:, 0, 0, 0].tolist() for space in spaces)
    assert len(set(first)) == 8
    assert max(first) > 50
    assert first == same
    assert set(first) != set(other)


def test_what_spreads_little_is_standardised_and_what_hardly_spreads_is_not():
    rows = torch.randn(50, 15, generator=generator()) * 10.0 ** -torch.arange(15)
    nets = Nets(nn.Linear(4, 3), rows)
    space = NetSpace.for_zoos(nets, torch.randn(9, 4), replace(CONFIG, weights=True, chunk=15))
    expected = torch.cat([rows[:, :4].std(0), torch.ones(11)])
    torch.testing.assert_close(space.std0.flatten(), expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(space.mean0.flatten(), rows.mean(0), rtol=1e-3, atol=1e-7)


def test_nets_that_answer_nothing_have_features_all_the_same():
    found = normalised_answers(torch.full((1, 2, 3), 5.0))
    torch.testing.assert_close(found, torch.tensor([[0.0] * 6 + [math.log(1e-6)]]))
    faint = normalised_answers(torch.tensor([[[-1e-3, 1e-3]]]))
    torch.testing.assert_close(faint, torch.tensor([[-1, 1, math.log(1e-3)]]))


def test_a_space_that_is_loaded_draws_by_the_seed_it_was_made_with(zoos, data, tmp_path):
    NetSpace.for_zoos(zoos[0], data.train.x, CONFIG, seed=7).save(tmp_path)
    assert NetSpace.load(tmp_path).seed == 7


def test_axes_along_which_answers_hardly_differ_are_not_magnified():
    nets = random_nets(mlp(nn.Tanh(), 6, 8, 3), 5)  # which span four directions
    x, config = torch.randn(30, 6, generator=generator()), replace(CONFIG, components=5)
    encoder = NetSpace.for_zoos(nets, x, config).encoder
    gains = encoder.axes.norm(dim=0)
    assert (gains.max() / gains.min()).item() == pytest.approx(1000**0.5, rel=1e-3)
    answers = torch.randn(9, len(encoder.axes), generator=generator())
    answers[:, 0] = 1  # one that tells nothing is no reason to read none
    encoder.read_along(answers)
    torch.testing.assert_close(encoder.centre, answers.mean(0))


def test_a_space_is_of_the_readmes_sizes_unless_told():
    assert SpaceConfig() == SpaceConfig(
        embedding=128, chunk=128, chunk_features=32, probes=128, components=0, weights=True,
        learn_probes=False, told=True, hidden=256, parts="ours",
    )  # fmt: skip


@pytest.mark.parametrize("learned", [False, True])
def test_probes_are_learned_only_where_that_was_asked_for(zoos, data, learned):
    space = one(zoos, data, replace(CONFIG, learn_probes=learned))
    objective, before = Distillation(space, zoos[0], data.train.x), space.probes.detach().clone()
    fit(space, objective, lambda s: {"score": 0.0}, 2, epoch=2)
    assert torch.equal(space.probes, before) == (not learned)
