"""What tubelet_embedding's forward and weight gradient for Hopper must cost (csrc/cuda/tubelet_hopper.cuh,
tubelet_hopper_weights.cuh), counted from their machine code as cuda_model.py counts attention's: a part of
`python -m bench cuda_model`.

A step of the forward is 64 taps of a tile of 128 tubelets, one of the gradient 32 tubelets of a tile of 256 taps and
128 channels, both warpgroups' share of it. The busiest part of a multiprocessor bounds it: a bound and no prediction.
Sums are stored by one warpgroup while the other multiplies, so that no time is counted for it; nothing waits for memory
here, and what the second-level cache has to give beside is printed, not judged. To the gradient belong two smaller
kernels that only memory bounds: the sums over dout, which read it once, and the sum of the parts.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from vivit_kernels.tubelet_embedding import tiles

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
OF_WEIGHTS = 32, 256, 128  # the gradient's: tubelets of a step, taps and channels of a tile
MEMORY_BYTES_PER_US = 3e6  # as tiles.py has it
PIXEL_BYTES = {"unsigned char": 1, "float": 4}  # else 2
# 8 clips: tubelets, taps, channels of a token
CALLS = {
    "ViViT-B/16x2": (25088, 1536, 768),
    "ViViT-L/16x2": (25088, 1536, 1024),
    "ViViT-H/14x2": (32768, 1176, 1280),
}

_NAME = re.compile(r"gathering_(?:tubelet_forward|weight_gradient)<[\w ]+, ([\w ]+?)(?:, (\d+))?>")
_PRODUCT = re.compile(r"HGMMA\.64x(\d+)x16")


@dataclass(frozen=True)
class Step:
    """Cycles of a multiprocessor for a step."""

    columns: int  # 0: of the weight's gradient
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
        """That the second-level cache gives: the weight, or dout, and pixels."""
        if self.columns:
            return self.columns * TAPS * 2 + TUBELETS * TAPS * self.pixel_bytes
        tubelets, taps, channels = OF_WEIGHTS
        return tubelets * channels * 2 + tubelets * taps * self.pixel_bytes


def step_of(name: str, kernel: cubin.Kernel) -> Step:
    found = _NAME.search(name)
    if found is None:
        raise ValueError(f"bench cuda_model: {name} does not say pixels and columns as gathering_tubelet_forward does")
    pixel_bytes, columns = PIXEL_BYTES.get(found[1], 2), int(found[2] or 0)
    loops = cuda_gate.loops_with_products(kernel)
    if not loops:
        raise ValueError(f"bench cuda_model: {kernel.name} has no loop with products")
    loop = min(loops, key=lambda x: x.last - x.first)
    text = kernel.sass[kernel.sass.index(f"/*{loop.first:04x}*/") : kernel.sass.index(f"/*{loop.last:04x}*/")]
    widths = [int(n) for n in _PRODUCT.findall(text)]
    every = [(int(at, 16), opcode, rest) for at, _, opcode, rest in LINE.findall(kernel.sass)]
    lines = [line for line in every if loop.first <= line[0] <= loop.last]
    rare = passed_by(lines, loop.last, "FFMA", TAPS // 4)  # pixels that are scaled and shifted
    # what one warp alone asks the copy engine for; of the forward counted as if each did
    copies = set() if columns else passed_by(lines, loop.last, "UTMALDG", 1)
    mix = cubin.Counter(opcode for at, opcode, _ in lines if at not in rare | copies)
    warps_of_scheduler, warps = GROUPS, 4 * GROUPS
    arriving = columns * TAPS * 2 if columns else OF_WEIGHTS[0] * OF_WEIGHTS[2] * 2
    # an access of a warp takes a cycle for each 128 bytes, and one at least; a look-up is of four places in all
    pixels = mix["LDG"] * max(1, 2 * pixel_bytes * 32 // SHARED_BYTES_PER_CYCLE)
    copied = GROUPS * sum(16 * n * 2 for n in widths) + STEPS * arriving
    shared = copied // SHARED_BYTES_PER_CYCLE + warps * (pixels + mix["LDS"])
    return Step(
        columns=columns,
        pixel_bytes=pixel_bytes,
        products=GROUPS * sum(2 * 64 * n * 16 // FLOP_PER_CYCLE for n in widths) // STEPS,
        issue=(warps_of_scheduler * sum(mix.values()) + len(copies)) // STEPS,
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


def gradient_us(step: Step, M: int, K: int, E: int) -> tuple[float, float, int]:
    """(microseconds of the product, of what memory bounds beside it, parts), as cuda_kernels.py shares them out."""
    tubelets, taps, channels = OF_WEIGHTS
    programs = -(-K // taps) * -(-E // channels)
    parts = tiles.splits(M, E * K, STEPS * tubelets, programs, MULTIPROCESSORS)
    pairs = math.ceil(math.ceil(M / (STEPS * tubelets)) / parts)
    cycles = -(-programs * parts // MULTIPROCESSORS) * pairs * STEPS * step.period()[0]
    beside = (M * E * 2 + parts * E * K * 4) / MEMORY_BYTES_PER_US
    return cycles / (CLOCK_GHZ * 1e3), beside, parts


def report(kernels: list[tuple[str, cubin.Kernel]]) -> str:
    rows, calls, gradients = [], [], []
    for name, kernel in kernels:
        step = step_of(name, kernel)
        period, bound = step.period()
        numbers = (step.products, step.issue, step.normalise, step.alu, step.fma, step.shared)
        cached = f"{step.cached_bytes() / period:.0f}"
        rows.append((name, *map(str, numbers), f"{period} {bound}", f"{step.products / period:.0%}", cached))
        for call, (M, K, E) in CALLS.items():
            if step.columns:
                us, tflops = call_us(step, M, K, E)
                calls.append((name, call, f"{us:.0f}", f"{tflops:.0f}"))
            else:
                us, beside, parts = gradient_us(step, M, K, E)
                least = 2 * M * K * E / (FLOP_PER_CYCLE * MULTIPROCESSORS * CLOCK_GHZ * 1e3)
                share = f"{least / (us + beside):.0%}"
                gradients.append((name, call, str(parts), f"{least:.0f}", f"{us:.0f}", f"{beside:.0f}", share))
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
    tubelets, taps, channels = OF_WEIGHTS
    what = f"{TUBELETS} tubelets x {TAPS} taps of a tile; of weight gradients {tubelets} tubelets x {taps} taps x "
    found = [f"Cycles for {what}{channels} channels; period: what bounds it", table(head, rows, 1)]
    at = f"for 8 clips, {MULTIPROCESSORS} multiprocessors at {CLOCK_GHZ} GHz"
    if calls:
        found += [f"At least, {at}:", table(("kernel", "tubelets of", "microseconds", "TFLOP/s at most"), calls, 1)]
    if gradients:
        columns = ("kernel", "tubelets of", "parts", "all tensor cores", "product", "sums and parts", "share")
        found += [f"Microseconds at least, {at}, of dout's sums too; share: of products alone:"]
        found += [table(columns, gradients, 1)]
    return "\n\n".join(found)
