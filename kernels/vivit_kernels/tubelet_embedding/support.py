"""What each backend of tubelet_embedding can run."""

from __future__ import annotations

from .._dispatch import Call, Refusal


def torch_refusals(call: Call) -> list[Refusal]:
    """A composition of PyTorch ops runs every call."""
    return []


SUPPORT = {"torch": torch_refusals}
