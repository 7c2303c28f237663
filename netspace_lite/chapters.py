"""What notebooks 2 and 3 leave in ``build/`` for later ones; trained here where it is missing.

Zoos, fits and their folders are those of the notebooks, so whoever comes first does the work.
"""

from dataclasses import dataclass

from . import metrics
from .architectures import lite_net, paper_net
from .data import ImageData
from .objectives import ArchitectureClassification, MixedDistillation, combine
from .space import NetSpace, SpaceConfig
from .training import InstanceDistillation, fit
from .tutorial import FIT, MULTI, ZOO, Settings
from .zoo import ImageTask, Zoo, draw_recipes, train_zoo


@dataclass
class Chapter:
    """A fitted space and the nets it was fitted, chosen and tested on.

    train, val, test: a `Zoo`, or a list of one per architecture.
    """

    space: NetSpace
    train: Zoo | list[Zoo]
    val: Zoo | list[Zoo]
    test: Zoo | list[Zoo]


def single(settings: Settings, data: ImageData) -> Chapter:
    """The zoo of notebook 1 and the space of notebook 2 (weights and probes)."""
    size, fitting = ZOO[settings.preset], FIT[settings.preset]
    net = lite_net("LeNetLike", data.shape, data.classes) if settings.lite else paper_net("ResNet8")
    recipes = draw_recipes(size.nets, settings.seed, steps=size.steps)
    zoo = train_zoo(net, ImageTask(data, size.batch), recipes, settings.folder("zoo"))
    train, val, test = zoo.split(fitting.val, fitting.test, settings.seed)
    space = NetSpace.for_zoos(train, data.train.x, SpaceConfig(chunk=size.chunk), settings.seed)
    fit(
        space,
        InstanceDistillation(space, train, data.train.x),
        lambda s: metrics.scores(s, val, data.val),
        fitting.steps,
        epoch=fitting.epoch,
        seed=settings.seed,
        folder=settings.folder("space"),
    )
    return Chapter(space, train, val, test)


def several(settings: Settings, data: ImageData) -> Chapter:
    """The mixed zoo of notebook 3 and its space, distilled from instances."""
    size, task = MULTI[settings.preset], ImageTask(data, MULTI[settings.preset].batch)
    parts = []
    for name, count in size.nets.items():
        net = lite_net(name, data.shape, data.classes) if settings.lite else paper_net(name)
        recipes = draw_recipes(count, settings.seed, steps=size.steps)
        zoo = train_zoo(net, task, recipes, settings.folder(f"mixed/{name}"))
        parts.append(zoo.split(*size.held_out, settings.seed))
    train, val, test = (list(part) for part in zip(*parts, strict=True))
    space = NetSpace.for_zoos(
        train, data.train.x, SpaceConfig(weights=False, hidden=size.hidden), settings.seed
    )

    def validate(space):
        pairs = zip(size.nets, val, strict=True)
        found = {name: metrics.scores(space, zoo, data.val, name) for name, zoo in pairs}
        found = {name: score["agreement"] for name, score in found.items()}
        return {"agreement": sum(found.values()) / len(found), **found}

    objective = combine(
        MixedDistillation(space, train, data.train.x, chances=size.chances),
        ArchitectureClassification(space, train, translated=True),
        weights=(1, 0.1),
    )
    fit(
        space,
        objective,
        validate,
        size.instance_steps,
        epoch=size.epoch,
        seed=settings.seed,
        folder=settings.folder("mixed/space"),
    )
    return Chapter(space, train, val, test)
