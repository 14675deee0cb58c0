"""Tiles of the Triton attention kernels: what one launch is told, the rules that choose it, arithmetic of powers of two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

PACKED, RESIDENT, STREAMING = "packed", "resident", "streaming"


@dataclass(frozen=True)
class Axis:
    """How the sequences along one axis are cut.

    rows: of a tile; packed: as many whole sequences as fit, else a block of queries.
    keys: packed: unused; resident forward: pieces that hold all keys; else one block of keys.
    parts: programs that share the queries of one resident sequence (forward).
    """

    regime: str
    rows: int
    keys: tuple[int, ...] = ()
    parts: int = 1


@dataclass(frozen=True)
class Tiles:
    """One launch: time and space (None where no head attends along it), and what both share.

    split: head sizes that are no power of two are two pieces (80 = 64 + 16), else padded to one.
    keys: of a backward, the second launch, for dk and dv of streamed sequences.
    """

    direction: str
    time: Axis | None
    space: Axis | None
    warps: int
    stages: int
    split: bool = True
    keys: Tiles | None = None

    @property
    def keeps_output(self) -> bool:
        """Whether this backward reads o and the statistics of the forward: all but the packed one."""
        return any(axis is not None and axis.regime != PACKED for axis in (self.time, self.space))

    @property
    def streams(self) -> bool:
        return any(axis is not None and axis.regime == STREAMING for axis in (self.time, self.space))


def statistics(itemsize: int) -> int:
    """Numbers that a forward leaves of a query for a backward: one lse, in float32 its two parts apart."""
    return 2 if itemsize == 4 else 1


class Override:
    """The tile that a test or a search forces on every launch of its direction."""

    def __init__(self) -> None:
        self._tiles: dict[str, Tiles] = {}

    @contextmanager
    def forced(self, tile: Tiles) -> Iterator[None]:
        before = self._tiles
        self._tiles = before | {tile.direction: tile}
        try:
            yield
        finally:
            self._tiles = before

    @property
    def active(self) -> bool:
        return bool(self._tiles)

    def of(self, direction: str) -> Tiles | None:
        return self._tiles.get(direction)


# ---- the rules for one axis; each op's tiles.py puts them together ----


def forward_axis(N: int, N_k: int, D: int, itemsize: int) -> Axis:
    if itemsize == 4:  # products on the FMA pipes: operands are held in registers, so small tiles
        return Axis(PACKED, power_of_two(N)) if N == N_k <= 32 else Axis(STREAMING, 16, (32,))
    if N == N_k <= 64:
        return Axis(PACKED, 64)
    if N == N_k <= 272:  # 64 rows of 272 scores are 136 of 255 registers
        return Axis(RESIDENT, 64, pieces(N))
    return Axis(STREAMING, 128, (64,))


def backward_axis(N: int, N_k: int, D: int, itemsize: int) -> Axis:
    if itemsize == 4:
        return Axis(PACKED, power_of_two(N)) if N == N_k <= 32 else Axis(STREAMING, 16, (32,))
    if N == N_k <= 64:
        return Axis(PACKED, 64)
    return Axis(STREAMING, 64, (64,))


def tiles(direction: str, time: Axis | None, space: Axis | None) -> Tiles:
    """The launch for these axes, and of a backward that streams the second one."""
    if direction == "forward":
        return Tiles(direction, time, space, warps=4, stages=2)
    over_time, over_space = (axis if axis is not None and axis.regime == STREAMING else None for axis in (time, space))
    keys = Tiles(direction, over_time, over_space, warps=4, stages=2) if over_time or over_space else None
    return Tiles(direction, time, space, warps=4, stages=2, keys=keys)


# ---- powers of two ----


def power_of_two(n: int, least: int = 16) -> int:
    return max(least, 1 << (n - 1).bit_length())


def pieces(n: int, least: int = 16, most: int = 3) -> tuple[int, ...]:
    """Powers of two, falling, at most `most` of them, that together hold n with the least to spare: 196 -> 128, 64, 16.

    A product wants at least 16 of everything."""
    if most == 1 or n <= least:
        return (power_of_two(n, least),)
    largest = 1 << (n.bit_length() - 1)
    if largest == n:
        return (n,)
    split = (largest, *pieces(n - largest, least, most - 1))
    whole = power_of_two(n, least)
    return (whole,) if sum(split) >= whole else split


def columns(D: int, split: bool, halves: bool) -> tuple[tuple[int, int, int], ...]:
    """COLS of a head size, see triton_device.py: (first channel, width, channels in use) of each piece.

    halves: for a rotary embedding, whose pairs (i, i + D/2) then lie at one place of both."""
    if halves:
        width = power_of_two(D // 2)
        return (0, width, D // 2), (D // 2, width, D // 2)
    found, first = [], 0
    for width in pieces(D, most=2) if split else (power_of_two(D),):
        found.append((first, width, min(width, D - first)))
        first += width
    return tuple(found)


def placed(widths: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """KEYS of pieces: (first, count) of each."""
    found, first = [], 0
    for width in widths:
        found.append((first, width))
        first += width
    return tuple(found)
