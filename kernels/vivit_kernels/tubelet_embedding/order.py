"""Which backend of tubelet_embedding is tried first: `Ladder`s (_order.py) of measured cases."""

from __future__ import annotations

import torch

from .. import _order
from .._dispatch import Call
from .._order import Decision, Ladder, Rung

LETTERS = ("B", "C", "F", "Y", "X")
LADDERS = {
    "cuda": Ladder(
        ("triton", "cuda", "torch"),
        "This project's kernels, which read pixels where they lie, then the composition of PyTorch ops. CUDA C++ comes "
        "second until it has passed its tests on a GPU and is in the records. ViT-B, "
        "tubelets of 2x16x16, 8 clips of 32 frames in uint8, bf16, 2026-11-26, triton and torch: one H100 forward 165 "
        "and 616 us (older tiles), one H200 forward 123 and 524, backward 202 and 820 (torch's recorded hours before). "
        "Tokens take 0.20 of the error budget on both, gradients 0.24 on the H200; tokens were outside it there before "
        "a step waited for its product (triton_forward.py).",
    ),
    "cpu": Ladder(
        ("cpu", "torch"),
        "Compiled kernels, which read pixels where they lie, then the composition of PyTorch ops, which runs every "
        "call. Two threads of an EPYC Zen 4, 2026-11-26, ViT-B, tubelets of 2x16x16 of 32 frames in uint8, cpu and "
        "torch: bf16 forward 19 and 36 ms a clip, with backward 44 and 56, four clips 75 and 138, 181 and 240; fp32 "
        "37 and 53, 80 and 95, four clips 156 and 207, 298 and 407. With an allocator that keeps its pages bf16 19 and "
        "23 ms, 40 and 48, fp32 35 and 39, 74 and 81. Triton's kernels run on CPU tensors only interpreted, to be "
        "checked: by name.",
        (
            Rung(
                "torch",
                isas=("avx512_bf16_beside_amx",),
                dtypes=(torch.bfloat16,),
                reason="One core of an Intel Xeon with AMX, whose products torch has and cpu has not, 2026-11-26, "
                "ViT-B, tubelets of 2x16x16, bf16 weights: 16 frames of 224x224 in uint8 torch 11 ms, cpu 50; in bf16 "
                "11 and 57.",
            ),
            Rung(
                "torch",
                isas=("avx512_amx",),
                dtypes=(torch.bfloat16,),
                needs_grad=True,
                reason="One core of an Intel Xeon with AMX, 2026-11-26, when cpu did its forward by AVX-512, as it "
                "does its backward: 16 frames of 224x224 with backward in uint8 torch 29 ms, cpu 105; in bf16 33 and "
                "113.",
            ),
            Rung(
                "torch",
                isas=("avx512_amx",),
                dtypes=(torch.bfloat16,),
                sizes=(("B", 1, 1), ("F", 1, 2), ("Y", 1, 64), ("X", 1, 64)),
                reason="One core of an Intel Xeon with AMX, 2026-11-27, ViT-B, tubelets of 2x16x16, bf16 weights and "
                "clip: 2 frames of 64x64 torch 0.7 ms, cpu 1.0. Of 32 frames of 224x224 cpu comes first: 25 and 15 "
                "ms, in uint8 23 and 12.",
            ),
        ),
    ),
}


def decide(call: Call) -> Decision:
    """The backends in the order in which they are tried for this call, and why in this one."""
    return _order.decide(call, LADDERS, LETTERS)


def order(call: Call) -> tuple[str, ...]:
    return decide(call).order
