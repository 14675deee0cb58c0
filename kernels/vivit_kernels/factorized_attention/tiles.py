"""Tiles of the Triton kernels of factorized_attention; their reasons stand in _attention/triton_tiles.py.

What backend `cuda` has instead, heads of a block and stages of copies, is in cuda_tiles.py."""

from __future__ import annotations

from .._attention.triton_tiles import Override, Tiles, alternatives, tiles

BACKENDS = ("triton",)
_override = Override()
forced = _override.forced


def chosen() -> bool:
    """Whether tiles follow from the call alone: nothing is forced."""
    return not _override.active


def choose(direction: str, T: int, S: int, H: int, temporal_heads: int, D: int, itemsize: int, arch: int) -> Tiles:
    time, space = (T, T) if temporal_heads else None, (S, S) if temporal_heads < H else None
    return tiles(direction, D, itemsize, arch, time, space)


def candidates(
    direction: str, T: int, S: int, H: int, temporal_heads: int, D: int, itemsize: int, arch: int
) -> list[Tiles]:
    return alternatives(choose(direction, T, S, H, temporal_heads, D, itemsize, arch))


def current(direction: str, T: int, S: int, H: int, temporal_heads: int, D: int, itemsize: int, arch: int) -> Tiles:
    return _override.of(direction) or choose(direction, T, S, H, temporal_heads, D, itemsize, arch)
