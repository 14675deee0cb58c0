"""How backend `triton` of tubelet_embedding cuts its products. The parts are those of every tiles.py, see
`_attention/tiles.py`. Reasons with a time are measured: 8 clips of ViT-B in uint8 on one H200, bfloat16, 2026-11-26,
when its matmul reached 718 TFLOP/s, forward with the 4 us of the kernel before it, backward with the 36 us of the two
others. The others are computed."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

BACKENDS = ("triton",)

_MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
_SHARED = {80: 160 << 10, 90: 224 << 10, 100: 224 << 10}  # bytes a block may take, less what Triton adds
_WORKSPACE = 64 << 20  # bytes of the weight gradient's parts


@dataclass(frozen=True)
class Forward:
    """A program's part of `[M, K] @ [K, E]`: block_m tubelets by block_e columns, in steps of block_k taps.

    described: on sm_90 TMA loads the weight, where its rows are multiples of 16 bytes; where the kernel before writes
    nothing but the row to add, the product begins beside it."""

    block_m: int
    block_e: int
    block_k: int
    num_warps: int
    num_stages: int
    described: bool = False

    @property
    def halved(self) -> bool:
        """Whether columns are stored in two halves: 128 sums and 128 positions a thread are more than its registers."""
        return self.block_m * self.block_e >= 128 * 32 * self.num_warps and self.block_e >= 32

    def stages(self, pixel_bytes: int, itemsize: int, arch: int) -> int:
        """As many stages as fit into shared memory, at most num_stages."""
        step = self.block_k * (self.block_m * pixel_bytes + self.block_e * itemsize)
        converted = self.block_k * self.block_m * itemsize if pixel_bytes != itemsize else 0
        return max(1, min(self.num_stages, (_SHARED.get(arch, _SHARED[80]) - converted) // step))


@dataclass(frozen=True)
class Backward:
    """A program's part of `[E, M] @ [M, K]`: block_e by block_k of the weight, in steps of block_m of the M / splits
    tubelets."""

    block_m: int
    block_e: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int

    def stages(self, pixel_bytes: int, itemsize: int, arch: int) -> int:
        step = self.block_m * (self.block_k * pixel_bytes + self.block_e * itemsize)
        converted = self.block_m * self.block_k * itemsize if pixel_bytes != itemsize else 0
        return max(1, min(self.num_stages, (_SHARED.get(arch, _SHARED[80]) - converted) // step))


Tile = Forward | Backward


def _power(n: int, least: int, most: int) -> int:
    """The power of two that holds n, between two others."""
    return max(least, min(most, 1 << (n - 1).bit_length()))


def _sizes(B: int, C: int, F: int, Y: int, X: int, tubelet: tuple[int, int, int]) -> tuple[int, int]:
    """(tubelets M, taps K)."""
    f, y, x = tubelet
    return B * (F // f) * (Y // y) * (X // x), C * f * y * x


def _idle(programs: int, slots: int) -> float:
    """Time over the time without an unfinished last round of programs."""
    return math.ceil(programs / slots) * slots / max(1, programs)


def splits(M: int, weights: int, block_m: int, programs: int, slots: int) -> int:
    """Of the numbers of parts that the workspace and M allow, the one with the least time: rounds of programs left
    unfinished against parts written and read again. The two ways of `weights` fp32 numbers, 8 bytes each, take as long
    as their products, 2 operations each, with 1000 tubelets (3e12 bytes/s, 800e12 operations/s); parts mostly stay in
    L2: about 300."""
    most = max(1, min(_WORKSPACE // (4 * weights), math.ceil(M / block_m), 64))

    def cost(splits: int) -> float:
        return M * _idle(programs * splits, slots) + 300 * splits

    return min(range(1, most + 1), key=cost)


def _backward(M: int, K: int, X: int, x: int, E: int, arch: int, sizes: tuple[int, int, int, int, int]) -> Backward:
    """sizes: block_m, block_e, block_k, num_warps, num_stages; and as many splits as are best with them."""
    block_m, block_e, block_k, warps, stages = sizes
    block_e, block_k = _power(E, 16, block_e), _power(K, 16, block_k)
    # of uint8 video, whose runs are then 2 longer, two products: see triton_gather.py
    phases = 2 if x % 4 == 2 and X // x % 2 == 0 else 1
    K = K // x * (x + 2 * (phases - 1))
    programs = phases * math.ceil(E / block_e) * math.ceil(K / block_k)
    slots = _MULTIPROCESSORS.get(arch, 132) * max(1, 8 // warps)
    return Backward(block_m, block_e, block_k, warps, stages, splits(M, phases * E * K, block_m, programs, slots))


@functools.lru_cache(4096)
def abreast(frames: int, rows: int, columns: int, block_m: int) -> tuple[int, int]:
    """Rows and columns of the rectangle of tubelets that a step of the weight gradient takes from each of
    block_m / (rows * columns) frames: the fewest places left empty; then two columns, so that runs of 16 bytes come as
    the 32 that memory gives; then as many frames as possible, whose places are computed once."""

    def cost(shape: tuple[int, int]) -> tuple[int, bool, int]:
        tall, wide = shape
        deep = block_m // (tall * wide)
        filled = [math.ceil(n / part) * part for n, part in ((frames, deep), (rows, tall), (columns, wide))]
        return math.prod(filled), wide < 2, tall * wide

    powers = [1 << n for n in range(block_m.bit_length())]
    return min(((tall, wide) for tall in powers for wide in powers if tall * wide <= block_m), key=cost)


@functools.lru_cache(4096)
def choose(
    B: int, C: int, F: int, Y: int, X: int, tubelet: tuple[int, int, int], E: int, direction: str, itemsize: int,
    pixel_bytes: int, arch: int | None,
) -> Tile:  # fmt: skip
    arch = arch or 90
    M, K = _sizes(B, C, F, Y, X, tubelet)
    multiprocessors = _MULTIPROCESSORS.get(arch, 132)
    if direction == "forward":
        if itemsize == 4:  # no tensor cores in IEEE float32: accumulators and operands share the registers
            return Forward(_rows_of_float32(arch), _power(E, 16, 64), _power(K, 16, 32), 4, 3)
        return _forward_16_bits(M, E, K, arch, multiprocessors, pixel_bytes)
    # sm_90: one program a multiprocessor, of two warp groups that share the converted pixels, 202 us (3 stages 216).
    # Two programs of 128 x 128, of which one converts while the other multiplies, 226 (3 stages 230, steps of 32 242),
    # but less idle where E is a small odd number of 128. 128 x 256 262; dout by TMA 223 at best. sm_80 has its
    # accumulators and operands in registers: steps of 64 spill there.
    sizes = (64, 128, 128, 4, 3) if arch >= 90 else (32, 128, 64, 4, 4)
    if arch == 90 and 256 * math.ceil(E / 256) <= 1.12 * 128 * math.ceil(E / 128):
        sizes = (64, 256, 128, 8, 4)
    if itemsize == 4:  # 202 registers at 4 warps, 127 at 8; in 3 stages Triton 3.9 spills two
        sizes = (16, 64, 64, 8, 2) if _rows_of_float32(arch) == 64 else (16, 32, 64, 4, 3)
    return _backward(M, K, X, tubelet[2], E, arch, sizes)


def _rows_of_float32(arch: int) -> int:
    """For sm_100 Triton 3.6 compiles products of 64 rows and more to TF32, also where IEEE float32 is asked for."""
    return 32 if arch >= 100 else 64


def _forward_16_bits(M: int, E: int, K: int, arch: int, multiprocessors: int, pixel_bytes: int) -> Forward:
    """The larger a tile, the fewer times a pixel is converted and a weight fetched; the smaller, the more even the load
    of the multiprocessors. Speeds are those of a round of programs, relative to 128 x 256's without TMA.

    Measured on sm_90: without TMA 128 x 256 162 us, 128 x 128 154. With it 128 x 256 146, begun early 144; early too
    64 x 256 123, whose two programs take turns at converting and multiplying, 128 x 128 149 (4 stages 150). Not worth
    their registers: a second accumulator, 384 columns from one conversion, 130 at best (128 x 384), and positions
    loaded ahead, 148 for 144. Before TMA, when a step did not wait for its product and bytes took twice the
    instructions (matmul at 804 TFLOP/s): 128 x 256 142 with 4 stages, 145 with 3, 155 in steps of 32, 180 of 128;
    64 x 256 151 with 3 stages, 174 with 4, of which one program fits a multiprocessor; 64 x 128 171; 128 x 128 176 in
    steps of 32; 256 x 128 171 at best, 128 x 128 of 8 warps 195."""
    found = []
    sizes = [(128, 256, 64, 8, 4, 1.0), (128, 128, 32, 4, 4, 0.73), (64, 128, 64, 4, 3, 0.72), (64, 64, 64, 4, 4, 0.5)]
    described = arch == 90 and pixel_bytes == 1
    if arch == 90:
        sizes.append((64, 256, 64, 4, 3, 1.18 if described else 0.88))  # spills on sm_100
    if arch < 90:  # operands in registers
        sizes[:2] = [(128, 256, 32, 8, 4, 1.0), (128, 128, 32, 8, 4, 0.9)]
    for block_m, wide, block_k, warps, stages, speed in sizes:
        block_e = _power(E, 16, wide)
        programs = math.ceil(M / block_m) * math.ceil(E / block_e)
        load = math.ceil(programs / multiprocessors) * block_m * block_e
        by_tma = described and (block_m, wide) == (64, 256)
        found.append((load / speed, Forward(block_m, block_e, _power(K, 16, block_k), warps, stages, by_tma)))
    return min(found, key=lambda entry: entry[0])[1]


def scattering(K: int, E: int, pixel_bytes: int, itemsize: int, arch: int) -> Forward:
    """The tile of the video's gradient: there block_k taps are the columns of a program, block_e the steps."""
    if itemsize == 4:
        return Forward(_rows_of_float32(arch), _power(E, 16, 32), _power(K, 16, 64), 4, 3)
    # 128 columns spill: of pixels of 4 bytes, which take twice the addresses of 2, and on sm_80 and sm_100 a few of any
    return Forward(128, _power(E, 16, 64), _power(K, 16, 128 if pixel_bytes <= 2 and arch == 90 else 64), 4, 3)


@dataclass(frozen=True)
class RowSums:
    """Of the sums over dout: groups loaded at once, table rows and columns of a block, blocks of a strip."""

    block_g: int
    block_n: int
    block_e: int
    num_warps: int
    per_strip: int


STRIPS = 128  # parts of the sum of all rows of dout, at most


def row_sums(groups: int, table: int, E: int, itemsize: int) -> RowSums:
    """Blocks in which every thread loads 16 bytes of a row; smaller ones where the table, as of frames, is small: many
    loads must be in flight, and what a multiprocessor does not hold at once waits for its turn."""
    block_e = _power(E, 16, 256 // itemsize)
    warps = 4 if table * E * itemsize >= 2 << 20 else 1
    block_n = max(1, warps * 512 // (block_e * itemsize))
    per_strip = max(1, math.ceil(math.ceil(table / block_n) / STRIPS))
    return RowSums(_power(groups, 1, 8), block_n, block_e, warps, per_strip)


def candidates(
    B: int, C: int, F: int, Y: int, X: int, tubelet: tuple[int, int, int], E: int, direction: str, itemsize: int,
    pixel_bytes: int, arch: int | None,
) -> list[Tile]:  # fmt: skip
    choice = choose(B, C, F, Y, X, tubelet, E, direction, itemsize, pixel_bytes, arch)
    M, K = _sizes(B, C, F, Y, X, tubelet)
    wide, taps = _power(E, 16, 256), _power(K, 16, 256)
    found: list[Tile] = []
    if isinstance(choice, Forward):
        for block_m, block_e, warps in ((128, 256, 8), (128, 128, 4), (64, 256, 4), (64, 128, 4), (64, 64, 4)):
            for block_k, stages in ((64, 2), (64, 3), (64, 4), (32, 4)):
                tile = Forward(block_m, min(block_e, wide), min(block_k, taps), warps, stages)
                found += [tile, replace(tile, described=True)] if arch == 90 else [tile]
        return found
    for block_e, block_k, warps in ((128, 128, 4), (128, 256, 8), (256, 128, 8)):
        for block_m, stages in ((64, 3), (64, 4), (32, 4), (128, 2)):
            sizes = (block_m, block_e, block_k, warps, stages)
            tile = _backward(M, K, X, tubelet[2], E, arch or 90, sizes)
            found += [tile, replace(tile, splits=max(1, tile.splits // 2))]
    return found


_forced: Tile | None = None


@contextmanager
def forced(tile: Tile) -> Iterator[None]:
    """Every call in the process takes this tile in the direction that it is for, on all threads."""
    global _forced
    before, _forced = _forced, tile
    try:
        yield
    finally:
        _forced = before


def demanded() -> Tile | None:
    """The tile that `forced` asks for, if it does."""
    return _forced


def current(
    B: int, C: int, F: int, Y: int, X: int, tubelet: tuple[int, int, int], E: int, direction: str, itemsize: int,
    pixel_bytes: int, arch: int | None,
) -> Tile:  # fmt: skip
    if isinstance(_forced, Forward if direction == "forward" else Backward):
        return _forced
    return choose(B, C, F, Y, X, tubelet, E, direction, itemsize, pixel_bytes, arch)
