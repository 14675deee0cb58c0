"""From scores to probabilities, defined: the part of attention that the joint and the factorised reference share."""

from __future__ import annotations

import torch
from torch import Tensor

from .._philox import keep_mask
from .options import Options


def probabilities(q: Tensor, k: Tensor, mask: Tensor | None, rows: Tensor, options: Options) -> Tensor:
    """softmax over keys of cap(scale * q.k), masked, then dropped.

    q: `[..., N_q, D]`, k: `[..., N_k, D]` -> `[..., N_q, N_k]`.
    mask: bool, broadcasts to `[..., 1, N_k]`, True may be attended; a query with no key left gets zeros.
    rows: int64 `[..., N_q]`, the dropout rows of the queries (see _philox.py).
    """
    scores = q @ k.transpose(-1, -2) * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    p = torch.softmax(scores, -1)
    if mask is not None:
        p = p.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    if options.seed is None:
        return p
    keep = keep_mask(options.seed, rows, k.shape[-2], options.dropout_p)
    return p * keep / (1 - options.dropout_p) if options.dropout_p < 1 else p * 0.0
