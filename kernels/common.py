"""What several ops share: activations and the checks every layer makes of its arguments."""

import torch
import torch.nn.functional as F

ACTIVATIONS = (None, "leaky_relu", "sine")


def activate(y, activation=None, slope=0.01, omega=1.0):
    """None, leaky ReLU with a negative `slope`, or sin(omega · y), elementwise."""
    if activation is None:
        return y
    if activation == "leaky_relu":
        return F.leaky_relu(y, slope)
    return torch.sin(omega * y)


def shape(tensor) -> str:
    """The shape of a tensor as error messages print it."""
    return str(list(tensor.shape))


def check_layer(op, x, weight, bias, shared_rank, activation, activations=ACTIVATIONS):
    """Check what a batched layer is given; `shared_rank` is the rank of an input shared by nets.

    Raises:
        ValueError: naming the shapes at fault and what to pass instead.
    """
    nets_axis = 0 if shared_rank == 2 else 1
    weight_rank = shared_rank + 1
    if weight.ndim != weight_rank or x.ndim not in (shared_rank, shared_rank + 1):
        raise ValueError(
            f"{op}: expected a weight of rank {weight_rank} and an input of rank {shared_rank} "
            f"(shared) or {shared_rank + 1} (per net), got x {shape(x)} and weight {shape(weight)}."
        )
    if x.numel() == 0 or weight.numel() == 0:
        raise ValueError(
            f"{op}: x {shape(x)} and weight {shape(weight)} must hold at least one net, one "
            "sample and one value on every axis."
        )
    if x.ndim > shared_rank and x.shape[nets_axis] != weight.shape[0]:
        raise ValueError(
            f"{op}: x {shape(x)} holds {x.shape[nets_axis]} nets but weight {shape(weight)} holds "
            f"{weight.shape[0]}; pass one input per net, or one of rank {shared_rank} for all."
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0], weight.shape[1]):
        raise ValueError(
            f"{op}: bias {shape(bias)} must be {list(weight.shape[:2])} to match weight "
            f"{shape(weight)}."
        )
    check_same_kind(op, x=x, weight=weight, bias=bias)
    if not weight[0].is_contiguous() or (bias is not None and not bias[0].is_contiguous()):
        raise ValueError(
            f"{op}: the weights {shape(weight)} (strides {weight.stride()}) of one net must lie "
            "contiguously in its row; only the stride between nets is free. Call .contiguous()."
        )
    if activation not in activations:
        raise ValueError(f"{op}: activation must be one of {activations}, not {activation!r}.")


def check_same_kind(op, **tensors):
    """Check that all tensors given share one device and one floating dtype."""
    present = {name: t for name, t in tensors.items() if t is not None}
    kinds = {(t.device, t.dtype) for t in present.values()}
    if len(kinds) > 1 or not next(iter(kinds))[1].is_floating_point:
        listing = ", ".join(f"{k} {shape(t)} {t.dtype} on {t.device}" for k, t in present.items())
        raise ValueError(f"{op}: tensors must share one device and one floating dtype: {listing}.")
