"""Folded batch norms compute what they did, in evaluation mode, for any module."""

from unittest import mock

import pytest
import torch
from torch import nn

from netspace_lite import Batched, Zoo
from netspace_lite.architectures import ResNet, describe
from netspace_lite.folding import Affine, Folding, _trace, fold_batchnorm
from netspace_lite.layout import Layout


def _trained_batchnorm_net():
    """A ResNet whose running statistics are not those of its initialisation."""
    torch.manual_seed(0)
    net = ResNet((3, 16, 16), 5, channels=(4, 4, 8, 8), batch_norm=True)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1, 0.3)
            nn.init.normal_(layer.bias)
    for _ in range(3):
        net(torch.randn(32, 3, 16, 16))
    return net.eval()


def test_folding_batch_norm_changes_nothing_but_the_parameters():
    net = _trained_batchnorm_net()
    folded = fold_batchnorm(net)
    x = torch.randn(8, 3, 16, 16)
    torch.testing.assert_close(folded(x), net(x), rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    plain = ResNet((3, 16, 16), 5, channels=(4, 4, 8, 8))
    assert Layout.of(folded) == Layout.of(plain)
    assert describe(folded) == describe(plain)


def normed(norm, *after):
    """A batch norm with statistics and scales of its own, between other layers."""
    torch.manual_seed(0)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return nn.Sequential(*after[:1], norm, *after[1:]).eval()


class TwoReaders(nn.Module):
    """The convolution's output is read by the norm and by a skip."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), normed(nn.BatchNorm2d(3))[0]

    def forward(self, x):
        y = self.conv(x)
        return y + self.norm(y)


class Branching(nn.Module):
    """Its forward can't be traced."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), normed(nn.BatchNorm2d(3))[0]

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) if y.mean() > 0 else self.norm(-y)


class TwoNames(nn.Module):
    """Its layers are attributes and a list of them too."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), normed(nn.BatchNorm2d(3))[0]
        self.layers = nn.ModuleList([self.conv, self.norm])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


FOLDED = {  # module, shape of one input, how many Affine are left
    "after a convolution": (normed(nn.BatchNorm2d(4), nn.Conv2d(3, 4, 3)), (3, 5, 6), 0),
    "after a linear layer": (normed(nn.BatchNorm1d(4), nn.Linear(3, 4)), (3,), 1),
    "tokens of a linear layer": (normed(nn.BatchNorm1d(5), nn.Linear(3, 4)), (5, 3), 1),
    "after a 1-D convolution": (normed(nn.BatchNorm1d(4), nn.Conv1d(3, 4, 3)), (3, 7), 0),
    "after an activation": (normed(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3)), (3, 5, 5), 1),
    "first of all": (normed(nn.BatchNorm1d(3)), (3,), 1),
    "without scales": (normed(nn.BatchNorm2d(3, affine=False), nn.ReLU()), (3, 5, 5), 1),
    "two readers": (TwoReaders().eval(), (3, 5, 5), 1),
    "under two names": (TwoNames().eval(), (3, 5, 5), 1),
    "not traceable": (Branching().eval(), (3, 5, 5), 1),
}


@pytest.mark.parametrize("case", FOLDED)
def test_every_batch_norm_can_be_folded(case):
    net, shape, left = FOLDED[case]
    folded, x = fold_batchnorm(net), torch.randn(6, *shape)
    torch.testing.assert_close(folded(x), net(x), rtol=1e-4, atol=1e-5)
    assert sum(isinstance(m, Affine) for m in folded.modules()) == left
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())


def test_folding_leaves_the_module_itself_alone():
    net = _trained_batchnorm_net().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fold_batchnorm(net)
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_hooks_that_folding_would_lose_are_refused_or_kept():
    """Seen before: a layer that was folded lost them without a word."""
    x = torch.randn(5, 1, 8, 8)
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)
    net = nn.Sequential(*layers).eval()
    nn.init.normal_(net[1].running_mean)
    handle = net[1].register_forward_hook(lambda layer, given, out: torch.relu(out))
    with pytest.raises(ValueError, match="norm '1' has hooks, which folding would lose"):
        fold_batchnorm(net)
    handle.remove()
    net[0].register_forward_hook(lambda layer, given, out: torch.relu(out))
    folded = fold_batchnorm(net)
    assert isinstance(folded[1], Affine)
    torch.testing.assert_close(folded(x), net(x))


class OwnConfig(nn.Module):
    """Not registered, with a config of its own."""

    def __init__(self):
        super().__init__()
        self.config = {"batch_norm": True}
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        x = torch.relu(self.conv(x))
        return self.norm(x) if self.config["batch_norm"] else x


def test_a_config_of_ones_own_stays():
    """Seen before: its norm was left out, without a word."""
    torch.manual_seed(0)
    net, x = OwnConfig().eval(), torch.randn(3, 1, 5, 5)
    nn.init.normal_(net.norm.running_mean)
    torch.testing.assert_close(fold_batchnorm(net)(x), net(x))


class AsksForNorms(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            x = torch.relu(x) if isinstance(layer, nn.BatchNorm2d) else x
        return x


class ReadsScale(OwnConfig):
    def forward(self, x):
        x = self.conv(x)
        return self.norm(x) * self.norm.weight.abs().sum()


class ReadsEpsilon(OwnConfig):
    def forward(self, x):
        return self.norm(self.conv(x)) + self.norm.eps


@pytest.mark.parametrize("kind", [AsksForNorms, ReadsScale, ReadsEpsilon])
def test_a_forward_that_looks_at_its_norms_is_refused(kind):
    """Seen before: it went another way once they were folded, without a word."""
    with pytest.raises(
        ValueError, match=f"a {kind.__name__} asks what its batch norms are or hold"
    ):
        fold_batchnorm(kind().eval())


class AsksItsSamples(nn.Module):
    """Can't be traced for a step that it takes while it has a batch norm."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.norm(self.layer(x))
        if isinstance(self.norm, nn.BatchNorm2d) and y.shape[0] > 1000:
            y = y * 1
        return y


def test_what_can_be_traced_once_it_is_folded_is_folded():
    module, x = AsksItsSamples(), torch.randn(5, 2, 6, 6)
    module(3 * x + 1)
    torch.testing.assert_close(fold_batchnorm(module)(x), module.eval()(x), rtol=1e-4, atol=1e-5)


class Shared(nn.Module):
    """Norms that share a scale, one behind a convolution and one alone; a constant and a tie."""

    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = (
            nn.Conv2d(2, 3, 3),
            nn.BatchNorm2d(3),
            nn.BatchNorm2d(3),
        )
        self.second.weight = self.first.weight
        self.linear = nn.Linear(3, 3)
        self.other = nn.Linear(3, 3)
        self.other.weight = self.linear.weight
        self.register_buffer("factor", torch.tensor(0.5))

    def forward(self, x):
        x = self.second(torch.relu(self.first(self.conv(x))))
        return self.other(torch.tanh(self.linear(x.mean((2, 3))))) * self.factor


def asked(make, seed):
    """A module of its own, whose norms have seen something."""
    torch.manual_seed(seed)
    module = make()
    shape = (2, 6, 6) if make is Shared else (3, 16, 16)
    module(seed + 3 * torch.randn(16, *shape))
    return module.eval()


@pytest.mark.parametrize(
    "make", [Shared, lambda: ResNet((3, 16, 16), 5, channels=(4, 4, 8, 8), batch_norm=True)]
)
def test_what_folds_one_net_folds_all_of_its_kind(make):
    """Bit for bit as each alone; none of them is traced, which took 60 ms of a ResNet."""
    nets = [asked(make, seed) for seed in range(3)]
    folding = Folding(nets[0])
    for net in nets:
        alone = dict(fold_batchnorm(net).named_parameters())
        found = folding(dict(net.state_dict()))
        assert all(torch.equal(found[name], value) for name, value in alone.items())
    with mock.patch("netspace_lite.folding._trace", side_effect=_trace) as traced:
        zoo = Zoo.from_modules(nets)
    assert traced.call_count == 2  # of the first, with norms and without
    assert torch.equal(zoo.rows, zoo.layout.pack([fold_batchnorm(net) for net in nets]))
    x = torch.randn(5, *((2, 6, 6) if make is Shared else (3, 16, 16)))
    expected = torch.stack([net(x) for net in nets])
    torch.testing.assert_close(zoo.outputs(x), expected, rtol=1e-4, atol=1e-5)


def held(module, *names):
    """The module, with parameters of these names as constants."""
    for name in names:
        value = getattr(module, name).detach().clone()
        delattr(module, name)
        module.register_buffer(name, value)
    return module


def normal(norm):
    """A norm that has seen something."""
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm


class Mean(nn.Module):
    """Norms, and adds their mean again, a constant of another layer."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = normal(nn.BatchNorm1d(5, affine=False)), nn.Linear(5, 5)
        del self.linear.bias
        self.linear.register_buffer("bias", self.norm.running_mean)

    def forward(self, x):
        return self.linear(self.norm(x))


class Alike(nn.Module):
    """Two norms of the same statistics."""

    def __init__(self):
        super().__init__()
        self.one, self.other = normal(nn.BatchNorm1d(5)), nn.BatchNorm1d(5)
        for name in ("running_mean", "running_var"):
            setattr(self.other, name, getattr(self.one, name))

    def forward(self, x):
        return self.other(torch.tanh(self.one(x)))


FIXED = {
    "convolution's weight": (["weight"], []),
    "convolution's bias": (["bias"], []),
    "all of the convolution": (["weight", "bias"], []),
    "norm's weight": ([], ["weight"]),
    "all of the norm": ([], ["weight", "bias"]),
}


def normed_convolution(of_convolution, of_norm):
    torch.manual_seed(0)
    convolution = held(nn.Conv2d(1, 4, 3), *of_convolution)
    norm = nn.BatchNorm2d(4)
    nn.init.constant_(norm.weight, 3.0)
    nn.init.constant_(norm.bias, 0.5)
    after = nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    return nn.Sequential(convolution, held(norm, *of_norm), *after)


@pytest.mark.parametrize("case", FIXED)
def test_constants_in_or_before_norms_are_folded_in_each_net(case):
    """Seen before: all nets got what the first one's came to, or a norm its initial values."""
    nets = [normed_convolution(*FIXED[case]) for _ in range(3)]
    for n, net in enumerate(nets):
        nn.init.normal_(net[4].weight, generator=torch.Generator().manual_seed(n))
        net(torch.randn(8, 1, 8, 8) * (n + 1))
    x = torch.randn(5, 1, 8, 8)
    expected = torch.stack([net.eval()(x) for net in nets])
    zoo = Zoo.from_modules(nets)
    torch.testing.assert_close(zoo.outputs(x), expected, rtol=1e-4, atol=1e-4)
    batched, folding = Batched(nets[0]), Folding(nets[0])
    states = [dict(net.named_parameters()) | statistics_of(net) for net in nets]  # as in training
    rows = Batched(folding.module).layout.pack([folding(state) for state in states])
    assert torch.equal(rows, zoo.rows)
    assert batched.running.size == 8


def statistics_of(net):
    return {name: b for name, b in net.named_buffers() if name.startswith("1.running_")}


def test_statistics_that_are_constants_too_are_told_apart():
    """Seen before: merged, or a TypeError."""
    with pytest.raises(ValueError, match="module 1, a Mean, computes another function"):
        Zoo.from_modules([Mean().eval(), Mean().eval()])
    nets, x = [Alike().eval() for _ in range(3)], torch.randn(7, 5)
    expected = torch.stack([net(x) for net in nets])
    torch.testing.assert_close(Zoo.from_modules(nets).outputs(x), expected, rtol=1e-4, atol=1e-5)
