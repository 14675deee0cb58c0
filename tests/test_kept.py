"""bench/kept.py: every byte that hooks count has a kind, the one that footprint.py predicts, whoever's model it is."""

from __future__ import annotations

import json

import pytest
import test_memory
import torch
from torch import nn

from bench import kept, kept_tables, plots, zoo, zoo_stock
from vivit import footprint, memory

SPEC = zoo.Spec("joint", "auto", "Ti/16x2", None, 2, "autocast", "train", "cpu")
SAME = {"block inputs": "block inputs", "norms": "norms", "q, k, v": "qkv", "attention": "attention"}
SAME |= {"MLP hidden": "hidden", "GELU": "gelu", "bf16 weights": "weight copies"}


@pytest.mark.parametrize("level", memory.LEVELS)
def test_kinds_are_those_predicted(level):
    made = test_memory.model("joint", level, **test_memory.SIZES)
    clip = test_memory.video(made)
    found = kept.activations(lambda: made(clip), made, made.config, SPEC)
    assert set(found) <= set(kept.KINDS)
    assert sum(found.values()) == test_memory.counted(made, clip, True)
    predicted = footprint.activations(made.config, footprint.Step(level, 2, "autocast"))
    for ours, theirs in SAME.items():
        apart = abs(found[ours] - predicted[theirs])
        assert apart <= test_memory.PREDICTED * sum(found.values()), (ours, found[ours], predicted[theirs])


def test_stock_keeps_the_same_kinds():
    """What it keeps beyond "fast" is known: a sum for each branch, and every row of the last layer."""
    ours = test_memory.model("joint", "fast", **test_memory.SIZES)
    stock, clip = zoo_stock.StockViViT(ours.config), test_memory.video(ours)
    found = kept.activations(lambda: stock(clip), stock, ours.config, SPEC)
    assert sum(found.values()) == test_memory.counted(stock, clip, True)
    tokens, width, layers = 2 * (ours.config.T * ours.config.S + 1), ours.config.embedding, ours.config.depth
    assert found["q, k, v"] == layers * tokens * 3 * width * 2  # bfloat16
    assert found["GELU"] == found["MLP hidden"] == layers * tokens * ours.config.mlp * 2
    floats = clip.numel() * 4  # the video, which stock normalises before it embeds
    assert found["other"] - floats < 0.02 * sum(found.values())


def test_state_is_what_a_step_leaves():
    module = nn.Linear(8, 4)
    size = (8 * 4 + 4) * 4
    assert kept.state(module) == {"parameters": size, "gradients": size, "optimiser": size}
    assert module.weight.grad is None and torch.isfinite(module.weight).all()


def record(who, **sizes):
    return {
        "who": who, "model": "B/16x2 joint", "clips": 1, "frames": 32, "layers": 12, "dtype": "autocast",
        "bytes": {"parameters": 100 << 20, **{name.replace("_", " "): size << 20 for name, size in sizes.items()}},
        "device": "a CPU", "torch": "2", "date": "2026-01-02T00:00:00Z", "commit": "abc",
    }  # fmt: skip


def test_records_stand_in_one_order_and_are_replaced(tmp_path):
    file = tmp_path / "kept.json"
    for made in (record("stock", GELU=40), record("small", GELU=3), record("small", GELU=10)):
        kept.keep(made, file)
    assert [(made["who"], made["bytes"]["GELU"] >> 20) for made in kept.read(file)] == [("small", 10), ("stock", 40)]
    assert json.loads(file.read_text()) == kept.read(file) and kept.read(tmp_path / "none.json") == []


def test_the_figure_and_its_line(tmp_path):
    pytest.importorskip("matplotlib")
    records = [record("small", GELU=10), record("stock", GELU=40)]
    text = "\n".join(kept_tables.lines(records, "figures"))
    assert "`small` 10 MiB (0.25); stock PyTorch 40 MiB (1.00)." in text and "transformers" not in text
    (figure,) = kept_tables.planned(records)
    plots.save(figure, tmp_path / "a.svg")
    plots.save(figure, tmp_path / "b.svg")
    drawn = (tmp_path / "a.svg").read_bytes()
    assert drawn == (tmp_path / "b.svg").read_bytes() and b"stock PyTorch" in drawn and b"0.14" in drawn
    assert kept_tables.lines([], "figures") == kept_tables.planned([]) == []
