"""Whether a way of running many nets gives what plain modules give: tried on two of them.

Values, gradients and statistics of norms are compared with those of plain modules, in fp64, where
rounding switches no unit on or off. It shows what a trace can't, such as an operation that mixes
samples or has a gradient of its own.
"""

import contextlib
import copy
import warnings
from dataclasses import dataclass, replace
from threading import Lock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .architectures import name_of
from .checks import finite
from .fingerprint import fingerprint
from .folding import fill, within
from .randomness import drawn, own_randomness

LARGER = 1e3  # times the inputs, ways are compared again
TRIED = 1 << 13  # input values that show which way is right: 128 digits, 3 images of CIFAR-10


class NoDropout(TorchFunctionMode):
    """Functions that drop values at random give back what they were given."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name.endswith(("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d")):
            return args[0]
        if name == "scaled_dot_product_attention":
            args, kwargs = args[:4], {**kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)


_lock, _inside, _settings = Lock(), [], contextlib.ExitStack()


@contextlib.contextmanager
def plain_operations():
    """Transformer layers without their fused path, which has no gradient and no batching; and
    nothing said of single operations that vmap has to loop over.

    These settings are the whole process's: the first thread to come in makes them, and the last to
    leave puts back what was.
    """
    with _lock:
        if not _inside:
            mha = torch.backends.mha
            _settings.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
            mha.set_fastpath_enabled(False)
            _settings.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "There is a performance drop")
        _inside.append(None)
    try:
        yield
    finally:
        with _lock:
            _inside.pop()
            if not _inside:
                _settings.close()


@dataclass
class Trial:
    """Two nets and some samples; nets or inputs that are alike would hide much.

    ``batched`` and ``mode`` are a `Batched` and its mode, of which ways are tried by name.
    """

    batched: object
    mode: object
    rows: Tensor
    x: Tensor
    per_net: bool

    @classmethod
    def of(cls, batched, mode, rows: Tensor, x: Tensor, per_net: bool) -> "Trial | None":
        """The first two nets that are finite, if there are any, and the first samples."""
        rows = rows[finite(rows)][:2].detach().clone()
        if len(rows) == 0:
            return None
        if len(rows) == 1 or torch.equal(*rows):
            rows = torch.stack([rows[0], rows[0].flip(0)])
        noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)).to(rows)
        rows = rows.where(rows != 0, noise / 8)  # a head of zeros would hide what lies before it
        x = (x[0] if per_net else x).detach()
        x = x[: max(3, TRIED // x[0].numel())].clone()
        if (x == x[:1]).all():  # samples alike, such as one alone, hide what mixes them
            x = torch.cat([x, _others(x)])
        x = torch.stack([x, _others(x)]) if per_net else x
        return cls(batched, mode, rows, x, per_net)

    def exact(self) -> "Trial":
        """The same in fp64 if the module can that, else itself."""
        try:
            rows, x = self.rows.double(), self.x.double() if self.x.is_floating_point() else self.x
            trial = replace(self, mode=self.batched._mode(rows, self.mode.training), rows=rows, x=x)
            trial.run("loop")
        except Exception:  # the user's code may know one dtype only, and so may a device
            return self
        return trial

    def seeded(self, call, *args, seed: int = 1) -> tuple:
        """What a call gives whose random numbers start from ``seed``, and whether it draws any."""
        with own_randomness(seed, [self.x.device] * self.x.is_cuda):
            before = drawn()
            return call(*args), drawn() != before

    def expected(self) -> tuple[list[Tensor | None], bool, bool]:
        """What plain modules give, whether that is random, and whether a seed gives it again."""
        found, draws = self.seeded(self.plain)
        random = draws or not self.close(self.seeded(self.plain, seed=2)[0], found)
        return found, random, not random or self.close(self.seeded(self.plain)[0], found)

    def agrees(self, way: str, expected: list[Tensor | None], by_chance: bool) -> bool:
        """Whether a way gives what is expected; if that is random, something of its kind."""
        found = self.run(way)
        if by_chance:
            pairs = list(zip(found, expected, strict=True))[:2]
            return all(a.shape == b.shape and a.isnan().all() <= b.isnan().all() for a, b in pairs)
        return self.close(found, expected) and (way != "interpreted" or self.larger_agree(way))

    def larger_agree(self, way: str) -> bool:
        """Whether a way gives what plain modules do for larger inputs: thresholds lie out of reach.

        True for what can't be told: other precisions, places of a table, modules that know no such
        inputs.
        """
        steps = {getattr(node.target, "__name__", node.target) for node in self.mode.graph.nodes}
        if self.x.dtype != torch.double or steps & {"long", "int", "one_hot", "gather"}:
            return True
        larger = replace(self, x=self.x * LARGER)
        try:
            expected = larger.plain()
        except Exception:  # the user's code
            return True
        return larger.close(larger.run(way), expected)

    def run(self, way: str) -> list[Tensor | None]:
        """Outputs [2, B, ...], their gradient [2·P], in training the norms' statistics [2, Q]."""
        rows = self.rows.clone().requires_grad_()
        out, running = self._answer(way, rows, self.x)
        return [out.detach(), _gradient(out, [rows]), running]

    def _answer(self, way: str, rows: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        running = self.batched.initial_running(2).to(rows)  # of none unless in training
        return getattr(self.mode, way)(self.batched.views(rows, running), x, self.per_net), running

    @plain_operations()
    def plain(self) -> list[Tensor | None]:
        """What `run` gives, of modules with parameters of their own."""
        layout, statistics, outputs = self.batched.layout, self.batched.running, []
        modules = [copy.deepcopy(self.mode.module).requires_grad_() for _ in self.rows]
        for n, (module, state) in enumerate(zip(modules, layout.unpack(self.rows), strict=True)):
            fill(module, state)
            outputs.append(module((self.x[n] if self.per_net else self.x).clone()))
        out, named = torch.stack(outputs), [dict(module.named_parameters()) for module in modules]
        self._check_own(outputs, {p for of in named for p in of.values()})
        gradient = _gradient(out, [of[name] for of in named for name in layout.names])
        running = statistics.pack([m.state_dict() for m in modules]) if statistics.size else None
        return [out.detach(), gradient, running]

    def _check_own(self, outputs: list[Tensor], own: set[Tensor]) -> None:
        """Raise ValueError if copies' answers depend on the module they are copies of, or no own.

        Theirs is what both use that has the values of the module, or the shape of what none uses.
        """
        one, other = map(_leaves, outputs)
        unused = {p.shape for p in own - one - other}
        given = list(self.mode.module.parameters())
        foreign = any(p.shape in unused for p in (one | other) - own)
        if foreign or any(torch.equal(p.to(q), q) for p in (one & other) - own for q in given):
            what = f"copies of a {name_of(self.mode.module)} use parameters of the first"
            raise ValueError(f"{what}: a function that it holds, such as a lambda, names its parts")
        if not (one | other) & own:
            drawn = (torch.Generator().manual_seed(seed) for seed in range(4))
            size = self.rows.shape  # large rows, as steps may be flat over a wide range
            rows = [1e3 * torch.randn(size, generator=each).to(self.rows) for each in drawn]
            found = [self._answer("loop", each, self.x)[0] for each in rows]
            if all(torch.equal(found[0], answers) for answers in found):
                what = f"a {name_of(self.mode.module)} answers without its parameters"
                raise ValueError(f"{what}: if it keeps what it made of them, give one never asked")

    def mixes_samples(self, outputs: Tensor) -> bool:
        """Whether halves of the samples have other answers alone than all have, ``outputs``."""
        try:
            halves = self.x.tensor_split(2, int(self.per_net))
            alone = torch.cat([self._answer("loop", self.rows, half)[0] for half in halves], 1)
        except Exception:  # the user's code, of which a single sample may have no statistics
            return True
        return not self.close([alone.detach()], [outputs])

    def close(self, found: list[Tensor | None], expected: list[Tensor | None]) -> bool:
        """Whether each is equal up to what the dtype can tell, see `_near`, or not expected."""
        eps, pairs = torch.finfo(self.rows.dtype).eps, zip(found, expected, strict=True)
        return all(_near(a, b, eps) for a, b in pairs if b is not None)

    def watch(self) -> None:
        """See what plain modules change as they run: inputs, or what all nets share or rows hold.

        Raises ValueError naming a buffer, number or tensor that changes, or saying that parameters
        do. Of tensors that training leaves behind only those count that later answers depend on.
        """
        rows, x = self.rows.clone(), self.x.clone()
        module, alone = copy.deepcopy(self.mode.module), copy.copy(self.mode)
        alone.idle, alone.changes_inputs = {False: [module]}, False  # which no other thread runs
        before = _held(module) | {"parameters": fingerprint(rows)}
        replace(self, mode=alone)._answer("loop", rows, x)
        self.mode.changes_inputs = x._version > 0
        after = _held(module) | {"parameters": fingerprint(rows)}
        changed = [name for name, value in after.items() if value != before.get(name, value)]
        if changed := changed or (self._remembered(module) if self.mode.training else []):
            what = f"{name_of(module)} changes its {changed[0]!r} as it runs, one for all nets"
            cure = "count outside of it, or hold what a net keeps in a norm of PyTorch's"
            raise ValueError(f"{what}: {cure}")

    def _remembered(self, module: nn.Module) -> list[str]:
        """The tensors that training left changed in a module, if evaluation depends on them."""
        fresh, x = copy.deepcopy(self.mode.module), self.x[0] if self.per_net else self.x
        try:
            answers = [self.seeded(m.eval(), x.clone())[0].detach() for m in (module, fresh)]
            if self.close(*([each] for each in answers)):
                return []
        except Exception:  # the user's code, which may do nothing but train
            return []
        left, given = _held(module, Tensor), _held(fresh, Tensor)
        return [name for name in left if left[name] != given.get(name)] or ["state"]


def _near(a: Tensor, b: Tensor, eps: float) -> bool:
    """Equal up to rounding, in units of a column's largest value; to NaN all is.

    Columns are the last axis, such as outputs, which may be of very different sizes.
    """
    if a.shape != b.shape or b.numel() == 0:
        return a.shape == b.shape
    size, tolerance = b.abs().nan_to_num(0.0, torch.inf), max(1e-5, 2 * eps**0.5)
    column = size.amax(tuple(range(b.dim() - 1)), keepdim=True)
    limit = tolerance * (size + column) + min(tolerance, 1e3 * eps) * size.max()
    return bool(((a == b) | ((a - b).abs() <= limit) | b.isnan()).all())


def _leaves(out: Tensor) -> set[Tensor]:
    """The tensors that a gradient of ``out`` goes to."""
    steps = {out.grad_fn} - {None}
    for step in (todo := [*steps]):  # grows while it is read
        todo += (more := {before for before, _ in step.next_functions} - steps - {None})
        steps |= more
    return {step.variable for step in steps if hasattr(step, "variable")}


def _others(x: Tensor) -> Tensor:
    """Inputs like x, in another order; floats, which may be shares or numbers of things, halved."""
    if not x.is_floating_point():
        return x.roll(1, 0)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    return x.roll(1, 0) / 2 if x.any() else noise.to(x)


def _gradient(out: Tensor, of: list[Tensor]) -> Tensor:
    """The gradient of outputs, weighed by numbers of both signs, flat; NaN where there is none."""
    weights = torch.ones_like(out).flatten().cumsum(0).cos().view_as(out)
    try:
        found = torch.autograd.grad(out, of, weights, materialize_grads=True)
        return torch.cat([part.flatten() for part in found])
    except RuntimeError:  # of steps that have none
        return torch.cat([torch.full_like(p, torch.nan).flatten() for p in of])


def _held(module: nn.Module, kinds=int | float) -> dict[str, str]:
    """What buffers and numbers of all parts are, by name, but for those that count batches."""
    held = dict(module.named_buffers())
    for name, part in module.named_modules():
        found = {k: v for k, v in vars(part).items() if isinstance(v, kinds)}
        held |= {within(name, k): v for k, v in found.items()}
    return {k: fingerprint(v) for k, v in held.items() if not k.endswith("num_batches_tracked")}


def may_lie_innermost(module: nn.Module) -> bool:
    """Whether PyTorch 2.13 computes gradients with channels innermost without ruining memory.

    oneDNN writes beyond what it has in a 1×1 convolution with a stride over 2 to 7 channels, and a
    group norm of what needs no gradient itself reads what isn't there. Transposed convolutions are
    untried.
    """
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    strided = [c for c in convolutions if max(c.kernel_size) == 1 < max(c.stride)]
    untried = any(isinstance(m, nn.GroupNorm | nn.ConvTranspose2d) for m in module.modules())
    return not untried and all(c.in_channels % 8 == 0 for c in strided)
