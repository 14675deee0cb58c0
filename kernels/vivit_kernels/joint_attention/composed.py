"""Backend `torch` of joint_attention: blocks of whole score rows, a clip at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .._attention.blockwise import attend, attend_backward
from .._attention.options import Options
from .._attention.rotary import rotate


def _clips(q: Tensor, options: Options):
    """Per clip: its index, key mask and dropout rows."""
    B, N, H, _ = q.shape
    for b in range(B):
        mask = None if options.mask is None else options.mask[b]
        rows = None if options.seed is None else torch.arange(b * H * N, (b + 1) * H * N, device=q.device).view(H, N)
        yield b, mask, rows


def launch_fwd(q: Tensor, k: Tensor, v: Tensor, _: int, options: Options) -> tuple[Tensor, Tensor]:
    o = q.new_empty(q.shape)
    if options.cos is not None and options.sin is not None:
        q, k = rotate(q, options.cos, options.sin), rotate(k, options.cos, options.sin)
    for b, mask, rows in _clips(q, options):
        attend(*(x[b].transpose(0, 1) for x in (q, k, v, o)), mask, rows, options)
    return o, q.new_empty(0, dtype=torch.float32)


def launch_bwd(do, q, k, v, o, lse, dq, dk, dv, _: int, options: Options) -> None:
    if options.cos is not None and options.sin is not None:
        q, k = rotate(q, options.cos, options.sin), rotate(k, options.cos, options.sin)
    for b, mask, rows in _clips(q, options):
        attend_backward(*(x[b].transpose(0, 1) for x in (do, q, k, v, dq, dk, dv)), mask, rows, options)
    if options.cos is not None and options.sin is not None:
        dq.copy_(rotate(dq, options.cos, -options.sin))
        dk.copy_(rotate(dk, options.cos, -options.sin))
