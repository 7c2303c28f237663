"""Any module: trains, embeds, decodes, leaves and saves, equal to a loop over plain modules."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from toy import CLASSES, check_training_step, generator, gradients, looped, random_nets, toy_data

from netspace_lite import (
    Affine,
    Batched,
    Distillation,
    ImageTask,
    Layout,
    NetSpace,
    Recipe,
    SpaceConfig,
    Zoo,
    fold_batchnorm,
    train_zoo,
)

IMAGE = (1, 8, 6)  # every case but one sees images that are not square
CONFIG = SpaceConfig(embedding=6, probes=5, hidden=8, chunk=32, chunk_features=4)
pytestmark = pytest.mark.filterwarnings("ignore:.*which is slower")


def convolutional(*layers, width=4):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, bias=False), *layers, nn.Flatten(), nn.Linear(width * 24, 3)
    )


class Tokens(nn.Module):
    """Rows of the image as tokens [B, 8, 6], read by ``reader``; the mean is classified."""

    def __init__(self, reader, width=6):
        super().__init__()
        self.reader, self.head = reader, nn.Linear(width, CLASSES)

    def forward(self, x):
        y = self.reader(x.squeeze(1))
        return self.head((y[0] if isinstance(y, tuple) else y).mean(1))


class ClassToken(nn.Module):
    """A class token and positions, as in vision transformers: bare parameters."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.positions = nn.Parameter(0.1 * torch.randn(9, 6))
        self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        y = torch.cat([self.token.expand(len(x), -1, -1), x.squeeze(1)], 1) + self.positions
        return self.head(torch.tanh(self.mix(y)).cumsum(1)[:, -1] + self.token[:, 0])


class Tied(nn.Module):
    """Two uses of one layer, and one weight in two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(48, 48), nn.Linear(48, 48)
        self.second.weight = self.first.weight
        self.head = nn.Linear(48, CLASSES)

    def forward(self, x):
        y = torch.tanh(self.first(x.flatten(1)))
        return self.head(torch.tanh(self.second(torch.tanh(self.first(y)))))


class Buffered(nn.Module):
    """Inputs are standardised and one pixel is masked by buffers; one of them isn't saved."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.full((1, 8, 6), 0.5))
        self.register_buffer(
            "mask", torch.ones(8, 6).index_fill(0, torch.tensor(3), 0), persistent=False
        )
        self.register_buffer("order", torch.arange(48).flip(0))
        self.linear = nn.Linear(48, CLASSES)

    def forward(self, x):
        return self.linear(((x - self.mean) * self.mask).flatten(1)[:, self.order])


class Decides(nn.Module):
    """Data-dependent control flow, on inputs and on what layers answer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(48, CLASSES), nn.Linear(48, CLASSES)

    def forward(self, x):
        y = self.first(x.flatten(1))
        return y if y.mean() > 0 else y + self.second(x.flatten(1))


class PreActivation(nn.Module):
    """Norms before convolutions, around a skip, as in later residual nets."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 4, 3, bias=False), nn.Conv2d(4, 4, 3, 1, 1)
        self.norm, self.last = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        y = self.stem(x)
        y = y + self.conv(F.relu(self.norm(y)))
        return self.head(F.relu(self.last(y)).mean((2, 3)))


def transformer(**options):
    options = {"nhead": 2, "dim_feedforward": 8, "dropout": 0.0, "batch_first": True} | options
    return Tokens(nn.TransformerEncoderLayer(6, **options))


def depthwise():
    layers = nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=4), nn.ReLU(), nn.Conv2d(8, 4, 1)
    return convolutional(*layers)


def weight_normed():
    return nn.Sequential(nn.Flatten(), weight_norm(nn.Linear(48, 5)), nn.Tanh(), nn.Linear(5, 3))


def images_1d():
    reader = nn.Sequential(nn.Conv1d(8, 6, 3), nn.ReLU(), nn.Conv1d(6, 6, 3, padding="same"))
    return Tokens(reader, width=4)


CASES = {  # how to make one, and the way that carries many
    "batch norm": (lambda: convolutional(nn.BatchNorm2d(4), nn.ReLU()), "interpreted"),
    "batch norm without scales": (
        lambda: convolutional(nn.BatchNorm2d(4, affine=False), nn.ReLU()), "interpreted",
    ),
    "batch norm before and after a skip": (PreActivation, "interpreted"),
    "batch norm first and last": (
        lambda: nn.Sequential(
            nn.Flatten(), nn.BatchNorm1d(48), nn.Linear(48, 3), nn.BatchNorm1d(3, momentum=0.3)
        ), "interpreted",
    ),
    "group norm": (lambda: convolutional(nn.GroupNorm(2, 4), nn.ReLU()), "interpreted"),
    "layer norm": (lambda: convolutional(nn.LayerNorm((6, 4)), nn.ReLU()), "interpreted"),
    "layer norm of tokens": (lambda: Tokens(nn.LayerNorm(6)), "interpreted"),
    "instance norm": (lambda: convolutional(nn.InstanceNorm2d(4, affine=True)), "interpreted"),
    "instance norm, tracked": (
        lambda: convolutional(nn.InstanceNorm2d(4, track_running_stats=True)), None,
    ),
    "dropout": (lambda: convolutional(nn.ReLU(), nn.Dropout(0.4)), "interpreted"),
    "tied weights": (Tied, "interpreted"),
    "buffers": (Buffered, "interpreted"),
    "bare parameters and a class token": (ClassToken, None),
    "transformer layer": (transformer, None),
    "transformer layer, norm first": (lambda: transformer(norm_first=True), None),
    "GRU": (lambda: Tokens(nn.GRU(6, 5, batch_first=True), 5), None),
    "LSTM": (lambda: Tokens(nn.LSTM(6, 4, batch_first=True, bidirectional=True), 8), None),
    "1-D convolution": (images_1d, "interpreted"),
    "depthwise and dilated": (depthwise, "interpreted"),
    "circular padding": (
        lambda: convolutional(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")), None,
    ),
    "data-dependent control flow": (Decides, "loop"),
    "sequential": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.GELU(), nn.Linear(5, 3)),
        "interpreted",
    ),
    "weight norm": (weight_normed, None),
}  # fmt: skip
RANDOM = {"dropout"}  # in training
RECIPES = [Recipe(3, 4, 1e-2, 0.1), Recipe(5, 3, 5e-3, 0.0), Recipe(8, 4, 2e-3)]


def training_on(dtype):
    return ImageTask(toy_data(IMAGE, dtype), 16)


def made(make, seed, dtype=torch.float64):
    torch.manual_seed(seed)
    return make().to(dtype)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """(name, factory, way, a zoo trained in fp64)."""
    make, way = CASES[request.param]
    zoo = train_zoo(lambda: make().double(), training_on(torch.float64), RECIPES, progress=False)
    return request.param, make, way, zoo


def inputs(dtype=torch.float64, *lead):
    return torch.randn(*lead, 5, *IMAGE, generator=generator(4)).to(dtype)


def test_zoos_train_like_modules_alone(case):
    name, make, _, zoo = case
    task = training_on(torch.float64)
    for n, recipe in enumerate(RECIPES):
        net = made(make, recipe.seed).train()
        adamw = torch.optim.AdamW(net.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
        for step in range(recipe.steps):
            x, y = task.batch([recipe], torch.tensor([n]), step)
            loss = F.cross_entropy(net(x[0]), y[0])
            for parameter, grad in zip(net.parameters(), gradients(loss, net), strict=True):
                parameter.grad = grad
            adamw.step()
            if name not in RANDOM:
                torch.testing.assert_close(
                    zoo.losses[n, step].item(), loss.item(), rtol=1e-5, atol=1e-6
                )
        if name not in RANDOM:
            expected = net.eval()(task.data.test.x)
            torch.testing.assert_close(
                zoo.outputs(task.data.test.x)[n], expected, rtol=1e-5, atol=1e-6
            )
    assert zoo.rows.dtype == torch.float64
    assert zoo.rows.isfinite().all()


@pytest.mark.parametrize("per_net", [False, True], ids=["shared", "per net"])
def test_answers_and_gradients_are_those_of_a_loop(case, per_net):
    _, _, way, zoo = case
    x = inputs(torch.float64, *([3] if per_net else []))
    results = []
    for run in (zoo.batched, lambda *args: looped(copy.deepcopy(zoo.module), *args)):
        rows, given = zoo.rows.clone().requires_grad_(), x.clone().requires_grad_()
        out = run(rows, given, per_net)
        results.append([out, *torch.autograd.grad(out.square().sum(), (rows, given))])
    for name, found, expected in zip(("outputs", "rows", "inputs"), *results, strict=True):
        torch.testing.assert_close(
            found, expected, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert way in (None, zoo.batched.way(per_net=per_net))


def test_a_training_step_is_that_of_a_loop(case):
    """Outputs, gradients and running statistics in training mode, before any folding."""
    name, make, way, _ = case
    module, x = made(make, 0), inputs(torch.float64, 3)
    if name in RANDOM:
        batched = Batched(module)
        batched(random_nets(module, 3).rows.double(), x, True, torch.empty(3, 0))
    else:
        batched = check_training_step(module, x, per_net=True)
    assert way in (None, batched.way(training=True, per_net=True))


def test_nets_embed_decode_and_leave_as_modules(case):
    *_, zoo = case
    data = training_on(torch.float64).data
    space = NetSpace.for_zoos(zoo, data.train.x, CONFIG)
    z = space.encode(zoo)
    assert z.isfinite().all()
    torch.testing.assert_close(space.encode([zoo.to_module(n) for n in range(3)]), z)
    nets, x = space.decode(z), inputs()
    for n in range(3):
        module = nets.to_module(n)
        torch.testing.assert_close(module(x), nets.outputs(x)[n])
        assert Layout.of(module) == zoo.layout
        torch.testing.assert_close(zoo.to_module(n)(x), zoo.outputs(x)[n])
    objective = Distillation(space, zoo, data.train.x, nets=4, samples=3)
    objective(space, generator()).backward()
    assert space.decoder.heads[0].weight.grad.isfinite().all()
    assert space.decoder.heads[0].weight.grad.abs().sum() > 0


def test_zoos_and_spaces_save_and_load(case, tmp_path):
    _, make, _, zoo = case
    zoo.save(tmp_path)
    again = Zoo.load(tmp_path, make().double())  # batch norms are folded on the way
    assert torch.equal(again.rows, zoo.rows)
    torch.testing.assert_close(again.outputs(inputs()), zoo.outputs(inputs()))
    assert again.recipes == RECIPES
    data = training_on(torch.float64).data
    space = NetSpace.for_zoos(zoo, data.train.x, CONFIG)
    space.save(tmp_path)
    loaded = NetSpace.load(tmp_path, [zoo.module])
    z = space.encode(zoo)
    torch.testing.assert_close(loaded.encode(zoo), z)
    assert torch.equal(loaded.decode(z).rows, space.decode(z).rows)


def test_own_modules_become_the_same_zoo(case):
    _, _, _, zoo = case
    own = Zoo.from_modules([zoo.to_module(n) for n in range(3)])
    assert torch.equal(own.rows, zoo.rows)
    assert own.batched.fingerprint == zoo.batched.fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_dtypes_go_the_same_way(case, dtype):
    name, *_, zoo = case
    batched, rows, x = Batched(zoo.module), zoo.rows.to(dtype), inputs(dtype)
    out = batched(rows, x)
    assert out.dtype == dtype
    zoo.batched(zoo.rows, inputs())
    assert batched.way() == zoo.batched.way()
    if name == "data-dependent control flow":  # rounding may decide otherwise
        return
    exact = looped(copy.deepcopy(zoo.module).double(), rows.double(), x.double())
    alone = looped(copy.deepcopy(zoo.module).to(dtype), rows, x)
    error, usual = ((y.double() - exact).square().mean().sqrt() for y in (out, alone))
    assert error <= 3 * usual + 4 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["batch norm", "group norm", "dropout", "transformer layer"])
def test_zoos_train_in_other_dtypes(name, dtype):
    make, _ = CASES[name]
    task = training_on(dtype)
    zoo = train_zoo(lambda: make().to(dtype), task, [Recipe(1, 3)] * 2, progress=False)
    assert zoo.rows.dtype == dtype
    assert zoo.outputs(task.data.test.x).isfinite().all()


def test_norms_fold_where_they_can():
    left = {
        n: sum(isinstance(m, Affine) for m in fold_batchnorm(make()).modules())
        for n, (make, _) in CASES.items()
    }
    assert {name: count for name, count in left.items() if count} == {
        "batch norm before and after a skip": 2, "batch norm first and last": 2,
    }  # fmt: skip


def test_each_net_trains_with_statistics_of_its_own():
    """Statistics over all nets together would give other nets."""
    make, task = CASES["batch norm"][0], training_on(torch.float64)
    together = train_zoo(lambda: make().double(), task, RECIPES, progress=False)
    for n, recipe in enumerate(RECIPES):
        alone = train_zoo(lambda: make().double(), task, [recipe], progress=False)
        torch.testing.assert_close(together.rows[n], alone.rows[0], rtol=1e-6, atol=1e-8)


def test_steps_down_the_chain_are_said_once_with_their_reason():
    module = Decides()
    nets = random_nets(module, 2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            nets.outputs(inputs(torch.float32))
    texts = [str(w.message) for w in said]
    assert len(texts) == 1
    assert texts[0].startswith("Decides runs one net after the other")
    assert "traced" in texts[0]
