"""Starting a ViViT from an image ViT (section 3.4 of the paper), as Scenic does when it loads one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import ViViTConfig, nearest
from ..model import ViViT
from . import flax
from .files import kind_of, read_npz, read_tensors
from .flax import FlatReader, StateDict, sizes
from .huggingface import hub_name
from .scenic import read_scenic

# JAX's image ViTs number the modules of a block otherwise than Scenic, and call the head `head`
_MODULES = {"MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0", "LayerNorm_2": "LayerNorm_1"}
_MODULES |= {"MlpBlock_3": "MlpBlock_0", "head": "output_projection"}
_HF_BLOCK = {
    "layernorm_before": "LayerNorm_0",
    "layernorm_after": "LayerNorm_1",
    "intermediate.dense": "MlpBlock_0/Dense_0",
    "output.dense": "MlpBlock_0/Dense_1",
    "attention.output.dense": "MultiHeadDotProductAttention_0/out",
    **{f"attention.attention.{x}": f"MultiHeadDotProductAttention_0/{x}" for x in ("query", "key", "value")},
}


def init_from_image_vit(
    model: ViViT,
    flat_params: Mapping[str, Any],
    kernel: str = "central",
    position: str = "tile",
    temporal_attention: str = "copy",
) -> list[str]:
    """Copies an image ViT into `model`, in place and all or nothing; returns the sorted names that it left alone.

    flat_params: as `read_image_vit` gives, Scenic's names.
    kernel: "central" puts the image's patch kernel at index f//2 of the tubelet's frames and 0 elsewhere; "inflate"
        puts kernel/f at every frame.
    position: "tile" repeats the grid over time, "resize" interpolates it in space (bilinear, corners aligned),
        "resize_tile" does both. Tables of equal shape are copied whole. The class row is kept where both have one.
    temporal_attention: model 3's second attention: "copy" of the image's, or "zero_out", the same with a zero output
        projection, so that the layer starts as the image's. (With q, k and v zero too it would never train: their
        gradients stay 0.) Other models have no such step.
    Left alone: the head, model 3's temporal norm, model 2's temporal encoder and class tokens. (Model 2's spatial class
    token keeps its value, as in Scenic, though its position row is copied.) Raises ValueError where sizes do not fit.
    """
    for name, value, allowed in (
        ("kernel", kernel, ("central", "inflate")),
        ("position", position, ("tile", "resize", "resize_tile")),
        ("temporal_attention", temporal_attention, ("copy", "zero_out")),
    ):
        if value not in allowed:
            raise ValueError(f"init_from_image_vit: {name}={value!r} is not known; {nearest(str(value), allowed)}")
    config = model.config
    flat_params = _with_heads(flat_params, config.heads)
    reader = FlatReader("init_from_image_vit", flat_params, "the image ViT must have the model's width, depth and mlp")
    depth = len({path.split("/")[1] for path in flat_params if path.startswith("Transformer/encoderblock_")})
    if depth != config.depth:
        raise ValueError(
            f"init_from_image_vit: the image ViT has {depth} blocks, the model {config.depth}; give one of this depth"
        )
    new = _tubelets(reader, config, kernel)
    new["position"] = _position(reader, model, position)
    if config.has_class_token and not model.per_frame and "cls" in flat_params:
        new["class_token"] = reader.take("cls", 1, 1, config.embedding)
    for i, over in enumerate(config.layers):
        new |= flax.named(
            f"blocks.{i}", _block(reader, f"Transformer/encoderblock_{i}", over, config, temporal_attention)
        )
    new |= flax.named("norm", flax.layer_norm(reader, "Transformer/encoder_norm", config.embedding))
    if config.representation and "pre_logits/kernel" in flat_params:
        representation = flax.dense(reader, "pre_logits", config.embedding, config.representation)
        new |= flax.named("representation", representation)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in new.items():
            parameters[name].copy_(value)
    return sorted(set(parameters) - set(new))


def _tubelets(reader: FlatReader, config: ViViTConfig, how: str) -> StateDict:
    f, y, x = config.tubelet
    C, E = config.channels, config.embedding
    bias = reader.take("embedding/bias", E)
    if np.ndim(reader.flat.get("embedding/kernel", 0)) == 5:
        kernel = reader.take("embedding/kernel", f, y, x, C, E)
    else:
        image = reader.take("embedding/kernel", y, x, C, E)
        kernel = image.new_zeros(f, y, x, C, E)
        if how == "central":
            kernel[f // 2] = image
        else:
            kernel[:] = image / f
    return {"tubelet_weight": kernel.permute(4, 3, 0, 1, 2), "tubelet_bias": bias}


def _block(reader: FlatReader, path: str, over: str, config: ViViTConfig, temporal_attention: str) -> StateDict:
    E, heads = config.embedding, config.heads
    steps = {"space_time": ("space", "time"), "time_space": ("time", "space")}.get(over, (over,))
    attention = flax.attention(reader, f"{path}/MultiHeadDotProductAttention_0", E, heads)
    state = flax.named("norm_mlp", flax.layer_norm(reader, f"{path}/LayerNorm_1", E))
    state |= flax.named("mlp", flax.mlp(reader, f"{path}/MlpBlock_0", E, config.mlp))
    for i, step in enumerate(steps):
        state |= flax.named(f"attentions.{i}", attention)
        if step != "time":
            state |= flax.named(f"norms.{i}", flax.layer_norm(reader, f"{path}/LayerNorm_0", E))
        elif temporal_attention == "zero_out":
            for name in ("proj.weight", "proj.bias"):
                state[f"attentions.{i}.{name}"] = torch.zeros_like(attention[name])
    return state


def _with_heads(flat: Mapping[str, Any], heads: int) -> dict[str, Any]:
    """Kernels `[E, E]`, of a source that does not know its heads, as flax's `[E, H, D]` and `[H, D, E]`."""
    shaped = dict(flat)
    for path, x in flat.items():
        found = re.search(r"MultiHeadDotProductAttention_0/(query|key|value|out)/kernel$", path)
        if found and np.ndim(x) == 2:
            into, out = x.shape
            shaped[path] = x.reshape((heads, -1, out) if found[1] == "out" else (into, heads, -1))
            if found[1] != "out":
                bias = path.replace("/kernel", "/bias")
                shaped[bias] = flat[bias].reshape(heads, -1)
    return shaped


# -- positions --------------------------------------------------------------------------------------------------------
def _position(reader: FlatReader, model: ViViT, how: str) -> Tensor:
    """The image's table for the model's tokens: (class row), then time slowest, rows, columns."""
    config, target = model.config, model.position
    table = reader.take("Transformer/posembed_input/pos_embedding")
    if table.shape == target.shape:
        return table
    E, has_cls = config.embedding, "cls" in reader.flat
    rows, grid = table[:, : int(has_cls)], table[0, int(has_cls) :]
    side, wanted = round(len(grid) ** 0.5), (config.grid[1], config.grid[2])
    T = 1 if model.per_frame else config.T
    if table.shape[0] != 1 or table.shape[-1] != E or side * side != len(grid):
        raise ValueError(
            f"init_from_image_vit: the image's positions {sizes(table.shape)} are no square grid"
            f"{' with a class row' if has_cls else ''} of width {E}; give a ViT of square images and of this width"
        )
    if how != "tile" and (how == "resize_tile" or T == 1):
        grid = _resize_grid(grid.unflatten(0, (side, side)), wanted).flatten(0, 1)
    if len(grid) != config.S or (how == "resize" and T != 1):
        advice = "resize_tile" if T > 1 else "resize"
        raise ValueError(
            f"init_from_image_vit: position={how!r} cannot make {T}x{wanted[0]}x{wanted[1]} tokens of a {side}x{side} "
            f"grid; use position={advice!r}"
        )
    grid = grid.repeat(T, 1)[None]  # [1, T*S, E], the whole grid for every temporal index
    if not config.has_class_token:
        return grid
    if not has_cls:  # nothing to copy: the model's own class row stays
        rows = target.detach()[:, :1].to(grid)
    return torch.cat([rows, grid], 1)


def _resize_grid(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """`[rows, columns, E]` -> `[*size, E]`, linear, corners on corners."""
    wide = grid.double().permute(2, 0, 1)[None]
    return F.interpolate(wide, size=size, mode="bilinear", align_corners=True)[0].permute(1, 2, 0).to(grid.dtype)


def resize_temporal_position(table: Any, tokens: int, cls: bool = True) -> Any:
    """A temporal encoder's positions `[1, T(+1), E]` for `tokens` tokens: linear, ends on ends, class row kept.

    table: numpy array or tensor; the answer is of the same kind and dtype.

        state["temporal.position"] = resize_temporal_position(state["temporal.position"], 2 * config.T)
    """
    x = torch.as_tensor(table)
    if x.dim() != 3 or x.shape[0] != 1 or x.shape[1] <= cls or tokens < 1:
        raise ValueError(
            f"resize_temporal_position: table must be [1, T{'+1' if cls else ''}, E] and tokens positive, "
            f"got {sizes(x.shape)} and {tokens}"
        )
    rows, line = x[:, : int(cls)], x[:, int(cls) :]
    line = F.interpolate(line.double().mT, size=tokens, mode="linear", align_corners=True).mT.to(x.dtype)
    resized = torch.cat([rows, line], 1)
    return resized.numpy() if isinstance(table, np.ndarray) else resized


# -- reading ----------------------------------------------------------------------------------------------------------
def read_image_vit(path: str | Path) -> dict[str, Any]:
    """An image ViT's parameters under Scenic's names, flat, for `init_from_image_vit`.

    path: a .npz of the JAX models (ImageNet-21k, "augreg"), Hugging Face's ViT (.safetensors, .bin, a folder; names of
    the hub or of transformers 5), or a Scenic checkpoint. Hugging Face's weights do not tell their heads: with a
    config.json beside them the kernels come as `[E, H, D]`, else as `[E, E]`. Raises ValueError for other files.
    """
    path = Path(path)
    if path.is_dir() and not any(
        (path / n).is_file() for n in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    ):
        return _canonical(read_scenic(path))
    kind = "torch" if path.is_dir() or path.name.endswith(".index.json") else kind_of(path)
    if kind == "npz":
        return _canonical(read_npz(path))
    if kind == "other":
        return _canonical(read_scenic(path))
    config = (path if path.is_dir() else path.parent) / "config.json"
    heads = json.loads(config.read_text()).get("num_attention_heads") if config.is_file() else None
    return _from_hf(read_tensors(path), heads, path)


def image_vit_of(model: ViViT) -> dict[str, np.ndarray]:
    """A ViViT of single frames as the image ViT that it is, under Scenic's names, as `read_image_vit` gives them.

        np.savez("vit.npz", **image_vit_of(model))  # then init.path = "vit.npz" starts a ViViT from it

    model: joint attention, `frames = 1`, `tubelet = (1, y, x)`. Raises ValueError for another.
    """
    config = model.config
    if config.T != 1 or config.tubelet[0] != 1 or config.attention != "joint":
        raise ValueError(
            f"image_vit_of: a model of {config.attention!r} over {config.T} times of tubelets {config.tubelet} is no "
            "image ViT\n  -> attention='joint', frames=1, tubelet=(1, y, x)"
        )
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    flat = {
        "embedding/kernel": state["tubelet_weight"][:, :, 0].permute(2, 3, 1, 0),
        "embedding/bias": state["tubelet_bias"],
        "Transformer/posembed_input/pos_embedding": state["position"],
    }
    if config.has_class_token:
        flat["cls"] = state["class_token"]
    pairs = {"norm": "Transformer/encoder_norm", "head": "output_projection"}
    for i in range(config.depth):
        pairs |= {
            f"blocks.{i}.{ours}": f"Transformer/encoderblock_{i}/{theirs}"
            for ours, theirs in (
                ("norms.0", "LayerNorm_0"), ("norm_mlp", "LayerNorm_1"), ("mlp.fc1", "MlpBlock_0/Dense_0"),
                ("mlp.fc2", "MlpBlock_0/Dense_1"), ("attentions.0.proj", "MultiHeadDotProductAttention_0/out"),
            )
        }  # fmt: skip
        for kind in ("weight", "bias"):
            parts = state[f"blocks.{i}.attentions.0.qkv.{kind}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                path = f"Transformer/encoderblock_{i}/MultiHeadDotProductAttention_0/{name}"
                flat |= _flax_parameter(path, kind, part, config.heads)
    for ours, theirs in pairs.items():
        for kind in ("weight", "bias"):
            flat |= _flax_parameter(theirs, kind, state[f"{ours}.{kind}"], config.heads)
    return {name: x.contiguous().numpy() for name, x in flat.items()}


def _canonical(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    named = {}
    for key, value in flat.items():
        key = re.sub(r"^(opt/target/|params/)+", "", key)
        named["/".join(_MODULES.get(part, part) for part in key.split("/"))] = value
    if "embedding/kernel" not in named:
        raise ValueError(
            f"read_image_vit: no 'embedding/kernel' among {len(flat)} parameters ({', '.join(list(flat)[:4])}, ...); "
            "is this an image ViT?"
        )
    return named


def _from_hf(tensors: Mapping[str, Tensor], heads: int | None, path: Path) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tensors.items():
        name, x = hub_name(key, "vit."), value.detach()
        found = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", name)
        if found and found[2] in _HF_BLOCK:
            block = f"Transformer/encoderblock_{found[1]}/{_HF_BLOCK[found[2]]}"
            flat |= _flax_parameter(block, found[3], x, heads)
        elif name.startswith("layernorm."):
            flat |= _flax_parameter("Transformer/encoder_norm", name.split(".")[1], x, heads)
        elif name.startswith("classifier."):
            flat |= _flax_parameter("output_projection", name.split(".")[1], x, heads)
        elif name == "embeddings.patch_embeddings.projection.weight":
            flat["embedding/kernel"] = x.permute(2, 3, 1, 0)
        elif name == "embeddings.patch_embeddings.projection.bias":
            flat["embedding/bias"] = x
        elif name == "embeddings.position_embeddings":
            flat["Transformer/posembed_input/pos_embedding"] = x
        elif name == "embeddings.cls_token":
            flat["cls"] = x
        elif not name.startswith("pooler.") and name != "embeddings.mask_token":
            raise ValueError(
                f"read_image_vit: {key!r} in {path} is no name of a Hugging Face ViT; is this another model?"
            )
    return {
        name: x.contiguous().numpy() if x.dtype != torch.bfloat16 else x.float().numpy() for name, x in flat.items()
    }


def _flax_parameter(path: str, kind: str, x: Tensor, heads: int | None) -> dict[str, Tensor]:
    if "LayerNorm" in path or path.endswith("encoder_norm"):
        return {f"{path}/{'scale' if kind == 'weight' else 'bias'}": x}
    projects_in = path.endswith(("/query", "/key", "/value"))
    if kind == "bias":
        return {f"{path}/bias": x.reshape(heads, -1) if projects_in and heads else x}
    kernel = x.T
    if heads and projects_in:
        kernel = kernel.reshape(len(kernel), heads, -1)
    if heads and path.endswith("MultiHeadDotProductAttention_0/out"):
        kernel = kernel.reshape(heads, -1, kernel.shape[-1])
    return {f"{path}/kernel": kernel}
