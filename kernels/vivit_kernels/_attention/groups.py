"""Backend `torch` for both attention ops: an op names its groups of sequences, the engine that suits them runs."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from . import blockwise, sdpa
from .options import Options


class Group(NamedTuple):
    """Sequences of one length as strided views, heads first, `[G, H, N, D]`; nothing is copied to make one.

    mask: bool `[G, K]`; rows: int64 dropout rows `[G, H, Q]`, only with dropout.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    rows: Tensor | None


def forward(group: Group, o: Tensor, options: Options) -> None:
    """Writes o, a view like group.q."""
    q, k, v, mask, rows = group
    if sdpa.takes(k, options):
        sdpa.forward(q, k, v, o, mask, options)
    else:
        blockwise.forward(q, k, v, o, mask, rows, options)


def backward(group: Group, do: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, options: Options) -> None:
    """Writes dq, dk, dv, views like group.q, k, v."""
    q, k, v, mask, rows = group
    blockwise.backward(do, q, k, v, dq, dk, dv, mask, rows, options)
