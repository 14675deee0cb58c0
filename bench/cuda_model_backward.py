"""Joint attention's backward for Hopper in `python -m bench cuda_model`: its two launches, which follow each other.

A tile is 64 rows that a warpgroup keeps by some that pass by: 3 products of a launch that keeps queries, 4 of one that
keeps keys. What the parts of a multiprocessor are asked for is counted as for the forward; the chain of one warpgroup
alone is its loop walked through, instruction by instruction. A bound and no prediction.

A kernel with options is counted twice: `mask`, the shortest way through its loop, which is that of a call whose tile
hides no key; and `dropout`, all of its loop but the soft-cap's part. What a soft-cap costs depends on the scores.
"""

from __future__ import annotations

import re
from typing import NamedTuple

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
    passed_by,
    products_of,
)
from .static import table

KEPT, GROUPS = 128, 2
TOKENS = (1568, 3136, 3137, 6272)
LAPS = 4  # of the loop, until each takes as long as the one before it
_LAUNCH = re.compile(
    r"pipelined_joint_gradients?_of_(?P<kept>queries|keys)<(?P<dtype>\w+), "
    r"BackwardVariant<(?P<steps>\d+), (?P<passing>\d+), \d+, (?P<plain>true|false)> >"
)
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


class Shape(NamedTuple):
    """What a kernel is compiled for, as its name says: channels of a head, rows that pass by."""

    channels: int = 64
    passing: int = 64


Line = tuple[int, str, str, str]  # address, predicate, opcode, operands


def loop_of(kernel: cubin.Kernel) -> list[Line]:
    """The inner loop; operands of products with what is spelled behind their opcode."""
    loop = inner_loop(kernel)
    every = [(int(at, 16), if_, opcode, rest) for at, if_, opcode, rest in LINE.findall(kernel.sass)]
    lines = [line for line in every if loop.first <= line[0] <= loop.last]
    text = kernel.sass[kernel.sass.index(f"/*{loop.first:04x}*/") : kernel.sass.index(f"/*{loop.last:04x}*/")]
    spelled = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?HGMMA(\S*\s[^;]*);", text)
    of_products = iter(f"HGMMA{each}" for each in spelled)
    return [(at, if_, op, next(of_products) if op == "HGMMA" else rest) for at, if_, op, rest in lines]


def shortest(lines: list[Line]) -> list[Line]:
    """The way through with the fewest instructions, by branches that go forward."""
    index = {line[0]: i for i, line in enumerate(lines)}
    left = [0] * (len(lines) + 1)  # from each on
    follows = [0] * len(lines)
    for i in reversed(range(len(lines))):
        at, if_, opcode, rest = lines[i]
        target = re.search(r"0x([0-9a-f]+)\s*$", rest) if opcode == "BRA" else None
        ways = [i + 1]
        if target and at < int(target[1], 16) <= lines[-1][0] and int(target[1], 16) in index:
            always = not if_ and rest.strip().startswith("0x")
            ways = [index[int(target[1], 16)], *([] if always else ways)]
        follows[i] = min(ways, key=lambda way: left[way])
        left[i] = 1 + left[follows[i]]
    way, i = [], 0
    while i < len(lines):
        way.append(lines[i])
        i = follows[i]
    return way


def ways_of(kernel: cubin.Kernel, shape: Shape, plain: bool) -> dict[str, list[Line]]:
    """By what a call has: the instructions that it takes, in order."""
    lines = loop_of(kernel)
    if plain:
        return {"": lines}
    without = [(at, opcode, rest) for at, _, opcode, rest in lines]
    capped = passed_by(without, lines[-1][0], "MUFU", shape.passing)  # two or three for each of passing / 2 scores
    return {"mask": shortest(lines), "dropout": [line for line in lines if line[0] not in capped]}


def tile_of(lines: list[Line]) -> Tile:
    products = products_of("\n".join(rest for _, _, opcode, rest in lines if opcode == "HGMMA"))
    counts = cubin.Counter(opcode for _, _, opcode, _ in lines)
    loads = 4 * 32 * 16 // SHARED_BYTES_PER_CYCLE * counts["LDS"]  # 16 bytes of each lane, in four warps
    return Tile(
        products=sum(x.cycles for x in products),
        of_scores=0,
        exponentials=EXPONENTIALS * counts["MUFU"],
        issue=len(lines),
        rescale=0,
        alu=sum(cycles * counts[name] for name, cycles in ALU.items()) + SHUFFLES * counts["SHFL"],
        fma=sum(cycles * counts[name] for name, cycles in FMA.items()),
        shared=sum(x.shared for x in products) + loads,
        chain=walk([(opcode, rest) for _, _, opcode, rest in lines]),
    )


def launch_us(tile: Tile, shape: Shape, B: int, H: int, N: int) -> float:
    """Microseconds of one launch: whole tiles, by as many blocks as multiprocessors."""
    rounds = -(-(B * H * -(-N // KEPT)) // MULTIPROCESSORS)
    cycles = rounds * ((-(-N // shape.passing) - 1) * tile.period(GROUPS)[0] + max(tile.chain, GROUPS * tile.products))
    return cycles / (CLOCK_GHZ * 1e3)


def call_us(launches: list[tuple[Tile, Shape]], B: int, H: int, N: int) -> tuple[float, float]:
    """(microseconds, TFLOP/s) of both launches; what counts are the five products of a backward, not the seven done."""
    us = sum(launch_us(tile, shape, B, H, N) for tile, shape in launches)
    return us, 10 * B * H * N * N * launches[0][1].channels / us / 1e6


def report(kernels: list[tuple[str, cubin.Kernel]]) -> str:
    """Of those kernels that are the backward's; '' where there are none."""
    of: dict[tuple[str, int, str], list[tuple[Tile, Shape]]] = {}
    rows = []
    for name, kernel in kernels:
        if not (found := _LAUNCH.fullmatch(name)):
            continue
        shape = Shape(16 * int(found["steps"]), int(found["passing"]))
        for what, lines in ways_of(kernel, shape, found["plain"] == "true").items():
            tile = tile_of(lines)
            of.setdefault((found["dtype"], shape.channels, what), []).append((tile, shape))
            period, bound = tile.period(GROUPS)
            numbers = tile.products, tile.exponentials, tile.issue, tile.alu, tile.fma, tile.shared, tile.chain
            share = f"{GROUPS * tile.products / period:.0%}"
            called = f"{found['dtype']} by {found['kept']}"
            rows.append((called, *map(str, shape), what, *map(str, numbers), f"{period} {bound}", share))
    calls = []
    for (dtype, channels, what), launches in of.items():
        for N in TOKENS if len(launches) == 2 else ():
            us, tflops = call_us(launches, 8, 12, N)
            calls.append((dtype, str(channels), what, str(N), f"{us:.0f}", f"{tflops:.0f}"))
    if not rows:
        return ""
    head = ("backward", "channels", "passing", "option", "products", "exp", "issue", "alu", "fma", "shared", "chain")
    return "\n\n".join(
        [
            "Backward, cycles for 64 kept rows x those that pass; period: one such tile in both warpgroups",
            table((*head, "period", "products'"), rows, 1),
            "Both launches at least, for 8 clips of 12 heads, on the same multiprocessors:",
            table(("backward", "channels", "option", "tokens", "microseconds", "TFLOP/s at most"), calls, 1),
        ]
    )
