"""README's table of what accelerate() gains models of others, from kernels/vivit_kernels/gains.jsonl."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .markdown import table

REPLACED = {
    "vivit": "embedding as one op, attention, MLPs",
    "videomae": "tubelets, attention, MLPs",
    "timesformer": "layers as blocks on the grid, patches, MLPs",
    "videoprism": "tubelets, attention with its soft-cap, MLPs",
    "vjepa2": "tubelets, attention, rotary embedding, MLPs",
    "LatteTransformer3DModel": "temporal layers on the grid, spatial attention, linear layers",
    "UNetMotionModel": "motion modules on the grid, spatial attention, linear layers",
    "UNetSpatioTemporalConditionModel": "temporal transformers on the grid, spatial attention, linear layers",
    "UNet3DConditionModel": "temporal transformers on the grid, spatial attention, linear layers",
    "WanTransformer3DModel": "joint attention and that to the text, linear layers",
    "CogVideoXTransformer3DModel": "joint attention, linear layers",
}
HEADER = "model | replaced | step | ratio (of the rounds) | error"


def lines(records: Iterable[dict[str, Any]]) -> list[str]:
    """A table for each device and clock; none of no record."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["device"], record["clock"]), []).append(record)
    found = []
    for (device, clock), group in groups.items():
        ordered = sorted(group, key=lambda record: (record["family"], record["step"], record["dtype"]))
        found += ["", f"**{device}**", "", *table(HEADER, [_row(record) for record in ordered], 3)]
        found += ["", _footer(ordered, clock)]
    if not found:
        return []
    head = (
        "*ratio*: time of the model as its library has it, with its SDPA where it has one, over that of the same one "
        "after `accelerate()`, in turns in one process; below 1 ours is slower. *error*: share used of the error "
        "budget against float64. `python -m bench accelerate` measures."
    )
    return [head, *found]


def _row(record: dict[str, Any]) -> list[str]:
    ratio = f"{record['ratio']:.2f}× ({min(record['rounds']):.2f}–{max(record['rounds']):.2f})"
    step = f"{record['step']}, {record['dtype']}"
    return [record["model"], REPLACED.get(record["family"], "–"), step, ratio, f"{record['share']:.2f}"]


def _footer(group: list[dict[str, Any]], clock: str) -> str:
    versions = dict.fromkeys(
        ", ".join(f"{name} {version}" for name, version in record["versions"].items()) for record in group
    )
    dates = sorted({record["date"][:10] for record in group})
    timed = "time of the process" if clock == "process" else "wall time"
    return f"{timed[0].upper()}{timed[1:]}; {'; '.join(versions)}; {', '.join(dates)}."
