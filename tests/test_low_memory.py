"""vivit_kernels/low_memory.py: results, gradients and random draws of plain code, and what is kept on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import F64_BUDGET, assert_same
from torch import Tensor, nn

from vivit_kernels import Linear, factorized_attention, low_memory
from vivit_kernels.numerics import judge

E, HIDDEN, HEADS = 16, 48, 2
GRID = (2, 4, 70)  # clips, frames, positions: enough rows for every route of linear.py


def modules(dtype: torch.dtype = torch.float64, bias: bool = True, affine: bool = True) -> dict[str, Any]:
    made = {
        "norm": nn.LayerNorm(E, eps=1e-3, elementwise_affine=affine),
        "qkv": Linear(E, 3 * E, bias),
        "proj": nn.Linear(E, E, bias),
        "fc1": Linear(E, HIDDEN, bias),
        "fc2": Linear(HIDDEN, E, bias),
    }
    for module in made.values():
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
    return {name: module.to(dtype) for name, module in made.items()}


def attend(qkv: Tensor, seed: Tensor | None = None) -> Tensor:
    return factorized_attention(qkv, temporal_heads=1, dropout_p=0.0 if seed is None else 0.3, seed=seed)


def packed(y: Tensor) -> Tensor:
    return y.unflatten(-1, (3, HEADS, -1))


# name: (the function, plain code), of x [..., E] and modules
PAIRS = {
    "linear": (lambda x, m: low_memory.linear(x, m["fc1"]), lambda x, m: F.linear(x, m["fc1"].weight, m["fc1"].bias)),
    "norm_linear": (lambda x, m: low_memory.norm_linear(x, m["norm"], m["fc1"]), lambda x, m: m["fc1"](m["norm"](x))),
    **{
        f"norm_mlp {kept} {p}": (
            lambda x, m, kept=kept, p=p: low_memory.norm_mlp(x, m["norm"], m["fc1"], m["fc2"], p, kept == "kept"),
            lambda x, m, p=p: m["fc2"](F.dropout(F.gelu(m["fc1"](m["norm"](x)), approximate="tanh"), p)),
        )
        for kept in ("kept", "again")
        for p in (0.0, 0.4)
    },
    "attention_linear": (
        lambda x, m: low_memory.attention_linear(packed(m["qkv"](x)), attend, m["proj"]),
        lambda x, m: m["proj"](attend(packed(m["qkv"](x))).flatten(-2)),
    ),
    "attention_linear dropout": (
        lambda x, m: low_memory.attention_linear(packed(m["qkv"](x)), attend, m["proj"], seeded=True),
        lambda x, m: m["proj"](attend_dropped(packed(m["qkv"](x))).flatten(-2)),
    ),
    "dropout": (lambda x, m: low_memory.dropout(x * 2, 0.3), lambda x, m: F.dropout(x * 2, 0.3)),
    "dropout all": (lambda x, m: low_memory.dropout(x * 2, 1.0), lambda x, m: F.dropout(x * 2, 1.0)),
}


def attend_dropped(qkv: Tensor) -> Tensor:
    return factorized_attention(qkv, temporal_heads=1, dropout_p=0.3)


def results(function, x: Tensor, made: dict[str, Any], dy: Tensor) -> dict[str, Tensor]:
    """Result and every gradient; a draw after it, so that a generator left elsewhere is noticed."""
    x = x.detach().clone().requires_grad_()
    for module in made.values():
        module.zero_grad()
    torch.manual_seed(3)
    y = function(x, made)
    y.backward(dy.to(y.dtype))
    found = {"y": y.detach(), "dx": x.grad, "next draw": torch.rand(3)}
    named = ((f"{name}.{key}", p.grad) for name, m in made.items() for key, p in m.named_parameters())
    return found | {name: gradient.clone() for name, gradient in named if gradient is not None}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", PAIRS)
def test_float64(name, bias, device):
    made = {key: module.to(device) for key, module in modules(bias=bias, affine=bias).items()}
    x = torch.randn(*GRID, E, dtype=torch.float64, device=device)
    mine, plain = PAIRS[name]
    dy = torch.randn_like(plain(x, made))
    found, wanted = results(mine, x, made, dy), results(plain, x, made, dy)
    assert found.keys() == wanted.keys()
    for key, reference in wanted.items():
        assert_same(found[key], reference, F64_BUDGET, key)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", [name for name in PAIRS if "dropout" not in name and "0.4" not in name])
def test_within_the_budget(name, autocast, device):
    made = modules(torch.float32)
    x, (mine, plain) = torch.randn(*GRID, E), PAIRS[name]
    x = x.bfloat16().float() if autocast else x
    dy = torch.randn_like(plain(x, made)).bfloat16().float()
    exact = results(plain, x.double(), {key: m.double() for key, m in made.items()}, dy.double())
    made = {key: m.float().to(device) for key, m in made.items()}
    x, dy = x.to(device), dy.to(device)
    dtype = torch.bfloat16 if autocast else torch.float32
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        eager, found = results(plain, x.to(dtype), made, dy), results(mine, x.to(dtype), made, dy)
    for key in exact.keys() - {"next draw"}:
        assert found[key].dtype == eager[key].dtype, key
        verdict = judge(found[key].cpu(), exact[key], eager[key].cpu(), gradient=key != "y", row=E)
        assert verdict.ok, f"{key}: {verdict}"


@pytest.mark.parametrize("name", [name for name in PAIRS if not name.startswith("dropout")])
@pytest.mark.parametrize("frozen", ["x", "norm", "fc1", "fc2", "proj", "bias"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(name, frozen):
    made = modules()
    for key, module in made.items():
        for kind, parameter in module.named_parameters():
            parameter.requires_grad_(frozen not in (key, kind))
    x = torch.randn(*GRID, E, dtype=torch.float64)
    mine, plain = PAIRS[name]

    def run(function):
        for module in made.values():
            module.zero_grad()
        torch.manual_seed(3)
        inner = x.clone().requires_grad_(frozen != "x")
        function(inner, made).square().sum().backward()
        return {"x": inner.grad} | {f"{k} {n}": p.grad for k, m in made.items() for n, p in m.named_parameters()}

    found, wanted = run(mine), run(plain)
    for key, reference in wanted.items():
        assert (found[key] is None) == (reference is None), key
        if reference is not None:
            assert_same(found[key], reference, F64_BUDGET, key)


def kept(function, *arguments) -> dict[int, tuple[int, ...]]:
    found: dict[int, tuple[int, ...]] = {}

    def pack(x: Tensor) -> Tensor:
        found[x.untyped_storage().data_ptr()] = tuple(x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = function(*arguments)
    assert result.requires_grad
    return found


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("linear", []),
        ("norm_linear", []),
        ("norm_mlp kept 0.4", [(*GRID, HIDDEN)]),
        ("norm_mlp again 0.4", []),
        ("dropout", None),
    ],
)
def test_nothing_else_is_kept(name, wanted):
    made = modules(torch.float32)
    x = torch.randn(*GRID, E, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = kept(PAIRS[name][0], x, made)
    known = {t.untyped_storage().data_ptr() for m in made.values() for t in m.parameters()}
    assert known & found.keys() or name == "dropout"
    others = [shape for pointer, shape in found.items() if pointer not in known | {x.untyped_storage().data_ptr()}]
    assert others == (wanted or [])


def test_attention_keeps_the_projection_alone():
    made = modules(torch.float32)
    qkv = torch.randn(*GRID, 3, HEADS, E // HEADS, requires_grad=True)
    found = kept(lambda: low_memory.attention_linear(qkv, attend, made["proj"]))
    pointers = {qkv.untyped_storage().data_ptr(), made["proj"].weight.untyped_storage().data_ptr()}
    assert found.keys() == pointers


def test_the_result_is_nobodys_view():
    """A caller adds a residual in place."""
    made, x = modules(torch.float32), torch.randn(*GRID, E, requires_grad=True)
    low_memory.norm_mlp(x, made["norm"], made["fc1"], made["fc2"]).add_(x).sum().backward()
    assert x.grad is not None


def test_a_second_derivative_is_refused():
    made, x = modules(), torch.randn(*GRID, E, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(
        low_memory.norm_linear(x, made["norm"], made["fc1"]).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_usable_says_where_they_are_of_use():
    x = torch.randn(3)
    assert low_memory.usable(x)
    with torch.no_grad():
        assert not low_memory.usable(x)
    seen = []
    torch.func.vmap(lambda row: (seen.append(low_memory.usable(row)), row)[1])(torch.randn(2, 3))
    assert seen == [False]
