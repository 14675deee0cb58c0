"""Backend `cuda` of joint_attention: launchers of the native library's CUDA C++ kernels (csrc/cuda/joint.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._attention.cuda_grid import aligned_rows, flat
from .._attention.options import Options
from .._triton import arch_of

_HOPPER = 90  # csrc/cuda/joint_hopper.h
_MOST_TURNED = 128  # channels that joint_hopper_backward.h takes; the others are turned on their way


def _scalars(options: Options) -> tuple[float, float, float]:
    return options.scale, options.softcap, options.dropout_p


def _room_to_turn(q: Tensor, options: Options) -> Tensor | None:
    turns = options.cos is not None and arch_of(q.device) == _HOPPER
    return q.new_empty((2, *q.shape)) if turns else None


def launch_fwd(q: Tensor, k: Tensor, v: Tensor, _: int, options: Options, keep: bool = False):
    """q `[B, N_q, H, D]`, k, v `[B, N_k, H, D]` -> (o like q, lse `[B, H, N_q]` to base 2 if `keep`, else None).

    One launch; with a rotary embedding on Hopper two, the first of which writes q and k turned, so that the copy engine
    brings them as products want them. A tensor whose rows do not begin at multiples of 16 bytes is copied first."""
    B, N, H, _ = q.shape
    o = q.new_empty(q.shape)
    lse = q.new_empty((B, H, N), dtype=torch.float32) if keep else None
    if q.numel():
        given = *map(aligned_rows, (q, k, v)), o, lse, *flat(options), _room_to_turn(q, options)
        torch.ops.vivit_kernels_native.cuda_joint_fwd(*given, *_scalars(options))
    return o, lse


def launch_bwd(do, q, k, v, o, lse, dq, dk, dv, _: int, options: Options) -> None:
    """Writes dq, dk, dv, each once, the same bits in every run, in two launches; one before them of fewer than 16
    queries or keys, or of a rotary embedding on Hopper. o and lse are the forward's. Copies as the forward does; what
    it needs beside is four bytes a query and head, and with that embedding room for q and k turned."""
    if q.numel():
        turned = _room_to_turn(q, options) if q.shape[-1] <= _MOST_TURNED else None
        given = *map(aligned_rows, (do, q, k, v, o)), lse, torch.empty_like(lse), dq, dk, dv, *flat(options), turned
        torch.ops.vivit_kernels_native.cuda_joint_bwd(*given, *_scalars(options))
