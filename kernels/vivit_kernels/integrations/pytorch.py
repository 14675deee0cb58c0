"""PyTorch itself: torch.nn.MultiheadAttention, and F.scaled_dot_product_attention within a context, as joint_attention.

Both keep a call that joint_attention does not compute, or that PyTorch computes as fast, for PyTorch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch._guards import TracingContext
from torch.compiler import config as compiler_config
from torch.nn import attention as registry
from torch.overrides import has_torch_function

from ..accelerate import NO_RECORD, Left, Replacement, swap_class
from ..explain import explain
from ..joint_attention.api import joint_attention
from ..linear import autocast_dtype, transformed
from ..modules import VideoMultiheadAttention, attend

HOST, SUPPORTED = "torch", ">=2.11"
NAME = "vivit_kernels"  # in PyTorch's registry of attention implementations
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# On a CPU smaller calls stay PyTorch's, which spends in C++ what costs ours 0.1 ms in Python. One core of an AMD EPYC
# (Zen 4), 2026-11-26, stock / ours: nn.MultiheadAttention without gradients 0.6 at 1 x 64 tokens of 64 channels, 0.9 at
# 4 x 16 of 256, in float32 0.96 at 196 x 4 of 768 and 1.1 at 196 x 16.
_LEAST_ELEMENTS, _LEAST_KEYS = 2**16, 16
_GAINS = {
    torch.float32: "1.0 to 1.1 times forward (1.6 at 1568 tokens), 1.0 to 1.2 forward + backward",
    torch.bfloat16: "1.1 to 1.3 times forward, 1.3 to 1.8 forward + backward",
}
_RECORD = "one core of an AMD EPYC (Zen 4), 2026-11-26, 12 heads of 64, 16 to 1568 tokens, linears included"


def _has_kernels(dtype: torch.dtype, head_size: int) -> bool:
    """Elsewhere joint_attention is a composition of PyTorch's ops, with nothing to gain."""
    return dtype in _DTYPES and head_size % 8 == 0 and 16 <= head_size <= 160


def _is_large(q: Tensor, keys: int) -> bool:
    return q.device.type != "cpu" or (q.numel() >= _LEAST_ELEMENTS and keys >= _LEAST_KEYS)


def _chosen(device: torch.device | str, dtype: torch.dtype, head_size: int = 64, needs_grad: bool = True) -> str:
    """The backend of a long call, "torch" where there are no kernels for it."""
    qkv = torch.empty(1, 1024, 3, 1, head_size, dtype=dtype, device=device, requires_grad=needs_grad)
    return explain(joint_attention, qkv).chosen or "torch"


# ---- nn.MultiheadAttention ----


class FastMultiheadAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention whose calls are joint_attention where they can be, and otherwise what they were.

    They can be with need_weights=False, no attn_mask, tokens `[B, N, E]` and a bool key_padding_mask, on a CPU if they
    are not small. It adds no state: accelerate() makes an instance by its class alone.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        pairs = need_weights or attn_mask is not None or is_causal
        if not pairs and not _why_not(self) and _takes(self, query, key, value, key_padding_mask):
            mask = None if key_padding_mask is None else ~key_padding_mask
            return attend(self, query, key, value, mask, None), None
        return nn.MultiheadAttention.forward(
            self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )


def _why_not(module: nn.MultiheadAttention) -> str:
    """Why no call of this module could be joint_attention; "" if some could."""
    if not module.batch_first:
        return "its tokens come as [N, B, E]; make it with batch_first=True"
    if not module._qkv_same_embed_dim:
        return "its keys or values have another width than its queries"
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        return "it adds keys of its own (add_bias_kv, add_zero_attn)"
    if not _has_kernels(torch.float32, module.head_dim):
        return f"head size {module.head_dim} is not one of 16, 24, ..., 160"
    return ""


def _takes(module: nn.MultiheadAttention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether attend() runs the call, with the same result. Calls that are an error go to PyTorch, which tells."""
    weight, narrow = module.in_proj_weight, autocast_dtype(q.device.type)
    dtype = weight.dtype if narrow is None or weight.dtype == torch.float64 else narrow
    if any(x.is_nested or x.dim() != 3 or x.shape[-1] != module.embed_dim or 0 in x.shape for x in (q, k, v)):
        return False
    if q.shape[0] != k.shape[0] or k.shape != v.shape or not _is_large(q, k.shape[1]):
        return False
    if not _has_kernels(dtype, module.head_dim):
        return False
    if any(x.device != weight.device or (x.dtype != weight.dtype and narrow is None) for x in (q, k, v)):
        return False
    if mask is not None and (mask.dtype != torch.bool or mask.shape != k.shape[:2] or mask.device != q.device):
        return False
    return not has_torch_function((q, k, v, weight)) and not transformed()


def replacements(model: nn.Module) -> Iterator[Replacement | Left]:
    """Every nn.MultiheadAttention, as accelerate.py says."""
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if not isinstance(module, nn.MultiheadAttention) or isinstance(module, VideoMultiheadAttention):
            continue
        what, kind = type(module).__name__, type(module)
        if kind is FastMultiheadAttention:
            yield Left(path, what, "it is replaced already")
        elif kind is not nn.MultiheadAttention:
            yield Left(path, what, "a subclass of nn.MultiheadAttention, whose forward may be another")
        elif why := _why_not(module) or _no_kernels(module.in_proj_weight, module.head_dim):
            yield Left(path, what, why)
        else:
            done = "joint_attention in larger calls with need_weights=False and no attn_mask, others as before"
            if isinstance(modules.get(path.rpartition(".")[0]), nn.TransformerEncoderLayer):
                done += "; its layer's fused path, in evaluation without gradients, passes it by"
            yield Replacement(
                path, what, done, _gain(module.in_proj_weight), swap_class(module, FastMultiheadAttention)
            )


def _gain(weight: Tensor) -> str:
    gain = _GAINS.get(weight.dtype) if weight.device.type == "cpu" else None
    return f"{gain} ({_RECORD})" if gain else NO_RECORD


def _no_kernels(weight: Tensor, head_size: int) -> str:
    if weight.device.type in ("cpu", "cuda") and _chosen(weight.device, weight.dtype, head_size) == "torch":
        dtype = str(weight.dtype).removeprefix("torch.")
        return f"no kernel runs {dtype} on {weight.device.type} here; `python -m vivit_kernels` says why"
    return ""


# ---- F.scaled_dot_product_attention ----

_AUTOGRAD_KEYS = {"cpu": ("AutogradCPU", "CPU"), "cuda": ("AutogradCUDA", "CUDA")}  # with and without inference_mode
_INFINITE = float("inf")
Choices = dict[tuple[str, torch.dtype, bool], str]


@dataclass
class _Handle:
    """What PyTorch's registry keeps of an active implementation."""

    library: torch.library.Library

    def remove(self) -> None:
        self.library._destroy()
        _forget_dispatch()


def _forget_dispatch() -> None:
    """PyTorch keeps which kernel an earlier trace of the op ran, and asks nobody whether there is another by now."""
    torch.ops.aten.scaled_dot_product_attention.default._dispatch_cache.clear()


def _choices() -> Choices:
    """The backend of a call, by its device, its dtype and whether a gradient is wanted."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        (device, dtype, needs_grad): _chosen(device, dtype, needs_grad=needs_grad)
        for device in devices
        for dtype in _DTYPES
        for needs_grad in (False, True)
    }


def _activate(choices: Choices) -> _Handle:
    """Puts joint_attention before scaled_dot_product_attention, on the devices that have kernels for it.

    Before its autograd, not before the kernels under it (_scaled_dot_product_flash_attention and others), as those of
    PyTorch's list do: a backward that runs after the context has ended is that of its own forward, then.
    """
    able = {call for call, backend in choices.items() if backend != "torch"}

    def attention(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
    ) -> Tensor:
        needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        if (
            not (is_causal or enable_gqa)
            and (query.device.type, query.dtype, needs_grad) in able
            and _fits(query, key, value)
            and (attn_mask is None or _is_key_mask(query, key, attn_mask))
            and 0.0 <= dropout_p < 1.0
            and (scale is None or -_INFINITE < scale < _INFINITE)
            and torch.backends.cuda.flash_sdp_enabled()
            and not transformed()
            and not _compiled_by_others()
        ):
            mask = None if attn_mask is None else attn_mask[:, 0, 0].expand(key.shape[0], key.shape[2])
            return _ours(query, key, value, mask, dropout_p, scale)
        default = torch.ops.aten.scaled_dot_product_attention.default
        return default.decompose(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    library = torch.library.Library("aten", "IMPL")
    for device in {device for device, *_ in choices}:
        for dispatch_key in _AUTOGRAD_KEYS[device]:
            library.impl("scaled_dot_product_attention", attention, dispatch_key)
    _forget_dispatch()
    return _Handle(library)


def _ours(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, scale: float | None):
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # [B, H, N, D] -> [B, N, H, D]: a view, read in place
    out = joint_attention(q, k, v, key_mask=mask, dropout_p=dropout_p, scale=scale).transpose(1, 2)
    # PyTorch's on a CPU lies as query does, and callers may view it so
    return out.contiguous() if query.device.type == "cpu" and query.stride(1) > query.stride(2) else out


def _fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """One dtype, one device, `[B, H, N, D]` with channels side by side, nothing empty or broadcast."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or (*q.shape[:2], q.shape[3]) != (*k.shape[:2], k.shape[3]):
        return False
    if any(x.dtype != q.dtype or x.device != q.device or x.stride(-1) != 1 or 0 in x.shape for x in (q, k, v)):
        return False
    return _has_kernels(q.dtype, q.shape[-1]) and _is_large(q, k.shape[2])


def _is_key_mask(q: Tensor, k: Tensor, mask: Tensor) -> bool:
    """Whether all heads and queries of a clip share one row of a bool mask."""
    if mask.dtype != torch.bool or mask.dim() != 4:
        return False
    if any(size not in (1, wanted) for size, wanted in zip(mask.shape[:3], q.shape[:3], strict=True)):
        return False
    shared = all(size == 1 or stride == 0 for size, stride in zip(mask.shape[1:3], mask.stride()[1:3], strict=True))
    return shared and mask.shape[3] == k.shape[2] and mask.device == q.device


_MARK = f"{NAME}.sdpa_override"


def _tagged(choices: Choices) -> str:
    """What keeps graphs of this context and of others apart in PyTorch's caches on disk: they are looked up by the code
    that was compiled, which is a call of scaled_dot_product_attention in both."""
    before = compiler_config.cache_key_tag
    if _MARK in before:
        return before
    schema = torch.ops.vivit_kernels.joint_attention_fwd.default._schema
    return f"{before} {_MARK} {choices} {schema}".strip()


def _compiled_by_others() -> bool:
    """A graph that a thread compiles meanwhile without the tag, as one from outside of the context would be kept."""
    return TracingContext.try_get() is not None and _MARK not in compiler_config.cache_key_tag


_contexts: list[list[str | None]] = []  # those entered and not left: what was active before each
_lock = threading.Lock()


@contextmanager
def sdpa_override() -> Iterator[None]:
    """Within it torch.nn.functional.scaled_dot_product_attention is `joint_attention`, for every caller of it.

    Equivalent to calling `joint_attention` on the transposed views where the code within calls
    `F.scaled_dot_product_attention`: timm, nn.MultiheadAttention, or a model of your own. CPU and CUDA, forward and
    backward, the latter after the context has ended, too. It stays PyTorch's own

        with is_causal, enable_gqa, dropout_p=1, or a mask that is no bool mask of keys, `[B or 1, 1, 1, N_k]` or
        expanded from it;
        for float64, head sizes other than 16, 24, ..., 160, inputs other than `[B, H, N, D]` of one shape but for N;
        on a CPU for less than 16 keys or 2**16 elements of q; where this install has no kernels;
        where torch.backends.cuda.enable_flash_sdp(False) or torch.nn.attention.sdpa_kernel rule out flash attention;
        under torch.func's transformations and forward-mode AD.

    Dropout draws other random numbers than PyTorch's. A query that no key is left for gives 0, as PyTorch's does.
    Double backward raises, as PyTorch's fused kernels do. Activation checkpoints need their backward within it, too:
    PyTorch raises where what it computes again saves other tensors.

    It holds for all threads of the process until the last has left it, since PyTorch's registry of flash attention
    implementations has one switch: another implementation, such as FlashAttention 4, is inactive within it and active
    again after it. What is compiled within it keeps joint_attention, what was compiled before keeps PyTorch's, also in
    PyTorch's caches on disk; a thread that has not entered it may compile either. Its name
    in PyTorch's `torch.nn.attention.list_flash_attention_impls()` is "vivit_kernels", from the first use on; importing
    this package changes nothing.

        with vivit_kernels.sdpa_override():
            logits = model(clip)
    """
    choices = _choices()
    with _lock:
        before = [registry.current_flash_attention_impl()]
        registry.register_flash_attention_impl(NAME, register_fn=partial(_activate, choices))
        registry.activate_flash_attention_impl(NAME)
        _contexts.append(before)
    try:
        with compiler_config.patch(cache_key_tag=_tagged(choices)):  # pyright: ignore[reportAttributeAccessIssue]
            yield
    finally:
        with _lock:
            _leave(before)


def _leave(before: list[str | None]) -> None:
    """Gives back what was active before; if a later context, of another thread, goes on, that one will."""
    place = next(i for i, entered in enumerate(_contexts) if entered is before)
    del _contexts[place]
    if place < len(_contexts):
        _contexts[place][0] = before[0]
    elif before[0] is None:
        registry.restore_flash_attention_impl(_raise_warn=False)
    else:
        registry.activate_flash_attention_impl(before[0])
