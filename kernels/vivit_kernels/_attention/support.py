"""What each backend can run, for both attention ops: pure predicates over the facts of a call."""

from __future__ import annotations

import torch

from .. import _native
from .._dispatch import Call, Refusal
from .._triton import triton_refusals
from . import cuda_grid


def torch_refusals(call: Call) -> list[Refusal]:
    """Compositions of PyTorch ops run every call: any head size, dtype, device and stride."""
    return []


def triton_attention_refusals(call: Call) -> list[Refusal]:
    """Triton kernels: head sizes 16 to 160 in steps of 8."""
    return triton_refusals(call) + _head_size_refusals(call)


def cpu_attention_refusals(call: Call) -> list[Refusal]:
    """The native library's CPU kernels: 16 and 32 bits, head sizes 16 to 160 in steps of 8, every option."""
    return _native.refusals(call) + _head_size_refusals(call)


def cuda_attention_refusals(call: Call) -> list[Refusal]:
    """The native library's CUDA kernels: 16 bits, and float32, by tf32 where PyTorch allows it; head sizes 16 to 160 in
    steps of 8, every option, and sequences as long as shared memory holds: those of the backward where one follows."""
    found = _native.cuda_refusals(call) + _head_size_refusals(call)
    return found or _length_refusals(call)


def cuda_joint_refusals(call: Call) -> list[Refusal]:
    """The native library's CUDA kernels of joint attention: 16 bits, head sizes 16 to 160 in steps of 8, every option,
    any number of queries and keys."""
    found = _native.cuda_refusals(call) + _head_size_refusals(call)
    if call.dtype == torch.float32:
        found.append(
            Refusal("float32: its products are those of tensor cores, of 16 bits", "use backend='triton' or 'torch'")
        )
    return found


def _length_refusals(call: Call) -> list[Refusal]:
    """Of a call on the token grid that is otherwise fine. A backward takes more memory than its forward."""
    _, T, S, H, D = call.shape
    heads, direction = call.temporal_heads or 0, "backward" if call.needs_grad else "forward"
    way = D, call.dtype.itemsize, call.needs_grad, "rotary" in call.uses
    limit = cuda_grid.most_shared_bytes(call.arch)
    found = []
    for name, length, used in (("T", T, heads > 0), ("S", S, heads < H)):
        if used and not cuda_grid.fits(call.arch, length, *way):
            taken = cuda_grid.shared_bytes(length, *way)
            reason = (
                f"{name}={length} tokens take {-(-taken // 1024)} KiB of shared memory in the {direction} at head size "
                f"{D}, a block on sm_{call.arch} has {limit // 1024}"
            )
            found.append(Refusal(reason, "use backend='triton', or leave backend out"))
    return found


def _head_size_refusals(call: Call) -> list[Refusal]:
    D = call.shape[-1]
    if D % 8 == 0 and 16 <= D <= 160:
        return []
    return [Refusal(f"head size {D} is not one of 16, 24, ..., 160", "use backend='torch', or pad the heads")]
