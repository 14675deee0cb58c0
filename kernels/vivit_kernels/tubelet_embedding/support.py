"""What each backend of tubelet_embedding can run."""

from __future__ import annotations

from .._dispatch import Call, Refusal
from .._triton import triton_refusals


def torch_refusals(call: Call) -> list[Refusal]:
    """A composition of PyTorch ops runs every call."""
    return []


# Triton's kernels only for those who name them: in their one run of the benchmark (H200, 2026-11-26) their tokens were
# outside the error budget. An earlier state was right there, all states are right when interpreted; what went wrong is
# not found.
ORDER = ("cuda", "cpu", "torch", "triton")
SUPPORT = {"triton": triton_refusals, "torch": torch_refusals}
