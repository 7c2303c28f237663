"""The zoos and spaces that several notebooks need; trained here where ``build/`` lacks them."""

from collections.abc import Callable
from typing import NamedTuple

import torch

import netspace_lite as ns
from netspace_lite import shapes

from . import Settings


class Chapter(NamedTuple):
    """A fitted space, the zoos it was fitted, chosen and tested on (for several architectures a
    list of one each), and what `fit` recorded."""

    space: ns.NetSpace
    train: ns.Zoo | list[ns.Zoo]
    val: ns.Zoo | list[ns.Zoo]
    test: ns.Zoo | list[ns.Zoo]
    history: list[dict[str, float]]


def noise(data: ns.ImageData, seed: int, count: int = 128) -> torch.Tensor:
    """Blurred noise [count, C, H, W], of the size and the spread of images and nothing else."""
    white = torch.randn(count, *data.shape, generator=torch.Generator().manual_seed(seed))
    blurred = torch.nn.functional.avg_pool2d(white, 3, 1, 1, count_include_pad=False)
    return (blurred / blurred.std()).to(data.train.x)


def single_zoo(settings: Settings, data: ns.ImageData) -> ns.Zoo:
    """The zoo of notebook 1: one architecture, every net with its own length of training."""
    size = settings.sizes.zoo
    recipes = ns.draw_recipes(size.nets, settings.seed, steps=size.steps, lr=size.lr)
    task = ns.ImageTask(data, size.batch)
    return ns.train_zoo(settings.net(size.net, data), task, recipes, settings.folder("zoo"))


def single_space(settings: Settings, data, name="space", blind=False, **config) -> Chapter:
    """The space of notebook 2, kept in the folder ``name``; ``config`` goes to `SpaceConfig`.

    A ``blind`` one reads no weights and sees no image, its probes are `noise`, and learns from half
    as many nets a step.
    """
    size = settings.sizes.fit
    own = {"chunk": settings.sizes.zoo.chunk, "probes": size.probes, "components": size.components}
    own["weights"] = not blind
    train, val, test = single_zoo(settings, data).split(size.val, size.test, settings.seed)
    probes = noise(data, settings.seed, size.probes) if blind else data.train.x
    space = ns.NetSpace.for_zoos(train, probes, ns.SpaceConfig(**own | config), settings.seed)
    kept = {"epoch": size.epoch, "folder": settings.folder(name + blind * "-blind")}
    draw = size.blind if blind else size.asked if space.config.probes else size.unasked
    objective = ns.Distillation(space, train, ns.blends(data.train.x[: size.images]), **draw)
    history = ns.fit(space, objective, lambda s: ns.scores(s, val, data.val), size.steps, **kept)
    return Chapter(space, train, val, test, history)


def several_zoos(settings: Settings, data: ns.ImageData) -> tuple[list[ns.Zoo], ...]:
    """The mixed zoo of notebook 3, one zoo an architecture: training, validation and test nets."""
    size, parts = settings.sizes.several, []
    for name, count in size.nets.items():
        recipes = ns.draw_recipes(count, settings.seed, steps=size.steps, stream=name)
        task, folder = ns.ImageTask(data, size.batch), settings.folder(f"mixed/{name}")
        zoo = ns.train_zoo(settings.net(name, data), task, recipes, folder)
        parts.append(zoo.split(*size.held_out, settings.seed))
    return tuple(map(list, zip(*parts, strict=True)))


def agreements(space: ns.NetSpace, zoos: list[ns.Zoo], images) -> dict[str, float]:
    """Agreement in percent of the nets of each zoo, by name, and first their mean."""
    found = {space.architectures[space.index(zoo)]: ns.scores(space, zoo, images) for zoo in zoos}
    found = {name: score["agreement"] for name, score in found.items()}
    return {"agreement": sum(found.values()) / len(found), **found}


def several_space(settings: Settings, data: ns.ImageData, blind: bool = False) -> Chapter:
    """The space of notebook 3 that learns from instances, answers translated between heads.

    A ``blind`` one sees no image, its probes are `noise`, isn't told architectures, and takes half
    as many steps.
    """
    size, (train, val, test) = settings.sizes.several, several_zoos(settings, data)
    config = ns.SpaceConfig(weights=False, hidden=size.hidden, told=not blind)
    probes = noise(data, settings.seed, config.probes) if blind else data.train.x
    space = ns.NetSpace.for_zoos(train, probes, config, settings.seed)
    inputs = ns.blends(data.train.x[: size.images])
    instances = ns.Distillation(space, train, inputs, chances=size.chances, **size.draw)
    naming = ns.ArchitectureClassification(space, train, translated=not blind)
    objective = ns.combine(instances, naming, weights=(1, 0.1))
    kept = {"epoch": size.epoch, "folder": settings.folder("mixed/space" + blind * "-blind")}
    validate, steps = lambda s: agreements(s, val, data.val), size.instance_steps // (1 + blind)
    return Chapter(space, train, val, test, ns.fit(space, objective, validate, steps, **kept))


def shape_scores(val: ns.Zoo, fresh: shapes.Samples) -> Callable[[ns.NetSpace], dict[str, float]]:
    """How well a space knows held-out shapes, for `fit`."""
    name, points = "validation nets, % within 0.01", fresh.points[val.members]
    return lambda space: {name: float(shapes.agreement(space, val, points).mean())}


def shape_space(settings: Settings) -> Chapter:
    """The zoo and the space of the shapes notebook, which writes the same out."""
    size, device = settings.sizes.shapes, "cuda" if torch.cuda.is_available() else "cpu"
    chairs = shapes.draw_chairs(size.shapes, settings.seed)
    samples = shapes.sample_chairs(chairs, size.samples, seed=0, far=size.far)
    fresh = shapes.sample_chairs(chairs, 2048, seed=1)  # for scores
    samples, fresh = (shapes.level_off(s, size.limit).to(device) for s in (samples, fresh))
    recipes = shapes.shape_recipes(size.shapes, settings.seed, size.steps, size.lr)
    task = shapes.ShapeTask(samples, size.batch, test=fresh)
    zoo = ns.train_zoo(ns.Siren(size.hidden, size.omega), task, recipes, settings.folder("shapes"))
    train, val, test = zoo.split(*size.held_out, seed=settings.seed)
    config = ns.SpaceConfig(weights=False, probes=512)
    points = samples.points[train.members]  # [N, S, 3]
    space = ns.NetSpace.for_zoos(train, points.flatten(0, 1), config, settings.seed)
    like = {"per_net": True, "loss": shapes.squared_error, "nets": 64, "samples": 64}
    objective = ns.Distillation(space, train, points[:, ::4], **like)
    kept = {"epoch": size.epoch, "folder": settings.folder("shape-space")}
    history = ns.fit(space, objective, shape_scores(val, fresh), size.fit_steps, **kept)
    return Chapter(space, train, val, test, history)
