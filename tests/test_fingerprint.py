"""One fingerprint for what computes the same, another for everything else."""

import copy
import importlib
import os
import re
import subprocess
import sys
from collections import defaultdict, namedtuple
from dataclasses import dataclass
from enum import Enum, Flag
from functools import cache, cached_property, partial, update_wrapper
from threading import Lock
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import NearestNeighbors
from torch import nn
from toy import mlp, toy_data

from netspace_lite.architectures import Siren, lite_net
from netspace_lite.fingerprint import difference, fingerprint, structure, template
from netspace_lite.zoo import ImageTask, Recipe, Zoo


class Scaled(nn.Module):
    """Settings in attributes and constants in the forward; `branch` makes it untraceable."""

    def __init__(self, scale=2.0, buffer=0.5, branch=False, function=torch.relu, order=("a", "b")):
        super().__init__()
        self.scale, self.branch, self.function, self.order = scale, branch, function, order
        self.linear = nn.Linear(4, 3)
        self.register_buffer("shift", torch.tensor([buffer]))

    def forward(self, x):
        if self.branch and x.sum() > 0:
            x = -x
        return self.function(self.linear(x)) * self.scale + self.shift


class Plus(Scaled):
    def forward(self, x):
        return self.linear(x) + 1


class Minus(Scaled):
    def forward(self, x):
        return self.linear(x) - 1


class Cubes(Siren):
    def forward(self, points):
        return self.layers(points) ** 3


class Branches(Scaled):
    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else self.linear(x) + 1


class OtherBranches(Scaled):
    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else self.linear(x) + 2


class ThroughHelper(nn.Module):
    """Untraceable, and its parts are computed by a helper of its own."""

    def __init__(self, helper):
        super().__init__()
        self.linear, self.helper = nn.Linear(4, 3), helper

    def forward(self, x):
        return self.helper(self.linear(x)) if x.sum() > 0 else x


def edited(step, branch=False):
    """A class of one name whose forward somebody edits, with a constant from outside."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        if branch:

            def forward(self, x):
                return step(self.linear(x)) if x.sum() > 0 else x
        else:

            def forward(self, x):
                return step(self.linear(x))

    return Own()


def times(factor):
    return lambda x: x * factor


def attention(**changes):
    return nn.TransformerEncoderLayer(8, **{"nhead": 2, "dim_feedforward": 8} | changes)


DIFFER = {
    "activation": (mlp(nn.ReLU()), mlp(nn.Tanh())),
    "slope": (mlp(nn.LeakyReLU(0.1)), mlp(nn.LeakyReLU(0.2))),
    "GELU's formula": (mlp(nn.GELU()), mlp(nn.GELU(approximate="tanh"))),
    "width": (mlp(nn.ReLU()), mlp(nn.ReLU(), hidden=6)),
    "dropout": (nn.Sequential(nn.Dropout(0.1)), nn.Sequential(nn.Dropout(0.2))),
    "stride": (nn.Conv2d(2, 2, 3, 1), nn.Conv2d(2, 2, 3, 2)),
    "padding mode": (nn.Conv2d(2, 2, 3, 1, 1), nn.Conv2d(2, 2, 3, 1, 1, padding_mode="circular")),
    "groups of the same shapes": (nn.GroupNorm(2, 8), nn.GroupNorm(4, 8)),
    "batch norm's momentum": (nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=0.5)),
    "frequency": (Siren(8), Siren(8, omega=20.0)),
    "a forward of its own": (Siren(8), Cubes(8)),
    "a constant in the forward": (Scaled(2.0), Scaled(3.0)),
    "a buffer": (Scaled(buffer=0.5), Scaled(buffer=0.7)),
    "the forward's code": (Plus(), Minus()),
    "a function it was given": (Scaled(function=torch.relu), Scaled(function=torch.tanh)),
    "a constant, untraced": (Scaled(2.0, branch=True), Scaled(3.0, branch=True)),
    "the code, untraced": (Branches(), OtherBranches()),
    "a helper, untraced": (ThroughHelper(lambda x: x + 1), ThroughHelper(lambda x: x + 2)),
    "an edited forward": (edited(torch.relu), edited(torch.tanh)),
    "an edited method": (edited(lambda x: x.square()), edited(lambda x: x.exp())),
    "an edited constant": (edited(times(2)), edited(times(3))),
    "an edited order": (edited(lambda x: 2 * x.relu()), edited(lambda x: (2 * x).relu() + 0)),
    "an edited function, untraced": (edited(torch.relu, True), edited(torch.tanh, True)),
    "an edited method, untraced": (edited(lambda x: x.square(), True), edited(torch.exp, True)),
    "an edited constant, untraced": (edited(times(2), True), edited(times(3), True)),
    "numbers of heads": (attention(nhead=2), attention(nhead=4)),
    "an encoder's activation": (attention(), attention(activation="gelu")),
    "an encoder's order": (attention(), attention(norm_first=True)),
    "directions read": (nn.GRU(4, 4), nn.GRU(4, 4, batch_first=True)),
    "depth": (lite_net("ResNet8", (1, 8, 8), 3), lite_net("ResNet14", (1, 8, 8), 3)),
}


@pytest.mark.parametrize("case", DIFFER)
def test_modules_that_compute_something_else_are_told_apart(case):
    one, other = DIFFER[case]
    assert structure(one) != structure(other)
    assert structure(one) == structure(copy.deepcopy(one))


def tied():
    net = mlp(nn.ReLU(), 4, 4, 4)
    net[2].weight = net[0].weight
    return net


SAME = {
    "new weights": (
        lambda: lite_net("LeNetLike", (1, 8, 8), 3),
        lambda: lite_net("LeNetLike", (1, 8, 8), 3),
    ),
    "evaluation mode": (lambda: attention(), lambda: attention().eval()),
    "running statistics": (
        lambda: nn.Sequential(nn.BatchNorm1d(3)),
        lambda: _trained(nn.Sequential(nn.BatchNorm1d(3))),
    ),
    "tied weights": (tied, tied),
    "untraceable": (lambda: Branches(), lambda: Branches()),
    "defined again": (lambda: edited(times(2)), lambda: edited(times(2))),
    "defined again, untraceable": (lambda: edited(times(2), True), lambda: edited(times(2), True)),
}


def _trained(net):
    net(torch.randn(5, 3))
    return net


@pytest.mark.parametrize("case", SAME)
def test_weights_and_modes_leave_the_structure_alone(case):
    one, other = (make() for make in SAME[case])
    assert structure(one) == structure(other)
    mode = other.training
    structure(other)
    assert other.training == mode


def test_tied_weights_are_not_untied_ones():
    assert structure(tied()) != structure(mlp(nn.ReLU(), 4, 4, 4))


SCRIPT = """
import torch
from torch import nn
from netspace_lite.architectures import Siren, lite_net
from netspace_lite.fingerprint import fingerprint, structure
def even(n): return n == 0 or odd(n - 1)
def odd(n): return n > 0 and even(n - 1)
nets = Siren(8), lite_net("ResNet8", (1, 8, 8), 3), nn.TransformerEncoderLayer(8, 2), nn.GRU(2, 3)
things = {"b": {3, 1, 2}, "a": torch.arange(3)}, nn.functional.relu, frozenset("xyz")
both = fingerprint(lambda n: even(n) or odd(n))  # whichever is read first, it calls the other
print(*map(structure, nets), fingerprint(*things, lambda x: {1, 2, "x"} and x), both)
"""


def test_what_enums_and_locks_of_a_class_keep_does_not_count():
    """Seen before: a flag's combinations, which Python keeps once they are asked for, did."""

    class Sides(Flag):
        LEFT, RIGHT = 1, 2

    class Locks:
        _locks = {"a": Lock()}  # noqa: RUF012

    before = fingerprint(Sides.LEFT), fingerprint(Locks())
    assert (Sides.LEFT | Sides.RIGHT).value == 3
    Locks._locks["b"] = Lock()
    assert (fingerprint(Sides.LEFT), fingerprint(Locks())) == before


def test_another_process_finds_the_same():
    """Nothing depends on addresses or on the order of sets, which change from run to run."""
    command, options = [sys.executable, "-c", SCRIPT], {"stdout": subprocess.PIPE, "text": True}
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(command, env=env | {"PYTHONHASHSEED": seed}, **options) for seed in "12"
    ]
    one, other = (process.communicate(timeout=100)[0] for process in processes)
    assert one == other
    assert len(one.split()) == 6


@dataclass
class Settings:
    size: int
    values: torch.Tensor
    _least: int = 0


class Warm(ImageTask):
    """Its rate rises for some steps."""

    def __init__(self, data, steps):
        super().__init__(data)
        self._steps = steps

    def schedule(self, progress):
        return (progress * 100 / self._steps).clamp(max=1)


def own_gradient(factor):
    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.round()

        @staticmethod
        def backward(ctx, g):
            return factor * g

    class Rounds(nn.Linear):
        def forward(self, x):
            return Rounded.apply(super().forward(x))

    return Rounds(4, 3)


def without_gradients(frozen):
    class Probe(nn.Linear):
        if frozen:

            def forward(self, x):
                with torch.no_grad():
                    return super().forward(x)
        else:

            def forward(self, x):
                return super().forward(x)

    return Probe(4, 3)


def choice(power):
    class Distance(Enum):
        MAIN = "main"

        def __call__(self, x):
            return x.abs() ** power

    return Distance.MAIN


class Plain:
    def __init__(self, **attributes):
        vars(self).update(attributes)


class Slotted:
    __slots__ = ("a",)

    def __init__(self, a):
        self.a = a


class Extended(Slotted):
    """Has attributes of its own, too."""


class Linked:
    def __init__(self):
        self.self = self


def with_table(kind):
    class Weighs:
        _weights = kind

        def loss(self, x):
            return x * self._weights["a"]

    return Weighs()


def with_setter(step):
    class Rates:
        rate = property(None, step)

    return Rates()


def closing_over(value):
    return lambda x: x + value


def loss_one(x):
    return x.square().mean()


def loss_two(x):
    return x.abs().mean()


def calls(function):
    return lambda x: function(x) + 1


def through_module(factor, unread=0):
    """A function that reads a module of the user's own."""
    own = ModuleType("own")
    exec("def scaled(x): return x * factor", vars(own))
    own.factor, own.unread, own.own = factor, unread, own
    return eval("lambda x: own.scaled(x)", {"own": own})


class Wrapper:
    """Says of itself what a function says, as decorators do."""

    def __init__(self, function, weight):
        update_wrapper(self, function)
        self.weight = weight


class Forgiving(Plain):
    def __getattr__(self, name):
        return None


def edited_method(step):
    """A module whose method beside ``forward`` somebody edits, with the same weights."""

    class Own(nn.Linear):
        def besides(self, x):
            return step(self(x))

    torch.manual_seed(0)
    return Own(2, 3)


def with_attribute(value):
    def function(x):
        return x * function.factor

    function.factor = value
    return function


def body_reads(factor):
    """A function whose class reads a global in its body."""
    text = "def make(x):\n class Inner:\n  factor = FACTOR\n return x * Inner.factor"
    space = {"FACTOR": factor}
    exec(text, space)
    return space["make"]


def neighbours(seed):
    points = np.random.default_rng(seed).normal(size=(20, 3))
    return NearestNeighbors(algorithm="kd_tree").fit(points)


def scored_zoo(*scores):
    torch.manual_seed(0)
    return Zoo(nn.Linear(2, 2), torch.randn(2, 6), {"val_accuracy": torch.tensor(scores)})


ONE = torch.arange(6.0)
THINGS = {
    "values": (ONE, ONE + 1e-6),
    "order": (ONE, ONE.flip(0)),
    "dtype": (ONE, ONE.double()),
    "shape": (ONE, ONE.view(2, 3)),
    "number": (1, 2),
    "number and text": (1, "1"),
    "attributes": (Plain(a=1), Plain(a=2)),
    "slots": (Slotted(1), Slotted(2)),
    "slots of a base": (Extended(1), Extended(2)),
    "names": (Plain(a=1), Plain(b=1)),
    "nested": (Plain(a=[{"x": ONE}]), Plain(a=[{"x": -ONE}])),
    "dataclass": (Settings(3, ONE), Settings(3, ONE + 1)),
    "closure": (closing_over(ONE), closing_over(ONE + 1)),
    "code": (loss_one, loss_two),
    "code called": (calls(loss_one), calls(loss_two)),
    "method": (Settings(1, ONE).__eq__, Settings(2, ONE).__eq__),
    "partial": (partial(F.leaky_relu, negative_slope=0.1), partial(F.leaky_relu)),
    "own module": (through_module(2), through_module(3)),
    "library function": (F.relu, F.gelu),
    "weights": (nn.Linear(2, 3), nn.Linear(2, 3)),
    "images": (toy_data(), toy_data(per_class=41)),
    "grouping": ([[1], [2, 3]], [[1, 2], [3]]),
    "keys": ({"a": 1, "b": 2}, {"a": 2, "b": 1}),
    "default": (lambda x, a=1: x * a, lambda x, a=2: x * a),
    "constant": (lambda x: x + 1, lambda x: x + 2),
    "generator": (torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)),
    "NumPy's generator": (np.random.default_rng(0), np.random.default_rng(1)),
    "fitted estimator": (neighbours(0), neighbours(1)),
    "pattern": (re.compile("a"), re.compile("b")),
    "NumPy's function": (np.add, np.multiply),
    "wrapper": (Wrapper(loss_one, 0.0), Wrapper(loss_one, 1.0)),
    "forgiving attributes": (Forgiving(a=1), Forgiving(a=2)),
    "cached function": (cache(closing_over(1)), cache(closing_over(2))),
    "default of a dictionary": (defaultdict(closing_over(0)), defaultdict(closing_over(1))),
    "fields": (namedtuple("Pair", "a b")(1, 2), namedtuple("Pair", "a c")(1, 2)),
    "how arguments are taken": (lambda x: x, lambda *x: x),
    "attribute of a function": (with_attribute(1), with_attribute(2)),
    "global of a class inside": (body_reads(1), body_reads(2)),
    "another method of a module": (edited_method(torch.relu), edited_method(torch.tanh)),
    "gradient of a function": (own_gradient(0), own_gradient(1)),
    "steps without gradients": (without_gradients(True), without_gradients(False)),
    "method of an enum": (choice(1), choice(2)),
    "private attribute": (Settings(3, ONE, _least=1), Settings(3, ONE, _least=2)),
    "private attribute of a subclass of ours": (Warm(toy_data(), 1), Warm(toy_data(), 2)),
    "scores": (scored_zoo(1.0, 2.0), scored_zoo(2.0, 1.0)),
    "table of a class": (with_table({"a": 1.0}), with_table({"a": 2.0})),
    "set of a class": (with_table({"a"}), with_table({"b"})),
    "setter": (with_setter(lambda self, x: x), with_setter(lambda self, x: x + 1)),
}


@pytest.mark.parametrize("case", THINGS)
def test_things_are_told_apart_by_their_content(case):
    one, other = THINGS[case]
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) == fingerprint(one)


def test_what_does_not_matter_does_not_count():
    assert fingerprint(Settings(3, ONE)) == fingerprint(Settings(3, ONE.clone()))
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint(closing_over(ONE)) == fingerprint(closing_over(ONE.clone()))
    assert fingerprint(through_module(2)) == fingerprint(through_module(2, unread=1))
    assert fingerprint(ONE.view(2, 3).T) == fingerprint(ONE.view(2, 3).T.contiguous())
    assert fingerprint(toy_data()) == fingerprint(toy_data())


def test_what_a_function_imports_as_it_runs_counts(tmp_path, monkeypatch):
    """Seen before: an edited file of the user's own, and the earlier fit was loaded."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    found = []
    for factor in (2, 3, 2):
        (tmp_path / "imported_within.py").write_text(f"def loss(x):\n    return {factor} * x\n")
        sys.modules.pop("imported_within", None)
        importlib.invalidate_caches()

        def from_there(x):
            from imported_within import loss

            return loss(x)

        def by_name(x):
            import imported_within

            return imported_within.loss(x)

        def absent(x):
            import there_is_no_such_module

            return there_is_no_such_module.loss(x)

        found.append([fingerprint(function) for function in (from_there, by_name, absent)])
    assert found[0] == found[2]
    assert [a == b for a, b in zip(*found[:2], strict=True)] == [False, False, True]


@pytest.mark.parametrize("name", ["own_packages", "profile"])
def test_files_of_ones_own_count_wherever_they_lie(name, tmp_path, monkeypatch):
    """Seen before: taken for installed, for a folder's name or for that of a module of Python's."""
    folder = tmp_path / "my-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setitem(sys.modules, name, None)  # afterwards what was there, or nothing
    found = []
    for factor in (2, 3):
        (folder / f"{name}.py").write_text(f"def loss(x):\n    return {factor} * x\n")
        sys.modules.pop(name)
        importlib.invalidate_caches()
        found.append(fingerprint(importlib.import_module(name).loss))
    assert found[0] != found[1]


def test_a_module_whose_functions_name_the_module_itself_has_a_structure():
    """Seen before: a RecursionError."""

    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.steps = [lambda x: self.linear(x), torch.relu]

        def forward(self, x):
            for step in self.steps:
                x = step(x)
            return x

    module = Steps()
    assert structure(module) == structure(module)


def test_what_a_trace_leaves_in_a_module_does_not_count():
    """Seen before: a RecursionError, of a cache that held a step of the trace."""

    class Caches(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.cache = nn.Linear(4, 4), None

        def forward(self, x):
            if self.cache is None or self.cache.shape[0] < x.shape[1]:
                self.cache = torch.outer(torch.arange(x.shape[1]), torch.ones(1)).cos()
            return self.linear(x) * self.cache[:, 0]

    assert structure(Caches()) == structure(Caches())


def test_cycles_end():
    assert fingerprint(Linked()) == fingerprint(Linked())


def test_an_object_may_say_itself_what_it_is():
    assert fingerprint(Plain(fingerprint="x", a=1)) == fingerprint(Plain(fingerprint="x", a=2))


class Labelled:
    """Names and numbers as a task may hold them, and what it computes of them once."""

    def __init__(self, names=("cat", "dog"), change=(1.0,), step=1):
        self.names, self.change = np.array(names), torch.tensor(change).add
        self.numbers = np.arange(6)[::step]

    @cached_property
    def count(self):
        return len(self.names)


def test_arrays_of_names_and_methods_of_values_count():
    kinds = Labelled(), Labelled(("cat", "cow")), Labelled(change=(2.0,)), Labelled(step=-1)
    assert len({fingerprint(kind) for kind in kinds}) == len(kinds)
    assert fingerprint(Labelled()) == fingerprint(Labelled())


def test_what_is_computed_once_and_kept_does_not_count():
    used, task = Labelled(), Warm(toy_data(), 2)
    assert used.count == 2
    task.batch([Recipe(0, 1)], None, 0)  # keeps an order
    assert task._orders._kept
    assert fingerprint(used, task) == fingerprint(Labelled(), Warm(toy_data(), 2))


class Lazy:
    """Loads what it needs when it is needed, one thread at a time."""

    def __init__(self):
        self._lock, self._loaded = Lock(), None

    def load(self):
        with self._lock:
            self._loaded = torch.ones(3)


def test_caches_and_locks_in_private_attributes_do_not_count():
    lazy = Lazy()
    lazy.load()
    assert fingerprint(lazy) == fingerprint(Lazy())


def test_hooks_count():
    plain, hooked = mlp(nn.ReLU()), mlp(nn.ReLU())
    hooked[1].register_forward_hook(lambda module, inputs, output: 3 * output)
    assert structure(plain) != structure(hooked)
    with pytest.raises(ValueError, match="layer '1' has _forward_hooks"):
        Zoo.from_modules([plain, hooked])


def test_docstrings_do_not_count():
    def silent(x):
        return x + 1

    def told(x):
        """One more."""
        return x + 1

    told.__qualname__ = told.__name__ = silent.__qualname__
    assert fingerprint(silent) == fingerprint(told)


def test_what_differs_between_parametrised_layers_is_no_name():
    """Seen before: "it is a ParametrizedLinear, not a ParametrizedLinear"."""
    norm = nn.utils.parametrizations.spectral_norm
    torch.manual_seed(0)
    one, other = (norm(nn.Linear(4, 3)).eval() for _ in range(2))
    assert difference(one, other) == "in shapes, ties, buffers or the steps of forward"


class Held(nn.Module):
    """A layer and whatever is given."""

    def __init__(self, held):
        super().__init__()
        self.layer, self.norm, self.held = nn.Linear(3, 3), nn.BatchNorm1d(3), held

    def forward(self, x):
        return self.norm(self.layer(x))


class Secretive:
    """Keeps what it holds out of pickles."""

    def __init__(self, value):
        self.value = value

    def __getstate__(self):
        return {}


def doubled(self, x):
    return 2 * self.norm(self.layer(x))


def tripled(self, x):
    return 3 * self.norm(self.layer(x))


def with_forward(function):
    module = Held(0)
    module.forward = function.__get__(module)
    return module


def test_templates_tell_all_but_values_apart():
    """Each is a kind of its own; another net of a kind has the same, whatever it learned."""
    tripled.__name__ = doubled.__name__  # a pickle has methods by their names
    tied = Held(0)
    tied.held = tied.layer.weight
    kinds = {
        "number": lambda: Held(1),
        "another number": lambda: Held(2),
        "no number": lambda: Held(True),
        "tensor": lambda: Held(torch.ones(2)),
        "other values": lambda: Held(torch.zeros(2)),
        "array": lambda: Held(np.ones(2)),
        "names": lambda: Held(["a", {"b": np.arange(3)}]),
        "layer": lambda: Held(nn.LeakyReLU(0.1)),
        "another slope": lambda: Held(nn.LeakyReLU(0.2)),
        "function": lambda: Held(doubled),
        "another function": lambda: Held(tripled),
        "class": lambda: Held(Held),
        "another class": lambda: Held(Secretive),
        "method": lambda: with_forward(doubled),
        "another method": lambda: with_forward(tripled),
        "frozen": lambda: Held(0).requires_grad_(False),
        "double": lambda: Held(0).double(),
        "tied": lambda: copy.deepcopy(tied),
    }
    found = {name: {template(make()) for _ in range(2)} for name, make in kinds.items()}
    assert [name for name, of in found.items() if len(of) > 1 or None in of] == []
    assert len(set.union(*found.values())) == len(kinds)
    used = Held(1).train()
    used(torch.randn(5, 3))
    assert template(used) == template(Held(1))  # of other weights and statistics


def test_templates_say_where_they_cannot_tell():
    held = Secretive(1), Lock(), (n for n in range(3))
    assert [template(Held(each)) for each in held] == [None] * 3
    modules = [Held(Secretive(1)), Held(Secretive(1))]
    assert len(Zoo.from_modules(modules)) == 2  # and are compared as before
