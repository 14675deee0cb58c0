"""What may be compared with what: the records of one run and one case beside each other, and their ratios, unrounded.

One place for every table and picture:

    for group in groups(records):
        for record in group.ours:
            group.ratio(record)  # 6.8: the best peer takes 6.8 times as long; below 1 this project is slower
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from .cases import CASES, DIRECTIONS
from .record import Record, is_stale


def is_timed(record: Record) -> bool:
    return record.status == "ok" and record.ms.get("median", 0.0) > 0.0


@dataclass(frozen=True)
class Group:
    """Records of one run, machine, case, dtype and direction, each backend once; empty groups do not exist."""

    records: tuple[Record, ...]

    @property
    def first(self) -> Record:
        """Any of them: for what they have in common."""
        return self.records[0]

    @cached_property
    def timed(self) -> list[Record]:
        """Everything that has a time, the fastest first."""
        return sorted(filter(is_timed, self.records), key=lambda record: record.ms["median"])

    @property
    def ours(self) -> list[Record]:
        """Backends of this project as the tree has them, the fastest first (`triton@<git ref>` is not among them)."""
        return [record for record in self.timed if record.ours and "@" not in record.backend]

    @property
    def peers(self) -> list[Record]:
        """Everybody else, the fastest first, those with an ideal layout among them."""
        return [record for record in self.timed if not record.ours]

    @property
    def untimed(self) -> list[Record]:
        """Missing, refused, crashed, out of memory: ours and peers, in the order of the run."""
        return [record for record in self.records if not is_timed(record)]

    @property
    def best(self) -> Record | None:
        return next(iter(self.ours), None)

    @property
    def best_peer(self) -> Record | None:
        """The fastest peer that pays for its own permutes and copies."""
        return next((record for record in self.peers if not record.ideal), None)

    @property
    def best_ideal(self) -> Record | None:
        """The fastest peer that was given its inputs in the layout it likes."""
        return next((record for record in self.peers if record.ideal), None)

    @property
    def composed(self) -> Record | None:
        """This project's own composition of PyTorch ops."""
        return next((record for record in self.ours if record.backend == "torch"), None)

    def peer(self, prefix: str) -> Record | None:
        """The fastest honest peer whose name begins so; if none has a time, the one that says why."""
        named = [r for r in self.peers + self.untimed if not (r.ours or r.ideal) and r.backend.startswith(prefix)]
        return next(iter(named), None)

    def ratio(self, record: Record, other: Record | None = None) -> float | None:
        """How many times as fast as `other` (not given: as the best peer) `record` is; None where one has no time.

        Raises ValueError for a record of another group: ratios never cross runs.
        """
        other = other or self.best_peer
        for one in (record, other):
            if one is not None and not any(one is known for known in self.records):
                raise ValueError(
                    f"bench: ratio of {record.backend} got a record of {one.backend} on {one.op} {one.case} from run "
                    f"{one.run}, which is not of this group (run {self.first.run}); measure both in one run"
                )
        if other is None or not is_timed(record) or not is_timed(other):
            return None
        return other.ms["median"] / record.ms["median"]

    def spread(self, record: Record, other: Record | None = None) -> tuple[float, float] | None:
        """Lowest and highest ratio over the rounds in which both had their turn; None with fewer than two of them."""
        other = other or self.best_peer
        if self.ratio(record, other) is None or other is None or len(record.rounds) != len(other.rounds):
            return None
        ratios = [theirs / mine for mine, theirs in zip(record.rounds, other.rounds, strict=True) if mine > 0]
        return (min(ratios), max(ratios)) if len(ratios) > 1 else None


def groups(records: Iterable[Record]) -> list[Group]:
    """The groups in the order in which they begin; of a backend that a group has twice the later record counts."""
    found: dict[tuple, dict[str, Record]] = {}
    for record in records:
        place = found.setdefault((record.machine.get("device"), record.machine.get("malloc"), *record.group), {})
        place.pop(record.backend, None)
        place[record.backend] = record
    return [Group(tuple(place.values())) for place in found.values()]


def current(found: Iterable[Group]) -> list[Group]:
    """Of every measurement the group to show, where several runs made it.

    A time of the kernel as it is now comes before a stale one, then one with a peer beside it, then the later run.
    """
    chosen: dict[tuple, tuple[tuple, Group]] = {}
    for group in found:
        rank = (bool(group.best), bool(group.best and not is_stale(group.best)), bool(group.best_peer))
        machine = group.first.machine
        key = (machine.get("device"), machine.get("malloc"), *group.first.group[1:])
        if key not in chosen or rank >= chosen[key][0]:
            chosen[key] = (rank, group)
    return [group for _, group in chosen.values()]


# ---- which groups a reader looks at first ----

_RANKS = {(case.op, case.name): (case.rank, place) for place, case in enumerate(CASES)}
# What models run in on this kind of machine.
_DTYPES = {
    "gpu": ("bfloat16", "autocast", "float16", "float32"),
    "cpu": ("float32", "bfloat16", "autocast", "float16"),
}


def device(record: Record) -> str:
    return str(record.machine.get("device", "unknown device"))


def is_headline(group: Group) -> bool:
    """Whether bench/cases.py gives this case of an operation rank 0."""
    return group.first.kind == "op" and _RANKS.get((group.first.op, group.first.case), (1, 0))[0] == 0


def in_order(found: Iterable[Group]) -> list[Group]:
    """As bench/cases.py lists the cases, forward before backward; cases it does not have come last, by name."""

    def place(group: Group) -> tuple:
        first = group.first
        direction = DIRECTIONS.index(first.direction) if first.direction in DIRECTIONS else len(DIRECTIONS)
        return _RANKS.get((first.op, first.case), (1, len(CASES)))[1], first.case, first.op, direction

    return sorted(found, key=place)


def by_device(found: Iterable[Group]) -> list[list[Group]]:
    """One list for each device: GPUs first, then by name."""
    parts: dict[tuple, list[Group]] = {}
    for group in found:
        parts.setdefault(("cuda" not in group.first.machine, device(group.first)), []).append(group)
    return [parts[key] for key in sorted(parts)]


def by_dtype(found: Iterable[Group]) -> list[list[Group]]:
    """One list for each dtype and malloc setting of a device, the one a reader looks for first in front."""
    parts: dict[tuple, list[Group]] = {}
    for group in found:
        record, malloc = group.first, str(group.first.machine.get("malloc", ""))
        order = _DTYPES["gpu" if "cuda" in record.machine else "cpu"]
        place = order.index(record.dtype) if record.dtype in order else len(order)
        parts.setdefault((malloc not in ("", "default"), malloc, place, record.dtype), []).append(group)
    return [parts[key] for key in sorted(parts)]


def opening(found: Iterable[Group]) -> list[Group]:
    """Of one device, dtype and malloc setting: of every operation only the first case in the order of the list."""
    cases: dict[str, str] = {}
    return [
        group for group in in_order(found) if cases.setdefault(group.first.op, group.first.case) == group.first.case
    ]


# ---- whole models ----


class ModelCase(NamedTuple):
    """`vivit_b_16x2_joint.f32.b1`: preset B/16x2, attention, frames, clips."""

    preset: str
    attention: str
    frames: int
    clips: int


_MODEL = re.compile(
    r"vivit_(ti|s|b|l|h)_(\d+x\d+)_(joint|factorized_encoder|factorized_self_attention|factorized_dot_product)"
    r"(?:\.f(\d+))?(?:\.b(\d+))?"
)


def model_case(name: str) -> ModelCase | None:
    """What the name of a whole model's case says (32 frames and 1 clip if it does not); None if it is no ViViT."""
    match = _MODEL.fullmatch(name)
    if match is None:
        return None
    size, grid, attention, frames, clips = match.groups()
    return ModelCase(f"{size.capitalize()}/{grid}", attention, int(frames or 32), int(clips or 1))


def clips(name: str) -> int | None:
    """Clips of a case by its name."""
    match = re.search(r"\.b(\d+)$", name)
    return int(match[1]) if match else None
