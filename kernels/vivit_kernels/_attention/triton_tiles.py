"""Tiles of the Triton attention kernels: what one launch is told, the rules that choose it, powers of two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

PACKED, RESIDENT, STREAMING = "packed", "resident", "streaming"
RESIDENT_ROWS = 128  # of a tile, which one sequence fills at least half
RESIDENT_CHANNELS = {"forward": 128, "backward": 64}  # of a head, at most


@dataclass(frozen=True)
class Axis:
    """How the sequences along one axis are cut.

    rows: of a tile; packed: as many whole sequences as fit; resident: one whole sequence; streaming: a block of
        queries. keys: streaming: of a block.
    """

    regime: str
    rows: int
    keys: int = 0


@dataclass(frozen=True)
class Tiles:
    """One launch: time and space (None where no head attends along it), and what both share.

    split: head sizes that are no power of two are two pieces (80 = 64 + 16), else padded to one.
    whole: where the second piece is one of 16 channels, the last block of streamed rows is as large as the others.
    described: of a forward, whole blocks of keys of a frame's streamed sequences come by TMA, where rows allow it.
    persistent: of a forward, blocks of a multiprocessor that take one tile after the other; 0: a block for each tile.
    keys: of a backward, the second launch, for dk and dv of streamed sequences.
    """

    direction: str
    time: Axis | None
    space: Axis | None
    warps: int
    stages: int
    split: bool = True
    whole: bool = False
    described: bool = False
    persistent: int = 0
    keys: Tiles | None = None

    @property
    def keeps_output(self) -> bool:
        """Whether this backward reads o and the statistics of the forward."""
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


# ---- the rules; each op's tiles.py puts them together ----

# Measured on one H200 (copy 4.26 TB/s, matmul 803 TFLOP/s), 2026-11-26, bfloat16, replayed graphs, microseconds; errors
# of outputs 2.0 to 2.3e-3, of gradients 2.4e-3, relative to float32 SDPA in RMS:
# packed, 8 x 196 positions, 12 heads of 64, forward / backward
#   T = 16   rows 64, 4 warps: 43 / 72   rows 32, 2 warps: 42 / 82   rows 16, 1 warp: 41 / 72   rows 128, 8: 58 / -
#   T = 25   rows 64, 4 warps: 67 / 127  rows 32, 2 warps: 69 / 149  rows 128, 8 warps: 93 / 263
#   16 x 4096 positions, 8 heads of 40: rows 64: 105 / 217, padded to 64 columns 114 / 206; rows 16, 1 warp: 99 / 215
# streamed, (rows, keys), warps, stages
#   forward, 1536 x 196 x 64: (64, 64) 4, 3: 92   (64, 32) 4, 3: 95   (128, 64) 8, 3: 99   resident, 128 + 64 + 16: 96
#   forward, 24 x 3136 x 64: (64, 64) 4, 3: 154   4 stages: 161   (128, 64) 8, 3: 171   (128, 128) 8, 4: 201
#     with 1, 2 or 3 of every four exponentials as polynomials of degree 3 on the FMA pipes: 166, 182, 197
#     with TMA descriptors (24 x 3072 x 64): 402 instead of 391 TFLOP/s; with Triton's warp specialisation: 164
#       (as compiled now, the barriers of 3 stages take 56 bytes that a fourth block of a multiprocessor lacks)
#   forward, 24 x 3136 x 128: (128, 64) 8, 3: 286   (64, 64) 4, 3: 304
#   forward, 2048 x 256 x 80: (64, 64) 4, 3: 174   4, 2: 194   (64, 32) 4, 3: 185   padded to 128 columns: 294
#   backward, dq (rows, keys) and dk, dv (rows, keys): 1536 x 196 x 64: (64, 32), (32, 64), 3 stages: 260
#     (64, 64) twice: 274
#   24 x 3136 x 64: the same two: 443 and 458;  24 x 3136 x 128: (64, 64), 2 stages: 827   (64, 32), (32, 64), 3: 966
#   2048 x 256 x 80: (64, 32), (32, 64), 2 stages: 581   3: 603   (64, 64): 594
# On one H100 (copy 3.00 TB/s, matmul 713 TFLOP/s), 2026-11-26, the tiles chosen below, 8 clips of 16 x 196 tokens, 12
# heads of 64, single calls with the caches flushed, time on the device, at most 0.24 of the error budget; forward /
# backward: along time 60 / 99, within frames 101 / 283, half of the heads each way 85 / 208, all tokens 584 / -
#
# Why sequences of 65 to 128 are resident, one a tile, where a product reads its operands from shared memory (compiled
# for sm_90 by Triton 3.6, not measured): 128 tokens, heads of 64, instructions that a scheduler issues for a sequence,
# registers (warps of a multiprocessor):
#   forward   resident 1,980, 110 (16)   streamed 2,900, 116 (16)
#   backward  resident 3,420, 160 (8)    streamed 6,980, 94 (20) and 137 (12), and 12 tensors' traffic instead of 7
# Of 70 tokens, 1,660 and 2,980 against 2,000 and 4,200: what a streamed block saves by ending early is little. A
# backward of 80 channels still fits, but not with a rotary embedding (255, spilled). On sm_80, whose products hold
# their operands in registers: forward 190 (8), backward spills.
#
# Why not longer ones (the same): a resident forward of 196 was timed above. A backward that keeps all of K, V, dK and
# dV, 196 tokens in 256 rows, 32 queries a step, takes 255 registers of 8 warps, alone on its multiprocessor, for
# 14,300 instructions a scheduler, where streaming takes 16,400 with 16 warps there. As 3 x 64 + 16 or 128 + 64 + 16
# rows it spills. csrc/cuda/resident.cuh, which lays out shared memory itself, keeps such sequences.
#
# Why a block takes one tile and is done (compiled for sm_90 by Triton 3.6, not measured): what a persistent loop over
# tiles hides, their ends, the other blocks of a multiprocessor hide, too; left is the start of a block, and the loop
# takes registers: the forward of (64, 64) by addresses 202 instead of 117, 2 blocks a multiprocessor instead of 4. By
# TMA it takes 112 instead of 106, with as many blocks, of 3,136 tokens; of 3,137, whose last blocks are other code, 193
# instead of 96. `bench tune` tries it.
#
# Why the last block of rows that a tile keeps has 16 where that will do, but is whole for heads with a piece of 16
# channels (compiled for sm_90, not measured): there the branch of 16 rows takes more registers than all the rest.
# 196 tokens a frame, registers (warps of a multiprocessor), 16 rows -> whole, Triton 3.6:
#   D = 80   forward 220 (8) -> 125 (12)   dq 218 (8) -> 110 (16)   dk, dv 255 (8) -> 158 (12)
#   D = 40   forward 136 (12) -> 127 (16)  dq 170 (8) -> 92 (20)    dk, dv 178 (8) -> 112 (16)
#   D = 144  all three spill -> 170, 176, 232
# For 3.25 blocks' work of each sequence it does 4; of long sequences next to nothing more. Other heads gain no warps.
#
# Why dq has a pass of its own and no atomic variant beside it (computed, not measured): in blocks of 64 keys these 8 x
# 3136 tokens add 49 times to each of 19 million sums, 944 million reductions of 4 bytes. An H100's L2, taken as 96
# slices at 1.7 GHz, retires them in 5.8 ms at one a cycle and slice, in 1.4 ms at a sector of eight in two cycles; one
# pass saves two of seven products, 0.5 ms of 1.8 (4 x 443 us above). Others measured one such pass on an H100, 16,384
# tokens: 129 TFLOP/s with tl.atomic_add, 324 with the additions left out (triton-lang/triton, issue 4717).


def _multiplies_shared_memory(arch: int) -> bool:
    """Whether products take their operands from there; of sm_80 and the consumers' cards they lie in registers."""
    return arch // 10 in (9, 10)


def _regime(direction: str, N: int, N_k: int, D: int, itemsize: int, arch: int) -> str:
    """What a sequence of N queries and N_k keys is cut by, if its launch has nothing else."""
    if N == N_k <= (64 if itemsize == 2 else 32):
        return PACKED
    if N_k != N or itemsize != 2 or not _multiplies_shared_memory(arch):
        return STREAMING
    return RESIDENT if N <= RESIDENT_ROWS and RESIDENT_CHANNELS[direction] >= D else STREAMING


def tiles(
    direction: str, D: int, itemsize: int, arch: int, time: tuple[int, int] | None, space: tuple[int, int] | None
) -> Tiles:
    """The launches of a direction; time, space: (queries, keys) of a sequence, None where no head attends along it."""
    axes = [axis for axis in (time, space) if axis is not None]
    regimes = {_regime(direction, *axis, D, itemsize, arch) for axis in axes}
    packed_alone, shortest = regimes <= {PACKED}, 64
    streamed, warps, stages = _streamed(direction, D, itemsize, max((N for N, _ in axes), default=0))
    longer = streamed  # whatever is not packed is cut alike: a resident axis would take the warps of a streamed one
    if packed_alone:
        warps, shortest = 1 if itemsize == 2 and all(N <= 16 for N, _ in axes) else 4, 16
    elif STREAMING not in regimes:
        longer, warps = Axis(RESIDENT, RESIDENT_ROWS), 8

    def cut(axis: tuple[int, int] | None) -> Axis | None:
        if axis is None:
            return None
        if _regime(direction, *axis, D, itemsize, arch) != PACKED:
            return longer
        if itemsize == 4:
            return Axis(PACKED, power_of_two(axis[0]))
        return Axis(PACKED, shortest if axis[0] <= 16 else 64)

    whole = itemsize == 2 and has_narrow_piece(columns(D, split=True, halves=False))
    first = Tiles(direction, cut(time), cut(space), warps, stages, whole=whole)
    if direction == "forward":
        many = space is not None and space[1] >= 1024
        return replace(first, described=many and arch == 90 and itemsize == 2 and D in (64, 128))
    if not first.keeps_output:
        return first
    queries = 32 if D < 128 else streamed.keys if D == 128 else 16  # 64 spill from 104 to 120, 32 above 128
    if 64 < D < 104 and not _multiplies_shared_memory(arch):
        queries = 16  # 32 spill at the end of 729 tokens
    second = Axis(STREAMING, queries, streamed.rows)
    if itemsize == 4:  # the blocks of the first pass: see triton_streaming.py
        second = streamed
    over_time, over_space = (second if axis is streamed else None for axis in (first.time, first.space))
    return replace(first, keys=replace(first, time=over_time, space=over_space))


def _streamed(direction: str, D: int, itemsize: int, N: int) -> tuple[Axis, int, int]:
    """(blocks of queries and keys, warps, stages)"""
    if itemsize == 4:  # products on the FMA pipes hold their operands in registers
        return Axis(STREAMING, 16, 32), 8, 1
    if direction == "forward":
        if 96 < D <= 128 and N >= 1024:
            return Axis(STREAMING, 128, 64), 8, 3
        return Axis(STREAMING, 64, 64), 4, 3
    if 96 < D <= 128:
        return Axis(STREAMING, 64, 64), 4, 2
    return Axis(STREAMING, 64, 32), 4, 3 if D <= 96 else 2


# ---- powers of two ----


def power_of_two(n: int, least: int = 16) -> int:
    return max(least, 1 << (n - 1).bit_length())


def pieces(n: int, least: int = 16) -> tuple[int, ...]:
    """One or two powers of two that hold n, whichever has less to spare: 80 -> 64, 16. A product wants at least 16."""
    if n <= least:
        return (least,)
    largest, whole = 1 << (n.bit_length() - 1), power_of_two(n, least)
    rest = power_of_two(n - largest, least) if n > largest else 0
    return (largest, rest) if rest and largest + rest < whole else (whole,)


def columns(D: int, split: bool, halves: bool) -> tuple[tuple[int, int, int], ...]:
    """COLS of a head size, see triton_device.py: (first channel, width, channels in use) of each piece.

    halves: for a rotary embedding, whose pairs (i, i + D/2) then lie at one place of both."""
    if halves:
        width = power_of_two(D // 2)
        return (0, width, D // 2), (D // 2, width, D // 2)
    found, first = [], 0
    for width in pieces(D) if split else (power_of_two(D),):
        found.append((first, width, min(width, D - first)))
        first += width
    return tuple(found)


def has_narrow_piece(pieces: tuple[tuple[int, int, int], ...]) -> bool:
    """Of COLS: a last piece of 16 channels behind a wider one, as heads of 40, 48, 72, 80, 136 and 144 have."""
    return len(pieces) > 1 and pieces[-1][1] == 16 < pieces[0][1]


def alternatives(choice: Tiles) -> list[Tiles]:
    """Tiles worth trying beside the choice: blocks, warps, stages and last blocks of streamed sequences, rows of packed
    ones, resident ones streamed."""
    axes = [axis for axis in (choice.time, choice.space) if axis is not None]
    if any(axis.regime == RESIDENT for axis in axes):
        return _beside_resident(choice)
    if not choice.keeps_output:
        least = max(axis.rows for axis in axes)
        sizes = ((16, 1), (32, 2), (64, 4), (64, 8), (128, 8))
        return [_varied(choice, Axis(PACKED, rows), warps, choice.stages) for rows, warps in sizes if rows >= least]
    found = []
    for rows, keys, warps in ((64, 32, 4), (64, 64, 4), (128, 64, 8), (128, 64, 4), (64, 128, 4)):
        for stages in (2, 3, 4):
            tile = _varied(choice, Axis(STREAMING, rows, keys), warps, stages)
            if choice.keys is not None:
                tile = replace(tile, keys=_varied(choice.keys, Axis(STREAMING, keys, rows), warps, stages))
            found.append(tile)
    if choice.direction == "forward":
        found.append(replace(choice, described=not choice.described))
        found += [replace(choice, stages=stages, persistent=blocks) for stages, blocks in ((2, 4), (3, 3))]
    if choice.whole:
        keys = None if choice.keys is None else replace(choice.keys, whole=False)
        found.append(replace(choice, whole=False, keys=keys))
    return found


def _varied(tile: Tiles, axis: Axis, warps: int, stages: int, regime: str | None = None) -> Tiles:
    """The tile with this axis wherever it had one of the regime, the axis' own if none is named."""

    def cut(old: Axis | None) -> Axis | None:
        return axis if old is not None and old.regime == (regime or axis.regime) else old

    return replace(tile, time=cut(tile.time), space=cut(tile.space), warps=warps, stages=stages)


def _beside_resident(choice: Tiles) -> list[Tiles]:
    """Other warps; streamed as `_streamed` has it for heads of 64."""
    found = [replace(choice, warps=warps) for warps in (4, 16)]
    if choice.direction == "forward":
        return [*found, _varied(choice, Axis(STREAMING, 64, 64), 4, 3, RESIDENT)]
    first = _varied(choice, Axis(STREAMING, 64, 32), 4, 3, RESIDENT)
    second = _varied(first, Axis(STREAMING, 32, 64), 4, 3)
    over_time, over_space = (
        axis if axis is not None and axis.regime == STREAMING else None for axis in (second.time, second.space)
    )
    return [*found, replace(first, keys=replace(second, time=over_time, space=over_space))]
