"""diffusers: temporal transformers on the grid of tokens, without the permutations around every temporal attention.

Their blocks are made of what works on each token alone (norms, linears, feed-forward) and of attention. So tokens can
stay frame by frame, `[B*T, S, E]`, all through a model; only the temporal attention has to know T, and reads its
sequences where they lie. T comes to it as `cross_attention_kwargs={"frames": T}`, which blocks of diffusers pass on.
A context that is the same for all frames or positions is projected once for a clip, not once for each of them.
Everything else is a call of the host's own modules. Where a block or an attention has hooks, a processor of the user,
another class or feed-forward in chunks, all goes the host's way, by the host's code; that is asked in every call.
Source: diffusers 0.42.1, `AnimateDiffTransformer3D`, `TransformerTemporalModel`, `TransformerSpatioTemporalModel`,
`LatteTransformer3DModel`, `BasicTransformerBlock`, `TemporalBasicTransformerBlock`; the same in 0.35.2.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..linear import transformed
from ._mixin import Mixin
from .diffusers_attention import is_bare, knows_frames

_HOST = "diffusers.models"
NORMS = ("layer_norm", "ada_norm_single")  # of blocks that treat each token alone but for attention


class OurPlacedBlock(Mixin):
    """Mixed in before `BasicTransformerBlock` with positions of frames, which it adds before each attention."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        *rest: Any,
        **more: Any,
    ) -> Tensor:
        T = (cross_attention_kwargs or {}).get("frames")
        if T is None:
            return super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
                cross_attention_kwargs, *rest, **more,
            )  # fmt: skip
        x, place = hidden_states, self.pos_embed.pe[0, :T, None]  # [B*T, S, E], [T, 1, E]
        for norm, attention in ((self.norm1, self.attn1), (self.norm2, self.attn2)):
            if attention is not None:
                placed = (norm(x).unflatten(0, (-1, T)) + place).flatten(0, 1)
                x = attention(placed, frames=T) + x
        return self.ff(self.norm3(x)) + x


class OurTemporalBlock(Mixin):
    """Mixed in before `TemporalBasicTransformerBlock` of SVD: `[B*T, S, E]`, context `[B, N_k, E_k]`."""

    def forward(self, hidden_states: Tensor, num_frames: int, encoder_hidden_states: Tensor | None = None) -> Tensor:
        x, context = hidden_states, encoder_hidden_states
        of_clips = context is None or context.shape[0] * num_frames == x.shape[0]
        if not of_clips or not _is_ready(self):
            return super().forward(hidden_states, num_frames, encoder_hidden_states)
        y = self.ff_in(self.norm_in(x))
        x = y + x if self.is_res else y
        x = self.attn1(self.norm1(x), frames=num_frames) + x
        if self.attn2 is not None:
            y = self.norm2(x)
            x = (self.attn2(y, frames=num_frames) if context is None else self.attn2(y, context)) + x
        y = self.ff(self.norm3(x))
        return y + x if self.is_res else y


def _is_ready(block: Any) -> bool:
    """Whether a temporal block may be given the grid."""
    known = isinstance(block, OurTemporalBlock) or block.norm_type in NORMS
    if not known or not (isinstance(block, OurTemporalBlock | OurPlacedBlock) or block.pos_embed is None):
        return False
    return block._chunk_size is None and all(map(knows_frames, (block.attn1, block.attn2)))


def is_of_host(block: nn.Module, name: str) -> bool:
    """A block of the host, or ours in its place; one of a class of its own may do more."""
    return type(block).__name__ == name and (type(block).__module__ == f"{_HOST}.attention" or isinstance(block, Mixin))


def _are_ready(blocks: Iterable[nn.Module], name: str) -> bool:
    return all(is_of_host(block, name) and is_bare(block) and _is_ready(block) for block in blocks)


def _result(file: str, name: str, sample: Tensor, return_dict: bool) -> Any:
    """The host's class of this name, which is imported wherever its models are."""
    return getattr(sys.modules[f"{_HOST}.{file}"], name)(sample=sample) if return_dict else (sample,)


class OurTransformer(Mixin):
    """Of `AnimateDiffTransformer3D` and `TransformerTemporalModel`: what both do on `[B*T, E, Y, X]`."""

    def _fits(self, x: Tensor, T: int, *conditions: Any) -> bool:
        if any(condition is not None for condition in conditions) or x.dim() != 4 or x.shape[0] % T or transformed():
            return False
        places = [block.pos_embed.pe.shape[1] for block in self.transformer_blocks if block.pos_embed is not None]
        return all(count >= T for count in places) and _are_ready(self.transformer_blocks, "BasicTransformerBlock")

    def _on_grid(self, x: Tensor, T: int) -> Tensor:
        clips = x.unflatten(0, (-1, T))  # [B, T, E, Y, X]
        if x.device.type == "cpu":  # its norm takes channels last, and gives them back: one copy where the host has two
            clips = clips.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
        tokens = self.norm(clips.transpose(1, 2)).permute(0, 2, 3, 4, 1)  # [B, T, Y, X, E]
        tokens = self.proj_in(tokens.flatten(2, 3).flatten(0, 1))
        for block in self.transformer_blocks:
            tokens = block(tokens, cross_attention_kwargs={"frames": T})
        return x + self.proj_out(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


class OurMotionTransformer(OurTransformer):
    """Mixed in before `AnimateDiffTransformer3D`: hidden_states `[B*T, E, Y, X]` -> the same."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        num_frames: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        conditions = (encoder_hidden_states, timestep, class_labels, cross_attention_kwargs or None)
        if self._fits(hidden_states, num_frames, *conditions):
            return self._on_grid(hidden_states, num_frames)
        return super().forward(
            hidden_states, encoder_hidden_states, timestep, class_labels, num_frames, cross_attention_kwargs
        )


class OurTemporalTransformer(OurTransformer):
    """Mixed in before `TransformerTemporalModel`: the same, whose result has a name."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        num_frames: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        conditions = (encoder_hidden_states, timestep, class_labels, cross_attention_kwargs or None)
        if not self._fits(hidden_states, num_frames, *conditions):
            return super().forward(hidden_states, *conditions[:3], num_frames, cross_attention_kwargs, return_dict)
        sample = self._on_grid(hidden_states, num_frames)
        return _result("transformers.transformer_temporal", "TransformerTemporalModelOutput", sample, return_dict)


class OurSpatioTemporalTransformer(Mixin):
    """Mixed in before `TransformerSpatioTemporalModel` of SVD: hidden_states `[B*T, E, Y, X]` -> the same.

    The context of the temporal attention is that of a clip's first frame, for every position: here it is no copy.
    """

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        image_only_indicator: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        x, context = hidden_states, encoder_hidden_states
        T = 0 if image_only_indicator is None else image_only_indicator.shape[-1]
        if (
            context is None
            or T == 0
            or x.shape[0] % T
            or not _are_ready(self.temporal_transformer_blocks, "TemporalBasicTransformerBlock")
        ):
            return super().forward(hidden_states, encoder_hidden_states, image_only_indicator, return_dict)
        of_clips = context.unflatten(0, (-1, T))[:, 0]  # [B, N_k, E_k]
        tokens = self.proj_in(self.norm(x).permute(0, 2, 3, 1).flatten(1, 2))  # [B*T, S, E]
        frames = self.time_proj(torch.arange(T, device=x.device).repeat(x.shape[0] // T)).to(tokens.dtype)
        moment = self.time_pos_embed(frames).unsqueeze(1)  # [B*T, 1, E]
        checkpointed = torch.is_grad_enabled() and self.gradient_checkpointing
        for block, temporal in zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True):
            if checkpointed:
                tokens = self._gradient_checkpointing_func(block, tokens, None, context, None)
            else:
                tokens = block(tokens, encoder_hidden_states=context)
            mixed = temporal(tokens + moment, num_frames=T, encoder_hidden_states=of_clips)
            tokens = self.time_mixer(x_spatial=tokens, x_temporal=mixed, image_only_indicator=image_only_indicator)
        sample = x + self.proj_out(tokens).transpose(1, 2).unflatten(2, x.shape[2:])
        return _result("transformers.transformer_temporal", "TransformerTemporalModelOutput", sample, return_dict)


class OurLatte(Mixin):
    """Mixed in before `LatteTransformer3DModel`: hidden_states `[B, C, T, Y, X]` -> the same.

    Spatial and temporal blocks on one grid of tokens; the caption is projected to keys and values once for a clip.
    """

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        enable_temporal_attentions: bool = True,
        return_dict: bool = True,
    ) -> Any:
        x = hidden_states
        fits = x.dim() == 5 and encoder_hidden_states is not None and encoder_attention_mask is None
        if (
            not fits
            or not enable_temporal_attentions
            or not _are_ready(self.temporal_transformer_blocks, "BasicTransformerBlock")
        ):
            return super().forward(
                hidden_states, timestep, encoder_hidden_states, encoder_attention_mask,
                enable_temporal_attentions, return_dict,
            )  # fmt: skip
        B, _, T, Y, X = x.shape
        p = self.config.patch_size
        tokens = self.pos_embed(x.transpose(1, 2).flatten(0, 1))  # [B*T, S, E]
        conditions = {"resolution": None, "aspect_ratio": None}
        moment, embedded = self.adaln_single(
            timestep, added_cond_kwargs=conditions, batch_size=B, hidden_dtype=tokens.dtype
        )
        caption: Tensor = self.caption_projection(encoder_hidden_states)  # [B, N_k, E]
        tokens = self._blocks(tokens, moment.repeat_interleave(T, 0), caption, T)
        shift, scale = (self.scale_shift_table[None] + embedded.repeat_interleave(T, 0)[:, None]).chunk(2, dim=1)
        tokens = self.proj_out(self.norm_out(tokens) * (1 + scale) + shift)
        tokens = tokens.unflatten(1, (Y // p, X // p)).unflatten(-1, (p, p, self.out_channels)).unflatten(0, (B, T))
        sample = tokens.permute(0, 6, 1, 2, 4, 3, 5).reshape(B, self.out_channels, T, Y // p * p, X // p * p)
        return _result("modeling_outputs", "Transformer2DModelOutput", sample, return_dict)

    def _blocks(self, tokens: Tensor, timestep: Tensor, caption: Tensor, T: int) -> Tensor:
        """`[B*T, S, E]` through all blocks; timestep `[B*T, 6*E]`, of which the host has a second copy by position."""
        checkpointed = torch.is_grad_enabled() and self.gradient_checkpointing
        for i, (spatial, temporal) in enumerate(
            zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True)
        ):
            known = is_of_host(spatial, "BasicTransformerBlock") and is_bare(spatial) and knows_frames(spatial.attn2)
            context = caption if known else caption.repeat_interleave(T, 0)
            for block, around, options in ((spatial, context, None), (temporal, None, {"frames": T})):
                if i == 0 and block is temporal and T > 1:
                    place = self.temp_pos_embed.to(tokens.dtype)[0, :, None]  # [T, 1, E]
                    tokens = (tokens.unflatten(0, (-1, T)) + place).flatten(0, 1)
                arguments = (tokens, None, around, None, timestep, options, None)
                tokens = self._gradient_checkpointing_func(block, *arguments) if checkpointed else block(*arguments)
        return tokens
