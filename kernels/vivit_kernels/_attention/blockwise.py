"""Attention by blocks of whole score rows, in plain PyTorch: the engine of backend `torch` for short sequences, dropout
and soft-cap.

A block holds as many sequences, or of a long one as many queries, as fit in a scratch of a few megabytes, with all of
their keys, so softmax is exact in one pass, and backward recomputes it from q and k alone: neither o, lse nor any N x N
matrix is kept. On a CPU the products run in float32: fp16 products are hundreds of times slower there, bf16 ones too
where the hardware has no bf16 dot products, and rounding scores to 16 bits costs accuracy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._philox import keep_mask
from .options import Options

# Scores of a block: with 16 MB joint attention over 3137 tokens ran 1.3x faster than with 4 and 1.4x than with 64.
SCORES = 1 << 22
# q, k and v of a block, copied once into rows: 28 positions of 16 frames and 12 heads of 64; 7 or 98 were 1.7x slower
# in bfloat16, equal in float32. Both: Ice Lake, 2 cores.
INPUTS = 1 << 20


def _blocks(q: Tensor, k: Tensor, mask: Tensor | None, rows: Tensor | None):
    """Yields per block (slice of sequences, slice of queries, mask `[g, 1, 1, K]`, rows `[g, H, Q]`)."""
    (G, H, Q, D), K = q.shape, k.shape[2]
    sequences = max(1, min(SCORES // (H * Q * K), INPUTS // (H * (Q + 2 * K) * D)))
    queries = max(1, min(Q, SCORES // (H * K)))
    for g in range(0, G, sequences):
        some = slice(g, g + sequences)
        for i in range(0, Q, queries):
            block = slice(i, i + queries)
            yield (
                some,
                block,
                None if mask is None else mask[some, None, None, :],
                None if rows is None else rows[some, :, block],
            )


def _rows(x: Tensor) -> Tensor:
    """`[g, H, N, D]` as `[g * H, N, D]`, in float32 on a CPU where it came in 16 bits."""
    narrow = x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16)
    return (x.float() if narrow else x).flatten(0, 1)


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None, options: Options) -> tuple[Tensor, Tensor | None]:
    """q `[gH, Q, D]`, k `[gH, K, D]` -> probabilities before dropout `[gH, Q, K]`, and the soft-cap's derivative."""
    scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=options.scale)
    slope = None
    if options.softcap:
        scores.div_(options.softcap).tanh_()
        slope = 1 - scores.square()
        scores.mul_(options.softcap)
    if mask is None:
        return torch.softmax(scores, -1), slope
    by_sequence = scores.unflatten(0, (mask.shape[0], -1)).masked_fill_(~mask, float("-inf"))
    p = torch.softmax(by_sequence, -1).masked_fill_(~mask.any(-1, keepdim=True), 0.0)
    return p.flatten(0, 1), slope


def _dropped(p: Tensor, keep: Tensor | None, options: Options) -> Tensor:
    if keep is None:
        return p
    return torch.where(keep, p / (1 - options.dropout_p), 0.0) if options.dropout_p < 1 else torch.zeros_like(p)


def _keep(rows: Tensor | None, keys: int, options: Options) -> Tensor | None:
    if rows is None or options.seed is None:
        return None
    return keep_mask(options.seed, rows.flatten(0, 1), keys, options.dropout_p)


def forward(q, k, v, o, mask: Tensor | None, rows: Tensor | None, options: Options) -> None:
    """Writes o `[G, H, Q, D]` for q like it, k, v `[G, H, K, D]`, mask bool `[G, K]`, dropout rows `[G, H, Q]`."""
    for some, block, m, r in _blocks(q, k, mask, rows):
        q_rows, k_rows, v_rows = _rows(q[some, :, block]), _rows(k[some]), _rows(v[some])
        p, _ = _probabilities(q_rows, k_rows, m, options)
        p = _dropped(p, _keep(r, k.shape[2], options), options)
        o[some, :, block] = torch.bmm(p, v_rows).unflatten(0, (-1, q.shape[1]))


def backward(do, q, k, v, dq, dk, dv, mask: Tensor | None, rows: Tensor | None, options: Options) -> None:
    """Writes dq, dk, dv for the shapes of `forward`; dk and dv are summed over blocks of queries in fp32 or better."""
    H, K = q.shape[1], k.shape[2]
    sums: tuple[Tensor, Tensor] | None = None
    for some, block, m, r in _blocks(q, k, mask, rows):
        do_rows, q_rows, k_rows, v_rows = (
            _rows(do[some, :, block]),
            _rows(q[some, :, block]),
            _rows(k[some]),
            _rows(v[some]),
        )
        p, slope = _probabilities(q_rows, k_rows, m, options)
        keep = _keep(r, K, options)
        wide = torch.promote_types(p.dtype, torch.float32)
        dv_part = torch.bmm(_dropped(p, keep, options).transpose(1, 2), do_rows).to(wide)
        dp = _dropped(torch.bmm(do_rows, v_rows.transpose(1, 2)), keep, options)
        delta = (p * dp).sum(-1, keepdim=True, dtype=wide)  # from dP after dropout: exact without o
        ds = dp.sub_(delta).mul_(p)
        if slope is not None:
            ds.mul_(slope)
        dq[some, :, block] = torch.bmm(ds, k_rows).mul_(options.scale).unflatten(0, (-1, H))
        dk_part = torch.bmm(ds.transpose(1, 2), q_rows).to(wide)
        sums = (
            (dk_part, dv_part) if sums is None or block.start == 0 else (sums[0].add_(dk_part), sums[1].add_(dv_part))
        )
        if block.stop >= q.shape[2]:
            dk[some] = sums[0].mul_(options.scale).unflatten(0, (-1, H))
            dv[some] = sums[1].unflatten(0, (-1, H))
