"""Which backend of factorized_attention is tried first: `Ladder`s (_order.py) of measured cases."""

from __future__ import annotations

import torch

from .. import _order
from .._dispatch import Call
from .._order import Decision, Ladder, Rung

LETTERS = ("B", "T", "S", "H", "D")
LADDERS = {
    "cuda": Ladder(
        ("triton", "cuda", "torch"),
        "This project's kernels, then the composition of PyTorch ops. One H100, 2026-11-26, time on the device, bf16, "
        "8 clips of 16 x 196 tokens, 12 heads of 64, forward, then forward + backward: along time triton 60 and 154, "
        "torch 555 and 2068 us; within frames triton 101 and 376 us, torch 115 and 1918; half of the heads each way "
        "triton 85 and 287 us, torch 460 and 2421. CUDA C++ kernels on that card, not recorded: along time 64 us and "
        "100 for the backward (triton 59 and 99); within frames without Hopper's products 120 and 329.",
        tuple(
            Rung(
                "cuda",
                arches=(90,),
                dtypes=(torch.bfloat16, torch.float16),
                sizes=(("D", 64, 64), ("S", 129, 224), *more),
                axis=axis,
                reason="CUDA C++ with Hopper's products. One H200, 2026-11-26, time on the device, not recorded, bf16, "
                "8 clips of 16 x 196 tokens, 12 heads of 64, forward and backward: within frames cuda 83 and 219 us, "
                "triton 96 and 267; half of the heads each way cuda 67 and 165 us, triton 77 and 188. The kernels have "
                "become shorter since. 256 tokens, 16 heads: cuda 120 and 405 us, triton 130 and 384. float16 and "
                "other lengths are not measured.",
            )
            for axis, more in (("space", ()), ("both", (("T", 1, 16),)))
        ),
    ),
    "cpu": Ladder(
        ("cpu", "torch"),
        "Compiled kernels, which read the token grid where it lies, then the composition of PyTorch ops, which runs "
        "every call. 2 cores of an AMD EPYC (Zen 4), 2026-11-26, one clip of 16 x 196 tokens, 12 heads of 64, forward "
        "+ backward, bf16 and fp32: along time cpu 5.3 and 9.1 ms, torch 22 and 21; within frames cpu 24 and 43 ms, "
        "torch 74 and 62. Both held to AVX2, one core, forward: along time cpu 3.5 and 4.5 ms, torch 10 and 8.1; four "
        "frames cpu 6.3 and 6.3 ms, torch 8.2 and 7.0. Triton's kernels run on CPU tensors only interpreted, to be "
        "checked: by name.",
        (
            Rung(
                "torch",
                isas=("portable",),
                dtypes=(torch.float32,),
                axis="space",
                reason="One core of an AMD EPYC (Zen 4) held to SSE, 2026-11-26, forward, four frames of 196 tokens, "
                "12 heads of 64, fp32: torch 17 ms, cpu 19; in bf16 equal, 20 ms. Along time cpu is first: 8.9 ms, "
                "torch 14. Other processors without AVX2 are not measured.",
            ),
        ),
    ),
}


def decide(call: Call) -> Decision:
    """The backends in the order in which they are tried for this call, and why in this one."""
    return _order.decide(call, LADDERS, LETTERS)


def order(call: Call) -> tuple[str, ...]:
    return decide(call).order
