"""transformers: vision towers of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and GLM-4V: patches as a product, frames in one call.

Their images and frames come as one row of patches `[N, ...]`, cut where `cu_seqlens` says. The host attends in a Python
loop, a call for every frame; frames of one length are a grid, `[frames, N / frames, H, D]`, and one call. A patch is a
whole clip of one tubelet to their convolution, which is a linear layer then. Source: transformers 5.23 and 4.57.6,
`Qwen3VLVisionPatchEmbed`, `Qwen3VLVisionAttention` and those of the same form in qwen2_vl, qwen2_5_vl and glm4v.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..linear import linear
from ._mixin import Mixin
from .transformers_attention import OurAttention, attention, wants_probabilities
from .transformers_embeddings import is_bare, why_not


class OurFlatPatches(Mixin):
    """Mixed in before a patch embedding of flat patches: its convolution as the linear layer that it is."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        convolution = self.proj
        if why_not(convolution) or not is_bare(convolution):
            return super().forward(hidden_states)
        weight = convolution.weight.flatten(1)  # [E, C * f * y * x]
        return linear(hidden_states.to(weight.dtype).view(-1, weight.shape[1]), weight, convolution.bias)


class OurVisionAttention(OurAttention):
    """Mixed in before the attention of a vision tower: sequences of one length in one call.

    Of several lengths, for probabilities and while torch.compile looks on, which cannot know the lengths: the host's
    loop, each sequence by `attention`.
    """

    def forward(self, hidden_states: Tensor, cu_seqlens: Tensor, *args: Any, **kwargs: Any) -> Any:
        tables: Any = kwargs.get("position_embeddings") or ()
        module: Any = self
        sequences = 0 if args or not tables or torch.compiler.is_compiling() else _of_one_length(cu_seqlens)
        if not sequences or int(cu_seqlens[-1]) != hidden_states.shape[0] or wants_probabilities(module, kwargs):
            return super().forward(hidden_states, cu_seqlens, *args, **kwargs)
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(1)  # [N, H, D]
        q, k = _rotate(self)(q, k, *tables)
        q, k, v = (x.unflatten(0, (sequences, -1)).transpose(1, 2) for x in (q, k, v))  # [sequences, H, N, D]
        dropout = self.attention_dropout if self.training else 0.0
        o, _ = attention(module, q, k, v, scaling=self.scaling, dropout=dropout, is_causal=False)
        return self.proj(o.reshape(hidden_states.shape[0], -1))


def why_no_patches(module: nn.Module) -> str:
    """Why a patch embedding is no linear layer; "" if it is."""
    return why_not(getattr(module, "proj", None))


def _of_one_length(cu_seqlens: Tensor) -> int:
    """How many sequences there are, if all are of one length; else 0."""
    lengths = cu_seqlens.diff()
    return len(lengths) if len(lengths) and bool((lengths == lengths[0]).all()) else 0


def _rotate(module: object) -> Any:
    """`apply_rotary_pos_emb_vision` of the file that the module's class comes from."""
    found = (
        getattr(sys.modules.get(cls.__module__), "apply_rotary_pos_emb_vision", None) for cls in type(module).__mro__
    )
    return next(function for function in found if function is not None)
