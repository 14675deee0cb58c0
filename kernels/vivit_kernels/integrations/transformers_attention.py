"""transformers: attention through its own registry, for one module at a time or for a model as a whole.

Every attention class here asks `self.config._attn_implementation` which function of the registry to call, transformers
4.57 and 5 alike. So `OurAttention`, mixed in before the class of the host, shows the host's own forward another name
there and changes nothing else: projections, rotary embeddings and dropout rates stay the host's code, and so do config,
parameters and state dict. Source: transformers 5.23, `AttentionInterface`, `VivitAttention`, `VideoMAESelfAttention`,
`VideoPrismAttention`, `VJEPA2RopeAttention`.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..factorized_attention.api import spatial_attention
from ..joint_attention.api import joint_attention
from ._mixin import Mixin

# No part of it may be "flash", "sdpa" or "flex_attention": transformers runs other checks on such names.
NAME = "vivit_kernels"
# Tokens of the longest sequence that is taken as a frame of one clip, so that many share a step: 1024 sequences of 16
# tokens, 12 heads of 64, bf16, 2 busy cores of an AMD EPYC, 2026-11-26: 17 ms, as clips 31, PyTorch's kernel 75.
_SHORT = 512


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function for transformers' registry: query, key, value `[B, H, N, D]` -> (`[B, N, H, D]`, None).

    Equivalent to the model's `eager_attention_forward`, in O(N) memory, with attention dropout by counter. A bool mask
    `[B, N_k]` of keys, as `mask` below makes it, is taken along. What this package has no kernel for runs as the host
    runs it: masks of pairs or heads, causal attention, fewer heads of keys, and calls that want the probabilities.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    key_mask = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
    plain = attention_mask is None or (key_mask is not None and key_mask.dtype == torch.bool)
    same_heads = query.shape[1] == key.shape[1] and query.shape[-1] == value.shape[-1]
    if not plain or not same_heads or (causal and query.shape[2] > 1) or wants_probabilities(module, kwargs):
        return _host(module)(
            module, query, key, value, attention_mask,
            scaling=scaling, dropout=dropout, is_causal=causal, **({} if softcap is None else {"softcap": softcap}),
            **kwargs,
        )  # fmt: skip
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    options: dict[str, Any] = dict(scale=scaling, dropout_p=dropout, softcap=softcap)
    if q.shape[1] != k.shape[1] or k.shape[1] > _SHORT:
        return joint_attention(q, k, v, key_mask=key_mask, **options), None
    frames = (x.unsqueeze(0) for x in (q, k, v))  # every sequence as a frame of one clip
    key_mask = None if key_mask is None else key_mask.unsqueeze(0)
    return spatial_attention(*frames, key_mask=key_mask, **options).squeeze(0), None


def mask(**kwargs: Any) -> Tensor | None:
    """A mask function for transformers' registry: padding as bool `[B, N_k]`, other masks as for its "sdpa"."""
    from transformers import masking_utils

    both_ways = getattr(masking_utils, "bidirectional_mask_function", None)
    padding = kwargs.get("attention_mask")
    skips = kwargs.get("allow_is_bidirectional_skip", False) and kwargs.get("mask_function") is both_ways
    if skips and both_ways is not None and (padding is None or padding.dim() == 2):
        return None if padding is None else padding.to(torch.bool)
    return masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](**kwargs)


def register_attention() -> str:
    """Registers `attention` and `mask` with transformers, and returns the name: it touches no model by itself.

    model = VivitModel.from_pretrained(path, attn_implementation=register_attention())
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    return NAME


class Shown:
    """A config as it is, but for the name of the attention function."""

    _attn_implementation = NAME

    def __init__(self, host: Any) -> None:
        self.host = host

    def __getattr__(self, name: str) -> Any:
        if name == "host":  # only while pickle or copy builds one
            raise AttributeError(name)
        return getattr(self.host, name)


class OurAttention(Mixin):
    """Mixed in before an attention class of transformers: its forward calls `attention`, whatever the config says."""

    @property
    def config(self) -> Any:
        return Shown(self.__dict__["config"])

    @config.setter
    def config(self, value: Any) -> None:
        self.__dict__["config"] = value


class OurAskedAttention(OurAttention):
    """The same for classes of transformers 4.57 that take output_attentions and do not tell the attention function.

    host, asked_at: the class of the host, and the place of output_attentions among the arguments of its forward.
    """

    host: type
    asked_at: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        asked = args[self.asked_at] if len(args) > self.asked_at else kwargs.get("output_attentions")
        if not asked or _chosen(self) != "eager":
            return super().forward(*args, **kwargs)
        plain = copy.copy(self)  # shares parameters and settings
        plain.__class__ = self.host
        return plain.forward(*args, **kwargs)


class OurRopeAttention(OurAttention):
    """The same before `VJEPA2RopeAttention`, with its rotary embedding in three passes over memory, not some twenty.

    Channels 2i and 2i + 1 of an axis turn each other, but each by an angle of its own, j's by position *
    10000^-((j mod d/2) / (d/2)), as the host has it: that is no rotation, which the kernels' `rotary` would take.
    Angles are of float32, where the host rounds positions and frequencies to 16 bits before it multiplies them.
    """

    def apply_rotary_embeddings(self, qk: Tensor, pos_ids: Any) -> Tensor:
        """qk `[B, H, N, D]`; pos_ids: of frames, rows and columns, `[N]`, or `[B, H, N]`, the same for every head."""
        D, axes = qk.shape[-1], (self.d_dim, self.h_dim, self.w_dim)
        wide = torch.promote_types(qk.dtype, torch.float32)
        angles = []
        for position, d in zip(pos_ids, axes, strict=True):
            steps = torch.arange(d // 2, dtype=wide, device=qk.device) / (d / 2.0)
            position = position[:, :1] if position.dim() == 3 else position
            angles += [position.unsqueeze(-1) * (1.0 / 10000**steps)] * 2
        angle = F.pad(torch.cat(angles, -1), (0, D - sum(axes)))  # [..., N, D]; channels that are left have angle 0
        sign = torch.arange(D, device=qk.device) % 2 * 2 - 1
        cos, sin = angle.cos().to(qk.dtype), (angle.sin() * sign).to(qk.dtype)
        other = qk.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        return torch.addcmul(qk * cos, other, sin)


def attention_mixins(host: Any, mixin: type) -> tuple[tuple[type, ...], dict[str, Any]]:
    """What goes before an attention class of the host, and what the class of ours says about it."""
    arguments = list(inspect.signature(host.forward).parameters)[1:]
    if "output_attentions" not in arguments:
        return (mixin,), {}
    mixins = (OurAskedAttention,) if mixin is OurAttention else (mixin, OurAskedAttention)
    return mixins, {"host": host, "asked_at": arguments.index("output_attentions")}


def _chosen(module: Any) -> str:
    """The name that the user's config has, None or "eager" being the host's textbook."""
    return getattr(module.__dict__.get("config"), "_attn_implementation", None) or "eager"


def _host(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function that the module would call without us; "sdpa" for a model that was made with our name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = _chosen(module)
    if name == NAME:
        name = "sdpa"
    return _eager(module) if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]


def _eager(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """`eager_attention_forward` of the file that the module's class comes from."""
    for cls in type(module).__mro__:
        if found := getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None):
            return found
    raise NotImplementedError(
        f"attention: {type(module).__name__} has no eager_attention_forward beside it, which this call needs; "
        "make the model with attn_implementation='sdpa'"
    )


def wants_probabilities(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Only the host's textbook returns them. transformers 5 collects them by hooks, which a context variable turns on;
    4.57 by a forward of the instance, a function around its own; that of `kernelize` is a method."""
    if _chosen(module) != "eager":
        return False
    config = module.__dict__.get("config")
    wrapped = not isinstance(module.__dict__.get("forward"), MethodType | None)
    if kwargs.get("output_attentions") or getattr(config, "output_attentions", False) or wrapped:
        return True
    collector = getattr(sys.modules.get("transformers.utils.output_capturing"), "_active_collector", None)
    if collector is None:
        return False
    wanted = collector.global_var if torch.compiler.is_compiling() else collector.get()
    return wanted is not None and "attentions" in wanted
