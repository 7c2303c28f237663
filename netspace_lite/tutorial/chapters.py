"""The zoos and spaces that several notebooks need; trained here where ``build/`` lacks them."""

from typing import NamedTuple

import netspace_lite as ns

from . import Settings


class Chapter(NamedTuple):
    """A fitted space, the zoos it was fitted, chosen and tested on (for several architectures a
    list of one each), and what `fit` recorded."""

    space: ns.NetSpace
    train: ns.Zoo | list[ns.Zoo]
    val: ns.Zoo | list[ns.Zoo]
    test: ns.Zoo | list[ns.Zoo]
    history: list[dict[str, float]]


def single_zoo(settings: Settings, data: ns.ImageData) -> ns.Zoo:
    """The zoo of notebook 1: one architecture, every net with its own length of training."""
    size = settings.sizes.zoo
    recipes = ns.draw_recipes(size.nets, settings.seed, steps=size.steps)
    task = ns.ImageTask(data, size.batch)
    return ns.train_zoo(settings.net(size.net, data), task, recipes, settings.folder("zoo"))


def single_space(settings: Settings, data: ns.ImageData, name: str = "space", **config) -> Chapter:
    """The space of notebook 2, kept in the folder ``name``; ``config`` goes to `SpaceConfig`."""
    size, config = settings.sizes.fit, {"chunk": settings.sizes.zoo.chunk, **config}
    train, val, test = single_zoo(settings, data).split(size.val, size.test, settings.seed)
    space = ns.NetSpace.for_zoos(train, data.train.x, ns.SpaceConfig(**config), settings.seed)
    kept = {"epoch": size.epoch, "seed": settings.seed, "folder": settings.folder(name)}
    objective = ns.Distillation(space, train, data.train.x)
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


def several_space(settings: Settings, data: ns.ImageData) -> Chapter:
    """The space of notebook 3 that learns from instances, answers translated between heads."""
    size, (train, val, test) = settings.sizes.several, several_zoos(settings, data)
    config = ns.SpaceConfig(weights=False, hidden=size.hidden)
    space = ns.NetSpace.for_zoos(train, data.train.x, config, settings.seed)
    instances = ns.Distillation(space, train, data.train.x, chances=size.chances)
    naming = ns.ArchitectureClassification(space, train, translated=True)
    objective = ns.combine(instances, naming, weights=(1, 0.1))
    kept = {"epoch": size.epoch, "seed": settings.seed, "folder": settings.folder("mixed/space")}
    validate, steps = lambda s: agreements(s, val, data.val), size.instance_steps
    return Chapter(space, train, val, test, ns.fit(space, objective, validate, steps, **kept))
