"""What each backend of joint_attention can run, and in which order they are tried (order.py)."""

from __future__ import annotations

import torch

from .. import _environment
from .._attention.support import (
    cpu_attention_refusals,
    cuda_joint_refusals,
    torch_refusals,
    triton_attention_refusals,
)
from .._dispatch import Call, Refusal
from .order import decide, is_deterministic, order  # noqa: F401  for those outside of this op

_OLDEST = 80
_MOST_SEQUENCES = 65_535  # clips x heads: they put them into one dimension of a grid
_OURS = "leave backend out, or use backend='triton' or 'torch'"
# Options of this op that kernels of others do not have, or have in another sense.
_OPTIONS = {
    "key_mask": ("takes a mask as a bias of every pair of tokens, not of keys", _OURS),
    "dropout": ("drops other pairs than (seed, offset) names here", _OURS),
    "rotary": ("does not rotate q and k", "rotate them before the call, or " + _OURS),
    "softcap": ("has no soft-cap", _OURS),
}


def _refusals(call: Call, who: str, dtypes: tuple[torch.dtype, ...], options: tuple[str, ...] = ()) -> list[Refusal]:
    """Reasons that others' kernels share; options: those that these have in our sense."""
    found = []
    for name in call.uses:
        if name not in options:
            reason, remedy = _OPTIONS[name]
            found.append(Refusal(f"{name}: {who} {reason}", remedy))
    if call.dtype not in dtypes:
        dtype, known = (", ".join(str(x).removeprefix("torch.") for x in xs) for xs in ((call.dtype,), dtypes))
        found.append(Refusal(f"{dtype} is not one of {known}", "cast, or " + _OURS))
    return found


def _gpu_refusals(call: Call) -> list[Refusal]:
    """What others' kernels ask of a GPU; head sizes are those that this project holds to its error budget."""
    found, D = [], call.shape[-1]
    if call.device != "cuda":
        found.append(Refusal(f"the tensors are on {call.device}", "move them to a CUDA device"))
    if 0 < call.arch < _OLDEST:
        found.append(Refusal(f"sm_{call.arch} is older than sm_{_OLDEST}", "use backend='torch'"))
    if D % 8 or not 16 <= D <= 160:
        found.append(Refusal(f"head size {D} is not one of 16, 24, ..., 160", "use backend='torch', or pad the heads"))
    if call.shape[0] * call.shape[2] > _MOST_SEQUENCES:
        found.append(
            Refusal(
                f"{call.shape[0]} clips x {call.shape[2]} heads are more than {_MOST_SEQUENCES} sequences",
                "split the batch, or use backend='triton'",
            )
        )
    return found


_NARROW = (torch.float16, torch.bfloat16)


@torch.compiler.assume_constant_result  # a graph is compiled for the switches as they are
def _fused_sdpa_is_on() -> bool:
    return torch.backends.cuda.cudnn_sdp_enabled() or torch.backends.cuda.flash_sdp_enabled()


def sdpa_refusals(call: Call) -> list[Refusal]:
    """PyTorch's fused kernels, never its textbook. In float32 a GPU's take rounded products: not offered."""
    who = "scaled_dot_product_attention"
    if call.device == "cpu":
        found = _refusals(call, who, (*_NARROW, torch.float32))
        if call.dtype == torch.float32 and call.needs_grad:  # why: sdpa_kernels.py
            found.append(
                Refusal("its float32 gradients on a CPU err more than numerics.py allows", "use backend='torch'")
            )
        return found
    found = _refusals(call, who, _NARROW) + _gpu_refusals(call)
    if call.device == "cuda" and not _fused_sdpa_is_on():
        switches = "torch.backends.cuda.enable_cudnn_sdp(True) or enable_flash_sdp(True)"
        found.append(Refusal("its fused kernels are switched off", switches))
    return found


def flash_attn_refusals(call: Call) -> list[Refusal]:
    """FlashAttention 2, 3 or 4; which one depends on the GPU."""
    version = _environment.flash_attn_for(call.arch)
    found = [] if version else [_flash_attn_absent(call)]
    found += _refusals(call, f"FlashAttention {version or ''}".rstrip(), _NARROW, () if version == 4 else ("softcap",))
    found += _gpu_refusals(call)
    if version == 4 and call.shape[-1] not in (64, 96, 128):
        found.append(Refusal(f"FlashAttention 4: head size {call.shape[-1]} is not 64, 96 or 128", _OURS))
    return found


def _flash_attn_absent(call: Call) -> Refusal:
    if _environment.FLASH_ATTN:
        here = " and ".join(map(str, _environment.FLASH_ATTN))
        return Refusal(
            f"FlashAttention {here} is not for sm_{call.arch}", "pip install 'flash-attn>=2.7' --no-build-isolation"
        )
    return Refusal(
        "FlashAttention (2.7 or later, 3 or 4) is not installed", "pip install 'flash-attn>=2.7' --no-build-isolation"
    )


def xformers_refusals(call: Call) -> list[Refusal]:
    """Its memory-efficient attention; which of its kernels runs is its own choice."""
    found = [] if _environment.HAS_XFORMERS else [Refusal("xformers is not installed", "pip install xformers")]
    found += _refusals(call, "xformers", _NARROW) + _gpu_refusals(call)
    if call.needs_grad and is_deterministic():
        found.append(
            Refusal("its backward adds up in any order", "torch.use_deterministic_algorithms(False), or " + _OURS)
        )
    return found


SUPPORT = {
    "cuda": cuda_joint_refusals,
    "triton": triton_attention_refusals,
    "cpu": cpu_attention_refusals,
    "sdpa": sdpa_refusals,
    "flash_attn": flash_attn_refusals,
    "xformers": xformers_refusals,
    "torch": torch_refusals,
}
