"""Backend `torch` of joint_attention: a clip's heads are a group of sequences as they lie."""

from __future__ import annotations

import torch
from torch import Tensor

from .._attention import groups
from .._attention.options import Options, without_autocast
from .._attention.rotary import rotate


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)  # [B, N, H, ...] -> [B, H, N, ...]


def _group(q: Tensor, k: Tensor, v: Tensor, options: Options) -> groups.Group:
    B, N, H, _ = q.shape
    if options.cos is not None and options.sin is not None:
        q, k = rotate(q, options.cos, options.sin), rotate(k, options.cos, options.sin)
    rows = None if options.seed is None else torch.arange(B * H * N, device=q.device).view(B, H, N)
    return groups.Group(_heads_first(q), _heads_first(k), _heads_first(v), options.mask, rows)


@without_autocast
def launch_fwd(q: Tensor, k: Tensor, v: Tensor, _: int, options: Options) -> tuple[Tensor, None]:
    """q `[B, N_q, H, D]`, k and v `[B, N_k, H, D]` -> o like q, and no lse: backward reads neither."""
    o = q.new_empty(q.shape)
    groups.forward(_group(q, k, v, options), _heads_first(o), options)
    return o, None


@without_autocast
def launch_bwd(do, q, k, v, o, lse, dq, dk, dv, _: int, options: Options) -> None:
    """Writes dq, dk, dv."""
    group = _group(q, k, v, options)
    groups.backward(group, _heads_first(do), _heads_first(dq), _heads_first(dk), _heads_first(dv), options)
    if options.cos is not None and options.sin is not None:
        for gradient in (dq, dk):
            gradient.copy_(rotate(gradient, options.cos, -options.sin))
