"""Hugging Face's ViViT (model 1 with class token): its names, both the hub's and those of transformers 5's modules."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ViViTConfig
from .files import read_tensors, write_safetensors, write_text
from .flax import StateDict, sizes

_TANH_GELU = ("gelu_fast", "gelu_new", "gelu_pytorch_tanh")  # three names, one formula
# ours -> the hub's; {i} is the layer
_WHOLE = {
    "class_token": "embeddings.cls_token",
    "position": "embeddings.position_embeddings",
    "tubelet_weight": "embeddings.patch_embeddings.projection.weight",
    "tubelet_bias": "embeddings.patch_embeddings.projection.bias",
    **{f"norm.{x}": f"layernorm.{x}" for x in ("weight", "bias")},
    **{f"head.{x}": f"classifier.{x}" for x in ("weight", "bias")},
}
_LAYER = {
    "norms.0": "layernorm_before",
    "attentions.0.proj": "attention.output.dense",
    "norm_mlp": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
# transformers 5's modules -> the hub's, within a layer
_V5 = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def hub_name(name: str, prefix: str = "vivit.") -> str:
    """A parameter's name as on the hub, without the model's prefix, from the hub's or transformers 5's."""
    name = name.removeprefix(prefix)
    found = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if not found:
        return name
    layer, module, kind = found.groups()
    return f"encoder.layer.{layer}.{_V5.get(module, module)}.{kind}"


def v5_name(name: str) -> str:
    """The hub's name (with or without prefix) as transformers 5 calls its module."""
    found = re.fullmatch(r"(.*)encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", name)
    if not found:
        return name
    prefix, layer, module, kind = found.groups()
    return f"{prefix}layers.{layer}.{ {v: k for k, v in _V5.items()}.get(module, module) }.{kind}"


def load_hf(source: Mapping[str, Tensor] | str | Path, config: ViViTConfig) -> StateDict:
    """Hugging Face ViViT weights -> state dict of `ViViT(config)`, dtypes kept.

    source: a state dict, or a path: .safetensors, a folder with model.safetensors (or its sharded index), a .bin (read
        with weights_only). Names as on the hub or as transformers 5's modules, with or without `vivit.`.
    A pooler (VivitModel's, which no classifier reads) is left out, a missing classifier becomes zero, as from scratch;
    both with a warning. Raises ValueError for models other than 1 with class token, and for names that differ.

        load_into(model, load_hf("folder", config), "folder")
    """
    _check_model("load_hf", config)
    where = "the state dict" if isinstance(source, Mapping) else str(source)
    tensors = source if isinstance(source, Mapping) else read_tensors(Path(source))
    hub = {hub_name(name): x for name, x in tensors.items()}
    if len(hub) != len(tensors):
        raise ValueError(f"load_hf: {where} names a parameter twice, with and without `vivit.`; keep one of the two")
    _leave_out_and_fill(hub, config, where)
    state: StateDict = {ours: _take(hub, theirs, where) for ours, theirs in _WHOLE.items()}
    for i in range(config.depth):
        layer = f"encoder.layer.{i}"
        for kind in ("weight", "bias"):
            qkv = [_take(hub, f"{layer}.attention.attention.{x}.{kind}", where) for x in ("query", "key", "value")]
            state[f"blocks.{i}.attentions.0.qkv.{kind}"] = torch.cat(qkv)
            for ours, theirs in _LAYER.items():
                state[f"blocks.{i}.{ours}.{kind}"] = _take(hub, f"{layer}.{theirs}.{kind}", where)
    if hub:
        raise ValueError(
            f"load_hf: {where} has {sorted(hub)[0]!r}, for which a model of depth {config.depth} has no place; "
            "is it a ViViT of this size?"
        )
    return state


def _take(hub: dict[str, Tensor], name: str, where: str) -> Tensor:
    if name not in hub:
        raise ValueError(
            f"load_hf: {where} has no {name!r} (nor its name in transformers 5); is it a whole ViViT of this depth?"
        )
    return hub.pop(name).detach().clone()


def _leave_out_and_fill(hub: dict[str, Tensor], config: ViViTConfig, where: str) -> None:
    if any(name.startswith("pooler.") for name in hub):
        for name in [n for n in hub if n.startswith("pooler.")]:
            del hub[name]
        warnings.warn(f"load_hf: {where}: pooler.dense is left out, no classifier reads it", stacklevel=3)
    E, classes = config.embedding, sum(config.head_sizes)
    like = next(iter(hub.values()), torch.empty(0))
    if not any(name.startswith("classifier.") for name in hub):
        hub |= {"classifier.weight": like.new_zeros(classes, E), "classifier.bias": like.new_zeros(classes)}
        warnings.warn(f"load_hf: {where} has no classifier; the head is zero and must be trained", stacklevel=3)
    names = [
        f"encoder.layer.{i}.attention.attention.{x}.bias"
        for i in range(config.depth)
        for x in ("query", "key", "value")
    ]
    if not set(names) & set(hub):  # qkv_bias=False: a zero bias is the same model
        hub |= {name: like.new_zeros(E) for name in names}


def _check_model(caller: str, config: ViViTConfig) -> None:
    reasons = [
        (set(config.layers) != {"joint"}, f"attention={config.attention!r} is not 'joint' (model 1)"),
        (not config.has_class_token, f"pool={config.pool!r} has no class token to classify by"),
        (config.tokenization != "tubelet", f"tokenization={config.tokenization!r} is not 'tubelet'"),
        (bool(config.representation), f"representation={config.representation} puts a layer before the classifier"),
        (len(config.head_sizes) > 1, f"classes={config.classes} are two heads"),
    ]
    broken = [reason for is_broken, reason in reasons if is_broken]
    if broken:
        raise ValueError(
            f"{caller}: Hugging Face's ViViT is model 1 with class token and one head only; here {'; '.join(broken)}. "
            "Use vivit.weights.save and load for this model"
        )


def hf_config(source: Mapping[str, Any] | str | Path) -> ViViTConfig:
    """The ViViTConfig of a Hugging Face config.json (a dict, the file, or its folder)."""
    where = "config" if isinstance(source, Mapping) else str(source)
    if not isinstance(source, Mapping):
        path = Path(source) / "config.json" if Path(source).is_dir() else Path(source)
        try:
            source = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"hf_config: {path} is no JSON ({error}); give a Hugging Face config.json") from error
    assert isinstance(source, Mapping)
    if source.get("model_type", "vivit") != "vivit":
        raise ValueError(f"hf_config: {where} describes a {source['model_type']!r}, not a vivit")
    act = source.get("hidden_act", "gelu_fast")
    if act not in _TANH_GELU:
        raise ValueError(
            f"hf_config: hidden_act={act!r} in {where}; ViViT here has the tanh GELU only ({', '.join(_TANH_GELU)})"
        )
    image = source.get("image_size", 224)
    height, width = image if isinstance(image, list | tuple) else (image, image)
    return ViViTConfig(
        frames=source.get("num_frames", 32),
        height=height,
        width=width,
        channels=source.get("num_channels", 3),
        tubelet=tuple(source.get("tubelet_size", (2, 16, 16))),
        embedding=source.get("hidden_size", 768),
        depth=source.get("num_hidden_layers", 12),
        heads=source.get("num_attention_heads", 12),
        mlp=source.get("intermediate_size", 3072),
        classes=source.get("num_labels") or len(source.get("id2label") or ()) or 2,  # 2 is transformers' default
        dropout=source.get("hidden_dropout_prob", 0.0),
        attention_dropout=source.get("attention_probs_dropout_prob", 0.0),
        eps=source.get("layer_norm_eps", 1e-6),
    )


def hf_state_dict(state: Mapping[str, Tensor], config: ViViTConfig, names: str = "hub") -> StateDict:
    """`ViViT(config)`'s state dict under Hugging Face's names: "hub" (and transformers 4) or "v5"; gradients too."""
    if names not in ("hub", "v5"):
        raise ValueError(f"hf_state_dict: names={names!r} is not known; it is 'hub' or 'v5'")
    prefixed = {theirs: state[ours] for ours, theirs in _WHOLE.items()}
    for i in range(config.depth):
        layer = f"encoder.layer.{i}"
        for kind in ("weight", "bias"):
            parts = state[f"blocks.{i}.attentions.0.qkv.{kind}"].chunk(3)
            for x, part in zip(("query", "key", "value"), parts, strict=True):
                prefixed[f"{layer}.attention.attention.{x}.{kind}"] = part
            for ours, theirs in _LAYER.items():
                prefixed[f"{layer}.{theirs}.{kind}"] = state[f"blocks.{i}.{ours}.{kind}"]
    full = {name if name.startswith("classifier.") else f"vivit.{name}": x for name, x in prefixed.items()}
    return full if names == "hub" else {v5_name(name): x for name, x in full.items()}


def save_hf(
    model: nn.Module | Mapping[str, Tensor], config: ViViTConfig, folder: str | Path, names: str = "hub"
) -> None:
    """Writes config.json and model.safetensors that `VivitForVideoClassification.from_pretrained(folder)` loads.

    names: "hub", which every transformers reads, or "v5", its newer module names. Training settings that Hugging Face
    does not have (drop_path) are not written. Raises ValueError for other models than 1 with class token.
    """
    _check_model("save_hf", config)
    state = model.state_dict() if isinstance(model, nn.Module) else model
    folder = Path(folder)
    tensors = hf_state_dict(state, config, names)
    classes = config.head_sizes[0]
    if tuple(tensors["classifier.weight"].shape) != (classes, config.embedding):
        raise ValueError(
            f"save_hf: the head is {sizes(tensors['classifier.weight'].shape)}, the configuration says "
            f"[{classes}, {config.embedding}]; give the configuration of this model"
        )
    labels = {i: f"LABEL_{i}" for i in range(classes)}
    fields = {
        "architectures": ["VivitForVideoClassification"],
        "model_type": "vivit",
        "image_size": config.height if config.height == config.width else [config.height, config.width],
        "num_frames": config.frames,
        "tubelet_size": list(config.tubelet),
        "num_channels": config.channels,
        "hidden_size": config.embedding,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp,
        "hidden_act": "gelu_fast",
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "layer_norm_eps": config.eps,
        "qkv_bias": True,
        "id2label": labels,
        "label2id": {name: i for i, name in labels.items()},
        "dtype": str(tensors["classifier.weight"].dtype).removeprefix("torch."),
    }
    write_safetensors(tensors, folder / "model.safetensors", {"format": "pt"})
    write_text(json.dumps(fields, indent=2) + "\n", folder / "config.json")
