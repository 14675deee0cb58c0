"""The native library as a file: where it lies, what it says of itself, why it may not be used.

Standard library only, and nothing of this package: setup.py and csrc/build.py load this file by its path, where PyTorch
or the package itself may be absent.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import mmap
import os
import platform
import sys
from pathlib import Path
from typing import NamedTuple

VARIABLE = "VIVIT_KERNELS_LIBRARY"  # another file than FILE, such as one built with sanitizers
PACKAGE = Path(__file__).resolve().parent
NAME, NOTE = "_C.so", "_C.why"  # NOTE: why a build made no library
MARK = b"vivit-kernels-library:"  # in the library's data, before its record
SUFFIXES = (".cpp", ".h", ".cu", ".cuh", ".py")
_ELF_HEADER = 64  # bytes of a 64-bit one


class Record(NamedTuple):
    """What a library says of its own build."""

    version: str  # of this package
    sources: str  # hash_of(csrc)
    kind: str  # "cpu" or "cuda"
    why: str  # for what reason that kind
    compiler: str
    torch: str  # whose headers it was compiled with


class Problem(NamedTuple):
    reason: str
    remedy: str


def checkout() -> Path | None:
    """The folder that holds kernels/ and csrc/, where this package is used from its sources; None where installed."""
    root = PACKAGE.parent.parent
    return root if PACKAGE.parent.name == "kernels" and (root / "csrc" / "build.py").is_file() else None


def hash_of(csrc: Path) -> str:
    """Of everything that decides what the library does: the sources and their build. 0.7 ms for 10 files of 100 KB."""
    digest = hashlib.sha256()
    for path in sorted(path for path in csrc.rglob("*") if path.suffix in SUFFIXES):
        digest.update(f"{path.relative_to(csrc).as_posix()}\0".encode())
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def record_text(record: Record) -> str:
    """What a library has to contain, without its terminating NUL."""
    return MARK.decode() + json.dumps(record._asdict())


def read_record(path: Path) -> Record | None:
    """The record of a library, or None of any other file."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = data.find(MARK)
        end = data.find(b"\0", start)
        text = data[start + len(MARK) : end] if 0 <= start < end else b""
    try:
        return Record(**json.loads(text))
    except (ValueError, TypeError):
        return None


def library_path() -> Path:
    """Where the library of this install has to lie."""
    chosen = os.environ.get(VARIABLE)
    return Path(chosen).absolute() if chosen else PACKAGE / NAME


def problem() -> Problem | None:
    """Why the library of this install may not be loaded; None if nothing speaks against it."""
    return problem_of(library_path(), checkout())


def unloadable(message: str) -> Problem:
    """What the system's loader says against a library that `problem` let pass."""
    return Problem(f"{_shown(library_path())} is foreign: it does not load: {message}", _remedy(checkout()))


def problem_of(path: Path, root: Path | None) -> Problem | None:
    """Why the library at `path` may not be loaded by this package, which lies in the checkout `root` or is installed.

    Loading a wrong library could end the process, so all that can be told from the file is told before.
    """
    rebuild = _remedy(root)
    if sys.platform != "linux":
        return Problem(f"the native library is for Linux, this is {sys.platform}", "none: everything runs without it")
    if not path.is_file():
        return _missing(path, rebuild)
    if foreign := _foreign(path):
        return Problem(foreign, rebuild)
    record = read_record(path)
    if record is None:
        return Problem(f"{_shown(path)} is foreign: it is not vivit_kernels' library, or not whole", rebuild)
    if root is not None:
        if record.sources != hash_of(root / "csrc"):
            return Problem(f"{_shown(path)} is stale: csrc/ has changed since it was built", rebuild)
    elif (here := _installed_version()) not in (None, record.version):
        return Problem(f"{_shown(path)} belongs to vivit-kernels {record.version}, this is {here}", rebuild)
    return None


def _remedy(root: Path | None) -> str:
    if root is not None:
        return "make build (or: python csrc/build.py)"
    return (
        "reinstall it from source beside torch, where g++ and ninja are: "
        "pip install --no-build-isolation --no-cache-dir --no-deps --force-reinstall <vivit-kernels>"
    )


def _missing(path: Path, rebuild: str) -> Problem:
    reason, note = f"the native library is not built: {_shown(path)} is missing", path.with_name(NOTE)
    why, first = (note.read_text().splitlines() + ["", ""])[:2] if note.is_file() else ("", "")
    return Problem(f"{reason} ({why})" if why else reason, f"{first}, then {rebuild}" if first else rebuild)


def _foreign(path: Path) -> str:
    """What keeps a file from being a library of this process: the format, the machine it is for, a missing end."""
    with path.open("rb") as file:
        found, size = file.read(_ELF_HEADER), os.fstat(file.fileno()).st_size
    with open("/proc/self/exe", "rb") as file:
        own = file.read(_ELF_HEADER)
    if len(found) < _ELF_HEADER or found[:4] != own[:4]:
        return f"{_shown(path)} is foreign: it is not an ELF library"
    class_and_order, machine = slice(4, 6), slice(18, 20)
    if found[class_and_order] != own[class_and_order] or found[machine] != own[machine]:
        return f"{_shown(path)} is foreign: it is built for another machine than this {platform.machine()}"
    sections_at, each, count = (int.from_bytes(found[i:j], sys.byteorder) for i, j in ((40, 48), (58, 60), (60, 62)))
    if size < sections_at + each * count:  # they are the last of a file; to touch what is not there ends the process
        return f"{_shown(path)} is cut off: {size} bytes of {sections_at + each * count}"
    return ""


def _installed_version() -> str | None:
    """Of this package; None where that is not known, or it was copied with its library, as .ci/hub.py does."""
    if (PACKAGE / "metadata.json").is_file():
        return None
    try:
        return importlib.metadata.version("vivit-kernels")
    except importlib.metadata.PackageNotFoundError:
        return None


def _shown(path: Path) -> str:
    """From the package on: messages are the same wherever it is installed."""
    return str(path.relative_to(PACKAGE.parent)) if path.is_relative_to(PACKAGE) else str(path)
