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
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call, vmap
from torch.overrides import TorchFunctionMode

from .architectures import Sine, Siren, name_of
from .fingerprint import structure
from .folding import CONVOLUTIONS, Affine, statistics
from .kernels import backend, batched_conv2d, batched_linear, siren_mlp
from .kernels.cpu import nets_per_block
from .layout import Layout, check_rows

BLOCK = 32  # nets evaluated together: on a CPU, blocks of 16 to 80 nets fit the caches best
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_NORMS = (*_BATCH_NORMS, *_INSTANCE_NORMS, nn.GroupNorm, nn.LayerNorm, Affine)
_BATCHED = (nn.Linear, *CONVOLUTIONS, *_NORMS)


class Batched:
    """``batched(rows, x)`` is what N copies of ``module`` with the parameters ``rows`` answer.

    Args of the call:
        rows: [N, P], any row stride; gradients flow to it.
        x: [B, ...] shared by all nets, or [N, B, ...] with ``per_net=True``.
        per_net: whether x's first axis is the nets.
        running: None for answers. With [N, Q], the batch norms' running statistics (Q = 0 without
            any), the call is a step of training: dropout drops, each net's batch norms see its own
            batch, and ``running`` is updated in place.

    Returns [N, B, ...]. Equal to a loop over the modules, values and gradients.

    Raises ValueError for inputs of another dtype or device, and where batch norms would have to
    answer without statistics: ``fold_batchnorm(module)`` first.
    """

    def __init__(self, module: nn.Module):
        self.module = copy.deepcopy(module).eval()
        self.layout = Layout.of(module)
        self.running = _statistics_layout(self.module)
        self._modules = {mode: copy.deepcopy(self.module).train(mode) for mode in (False, True)}
        self._graphs = {mode: _trace(module) for mode, module in self._modules.items()}
        self._parts = {mode: dict(m.named_modules()) for mode, m in self._modules.items()}
        self._names = _first_names(self.module)
        self._ways: dict[tuple[bool, bool], str] = {}
        self._kind = None  # dtype and device that the modules' constants have
        own = type(module) is Siren and structure(Siren(**module.config))
        self._is_siren = own == self.fingerprint if own else False

    @functools.cached_property
    def fingerprint(self) -> str:
        """What the module computes of its parameters, see `structure`."""
        return structure(self.module)

    def way(self, training: bool = False, per_net: bool = False) -> str | None:
        """"interpreted", "vmap" or "loop"; None before the first call of that kind."""
        return self._ways.get((training, per_net))

    def initial_running(self, nets: int) -> Tensor:
        """Running statistics [N, Q] as the module has them, one copy a net."""
        buffers = dict(self.module.named_buffers())
        values = [buffers[name].flatten() for name in self.running.names]
        return torch.cat(values).repeat(nets, 1) if values else torch.empty(nets, 0)

    def __call__(self, rows: Tensor, x: Tensor, per_net: bool = False, running=None) -> Tensor:
        check_rows(rows, self.layout.size)
        _check_inputs(rows, x, per_net)
        if self._is_siren:
            return siren_mlp(x, rows, self.module.config["hidden"], self.module.config["omega"])
        training = running is not None
        if self.running.size and not training:
            raise ValueError(
                f"{name_of(self.module)} has batch norms, whose running statistics are not in its "
                "rows: call fold_batchnorm(module) first, or pass running=[N, Q] to train"
            )
        self._place(rows)
        way = self.way(training, per_net) or self._choose(rows, x, per_net, training)
        step = nets_per_block(x[0] if per_net else x)
        if way == "interpreted" and rows.device.type == "cpu" and step < len(rows):
            if step > 1:
                inputs = x.split(step) if per_net else itertools.repeat(x)
                states = running.split(step) if training else itertools.repeat(None)
                blocks = zip(rows.split(step), inputs, states, strict=False)
                return torch.cat([self._interpreted(r, i, per_net, s) for r, i, s in blocks])
            way = "loop"  # each net fills the caches alone
        with _plain_operations() if way != "interpreted" else contextlib.nullcontext():
            return getattr(self, f"_{way}")(rows, x, per_net, running)

    def _place(self, rows: Tensor) -> None:
        """Constants of the modules (buffers, traced tensors) where the rows are."""
        if self._kind == (rows.device, rows.dtype):
            return
        self._kind = rows.device, rows.dtype
        for part in itertools.chain(*(module.modules() for module in self._modules.values())):
            for name, value in vars(part).items():
                if isinstance(value, Tensor):
                    kind = rows.dtype if value.is_floating_point() else value.dtype
                    setattr(part, name, value.to(rows.device, kind))
        for module in self._modules.values():
            module.to(rows.device, rows.dtype)

    def _interpreted(self, rows, x, per_net, running) -> Tensor:
        graph, parts = self._graphs[running is not None], self._parts[running is not None]
        if isinstance(graph, str):
            raise TypeError(graph)
        views = self.layout.views(rows) | self._statistics(running)
        interpreter = _Interpreter(parts, graph, views, self._names, len(rows))
        return interpreter.run(x, per_net, apart=running is not None)  # each net drops its own

    def _vmap(self, rows, x, per_net, running) -> Tensor:
        module = self._modules[running is not None]

        def one_net(tensors, inputs):
            return functional_call(module, tensors, (inputs,))

        dims, tensors = (0, 0 if per_net else None), self.layout.views(rows)
        return vmap(one_net, dims, randomness="different")(tensors | self._statistics(running), x)

    def _loop(self, rows, x, per_net, running) -> Tensor:
        """One net after the other, as its plain module."""
        module, tensors = self._modules[running is not None], self.layout.unpack(rows)
        states = {name: view.unbind() for name, view in self._statistics(running).items()}
        outputs = []
        for n, parameters in enumerate(tensors):
            state = {name: values[n] for name, values in states.items()}
            outputs.append(functional_call(module, parameters | state, (x[n] if per_net else x,)))
            if not isinstance(outputs[n], Tensor):
                raise ValueError(
                    f"{name_of(module)} returns a {type(outputs[n]).__name__}, not one tensor of "
                    "outputs: wrap it in a module that picks the tensor"
                )
        return torch.stack(outputs)

    def _statistics(self, running: Tensor | None) -> dict[str, Tensor]:
        return self.running.views(running) if self.running.size and running is not None else {}

    @torch.no_grad()
    def _choose(self, rows: Tensor, x: Tensor, per_net: bool, training: bool) -> str:
        """The fastest way that gives what plain modules give, on two nets and three samples.

        Trying it shows what a trace can't, such as an operation that mixes samples. Dropout is off
        meanwhile; where training is random all the same, only shapes can be compared.
        """
        good = rows.detach()[rows.detach().isfinite().all(1)][:2]
        if len(good) == 0:
            return "loop"  # nothing can be seen on such nets; the next call looks again
        x, reasons = (x[: len(good), :3] if per_net else x[:3]).detach(), {}

        def run(way):
            running = self.initial_running(len(good)).to(good) if training else None
            out = way(good, x, per_net, running)
            return torch.cat([out.flatten(1), running], 1) if training else out

        devices = [x.device] if x.is_cuda else []
        with torch.random.fork_rng(devices), backend("torch"), _plain_operations(), _NoDropout():
            expected = run(self._loop)
            random = training and not _close(run(self._loop), expected)
            for way in ("interpreted", "vmap"):
                try:
                    found = run(getattr(self, f"_{way}"))
                    reason = "its operations mix samples or depend on the batch size"
                except Exception as error:  # the user's code runs on what it never expected
                    found, reason = None, str(error).partition("\n")[0] or repr(error)
                alike = found is not None and found.shape == expected.shape
                if alike and (random or _close(found, expected)):
                    break
                reasons[way] = reason
            else:
                way = "loop"
        for failed, reason in reasons.items():
            _announce(self.module, failed, reason)
        self._ways[training, per_net] = way
        return way


def _first_names(module: nn.Module) -> dict[str, str]:
    """For each tensor of a module the first of its names: layers that are tied share one."""
    named = [*module.named_parameters(remove_duplicate=False)]
    named += module.named_buffers(remove_duplicate=False)
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


class _NoDropout(TorchFunctionMode):
    """Functions that drop values at random give back what they were given."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name.endswith(("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d")):
            return args[0]
        if name == "scaled_dot_product_attention":
            args, kwargs = args[:4], {**kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)


@contextlib.contextmanager
def _plain_operations():
    """Transformer layers without their fused path, which has no gradient and no batching; and
    nothing said of single operations that vmap has to loop over."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _announce(module: nn.Module, way: str, reason: str) -> None:
    slower = {"interpreted": "through torch.func.vmap", "vmap": "one net after the other"}[way]
    warnings.warn(f"{name_of(module)} runs {slower}, which is slower: {reason}", stacklevel=5)


def _close(found: Tensor, expected: Tensor) -> bool:
    """Equal up to what the dtype can tell, in units of the largest value."""
    tolerance = 2 * torch.finfo(expected.dtype).eps ** 0.5
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance * scale)


def _statistics_layout(module: nn.Module) -> Layout:
    """Where the running statistics of all batch norms live in a row of their own."""
    norms = statistics(module)
    for name, norm in norms.items():
        if norm.momentum is None:
            raise ValueError(f"batch norm {name!r} averages all batches: give it a momentum")
    names = [f"{n}.{s}".lstrip(".") for n in norms for s in ("running_mean", "running_var")]
    buffers = dict(module.named_buffers())
    return Layout(tuple(names), tuple(tuple(buffers[name].shape) for name in names))


class _Tracer(fx.Tracer):
    """Layers that carry many nets and everything without parameters are single steps."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return type(module) in _BATCHED or next(module.parameters(), None) is None


def _trace(module: nn.Module) -> fx.Graph | str:
    """The module's graph, or why there is none that can carry many nets."""
    if type(module) in _BATCHED:  # the whole module is one layer
        graph = fx.Graph()
        graph.output(graph.call_module("", (graph.placeholder("x"),)))
        return graph
    try:
        graph = _Tracer().trace(module)
    except Exception as error:  # tracing runs the user's code on proxies: anything can be raised
        return f"it can't be traced ({str(error).partition(chr(10))[0]})"
    called = {n.target for n in graph.nodes if n.op == "call_module"}
    layers = {m: n for n, m in module.named_modules() if n in called and type(m) in _BATCHED}
    known = {id(p) for layer in layers for p in layer.parameters()}
    for name, parameter in module.named_parameters():
        if id(parameter) not in known:
            kinds = "linear, convolution and norm layers"
            return f"its parameter {name!r} belongs to none of the {kinds} that carry many nets"
    reads = [n.target for n in graph.nodes if n.op == "get_attr"]
    for name in dict(module.named_parameters(remove_duplicate=False)).keys() & set(reads):
        return f"it reads its parameter {name!r} outside the layer that owns it"
    for layer, name in layers.items():
        tracked = isinstance(layer, _INSTANCE_NORMS) and layer.running_mean is not None
        if tracked or getattr(layer, "padding_mode", "zeros") != "zeros":
            return f"its layer {name!r} ({layer}) has settings that no batched layer knows"
    return graph


def _check_inputs(rows: Tensor, x: Tensor, per_net: bool) -> None:
    if x.dtype != rows.dtype or x.device != rows.device:
        raise ValueError(
            f"inputs are {x.dtype} on {x.device}, nets are {rows.dtype} on {rows.device}: "
            "convert one of them with .to()"
        )
    if per_net and len(x) != len(rows):
        raise ValueError(f"per-net inputs {list(x.shape)} should start with {len(rows)} nets")
    if x.numel() == 0:
        raise ValueError(f"inputs {list(x.shape)} hold no samples: give at least one")


class _Interpreter:
    """One pass through the graph; ``folded`` remembers which values carry the nets.

    What a layer returns waits in ``apart`` as [B, N, ...], in whatever order it lies in memory, and
    goes straight into the next layer; it is folded to [B·N, ...] only if another step asks.
    """

    def __init__(self, modules, graph: fx.Graph, views: dict[str, Tensor], names, nets: int):
        self.modules, self.graph, self.nets = modules, graph, nets
        self.views, self.names = views, names
        self.values: dict[fx.Node, object] = {}
        self.apart: dict[fx.Node, Tensor] = {}
        self.folded: set[fx.Node] = set()

    def run(self, x: Tensor, per_net: bool, apart: bool) -> Tensor:
        """Outputs [N, B, ...]; with ``apart`` shared inputs are taken apart at once, not late."""
        skip = set()
        for node in self.graph.nodes:
            if node in skip:
                continue
            module = self.modules[node.target] if node.op == "call_module" else None
            if node.op == "placeholder":
                if per_net:
                    self._keep(node, x.transpose(0, 1))
                elif apart:
                    self._keep(node, x.unsqueeze(1).expand(-1, self.nets, *x.shape[1:]))
                else:
                    self.values[node] = x
            elif node.op == "output":
                return self._apart(node.args[0]).transpose(0, 1)
            elif type(module) in _NORMS:
                self._keep(node, self._norm(node, module, self._apart(node.args[0])))
            elif type(module) in _BATCHED:
                fused = _following_activation(node, self.modules)
                out = self._layer(node, module, fused and self.modules[fused.target])
                for done in filter(None, (node, fused)):
                    self._keep(done, out)
                    skip.add(done)
            elif type(module) is nn.Flatten and self._flattens(node, module):
                self._keep(node, self.apart[node.args[0]].flatten(2))
            else:
                self._plain(node, module)
        raise ValueError("the module returns nothing")

    def _keep(self, node: fx.Node, apart: Tensor) -> None:
        self.apart[node] = apart
        self.folded.add(node)

    def _flattens(self, node: fx.Node, module: nn.Module) -> bool:
        """Whether ``node`` flattens a layer's images: always a view while they are apart."""
        return (module.start_dim, module.end_dim) == (1, -1) and node.args[0] in self.apart

    def _apart(self, node: fx.Node) -> Tensor:
        """The value of ``node`` as [B, N, ...]."""
        if node in self.apart:
            return self.apart[node]
        return self._fold(node).unflatten(0, (-1, self.nets))

    def _fold(self, node: fx.Node) -> Tensor:
        """The value of ``node`` with one entry a sample and net: [B·N, ...]."""
        if node in self.apart and node not in self.values:
            self.values[node] = self.apart[node].flatten(0, 1)
        value = self.values[node]
        if node in self.folded or not isinstance(value, Tensor):
            return value
        return value.unsqueeze(1).expand(-1, self.nets, *value.shape[1:]).flatten(0, 1)

    def _of(self, node: fx.Node, *names: str) -> list[Tensor | None]:
        """All nets' tensors of a layer, [N, ...] each, or None where the layer has none."""
        return [self.views.get(self.names.get(f"{node.target}.{name}".lstrip("."))) for name in names]

    def _layer(self, node: fx.Node, layer: nn.Module, activation: nn.Module | None) -> Tensor:
        weight, bias = self._of(node, "weight", "bias")
        source, fuse = node.args[0], _fusable(activation)
        carried = source in self.folded
        value = self._apart(source) if carried else self.values[source]
        if isinstance(layer, nn.Linear):
            return self._linear(value, carried, weight, bias, fuse)
        plain = layer.groups == 1 and set(layer.dilation) == {1} and type(layer.padding) is tuple
        if type(layer) is nn.Conv2d and plain and fuse.get("activation") != "sine":
            return batched_conv2d(value, weight, bias, layer.stride, layer.padding, **fuse)
        out = _grouped_conv(self._apart(source), weight, bias, layer)
        return out if activation is None else activation(out)

    def _linear(self, value: Tensor, carried: bool, weight, bias, fuse) -> Tensor:
        shape = value.shape[2:-1] if carried else value.shape[1:-1]  # tokens count as samples
        if carried:
            value = value.transpose(0, 1)
            value = value.flatten(1, -2) if shape else value
        else:
            value = value.flatten(0, -2)
        out = batched_linear(value, weight, bias, **fuse)
        if shape:
            out = out.unflatten(1, (-1, *shape))
        return out.transpose(0, 1)

    def _norm(self, node: fx.Node, layer: nn.Module, x: Tensor) -> Tensor:
        """A norm of x [B, N, C, ...], each net with its own scale, shift and statistics."""
        if isinstance(layer, _BATCH_NORMS):
            return self._batch_norm(node, layer, x)
        folded = x.flatten(0, 1)
        if isinstance(layer, nn.LayerNorm):
            folded = F.layer_norm(folded, layer.normalized_shape, eps=layer.eps)
        elif isinstance(layer, nn.GroupNorm):
            folded = F.group_norm(folded, layer.num_groups, eps=layer.eps)
        elif not isinstance(layer, Affine):
            folded = F.instance_norm(folded, eps=layer.eps)
        x = folded.unflatten(0, (-1, self.nets))
        pairs = zip(self._of(node, "weight", "bias"), (torch.mul, torch.add), strict=True)
        for tensor, apply in pairs:
            if tensor is not None:
                missing = (None,) * (x.dim() - 1 - tensor.dim())
                last = isinstance(layer, nn.LayerNorm)  # its weights belong to the last axes
                at = (slice(None), *missing) if last else (..., *missing)
                x = apply(x, tensor[at])
        return x

    def _batch_norm(self, node: fx.Node, layer: nn.Module, x: Tensor) -> Tensor:
        """N·C channels at once: every net's batch is its own."""
        views = self._of(node, "running_mean", "running_var", "weight", "bias")
        flat = [None if view is None else view.reshape(-1) for view in views]
        flat[:2] = (None if t is None else t.clone() for t in flat[:2])  # updated, not yet rows'
        out = F.batch_norm(x.flatten(1, 2), *flat, True, layer.momentum or 0.0, layer.eps)
        for view, updated in zip(views[:2], flat[:2], strict=True):
            if view is not None:
                view.copy_(updated.view_as(view))
        return out.unflatten(1, (self.nets, -1))

    def _plain(self, node: fx.Node, module: nn.Module | None) -> None:
        """A step without parameters: unchanged, on shared or on folded values."""
        if node.op == "get_attr":
            self.values[node] = functools.reduce(getattr, node.target.split("."), self.modules[""])
            return
        folded = any(source in self.folded for source in node.all_input_nodes)
        constants = {n for n in node.all_input_nodes if n.op == "get_attr"}

        def load(source):
            return self._fold(source) if folded and source not in constants else self.values[source]

        args, kwargs = fx.map_arg((node.args, node.kwargs), load)
        if node.op == "call_module":
            value = module(*args, **kwargs)
        elif node.op == "call_method":
            value = getattr(args[0], node.target)(*args[1:], **kwargs)
        else:
            value = node.target(*args, **kwargs)
        self.values[node] = value
        if folded:
            self.folded.add(node)


def _following_activation(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """The activation that alone reads ``node`` and that the kernels can fuse, if there is one."""
    user = next(iter(node.users), None)
    if len(node.users) != 1 or user.op != "call_module":
        return None
    return user if _fusable(modules[user.target]) else None


def _fusable(activation: nn.Module | None) -> dict:
    if type(activation) is nn.LeakyReLU:
        return {"activation": "leaky_relu", "slope": activation.negative_slope}
    if type(activation) is Sine:
        return {"activation": "sine", "omega": activation.omega}
    return {}


def _grouped_conv(x: Tensor, weight: Tensor, bias: Tensor | None, layer: nn.Module) -> Tensor:
    """Any other convolution of x [B, N, C, ...] by PyTorch alone, nets as groups."""
    nets, convolve = len(weight), getattr(F, f"conv{weight.dim() - 3}d")
    bias = None if bias is None else bias.flatten()
    settings = layer.stride, layer.padding, layer.dilation, layer.groups * nets
    out = convolve(x.flatten(1, 2), weight.flatten(0, 1), bias, *settings)
    return out.unflatten(1, (nets, -1))
