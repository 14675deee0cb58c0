"""What a run shows: rows as they come, a bar with the time left, and the final table. Plain without a terminal."""

from __future__ import annotations

import sys
import time

from .compare import Group as Compared
from .record import Record

try:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
except ImportError:  # plain lines
    Console = None

_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def figure(ms: float) -> str:
    """Four digits or all before the point, never an exponent."""
    return f"{ms:.0f}" if ms >= 1000 else f"{ms:.4g}" if ms >= 1 else f"{ms:.4f}"


def row(record: Record) -> str:
    """One measurement, or why there is none, on one line."""
    start = (
        f"{record.op:<12}{record.case:<22}{_SHORT.get(record.dtype, record.dtype):<9}{record.direction:<17}"
        f"{('* ' if record.ours else '  ') + record.backend:<33}"
    )
    if record.status != "ok":
        return f"{start}{record.status}: {record.reason}"
    ms, share = record.ms, f"{100 * record.share.get(record.bound, 0.0):.0f} % {record.bound}" if record.bound else ""
    spread = f"{figure(ms['p20'])}-{figure(ms['p80'])}"
    peak = record.memory.get("peak", 0) / 2**20
    return f"{start}{figure(ms['median']):>9}  {spread:<16}{share:>11}{record.error['share']:>7.2f}{peak:>8.1f}"


HEAD = (
    f"{'operation':<12}{'case':<22}{'dtype':<9}{'direction':<17}{'  backend (* ours)':<33}{'ms':>9}  {'p20-p80':<16}"
    f"{'of ceiling':>11}{'error':>7}{'MiB':>8}"
)


class Board:
    """`with Board() as board: board.group(...); board.now("sdpa"); board.row(record)`"""

    def __init__(self, quiet: bool = False):
        self.quiet, self.begun, self.progress, self.left = quiet, time.monotonic(), None, 0.0
        if Console is not None and not quiet and sys.stdout.isatty():
            self.progress = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn(), TimeElapsedColumn(),
                TextColumn("about {task.fields[left]} left"), console=Console(highlight=False),
            )  # fmt: skip
            self.task = self.progress.add_task("ceilings", total=1.0, left="?")

    def __enter__(self) -> Board:
        if self.progress:
            self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        if self.progress:
            self.progress.stop()

    def say(self, text: str, style: str = "") -> None:
        if self.progress:
            self.progress.console.print(text, style=style, markup=False, soft_wrap=True)
        elif not self.quiet:
            print(text, flush=True)

    def group(self, name: str, done: float, left: float) -> None:
        """A group begins; `done` and `left` are seconds, `left` a guess."""
        self.name, self.since, self.done, self.left = name, time.monotonic(), done, left
        if self.progress:
            self.now("")
        elif not self.quiet:
            print(f"-- {name}   ({clock(done)} passed, about {clock(left)} left)", flush=True)

    def now(self, doing: str) -> None:
        """What of the group is being done, for the bar."""
        if self.progress:
            passed = time.monotonic() - self.since
            left = max(self.left - passed, 0.0)
            text = f"{self.name}  {doing}"
            total = self.done + max(self.left, passed)
            self.progress.update(
                self.task, description=text, total=total, completed=self.done + passed, left=clock(left)
            )

    def row(self, record: Record) -> None:
        style = (
            "red" if record.status in ("wrong", "crashed") else "bold" if record.ours and record.status == "ok" else ""
        )
        mark = "NOT STORED  " if record.status == "wrong" else ""
        self.say(mark + row(record), style)


def final_table(groups: list[Compared]) -> list[str]:
    """Our backends, the highest ratio to the best peer first."""
    rows = [(group, record, group.ratio(record)) for group in groups for record in group.ours]
    rows.sort(key=lambda entry: -(entry[2] or 0.0))
    lines = [
        f"{'operation':<12}{'case':<22}{'dtype':<6}{'direction':<17}{'backend':<10}{'ms':>9}{'share':>12}{'error':>7}"
        f"{'MiB':>8}{'composed':>10}  {'best peer':<32}{'ms':>9}{'ratio':>7}"
    ]
    for group, record, ratio in rows:
        best, composed = group.best_peer, group.composed
        against = group.ratio(record, composed) if composed and composed is not record else None
        share = f"{100 * record.share.get(record.bound, 0.0):.0f} % {record.bound}" if record.bound else "-"
        lines.append(
            f"{record.op:<12}{record.case:<22}{_SHORT.get(record.dtype, record.dtype):<6}{record.direction:<17}"
            f"{record.backend:<10}{figure(record.ms['median']):>9}{share:>12}{record.error['share']:>7.2f}"
            f"{record.memory.get('peak', 0) / 2**20:>8.1f}{f'{against:.2f}' if against else '-':>10}  "
            + (f"{best.backend:<32}{figure(best.ms['median']):>9}{ratio:>7.2f}" if best and ratio else "no peer ran")
        )
    return lines


def against_base(groups: list[Compared]) -> list[str]:
    """Each backend of ours against itself at the git ref of --base; nothing without one."""
    lines = []
    for group in groups:
        for old in group.timed:
            name, at, _ = old.backend.partition("@")
            new = next((record for record in group.ours if at and record.backend == name), None)
            if new is not None:
                low, high = group.spread(new, old) or (float("nan"),) * 2
                lines.append(
                    f"{new.op:<12}{new.case:<22}{_SHORT.get(new.dtype, new.dtype):<6}{new.direction:<17}{name:<10}"
                    f"{new.ms['median']:>9.4g} ms, {old.backend} {old.ms['median']:.4g} ms: "
                    f"{group.ratio(new, old):.2f} times as fast ({low:.2f}-{high:.2f} over rounds)"
                )
    return ["", "Against the base", *lines] if lines else []
