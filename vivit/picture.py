"""Pictures of a run: a prediction with its frames and attention roll-out, and the learning curve."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .evaluate import Prediction
from .model import ViViT
from .rollout import rollout
from .trials import summaries

INK, ACCENT, MUTED = "#1a1c20", "#d1495b", "#9aa1ad"


def pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ModuleNotFoundError(
            'pictures need matplotlib\n  -> pip install "vivit-kernels[train]"', name="matplotlib"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"font.size": 9, "axes.edgecolor": MUTED, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK}
    )
    return plt


def heat(clip: np.ndarray, map_YX: np.ndarray, low: float, high: float, colours: Any) -> np.ndarray:
    """The frame in grey with the map over it, smoothed to its size."""
    size = clip.shape[:2]
    smooth = F.interpolate(torch.from_numpy(map_YX)[None, None].float(), size, mode="bilinear")[0, 0].numpy()
    strength = np.clip((smooth - low) / max(high - low, 1e-12), 0, 1)[..., None]
    grey = np.repeat(clip.mean(-1, keepdims=True) / 255, 3, -1)
    return grey * (1 - 0.7 * strength) + colours(strength[..., 0])[..., :3] * 0.7 * strength


def prediction(
    model: ViViT,
    found: Prediction,
    path: str | Path,
    credit: str = "",
    truth: str = "",
    frame_numbers: Iterable[int] = (),
) -> Path:
    """Frames of the central view, the roll-out over them and over time, probabilities; writes a PNG."""
    plt = pyplot()
    device = next(model.parameters()).device
    map_TYX = rollout(model, found.clip[None].to(device))[0].cpu().numpy()
    clip, T = found.clip.numpy(), map_TYX.shape[0]
    starts = np.arange(T) * model.config.tubelet[0] if model.config.tokenization == "tubelet" else np.arange(T)
    shown = np.unique(np.linspace(0, T - 1, min(T, 8)).round().astype(int))
    numbers = list(frame_numbers)

    figure = plt.figure(figsize=(13, 6.6), facecolor="white")
    grid = figure.add_gridspec(
        3, len(shown), height_ratios=[1, 1, 0.9], hspace=0.16, wspace=0.06, left=0.07, right=0.98, top=0.87, bottom=0.12
    )
    low, high = (float(np.quantile(map_TYX, part)) for part in (0.3, 0.995))
    for column, t in enumerate(shown):
        frame = clip[starts[t]]
        label = f"frame {numbers[starts[t]]}" if numbers else f"frame {starts[t]}"
        for row, picture in enumerate((frame, heat(frame, map_TYX[t], low, high, plt.get_cmap("inferno")))):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(picture, interpolation="lanczos")
            axes.set_xticks([])
            axes.set_yticks([])
            for side in axes.spines.values():
                side.set_visible(False)
            if row == 0:
                axes.set_title(label, fontsize=8.5, color=INK, pad=4)
            if column == 0:
                axes.set_ylabel(("the clip", "attention roll-out")[row], fontsize=9.5)
    below = grid[2, :].subgridspec(1, 2, wspace=0.36)
    _over_time(figure.add_subplot(below[0]), map_TYX.sum((1, 2)))
    _probabilities(figure.add_subplot(below[1]), found.top, truth)
    name, probability = found.top[0]
    figure.text(0.07, 0.945, f"{name}: {probability:.1%}", fontsize=16, fontweight="bold", color=INK)
    figure.text(0.07, 0.915, f"{Path(found.file).name}" + (f"   (true: {truth})" if truth else ""), color="#555b66")
    if credit:
        figure.text(0.07, 0.02, credit, fontsize=8, color="#555b66")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _over_time(axes: Any, weights: np.ndarray) -> None:
    axes.bar(np.arange(len(weights)), weights, color=MUTED, width=0.7)
    axes.axhline(1 / len(weights), color=ACCENT, linewidth=1, linestyle="--")
    axes.set_xlabel("tubelet in time (dashed: all alike)")
    axes.set_ylabel("attention")
    axes.set_xticks(np.arange(len(weights)) if len(weights) <= 16 else [])
    axes.spines[["top", "right"]].set_visible(False)


def _probabilities(axes: Any, top: list[tuple[str, float]], truth: str) -> None:
    names, values = [n for n, _ in top][::-1], [v for _, v in top][::-1]
    bars = axes.barh(names, values, color=[ACCENT if v == max(values) else MUTED for v in values], height=0.6)
    axes.bar_label(bars, [f"{v:.1%}" for v in values], padding=4)
    axes.set_xlim(0, 1.15)
    axes.set_xticks([0, 0.5, 1])
    axes.set_xlabel("probability")
    axes.spines[["top", "right"]].set_visible(False)
    for text in axes.get_yticklabels():
        text.set_fontweight("bold" if text.get_text() == truth else "normal")


def learning_curve(logs: dict[str, Path], path: str | Path, chance: float) -> Path:
    """Training loss and validation top-1 of runs, from their log.jsonl."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for (name, file), colour in zip(logs.items(), (ACCENT, MUTED, INK, "#2e86ab"), strict=False):
        records = [json.loads(line) for line in file.read_text().splitlines()]
        loss = [(r["step"], r["loss"]) for r in records if "loss" in r]
        window = max(len(loss) // 40, 1)
        steps, values = np.array([s for s, _ in loss]), np.array([v for _, v in loss])
        smooth = np.convolve(values, np.ones(window) / window, "valid")
        left.plot(steps[window - 1 :], smooth, color=colour, label=name)
        tops = [(r["step"], r["val_top1"]) for r in records if "val_top1" in r]
        right.plot([s for s, _ in tops], [v for _, v in tops], color=colour, marker="o", markersize=4, label=name)
    right.axhline(chance, color=MUTED, linestyle="--", linewidth=1, label="chance")
    left.set(xlabel="step", ylabel="training loss")
    right.set(xlabel="step", ylabel="held-out top-1", ylim=(0, 1.02), xlim=(0, None))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, loc="lower right")
    path = Path(path)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


# ---- recipes side by side ----


def trials(records: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Held-out top-1 of every recipe, a dot for each seed, the bar their mean; what each adds, beside the paper's."""
    rows = summaries(records)
    plt = pyplot()
    height = 1.6 + 0.42 * len(rows)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, height), constrained_layout=True, sharey=True)
    _dots(left, [[100 * x for x in row.top1] for row in rows])
    left.axvline(100 / records[0]["classes"], color=MUTED, linestyle="--", linewidth=1)
    left.set(yticks=range(len(rows)), yticklabels=[row.label for row in rows], ylim=(len(rows) - 0.4, -0.6))
    left.set_xlabel(f"top-1 of {records[0]['clips']} held-out clips, % (dashed: chance)")
    right.axvline(0, color=MUTED, linewidth=1)
    _dots(right, [list(row.effect) for row in rows])
    told = [(row.paper, y) for y, row in enumerate(rows) if row.paper is not None]
    if told:
        right.plot(*zip(*told, strict=True), "D", markersize=7, markerfacecolor="none", markeredgecolor=INK)
    right.set_xlabel("points added, seed by seed" + "; hollow: the paper's, EPIC-Kitchens" * bool(told))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    return _saved(figure, path)


def _dots(axes: Any, rows: Sequence[Sequence[float]]) -> None:
    for y, values in enumerate(rows):
        if values:
            mean = sum(values) / len(values)
            axes.plot(values, [y] * len(values), "o", color=MUTED, markersize=4.5, zorder=2)
            axes.plot([mean, mean], [y - 0.28, y + 0.28], color=ACCENT, linewidth=3, zorder=3)


def recipes(records: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Two or three recipes over the steps, thin a seed, thick their mean; and the test of each at the end."""
    plt, rows = pyplot(), summaries(records)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10.5, 3.6), constrained_layout=True, gridspec_kw={"width_ratios": [2, 1]}
    )
    for row, colour in zip(rows, (MUTED, ACCENT, INK), strict=False):
        curves = [np.array(r["curve"], dtype=float) for r in records if r["trial"] == row.name and r["curve"]]
        for curve in curves:
            left.plot(curve[:, 0], 100 * curve[:, 1], color=colour, linewidth=0.7, alpha=0.6)
        if curves and len({len(curve) for curve in curves}) == 1:
            mean = np.mean(curves, axis=0)
            left.plot(
                mean[:, 0], 100 * mean[:, 1], color=colour, linewidth=2.2, marker="o", markersize=4, label=row.label
            )
    left.axhline(100 / records[0]["classes"], color=MUTED, linestyle="--", linewidth=1)
    left.set(xlabel="step", ylabel="validation top-1, % (dashed: chance)")
    left.legend(frameon=False, loc="lower right")
    _dots(right, [[100 * x for x in row.top1] for row in rows])
    right.set(yticks=range(len(rows)), yticklabels=[row.label for row in rows], ylim=(len(rows) - 0.4, -0.6))
    right.set_xlabel(f"top-1 of {records[0]['clips']} test clips, %")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return _saved(figure, path)


def _saved(figure: Any, path: str | Path) -> Path:
    """The same records give the same file, byte for byte."""
    import matplotlib

    plt, path = pyplot(), Path(path)
    with matplotlib.rc_context({"svg.hashsalt": "vivit", "svg.fonttype": "none"}):
        figure.savefig(path, dpi=110, metadata={"Date": None, "Creator": None} if path.suffix == ".svg" else {})
    plt.close(figure)
    return path
