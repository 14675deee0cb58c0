"""vivit's own module with other attention and another tubelet embedding: stock PyTorch's, and the definitions'."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vivit import ViViT, ViViTConfig
from vivit.model import Attention, Block
from vivit_kernels import Linear
from vivit_kernels._attention.options import Options
from vivit_kernels.factorized_attention import reference as factorized_reference
from vivit_kernels.joint_attention import reference as joint_reference
from vivit_kernels.tubelet_embedding import reference as tubelet_reference

from .attention_peers import heads_first, to_grid, to_sequences
from .peers import Missing, require


def use_liger(module: nn.Module, on: str) -> None:
    """Every LayerNorm of the module becomes Liger's, with the same parameters. Raises Missing where it cannot run."""
    if on == "cpu":
        raise Missing("Liger's LayerNorm is a Triton kernel: it runs on GPUs only")
    function = require("liger_kernel.ops", "pip install liger-kernel").LigerLayerNormFunction

    class LigerLayerNorm(nn.LayerNorm):
        def forward(self, input: Tensor) -> Tensor:
            return function.apply(input, self.weight, self.bias, self.eps)

    for part in module.modules():
        if type(part) is nn.LayerNorm:
            part.__class__ = LigerLayerNorm


class StockLinear(Linear):  # an MLP of them fuses nothing and makes nothing again
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


class StockAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:  # [B, N, E] or [B, T, S, E]
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        return self.proj(stock_attention(qkv, self.temporal_heads).reshape(x.shape))


_sdpa = heads_first(F.scaled_dot_product_attention)  # [G, N, H, D]


def stock_attention(qkv: Tensor, temporal_heads: int | None) -> Tensor:
    """Packed `[B, N, 3, H, D]` or `[B, T, S, 3, H, D]` -> `[B, N, H, D]` or `[B, T, S, H, D]`.

    temporal_heads: None attends over everything, else so many heads along time and the others within the frame.
    """
    if temporal_heads is None:
        return _sdpa(*qkv.flatten(1, -4).unbind(-3))
    outputs = []
    for heads, over_time in ((slice(0, temporal_heads), True), (slice(temporal_heads, qkv.shape[-2]), False)):
        if heads.start < heads.stop:
            sequences = (to_sequences(x[..., heads, :], over_time) for x in qkv.unbind(-3))
            outputs.append(to_grid(_sdpa(*sequences), over_time, qkv.shape[0]))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -2)


def become(model: nn.Module, others: dict[type[nn.Module], type[nn.Module]]) -> None:
    """Modules of these very classes turn into the others, with the same parameters under the same names."""
    for module in model.modules():
        if type(module) in others:
            module.__class__ = others[type(module)]


class StockViViT(ViViT):
    class_row_alone = False

    def __init__(self, config: ViViTConfig):
        super().__init__(config)
        become(self, {Attention: StockAttention, Linear: StockLinear})

    def embed(self, video: Tensor, layout: str = "BCFYX") -> Tensor:
        config, B = self.config, video.shape[0]
        if video.dtype == torch.uint8:
            video = (video.float() / 255 - 0.5) / 0.5  # the presets' pixel_mean and pixel_std
        video = video.to(self.tubelet_weight.dtype)
        tokens = F.conv3d(video, self.tubelet_weight, self.tubelet_bias, stride=config.tubelet)
        tokens = tokens.flatten(2).transpose(1, 2)  # [B, T*S, E]
        if self.per_frame:
            tokens = tokens.reshape(B * config.T, config.S, -1)
        if self.class_token is not None:
            tokens = torch.cat([self.class_token.expand(tokens.shape[0], -1, -1), tokens], 1)
        tokens = tokens + self.position
        return tokens.unflatten(0, (B, config.T)) if self.per_frame else tokens


class ReferenceAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        options = Options(qkv.shape[-1] ** -0.5)
        if self.temporal_heads is None:
            q, k, v = qkv.flatten(1, -4).unbind(-3)  # [B, N, H, D]
            o = joint_reference.joint_attention(q, k, v, options)
        else:
            q, k, v = qkv.unbind(-3)  # [B, T, S, H, D]
            o = factorized_reference.factorized_attention(q, k, v, self.temporal_heads, options)
        return self.proj(o.reshape(x.shape))


class ReferenceBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        """Its N x N matrices are made again in backward: those of all layers in float64 fit nowhere."""
        if not torch.is_grad_enabled():
            return super().forward(x)
        return checkpoint(super().forward, x, use_reentrant=False)  # pyright: ignore[reportReturnType]


class ReferenceViViT(ViViT):
    class_row_alone = False

    def __init__(self, config: ViViTConfig):
        super().__init__(config)
        become(self, {Attention: ReferenceAttention, Block: ReferenceBlock, Linear: StockLinear})

    def embed(self, video: Tensor, layout: str = "BCFYX") -> Tensor:
        channels = self.config.channels
        return tubelet_reference.tubelet_embedding(
            video, self.tubelet_weight, self.tubelet_bias, self.position, self.class_token, self.per_frame,
            [1 / 127.5] * channels, [-1.0] * channels,
        )  # fmt: skip
