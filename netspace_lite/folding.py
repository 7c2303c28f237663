"""Batch norms folded away, so that a trained net is weights and biases only."""

import copy

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


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
        shape = (-1, *(1,) * (x.dim() - 2))
        return torch.addcmul(self.bias.view(shape), x, self.weight.view(shape))


def statistics(module: nn.Module) -> dict[str, nn.Module]:
    """The batch norms of a module that keep running statistics of their inputs, by name."""
    norms = {n: m for n, m in module.named_modules() if isinstance(m, _BatchNorm)}
    return {name: norm for name, norm in norms.items() if norm.running_mean is not None}


def fold_batchnorm(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode without batch norms that computes the same (paper section IV).

    A convolution that feeds nothing but a batch norm absorbs it and the norm becomes the identity
    (``torch.nn.utils.fusion``); any other batch norm becomes an `Affine` layer. What is left is
    weights and biases only, so it can be packed. Without batch norms it is a plain copy.
    """
    folded = copy.deepcopy(module).eval()
    norms = statistics(folded)
    for name, layer in _layers_before(folded, norms).items() if norms else ():
        fused = fuse_conv_bn_eval(folded.get_submodule(layer), norms.pop(name))
        folded.set_submodule(layer, fused)
        folded.set_submodule(name, nn.Identity())
    for name, norm in norms.items():
        weight = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
        bias = torch.zeros_like(weight) if norm.bias is None else norm.bias
        with torch.no_grad():
            weight = weight * (norm.running_var + norm.eps).rsqrt()
            affine = Affine(weight, bias - norm.running_mean * weight).eval()
        if not name:
            return affine
        folded.set_submodule(name, affine)
    if getattr(folded, "config", {}).get("batch_norm"):
        folded.config = {**folded.config, "batch_norm": False}
    return folded


def _layers_before(module: nn.Module, norms: dict) -> dict[str, str]:
    """For each batch norm that can be absorbed the convolution that feeds only it."""
    try:
        graph = fx.Tracer().trace(module)
    except Exception:  # tracing runs the user's code on proxies: anything can be raised
        return {}
    calls = [node for node in graph.nodes if node.op == "call_module"]
    once = {n.target for n in calls if sum(m.target == n.target for m in calls) == 1}
    tied = [id(p) for _, p in module.named_parameters(remove_duplicate=False)]
    found = {}
    for node in calls:
        layer = node.args[0] if node.target in norms and node.args else None
        if not isinstance(layer, fx.Node) or layer.op != "call_module" or len(layer.users) > 1:
            continue
        before = module.get_submodule(layer.target)
        alone = all(tied.count(id(p)) == 1 for p in before.parameters())
        if type(before) in CONVOLUTIONS and alone and {node.target, layer.target} <= once:
            found[node.target] = layer.target
    return found
