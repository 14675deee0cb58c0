"""A Triton kernel that does nothing but exponentials, in registers: the ceiling that a softmax can reach on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 1024, 4  # eight independent chains a thread: the latency of one is hidden by the others
PROGRAMS = 16  # per multiprocessor


@triton.jit
def exponentials(x_ptr, iterations, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)  # [BLOCK], in [0, 1]
    for _ in range(iterations):
        # the special function unit's own instruction: without `ftz` a scaling for denormals comes around each
        turned = 0.0 - x  # pyright: ignore[reportOperatorIssue]
        x = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [turned], dtype=tl.float32, is_pure=True, pack=1
        )
    tl.store(x_ptr + at, x)


def buffer(device: torch.device) -> Tensor:
    count = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return torch.rand(count * PROGRAMS * BLOCK, device=device)


def launch(x: Tensor, iterations: int) -> None:
    """x fp32, a multiple of 1024 elements: each becomes 2^-x, `iterations` times over."""
    exponentials[(x.numel() // BLOCK,)](x_ptr=x, iterations=iterations, BLOCK=BLOCK, num_warps=WARPS)  # pyright: ignore
