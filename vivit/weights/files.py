"""Reading weight files of every kind without running anything in them: safetensors, .npz, flax msgpack, torch .bin.

What a file is, is told by its first bytes, not by its name. A pickle is never opened (torch .bin: weights_only).
"""

from __future__ import annotations

import json
import math
import os
import pickle
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_CHUNKED = "__msgpack_chunked_array__"
_TORCH_BEFORE_1_6 = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # torch's magic number, itself a pickle


def kind_of(path: Path) -> str:
    """'safetensors', 'npz', 'torch', 'pickle' or 'other' (a msgpack file has no mark of its own)."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"weights: {path} {what}; give the path of a weight file")
    with open(path, "rb") as file:
        head = file.read(16)
    if head[:2] == b"PK":
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except zipfile.BadZipFile as error:
            raise _broken(path, "a truncated zip archive (.npz or torch .bin)", error) from error
        return "npz" if any(name.endswith(".npy") for name in names) else "torch"
    if head[4:9] == b"\0\0\0\0{":  # the header's length, 64 bits, then JSON
        return "safetensors"
    if head.startswith(_TORCH_BEFORE_1_6):
        return "torch"
    return "pickle" if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") else "other"


def _broken(path: Path, found: str, error: Exception | None = None) -> ValueError:
    detail = f" ({error})" if error else ""
    return ValueError(f"weights: {path} ({path.stat().st_size} bytes) is {found}{detail}; fetch or save it again")


def refuse_pickle(path: Path) -> ValueError:
    return ValueError(
        f"weights: {path} is a bare pickle, which could run any code when read, and is never opened; "
        "save the weights as .safetensors"
    )


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata)."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise _broken(path, "no whole safetensors file", error) from error


def read_torch(path: Path) -> dict[str, Tensor]:
    """A torch .bin holding a flat dict of tensors; read with weights_only, which builds tensors and nothing else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"weights: {path} asks for more than tensors and is refused: it could run code; save it as .safetensors"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise _broken(path, "no whole torch file", error) from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"weights: {path} is no flat dict of tensors; save model.state_dict() as .safetensors")
    return dict(state)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A PyTorch state dict: .safetensors, .bin, a sharded index json, or a folder with one of them."""
    if path.is_dir():
        names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"weights: none of {', '.join(names)} in {path}; give the file itself")
        path = found[0]
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    kind = kind_of(path)
    if kind == "safetensors":
        return read_safetensors(path)[0]
    if kind == "torch":
        return read_torch(path)
    if kind == "pickle":
        raise refuse_pickle(path)
    raise _broken(path, f"neither safetensors nor a torch file, but {'.npz' if kind == 'npz' else 'something else'}")


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        places: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        raise _broken(index, "no safetensors index (no weight_map)", error) from error
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:  # an index may name files beside it, never elsewhere
            raise ValueError(f"weights: {index} points outside its folder, at {name!r}; this is refused")
        tensors |= read_tensors(index.parent / name)
    missing = sorted(set(places) - set(tensors))
    if missing:
        raise ValueError(f"weights: {index} promises {missing[0]!r}, its shards do not hold it; fetch them again")
    return tensors


def read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except ValueError as error:
        if "pickle" in str(error).lower():
            raise refuse_pickle(path) from None
        raise _broken(path, "no whole .npz", error) from error
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise _broken(path, "no whole .npz", error) from error


# -- flax's msgpack: arrays are extension types, large ones cut into chunks -------------------------------------------
def read_msgpack(path: Path) -> Any:
    """The tree in a file of flax.serialization, arrays as numpy (bfloat16 widened to float32)."""
    kind = kind_of(path)
    if kind == "pickle":
        raise refuse_pickle(path)
    if kind != "other":
        raise ValueError(f"weights: {path} is a {kind} file, not a flax (msgpack) checkpoint; use that format's reader")
    try:
        tree = msgpack.unpackb(path.read_bytes(), ext_hook=_extension, raw=False, strict_map_key=False)
        return _join_chunks(tree)
    except (ValueError, TypeError, KeyError, msgpack.exceptions.UnpackException) as error:
        raise _broken(path, "no whole flax (msgpack) checkpoint", error) from error


def _extension(code: int, data: bytes) -> Any:
    if code == 1:
        return _array(data)
    if code == 2:
        return complex(*msgpack.unpackb(data))
    if code == 3:
        return _array(data)[()]
    raise ValueError(f"extension type {code} is none of flax's")


def _array(data: bytes) -> np.ndarray:
    shape, dtype, values = msgpack.unpackb(data, raw=True)
    dtype = dtype.decode() if isinstance(dtype, bytes) else dtype
    if dtype == "bfloat16":
        bits = np.frombuffer(values, "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(shape)
    if np.dtype(dtype).hasobject:
        raise ValueError(f"an array of {dtype} is refused")
    return np.frombuffer(values, dtype).reshape(shape)


def _join_chunks(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return [_join_chunks(v) for v in tree] if isinstance(tree, list) else tree
    if _CHUNKED in tree:
        shape, chunks = _in_order(tree["shape"]), _in_order(tree["chunks"])
        joined = np.concatenate([np.asarray(c).reshape(-1) for c in chunks])
        if joined.size != math.prod(shape):
            raise ValueError(f"chunks of {joined.size} values for an array of {shape}")
        return joined.reshape(shape)
    return {key: _join_chunks(value) for key, value in tree.items()}


def _in_order(items: Any) -> list:
    """flax writes a tuple as {'0': a, '1': b}."""
    return [items[str(i)] for i in range(len(items))] if isinstance(items, dict) else list(items)


# -- writing ----------------------------------------------------------------------------------------------------------
def write_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Whole or not at all: written beside `path`, then moved over it."""
    plain = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}  # shared memory is refused
    with _atomic(path) as temporary:
        save_file(plain, temporary, metadata)


def write_text(text: str, path: Path) -> None:
    with _atomic(path) as temporary:
        Path(temporary).write_text(text)


class _atomic:
    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> str:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, self.temporary = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        os.close(handle)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(self.temporary, 0o666 & ~umask)  # mkstemp's files are private
        return self.temporary

    def __exit__(self, failed, *_):
        if failed is None:
            with open(self.temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(self.temporary, self.path)
        else:
            os.unlink(self.temporary)
