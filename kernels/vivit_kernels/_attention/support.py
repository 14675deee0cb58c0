"""What each backend can run, for both attention ops: pure predicates over the facts of a call."""

from __future__ import annotations

from .. import _native
from .._dispatch import Call, Refusal
from .._triton import triton_refusals


def torch_refusals(call: Call) -> list[Refusal]:
    """Compositions of PyTorch ops run every call: any head size, dtype, device and stride."""
    return []


def triton_attention_refusals(call: Call) -> list[Refusal]:
    """Triton kernels: head sizes 16 to 160 in steps of 8."""
    return triton_refusals(call) + _head_size_refusals(call)


def cpu_attention_refusals(call: Call) -> list[Refusal]:
    """The native library's CPU kernels: 16 and 32 bits, head sizes 16 to 160 in steps of 8, every option."""
    return _native.refusals(call) + _head_size_refusals(call)


def _head_size_refusals(call: Call) -> list[Refusal]:
    D = call.shape[-1]
    if D % 8 == 0 and 16 <= D <= 160:
        return []
    return [Refusal(f"head size {D} is not one of 16, 24, ..., 160", "use backend='torch', or pad the heads")]
