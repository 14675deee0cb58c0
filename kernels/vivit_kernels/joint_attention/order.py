"""Which backend of joint_attention is tried first: `Ladder`s (_order.py) of measured cases."""

from __future__ import annotations

import torch

from .. import _order
from .._dispatch import Call
from .._order import MANY, Decision, Ladder, Rung, is_deterministic  # noqa: F401  for support.py

LETTERS = ("B", "N", "H", "D")
RUNGS = (
    Rung(
        "sdpa",
        arches=(90,),
        needs_grad=True,
        dtypes=(torch.bfloat16, torch.float16),
        sizes=(("N", 2048, MANY), ("D", 64, 64)),
        deterministic=False,  # cuDNN's backward is not, and PyTorch's FlashAttention is slower than triton
        reason="One H200, 2026-11-26, bf16, 12 heads of 64, forward + backward: two clips of 3136 tokens cuDNN 167 + "
        "384 us, triton 154 + 442, PyTorch's FlashAttention 268 + 662; eight of 3137 together (recorded) sdpa 2167, "
        "triton 2271. Forward alone: triton. float16 and other N are not measured.",
    ),
)
CPU_RUNGS = (
    Rung(
        "sdpa",
        isas=("avx512_bf16_beside_amx",),
        dtypes=(torch.bfloat16,),
        needs_grad=True,
        sizes=(("N", 512, MANY), ("N_k", 512, MANY)),
        reason="One core of an Intel Xeon with AMX, which sdpa has and these kernels have not, 2026-11-26, bf16, "
        "12 heads of 64, forward + backward: two clips of 512 tokens sdpa 67 ms, torch 85, cpu 91; one of 1569 sdpa "
        "224, torch 301, cpu 399; 785 tokens, 8 heads of 72, "
        "80 and 128: sdpa 105, 102 and 124, cpu 157, 168 and 256. Five of 197 tokens cpu 34, sdpa 47.",
    ),
    Rung(
        "torch",
        isas=("avx512_bf16_beside_amx",),
        dtypes=(torch.bfloat16,),
        needs_grad=False,
        sizes=(("N", 128, MANY), ("N_k", 128, MANY)),
        reason="One core of an Intel Xeon with AMX, which PyTorch's forward has and these kernels have not, "
        "2026-11-26, bf16, 12 heads of 64: eight clips of 128 tokens torch 4.6 ms, cpu 6.9; five of 197 5.8 and 9.8; "
        "one of 1569 33 and 104; 785 tokens, 8 heads of 32, 72 and 128: 12, 20 and 24, cpu 19, 43 and 67. Of 64 tokens "
        "cpu is first: 4.2 ms, torch 7.6.",
    ),
    Rung(
        "torch",
        isas=("portable",),
        reason="One core of an AMD EPYC (Zen 4) held to SSE, 2026-11-26, forward over 1568 tokens, 12 heads of 64, "
        "bf16 and fp32: torch 250 and 219 ms, cpu 298 and 295. Other processors without AVX2 are not measured.",
    ),
    Rung(
        "torch",
        dtypes=(torch.float32,),
        needs_grad=False,
        sizes=(("N", 1, 8),),
        reason="One core of an AMD EPYC (Zen 4), 2026-11-26, forward, 12 heads of 64: one query and 3137 keys torch "
        "1.4 ms, cpu 3.4; 8 queries 2.8 and 3.8; 12 are equal. In bf16 cpu is 2.5 times as fast with one query.",
    ),
)
LADDERS = {
    "cuda": Ladder(
        ("triton", "flash_attn", "sdpa", "xformers", "cuda", "torch"),
        "This project's Triton kernels; then those of others, which keep o and lse and have a fused backward; last the "
        "composition of PyTorch ops, which has none. Just before it, for who has neither Triton nor a call without "
        "options, this project's CUDA C++ kernels: proved on a simulator, they have not run on a GPU and are in no "
        "record. One H200, 2026-11-26, bf16, 8 clips of 3136 tokens, 12 heads of 64, forward, then forward + backward: "
        "triton 583 and 2271 us, sdpa 616 and 2167, torch 634 and 13033.",
        RUNGS,
    ),
    "cpu": Ladder(
        ("cpu", "torch"),
        "Compiled kernels, then the composition of PyTorch ops, which runs every call, with PyTorch's fused forward "
        "and a backward more accurate than PyTorch's: in float32 that of sdpa misses the error budget in 57 of 135 "
        "cases of the parity grid. 2 cores of an AMD EPYC (Zen 4), 2026-11-26, one clip of 3137 tokens, 12 heads of "
        "64: bf16, forward + backward, cpu 292 ms, torch 795; fp32, forward, cpu 174 ms, torch 202. One core of an "
        "Intel Xeon, products of both on AMX, 2026-11-26, bf16, 12 heads of 64: one clip of 1569 tokens forward cpu 20 "
        "ms, torch 32, with backward cpu 100, sdpa 305, torch 407; five of 197 cpu 3.2 and torch 6.7, with backward "
        "11, sdpa 44, torch 43; 32 of 16 cpu 1.0 and torch 5.2. Triton's kernels run on CPU tensors only interpreted, "
        "to be checked. Both by name.",
        CPU_RUNGS,
    ),
}


def decide(call: Call) -> Decision:
    """The backends in the order in which they are tried for this call, and why in this one."""
    return _order.decide(call, LADDERS, LETTERS)


def order(call: Call) -> tuple[str, ...]:
    return decide(call).order
