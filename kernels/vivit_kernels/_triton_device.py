"""Device functions that the Triton kernels of several operations share."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _environment

# inline assembly is PTX: neither the interpreter nor a ROCm build takes it
IN_PTX = tl.constexpr(not _environment.TRITON_INTERPRETED and torch.version.hip is None)


@triton.jit
def waited_for(total):
    """The sums as they are, once their product is done.

    On sm_90 a left factor that is computed, as converted pixels are, enters the product from registers. Triton leaves
    products in flight that only the next step's follow, and ptxas before CUDA 13.3 then writes the next factor into
    registers that a product still reads (triton-lang/triton#9433; tokens were wrong on an H200, 2026-11-26). A use of
    the sums makes Triton wait; this one costs no instruction."""
    if IN_PTX:
        return tl.inline_asm_elementwise("", "=f,0", [total], tl.float32, True, 1)
    else:
        return total
