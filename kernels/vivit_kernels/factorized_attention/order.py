"""Which backend of factorized_attention is tried first: `Ladder`s (_order.py) of measured cases."""

from __future__ import annotations

import torch

from .. import _order
from .._dispatch import Call
from .._order import MANY, Decision, Ladder, Rung

LETTERS = ("B", "T", "S", "H", "D")
LADDERS = {
    "cuda": Ladder(
        ("triton", "cuda", "torch"),
        "This project's kernels, then the composition of PyTorch ops. One H100, 2026-11-26, time on the device, bf16, "
        "8 clips of 16 x 196 tokens, 12 heads of 64, forward, then forward + backward: along time triton 60 and 154, "
        "torch 555 and 2068 us; within frames triton 101 and 376 us, torch 115 and 1918; half of the heads each way "
        "triton 85 and 287 us, torch 460 and 2421. CUDA C++ comes second until it has passed all of its tests on a GPU "
        "and is in the records. What is known of it: the same shapes on one H200, kernels alone, right against "
        "float64, forward and backward: along time cuda 48 and 76 us, triton 44 and 73; within frames, by Hopper's "
        "products, cuda 83 and 219 us, triton 96 and 267; half of the heads each way cuda 67 and 165 us, triton 77 and "
        "188; 256 tokens, 16 heads, cuda 120 and 405 us, triton 130 and 384. Without Hopper's products, on the H100, "
        "within frames cuda 120 and 329 us.",
    ),
    "cpu": Ladder(
        ("cpu", "torch"),
        "Compiled kernels, which read the token grid where it lies, then the composition of PyTorch ops, which runs "
        "every call. 2 cores of an AMD EPYC (Zen 4), 2026-11-26, one clip of 16 x 196 tokens, 12 heads of 64, forward "
        "+ backward, bf16 and fp32: along time cpu 5.3 and 9.1 ms, torch 22 and 21; within frames cpu 24 and 43 ms, "
        "torch 74 and 62. Both held to AVX2, one core, forward: along time cpu 3.5 and 4.5 ms, torch 10 and 8.1; four "
        "frames cpu 6.3 and 6.3 ms, torch 8.2 and 7.0. Triton's kernels run on CPU tensors only interpreted, to be "
        "checked: by name. One core of an Intel Xeon, products of both on AMX, 2026-11-26, bf16, 12 heads of 64, "
        "within frames: five of 196 tokens forward cpu 3.9 ms, torch 6.8, with backward 11 and 40; eight of 64 forward "
        "1.1 and 4.7.",
        (
            Rung(
                "torch",
                isas=("avx512_bf16_beside_amx",),
                dtypes=(torch.bfloat16,),
                needs_grad=False,
                axis="space",
                sizes=(("S", 128, MANY),),
                reason="One core of an Intel Xeon with AMX, which PyTorch's forward has and these kernels have not, "
                "2026-11-26, forward within frames, bf16, 12 heads of 64: eight frames of 128 tokens torch 4.5 ms, "
                "cpu 6.8; five of 196 5.9 and 9.6; four of 256 6.3 and 12. Of 64 tokens, and with a backward, cpu.",
            ),
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
