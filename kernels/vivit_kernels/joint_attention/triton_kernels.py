"""Backend `triton` of joint_attention: the launchers; a clip is a token grid of one frame."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .._attention import triton_grid
from .._attention.options import Options
from .._triton import arch_of
from . import tiles
from .tiles import Tiles

_OP = "joint_attention"


def _tile(q: Tensor, k: Tensor) -> Callable[[str], Tiles]:
    N, D, itemsize = q.shape[1], q.shape[3], q.dtype.itemsize
    return lambda direction: tiles.current(direction, N, D, itemsize, arch_of(q.device), k.shape[1])


def _frame(*tensors: Tensor | None) -> list:
    return [None if x is None else x.unsqueeze(1) for x in tensors]  # [B, N, H, D] -> [B, 1, N, H, D]


def launch_fwd(q: Tensor, k: Tensor, v: Tensor, _: int, options: Options, keep: bool = False):
    """q `[B, N_q, H, D]`, k, v `[B, N_k, H, D]` -> (o like q, statistics of every query for the backward, or None)."""
    tile = _tile(q, k)
    q, k, v = _frame(q, k, v)
    o, stats = triton_grid.launch_fwd(_OP, q, k, v, 0, options, tile, tiles.chosen(), keep)
    return o.squeeze(1), stats


def launch_bwd(do, q, k, v, o, lse, dq, dk, dv, _: int, options: Options) -> None:
    """Writes dq, dk, dv, each once."""
    tile = _tile(q, k)
    do, q, k, v, o, dq, dk, dv = _frame(do, q, k, v, o, dq, dk, dv)
    triton_grid.launch_bwd(_OP, do, q, k, v, o, lse, dq, dk, dv, 0, options, tile, tiles.chosen())
