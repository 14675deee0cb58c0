"""vivit/optimizers.py: every way to compute a step takes the same step; 8-bit states by packages that may be absent."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch
from parity import F32_BUDGET, assert_same, small

from vivit import plan, recipe
from vivit.averaging import Average
from vivit.footprint import Step
from vivit.optimizers import make_optimizer, set_rate


def stepped(**settings) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = small()
    optimizer = make_optimizer(model, recipe.OptimizerConfig(lr=0.01, weight_decay=0.1, **settings))
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kernel", ["foreach", "fused", "loop"])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_every_kernel_takes_the_same_step(name, kernel):
    wanted = stepped(name=name)
    for key, value in stepped(name=name, kernel=kernel).items():
        assert_same(value, wanted[key], F32_BUDGET, key)


@pytest.mark.parametrize("kernel", ["foreach", "fused", "loop"])
def test_the_kernel_asked_for_is_used(kernel):
    group = make_optimizer(small(), recipe.OptimizerConfig("adamw", kernel=kernel)).param_groups[0]
    assert {"foreach": group["foreach"], "fused": group["fused"], "loop": group["foreach"] is False}[kernel]


@pytest.mark.parametrize("package", ["torchao", "bitsandbytes"])
def test_eight_bits_without_the_package(package, monkeypatch):
    monkeypatch.setitem(sys.modules, f"{package}.optim", None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=f"'{package}': {package} is not installed here .*\n  -> pip install"):
        make_optimizer(small(), recipe.OptimizerConfig("adamw", states=package))


@pytest.mark.parametrize("package", ["torchao", "bitsandbytes"])
def test_eight_bits_are_the_packages_own(package, monkeypatch):
    module = types.ModuleType(f"{package}.optim")
    module.AdamW8bit = torch.optim.Adagrad  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(torch.optim.Adagrad, "__init__", lambda self, groups, **options: vars(self).update(options))
    monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    monkeypatch.setitem(sys.modules, f"{package}.optim", module)
    made = make_optimizer(small(), recipe.OptimizerConfig("adamw", lr=0.5, states=package))
    assert vars(made) == {"lr": 0.5, "betas": (0.9, 0.98)}


@pytest.mark.full  # torchao compiles its step
@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_torchao_steps():
    for key, value in stepped(name="adamw", states="torchao").items():
        assert value.isfinite().all(), key


def test_rates_in_numbers_and_in_tensors():
    groups = [{"lr": 0.1}, {"lr": torch.tensor(0.1)}]
    held = groups[1]["lr"]
    for group in groups:
        set_rate(group, 0.25)
    assert groups[0]["lr"] == 0.25 and groups[1]["lr"] is held and held == 0.25


@pytest.mark.parametrize(
    "settings, rule",
    [
        (dict(kernel="quick"), "optimizer.kernel='quick' is not known"),
        (dict(states="int8"), "optimizer.states='int8' is not known"),
        (dict(states="torchao"), "is for name = 'adamw'"),
        (dict(name="adamw", states="torchao", kernel="fused"), "goes with states = 'float32'"),
    ],
)
def test_settings_that_do_not_fit(settings, rule):
    with pytest.raises(ValueError, match=rule):
        recipe.OptimizerConfig(**settings)


def test_eight_bits_are_planned():
    config = small().config
    wide = plan.need(config, Step(), recipe.OptimizerConfig("adamw")).optimizer
    narrow = plan.need(config, Step(), recipe.OptimizerConfig("adamw", states="torchao")).optimizer
    assert wide / 4 <= narrow < wide / 3


def test_a_mean_on_the_cpu_is_the_mean(device):
    model = small().to(device)
    averages = [Average(model, 0.5, on) for on in ("model", "cpu")]
    with torch.no_grad():
        model.position.add_(1)
    own = model.position.detach().clone()
    for average in averages:
        average.update(model)
    assert averages[1].values["position"].device.type == "cpu"
    assert_same(averages[1].values["position"], averages[0].values["position"].cpu(), F32_BUDGET)
    with averages[1].inside(model):
        assert model.position.device.type == device.type and not torch.equal(model.position.detach(), own)
    assert torch.equal(model.position.detach(), own)
