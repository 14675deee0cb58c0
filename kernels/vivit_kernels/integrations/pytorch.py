"""PyTorch itself: torch.nn.MultiheadAttention as joint_attention."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..accelerate import Left, Replacement

HOST, SUPPORTED = "torch", ">=2.11"


def replacements(model: nn.Module) -> Iterator[Replacement | Left]:
    """As accelerate.py says."""
    yield from ()
