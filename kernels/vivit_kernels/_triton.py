"""What every Triton backend needs to know before it launches: where it can run, and for which architecture."""

from __future__ import annotations

import functools

import torch

from . import _environment
from ._dispatch import Call, Refusal

_OLDEST = 80  # bfloat16 products and asynchronous copies


@functools.cache
def _arch_of(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def arch_of(device: torch.device) -> int:
    """90 for sm_90. Tensors on a CPU are interpreted, or compiled without a launch, as for sm_90."""
    if device.type != "cuda":
        return 90
    return _arch_of(torch.cuda.current_device() if device.index is None else device.index)


def precision(dtype: torch.dtype) -> str:
    """How float32 products are taken: TF32 only where PyTorch's own setting allows it."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def triton_refusals(call: Call) -> list[Refusal]:
    """Why no Triton kernel can run the call, whatever the op."""
    found = []
    if not _environment.HAS_TRITON:
        found.append(Refusal("Triton is not installed", "pip install triton (Linux)"))
    if call.device == "cpu" and not _environment.TRITON_INTERPRETED:
        found.append(
            Refusal(
                "the tensors are on cpu",
                "move them to a GPU; or set TRITON_INTERPRET=1 before the start, to check a kernel slowly",
            )
        )
    if call.device not in ("cpu", "cuda"):
        found.append(Refusal(f"the tensors are on {call.device}", "move them to a CUDA device"))
    if call.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        dtype = str(call.dtype).removeprefix("torch.")
        found.append(Refusal(f"{dtype} is not one of float16, bfloat16, float32", "cast, or use backend='torch'"))
    return found
