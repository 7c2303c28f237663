"""The whole SIREN 3 → h → h → 1 of N nets: w3·sin(ω(W2·sin(ω(W1·p + b1)) + b2)) + b3."""

import torch

from .common import check_same_kind, shape


def siren_mlp(points, rows, hidden, omega=30.0, precision=None) -> torch.Tensor:
    """Evaluate N signed distance nets at B points each.

    Args:
        points: `[B, 3]` shared by all nets, or `[N, B, 3]`.
        rows: `[N, P]`, each net's parameters in module order: weight and bias of 3→h, h→h, h→1,
            so P = h² + 6h + 1. Contiguous within a row.
        hidden: h, the width of both hidden layers.
        omega: frequency ω of the sines.
        precision: of fp32 products in the Triton kernel, "ieee" or "tf32"; None follows
            `torch.get_float32_matmul_precision()`.

    Returns:
        Signed distances `[N, B, 1]`.

    Raises:
        ValueError: on wrong ranks or row lengths, mismatched nets, no nets or points, mixed
            devices or dtypes, or rows that are not contiguous.
    """
    _check(points, rows, hidden)
    return siren_mlp_reference(points, rows, hidden, omega)


def siren_mlp_reference(points, rows, hidden, omega=30.0):
    """The same in PyTorch: one batched product per layer."""
    h = hidden
    w1, b1, w2, b2, w3, b3 = rows.split([3 * h, h, h * h, h, h, 1], dim=1)
    if points.ndim == 2:
        points = points.expand(rows.shape[0], -1, -1)
    y = torch.sin(omega * torch.baddbmm(b1[:, None], points, w1.unflatten(1, (h, 3)).mT))
    y = torch.sin(omega * torch.baddbmm(b2[:, None], y, w2.unflatten(1, (h, h)).mT))
    return torch.baddbmm(b3[:, None], y, w3[:, :, None])


def siren_params(hidden) -> int:
    """P, the number of parameters of a 3 → h → h → 1 net."""
    return hidden * hidden + 6 * hidden + 1


def _check(points, rows, hidden):
    if points.ndim not in (2, 3) or points.shape[-1] != 3 or rows.ndim != 2:
        raise ValueError(
            f"siren_mlp: expected points [B, 3] or [N, B, 3] and rows [N, P], got points "
            f"{shape(points)} and rows {shape(rows)}."
        )
    if points.numel() == 0 or rows.numel() == 0:
        raise ValueError(
            f"siren_mlp: points {shape(points)} and rows {shape(rows)} must hold at least one "
            "point and one net."
        )
    if rows.shape[1] != siren_params(hidden):
        raise ValueError(
            f"siren_mlp: rows {shape(rows)} must hold h² + 6h + 1 = {siren_params(hidden)} values "
            f"a net for hidden width {hidden}; unpack padded rows first."
        )
    if points.ndim == 3 and points.shape[0] != rows.shape[0]:
        raise ValueError(
            f"siren_mlp: points {shape(points)} are for {points.shape[0]} nets but rows "
            f"{shape(rows)} hold {rows.shape[0]}; pass [B, 3] to share the points."
        )
    check_same_kind("siren_mlp", points=points, rows=rows)
    if not rows[0].is_contiguous():
        raise ValueError(
            f"siren_mlp: the values of one net in rows {shape(rows)} (strides {rows.stride()}) "
            "must be contiguous; only the stride between nets is free. Call .contiguous()."
        )
