"""Figures of the records: roofline, time against peers, memory against frames and clips. Needs matplotlib.

`planned(records)` names every figure the records can give and draws nothing; `save` draws one. The same records and the
same matplotlib give the same file, byte for byte.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .compare import (
    Group,
    ModelCase,
    by_device,
    by_dtype,
    current,
    device,
    groups,
    in_order,
    is_headline,
    model_case,
    opening,
)
from .device import slug
from .markdown import marks, setting, shown, source, three
from .record import Record, latest

WIDTH = 8.4  # inches; at README's width of about 830 pixels the fonts below keep their size
INK, OURS, PEER, MUTED = "#1a1c20", "#0b5fa5", "#c8ccd4", "#5c6370"
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "vivit-kernels",
    "svg.fonttype": "none",  # text as text: a tenth of the size
    "font.family": "sans-serif",
    "font.size": 8.5,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
# Okabe and Ito's colours and a marker each: lines stay apart without colour
_LINES = (("#0b5fa5", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#a5478c", "D"), ("#6b5900", "v"), ("#333333", "P"))


class Planned(NamedTuple):
    """A figure that the records can give. name: of its file, without suffix; kind: roofline, bars or memory."""

    kind: str
    device: str
    name: str
    caption: str
    draw: Callable[[], Any]


def planned(records: Iterable[Record]) -> list[Planned]:
    """Of each device and dtype a roofline, bars for each operation (in the first dtype for each headline case), and
    memory for each step."""
    records = list(records)
    of_ops = filter(is_headline, current(groups(record for record in records if record.kind == "op")))
    memory = [Group((record,)) for record in latest(records) if record.kind == "memory" and model_case(record.case)]
    figures = []
    for on_device in by_device([*of_ops, *memory]):
        parts = by_dtype(group for group in on_device if group.first.kind == "op")
        for part in parts:
            opened = opening(part)
            if _points(opened):
                figures.append(_planned("roofline", "roofline", "roofline", opened, _roofline))
            figures += _of_cases(part if part is parts[0] else opened)
        for part in by_dtype(group for group in on_device if group.first.kind == "memory"):
            figures += _of_steps(part)
    return figures


def _of_cases(part: list[Group]) -> Iterator[Planned]:
    cases: dict[tuple[str, str], list[Group]] = {}
    for group in in_order(part):
        cases.setdefault((group.first.op, group.first.case), []).append(group)
    for (op, case), found in cases.items():
        if any(group.timed for group in found):
            yield _planned("bars", f"{op}-{case.replace('.', '-')}", f"{op} {case}", found, _bars)


def _of_steps(part: list[Group]) -> Iterator[Planned]:
    for step in sorted({group.first.op for group in part}):
        found = [group for group in part if group.first.op == step]
        if any("peak" in group.first.memory for group in found):
            yield _planned("memory", f"memory-{step}", f"memory of a {step} step", found, _memory)


def _planned(kind: str, name: str, caption: str, found: list[Group], draw: Callable[[list[Group]], Any]) -> Planned:
    title = _title(found[0])
    return Planned(
        kind, device(found[0].first), f"{_stem(found[0])}-{name}", f"{caption}, {title}", lambda: draw(found)
    )


def save(figure: Planned, path: Path) -> None:
    """Draws into `path`, an .svg or .png. Raises ModuleNotFoundError without matplotlib."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's matplotlibrc must not change the file
        matplotlib.rcParams.update(_STYLE)
        path.parent.mkdir(parents=True, exist_ok=True)
        nothing = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
        figure.draw().savefig(path, dpi=150, facecolor="white", metadata=nothing)


def _stem(group: Group) -> str:
    record, malloc = group.first, group.first.machine.get("malloc", "default")
    return "-".join([slug(device(record)), record.dtype, *([] if malloc == "default" else [slug(str(malloc))])])


def _title(group: Group) -> str:
    return f"{device(group.first)}, {setting(group.first)}"


def _new(height: float, title: str, records: list[Record], *notes: str) -> Any:
    """A figure with its title, and below it how to read it and where its records come from."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.05))
    figure.suptitle(title, x=0.012, ha="left", fontsize=10.5, fontweight="bold")
    lines = [*notes, *dict.fromkeys(source(record) for record in records)]
    signs = "".join(dict.fromkeys("".join(map(marks, records))))
    meaning = {"†": "† older kernel", "‡": "‡ uncommitted changes", "§": "§ clocks held back", "¶": "¶ host slower"}
    lines += [", ".join(meaning[sign] for sign in signs)] if signs else []
    text = "\n".join(textwrap.fill(line, 135) for line in lines)
    figure.supxlabel(text, x=0.012, ha="left", fontsize=7, color=MUTED)
    return figure


# ---- roofline ----

_DIRECTION_MARKS = {"forward": "o", "backward": "s"}  # forward+backward is a mixture of the two
_BOX = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8}


def _roofline(found: list[Group]) -> Any:
    """Our fastest backend filled, the fastest honest peer hollow, a line from one to the other."""
    drawn = _points(found)
    figure = _new(4.8, f"Achieved against intensity: {_title(found[0])}", [best for _, best in drawn])
    axes = figure.add_subplot()
    axes.set(xscale="log", yscale="log", ylabel="TFLOP/s achieved")
    axes.set_xlabel("intensity, FLOP per byte (every input read once, every output written once)")
    tops: dict[str, tuple[float, float]] = {}
    for group, best in drawn:
        x, y, marker = best.flops / best.bytes, _tflops(best), _DIRECTION_MARKS[best.direction]
        if group.best_peer is not None:
            theirs = _tflops(group.best_peer)
            axes.plot([x, x], [y, theirs], color=MUTED, linewidth=0.9, zorder=2)
            axes.plot(x, theirs, marker, markersize=9, markerfacecolor="none", markeredgecolor=INK, zorder=5)
        axes.plot(
            x, y, marker, markersize=7, markerfacecolor=OURS, markeredgecolor="white", markeredgewidth=0.6, zorder=4
        )
        tops[best.op] = max(tops.get(best.op, (x, y)), (x, y), key=lambda point: point[1])
    for op, point in tops.items():
        style = {"textcoords": "offset points", "ha": "right", "va": "bottom", "fontsize": 9, "bbox": _BOX, "zorder": 6}
        axes.annotate(op, point, (-5, 4), **style)
    theirs = [_tflops(peer) for group, _ in drawn if (peer := group.best_peer)]
    _roofs(axes, [best for _, best in drawn], [*theirs, *(_tflops(best) for _, best in drawn)])
    _plain_ticks(axes.xaxis, axes.yaxis)
    for label, marker, face, edge in (
        ("ours, forward", "o", OURS, OURS), ("ours, backward", "s", OURS, OURS),
        ("best peer, forward", "o", "none", INK), ("best peer, backward", "s", "none", INK),
    ):  # fmt: skip
        axes.plot([], [], marker, markerfacecolor=face, markeredgecolor=edge, label=label)
    axes.legend(loc="lower right", ncols=2)
    return figure


def _points(found: list[Group]) -> list[tuple[Group, Record]]:
    best = [(group, group.best) for group in found if group.best]
    return [(group, record) for group, record in best if record.bytes and record.direction in _DIRECTION_MARKS]


def _tflops(record: Record) -> float:
    return record.flops / record.ms["median"] / 1e9


def _roofs(axes: Any, records: list[Record], reached: list[float]) -> None:
    """The ceilings of every run that the points are of; exponentials where joint attention's forward meets them.

    reached: TFLOP/s of every point.
    """
    intensities = [record.flops / record.bytes for record in records]
    left, right = min(intensities) / 4, max(intensities) * 4
    runs = {record.run: record.ceilings for record in records}
    tops = [limits["matmul_tflops"] for limits in runs.values() if "matmul_tflops" in limits]
    copies = sorted(limits["copy_gbps"] for limits in runs.values() if "copy_gbps" in limits)
    said = " to ".join(dict.fromkeys(map(three, (copies[0], copies[-1])))) if copies else ""
    for limits in runs.values():
        copy, matmul = limits.get("copy_gbps", 0.0) / 1e3, limits.get("matmul_tflops", float("inf"))
        if copy:
            ridge = min(matmul / copy, right)
            axes.plot([left, ridge], [left * copy, ridge * copy], color=MUTED, linewidth=1.6, zorder=1)
            x = left**0.1 * ridge**0.9  # near the ridge, left of the slope: nothing can be there
            if limits["copy_gbps"] == copies[-1]:
                style = {"textcoords": "offset points", "color": MUTED}
                axes.annotate(f"copy {said} GB/s", (left, x * copy), (4, 0), **style)
        if "matmul_tflops" in limits:
            axes.plot([matmul / copy if copy else left, right], [matmul] * 2, color=MUTED, linewidth=1.6, zorder=1)
            style = {"textcoords": "offset points", "ha": "right", "color": MUTED, "bbox": _BOX}
            if matmul == max(tops):
                axes.annotate(f"matrix products {three(matmul)} TFLOP/s", (right, matmul), (-2, 4), **style)
    for record in records:
        if (record.op, record.direction) == ("joint", "forward") and record.exps and record.ceilings.get("exp_gops"):
            limit = record.flops / record.exps * record.ceilings["exp_gops"] / 1e3
            axes.plot([left, right], [limit] * 2, color=MUTED, linewidth=1, linestyle=":", zorder=1)
            text = f"exponentials, joint forward: {three(limit)} TFLOP/s"
            axes.annotate(text, (left, limit), (5, 3), textcoords="offset points", color=MUTED)
            tops.append(limit)
    axes.set(xlim=(left, right), ylim=(min(reached) / 4, max([*tops, *reached]) * 2))


def _plain_ticks(*axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    for axis in axes:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


# ---- bars ----

_BARS = (
    "Medians; the line at a bar's end goes from the 20th to the 80th percentile. Solid and first: this project. "
    "Hatched: a peer that gets its inputs, at no cost, in the layout it likes."
)


def _bars(found: list[Group]) -> Any:
    """Of one case a panel for each direction: ours first, then peers ascending, then those without a time, in words."""
    first, rows = found[0].first, [_rows(group) for group in found]
    heights = [len(rows_of) + 1.6 for rows_of in rows]
    title = f"{first.op} {first.case}, {setting(first)}: {first.shape}"
    figure = _new(0.7 + 0.2 * sum(heights) + 0.3 * len(found), title, [shown(group) for group in found], _BARS)
    panels = figure.subplots(len(found), squeeze=False, height_ratios=heights)[:, 0]
    for axes, group, rows_of in zip(panels, found, rows, strict=True):
        _panel(axes, group, rows_of)
    return figure


class Row(NamedTuple):
    label: str
    record: Record | None  # with a time
    words: str = ""  # instead of one


def _rows(group: Group) -> list[Row]:
    timed = [*group.ours, *(record for record in group.timed if record not in group.ours)]
    rows = [Row(record.backend + (marks(record) if record.ours else ""), record) for record in timed]
    said: dict[tuple[str, str], list[str]] = {}
    for record in group.untimed:
        said.setdefault((record.status, " ".join(record.reason.split())), []).append(record.backend)
    for (status, reason), names in said.items():
        words = f"{status}: {reason}" if reason else status
        if len(names) > 1:  # one row for all that say the same
            names, words = [f"{len(names)} peers"], f"{', '.join(names)} {words}"
        rows.append(Row(names[0], None, textwrap.shorten(words, 105, placeholder=" ...")))
    return rows


def _panel(axes: Any, group: Group, rows: list[Row]) -> None:
    values, floor = [row.record.ms["median"] for row in rows if row.record], _floor(group.best)
    is_wide = bool(values) and max(values) > 30 * min(values)
    limit = f"; dashed: limit by {group.best.bound}, {three(floor)}" if group.best and floor else ""
    axes.set_title(f"{group.first.direction}, ms{' (logarithmic)' if is_wide else ''}{limit}")
    axes.set(yticks=range(len(rows)), yticklabels=[row.label for row in rows], ylim=(len(rows) - 0.4, -0.6))
    if is_wide:
        axes.set(xscale="log", xlim=(min(floor or values[0], *values) / 1.5, max(values) * 4))
    elif values:
        axes.set_xlim(0, max(values) * 1.25)
    if floor:
        axes.axvline(floor, color=INK, linewidth=1, linestyle="--", zorder=3)
    for y, row in enumerate(rows):
        if row.record is None:
            where = {"transform": axes.get_yaxis_transform(), "va": "center", "bbox": _BOX, "zorder": 4}
            axes.text(0.008, y, row.words, fontsize=7.5, style="italic", **where)
            continue
        record, width = row.record, row.record.ms["median"]
        style: dict[str, Any] = {"color": OURS} if record.ours else {"color": PEER, "edgecolor": MUTED}
        if record.ideal:
            style = {"color": "white", "edgecolor": MUTED, "hatch": "////"}
        axes.barh(y, width, 0.72, linewidth=0.6, **style)
        if "p20" in record.ms and "p80" in record.ms:
            axes.plot([record.ms["p20"], record.ms["p80"]], [y, y], color=INK, linewidth=1.2, solid_capstyle="butt")
        end = max(width, record.ms.get("p80", 0.0))
        axes.annotate(_said(group, record), (end, y), (4, 0), textcoords="offset points", va="center", fontsize=8)
    _plain_ticks(axes.xaxis)
    axes.tick_params(axis="y", length=0)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row.record and row.record.ours else "normal")


def _floor(record: Record | None) -> float:
    """The least ms that the nearest ceiling of that run allows; 0 if none is known."""
    return record.ms["median"] * record.share.get(record.bound, 0.0) if record else 0.0


def _said(group: Group, record: Record) -> str:
    """The time, and of a peer how it stands to our best backend."""
    ratio = group.ratio(group.best, record) if group.best and not record.ours else None
    return three(record.ms["median"]) + (f"   {three(ratio)}× ours" if ratio else "")


# ---- memory ----

_PANELS = (("frames", "clips"), ("clips", "frames"))  # (against this, at one value of that)


def _memory(found: list[Group]) -> Any:
    """A row for each model: peak memory against frames, and against clips; a cross where there was none left."""
    records = [group.first for group in found]
    cases = [(case, record) for record in records if (case := model_case(record.case))]
    models = list(dict.fromkeys((case.preset, case.attention) for case, _ in cases))
    backends = sorted({(not record.ours, record.backend) for record in records})
    title = f"Peak memory of a step above the loaded model, {records[0].op}: {_title(found[0])}"
    figure = _new(1.1 + 1.9 * len(models), f"{title}\n", records)  # the second line is the legend's
    grid = figure.subplots(len(models), len(_PANELS), squeeze=False)
    for row, model in zip(grid, models, strict=True):
        of_model = [(case, record) for case, record in cases if (case.preset, case.attention) == model]
        for axes, (against, fixed) in zip(row, _PANELS, strict=True):
            value = _most_points(of_model, against, fixed)
            axes.set_title(f"{model[0]} {model[1].replace('_', ' ')}, {fixed}: {value}", fontsize=9)
            axes.set(xscale="log", xlabel=against, ylabel="GiB")
            sizes = sorted({getattr(case, against) for case, _ in of_model if getattr(case, fixed) == value})
            axes.set_xticks(sizes, map(str, sizes))
            axes.minorticks_off()
            for (theirs, backend), (colour, marker) in zip(backends, _LINES * len(backends), strict=False):
                points = sorted(
                    (getattr(case, against), record.memory["peak"] if record.status == "ok" else None)
                    for case, record in of_model
                    if getattr(case, fixed) == value and record.backend == backend
                    and record.status in ("ok", "out of memory")
                )  # fmt: skip
                _line(axes, points, colour, marker, backend, bool(theirs))
            axes.set_ylim(bottom=0)
    _memory_legend(figure, grid)
    return figure


def _most_points(cases: list[tuple[ModelCase, Record]], against: str, fixed: str) -> int:
    """The value of `fixed` at which `against` takes most values, the smallest of several."""
    taken: dict[int, set[int]] = {}
    for case, _ in cases:
        taken.setdefault(getattr(case, fixed), set()).add(getattr(case, against))
    return min(taken, key=lambda value: (-len(taken[value]), value))


def _line(
    axes: Any, points: list[tuple[int, float | None]], colour: str, marker: str, label: str, is_peer: bool
) -> None:
    fitted = [(x, peak / 2**30) for x, peak in points if peak is not None]
    if not fitted:
        return
    style = {"color": colour, "markersize": 5, "linewidth": 1.4, "linestyle": "--" if is_peer else "-"}
    axes.plot(
        *zip(*fitted, strict=True), marker=marker, markerfacecolor="white" if is_peer else colour, label=label, **style
    )
    beyond = [x for x, peak in points if peak is None and x > fitted[-1][0]]
    if beyond:
        last, height = fitted[-1]
        axes.plot([last, beyond[0]], [height] * 2, color=colour, linewidth=1, linestyle=":")
        axes.plot(beyond[0], height, "x", color=colour, markersize=8, markeredgewidth=2)


def _memory_legend(figure: Any, grid: Any) -> None:
    found = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    found["out of memory there"] = grid.flat[0].plot([], [], "x", color=INK, markersize=8, markeredgewidth=2)[0]
    below_title = (0, 1 - 0.22 / figure.get_size_inches()[1])
    figure.legend(found.values(), found.keys(), loc="upper left", bbox_to_anchor=below_title, ncols=6, fontsize=8)
