"""What each backend of factorized_attention can run, and in which order they are tried (order.py)."""

from .._attention.support import (
    cpu_attention_refusals,
    cuda_attention_refusals,
    torch_refusals,
    triton_attention_refusals,
)
from .order import decide, order  # noqa: F401  for those outside of this op

SUPPORT = {
    "cuda": cuda_attention_refusals,
    "triton": triton_attention_refusals,
    "cpu": cpu_attention_refusals,
    "torch": torch_refusals,
}
