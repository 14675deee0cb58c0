"""What each backend can run, for both attention ops: pure predicates over the facts of a call."""

from __future__ import annotations

import torch

from .. import _native
from .._dispatch import Call, Refusal
from .._triton import triton_refusals

_CPU_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def torch_refusals(call: Call) -> list[Refusal]:
    """Compositions of PyTorch ops run every call: any head size, dtype, device and stride."""
    return []


def triton_attention_refusals(call: Call) -> list[Refusal]:
    """Triton kernels: head sizes 16 to 160 in steps of 8."""
    return triton_refusals(call) + _head_size_refusals(call)


def cpu_attention_refusals(call: Call) -> list[Refusal]:
    """The native library's CPU kernels: 16 and 32 bits, head sizes 16 to 160 in steps of 8, every option."""
    found = []
    if not _native.AVAILABLE:
        found.append(Refusal(_native.WHY, _native.REMEDY))
    if call.device != "cpu":
        found.append(Refusal(f"the tensors are on {call.device}", "move them to the CPU, or leave backend out"))
    if call.dtype not in _CPU_DTYPES:
        dtype = str(call.dtype).removeprefix("torch.")
        found.append(Refusal(f"{dtype} is not one of float16, bfloat16, float32", "cast, or use backend='torch'"))
    return found + _head_size_refusals(call)


def _head_size_refusals(call: Call) -> list[Refusal]:
    D = call.shape[-1]
    if D % 8 == 0 and 16 <= D <= 160:
        return []
    return [Refusal(f"head size {D} is not one of 16, 24, ..., 160", "use backend='torch', or pad the heads")]
