"""What accelerate() was measured to gain, for its report: gains.jsonl, which `python -m bench accelerate` writes.

A line is one comparison: a model of a host library as it comes, and the same one accelerated, in turns in one process.

    host, family, model    "transformers", "vivit", and which size of it, on what clip
    step, dtype            "forward" or "train", of float32, bfloat16 or autocast (float32 weights, bfloat16 products)
    device, clock          the processor or GPU; "wall", or "process" (its own time, for one thread on a busy machine)
    stock_ms, ours_ms      medians of the rounds; ratio: of the first to the second, below 1 the accelerated is slower
    rounds                 the ratio in each round
    share                  of the error budget against float64 that the accelerated output uses
    date, commit, versions when, of which code, with which PyTorch and host
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

FILE = Path(__file__).with_name("gains.jsonl")
_THREADS = re.compile(r" \d+ threads$")  # at the end of a processor's name in a record


@cache
def records() -> tuple[dict[str, Any], ...]:
    """All of the file, the last of each comparison."""
    lines = FILE.read_text().splitlines() if FILE.exists() else []
    return tuple({key(record): record for record in map(json.loads, lines)}.values())


def key(record: dict[str, Any]) -> tuple[str, ...]:
    """What two records of one comparison share."""
    return tuple(record[name] for name in ("host", "family", "model", "step", "dtype", "device", "clock"))


def expected(host: str, family: str, module: nn.Module) -> str:
    """Of the whole model that a module of this family is in, on this kind of device, in its dtype; "" if not measured.

    A record of this very processor or GPU if there is one, else of another one, which the text names.
    """
    parameter = next(module.parameters(), None)
    dtype, device = ("float32", "cpu") if parameter is None else (str(parameter.dtype)[6:], parameter.device.type)
    found = [
        record
        for record in records()
        if (record["host"], record["family"]) == (host, family)
        and (record["dtype"] == dtype or (record["dtype"] == "autocast" and dtype == "float32"))
        and is_gpu(record) == (device == "cuda")
    ]
    here = [record for record in found if _THREADS.sub("", record["device"]) == name_of(device)] or found
    here = [record for record in here if all(record[name] == here[-1][name] for name in ("device", "model", "clock"))]
    if not here:
        return ""
    last = here[-1]
    return (
        f"whole model: {', '.join(map(_figure, here))} ({last['model']}, {last['device']}, "
        + ("time of the process, " if last["clock"] == "process" else "")
        + f"{last['date'][:10]})"
    )


def _figure(record: dict[str, Any]) -> str:
    step = "training step" if record["step"] == "train" else record["step"]
    return f"{step} {record['dtype']} {record['ratio']:.2f}x"


def is_gpu(record: dict[str, Any]) -> bool:
    return "cuda" in record["versions"]


@cache
def name_of(device: str) -> str:
    """The first GPU's name, or the processor's model as Linux has it and what PyTorch uses of it: clouds sell one model
    with and without AMX. What fits no record where the model is not known."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    extras = (("AMX", "_is_amx_tile_supported"), ("bf16", "_is_avx512_bf16_supported"))
    there = [extra for extra, is_supported in extras if getattr(torch.cpu, is_supported, bool)()]
    return " ".join([model, torch.backends.cpu.get_cpu_capability(), *there])
