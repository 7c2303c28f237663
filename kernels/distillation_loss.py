"""Distillation for N nets: α·T²·KL(softmax(t/T) ‖ softmax(z/T)) + (1 − α)·CE(z, labels)."""

import torch
import torch.nn.functional as F

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
    return distillation_loss_reference(logits, targets, labels, temperature, alpha)


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
    if isinstance(temperature, torch.Tensor) and tuple(temperature.shape) not in ((), (nets,)):
        raise ValueError(
            f"distillation_loss: temperature {shape(temperature)} must be a number or {[nets]}, "
            f"one per net of logits {shape(logits)}."
        )
