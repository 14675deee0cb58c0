"""integrations/diffusers.py: linear layers where a CPU has a faster product than PyTorch's, and vmap over clips."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: its models cannot be accelerated")

from diffusers_models import FAMILIES, exact_of, hold, inputs, make, output, results  # noqa: E402

from vivit_kernels import Linear, _native  # noqa: E402
from vivit_kernels.accelerate import accelerate  # noqa: E402
from vivit_kernels.numerics import judge  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("every_call_counts", "no_matrix_unit"),
    pytest.mark.skipif(not _native.AVAILABLE, reason=f"without kernels nothing is replaced: {_native.WHY}"),
]
routes = importlib.import_module("vivit_kernels.linear")
CONVOLVES = pytest.mark.skipif(not routes._ONEDNN, reason="no AVX-512: there are no convolutions")


@pytest.fixture
def convolves(monkeypatch):
    """As on a CPU where convolutions are faster; returns what was computed by them."""
    calls, convolved = [], routes._convolved
    monkeypatch.setattr(routes, "_FEWEST_ROWS", 1)
    monkeypatch.setattr(routes, "_CONVOLVES", True)
    monkeypatch.setattr(routes, "_convolved", lambda *args: calls.append(args) or convolved(*args))
    return calls


def layers(model, kind):
    return {name for name, module in model.named_modules() if type(module) is kind}


@CONVOLVES
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in ("latte", "wan") else pytest.mark.full) for name in FAMILIES]
)
def test_outputs_and_gradients(family, convolves):
    exact, given = exact_of(family, torch.float32), inputs(family)
    eager, model = results(make(family), given), make(family)
    plain, names = layers(model, nn.Linear), set(model.state_dict())
    report = accelerate(model, only="diffusers")
    assert {entry.path for entry in report.replaced if entry.what == "Linear"} == plain == layers(model, Linear)
    hold(results(model, given), exact, eager)
    assert convolves and set(model.state_dict()) == names
    report.restore()
    assert layers(model, nn.Linear) == plain


@pytest.mark.parametrize("tiles", [False, True])
def test_they_stay_where_none_is_faster(tiles, monkeypatch):
    monkeypatch.setattr(routes, "_CONVOLVES", False)
    monkeypatch.setattr(routes.native, "_LACKING", ())
    monkeypatch.setattr(routes.native, "has_tiles", lambda: tiles)
    report = accelerate(make("latte"), only="diffusers")
    assert report.replaced and any(entry.what == "Linear" for entry in report.replaced) == tiles


def test_those_of_other_models_stay(monkeypatch):
    monkeypatch.setattr(routes, "_CONVOLVES", True)
    other = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    model = nn.ModuleDict({"ours": make("latte"), "other": other, "head": nn.Linear(8, 8)})
    paths = {entry.path for entry in accelerate(model, only="diffusers").replaced if entry.what == "Linear"}
    assert paths and all(path.startswith("ours.") for path in paths)


@pytest.mark.parametrize("family", ["latte", "unet3d"])
def test_clips_of_a_vmap(family):
    """Each clip of a batch by itself, as who wants gradients of samples asks."""
    given = {name: x for name, x in inputs(family).items() if name != "timestep"}
    axes = (0,) * len(given)

    def apart(model, given):
        def one(*clip):
            alone = {name: x.unsqueeze(0) for name, x in zip(given, clip, strict=True)}
            return output(model, alone | {"timestep": torch.tensor([3])})

        return torch.func.vmap(one, axes)(*given.values())

    model, exact = make(family), copy.deepcopy(make(family)).double()
    eager = apart(model, given)
    accelerate(model)
    found = apart(model, given)
    assert judge(found, apart(exact, {name: x.double() for name, x in given.items()}), eager).ok
