"""Rotary position embedding for a grid of tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x `[..., N, H, D]` rotated in pairs (i, i + D/2) by tables `[N, D/2]`; in fp32 (or fp64), returned in x's dtype.

    The gradient of `rotate(x, cos, sin)` is `rotate(dx, cos, -sin)`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    first, second = x.to(wide).chunk(2, -1)
    cos, sin = cos.to(wide).unsqueeze(-2), sin.to(wide).unsqueeze(-2)  # [N, 1, D/2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def rotary_tables(
    T: int,
    rows: int,
    columns: int,
    head_size: int,
    *,
    base: float = 10000.0,
    split: tuple[int, int, int] | None = None,
    device=None,
) -> tuple[Tensor, Tensor]:
    """Tables (cos, sin), fp32 `[T, rows * columns, D/2]`, of a three-axis rotary embedding, for `rotary=`.

    The D/2 pairs are shared out between time, row and column by `split` (pairs per axis, default as even as can be,
    the rest to time); pair i of an axis with n pairs turns by position * base^(-i/n). Source: Su et al. 2021
    (arXiv 2104.09864), applied per axis. Raises ValueError for an empty grid, a split that does not add up to D/2, or a
    base that is not positive.

        cos, sin = rotary_tables(16, 14, 14, 64)
        o = joint_attention(q, k, v, rotary=(cos.flatten(0, 1), sin.flatten(0, 1)))
    """
    pairs = head_size // 2
    split = split or (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    if min(T, rows, columns) < 1 or not 0 < base < float("inf"):
        raise ValueError(
            f"rotary_tables: T={T}, rows={rows}, columns={columns} must be at least 1, base={base} positive and finite"
        )
    if head_size % 2 or len(split) != 3 or min(split) < 0 or sum(split) != pairs:
        raise ValueError(f"rotary_tables: split={split} must add up to head_size / 2 = {head_size / 2:g}")
    axes = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float64, device=device) for n in (T, rows, columns)), indexing="ij"
    )
    angles = [
        axis.reshape(T, -1, 1) * base ** (-torch.arange(n, dtype=torch.float64, device=device) / max(n, 1))
        for axis, n in zip(axes, split, strict=True)
    ]
    angle = torch.cat(angles, -1)  # [T, S, D/2]
    return angle.cos().float(), angle.sin().float()
