"""What each backend can run, for both attention ops: pure predicates over the facts of a call."""

from __future__ import annotations

from .._dispatch import Call, Refusal
from .._triton import triton_refusals


def torch_refusals(call: Call) -> list[Refusal]:
    """Compositions of PyTorch ops run every call: any head size, dtype, device and stride."""
    return []


def triton_attention_refusals(call: Call) -> list[Refusal]:
    """Triton kernels: head sizes 16 to 160 in steps of 8."""
    found = triton_refusals(call)
    D = call.shape[-1]
    if D % 8 or not 16 <= D <= 160:
        found.append(Refusal(f"head size {D} is not one of 16, 24, ..., 160", "use backend='torch', or pad the heads"))
    return found
