"""Backend `torch` for both attention ops: an op names its groups of sequences, each runs by the engine it suits."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from . import blockwise, sdpa
from .options import Options


class Group(NamedTuple):
    """Sequences of one length as strided views: heads first, `[G, H, N, D]`; nothing is copied to make one.

    mask: bool `[G, K]`; rows: int64 dropout rows `[G, H, Q]`, only with dropout.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    rows: Tensor | None


def forward(group: Group, o: Tensor, lse: Tensor, options: Options) -> None:
    """Writes o, a view like group.q, and, where backward will read it, lse, a view `[G, H, Q]`."""
    q, k, v, mask, rows = group
    if not sdpa.takes(k.shape[2], options.seed, options.softcap):
        return blockwise.forward(q, k, v, o, mask, rows, options)
    kept = sdpa.forward(q, k, v, o, mask, options)
    if kept is not None:
        lse.copy_(kept)


def backward(group: Group, do, o, lse, dq, dk, dv, options: Options) -> None:
    """Writes dq, dk, dv, views like group.q, k, v; o and lse as `forward` wrote them."""
    q, k, v, mask, rows = group
    if sdpa.takes(k.shape[2], options.seed, options.softcap):
        sdpa.backward(do, q, k, v, o, lse, dq, dk, dv, mask, options)
    else:
        blockwise.backward(do, q, k, v, dq, dk, dv, mask, rows, options)
