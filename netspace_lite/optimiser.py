"""The optimiser that fits a space: matrices step by Muon's rule, everything else by AdamW's."""

import torch
from torch import Tensor, nn

from .zoo import adamw_step

# The shorter side of a matrix that Muon takes. A narrower one has no directions worth balancing; of
# a wider one the eigenvectors cost more than they bring: the space of shapes, whose head is 512
# wide, gets further with AdamW there (held out 91.8% after 500 steps, not 88.6), in a third of the
# time.
SIDES = range(16, 257)


def orthogonal(x: Tensor, floor: float = 1e-6) -> Tensor:
    """The orthogonal part of a matrix [M, K]: the same singular vectors, all singular values 1.

    Found from the Gram matrix of the shorter side, min(M, K) squared, since a decoder's heads are
    long and thin: two products instead of the fifteen of a Newton-Schulz iteration. Singular values
    under ``floor ** 0.5`` of the matrix's norm can't be told from rounding and stay small.
    """
    if x.shape[0] < x.shape[1]:
        return orthogonal(x.T, floor).T
    gram = x.T @ x
    values, vectors = torch.linalg.eigh(gram)
    values = (values + floor * gram.trace()).clamp_min(torch.finfo(x.dtype).tiny)
    return x @ ((vectors * values.rsqrt()) @ vectors.T)


class Muon(torch.optim.Optimizer):
    """Muon for ``module``'s linear layers of 16 to 256 on the shorter side, else AdamW.

    A head's gradient is nearly of rank one: few directions of the hidden layer carry most of it,
    and Adam, which weighs every entry alone, follows those. Muon steps as far along every direction
    (Jordan et al. 2024), here with the polar factor itself in place of its iteration. Its steps are
    scaled to AdamW's root mean square (Liu et al. 2025), so that one ``lr`` serves both.
    """

    def __init__(self, module: nn.Module, lr: float, momentum: float = 0.95, weight_decay=1e-2):
        layers = (m.weight for m in module.modules() if isinstance(m, nn.Linear))
        self._matrices = {weight for weight in layers if min(weight.shape) in SIDES}
        learned = (p for p in module.parameters() if p.requires_grad)
        super().__init__(learned, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def initial(self, p: nn.Parameter) -> dict[str, Tensor]:
        """The state that a parameter starts from."""
        names = ("exp_avg",) if p in self._matrices else ("exp_avg", "exp_avg_sq")
        return {"step": torch.zeros(())} | {name: torch.zeros_like(p) for name in names}

    @torch.no_grad()
    def step(self) -> None:
        """One step along the gradients that there are, in place."""
        for group in self.param_groups:
            lr, decay, beta = group["lr"], group["weight_decay"], group["momentum"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state |= self.initial(p)
                state["step"] += 1
                if p not in self._matrices:
                    moments = state["exp_avg"], state["exp_avg_sq"]
                    adamw_step(p, p.grad, *moments, float(state["step"]), lr, decay)
                    continue
                momentum = state["exp_avg"].lerp_(p.grad, 1 - beta)
                ahead = orthogonal(p.grad.lerp(momentum, beta))  # Nesterov's
                p.mul_(1 - lr * decay).sub_(ahead, alpha=0.2 * lr * max(p.shape) ** 0.5)
