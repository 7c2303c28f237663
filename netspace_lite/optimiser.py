"""The optimiser that fits a space: matrices step by Muon's rule, everything else by AdamW's."""

import torch
from torch import Tensor, nn

from .zoo_training import adamw_step

# The shorter side of a matrix that Muon takes. A narrower one has no directions worth balancing; of
# a wider one, [M, K], the turn takes 2·M·K² operations, and the layer itself only 6·M·K for a net.
SIDES = range(16, 513)


# Steps from one look at a matrix's directions to the next: they turn slowly, and looking in every
# step took a fifth of a fit's time on a CPU.
LOOK = 8
BLOCK = 1 << 17  # values that a CPU takes through a whole step while they lie in its caches


def inverse_root(x: Tensor, floor: float = 1e-6) -> Tensor:
    """(xᵀx)^(-1/2) of a matrix [M, K]: x times it has the same singular vectors, and values of 1.

    The Gram matrix is small where M is large, as in a decoder's heads: two products instead of the
    fifteen of a Newton-Schulz iteration. Singular values under ``floor ** 0.5`` of the matrix's
    norm can't be told from rounding and stay small.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    gram = x.T @ x
    values, vectors = torch.linalg.eigh(gram)
    values = (values + floor * gram.trace()).clamp_min(1e-24)  # of a gradient of zeros, too
    return (vectors * values.rsqrt()) @ vectors.T


class Muon(torch.optim.Optimizer):
    """Muon for ``module``'s linear layers of 16 to 512 on the shorter side, else AdamW.

    A head's gradient is nearly of rank one: few directions of the hidden layer carry most of it,
    and Adam, which weighs every entry alone, follows those. Muon steps as far along every direction
    (Jordan et al. 2024), here with the polar factor itself in place of its iteration, by directions
    that are up to `LOOK` steps old. Its steps have AdamW's root mean square (Liu et al. 2025), so
    that one ``lr`` serves both.
    """

    def __init__(self, module: nn.Module, lr: float, momentum: float = 0.95, weight_decay=1e-2):
        layers = (m.weight for m in module.modules() if isinstance(m, nn.Linear))
        self._matrices = {weight for weight in layers if min(weight.shape) in SIDES}
        learned = (p for p in module.parameters() if p.requires_grad)
        super().__init__(learned, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def initial(self, p: nn.Parameter) -> dict[str, Tensor]:
        """The state that a parameter starts from."""
        state = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p)}
        if p in self._matrices:
            return state | {"root": p.new_zeros(min(p.shape), min(p.shape))}
        return state | {"exp_avg_sq": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, closure=None):
        """One step along the gradients that there are, in place. Gradients are used up.

        With a ``closure``, which computes them, returns what that does.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, decay, beta = group["lr"], group["weight_decay"], group["momentum"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p] = self.state[p] or self.initial(p)
                state["step"] += 1
                if p in self._matrices:
                    with torch.autocast(p.device.type, enabled=False):  # or directions are bf16's
                        _turned_step(p, state, lr, decay, beta)
                    continue
                for part in _blocks(p, p.grad, state["exp_avg"], state["exp_avg_sq"]):
                    adamw_step(*part, float(state["step"]), lr, decay)
        return loss


def _turned_step(p: nn.Parameter, state: dict, lr: float, decay: float, beta: float) -> None:
    """Muon's step of a matrix. Its direction comes to stand where the gradient did, by blocks."""
    p, grad, momentum = (t.T if len(t) < t.shape[1] else t for t in (p, p.grad, state["exp_avg"]))
    ahead = (g.lerp_(m.lerp_(g, 1 - beta), beta) for g, m in _blocks(grad, momentum))  # Nesterov's
    if (int(state["step"]) - 1) % LOOK == 0:
        ahead = list(ahead)  # all of it, before any block is turned
        state["root"].copy_(inverse_root(grad))
    for block in ahead:
        block.copy_(block @ state["root"])
    size = 0.2 * lr * p.numel() ** 0.5 / grad.norm().clamp_min(1e-12)
    for part, way in _blocks(p, grad):
        part.mul_(1 - lr * decay).sub_(way.mul_(size))


def _blocks(*tensors: Tensor):
    """The same rows of each tensor, few at a time on a CPU."""
    first, *_ = tensors = torch.atleast_1d(*tensors)
    rows = BLOCK * len(first) // max(1, first.numel()) if first.device.type == "cpu" else len(first)
    return zip(*(tensor.split(max(1, rows)) for tensor in tensors), strict=True)
