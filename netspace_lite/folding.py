"""Batch norms folded away, so that a trained net is weights and biases only."""

import copy
from threading import get_ident

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.optim.swa_utils import AveragedModel

from .architectures import is_registered
from .randomness import ALONE

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
STATISTICS = "running_mean", "running_var", "num_batches_tracked"
HOOKS = "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"


class Affine(nn.Module):
    """A scale and a shift per channel of x [B, C, ...]: what a batch norm is once training ended.

    Args:
        weight, bias: [C] each.
    """

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())

    def forward(self, x):
        """x: [B, C, ...] -> the same shape."""
        return affine(x, self.weight, self.bias)


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [B, C, ...] · weight [C] + bias [C], channel by channel."""
    shape = (-1, *(1,) * (x.dim() - 2))
    return torch.addcmul(bias.view(shape), x, weight.view(shape))


def unwrapped(module: nn.Module) -> nn.Module:
    """The module in what compiles it or trains it on several devices. ValueError for no module."""
    inner = None
    while inner is not module:
        inner, module = module, getattr(module, "_orig_mod", module)  # of torch.compile
        module = module.module if isinstance(module, WRAPPERS) else module
    if not isinstance(module, nn.Module):
        given = module if isinstance(module, type) else f"a {type(module).__name__}"
        raise ValueError(f"{given} is no module: make one, as MyNet(...) does of a class")
    if any(map(nn.parameter.is_lazy, (*module.parameters(), *module.buffers()))):
        raise ValueError(f"{type(module).__name__} has lazy layers: call it on an example first")
    return module


def evaluated_copy(module: nn.Module) -> nn.Module:
    """A copy of the module itself, see `unwrapped`, in evaluation mode."""
    module = unwrapped(module)
    try:
        return copy.deepcopy(module).eval()
    except RuntimeError as error:  # pruned, or normalised by hooks: weights that are no parameters
        cure = "take its pruning or weight norm off first (torch.nn.utils has what removes them)"
        raise ValueError(f"{type(module).__name__} can't be copied ({error}): {cure}") from error


def moved(module: nn.Module, like: Tensor) -> nn.Module:
    """The module itself, its constants too, moved to where ``like`` is and to its dtype.

    Tensors of another dtype than the parameters', such as complex ones, keep theirs.
    """
    own = {p.dtype for p in module.parameters()}

    def to_like(t: Tensor) -> Tensor:
        return t.to(like.device, like.dtype if t.dtype in own else t.dtype)

    for part in module.modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor):  # a plain attribute, or a constant of a trace
                setattr(part, name, to_like(value))
    return module._apply(to_like)


def hooks(module: nn.Module) -> dict[str, list]:
    """What runs before, after or in place of a module's forward, or on its gradients, by kind."""
    found = {kind: [*vars(module)[kind].values()] for kind in HOOKS if vars(module)[kind]}
    return found | {k: [v] for k, v in vars(module).items() if k == "forward"}


def statistics(module: nn.Module) -> dict[str, nn.Module]:
    """The batch and instance norms of a module that answer with running statistics, by name."""
    norms = {n: m for n, m in module.named_modules() if isinstance(m, _NormBase)}
    norms = {name: norm for name, norm in norms.items() if norm.running_mean is not None}
    for name, norm in norms.items():
        if not type(norm).forward.__module__.startswith("torch."):
            what = f"norm {name!r}, a {type(norm).__name__}, has a forward of its own"
            raise ValueError(f"{what}, which folding would lose: hold a norm instead of being one")
    return norms


def fold_batchnorm(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode without batch norms that computes the same (paper section IV).

    A convolution that feeds nothing but a batch norm absorbs it and the norm becomes the identity
    (``torch.nn.utils.fusion``); any other batch norm becomes an `Affine` layer. What is left is
    weights and biases only, so it can be packed. Without batch norms it is a plain copy.
    """
    return Folding(module).module


class Folding:
    """How nets of an architecture are folded, see `fold_batchnorm`: found once for all of them.

    Called with a net's tensors by name, of tied ones the first, it gives those of the folded net.
    ``module`` is a folded copy of the one given, whose buffers stand in for those that aren't.
    """

    def __init__(self, module: nn.Module):
        self.module = folded = evaluated_copy(module)
        norms, first = statistics(folded), {}
        if bad := [name for name, norm in norms.items() if hooks(norm)]:
            raise ValueError(f"norm {bad[0]!r} has hooks, which folding would lose: take them off")
        graph = _trace(folded, norms) if norms else fx.Graph()
        before = _layers_before(folded, graph, norms)
        self.norms = {name: (before.get(name), norm.eps) for name, norm in norms.items()}
        buffers = dict(folded.named_buffers(remove_duplicate=False))
        tensors = dict(folded.named_parameters(remove_duplicate=False)) | buffers
        self.first = {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}
        self.constants = {name: tensor.clone() for name, tensor in buffers.items()}
        values = self(tensors) if norms else {}
        for name, norm in norms.items():
            left = Affine(norm.running_var, norm.running_mean)
            if name in before:
                layer, left = folded.get_submodule(before[name]), nn.Identity()
                bias = layer.weight.detach().new_empty(layer.out_channels)
                bias = nn.Parameter(bias) if layer.bias is None else layer.bias
                layer.bias = bias.requires_grad_(layer.weight.requires_grad)
            _replace(norm, left.eval())
        fill(folded, values)
        if is_registered(folded) and folded.config.get("batch_norm"):
            folded.config = folded.config | {"batch_norm": False}
        read = (node.target.rpartition(".")[0] for node in graph.nodes if node.op == "get_attr")
        changed = graph.nodes and str(graph) != str(_trace(folded, norms))
        if changed or not norms.keys().isdisjoint(read):
            what = f"the forward of a {type(folded).__name__} asks what its batch norms are or hold"
            cure = "let it only call them, or it would change once they are folded"
            raise ValueError(f"{what}: {cure}")

    @torch.no_grad()
    def __call__(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        like, missing = next(iter(tensors.values())), self.constants.keys() - tensors.keys()
        tensors = tensors | {name: self.constants[name].to(like.device) for name in missing}
        given = {name: tensors[first] for name, first in self.first.items()}
        folded, parts = dict(given), (*STATISTICS[:2], "weight", "bias")
        for norm, (layer, eps) in self.norms.items():
            mean, var, weight, bias = (given.get(within(norm, part)) for part in parts)
            if layer is None:
                scale = (var + eps).rsqrt()
                scale = scale if weight is None else scale * weight
                own = scale, (0 if bias is None else bias) - mean * scale
            else:
                convolution = given[f"{layer}.weight"], given.get(f"{layer}.bias")
                own = fuse_conv_bn_weights(*convolution, mean, var, eps, weight, bias)
            names = (within(norm if layer is None else layer, part) for part in parts[2:])
            folded |= dict(zip(names, own, strict=True))
        return folded


@torch.no_grad()
def fill(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Give a module's tensors values by name: all others stay, and what is tied stays tied."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name in state:
            tensor.copy_(state[name])


def within(layer: str, name: str) -> str:
    """The name of a layer's tensor in the module, which may be that layer itself."""
    return f"{layer}.{name}".lstrip(".")


def _around() -> list[bool]:
    """The settings under which steps run, and which no graph keeps."""
    return [torch.is_grad_enabled(), *map(torch.is_autocast_enabled, ("cpu", "cuda"))]


class Tracer(fx.Tracer):
    """Follows the thread that traces; modules that others call meanwhile just run.

    While PyTorch traces, all calls of modules in the process come to the tracer.
    """

    def trace(self, root: nn.Module) -> fx.Graph:
        """The steps of ``root``.

        Raises TypeError for those without gradients or in autocast, and those of a function with a
        gradient of its own, whose forward alone would be seen.
        """
        with ALONE, torch.inference_mode(False), torch.enable_grad():
            self._thread, self._outside = get_ident(), _around()
            return super().trace(root)

    def create_node(self, *args, **kwargs):
        if _around() != self._outside:
            raise TypeError("it turns gradients or autocast on or off")
        return super().create_node(*args, **kwargs)

    def call_module(self, m, forward, args, kwargs):
        own = get_ident() == self._thread
        return super().call_module(m, forward, args, kwargs) if own else forward(*args, **kwargs)

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        own = get_ident() == self._thread
        return super().getattr(attr, attr_val, parameter_proxy_cache) if own else attr_val


def _trace(module: nn.Module, leaves) -> fx.Graph:
    """The steps of a module, in which each of ``leaves`` is one; none if it can't be traced."""
    tracer = Tracer()
    usual = tracer.is_leaf_module
    tracer.is_leaf_module = lambda m, name: name[2:] in leaves or usual(m, name)
    try:  # in a root that calls it with the input alone: options have their defaults
        graph = tracer.trace(nn.Sequential(copy.deepcopy(module)))
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr"):
                node.target = node.target.removeprefix("0").removeprefix(".")
        return graph
    except Exception:  # tracing runs the user's code on proxies: anything can be raised
        return fx.Graph()


def _replace(old: nn.Module, new: nn.Module) -> None:
    """Make a layer another one, wherever it is held: also in plain lists."""
    old.__class__, old.__dict__ = type(new), new.__dict__


def _layers_before(module: nn.Module, graph: fx.Graph, norms: dict) -> dict[str, str]:
    """For each batch norm that can be absorbed the convolution that feeds only it."""
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    calls += [n.target.rpartition(".")[0] for n in graph.nodes if n.op == "get_attr"]
    tied = [id(p) for _, p in module.named_parameters(remove_duplicate=False)]
    found = {}
    for layer in graph.nodes:
        user = next(iter(layer.users), layer)
        norm, both = user.target, layer.op == user.op == "call_module"
        if both and len(layer.users) == 1 and norm in norms:
            before = module.get_submodule(layer.target)
            alone = all(tied.count(id(p)) == 1 for p in before.parameters())
            once = calls.count(norm) == calls.count(layer.target) == 1
            learned = next(before.buffers(), None) is None  # or it would not stay a constant
            if type(before) in CONVOLUTIONS and alone and once and learned and not hooks(before):
                found[norm] = layer.target
    return found
