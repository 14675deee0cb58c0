"""Training state on disk: written whole or not at all, read without executing anything."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

VERSION = 1


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file to write, synchronised and renamed to `path` when it is done.

    A kill, an error or a full disk at any moment leaves the old one or the new one, the last two nothing beside it.
    Raises OSError that names `path` and what to do.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch's writer reports a failed write as RuntimeError
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        raise unwritten(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def unwritten(path: Path, error: Exception) -> OSError:
    cause = error if isinstance(error, OSError) else error.__context__
    code = cause.errno if isinstance(cause, OSError) else None
    reason = os.strerror(code) if code else str(error).splitlines()[0]
    free = shutil.disk_usage(path.parent).free / 2**20 if path.parent.is_dir() else 0
    kept = "; the one before is whole" if path.exists() else ""
    return OSError(
        f"{path} cannot be written: {reason}, {free:,.0f} MiB free{kept}"
        "\n  -> make room, or another --out; then --resume goes on from the last checkpoint"
    )


def save(state: dict[str, Any], path: Path) -> None:
    """To a temporary file, synchronised, renamed over `path`: a kill at any moment leaves the old or the new one."""
    with whole(path) as temporary, open(temporary, "wb") as file:
        torch.save({"version": VERSION, **state}, file)


def load(path: Path) -> dict[str, Any]:
    """Tensors, numbers and text only (weights_only): anything else is refused, not unpickled."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: no checkpoint of `vivit train` ({reason})") from error
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise ValueError(f"{path}: no checkpoint of this version of `vivit train`")
    return state


def random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if isinstance(state["cuda"], torch.Tensor):  # of the one device of a process among several
        torch.cuda.set_rng_state(state["cuda"])
    elif state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
