"""Which backend of factorized_attention is tried first: `Ladder`s (_order.py) of measured cases."""

from __future__ import annotations

from .. import _order
from .._dispatch import Call
from .._order import Decision, Ladder

LETTERS = ("B", "T", "S", "H", "D")
LADDERS = {
    "cuda": Ladder(
        ("cuda", "triton", "torch"),
        "This project's kernels, then the composition of PyTorch ops. One H200, 2026-11-26, bf16, 8 clips of 16 x 196 "
        "tokens, 12 heads of 64, forward, then forward + backward: along time triton 98 and 807 us, torch 1231 and "
        "6451; within frames triton 208 and 1263 us, torch 361 and 2683.",
    ),
    "cpu": Ladder(
        ("cpu", "torch"),
        "Compiled kernels, which read the token grid where it lies, then the composition of PyTorch ops, which runs "
        "every call. 2 cores of an AMD EPYC (Zen 4), 2026-11-26, one clip of 16 x 196 tokens, 12 heads of 64, forward "
        "+ backward, bf16 and fp32: along time cpu 7.3 and 9.7 ms, torch 35 and 20; within frames cpu 25 and 45 ms, "
        "torch 80 and 67. Forced to AVX2 and to the portable code, forward: along time 0.6 of torch's time with the "
        "same instructions, within frames 0.8 to 1.1. Triton's kernels run on CPU tensors only interpreted, to be "
        "checked: by name.",
    ),
}


def decide(call: Call) -> Decision:
    """The backends in the order in which they are tried for this call, and why in this one."""
    return _order.decide(call, LADDERS, LETTERS)


def order(call: Call) -> tuple[str, ...]:
    return decide(call).order
