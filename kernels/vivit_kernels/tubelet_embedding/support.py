"""What each backend of tubelet_embedding can run, and in which order they are tried (order.py)."""

from __future__ import annotations

import torch

from .. import _native
from .._dispatch import Call, Refusal
from .._triton import triton_refusals
from .order import decide, order  # noqa: F401  for those outside of this op

_MOST_CHANNELS = 8  # of a video: kMostChannels of csrc/cuda/tubelet.h


def cuda_refusals(call: Call) -> list[Refusal]:
    """The native library's CUDA kernels: weights of 16 bits, tokens of whole 16 bytes, up to 8 channels; runs of any
    length, by one kernel or another (cuda_kernels.py)."""
    found = _native.cuda_refusals(call)
    if call.dtype == torch.float32:
        reason = "float32 weights: these kernels multiply in 16 bits"
        found.append(Refusal(reason, "cast the weight to bfloat16 or float16, or use backend='triton'"))
    if call.channels is not None and call.channels % 8:
        reason = f"tokens of {call.channels} channels, no multiple of 8: their rows begin between 16 bytes"
        found.append(Refusal(reason, "use backend='triton', or leave backend out"))
    if call.shape[1] > _MOST_CHANNELS:
        reason = f"{call.shape[1]} channels of the video, {_MOST_CHANNELS} at most"
        found.append(Refusal(reason, "use backend='triton', or leave backend out"))
    return found


def torch_refusals(call: Call) -> list[Refusal]:
    """A composition of PyTorch ops runs every call."""
    return []


SUPPORT = {"cuda": cuda_refusals, "triton": triton_refusals, "cpu": _native.refusals, "torch": torch_refusals}
