"""How much of a training step stays in memory until its backward: four levels, all with the same gradients.

    fast      what autograd keeps of plain code
    balanced  nothing that is made again element by element: the outputs of norms and GELUs, masks of dropout, and under
              autocast the copies of weights
    small     the inputs of attention (QKV) and MLP, and of each norm: backward multiplies by fc1 once more, a ninth of
              the products of a step, and makes attention again where its sequences are short
    smallest  the input of each block: backward runs the block forward once more, a third of the products of a step;
              with `offload` in the host's memory, but for one of them (offload.py)

Bytes for each: `python -m vivit info CONFIG` (footprint.py). Attention keeps no N x N matrix at any level, the tubelet
embedding keeps the video as it came. A block whose modules are watched by hooks, were replaced by others, or are being
compiled (there the compiler decides what is made again) runs as plain code: the results are the same.

E.g. x `[B, N, E]` or `[B, T, S, E]` is what a block gets; H heads, D = E/H.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vivit_kernels import low_memory, unwatched

from .config import nearest

if TYPE_CHECKING:
    from .model import Attention, Block

LEVELS = ("fast", "balanced", "small", "smallest")
LONGEST_AGAIN = 512  # keys: up to so many, attention costs less than a tenth of the products around it (E = 768)


def check(level: str, where: str = "ViViT", offload: bool = False) -> str:
    if level not in LEVELS:
        raise ValueError(f"{where}: memory={level!r} is not known; {nearest(str(level), LEVELS)}")
    if offload and level != "smallest":
        raise ValueError(
            f"{where}: offload=True with memory={level!r}: what goes to the host is the inputs of blocks, "
            "and these keep more than that\n  -> memory='smallest'"
        )
    return level


def forward(block: Block, x: Tensor, row: bool = False) -> Tensor:
    """block.plain(x), or with `row` block.plain_class_row(x), keeping what block.memory says."""
    plain = block.plain_class_row if row else block.plain
    if not torch.is_grad_enabled():
        return plain(x)
    if block.memory == "smallest":
        random = block.training and max(block.drop_path.rate, block.mlp.dropout.p, _attention_dropout(block)) > 0
        to_host = block.offload is not None and not torch.compiler.is_compiling()
        # of this graph, not of what runs in it: checkpoint's own hooks are in there
        with block.offload.hooks() if block.offload is not None and to_host else nullcontext():
            # what the block keeps when it runs again in backward is the second largest part of the peak
            found = checkpoint(_steps, block, x, row, "balanced", use_reentrant=False, preserve_rng_state=random)
        assert isinstance(found, Tensor)
        return found
    return _steps(block, x, row, block.memory)


def _steps(block: Block, x: Tensor, row: bool, level: str) -> Tensor:
    if why := _obstacle(block, x):
        if block.memory == level and why != "compiled":
            warnings.warn(f"ViViT: memory={level!r} has no effect on a block that is {why}", stacklevel=2)
        return (block.plain_class_row if row else block.plain)(x)
    branch = None  # of the residual sum that the next norm begins with
    for norm, attention in zip(block.norms, block.attentions, strict=True):
        x, branch = (_class_row if row else _attention)(attention, norm, x, branch, level)  # pyright: ignore[reportArgumentType]
        x, branch = x[..., :1, :] if row else x, block.drop_path(branch)
    x, branch = _mlp(block, x, branch, level)
    return low_memory.add(block.drop_path(branch), x)


def _obstacle(block: Block, x: Tensor) -> str:
    if torch.compiler.is_compiling():
        return "compiled"
    if not block.ordinary():
        return "made of other modules than this model's own"
    if not unwatched(*(module for module in block.modules() if module is not block)):  # the block's own see x and y
        return "watched by hooks"
    return "" if low_memory.usable(x) else "traced or transformed"


def _attention(
    attention: Attention, norm: nn.LayerNorm, x: Tensor, branch: Tensor | None, level: str
) -> tuple[Tensor, Tensor]:
    """(x + branch, the attention's own branch)."""
    if attention.moves:  # the sum stays on this process, attention takes other rows
        x = x if branch is None else low_memory.add(branch, x)
        inner = attention.enter(x)
        qkv = low_memory.norm_linear(inner, norm, attention.qkv)
    else:
        x, qkv = low_memory.residual_norm_linear(x, branch, norm, attention.qkv)
        inner = x
    qkv = qkv.unflatten(-1, (3, attention.heads, -1))  # [..., 3, H, D]
    if level == "small" and attention.longest(inner) <= LONGEST_AGAIN:
        seeded = attention.training and attention.attention_dropout > 0
        y = low_memory.attention_linear(qkv, attention.attend, attention.proj, seeded)
    else:
        y = low_memory.linear(attention.attend(qkv).flatten(-2), attention.proj)
    return x, attention.leave(_dropout(y, attention.dropout))


def _class_row(  # [..., N, E] -> [..., N, E], [..., 1, E]
    attention: Attention, norm: nn.LayerNorm, x: Tensor, branch: Tensor | None, level: str
) -> tuple[Tensor, Tensor]:
    x, qkv = low_memory.residual_norm_linear(x, branch, norm, attention.qkv)
    o = attention.attend_class_row(qkv.unflatten(-1, (3, attention.heads, -1)))  # [B, 1, H, D]
    y = low_memory.linear(o.reshape(x[..., :1, :].shape), attention.proj)
    return x, _dropout(y, attention.dropout)


def _mlp(block: Block, x: Tensor, branch: Tensor | None, level: str) -> tuple[Tensor, Tensor]:
    mlp = block.mlp
    p = mlp.dropout.p if mlp.dropout.training else 0.0
    keep = level == "balanced"
    x, y = low_memory.residual_norm_mlp(x, branch, block.norm_mlp, mlp.fc1, mlp.fc2, p, keep_hidden=keep)
    return x, _dropout(y, mlp.dropout)


def _attention_dropout(block: Block) -> float:
    return max(attention.attention_dropout for attention in block.attentions)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _dropout(x: Tensor, module: nn.Dropout) -> Tensor:
    return low_memory.dropout(x, module.p) if module.training and module.p > 0 else x
