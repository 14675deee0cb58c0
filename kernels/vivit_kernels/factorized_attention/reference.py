"""factorized_attention, defined: unoptimised PyTorch, any dtype, device and size. The truth for every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from .._attention.options import Options
from .._attention.probabilities import probabilities
from .._attention.rotary import rotate


def factorized_attention(q: Tensor, k: Tensor, v: Tensor, temporal_heads: int, options: Options) -> Tensor:
    """q, k, v `[B, T, S, H, D]` -> the same shape: the first `temporal_heads` heads attend over T, the rest over S."""
    B, T, S, H, _ = q.shape
    if options.cos is not None and options.sin is not None:
        tables = options.cos.view(T, S, -1), options.sin.view(T, S, -1)
        q, k = rotate(q, *tables), rotate(k, *tables)
    mask = (
        torch.ones(B, T, S, dtype=torch.bool, device=q.device) if options.mask is None else options.mask.view(B, T, S)
    )
    rows = torch.arange(B * H * T * S, device=q.device).view(B, H, T, S)

    time = [x[..., :temporal_heads, :].permute(0, 2, 3, 1, 4) for x in (q, k, v)]  # [B, S, H, T, D]
    rows_time = rows[:, :temporal_heads].permute(0, 3, 1, 2)  # [B, S, H, T]
    mask_time = mask.transpose(1, 2)[:, :, None, None, :]  # [B, S, 1, 1, T]
    over_time = probabilities(time[0], time[1], mask_time, rows_time, options) @ time[2]

    space = [x[..., temporal_heads:, :].permute(0, 1, 3, 2, 4) for x in (q, k, v)]  # [B, T, H, S, D]
    rows_space = rows[:, temporal_heads:].permute(0, 2, 1, 3)  # [B, T, H, S]
    mask_space = mask[:, :, None, None, :]  # [B, T, 1, 1, S]
    over_space = probabilities(space[0], space[1], mask_space, rows_space, options) @ space[2]

    return torch.cat([over_time.permute(0, 3, 1, 2, 4), over_space.permute(0, 1, 3, 2, 4)], -2)
