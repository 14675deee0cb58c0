"""temporal_block, defined: unoptimised PyTorch, any dtype, device and size. The truth for every backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def temporal_block(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, heads: int, eps: float
) -> Tensor:
    """x `[B, T, S, E]` -> `[B, T, S, E]`, weight `[3 E, E]`: each head attends over T at each position."""
    n = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    q, k, v = F.linear(n, weight, bias).unflatten(-1, (3, heads, -1)).unbind(-3)  # [B, T, S, H, D]
    scores = torch.einsum("btshd,bushd->bshtu", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bshtu,bushd->btshd", scores.softmax(-1), v).flatten(-2)
