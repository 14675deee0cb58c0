"""Starting from weights that exist, an image ViT or a ViViT, by one line of a config; frozen parts, slower layers.

[init]
path = "vit.npz"             # an image ViT, or a ViViT of this project, of Hugging Face or of Scenic
freeze = ["tubelets", "blocks.0-5"]
layer_decay = 0.75
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import weights
from .config import ViViTConfig, nearest
from .model import ViViT
from .weights.files import kind_of, read_safetensors

KINDS = ("image_vit", "vivit", "huggingface", "scenic")


@dataclass(frozen=True)
class InitConfig:
    """path: where the weights lie; empty: from scratch. kind: one of KINDS, or "auto", by what is in it.

    kernel, position, temporal_attention: how an image becomes a video, as `weights.init_from_image_vit`; position
        "auto" tiles a grid of the model's size and resizes another. (A ViViT's own positions are always resized.)
    head: "new" (zero, as from scratch) or "keep" (the classes are the ones the weights were trained on).
    attention: of a Scenic checkpoint without class token, whose names do not tell model 1 from model 4.
    frames: the clip's frames that a Scenic checkpoint of model 1, 3 or 4 was trained on; its table does not tell.
    freeze: what stays as it is: "trunk" (all but the head), "tubelets", "position", "blocks", "blocks.0-5", "temporal",
        or the beginning of a parameter's name up to a dot.
    layer_decay: factor of the learning rate from each layer to the one below it; 1: all alike.
    """

    path: str = ""
    kind: str = "auto"
    kernel: str = "central"
    position: str = "auto"
    temporal_attention: str = "copy"
    head: str = "new"
    attention: str = ""
    frames: int = 32
    freeze: tuple[str, ...] = ()
    layer_decay: float = 1.0


def initialise(model: ViViT, config: InitConfig) -> str:
    """Fills `model` as `config` says, all or nothing; returns one line on what came from where. Raises ValueError."""
    path = Path(config.path)
    if not path.exists():
        raise FileNotFoundError(f"init.path={config.path!r}: no such file or folder")
    kind = config.kind if config.kind != "auto" else detect(path)
    if kind == "image_vit":
        flat = weights.read_image_vit(path)
        how = config.position if config.position != "auto" else _image_position(model, flat)
        left = weights.init_from_image_vit(model, flat, config.kernel, how, config.temporal_attention)
        return f"init: image ViT {path}, kernel {config.kernel}, position {how}; from scratch: {_listed(left)}"
    state, source = read_vivit(path, kind, config)
    return f"init: {kind} {path}; {adapt(model, state, source, config.head, str(path))}"


def _listed(names: list[str]) -> str:
    groups = list(dict.fromkeys(name.split(".")[0] for name in names))
    return ", ".join(groups) or "nothing"


def detect(path: Path) -> str:
    """Which of KINDS a file or folder is."""
    if path.is_dir() and (path / "config.json").is_file():
        kind = json.loads((path / "config.json").read_text()).get("model_type")
        return "huggingface" if kind == "vivit" else "image_vit"
    file = path / "model.safetensors" if (path / "model.safetensors").is_file() else path
    if file.is_file() and kind_of(file) == "safetensors":
        tensors, metadata = read_safetensors(file)
        if "vivit_config" in metadata:
            return "vivit"
        return "huggingface" if any(x.dim() == 5 for x in tensors.values()) else "image_vit"
    if path.is_file() and kind_of(path) == "npz":
        return "image_vit"
    return "scenic" if np.ndim(weights.read_scenic(path).get("embedding/kernel", 0)) == 5 else "image_vit"


def read_vivit(path: Path, kind: str, config: InitConfig) -> tuple[dict[str, Tensor], ViViTConfig]:
    """State dict and configuration of a ViViT on disk."""
    if kind == "vivit":
        model = weights.load(path / "model.safetensors" if path.is_dir() else path)
        return model.state_dict(), model.config
    if kind == "huggingface":
        beside = path if path.is_dir() else path.parent
        if not (beside / "config.json").is_file():
            raise ValueError(f"init.path={path}: no config.json beside it, which tells the model's sizes")
        source = weights.hf_config(beside)
        return weights.load_hf(path, source), source
    flat = weights.read_scenic(path)
    source = weights.scenic_config(flat, config.frames, config.attention)
    return weights.load_scenic(flat, source), source


def _image_position(model: ViViT, flat: dict[str, Any]) -> str:
    table = flat.get("Transformer/posembed_input/pos_embedding")
    same = table is not None and table.shape[1] - ("cls" in flat) == model.config.S
    if same:
        return "tile"
    return "resize" if model.per_frame or model.config.T == 1 else "resize_tile"


# ---- from one ViViT to another ----


def adapt(model: ViViT, state: dict[str, Tensor], source: ViViTConfig, head: str, where: str) -> str:
    """Loads a ViViT's weights into one of other frames, rows, columns or classes; returns what was done about them.

    Positions are interpolated along time, rows and columns (linear, ends on ends, class row kept: Scenic's way).
    Temporal layers beyond the model's are left out. Raises ValueError where the models differ otherwise.
    """
    target, wanted, done = model.config, model.state_dict(), []
    if source.tubelet != target.tubelet or source.tokenization != target.tokenization:
        raise ValueError(
            f"init.path={where}: its tubelets are {source.tubelet} ({source.tokenization}), the model's "
            f"{target.tubelet} ({target.tokenization})\n  -> the same tubelet; frames, rows and columns may differ"
        )
    if source.attention != target.attention or source.pool != target.pool:
        raise ValueError(
            f"init.path={where}: a model of attention {source.attention!r}, pool {source.pool!r}; this one is "
            f"{target.attention!r}, {target.pool!r}\n  -> the same attention and pool in [model]"
        )
    new = dict(state)
    if source.grid != target.grid:
        rows, per_frame = int(target.has_class_token), model.per_frame
        old, size = ((1, *c.grid[1:]) if per_frame else c.grid for c in (source, target))
        new["position"] = resize_position(new["position"], old, size, rows)
        if "temporal.position" in new and target.temporal_depth:
            new["temporal.position"] = weights.resize_temporal_position(
                new["temporal.position"], target.T, target.has_class_token
            )
        done.append(f"positions {_times(source.grid)} -> {_times(target.grid)}")
    extra = [name for name in new if name not in wanted and re.match(r"temporal\.blocks\.", name)]
    for name in extra:
        del new[name]
    if extra:
        done.append(f"{source.temporal_depth - target.temporal_depth} temporal layers left out")
    if head == "keep" and source.classes != target.classes:
        raise ValueError(
            f"init.head='keep': {where} has {source.classes} classes, the data {target.classes}\n  -> init.head = 'new'"
        )
    if head == "new":
        new |= {name: value for name, value in wanted.items() if name.startswith("head.")}
        done.append("a new head")
    weights.load_into(model, new, where)
    return ", ".join(done) or "all of it"


def _times(grid: tuple[int, ...]) -> str:
    return "x".join(map(str, grid))


def resize_position(table: Tensor, old: tuple[int, int, int], new: tuple[int, int, int], rows: int = 0) -> Tensor:
    """`[1, rows + T*Y*X, E]` for a grid (T, Y, X) -> the same for another: linear, corners on corners; the `rows` class
    rows in front stay."""
    first, grid = table[:, :rows], table[:, rows:]
    if grid.shape[1] != old[0] * old[1] * old[2]:
        raise ValueError(f"resize_position: {grid.shape[1]} positions are no grid of {_times(old)}")
    x = grid.double().unflatten(1, old).permute(0, 4, 1, 2, 3)  # [1, E, T, Y, X]
    x = F.interpolate(x, size=new, mode="trilinear", align_corners=True)
    return torch.cat([first, x.permute(0, 2, 3, 4, 1).flatten(1, 3).to(table.dtype)], 1)


# ---- frozen parts and slower layers ----

_GROUPS = {"tubelets": ("tubelet_weight", "tubelet_bias"), "position": ("position", "temporal.position")}


def freeze(model: nn.Module, parts: tuple[str, ...]) -> list[str]:
    """Takes the parameters that `parts` name (see InitConfig) out of training; returns their names."""
    names = [name for name, _ in model.named_parameters()]
    frozen = {name for part in parts for name in _named(part, names)}
    if len(frozen) == len(names):
        raise ValueError(f"init.freeze={list(parts)} leaves nothing to train\n  -> leave out one part of it")
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
    return sorted(frozen)


def _named(part: str, names: list[str]) -> list[str]:
    if part == "trunk":
        return [name for name in names if not name.startswith("head.")]
    if part in _GROUPS:
        return [name for name in names if name in _GROUPS[part]]
    spans = [part]
    if found := re.fullmatch(r"(.*blocks)\.(\d+)-(\d+)", part):
        spans = [f"{found[1]}.{i}" for i in range(int(found[2]), int(found[3]) + 1)]
    chosen = []
    for span in spans:
        some = [name for name in names if name == span or name.startswith(f"{span}.")]
        if not some:
            words = ["trunk", *_GROUPS, *dict.fromkeys(".".join(n.split(".")[:k]) for n in names for k in (1, 2))]
            raise ValueError(f"init.freeze: no part {span!r} in this model; {nearest(span, words)}")
        chosen += some
    return chosen


def layer_of(name: str, config: ViViTConfig) -> int:
    """How far above the pixels a parameter is: 0 tubelets, positions; 1.. blocks, then temporal ones; last the head."""
    depth = config.depth
    if found := re.match(r"(temporal\.)?blocks\.(\d+)\.", name):
        return int(found[2]) + 1 + (depth if found[1] else 0)
    if name.startswith(("head.", "representation.", "temporal.norm.")):
        return depth + config.temporal_depth + 1
    if name.startswith(("norm.", "temporal.")):
        return depth
    return 0


def parameter_groups(model: ViViT, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """For an optimizer: matrices with weight decay, the rest (biases, norms, positions) without; with `layer_decay` a
    pair for every layer, `scale` the factor of its learning rate. What is frozen is in none."""
    top = model.config.depth + model.config.temporal_depth + 1
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    if layer_decay == 1.0:
        groups = {(top, True): [], (top, False): []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            layer = layer_of(name, model.config) if layer_decay != 1.0 else top
            groups.setdefault((layer, p.dim() > 1 and p.shape[0] > 1), []).append(p)
    return [
        {"params": ps, "weight_decay": weight_decay if decayed else 0.0, "scale": layer_decay ** (top - layer)}
        for (layer, decayed), ps in groups.items()
    ]
