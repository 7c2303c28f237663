"""What is given in another's place on a first try is answered by a sentence that says what to do.

Each of these was an AttributeError, a TypeError or worse from somewhere inside.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from toy import random_nets

import netspace_lite as ns
from netspace_lite import shapes


@pytest.fixture(scope="module")
def w():
    data = ns.load_digits()
    nets = random_nets(ns.lite_net("LeNetLike", data.shape, data.classes), 4)
    space = ns.NetSpace.for_zoos(nets, data.train.x, ns.SpaceConfig(probes=8))
    objective = ns.Distillation(space, nets, data.train.x)
    others = random_nets(ns.lite_net("VanillaCNN", data.shape, data.classes), 4)
    two = ns.NetSpace.for_zoos([nets, others], data.train.x, ns.SpaceConfig(probes=8))
    parts = {
        "others": others,
        "two": two,
        "data": data,
        "nets": nets,
        "net": nets.module,
        "space": space,
        "fit": objective,
    }
    return SimpleNamespace(**parts, validate=lambda s: ns.scores(s, nets, data.val))


FIRST_TRIES = {
    "nets have no line": (
        lambda w: ns.interpolate(w.nets[0], w.nets[1]),
        "by space.encode; weight_line",
    ),
    "a module is no point": (lambda w: ns.interpolate(w.net, w.net), "by space.encode"),
    "no validation": (lambda w: ns.fit(w.space, w.fit, None, 2), "lambda space: scores"),
    "no objective": (lambda w: ns.fit(w.space, None, w.validate, 2), "such as a Distillation"),
    "no loss": (
        lambda w: ns.optimise(w.space, w.nets, None),
        r"as ImageLoss\(images\), not a None",
    ),
    "nets of two kinds for noise": (
        lambda w: ns.noisy_nets(ns.MixedNets([w.nets, w.others])),
        "of one architecture, as zoo.mask. or mixed.groups.0., not a MixedNets",
    ),
    "nets of two kinds for averages": (
        lambda w: ns.averages(ns.MixedNets([w.nets, w.others]), 2),
        "not a MixedNets",
    ),
    "nets of two kinds for novelty": (
        lambda w: ns.novelty(ns.MixedNets([w.nets, w.others]), w.data.val.x),
        "not a MixedNets",
    ),
    "images for a loss": (lambda w: ns.refine(w.space, w.nets, w.data.train), "not a Images"),
    "data for inputs": (
        lambda w: ns.NetSpace.for_zoos(w.nets, w.data),
        "data.train.x, not ImageData",
    ),
    "images for inputs": (lambda w: ns.NetSpace.for_zoos(w.nets, w.data.train), "not Images"),
    "data for a task": (
        lambda w: ns.train_zoo(w.net, w.data, ns.draw_recipes(2)),
        r"ImageData is no task: ImageTask\(data\)",
    ),
    "a number of recipes": (
        lambda w: ns.train_zoo(w.net, ns.ImageTask(w.data), 12),
        "one per net, as draw_recipes",
    ),
    "data for a loss": (lambda w: ns.ImageLoss(w.data), "such as data.test"),
    "data for a few": (lambda w: ns.few_shot(w.data, 5), "such as data.test"),
    "inputs for images": (
        lambda w: ns.scores(w.space, w.nets, w.data.test.x),
        "such as data.test",
    ),
    "a side for an image": (
        lambda w: ns.lite_net("VanillaCNN", 28, 10),
        "as data.shape, not 28",
    ),
    "a net for an index": (lambda w: w.nets[w.nets[1]], "not a Nets"),  # Python died of it
    "a net in a list": (lambda w: w.nets[[w.nets[1]]], "not a Nets"),
    "nets for images": (lambda w: w.data.test[w.nets], "not a Nets"),
    "a module to score": (lambda w: ns.scores(w.space, w.net, w.data.val), "as zoo.n."),
    "a module to refine": (lambda w: ns.refine(w.space, w.net, w.data.train.x), "as zoo.n."),
    "a module for a zoo": (lambda w: ns.NetSpace.for_zoos(w.net, w.data.train.x), "Zoo.from_mod"),
    "modules for zoos": (
        lambda w: ns.Distillation(w.space, [w.net], w.data.train.x),
        "Zoo.from_modules",
    ),
    "a zoo for a space": (
        lambda w: ns.Distillation(w.nets, w.space, w.data.train.x),
        "a space and zoos",
    ),
    "no zoo": (lambda w: ns.Distillation(w.space, [], w.data.train.x), "of a space and zoos"),
    "images to answer": (lambda w: ns.Distillation(w.space, w.nets, w.data.train), "data.train.x"),
    "images to blend": (lambda w: ns.blends(w.data.train), "data.train.x"),
    "a dict for a config": (
        lambda w: ns.NetSpace.for_zoos(w.nets, w.data.train.x, {"embedding": 8}),
        r"SpaceConfig\(embedding=64\)",
    ),
    "a dict for a descent": (
        lambda w: ns.optimise(w.space, w.nets, ns.ImageLoss(w.data.val), config={"steps": 2}),
        r"Descent\(steps=50\)",
    ),
    "a space's config for a descent": (
        lambda w: ns.optimise_weights(w.nets, ns.ImageLoss(w.data.val), config=ns.SpaceConfig()),
        r"as Descent\(steps=50\), not a SpaceConfig",
    ),
    "numbers of two kinds for a line": (
        lambda w: ns.interpolate(torch.zeros(4), torch.zeros(4).double(), 3),
        "floats alike, not torch.float32 and torch.float64",
    ),
    "percent for a share": (
        lambda w: ns.ImageLoss(w.data.train, w.net, distil=90),
        "a share of the loss, from 0 to 1, not 90",
    ),
    "inputs of their own for two zoos": (
        lambda w: ns.Distillation(w.two, [w.nets, w.others], w.data.train.x, per_net=True),
        "inputs per net need one zoo, not 2",
    ),
    "zoos in another order": (
        lambda w: ns.Distillation(w.two, [w.nets, w.others], w.data.train.x)(
            ns.NetSpace.for_zoos([w.others, w.nets], w.data.train.x, ns.SpaceConfig(probes=8)),
            torch.Generator(),
        ),
        "has these zoos elsewhere",
    ),
    "yes for True": (lambda w: ns.SpaceConfig(told="no"), r"\(True, False\), not 'no'"),
    "nets to compare": (lambda w: ns.compare(w.nets, w.nets, w.data.val), "nets.outputs"),
    "nets to disagree": (lambda w: ns.disagreement(w.nets, w.nets), "nets.outputs"),
    "scores to read": (lambda w: ns.readout({}, {}, {}, {}), "zoo.scores.name."),
    "an array to encode": (lambda w: w.space.encode(w.nets.rows.numpy()), "not a ndarray"),
    "an array of nets": (lambda w: ns.Nets(w.net, w.nets.rows.numpy()), "not a ndarray"),
    "an array to sample": (
        lambda w: ns.sample(w.space.encode(w.nets).numpy(), 3),
        "space.encode",
    ),
    "floats for places": (lambda w: w.nets[np.array([0.0, 1.0, 1.0, 0.0])], "not float64"),
    "floats for images": (lambda w: w.data.test[[np.float32(1)]], "a mask, not float32"),
    "a target without its axis": (
        lambda w: ns.squared_error(w.nets(w.data.val.x)[..., :1], w.data.val.y.float(), 1.0),
        "can't be compared",
    ),
    "distances with an axis more": (
        lambda w: shapes.within(torch.zeros(4, 50, 1), torch.zeros(4, 50)),
        r"as many points, \[..., B\], not \[4, 50, 1\] and \[4, 50\]",
    ),
    "channels last": (
        lambda w: ns.ImageData("own", *[(torch.rand(6, 12, 12, 3), torch.arange(6) % 3)] * 3, 3),
        r"x.permute\(0, 3, 1, 2\)",
    ),
    "half a step": (lambda w: ns.fit(w.space, w.fit, w.validate, 2.5), "whole number, not 2.5"),
    "half a batch": (lambda w: ns.ImageTask(w.data, 8.5), "whole number, not 8.5"),
    "half a net": (lambda w: ns.Distillation(w.space, w.nets, w.data.train.x, nets=2.5), "whole"),
    "half a point": (lambda w: ns.interpolate(*w.space.encode(w.nets[:2]), 2.5), "whole number"),
    "a name for a net": (
        lambda w: ns.train_zoo("LeNetLike", ns.ImageTask(w.data), ns.draw_recipes(2)),
        "a str makes no net",
    ),
    "a factory for a module": (
        lambda w: ns.Zoo.from_files(".", lambda: w.net),
        "a function is no module",
    ),
    "a layer that is lazy": (
        lambda w: ns.Zoo.from_modules([nn.Sequential(nn.Flatten(), nn.LazyLinear(3))]),
        "call it on an example first",
    ),
    "an objective that nothing moves": (
        lambda w: ns.fit(w.space, lambda s, g: torch.ones(()), w.validate, 2),
        "no gradient",
    ),
    "no channels": (
        lambda w: ns.lite_net("ResNet8", (28, 28), 10),
        r"\(channels, height, width\), as data.shape",
    ),
}


@pytest.mark.parametrize(("attempt", "sentence"), FIRST_TRIES.values(), ids=FIRST_TRIES)
def test_it_says_what_to_give(w, attempt, sentence):
    with pytest.raises(ValueError, match=sentence):
        attempt(w)


def test_a_search_may_start_from_a_module(w):
    start, config = w.nets.to_module(0), ns.Descent(steps=1)
    found = ns.optimise(w.space, start, ns.ImageLoss(w.data.train), config=config, progress=False)
    assert found.best.shape == (1, 128)


def test_a_task_that_only_scores_will_do_for_nets_that_are_trained(w):
    class Scoring:
        def scores(self, nets, members):
            return {"val_accuracy": nets.accuracy(w.data.val)}

    zoo = ns.Zoo.from_modules([w.nets.to_module(n) for n in range(3)], Scoring())
    assert zoo.scores["val_accuracy"].tolist() == w.nets[:3].accuracy(w.data.val).tolist()


def test_what_a_module_says_of_its_inputs_comes_with_what_they_were(w):
    said = r"LeNetLike can't take inputs \[3, 1, 9, 9\] of torch.float32: .* cannot be multiplied"
    with pytest.raises(ValueError, match=said):
        ns.Nets(w.nets.module, w.nets.rows).outputs(torch.zeros(3, 1, 9, 9))
