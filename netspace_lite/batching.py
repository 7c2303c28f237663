"""Run any ``nn.Module`` for N nets at once, straight from their packed rows.

The module is traced once with ``torch.fx``. Its graph is then interpreted with activations that
carry all nets, folded **sample-major**: [B, N, C, H, W] stored as [B·N, C, H, W]. A grouped
convolution sees that memory as [B, N·C, H, W] and a batched product sees it as [N, B, I] by
stride, so neither copies, and every layer without parameters works per sample and runs unchanged.
What does not depend on the net yet (the input images) stays unfolded until the first layer with
weights. What can't be interpreted runs through ``torch.func.vmap``, and what that can't take, net
by net; either is said once, with its reason.
"""

import contextlib
import copy
import functools
import itertools
import operator
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call, vmap

from .architectures import Sine, Siren, build, describe, name_of
from .fingerprint import structure
from .folding import CONVOLUTIONS, Affine, Tracer, affine, evaluated_copy, hooks, moved, statistics
from .kernels import backend, batched_conv2d, batched_linear, siren_mlp
from .kernels.backend import use_triton
from .kernels.cpu import channels_last, nets_per_block
from .kernels.net import net
from .kernels.plan import is_plain, translate
from .layout import Layout, check_rows, one_by_one
from .randomness import drawn, own_randomness
from .trial import NoDropout, Trial, may_lie_innermost, plain_operations

BLOCK = 32  # nets evaluated together: on a CPU, blocks of 16 to 80 nets fit the caches best
NEAR = 1 << 18  # values of inputs whose activations, a few times as many, stay in the caches
VMAPPED = 1 << 20  # input values of all nets that vmap takes at a time: attention makes much of few
TOKENS = (torch.int32, torch.int64)  # inputs which a module may look up
WIDE = 64  # values that a token may become
UNLIKE = "its operations mix samples, draw at random, depend on the batch size or "
UNLIKE += "have gradients of their own"
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_NORMS = (*_BATCH_NORMS, *_INSTANCE_NORMS, nn.GroupNorm, nn.LayerNorm, Affine)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCHED = (nn.Linear, *CONVOLUTIONS, *_TRANSPOSED, *_NORMS)


class Batched:
    """``batched(rows, x)`` is what N copies of ``module`` with the parameters ``rows`` answer.

    Args of the call:
        rows: [N, P], any row stride; gradients flow to it.
        x: [B, ...] shared by all nets, or [N, B, ...] with ``per_net=True``.
        per_net: whether x's first axis is the nets.
        running: None for answers. With [N, Q], the norms' running statistics (Q = 0 without any),
            the call is a step of training: dropout drops, each net's batch norms see its own
            batch, and ``running`` is updated in place.

    Returns [N, B, ...]. Equal to a loop over the modules, values and gradients.

    Raises ValueError for inputs of another dtype or device, and where batch norms would have to
    answer without statistics: ``fold_batchnorm(module)`` first.
    """

    def __init__(self, module: nn.Module):
        self.module = evaluated_copy(module)
        self.layout = Layout.of(self.module)
        self.running = _statistics_layout(self.module)
        self._modes: dict[tuple, _Mode] = {}
        # of training, per_net and axes of inputs: the way, and whether it `mixes_samples`
        self._ways: dict[tuple[bool, bool, int], tuple[str, bool]] = {}
        stock = build(describe(self.module)) if type(self.module) is Siren else None
        self._is_siren = stock is not None and structure(stock) == self.fingerprint

    def check_trainable(self) -> None:
        """Raise ValueError if some parameters are frozen: rows are trained as a whole."""
        if len({p.requires_grad for p in self.module.parameters()}) > 1:
            raise ValueError("some parameters are frozen, all would be trained: make them buffers")

    def check_constants(self, state: dict[str, Tensor]) -> None:
        """Raise ValueError if a state dict holds what no row can: other buffers, untied weights."""
        own, first = self.module.state_dict(keep_vars=True), {}
        tied = {name: first.setdefault(id(value), name) for name, value in own.items()}
        if more := state.keys() - own.keys():
            what = f"state dicts hold {sorted(more)[:3]}, too: they are of another architecture"
            raise ValueError(f"{what}, or have batch norms, and fold_batchnorm takes modules")
        for name in state.keys() - set(self.layout.names):
            wanted = own[name] if tied[name] == name else state.get(tied[name])
            if isinstance(wanted, Tensor) and not _same_constant(state[name], wanted):
                what = f"a state dict has another {name!r} than a {name_of(self.module)}"
                raise ValueError(f"{what}, which is the same in all nets of one architecture")

    @functools.cached_property
    def fingerprint(self) -> str:
        """What the module computes of its parameters, see `structure`."""
        return structure(self.module)

    def way(self, training=False, per_net=False, axes: int | None = None) -> str | None:
        """Either "interpreted", "vmap" or "loop"; None before the first call of that kind.

        Inputs of other ``axes`` are tried anew; None: of those tried last.
        """
        wanted, ways = (training, per_net), self._ways.copy()  # other threads add to them
        found = (w for k, (w, _) in ways.items() if k[:2] == wanted and axes in (None, k[2]))
        return [None, *found][-1]

    def mixes_samples(self, rows: Tensor, x: Tensor, per_net: bool = False) -> bool:
        """Whether answers to a sample depend on the others, as with a batch norm's own batch."""
        if not (self._is_siren or self.running.size or self.way(False, per_net, x.dim())):
            self._choose(self._mode(rows, False), rows, x, per_net)
        return self._ways.get((False, per_net, x.dim()), ("", False))[1]

    def initial_running(self, nets: int) -> Tensor:
        """Running statistics [N, Q] as the module has them, one copy a net."""
        buffers = dict(self.module.named_buffers())
        values = [buffers[name] for name in self.running.names] or [torch.empty(0)]
        return torch.cat(values).repeat(nets, 1)

    def __call__(self, rows: Tensor, x: Tensor, per_net: bool = False, running=None) -> Tensor:
        check_rows(rows, self.layout.size)
        check_inputs(rows, x, per_net)
        if self._is_siren and x.dim() == 2 + per_net:  # not points in groups
            return siren_mlp(x, rows, self.module.config["hidden"], self.module.config["omega"])
        if self.running.size and running is None:
            why = f"the rows of a {name_of(self.module)} have no batch norms' statistics"
            raise ValueError(f"{why}: fold_batchnorm(module) first, or train with running=[N, Q]")
        mode = self._mode(rows, running is not None)
        way = self.way(mode.training, per_net, x.dim()) or self._choose(mode, rows, x, per_net)
        whole = way == "interpreted" and use_triton(rows) and not x.requires_grad
        if whole and (plan := mode.plan(self.layout, x.shape[1 + per_net :])):
            return net(x.flatten(1 + per_net), rows, plan)  # small: one launch, and one backward
        own, run = x[0] if per_net else x, getattr(mode, way)
        step = max(1, VMAPPED // own.numel()) if way == "vmap" else nets_per_block(own)
        if way == "loop" or step >= len(rows) or (way != "vmap" and rows.device.type != "cpu"):
            return run(self.views(rows, running), x, per_net)
        if step < 2 and way == "interpreted":  # each net fills the caches alone
            alone = mode.innermost if mode.may_reorder else mode.loop
            return alone(self.views(rows, running), x, per_net)
        inputs = x.split(step) if per_net else itertools.repeat(x)
        states = itertools.repeat(None) if running is None else running.split(step)
        blocks = zip(rows.split(step), states, inputs, strict=False)
        return torch.cat([run(self.views(r, state), i, per_net) for r, state, i in blocks])

    def _mode(self, rows: Tensor, training: bool) -> "_Mode":
        key = training, rows.device, rows.dtype
        if key not in self._modes:
            # without inference mode, or its constants never have gradients
            with torch.inference_mode(False), own_randomness():
                self._modes[key] = _Mode(self.module, training, rows)
        return self._modes[key]

    def views(self, rows: Tensor, running: Tensor | None) -> dict[str, Tensor]:
        """All nets' tensors by name, [N, ...] each."""
        views = self.layout.views(rows)
        return views if running is None else views | self.running.views(running)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _choose(self, mode: "_Mode", rows: Tensor, x: Tensor, per_net: bool) -> str:
        """The fastest way that gives what plain modules give, see `Trial`.

        Dropout is off meanwhile. What is random all the same can't be compared: that is vmap's.
        Raises ValueError where no way gives it.
        """
        trial, reasons, way = Trial.of(self, mode, rows, x, per_net), [], "loop"
        if trial is None:  # nets that aren't finite show nothing: the next call looks again
            return way
        with own_randomness(devices=[x.device] * x.is_cuda), backend("torch"), NoDropout():
            try:
                trial.watch()
                trial = trial.exact()
                expected, random, known = trial.expected()
            except (torch.OutOfMemoryError, NotImplementedError):
                raise
            except (RuntimeError, IndexError, TypeError) as error:  # of shapes, tokens, arguments
                what = f"{name_of(self.module)} can't take inputs {list(x.shape)} of {x.dtype}"
                raise ValueError(f"{what}: {error}") from error
            if not expected[0].isfinite().all():
                return way
            mixing = random or (not mode.training and trial.mixes_samples(expected[0]))
            if known and not trial.close(trial.seeded(trial.run, "loop")[0], expected):
                what = f"{name_of(self.module)} has other answers or gradients with parameters that"
                cure = "does it keep some in a list, or compute parts anew for the gradient?"
                raise ValueError(f"{what} it is handed than with its own: {cure}")
            for way in ("interpreted", "vmap"):
                reason, by_chance = UNLIKE, random and mode.training and way == "vmap"
                try:
                    if trial.agrees(way, expected, by_chance):
                        break
                except _Mixed:
                    mixing = True
                except Exception as error:  # the user's code runs on what it never expected
                    reason = str(error).partition("\n")[0] or repr(error)
                reasons.append(reason)
            else:
                way = "loop"
            if way == "interpreted" and may_lie_innermost(self.module):
                with contextlib.suppress(Exception):  # the user's, who may read memory as it lies
                    mode.may_reorder = trial.close(trial.run("innermost"), expected)
        if reasons:
            how = "one net after the other" if way == "loop" else "through torch.func.vmap"
            text = f"{name_of(self.module)} runs {how}, which is slower: {'; '.join(reasons)}"
            warnings.warn(text, stacklevel=4)
        self._ways[mode.training, per_net, x.dim()] = way, mixing
        return way


def check_inputs(rows: Tensor, x: Tensor, per_net: bool) -> None:
    """Raise ValueError unless nets [N, P] can be asked about inputs x."""
    if not isinstance(x, Tensor):
        raise ValueError(f"inputs are a {type(x).__name__}: give a tensor")
    if x.device != rows.device or not (x.dtype in TOKENS or x.dtype == rows.dtype):
        given, nets = f"{x.dtype} on {x.device}", f"{rows.dtype} on {rows.device}"
        cure = "convert one of them with .to(), and tokens to int64"
        raise ValueError(f"inputs are {given}, nets are {nets}: {cure}")
    if per_net and len(x) != len(rows):
        raise ValueError(f"per-net inputs {list(x.shape)} should start with {len(rows)} nets")
    if x.dim() < 1 + per_net or x.numel() == 0:
        raise ValueError(f"inputs {list(x.shape)} hold no samples: give at least one")


def _same_constant(found: Tensor, wanted: Tensor) -> bool:
    """Whether two are alike up to what halves round; a count, such as of batches, may be any."""
    if wanted.dim() == 0 and not wanted.is_floating_point():
        return True
    found, wanted = (t.cpu().double() for t in (found, wanted))
    rounded = {"rtol": 4e-3, "atol": 1e-6, "equal_nan": True}
    return found.shape == wanted.shape and torch.allclose(found, wanted, **rounded)


def samples_per_block(inputs: Tensor) -> int:
    """How many of one net's inputs [B, ...] to evaluate together where no gradient is wanted.

    ResNet8 answers 85 CIFAR images at a time twice as fast as 4,096, on a CPU.
    """
    values = inputs[0].numel() * (WIDE if inputs.dtype in TOKENS else 1)
    near = NEAR // values if inputs.device.type == "cpu" else 4096
    return min(4096, max(32, near))


def _statistics_layout(module: nn.Module) -> Layout:
    """Where the running statistics of all norms live in a row of their own."""
    shapes = {}
    for name, norm in statistics(module).items():
        if norm.momentum is None:
            raise ValueError(f"norm {name!r} averages all its batches: give it a momentum")
        for statistic in ("running_mean", "running_var"):
            shapes[f"{name}.{statistic}".lstrip(".")] = tuple(norm.running_mean.shape)
    return Layout(tuple(shapes), tuple(shapes.values()))


class _Mode:
    """A module in training or evaluation on one device in one dtype: its graph and ways to run it.

    Each way takes ``views``, all nets' tensors [N, ...] by name, and x; it returns [N, B, ...].
    """

    def __init__(self, module: nn.Module, training: bool, like: Tensor):
        self.module, self.training = copy.deepcopy(module).train(training), training
        self.may_reorder = False  # whether images can have their channels innermost
        self.changes_inputs = True  # whether steps in place may change the caller's
        # A bare layer has a name in it, and options are left out. Tracing leaves proxies behind.
        root, before = nn.Sequential(copy.deepcopy(self.module)), drawn()
        try:
            graph = _Tracer().trace(root)
            self.overwriting = _overwriting(graph, root)
            self.graph = _fused(graph, root)
            if drawn() != before:
                self.graph = "a trace would keep what it draws at random"
            if any(map(hooks, self.module.modules())):  # whose layers a graph may never call
                self.graph = "it has hooks, or a forward put in, which take one net's tensors"
        except Exception as error:  # tracing runs the user's code on proxies
            self.graph = f"it can't be traced ({str(error).partition(chr(10))[0]})"
        self.parts, self.plans, first = dict(root.named_modules()), {}, {}
        every = {"remove_duplicate": False}
        tensors = *root.named_parameters(**every), *root.named_buffers(**every)
        # A tensor that is tied has several names in the module, and the first of them in the views.
        self.names = {n: first.setdefault(id(t), n.removeprefix("0.")) for n, t in tensors}
        moved(root, like), moved(self.module, like)
        self.interpreter = None if isinstance(self.graph, str) else _Interpreter(self)
        self.idle = {False: [], True: []}  # copies of the module that no call is running
        self.buffers = {name for name, _ in self.module.named_buffers()}

    def interpreted(self, views: dict[str, Tensor], x: Tensor, per_net: bool) -> Tensor:
        """Through the graph, all nets at once."""
        if isinstance(self.graph, str):
            raise TypeError(self.graph)
        nets = len(next(iter(views.values())))
        if self.training and not per_net:  # each net drops its own
            x, per_net = x.expand(nets, *x.shape), True
        x, own = self._own(x), copy.copy(self.interpreter)  # of this call: threads share a mode
        own.views, own.nets, own.samples = views, nets, x.shape[per_net]
        return own.run(_Many(x.transpose(0, 1), nets) if per_net else x)

    def plan(self, layout: Layout, sample: torch.Size):
        """How `net` takes samples of this shape through the graph; None if it can't."""
        if sample not in self.plans:
            at = dict(zip(layout.names, layout.offsets, strict=True))
            weights = {name: at.get(view) for name, view in self.names.items()}
            self.plans[sample] = translate(self.graph, self.parts, weights, layout.size, sample)
        return self.plans[sample]

    def _own(self, x: Tensor) -> Tensor:
        return x.clone() if self.changes_inputs else x

    @contextlib.contextmanager
    def a_copy(self, sparing=False):
        """The module for one call: it is handed parameters meanwhile, and threads share a mode.

        A ``sparing`` one's activations write over what nothing else reads.
        """
        try:
            module = self.idle[sparing].pop()
        except IndexError:
            with torch.inference_mode(False):  # as in `_mode`
                module = copy.deepcopy(self.module)
            for name in self.overwriting if sparing else ():
                module.get_submodule(name).inplace = True
        yield module
        self.idle[sparing].append(module)

    @plain_operations()
    def vmap(self, views: dict[str, Tensor], x: Tensor, per_net: bool) -> Tensor:
        """Through PyTorch's own batching."""
        if any(getattr(part, "padding_idx", None) is not None for part in self.module.modules()):
            raise TypeError("vmap would train the padding of embeddings")
        if any("backward" in kind for part in self.module.modules() for kind in hooks(part)):
            raise TypeError("vmap passes over hooks on gradients")
        with self.a_copy() as module:
            one_net, axes = functools.partial(functional_call, module), (0, 0 if per_net else None)
            # a norm's updates of strided statistics would be lost
            own = views | {name: views[name].clone() for name in self.buffers & views.keys()}
            outputs = vmap(one_net, axes, randomness="different")(own, self._own(x))
            for name in self.buffers & views.keys():
                views[name].copy_(own[name])
            return outputs

    @plain_operations()
    def loop(self, views: dict[str, Tensor], x: Tensor, per_net: bool, sparing=False) -> Tensor:
        """One net after the other, as its plain module."""
        nets = zip(one_by_one(views), x if per_net else itertools.repeat(x), strict=False)
        with self.a_copy(sparing) as module:
            outputs = [functional_call(module, state, self._own(x)) for state, x in nets]
        if not isinstance(outputs[0], Tensor):
            what = f"{name_of(self.module)} returns a {type(outputs[0]).__name__}"
            raise ValueError(f"{what}, not one tensor: wrap it in a module that picks the tensor")
        return torch.stack(outputs)

    def innermost(self, views: dict[str, Tensor], x: Tensor, per_net: bool) -> Tensor:
        """`loop` over images whose channels lie innermost, which a CPU convolves fastest.

        New memory for what an activation makes took a tenth of ResNet8's step: it spares that.
        """
        images = (channels_last(own) for own in x) if per_net else channels_last(x)
        return self.loop(views, images, per_net, sparing=True)


class _Tracer(Tracer):
    """Layers that carry many nets and what has no parameters are single steps, identities none."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        plain = next(module.parameters(), None) is None and type(module) is not nn.Identity
        return plain or type(module) in _BATCHED


def _fused(graph: fx.Graph, root: nn.Sequential) -> fx.Graph | str:
    """The graph of what is in ``root``, with activations in their layers.

    If it has a step that no batched layer knows, what is said of that.
    """
    for node in reversed(list(graph.nodes)):
        named = node.op in ("get_attr", "call_module")
        part = operator.attrgetter(node.target)(root) if named else None
        if isinstance(part, nn.Parameter):
            return f"it reads {node.target[2:]!r} outside layers of many nets"
        if getattr(part, "padding_mode", "zeros") != "zeros":
            return f"{part} pads in a way that no batched layer knows"
        if len(node.users) == 1 and (user := next(iter(node.users))).op == "call_module":
            node.meta["fused"] = _fusable(part, root.get_submodule(user.target))
            if node.meta["fused"]:
                user.replace_all_uses_with(node)
                graph.erase_node(user)
    return graph


def _overwriting(graph: fx.Graph, root: nn.Sequential) -> list[str]:
    """The activations, by name, that can write over what they are given wherever they are called.

    That is what a layer or a sum has made, which no gradient needs, and nothing else reads. Layers
    and sums read the result: other steps might write over it in turn.
    """
    calls, found = [node for node in graph.nodes if node.op == "call_module"], {}
    plain = {node for node in calls if type(root.get_submodule(node.target)) in _BATCHED}
    plain |= {node for node in graph.nodes if node.target is operator.add}
    for node in calls:
        part, sources = root.get_submodule(node.target), node.all_input_nodes
        if type(part) in (nn.ReLU, nn.LeakyReLU) and getattr(part, "negative_slope", 1) > 0:
            able = plain.issuperset(sources) and plain.issuperset(node.users)
            able = able and all(len(source.users) == 1 for source in sources)
            found[node.target] = able and found.get(node.target, True)
    return [name.removeprefix("0").removeprefix(".") for name, able in found.items() if able]


def _fusable(layer: nn.Module | None, activation: nn.Module) -> dict:
    """The kernels' options for ``activation`` right after ``layer``; none if it stays a step."""
    linear = isinstance(layer, nn.Linear)
    if type(activation) is nn.LeakyReLU and (linear or is_plain(layer)):
        return {"activation": "leaky_relu", "slope": activation.negative_slope}
    if type(activation) is Sine and linear:
        return {"activation": "sine", "omega": activation.omega}
    return {}


class _Mixed(ValueError):
    """A step takes samples together, and with them nets."""


class _Many:
    """A value of all nets and samples: [B, N, ...], or [B·N, ...] once a step has asked for that.

    What a layer returns stays apart, in whatever order it lies in memory, for the next layer.
    """

    def __init__(self, value, nets: int, folded: bool = False):
        self.value, self.nets, self.is_folded = value, nets, folded

    @property
    def apart(self) -> Tensor:
        """[B, N, ...]."""
        return self.value.unflatten(0, (-1, self.nets)) if self.is_folded else self.value

    @property
    def folded(self):
        """[B·N, ...], or what is no tensor as it is. Kept, for steps that work in place."""
        if not self.is_folded:
            self.value, self.is_folded = self.value.flatten(0, 1), True
        return self.value


class _Interpreter(fx.Interpreter):
    """Passes through a graph; values are tensors that all nets share, or `_Many`.

    Each pass is a copy's, which is given ``views`` of all tensors and the number of ``nets``.
    """

    def __init__(self, mode: _Mode):
        super().__init__(mode.parts[""], False, mode.graph)  # keeping all values
        self.names, self.constant, nodes = mode.names, set(), mode.graph.nodes
        for node in nodes:  # moved to where an input is, they are constants still
            moved = node.op == "call_method" and node.target in ("to", "type_as")
            made = node.args[:1] if moved else node.all_input_nodes
            if node.op == "get_attr" or (made and self.constant.issuperset(made)):
                self.constant.add(node)
        self.needed = {n for n in nodes if n.op == "output" or self._works_in_place(n)}
        for node in reversed(nodes):  # what is kept by nobody is not
            self.needed |= set(node.all_input_nodes) if node in self.needed else set()
        self.extra_traceback = False  # errors stay as they are

    def run_node(self, node: fx.Node):
        """The value of a node; of the last one outputs [N, B, ...]."""
        module = self.submodules[node.target] if node.op == "call_module" else None
        if node.op == "output":
            return self._many(node.args[0]).apart.transpose(0, 1)
        if type(module) in _BATCHED:
            return _Many(self._layer(node, module), self.nets)
        return self._plain(node, module)

    def _many(self, node: fx.Node) -> _Many:
        """The value of ``node``, repeated if all nets share it."""
        value = self.env[node]
        if isinstance(value, Tensor):
            return _Many(value.unsqueeze(1).expand(-1, self.nets, *value.shape[1:]), self.nets)
        return value if isinstance(value, _Many) else _Many(value, self.nets, folded=True)

    def _of(self, node: fx.Node, *names: str) -> list[Tensor | None]:
        """All nets' tensors of a layer, [N, ...] each, or None where the layer has none."""
        layer, found = self.submodules[node.target], []
        for name in names:
            view = self.views.get(self.names.get(f"{node.target}.{name}"))
            same = getattr(layer, name, None) if view is None else None  # of a frozen layer
            found.append(view if same is None else same.expand(self.nets, *same.shape))
        return found

    def _layer(self, node: fx.Node, layer: nn.Module) -> Tensor:
        """Outputs [B, N, ...] of a layer with weights."""
        source, weights = node.args[0], self._of(node, "weight", "bias")
        if type(layer) in _NORMS:
            return self._norm(node, layer, self._many(source).apart, *weights)
        value, fused = self.env[source], node.meta.get("fused", {})
        many = isinstance(value, _Many)
        value = value.apart if many else value
        if isinstance(layer, nn.Linear):
            value = value.transpose(0, 1) if many else value
            samples = value.shape[many:-1]  # tokens count as samples
            out = batched_linear(value.flatten(int(many), -2), *weights, **fused)
            return out.unflatten(1, samples).transpose(0, 1)
        if is_plain(layer):
            return batched_conv2d(value, *weights, layer.stride, layer.padding, **fused)
        return _grouped_conv(self._many(source).apart, *weights, layer)

    def _norm(self, node: fx.Node, layer: nn.Module, x: Tensor, weight, bias) -> Tensor:
        """A norm of x [B, N, C, ...] as one of N·C channels: each net has its own statistics."""
        if isinstance(layer, nn.LayerNorm):
            x = F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
            at = slice(None), *(None,) * (x.dim() - 2 - len(layer.normalized_shape))
            for view, apply in ((weight, torch.mul), (bias, torch.add)):
                x = x if view is None else apply(x, view[at])
            return x
        weight, bias = (None if view is None else view.flatten() for view in (weight, bias))
        channels = x.flatten(1, 2)
        if isinstance(layer, Affine):
            out = affine(channels, weight, bias)
        elif isinstance(layer, nn.GroupNorm):
            out = F.group_norm(channels, self.nets * layer.num_groups, weight, bias, layer.eps)
        else:
            views = [v for v in self._of(node, "running_mean", "running_var") if v is not None]
            running = [view.clone().flatten() for view in views] or [None, None]
            norm = F.batch_norm if isinstance(layer, _BATCH_NORMS) else F.instance_norm
            out = norm(channels, *running, weight, bias, True, layer.momentum or 0.0, layer.eps)
            if norm is F.instance_norm and out.requires_grad:  # its backward reads others wrongly
                out.register_hook(Tensor.contiguous)
            for view, updated in zip(views, running, strict=False):
                view.copy_(updated.view_as(view))
        return out.unflatten(1, (self.nets, -1))

    def _plain(self, node: fx.Node, module: nn.Module | None):
        """A step without parameters: unchanged, on shared or on folded values."""
        values = {source: self.env[source] for source in node.all_input_nodes}
        many = any(isinstance(value, _Many) for value in values.values())
        if type(module) is nn.Flatten and many and (module.start_dim, module.end_dim) == (1, -1):
            return _Many(self._many(node.args[0]).apart.flatten(2), self.nets)  # copies nothing
        if many:  # constants stay as they are
            varying = [source for source in values if source not in self.constant]
            if self._works_in_place(node):  # on memory of its own, not on a layer's output
                changed = self._many(varying[0])
                changed.value = changed.folded.clone()
            values |= {source: self._many(source).folded for source in varying}
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.get)
        value = getattr(self, node.op)(node.target, args, kwargs)
        if node in self.constant or not many:
            return value
        if node in self.needed and any(self._carries(values[source]) for source in varying):
            parts = value if isinstance(value, tuple) else (value,)
            if not all(self._carries(part) for part in parts if isinstance(part, Tensor)):
                raise _Mixed(f"{node.name} takes samples together")
        return _Many(value, self.nets, folded=True)

    def _carries(self, value) -> bool:
        """Whether a tensor has a place for each net and sample; a threshold may hide that not."""
        many = self.nets * self.samples
        return isinstance(value, Tensor) and any(size % many == 0 for size in value.shape)

    def _works_in_place(self, node: fx.Node) -> bool:
        module = self.submodules[node.target] if node.op == "call_module" else None
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        flags = getattr(module, "inplace", False), node.kwargs.get("inplace"), *node.args[1:]
        return any(flag is True for flag in flags) or (module is None and name.endswith("_"))


def _grouped_conv(x: Tensor, weight: Tensor, bias: Tensor | None, layer: nn.Module) -> Tensor:
    """Any other convolution of x [B, N, C, ...] by PyTorch alone, nets as groups."""
    kind, names = "conv", ["stride", "padding", "dilation"]
    if layer.transposed:
        kind, names = "conv_transpose", [*names, "output_padding"]
    settings, nets = {name: getattr(layer, name) for name in names}, len(weight)
    given = x.flatten(1, 2), weight.flatten(0, 1), None if bias is None else bias.flatten()
    convolve = getattr(F, f"{kind}{weight.dim() - 3}d")
    return convolve(*given, **settings, groups=layer.groups * nets).unflatten(1, (nets, -1))
