"""integrations/transformers.py: MLPs with their GELU in the product, and linear layers where a CPU has a faster one."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from transformers_models import FAMILIES, clip, exact_of, hold, make, results  # noqa: E402

from vivit_kernels import Linear, gains  # noqa: E402
from vivit_kernels.accelerate import NO_RECORD, accelerate  # noqa: E402
from vivit_kernels.integrations import diffusers  # noqa: E402
from vivit_kernels.integrations import transformers as ours  # noqa: E402
from vivit_kernels.integrations.transformers_mlp import OurIntermediate, OurMLP  # noqa: E402
from vivit_kernels.numerics import judge  # noqa: E402

EVERY = pytest.mark.parametrize("family", FAMILIES)
routes = importlib.import_module("vivit_kernels.linear")
ROUTES = pytest.mark.parametrize(
    "convolves",
    [
        pytest.param(
            True, marks=pytest.mark.skipif(not routes._ONEDNN, reason="no AVX-512: there are no convolutions")
        ),
        False,
    ],
)


@pytest.fixture(autouse=True)
def every_row_counts(monkeypatch):
    monkeypatch.setattr(routes, "_FEWEST_ROWS", 1)


def inference(model, pixels):
    with torch.no_grad():
        output = model(pixels, output_hidden_states=True)
    return {"logits": output.logits} | {f"hidden {i}": x for i, x in enumerate(output.hidden_states or ())}


@ROUTES
@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference(family, dtype, convolves, monkeypatch):
    monkeypatch.setattr(routes, "_CONVOLVES", convolves)
    textbook, pixels = None if family == "timesformer" else "eager", clip().to(dtype)
    exact = inference(make(family, textbook).to(dtype).double(), pixels.double())
    eager = inference(make(family, textbook).to(dtype), pixels)
    model = make(family).to(dtype)
    accelerate(model, only="transformers")
    fused, real = [], routes._with_gelu
    monkeypatch.setattr(routes, "_with_gelu", lambda *args: fused.append(args[-1]) or real(*args))
    found = inference(model, pixels)
    if dtype == torch.float32 and routes._ONEDNN:
        assert set(fused) == {"tanh" if family == "vivit" else "none"}
        mlps = [module for module in model.modules() if isinstance(module, OurMLP | OurIntermediate)]
        assert len(fused) == len(mlps) - (family == "vjepa2")  # its predictor is not asked
    assert found.keys() == exact.keys()
    for name, x in found.items():
        verdict = judge(x, exact[name], eager[name], row=x.shape[-1])
        assert verdict.ok, f"{name}: {verdict}"


@pytest.mark.skipif(not routes._ONEDNN, reason="no AVX-512: there are no convolutions")
@EVERY
def test_linear_layers_where_convolutions_are_faster(family, monkeypatch):
    monkeypatch.setattr(routes, "_CONVOLVES", True)
    pixels = clip()
    exact, eager = exact_of(family, pixels, torch.float32), results(make(family, None), pixels)
    model = make(family)
    layers = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    report = accelerate(model, only="transformers")
    swapped = {entry.path for entry in report.replaced if entry.what == "Linear"}
    assert swapped and swapped <= layers
    assert {name for name, module in model.named_modules() if type(module) is Linear} == swapped
    convolved, calls = routes._convolved, []
    monkeypatch.setattr(routes, "_convolved", lambda *args: calls.append(args) or convolved(*args))
    hold(results(model, pixels), exact, eager)
    assert calls
    report.restore()
    assert {name for name, module in model.named_modules() if type(module) is nn.Linear} == layers


def test_linear_layers_stay_where_none_is_faster(monkeypatch):
    monkeypatch.setattr(routes, "_CONVOLVES", False)
    monkeypatch.setattr(routes.native, "OP", None)
    report = accelerate(make("vivit"), only="transformers")
    assert report.replaced and not [entry for entry in report.replaced if entry.what == "Linear"]


def first_mlp(model):
    return next(module for module in model.modules() if isinstance(module, OurMLP | OurIntermediate))


@EVERY
def test_layers_that_are_watched_are_called(family):
    model, seen = make(family), []
    accelerate(model)
    mlp = first_mlp(model)
    layer = mlp.fc1 if isinstance(mlp, OurMLP) else mlp.dense
    handle = layer.register_forward_hook(lambda *args: seen.append(args[-1]))
    with torch.no_grad():
        model(clip())
        handle.remove()
        model(clip())
    assert len(seen) == 1 and seen[0].shape[-1] == layer.out_features


def test_layers_of_others_are_left():
    model = make("videomae")
    half = next(module for module in model.modules() if type(module).__name__ == "VideoMAEIntermediate")
    half.dense = nn.Sequential(half.dense, nn.Identity())
    report = accelerate(model, only="transformers")
    assert any("a Sequential, which may do more" in entry.why for entry in report.left)
    assert not isinstance(half, OurIntermediate)


def test_an_adapter_that_comes_later_is_called():
    model, pixels = make("vivit"), clip()
    accelerate(model, only="transformers")
    mlp = first_mlp(model)
    name = "fc1" if isinstance(mlp, OurMLP) else "dense"
    layer = getattr(mlp, name)
    with torch.no_grad():
        before = model(pixels).logits
        setattr(mlp, name, nn.Sequential(layer, nn.Threshold(1e9, 0.0)))
        assert not torch.equal(model(pixels).logits, before)


def test_other_activations_are_left_with_a_reason():
    model = make("vivit", hidden_act="relu")
    report = accelerate(model, only="transformers")
    assert any("is no GELU" in entry.why for entry in report.left)


# ---- what the report says of the gain ----


def made(**changes):
    facts = dict(
        host="transformers", family="vivit", model="VivitModel", step="forward", dtype="float32", clock="wall",
        device=f"{gains.name_of('cpu')} 2 threads", ratio=1.5, date="2026-11-26T00:00:00Z", versions={"torch": "2.13"},
    )  # fmt: skip
    return facts | changes


def test_the_gain_is_that_of_the_record(monkeypatch):
    known = (
        made(ratio=9.0, device="another processor"),
        made(),
        made(step="train", dtype="autocast", ratio=1.25),
        made(dtype="bfloat16", ratio=3.0),
        made(ratio=7.0, versions={"cuda": "13.0"}),
        made(ratio=8.0, device=f"{gains.name_of('cpu')} and more 2 threads"),  # the same model, with other instructions
    )
    monkeypatch.setattr(gains, "records", lambda: known)
    texts = {entry.gain for entry in accelerate(make("vivit"), only="transformers").replaced}
    assert len(texts) == 1
    (text,) = texts
    assert "forward float32 1.50x, training step autocast 1.25x" in text and "2026-11-26" in text
    assert not any(other in text for other in ("9.00x", "3.00x", "7.00x", "8.00x"))
    monkeypatch.setattr(gains, "records", lambda: known[:1])
    assert "another processor" in gains.expected("transformers", "vivit", nn.Linear(1, 1))
    assert {entry.gain for entry in accelerate(make("videomae"), only="transformers").replaced} == {NO_RECORD}


def test_every_record_that_is_kept_is_whole():
    families = {"transformers": set(ours.FAMILIES), "diffusers": diffusers.MODELS}
    for record in gains.records():
        assert record["family"] in families[record["host"]]
        assert record["share"] <= 1 and min(record["rounds"]) <= record["ratio"] <= max(record["rounds"])
        assert record["date"] and record["commit"] and {"torch", record["host"]} <= record["versions"].keys()
