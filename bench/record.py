"""A measurement as one JSON line, and the files they are kept in: bench/results/<device>.jsonl.

A record stands on its own: what was run, on what machine, how long, at what error, with which ceilings measured in the
same run. It is written the moment it is known, so a run that is killed loses nothing.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .cases import PACKAGES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

# `wrong` (outside the error budget) is shown and never stored; the others without a time are results, too.
STATUSES = ("ok", "missing", "refused", "crashed", "out of memory", "timed out")


@dataclass
class Record:
    """
    kind: "op" (one operation), "model" (a whole model; `op` is its step, "forward" or "train"), "memory" (its peak).
    backend: ours ("torch", "triton", "cuda", "cpu", or "<name>@<git ref>") or a peer's name.
    ours: a backend of this project. ideal: a peer given its inputs in the layout it likes, so without its copies.
    status, reason: "ok", or why there is no time.
    ms: median, p20, p80 and n of one call; on a GPU the device's time, and `host` what the host took to launch it.
    rounds: the median of each round, taken in turns with the other backends.
    flops, bytes, exps: the work, computed from the case. share: of each ceiling, and `bound` the one it is nearest to.
    ceilings: copy_gbps, matmul_tflops (of this dtype), exp_gops, measured in the same run.
    error: share of the budget used (<= 1), max, rms, and `checked`, the share of the output that was compared.
    memory: bytes; peak above what the inputs hold, and on a GPU reserved.
    machine: device, driver, torch, triton, cuda, python, threads, malloc. clocks: before and after, throttled.
    source: hash of the kernel's source (ours only): a record whose hash is not the tree's speaks of an older kernel.
    """

    run: str
    date: str
    kind: str
    op: str
    case: str
    shape: str
    dtype: str
    direction: str
    backend: str
    ours: bool
    status: str
    ideal: bool = False
    reason: str = ""
    ms: dict[str, float] = field(default_factory=dict)
    rounds: list[float] = field(default_factory=list)
    flops: int = 0
    bytes: int = 0
    exps: int = 0
    share: dict[str, float] = field(default_factory=dict)
    bound: str = ""
    ceilings: dict[str, float] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    clocks: dict[str, Any] = field(default_factory=dict)
    commit: str = ""
    dirty: bool = False
    source: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What two records of one measurement share; the later one counts."""
        return self.kind, self.op, self.case, self.dtype, self.direction, self.backend, str(self.machine.get("malloc"))

    def refuse_wrong(self) -> None:
        """Outside the error budget the status becomes "wrong", which is never stored."""
        if self.error.get("share", 0.0) > 1:
            self.status = "wrong"
            self.reason = (
                f"{self.error['of']} uses {self.error['share']:.3g} of the error budget; at most 1 may be kept"
            )

    @property
    def group(self) -> tuple[str, ...]:
        """What may be compared: one run, one case, one dtype and direction."""
        return self.run, self.kind, self.op, self.case, self.dtype, self.direction

    def to_json(self) -> str:
        """What differs from the defaults."""
        values, fields = dataclasses.asdict(self), dataclasses.fields(self)
        defaults = {x.name: x.default for x in fields if x.default is not dataclasses.MISSING}
        defaults |= {x.name: x.default_factory() for x in fields if x.default_factory is not dataclasses.MISSING}
        kept = (name for name, value in values.items() if name not in defaults or value != defaults[name])
        return json.dumps({name: values[name] for name in kept})


def now() -> str:
    """As records date themselves, in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def new_run() -> str:
    """A name for a run that no other has."""
    return f"{now()}-{uuid.uuid4().hex[:4]}"


def from_json(line: str) -> Record:
    return Record(**json.loads(line))


def append(path: Path, record: Record) -> None:
    """One whole line, or nothing: safe against a kill in between."""
    if record.status not in STATUSES:
        raise ValueError(
            f"bench: a record with status {record.status!r} is not stored; it is one of {', '.join(STATUSES)}"
        )
    if record.status == "ok" and not record.error.get("share", float("inf")) <= 1.0:
        raise ValueError(f"bench: {record.backend} on {record.case} has no error within the budget: not stored")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(record.to_json() + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> Iterator[Record]:
    """The records of a file, or of every .jsonl in a folder; a last line cut short by a kill is skipped."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    for file in files:
        lines = file.read_text().splitlines()
        for number, line in enumerate(lines, 1):
            try:
                yield from_json(line)
            except (ValueError, TypeError) as error:
                if number < len(lines):
                    raise ValueError(f"{file.name}:{number}: not a record: {error}") from error


def latest(records: Iterable[Record]) -> list[Record]:
    """Of every key the last record, in the order of the file."""
    last: dict[tuple, Record] = {}
    for record in records:
        last.pop((record.machine.get("device"), *record.key), None)
        last[(record.machine.get("device"), *record.key)] = record
    return list(last.values())


# What a time of ours speaks of: the files of its op and backend, and what the ops share.
_FILES = {"torch": "composed", "triton": "triton_kernels", "cuda": "cuda_kernels", "cpu": "cpu_kernels"}
# Of what the attention ops share, what belongs to one backend; and what only chooses one.
_OWN = {
    "torch": ("blockwise.py", "groups.py", "probabilities.py", "sdpa.py"),
    "triton": ("triton_*.py", "tiles.py"),
    "cuda": ("cuda_*.py",),
    "cpu": ("cpu_*.py",),
}
_CHOICE = ("support.py",)
# Backends of the native library, each with a folder in csrc/. Of a library only a fresh one is loaded (_native.py), so
# its sources say what it is.
_NATIVE = {"cuda", "cpu"}
_NATIVE_SUFFIXES = (".cpp", ".h", ".cu", ".cuh", ".py")  # .py: how it is compiled


def source_files(op: str, backend: str) -> list[Path]:
    """The files that decide what `backend` of `op` runs; for a whole model (op "model") those of every op and its own.

    A whole model whose backend was chosen per call (backend "auto") depends on all of them."""
    package = ROOT / "kernels" / "vivit_kernels"
    folders = sorted(set(PACKAGES.values())) if op == "model" else [PACKAGES[op]]
    backends = [backend] if backend in _FILES else list(_FILES)
    names = [*(_FILES[name] for name in backends), "op", "tiles"]
    files = [package / folder / f"{name}.py" for folder in folders for name in names]
    if op != "tubelet":
        others = [pattern for name, own in _OWN.items() if name not in backends for pattern in own]
        shared = sorted(package.glob("_attention/*.py"))
        files += [path for path in shared if not any(map(path.match, (*others, *_CHOICE)))] + [package / "_philox.py"]
    if op == "model":
        files += [ROOT / "vivit" / "model.py", ROOT / "vivit" / "memory.py"]
        files += [package / f"{name}.py" for name in ("linear", "_linear_native", "low_memory")]
        files += sorted(package.glob("_rows/*.py"))
        if "triton" in backends:  # the only one by which a model takes it
            files += [package / "temporal_block" / f"{name}.py" for name in ("triton_kernels", "op", "tiles")]
    if native := _NATIVE.intersection(backends):
        csrc, others = ROOT / "csrc", _NATIVE - native
        sources = (path for path in sorted(csrc.rglob("*")) if path.suffix in _NATIVE_SUFFIXES)
        files += [path for path in sources if path.relative_to(csrc).parts[0] not in others]
    return [path for path in files if path.is_file()]


def source_hash(op: str, backend: str) -> str:
    """Of the code of those files: comments on lines of their own and blank lines do not count."""
    digest = hashlib.sha256()
    for path in source_files(op, backend.partition("@")[0]):
        lines = (line.strip() for line in path.read_text().splitlines())
        comment = "#" if path.suffix == ".py" else "//"  # in C++ a # begins code
        code = [line for line in lines if line and not line.startswith(comment)]
        digest.update("\n".join([path.name, *code]).encode())
    return digest.hexdigest()[:12]


def is_stale(record: Record) -> bool:
    """Whether the kernel changed since (also when the record was made from an uncommitted tree that is gone)."""
    if not record.ours or "@" in record.backend:
        return False
    return record.source != source_hash(record.op if record.kind == "op" else "model", record.backend)
