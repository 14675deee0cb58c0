"""Backend `torch` of factorized_attention: frames and positions one slice at a time, on strided views of the grid."""

from __future__ import annotations

import torch
from torch import Tensor

from .._attention.blockwise import attend, attend_backward
from .._attention.options import Options
from .._attention.rotary import rotate


def _sequences(shape, temporal_heads: int, options: Options, device):
    """Yields (slice of a `[B, T, S, H, D]` grid as `[G, N, D]`, key mask, dropout rows) for every group of sequences.

    Spatial heads: G = heads of one frame. Temporal heads: G = positions of one head of one clip.
    """
    B, T, S, H, _ = shape
    rows = None if options.seed is None else torch.arange(B * H * T * S, device=device).view(B, H, T, S)
    mask = None if options.mask is None else options.mask.view(B, T, S)
    for b in range(B):
        for h in range(temporal_heads):
            yield (
                lambda x, b=b, h=h: x[b, :, :, h].transpose(0, 1),  # [S, T, D]
                None if mask is None else mask[b].t()[:, None, :],
                None if rows is None else rows[b, h].t(),
            )
        for t in range(T if temporal_heads < H else 0):
            yield (
                lambda x, b=b, t=t: x[b, t, :, temporal_heads:].transpose(0, 1),  # [H, S, D]
                None if mask is None else mask[b, t],
                None if rows is None else rows[b, temporal_heads:, t],
            )


def launch_fwd(q: Tensor, k: Tensor, v: Tensor, temporal_heads: int, options: Options) -> tuple[Tensor, Tensor]:
    o = q.new_empty(q.shape)
    q, k = _rotated(q, k, options)
    for view, mask, rows in _sequences(q.shape, temporal_heads, options, q.device):
        attend(view(q), view(k), view(v), view(o), mask, rows, options)
    return o, q.new_empty(0, dtype=torch.float32)


def launch_bwd(do, q, k, v, o, lse, dq, dk, dv, temporal_heads: int, options: Options) -> None:
    q, k = _rotated(q, k, options)
    for view, mask, rows in _sequences(q.shape, temporal_heads, options, q.device):
        attend_backward(*(view(x) for x in (do, q, k, v, dq, dk, dv)), mask, rows, options)
    if options.cos is not None and options.sin is not None:
        dq_rotated, dk_rotated = _rotated(dq, dk, options._replace(sin=-options.sin))
        dq.copy_(dq_rotated)
        dk.copy_(dk_rotated)


def _rotated(q: Tensor, k: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    if options.cos is None or options.sin is None:
        return q, k
    tables = options.cos.view(*q.shape[1:3], -1), options.sin.view(*q.shape[1:3], -1)
    return rotate(q, *tables), rotate(k, *tables)
