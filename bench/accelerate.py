"""`python -m bench accelerate`: models of others as they come against the same ones after accelerate(), in turns.

    python -m bench accelerate [--family ...] [--dtype ...] [--step forward train] [--rounds N] [--keep]

Both are in one process, with the same weights; in a round each has its turn, so that a busy machine slows both alike.
`--clock process` with OMP_NUM_THREADS=1 counts the time of the process alone, for a machine that others use, too. The
output is held to float64 under the error budget, and nothing outside of it is kept. `--keep` writes to
kernels/vivit_kernels/gains.jsonl, where accelerate() reads what to expect.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vivit_kernels import accelerate, gains
from vivit_kernels.accelerate import Report
from vivit_kernels.numerics import judge

from . import device, record
from .accelerate_models import FAMILIES, Subject, build
from .device import ROOT
from .peers import Missing, require

DTYPES = ("float32", "bfloat16", "autocast")
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "process": time.process_time}


def step_of(subject: Subject, model: nn.Module, step: str, dtype: str) -> Callable[[], Tensor]:
    """A call of the model, or one of its training steps, on the subject's inputs; gives the output."""

    def run() -> Tensor:
        model.zero_grad(set_to_none=True)
        with (
            torch.set_grad_enabled(step == "train"),
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"),
        ):
            output = subject.run(model)
        if step == "train":
            output.float().square().mean().backward()
        return output.detach()

    return run


def share_of(subject: Subject, ours: Tensor, stock: Tensor) -> float:
    """Of the error budget, against float64; above 1 it is outside."""
    exact = subject._replace(model=copy.deepcopy(subject.model)).to(torch.float64)
    with torch.no_grad():
        truth = exact.run(exact.model)
    return judge(ours, truth, stock, row=ours.shape[-1]).share


def in_turns(turns: list[Callable[[], Tensor]], rounds: int, clock: Callable[[], float]) -> list[tuple[float, ...]]:
    """ms of each turn in each round."""
    times: list[tuple[float, ...]] = []
    for _ in range(rounds):
        round_ms = []
        for turn in turns:
            began = clock()
            turn()
            round_ms.append((clock() - began) * 1e3)
        times.append(tuple(round_ms))
    return times


def prepared(
    family: str, dtype: str, layers: int | None, clips: int, small: bool = False
) -> tuple[Subject, nn.Module, Report]:
    """The model as it comes, the same one accelerated, and what accelerate() says of that."""
    subject = build(family, layers, clips, small).to(torch.float32 if dtype == "autocast" else getattr(torch, dtype))
    ours = copy.deepcopy(subject.model)
    return subject, ours, accelerate(ours, only=subject.host)


def ratios(family: str, dtype: str, step: str, rounds: int) -> list[float]:
    """Of one layer of a model, on few latents, by the time of the process: for a test that nothing became slower."""
    subject, ours, _ = prepared(family, dtype, 1, 1, small=True)
    turns = [step_of(subject, one, step, dtype) for one in (subject.model, ours)]
    for turn in turns:
        turn()
    return [stock_ms / ours_ms for stock_ms, ours_ms in in_turns(turns, rounds, CLOCKS["process"])]


def measure(family: str, dtype: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A record for each step that was asked for."""
    subject, ours, report = prepared(family, dtype, args.layers, args.clips)
    if args.report:
        print(report)
    share, found = None, []
    for step in args.step:
        turns = [step_of(subject, one, step, dtype) for one in (subject.model, ours)]
        stock_output, our_output = (turn() for turn in turns)
        if share is None:
            share = share_of(subject, our_output, stock_output)
        times = in_turns(turns, args.rounds, CLOCKS[args.clock])
        stock_ms, ours_ms = (statistics.median(column) for column in zip(*times, strict=True))
        made = facts(subject, step, dtype, args.clock)
        made |= {"stock_ms": round(stock_ms, 1), "ours_ms": round(ours_ms, 1), "ratio": round(stock_ms / ours_ms, 3)}
        made |= {"rounds": [round(a / b, 3) for a, b in times], "share": round(share, 3)}
        found.append(made)
    return found


def facts(subject: Subject, step: str, dtype: str, clock: str) -> dict[str, Any]:
    machine, (commit, dirty) = device.machine(torch.device("cpu")), device.commit()
    versions = {"torch": torch.__version__, subject.host: require(subject.host, "").__version__}
    return {
        "host": subject.host, "family": subject.family, "model": subject.size, "step": step, "dtype": dtype,
        "device": machine["device"], "clock": clock, "date": record.now(),
        "commit": commit + "+" * dirty, "versions": versions,
    }  # fmt: skip


def keep(made: dict[str, Any]) -> None:
    """In the place of an older record of the same comparison."""
    lines = gains.FILE.read_text().splitlines() if gains.FILE.exists() else []
    others = [line for line in lines if gains.key(json.loads(line)) != gains.key(made)]
    gains.FILE.write_text("\n".join([*others, json.dumps(made)]) + "\n")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m bench accelerate", description=(__doc__ or "").partition("\n")[0])
    top.add_argument("--family", nargs="+", default=FAMILIES, choices=FAMILIES, help="all")
    top.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=DTYPES, help="float32 bfloat16")
    top.add_argument("--step", nargs="+", default=["forward", "train"], choices=["forward", "train"], help="both")
    top.add_argument("--layers", type=int, help="fewer than the published model has")
    top.add_argument("--clips", type=int, default=1)
    top.add_argument("--rounds", type=int, default=5)
    top.add_argument("--clock", choices=CLOCKS, default="wall", help="process: with one thread, on a busy machine")
    top.add_argument("--report", action="store_true", help="print what accelerate() did")
    top.add_argument("--keep", action="store_true", help=f"into {gains.FILE.relative_to(ROOT)}")
    return top


def main(argv: list[str]) -> int:
    args, outside = parser().parse_args(argv), 0
    if args.clock == "process" and torch.get_num_threads() > 1:
        parser().error("--clock process counts every thread's time: set OMP_NUM_THREADS=1")
    for family in args.family:
        for dtype in args.dtype:
            try:
                found = measure(family, dtype, args)
            except Missing as missing:
                print(f"{family:<12}{dtype:<10}left out: {missing}")
                continue
            for made in found:
                low, high = min(made["rounds"]), max(made["rounds"])
                print(
                    f"{family:<12}{dtype:<10}{made['step']:<9}{made['stock_ms']:>9.1f} -> {made['ours_ms']:>9.1f} ms  "
                    f"{made['ratio']:.2f}x ({low:.2f}-{high:.2f})  {made['share']:.2f} of the error budget",
                    flush=True,
                )
                outside += made["share"] > 1
                if args.keep and made["share"] <= 1:
                    keep(made)
    return 1 if outside else 0
