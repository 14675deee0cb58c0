"""What other libraries call the parameters of an attention and of a tubelet embedding: renamed in a state dict, in
place, before a module of modules.py loads it. A known name stays; one that nobody knows is left for PyTorch to report.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor

State = MutableMapping[str, Tensor]

# Of an attention, relative to its module.
_PACKED = ("in_proj_{}", "attention.qkv.{}")  # nn.MultiheadAttention; transformers' TimeSformer
_SPLIT = (
    ("q_proj", "k_proj", "v_proj"),  # transformers 5
    ("query", "key", "value"),
    ("attention.query", "attention.key", "attention.value"),  # transformers 4, VideoMAE
    ("to_q", "to_k", "to_v"),  # diffusers
)
_BIASES = (("q_bias", "v_bias"), ("attention.q_bias", "attention.v_bias"))  # BEiT, VideoMAE: no bias of keys
_OUT = ("out_proj", "o_proj", "output.dense", "to_out.0")


def adopt_attention(state: State, prefix: str) -> None:
    """To timm's names, this project's: qkv.* and proj.*."""
    for kind in ("weight", "bias"):
        if f"{prefix}qkv.{kind}" not in state:
            found = _packed(state, prefix, kind)
            if found is not None:
                state[f"{prefix}qkv.{kind}"] = found
        _rename(state, f"{prefix}proj.{kind}", [f"{prefix}{name}.{kind}" for name in _OUT])


def _packed(state: State, prefix: str, kind: str) -> Tensor | None:
    """q, k and v one below the other, taken out of `state`; None where it has none."""
    for name in _PACKED:
        if (key := prefix + name.format(kind)) in state:
            return state.pop(key)
    names = [tuple(f"{name}.{kind}" for name in split) for split in _SPLIT]
    if kind == "bias":
        names += [(q, "", v) for q, v in _BIASES]
    for q, k, v in names:
        if prefix + q in state and prefix + v in state and (prefix + k in state or kind == "bias"):
            first, last = state.pop(prefix + q), state.pop(prefix + v)
            middle = state.pop(prefix + k, None)
            return torch.cat([first, torch.zeros_like(first) if middle is None else middle, last])
    return None


def _rename(state: State, ours: str, theirs: list[str]) -> None:
    for key in theirs:
        if key in state and ours not in state:
            state[ours] = state.pop(key)


def adopt_multihead(state: State, prefix: str) -> None:
    """To those of nn.MultiheadAttention."""
    adopt_attention(state, prefix)
    for kind in ("weight", "bias"):
        _rename(state, f"{prefix}in_proj_{kind}", [f"{prefix}qkv.{kind}"])
        _rename(state, f"{prefix}out_proj.{kind}", [f"{prefix}proj.{kind}"])


_CONVOLUTIONS = ("proj", "projection", "patch_embeddings.projection", "patch_embed.proj")
_TUBELETS = {
    "weight": [f"{name}.weight" for name in _CONVOLUTIONS],
    "bias": [f"{name}.bias" for name in _CONVOLUTIONS],
    "position": ["position_embeddings", "pos_embed"],
    "class_token": ["cls_token"],
}


def adopt_tubelets(state: State, prefix: str, frames: int) -> None:
    """To weight, bias, position and class_token; frames: of a tubelet. The kernel of an image `[E, C, y, x]` is one
    of a tubelet of one frame."""
    for ours, theirs in _TUBELETS.items():
        _rename(state, prefix + ours, [prefix + name for name in theirs])
    weight = state.get(f"{prefix}weight")
    if weight is not None and weight.dim() == 4 and frames == 1:
        state[f"{prefix}weight"] = weight.unsqueeze(2)
