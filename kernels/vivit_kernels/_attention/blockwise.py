"""Attention by blocks of whole score rows, in plain PyTorch: the core of backend `torch`.

A block holds a few heads and as many queries as fit in a scratch of a few megabytes, with all of their keys, so softmax
is exact in one pass, and backward recomputes it from q and k alone: neither o, lse nor any N x N matrix is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._philox import keep_mask
from .options import Options

SCRATCH_ELEMENTS = 1 << 20


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None, options: Options) -> tuple[Tensor, Tensor | None]:
    """q `[G, Q, D]`, k `[G, K, D]` -> probabilities before dropout `[G, Q, K]`, and the derivative of the soft-cap."""
    scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=options.scale)
    slope = None
    if options.softcap:
        scores.div_(options.softcap).tanh_()
        slope = 1 - scores.square()
        scores.mul_(options.softcap)
    if mask is None:
        return torch.softmax(scores, -1), slope
    p = torch.softmax(scores.masked_fill_(~mask, float("-inf")), -1)
    return p.masked_fill_(~mask.any(-1, keepdim=True), 0.0), slope


def _dropped(p: Tensor, rows: Tensor | None, options: Options) -> Tensor:
    if rows is None or options.seed is None:
        return p
    if options.dropout_p >= 1:
        return torch.zeros_like(p)
    return torch.where(keep_mask(options.seed, rows, p.shape[-1], options.dropout_p), p / (1 - options.dropout_p), 0.0)


def _query_blocks(q: Tensor, k: Tensor):
    step = max(1, min(q.shape[1], SCRATCH_ELEMENTS // max(1, q.shape[0] * k.shape[1])))
    return (slice(start, start + step) for start in range(0, q.shape[1], step))


def attend(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, mask: Tensor | None, rows: Tensor | None, options: Options
) -> None:
    """Writes o `[G, Q, D]` for q `[G, Q, D]`, k, v `[G, K, D]`; mask broadcasts to `[G, 1, K]`, rows `[G, Q]`."""
    for block in _query_blocks(q, k):
        p, _ = _probabilities(q[:, block], k, mask, options)
        p = _dropped(p, None if rows is None else rows[:, block], options)
        o[:, block] = torch.bmm(p, v)


def attend_backward(do, q, k, v, dq, dk, dv, mask, rows, options: Options) -> None:
    """Writes dq, dk, dv for the same shapes; dk and dv are summed over blocks of queries in fp32 or better."""
    wide = torch.promote_types(q.dtype, torch.float32)
    sums: tuple[Tensor, Tensor] | None = None
    for block in _query_blocks(q, k):
        p, slope = _probabilities(q[:, block], k, mask, options)
        block_rows = None if rows is None else rows[:, block]
        dv_part = torch.bmm(_dropped(p, block_rows, options).transpose(1, 2), do[:, block])
        dp = _dropped(torch.bmm(do[:, block], v.transpose(1, 2)), block_rows, options)
        delta = (p * dp).sum(-1, keepdim=True, dtype=wide)
        ds = dp.sub_(delta).mul_(p)
        if slope is not None:
            ds.mul_(slope)
        dq[:, block] = torch.bmm(ds, k).mul_(options.scale)
        dk_part = torch.bmm(ds.transpose(1, 2), q[:, block])
        sums = (dk_part.to(wide), dv_part.to(wide)) if sums is None else (sums[0].add_(dk_part), sums[1].add_(dv_part))
    if sums is not None:
        dk.copy_(sums[0].mul_(options.scale))
        dv.copy_(sums[1])
