"""vivit/flops.py against the counts of the references (tests/fixtures/flops_params.json) and the model itself."""

from __future__ import annotations

import json
import re

import parity
import pytest
import torch
from torch import nn

from vivit import ViViT, ViViTConfig
from vivit.flops import count, operations, parameters

TABLE = json.loads((parity.FIXTURES / "flops_params.json").read_text())
ROWS = [(name, row) for table in ("table2", "large_huge", "tubelet_length") for name, row in TABLE[table].items()]
ATTENTION = {
    "M1": "joint",
    "M2": "factorized_encoder",
    "FE": "factorized_encoder",
    "M3": "factorized_self_attention",
    "M4": "factorized_dot_product",
}


def row_config(name: str) -> ViViTConfig:
    """The configuration that a row's name describes: "L/16x2 FE Lt=24 T128", "M4 B/16x8", "L/16x2 M1 288"."""
    size = re.search(r"[BLH]/\d+x\d+", name)
    model = re.search(r"\b(M\d|FE)\b", name)
    assert size and model, name
    changes: dict = dict(attention=ATTENTION[model[0]])
    if layers := re.search(r"Lt=(\d+)", name):
        changes["temporal_depth"] = int(layers[1])
    if "avgpool" in name:
        changes["temporal_depth"] = 0
    if frames := re.search(r"T(\d+)", name):
        changes["frames"] = int(frames[1])
    if side := re.search(r" (\d{3})$", name):
        changes.update(height=int(side[1]), width=int(side[1]))
    return ViViTConfig.preset(size[0], **changes)


@pytest.mark.parametrize("name, row", ROWS, ids=[name for name, _ in ROWS])
def test_every_row_of_the_table(name, row):
    config = row_config(name)
    with torch.device("meta"):
        in_the_model = sum(p.numel() for p in ViViT(config).parameters())
    assert parameters(config) == in_the_model == row["params"]
    counted = count(config)
    half = row.get("xla_flops_half_G", row.get("GFLOPs_paper_convention"))
    assert round(counted.paper_gflops * 1e9) == round(half * 1e9)  # XLA's float32 sum, bit for bit
    if "matmul_conv_macs_G" in row:
        assert counted.macs == round(row["matmul_conv_macs_G"] * 1e9)
    if "paper_GFLOPs" in row:
        assert f"{counted.paper_gflops:.1f}" == str(row["paper_GFLOPs"])
        assert f"{counted.flops / 2e9:.1f}" == str(row["paper_GFLOPs"])  # the exact sum prints the same


@pytest.mark.parametrize(
    "changes",
    [
        dict(pool="mean"),
        dict(pool="max", representation=24, classes=(3, 4)),
        dict(attention="factorized_encoder", temporal_depth=2, temporal_heads=4, temporal_mlp=40, pool="sum"),
        dict(attention=("joint", "factorized_dot_product", "factorized_self_attention"), pool="mean"),
        dict(tokenization="uniform", uniform_frames=3, tubelet=(1, 8, 4)),
    ],
)
def test_other_configurations_agree_with_the_model(changes):
    small = dict(frames=6, height=16, width=12, tubelet=(2, 8, 4), embedding=48, depth=3, heads=2, mlp=80, classes=7)
    config = ViViTConfig(**(small | changes))
    model = ViViT(config).eval()
    assert parameters(config) == sum(p.numel() for p in model.parameters())
    seen = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda linear, _, out: seen.append(2 * out.numel() * linear.in_features))
    with torch.no_grad():
        model(torch.zeros(1, 3, 6, 16, 12))
    elsewhere = ("tubelets", "scores", "values")
    assert sum(seen) == sum(o.flops for o in operations(config) if o.is_product and o.name not in elsewhere)
    counted = count(config)
    assert 2 * counted.macs < counted.flops
