"""Modules over the public ops: TubeletEmbedding, Spatial-, Temporal-, Factorized- and JointAttention, and
VideoMultiheadAttention in the form of torch.nn.MultiheadAttention.

They load their own state dicts and those of other libraries, where the same parameters have other names (_layouts.py).
Letters: B clips, T temporal and S spatial tokens, N tokens one query attends to, H heads, D head size, E = H*D.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _layouts
from .factorized_attention.api import factorized_attention
from .joint_attention.api import joint_attention
from .tubelet_embedding.api import Normalisation, tubelet_embedding

Rotary = tuple[Tensor, Tensor]


class _Attention(nn.Module):
    """The projections and options that all share."""

    def __init__(
        self,
        embedding: int,
        heads: int,
        *,
        bias: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        softcap: float | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        name = type(self).__name__
        if heads < 1 or embedding % heads:
            raise ValueError(f"{name}: embedding={embedding} must be a multiple of heads={heads}")
        self.embedding, self.heads = embedding, heads
        self.attention_dropout, self.softcap, self.backend = attention_dropout, softcap, backend
        self.qkv = nn.Linear(embedding, 3 * embedding, bias, device, dtype)
        self.proj = nn.Linear(embedding, embedding, bias, device, dtype)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for each of the four projections, no bias."""
        for weight in (*self.qkv.weight.chunk(3), self.proj.weight):
            nn.init.xavier_uniform_(weight)
        for bias in (self.qkv.bias, self.proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def extra_repr(self) -> str:
        return f"embedding={self.embedding}, heads={self.heads}"

    def _check(self, x: Tensor, dims: tuple[int, ...], letters: str) -> None:
        if x.dim() not in dims or x.shape[-1] != self.embedding:
            raise ValueError(f"{type(self).__name__}: x must be {letters}, E={self.embedding}; got {tuple(x.shape)}")

    def _options(self, key_mask: Tensor | None, rotary: Rotary | None) -> dict[str, Any]:
        dropout_p = self.attention_dropout if self.training else 0.0
        return dict(key_mask=key_mask, dropout_p=dropout_p, rotary=rotary, softcap=self.softcap, backend=self.backend)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        _layouts.adopt_attention(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class JointAttention(_Attention):
    """Multi-head self-attention of every token to every token of its clip: two linears around `joint_attention`.

    Equivalent to

        q, k, v = qkv(x).unflatten(-1, (3, H, D)).unbind(-3)                   # [B, N, H, D] each
        out = dropout(proj(joint_attention(q, k, v).flatten(-2)))

    embedding, heads: E and H; D = E/H. bias: of both linears. dropout: after `proj`; attention_dropout: of pairs, after
    softmax; both in training alone. softcap, backend: as for `joint_attention`. device, dtype: of the parameters.

    Its forward takes x `[B, N, E]`, or `[B, T, S, E]`, whose clip is one sequence; key_mask: bool `[B, N]` (or
    `[B, T, S]`), True may be attended; rotary as for the op, or `[T, S, D/2]`. Returns x's shape.
    State dict: qkv.weight `[3E, E]`, qkv.bias, proj.weight, proj.bias, as timm's. It also loads those of
    torch.nn.MultiheadAttention, of transformers' attentions (query, key, value or q_proj, ..., with or without biases)
    and of diffusers (to_q, ...). Raises ValueError for sizes that do not fit, and what the op raises.

        out = JointAttention(768, 12)(tokens)
    """

    def forward(self, x: Tensor, key_mask: Tensor | None = None, rotary: Rotary | None = None) -> Tensor:
        self._check(x, (3, 4), "[B, N, E] or [B, T, S, E]")
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [B, (T, S or) N, 3, H, D]: read in place
        if key_mask is not None and key_mask.dim() == 3:
            key_mask = key_mask.flatten(1)
        if rotary is not None and rotary[0].dim() == rotary[1].dim() == 3:
            rotary = rotary[0].flatten(0, 1), rotary[1].flatten(0, 1)
        o = joint_attention(qkv.flatten(1, -4), **self._options(key_mask, rotary))  # [B, N, H, D]
        return self.dropout(self.proj(o.reshape(x.shape)))


class FactorizedAttention(_Attention):
    """Multi-head self-attention on the token grid: `temporal_heads` of the heads along time, the others in the frame.

    Equivalent to

        q, k, v = qkv(x).unflatten(-1, (3, H, D)).unbind(-3)                   # [B, T, S, H, D] each
        out = dropout(proj(factorized_attention(q, k, v, temporal_heads=temporal_heads).flatten(-2)))

    temporal_heads: half of the heads by default, model 4 of ViViT; 0 is `SpatialAttention`, H `TemporalAttention`.
    Everything else as for `JointAttention`; its forward takes x `[B, T, S, E]` alone, key_mask bool `[B, T, S]`, rotary
    `[T, S, D/2]`. A class token per frame is one more spatial token.
    Source: ViViT (arXiv 2103.15691) section 3.3, model 4.

        out = FactorizedAttention(768, 12)(tokens)
    """

    def __init__(self, embedding: int, heads: int, temporal_heads: int | None = None, **options):
        super().__init__(embedding, heads, **options)
        self.temporal_heads = heads // 2 if temporal_heads is None else temporal_heads
        if not 0 <= self.temporal_heads <= heads:
            raise ValueError(
                f"{type(self).__name__}: temporal_heads={temporal_heads} must lie between 0 (all spatial) "
                f"and heads={heads} (all temporal)"
            )

    def forward(self, x: Tensor, key_mask: Tensor | None = None, rotary: Rotary | None = None) -> Tensor:
        self._check(x, (4,), "[B, T, S, E]")
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [B, T, S, 3, H, D]: read in place, never permuted
        o = factorized_attention(qkv, temporal_heads=self.temporal_heads, **self._options(key_mask, rotary))
        return self.dropout(self.proj(o.flatten(-2)))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temporal_heads={self.temporal_heads}"


class SpatialAttention(FactorizedAttention):
    """`FactorizedAttention` with all heads within the frame: no frame sees another.

    out = SpatialAttention(768, 12)(tokens)
    """

    def __init__(self, embedding: int, heads: int, **options):
        super().__init__(embedding, heads, 0, **options)


class TemporalAttention(FactorizedAttention):
    """`FactorizedAttention` with all heads along time: no position sees another.

    out = TemporalAttention(768, 12)(tokens)
    """

    def __init__(self, embedding: int, heads: int, **options):
        super().__init__(embedding, heads, heads, **options)


def attend(mha: nn.MultiheadAttention, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, heads: int | None):
    """What nn.MultiheadAttention computes without its weights, from its parameters, in our ops.

    q, k, v: tokens `[B, ..., E]`, heads None; or one and the same `[B, T, S, E]`, and `heads` of them along time.
    key_mask: True may be attended.
    """
    weight, bias, shape = mha.in_proj_weight, mha.in_proj_bias, (mha.num_heads, mha.head_dim)
    dropout_p = mha.dropout if mha.training else 0.0
    if q is k and k is v:
        qkv: tuple[Tensor, ...] = (F.linear(q, weight, bias).unflatten(-1, (3, *shape)),)
        if heads is None:
            qkv = (qkv[0].flatten(1, -4),)
    else:
        biases = (None, None, None) if bias is None else bias.chunk(3)
        qkv = tuple(
            F.linear(x, w, b).unflatten(-1, shape).flatten(1, -3)
            for x, w, b in zip((q, k, v), weight.chunk(3), biases, strict=True)
        )
    if heads is None:
        o = joint_attention(*qkv, key_mask=key_mask, dropout_p=dropout_p)
    else:
        o = factorized_attention(*qkv, key_mask=key_mask, dropout_p=dropout_p, temporal_heads=heads)
    return F.linear(o.reshape(q.shape), mha.out_proj.weight, mha.out_proj.bias)


class VideoMultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention for the tokens of video: same constructor, same call, same state dict.

    Equivalent to `torch.nn.MultiheadAttention(embed_dim, num_heads, dropout, bias, batch_first=True)` with
    `need_weights=False`, on each clip's, frame's or position's sequence as `over` says, without copies of the tokens.

    over: "joint", every query to every key; "space" or "time", within the frame or along time at a position; or the
        number of heads, the first ones, that go along time while the others stay in the frame (ViViT, model 4).
    device, dtype: of the parameters.

    Its forward takes query, key and value `[B, N, E]` or `[B, T, S, E]`; "joint" takes others of key and value than of
    query (cross-attention), all else one tensor on the grid, `[B, T, S, E]`, or `[B, N, E]` and grid=(T, S).
    key_padding_mask: one per key: bool, True is ignored; or, as nn.TransformerEncoderLayer makes of that,
    floating-point, -inf is ignored and 0 is not. A query whose keys are all ignored gives what `out_proj` makes of 0,
    not NaN. Returns (output like query, None). There are no weights to return and no pairs to mask: need_weights (not
    the default here), attn_mask and is_causal raise NotImplementedError; wrong sizes and masks ValueError (other
    numbers in a mask, compiled or in a CUDA graph, an assertion of PyTorch's on the device).
    State dict: in_proj_weight, in_proj_bias, out_proj.weight, out_proj.bias; it loads timm's, transformers' and
    diffusers' layouts, too, as `JointAttention` does. Source: Vaswani et al. 2017; ViViT section 3.3.

        out, _ = VideoMultiheadAttention(768, 12, over="time")(x, x, x)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        over: str | int = "joint",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                f"VideoMultiheadAttention: embed_dim={embed_dim} must be a multiple of num_heads={num_heads}"
            )
        super().__init__(embed_dim, num_heads, dropout, bias, batch_first=True, device=device, dtype=dtype)
        known: dict[str | int, int | None] = {"joint": None, "space": 0, "time": num_heads}
        if over not in known and not (isinstance(over, int) and 0 <= over <= num_heads):
            raise ValueError(
                f"VideoMultiheadAttention: over={over!r} is not known; it is 'joint', 'space', 'time', "
                f"or the number of heads along time, 0 to {num_heads}"
            )
        self.over = over
        self.temporal_heads = over if isinstance(over, int) else known[over]
        # nn.TransformerEncoderLayer would, in inference, compute joint attention from our parameters by itself
        self._qkv_same_embed_dim = False

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        grid: tuple[int, int] | None = None,
    ) -> tuple[Tensor, None]:
        asked = [("need_weights=True", need_weights), ("attn_mask", attn_mask is not None), ("is_causal", is_causal)]
        if refused := [name for name, given in asked if given]:
            raise NotImplementedError(
                f"VideoMultiheadAttention: {', '.join(refused)}: no matrix of pairs is made, to return or to mask; "
                "use torch.nn.MultiheadAttention"
            )
        key = query if key is None else key
        value = key if value is None else value
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x.dim() not in (3, 4) or x.shape[-1] != self.embed_dim:
                raise ValueError(
                    f"VideoMultiheadAttention: {name} must be [B, N, E] or [B, T, S, E], E={self.embed_dim}; "
                    f"got {tuple(x.shape)}"
                )
        mask = None if key_padding_mask is None else _kept(key_padding_mask)
        if self.temporal_heads is None:
            return attend(self, query, key, value, None if mask is None else mask.flatten(1), None), None
        x = self._on_grid(query, key, value, grid)
        mask = None if mask is None else mask.reshape(x.shape[:-1])
        return attend(self, x, x, x, mask, self.temporal_heads).reshape(query.shape), None

    def _on_grid(self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int] | None) -> Tensor:
        who = f"VideoMultiheadAttention: over={self.over!r}"
        if query is not key or key is not value:
            raise ValueError(f"{who} takes one tensor as query, key and value; over='joint' takes others")
        if query.dim() == 4:
            return query
        if grid is None or grid[0] * grid[1] != query.shape[1]:
            raise ValueError(
                f"{who} takes [B, T, S, E], or [B, N, E] and grid=(T, S) with T*S=N; "
                f"got {tuple(query.shape)} and grid={grid}"
            )
        return query.unflatten(1, grid)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        _layouts.adopt_multihead(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _kept(key_padding_mask: Tensor) -> Tensor:
    """The ops' mask, True is attended to, of nn.MultiheadAttention's."""
    if key_padding_mask.dtype == torch.bool:
        return ~key_padding_mask
    if not key_padding_mask.is_floating_point():
        raise ValueError(
            "VideoMultiheadAttention: key_padding_mask must be bool, True is ignored, or floating-point, -inf is "
            f"ignored and 0 is not; got {key_padding_mask.dtype}"
        )
    kept = key_padding_mask == 0
    known = (kept | (key_padding_mask == -torch.inf)).all()
    rule = (
        "VideoMultiheadAttention: key_padding_mask adds to the scores; floating-point, it is 0 (kept) or -inf "
        "(ignored); use torch.nn.MultiheadAttention"
    )
    if torch.compiler.is_compiling() or (known.is_cuda and torch.cuda.is_current_stream_capturing()):
        torch.ops.aten._assert_async.msg(known, rule)  # the host cannot wait
    elif not known.is_meta and not known:
        raise ValueError(rule)
    return kept


class TubeletEmbedding(nn.Module):
    """Clip -> tokens with bias, position and class row: `tubelet_embedding` and its parameters.

    Equivalent to `tubelet_embedding(video, weight, bias, position, class_token, ...)`, whose text says what it does.

    embedding: E. tubelet: (f, y, x). channels: C. bias: of the projection.
    grid: (T, S), tokens of a clip: a learned position for each; None for none. class_token: whether there is one.
    per: "clip", tokens `[B, T*S(+1), E]`, or "frame", `[B, T, S(+1), E]`, the class row in every frame and positions of
        one frame, shared by all. mean, std, layout, backend: as for the op. device, dtype: of the parameters.

    Its forward takes video, uint8 or floating point, as `layout` says. State dict: weight `[E, C, f, y, x]`, bias,
    position, class_token; it also loads those of nn.Conv3d, timm (proj, pos_embed, cls_token; a patch's `[E, C, y, x]`
    where f = 1) and transformers (projection or patch_embeddings.projection, position_embeddings, cls_token).
    Raises ValueError for sizes that do not fit, and what the op raises. Source: ViViT section 3.2.

        tokens = TubeletEmbedding(768, grid=(16, 196), class_token=True)(clip_uint8)
    """

    def __init__(
        self,
        embedding: int,
        tubelet: tuple[int, int, int] = (2, 16, 16),
        *,
        channels: int = 3,
        bias: bool = True,
        grid: tuple[int, int] | None = None,
        class_token: bool = False,
        per: str = "clip",
        mean: Normalisation = None,
        std: Normalisation = None,
        layout: str = "BCFYX",
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if per not in ("clip", "frame"):
            raise ValueError(f"TubeletEmbedding: per={per!r} is not known; it is 'clip' or 'frame'")
        self.per, self.mean, self.std, self.layout, self.backend = per, mean, std, layout, backend

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight = parameter(embedding, channels, *tubelet)
        self.bias = parameter(embedding) if bias else None
        self.class_token = parameter(1, 1, embedding) if class_token else None
        self.position = None
        if grid is not None:
            T, S = grid
            self.position = parameter(1, (T * S if per == "clip" else S) + class_token, embedding)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights normal by fan-in (LeCun), positions N(0, 0.02), class token and bias zero."""
        nn.init.normal_(self.weight, std=self.weight[0].numel() ** -0.5)
        for zero in (self.bias, self.class_token):
            if zero is not None:
                nn.init.zeros_(zero)
        if self.position is not None:
            nn.init.normal_(self.position, std=0.02)

    def forward(self, video: Tensor) -> Tensor:
        tokens = tubelet_embedding(
            video, self.weight, self.bias, self.position, self.class_token,
            class_token_per=self.per, mean=self.mean, std=self.std, layout=self.layout, backend=self.backend,
        )  # fmt: skip
        return tokens

    def extra_repr(self) -> str:
        E, C, *tubelet = self.weight.shape
        return f"{E}, tubelet={tuple(tubelet)}, channels={C}, per={self.per!r}, layout={self.layout!r}"

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        _layouts.adopt_tubelets(state_dict, prefix, frames=self.weight.shape[2])
        super()._load_from_state_dict(state_dict, prefix, *rest)
