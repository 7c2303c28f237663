"""What is given in another's place on a first try is answered by a sentence that says what to do.

Each of these was an AttributeError or a TypeError from somewhere inside.
"""

import pytest
from toy import random_nets

import netspace_lite as ns

DATA = ns.load_digits()
NET = ns.lite_net("LeNetLike", DATA.shape, DATA.classes)
NETS = random_nets(NET, 4)
SPACE = ns.NetSpace.for_zoos(NETS, DATA.train.x, ns.SpaceConfig(probes=8))
OBJECTIVE = ns.Distillation(SPACE, NETS, DATA.train.x)


def validate(space):
    return ns.scores(space, NETS, DATA.val)


FIRST_TRIES = {
    "nets have no line": (lambda: ns.interpolate(NETS[0], NETS[1]), "by space.encode; weight_line"),
    "a module is no point": (lambda: ns.interpolate(NET, NET), "by space.encode; weight_line"),
    "no validation": (lambda: ns.fit(SPACE, OBJECTIVE, None, 2), "lambda space: scores"),
    "no objective": (lambda: ns.fit(SPACE, None, validate, 2), "such as a Distillation"),
    "no loss": (lambda: ns.optimise(SPACE, NETS, None), r"as ImageLoss\(images\), not None"),
    "images for a loss": (lambda: ns.refine(SPACE, NETS, DATA.train), r"not Images\(x="),
    "data for inputs": (lambda: ns.NetSpace.for_zoos(NETS, DATA), "data.train.x, not ImageData"),
    "images for inputs": (lambda: ns.NetSpace.for_zoos(NETS, DATA.train), "not Images"),
    "data for a task": (lambda: ns.train_zoo(NET, DATA, ns.draw_recipes(2)), r"ImageTask\(data\)"),
    "a number of recipes": (lambda: ns.train_zoo(NET, ns.ImageTask(DATA), 12), "draw_recipes"),
    "data for a loss": (lambda: ns.ImageLoss(DATA), "such as data.test"),
    "data for a few": (lambda: ns.few_shot(DATA, 5), "such as data.test"),
    "inputs for images": (lambda: ns.scores(SPACE, NETS, DATA.test.x), "such as data.test"),
    "a side for an image": (lambda: ns.lite_net("VanillaCNN", 28, 10), "as data.shape, not 28"),
    "no channels": (lambda: ns.lite_net("ResNet8", (28, 28), 10), "channels, height, width"),
}


@pytest.mark.parametrize(("attempt", "sentence"), FIRST_TRIES.values(), ids=FIRST_TRIES)
def test_it_says_what_to_give(attempt, sentence):
    with pytest.raises(ValueError, match=sentence):
        attempt()


def test_a_search_may_start_from_a_module():
    config = ns.Descent(steps=1)
    found = ns.optimise(SPACE, NETS.to_module(0), ns.ImageLoss(DATA.train), config=config)
    assert found.best.shape == (1, 128)
