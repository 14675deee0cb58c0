"""ViViT (Arnab et al. 2021, arXiv 2103.15691), all four models, read top to bottom.

Letters: B clips, C channels, F Y X the clip's frames, rows, columns, T temporal and S spatial tokens, N tokens that one
query attends to, H heads, D head size, E = H*D. Attention, tubelet embedding and linears are vivit_kernels' public
names; everything else is plain PyTorch. The names in brackets are the sections of the paper.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vivit_kernels import (
    Linear,
    factorized_attention,
    joint_attention,
    mlp,
    temporal_block,
    temporal_block_pays,
    tubelet_embedding,
    unwatched,
)

from . import memory
from .config import ViViTConfig
from .offload import Offload

if TYPE_CHECKING:
    from .sequence_parallel import Split


def uniform_frame_indices(frames: int, wanted: int) -> list[int]:
    """`wanted` frames at equal distances (3.2; Scenic's rounding): round(k * frames / (wanted + 1)), k = 1..wanted."""
    if wanted >= frames:
        return list(range(frames))
    return [min(round(k * frames / (wanted + 1)), frames - 1) for k in range(1, wanted + 1)]


class DropPath(nn.Module):
    """Stochastic depth: drops a residual branch for a whole clip, so that all frames of a clip share the decision.

    Scenic's ViViT and the paper leave survivors as they are; timm divides them by the keep probability (`rescale`).
    """

    def __init__(self, rate: float, rescale: bool):
        super().__init__()
        self.rate, self.rescale = rate, rescale

    def forward(self, branch: Tensor) -> Tensor:  # [B, ..., E]
        if not self.training or self.rate == 0.0:
            return branch
        per_clip = (branch.shape[0],) + (1,) * (branch.dim() - 1)
        keep = (torch.rand(per_clip, device=branch.device) >= self.rate).to(branch.dtype)
        return branch * (keep / (1.0 - self.rate) if self.rescale and self.rate < 1.0 else keep)


class Attention(nn.Module):
    """Multi-head attention over every token ("joint"), within a frame ("space"), along time at a position ("time"),
    or half of the heads along time and half within the frame ("dot_product", model 4: temporal heads first)."""

    split: Split | None = None  # where clips lie on several processes (sequence_parallel.py)

    def __init__(
        self,
        embedding: int,
        heads: int,
        over: str,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        backend: str | None = None,
    ):
        super().__init__()
        self.heads, self.over, self.attention_dropout, self.backend = heads, over, attention_dropout, backend
        self.temporal_heads = {"space": 0, "time": heads, "dot_product": heads // 2}.get(over)
        self.qkv = Linear(embedding, 3 * embedding)
        self.proj = Linear(embedding, embedding)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, E] or [B, T, S, E]
        x = self.enter(x)
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [B, T, S, 3, H, D]: read in place, never permuted
        return self.leave(self.dropout(self.proj(self.attend(qkv).reshape(x.shape))))

    def normed(self, norm: nn.Module, x: Tensor) -> Tensor:  # [B, N, E] or [B, T, S, E]
        """self(norm(x)); along time, where that pays, norm, QKV and attention are one kernel."""
        if not self._in_one(norm, x):
            return self(norm(x))
        assert isinstance(norm, nn.LayerNorm)
        tensors = (x, norm.weight, norm.bias, self.qkv.weight, self.qkv.bias)
        o = temporal_block(*tensors, heads=self.heads, eps=norm.eps, backend="triton")
        return self.dropout(self.proj(o))

    def _in_one(self, norm: nn.Module, x: Tensor) -> bool:
        qkv = self.qkv
        if self.over != "time" or self.split is not None or (self.training and self.attention_dropout > 0):
            return False
        if not (type(self) is Attention and type(norm) is nn.LayerNorm and type(qkv) is Linear):
            return False
        tensors = (x, norm.weight, norm.bias, qkv.weight, qkv.bias)
        return unwatched(self, norm, qkv) and temporal_block_pays(*tensors, heads=self.heads, backend=self.backend)

    @property
    def moves(self) -> bool:
        """Whether it takes other rows of x than lie here, of a clip on several processes."""
        return self.split is not None and self.over == "time"

    def enter(self, x: Tensor) -> Tensor:
        """Of a clip on several processes, the tokens that attention along time needs here; `leave` is the way back."""
        return self.split.to_positions(x) if self.split is not None and self.moves else x

    def leave(self, x: Tensor) -> Tensor:
        return self.split.to_frames(x) if self.split is not None and self.moves else x

    def attend(self, qkv: Tensor, seed: Tensor | None = None) -> Tensor:  # [..., 3, H, D] -> [..., H, D]
        dropout_p = self.attention_dropout if self.training else 0.0
        options: dict[str, Any] = dict(dropout_p=dropout_p, seed=seed if dropout_p else None, backend=self.backend)
        if self.split is not None and self.over in ("joint", "dot_product"):
            return self.split.attend(qkv, self.temporal_heads, options)
        if self.temporal_heads is None:
            return joint_attention(qkv.flatten(1, -4), **options).view(*qkv.shape[:-3], *qkv.shape[-2:])
        return factorized_attention(qkv, temporal_heads=self.temporal_heads, **options)

    def class_row(self, x: Tensor) -> Tensor:  # [..., N, E] -> [..., 1, E]
        """The first row of `forward`, over all N tokens ("joint", "space"): no other query is asked."""
        o = self.attend_class_row(self.qkv(x).unflatten(-1, (3, self.heads, -1)))  # [B, 1, H, D], B times T frames
        return self.dropout(self.proj(o.reshape(x[..., :1, :].shape)))

    def attend_class_row(self, qkv: Tensor) -> Tensor:  # [..., N, 3, H, D] -> [B, 1, H, D]
        qkv = qkv.flatten(0, -5)
        options: dict[str, Any] = dict(dropout_p=self.attention_dropout if self.training else 0.0, backend=self.backend)
        if self.split is not None and self.over == "joint":
            return self.split.attend_class_row(qkv, options)
        q, k, v = qkv.unbind(2)
        return joint_attention(q[:, :1], k, v, **options)

    def longest(self, x: Tensor) -> int:
        """Keys of the longest sequence that a query of x, `[B, N, E]` or `[B, T, S, E]`, attends to."""
        if self.temporal_heads is None:
            return x[0, ..., 0].numel() if self.split is None else sum(self.split.rows)
        T, S = x.shape[1:3]
        return max(T if self.temporal_heads else 0, S if self.temporal_heads < self.heads else 0)


class MLP(nn.Module):
    def __init__(self, embedding: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        self.fc1, self.fc2 = Linear(embedding, hidden), Linear(hidden, embedding)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # [..., E]
        fc1, fc2 = self.fc1, self.fc2
        if type(fc1) is type(fc2) is Linear and unwatched(fc1, fc2) and not (self.training and self.dropout.p > 0):
            return mlp(x, fc1, fc2)  # the same with a pass and a tensor less
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x), approximate="tanh"))))


class Block(nn.Module):
    """Pre-norm: one residual step per attention (two in model 3, in the given order), then the MLP."""

    def __init__(self, config: ViViTConfig, over: str, heads: int, mlp: int, drop_path: float, backend: str | None):
        super().__init__()
        E, drop = config.embedding, config.dropout
        steps = {"space_time": ("space", "time"), "time_space": ("time", "space")}.get(over, (over,))
        self.norms = nn.ModuleList(nn.LayerNorm(E, config.eps) for _ in steps)
        self.attentions = nn.ModuleList(
            Attention(E, heads, step, drop, config.attention_dropout, backend) for step in steps
        )
        self.norm_mlp = nn.LayerNorm(E, config.eps)
        self.mlp = MLP(E, mlp, drop)
        self.drop_path = DropPath(drop_path, rescale=config.drop_path_schedule == "timm")
        self.memory = "fast"
        self.offload: Offload | None = None

    def forward(self, x: Tensor) -> Tensor:  # [B, N, E] or [B, T, S, E]
        return self.plain(x) if self.memory == "fast" else memory.forward(self, x)

    def class_row(self, x: Tensor) -> Tensor:  # [..., N, E] -> [..., 1, E]
        """The first row of `forward`; only where each token is attended to once ("joint", "space")."""
        return self.plain_class_row(x) if self.memory == "fast" else memory.forward(self, x, row=True)

    def plain(self, x: Tensor) -> Tensor:
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            one = isinstance(attention, Attention)  # else one that took its place
            x = x + self.drop_path(attention.normed(norm, x) if one else attention(norm(x)))
        return x + self.drop_path(self.mlp(self.norm_mlp(x)))

    def plain_class_row(self, x: Tensor) -> Tensor:
        attention = self.attentions[0]
        assert isinstance(attention, Attention)
        row = x[..., :1, :] + self.drop_path(attention.class_row(self.norms[0](x)))
        return row + self.drop_path(self.mlp(self.norm_mlp(row)))

    def ordinary(self) -> bool:
        """Whether it is made of this file's modules and none was replaced: memory.py computes what these would."""
        inner = all(type(module) in _ORDINARY for module in self.modules() if module is not self)
        return inner and type(self).plain is Block.plain  # FSDP makes a subclass of what it shards


_ORDINARY = {Block, Attention, MLP, DropPath, Linear, nn.LayerNorm, nn.Dropout, nn.ModuleList}


def drop_path_rates(config: ViViTConfig, depth: int) -> list[float]:
    """Stochastic depth per layer, 0 for the first: p*l/(L-1) (Scenic, timm) or p*l/L (the paper's appendix)."""
    last = depth if config.drop_path_schedule == "paper" else max(depth - 1, 1)
    return [config.drop_path * layer / last for layer in range(depth)]


def pooled(x: Tensor, pool: str, dims: tuple[int, ...]) -> Tensor:
    if pool == "mean":
        return x.mean(dims)
    return x.amax(dims) if pool == "max" else x.sum(dims)


class TemporalEncoder(nn.Module):
    """Model 2's second encoder: one token per frame of the first, its own class token, positions and final norm."""

    def __init__(self, config: ViViTConfig, backend: str | None):
        super().__init__()
        E, heads, mlp = config.embedding, config.temporal_heads or config.heads, config.temporal_mlp or config.mlp
        self.pool = config.pool or "cls"
        self.class_token = nn.Parameter(torch.zeros(1, 1, E)) if config.has_class_token else None
        self.position = nn.Parameter(torch.empty(1, config.T + config.has_class_token, E))
        self.dropout = nn.Dropout(config.dropout)
        rates = drop_path_rates(config, config.temporal_depth)
        self.blocks = nn.ModuleList(Block(config, "joint", heads, mlp, rate, backend) for rate in rates)
        self.norm = nn.LayerNorm(E, config.eps)

    def forward(self, frames: Tensor) -> Tensor:  # [B, T, E] -> [B, E]
        if self.class_token is not None:
            frames = torch.cat(
                [self.class_token.to(frames.dtype).expand(frames.shape[0], -1, -1), frames], 1
            )  # [B, T+1, E]
        x = self.dropout(frames + self.position)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0]) if self.class_token is not None else pooled(self.norm(x), self.pool, (1,))


class ViViT(nn.Module):
    """`ViViT(config)(video)` -> logits `[B, classes]` (a pair of them for two heads).

    video: `[B, C, F, Y, X]`, or another layout named by `layout=` ("BFCYX", "BFYXC"). uint8 is normalised inside
    (config.pixel_mean, pixel_std); floating-point video is taken as already normalised (ViViT: in [-1, 1]).
    backend: for every vivit_kernels call of this model; None chooses the fastest that can run each call.
    memory: what training keeps for its backward, one of memory.LEVELS: "fast", "balanced", "small", "smallest". An
        attribute of every block, and free to change between steps: `model.keep("small")`.
    offload: with "smallest", block inputs wait in the host's memory (offload.py).
    """

    frame_indices: Tensor
    split: Split | None = None  # where clips lie on several processes (sequence_parallel.py)
    class_row_alone = True  # a last block that is read in one row computes that row

    def __init__(self, config: ViViTConfig, backend: str | None = None, memory: str = "fast", offload: bool = False):
        super().__init__()
        self.config, self.backend = config, backend
        E, (T, S) = config.embedding, (config.T, config.S)
        if config.tokenization == "uniform":
            indices = torch.tensor(uniform_frame_indices(config.frames, config.uniform_frames or 0))
            self.register_buffer("frame_indices", indices, persistent=False)
        self.per_frame = config.attention == "factorized_encoder"  # model 2: class token and positions per frame
        self.on_grid = not config.has_class_token and not self.per_frame  # tokens stay [B, T, S, E]
        self.tubelet_weight = nn.Parameter(torch.empty(E, config.channels, *config.tubelet))
        self.tubelet_bias = nn.Parameter(torch.zeros(E))
        self.class_token = nn.Parameter(torch.zeros(1, 1, E)) if config.has_class_token else None
        self.position = nn.Parameter(torch.empty(1, (S if self.per_frame else T * S) + config.has_class_token, E))
        self.dropout = nn.Dropout(config.dropout)
        rates = drop_path_rates(config, config.depth)
        self.blocks = nn.ModuleList(
            Block(config, over, config.heads, config.mlp, rate, backend)
            for over, rate in zip(config.layers, rates, strict=True)
        )
        self.norm = nn.LayerNorm(E, config.eps)
        self.temporal = TemporalEncoder(config, backend) if config.temporal_depth else None
        self.representation = nn.Linear(E, config.representation) if config.representation else None
        self.head = nn.Linear(config.representation or E, sum(config.head_sizes))
        self.reset_parameters()
        self.keep(memory, offload)

    def keep(self, level: str, offload: bool = False) -> None:
        """Sets what training keeps for its backward. Raises ValueError for what is none of memory.LEVELS, and for
        `offload` at another level than "smallest"."""
        memory.check(level, offload=offload)
        for module in self.modules():
            if isinstance(module, Block):
                module.memory, module.offload = level, None
        place = Offload() if offload else None
        for block in self.blocks:  # not the temporal encoder's, whose inputs are a row a frame
            block.offload = place  # pyright: ignore[reportArgumentType]

    def forward(self, video: Tensor, layout: str = "BCFYX"):
        logits = self.head(self.forward_features(video, layout))
        return logits.split(self.config.head_sizes, -1) if len(self.config.head_sizes) > 1 else logits  # [B, classes]

    def forward_features(self, video: Tensor, layout: str = "BCFYX") -> Tensor:
        """What the head sees: `[B, E]`, or `[B, representation]`."""
        config, pool = self.config, self.config.pool or "cls"
        x = self.dropout(self.embed(video, layout))  # [B, N(+1), E], model 2 [B, T, S(+1), E]
        if self.on_grid:
            x = x.unflatten(1, (-1, config.S))  # [B, T, S, E]
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        x = last.class_row(x) if isinstance(last, Block) and self._only_class_row(last) else last(x)
        if self.class_token is not None:
            x = self.norm(x[..., 0, :])  # [B, E], model 2 [B, T, E]: the class rows are all that is read
        else:
            x = pooled(self.norm(x), pool, (2,) if self.per_frame else (1, 2))
        if self.split is not None:
            x = self.split.whole(x, pool)
        if self.per_frame:
            x = self.temporal(x) if self.temporal is not None else x.mean(1)  # [B, E]
        return torch.tanh(self.representation(x)) if self.representation is not None else x

    def _only_class_row(self, last: Block) -> bool:
        """Whether the other rows of the last block, 90 % of its work, would go unread: no hook takes them either."""
        if self.class_token is None or not self.class_row_alone:
            return False
        hooked = "class_row" in vars(last)  # FSDP's hooks on the block, which were put around class_row too
        return unwatched(*(module for module in last.modules() if not (hooked and module is last)))

    def embed(self, video: Tensor, layout: str = "BCFYX") -> Tensor:
        """Tokens with positions and class token (sections 3.1, 3.2)."""
        config = self.config
        frames = layout.find("F")
        self._check_video(video, layout, frames)
        if config.tokenization == "uniform":
            video = video.index_select(frames, self.frame_indices)
        position = self.position
        if self.split is not None:
            video, position = self.split.clip(video, position, frames)
        x = tubelet_embedding(
            video,
            self.tubelet_weight,
            self.tubelet_bias,
            position,
            self.class_token,
            class_token_per="frame" if self.per_frame else "clip",
            mean=config.pixel_mean if video.dtype == torch.uint8 else None,
            std=config.pixel_std if video.dtype == torch.uint8 else None,
            layout=layout,
            backend=self.backend,
        )
        return x if self.split is None else self.split.without_class_row(x)

    def _check_video(self, video: Tensor, layout: str, frames: int) -> None:
        config = self.config
        sizes = dict(zip(layout, video.shape, strict=False))
        wanted = {"C": config.channels, "F": config.frames, "Y": config.height, "X": config.width}
        if video.dim() != 5 or frames < 0 or any(sizes.get(name) != size for name, size in wanted.items()):
            raise ValueError(
                f"ViViT: video {tuple(video.shape)} as {layout} does not fit this model: it takes "
                f"C={config.channels} F={config.frames} Y={config.height} X={config.width}; "
                "resize or sample the clip, or name its layout= (BCFYX, BFCYX, BFYXC)"
            )

    def reset_parameters(self) -> None:
        """From scratch as Scenic does: Xavier for each of q, k, v, LeCun for tubelets, positions N(0, 0.02), class
        tokens and head zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():  # after all Linears: a module comes before the Linears in it
            if isinstance(module, Attention):  # three E x E projections in one weight: the fan is that of each
                for weight in module.qkv.weight.chunk(3):
                    nn.init.xavier_uniform_(weight)
            if isinstance(module, MLP):
                nn.init.normal_(module.fc1.bias, std=1e-6)
                nn.init.normal_(module.fc2.bias, std=1e-6)
            if isinstance(module, ViViT | TemporalEncoder):
                nn.init.normal_(module.position, std=0.02)
        fan_in = self.tubelet_weight[0].numel()
        std = fan_in**-0.5 / 0.87962566103423978  # a normal cut at two sigma has this share of its deviation
        nn.init.trunc_normal_(self.tubelet_weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(self.head.weight)
