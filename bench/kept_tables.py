"""README's figure and line of where a training step's bytes are, from bench/results/kept.json."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from .kept import KINDS, STATE
from .plots import INK, MUTED, Planned

NAME = "training-step-bytes"
_LABELS = {"stock": "stock PyTorch", "transformers_sdpa": "transformers, SDPA"}
# Light to dark within a family: what every step has, what follows the tokens, what the MLP keeps
_WRITTEN_OUT = " transformers writes its GELU out in elementary operations, and autograd keeps the result of each."
_GREYS, _BLUES = ("#5c6370", "#8d94a0", "#c0c5cd"), ("#0b5fa5", "#4f93c8", "#9cc3e3")
_COLOURS = dict(
    zip((*STATE, *KINDS), (*_GREYS, "#e3d9a8", *_BLUES, "#009e73", "#d55e00", "#f0a868", "#333333"), strict=True)
)


def label(made: dict[str, Any]) -> str:
    return _LABELS.get(made["who"], f'memory="{made["who"]}"')


def _named(made: dict[str, Any]) -> str:
    return _LABELS.get(made["who"], f"`{made['who']}`")


def activations(made: dict[str, Any]) -> int:
    return sum(size for kind, size in made["bytes"].items() if kind not in STATE)


def lines(records: Sequence[dict[str, Any]], figures: str) -> list[str]:
    """The picture, how to read it, and what each keeps of what stock PyTorch keeps."""
    if not records:
        return []
    stock = next((activations(made) for made in records if made["who"] == "stock"), 0)
    shares = [
        f"{_named(made)} {activations(made) / 2**20:,.0f} MiB"
        + (f" ({activations(made) / stock:.2f})" if stock else "")
        for made in records
    ]
    return [
        f"![bytes of a training step by kind]({figures}/{NAME}.svg)",
        "",
        "Kept from forward for backward (in brackets, of stock PyTorch's): "
        + "; ".join(shares)
        + "."
        + _WRITTEN_OUT * any(made["who"].startswith("transformers") for made in records),
        "",
        f"{source(records)} Counted by saved-tensor hooks; `python -m bench kept --keep` measures.",
    ]


def source(records: Sequence[dict[str, Any]]) -> str:
    first = records[0]
    dates = " to ".join(dict.fromkeys(sorted({made["date"][:10] for made in records})))
    clip = f"{first['clips']} clip of {first['frames']} frames"
    what = f"{first['model'].replace('_', ' ')}, {first['layers']} layers, {clip}, {first['dtype']}, SGD with momentum"
    return f"{what}; {first['device']}, torch {first['torch']}, {dates}."


def planned(records: Sequence[dict[str, Any]]) -> list[Planned]:
    if not records:
        return []
    return [Planned("bytes", records[0]["device"], NAME, "bytes of a training step by kind", lambda: draw(records))]


def draw(records: Sequence[dict[str, Any]]) -> Any:
    """A bar for each contestant, stacked by kind; the number at its end is the sum."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(8.4, 1.5 + 0.36 * len(records)), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.05))
    figure.suptitle("Where the bytes of a training step are", x=0.012, ha="left", fontsize=10.5, fontweight="bold")
    axes, left = figure.add_subplot(), [0.0] * len(records)
    for kind in (*STATE, *KINDS):
        sizes = [made["bytes"].get(kind, 0) / 2**30 for made in records]
        if any(sizes):
            style = {"edgecolor": "white", "linewidth": 0.4, "color": _COLOURS[kind], "label": kind}
            axes.barh(range(len(records)), sizes, 0.7, left=left, **style)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    for y, end in enumerate(left):
        axes.annotate(f"{end:.2f}", (end, y), (4, 0), textcoords="offset points", va="center", fontsize=8, color=INK)
    axes.set(yticks=range(len(records)), yticklabels=[label(made) for made in records], xlabel="GiB")
    axes.set(ylim=(len(records) - 0.5, -0.5), xlim=(0, max(left) * 1.08))
    axes.tick_params(axis="y", length=0)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=7.5)
    figure.supxlabel(textwrap.fill(source(records), 120), x=0.012, ha="left", fontsize=7, color=MUTED)
    return figure
