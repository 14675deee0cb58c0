"""`python -m bench memory`: peak memory of a training step against frames and clips, up to out of memory.

    python -m bench memory [--model ...] [--backend ...] [--frames N ...] [--clips N ...] [--limit GB]

Every point is a process of its own that takes two training steps. On a CPU the process may take `--limit` GB and not a
byte more, so that the end is an error that can be told and not the machine's. Each contestant is first held to float64
on a small clip, logits and gradients; `error.checked` says how small beside the point.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, replace

from . import compare, device, zoo
from .model_worker import STEP, available
from .models import Lab, refuse, shared_options, stop_on_sigterm
from .record import Record
from .show import Board
from .zoo import Spec

MODELS = ("joint", "factorized_encoder")
DTYPE = {"cpu": "float32", "cuda": "autocast"}
FRAMES, CLIPS = (8, 16, 32, 64, 128), (1, 2, 4, 8, 16, 32, 64, 128)
FRAMES_OF_CLIPS = 32  # while the clips grow
_SHARE = 0.8  # of what is free, if no limit is given
MIB, GB = 2**20, 10**9


def case(spec: Spec) -> str:
    return f"{spec.name}.f{spec.frames}.b{spec.clips}"


def sweeps(args: argparse.Namespace, on: str) -> list[list[list[Spec]]]:
    """Sweeps of points of contestants: the frames of one clip, then the number of clips. Raises ValueError."""
    refuse(args, on)
    planned = []
    for model in args.model or MODELS:
        for dtype in args.dtype or [DTYPE[on]]:
            base = Spec(model, "", args.size, None, 1, dtype, "train", on)
            sizes = [[(frames, 1) for frames in sorted(args.frames)]]
            sizes.append([(FRAMES_OF_CLIPS, clips) for clips in sorted(args.clips) if clips > 1 or not args.frames])
            for sweep in sizes:
                points = [replace(base, frames=frames, clips=clips) for frames, clips in sweep]
                names = args.backend or [*zoo.own_backends(points[0]), "stock"] if points else []
                planned.append([[replace(point, contestant=name) for name in names] for point in points])
    return [sweep for sweep in planned if sweep]


class Meter:
    """Measures points; knows whose results are right, and who has met the limit."""

    def __init__(self, lab: Lab, limit: int | None):
        self.lab, self.limit = lab, limit
        self.guards: dict[Spec, Record] = {}

    def guard(self, spec: Spec) -> Record:
        """The record of this contestant's check on the smallest clip."""
        small = replace(spec, frames=min(FRAMES), clips=1)
        if small not in self.guards:
            entrant = self.lab.entrant(small)
            path, entrant.found = self.lab.expected(small)
            for request in ({"build": asdict(small)}, {"check": str(path)}):
                if entrant.failed or not entrant.ask(request, self.lab.seconds()):
                    break
            entrant.worker.stop()
            self.guards[small] = self.lab.record(entrant, "memory", small.shape, case(small))
        return self.guards[small]

    def point(self, spec: Spec) -> Record | None:
        """The record of one point; None where there was no time for it."""
        guard, entrant = self.guard(spec), self.lab.entrant(spec)
        if guard.status != "ok":
            entrant.found |= {"status": guard.status, "reason": guard.reason}
        for request in ({"build": asdict(spec), "limit": self.limit}, {"warm": True}):
            if entrant.failed or not entrant.ask(request, self.lab.seconds()):
                break
        entrant.worker.stop()
        if self.lab.left() <= 0:
            return None
        found = entrant.found
        if found.get("finite") is False:
            found |= {"status": "crashed", "reason": "the loss is not finite"}
        if found.get("status") == "out of memory" and self.limit:
            found["reason"] = f"the process may take {self.limit / GB:.1f} GB"
        made = self.lab.record(entrant, "memory", f"{spec.shape}, {STEP}", case(spec))
        if made.status == "ok":
            seen = (guard.error["checked"] * min(FRAMES)) / (spec.clips * (spec.frames or min(FRAMES)))
            made.error, made.memory = guard.error | {"checked": seen}, found["memory"]
        return made


def row(made: Record) -> str:
    start = f"{made.case:<46}{made.dtype:<9} {('* ' if made.ours else '  ') + made.backend:<18}"
    if made.status != "ok":
        return ("NOT STORED  " if made.status == "wrong" else "") + f"{start}{made.status}: {made.reason}"
    memory = {name: size / MIB for name, size in made.memory.items()}
    reserved = f", reserved {memory['reserved']:.0f}" if "reserved" in memory else ""
    return (
        f"{start}peak {memory['peak']:>8.0f} MiB over {memory['loaded']:.0f} loaded{reserved}; "
        f"held between steps {memory['held']:.0f}; error {made.error['share']:.2f}"
    )


def table(records: Iterable[Record]) -> list[str]:
    """Peak of every point by contestant, in MiB, and the smallest of ours as a share of stock's."""
    groups = compare.groups(records)
    names = list(dict.fromkeys(made.backend for group in groups for made in group.records))
    head = "Peak memory of a training step over what the loaded model holds, MiB"
    lines = ["", head, f"{'':<46}{'dtype':<10}" + "".join(f"{name:>20}" for name in names) + f"{'ours/stock':>12}"]
    for group in groups:
        peaks = {made.backend: made.memory["peak"] / MIB for made in group.records if made.status == "ok"}
        status = {made.backend: made.status for made in group.records}
        cells = [f"{peaks[name]:.0f}" if name in peaks else status.get(name, "-") for name in names]
        ours = [peaks[made.backend] for made in group.records if made.ours and made.backend in peaks]
        ratio = f"{min(ours) / peaks['stock']:.2f}" if ours and peaks.get("stock") else "-"
        first = group.first
        lines.append(f"{first.case:<46}{first.dtype:<10}" + "".join(f"{cell:>20}" for cell in cells) + f"{ratio:>12}")
    return lines


def measure(lab: Lab, planned: list[list[list[Spec]]], limit: int | None) -> None:
    meter, began, done = Meter(lab, limit), time.monotonic(), 0
    many = sum(len(point) for sweep in planned for point in sweep)
    for sweep in planned:
        ended: set[str] = set()  # contestants that cannot run, or for which all that is larger is out of memory, too
        for spec in (spec for point in sweep for spec in point):
            done += 1
            if spec.contestant in ended or lab.left() <= 0:
                continue
            passed = time.monotonic() - began
            guess = passed / max(done - 1, 1) * (many - done + 1)
            lab.board.group(f"{case(spec)} {spec.contestant}", passed, min(guess, lab.left()))
            made = meter.point(spec)
            if made is not None:
                lab.keep(made, row)
                if made.status != "ok":
                    ended.add(spec.contestant)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m bench memory", description=(__doc__ or "").partition("\n")[0])
    shared_options(top)
    top.add_argument("--frames", nargs="*", type=int, default=list(FRAMES), help="of one clip")
    top.add_argument("--clips", nargs="*", type=int, default=list(CLIPS), help=f"of {FRAMES_OF_CLIPS} frames")
    top.add_argument("--limit", type=float, metavar="GB", help="per process (CPU: 80 %% of what is free)")
    return top


def limit_of(asked: float | None, on: str) -> int | None:
    """Bytes a process may take; None, on a GPU, is all of it. Raises ValueError where nobody can say."""
    if asked is not None:
        return int(asked * GB)
    if on == "cuda":
        return None
    free = available()
    if free is None:
        raise ValueError("this machine does not say how much memory is free; give --limit GB")
    return int(_SHARE * free)


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    on = args.device or device.default_device().type
    try:
        planned, limit = sweeps(args, on), limit_of(args.limit, on)
        board = Board()
        lab = Lab(args, board)
    except ValueError as error:
        raise SystemExit(f"bench memory: {error}") from error
    stop_on_sigterm()
    status = 0
    with board:
        try:
            measure(lab, planned, limit)
        except KeyboardInterrupt:
            board.say("\nstopped; what was measured is kept")
            status = 130
        kept = [made for made in lab.records if made.status != "wrong"]
        for line in table(kept) if kept else []:
            board.say(line)
        if lab.left() <= 0:
            board.say("\nthe time is up; what is larger was not measured")
        if kept:
            board.say(f"\nRecords: {lab.path}")
    return status or int(any(made.status == "wrong" and made.ours for made in lab.records))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
