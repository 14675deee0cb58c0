"""Backend `torch` of factorized_attention: groups of sequences are strided views of the grid.

The frames of all clips are one group. The positions are a group per clip, because their stride and the clips' do not
merge: looping over clips was 1.7 to 2.2 times faster than permuting into copies first (16 frames of 196 tokens,
12 heads of 64, float32 and bfloat16, 2 cores).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._attention import groups
from .._attention.options import Options, without_autocast
from .._attention.rotary import rotate


def _views(B: int, H: int, temporal_heads: int):
    """Yields (view of a grid `[B, T, S, H, ...]` as a group `[G, H', N, ...]`, the same for a mask `[B, T, S]`)."""
    for b in range(B if temporal_heads else 0):
        yield (
            lambda x, b=b: x[b, :, :, :temporal_heads].transpose(0, 1).transpose(1, 2),
            lambda m, b=b: m[b].t(),
        )  # [S, H', T, ...]
    if temporal_heads < H:
        yield (
            lambda x: x[:, :, :, temporal_heads:].flatten(0, 1).transpose(1, 2),
            lambda m: m.flatten(0, 1),
        )  # [B*T, H', S, ...]


def _groups(q: Tensor, k: Tensor, v: Tensor, temporal_heads: int, options: Options):
    """Yields (group, function to the same view of another grid)."""
    B, T, S, H, _ = q.shape
    q, k = _rotated(q, options), _rotated(k, options)
    mask = None if options.mask is None else options.mask.view(B, T, S)
    rows = None
    if options.seed is not None:
        rows = torch.arange(B * H * T * S, device=q.device).view(B, H, T, S).permute(0, 2, 3, 1)  # [B, T, S, H]
    for view, per_token in _views(B, H, temporal_heads):
        group_rows = None if rows is None else view(rows)
        yield groups.Group(view(q), view(k), view(v), None if mask is None else per_token(mask), group_rows), view


def _rotated(x: Tensor, options: Options, direction: int = 1) -> Tensor:
    if options.cos is None or options.sin is None:
        return x
    T, S = x.shape[1:3]
    return rotate(x, options.cos.view(T, S, -1), direction * options.sin.view(T, S, -1))


@without_autocast
def launch_fwd(q: Tensor, k: Tensor, v: Tensor, temporal_heads: int, options: Options) -> tuple[Tensor, None]:
    """q, k, v `[B, T, S, H, D]` -> o like q, and no lse: backward reads neither."""
    o = q.new_empty(q.shape)
    for group, view in _groups(q, k, v, temporal_heads, options):
        groups.forward(group, view(o), options)
    return o, None


@without_autocast
def launch_bwd(do, q, k, v, o, lse, dq, dk, dv, temporal_heads: int, options: Options) -> None:
    """Writes dq, dk, dv."""
    for group, view in _groups(q, k, v, temporal_heads, options):
        groups.backward(group, view(do), view(dq), view(dk), view(dv), options)
    if options.sin is not None:
        for gradient in (dq, dk):
            gradient.copy_(_rotated(gradient, options, -1))
