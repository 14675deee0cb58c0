"""`python -m bench`: measures this project's operations beside what others run, and keeps every record at once."""

from __future__ import annotations

import argparse
import fnmatch
import io
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vivit.config import nearest

from . import cases, ceilings, compare, device, record
from .device import ROOT
from .plan import Effort, Group, Planner, fitting, order
from .record import Record
from .show import HEAD, Board, against_base, final_table, row
from .timing import summary
from .workers import Died, Worker

DTYPES = {"cpu": ["float32", "bfloat16"], "cuda": ["bfloat16", "float16", "float32"]}
QUICK_BUDGET = 120.0
_TRY_SECONDS, _OPEN_SECONDS = 240.0, 120.0
_SLOW = ("compiled*", "flex_attention*", "sdpa_math*")  # they compile, or are there for completeness
EFFORT = {"cpu": Effort(5, 0.2), "cuda": Effort(5, 0.02)}


@dataclass
class Lane:
    """A contestant in a worker."""

    worker: Worker
    backend: str  # as the worker knows it
    name: str  # as records and tables show it
    ours: bool
    ideal: bool
    times: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)
    tried: dict[str, Any] = field(default_factory=dict)


class Run:
    """One run: its workers, its ceilings, its records."""

    def __init__(self, args: argparse.Namespace, board: Board):
        self.args, self.board = args, board
        self.device = device.default_device() if args.device is None else device.torch.device(args.device)
        self.began = time.monotonic()
        self.deadline = None if args.budget is None else self.began + args.budget
        self.name = record.new_run()
        self.worker = Worker(str(self.device), args.plugin, tuned_malloc=args.tuned_malloc)
        self.base: Worker | None = None
        self.records: list[Record] = []
        self.missing: dict[tuple[str, str], str] = {}  # (op, contestant): why it cannot run here at all
        self.dead: set[tuple[str, ...]] = set()  # (op, case, dtype, contestant) that took its worker along
        self.commit, self.dirty = device.commit()

    # -- before ---------------------------------------------------------------------------------------------------
    def hello(self) -> None:
        """Learns what the machine is and who could take part; nothing is measured yet."""
        found = self.worker.ask({"hello": True}, 180.0)
        if "status" in found:
            raise SystemExit(f"bench: the worker on {self.device} cannot begin: {found['reason']}")
        self.machine, self.clocks = found["machine"], found["clocks"]
        self.contestants = {op: [tuple(entry) for entry in entries] for op, entries in found["contestants"].items()}
        self.path = Path(self.args.out) / f"{device.slug(self.machine['device'])}.jsonl"
        facts = ", ".join(f"{name} {value}" for name, value in self.machine.items() if name != "device")
        self.board.say(f"{self.machine['device']}   ({facts})")
        load, threads = self.clocks.get("load", 0.0), self.machine["threads"]
        if load > 0.5 * threads:
            self.board.say(
                f"This machine is busy: load {load:.1f} on {threads} threads. Code that often waits for all of its "
                "threads may take 30 times as long here: measure when it is idle, or with OMP_NUM_THREADS=1"
            )

    def measure_ceilings(self, dtypes: list[str]) -> None:
        found = self.worker.ask({"ceilings": dtypes}, 180.0)
        if "status" in found:
            raise SystemExit(f"bench: the ceilings of {self.device} cannot be measured: {found['reason']}")
        self.ceilings = {dtype: ceilings.of_dtype(found, dtype) for dtype in dtypes}
        for dtype, rates in self.ceilings.items():
            self.board.say(f"ceilings {dtype}: " + ", ".join(f"{name} {value:.4g}" for name, value in rates.items()))

    def start_base(self, ref: str) -> None:
        """A second worker whose kernels are those of a git ref; the bench is this tree's."""
        native = subprocess.run(["git", "cat-file", "-e", f"{ref}:csrc"], cwd=ROOT, capture_output=True).returncode == 0
        wanted = ["kernels", *["csrc"] * native]
        archive = subprocess.run(["git", "archive", ref, *wanted], cwd=ROOT, capture_output=True)
        if archive.returncode != 0:
            raise SystemExit(f"bench: --base {ref}: {archive.stderr.decode().strip()}; name a commit, branch or tag")
        self.base_folder = tempfile.TemporaryDirectory()
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(self.base_folder.name, filter="data")
        kernels, build = (Path(self.base_folder.name) / part for part in ("kernels", "csrc/build.py"))
        if build.is_file():  # where it fails, those of its backends that need the library are not here
            self.board.say(f"building the native library of {ref}")
            subprocess.run([sys.executable, str(build)], capture_output=True)
        self.base = Worker(str(self.device), self.args.plugin, kernels, self.args.tuned_malloc)

    def lanes(self, group: Group) -> list[Lane]:
        """Who takes part, without those known to be missing."""
        op, lanes = group.case.op, []
        for name, ours, ideal in self.contestants[op]:
            if ours:
                lanes.append(Lane(self.worker, name, name, True, False))
                if self.base is not None:
                    lanes.append(Lane(self.base, name, f"{name}@{self.args.base}", True, False))
            elif self._wanted(name, group):
                lanes.append(Lane(self.worker, name, name, False, ideal))
        return [lane for lane in lanes if (op, lane.name) not in self.missing]

    def _wanted(self, name: str, group: Group) -> bool:
        if self.args.no_peers:
            return False
        if self.args.peer:
            return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.args.peer)
        # a budget buys more cases without what compiles for each of them
        headline = group.case.rank == 0 and group.dtype == DTYPES[self.device.type][0]
        hurry = self.args.quick or (self.args.budget is not None and not headline)
        return not (hurry and any(fnmatch.fnmatchcase(name, pattern) for pattern in _SLOW))

    def check_peers(self, ops: list[str]) -> None:
        names = sorted({name for op in ops for name, ours, _ in self.contestants[op] if not ours})
        for pattern in self.args.peer:
            if not fnmatch.filter(names, pattern):
                raise SystemExit(f"bench: no peer {pattern!r} of {', '.join(ops)}; {nearest(pattern, names)}")

    # -- one group ------------------------------------------------------------------------------------------------
    def left(self) -> float:
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()

    def ask(self, lane: Lane, group: Group, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Asks the lane's worker, which first makes the inputs of the group if it does not hold them."""
        key = (group.case.op, group.case.name, group.dtype)
        if lane.worker.process is None or lane.worker.opened != key:
            opened = lane.worker.ask({"open": key[:2], "dtype": group.dtype}, min(_OPEN_SECONDS, max(self.left(), 1.0)))
            if "status" in opened:
                return opened
            lane.worker.opened = key
        return lane.worker.ask(request, min(seconds, max(self.left(), 1.0)))

    def measure(self, group: Group, effort: Effort) -> list[Record]:
        """Tries every contestant, then gives each its turn in every round; returns the records, in order."""
        lanes, records = self.lanes(group), []
        key = (group.case.op, group.case.name, group.dtype)
        lanes = [lane for lane in lanes if (*key, lane.name) not in self.dead]
        waiting = list(lanes)
        while waiting:
            lane = waiting.pop(0)
            self.board.now(lane.name)
            try:
                lane.tried = self.ask(lane, group, {"try": lane.backend, "direction": group.direction}, _TRY_SECONDS)
            except Died as death:  # with the worker went what it had built: the others of this worker once more
                lane.tried = {"status": death.status, "reason": death.reason}
                if self.left() > 0:
                    self.dead.add((*key, lane.name))
                built = [x for x in lanes if x.worker is lane.worker and x.tried and "status" not in x.tried]
                waiting += [x for x in built if x not in waiting]
            if "status" in lane.tried and lane.tried["status"] == "missing":
                self.missing[group.case.op, lane.name] = lane.tried["reason"]
            if self.left() <= 0:
                return records
        ready = [lane for lane in lanes if "status" not in lane.tried and lane.tried["error"]["share"] <= 1]
        for turn in range(effort.rounds):
            self.board.now(f"round {turn + 1} of {effort.rounds}")
            for lane in ready:
                self._turn(lane, group, effort)
        before, self.clocks = self.clocks, self._clocks()
        held = device.clocks_between(before, self.clocks)
        for lane in lanes:
            if lane.tried.get("status") != "missing" and not (lane in ready and not lane.rounds):
                records.append(self._record(lane, group, held))
        return records

    def _clocks(self) -> dict[str, Any]:
        try:
            return self.worker.ask({"clocks": True}, 30.0).get("clocks", self.clocks)
        except Died:
            return self.clocks

    def _turn(self, lane: Lane, group: Group, effort: Effort) -> None:
        if "status" in lane.tried or self.left() <= 0:
            return
        request = {"time": lane.backend, "direction": group.direction, "seconds": effort.seconds}
        try:
            found = self.ask(lane, group, request | {"estimate_ms": lane.tried["estimate_ms"]}, _TRY_SECONDS)
        except Died as death:
            found: dict[str, Any] = {"status": death.status, "reason": death.reason}
            self.dead.add((group.case.op, group.case.name, group.dtype, lane.name))
        if "status" in found:
            if self.left() > 0:  # else it was cut off by the budget, which says nothing of it
                lane.tried = found
            return
        times: list[float] = found["ms"]
        lane.times += times
        lane.rounds.append(statistics.median(times))
        lane.host_ms.append(found.get("host_ms", 0.0))

    def _record(self, lane: Lane, group: Group, clocks: dict[str, Any]) -> Record:
        case = group.case
        made = Record(
            run=self.name, date=record.now(), kind="op", op=case.op, case=case.name, shape=case.shape,
            dtype=group.dtype, direction=group.direction, backend=lane.name, ours=lane.ours, ideal=lane.ideal,
            status=lane.tried.get("status", "ok"), reason=lane.tried.get("reason", ""), machine=self.machine,
            commit=self.args.base if "@" in lane.name else self.commit, dirty=self.dirty,
        )  # fmt: skip
        if lane.ours and "@" not in lane.name:
            made.source = record.source_hash(case.op, lane.backend)
        if made.status != "ok":
            return made
        made.error = lane.tried["error"]
        made.refuse_wrong()
        if made.status == "wrong":
            return made
        itemsize = 4 if group.dtype == "float32" else 2
        made.flops, made.exps = case.flops(group.direction), case.exps(group.direction)
        made.bytes = case.bytes(group.direction, itemsize)
        made.ms, made.rounds, made.memory = summary(lane.times), lane.rounds, lane.tried["memory"]
        made.ceilings = self.ceilings[group.dtype]
        made.share, made.bound = ceilings.shares(made.ms["median"], made.flops, made.bytes, made.exps, made.ceilings)
        if host := min(lane.host_ms, default=0.0):
            made.ms["host"] = host
        made.clocks = clocks
        return made

    # -- all of them ----------------------------------------------------------------------------------------------
    def run(self, groups: list[Group], effort: Effort) -> list[Group]:
        """Measures what fits; returns the groups that did not."""
        planner = Planner(self.device.type, self.ceilings, effort)
        waiting, left_out = list(groups), []
        self.board.say("\n" + HEAD)
        while waiting:
            names = [[lane.name for lane in self.lanes(group)] for group in waiting]
            costs = [planner.seconds(group, some) for group, some in zip(waiting, names, strict=True)]
            fits = fitting(waiting, costs, None if self.deadline is None else self.left())
            group, fit = waiting.pop(0), fits[0]
            if not fit:
                left_out.append(group)
                continue
            self.board.group(
                str(group), time.monotonic() - self.began, sum(c for c, f in zip(costs, fits, strict=True) if f)
            )
            began = time.monotonic()
            found = self.measure(group, effort)
            planner.learn(group, names[0], time.monotonic() - began)
            for made in found:
                self.board.row(made)
                if made.status != "wrong":
                    record.append(self.path, made)
                self.records.append(made)
            if not found:
                left_out.append(group)
        return left_out

    def close(self) -> None:
        self.worker.stop()
        if self.base is not None:
            self.base.stop()
            self.base_folder.cleanup()


def report(run: Run, left_out: list[Group]) -> None:
    """The final table, and everything that has no place in it."""
    say = run.board.say
    groups = compare.groups([made for made in run.records if made.status != "wrong"])
    if any(group.ours for group in groups):
        say("\nThis project's backends, by the ratio to the best peer (above 1: faster than any)")
        for line in final_table(groups):
            say(line)
        for line in against_base(groups):
            say(line)
    failed = [made for made in run.records if made.status != "ok"]
    if failed:
        say("\nWithout a time")
        for made in failed:
            say(("NOT STORED  " if made.status == "wrong" else "") + row(made), "red" if made.status == "wrong" else "")
    if run.missing:
        say("\nNot here")
        reasons: dict[str, list[str]] = {}
        for (_, name), why in run.missing.items():
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            say(f"  {', '.join(dict.fromkeys(names))}: {why}")
    throttled = sorted({str(made.clocks["throttled"]) for made in run.records if made.clocks.get("throttled")})
    if throttled:
        say(f"\nThe GPU held its clocks back in this run ({'; '.join(throttled)}): its times are not the card's best")
    if any(max(made.share.values(), default=0.0) > 1.02 for made in run.records):
        say("\nA share above 100 % means that the ceiling was measured while the machine was disturbed: run again")
    if left_out:
        say(f"\nNo time for {len(left_out)} groups, the first: {left_out[0]}")
    if any(made.status != "wrong" for made in run.records):
        say(f"\nRecords: {run.path}")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m bench",
        description="Time, error, memory and share of the machine's limit of every operation, beside what others run.",
        epilog="Other commands: python -m bench models | memory | report | tune | static | gpu; each has --help.",
    )
    top.add_argument("op", nargs="*", help=f"{', '.join(cases.OPS)}; all if none is named")
    top.add_argument("--case", nargs="+", default=[], metavar="NAME", help="cases by name, beginning or pattern")
    top.add_argument("--peer", nargs="+", default=[], metavar="NAME", help="only these peers (patterns are allowed)")
    top.add_argument("--no-peers", action="store_true", help="only this project's backends")
    top.add_argument("--dtype", nargs="+", default=[], choices=["float32", "bfloat16", "float16"])
    top.add_argument("--direction", nargs="+", default=[], choices=cases.DIRECTIONS)
    top.add_argument(
        "--quick", action="store_true", help=f"the headline in {QUICK_BUDGET:.0f} seconds, without slow peers"
    )
    top.add_argument("--budget", type=float, metavar="SECONDS", help="end in time, the most important first")
    top.add_argument("--rounds", type=int, help="turns of every contestant (5, with --quick 3)")
    top.add_argument("--out", default="runs/bench", metavar="DIR", help="records are appended here (%(default)s)")
    top.add_argument("--base", metavar="GITREF", help="also this project's kernels as they were at a commit")
    top.add_argument(
        "--with", dest="plugin", action="append", default=[], metavar="FILE", help="a file with @peer functions"
    )
    top.add_argument("--device", choices=["cpu", "cuda"], help="the GPU if there is one")
    top.add_argument("--tuned-malloc", action="store_true", help="on a CPU: keep freed memory, without page faults")
    top.add_argument("--list", action="store_true", help="print the cases and stop")
    return top


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if args.quick and args.budget is None:
        args.budget = QUICK_BUDGET
    board = Board()
    try:
        run = Run(args, board)
        on = run.device.type
        chosen = cases.select(args.op, args.case, on == "cpu")
    except ValueError as error:
        raise SystemExit(str(error)) from error
    if args.list:
        for case in chosen:
            print(f"{case.op:<13}{case.name:<24}{case.shape}")
        return 0
    if args.quick and not args.case:
        chosen = [case for case in chosen if case.rank == 0]
    dtypes = args.dtype or (DTYPES[on][:1] if args.quick and on == "cuda" else DTYPES[on])
    directions = args.direction or (["forward", "forward+backward"] if args.quick else list(cases.DIRECTIONS))
    left_out: list[Group] = []
    status = 0
    with board:
        try:
            run.hello()
            run.check_peers(sorted({case.op for case in chosen}))
            if args.base:
                run.start_base(args.base)
            run.measure_ceilings(dtypes)
            effort = EFFORT[on]
            if args.rounds or args.quick:
                effort = Effort(args.rounds or 3, effort.seconds)
            left_out = run.run(order(chosen, dtypes, directions), effort)
        except KeyboardInterrupt:
            board.say("\nstopped; what was measured is kept")
            status = 130
        except Died as death:
            raise SystemExit(f"bench: the worker on {run.device} did not start: {death.reason}") from death
        finally:
            run.close()
    if run.records:
        report(run, left_out)
    return status or int(any(made.status == "wrong" and made.ours for made in run.records))
