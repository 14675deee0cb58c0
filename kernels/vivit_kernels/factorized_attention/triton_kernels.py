"""Backend `triton` of factorized_attention: the launchers; the kernels are those of the token grid."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .._attention import triton_grid
from .._attention.options import Options
from .._triton import arch_of
from . import tiles
from .tiles import Tiles

_OP = "factorized_attention"


def _tile(q: Tensor, temporal_heads: int) -> Callable[[str], Tiles]:
    _, T, S, H, D = q.shape
    return lambda direction: tiles.current(direction, T, S, H, temporal_heads, D, q.dtype.itemsize, arch_of(q.device))


def launch_fwd(q: Tensor, k: Tensor, v: Tensor, temporal_heads: int, options: Options, keep: bool = False):
    """q, k, v `[B, T, S, H, D]` -> (o like q, statistics of every query for the backward, or None)."""
    tile = _tile(q, temporal_heads)
    return triton_grid.launch_fwd(_OP, q, k, v, temporal_heads, options, tile, tiles.chosen(), keep)


def launch_bwd(
    do, q, k, v, o, lse, dq, dk, dv, temporal_heads: int, options: Options, o_again: Tensor | None = None
) -> None:
    """Writes dq, dk, dv, each once; o_again: memory in which packed sequences, which need no o, recompute theirs."""
    tile = _tile(q, temporal_heads)
    triton_grid.launch_bwd(_OP, do, q, k, v, o, lse, dq, dk, dv, temporal_heads, options, tile, tiles.chosen(), o_again)
