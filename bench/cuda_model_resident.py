"""Sequences in shared memory by Hopper's products (csrc/cuda/hopper_*.cuh) in `python -m bench cuda_model`: a block's
loops, counted from their machine code, beside the time that memory takes for the same sequences.

A step is 64 rows of a warpgroup by the rows that go by: 64 or 32 of them, at the end 16. A backward has one loop by
keys, with 4 products, and one by queries, with 3. All blocks of a multiprocessor share its parts, so the busiest one
bounds them; and no block is faster than the chain of its warpgroup with the most tiles. Sixteens that single warps
take are counted as a tile. A bound and no prediction: copies are taken to be hidden where two blocks share a
multiprocessor, and to come before the products where there is one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from . import cubin
from .cuda_model import ALU, CLOCK_GHZ, EXPONENTIALS, FMA, LINE, MULTIPROCESSORS, QUERIES, SHUFFLES, products_of
from .cuda_model_backward import walk
from .static import ASSUMED, table

THREADS, GROUPS, MOST_SHARED = 256, 2, 227 << 10
TOKENS = (144, 196, 256)
FRAMES, WIDTH = 8 * 16, 768  # of 8 clips; channels of all heads
_NAME = re.compile(r"hopper_attention<(\w+), (\d+), true, (true|false)>")
_HGMMA = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?HGMMA(\S*\s[^;]*);")


@dataclass(frozen=True)
class Step:
    """Cycles of a multiprocessor for 64 rows by `passing` rows, whose four warps sit on a scheduler each."""

    passing: int
    by_keys: bool
    products: int
    exponentials: int
    issue: int
    alu: int
    fma: int
    shared: int
    chain: int

    @property
    def parts(self) -> dict[str, int]:
        names = ("products", "exponentials", "issue", "alu", "fma", "shared")
        return {name: getattr(self, name) for name in names}


def slices(steps: int) -> int:
    """Of a row of 16 `steps` channels: wide ones of 64, and a narrow one."""
    return -(-steps // 4)


def step_of(kernel: cubin.Kernel, loop: cubin.Loop, steps: int) -> Step:
    first, last = (kernel.sass.index(f"/*{at:04x}*/") for at in (loop.first, loop.last))
    text = kernel.sass[kernel.sass.rindex("\n", 0, first) : last]  # lines, the branch back not among them
    products = products_of(text)
    passing = max(int(n) for n in re.findall(r"HGMMA\.64x(\d+)x16[.\w]*\s+R\d+, gdesc", text))
    sums = sum(not x.left_in_shared for x in products) * 16 // passing // slices(steps)  # products that rows add to
    spelled = iter(f"HGMMA{each}" for each in _HGMMA.findall(text))
    lines = [(opcode, next(spelled, rest) if opcode == "HGMMA" else rest) for _, _, opcode, rest in LINE.findall(text)]
    counts = cubin.Counter(opcode for opcode, _ in lines)
    return Step(
        passing,
        sums == 2,
        products=sum(x.cycles for x in products),
        exponentials=EXPONENTIALS * counts["MUFU"],
        issue=len(lines),
        alu=sum(cycles * counts[name] for name, cycles in ALU.items()) + SHUFFLES * counts["SHFL"],
        fma=sum(cycles * counts[name] for name, cycles in FMA.items()),
        shared=sum(x.shared for x in products),
        chain=walk(lines),
    )


def steps_of(kernel: cubin.Kernel, steps: int) -> list[Step]:
    """Of its inner loops with products of a warpgroup and exponentials."""
    loops = [x for x in cubin.loops_with_products(kernel) if x.mix["HGMMA"] and x.mix["MUFU.EX2"]]
    return [step_of(kernel, loop, steps) for loop in loops]


def cut(found: list[Step], by_keys: bool, N: int) -> list[tuple[int, Step]]:
    """(how often, step) of one tile of 64 rows over N others."""
    mine = sorted((x for x in found if x.by_keys == by_keys), key=lambda x: -x.passing)
    left, taken = -(-N // 16) * 16, []
    for step in mine:
        taken.append((left // step.passing, step))
        left %= step.passing
    return taken


def blocks_at_a_time(kernel: cubin.Kernel, steps: int, backward: bool, N: int) -> int:
    rows = -(-N // 16) * 16
    shared = rows * (4 * 32 * steps + 8 if backward else 3 * 32 * steps + 4) + 48 * 128
    return cubin.occupancy(90, kernel.registers, shared, THREADS).blocks if shared <= MOST_SHARED else 0


def call_us(kernel: cubin.Kernel, found: list[Step], steps: int, backward: bool, N: int) -> tuple[float, str, float]:
    """(microseconds of products at least, what bounds them, of memory) of FRAMES sequences in every head."""
    blocks, tiles = blocks_at_a_time(kernel, steps, backward, N), -(-N // QUERIES)
    parts: dict[str, int] = {}
    chain = 0
    for by_keys in (True, False) if backward else (False,):
        for count, step in cut(found, by_keys, N):
            chain += -(-tiles // GROUPS) * count * step.chain
            for name, cycles in step.parts.items():
                parts[name] = parts.get(name, 0) + blocks * tiles * count * cycles
    name = max(parts, key=lambda each: parts[each])
    cycles, bound = (parts[name], name) if parts[name] > chain else (chain, "chain")
    heads = WIDTH // (16 * steps)
    us = -(-FRAMES * heads // (MULTIPROCESSORS * blocks)) * cycles / (CLOCK_GHZ * 1e3)
    moved = (7 if backward else 4) * 2 * FRAMES * heads * N * 16 * steps
    return us, bound, moved / (ASSUMED[90]["copy_gbps"] * 1e3)


def report(kernels: list[tuple[str, cubin.Kernel]]) -> str:
    """Of the kernels without options; '' where there are none."""
    rows, calls = [], []
    for name, kernel in kernels:
        if not (match := _NAME.fullmatch(name)):
            continue
        steps, backward = int(match[2]), match[3] == "true"
        found = steps_of(kernel, steps)
        for step in found:
            way = "keys" if step.by_keys else "queries"
            rows.append((name, way, str(step.passing), *map(str, step.parts.values()), str(step.chain)))
        for N in TOKENS:
            if blocks := blocks_at_a_time(kernel, steps, backward, N):
                us, bound, memory = call_us(kernel, found, steps, backward, N)
                calls.append((name, str(16 * steps), str(N), str(blocks), f"{us:.0f} {bound}", f"{memory:.0f}"))
    if not rows:
        return ""
    head = ("kernel", "by", "passing", "products", "exp", "issue", "alu", "fma", "shared", "chain")
    return "\n\n".join(
        [
            "Sequences in shared memory, cycles for 64 rows of a warpgroup and those that pass:",
            table(head, rows, 2),
            f"At least, for {FRAMES} frames of {WIDTH} channels in all heads, {MULTIPROCESSORS} multiprocessors at"
            f" {CLOCK_GHZ} GHz:",
            table(("kernel", "D", "tokens", "blocks", "us of products", "us of memory"), calls, 1),
        ]
    )
