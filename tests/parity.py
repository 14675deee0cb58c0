"""Reading tests/fixtures: the reference's numbers beside this project's model, and how far they may lie apart.

The two budgets are the fixtures' own (tests/fixtures/README.md): float64 re-runs of the reference on the same weights,
and the float32 noise of the reference itself. What kernels may differ by is another matter: vivit_kernels/numerics.py.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from vivit import ViViT, ViViTConfig
from vivit.weights import hf_config, load_hf, load_into, load_scenic

FIXTURES = Path(__file__).parent / "fixtures"
F64_BUDGET = 1e-9  # a re-implementation that follows the specification reached 2e-15; a wrong LayerNorm eps moves 1e-6
F32_BUDGET = 5e-6  # of the largest value compared, but at least of 1: the references' float32 noise is up to 1.2e-6

_MODELS = {
    "spacetime": "joint",
    "factorized_encoder": "factorized_encoder",
    "factorized_self_attention_block": "factorized_self_attention",
    "factorized_dot_product_attention": "factorized_dot_product",
}
_POOLS = {"token": "cls", "gap": "mean", "gmp": "max", "gsp": "sum"}


def names(pattern: str) -> list[str]:
    """Fixtures whose file matches, without the extension; never none, so that no test passes by testing nothing."""
    found = sorted(p.stem for p in FIXTURES.glob(pattern))
    assert found, f"no {pattern} in {FIXTURES}"
    return found


@cache
def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def under(data: dict[str, Any], folder: str) -> dict[str, Any]:
    return {key.removeprefix(f"{folder}/"): x for key, x in data.items() if key.startswith(f"{folder}/")}


def scenic_config(meta: dict[str, Any], params: dict[str, np.ndarray], **changes) -> ViViTConfig:
    """The fixture's `config_json` in this project's words."""
    y, x, f = meta["patch"]
    attention = _MODELS[meta["att"]["type"]]
    uniform = params["embedding/kernel"].ndim == 4
    if uniform:
        te = meta["te"]
        changes["uniform_frames"] = next(te[k] for k in ("n_sampled_frames", "n_frames", "frames") if k in te)
        changes["tokenization"], f = "uniform", 1
    if attention == "factorized_encoder" and any(k.startswith("TemporalTransformer/") for k in params):
        changes.update(temporal_depth=meta["Lt"], temporal_heads=meta["ht"], temporal_mlp=meta["mlpt"])
    return ViViTConfig(
        **dict(
            dict(frames=meta["T"], height=meta["H"], width=meta["W"], tubelet=(f, y, x), attention=attention)
            | dict(attention_order=meta["att"].get("attention_order", "time_space"), pool=_POOLS[meta["cls"]])
            | dict(embedding=meta["d"], depth=meta["L"], heads=meta["h"], mlp=meta["mlp"], classes=meta["nc"])
            | dict(representation=meta["rep"]),
            **changes,
        )
    )


def scenic_model(name: str, dtype: torch.dtype, **changes) -> tuple[ViViT, dict[str, np.ndarray]]:
    """(model with the fixture's weights, in eval mode; the fixture)."""
    data = arrays(name)
    params = under(data, "params")
    config = scenic_config(json.loads(str(data["config_json"])), params, **changes)
    model = ViViT(config).to(dtype).eval()
    load_into(model, load_scenic(params, config), name)
    return model, data


@cache
def tensors(name: str) -> dict[str, Tensor]:
    return load_file(FIXTURES / f"{name}.safetensors")


def hf_model(name: str, dtype: torch.dtype) -> tuple[ViViT, dict[str, Tensor]]:
    config = hf_config(json.loads((FIXTURES / f"{name}.json").read_text())["config"])
    model = ViViT(config).to(dtype).eval()
    load_into(model, load_hf(under(tensors(name), "state"), config), name)
    return model, tensors(name)


def as_tensor(x: Any, dtype: torch.dtype) -> Tensor:
    return torch.as_tensor(x).to(dtype)


def error(found: Any, reference: Any) -> float:
    """The largest difference; in units of the reference's largest value where that is above 1."""
    found, reference = as_tensor(found, torch.float64), as_tensor(reference, torch.float64)
    assert found.shape == reference.shape, (found.shape, reference.shape)
    assert found.isfinite().all()
    return ((found - reference).abs().max() / reference.abs().max().clamp(min=1.0)).item()


def assert_same(found: Any, reference: Any, budget: float, what: str = "") -> None:
    worst = error(found.detach() if isinstance(found, Tensor) else found, reference)
    assert worst <= budget, f"{what}: {worst:.3g} apart, {budget:.3g} allowed"


def small(**changes) -> ViViT:
    """A small model in eval mode whose every parameter is random: a zero head or class token would hide mistakes."""
    sizes = dict(frames=6, height=16, width=12, tubelet=(2, 8, 4), embedding=32, depth=2, heads=2, mlp=48, classes=5)
    model = ViViT(ViViTConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
