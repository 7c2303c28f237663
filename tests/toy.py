"""Small data, nets and failures that the core's tests share, and the oracle: a loop."""

import copy

import torch
from torch import nn
from torch.func import functional_call

from netspace_lite import (
    Batched,
    ImageData,
    Images,
    ImageTask,
    Layout,
    LeNetLike,
    Nets,
    Recipe,
    ResNet,
    VanillaCNN,
    train_zoo,
)

IMAGE, CLASSES = (1, 8, 8), 3


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def toy_data(image=IMAGE, dtype=torch.float32, per_class=40):
    """A class is a random picture, an image is that picture and noise."""
    y = torch.arange(CLASSES).repeat_interleave(per_class)
    noise = torch.randn(len(y), *image, generator=generator(1))
    x = torch.randn(CLASSES, *image, generator=generator())[y] + noise
    images = Images(x.to(dtype), y)
    return ImageData("toy", images, images[::2], images[1::2], CLASSES)


def small_nets():
    """Four architectures for 8×8 images, from the smallest to the deepest."""
    resnet = {"channels": (4, 4, 4, 4), "strides": (2, 1, 2)}
    return [
        LeNetLike(IMAGE, CLASSES, channels=(4,), hidden=(8,), kernel=3),
        VanillaCNN(IMAGE, CLASSES, channels=(4, 4), strides=(2, 2)),
        ResNet(IMAGE, CLASSES, 8, **resnet),
        ResNet(IMAGE, CLASSES, 14, **resnet),
    ]


def small_zoos(data):
    """Six briefly trained nets of each of `small_nets`."""
    recipes = [Recipe(seed, 10 - seed) for seed in range(6)]
    return [train_zoo(net, ImageTask(data, 32), recipes, progress=False) for net in small_nets()]


def random_nets(module, count, seed=0, scale=1.0):
    size = Layout.of(module).size
    return Nets(module, torch.randn(count, size, generator=generator(seed)) * scale)


def looped(module, rows, x, per_net=False):
    """The oracle: one functional call of the plain module after the other, [N, B, ...]."""
    states = Layout.of(module).unpack(rows)
    calls = [functional_call(module, s, (x[n] if per_net else x,)) for n, s in enumerate(states)]
    return torch.stack(calls)


def gradients(loss, net):
    """Of all parameters; zeros for those that the forward left out."""
    parameters = list(net.parameters())
    return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)


def check_training_step(module, x, per_net):
    """Outputs, gradients and running statistics of a step in fp64, each net for itself."""
    module, x = module.double(), x.double()
    batched, rows = Batched(module), random_nets(module, 3, scale=0.4).rows.double()
    running = batched.initial_running(3).double()
    weights = rows.clone().requires_grad_()
    found = batched(weights, x, per_net, running)
    (grad,) = torch.autograd.grad(found.square().sum(), weights)
    for n, state in enumerate(Layout.of(module).unpack(rows)):
        net = copy.deepcopy(module).train()
        net.load_state_dict(state, strict=False)
        expected = net(x[n] if per_net else x)
        torch.testing.assert_close(found[n], expected)
        wanted = torch.cat([g.flatten() for g in gradients(expected.square().sum(), net)])
        torch.testing.assert_close(grad[n], wanted, rtol=1e-6, atol=1e-7)
        buffers = dict(net.named_buffers())
        for name, view in batched.running.views(running).items() if running.numel() else ():
            torch.testing.assert_close(view[n], buffers[name], msg=name)
    return batched


def mlp(activation, inputs=4, hidden=5, outputs=CLASSES):
    """Two layers; the activation is all that tells one from another."""
    return nn.Sequential(nn.Linear(inputs, hidden), activation, nn.Linear(hidden, outputs))


class Sums:
    """Learn the sum of four numbers."""

    def batch(self, recipes, members, step):
        x = torch.randn(len(recipes), 16, 4, generator=generator(step))
        return x, x.sum(-1, keepdim=True)

    def loss(self, outputs, y):
        return (outputs - y).square().mean((1, 2))

    def schedule(self, progress):
        return torch.ones_like(progress)

    def scores(self, nets, members):
        return {}


class MixesSamples(nn.Module):
    """Centres each batch: traceable, but no longer per sample."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        y = self.linear(x)
        return y - y.mean(0)


class Looks(nn.Module):
    """Answers tokens [B, 5] by the mean of their vectors."""

    def __init__(self):
        super().__init__()
        self.vectors, self.head = nn.Embedding(11, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.vectors(x).mean(1))


class Interrupted(Exception):
    """What Ctrl-C does, without disturbing pytest."""


def interrupted(function, at):
    """``function``, raising in its ``at``-th call."""
    count = 0

    def call(*args, **kwargs):
        nonlocal count
        count += 1
        if count == at:
            raise Interrupted
        return function(*args, **kwargs)

    return call
