"""Scenic's ViViT checkpoints: the four models by their flax names, and the msgpack file they come in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ViViTConfig
from . import flax
from .files import read_msgpack
from .flax import FlatReader, StateDict

_ROOTS = {"joint": "Transformer", "factorized_encoder": "SpatialTransformer"}


def load_scenic(flat_params: Mapping[str, np.ndarray], config: ViViTConfig) -> StateDict:
    """Scenic's parameters (flat dict of flax paths, as `read_scenic` gives) -> state dict of `ViViT(config)`.

    All four models with class token or pooling, both orders of model 3, uniform frames, `pre_logits`, the average-pool
    baseline. Two heads are one Dense in Scenic, split in the order of `config.classes`. dtypes are kept. Raises
    ValueError for a parameter that is missing, left over or of another shape; heads are compared, not only sizes.

        load_into(model, load_scenic(read_scenic("checkpoint"), config), "checkpoint")
    """
    if isinstance(config.attention, tuple):
        raise ValueError(
            "load_scenic: Scenic has no mixed model (attention is a list here); load one of the four models"
        )
    reader = FlatReader("load_scenic", flat_params, "check that the configuration describes this checkpoint's model")
    E, class_rows = config.embedding, int(config.has_class_token)
    per_frame = config.attention == "factorized_encoder"
    root = _ROOTS.get(config.attention, "Transformer")
    state = _tubelets(reader, config)
    state["position"] = reader.take(
        f"{root}/posembed_input/pos_embedding", 1, config.S * (1 if per_frame else config.T) + class_rows, E
    )
    if config.has_class_token:
        state["class_token"] = reader.take("cls_SpatialTransformer" if per_frame else "cls", 1, 1, E)
    for i, over in enumerate(config.layers):
        block = encoder_block(reader, f"{root}/encoderblock_{i}", over, E, config.heads, config.mlp)
        state |= flax.named(f"blocks.{i}", block)
    state |= flax.named("norm", flax.layer_norm(reader, f"{root}/encoder_norm", E))
    if config.temporal_depth:
        state |= flax.named("temporal", _temporal_encoder(reader, config))
    width = E
    if config.representation:
        state |= flax.named("representation", flax.dense(reader, "pre_logits", E, config.representation))
        width = config.representation
    state |= flax.named("head", flax.dense(reader, "output_projection", width, sum(config.head_sizes)))
    reader.finish()
    return state


def scenic_config(flat_params: Mapping[str, np.ndarray], frames: int = 32, attention: str = "") -> ViViTConfig:
    """What `load_scenic` needs to know of a checkpoint, from its parameters.

    frames: of the clips that models 1, 3 and 4 were trained on (one table holds all positions; 32 in every published
        one). attention: of a checkpoint without class token, whose names models 1 and 4 share.
    Frames are taken to be square. Two heads show as one: replace `classes` by the pair. Raises ValueError.
    """
    kernel = flat_params.get("embedding/kernel")
    if kernel is None or np.ndim(kernel) != 5:
        raise ValueError("scenic_config: no embedding/kernel of five dimensions; is this a ViViT with tubelets?")
    f, y, x, channels, E = kernel.shape
    per_frame = any(name.startswith("SpatialTransformer/") for name in flat_params)
    root = "SpatialTransformer" if per_frame else "Transformer"
    has_class_token = ("cls_SpatialTransformer" if per_frame else "cls") in flat_params
    names = [n for n in flat_params if n.startswith(f"{root}/encoderblock_0/") and n.endswith("query/kernel")]
    over_time = any("_time/" in name for name in names)
    if per_frame or over_time:
        attention = "factorized_encoder" if per_frame else "factorized_self_attention"
    elif not attention:
        if not has_class_token:
            raise ValueError(
                "scenic_config: without class token models 1 and 4 have the same names; give attention='joint' or "
                "'factorized_dot_product'"
            )
        attention = "joint"
    tokens = flat_params[f"{root}/posembed_input/pos_embedding"].shape[1] - has_class_token
    temporal = flat_params.get("TemporalTransformer/posembed_input/pos_embedding")
    if temporal is not None:
        frames = f * (temporal.shape[1] - has_class_token)
    spatial = tokens if per_frame else tokens // (frames // f)
    side = round(spatial**0.5)
    if side * side * (1 if per_frame else frames // f) != tokens:
        raise ValueError(
            f"scenic_config: {tokens} positions are no square grid of {frames} frames, {f} to a tubelet; give frames="
        )
    values: dict[str, Any] = {"temporal_depth": _layers(flat_params, "TemporalTransformer")} if per_frame else {}
    if temporal is not None:
        first = "TemporalTransformer/encoderblock_0"
        values["temporal_heads"] = flat_params[f"{first}/MultiHeadDotProductAttention_0/query/kernel"].shape[1]
        values["temporal_mlp"] = flat_params[f"{first}/MlpBlock_0/Dense_0/kernel"].shape[1]
    mlp = "MlpBlock" if over_time else "MlpBlock_0"
    return ViViTConfig(
        frames=frames,
        height=side * y,
        width=side * x,
        channels=channels,
        tubelet=(f, y, x),
        attention=attention,
        pool="cls" if has_class_token else "mean",
        embedding=E,
        depth=_layers(flat_params, root),
        heads=flat_params[names[0]].shape[1],
        mlp=flat_params[f"{root}/encoderblock_0/{mlp}/Dense_0/kernel"].shape[1],
        classes=len(flat_params["output_projection/bias"]),
        representation=len(flat_params["pre_logits/bias"]) if "pre_logits/bias" in flat_params else None,
        **values,
    )


def _layers(flat_params: Mapping[str, np.ndarray], root: str) -> int:
    return len({name.split("/")[1] for name in flat_params if name.startswith(f"{root}/encoderblock_")})


def encoder_block(reader: FlatReader, path: str, over: str, width: int, heads: int, hidden: int) -> StateDict:
    """One block; `over` is what it attends over, in the words of `ViViTConfig.layers`."""
    steps = {"space_time": ("space", "time"), "time_space": ("time", "space")}.get(over)
    state: StateDict = {}
    for i, step in enumerate(steps or ("0",)):
        state |= flax.named(f"norms.{i}", flax.layer_norm(reader, f"{path}/LayerNorm_{step}", width))
        attention = flax.attention(reader, f"{path}/MultiHeadDotProductAttention_{step}", width, heads)
        state |= flax.named(f"attentions.{i}", attention)
    norm, mlp = ("LayerNorm_mlp", "MlpBlock") if steps else ("LayerNorm_1", "MlpBlock_0")
    state |= flax.named("norm_mlp", flax.layer_norm(reader, f"{path}/{norm}", width))
    return state | flax.named("mlp", flax.mlp(reader, f"{path}/{mlp}", width, hidden))


def _tubelets(reader: FlatReader, config: ViViTConfig) -> StateDict:
    f, y, x = config.tubelet
    E, C = config.embedding, config.channels
    if config.tokenization == "uniform":  # Scenic stacks the frames and convolves them as one image
        kernel = reader.take("embedding/kernel", y, x, C, E)[None]
    else:
        kernel = reader.take("embedding/kernel", f, y, x, C, E)
    return {
        "tubelet_weight": kernel.permute(4, 3, 0, 1, 2).contiguous(),
        "tubelet_bias": reader.take("embedding/bias", E),
    }


def _temporal_encoder(reader: FlatReader, config: ViViTConfig) -> StateDict:
    root, E = "TemporalTransformer", config.embedding
    heads, mlp = config.temporal_heads or config.heads, config.temporal_mlp or config.mlp
    rows = config.T + config.has_class_token
    state = {"position": reader.take(f"{root}/posembed_input/pos_embedding", 1, rows, E)}
    if config.has_class_token:
        state["class_token"] = reader.take(f"cls_{root}", 1, 1, E)
    for i in range(config.temporal_depth):
        state |= flax.named(f"blocks.{i}", encoder_block(reader, f"{root}/encoderblock_{i}", "joint", E, heads, mlp))
    return state | flax.named("norm", flax.layer_norm(reader, f"{root}/encoder_norm", E))


def read_scenic(path: str | Path) -> dict[str, np.ndarray]:
    """The parameters in a Scenic checkpoint: a msgpack file, or a folder with `checkpoint` or the last `checkpoint_N`.

    Returns a flat dict for `load_scenic`. Old files keep parameters under optimizer/target, newer ones under params.
    Raises ValueError, naming the file, for anything else, truncated files included. Nothing in the file is executed.
    """
    path = _checkpoint_file(Path(path))
    tree = read_msgpack(path)
    for keys in (("optimizer", "target"), ("params",)):
        node: Any = tree
        for key in keys:
            node = node.get(key) if isinstance(node, Mapping) else None
        if isinstance(node, Mapping) and node:
            if set(node) == {"params"}:  # flax's variable collections
                node = node["params"]
            return {k: v for k, v in flax.flatten(node).items() if isinstance(v, np.ndarray)}
    found = ", ".join(sorted(map(str, tree))[:8]) if isinstance(tree, Mapping) else type(tree).__name__
    raise ValueError(
        f"read_scenic: {path} holds neither optimizer/target nor params (found: {found}); "
        "is it a Scenic training checkpoint?"
    )


def _checkpoint_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    numbered = [p for p in path.glob("checkpoint_*") if p.suffix == "" and p.name[len("checkpoint_") :].isdigit()]
    if (path / "checkpoint").is_file():
        return path / "checkpoint"
    if not numbered:
        raise FileNotFoundError(
            f"read_scenic: no file `checkpoint` or `checkpoint_N` in {path}; give the file or its folder"
        )
    return max(numbered, key=lambda p: int(p.name[len("checkpoint_") :]))
