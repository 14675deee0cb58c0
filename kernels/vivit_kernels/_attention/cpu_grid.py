"""Attention on the token grid by the native library's CPU kernels (csrc/cpu): launchers of both attention ops."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from .options import Options

# kResidentKeys of csrc/cpu/attention.h: the backward of longer sequences reads o and statistics of the forward, but in
# float32, where no backward does.
RESIDENT_KEYS = 512


def statistics(dtype: torch.dtype, T: int, S: int, S_k: int, H: int, temporal_heads: int) -> int:
    """Numbers that a forward leaves of a query for a backward: largest score and 1 / sum, or none."""
    longest = max(T if temporal_heads > 0 else 0, S_k if temporal_heads < H else 0)
    return 2 if longest > RESIDENT_KEYS and dtype != torch.float32 else 0


def _flat(options: Options) -> tuple[Tensor | None, ...]:
    """Mask, seed and tables as the kernels read them: without gaps."""
    _, _, _, mask, seed, cos, sin = options
    return tuple(None if x is None else x.contiguous() for x in (mask, seed, cos, sin))


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def launch_fwd(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, temporal_heads: int, options: Options, keep: bool
) -> Tensor | None:
    """Writes o, of q's shape `[B, T, S, H, D]`, for k, v `[B, T, S_k, H, D]`; returns, if `keep`, the statistics
    `[2, B, H, T * S]` that a backward will ask for, if any."""
    B, T, S, H, _ = q.shape
    count = statistics(q.dtype, T, S, k.shape[2], H, temporal_heads) if keep else 0
    stats = torch.empty(count, B, H, T * S, dtype=torch.float32) if count else None
    if q.numel():
        scalars = temporal_heads, options.scale, options.softcap, options.dropout_p, _native.isa()
        torch.ops.vivit_kernels_native.attention_fwd(q, k, v, o, stats, *_flat(options), *scalars)
    return stats


def launch_bwd(do, q, k, v, o, stats, dq, dk, dv, temporal_heads: int, options: Options) -> None:
    """Writes dq, dk, dv; o and stats are the forward's, read where sequences are long."""
    if q.numel():
        scalars = temporal_heads, options.scale, options.softcap, options.dropout_p, _native.isa()
        given = _rows(do), q, k, v, o, stats, dq, dk, dv, *_flat(options)
        torch.ops.vivit_kernels_native.attention_bwd(*given, *scalars)
