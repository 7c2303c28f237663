"""Nothing forgets its device: on a pretended CUDA device the core gives what it does on the CPU."""

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from netspace_lite.kernels import backend
from pretend_cuda import CudaTensor, pretend_cuda
from sklearn.mixture import GaussianMixture
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toy import Interrupted, Looks, generator, interrupted, small_nets, toy_data

import netspace_lite as ns
from netspace_lite import store, zoo_training
from netspace_lite.optimiser import inverse_root

NETS = small_nets()[:3]
RECIPES = [ns.Recipe(seed, 5 - seed) for seed in range(4)]
SMALL = ns.SpaceConfig(embedding=6, probes=5, hidden=8, chunk=64, chunk_features=4)
STEPS = ns.Descent(steps=4, every=2)
QUIET = {"progress": False}


class World:
    """Data, zoos and a space on one device, for whatever is called."""

    def __init__(self, device, folder):
        self.device, self.folder = device, folder
        self.data = toy_data().to(device)
        self.task, self.images, self.x = (
            ns.ImageTask(self.data, 16),
            self.data.val,
            self.data.test.x,
        )
        self.zoos = [ns.train_zoo(net, self.task, RECIPES, **QUIET) for net in NETS]
        self.zoo, self.seen = self.zoos[0], self.data.train.x
        self.one = ns.NetSpace.for_zoos(self.zoo, self.seen, SMALL)
        self.space = ns.NetSpace.for_zoos(self.zoos, self.seen, SMALL)
        self.z, self.mixed = self.space.encode(self.zoos), ns.MixedNets(self.zoos)
        self.teacher = self.zoo.to_module(1)
        self.loss = ns.ImageLoss(self.data.train, self.teacher, samples=20)

    def fitted(self, objective, folder=None, log=lambda row: None):
        """The space after two epochs of an objective, and its history without the seconds."""
        space = ns.NetSpace.for_zoos(self.zoos, self.seen, SMALL)
        validate = lambda space: ns.scores(space, self.zoos[1], self.images)  # noqa: E731
        history = ns.fit(space, objective(space), validate, 4, epoch=2, folder=folder, log=log)
        numbers = [v for row in history for k, v in row.items() if k != "seconds"]
        return [space.encode(self.zoos), numbers]


def normed():
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.GroupNorm(2, 4), nn.Flatten()
    last = nn.BatchNorm1d(3)
    del last.weight
    last.register_buffer("weight", torch.full((3,), 2.0))  # a constant, which folding reads
    return nn.Sequential(*layers, nn.Linear(144, 3), last)


def trained_outputs(w, module):
    zoo = ns.train_zoo(module, w.task, [ns.Recipe(seed, 2) for seed in range(2)], **QUIET)
    return [zoo.outputs(w.x), zoo.to_module(1)(w.x)]


def norms(w):
    return trained_outputs(w, normed)


def attention(w):
    return trained_outputs(w, Attends)


def control_flow(w):
    return trained_outputs(w, Decides)


def constants(w):
    """A tensor that is neither a parameter nor a buffer, so nothing but `Batched` moves it; and a
    buffer, in a module that is interpreted."""
    zoo = ns.Zoo(ns.Batched(Shifts()), ns.initial_rows(Shifts, [0, 1]).to(w.device))
    found = zoo.outputs(w.x)
    assert zoo.batched.way() == "interpreted"
    space = ns.NetSpace.for_zoos(zoo, w.x, SMALL)
    shared = ns.Nets(zoo.batched, torch.cat([zoo.rows[:1, :9].expand(2, -1), zoo.rows[:, 9:]], 1))
    holds = ns.NetSpace.for_zoos(shared, w.x, SMALL)
    states = {name: value.cpu() for name, value in holds.state_dict().items()}
    z = torch.ones(2, 6).to(w.device)
    rows = [holds.decode(z).rows]
    holds.load_state_dict(states)  # from a file, wherever the space is
    assert holds.constant0 is not None
    rows.append(holds.decode(z).rows)
    return [found, space.encode(zoo.to_module(1).state_dict()), *rows]


def choices(w):
    """Answers without a gradient: whether they come of the weights is seen by trying others."""
    zoo = ns.Zoo(ns.Batched(Sides()), ns.initial_rows(Sides, [0, 1]).to(w.device))
    return [zoo.outputs(w.x)]


class Sides(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 3)

    def forward(self, x):
        return (self.linear(x.flatten(1)) > 0).float()


class Shifts(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.shift = nn.Linear(64, 3), torch.arange(3.0)
        self.register_buffer("scale", torch.arange(1.0, 4.0))

    def forward(self, x):
        return self.linear(x.flatten(1)) * self.scale + self.shift


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.head = nn.Parameter(torch.ones(1, 1, 8)), nn.Linear(8, 3)
        self.layer = nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True)
        self.register_buffer("shift", torch.ones(8))

    def forward(self, x):
        y = torch.cat([self.token.expand(len(x), -1, -1), x.squeeze(1) + self.shift], 1)
        return self.head(self.layer(y)[:, 0])


class Decides(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 3)

    def forward(self, x):
        y = self.linear(x.flatten(1))
        return y if y.sum() > 0 else -y


def components(w):
    config = replace(SMALL, components=3)
    return [ns.NetSpace.for_zoos(w.zoo, w.seen, config).encode(w.zoo)]


def tokens(w):
    x, rows = (torch.arange(60) * 7 % 11).view(12, 5), ns.initial_rows(Looks, range(3)).double()
    nets, x = ns.Nets(Looks().double(), rows.to(w.device)), x.to(w.device)
    space = ns.NetSpace.for_zoos(nets, x, SMALL)
    space.save(w.folder / "tokens")
    again = ns.NetSpace.load(w.folder / "tokens", Looks())
    own = nets(x.expand(3, 12, 5), per_net=True)  # tokens of its own for the second net tried
    return [space.encode(nets), again.to(w.device).encode(nets), nets.outputs(x), own]


def described(w):
    decoder = ns.DescribedDecoder(6, 8, ns.Largest.of(NETS)).to(w.device)
    objective = ns.DescribedDistillation(NETS, w.z, w.loss)
    history = ns.fit(decoder, objective, lambda decoder: {"score": 0.0}, 2, epoch=2)
    rows = decoder.decode(w.z, NETS[1]).rows
    return [rows, history[0]["loss"], ns.describe_layers(w.zoo.layout)]


def saved_zoo(w):
    w.zoo.save(w.folder / "zoo")
    again = ns.Zoo.load(w.folder / "zoo")
    assert again.rows.device.type == "cpu"
    kept = ns.train_zoo(NETS[0], w.task, RECIPES, w.folder / "kept", **QUIET)
    loaded = ns.train_zoo(NETS[0], w.task, RECIPES, w.folder / "kept", **QUIET)
    assert kept.rows.device.type == loaded.rows.device.type == torch.device(w.device).type
    w.zoo.export(w.folder / "net.safetensors", 2)
    files = ns.Zoo.from_files([w.folder / "net.safetensors"], NETS[0], w.task)
    return [
        again.rows,
        again.outputs(toy_data().test.x),
        loaded.rows,
        files.rows,
        *files.scores.values(),
    ]


def saved_space(w):
    w.space.save(w.folder / "space")
    again = ns.NetSpace.load(w.folder / "space").to(w.device)
    return [again.encode(w.zoos)]


def distilled(w):
    draw = {"nets": 6, "samples": 5, "consensus": 2.0}
    return w.fitted(lambda space: ns.Distillation(space, w.zoos, w.seen, **draw))


def resumed(w):
    def make(space):
        return ns.Distillation(space, w.zoo, w.seen, nets=6, samples=5)

    with pytest.raises(Interrupted):
        w.fitted(make, w.folder / "fit", interrupted(lambda row: None, 2))
    return [*w.fitted(make, w.folder / "fit"), *w.fitted(make, w.folder / "fit")]


def several(w):
    return w.fitted(lambda space: ns.combine(
        ns.TeacherDistillation(space, w.zoos, w.loss),
        ns.ArchitectureClassification(space, w.zoos, nets=8, translated=True),
        ns.Interpolation(space, w.zoos, w.loss, named=8, apart=1),
    ))  # fmt: skip


def searched(w):
    prior = ns.Gaussian(w.space.encode(w.zoo))
    options = {"config": STEPS, "progress": False}
    found = ns.optimise(w.space, w.z[:3] + 1, w.loss, w.images, prior=prior, **options)
    accuracy = lambda nets: nets.accuracy(w.images)  # noqa: E731
    named = ns.optimise(w.space, w.zoo, w.loss, accuracy, architecture=1, **options)
    weights = ns.optimise_weights(w.zoo, w.loss, w.images, **options)
    refined = ns.refine(w.space, w.zoos[1], w.seen, 3)
    return [found.best, found.score, found.losses, named.best, named.path, named.reached,
            weights.best, refined]  # fmt: skip


def per_net(w):
    x = w.seen[:40].view(4, 10, 1, 8, 8)
    objective = ns.Distillation(w.one, w.zoo, x, per_net=True, nets=4, samples=3)
    like = ns.LikenessLoss(w.zoo, x, per_net=True, loss=ns.squared_error)
    nets = w.one.decode(w.one.encode(w.zoo))
    return [objective(w.one, generator()), like(nets, generator()), nets.outputs(x, per_net=True)]


def answers(w):
    zoo, mixed = w.zoo, w.mixed
    found = [zoo(w.x), zoo.outputs(w.x), zoo.accuracy(w.images), zoo.to_module(-1)(w.x)]
    found += [mixed(w.x), mixed.accuracy(w.images), mixed[7].rows, *zoo.state_dict(1).values()]
    found += [net.rows for net in mixed[torch.tensor([1, 9], device=w.x.device)]]
    siren = ns.Nets(ns.Siren(8), ns.initial_rows(ns.Siren(8), [1, 2]).to(w.device))
    return [*found, siren(w.x.flatten(1)[:, :3])]


def parts(w):
    masks = w.zoo.scores["val_accuracy"] > 30, w.zoo.finite(), [2, 0], slice(1, 3)
    nets = [*(w.zoo[mask] for mask in masks), *w.zoo.split(1, 1), w.zoo.to("cpu").to(w.device)]
    return [tensor for part in nets for tensor in (part.rows, part.members, part.outputs(w.x))]


def trained(w):
    state = ns.train_nets(NETS[0], w.task, RECIPES)
    tuned = ns.fine_tune(w.zoo, w.task, [ns.Recipe(0, 3)] * 4)
    found = [ns.initial_rows(NETS[0], [1, 2]), state["rows"], state["losses"], tuned.rows]
    modules = ns.Zoo.from_modules([w.zoo.to_module(n) for n in (0, 1)], w.task)
    return [*found, w.zoo.rows, w.zoo.losses, *w.zoo.scores.values(), modules.rows]


def layouts(w):
    prep = ns.to_prep(w.zoo.rows, 10, 64)
    packed = w.zoo.layout.pack([w.teacher, w.zoo.state_dict(2)])
    return [prep, ns.from_prep(prep, 587), packed, ns.invariants(w.zoo.layout, w.zoo.rows)]


def embedded(w):
    space, z = w.space, w.z
    found = [z, space.encode(w.mixed), space.encode(w.teacher), space.encode(w.zoo.rows, 0)]
    found += [w.one.encode(w.zoo.state_dict(0)), space.classify(z), space.predict(z)]
    decoded = space.decode(z).outputs(w.x), space.decode(z[0], 1).rows, space.translate(z, 0, 2)
    found += [space.decode(z.double(), 1).rows]  # in the precision of the space
    return [*found, *decoded, *ns.scores(space, w.zoos[1], w.images).values()]


def walked(w):
    line = ns.weight_line(w.zoo[:2], w.zoo[2:], 3)
    drop = ns.line_drop(line.accuracy(w.images).view(2, 3))
    drawn = [ns.sample(w.z, 5), ns.sample(w.z, 5, GaussianMixture(2, random_state=0))]
    return [ns.interpolate(w.z[:2], w.z[2:4], 3), line.rows, drop, *drawn, ns.Gaussian(w.z)(w.z)]


def baselines(w):
    zoo, nets = w.zoo, w.zoo[:2]
    found = [ns.mean_net(zoo, nets), ns.nearest_by_weights(zoo, nets), ns.pca_nets(zoo, nets, 2)]
    found += [ns.noisy_nets(zoo), ns.averages(zoo, 3)]
    found += [ns.nearest_by_answers(w.z[:4], w.z[1:3], zoo)]
    return [tensor for nets in found for tensor in (nets.rows, nets.outputs(w.x))]


def measured(w):
    y, z = w.zoo.scores["val_accuracy"], w.z[:4]
    found = [*ns.novelty(w.zoo, w.x).values(), *ns.novelty(w.zoo[:1], w.x, w.zoo).values()]
    found += [ns.disagreement(w.zoo.outputs(w.x), w.zoo.outputs(w.x))]
    found += [ns.blends(w.seen)]
    found += [ns.r_squared(w.zoo.outputs(w.x), w.zoo.outputs(w.x).roll(1, 0))]
    return [*found, ns.readout(z, y, z, y)[0], ns.few_shot(w.images, 2).x]


def recognised(w):
    """Fingerprints are the same wherever the content is."""
    nets = ns.Nets(w.zoo.batched, torch.ones(2, 587).to(w.device))
    things = nets.fingerprint, ns.fingerprint(w.data), ns.fingerprint({"x": [w.images.x, 1]})
    return [int(digits, 16) % 10**6 for digits in things]


CALLS = {  # what is called -> the public names that it shows
    answers: "Nets Batched ImageData Images MixedNets Siren Sine",
    parts: "Zoo",
    trained: "train_zoo train_nets initial_rows fine_tune ImageTask Recipe",
    layouts: "Layout to_prep from_prep invariants",
    saved_zoo: "",
    norms: "fold_batchnorm Affine",
    constants: "",
    attention: "",
    control_flow: "",
    components: "",
    tokens: "",
    choices: "",
    embedded: "NetSpace SpaceConfig scores compare",
    saved_space: "",
    distilled: "Distillation fit kl_divergence logit_scale MixedZoo Muon",
    resumed: "",
    several: "TeacherDistillation ArchitectureClassification Interpolation combine ImageLoss",
    per_net: "LikenessLoss squared_error",
    described: "DescribedDecoder DescribedDistillation Largest describe_layers",
    searched: "optimise optimise_weights refine Descent Search",
    walked: "interpolate weight_line line_drop sample Gaussian",
    baselines: "mean_net nearest_by_weights pca_nets noisy_nets averages nearest_by_answers",
    measured: "novelty disagreement r_squared readout few_shot blends",
    recognised: "fingerprint",
}
NO_TENSORS = """
    LeNetLike ResNet VanillaCNN architecture lite_net name_of paper_net load_cifar10 load_digits
    load_images draw_recipes Task
"""


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    with backend("torch"):
        with pretend_cuda():
            cuda = World("cuda", tmp_path_factory.mktemp("cuda"))
        return World("cpu", tmp_path_factory.mktemp("cpu")), cuda


def plain(value):
    return (
        value.detach().cpu().double()
        if isinstance(value, torch.Tensor)
        else torch.tensor(float(value))
    )


@pytest.mark.filterwarnings("ignore:.*which is slower")
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_on_cuda_it_is_what_it_is_on_the_cpu(worlds, call):
    with backend("torch"):
        expected = call(worlds[0])
        with pretend_cuda():
            results = [plain(value) for value in flattened(call(worlds[1]))]
    for result, value in zip(results, flattened(expected), strict=True):
        torch.testing.assert_close(result, plain(value), rtol=1e-3, atol=1e-4, equal_nan=True)


def flattened(values):
    for value in values:
        yield from flattened(value) if isinstance(value, list) else (value,)


def test_everything_public_is_called():
    shown = {name for names in [*CALLS.values(), NO_TENSORS] for name in names.split()}
    assert shown == set(ns.__all__)


def test_results_stay_where_the_nets_are(worlds):
    w = worlds[1]
    for tensor in (w.zoo.rows, w.z, w.teacher.layers[0].weight, w.space.probes, w.space.mean0):
        assert tensor.is_cuda
    with pretend_cuda(), backend("torch"):  # figures are drawn beside one another
        figures = [*ns.novelty(w.zoo, w.x).values(), w.zoo.accuracy(w.images)]
        options = {"config": STEPS, "progress": False}  # scores where the nets are
        score = lambda nets: nets(w.x).mean((1, 2))  # noqa: E731
        found = ns.optimise(w.space, w.z[:2], w.loss, score, **options)
        drawn = ns.sample(w.z, 5), ns.Gaussian(w.z).sample(5)
        chosen = w.zoo[w.zoo.rows[:, 0] > w.zoo.rows[:, 0].mean()]  # by a mask that is there, too
    assert 0 < len(chosen) < len(w.zoo)
    for tensor in (
        w.zoo.finite(),
        w.zoo.scores["val_accuracy"],
        w.zoo.losses,
        w.zoo.members,
        *figures,
    ):
        assert not tensor.is_cuda
    assert not found.score.is_cuda
    for tensor in (*drawn, found.best):
        assert tensor.is_cuda


def test_the_space_and_its_nets_move(worlds):
    w = worlds[0]
    with pretend_cuda(), backend("torch"):
        space = ns.NetSpace.for_zoos(w.zoos, w.seen, SMALL).to("cuda")
        z = space.encode([zoo.to("cuda") for zoo in w.zoos])
        assert z.is_cuda
        torch.testing.assert_close(z.cpu(), w.z)
        with pytest.raises(ValueError, match="on cpu.*on cuda|device"):
            space.encode(w.zoo)
        with pytest.raises(ValueError, match="on cpu.*on cuda"):
            w.zoo.to("cuda").outputs(w.x)


STEPPED = {
    "Distillation": lambda w: ns.Distillation(w.space, w.zoos, w.seen, nets=4, samples=3),
    "teacher": lambda w: ns.TeacherDistillation(w.space, w.zoos, w.loss),
    "names": lambda w: ns.ArchitectureClassification(w.space, w.zoos, 6, translated=True),
    "lines": lambda w: ns.Interpolation(w.space, w.zoos, w.loss, nets=2, named=4, apart=1),
}


@pytest.mark.parametrize("name", STEPPED)
def test_a_step_copies_what_it_draws_once(worlds, name):
    """Not in every operation that is given an index, as CUDA would."""
    w = worlds[1]
    with pretend_cuda(), backend("torch"):
        objective = STEPPED[name](w)
        objective(w.space, generator())  # which reads the zoos
        with pretend_cuda(strict=True):
            assert objective(w.space, generator()).is_cuda


def test_batches_and_losses_copy_what_they_draw_once(worlds):
    w = worlds[1]
    with pretend_cuda(), backend("torch"):
        like = ns.LikenessLoss(w.zoo, w.seen, samples=3)
        own = w.seen[:8].expand(4, 8, 1, 8, 8)
        per_net = ns.LikenessLoss(w.zoo, own, per_net=True, samples=3)
        described = ns.DescribedDistillation(NETS[:1], w.z, w.loss)
        decoder = ns.DescribedDecoder(6, 8, ns.Largest.of(NETS)).to("cuda")
    with pretend_cuda(strict=True), backend("torch"):
        assert all(part.is_cuda for part in w.task.batch(RECIPES, torch.arange(4), 0))
        for loss in (w.loss, like, per_net):
            assert loss(w.zoo, generator()).is_cuda
        assert described(decoder, generator()).is_cuda


class Waits(TorchDispatchMode):
    """Collects operations for which a CPU waits for its GPU: they can't be in a CUDA graph."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, leaves = func.overloadpacket.__name__, tree_leaves((args, kwargs))
        places = {t.is_cuda for t in leaves if isinstance(t, torch.Tensor) and t.dim()}
        places |= {d.type != "cpu" for d in leaves if isinstance(d, torch.device)}
        masked = name.startswith("index") and any(
            t.dtype == torch.bool for t in leaves if isinstance(t, torch.Tensor)
        )
        if len(places) > 1 or masked or name in ("_local_scalar_dense", "nonzero", "equal"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


WAITING = {
    "a number": lambda cuda, cpu: cuda.sum().item(),
    "a decision": lambda cuda, cpu: bool(cuda.sum() > 0),
    "a mask": lambda cuda, cpu: cuda[cuda > 0],
    "a list": lambda cuda, cpu: (cuda > 0).nonzero(),
    "copied in": lambda cuda, cpu: cpu.to("cuda"),
    "copied out": lambda cuda, cpu: cuda.cpu(),
    "an index": lambda cuda, cpu: cuda[torch.tensor([1, 0])],
}


@pytest.mark.parametrize("case", WAITING)
def test_what_waits_for_the_gpu_is_seen(case):
    with pretend_cuda():
        cuda, cpu = torch.randn(3, 3).to("cuda"), torch.randn(3, 3)
        with Waits() as waits:
            assert (cuda @ cuda).relu().is_cuda
            assert waits.found == []
            WAITING[case](cuda, cpu)
    assert waits.found


@pytest.mark.parametrize(
    "module", [*NETS, normed(), ns.Siren(8), Shifts()], ids=lambda module: type(module).__name__
)
@pytest.mark.parametrize("per_net", [False, True], ids=["shared", "per net"])
def test_a_step_waits_for_no_gpu_once_its_way_is_chosen(module, per_net):
    """So that it can be captured in a CUDA graph: forward and backward."""
    with pretend_cuda(), backend("torch"):
        batched = ns.Batched(module)
        rows = (0.3 * torch.randn(3, batched.layout.size, generator=generator())).to("cuda")
        sample = (3,) if isinstance(module, ns.Siren) else (1, 8, 8)
        x = torch.randn(*[3] * per_net, 5, *sample, generator=generator()).to("cuda")
        running = batched.initial_running(3).to("cuda") if batched.running.size else None
        rows.requires_grad_()

        def step():
            return torch.autograd.grad(batched(rows, x, per_net, running).square().sum(), rows)

        first = step()
        with Waits() as waits:
            (grad,) = step()
        assert waits.found == []
        assert grad.cpu().any()
        torch.testing.assert_close(grad.cpu(), first[0].cpu())


class ScoresThere(ns.ImageTask):
    """A task whose scores lie where its images do."""

    def scores(self, nets, members):
        return {"spread": nets.rows.std(1)}


def test_checkpoints_in_another_dtype_are_gone_on_from(worlds, tmp_path, monkeypatch):
    """Of a block of nets, written by another hand."""
    w, interruption = worlds[0], interrupted(ns.ImageTask.batch, 3)
    monkeypatch.setattr(zoo_training, "CHECKPOINT_SECONDS", 0)
    with monkeypatch.context() as patch:
        patch.setattr(ns.ImageTask, "batch", interruption)
        with pytest.raises(Interrupted):
            ns.train_zoo(NETS[0], w.task, RECIPES, tmp_path, **QUIET)
    record, tensors = store.load(tmp_path, "block-0")
    store.save(tmp_path, "block-0", record, tensors | {"momentum": tensors["momentum"].double()})
    zoo = ns.train_zoo(NETS[0], w.task, RECIPES, tmp_path, **QUIET)
    assert torch.equal(zoo.rows, w.zoo.rows)


def test_blocks_that_were_kept_and_blocks_just_trained_make_one_zoo(worlds, tmp_path, monkeypatch):
    w = worlds[1]
    with pretend_cuda(), backend("torch"):
        with monkeypatch.context() as patch:
            patch.setattr(ns.ImageTask, "batch", interrupted(ns.ImageTask.batch, 6))
            with pytest.raises(Interrupted):
                ns.train_zoo(NETS[0], w.task, RECIPES, tmp_path, block=1, **QUIET)
        zoo = ns.train_zoo(NETS[0], w.task, RECIPES, tmp_path, block=1, **QUIET)
        assert zoo.rows.is_cuda
        assert not w.zoo.losses.is_cuda
        torch.testing.assert_close(zoo.rows, w.zoo.rows)


def test_a_gpu_trains_more_nets_together_and_a_cpu_loads_them(worlds, tmp_path):
    """Launching a step for 32 small nets took an H200 17 times as long as computing it."""
    recipes = ns.draw_recipes(40, steps=(1, 4))
    with pretend_cuda(), backend("torch"):
        task = worlds[1].task
        trained = ns.train_zoo(NETS[0], task, recipes, tmp_path, **QUIET)
        images = torch.empty(1, 1 << 17)
        large = SimpleNamespace(device=task.device, batch=lambda *_: (images, None))
        assert zoo_training._fitting(large, recipes) == 32
    assert trained.about["block"] == 512
    loaded = ns.train_zoo(NETS[0], worlds[0].task, recipes, tmp_path, **QUIET)
    assert torch.equal(loaded.rows, trained.rows.cpu())
    here = ns.train_zoo(NETS[0], worlds[0].task, recipes, **QUIET)
    assert here.about["block"] == 32
    torch.testing.assert_close(loaded.rows, here.rows)


def test_another_default_device_is_refused_in_a_sentence(worlds):
    """Seen before: PyTorch's "Expected a 'cuda' device type for generator" in the first step."""
    w = worlds[0]
    with torch.device("meta"):
        for call in (
            lambda: ns.train_zoo(NETS[0], w.task, RECIPES, **QUIET),
            lambda: ns.NetSpace.for_zoos(w.zoo, w.data.train.x, SMALL),
        ):
            with pytest.raises(ValueError, match="set_default_device is meta: leave it at 'cpu'"):
                call()


def test_what_lies_on_the_gpu_is_fetched(worlds):
    """Scores, modules to be made anew, and what an error names."""
    w = worlds[1]
    with pretend_cuda(), backend("torch"):
        assert not w.zoo.scored(ScoresThere(w.data)).scores["spread"].is_cuda
        module = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        expected = ns.initial_rows(module, [3])
        assert torch.equal(ns.initial_rows(module.to("cuda"), [3]), expected)
        spoilt = ns.Distillation(w.space, w.zoos, w.seen, loss=lambda o, t, s: o.sum((1, 2)) / 0)
        with pytest.raises(ValueError, match="losses of nets .* are not finite"):
            spoilt(w.space, generator())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_what_takes_more_digits_on_the_way_gives_the_dtype_back(worlds, dtype):
    """Factors of matrices and distances, which PyTorch doesn't compute in half precision."""
    zoo, z = worlds[0].zoo, worlds[0].z[:4]
    short = ns.Nets(zoo.batched, zoo.rows.to(dtype))
    density, found = ns.Gaussian(z.to(dtype)), ns.invariants(zoo.layout, short.rows)
    assert {density.axes.dtype, density.spread.dtype, density(z.to(dtype)).dtype} == {dtype}
    torch.testing.assert_close(density(z.to(dtype)).float(), ns.Gaussian(z)(z), rtol=0.1, atol=0.1)
    assert found.dtype == dtype
    expected = ns.invariants(zoo.layout, zoo.rows)
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02 * expected.std())
    assert torch.equal(ns.nearest_by_weights(short, short[1:]).rows, short.rows[1:])
    assert ns.nearest_by_weights(zoo, short).rows.dtype == torch.float32
    assert ns.initial_rows(copy.deepcopy(NETS[0]).to(dtype), [0]).dtype == dtype
    matrix = torch.randn(20, 16, generator=generator())
    root = inverse_root(matrix.to(dtype)).double()
    torch.testing.assert_close(root, inverse_root(matrix.double()), rtol=0.02, atol=0.02)


MISTAKES = {
    "mixed": lambda cuda, cpu: cuda + cpu,
    "matrices": lambda cuda, cpu: cpu @ cuda.T,
    "chosen": lambda cuda, cpu: torch.where(cpu > 0, cuda, cuda),
    "joined": lambda cuda, cpu: torch.cat([cuda, cpu]),
    "stacked scalars": lambda cuda, cpu: torch.stack([cuda.sum(), cpu.sum()]),
    "index": lambda cuda, cpu: cpu[(cuda > 0).nonzero()[:, 0]],
    "mask": lambda cuda, cpu: cpu[cuda > 0],
    "written": lambda cuda, cpu: cpu.add_(cuda),
    "written to a scalar": lambda cuda, cpu: cpu.sum().add_(cuda.sum()),
    "CUDA scalar": lambda cuda, cpu: cpu * cuda.sum(),
    "generator": lambda cuda, cpu: torch.randn(2, device="cuda", generator=torch.Generator()),
    "drawn": lambda cuda, cpu: torch.multinomial(cuda.abs(), 1, generator=torch.Generator()),
    "module": lambda cuda, cpu: nn.Linear(3, 2)(cuda),
    "numpy": lambda cuda, cpu: cuda.numpy(),
    "array": lambda cuda, cpu: np.asarray(cuda),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_pretence_fails_where_cuda_fails(mistake):
    with pretend_cuda():
        cuda, cpu = torch.randn(3, 3).to("cuda"), torch.randn(3, 3)
        with pytest.raises((RuntimeError, TypeError), match="(?i)device|cpu|cuda"):
            MISTAKES[mistake](cuda, cpu)


ALLOWED = {
    "CPU scalar": lambda cuda, cpu: cuda * cpu.sum(),
    "CPU index": lambda cuda, cpu: cuda[torch.tensor([2, 0])],
    "list": lambda cuda, cpu: cuda[[2, 0]] + cuda[1, [0, 2, 1]],
    "inside of a function": lambda cuda, cpu: torch.pca_lowrank(cuda, 2)[0],
    "copied in": lambda cuda, cpu: cuda.clone().copy_(cpu),
    "item set": lambda cuda, cpu: cuda.clone().index_put_((torch.tensor(0),), cpu.sum()),
    "made": lambda cuda, cpu: torch.zeros(3, device="cuda") + cuda.new_tensor([1.0, 2, 3]),
    "made like": lambda cuda, cpu: torch.tensor([1.0], device=cuda.device) + torch.ones_like(cuda),
    "moved": lambda cuda, cpu: nn.Linear(3, 2).to(cuda.device)(cuda),
    "to another": lambda cuda, cpu: cpu.to(cuda),
}


def test_a_strict_pretence_refuses_indices_that_are_copied():
    with pretend_cuda():
        cuda, index = torch.randn(3, 3).to("cuda"), torch.tensor([2, 0])
        with pretend_cuda(strict=True):
            with pytest.raises(RuntimeError, match="CPU index"):
                cuda[index]
            assert cuda[index.to("cuda")].shape == cuda[1:].shape
        assert cuda[index].is_cuda


@pytest.mark.parametrize("case", ALLOWED)
def test_the_pretence_allows_what_cuda_allows(case):
    with pretend_cuda():
        cuda, cpu = torch.randn(3, 3).to("cuda"), torch.randn(3, 3)
        found = ALLOWED[case](cuda, cpu)
        assert isinstance(found, CudaTensor)
        assert not isinstance(found.cpu(), CudaTensor)
        if case == "list":
            values = cuda.cpu()
            torch.testing.assert_close(found.cpu(), values[[2, 0]] + values[1, [0, 2, 1]])


def test_gradients_pass_through_the_pretence():
    x = torch.randn(4, 3, generator=generator())
    expected = torch.autograd.functional.jacobian(lambda x: (x.square() @ x.T).sum(1), x)
    with pretend_cuda():
        found = torch.autograd.functional.jacobian(
            lambda x: (x.square() @ x.T).sum(1), x.to("cuda")
        )
        found = found.cpu()
    torch.testing.assert_close(found, expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here make gpu would do all its work")
def test_make_gpu_says_that_there_is_no_gpu():
    folder, here = Path(__file__).parents[1], Path(sys.executable).parent
    command = ["make", "-o", ".venv/.ready", f"BIN={here}", "gpu"]  # without installing anything
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert said.returncode != 0
    assert said.stderr.startswith("make gpu needs a GPU that PyTorch can use, and there is none.")
