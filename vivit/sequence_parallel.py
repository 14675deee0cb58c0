"""One clip on several processes: each holds some of its frames, or of its positions, and all of them every weight.

Between attentions a process holds the tokens of its frames, `[B, t, S, E]` of `[B, T, S, E]`; t differs by one at most
where T is no multiple of the processes. Layers that look at one token, or within a frame, need nothing of the others.

    "space"        is local: model 2's frames never meet before its temporal encoder, which gets one row a frame
    "time"         tokens go to who has their position, `[B, T, s, E]`, and their branch back: an all-to-all each way
    "dot_product"  the temporal half of q, k, v goes to `[B, T, s, 3, H/2, D]`, its o back; the spatial half is local
    "joint"        q, k, v of all tokens go to who has their heads, `[B, N, 3, h, D]`, o back (DeepSpeed-Ulysses, Jacobs
                   et al. 2023, arXiv 2309.14509): PyTorch's context parallelism knows only PyTorch's own attention

Bytes that a process of P sends for a layer's forward, of the (P-1)/P that leave it, in tokens of E numbers each: "time"
2, "dot_product" 2, "joint" 4; the same again for its backward. What is read in the end, a row or a mean, is summed over
the processes, and each computes the head and the loss of the whole clip.

Gradients are those of the sum of all processes' losses, which are P times the same one: a mean over all processes, as
DDP and FSDP take it, is then the gradient of one process that has the clip to itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vivit_kernels import factorized_attention, joint_attention

if TYPE_CHECKING:
    from .config import ViViTConfig
    from .model import ViViT

Group = Any  # a torch.distributed.ProcessGroup


def check(config: ViViTConfig, processes: int) -> None:
    """Raises ValueError for a model that cannot be cut into so many parts, with what to do."""
    least = [("temporal tokens", config.T, "frames of the clip, or a shorter tubelet")]
    kinds = set(config.layers)
    if kinds & {"space_time", "time_space", "dot_product"}:
        least.append(("positions", config.S, "rows and columns of the clip"))
    if "joint" in kinds:  # Ulysses
        least.append(
            ("heads", config.heads, "heads, or attention = 'factorized_encoder', which splits by frames alone")
        )
    for what, count, more in least:
        if count < processes:
            raise ValueError(
                f"sequence_parallel={processes}: a clip of this model has {count} {what}, and each process needs one "
                f"at least\n  -> sequence_parallel = {count} at most, or more {more}"
            )
    for field in ("dropout", "attention_dropout"):
        if getattr(config, field):
            raise ValueError(
                f"sequence_parallel={processes}: model.{field}={getattr(config, field)} would draw the same mask for "
                f"every process's part of a clip\n  -> {field} = 0; drop_path, whose draw is a clip's, stays"
            )


def shard(model: ViViT, group: Group) -> Split:
    """Makes `model` compute its part of each clip in the processes of `group`; returns how it is cut.

    Every process of the group calls it, gives the model the same whole clips, and gets the same logits. The temporal
    encoder of model 2 is computed by each. To be called before DDP or `fully_shard`; `model.split = None` on the model
    and its attentions undoes it. Raises ValueError as `check`.
    """
    config = model.config
    check(config, dist.get_world_size(group))
    model.split = split = Split(config, group)
    for block in model.blocks:
        for attention in block.attentions:  # pyright: ignore[reportGeneralTypeIssues, reportAttributeAccessIssue]
            attention.split = split
    return split


def parts(count: int, of: int) -> tuple[int, ...]:
    """`count` in `of` parts, the first ones larger by one where it does not divide."""
    least, more = divmod(count, of)
    return tuple(least + (i < more) for i in range(of))


class Split:
    """Which frames, positions and heads each process has, and the ways between them."""

    def __init__(self, config: ViViTConfig, group: Group):
        self.config, self.group = config, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.frames, self.positions = parts(config.T, self.size), parts(config.S, self.size)
        self.heads = parts(config.heads, self.size)
        self.first, self.mine = sum(self.frames[: self.rank]), self.frames[self.rank]
        # the class row of model 1 is the first process's, as the first row of the sequence
        self.class_row = config.has_class_token and config.attention != "factorized_encoder"
        self.rows = tuple(t * config.S + (self.class_row and i == 0) for i, t in enumerate(self.frames))

    # -- the ends of the model ----------------------------------------------------------------------------------------
    def clip(self, video: Tensor, position: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        """This process's frames of the video (its dimension `frames`) and rows of the positions `[1, N(+1), E]`.

        A class row comes with every part, so that its parameters are used on each process; `without_class_row`.
        """
        config, f = self.config, self.config.tubelet[0]
        video = video.narrow(frames, self.first * f, self.mine * f)
        if config.attention == "factorized_encoder":  # the same positions for every frame
            return video, position
        start = self.first * config.S + self.class_row
        mine = position[:, start : start + self.mine * config.S]
        return video, torch.cat([position[:, :1], mine], 1) if self.class_row else mine

    def without_class_row(self, x: Tensor) -> Tensor:  # [B, N(+1), E]
        return x[:, 1:] if self.class_row and self.rank else x

    def whole(self, x: Tensor, pool: str) -> Tensor:
        """What the tokens of all frames give, of what this process's gave: model 2's row a frame, `[B, t, E] -> [B, T,
        E]`, else `[B, E]`, the class row or pooled, of its own."""
        if x.dim() == 3:
            x = F.pad(x, (0, 0, self.first, self.config.T - self.first - self.mine))  # [B, T, E], zero in other frames
        elif pool == "cls":  # the others' rows are no class rows
            x = x * (1.0 if self.rank == 0 else 0.0)
        elif pool == "mean":
            x = x * (self.mine / self.config.T)
        elif pool == "max":
            slots = F.pad(x[:, None], (0, 0, self.rank, self.size - 1 - self.rank))  # [B, P, E]
            return summed(slots, self.group).amax(1)
        return summed(x, self.group)

    # -- attention ----------------------------------------------------------------------------------------------------
    def to_positions(self, x: Tensor) -> Tensor:  # [B, t, S, ...] -> [B, T, s, ...]
        return exchange(x, self.group, 2, 1, self.positions, self.frames)

    def to_frames(self, x: Tensor) -> Tensor:  # [B, T, s, ...] -> [B, t, S, ...]
        return exchange(x, self.group, 1, 2, self.frames, self.positions)

    def attend(self, qkv: Tensor, temporal_heads: int | None, options: dict[str, Any]) -> Tensor:
        """`[B, t, S, 3, H, D]` or `[B, n, 3, H, D]` -> `[..., H, D]`: joint with None, else model 4's."""
        if temporal_heads is None:
            rows = qkv.flatten(1, -4)  # [B, n, 3, H, D]
            o = joint_attention(exchange(rows, self.group, 3, 1, self.heads, self.rows), **options)  # [B, N, h, D]
            return exchange(o, self.group, 1, 2, self.rows, self.heads).view(*qkv.shape[:-3], *qkv.shape[-2:])
        time, space = qkv.split((temporal_heads, qkv.shape[-2] - temporal_heads), -2)
        o_time = factorized_attention(self.to_positions(time), temporal_heads=temporal_heads, **options)
        o_space = factorized_attention(space, temporal_heads=0, **options)  # [B, t, S, H/2, D]
        return torch.cat([self.to_frames(o_time), o_space], -2)

    def attend_class_row(self, qkv: Tensor, options: dict[str, Any]) -> Tensor:
        """`[B, n, 3, H, D]` -> `[B, 1, H, D]`, o of the clip's class row, which the first process goes on with."""
        q, k, v = exchange(qkv, self.group, 3, 1, self.heads, self.rows).unbind(2)  # [B, N, h, D]
        o = joint_attention(q[:, :1], k, v, **options)
        before, mine = sum(self.heads[: self.rank]), self.heads[self.rank]
        return summed(F.pad(o, (0, 0, before, self.config.heads - before - mine)), self.group)


def exchange(
    x: Tensor, group: Group, give: int, take: int, give_sizes: Sequence[int], take_sizes: Sequence[int]
) -> Tensor:
    """One all-to-all: x is whole along dimension `give` and this process's part along `take`; the result is its part
    along `give` and whole along `take`. Differentiable; the sizes are those of each process.

    The same as, of the x of all processes: torch.cat(xs, take).split(give_sizes, give)[rank].
    """
    return _Exchange.apply(x, group, give, take, tuple(give_sizes), tuple(take_sizes))


def summed(x: Tensor, group: Group) -> Tensor:
    """The sum of the x of all processes, in each of them; so is its gradient. The result may be written into."""
    return _Summed.apply(x, group)


def _exchanged(x: Tensor, group: Group, give: int, take: int, give_sizes, take_sizes) -> Tensor:
    pieces = x.split(give_sizes, give)
    sent = [piece.numel() for piece in pieces]
    packed = x.new_empty(x.numel())
    for piece, place in zip(pieces, packed.split(sent), strict=True):
        place.view(piece.shape).copy_(piece)
    shapes = []
    for size in take_sizes:
        shape = list(x.shape)
        shape[give], shape[take] = give_sizes[dist.get_rank(group)], size
        shapes.append(shape)
    received = [math.prod(shape) for shape in shapes]
    found = x.new_empty(sum(received))
    dist.all_to_all_single(found, packed, received, sent, group=group)
    return torch.cat([part.view(shape) for part, shape in zip(found.split(received), shapes, strict=True)], take)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, give: int, take: int, give_sizes, take_sizes) -> Tensor:
        ctx.way = group, take, give, take_sizes, give_sizes  # back
        return _exchanged(x, group, give, take, give_sizes, take_sizes)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return exchange(dy, *ctx.way), None, None, None, None, None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        y = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return summed(dy, ctx.group), None
