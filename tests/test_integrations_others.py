"""What others do to an accelerated model: hooks, parametrizations, weights of other classes, torch.func, meta tensors.

Each is done to the host's model and to ours, on transformers' families; and on nn.MultiheadAttention.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

transformers = pytest.importorskip("transformers")

from transformers_models import FAMILIES, clip, hold, make, results  # noqa: E402

from vivit_kernels import Linear  # noqa: E402
from vivit_kernels.accelerate import accelerate  # noqa: E402
from vivit_kernels.numerics import judge  # noqa: E402

EVERY = pytest.mark.parametrize("family", FAMILIES)
routes = importlib.import_module("vivit_kernels.linear")


@pytest.fixture(autouse=True)
def every_route(monkeypatch):
    monkeypatch.setattr(routes, "_FEWEST_ROWS", 1)
    monkeypatch.setattr(routes, "_CONVOLVES", routes._ONEDNN)


def textbook(family):
    return make(family, None if family == "timesformer" else "eager")


def accelerated(family):
    model = textbook(family)
    return model, accelerate(model, only="transformers")


# ---- hooks ----

HOOKS: dict[str, str] = {
    "forward": "register_forward_hook",
    "before forward": "register_forward_pre_hook",
    "backward": "register_full_backward_hook",
    "before backward": "register_full_backward_pre_hook",
}


def seen(model: nn.Module, register: str, only: list[str] | None = None) -> dict[str, int]:
    """How often the hook of each module, or of those named, is called in a step of training."""
    calls: dict[str, int] = {}

    def counts(name):
        return lambda *_: calls.__setitem__(name, calls.get(name, 0) + 1)

    hooked = [(name, module) for name, module in model.named_modules() if only is None or name in only]
    handles = [getattr(module, register)(counts(name)) for name, module in hooked]
    model(clip(1).requires_grad_()).logits.sum().backward()
    for handle in handles:
        handle.remove()
    return calls


@EVERY
@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
def test_hooks_of_every_module_are_called(family, register):
    assert seen(accelerated(family)[0], register) == seen(textbook(family), register)


@EVERY
@pytest.mark.parametrize("register", ["register_forward_hook", "register_full_backward_hook"])
def test_hooks_of_some_modules_are_called(family, register):
    """Of modules that ours calls by itself only because something hangs on them: one of four at a time."""
    model, known = accelerated(family)[0], seen(textbook(family), register)
    names = list(known)
    for i in range(4):
        assert seen(model, register, names[i::4]) == {name: known[name] for name in names[i::4]}


@EVERY
def test_a_hook_of_all_modules_is_called(family):
    def count(model):
        calls: list[str] = []
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(module._get_name()))
        with torch.no_grad():
            model(clip())
        handle.remove()
        return len(calls)

    assert count(accelerated(family)[0]) == count(textbook(family)) > 10


# ---- weights that are others ----


class Larger(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 1.5 * weight


def parametrized(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            parametrize.register_parametrization(module, "weight", Larger())
    return model


@EVERY
@pytest.mark.parametrize("first", [False, True])
def test_parametrizations(family, first):
    """PyTorch makes a class for every parametrized module: before, ours leaves it; after, restore() keeps it."""
    pixels = clip()
    exact = results(parametrized(textbook(family).double()), pixels.double())
    stock = parametrized(textbook(family))
    eager = results(stock, pixels)
    model = textbook(family)
    if first:
        parametrized(model)
    report = accelerate(model, only="transformers")
    if not first:
        parametrized(model)
    hold(results(model, pixels), exact, eager)
    report.restore()
    assert torch.equal(model(pixels).logits, stock(pixels).logits)
    classes = [[[cls.__name__ for cls in type(x).__mro__] for x in one.modules()] for one in (model, stock)]
    assert classes[0] == classes[1]
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    assert [type(x) for x in model.modules()] == [type(x) for x in textbook(family).modules()]


class Coded(Tensor):
    """A weight as quantisers make it: it has a product of its own, and no other."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            return Answered.apply(args[0].shape, args[1].shape[0])
        assert func not in (torch.conv2d, Tensor.contiguous, Tensor.to), f"{func} of a coded weight"
        return super().__torch_function__(func, types, args, kwargs or {})


class Answered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shape, outputs):
        return torch.full((*shape[:-1], outputs), 7.0)


@pytest.mark.skipif(not routes._ONEDNN, reason="no AVX-512: there are no convolutions")
@pytest.mark.parametrize("needs_grad", [False, True])
def test_a_weight_of_another_class_has_its_own_product(needs_grad):
    layer = nn.Linear(32, 32).requires_grad_(False)
    layer.__class__ = Linear
    layer.weight = nn.Parameter(torch.randn(32, 32).as_subclass(Coded), requires_grad=False)
    with torch.set_grad_enabled(needs_grad):
        assert torch.equal(layer(torch.randn(600, 32)), torch.full((600, 32), 7.0))


# ---- transformations, meta tensors, traces ----


def per_sample(model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    parameters = {name: x.detach() for name, x in model.named_parameters()}

    def loss(parameters, clip):
        output: Any = torch.func.functional_call(model, parameters, (clip.unsqueeze(0),))
        return output.logits.square().sum()

    return torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, pixels)


@EVERY
def test_gradients_of_samples(family):
    pixels = clip()
    exact, eager = per_sample(textbook(family).double(), pixels.double()), per_sample(textbook(family), pixels)
    found = per_sample(accelerated(family)[0], pixels)
    largest = max(x.abs().max().item() for name, x in exact.items() if name.endswith("bias"))
    for name, x in found.items():
        scale = largest if name.endswith(("key.bias", "k_proj.bias")) else None
        verdict = judge(x, exact[name], eager[name], gradient=True, scale=scale, row=x.shape[-1])
        assert verdict.ok, f"{name}: {verdict}"


@EVERY
def test_tangents(family):
    def tangent(model, pixels):
        return torch.func.jvp(lambda x: model(x).logits, (pixels,), (pixels.cos(),))[1]

    pixels = clip()
    exact, eager = tangent(textbook(family).double(), pixels.double()), tangent(textbook(family), pixels)
    assert exact.abs().max() > 0
    assert judge(tangent(accelerated(family)[0], pixels), exact, eager, gradient=True).ok


@EVERY
def test_made_on_meta(family):
    """Shapes are asked there before memory is there."""
    with torch.device("meta"):
        model = type(textbook(family))(textbook(family).config)
    report = accelerate(model, only="transformers")
    output = model(clip().to("meta"))
    output.logits.sum().backward()
    assert report.replaced and output.logits.is_meta and output.logits.numel() == 2 * 5


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit:DeprecationWarning")
@EVERY
def test_traced_by_torch_jit(family):
    pixels, other = clip(), clip()
    with torch.no_grad():
        traced: Any = torch.jit.trace(accelerated(family)[0], pixels, strict=False)
        exact, eager = textbook(family).double()(other.double()).logits, textbook(family)(other).logits
        assert judge(traced(other)["logits"], exact, eager).ok
