"""Flax parameters (flat dict, paths joined by '/') read piece by piece into the names of vivit/model.py.

Every piece is a permutation of its source's entries, so gradients convert by the same functions.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

StateDict = dict[str, Tensor]


def as_tensor(x: Any) -> Tensor:
    """A tensor of its own memory and of the array's dtype."""
    return x.detach().clone() if isinstance(x, Tensor) else torch.from_numpy(np.array(x, order="C"))


def sizes(shape: Iterable[int]) -> str:
    return "[" + ", ".join(str(s) for s in shape) + "]"


class FlatReader:
    """Hands out parameters by path and shape, and remembers which ones nobody asked for."""

    def __init__(self, caller: str, flat: Mapping[str, Any], hint: str):
        self.caller, self.flat, self.hint = caller, flat, hint
        self.read: set[str] = set()

    def take(self, path: str, *shape: int) -> Tensor:
        """The parameter at `path`, which must have exactly this shape (any, if none is given)."""
        if path not in self.flat:
            close = difflib.get_close_matches(path, list(self.flat), n=1, cutoff=0.8)
            found = f"the nearest name is {close[0]!r}" if close else f"there are {len(self.flat)} others"
            raise ValueError(f"{self.caller}: parameter {path!r} is missing ({found}); {self.hint}")
        value = as_tensor(self.flat[path])
        if shape and tuple(value.shape) != shape:
            raise ValueError(
                f"{self.caller}: parameter {path!r} is {sizes(value.shape)}, {sizes(shape)} is needed; {self.hint}"
            )
        self.read.add(path)
        return value

    def finish(self) -> None:
        """All must have been asked for: one left over means that the configuration describes another model."""
        left = sorted(set(self.flat) - self.read)
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise ValueError(f"{self.caller}: no place in this model for {left[0]!r}{more}; {self.hint}")


def dense(reader: FlatReader, path: str, inputs: int, outputs: int) -> StateDict:
    return {
        "weight": reader.take(f"{path}/kernel", inputs, outputs).T.contiguous(),
        "bias": reader.take(f"{path}/bias", outputs),
    }


def layer_norm(reader: FlatReader, path: str, width: int) -> StateDict:
    return {"weight": reader.take(f"{path}/scale", width), "bias": reader.take(f"{path}/bias", width)}


def mlp(reader: FlatReader, path: str, width: int, hidden: int) -> StateDict:
    return named("fc1", dense(reader, f"{path}/Dense_0", width, hidden)) | named(
        "fc2", dense(reader, f"{path}/Dense_1", hidden, width)
    )


def attention(reader: FlatReader, path: str, width: int, heads: int) -> StateDict:
    """query, key, value kernels `[E, H, D]` stacked into qkv `[3E, E]`; out kernel `[H, D, E]`."""
    size = width // heads
    weights, biases = [], []
    for name in ("query", "key", "value"):
        # a kernel with other heads has the same number of entries: only its shape tells
        weights.append(reader.take(f"{path}/{name}/kernel", width, heads, size).reshape(width, width).T)
        biases.append(reader.take(f"{path}/{name}/bias", heads, size).reshape(width))
    return {
        "qkv.weight": torch.cat(weights),
        "qkv.bias": torch.cat(biases),
        "proj.weight": reader.take(f"{path}/out/kernel", heads, size, width).reshape(width, width).T.contiguous(),
        "proj.bias": reader.take(f"{path}/out/bias", width),
    }


def named(prefix: str, state: StateDict) -> StateDict:
    return {f"{prefix}.{name}": value for name, value in state.items()}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict -> flat dict, keys joined by '/'."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else str(key)
        flat.update(flatten(value, path) if isinstance(value, Mapping) else {path: value})
    return flat
