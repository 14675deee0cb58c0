"""Which backend of temporal_block is tried first: `Ladder`s (_order.py), of computed reasons: nothing is measured."""

from __future__ import annotations

from .. import _order
from .._dispatch import Call
from .._order import Decision, Ladder

LETTERS = ("B", "T", "S", "H", "D")
LADDERS = {
    "cuda": Ladder(
        ("triton", "torch"),
        "One kernel, then the composition of PyTorch ops, whose attention of short sequences copies and pads. Beside a "
        "linear layer and temporal_attention, three kernels, it is computed, not measured (tiles.floors; H100: copy "
        "3.0 TB/s, 798 TFLOP/s, L2 assumed at 5.5 TB/s), bf16, ns a token, one kernel and three steps, both at their "
        "floors: E = 192 in 3 heads 0.52 and 1.28, E = 384 in 6 2.1 and 2.6, E = 512 in 8 3.7 and 4.0, E = 768 in 12 "
        "8.4 and 7.5, E = 1024 in 16 14.9 and 12.0. For each tile of 128 rows it reads all of the weight from L2, and "
        "the rows once a head: from E = 768 on that alone takes longer than the three steps. So this project's models "
        "take it for narrow tokens alone, in 16 bits, without a gradient, and where its tiles fill the GPU "
        "(temporal_block_pays). No GPU has run or timed it.",
    ),
    "cpu": Ladder(
        ("torch",), "PyTorch's ops. Triton's kernel runs on CPU tensors only interpreted, to be checked: by name."
    ),
}


def decide(call: Call) -> Decision:
    """The backends in the order in which they are tried for this call, and why in this one."""
    return _order.decide(call, LADDERS, LETTERS)


def order(call: Call) -> tuple[str, ...]:
    return decide(call).order
