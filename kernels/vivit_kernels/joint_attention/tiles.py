"""Tiles of the Triton kernels of joint_attention; their reasons stand in _attention/triton_tiles.py."""

from __future__ import annotations

from .._attention.triton_tiles import Override, Tiles, alternatives, tiles

BACKENDS = ("triton",)
_override = Override()
forced = _override.forced


def chosen() -> bool:
    """Whether tiles follow from the call alone: nothing is forced."""
    return not _override.active


def choose(direction: str, S: int, D: int, itemsize: int, arch: int) -> Tiles:
    return tiles(direction, D, itemsize, arch, None, (S, S))


def candidates(direction: str, S: int, D: int, itemsize: int, arch: int) -> list[Tiles]:
    return alternatives(choose(direction, S, D, itemsize, arch))


def current(direction: str, S: int, D: int, itemsize: int, arch: int, S_k: int | None = None) -> Tiles:
    """S, S_k: tokens of the queries and, where they differ, of the keys."""
    return _override.of(direction) or tiles(direction, D, itemsize, arch, None, (S, S if S_k is None else S_k))
