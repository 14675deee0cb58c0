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
