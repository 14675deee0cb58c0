"""diffusers: its `Attention` with the default processors through our ops, and processors of other models as they are.

Two kinds of attention are in its video models. `Attention` calls a processor; the default one is the textbook around
F.scaled_dot_product_attention. `OurAttention`, mixed in before that class, computes the same while the processor is the
default one, so that a processor of the user, set before or after, is used as before. Models with joint attention have a
processor each, which norms and rotates in its own way and then calls one function: `bound` makes of its code the same
with this function ours. Source: diffusers 0.42.1, `Attention`, `AttnProcessor2_0`, `FusedAttnProcessor2_0`,
`dispatch_attention_fn`; the same in 0.35.2.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..factorized_attention.api import spatial_attention, temporal_attention
from ..joint_attention.api import joint_attention
from ..linear import autocast_dtype, transformed, unwatched
from . import pytorch
from ._mixin import Mixin
from .transformers_attention import _SHORT as SHORT

_DEFAULT, _FUSED = "AttnProcessor2_0", "FusedAttnProcessor2_0"
_FILE = "diffusers.models.attention_processor"
# PyTorch's attention multiplies bfloat16 on the matrix unit of a processor that has one, ours only in avx512_amx. One
# core of an Intel Xeon with AMX, 2026-11-26, forward, PyTorch / ours in avx512_bf16: 4 x 1024 tokens, 8 heads of 40,
# 0.39; 8 x 256, heads of 80, 0.50; 4096 x 120, 16 heads of 72, 0.86; 1024 x 77 1.20. In float32 0.97 to 1.53. Along
# time ours is faster in both.
AMX = torch.cpu._is_amx_tile_supported() and pytorch._chosen("cpu", torch.bfloat16, needs_grad=False) != "cpu"


class OurAttention(Mixin):
    """Mixed in before `Attention`: hidden_states `[R, N, E]` -> `[R, N, E]`, in O(N) memory.

    frames: T, of rows that are frames of one clip after the other: then along time, with R = B*T, and no permutation.
    encoder_hidden_states `[R or B, N_k, E_k]`; of B < R rows each serves R/B rows of hidden_states, as a caption does
    its frames. Masks, further arguments and 4-D hidden_states go the host's way, and small calls on a CPU.
    """

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        frames: int | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        context = encoder_hidden_states
        on_grid = frames is not None or (context is not None and context.shape[0] != hidden_states.shape[0])
        keys = (hidden_states if context is None else context).shape[1]
        # while training all projections stay in the graph: their gradients are zeros, which wrappers wait for
        is_single = context is not None and keys == 1 and not torch.is_grad_enabled() and not self.training
        if not on_grid and (
            attention_mask is not None
            or cross_attention_kwargs
            or hidden_states.dim() != 3
            or why_not(self)
            or not (is_single or _is_faster(self, hidden_states, keys))
        ):
            return super().forward(hidden_states, context, attention_mask, **cross_attention_kwargs)
        if is_single and context is not None and all(map(is_bare, list(self.modules())[1:])):
            return self._of_one_key(hidden_states, context)
        o = _attend(frames, *self._heads(hidden_states, context))
        return self.to_out[1](self.to_out[0](o.flatten(-2)))

    def _heads(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
        """`[R, N, H, D]` each; or packed `[R, N, 3, H, D]` alone, of fused projections."""
        H = self.heads
        if not self._is_fused():
            source = x if context is None else context
            return tuple(y.unflatten(-1, (H, -1)) for y in (self.to_q(x), self.to_k(source), self.to_v(source)))
        if context is None:
            return (self.to_qkv(x).unflatten(-1, (3, H, -1)),)
        return self.to_q(x).unflatten(-1, (H, -1)), *self.to_kv(context).unflatten(-1, (2, H, -1)).unbind(-3)

    def _is_fused(self) -> bool:
        """fused_projections stays True when diffusers goes back to separate ones: the processor tells."""
        return type(self.processor).__name__ == _FUSED

    def _of_one_key(self, x: Tensor, context: Tensor) -> Tensor:
        """The softmax over a single key is 1: every query gets the value, whatever it asks."""
        value = self.to_kv(context).chunk(2, -1)[1] if self._is_fused() else self.to_v(context)
        out = self.to_out[1](self.to_out[0](value)).repeat_interleave(x.shape[0] // context.shape[0], 0)
        return out.expand(-1, x.shape[1], -1)


def _attend(frames: int | None, *qkv: Tensor) -> Tensor:
    """q, k, v `[R, N, H, D]`, or one that packs them, `[R, N, 3, H, D]` -> `[R, N, H, D]`."""
    q, k = qkv[0], qkv[min(1, len(qkv) - 1)]
    if frames is not None:
        return temporal_attention(*(x.unflatten(0, (-1, frames)) for x in qkv)).flatten(0, 1)
    R, N, *heads = q.shape
    if k.shape[0] != R:  # a context for each clip: all of its rows ask the same keys
        return _of_clips(q.reshape(k.shape[0], -1, *heads), *qkv[1:]).reshape(R, N, *heads)
    if N > SHORT or k.shape[1] != N:
        return joint_attention(*qkv)
    return spatial_attention(*(x.unsqueeze(0) for x in qkv)).squeeze(0)  # every row as a frame of one clip


def _of_clips(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if not has_matrix_unit(q.device, q.dtype):
        return joint_attention(q, k, v)
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def why_not(attention: Any) -> str:
    """Why an `Attention` is left to its processor; "" if `OurAttention` computes the same."""
    processor = attention.processor
    kind = type(processor)
    if kind.__module__ != _FILE or kind.__name__ not in (_DEFAULT, _FUSED):
        return f"its processor is a {kind.__name__}, which is not {_DEFAULT}: another's own is never replaced"
    if kind.__name__ == _FUSED and not attention.fused_projections:
        return f"its processor is a {kind.__name__}, its projections are not fused"
    if attention.group_norm is not None or attention.spatial_norm is not None or attention.norm_cross is not None:
        return "it normalises its input itself (group_norm, spatial_norm, norm_cross)"
    if attention.norm_q is not None or attention.norm_k is not None:
        return "it normalises queries and keys"
    if attention.added_kv_proj_dim is not None or attention.to_k is None:
        return "it adds keys and values of its own (added_kv_proj_dim)"
    if attention.residual_connection or attention.rescale_output_factor != 1 or attention.to_out is None:
        return "it adds its input, rescales its output or has no output projection"
    if attention.inner_kv_dim != attention.inner_dim:
        return "it has fewer heads of keys than of queries"
    if not pytorch._has_kernels(torch.float32, attention.inner_dim // attention.heads):
        return f"head size {attention.inner_dim // attention.heads} is not one of 16, 24, ..., 160"
    return ""


def has_matrix_unit(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch's attention multiplies on a matrix unit of the CPU that ours has no kernel for."""
    return AMX and device.type == "cpu" and dtype == torch.bfloat16


def _is_faster(attention: Any, x: Tensor, keys: int) -> bool:
    """Whether ours is worth a call for tokens x, in the dtype that autocast makes of them."""
    dtype = autocast_dtype(x.device.type) or attention.to_q.weight.dtype
    return pytorch._is_large(x, keys) and not has_matrix_unit(x.device, dtype)


def is_bare(module: nn.Module) -> bool:
    """Nothing hangs on its forward that would see other shapes; offloading and caches replace the forward of one."""
    return unwatched(module) and "forward" not in module.__dict__


def knows_frames(attention: nn.Module | None) -> bool:
    """Whether it may be called with `frames` or a context for each clip now: processors and hooks come and go."""
    if attention is None:
        return True
    return isinstance(attention, OurAttention) and is_bare(attention) and not why_not(attention)


# ---- processors of models with joint attention ----


def dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    *,
    backend: Any = None,
    **options: Any,
) -> Tensor:
    """In the place of `dispatch_attention_fn`: query, key, value `[B, N, H, D]` -> the same.

    joint_attention where the user chose no backend, neither for the model nor by the context manager, and the mask is
    one of keys; all else, context parallelism included, goes to the host's function.
    """
    host: Any = sys.modules["diffusers.models.attention_dispatch"]
    registry = host._AttentionBackendRegistry
    chosen = backend or registry._active_backend
    plain = not (is_causal or enable_gqa or attention_kwargs or any(x is not None for x in options.values()))
    if chosen == "native" and not registry._checks_enabled and plain and fits(query, key, value):
        mask, is_mask = key_mask(query, key, attn_mask)
        if is_mask:
            return joint_attention(query, key, value, key_mask=mask, dropout_p=dropout_p, scale=scale)
    return host.dispatch_attention_fn(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs,
        backend=backend, **options,
    )  # fmt: skip


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """In the place of F's: query, key, value `[B, H, N, D]` -> the same, a view of `[B, N, H, D]`."""
    heads = tuple(x.transpose(1, 2) for x in (query, key, value))
    if not is_causal and not options and fits(*heads):
        mask, is_mask = key_mask(heads[0], heads[1], attn_mask)
        if is_mask:
            return joint_attention(*heads, key_mask=mask, dropout_p=dropout_p).transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """One dtype, `[B, N, H, D]` of as many heads, worth it; not what a cast or a broadcast makes of others."""
    if q.dim() != 4 or k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        return False
    if any(x.dtype != q.dtype or x.device != q.device or x.stride(-1) != 1 or 0 in x.shape for x in (q, k, v)):
        return False
    able = pytorch._has_kernels(q.dtype, q.shape[-1]) or q.dtype == torch.float64
    worth = pytorch._is_large(q, k.shape[1]) and not has_matrix_unit(q.device, q.dtype)
    return able and worth and not transformed()


def key_mask(q: Tensor, k: Tensor, mask: Tensor | None) -> tuple[Tensor | None, bool]:
    """(bool `[B, N_k]`, whether mask is one of keys); q, k `[B, N, H, D]`."""
    if mask is None:
        return None, True
    if not pytorch._is_key_mask(q.transpose(1, 2), k.transpose(1, 2), mask):
        return None, False
    return mask[:, 0, 0].expand(k.shape[0], -1), True


class _Functional(types.ModuleType):
    """torch.nn.functional, but for one function."""

    scaled_dot_product_attention = staticmethod(scaled_dot_product_attention)

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)


_OURS = {"dispatch_attention_fn": dispatch, "F": _Functional("torch.nn.functional")}


def bound(call: Any) -> types.FunctionType:
    """The same code, defaults and closure, in which the names of `_OURS` mean ours: the rest of its file stays."""
    names = {**call.__globals__, **_OURS}
    made = types.FunctionType(call.__code__, names, call.__name__, call.__defaults__, call.__closure__)
    made.__kwdefaults__, made.__doc__ = call.__kwdefaults__, call.__doc__
    return made
