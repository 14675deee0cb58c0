"""Backend `cpu` of joint_attention: the launchers; a clip is a token grid of one frame."""

from __future__ import annotations

from torch import Tensor

from .._attention import cpu_grid
from .._attention.options import Options


def _frame(x: Tensor) -> Tensor:
    return x.unsqueeze(1)  # [B, N, H, D] -> [B, 1, N, H, D]


def launch_fwd(q: Tensor, k: Tensor, v: Tensor, _: int, options: Options, keep: bool = False):
    """q `[B, N_q, H, D]`, k, v `[B, N_k, H, D]` -> (o like q, statistics of every query for the backward, or None)."""
    o = q.new_empty(q.shape)
    return o, cpu_grid.launch_fwd(_frame(q), _frame(k), _frame(v), _frame(o), 0, options, keep)


def launch_bwd(do, q, k, v, o, lse, dq, dk, dv, _: int, options: Options) -> None:
    """Writes dq, dk, dv."""
    do, q, k, v, dq, dk, dv = (_frame(x) for x in (do, q, k, v, dq, dk, dv))
    cpu_grid.launch_bwd(do, q, k, v, None if o is None else _frame(o), lse, dq, dk, dv, 0, options)
