"""Distillation for N nets: α·T²·KL(softmax(t/T) ‖ softmax(z/T)) + (1 − α)·CE(z, labels).

Pointers and strides (in values):
    z      [N, B, K]  strides (zn, zb, 1)
    t      [N, B, K]  strides (tn, tb, 1); tn = 0 if all nets share the targets
    labels [N, B]     strides (ln, lb), int64; ln = 0 if shared
    T      [N]        fp32
    parts  [N, S]     fp32 losses summed over the samples of each program
    dz     [N, B, K]  contiguous: the gradient of the mean loss

Grid (N·⌈B/BM⌉,). One program reads BM rows of z and t once and writes their losses' sum and their
gradient; forward and gradient in one pass, and softmaxes never reach memory:

    ∂/∂z = (α·T·(softmax(z/T) − softmax(t/T)) + (1 − α)·(softmax(z) − onehot(label))) / B

Traffic in bytes for values of s bytes: 3·s·N·B·K (z and t read, dz written), against about ten
passes over [N, B, K] in PyTorch. About 15 operations a value: bound by memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import tl, triton, use_triton
from .common import autocast, cdiv, check, register_differentiable
from .tiles import place, put, take


def distillation_loss(logits, targets, labels=None, temperature=4.0, alpha=0.9) -> torch.Tensor:
    """How far the answers of N nets are from their targets' answers, one number a net.

    Args:
        logits: z `[N, B, K]`, any strides.
        targets: logits t `[N, B, K]` of one target per net, or `[B, K]` of one teacher for all.
            Constants: no gradient reaches them.
        labels: classes `[B]` or `[N, B]` (integers in 0..K-1), or None for distillation alone.
        temperature: T > 0, a float, or a tensor `[N]` with one per net (a constant too).
        alpha: weight of the distillation term; cross-entropy weighs 1 − alpha. Without labels the
            loss is the distillation term with weight 1 and alpha is not used.

    Returns:
        The loss of each net, averaged over its B samples, `[N]`, in the logits' dtype, or in fp32
        inside the region of `torch.autocast`. The Triton kernel's loss is differentiable once:
        gradients come with the loss, and differentiating them raises.

    Raises:
        ValueError: on wrong ranks, mismatched shapes, no nets or samples, or mixed devices or
            dtypes.

    Source: T² keeps gradients comparable between temperatures (Hinton et al. 2015); NetSpace
    trains with T = 4, and with alpha = 0.9 where labels take part.
    """
    logits, targets = autocast(logits, targets, dtype=torch.float32)
    op, place = "distillation_loss", logits.device
    sizes = check(op, {"logits": (logits, "NBK"), "targets": (targets, "BK", "NBK")})
    check(op, {"labels": (labels, "B", "NB")}, (place, torch.int64), **sizes)
    if labels is not None:  # on a GPU nothing waits for it
        torch._assert_async(((labels >= 0) & (labels < sizes["K"])).all())
    if isinstance(temperature, Tensor):
        temperature = temperature.to(place)
        check(op, {"temperature": (temperature, "", "N")}, **sizes)
    if not use_triton(logits):
        return distillation_loss_reference(logits, targets, labels, temperature, alpha)
    ones = torch.ones(sizes["N"], device=place)  # a fill, so no float is copied and waited for
    per_net = (ones * temperature).detach().to(torch.float32)
    weight = 1.0 if labels is None else float(alpha)
    return _distillation(logits, targets.detach(), labels, per_net, weight)[0]


def distillation_loss_reference(logits, targets, labels=None, temperature=4.0, alpha=0.9):
    """The same in PyTorch, differentiable in `logits`."""
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().view(-1, 1, 1)
    target_log = F.log_softmax(targets.detach() / temperature, dim=-1)
    log = F.log_softmax(logits / temperature, dim=-1)
    divergence = (target_log.exp() * (target_log - log)).sum(-1, keepdim=True)
    loss = (divergence * temperature**2).squeeze(-1)
    if labels is not None:
        index = labels.expand(logits.shape[:2]).unsqueeze(-1)
        entropy = -F.log_softmax(logits, dim=-1).gather(-1, index).squeeze(-1)
        loss = alpha * loss + (1 - alpha) * entropy
    return loss.mean(dim=1).to(logits.dtype)


@triton.jit
def _softmax(z):
    """Softmax and its logarithm over the last axis of a tile; padding holds −1e30."""
    shifted = z - tl.max(z, 1)[:, None]
    exp = tl.exp(shifted)
    total = tl.sum(exp, 1)[:, None]
    return exp / total, shifted - tl.log(total)


@triton.jit
def _loss_kernel(
    z, t, labels, temperatures, parts, dz, B, K, alpha, zn, zb, tn, tb, ln, lb,
    BM: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Loss and gradient of BM samples of one net; KP is K up to a power of 2."""
    n, m, k = place(B, KP, BM, KP)
    n, rows = n.to(tl.int64), m.to(tl.int64)[:, None]
    inside = (m[:, None] < B) & (k[None, :] < K)
    outside = tl.where(k < K, 0.0, -1e30)[None, :]
    temperature = tl.load(temperatures + n)
    logit = take(z + n * zn + rows * zb + k[None, :], inside)
    target = take(t + n * tn + rows * tb + k[None, :], inside)
    q, log_q = _softmax(logit / temperature + outside)
    p, log_p = _softmax(target / temperature + outside)
    apart = tl.where(inside, p * (log_p - log_q), 0.0)
    loss = tl.sum(apart, 1) * (temperature * temperature * alpha)
    grad = (q - p) * (temperature * alpha)
    if labels is not None:
        label = tl.load(labels + n * ln + m.to(tl.int64) * lb, mask=m < B, other=0)
        right = (label[:, None] == k[None, :]) & inside
        s, log_s = _softmax(logit + outside)
        loss -= tl.sum(tl.where(right, log_s, 0.0), 1) * (1 - alpha)
        grad += (s - tl.where(right, 1.0, 0.0)) * (1 - alpha)
    tl.store(parts + tl.program_id(0), tl.sum(loss, 0))
    put(dz + (n * B + rows) * K + k[None, :], grad / B, inside)


def _empty(logits, targets, labels, temperature, alpha):
    return logits.new_empty(logits.shape[0]), logits.new_empty(logits.shape)


def launch(
    logits: Tensor, targets: Tensor, labels: Tensor | None, temperature: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """The losses [N] and the gradient [N, B, K] of their sum."""
    nets, samples, classes = logits.shape
    logits, targets = (t if t.stride(-1) == 1 else t.contiguous() for t in (logits, targets))
    label_strides = (0, 0) if labels is None else labels.expand(nets, -1).stride()
    padded = max(2, triton.next_power_of_2(classes))
    rows = max(1, min(64, 2048 // padded))
    parts = logits.new_empty(nets, cdiv(samples, rows), dtype=torch.float32)
    grad = logits.new_empty(logits.shape)
    strides = *logits.stride()[:2], *targets.expand(nets, -1, -1).stride()[:2], *label_strides
    given = logits, targets, labels, temperature.contiguous(), parts, grad, samples, classes, alpha
    _loss_kernel[(parts.numel(),)](*given, *strides, BM=rows, KP=padded)
    return (parts.sum(1) / samples).to(logits.dtype), grad


def launch_backward(g, needs, logits, targets, labels, temperature, alpha, loss, grad):
    """The gradient of the logits, which the forward made already."""
    return (grad * g[:, None, None],)


_distillation = register_differentiable("distillation_loss", launch, _empty, launch_backward)
