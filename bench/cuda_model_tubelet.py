"""What tubelet_embedding's forward for Hopper must cost (csrc/cuda/tubelet_hopper.cuh), counted from its machine code
as cuda_model.py counts attention's: a part of `python -m bench cuda_model`.

A step is 64 taps of a tile of 128 tubelets, both warpgroups' share of it. The busiest part of a multiprocessor bounds
it: a bound and no prediction. Tokens are stored by one warpgroup while the other multiplies, so that no time is counted
for it; nothing waits for memory here, and what the second-level cache has to give beside is printed, not judged.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from . import cubin, cuda_gate
from .cuda_model import (
    ALU,
    CLOCK_GHZ,
    FLOP_PER_CYCLE,
    FMA,
    LINE,
    MULTIPROCESSORS,
    SHARED_BYTES_PER_CYCLE,
    SHUFFLES,
    passed_by,
)  # fmt: skip
from .static import table

GROUPS, TUBELETS, TAPS = 2, 128, 64  # of a block, of its tile, of a step
STEPS = 2  # in the loop's body
PIXEL_BYTES = {"unsigned char": 1, "float": 4}  # else 2
# 8 clips: tubelets, taps, channels of a token
CALLS = {
    "ViViT-B/16x2": (25088, 1536, 768),
    "ViViT-L/16x2": (25088, 1536, 1024),
    "ViViT-H/14x2": (32768, 1176, 1280),
}

_NAME = re.compile(r"gathering_tubelet_forward<[\w ]+, ([\w ]+), (\d+)>")
_PRODUCT = re.compile(r"HGMMA\.64x(\d+)x16")


@dataclass(frozen=True)
class Step:
    """Cycles of a multiprocessor for a step."""

    columns: int
    pixel_bytes: int
    products: int
    issue: int
    normalise: int  # further slots where floating-point pixels have a mean or std
    alu: int
    fma: int
    shared: int  # and the first-level cache, which is the same memory

    def period(self) -> tuple[int, str]:
        parts = {name: getattr(self, name) for name in ("products", "issue", "alu", "fma", "shared")}
        name = max(parts, key=lambda each: parts[each])
        return parts[name], name

    def cached_bytes(self) -> int:
        """That the second-level cache gives: the weight and pixels."""
        return self.columns * TAPS * 2 + TUBELETS * TAPS * self.pixel_bytes


def step_of(name: str, kernel: cubin.Kernel) -> Step:
    found = _NAME.search(name)
    if found is None:
        raise ValueError(f"bench cuda_model: {name} does not say pixels and columns as gathering_tubelet_forward does")
    pixel_bytes, columns = PIXEL_BYTES.get(found[1], 2), int(found[2])
    loops = cuda_gate.loops_with_products(kernel)
    if not loops:
        raise ValueError(f"bench cuda_model: {kernel.name} has no loop with products")
    loop = min(loops, key=lambda x: x.last - x.first)
    text = kernel.sass[kernel.sass.index(f"/*{loop.first:04x}*/") : kernel.sass.index(f"/*{loop.last:04x}*/")]
    widths = [int(n) for n in _PRODUCT.findall(text)]
    every = [(int(at, 16), opcode, rest) for at, _, opcode, rest in LINE.findall(kernel.sass)]
    lines = [line for line in every if loop.first <= line[0] <= loop.last]
    rare = passed_by(lines, loop.last, "FFMA", TAPS // 4)  # pixels that are scaled and shifted
    mix = cubin.Counter(opcode for at, opcode, _ in lines if at not in rare)
    warps_of_scheduler, warps = GROUPS, 4 * GROUPS
    # an access of a warp takes a cycle for each 128 bytes, and one at least; a look-up is of four places in all
    pixels = mix["LDG"] * max(1, 2 * pixel_bytes * 32 // SHARED_BYTES_PER_CYCLE)
    weight = GROUPS * sum(16 * n * 2 for n in widths) + STEPS * columns * TAPS * 2
    shared = weight // SHARED_BYTES_PER_CYCLE + warps * (pixels + mix["LDS"])
    return Step(
        columns=columns,
        pixel_bytes=pixel_bytes,
        products=GROUPS * sum(2 * 64 * n * 16 // FLOP_PER_CYCLE for n in widths) // STEPS,
        issue=warps_of_scheduler * sum(mix.values()) // STEPS,
        normalise=warps_of_scheduler * len(rare) // STEPS,
        alu=warps_of_scheduler * (sum(c * mix[o] for o, c in ALU.items()) + SHUFFLES * mix["SHFL"]) // STEPS,
        fma=warps_of_scheduler * (sum(c * mix[o] for o, c in FMA.items()) + 2 * mix["HFMA2"]) // STEPS,
        shared=shared // STEPS,
    )


def call_us(step: Step, M: int, K: int, E: int) -> tuple[float, float]:
    """(microseconds, TFLOP/s): whole tiles, by as many blocks as multiprocessors, steps in pairs."""
    tiles = -(-M // TUBELETS) * -(-E // step.columns)
    cycles = -(-tiles // MULTIPROCESSORS) * -(-K // (STEPS * TAPS)) * STEPS * step.period()[0]
    us = cycles / (CLOCK_GHZ * 1e3)
    return us, 2 * M * K * E / us / 1e6


def report(kernels: list[tuple[str, cubin.Kernel]]) -> str:
    rows, calls = [], []
    for name, kernel in kernels:
        step = step_of(name, kernel)
        period, bound = step.period()
        numbers = (step.products, step.issue, step.normalise, step.alu, step.fma, step.shared)
        cached = f"{step.cached_bytes() / period:.0f}"
        rows.append((name, *map(str, numbers), f"{period} {bound}", f"{step.products / period:.0%}", cached))
        for call, sizes in CALLS.items():
            us, tflops = call_us(step, *sizes)
            calls.append((name, call, f"{us:.0f}", f"{tflops:.0f}"))
    head = (
        "kernel",
        "products",
        "issue",
        "+normalise",
        "alu",
        "fma",
        "shared",
        "period",
        "products'",
        "L2 bytes a cycle",
    )
    return "\n\n".join(
        [
            f"Cycles for {TUBELETS} tubelets x {TAPS} taps of a tile; period: what bounds it",
            table(head, rows, 1),
            f"At least, for 8 clips, {MULTIPROCESSORS} multiprocessors at {CLOCK_GHZ} GHz:",
            table(("kernel", "tubelets of", "microseconds", "TFLOP/s at most"), calls, 1),
        ]
    )
