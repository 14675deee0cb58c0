"""Registers vivit_kernels::joint_attention_fwd and _bwd; what they run is chosen by the backend's name."""

import torch

from .._attention.registration import register
from . import tiles


def _flops(q: tuple, k: tuple, _: int) -> int:
    B, N, H, D = q
    return 4 * B * H * N * k[1] * D


def _triton_keeps(q: tuple, k: tuple, dtype: torch.dtype, _: int) -> bool:
    return tiles.current("backward", q[1], q[3], dtype.itemsize, k[1]).keeps_output


register("joint_attention", __package__ or "", _flops, {"triton": _triton_keeps})
