"""`python -m bench tune OP`: tries the candidates of an operation's tiles.py and cuda_tiles.py, and prints the lines to
paste there.

A tiles.py is described in vivit_kernels/_attention/tiles.py; whatever has its parts takes part. Its functions are given
the facts that their parameters name:

    on_cpu, arch (90 for sm_90, None on a CPU), threads (None on a GPU), op, direction ("forward", "backward"), dtype,
    itemsize, the fields of the case (B, T, S, H, D, softcap; or B, C, F, Y, X, tubelet, E), temporal_heads, and
    sequences: of every kind that attends (how many lie at one stride, heads, length)

Cases between which `choose` cannot tell are one rung and get one answer: the tile with the best geometric mean of the
ratios to the present choice. Every candidate is held to the error budget before it is timed, and timed in turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import importlib.util
import inspect
import statistics
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import torch

from . import device
from .cases import OPS, PACKAGES, AttentionCase, select
from .plan import Group as Setting  # what is measured at a time: case, dtype, direction
from .static import table
from .timing import in_turns, summary
from .worker import Session, explain

ROUNDS = 5
_SCREEN = 1.5  # a candidate whose better of two first calls is this much slower than the best gets no turns
_GAIN = 0.03  # a smaller one is not worth a new rung, and here not told from noise
_DIRECTIONS = ["forward", "backward"]  # each has a choice of its own in a kernel's tiles.py
_DTYPES = {"cpu": ["float32"], "cuda": ["bfloat16"]}


@dataclass
class Outcome:
    """Of every tile in one setting: first calls and ms per round, the share of the error budget, or why no time."""

    setting: Setting
    present: Any
    first: dict[Any, float] = field(default_factory=dict)  # ms, the better of two calls; those far behind have no more
    ms: dict[Any, list[float]] = field(default_factory=dict)
    error: dict[Any, float] = field(default_factory=dict)
    reason: dict[Any, str] = field(default_factory=dict)
    same: dict[Any, Any] = field(default_factory=dict)  # tile: the one with the same plan that was timed in its place

    def ratios(self, tile: Any) -> list[float]:
        """Time over the present choice's in the same round; of a tile without turns, from the first calls."""
        tile = self.same[tile]
        if tile in self.ms:
            return [mine / other for mine, other in zip(self.ms[tile], self.ms[self.present], strict=True)]
        return [self.first[tile] / self.first[self.present]]


# ---- the tiles of an operation ----


def tile_modules(op: str) -> list[ModuleType]:
    names = [f"vivit_kernels.{PACKAGES[op]}.{name}" for name in ("tiles", "cuda_tiles")]
    if op != "tubelet":
        names.append("vivit_kernels._attention.tiles")
    return [importlib.import_module(name) for name in names if importlib.util.find_spec(name)]


def facts(setting: Setting, on: torch.device) -> dict[str, Any]:
    """What a tiles.py may ask for, by name."""
    case, dtype, on_cpu = setting.case, getattr(torch, setting.dtype), on.type == "cpu"
    known = {x.name: getattr(case, x.name) for x in dataclasses.fields(case) if x.name not in ("name", "rank")}
    known |= {"direction": setting.direction, "dtype": dtype, "itemsize": dtype.itemsize, "on_cpu": on_cpu}
    major, minor = (0, 0) if on_cpu else torch.cuda.get_device_capability(on)
    known |= {"arch": None if on_cpu else 10 * major + minor, "threads": torch.get_num_threads() if on_cpu else None}
    known["pixel_bytes"] = 1  # tubelets are of clips as decoded
    if isinstance(case, AttentionCase):
        over_time, over_space = case.temporal_heads, case.H - case.temporal_heads
        kinds = [(case.S, over_time, case.T), (case.B * case.T, over_space, case.S)]
        known |= {"temporal_heads": over_time, "sequences": [kind for kind in kinds if kind[1]]}
    return known


def ask(function: Callable, known: dict[str, Any], *given: Any) -> Any:
    """Calls a function of a tiles.py with `given` and the facts its other parameters name."""
    return function(*given, **_asked(function, known, len(given)))


def _asked(function: Callable, known: dict[str, Any], given: int = 0) -> dict[str, Any]:
    names = list(inspect.signature(function).parameters)[given:]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"bench tune: {function.__module__}.{function.__name__} asks for {', '.join(unknown)}, which is no fact "
            f"of this operation; these are: {', '.join(known)}"
        )
    return {name: known[name] for name in names}


# ---- measuring ----


def measure(session: Session, backend: str, module: ModuleType, setting: Setting, seconds: float) -> Outcome:
    """Holds every candidate to the error budget, then times those within it, in turns, for about `seconds`."""
    known = facts(setting, session.device)
    outcome = Outcome(setting, ask(module.choose, known))
    first_of: dict[Any, Any] = {}
    for tile in dict.fromkeys([outcome.present, *ask(module.candidates, known)]):
        plan = ask(module.plan, known, tile) if hasattr(module, "plan") else tile
        outcome.same[tile] = first_of.setdefault(plan, tile)

    session.open(setting.case.op, setting.case.name, setting.dtype)
    for tile in first_of.values():
        try:
            with module.forced(tile):
                share, ms = _first(session, backend, setting.direction)
        except Exception as error:  # a tile that does not compile or fit is a result
            outcome.reason[tile] = ": ".join(explain(error))
        else:
            outcome.error[tile] = share
            if ms is None:
                outcome.reason[tile] = f"wrong: error {share:.3g} of the budget, not timed"
            else:
                outcome.first[tile] = ms
        if outcome.present not in outcome.first:
            return outcome

    call = session.call(session.candidate(backend), setting.direction)
    limit = _SCREEN * min(outcome.first.values())
    kept: dict[Any, Callable[[], object]] = {
        tile: partial(_forced, module, tile, call)
        for tile, ms in outcome.first.items()
        if tile == outcome.present or ms <= limit
    }
    outcome.ms = in_turns(session.timer, kept, ROUNDS, seconds / (len(kept) * ROUNDS))
    return outcome


def _first(session: Session, backend: str, direction: str) -> tuple[float, float | None]:
    """(share of the error budget used, ms of the better of two calls if that is within it)."""
    candidate = session.candidate(backend)
    share = session.error(candidate, direction)["share"]
    call = session.call(candidate, direction)
    return share, min(session.timer.once(call) for _ in range(2)) if share <= 1 else None


def _forced(module: ModuleType, tile: Any, call: Callable[[], object]) -> None:
    with module.forced(tile):
        call()


# ---- choosing ----


def ranked(outcomes: list[Outcome]) -> list[tuple[float, Any]]:
    """(geometric mean over settings of the median ratio to the present choice, tile) of the tiles that had turns in
    every setting, the fastest first."""

    def score(tile: Any) -> float:
        return statistics.geometric_mean(statistics.median(x.ratios(tile)) for x in outcomes)

    tiles = [tile for tile in outcomes[0].same if all(x.same.get(tile) in x.ms for x in outcomes)]
    return sorted(((score(tile), tile) for tile in tiles), key=lambda entry: entry[0])


def winner(outcomes: list[Outcome]) -> Any:
    """The fastest tile that gains 3 % on the whole, and loses 3 % in at most one round of each setting; else the
    present choice."""

    def steady(ratios: list[float]) -> bool:
        return sum(ratio > 1 + _GAIN for ratio in ratios) <= 1

    for score, tile in ranked(outcomes):
        if score <= 1 - _GAIN and all(steady(x.ratios(tile)) for x in outcomes):
            return tile
    return outcomes[0].present


# ---- what is printed ----


def _number(value: Any) -> str:
    return f"{value:_}" if isinstance(value, int) and not isinstance(value, bool) else repr(value)


def written(tile: Any, besides: Any = None) -> str:
    """The tile as source; `besides` another one: only the fields that differ."""
    values = {x.name: getattr(tile, x.name) for x in dataclasses.fields(tile)}
    if besides is not None:
        return ", ".join(f"{k}={_number(v)}" for k, v in values.items() if v != getattr(besides, k)) or "the same"
    return f"{type(tile).__name__}({', '.join(f'{k}={_number(v)}' for k, v in values.items())})"


def setting_table(outcome: Outcome) -> str:
    rows = []
    timed = sorted(outcome.first, key=lambda tile: statistics.median(outcome.ratios(tile)))
    for tile in [*timed, *outcome.reason]:
        name = "the present choice" if tile == outcome.present else written(tile, outcome.present)
        if tile in outcome.reason:
            rows.append((name, "-", "-", "-", outcome.reason[tile]))
            continue
        times = summary(outcome.ms.get(tile, [outcome.first[tile]]))
        spread = f"{times['p20']:.4g}-{times['p80']:.4g}" if tile in outcome.ms else "best of 2"
        ratio, share = f"{statistics.median(outcome.ratios(tile)):.3f}", f"{outcome.error[tile]:.2f}"
        rows.append((name, f"{times['median']:.4g}", spread, ratio, share))
    alike = sum(tile != timed_instead for tile, timed_instead in outcome.same.items())
    note = f"\n{alike} more candidates would run as one of these does" if alike else ""
    return table(("tile", "ms", "p20-p80", "/ present", "error/budget"), rows, 1) + note


def lines_to_paste(outcomes: list[Outcome], where: str) -> list[str]:
    """The tile of a rung under its reasons. where: machine and date."""
    present, best = outcomes[0].present, winner(outcomes)
    others = [tile for _, tile in ranked(outcomes) if any(x.same[tile] != x.same[best] for x in outcomes)]
    shown = [("", best), *((f"; runner-up ({written(tile, best)})", tile) for tile in others[:1])]
    if present not in (best, *others[:1]):
        shown.append((f"; before ({written(present, best)})", present))
    reasons = [f"{x.setting}: " + "".join(f"{name} {_ms(x, tile)}" for name, tile in shown).strip() for x in outcomes]
    comments = [
        line for text in [*reasons, where] for line in textwrap.wrap(f"# {text}", 112, subsequent_indent="#   ")
    ]
    return [*comments, f"return {written(best)}"]


def _ms(outcome: Outcome, tile: Any) -> str:
    return f"{statistics.median(outcome.ms[outcome.same[tile]]):.4g} ms"


def _report(module: ModuleType, rung: tuple[tuple[str, Any], ...], outcomes: list[Outcome], where: str) -> None:
    best, present = winner(outcomes), outcomes[0].present
    asked = ", ".join(f"{name}={value}" for name, value in rung)
    settled = (
        "the present choice stays" if best == present else f"{written(best, present)} instead of the present choice"
    )
    path = f"kernels/{module.__name__.replace('.', '/')}.py"
    print(f"\n{path}, choose({asked}): {settled}; to paste:\n")
    print(textwrap.indent("\n".join(lines_to_paste(outcomes, where)), "    "))


def tune(session: Session, backend: str, module: ModuleType, settings: list[Setting], seconds: float) -> bool:
    """Measures and prints; whether the present choice ran everywhere, within its budget."""
    rungs: dict[tuple, list[Outcome]] = {}
    failed = False
    for setting in settings:
        print(f"\n{setting}  backend {backend}  ({setting.case.shape})", flush=True)
        outcome = measure(session, backend, module, setting, seconds / len(settings))
        if not outcome.ms:
            print(f"  {outcome.reason[outcome.present]}")
            failed = True
            continue
        print(setting_table(outcome), flush=True)
        rung = tuple(_asked(module.choose, facts(setting, session.device)).items())
        rungs.setdefault(rung, []).append(outcome)
    where = f"{device.device_name(session.device)}, torch {torch.__version__}, {datetime.date.today()}"
    for rung, outcomes in rungs.items():
        _report(module, rung, outcomes, where)
    return not failed


def _parser(on: torch.device) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m bench tune", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("op", choices=OPS)
    parser.add_argument("--case", nargs="+", default=[], help="names or patterns; the headline cases without")
    parser.add_argument("--dtype", nargs="+", default=_DTYPES[on.type], choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--direction", nargs="+", default=_DIRECTIONS, choices=_DIRECTIONS)
    parser.add_argument("--backend", nargs="+", default=[], help="all that have tiles without; cuda on a GPU")
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing; checks and first calls come on top")
    return parser


def main(argv: list[str]) -> int:
    """0; 1 where the present choice fails; 2 for a name that is not known."""
    on = device.default_device()
    args = _parser(on).parse_args(argv)
    try:
        cases = select([args.op], args.case, on_cpu=on.type == "cpu")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not args.case:
        cases = [case for case in cases if case.rank == 0]
    found = [(backend, module) for module in tile_modules(args.op) for backend in module.BACKENDS]
    if not found:
        print(f"bench tune: {args.op} has no tiles.py, so nothing to tune: its torch backend has no sizes to choose")
        return 0
    # CUDA C++ runs on no CPU, to be tried there only where it is asked for: then it says so
    wanted = args.backend or [backend for backend, _ in found if backend != "cuda" or on.type == "cuda"]
    chosen = [entry for entry in found if entry[0] in wanted]
    if not chosen:
        names = ", ".join(backend for backend, _ in found)
        print(
            f"bench tune: no tiles of {args.op} are for {', '.join(args.backend)}; there are for {names}",
            file=sys.stderr,
        )
        return 2
    session = Session(on)
    settings = [Setting(*x) for x in ((c, dtype, way) for c in cases for dtype in args.dtype for way in args.direction)]
    fine = [tune(session, *entry, settings, args.seconds / len(chosen)) for entry in chosen]
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
