"""Registers vivit_kernels::joint_attention_fwd and _bwd; what they run is chosen by the backend's name."""

import torch

from .._attention import cpu_grid
from .._attention.registration import Saved, register
from .._attention.triton_tiles import statistics
from .._triton import arch_of
from . import tiles


def _flops(q: tuple, k: tuple, _: int) -> int:
    B, N, H, D = q
    return 4 * B * H * N * k[1] * D


def _triton_saves(q: tuple, k: tuple, _: int, dtype: torch.dtype, device: torch.device) -> Saved:
    B, N, H, D = q
    tile = tiles.current("backward", N, D, dtype.itemsize, arch_of(device), k[1])
    return (statistics(dtype.itemsize), B, H, N) if tile.keeps_output else None


def _cpu_saves(q: tuple, k: tuple, _: int, dtype: torch.dtype, *__) -> Saved:
    B, N, H, _ = q
    count = cpu_grid.statistics(dtype, 1, N, k[1], H, 0)
    return (count, B, H, N) if count else None


def _lse(q: tuple, k: tuple, *_) -> Saved:
    """Logsumexp of each row of scores: of others' kernels natural, one form for all of them; of `cuda` to base 2."""
    B, N, H, _ = q
    return B, H, N


_SAVED = {
    "triton": _triton_saves,
    "cpu": _cpu_saves,
    "cuda": _lse,
    "sdpa": _lse,
    "flash_attn": _lse,
    "xformers": _lse,
}
register("joint_attention", __package__ or "", _flops, _SAVED)
