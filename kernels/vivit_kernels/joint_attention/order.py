"""Which backend of joint_attention is tried first: a table of measured cases, and a rule for everything else.

A rung moves one backend to the front for the calls that it describes. It is added, moved and removed by hand, from
records: tests/test_joint_backends.py holds every record in bench/results of a call that a rung or the rule decides
against it, so that a rung which stopped being right is noticed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import _environment
from .._dispatch import Call

# On a GPU, where no rung knows better: this project's kernels; then those of others, which keep o and lse and have a
# fused backward; last the composition of PyTorch ops, which has none. On a CPU `torch` runs every call, with PyTorch's
# fused forward and a backward more accurate than PyTorch's (sdpa_kernels.py).
_GPU_ORDER = ("cuda", "triton", "flash_attn", "sdpa", "xformers", "cpu", "torch")


@dataclass(frozen=True)
class Rung:
    """`backend` first, for plain calls (no options) of this kind on GPUs of this architecture.

    tokens: from how many queries on; needs_grad: of a call that a backward follows, or of one alone.
    reason: what was measured, where and when.
    """

    backend: str
    arch: int
    needs_grad: bool
    dtypes: tuple[torch.dtype, ...]
    head_sizes: tuple[int, ...]
    tokens: int
    reason: str

    def takes(self, call: Call) -> bool:
        return (
            call.arch == self.arch
            and call.needs_grad == self.needs_grad
            and call.dtype in self.dtypes
            and call.shape[-1] in self.head_sizes
            and call.shape[1] >= self.tokens
            and not call.uses
        )


RUNGS = (
    Rung(
        "sdpa",
        arch=90,
        needs_grad=True,
        dtypes=(torch.bfloat16, torch.float16),
        head_sizes=(64,),
        tokens=2048,
        reason="One H200, 2026-11-26, bf16, 12 heads of 64, forward + backward: two clips of 3136 tokens cuDNN "
        "167 + 384 us, triton 154 + 442, PyTorch's FlashAttention 268 + 662; eight of 3137 together (recorded) sdpa "
        "2167, triton 2271. Forward alone: triton. float16 and other N are not measured.",
    ),
)


@torch.compiler.assume_constant_result  # a graph is compiled for the settings as they are, which PyTorch guards
def _only_warns() -> bool:
    return torch.is_deterministic_algorithms_warn_only_enabled()


def is_deterministic() -> bool:
    """Whether PyTorch must refuse what is not the same bit for bit in every run."""
    return torch.are_deterministic_algorithms_enabled() and not _only_warns()


def order(call: Call) -> tuple[str, ...]:
    """The backends in the order in which they are tried for this call."""
    if call.device != "cuda":
        return _environment.BACKENDS
    if is_deterministic():  # cuDNN's backward is not, and PyTorch's FlashAttention is slower than triton
        return _GPU_ORDER
    for rung in RUNGS:
        if rung.takes(call):
            return (rung.backend, *(name for name in _GPU_ORDER if name != rung.backend))
    return _GPU_ORDER
