"""README's table of what each level of memory costs in time, from the records of whole training steps.

The levels are contestants of `python -m bench models --step train`, in turns with the others: ratios are of one run.
"""

from __future__ import annotations

from collections.abc import Iterable

from . import markdown as md
from .compare import Group, current, groups
from .model_tables import name
from .record import Record
from .zoo import LEANER, LEVELS

_LEGEND = (
    "The same training step at each level of memory, in turns with the others. *ms*: median (20th–80th percentile). "
    "*peak*: memory of one step above the loaded model; *whole*: with the model and all else of the process. "
    "*against*: time of theirs over ours, below 1 we are slower; in brackets our peak, and our whole, as multiples of "
    "theirs. *error*: share used of the error budget against float64."
)
_HEAD = "model | dtype | memory | ms | peak | whole | error | against stock | against transformers"
_PEERS = ("stock", "transformers_sdpa")


def lines(records: Iterable[Record]) -> list[str]:
    """A table of all steps in which a level leaner than the first took part; nothing where there is none."""
    found = current(groups(record for record in records if record.kind == "model" and record.op == "train"))
    found = [group for group in found if any(record.backend in LEANER for record in group.ours)]
    if not found:
        return []
    letters, rows = md.letters_of(found), []
    for group in found:
        for record in (*_fast(group), *_leaner(group)):
            level = record.backend if record.backend in LEANER else LEVELS[0]
            against = [_against(group, record, peer) for peer in _PEERS]
            rows.append([
                name(record.case), record.dtype, f"`{level}`{md.marks(record)}{letters[record.run]}",
                md.milliseconds(record), md.peak(record), md.size(_whole(record)), md.error(record), *against,
            ])  # fmt: skip
    notes = md.sources(found)
    return [_LEGEND, "", *md.table(_HEAD, rows, right=3), *md.spaced([*notes, *md.explained(str([rows, notes]))])]


def _fast(group: Group) -> list[Record]:
    """The fastest of this project that keeps everything."""
    return [record for record in group.ours if record.backend not in LEANER][:1]


def _leaner(group: Group) -> list[Record]:
    known = {record.backend: record for record in group.ours}
    return [known[level] for level in LEANER if level in known]


def _against(group: Group, record: Record, who: str) -> str:
    peer = next((other for other in group.peers if other.backend == who), None)
    if peer is None:
        return "–"
    shares = [of(record) / max(of(peer), 1) for of in (_peak, _whole)]
    return f"{md.times(group.ratio(record, peer))} ({', '.join(f'{md.three(share)}×' for share in shares)})"


def _peak(record: Record) -> float:
    return record.memory.get("peak", 0)


def _whole(record: Record) -> float:
    return record.memory.get("loaded", 0) + _peak(record)
