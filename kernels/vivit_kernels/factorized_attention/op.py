"""Registers vivit_kernels::factorized_attention_fwd and _bwd; what they run is chosen by the backend's name."""

import torch

from .._attention.registration import register
from . import tiles


def _flops(q: tuple, _: tuple, temporal_heads: int) -> int:
    B, T, S, H, D = q
    return 4 * B * T * S * D * (temporal_heads * T + (H - temporal_heads) * S)


def _triton_keeps(q: tuple, _: tuple, dtype: torch.dtype, temporal_heads: int) -> bool:
    _, T, S, H, D = q
    return tiles.current("backward", T, S, H, temporal_heads, D, dtype.itemsize).keeps_output


register("factorized_attention", __package__ or "", _flops, {"triton": _triton_keeps})
