"""What a run of whole models shows: a line per model, the table by ratio, and the paper's Table 2 as measured time."""

from __future__ import annotations

from collections.abc import Iterable

from vivit import ViViTConfig, flops
from vivit.config import MODELS

from .compare import Group, clips, model_case
from .record import Record

# ViViT (arXiv 2103.15691), Table 2: models 1 to 4 at ViViT-B/16x2 with 32 frames, ms of one clip on a TPU-v3
PAPER_MS: dict[str, float] = dict(zip(MODELS, (58.9, 17.4, 31.7, 22.9), strict=True))
MIB = 2**20


def name(case: str) -> str:
    """Of a case as tables show it: preset, frames where they are not 32, and which of the paper's models."""
    model = model_case(case)
    if model is None:
        return f"`{case}`"
    frames = "" if model.frames == 32 else f", {model.frames} frames"
    return f"{model.preset}{frames}: {MODELS.index(model.attention) + 1} {model.attention.replace('_', ' ')}"


def row(record: Record) -> str:
    """One model, or why there is no time, on one line."""
    start = f"{record.case:<46}{record.op:<8}{record.dtype:<9} {('* ' if record.ours else '  ') + record.backend:<21}"
    if record.status != "ok":
        return ("NOT STORED  " if record.status == "wrong" else "") + f"{start}{record.status}: {record.reason}"
    ms, memory = record.ms, record.memory
    reserved = f" ({memory['reserved'] / MIB:.0f} reserved)" if "reserved" in memory else ""
    return (
        f"{start}{ms['median']:>9.4g} ms {ms['p20']:.4g}-{ms['p80']:.4g}  {_rate(record):.3g} clips/s  "
        f"{100 * record.share.get('matmul', 0.0):.0f} % of matmul  error {record.error['share']:.2f}  "
        f"peak {memory.get('peak', 0) / MIB:.0f} MiB over {memory.get('loaded', 0) / MIB:.0f}{reserved}"
    )


def _rate(record: Record) -> float:
    return 1e3 * (clips(record.case) or 1) / record.ms["median"]


def report(groups: list[Group]) -> list[str]:
    """The final lines of a run."""
    lines = [*by_ratio(groups), *table2(groups)]
    failed = [record for group in groups for record in group.untimed]
    if failed:
        lines += ["", "Without a time", *map(row, failed)]
    held = sorted(
        {str(record.clocks["throttled"]) for g in groups for record in g.timed if record.clocks.get("throttled")}
    )
    if held:
        lines += ["", f"The GPU held its clocks back ({'; '.join(held)}): these times are not the card's best"]
    if any(record.share.get("matmul", 0.0) > 1 for group in groups for record in group.timed):
        lines += ["", "Shares above 100 %: the machine was busier while its ceilings were measured; run it again"]
    return lines


def by_ratio(groups: list[Group]) -> list[str]:
    """This project's backends, the highest ratio to the best peer first."""
    rows = [(group.ratio(record) or 0.0, group, record) for group in groups for record in group.ours]
    if not rows:
        return []
    lines = [
        "",
        "This project, by the ratio to the best peer in turns with it (above 1: faster); memory: peak over loaded, MiB",
        f"{'model':<46}{'step':<8}{'dtype':<9} {'backend':<8}{'ms':>9}{'clips/s':>9}{'matmul':>8}{'error':>7}"
        f"{'memory':>8}  {'best peer':<19}{'ms':>9}{'memory':>8}{'ratio':>7}  over rounds",
    ]
    for ratio, group, r in sorted(rows, key=lambda entry: -entry[0]):
        start = (
            f"{r.case:<46}{r.op:<8}{r.dtype:<9} {r.backend:<8}{r.ms['median']:>9.4g}{_rate(r):>9.3g}"
            f"{100 * r.share.get('matmul', 0.0):>6.0f} %{r.error['share']:>7.2f}{r.memory.get('peak', 0) / MIB:>8.0f}  "
        )
        best, spread = group.best_peer, group.spread(r)
        if best is None:
            lines.append(f"{start}no peer ran")
            continue
        over = f"  {spread[0]:.2f}-{spread[1]:.2f}" if spread else ""
        peak = best.memory.get("peak", 0) / MIB
        lines.append(f"{start}{best.backend:<19}{best.ms['median']:>9.4g}{peak:>8.0f}{ratio:>7.2f}{over}")
    return lines


def table2(groups: Iterable[Group]) -> list[str]:
    """The paper's Table 2: FLOPs against measured time, for every forward in which models 2 and 4 have one."""
    tables: dict[tuple, dict[str, Group]] = {}
    for group in groups:
        case = model_case(group.first.case)
        if case and group.first.op == "forward":
            key = (case.preset, case.frames, case.clips, group.first.dtype)
            tables.setdefault(key, {})[case.attention] = group
    lines = []
    for (preset, frames, many, dtype), models in tables.items():
        columns = {who: times for who, times in _columns(models).items() if set(MODELS[1::2]) <= times.keys()}
        if columns:
            title = f"{preset}, {frames} frames, {many} clip{'s' * (many > 1)}, {dtype}"
            lines += ["", *_table2(title, preset, frames, columns)]
    return lines


def _columns(models: dict[str, Group]) -> dict[str, dict[str, float]]:
    """Who -> model -> ms: this project by its fastest backend, and the stock peers."""
    columns: dict[str, dict[str, float]] = {}
    for attention, group in models.items():
        if group.best is not None:
            columns.setdefault("this project", {})[attention] = group.best.ms["median"]
        for peer in group.peers:
            if peer.backend.startswith("stock"):
                columns.setdefault(peer.backend, {})[attention] = peer.ms["median"]
    return columns


def _table2(title: str, preset: str, frames: int, columns: dict[str, dict[str, float]]) -> list[str]:
    """Every number with its ratio to model 2, the factorised encoder."""
    gflops: dict[str, float] = {
        attention: flops.count(ViViTConfig.preset(preset, attention=attention, frames=frames)).paper_gflops
        for attention in MODELS
        if any(attention in times for times in columns.values())
    }
    whole: dict[str, dict[str, float]] = {"GFLOPs": gflops}
    if (preset, frames) == ("B/16x2", 32):
        whole["TPU-v3 ms"] = PAPER_MS
    whole |= {f"{who} ms": times for who, times in columns.items()}
    lines = [
        f"The paper's Table 2 here: {title}; in brackets, as many times as model 2",
        f"{'model':<30}" + "".join(f"{name:>22}" for name in whole),
    ]
    for attention in gflops:
        cells = [_cell(numbers, attention) for numbers in whole.values()]
        lines.append(f"{MODELS.index(attention) + 1} {attention:<28}" + "".join(f"{cell:>22}" for cell in cells))
    ratios = [f"{name.removesuffix(' ms')} {x[MODELS[3]] / x[MODELS[1]]:.2f}" for name, x in whole.items()]
    return [*lines, f"Model 4 against model 2: {', '.join(ratios)}"]


def _cell(numbers: dict[str, float], attention: str) -> str:
    if attention not in numbers:
        return "-"
    return f"{numbers[attention]:.4g} ({numbers[attention] / numbers[MODELS[1]]:.2f})"
