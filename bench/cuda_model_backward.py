"""Joint attention's backward for Hopper in `python -m bench cuda_model`: its two launches, which follow each other.

A tile is 64 rows that a warpgroup keeps by 64 that pass by: 3 products of a launch that keeps queries, 4 of one that
keeps keys. What the parts of a multiprocessor are asked for is counted as for the forward; the chain of one warpgroup
alone is its loop walked through, instruction by instruction. A bound and no prediction.
"""

from __future__ import annotations

import re

from . import cubin
from .cuda_model import (
    ALU,
    CLOCK_GHZ,
    EXPONENTIALS,
    FMA,
    LINE,
    MULTIPROCESSORS,
    SHARED_BYTES_PER_CYCLE,
    SHUFFLES,
    Tile,
    inner_loop,
    products_of,
)
from .static import table

KEPT, PASSING, GROUPS, CHANNELS = 128, 64, 2, 64
LAPS = 4  # of the loop, until each takes as long as the one before it
_LAUNCH = re.compile(r"pipelined_joint_gradients?_of_(queries|keys)<(\w+)>")
_COST = {**ALU, **FMA, "MUFU": EXPONENTIALS, "SHFL": SHUFFLES}
_PIPE = {**dict.fromkeys(ALU, "alu"), **dict.fromkeys(FMA, "fma"), "MUFU": "mufu", "SHFL": "alu"}


def walk(lines: list[tuple[str, str]]) -> int:
    """Cycles of one lap of (opcode, operands). A warp starts an instruction a cycle where its part is free; products
    run on their own, one after the other, until they are waited for. No latency but theirs is counted."""
    now = core = lap = 0
    free: dict[str, int] = {}
    done: list[int] = []  # of each group of products
    for _ in range(LAPS):
        start = now
        for opcode, operands in lines:
            if opcode == "HGMMA":
                core = max(core, now) + products_of(operands)[0].cycles
                done += [core] if "gsb0" in operands else []
            elif opcode == "WARPGROUP" and (later := re.search(r"gsb0, (0x[0-9a-f]+)", operands)):
                left = int(later[1], 16)
                now = max([now, *done[: len(done) - left]])
            elif opcode in _COST:
                now = max(now, free.get(_PIPE[opcode], 0))
                free[_PIPE[opcode]] = now + _COST[opcode]
            now += 1
        lap = now - start
    return lap


def tile_of(kernel: cubin.Kernel) -> Tile:
    loop = inner_loop(kernel)
    every = [(int(at, 16), opcode, rest) for at, _, opcode, rest in LINE.findall(kernel.sass)]
    lines = [(opcode, rest) for at, opcode, rest in every if loop.first <= at <= loop.last]
    text = kernel.sass[kernel.sass.index(f"/*{loop.first:04x}*/") : kernel.sass.index(f"/*{loop.last:04x}*/")]
    products = products_of(text)
    spelled = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?HGMMA(\S*\s[^;]*);", text)
    of_products = iter(f"HGMMA{each}" for each in spelled)
    lines = [(opcode, next(of_products) if opcode == "HGMMA" else rest) for opcode, rest in lines]
    counts = cubin.Counter(opcode for opcode, _ in lines)
    loads = 4 * 32 * 16 // SHARED_BYTES_PER_CYCLE * counts["LDS"]  # 16 bytes of each lane, in four warps
    return Tile(
        products=sum(x.cycles for x in products),
        of_scores=sum(x.cycles for x in products[:4]),
        exponentials=EXPONENTIALS * counts["MUFU"],
        issue=len(lines),
        rescale=0,
        alu=sum(cycles * counts[name] for name, cycles in ALU.items()) + SHUFFLES * counts["SHFL"],
        fma=sum(cycles * counts[name] for name, cycles in FMA.items()),
        shared=sum(x.shared for x in products) + loads,
        chain=walk(lines),
    )


def launch_us(tile: Tile, B: int, H: int, N: int) -> float:
    """Microseconds of one launch: whole tiles, by as many blocks as multiprocessors."""
    rounds = -(-(B * H * -(-N // KEPT)) // MULTIPROCESSORS)
    cycles = rounds * ((-(-N // PASSING) - 1) * tile.period(GROUPS)[0] + max(tile.chain, GROUPS * tile.products))
    return cycles / (CLOCK_GHZ * 1e3)


def call_us(tiles: list[Tile], B: int, H: int, N: int) -> tuple[float, float]:
    """(microseconds, TFLOP/s) of both launches; what counts are the five products of a backward, not the seven done."""
    us = sum(launch_us(tile, B, H, N) for tile in tiles)
    return us, 10 * B * H * N * N * CHANNELS / us / 1e6


def report(kernels: list[tuple[str, cubin.Kernel]]) -> str:
    """Of those kernels that are the backward's; '' where there are none."""
    of: dict[str, list[Tile]] = {}
    rows = []
    for name, kernel in kernels:
        if found := _LAUNCH.fullmatch(name):
            tile = tile_of(kernel)
            of.setdefault(found[2], []).append(tile)
            period, bound = tile.period(GROUPS)
            numbers = tile.products, tile.exponentials, tile.issue, tile.alu, tile.fma, tile.shared, tile.chain
            rows.append((name, *map(str, numbers), f"{period} {bound}", f"{GROUPS * tile.products / period:.0%}"))
    calls = []
    for dtype, tiles in of.items():
        for N in (1568, 3136, 3137, 6272) if len(tiles) == 2 else ():
            us, tflops = call_us(tiles, 8, 12, N)
            calls.append((dtype, str(N), f"{us:.0f}", f"{tflops:.0f}"))
    if not rows:
        return ""
    head = ("kernel", "products", "exp", "issue", "alu", "fma", "shared", "chain", "period", "products'")
    return "\n\n".join(
        [
            f"Backward, cycles for 64 kept rows x {PASSING} that pass; period: one such tile in both warpgroups",
            table(head, rows, 1),
            f"Both launches at least, for 8 clips of 12 heads of {CHANNELS}, on the same multiprocessors:",
            table(("backward", "tokens", "microseconds", "TFLOP/s at most"), calls, 1),
        ]
    )
