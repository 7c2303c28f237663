"""Several architectures in one space: naming, decoding, objectives, mixed zoos on disk."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from netspace_lite.architectures import LeNetLike, ResNet, VanillaCNN, name_of, paper_net
from netspace_lite.data import ImageData, Images
from netspace_lite.explore import OnImages
from netspace_lite.functional import Nets
from netspace_lite.mixed import MixedNets, load_zoos, save_zoos
from netspace_lite.objectives import (
    ArchitectureClassification,
    Interpolation,
    MixedDistillation,
    Pool,
    TeacherDistillation,
    combine,
)
from netspace_lite.space import NetSpace, SpaceConfig
from netspace_lite.tutorial import MULTI
from netspace_lite.zoo import ImageTask, Recipe, fine_tune, initial_rows, train_zoo

IMAGE, CLASSES = (1, 8, 8), 3
CONFIG = SpaceConfig(embedding=16, probes=8, weights=False, hidden=16)


def small_nets():
    resnet = {"channels": (4, 4, 4, 4), "strides": (2, 1, 2)}
    return [
        LeNetLike(IMAGE, CLASSES, channels=(4,), hidden=(8,), kernel=3),
        VanillaCNN(IMAGE, CLASSES, channels=(4, 4), strides=(2, 2)),
        ResNet(IMAGE, CLASSES, 8, **resnet),
        ResNet(IMAGE, CLASSES, 14, **resnet),
    ]


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(0)
    y = torch.arange(CLASSES).repeat_interleave(40)
    x = torch.randn(CLASSES, *IMAGE)[y] + torch.randn(len(y), *IMAGE)
    images = Images(x, y)
    return ImageData("toy", images, images[::2], images[1::2], CLASSES)


@pytest.fixture(scope="module")
def zoos(data):
    recipes = [Recipe(seed, 10 - seed) for seed in range(6)]
    return [train_zoo(net, ImageTask(data, 32), recipes, progress=False) for net in small_nets()]


@pytest.fixture
def space(zoos, data):
    return NetSpace.for_zoos(zoos, data.train.x, CONFIG)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_names_tell_depths_and_repeats_apart(space):
    assert space.architectures == ["LeNetLike", "VanillaCNN", "ResNet8", "ResNet14"]
    lenet = small_nets()[0]
    wider = LeNetLike(IMAGE, CLASSES, channels=(8,), hidden=(8,), kernel=3)
    twice = NetSpace([lenet, wider], torch.randn(8, *IMAGE), CONFIG)
    assert twice.architectures == ["LeNetLike", "LeNetLike-2"]
    assert name_of(nn.Linear(2, 3)) == "Linear"


def test_index_finds_architectures_in_every_form(space, zoos):
    for a, (name, net, zoo) in enumerate(zip(space.architectures, small_nets(), zoos, strict=True)):
        assert [space.index(form) for form in (a, name, net, zoo)] == [a] * 4


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (None, "no architecture: this space needs one of LeNetLike, VanillaCNN"),
        ("AlexNet", "architecture 'AlexNet'"),
        (7, "architecture 7"),
        (nn.Linear(2, 3), "a Linear of 9 parameters is not in this space"),
    ],
)
def test_index_says_what_there_is(space, architecture, message):
    with pytest.raises(ValueError, match=message):
        space.index(architecture)


def test_a_second_architecture_leaves_the_first_initialisation_alone(zoos, data):
    one = NetSpace.for_zoos(zoos[0], data.train.x, CONFIG).state_dict()
    assert not [key for key in one if "offset" in key or "classifier" in key]
    two = NetSpace.for_zoos([zoos[0], zoos[0]], data.train.x, CONFIG)
    assert torch.equal(one["encoder.answers.weight"], two.encoder.answers.weight)


def test_one_architecture_has_nothing_to_classify(zoos, data):
    space = NetSpace.for_zoos(zoos[0], data.train.x, CONFIG)
    assert isinstance(space.decode(torch.zeros(2, 16)), Nets)
    with pytest.raises(ValueError, match="one architecture only, LeNetLike"):
        space.classify(torch.zeros(2, 16))


def test_encode_takes_mixed_zoos_in_order(space, zoos):
    z = space.encode(zoos)
    assert z.shape == (24, 16)
    torch.testing.assert_close(z[6:12], space.encode(zoos[1], "VanillaCNN"))
    torch.testing.assert_close(z[18:20], space.encode([zoos[3].to_module(n) for n in (0, 1)]))
    torch.testing.assert_close(z[:6], space.encode(zoos[0].rows, 0))


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


def test_mixed_nets_need_every_place_once(zoos):
    with pytest.raises(ValueError, match="need as many places each"):
        MixedNets(zoos[:2], [torch.arange(6), torch.arange(6)])
    with pytest.raises(ValueError, match="at least one group"):
        MixedNets([])


def test_translation_keeps_answers_apart_from_form(space, zoos):
    z = space.encode(zoos[0])
    moved = space.translate(z, "LeNetLike", "ResNet8")
    features = space.features(zoos[0].rows, 0)
    torch.testing.assert_close(moved, space.encoder(features, 2))
    torch.testing.assert_close(space.translate(moved, 2, 0), z)


def test_mixed_zoos_come_back(zoos, tmp_path):
    save_zoos(zoos, tmp_path)
    loaded = load_zoos(tmp_path)
    assert all(torch.equal(a.rows, b.rows) for a, b in zip(zoos, loaded, strict=True))
    with pytest.raises(ValueError, match="holds 4 zoos, but 1 modules"):
        load_zoos(tmp_path, [None])
    with pytest.raises(FileNotFoundError, match="zoos"):
        load_zoos(tmp_path / "elsewhere")


def test_mixed_spaces_come_back(space, zoos, tmp_path):
    space.save(tmp_path)
    loaded = NetSpace.load(tmp_path)
    assert torch.equal(loaded.predict(space.encode(zoos)), space.predict(space.encode(zoos)))


def test_pool_encodes_like_the_space(space, zoos):
    pool = Pool(space, zoos)
    n = torch.tensor([20, 3, 9, 0, 23])
    torch.testing.assert_close(pool.encode(space, n), space.encode(zoos)[n])
    assert pool.architecture[n].tolist() == [3, 0, 1, 0, 3]
    drawn = pool.draw(200, generator(), 2)
    assert set(drawn.tolist()) == set(range(12, 18))


def test_combine_is_a_weighted_sum(space):
    parts = [lambda space, generator, v=v: torch.tensor(v) for v in (1.0, 10.0)]
    assert float(combine(*parts, weights=(0.5, 2))(space, generator())) == 20.5
    with pytest.raises(ValueError, match="2 objectives need as many weights"):
        combine(*parts, weights=(1,))


def test_teacher_distillation_is_the_papers_loss(space, zoos, data):
    """0.9·T²·KL + 0.1·cross-entropy, from the formula."""
    teacher = zoos[0].to_module(0)
    answering = OnImages(data.train, teacher, distil=0.9, temperature=4, samples=len(data.train))
    nets = space.decode(space.encode(zoos[1]), 1)
    logits, wanted = nets(data.train.x), teacher(data.train.x)
    kl = F.kl_div(
        F.log_softmax(logits[0] / 4, -1), F.softmax(wanted / 4, -1), reduction="batchmean"
    )
    expected = 0.9 * 16 * kl + 0.1 * F.cross_entropy(logits[0], data.train.y)
    torch.testing.assert_close(answering(nets, generator())[0], expected, rtol=1e-4, atol=1e-5)
    loss = TeacherDistillation(space, zoos, answering)(space, generator())
    loss.backward()
    assert all(head.weight.grad is not None for head in space.decoder.heads)


def test_interpolation_follows_the_distance_rule(space, zoos):
    answering = lambda nets, generator: nets.rows.sum(1)  # noqa: E731
    objective = Interpolation(space, zoos, answering, jitter=0)
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
    assert len(Interpolation(space, zoos, answering, apart=1).ends) == 3
    with pytest.raises(ValueError, match="nothing in between"):
        Interpolation(space, zoos[:2], answering)


def test_unseen_architectures_learn_from_the_line_alone(zoos, data):
    ends = [zoos[3], zoos[0]]  # any order: each finds its module
    space = NetSpace.for_zoos(ends, data.train.x, CONFIG, modules=small_nets())
    assert torch.equal(space.decoder.bias[3], zoos[3].rows[zoos[3].scores["val_accuracy"].argmax()])
    answering = OnImages(data.train, samples=16)
    Interpolation(space, ends, answering)(space, generator()).backward()
    heads = space.decoder.heads
    assert [head.weight.grad is not None for head in heads] == [False, True, True, False]


def test_mixed_distillation_teaches_one_head_with_all_nets(space, zoos, data):
    objective = MixedDistillation(
        space, zoos, data.train.x, nets=8, samples=4, crossing=1.0, chances=(0, 0, 1, 0)
    )
    loss = objective(space, generator())
    loss.backward()
    heads = [head.weight.grad is not None for head in space.decoder.heads]
    assert heads == [False, False, True, False]
    assert (space.encoder.offset.grad.abs().sum(1) > 0).tolist() == [False, False, True, False]
    assert loss > 0


def test_a_new_space_has_its_architectures_in_a_row(space, zoos):
    offset = space.encoder.offset.detach()
    assert torch.equal(space.predict(offset), torch.arange(4))
    way = torch.lerp(offset[:1], offset[3:], torch.linspace(0, 1, 100)[:, None])
    assert space.predict(way).diff().sum() == 3
    assert (space.predict(way).diff() >= 0).all()


def test_classification_separates_architectures(space, zoos):
    """A few steps suffice, for embeddings as they are and moved to other architectures."""
    objective = ArchitectureClassification(space, zoos, translated=True)
    adam = torch.optim.Adam(space.parameters(), 1e-2)
    for step in range(50):
        adam.zero_grad()
        objective(space, generator(step)).backward()
        adam.step()
    wanted = torch.arange(4).repeat_interleave(6)
    z = space.encode(zoos)
    assert torch.equal(space.predict(z), wanted)
    assert (space.predict(space.translate(z[:6], 0, 3)) == 3).all()


def test_fine_tuning_is_training_from_where_nets_are(zoos, data):
    """One step from given weights equals AdamW on the plain module."""
    task, recipe, before = ImageTask(data, 32), Recipe(3, 1, 1e-2, 0.1), zoos[0].rows.clone()
    tuned = fine_tune(zoos[0][:2], task, [recipe] * 2)
    module = zoos[0].to_module(1)
    adam = torch.optim.AdamW(module.parameters(), 1e-2, weight_decay=0.1)
    x, y = task.batch([recipe], 0)
    F.cross_entropy(module(x[0]), y[0]).backward()
    adam.step()
    torch.testing.assert_close(tuned.rows[1:], tuned.layout.pack([module]), rtol=1e-4, atol=1e-5)
    assert torch.equal(zoos[0].rows, before)
    with pytest.raises(ValueError, match="6 nets need as many recipes"):
        fine_tune(zoos[0], task, [recipe])


def test_the_papers_sizes_take_a_training_step():
    image, names = torch.randn(2, 3, 32, 32), MULTI["paper"].nets
    nets = [Nets(net, initial_rows(net, [0])) for net in map(paper_net, names)]
    assert [zoo.layout.size for zoo in nets] == [62_006, 68_818, 77_706, 465_674]
    config = SpaceConfig(embedding=4, probes=1, weights=False, hidden=4)
    space = NetSpace.for_zoos(nets, image, config)
    answering = OnImages(Images(image, torch.arange(2)), paper_net("ResNet56"))
    objective = combine(
        TeacherDistillation(space, nets, answering, nets=1),
        ArchitectureClassification(space, nets),
        Interpolation(space, nets, answering, nets=1),
    )
    loss = objective(space, generator())
    loss.backward()
    assert torch.isfinite(loss)
    assert all(head.weight.grad is not None for head in space.decoder.heads)


class Depthwise(nn.Module):
    """A user's own net: depthwise, then pointwise convolution."""

    def __init__(self):
        super().__init__()
        self.depth = nn.Conv2d(1, 4, 3, 2, 1)
        self.wise = nn.Conv2d(4, 4, 3, 2, 1, groups=4)
        self.norm = nn.LayerNorm(16)
        self.linear = nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.linear(self.norm(torch.relu(self.wise(self.depth(x))).flatten(1)))


@pytest.mark.filterwarnings("ignore:Depthwise runs through torch.func.vmap")
def test_a_users_module_joins_a_mixed_zoo(zoos, data):
    own = Nets(Depthwise(), initial_rows(Depthwise(), range(4)))
    space = NetSpace.for_zoos([zoos[0], own], data.train.x, CONFIG)
    assert space.architectures == ["LeNetLike", "Depthwise"]
    for target in range(2):  # each head learns from the other's nets
        chances = [1 - target, target]
        objective = MixedDistillation(space, [zoos[0], own], data.train.x, chances=chances)
        objective(space, generator()).backward()
    assert all(head.weight.grad.abs().sum() > 0 for head in space.decoder.heads)
