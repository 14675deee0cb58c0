"""This project's own file, a .safetensors with the configuration in it; and `load_into`, the one way into a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import ViViTConfig, from_dict
from ..model import ViViT
from .files import kind_of, read_safetensors, refuse_pickle, write_safetensors
from .flax import sizes

_KEY = "vivit_config"


def load_into(model: nn.Module, state_dict: Mapping[str, Tensor], source: str | Path) -> None:
    """Copies `state_dict` into `model`, all of it or nothing, converting to the model's dtypes and device.

    source: where it came from, for the message. Raises ValueError that names the first parameter that is missing, left
    over or of another shape (with both shapes); the model is then as before.
    """
    _check(model.state_dict(), state_dict, str(source))
    model.load_state_dict(dict(state_dict), strict=True)


def _check(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str) -> None:
    advice = "build the model with the configuration these weights were made with"
    for name, target in wanted.items():
        if name not in found:
            missing = sum(n not in found for n in wanted)
            raise ValueError(
                f"load_into: {source} has no {name!r} {sizes(target.shape)} ({missing} of {len(wanted)} are missing); "
                f"{advice}"
            )
        value = found[name]
        if not isinstance(value, Tensor) or value.shape != target.shape:
            what = sizes(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"load_into: {name!r} in {source} is {what}, the model's is {sizes(target.shape)}; {advice}"
            )
        if not value.is_floating_point():
            raise ValueError(f"load_into: {name!r} in {source} is {value.dtype}, not floating point; {advice}")
    extra = sorted(set(found) - set(wanted))
    if extra:
        raise ValueError(
            f"load_into: {source} has {extra[0]!r} {sizes(found[extra[0]].shape)} ({len(extra)} such), "
            f"the model has no such parameter; {advice}"
        )


def save(model: ViViT, path: str | Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Weights and configuration in one .safetensors, written whole or not at all; `load(path)` gives the model back.

    weights: the model's, where it holds but a part of them (FSDP); None takes its state dict.
    """
    metadata = {"format": "pt", _KEY: json.dumps(model.config.to_dict())}
    write_safetensors(model.state_dict() if weights is None else weights, Path(path), metadata)


def load(path: str | Path, backend: str | None = None) -> ViViT:
    """The model in a file of `save`, on the CPU, in the dtypes it was saved in; `backend` as for `ViViT`.

    Raises FileNotFoundError, or ValueError that says what the file is instead (truncated, another format, a pickle).
    """
    path = Path(path)
    kind = kind_of(path)
    if kind == "pickle":
        raise refuse_pickle(path)
    if kind != "safetensors":
        raise ValueError(
            f"load: {path} ({path.stat().st_size} bytes) is no whole .safetensors file; give one that "
            "vivit.weights.save wrote, or read another format with load_hf or read_scenic"
        )
    tensors, metadata = read_safetensors(path)
    if _KEY not in metadata:
        raise ValueError(
            f"load: {path} holds weights without a ViViT configuration; build the model and use load_hf with load_into"
        )
    config = from_dict(ViViTConfig, json.loads(metadata[_KEY]), where=f"load: {path}")
    with torch.device("meta"):
        model = ViViT(config, backend)
    _check(model.state_dict(), tensors, str(path))
    model.load_state_dict(tensors, strict=True, assign=True)
    return model
