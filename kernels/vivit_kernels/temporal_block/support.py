"""What each backend of temporal_block can run, and in which order they are tried (order.py)."""

from __future__ import annotations

from .._dispatch import Call, Refusal
from .._triton import triton_refusals
from .order import decide, order  # noqa: F401  for those outside of this op

_LONGEST, _WIDEST_HEAD = 32, 64


def torch_refusals(call: Call) -> list[Refusal]:
    """A composition of PyTorch ops runs every call."""
    return []


def triton_block_refusals(call: Call) -> list[Refusal]:
    """Triton's kernel: whole sequences in a tile of rows, head sizes 16 to 64 in steps of 8."""
    found = triton_refusals(call)
    _, T, _, _, D = call.shape
    if T > _LONGEST:
        reason = f"T={T}: its tiles hold whole sequences, of {_LONGEST} at most"
        found.append(Refusal(reason, "use backend='torch', or a linear layer and temporal_attention"))
    if D % 8 or not 16 <= D <= _WIDEST_HEAD:
        reason = f"head size {D} is not one of 16, 24, ..., {_WIDEST_HEAD}"
        found.append(Refusal(reason, "use backend='torch', or a linear layer and temporal_attention"))
    return found


SUPPORT = {"triton": triton_block_refusals, "torch": torch_refusals}
