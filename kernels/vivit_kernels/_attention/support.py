"""What each backend can run, for both attention ops: pure predicates over the facts of a call."""

from __future__ import annotations

from .._dispatch import Call, Refusal


def torch_refusals(call: Call) -> list[Refusal]:
    """Compositions of PyTorch ops run every call: any head size, dtype, device and stride."""
    return []
