"""`python -m bench accelerate`: models of transformers as they come against the same ones after accelerate(), in turns.

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
from vivit_kernels.numerics import judge

from . import device, record
from .device import ROOT
from .peers import Missing, require

DTYPES = ("float32", "bfloat16", "autocast")
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "process": time.process_time}
# Family: its config and model, what differs from the published base model, the clip (F, Y, X), options of its forward
FAMILIES: dict[str, tuple[str, str, dict[str, Any], tuple[int, int, int], dict[str, Any]]] = {
    "vivit": ("VivitConfig", "VivitModel", {}, (32, 224, 224), {}),
    "videomae": ("VideoMAEConfig", "VideoMAEModel", {}, (16, 224, 224), {}),
    "timesformer": ("TimesformerConfig", "TimesformerModel", {}, (8, 224, 224), {}),
    "videoprism": ("VideoPrismVisionConfig", "VideoPrismVisionModel", {}, (16, 288, 288), {}),
    "vjepa2": (  # the published ones begin at L
        "VJEPA2Config",
        "VJEPA2Model",
        dict(hidden_size=768, num_attention_heads=12, num_hidden_layers=12, frames_per_clip=16, crop_size=224),
        (16, 224, 224),
        dict(skip_predictor=True),
    ),
}


def build(family: str, dtype: str, layers: int | None, clips: int) -> tuple[Any, Tensor, str]:
    """The model as it comes, its clips, and what a record calls it. Raises Missing where transformers has no such."""
    package = require("transformers", "pip install transformers")
    config_name, name, changes, (frames, rows, columns), _ = FAMILIES[family]
    if not hasattr(package, name):
        raise Missing(f"transformers {package.__version__} has no {name}")
    changes = dict(changes)
    if layers is not None:
        changes |= {"num_spatial_layers" if family == "videoprism" else "num_hidden_layers": layers}
    config = getattr(package, config_name)(**changes)
    torch.manual_seed(0)
    model = getattr(package, name)(config)
    kept = torch.float32 if dtype == "autocast" else getattr(torch, dtype)
    pixels = torch.rand(clips, frames, 3, rows, columns) * 2 - 1
    depth = f", {layers} layers" if layers is not None else ""
    size = f"{name}, width {config.hidden_size}, {clips} clip of {frames}x{rows}x{columns}{depth}"
    return model.to(kept).eval(), pixels.to(kept), size


def step_of(model: nn.Module, pixels: Tensor, step: str, dtype: str, options: dict[str, Any]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        model.zero_grad(set_to_none=True)
        with (
            torch.set_grad_enabled(step == "train"),
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"),
        ):
            output = model(pixels, **options).last_hidden_state
        if step == "train":
            output.float().square().mean().backward()
        return output.detach()

    return run


def share_of(model: Any, ours: Tensor, stock: Tensor, pixels: Tensor, options: dict[str, Any]) -> float:
    """Of the error budget, against float64; above 1 it is outside."""
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        truth = exact(pixels.double(), **options).last_hidden_state
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


def ratios(family: str, dtype: str, step: str, rounds: int) -> list[float]:
    """Of one layer of a model, by the time of the process: for a test that nothing became slower."""
    model, pixels, _ = build(family, dtype, 1, 1)
    ours = copy.deepcopy(model)
    accelerate(ours, only="transformers")
    turns = [step_of(one, pixels, step, dtype, FAMILIES[family][4]) for one in (model, ours)]
    for turn in turns:
        turn()
    return [stock_ms / ours_ms for stock_ms, ours_ms in in_turns(turns, rounds, CLOCKS["process"])]


def measure(family: str, dtype: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A record for each step that was asked for."""
    model, pixels, size = build(family, dtype, args.layers, args.clips)
    options, ours, clock = FAMILIES[family][4], copy.deepcopy(model), CLOCKS[args.clock]
    report = accelerate(ours, only="transformers")
    if args.report:
        print(report)
    share, found = None, []
    for step in args.step:
        turns = [step_of(one, pixels, step, dtype, options) for one in (model, ours)]
        stock_output, our_output = (turn() for turn in turns)
        if share is None:
            share = share_of(model, our_output, stock_output, pixels, options)
        times = in_turns(turns, args.rounds, clock)
        stock_ms, ours_ms = (statistics.median(column) for column in zip(*times, strict=True))
        made = facts(family, size, step, dtype, args.clock)
        made |= {"stock_ms": round(stock_ms, 1), "ours_ms": round(ours_ms, 1), "ratio": round(stock_ms / ours_ms, 3)}
        made |= {"rounds": [round(a / b, 3) for a, b in times], "share": round(share, 3)}
        found.append(made)
    return found


def facts(family: str, size: str, step: str, dtype: str, clock: str) -> dict[str, Any]:
    machine, (commit, dirty) = device.machine(torch.device("cpu")), device.commit()
    versions = {"torch": torch.__version__, "transformers": require("transformers", "").__version__}
    return {
        "host": "transformers", "family": family, "model": size, "step": step, "dtype": dtype,
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
    top.add_argument("--family", nargs="+", default=list(FAMILIES), choices=FAMILIES, help="all")
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
