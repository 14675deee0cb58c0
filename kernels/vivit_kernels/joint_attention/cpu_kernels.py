"""Backend `cpu` of joint_attention: the launchers; a clip is a token grid of one frame."""

from __future__ import annotations

from torch import Tensor

from .._attention import cpu_grid
from .._attention.options import Options


def _frame(*tensors: Tensor | None) -> list:
    return [None if x is None else x.unsqueeze(1) for x in tensors]  # [B, N, H, D] -> [B, 1, N, H, D]


def launch_fwd(q: Tensor, k: Tensor, v: Tensor, _: int, options: Options, keep: bool = False):
    """q `[B, N_q, H, D]`, k, v `[B, N_k, H, D]` -> (o like q, statistics of every query for the backward, or None)."""
    o = q.new_empty(q.shape)
    return o, cpu_grid.launch_fwd(*_frame(q, k, v, o), 0, options, keep)


def launch_bwd(do, q, k, v, o, lse, dq, dk, dv, _: int, options: Options) -> None:
    """Writes dq, dk, dv."""
    do, q, k, v, o, dq, dk, dv = _frame(do, q, k, v, o, dq, dk, dv)
    cpu_grid.launch_bwd(do, q, k, v, o, lse, dq, dk, dv, 0, options)
