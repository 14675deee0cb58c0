"""Registers vivit_kernels::factorized_attention_fwd and _bwd; what they run is chosen by the backend's name."""

import torch

from .._attention import cpu_grid, cuda_grid
from .._attention.registration import Saved, register
from .._attention.triton_tiles import statistics
from .._triton import arch_of
from . import tiles


def _flops(q: tuple, _: tuple, temporal_heads: int) -> int:
    B, T, S, H, D = q
    return 4 * B * T * S * D * (temporal_heads * T + (H - temporal_heads) * S)


def _triton_saves(q: tuple, _: tuple, temporal_heads: int, dtype: torch.dtype, device: torch.device) -> Saved:
    B, T, S, H, D = q
    tile = tiles.current("backward", T, S, H, temporal_heads, D, dtype.itemsize, arch_of(device))
    return (statistics(dtype.itemsize), B, H, T * S) if tile.keeps_output else None


def _cpu_saves(q: tuple, _: tuple, temporal_heads: int, dtype: torch.dtype, *__) -> Saved:
    B, T, S, H, _ = q
    count = cpu_grid.statistics(dtype, T, S, S, H, temporal_heads)
    return (count, B, H, T * S) if count else None


def _cuda_saves(q: tuple, _: tuple, temporal_heads: int, dtype: torch.dtype, *__) -> Saved:
    B, T, S, H, _ = q
    return (B, H, T * S) if cuda_grid.keeps_output(T, S, H, temporal_heads, dtype.itemsize) else None


_SAVES = {"cuda": _cuda_saves, "triton": _triton_saves, "cpu": _cpu_saves}
register("factorized_attention", __package__ or "", _flops, _SAVES)
