"""Backend `xformers` of joint_attention: its memory-efficient attention, by the functions that give the logsumexp."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from .._attention.options import Options
from .peer_views import whole_vectors, write


def launch_fwd(q: Tensor, k: Tensor, v: Tensor, _: int, options: Options, keep: bool = False):
    """q `[B, N_q, H, D]`, k, v `[B, N_k, H, D]` -> (o like q, logsumexp fp32 `[B, H, N_q]` or None)."""
    B, N, H, _ = q.shape
    if B == 0:
        return q.new_empty(q.shape), q.new_empty(B, H, N, dtype=torch.float32) if keep else None
    ops = importlib.import_module("xformers.ops")
    q, k, v = whole_vectors(q, k, v)
    if not keep:
        return ops.memory_efficient_attention_forward(q, k, v, scale=options.scale).contiguous(), None
    o, lse = ops.memory_efficient_attention_forward_requires_grad(q, k, v, scale=options.scale)
    return o.contiguous(), lse[:, :, :N].contiguous()  # some of its kernels round N up to 32; backward pads again


def launch_bwd(do, q, k, v, o, lse, dq, dk, dv, _: int, options: Options) -> None:
    """Writes dq, dk, dv."""
    if q.shape[0] == 0:
        return
    ops = importlib.import_module("xformers.ops")
    do, q, k, v, o = whole_vectors(do, q, k, v, o)
    write((dq, dk, dv), ops.memory_efficient_attention_backward(do, o, lse, q, k, v, scale=options.scale))
