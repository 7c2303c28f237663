"""Run any ``nn.Module`` for N nets at once, straight from their packed rows.

The module is traced once with ``torch.fx``. Its graph is then interpreted with activations that
carry all nets, folded **sample-major**: [B, N, C, H, W] stored as [B·N, C, H, W]. A grouped
convolution sees that memory as [B, N·C, H, W] and a batched product sees it as [N, B, I] by
stride, so neither copies, and every layer without parameters works per sample and runs unchanged.
What does not depend on the net yet (the input images) stays unfolded until the first layer with
weights. Anything else falls back to ``torch.func.vmap``, and says so once.
"""

import copy
import itertools
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, fx, nn
from torch.func import functional_call, vmap

from .architectures import Sine, Siren, name_of
from .kernels import batched_conv2d, batched_linear, siren_mlp
from .kernels.cpu import nets_per_block
from .layout import Layout, check_rows

BLOCK = 32  # nets evaluated together: on a CPU, blocks of 16 to 80 nets fit the caches best
_BATCHED = (nn.Linear, nn.Conv2d)


class Batched:
    """``batched(rows, x)`` is what N copies of ``module`` with the parameters ``rows`` answer.

    Args of the call:
        rows: [N, P], any row stride; gradients flow to it.
        x: [B, ...] shared by all nets, or [N, B, ...] with ``per_net=True``.
        per_net: whether x's first axis is the nets.

    Returns [N, B, ...]. Equal to a loop over the modules, values and gradients.
    """

    def __init__(self, module: nn.Module):
        self.module = copy.deepcopy(module)
        self.layout = Layout.of(module)
        self.graph = _trace(self.module)
        self._checked = False

    def __call__(self, rows: Tensor, x: Tensor, per_net: bool = False) -> Tensor:
        check_rows(rows, self.layout.size)
        _check_inputs(rows, x, per_net)
        if isinstance(self.module, Siren):
            return siren_mlp(x, rows, self.module.config["hidden"], self.module.config["omega"])
        if not self._checked:
            self._check(rows, x, per_net)
        if self.graph is None:
            return self._vmap(rows, x, per_net)
        step = nets_per_block(x[0] if per_net else x)
        if rows.device.type != "cpu" or step >= len(rows):
            return self._interpret(rows, x, per_net)
        if step == 1:
            return self._loop(rows, x, per_net)
        inputs = x.split(step) if per_net else itertools.repeat(x)
        blocks = zip(rows.split(step), inputs, strict=False)
        return torch.cat([self._interpret(block, part, per_net) for block, part in blocks])

    def _interpret(self, rows: Tensor, x: Tensor, per_net: bool) -> Tensor:
        return _Interpreter(self.graph, self.layout.views(rows), len(rows)).run(x, per_net)

    def _loop(self, rows: Tensor, x: Tensor, per_net: bool) -> Tensor:
        """One net after the other, as its plain module: each fills the caches alone."""
        inputs = x if per_net else itertools.repeat(x)
        calls = zip(self.layout.unpack(rows), inputs, strict=False)
        return torch.stack([functional_call(self.module, net, (part,)) for net, part in calls])

    def _vmap(self, rows: Tensor, x: Tensor, per_net: bool) -> Tensor:
        def one_net(parameters, inputs):
            return functional_call(self.module, parameters, (inputs,))

        in_dims = (0, 0 if per_net else None)
        return vmap(one_net, in_dims, randomness="different")(self.layout.views(rows), x)

    @torch.no_grad()
    def _check(self, rows: Tensor, x: Tensor, per_net: bool) -> None:
        """Hold the interpreted graph against vmap on two nets and two samples, once.

        This catches what a trace can't show, such as an operation that mixes samples.
        """
        self._checked = True
        reason = f"its layers are not all {', '.join(c.__name__ for c in _BATCHED)}"
        if self.graph is not None:
            training = self.module.training
            self.module.eval()
            rows, x = rows[:2].detach(), x[:2, :2] if per_net else x[:2]
            expected = self._vmap(rows, x, per_net)
            try:
                views = self.layout.views(rows)
                found = _Interpreter(self.graph, views, len(rows)).run(x, per_net)
                agrees = found.shape == expected.shape and torch.allclose(
                    found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
                )
                reason = "its operations mix samples or depend on the batch size"
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                agrees, reason = False, f"its graph can't carry many nets ({error})"
            self.module.train(training)
            if agrees:
                return
            self.graph = None
        warnings.warn(
            f"{type(self.module).__name__} runs through torch.func.vmap, which is slower: {reason}",
            stacklevel=4,
        )


class _Tracer(fx.Tracer):
    """Layers the kernels know and everything without parameters are single steps."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return type(module) in _BATCHED or next(module.parameters(), None) is None


def _trace(module: nn.Module) -> fx.GraphModule | None:
    """The module's graph, or None if anything but a plain Linear or Conv2d has parameters."""
    try:
        graph = fx.GraphModule(module, _Tracer().trace(module))
    except Exception:  # tracing runs the user's code on proxies: anything can be raised
        return None
    layers = [m for m in graph.modules() if type(m) in _BATCHED]
    known = {id(p) for layer in layers for p in layer.parameters()}
    names = dict(module.named_parameters(remove_duplicate=False))
    reads_weights = any(n.op == "get_attr" and n.target in names for n in graph.graph.nodes)
    odd_padding = any(
        isinstance(m, nn.Conv2d) and (m.padding_mode != "zeros" or isinstance(m.padding, str))
        for m in layers
    )
    if reads_weights or odd_padding or any(id(p) not in known for p in names.values()):
        return None
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

    def __init__(self, graph: fx.GraphModule, views: dict[str, Tensor], nets: int):
        self.graph, self.views, self.nets = graph, views, nets
        self.values: dict[fx.Node, object] = {}
        self.apart: dict[fx.Node, Tensor] = {}
        self.folded: set[fx.Node] = set()

    def run(self, x: Tensor, per_net: bool) -> Tensor:
        modules = dict(self.graph.named_modules())
        skip = set()
        for node in self.graph.graph.nodes:
            if node in skip:
                continue
            if node.op == "placeholder":
                if per_net:
                    self.apart[node] = x.transpose(0, 1)
                    self.folded.add(node)
                else:
                    self.values[node] = x
            elif node.op == "output":
                return self._unfold(node.args[0])
            elif node.op == "call_module" and type(modules[node.target]) in _BATCHED:
                fused = _following_activation(node, modules)
                out = self._layer(node, modules[node.target], fused and modules[fused.target])
                for done in filter(None, (node, fused)):
                    self.apart[done] = out
                    self.folded.add(done)
                    skip.add(done)
            elif node.op == "call_module" and self._flattens(node, modules[node.target]):
                self.apart[node] = self.apart[node.args[0]].flatten(2)
                self.folded.add(node)
            else:
                self._plain(node, modules)

    def _unfold(self, node: fx.Node) -> Tensor:
        return self._apart(node).transpose(0, 1)

    def _flattens(self, node: fx.Node, module: nn.Module) -> bool:
        """Whether ``node`` flattens a layer's images: always a view while they are apart."""
        whole = type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
        return whole and node.args[0] in self.apart

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

    def _layer(self, node: fx.Node, layer: nn.Module, activation: nn.Module | None) -> Tensor:
        weight = self.views[f"{node.target}.weight"]
        bias = self.views.get(f"{node.target}.bias")
        (source,) = node.args
        carried = source in self.folded
        value = self._apart(source) if carried else self.values[source]
        fuse = _fusable(activation)
        if isinstance(layer, nn.Linear):
            return self._linear(value, carried, weight, bias, fuse)
        if layer.groups != 1 or layer.dilation != (1, 1):
            out = _grouped_conv(self._fold(source), weight, bias, layer)
            out = activation(out) if activation is not None else out
            return out.unflatten(0, (-1, self.nets))
        return batched_conv2d(value, weight, bias, layer.stride, layer.padding, **fuse)

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

    def _plain(self, node: fx.Node, modules: dict[str, nn.Module]) -> None:
        """A step without parameters: unchanged, on shared or on folded values."""
        if node.op == "get_attr":
            value = self.graph
            for name in node.target.split("."):
                value = getattr(value, name)
            self.values[node] = value
            return
        folded = any(source in self.folded for source in node.all_input_nodes)
        constants = {n for n in node.all_input_nodes if n.op == "get_attr"}

        def load(source):
            return self._fold(source) if folded and source not in constants else self.values[source]

        args, kwargs = fx.map_arg((node.args, node.kwargs), load)
        if node.op == "call_module":
            value = modules[node.target](*args, **kwargs)
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


def _grouped_conv(x: Tensor, weight: Tensor, bias: Tensor | None, layer: nn.Conv2d) -> Tensor:
    """Depthwise, grouped or dilated convolution of folded x [B·N, C, H, W] by PyTorch alone."""
    nets = len(weight)
    out = F.conv2d(
        x.unflatten(0, (-1, nets)).flatten(1, 2),
        weight.flatten(0, 1),
        None if bias is None else bias.flatten(),
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups * nets,
    )
    return out.unflatten(1, (nets, -1)).flatten(0, 1)


class Nets:
    """N trained nets of one architecture: packed rows that run as they are.

    Args:
        module: the architecture, as any module of it; its own parameters are not used.
        rows: [N, P], parameters of each net in module order.

    ``nets[2:5]`` or ``nets[mask]`` are nets again, ``nets[0]`` is one net (N = 1).
    """

    def __init__(self, module: nn.Module | Batched, rows: Tensor):
        self.batched = module if isinstance(module, Batched) else Batched(module)
        check_rows(rows, self.layout.size)
        self.rows = rows

    @property
    def module(self) -> nn.Module:
        """A module of the architecture; its parameters are nobody's."""
        return self.batched.module

    @property
    def layout(self) -> Layout:
        return self.batched.layout

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index) -> "Nets":
        rows = self.rows[index]
        return Nets(self.batched, rows if rows.dim() == 2 else rows[None])

    def __iter__(self) -> Iterator["Nets"]:
        return (self[n] for n in range(len(self)))

    def __repr__(self) -> str:
        name = name_of(self.module)
        return f"{type(self).__name__}({len(self)} × {name}, {self.layout.size:,} parameters each)"

    def __call__(self, x: Tensor, per_net: bool = False) -> Tensor:
        """Outputs [N, B, ...] of all nets on x, differentiable; see `Batched`."""
        return self.batched(self.rows, x, per_net)

    @torch.no_grad()
    def outputs(self, x: Tensor, per_net: bool = False, samples: int = 4096) -> Tensor:
        """Outputs [N, B, ...] without gradients, in blocks of nets and of samples."""
        blocks = []
        for start in range(0, len(self), BLOCK):
            rows, last = self.rows[start : start + BLOCK], start + BLOCK
            parts = (x[start:last] if per_net else x).split(samples, dim=1 if per_net else 0)
            blocks.append(torch.cat([self.batched(rows, part, per_net) for part in parts], dim=1))
        return torch.cat(blocks)

    logits = outputs

    def accuracy(self, images) -> Tensor:
        """Accuracy in percent of each net on ``images`` (``.x`` [B, C, H, W], ``.y`` [B]): [N].

        The result is on the CPU, wherever the nets are.
        """
        return (self.logits(images.x).argmax(-1) == images.y).float().mean(1).cpu() * 100

    def to_module(self, n: int = 0) -> nn.Module:
        """Net n as a plain ``nn.Module`` of its own, in evaluation mode."""
        module = copy.deepcopy(self.module).eval()
        module.load_state_dict(self.state_dict(n))
        return module

    def state_dict(self, n: int = 0) -> dict[str, Tensor]:
        """Net n's parameters, copied out of the packed row."""
        state = self.layout.unpack(self.rows[n : n + 1] if n >= 0 else self.rows[[n]])[0]
        return {name: value.detach().clone() for name, value in state.items()}

    def export(self, path, n: int = 0) -> None:
        """Write net n as a safetensors file that ``module.load_state_dict`` takes back."""
        save_file(self.state_dict(n), path)
