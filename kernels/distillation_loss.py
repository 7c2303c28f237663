"""Distillation for N nets: α·T²·KL(softmax(t/T) ‖ softmax(z/T)) + (1 − α)·CE(z, labels).

Pointers and strides (in values):
    z      [N, B, K]  strides (zn, zb, 1)
    t      [N, B, K]  strides (tn, tb, 1); tn = 0 if all nets share the targets
    labels [N, B]     strides (ln, lb), int64; ln = 0 if shared
    T      [N]        fp32
    parts  [N, S]     fp32 losses summed over the samples of each program
    dz     [N, B, K]  contiguous: the gradient of the mean loss

Grid (N, ⌈B/BM⌉). One program reads BM rows of z and t once and writes their losses' sum and their
gradient; forward and gradient in one pass, and softmaxes never reach memory:

    ∂/∂z = (α·T·(softmax(z/T) − softmax(t/T)) + (1 − α)·(softmax(z) − onehot(label))) / B

Traffic in bytes for values of s bytes: 3·s·N·B·K (z and t read, dz written), against about ten
passes over [N, B, K] in PyTorch. About 15 operations a value: bound by memory.
"""

import torch
import torch.nn.functional as F

from .backend import tl, triton, use_triton
from .common import check_same_kind, shape


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
        The loss of each net, averaged over its B samples, `[N]`.

    Raises:
        ValueError: on wrong ranks, mismatched shapes, no nets or samples, or mixed devices or
            dtypes.

    Source: T² keeps gradients comparable between temperatures (Hinton et al. 2015); NetSpace
    trains with T = 4, and with alpha = 0.9 where labels take part.
    """
    _check(logits, targets, labels, temperature)
    if not use_triton(logits):
        return distillation_loss_reference(logits, targets, labels, temperature, alpha)
    per_net = torch.as_tensor(temperature, dtype=torch.float32, device=logits.device)
    per_net = per_net.detach().expand(logits.shape[0])
    weight = 1.0 if labels is None else float(alpha)
    return _distillation(logits, targets.detach(), labels, per_net, weight)[0]


def distillation_loss_reference(logits, targets, labels=None, temperature=4.0, alpha=0.9):
    """The same in PyTorch, differentiable in `logits`."""
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.detach().view(-1, 1, 1)
    target_log = F.log_softmax(targets.detach() / temperature, dim=-1)
    log = F.log_softmax(logits / temperature, dim=-1)
    divergence = (target_log.exp() * (target_log - log)).sum(-1, keepdim=True)
    loss = (divergence * temperature**2).squeeze(-1)
    if labels is not None:
        index = labels.expand(logits.shape[:2]).unsqueeze(-1)
        entropy = -F.log_softmax(logits, dim=-1).gather(-1, index).squeeze(-1)
        loss = alpha * loss + (1 - alpha) * entropy
    return loss.mean(dim=1)


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
    HAS_LABELS: tl.constexpr, BM: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Grid (N, ⌈B/BM⌉): loss and gradient of BM samples of one net; KP is K up to a power of 2."""
    n = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    k = tl.arange(0, KP)
    rows = m.to(tl.int64)[:, None]
    inside = (m[:, None] < B) & (k[None, :] < K)
    outside = tl.where(k < K, 0.0, -1e30)[None, :]
    temperature = tl.load(temperatures + n)
    logit = tl.load(z + n * zn + rows * zb + k[None, :], mask=inside, other=0).to(tl.float32)
    target = tl.load(t + n * tn + rows * tb + k[None, :], mask=inside, other=0).to(tl.float32)
    q, log_q = _softmax(logit / temperature + outside)
    p, log_p = _softmax(target / temperature + outside)
    apart = tl.where(inside, p * (log_p - log_q), 0.0)
    loss = tl.sum(apart, 1) * (temperature * temperature * alpha)
    grad = (q - p) * (temperature * alpha)
    if HAS_LABELS:
        label = tl.load(labels + n * ln + m.to(tl.int64) * lb, mask=m < B, other=0)
        right = (label[:, None] == k[None, :]) & inside
        s, log_s = _softmax(logit + outside)
        loss -= tl.sum(tl.where(right, log_s, 0.0), 1) * (1 - alpha)
        grad += (s - tl.where(right, 1.0, 0.0)) * (1 - alpha)
    tl.store(parts + n * tl.num_programs(1) + tl.program_id(1), tl.sum(loss, 0))
    at = dz + (n * B + rows) * K + k[None, :]
    tl.store(at, (grad / B).to(dz.dtype.element_ty), mask=inside)


def launch(logits, targets, labels, temperature, alpha):
    """The losses [N] and the gradient [N, B, K] of their sum."""
    nets, samples, classes = logits.shape
    logits = logits if logits.stride(2) == 1 else logits.contiguous()
    targets = targets if targets.stride(-1) == 1 else targets.contiguous()
    if targets.ndim == 2:
        targets = targets.expand(nets, -1, -1)
    label_strides = (0, 0) if labels is None else labels.expand(nets, -1).stride()
    padded = max(2, triton.next_power_of_2(classes))
    rows = max(1, min(64, 2048 // padded))
    programs = triton.cdiv(samples, rows)
    parts = logits.new_empty(nets, programs, dtype=torch.float32)
    grad = logits.new_empty(logits.shape)
    _loss_kernel[(nets, programs)](
        logits, targets, logits if labels is None else labels, temperature.contiguous(), parts,
        grad, samples, classes, alpha, *logits.stride()[:2], *targets.stride()[:2], *label_strides,
        HAS_LABELS=labels is not None, BM=rows, KP=padded, num_warps=4,
    )  # fmt: skip
    return (parts.sum(1) / samples).to(logits.dtype), grad


@torch.library.custom_op("netspace_lite::distillation_loss", mutates_args=())
def _distillation(
    logits: torch.Tensor, targets: torch.Tensor, labels: torch.Tensor | None,
    temperature: torch.Tensor, alpha: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return launch(logits, targets, labels, temperature, alpha)


@_distillation.register_fake
def _(logits, targets, labels, temperature, alpha):
    return logits.new_empty(logits.shape[0]), logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output):
    _, grad = output
    ctx.mark_non_differentiable(grad)
    ctx.save_for_backward(grad)


def _backward(ctx, g, _):
    (grad,) = ctx.saved_tensors
    return grad * g[:, None, None], None, None, None, None


_distillation.register_autograd(_backward, setup_context=_setup_context)


def _check(logits, targets, labels, temperature):
    if logits.ndim != 3 or logits.numel() == 0:
        raise ValueError(
            f"distillation_loss: logits must be [N, B, K] with no empty axis, got {shape(logits)}."
        )
    nets, samples, classes = logits.shape
    if tuple(targets.shape) not in ((nets, samples, classes), (samples, classes)):
        raise ValueError(
            f"distillation_loss: targets {shape(targets)} must be {[nets, samples, classes]}, one "
            f"per net, or {[samples, classes]}, one for all, to match logits {shape(logits)}."
        )
    check_same_kind("distillation_loss", logits=logits, targets=targets)
    if labels is not None and tuple(labels.shape) not in ((samples,), (nets, samples)):
        raise ValueError(
            f"distillation_loss: labels {shape(labels)} must be {[samples]} or {[nets, samples]} "
            f"to match logits {shape(logits)}."
        )
    if labels is not None and (labels.dtype != torch.int64 or labels.device != logits.device):
        raise ValueError(
            f"distillation_loss: labels {shape(labels)} must be torch.int64 on {logits.device}, "
            f"got {labels.dtype} on {labels.device}."
        )
    if isinstance(temperature, torch.Tensor) and tuple(temperature.shape) not in ((), (nets,)):
        raise ValueError(
            f"distillation_loss: temperature {shape(temperature)} must be a number or {[nets]}, "
            f"one per net of logits {shape(logits)}."
        )
