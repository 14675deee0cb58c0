"""The tables as Markdown: how fast, how far from the limit, against whom, at what error, and where it loses."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vivit import ViViTConfig
from vivit.flops import count

from . import markdown as md
from .cases import CASES, AttentionCase
from .compare import (
    Group,
    by_device,
    by_dtype,
    clips,
    current,
    device,
    groups,
    in_order,
    is_headline,
    model_case,
    opening,
)
from .model_tables import MODELS, PAPER_MS
from .model_tables import name as name_of
from .record import Record, latest

_TWO, _FOUR = "factorized_encoder", "factorized_dot_product"
_STEPS = ("forward", "train")
_FAILED = ("crashed", "out of memory", "timed out")
_MOST_PLACES = 4  # in a sentence


def _kind(records: Iterable[Record], kind: str) -> list[Group]:
    return current(groups(record for record in records if record.kind == kind))


def _heading(record: Record, what: str = "") -> str:
    return f"**{device(record)}{', ' if what else ''}{what}**"


# ---- operations ----

_OPS_LEGEND = (
    "*ms*: median (20th–80th percentile) of one call, caches flushed before it. *limit*: share of the nearest ceiling "
    "(copy bandwidth, matrix products or exponentials), measured in the same run. *error*: share used of the [error "
    "budget]({root}kernels/vivit_kernels/numerics.py) against float64 (in brackets: the part of the output that was "
    "compared, if not all). *peak*: memory one call takes. *ratio*: time of the best peer over ours, in the same run "
    "(lowest–highest of the rounds); below 1 we are slower. *ideal*: the same against the best peer that gets its "
    "inputs, at no cost, in the layout it likes. *composed*: the same against our own composition of PyTorch ops, "
    "where another of our backends is shown. Shapes: [bench/cases.py]({root}bench/cases.py)."
)
_OPS_HEAD = "operation | direction | ours | ms | limit | error | peak | best peer, ms | ratio | ideal | composed"


def ops(records: list[Record]) -> list[str]:
    """Of each device one table: the first headline case of every operation, in the dtype its users run."""
    found = _kind(records, "op")
    lines = []
    for on_device in by_device(filter(is_headline, found)):
        opened = opening(by_dtype(on_device)[0])
        others = [group for group in found if device(group.first) == device(opened[0].first) and group not in opened]
        lines += ["", *_ops_table(opened), *md.spaced(_beyond(others))]
    return [_OPS_LEGEND.format(root=""), *lines] if lines else []


def all_ops(records: list[Record], root: str) -> list[str]:
    """Every case of every device and dtype. root: of the repository, as links from where this stands."""
    tables = [part for on_device in by_device(_kind(records, "op")) for part in by_dtype(on_device)]
    lines = [line for part in tables for line in ("", *_ops_table(in_order(part)))]
    return [_OPS_LEGEND.format(root=root), *lines] if lines else []


def _ops_table(found: list[Group]) -> list[str]:
    letters, rows, before = md.letters_of(found), [], None
    for group in found:
        case = f"{group.first.op} `{group.first.case}`"
        rows.append(["" if case == before else case, group.first.direction, *_ops_cells(group, letters)])
        before = case
    notes = md.sources(found)
    below = [*_verdict(found), *_no_time(found), *notes, *md.explained(str([rows, notes]))]
    heading = _heading(found[0].first, md.setting(found[0].first))
    return [heading, "", *md.table(_OPS_HEAD, rows, right=3), *md.spaced(below)]


def _ops_cells(group: Group, letters: dict[str, str]) -> list[str]:
    best, peer = group.best, group.best_peer
    theirs = f"`{peer.backend}` {md.three(peer.ms['median'])}" if peer else "none"
    if best is None:
        return ["none", "–", "–", "–", "–", theirs, "–", "–", "–"]
    spread = group.spread(best)
    ratio = md.times(group.ratio(best)) + (md.between(*spread) if spread else "")
    ideal = md.times(group.ratio(best, group.best_ideal)) if group.best_ideal else "–"
    composed = md.times(group.ratio(best, group.composed)) if group.composed not in (None, best) else "–"
    limit = f"{md.share(best, best.bound)} {best.bound}".strip()
    name = f"`{best.backend}`{md.marks(best)}{letters[best.run]}"
    return [name, md.milliseconds(best), limit, md.error(best), md.peak(best), theirs, ratio, ideal, composed]


def _verdict(found: list[Group]) -> list[str]:
    """Where we are slower than the best peer, said in words: in a table one overlooks it."""
    slower, compared, unclear = [], 0, 0
    for group in found:
        best = group.best
        if best is None or (ratio := group.ratio(best)) is None:
            continue
        compared += 1
        low, high = group.spread(best) or (ratio, ratio)
        unclear += low < 1 < high
        slower += [f"{_place(best, found)} ({md.times(ratio)})"] if ratio < 1 else []
    if not compared:
        return []
    text = f"Slower than the best peer in {len(slower)} of {compared} rows"
    tail = f" In {unclear} the rounds do not agree who is faster." if unclear else ""
    return [text + (": " if slower else "") + ", ".join(slower) + "." + tail]


def _listed(places: list[str]) -> str:
    places = list(dict.fromkeys(places))
    more = [f"{len(places) - _MOST_PLACES} more"] if len(places) > _MOST_PLACES else []
    return ", ".join(places[:_MOST_PLACES] + more)


def _no_time(found: list[Group]) -> list[str]:
    """A place is an operation, with its direction and case unless it is all that the table has of it."""
    tried: dict[str, set[tuple[str, str]]] = {}
    for group in found:
        tried.setdefault(group.first.op, set()).add((group.first.case, group.first.direction))

    def where(records: list[Record]) -> str:
        places = []
        for op in dict.fromkeys(record.op for record in records):
            failed = [record for record in records if record.op == op]
            whole = {(record.case, record.direction) for record in failed} == tried[op]
            places += [op] if whole else [_place(record, found) for record in failed]
        return _listed(places)

    text = md.no_time(found, where)
    return [f"No time: {text}"] if text else []


def _place(record: Record, found: list[Group]) -> str:
    """Operation and direction, and the case where the table has several of this operation."""
    cases = {group.first.case for group in found if group.first.op == record.op}
    return f"{record.op} {record.direction}" + (f" `{record.case}`" if len(cases) > 1 else "")


def _beyond(found: list[Group]) -> list[str]:
    """Who crashed or ran out of memory on a case that the table does not show: that is a result, too."""
    failed = [Group(tuple(r for r in group.untimed if r.status in _FAILED)) for group in in_order(found)]
    text = md.no_time((group for group in failed if group.records), _sizes)
    return [f"On other cases: {text}"] if text else []


def _sizes(records: list[Record]) -> str:
    """The smallest case, with its sequences x heads, which some kernels put into a grid dimension of 65,535."""
    cases = {(case.op, case.name): case for case in CASES}
    sizes: dict[str, int] = {}
    for record in records:
        case = cases.get((record.op, record.case))
        sizes[f"{record.op} `{record.case}`"] = case.sequences if isinstance(case, AttentionCase) else 0
    smallest = min(sizes, key=lambda name: sizes[name])
    many = f" with {sizes[smallest]:,} sequences × heads" if sizes[smallest] else ""
    more = f", and {len(sizes) - 1} more" if len(sizes) > 1 else ""
    return f"{smallest}{many}{more}"


# ---- whole models ----

_MODELS_LEGEND = (
    "*GFLOPs*: of one clip, forward, in the paper's count. *matmul*: share of the matrix-product rate that the same "
    "run measured. *error*: share used of the error budget against float64. *peak*: memory of one step above the "
    "loaded model. *against*: time of that implementation of the same model over ours, in the same run, below 1 we are "
    "slower; in brackets our peak as a multiple of its."
)
_MODELS_HEAD = (
    "model | step | clips | GFLOPs | ours | ms | clips/s | matmul | error | peak | against stock | against transformers"
)


def gflops(case: str) -> float | None:
    """Of one clip forward, as the paper counts; None for a model that is no ViViT."""
    model = model_case(case)
    if model is None:
        return None
    return count(ViViTConfig.preset(model.preset, attention=model.attention, frames=model.frames)).paper_gflops


def models(records: list[Record]) -> list[str]:
    """Of each device one table: every step in the first dtype that it was measured in."""
    lines = []
    for on_device in by_device(_kind(records, "model")):
        lines += ["", *_models_table(_first_dtypes(on_device))]
    return [_MODELS_LEGEND, *lines] if lines else []


def _first_dtypes(found: list[Group]) -> list[Group]:
    """Of every step the groups in the dtype that a reader looks for first."""
    first: dict[str, str] = {}
    for group in (group for part in by_dtype(found) for group in part):
        first.setdefault(group.first.op, md.setting(group.first))
    return [group for group in found if first[group.first.op] == md.setting(group.first)]


def all_models(records: list[Record]) -> list[str]:
    lines = [line for on_device in by_device(_kind(records, "model")) for line in ("", *_models_table(on_device))]
    return [_MODELS_LEGEND, *lines] if lines else []


def _models_order(group: Group) -> tuple:
    first, model = group.first, model_case(group.first.case)
    step = _STEPS.index(first.op) if first.op in _STEPS else len(_STEPS)
    what = (first.case, 0, 0) if model is None else (model.preset, model.frames, MODELS.index(model.attention))
    return step, first.dtype, md.setting(first), model is None, -(clips(first.case) or 0), *what


def _models_table(found: list[Group]) -> list[str]:
    ordered, letters = sorted(found, key=_models_order), md.letters_of(found)
    rows, notes = [_models_row(group, letters) for group in ordered], md.sources(ordered)
    untimed = md.no_time(ordered, lambda records: _listed([f"`{r.case}` {r.op} {r.dtype}" for r in records]))
    below = [*_four_against_two(ordered), *([f"No time: {untimed}"] if untimed else []), *notes]
    below += md.explained(str([rows, notes]))
    return [_heading(found[0].first), "", *md.table(_MODELS_HEAD, rows, right=2), *md.spaced(below)]


def _models_row(group: Group, letters: dict[str, str]) -> list[str]:
    first, best = group.first, group.best
    many, work = clips(first.case), gflops(first.case)
    row = [name_of(first.case), f"{first.op}, {md.setting(first)}", str(many or "–"), f"{work:.1f}" if work else "–"]
    against = [_against(group, name) for name in ("stock", "transformers")]
    if best is None:
        return [*row, "none", *["–"] * 5, *against]
    rate = md.three(many * 1e3 / best.ms["median"]) if many else "–"
    name = f"`{best.backend}`{md.marks(best)}{letters[best.run]}"
    return [*row, name, md.milliseconds(best), rate, md.share(best, "matmul"), md.error(best), md.peak(best), *against]


def _against(group: Group, name: str) -> str:
    """Ratios to the fastest peer whose name begins so; without ours its time, without its time the reason."""
    peer, best = group.peer(name), group.best
    if peer is None:
        return "–"
    if peer.status != "ok":
        return peer.status
    if best is None:
        return f"{md.three(peer.ms['median'])} ms"
    peaks = [record.memory.get("peak", 0.0) for record in (best, peer)]
    return md.times(group.ratio(best, peer)) + (f" ({md.times(peaks[0] / peaks[1])})" if all(peaks) else "")


def _four_against_two(found: list[Group]) -> list[str]:
    """The headline: both models of one run in this project's fastest backend, for every step, dtype and clips."""
    pairs: dict[tuple[str, int], dict[tuple, dict[str, Record]]] = {}
    for group in found:
        model, best = model_case(group.first.case), group.best
        if model is not None and best is not None:
            key = (best.run, best.op, md.setting(best), model.clips)
            pairs.setdefault((model.preset, model.frames), {}).setdefault(key, {})[model.attention] = best
    sentences = []
    for (preset, frames), measured in pairs.items():
        both = {key: (pair[_FOUR], pair[_TWO]) for key, pair in measured.items() if {_FOUR, _TWO} <= pair.keys()}
        if not both:
            continue
        ratios = [
            f"{md.three(four.ms['median'] / two.ms['median'])} ({step} {dtype}, clips: {many})"
            for (_, step, dtype, many), (four, two) in both.items()
        ]
        flops = [gflops(record.case) or 0.0 for record in next(iter(both.values()))]
        sentence = (
            f"**Model 4 against model 2**, {preset}, {frames} frames: measured time {', '.join(ratios)}; "
            f"FLOPs {md.three(flops[0] / flops[1])} ({flops[0]:.1f} against {flops[1]:.1f} G)"
        )
        if (preset, frames) == ("B/16x2", 32):
            sentence += f"; the paper, forward on a TPU-v3: {md.three(PAPER_MS[_FOUR] / PAPER_MS[_TWO])}"
        sentences.append(f"{sentence}.")
    return sentences


# ---- memory ----


def memory(records: list[Record]) -> list[str]:
    """Of each device how far every model goes, in the first dtype that a step was measured in."""
    head = "model | step | backend | 1 clip of 32 frames | most clips of 32 frames | most frames of 1 clip"
    lines = []
    for on_device in by_device(_memory_groups(records)):
        lines += ["", *_memory_table(_first_dtypes(on_device), head, _furthest)]
    return ["Peak memory of a step above the loaded model.", *lines] if lines else []


def all_memory(records: list[Record]) -> list[str]:
    """Every point that was measured."""

    def points(row: dict[tuple[int, int], tuple[Record, str]]) -> list[str]:
        return [" · ".join(f"{frames}×{many}: {row[frames, many][1]}" for frames, many in sorted(row))]

    head, lines = "model | step | backend | peak above the loaded model, at frames×clips", []
    for on_device in by_device(_memory_groups(records)):
        lines += ["", *_memory_table(on_device, head, points)]
    return lines[1:]


def _memory_groups(records: list[Record]) -> list[Group]:
    return [Group((record,)) for record in latest(records) if record.kind == "memory" and model_case(record.case)]


def _memory_table(found: list[Group], head: str, say: Callable[[dict], list[str]]) -> list[str]:
    letters, rows, notes = md.letters_of(found), {}, md.sources(found)
    for group in sorted(found, key=_models_order):
        record, model = group.first, model_case(group.first.case)
        assert model is not None
        name = f"{model.preset}: {MODELS.index(model.attention) + 1} {model.attention.replace('_', ' ')}"
        row = rows.setdefault((name, f"{record.op}, {md.setting(record)}", f"`{record.backend}`"), {})
        text = md.peak(record) if record.status == "ok" else record.status
        row[model.frames, model.clips] = record, text + md.marks(record) + letters[record.run]
    cells = [[*key, *say(row)] for key, row in rows.items()]
    below = [*notes, *md.explained(str([cells, notes]))]
    return [_heading(found[0].first), "", *md.table(head, cells, right=3), *md.spaced(below)]


def _furthest(row: dict[tuple[int, int], tuple[Record, str]]) -> list[str]:
    """The common point, then along clips and along frames the last that fitted and what came after it."""
    cells = [row[32, 1][1] if (32, 1) in row else "–"]
    for axis, fixed in ((1, 32), (0, 1)):
        line = sorted(point for point in row if point[1 - axis] == fixed)
        fitted = [point for point in line if row[point][0].status == "ok"]
        beyond = next((point for point in line if not fitted or point > fitted[-1]), None)
        parts = [f"{fitted[-1][axis]}: {row[fitted[-1]][1]}"] if fitted else []
        parts += [f"{beyond[axis]}: {row[beyond][1]}"] if beyond else []
        cells.append("; ".join(parts) or "–")
    return cells
