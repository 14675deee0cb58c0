"""What each backend of tubelet_embedding can run, and in which order they are tried (order.py)."""

from __future__ import annotations

from .. import _native
from .._dispatch import Call, Refusal
from .._triton import triton_refusals
from .order import decide, order  # noqa: F401  for those outside of this op


def torch_refusals(call: Call) -> list[Refusal]:
    """A composition of PyTorch ops runs every call."""
    return []


SUPPORT = {"triton": triton_refusals, "cpu": _native.refusals, "torch": torch_refusals}
