"""`python -m bench cuda_model`: what a pipelined CUDA C++ kernel must cost, counted from its machine code; and what one
must that gathers tubelets (cuda_model_tubelet.py), or has sequences in shared memory (cuda_model_resident.py).

For each kernel of csrc/cuda whose warps each do one thing at a time (its name begins with pipelined), the inner loop is
read, a tile of keys in one warpgroup, and what it asks of each part of a multiprocessor is added up. All warpgroups
share these parts, so the busiest one bounds the kernel; one warpgroup alone can go through a tile no faster than its
own chain. It is a bound and no prediction: nothing here waits for memory, a barrier or a free issue slot.
FlashAttention-3, built the same way, was published with 460 to 476 TFLOP/s at D = 64 and 2k to 4k tokens.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vivit_kernels import _library

from . import cubin, cuda_gate
from .static import table

# Cycles that one instruction of a warp keeps its scheduler's part busy: 32 lanes over the lanes that start in a cycle,
# a quarter of what the CUDA C++ Programming Guide gives for a multiprocessor of compute capability 9.0 (arithmetic
# instructions, throughput of native ones): 128 float32 additions and multiplications, 64 comparisons, conversions to 16
# bits, shifts and logic, 64 integer multiplications, 16 exponentials, 32 shuffles.
FMA = {"FFMA": 1, "FADD": 1, "FMUL": 1, "IMAD": 2}
ALU = {
    name: 2
    for name in (
        "FMNMX",
        "FSEL",
        "FSETP",
        "ISETP",
        "IADD3",
        "LOP3",
        "LEA",
        "SHF",
        "SEL",
        "F2FP",
        "MOV",
        "VIADD",
        "PRMT",
    )
}
EXPONENTIALS, SHUFFLES = 8, 4
# 989.4 TFLOP/s dense in 16 bits on 132 multiprocessors at 1.83 GHz (H100 SXM data sheet): 4,096 a cycle each.
FLOP_PER_CYCLE = 4096
SHARED_BYTES_PER_CYCLE = 128
MULTIPROCESSORS, CLOCK_GHZ = 132, 1.7  # the clock that an H100 holds under load is lower or higher by a tenth
QUERIES = 64  # of a warpgroup
TOKENS = (1568, 3136, 3137, 6272, 12544)

_PRODUCT = re.compile(r"HGMMA\.64x(\d+)x16[.\w]*\s+R\d+, (gdesc|R)")
LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)(?:\.[\w.]+)?([^;]*);", re.MULTILINE)
_VARIANT = re.compile(r"HopperVariant<(\d+), (\d+), \w+, (\d+), ")


class Shape(NamedTuple):
    """What a kernel is compiled for, as its name says: channels of a head, keys of a tile, warpgroups that compute."""

    channels: int = 64
    keys: int = 128
    groups: int = 2

    @classmethod
    def of(cls, name: str) -> Shape:
        found = _VARIANT.search(name)
        return cls(16 * int(found[1]), int(found[2]), int(found[3])) if found else cls()


@dataclass(frozen=True)
class Product:
    """Of 64 rows by 16 channels or keys, as one warpgroup asks for it: cycles of the tensor cores, of shared memory."""

    cycles: int
    shared: int
    left_in_shared: bool


def products_of(text: str) -> list[Product]:
    found = []
    for columns, left in _PRODUCT.findall(text):
        n, shared = int(columns), left == "gdesc"
        read = 2 * 16 * (n + (QUERIES if shared else 0)) // SHARED_BYTES_PER_CYCLE
        found.append(Product(2 * QUERIES * n * 16 // FLOP_PER_CYCLE, read, shared))
    return found


@dataclass(frozen=True)
class Tile:
    """Cycles of a multiprocessor for one tile in one warpgroup, whose four warps sit on a scheduler each."""

    products: int
    of_scores: int  # the first of the two products
    exponentials: int
    issue: int
    rescale: int  # further slots where a base rises
    alu: int
    fma: int
    shared: int
    chain: int  # of one warpgroup, alone

    def period(self, groups: int) -> tuple[int, str]:
        """Of one tile in every warpgroup, and what bounds it."""
        names = ("products", "exponentials", "issue", "alu", "fma", "shared")
        parts = {name: groups * getattr(self, name) for name in names} | {"chain": self.chain}
        name = max(parts, key=lambda each: parts[each])
        return parts[name], name


def inner_loop(kernel: cubin.Kernel) -> cubin.Loop:
    """The one with both products and exponentials, every tile but the last."""
    found = [x for x in cubin.loops_with_products(kernel) if x.mix["HGMMA"] and x.mix["MUFU.EX2"]]
    if not found:
        raise ValueError(f"bench cuda_model: {kernel.name} has no loop with products and exponentials")
    return min(found, key=lambda loop: loop.last - loop.first)


def passed_by(lines: list[tuple[int, str, str]], last: int, opcode: str, least: int) -> set[int]:
    """Addresses that a forward branch may pass by, where at least so many of an opcode stand: rare work."""
    passed: set[int] = set()
    for at, name, rest in lines:
        target = re.search(r"0x([0-9a-f]+)", rest) if name == "BRA" else None
        if target is None or not at < int(target[1], 16) <= last:
            continue
        inside = [(a, o) for a, o, _ in lines if at < a < int(target[1], 16)]
        if sum(o == opcode for _, o in inside) >= least:
            passed.update(a for a, _ in inside)
    return passed


def tile_of(kernel: cubin.Kernel, shape: Shape = Shape()) -> Tile:  # noqa: B008  it is immutable
    loop = inner_loop(kernel)
    every = [(int(at, 16), opcode, rest) for at, _, opcode, rest in LINE.findall(kernel.sass)]
    lines = [line for line in every if loop.first <= line[0] <= loop.last]
    rare = passed_by(lines, loop.last, "FMUL", QUERIES * shape.channels // 128)  # sums, where no base rises
    counts = cubin.Counter(opcode for at, opcode, _ in lines if at not in rare)
    text = kernel.sass[kernel.sass.index(f"/*{loop.first:04x}*/") : kernel.sass.index(f"/*{loop.last:04x}*/")]
    found = products_of(text)
    products, shared = sum(x.cycles for x in found), sum(x.shared for x in found)
    of_scores = sum(x.cycles for x in found if x.left_in_shared)
    issue = sum(counts.values())
    exponentials = EXPONENTIALS * counts["MUFU"]
    alu = sum(cycles * counts[name] for name, cycles in ALU.items()) + SHUFFLES * counts["SHFL"]
    fma = sum(cycles * counts[name] for name, cycles in FMA.items())
    # find the largest score, then exponentials beside all else, then round
    largest, rounding = ALU["FMNMX"] * shape.keys * QUERIES // 128, ALU["F2FP"] * counts["F2FP"]
    chain = of_scores + largest + max(exponentials, issue - largest // 2 - rounding // 2) + rounding
    return Tile(products, of_scores, exponentials, issue, len(rare), alu, fma, shared, chain)


def call_us(tile: Tile, shape: Shape, B: int, H: int, N: int) -> tuple[float, float]:
    """(microseconds, TFLOP/s) of q k^T and the weighted sum of v: whole tiles, by as many blocks as multiprocessors."""
    queries, keys = shape.groups * QUERIES, -(-N // shape.keys)
    rounds = -(-(B * H * -(-N // queries)) // MULTIPROCESSORS)
    # the first tile's weights and the last one's outputs lie beside nothing of this warpgroup
    ends = tile.chain + shape.groups * (tile.products - tile.of_scores)
    cycles = rounds * ((keys - 1) * tile.period(shape.groups)[0] + ends)
    us = cycles / (CLOCK_GHZ * 1e3)
    return us, 4 * B * H * N * N * shape.channels / us / 1e6


def report(kernels: list[tuple[str, cubin.Kernel]]) -> str:
    rows, calls = [], []
    for name, kernel in kernels:
        shape = Shape.of(name)
        tile = tile_of(kernel, shape)
        period, bound = tile.period(shape.groups)
        numbers = (
            tile.products,
            tile.exponentials,
            tile.issue,
            tile.rescale,
            tile.alu,
            tile.fma,
            tile.shared,
            tile.chain,
        )
        share = f"{shape.groups * tile.products / period:.0%}"
        rows.append((name, *map(str, shape), *map(str, numbers), f"{period} {bound}", share))
        for N in TOKENS:
            us, tflops = call_us(tile, shape, 8, 12, N)
            calls.append((name, str(N), f"{us:.0f}", f"{tflops:.0f}"))
    head = ("kernel", "channels", "keys", "groups", "products", "exp", "issue", "+rescale", "alu", "fma", "shared")
    return "\n\n".join(
        [
            f"Cycles for {QUERIES} queries and a tile of keys; period: one such tile in every warpgroup, and what"
            " bounds it.\nKernels with options (false) are counted for no one call: branches of options that multiply"
            " as much as\na rescaling does (the soft-cap's) stand under +rescale, all others (dropout's) are taken.",
            table((*head, "chain", "period", "products'"), rows, 1),
            f"At least, for 8 clips of 12 heads, {MULTIPROCESSORS} multiprocessors at {CLOCK_GHZ} GHz:",
            table(("kernel", "tokens", "microseconds", "TFLOP/s at most"), calls, 1),
        ]
    )


def main(argv: list[str]) -> int:
    """0; 1 where there is no such kernel."""
    parser = argparse.ArgumentParser("python -m bench cuda_model", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--file", type=Path, help="a cubin or object file instead of the installed library")
    args = parser.parse_args(argv)
    if args.file is None and (why := cuda_gate.unavailable()):
        print(why)
        return 1
    from . import cuda_model_tubelet

    found = cuda_gate.read(args.file or _library.library_path())
    kernels = [(name, x) for name, x in found if name.startswith("pipelined") and x.arch == 90]
    from . import cuda_model_backward, cuda_model_resident  # here: they count with what stands above

    forward = [(name, x) for name, x in kernels if name.startswith("pipelined_joint_forward")]
    tubelets = [(name, x) for name, x in found if name.startswith(("gathering", "scattering")) and x.arch == 90]
    reports = [report(forward) if forward else "", cuda_model_backward.report(kernels)]
    reports.append(cuda_model_tubelet.report(tubelets) if tubelets else "")
    reports.append(cuda_model_resident.report([(name, x) for name, x in found if x.arch == 90]))
    text = "\n\n".join(filter(None, reports))
    print(text or "no kernel of sm_90 is called pipelined, gathering, scattering or hopper")
    return 0 if text else 1
