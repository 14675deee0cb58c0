"""Tiles of temporal_block's Triton kernels, and what the operation costs at best, in one kernel and in three steps.

A tile is some positions of a clip with all their frames: 8 positions of 16 frames are 128 rows of a product. For each
head a program multiplies its rows, normalised on the way, with that head's slices of the weight, E long, and attends.
The rows do not fit beside the weight (128 x 768 numbers of 2 bytes are 196 of 227 KB), so they are read once a head,
from L2; and every tile reads the whole weight.
"""

from __future__ import annotations

from dataclasses import dataclass

from .._attention.triton_tiles import Override, power_of_two

BACKENDS = ("triton",)
_override = Override()
forced = _override.forced

# Of one H100: copy and matmul (16 bits) as measured there, bytes and operations a second; L2 is assumed.
COPY, MATMUL, L2 = 3.0e12, 798e12, 5.5e12
MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Tile:
    """direction; rows of a tile, channels that a step of a product takes, warps, stages of its pipeline."""

    direction: str
    rows: int
    step: int
    warps: int
    stages: int


def choose(direction: str, T: int, itemsize: int, arch: int) -> Tile:
    """Forward 128 rows: half as many would read the weight twice as often. Backward 64, which holds the scores twice.

    Registers, compiled for sm_90, E = 768, heads of 64, steps of 32 channels: 228 forward, 244 backward; of 64 channels
    255 and, backward, spills. Before sm_90, whose products hold both factors in registers, half the rows: forward, with
    steps of 16 channels, 236 at most; with steps of 32 and 7 frames 255 and spills.
    """
    if itemsize == 4:  # products on the FMA pipes hold their operands in registers
        return Tile(direction, power_of_two(T), 16, 4, 1)
    if arch < 90:
        return Tile(direction, 32, 32, 4, 2) if direction == "backward" else Tile(direction, 64, 16, 8, 2)
    return Tile(direction, 64, 32, 4, 2) if direction == "backward" else Tile(direction, 128, 32, 8, 2)


def candidates(direction: str, T: int, itemsize: int, arch: int) -> list[Tile]:
    first = choose(direction, T, itemsize, arch)
    if itemsize == 4:
        return []
    return [Tile(direction, rows, first.step, rows // 16, stages) for rows in (64, 128) for stages in (2, 3)]


def current(direction: str, T: int, itemsize: int, arch: int) -> Tile:
    return _override.of(direction) or choose(direction, T, itemsize, arch)  # pyright: ignore[reportReturnType]


def floors(E: int, heads: int, rows: int = 128, itemsize: int = 2) -> tuple[float, float]:
    """Least time of a forward in ns a token: (one kernel, three steps), where nothing but these bytes and products is.

    One kernel: the largest of x in and o out; the products of the projection and of a tile's scores; and from L2 the
    weight once a tile, x once a head. Three steps: norm, 2 tensors; projection, 4 or its products; attention, 4. How
    blocks fill the GPU is left to `times`.
    """
    row = E * itemsize
    products = 6 * E * E / MATMUL
    one = max(2 * row / COPY, products + 4 * rows * E / MATMUL, (3 * E * row / rows + heads * row) / L2)
    apart = 6 * row / COPY + max(4 * row / COPY, products)
    return 1e9 * one, 1e9 * apart


def times(shape: tuple, itemsize: int, arch: int) -> tuple[float, float]:
    """Least time of a forward in ns, shape `[B, T, S, H, D]`: (one kernel, three steps), each token at its floor.

    Of the one kernel every row of every tile of every round counts as a token: 8 clips of 196 positions and 16 frames
    are 196 tiles, two rounds of 132 multiprocessors, a quarter of them idle. The three steps, whose blocks are many and
    small, count as if they filled the GPU. For each architecture with its own tile, but with one H100's rates.
    """
    B, T, S, H, D = shape
    rows = choose("forward", T, itemsize, arch).rows
    rounds = -(-B * S // (rows // T * MULTIPROCESSORS))
    one, apart = floors(H * D, H, rows, itemsize)
    return rounds * MULTIPROCESSORS * rows * one, B * T * S * apart
