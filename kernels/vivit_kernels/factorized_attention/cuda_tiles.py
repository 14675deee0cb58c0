"""How backend `cuda` cuts its launches: 0 leaves a size to the launcher, whose rules and figures csrc/cuda/tiles.cuh
has.

What can be asked for at a launch is here, for `python -m bench tune` (the parts of such a file:
_attention/tiles.py). What a kernel is compiled for is not: warps of a block and the memory that short sequences share
(kResidentWarps, kShortBytes of csrc/cuda/resident.cuh), blocks of a multiprocessor (kBlocksAtATime there, kHopperBlocks
of hopper_launch.cuh), the rows of a step (kPassing of hopper_backward.cuh). Of those another library is compiled, and
the two compared by `python -m bench run` with VIVIT_KERNELS_LIBRARY.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from .._attention.cuda_grid import PACKED_TOKENS

BACKENDS = ("cuda",)
# csrc/cuda/attention.cuh and resident.cuh; tests/test_cuda_binding.py holds these copies to them
PACKED_WARPS = 4
MOST_STAGES = 3
GROUP_ROWS = 64  # longer sequences of 16 bits take Hopper's products there


@dataclass(frozen=True)
class Tiling:
    """Of one direction. packed_warps: of a block of packed sequences, one of them in each or two. stages: how many
    blocks' sequences lie in shared memory at a time, all but one on their way there."""

    direction: str
    packed_warps: int = 0
    stages: int = 0


def choose(direction: str) -> Tiling:
    """The launcher's own choice: nothing else was measured yet."""
    return Tiling(direction)


def _lengths(T: int, S: int, H: int, temporal_heads: int) -> list[int]:
    return [T] * (temporal_heads > 0) + [S] * (temporal_heads < H)


def _by_hopper(arch: int | None, longer: list[int]) -> bool:
    return arch == 90 and all(N > GROUP_ROWS for N in longer)


def staged(direction: str, lengths: list[int], D: int, itemsize: int, arch: int | None, softcap: bool) -> bool:
    """Whether the kernel of such a call, without options but perhaps a soft-cap, copies stages ahead (kStaged of
    csrc/cuda/resident.cuh): of one axis, where a block is alone on its multiprocessor and has registers left."""
    longer = [N for N in lengths if N > PACKED_TOKENS]
    if itemsize != 2 or not longer or len(lengths) > 1 or _by_hopper(arch, longer):
        return False
    backward = direction == "backward"
    alone = D > 64 or softcap or backward
    return alone and (not softcap or not backward or D <= 96)


def candidates(
    direction: str, T: int, S: int, H: int, temporal_heads: int, D: int, itemsize: int, arch: int | None, softcap: bool
) -> list[Tiling]:
    """Every number of heads of a block where all sequences are packed, of stages where copies are staged."""
    present, lengths = choose(direction), _lengths(T, S, H, temporal_heads)
    if itemsize == 2 and all(N <= PACKED_TOKENS for N in lengths):
        return [replace(present, packed_warps=warps) for warps in range(1, PACKED_WARPS + 1)]
    if staged(direction, lengths, D, itemsize, arch, softcap):
        return [replace(present, stages=stages) for stages in range(1, MOST_STAGES + 1)]
    return []


def plan(tile: Tiling, T: int, S: int, H: int, temporal_heads: int, itemsize: int) -> Tiling:
    """Of packed sequences a tile as it is launched."""
    packed = itemsize == 2 and all(N <= PACKED_TOKENS for N in _lengths(T, S, H, temporal_heads))
    return replace(tile, packed_warps=tile.packed_warps or PACKED_WARPS, stages=0) if packed else tile


_forced: dict[str, Tiling] = {}


@contextmanager
def forced(tile: Tiling) -> Iterator[None]:
    """Every launch of its direction in the process takes it, on all threads."""
    global _forced
    before, _forced = _forced, _forced | {tile.direction: tile}
    try:
        yield
    finally:
        _forced = before


def current(direction: str) -> Tiling:
    return _forced.get(direction) or choose(direction)
