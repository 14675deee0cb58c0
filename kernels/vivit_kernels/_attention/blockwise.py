"""Attention by blocks of whole score rows, in plain PyTorch: the engine of backend `torch` for every backward, and for
the forward of short sequences, of dropout and of soft-cap.

A block holds as many sequences, or of a long one as many queries, as fit in a scratch of a few megabytes, with all of
their keys, so softmax is exact in one pass, and backward recomputes it from q and k alone: neither o, lse nor any N x N
matrix is kept. On a CPU the products run in float32: fp16 products are hundreds of times slower there, bf16 ones too
where the hardware has no bf16 dot products, and rounding scores to 16 bits costs accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._philox import keep_mask
from . import tiles
from .options import Options


def _chunks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, int]]:
    """Yields (sequences, heads, queries per block): all heads of several short sequences, or a few of a long one."""
    (G, H, Q, D), K = q.shape, k.shape[2]
    on_cpu = q.device.type == "cpu"
    sequences, heads, step = tiles.current(on_cpu).cut(G, H, Q, K, D, torch.get_num_threads() if on_cpu else None)
    for g in range(0, G, sequences):
        for h in range(0, H, heads):
            yield slice(g, g + sequences), slice(h, h + heads), step


def _rows(x: Tensor) -> Tensor:
    """`[g, h, N, D]` as rows `[g * h, N, D]` without gaps, in float32 on a CPU where it came in 16 bits."""
    narrow = x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16)
    return (x.float() if narrow else x).flatten(0, 1).contiguous()


def _probabilities(
    q: Tensor, k: Tensor, mask: Tensor | None, options: Options, scores: Tensor
) -> tuple[Tensor, Tensor | None]:
    """q `[gh, Q, D]`, k `[gh, K, D]` -> probabilities before dropout `[gh, Q, K]`, and the slope of the soft-cap."""
    torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=options.scale, out=scores)
    slope = None
    if options.softcap:
        scores.div_(options.softcap).tanh_()
        slope = 1 - scores.square()
        scores.mul_(options.softcap)
    if mask is None:
        return torch.softmax(scores, -1, out=scores), slope
    by_sequence = scores.unflatten(0, (mask.shape[0], -1)).masked_fill_(~mask, float("-inf"))
    p = torch.softmax(by_sequence, -1).masked_fill_(~mask.any(-1, keepdim=True), 0.0)
    return p.flatten(0, 1), slope


def _dropped(p: Tensor, keep: Tensor | None, options: Options) -> Tensor:
    if keep is None:
        return p
    return torch.where(keep, p / (1 - options.dropout_p), 0.0) if options.dropout_p < 1 else torch.zeros_like(p)


def _blocks(q: Tensor, k: Tensor, step: int, mask: Tensor | None, rows: Tensor | None, options: Options):
    """Of `[gh, N, D]`: yields (queries of a block, probabilities, slope of the soft-cap, pairs that dropout keeps)."""
    Q, K = q.shape[1], k.shape[1]
    scratch = q.new_empty(q.shape[0], step, K)
    for start in range(0, Q, step):
        block = slice(start, min(start + step, Q))
        size = block.stop - start
        scores = scratch if size == step else q.new_empty(q.shape[0], size, K)
        keep = None
        if rows is not None and options.seed is not None:
            keep = keep_mask(options.seed, rows[:, block], K, options.dropout_p)
        yield block, *_probabilities(q[:, block], k, mask, options, scores), keep


def forward(q, k, v, o, mask: Tensor | None, rows: Tensor | None, options: Options) -> None:
    """Writes o `[G, H, Q, D]` for q of its shape, k, v `[G, H, K, D]`, mask bool `[G, K]`, dropout rows `[G, H, Q]`."""
    for some, heads, step in _chunks(q, k):
        q_rows, k_rows, v_rows = (_rows(x[some, heads]) for x in (q, k, v))
        mask_rows = None if mask is None else mask[some, None, None, :]
        drop_rows = None if rows is None else rows[some, heads].flatten(0, 1)
        written = o[some, heads]
        for block, p, _, keep in _blocks(q_rows, k_rows, step, mask_rows, drop_rows, options):
            product = torch.bmm(_dropped(p, keep, options), v_rows)
            written[:, :, block] = product.unflatten(0, written.shape[:2])


def backward(do, q, k, v, dq, dk, dv, mask: Tensor | None, rows: Tensor | None, options: Options) -> None:
    """Writes dq, dk, dv for the shapes of `forward`; dk and dv are summed over blocks of queries in fp32 or better."""
    for some, heads, step in _chunks(q, k):
        do_rows, q_rows, k_rows, v_rows = (_rows(x[some, heads]) for x in (do, q, k, v))
        mask_rows = None if mask is None else mask[some, None, None, :]
        drop_rows = None if rows is None else rows[some, heads].flatten(0, 1)
        gradients = [x[some, heads] for x in (dq, dk, dv)]
        wide = torch.promote_types(q_rows.dtype, torch.float32)
        scratch = q_rows.new_empty(q_rows.shape[0], step, k_rows.shape[1])
        dk_sum, dv_sum = (torch.zeros(k_rows.shape, dtype=wide, device=k.device) for _ in range(2))
        for block, p, slope, keep in _blocks(q_rows, k_rows, step, mask_rows, drop_rows, options):
            _add_product(dv_sum, _dropped(p, keep, options).transpose(1, 2), do_rows[:, block])
            dp = scratch if p.shape[1] == step else torch.empty_like(p)
            dp = _dropped(torch.bmm(do_rows[:, block], v_rows.transpose(1, 2), out=dp), keep, options)
            # p * (dp - rowsum(p * dp)), in place: with dp after dropout it is exact without o
            ds = torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=dp)
            if slope is not None:
                ds.mul_(slope)
            product = torch.bmm(ds, k_rows).mul_(options.scale)
            gradients[0][:, :, block] = product.unflatten(0, gradients[0].shape[:2])
            _add_product(dk_sum, ds.transpose(1, 2), q_rows[:, block])
        for written, total in zip(gradients[1:], (dk_sum.mul_(options.scale), dv_sum), strict=True):
            written.copy_(total.unflatten(0, written.shape[:2]))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total.add_(torch.bmm(a, b))
