"""`python -m bench models`: whole models, forward and training, beside stock PyTorch and transformers.

    python -m bench models [--model ...] [--step forward train] [--dtype ...] [--backend ...] [--clips N ...] [--quick]

Every model runs in a process of its own, so that its peak memory is its own; the processes take turns, so that a busy
machine slows all alike. Logits, and for a training step gradients, are held to float64 under the error budget; what is
outside is shown and not stored. `--tuned-malloc` keeps freed memory in the processes, which takes page faults on fresh
temporaries out of a CPU's times: report both.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vivit import ViViTConfig

from . import ceilings, compare, device, model_tables, record, zoo
from .device import ROOT
from .model_worker import STEP, ModelWorker
from .record import Record
from .show import Board
from .timing import summary
from .workers import Died
from .zoo import Spec

EXPECTED = ROOT / "runs" / "exact"  # what the references gave; minutes of work on a CPU, so kept between runs
DTYPES = {"cpu": {"forward": ["float32", "bfloat16"], "train": ["float32", "autocast"]},
          "cuda": {"forward": ["bfloat16"], "train": ["autocast"]}}  # fmt: skip
MODELS, BACKENDS = (*zoo.VIVITS, *zoo.OTHERS), (*zoo.OURS, *zoo.PEERS)
CLIPS = {"cpu": [1], "cuda": [8, 1]}
TURN = {"cpu": 0.5, "cuda": 0.5}  # seconds, at least one step
QUICK = Spec("", "", size="S/16x2", frames=4)
QUICK_MODELS, QUICK_BUDGET = zoo.VIVITS[:3], 90.0
_ASK_SECONDS = 900.0
_ENTER_SHARE = 0.6  # of a field's time may go into starting and checking; the rest is for turns


@dataclass
class Entrant:
    """A model that takes part: its process and what is known of it."""

    spec: Spec
    worker: ModelWorker
    found: dict[str, Any] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return "status" in self.found or self.found.get("error", {}).get("share", 0.0) > 1

    def ask(self, request: dict[str, Any], seconds: float) -> bool:
        """Whether it could; else `found` says why not, and its process is gone."""
        try:
            answer = self.worker.ask(request, seconds)
        except Died as death:
            answer = {"status": death.status, "reason": death.reason}
        self.found |= answer
        if self.failed:
            self.worker.stop()
        return not self.failed


class Lab:
    """What every measurement of whole models needs: machine, ceilings, references, and where records go."""

    def __init__(self, args: argparse.Namespace, board: Board):
        self.args, self.board = args, board
        self.device = device.default_device() if args.device is None else torch.device(args.device)
        self.began = time.monotonic()
        self.deadline = float("inf") if args.budget is None else self.began + args.budget
        self.run = record.new_run()
        self.commit, self.dirty = device.commit()
        self.machine = device.machine(self.device)
        if self.device.type == "cpu" and args.tuned_malloc:
            self.machine["malloc"] = "tuned"
        self.path = Path(args.out) / f"{device.slug(self.machine['device'])}.jsonl"
        self.records: list[Record] = []
        self.ceilings: dict[str, dict[str, float]] = {}

    def measure_ceilings(self, dtypes: Iterable[str]) -> None:
        products = {dtype: "bfloat16" if dtype == "autocast" else dtype for dtype in dtypes}
        measured = ceilings.measure(self.device, [getattr(torch, name) for name in dict.fromkeys(products.values())])
        self.ceilings = {dtype: ceilings.of_dtype(measured, name) for dtype, name in products.items()}
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the models need the room
        facts = ", ".join(f"{name} {value}" for name, value in self.machine.items() if name != "device")
        self.board.say(f"{self.machine['device']}   ({facts})")
        rates = ", ".join(f"{name} {1e3 * rate:.4g}" for name, rate in measured["matmul_tflops"].items())
        self.board.say(f"matrix products, GFLOP/s: {rates}")

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def seconds(self) -> float:
        """How long a worker may take for an answer."""
        return min(_ASK_SECONDS, max(self.left(), 1.0))

    def entrant(self, spec: Spec) -> Entrant:
        return Entrant(spec, ModelWorker(spec, self.args.tuned_malloc))

    def expected(self, spec: Spec) -> tuple[Path, dict[str, Any]]:
        """The file with the reference's results for this model and dtype, and, if there is none, why not."""
        reference = zoo.reference_of(spec)
        path = EXPECTED / f"{_digest(reference)}.pt"
        if path.exists():
            return path, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        entrant = self.entrant(reference)
        try:
            done = entrant.ask({"build": asdict(reference)}, self.seconds()) and entrant.ask(
                {"expect": str(path)}, self.seconds()
            )
        finally:
            entrant.worker.stop()
        if done:
            return path, {}
        return path, {"status": entrant.found["status"], "reason": f"the reference: {entrant.found['reason']}"}

    def record(self, entrant: Entrant, kind: str, shape: str, case: str) -> Record:
        """A record without numbers, or with why there are none."""
        spec, found = entrant.spec, entrant.found
        made = Record(
            run=self.run, date=record.now(), kind=kind, op=spec.step, case=case, shape=shape, dtype=spec.dtype,
            direction=spec.step, backend=spec.contestant, ours=spec.ours, status=found.get("status", "ok"),
            reason=found.get("reason", ""), machine=self.machine, commit=self.commit, dirty=self.dirty,
            error=found.get("error", {}), source=record.source_hash("model", spec.contestant) if spec.ours else "",
        )  # fmt: skip
        made.refuse_wrong()
        return made

    def keep(self, made: Record, row: Callable[[Record], str] = model_tables.row) -> None:
        """Shows a record as `row` and, unless it is wrong, stores it."""
        wrong = made.status == "wrong"
        self.board.say(row(made), "red" if wrong else "bold" if made.ours and made.status == "ok" else "")
        if not wrong:
            record.append(self.path, made)
        self.records.append(made)


def _digest(reference: Spec) -> str:
    """Names a reference's results by all that they depend on."""
    digest = hashlib.sha256(json.dumps([asdict(reference), torch.__version__]).encode())
    sources = [
        *(ROOT / "kernels").rglob("reference.py"),
        *(ROOT / "vivit").glob("*.py"),
        *(ROOT / "bench" / name for name in ("zoo.py", "zoo_stock.py", "model_worker.py")),
    ]
    for path in sorted(sources):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# ---- one field: the models that are compared, in turns ----


@dataclass(frozen=True)
class Field:
    """One step, dtype and number of clips; `specs`, the most important first."""

    specs: tuple[Spec, ...]

    def __str__(self) -> str:
        first = self.specs[0]
        return f"{first.step} {first.dtype} {first.clips} clip{'s' * (first.clips > 1)}, {len(self.specs)} models"


def measure(lab: Lab, contest: Field, until: float) -> list[Spec]:
    """Enters, checks and times the models and keeps their records; returns those for which there was no time."""
    began, entrants = time.monotonic(), []
    before = device.clocks(lab.device)
    try:
        for spec in contest.specs:
            if entrants and time.monotonic() > began + _ENTER_SHARE * (until - began):
                break
            entrants.append(entrant := lab.entrant(spec))
            enter(lab, entrant)
        ready = [entrant for entrant in entrants if "estimate_ms" in entrant.found]
        for number in range(lab.args.rounds):
            cost = sum(max(entrant.found["estimate_ms"] / 1e3, TURN[lab.device.type]) for entrant in ready)
            if number and time.monotonic() + cost > until:
                break
            for entrant in ready:
                turn(lab, entrant)
    finally:  # also when stopped from outside
        clocks = device.clocks_between(before, device.clocks(lab.device))
        for entrant in entrants:
            entrant.worker.stop()
        known = [entrant for entrant in entrants if entrant.rounds or entrant.failed]
        for entrant in known:
            lab.keep(finished(lab, entrant, clocks))
    return [spec for spec in contest.specs if not any(entrant.spec is spec for entrant in known)]


def enter(lab: Lab, entrant: Entrant) -> None:
    """Builds, checks and warms up a model, unless its `found` says why not."""
    path, failure = lab.expected(entrant.spec)
    entrant.found |= failure
    for request in ({"build": asdict(entrant.spec)}, {"check": str(path)}, {"warm": True}):
        if entrant.failed or not entrant.ask(request, lab.seconds()):
            break
    if entrant.failed and lab.left() <= 0:  # cut off by the budget, which says nothing of it
        entrant.found.clear()


def turn(lab: Lab, entrant: Entrant) -> None:
    if lab.left() <= 0 or entrant.failed:
        return
    request = {"time": TURN[lab.device.type], "estimate_ms": entrant.found["estimate_ms"]}
    if entrant.ask(request, lab.seconds()):
        entrant.times += entrant.found["ms"]
        entrant.rounds.append(statistics.median(entrant.found["ms"]))
    elif lab.left() <= 0:
        entrant.found.pop("status")


def finished(lab: Lab, entrant: Entrant, clocks: dict[str, Any]) -> Record:
    spec, found = entrant.spec, entrant.found
    shape = spec.shape + (f", {STEP}" if spec.step == "train" else "")
    made = lab.record(entrant, "model", shape, spec.case)
    if made.status == "out of memory" and spec.device == "cpu":
        made.reason = f"more than was free beside the other models: {made.reason}"
    if made.status != "ok":
        return made
    made.flops, made.memory, made.clocks = spec.step_flops(found["flops"]), found["memory"], clocks
    made.ms, made.rounds, made.ceilings = summary(entrant.times), entrant.rounds, lab.ceilings[spec.dtype]
    made.share, made.bound = ceilings.shares(made.ms["median"], made.flops, 0, 0, made.ceilings)
    return made


# ---- what to measure ----


def fields(args: argparse.Namespace, on: str) -> list[Field]:
    """The fields that were asked for, the most important first. Raises ValueError for what cannot be."""
    refuse(args, on)
    chosen = []
    for clips in args.clips or CLIPS[on]:
        for step in args.step:
            for dtype in args.dtype or DTYPES[on][step]:
                base = Spec("", "", args.size, args.frames, clips, dtype, step, on)
                chosen.append(Field(tuple(contestants(args, base))))
    return [contest for contest in chosen if contest.specs]


def impossible(args: argparse.Namespace) -> dict[str, str]:
    """Models that do not exist in this size, and why (Ti's three heads have no half). Raises ValueError for a size."""
    ViViTConfig.preset(args.size)
    found = {}
    for model in zoo.VIVITS:
        try:
            Spec(model, "", args.size, args.frames).config()
        except ValueError as error:
            found[model] = str(error)
    return found


def refuse(args: argparse.Namespace, on: str) -> None:
    if on == "cpu" and "float16" in args.dtype:
        raise ValueError("--dtype float16: a CPU multiplies it at about 1 GFLOP/s; use bfloat16")
    if on == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here; use --device cpu")


def contestants(args: argparse.Namespace, base: Spec) -> list[Spec]:
    """Of every model this project's backends, then its peers."""
    specs = []
    for model in args.model:
        spec, peers = replace(base, model=model), zoo.peers_of(model)
        if args.backend:
            able = (*zoo.OURS, *peers) if model in zoo.VIVITS else peers
            names = [name for name in args.backend if name in able]
            names = [name for name in names if name not in zoo.LEANER or base.step == "train"]
        else:
            names = zoo.own_backends(spec) if model in zoo.VIVITS else []
            names += [name for name in peers if name not in zoo.GPU_PEERS or base.device == "cuda"]
            names += zoo.LEANER if model in zoo.VIVITS and base.step == "train" else ()
        specs += [replace(spec, contestant=name) for name in names]
    return sorted(specs, key=lambda spec: spec.contestant == "transformers_eager")  # slow, and nobody's choice: last


def shared_options(top: argparse.ArgumentParser) -> None:
    top.add_argument("--model", nargs="+", default=[], choices=MODELS, metavar="MODEL", help=", ".join(MODELS))
    top.add_argument("--backend", nargs="+", default=[], choices=BACKENDS, metavar="NAME",
                     help=f"only these of {', '.join(BACKENDS)}")  # fmt: skip
    top.add_argument("--dtype", nargs="+", default=[], choices=zoo.DTYPES, help="autocast: bf16 over fp32 weights")
    top.add_argument("--size", default="B/16x2", help="Ti, S, B, L or H, patch and tubelet frames (%(default)s)")
    top.add_argument("--budget", type=float, metavar="SECONDS", help="end in time, the most important first")
    top.add_argument("--tuned-malloc", action="store_true", help="on a CPU: keep freed memory, without page faults")
    top.add_argument("--out", default="runs/bench", metavar="DIR", help="records are appended here (%(default)s)")
    top.add_argument("--device", choices=["cpu", "cuda"], help="the GPU if there is one")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m bench models", description=(__doc__ or "").partition("\n")[0])
    shared_options(top)
    top.add_argument("--step", nargs="+", default=list(zoo.STEPS), choices=zoo.STEPS, help="both")
    top.add_argument("--clips", nargs="+", type=int, default=[], help="per step (GPU: 8 and 1, CPU: 1)")
    top.add_argument("--frames", type=int, help="of a clip (ViViT 32, TimeSformer 8, VideoPrism 16)")
    top.add_argument("--rounds", type=int, help="turns of every model (5)")
    top.add_argument("--quick", action="store_true", help=f"{QUICK.size} with {QUICK.frames} frames: a minute or two")
    return top


def stop_on_sigterm() -> None:
    """A polite kill ends as Ctrl-C does: with what was measured so far."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    on = args.device or device.default_device().type
    if args.quick:
        args.size, args.frames, args.budget = QUICK.size, args.frames or QUICK.frames, args.budget or QUICK_BUDGET
        args.model, args.dtype = args.model or QUICK_MODELS, args.dtype or DTYPES[on]["forward"][:1]
    args.rounds = args.rounds or (2 if args.quick else 5)
    board = Board()
    lab = Lab(args, board)
    try:
        for model, why in impossible(args).items():
            if model in args.model:
                raise ValueError(why)
            board.say(f"without {model}: {why}")
        args.model = args.model or [model for model in MODELS if model not in impossible(args)]
        planned = fields(args, on)
    except ValueError as error:
        raise SystemExit(f"bench models: {error}") from error
    if not planned:
        raise SystemExit(f"bench models: nobody runs {', '.join(args.model)} as {', '.join(args.backend)}")
    stop_on_sigterm()
    left_out: list[Spec] = []
    status = 0
    with board:
        try:
            lab.measure_ceilings({spec.dtype: None for contest in planned for spec in contest.specs})
            for number, contest in enumerate(planned):
                began, many = time.monotonic(), len(planned) - number
                if lab.left() <= 0:
                    left_out += contest.specs
                    continue
                guess = (began - lab.began) / number * many if number else many * 60.0
                board.group(str(contest), began - lab.began, min(guess, lab.left()))
                left_out += measure(lab, contest, began + lab.left() / many)
        except KeyboardInterrupt:
            board.say("\nstopped; what was measured is kept")
            status = 130
        for line in model_tables.report(compare.groups([r for r in lab.records if r.status != "wrong"])):
            board.say(line)
        if left_out:
            board.say(f"\nno time for {len(left_out)} models, the first: {left_out[0].contestant} {left_out[0].case}")
        if any(made.status != "wrong" for made in lab.records):
            board.say(f"\nRecords: {lab.path}")
    return status or int(any(made.status == "wrong" and made.ours for made in lab.records))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
