"""What tubelet_embedding's kernels for Hopper must cost (csrc/cuda/tubelet_hopper*.cuh), counted from their machine
code as cuda_model.py counts attention's: a part of `python -m bench cuda_model`.

A step of the forward is 64 taps of a tile of 128 tubelets, one of the weight's gradient 32 tubelets of a tile of 256
taps and 128 channels, one of the video's 64 channels of a tile of 128 tubelets and 256 taps; both warpgroups' share of
it. The busiest part of a multiprocessor bounds it: a bound and no prediction. Sums are stored by one warpgroup while
the other multiplies, so that no time is counted for it; nothing waits for memory here, and what the second-level cache
has to give beside is printed, not judged. To the weight's gradient belong two smaller kernels that only memory bounds:
the sums over dout, which read it once, and the sum of the parts.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from vivit_kernels.tubelet_embedding import tiles

from . import cubin
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
STEPS = 2  # in the loop's body, but for the video's gradient
WEIGHTS, VIDEO = "gathering_weight_gradient", "scattering_video_gradient"
OF_WEIGHTS = 32, 256, 128  # tubelets of a step, taps and channels of a tile
OF_VIDEO = 128, 256, 64  # tubelets and taps of a tile, channels of a step
MEMORY_BYTES_PER_US = 3e6  # as tiles.py has it
PIXEL_BYTES = {"unsigned char": 1, "float": 4}  # else 2
# 8 clips: tubelets, taps, channels of a token
CALLS = {
    "ViViT-B/16x2": (25088, 1536, 768),
    "ViViT-L/16x2": (25088, 1536, 1024),
    "ViViT-H/14x2": (32768, 1176, 1280),
}

_NAME = re.compile(rf"(gathering_tubelet_forward|{WEIGHTS}|{VIDEO})<[\w ]+(?:, ([a-z][\w ]+?))?(?:, (\d+))?>")
_PRODUCT = re.compile(r"HGMMA\.64x(\d+)x16")


@dataclass(frozen=True)
class Step:
    """Cycles of a multiprocessor for a step."""

    kernel: str
    columns: int  # of the forward
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
        """That the second-level cache gives: what is copied, and pixels."""
        gathered = {VIDEO: 0, WEIGHTS: OF_WEIGHTS[0] * OF_WEIGHTS[1]}
        pixels = gathered.get(self.kernel, TUBELETS * TAPS)
        return copied_bytes(self.kernel, self.columns) + pixels * self.pixel_bytes


def copied_bytes(kernel: str, columns: int) -> int:
    """That the copy engine brings for a step: the weight, dout, or both."""
    if kernel == WEIGHTS:
        return OF_WEIGHTS[0] * OF_WEIGHTS[2] * 2
    tubelets, taps, channels = OF_VIDEO
    return (tubelets + taps) * channels * 2 if kernel == VIDEO else columns * TAPS * 2


def step_of(name: str, kernel: cubin.Kernel) -> Step:
    found = _NAME.search(name)
    if found is None:
        raise ValueError(f"bench cuda_model: {name} does not say pixels and columns as gathering_tubelet_forward does")
    word, pixel_bytes, columns = found[1], PIXEL_BYTES.get(found[2], 2), int(found[3] or 0)
    steps = 1 if word == VIDEO else STEPS
    loops = cubin.loops_with_products(kernel)
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
    left = 64 * 16 * 2 if word == VIDEO else 0  # bytes of a product's left operand in shared memory
    # an access of a warp takes a cycle for each 128 bytes, and one at least; a look-up is of four places in all
    pixels = mix["LDG"] * max(1, 2 * pixel_bytes * 32 // SHARED_BYTES_PER_CYCLE)
    copied = GROUPS * sum(16 * n * 2 + left for n in widths) + steps * copied_bytes(word, columns)
    shared = copied // SHARED_BYTES_PER_CYCLE + warps * (pixels + mix["LDS"])
    return Step(
        kernel=word,
        columns=columns,
        pixel_bytes=pixel_bytes,
        products=GROUPS * sum(2 * 64 * n * 16 // FLOP_PER_CYCLE for n in widths) // steps,
        issue=(warps_of_scheduler * sum(mix.values()) + len(copies)) // steps,
        normalise=warps_of_scheduler * len(rare) // steps,
        alu=warps_of_scheduler * (sum(c * mix[o] for o, c in ALU.items()) + SHUFFLES * mix["SHFL"]) // steps,
        fma=warps_of_scheduler * (sum(c * mix[o] for o, c in FMA.items()) + 2 * mix["HFMA2"]) // steps,
        shared=shared // steps,
    )


def call_us(step: Step, M: int, K: int, E: int) -> tuple[float, float]:
    """(microseconds, TFLOP/s) of the forward or the video's gradient: whole tiles, by as many blocks as
    multiprocessors; of the forward steps in pairs."""
    if step.kernel == VIDEO:
        of_tile, taps, channels = OF_VIDEO
        count, steps = -(-M // of_tile) * -(-K // taps), -(-E // channels)
    else:
        count, steps = -(-M // TUBELETS) * -(-E // step.columns), -(-K // (STEPS * TAPS)) * STEPS
    us = -(-count // MULTIPROCESSORS) * steps * step.period()[0] / (CLOCK_GHZ * 1e3)
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
            if step.kernel != WEIGHTS:
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
    what = f"{TUBELETS} tubelets x {TAPS} taps of a tile; of weight gradients {tubelets} x {taps} taps x {channels} "
    what += f"channels, of video gradients {OF_VIDEO[0]} x {OF_VIDEO[1]} x {OF_VIDEO[2]}"
    found = [f"Cycles for {what}; period: what bounds it", table(head, rows, 1)]
    at = f"for 8 clips, {MULTIPROCESSORS} multiprocessors at {CLOCK_GHZ} GHz"
    if calls:
        found += [f"At least, {at}:", table(("kernel", "tubelets of", "microseconds", "TFLOP/s at most"), calls, 1)]
    if gradients:
        columns = ("kernel", "tubelets of", "parts", "all tensor cores", "product", "sums and parts", "share")
        found += [f"Microseconds at least, {at}, of dout's sums too; share: of products alone:"]
        found += [table(columns, gradients, 1)]
    return "\n\n".join(found)
