"""What a run shows while it runs: a bar with clips/s, memory and the time left; plain lines without a terminal."""

from __future__ import annotations

import os
import sys
import time

import torch

try:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
except ImportError:  # lines only
    Console = None


def memory_gib() -> tuple[str, float]:
    """("GPU", peak allocated) on a GPU, ("RSS", resident now) without."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return "GPU", torch.cuda.max_memory_allocated() / 2**30
    try:
        with open("/proc/self/statm") as file:
            return "RSS", int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    except OSError:
        return "RSS", 0.0


class Bar:
    """`with Bar("train", total=steps) as bar: bar.advance(clips=16, note="loss 0.61")`."""

    def __init__(self, what: str, total: int | None, start: int = 0, unit: str = "clips", quiet: bool = False):
        self.what, self.total, self.unit, self.quiet = what, total, unit, quiet
        self.start, self.done, self.count = start, start, 0
        self.begun = self.last_line = time.monotonic()
        self.recent: list[tuple[float, int]] = [(self.begun, 0)]
        self.rich = None
        if Console is not None and not quiet and sys.stderr.isatty():
            self.rich = Progress(
                TextColumn("{task.description:<8}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self.task = self.rich.add_task(what, total=total, completed=start, rate="", note="")

    def __enter__(self) -> Bar:
        if self.rich:
            self.rich.start()
        return self

    def __exit__(self, *_) -> None:
        if self.rich:
            self.rich.stop()

    def rate(self) -> float:
        """Per second, over about the last ten seconds."""
        (first, before), (last, now) = self.recent[0], self.recent[-1]
        return (now - before) / max(last - first, 1e-9)

    def advance(self, clips: int = 1, steps: int = 1, note: str = "") -> None:
        now = time.monotonic()
        self.done += steps
        self.count += clips
        self.recent.append((now, self.count))
        while len(self.recent) > 2 and now - self.recent[0][0] > 10:
            self.recent.pop(0)
        kind, gib = memory_gib()
        rate = f"{self.rate():,.0f} {self.unit}/s  {kind} {gib:.1f} GiB"
        if self.rich:
            self.rich.update(self.task, completed=self.done, rate=rate, note=note)
        elif not self.quiet and (now - self.last_line > 10 or self.done == self.total):
            self.last_line = now
            total = f"/{self.total}" if self.total else ""
            each = (now - self.begun) / max(self.done - self.start, 1)
            left = ((self.total or self.done) - self.done) * each
            print(f"{self.what} {self.done}{total}  {rate}  {note}  {left:.0f} s left", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        if self.rich:
            self.rich.console.print(text, markup=False, highlight=False)
        elif not self.quiet:
            print(text, file=sys.stderr, flush=True)
