"""transformers: TimeSformer's divided attention as a block on the token grid, without its permutations.

Tokens of TimeSformer lie position by position, frames next to each other: `[B, 1 + S*T, C]`, class row first. The host
copies them around every attention: a slice before the temporal one, a permutation and a class row for every frame
before the spatial one, and all of it back. Here the temporal attention reads its queries where they lie, and what has
to be added anyhow is added into frames and back. Source: transformers 5.23, `TimesformerLayer.forward` with
attention_type="divided_space_time"; Bertasius et al., arXiv 2102.05095, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..factorized_attention.api import spatial_attention, temporal_attention
from ..joint_attention.api import joint_attention
from ._mixin import Mixin
from .transformers_embeddings import is_bare


class OurTimesformerLayer(Mixin):
    """Mixed in before `TimesformerLayer`.

    The class row takes part in every frame, with the keys and values that it has at the layer's input; it gets the mean
    of what the frames give it. Everything but attention is a call of the host's own modules. Attention dropout draws
    other numbers than the host's, stochastic depth the same. With output_attentions and for the other types of
    attention all is as the host does it, and while hooks hang on its attention modules.
    """

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> Any:
        T, tokens = self.config.num_frames, hidden_states.shape[1] - 1
        divided = self.attention_type == "divided_space_time" and tokens % T == 0
        if output_attentions or not divided or not _is_bare(self):
            return super().forward(hidden_states, output_attentions)
        first = hidden_states[:, :1]
        grid = hidden_states[:, 1:].unflatten(1, (-1, T)).transpose(1, 2)  # [B, T, S, C], as it lies
        moved = grid + self._temporal(hidden_states, T)
        frames = torch.cat((first.unsqueeze(1).expand(-1, T, -1, -1), moved), 2)  # [B, T, 1 + S, C]
        change = self._spatial(frames)
        moved = (moved + change[:, :, 1:]).transpose(1, 2).flatten(1, 2)
        hidden_states = torch.cat((first + change[:, :, 0].mean(1, True), moved), 1)
        output = self.output(self.intermediate(self.layernorm_after(hidden_states)))
        return (hidden_states + self.drop_path(output),)

    def _temporal(self, hidden_states: Tensor, T: int) -> Tensor:
        """`[B, 1 + S*T, C]` -> what attention along time adds, `[B, T, S, C]`.

        The class row goes through the first linears with the others: without it they would take a copy of these."""
        module = self.temporal_attention.attention
        qkv = _heads(module, self.temporal_layernorm(hidden_states))[:, 1:]
        o = temporal_attention(qkv.unflatten(1, (-1, T)).transpose(1, 2), **_options(module))
        change = self.temporal_attention.output(o.flatten(-2))
        if self.training and not isinstance(self.drop_path, nn.Identity):  # the host drops whole positions of a clip
            B, _, S, _ = change.shape
            change = change * self.drop_path(change.new_ones(B * S, 1, 1)).view(B, 1, S, 1)
        return self.temporal_dense(change)

    def _spatial(self, frames: Tensor) -> Tensor:
        """`[B, T, 1 + S, C]` -> what attention within frames adds to it."""
        module = self.attention.attention
        o = spatial_attention(_heads(module, self.layernorm_before(frames)), **_options(module))
        return self.drop_path(self.attention.output(o.flatten(-2)).flatten(0, 1)).view(frames.shape)


class OurTimesformerSelfAttention(Mixin):
    """Mixed in before `TimesformerSelfAttention`, of the attention types that are no block: joint, or within frames."""

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> Any:
        if output_attentions:
            return super().forward(hidden_states, output_attentions)
        return (joint_attention(_heads(self, hidden_states), **_options(self)).flatten(-2),)


def _heads(module: Any, x: Tensor) -> Tensor:
    """`[..., C]` -> queries, keys and values of its heads, `[..., 3, H, D]`."""
    return module.qkv(x).unflatten(-1, (3, module.num_heads, -1))


def _is_bare(layer: Any) -> bool:
    """Nothing hangs on the modules that are not called here, or less often."""
    outer = layer.attention, layer.temporal_attention
    inner = [module.attention for module in outer]
    return is_bare(*outer, *inner, *(module.attn_drop for module in inner), layer.drop_path)


def _options(module: Any) -> dict[str, Any]:
    return {"scale": module.scale, "dropout_p": module.attn_drop.p if module.training else 0.0}
