"""joint_attention, defined: unoptimised PyTorch, any dtype, device and size. The truth for every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from .._attention.options import Options
from .._attention.probabilities import probabilities
from .._attention.rotary import rotate


def joint_attention(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    """q `[B, N_q, H, D]`, k and v `[B, N_k, H, D]` -> `[B, N_q, H, D]`; differentiable by autograd."""
    B, N, H, _ = q.shape
    if options.cos is not None and options.sin is not None:
        q, k = rotate(q, options.cos, options.sin), rotate(k, options.cos, options.sin)
    mask = None if options.mask is None else options.mask[:, None, None, :]  # [B, 1, 1, N_k]
    rows = torch.arange(B * H * N, device=q.device).view(B, H, N)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, N, D]
    return (probabilities(q, k, mask, rows, options) @ v).transpose(1, 2).contiguous()
