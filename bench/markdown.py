"""Figures, marks and sentences as Markdown: what every table of the report is put together from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from .compare import Group, device
from .record import Record, is_stale

_MARKS = {
    "†": "† Measured before this kernel last changed: the figure of another version.",
    "‡": "‡ Measured with uncommitted changes: the commit named does not hold all of the code.",
    "§": "§ The GPU held its clocks back during this measurement.",
    "¶": "¶ Shorter than the host takes to launch it: alone in a loop such calls come at the host's pace.",
}


# ---- numbers and messages as text ----


def three(x: float) -> str:
    """Three significant digits, never an exponent: 0.0612, 6.83, 1,530."""
    exponent = int(f"{x:.2e}".partition("e")[2])
    return f"{x:,.{max(0, 2 - exponent)}f}"


def size(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= scale:
            return f"{three(count / scale)} {unit}"
    return f"{count:.0f} B"


def times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{three(ratio)}×"


def between(low: float, high: float) -> str:
    return f" ({three(low)}–{three(high)})"


def marks(record: Record) -> str:
    lags = record.ms.get("host", 0.0) > record.ms.get("median", 0.0)
    return "†" * is_stale(record) + "‡" * record.dirty + "§" * bool(record.clocks.get("throttled")) + "¶" * lags


def plain(text: str, longest: int = 140) -> str:
    """Somebody's message on one line, harmless in Markdown."""
    text = " ".join(text.split())
    text = text if len(text) <= longest else text[: longest - 3].rstrip() + "..."
    return re.sub(r"([\\`*<>|\[\]])", r"\\\1", text)


def milliseconds(record: Record) -> str:
    ms = record.ms
    return three(ms["median"]) + (between(ms["p20"], ms["p80"]) if "p20" in ms and "p80" in ms else "")


def share(record: Record, bound: str) -> str:
    return f"{100 * record.share[bound]:.0f} %" if bound in record.share else "–"


def error(record: Record) -> str:
    """Share of the error budget, and of the output that was compared where it was not all."""
    checked = record.error.get("checked", 1.0)
    part = f" ({100 * checked:.2g} %)" if checked < 1 else ""
    return f"{record.error['share']:.2f}{part}" if "share" in record.error else "–"


def peak(record: Record) -> str:
    return size(record.memory["peak"]) if "peak" in record.memory else "–"


# ---- parts of every table ----


def table(head: str, rows: list[list[str]], right: int) -> list[str]:
    """head: titles with | between them; the columns from `right` on are aligned to the right."""
    rule = ["---"] * right + ["---:"] * (head.count("|") + 1 - right)
    return [f"| {head} |", f"| {' | '.join(rule)} |", *(f"| {' | '.join(row)} |" for row in rows)]


def spaced(paragraphs: Iterable[str]) -> list[str]:
    return [line for paragraph in paragraphs for line in ("", paragraph)]


def setting(record: Record) -> str:
    """The dtype, and how malloc was set where it was not left alone."""
    malloc = record.machine.get("malloc", "default")
    return record.dtype + ("" if malloc == "default" else f", {malloc} malloc")


def shown(group: Group) -> Record:
    """Whose machine and commit a row speaks of."""
    return group.best or next(iter(group.timed), group.first)


def letters_of(found: list[Group]) -> dict[str, str]:
    """What a row of each run carries, the oldest first: nothing if all are of one run."""
    runs = sorted({shown(group).run: shown(group).date for group in found}.items(), key=lambda run: (run[1], run[0]))
    return {run: f" [{number}]" if len(runs) > 1 else "" for number, (run, _) in enumerate(runs, 1)}


def source(record: Record) -> str:
    """Device, versions, commit, date, on one line."""
    machine = record.machine
    names = [name for name in ("torch", "triton", "cuda", "driver") if machine.get(name)]
    versions = [f"{name} {machine[name]}" for name in names if machine[name] != "not installed"]
    commit = f"commit {record.commit or 'unknown'}{'‡' * record.dirty}"
    return f"{device(record)}; {', '.join(versions)}; {commit}, {record.date[:10]}"


def ceilings(record: Record) -> str:
    units = {
        "copy_gbps": "copy {} GB/s",
        "matmul_tflops": f"{record.dtype} matmul {{}} TFLOP/s",
        "exp_gops": "exp {} G/s",
    }
    return ", ".join(
        text.format(three(record.ceilings[key])) for key, text in units.items() if record.ceilings.get(key)
    )


def sources(found: list[Group]) -> list[str]:
    """A line for each run that the table shows."""
    lines = []
    for run, letter in letters_of(found).items():
        record = next(record for group in found if (record := shown(group)).run == run)
        rates = dict.fromkeys(ceilings(shown(group)) for group in found if shown(group).run == run)
        known = "; ".join(text for text in rates if text)
        limits = f" Ceilings of that run: {known}." if known else ""
        lines.append(f"{letter.strip()} {source(record)}.{limits}".strip())
    return lines


def explained(shown: str) -> list[str]:
    return [text for mark, text in _MARKS.items() if mark in shown]


def no_time(found: Iterable[Group], where: Callable[[list[Record]], str]) -> str:
    """Who was asked and gave no time, and why; those that say the same of the same stand together."""
    said: dict[tuple[str, str, str], list[Record]] = {}
    for group in found:
        for record in group.untimed:
            said.setdefault((record.backend, record.status, plain(record.reason)), []).append(record)
    together: dict[tuple[str, str, str], list[str]] = {}
    for (backend, status, reason), records in said.items():
        together.setdefault((status, where(records), reason), []).append(f"`{backend}`")
    entries = [
        f"{', '.join(names)} {status} ({places})" + (f": {reason.rstrip('.')}" if reason else "")
        for (status, places, reason), names in together.items()
    ]
    return "; ".join(entries) + "." if entries else ""
