"""The linear layer in tiles of AMX: values on every kind of size, and who takes it."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vivit_kernels import Linear, _native, linear, linear_gelu, mlp
from vivit_kernels.numerics import judge

routes = importlib.import_module("vivit_kernels.linear")  # `vivit_kernels.linear` is the function
pytestmark = [
    pytest.mark.skipif(
        _native.BEST != "avx512_amx", reason="this processor has no AMX, or the library was built without"
    ),
    pytest.mark.usefixtures("poisoned_scratch"),
]
# Rows around tiles (16), pairs of them and blocks (128); columns around vectors and panels (32); K around a step (32)
# and what is multiplied at a time (256).
SIZES = [
    (1, 1, 1),
    (15, 31, 33),
    (16, 32, 32),
    (17, 33, 31),
    (33, 16, 2),
    (127, 64, 256),
    (128, 65, 257),
    (129, 1, 255),
]
SIZES += [(520, 96, 768), (300, 7, 1024)]


def layer(M, N, K, bias=True):
    x, weight = torch.randn(M, K), torch.randn(N, K) * K**-0.5
    return [t.bfloat16() for t in (x, weight)] + [torch.randn(N).bfloat16() if bias else None]


def hold(found, tensors, function):
    exact, eager = function(*(None if t is None else t.double() for t in tensors)), function(*tensors)
    verdict = judge(found, exact, eager, terms=tensors[0].shape[1])
    assert verdict.ok, str(verdict)


@pytest.mark.parametrize("M, N, K", SIZES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", [True, False])
def test_values(M, N, K, bias, gelu):
    tensors = layer(M, N, K, bias)
    found = routes._multiplied_in_tiles(*tensors, tanh_gelu=gelu)
    hold(found, tensors, (lambda *t: F.gelu(F.linear(*t), approximate="tanh")) if gelu else F.linear)


def test_rows_may_lie_apart():
    x, weight, bias = layer(600, 40, 64)
    wide = torch.randn(600, 100).bfloat16()
    wide[:, :64] = x
    y = torch.full((600, 50), 7.0).bfloat16()
    torch.ops.vivit_kernels_native.linear(wide[:, :64], weight, bias, y[:, :40], False, -1)
    assert torch.equal(y[:, :40], routes._multiplied_in_tiles(x, weight, bias))
    assert bool((y[:, 40:] == 7).all())


def test_the_same_bits_for_any_number_of_threads():
    tensors, before, found = layer(700, 200, 300), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(routes._multiplied_in_tiles(*tensors, tanh_gelu=True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_the_gelu_of_what_is_not_finite_and_of_what_is_huge():
    x = torch.zeros(32, 32)
    x[:5, 0] = torch.tensor([float("nan"), 1e30, -1e30, 300.0, -300.0])
    x = x.bfloat16()
    found = routes._multiplied_in_tiles(x, torch.eye(32).bfloat16(), None, tanh_gelu=True)
    assert bool(found[0].isnan().all())  # every product of the row has it
    assert torch.equal(found[1:], F.gelu(x[1:], approximate="tanh"))


@pytest.mark.parametrize("isa", ["avx512_bf16", "portable"])
def test_another_instruction_set_has_none(isa):
    tensors = layer(16, 16, 16)
    with pytest.raises(RuntimeError, match="is not in this build"):
        torch.ops.vivit_kernels_native.linear(*tensors, tensors[0], False, _native.ISAS.index(isa))
    with _native.forced_isa(isa):
        assert not routes._has_tiles()


@pytest.fixture
def calls(monkeypatch):
    """What goes through tiles."""
    monkeypatch.setattr(routes, "_CONVOLVES", False)
    real, seen = routes._TILES, []
    monkeypatch.setattr(routes, "_TILES", lambda *args: seen.append(args[0].shape) or real(*args))
    return seen


def test_who_takes_it(calls):
    x, weight, bias = layer(520, 48, 64)
    hold(linear(x, weight, bias), (x, weight, bias), F.linear)
    hold(linear_gelu(x, weight, bias), (x, weight, bias), lambda *t: F.gelu(F.linear(*t), approximate="tanh"))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x.float(), weight.float(), bias.float()).dtype == torch.bfloat16
    one, two = nn.Linear(64, 96).bfloat16(), nn.Linear(96, 64).bfloat16()
    with torch.no_grad():
        mlp(x, one, two)
        one.__class__ = Linear
        one(x)
    assert len(calls) == 6


@pytest.mark.parametrize("case", ["gradients", "float32", "wide", "few rows", "vmap", "compiled"])
def test_who_does_not(case, calls):
    x, weight, bias = layer(520, 48, routes._WIDEST_IN_TILES + 32 if case == "wide" else 64)
    if case == "gradients":
        linear(x, weight.requires_grad_(), bias).float().sum().backward()
        assert weight.grad is not None
    elif case == "float32":
        linear(x.float(), weight.float(), bias.float())
    elif case == "vmap":
        torch.func.vmap(lambda one: linear(one, weight, bias))(x.unsqueeze(0))
    elif case == "compiled":
        torch.compile(linear, backend="eager", fullgraph=True)(x, weight, bias)
    else:
        linear(x[:5] if case == "few rows" else x, weight, bias)
    assert not calls
