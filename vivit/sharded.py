"""The state of a run of several processes on disk: each writes its parts, and any number of processes reads them.

    checkpoint-000120/       of step 120, by torch.distributed.checkpoint: a file a process, and .metadata

The folder gets its name when all of it is on the disk, and only then the one before goes: a kill at any moment leaves a
whole one. A run of one process writes checkpoint.pt (checkpoint.py); each kind reads the other's. Like that file, such
a folder is read without executing anything: it holds tensors alone, and of .metadata, a pickle, only the classes that
describe where they lie are made.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, parallel
from .parallel import World

_NAME = re.compile(r"checkpoint-(\d+)")
_ABOUT = "about"  # what is no tensor: JSON, as bytes


def latest(out: Path) -> Path | None:
    """The state from which a run goes on: a folder of several processes, or checkpoint.pt of one."""
    single = out / "checkpoint.pt"
    folders = _folders(out)
    if not (folders and single.exists()):
        return folders[-1] if folders else single if single.exists() else None
    # killed between a new one and the removal of the old: both are whole
    return single if checkpoint.load(single)["step"] >= _step(folders[-1]) else folders[-1]


def _step(folder: Path) -> int:
    found = _NAME.fullmatch(folder.name)
    return int(found[1]) if found else -1


def _folders(out: Path) -> list[Path]:
    return sorted((path for path in out.glob("checkpoint-*") if path.is_dir() and _step(path) >= 0), key=_step)


def forget(out: Path, but: Path | None = None) -> None:
    """Removes the folders of other steps, and what a kill left of one half written."""
    for folder in [*_folders(out), *out.glob(".checkpoint-*.part")]:
        if folder != but:
            shutil.rmtree(folder, ignore_errors=True)


def save(world: World, out: Path, state: dict[str, Any]) -> None:
    """state: as checkpoint.save takes it, without `random`, which is each process's own. All processes call it.

    Raises OSError in all of them where one cannot write.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save as write

    folder = out / f"checkpoint-{state['step']:06d}"
    if world.from_first(folder.exists()):
        return  # of this very step: what has this name is whole
    part = folder.with_name(f".{folder.name}.part")
    if world.first:
        shutil.rmtree(part, ignore_errors=True)
    tensors = {**_flat(world, state), **_random(world)}
    world.barrier()
    try:
        write(tensors, storage_writer=FileSystemWriter(part, sync_files=True))
    except (CheckpointException, OSError) as error:
        if world.first:
            shutil.rmtree(part, ignore_errors=True)
        raise checkpoint.unwritten(folder, _cause(error)) from error
    if world.first:
        _synchronise(part)
        os.replace(part, folder)
        _synchronise(out)
        (out / "checkpoint.pt").unlink(missing_ok=True)
        forget(out, but=folder)
    world.barrier()


def _cause(error: BaseException) -> Exception:
    failures = getattr(error, "failures", {})
    first = next(iter(failures.values()), (error,))[0]
    return first if isinstance(first, Exception) else OSError(str(first))


def _synchronise(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flat(world: World, state: dict[str, Any]) -> dict[str, Tensor]:
    tensors = {f"{part}.{name}": t for part in ("model", "average") for name, t in state.get(part, {}).items()}
    for number, values in state["optimizer"]["state"].items():
        tensors |= {f"optimizer.{number}.{key}": v for key, v in values.items() if isinstance(v, Tensor)}
    plain = {key: value for key, value in state.items() if key not in ("model", "average", "optimizer")}
    text = json.dumps({**plain, "processes": world.size, "sequence_parallel": world.sequence})
    return {**tensors, _ABOUT: torch.tensor(list(text.encode()), dtype=torch.uint8)}


def _random(world: World) -> dict[str, Tensor]:
    states = {f"random.{world.rank}.cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states[f"random.{world.rank}.cuda"] = torch.cuda.get_rng_state()
    return states


# ---- reading ----


def laid_out(state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of checkpoint.pt, its tensors as those of model and optimizer lie on the processes."""
    named = model.state_dict()
    numbered = [p for group in optimizer.param_groups for p in group["params"]]
    weights = {k: parallel.laid_out(v, named[k]) if k in named else v for k, v in state["model"].items()}
    values = {
        number: {k: parallel.laid_out(v, numbered[number]) if isinstance(v, Tensor) else v for k, v in kept.items()}
        for number, kept in state["optimizer"]["state"].items()
    }
    return {**state, "model": weights, "optimizer": {**state["optimizer"], "state": values}}


def load(world: World, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state in `folder` as `checkpoint.load` gives it, its tensors laid out as those of model and optimizer are.

    `random` is None where it was written by another number of processes. All processes call it. Raises ValueError for a
    folder that is no whole checkpoint.
    """
    reader = _reader(folder)
    try:
        metadata = reader.read_metadata().state_dict_metadata
        about = {_ABOUT: torch.empty(metadata[_ABOUT].size, dtype=torch.uint8)}
        _read(about, reader, world)
        state = json.loads(bytes(about[_ABOUT].tolist()))
        same = (state["processes"], state["sequence_parallel"]) == (world.size, world.sequence)
        found = _places(metadata, model, optimizer, f"random.{world.rank}." if same else "-")
        _read(found, reader, world)
    except (pickle.UnpicklingError, KeyError, AttributeError, EOFError, ValueError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{folder}: no whole checkpoint of `vivit train` ({reason})") from error
    return {**state, **_nested(found, optimizer, same)}


def _read(places: dict[str, Tensor], reader: Any, world: World) -> None:
    from torch.distributed.checkpoint.state_dict_loader import load as read

    with warnings.catch_warnings():  # that there is one process is what is meant
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        read(places, storage_reader=reader, no_dist=not world.together)


def _places(metadata: Any, model: nn.Module, optimizer: torch.optim.Optimizer, random: str) -> dict[str, Tensor]:
    """An empty tensor for each stored one: like the parameter that it is of, where it has its shape."""
    named = model.state_dict()
    numbered = [p for group in optimizer.param_groups for p in group["params"]]
    places: dict[str, Tensor] = {}
    for name, kept in metadata.items():
        kind, _, rest = name.partition(".")
        if kind == _ABOUT or (kind == "random" and not name.startswith(random)):
            continue
        like = numbered[int(rest.partition(".")[0])] if kind == "optimizer" else named.get(rest)
        dtype = kept.properties.dtype
        if like is not None and like.shape == kept.size:
            places[name] = torch.empty_like(like, dtype=dtype, requires_grad=False)
        else:
            places[name] = torch.empty(kept.size, dtype=dtype)
    return places


def _nested(found: dict[str, Tensor], optimizer: torch.optim.Optimizer, same: bool) -> dict[str, Any]:
    state: dict[str, Any] = {"model": {}, "average": {}, "optimizer": optimizer.state_dict()}
    values: dict[int, dict[str, Tensor]] = {}
    random: dict[str, Tensor] = {}
    for name, tensor in found.items():
        kind, _, rest = name.partition(".")
        first, _, last = rest.partition(".")
        if kind == "optimizer":
            values.setdefault(int(first), {})[last] = tensor
        elif kind == "random":
            random[last] = tensor
        else:
            state[kind][rest] = tensor
    state["optimizer"]["state"] = values
    return {**state, "random": _as_one(random) if same else None}


def _as_one(random: dict[str, Tensor]) -> dict[str, Any]:
    return {"cpu": random["cpu"], "cuda": random.get("cuda")}


def _reader(folder: Path) -> Any:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with open(folder / ".metadata", "rb") as file:
                metadata = _Description(file).load()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    return Reader(folder)


_DCP = "torch.distributed.checkpoint"
_DESCRIBE = {
    f"{_DCP}.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_DCP}.filesystem": {"_StorageInfo"},
    "torch": {"Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}


class _Description(pickle.Unpickler):
    """Makes what says where tensors lie, and nothing else. Names are whole: "os.system" of a module is none of them."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _DESCRIBE.get(module, ()):
            raise pickle.UnpicklingError(f".metadata names {module}.{name}, which describes no tensor")
        return super().find_class(module, name)
