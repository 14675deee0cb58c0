"""Hugging Face `kernels`: layers whose forward `kernelize` puts into modules of transformers and PyTorch.

`make hub` writes a folder in which this file is `layers`. The loader demands that a layer has no constructor and no
member but forward and two flags, and that forward takes what that of the module takes. It is called with the module as
self, so it reads the module's parameters and settings, and `type(self).forward` is what the module did before: calls
that are not ours to run go there. Source: kernels 0.17, layer/layer.py; transformers 5.22 and 5.23.

    from kernels import LocalLayerRepository, Mode, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping

    replace_kernel_forward_from_hub(VivitAttention, "VivitAttention")
    layer = LocalLayerRepository(Path("build/hub"), layer_name="VivitAttention")
    with use_kernel_mapping({"VivitAttention": {"cpu": layer, "cuda": layer}}):
        kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE)

Dropout of attention draws other random numbers than the host's.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..joint_attention.api import joint_attention
from ..tubelet_embedding.api import tubelet_embedding
from .pytorch import FastMultiheadAttention
from .transformers_attention import attention
from .transformers_embeddings import _as_convolution, _fits, is_bare, why_not

__all__ = [
    "FastGELU",
    "MultiheadAttention",
    "PatchConv2d",
    "TimesformerSelfAttention",
    "TubeletConv3d",
    "TubeletEmbedding",
    "VideoMAESelfAttention",
    "VideoPrismAttention",
    "VivitAttention",
]


def _takes(convolution: Any, x: Tensor) -> bool:
    """Whether a convolution cuts x into tubelets, as tubelet_embedding does."""
    return not why_not(convolution) and x.dim() == convolution.weight.dim() and _fits(convolution, x)


class TubeletEmbedding(nn.Module):
    """For `VivitTubeletEmbeddings` and `VideoMAEPatchEmbeddings`: clips `[B, F, C, Y, X]` -> tokens `[B, N, E]`, read
    in place. Frames of another size than image_size go to the host, which refuses or interpolates."""

    has_backward = True
    can_torch_compile = True

    def forward(self: Any, pixel_values: Tensor) -> Tensor:
        convolution = self.projection
        whole = pixel_values.dim() == 5 and tuple(pixel_values.shape[3:]) == tuple(self.image_size)
        if not whole or not is_bare(convolution) or not _takes(convolution, pixel_values.transpose(1, 2)):
            return type(self).forward(self, pixel_values)
        return tubelet_embedding(pixel_values, convolution.weight, convolution.bias, layout="BFCYX")


class TubeletConv3d(nn.Module):
    """For `torch.nn.Conv3d`, wherever its stride is its kernel: `[B, C, F, Y, X]` -> `[B, E, T, Y/y, X/x]`, channels
    last in memory. Any other convolution stays what it is."""

    has_backward = True
    can_torch_compile = True

    def forward(self: Any, input: Tensor) -> Tensor:
        if not _takes(self, input):
            return type(self).forward(self, input)
        return _as_convolution(tubelet_embedding(input, self.weight, self.bias), self, input)


class PatchConv2d(nn.Module):
    """The same for `torch.nn.Conv2d`, a tubelet of one frame: `[B, C, Y, X]` -> `[B, E, Y/y, X/x]`."""

    has_backward = True
    can_torch_compile = True

    def forward(self: Any, input: Tensor) -> Tensor:
        if not _takes(self, input):
            return type(self).forward(self, input)
        tokens = tubelet_embedding(input.unsqueeze(2), self.weight.unsqueeze(2), self.bias)
        return _as_convolution(tokens, self, input)


class VivitAttention(nn.Module):
    """For `VivitAttention`: the registered attention function of this package, whatever the config says; with a mask of
    pairs, or with probabilities asked for, what the config says."""

    has_backward = True
    can_torch_compile = True

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        q, k, v = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        o, probabilities = attention(
            self, q, k, v, attention_mask,
            scaling=self.scaling, dropout=self.attention_dropout if self.training else 0.0, **kwargs,
        )  # fmt: skip
        return self.o_proj(o.flatten(-2)), probabilities


class VideoPrismAttention(nn.Module):
    """The same for `VideoPrismAttention`, soft-cap included."""

    has_backward = True
    can_torch_compile = True

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        return VivitAttention.forward(
            self, hidden_states, attention_mask, softcap=self.attn_logit_softcapping, **kwargs
        )


class VideoMAESelfAttention(nn.Module):
    """The same for `VideoMAESelfAttention`, whose output projection is a module of its own."""

    has_backward = True
    can_torch_compile = True

    def forward(self: Any, hidden_states: Any = None) -> Any:
        q, k, v = (
            projection(hidden_states).unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        dropout_p = self.dropout_prob if self.training else 0.0
        o, probabilities = attention(self, q, k, v, None, scaling=self.scaling, dropout=dropout_p)
        return o.flatten(-2), probabilities


class TimesformerSelfAttention(nn.Module):
    """For `TimesformerSelfAttention`: tokens `[B, N, E]`, all of them one sequence. The block around it, with its
    permutations, is the host's: `vivit_kernels.accelerate` replaces that one, too."""

    has_backward = True
    can_torch_compile = True

    def forward(self: Any, hidden_states: Tensor, output_attentions: bool = False) -> Any:
        if output_attentions:
            return type(self).forward(self, hidden_states, output_attentions)
        qkv = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, H, D]: read in place
        dropout_p = self.attn_drop.p if self.training else 0.0
        return (joint_attention(qkv, scale=self.scale, dropout_p=dropout_p).flatten(-2),)


class MultiheadAttention(nn.Module):
    """For `torch.nn.MultiheadAttention`, as accelerate() has it: calls with need_weights=False, no attn_mask and
    batch_first=True that are not small. A subclass with a forward of its own keeps that."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        host = type(self).forward
        theirs = host if host is not nn.MultiheadAttention.forward else FastMultiheadAttention.forward
        return theirs(
            self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )


class FastGELU(nn.Module):
    """For `FastGELUActivation`, which transformers already offers under this name: five passes over memory in one."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input, approximate="tanh")
