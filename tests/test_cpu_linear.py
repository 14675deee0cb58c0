"""The native library's linear layers: values on every kind of size, dtype and layout, and who takes them."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from vivit_kernels import Linear, _linear_native, _native, linear, linear_gelu, mlp
from vivit_kernels.low_memory import input_gradient, weight_gradient
from vivit_kernels.numerics import judge

routes = importlib.import_module("vivit_kernels.linear")  # `vivit_kernels.linear` is the function
pytestmark = [
    pytest.mark.skipif(not _native.AVAILABLE, reason=f"no native library: {_native.WHY}"),
    pytest.mark.usefixtures("poisoned_scratch"),
]
RUNS_HERE = _native.ISAS[: _native.ISAS.index(_native.BEST) + 1] if _native.BEST else ()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows around tiles (16) and blocks (96, 128); columns around vectors, panels (32, 64) and groups (256); K around a step
# (32), chains (128) and parts (768), of which several.
SIZES = [
    (2, 2, 1),
    (15, 31, 33),
    (16, 32, 32),
    (17, 33, 31),
    (33, 16, 2),
    (95, 64, 256),
    (97, 65, 257),
    (129, 3, 255),
    (193, 257, 129),
]
SIZES += [(520, 96, 768), (300, 7, 1024), (130, 260, 1700)]
GELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "tanh": lambda x: F.gelu(x, approximate="tanh"),
    "none": F.gelu,
}


def layer(M, N, K, bias=True, dtype=torch.bfloat16):
    x, weight = torch.randn(M, K), torch.randn(N, K) * K**-0.5
    return [t.to(dtype) for t in (x, weight)] + [torch.randn(N).to(dtype) if bias else None]


def hold(found, tensors, function):
    exact, eager = function(*(None if t is None else t.double() for t in tensors)), function(*tensors)
    verdict = judge(found, exact, eager, terms=tensors[0].shape[1])
    assert verdict.ok, str(verdict)


def across(x: Tensor) -> Tensor:
    """The same values, neighbours down the columns."""
    return x.t().contiguous().t()


@pytest.mark.parametrize("M, N, K", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", RUNS_HERE)
def test_values(M, N, K, dtype, isa):
    with _native.forced_isa(isa):
        for bias, gelu in ((True, ""), (False, ""), (True, "tanh"), (True, "none")):
            tensors = layer(M, N, K, bias, dtype)
            found = _linear_native.multiplied(*tensors, gelu=gelu)
            hold(found, tensors, lambda *t, gelu=gelu: GELUS[gelu](F.linear(*t)))


@pytest.mark.parametrize("M, N, K", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", RUNS_HERE)
def test_operands_that_lie_across(M, N, K, dtype, isa):
    """As those of an input gradient and of a weight gradient do: the same as of ones that do not."""
    x, weight, bias = layer(M, N, K, dtype=dtype)
    with _native.forced_isa(isa):
        for one, other in ((x, across(weight)), (across(x), weight), (across(x), across(weight))):
            hold(_linear_native.multiplied(one, other, bias), (x, weight, bias), F.linear)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_lie_apart(dtype):
    x, weight, bias = layer(600, 40, 64, dtype=dtype)
    wide = torch.randn(600, 100).to(dtype)
    wide[:, :64] = x
    y = torch.full((600, 50), 7.0).to(dtype)
    torch.ops.vivit_kernels_native.linear(wide[:, :64], weight, bias, y[:, :40], 0, -1)
    assert torch.equal(y[:, :40], _linear_native.multiplied(x, weight, bias))
    assert bool((y[:, 40:] == 7).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [300, 1700])
def test_the_same_bits_for_any_number_of_threads(dtype, K):
    tensors, before, found = layer(700, 600, K, dtype=dtype), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(_linear_native.multiplied(*tensors, gelu="tanh"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("gelu", ["tanh", "none"])
@pytest.mark.parametrize("isa", RUNS_HERE)
def test_the_gelu_of_what_is_not_finite_and_of_what_is_huge(gelu, isa):
    x = torch.zeros(32, 32)
    x[:5, 0] = torch.tensor([float("nan"), 1e30, -1e30, 300.0, -300.0])
    x = x.bfloat16()
    with _native.forced_isa(isa):
        found = _linear_native.multiplied(x, torch.eye(32).bfloat16(), None, gelu=gelu)
    assert bool(found[0].isnan().all())  # every product of the row has it
    assert torch.equal(found[1:], GELUS[gelu](x[1:]))


@pytest.mark.parametrize("gelu", ["tanh", "none"])
@pytest.mark.parametrize("isa", RUNS_HERE)
def test_the_gelu_over_its_whole_range(gelu, isa):
    """In float32, where a product by one is exact: every error is the GELU's own."""
    x = torch.cat([torch.linspace(-12, 12, 24 * 1024), torch.logspace(-30, 1, 1024), -torch.logspace(-30, 1, 1024)])
    x = F.pad(x[:, None], (0, 15))
    with _native.forced_isa(isa):
        found = _linear_native.multiplied(x, torch.eye(16), None, gelu=gelu)
    verdict = judge(found[:, 0], GELUS[gelu](x[:, 0].double()), GELUS[gelu](x[:, 0]), row=1)
    assert verdict.ok, str(verdict)


def test_what_is_no_linear_layer_is_refused():
    x, weight, bias = layer(16, 20, 24)
    y = x.new_empty(16, 20)
    op = torch.ops.vivit_kernels_native.linear
    for arguments, why in (
        ((x, weight.float(), bias, y, 0), "weight must be"),
        ((x, weight[:, :8], bias, y, 0), "weight must be"),
        ((x[:, ::2], weight[:, :12], bias, y, 0), "x must be"),
        ((x, weight, bias, y.float(), 0), "y must be"),
        ((x, weight, bias, x.new_empty(20, 16).t(), 0), "y's rows"),
        ((x, weight, bias[:4], y, 0), "bias"),
        ((x, weight, bias, y, 3), "no activation 3"),
        ((x[:0], weight, bias, y[:0], 0), "of nothing"),
        ((x[0], weight, bias, y, 0), "two dimensions"),
    ):
        with pytest.raises(RuntimeError, match=why):
            op(*arguments, -1)


# ---- who takes them ----


@pytest.fixture
def calls(monkeypatch):
    """What goes through the native library, on a processor whose convolutions are no faster."""
    monkeypatch.setattr(routes, "_CONVOLVES", False)
    real, seen = _linear_native.OP, []
    monkeypatch.setattr(_linear_native, "OP", lambda *args: seen.append((args[0].shape, args[4])) or real(*args))
    return seen


@pytest.fixture
def in_tiles(calls):
    if _native.BEST != "avx512_amx":
        pytest.skip("this processor has no AMX, or the library was built without")
    return calls


@pytest.fixture
def lacking(monkeypatch):
    """As if the processor had no products in bfloat16 and float16; on most that is so."""
    if _native.BEST == "portable":
        pytest.skip("no vectors here that are faster")
    monkeypatch.setattr(_linear_native, "_LACKING", (torch.bfloat16, torch.float16))


@pytest.fixture
def in_vectors(calls, lacking):
    return calls


def test_who_takes_tiles(in_tiles):
    x, weight, bias = layer(520, 48, 64)
    hold(linear(x, weight, bias), (x, weight, bias), F.linear)
    for approximate in ("tanh", "none"):
        found = linear_gelu(x, weight, bias, approximate)
        hold(found, (x, weight, bias), lambda *t, a=approximate: F.gelu(F.linear(*t), approximate=a))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x.float(), weight.float(), bias.float()).dtype == torch.bfloat16
    one, two = nn.Linear(64, 96).bfloat16(), nn.Linear(96, 64).bfloat16()
    with torch.no_grad():
        mlp(x, one, two)
        one.__class__ = Linear
        one(x)
    assert len(in_tiles) == 7


@pytest.mark.parametrize("case", ["gradients", "float32", "wide", "few rows", "vmap", "compiled"])
def test_who_does_not_take_tiles(case, in_tiles):
    x, weight, bias = layer(520, 48, _linear_native._WIDEST_IN_TILES + 32 if case == "wide" else 64)
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
    assert not in_tiles


def gradients(function, x, weight, bias, dy):
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


@pytest.mark.parametrize("rows", [routes._FEWEST_ROWS_IN_VECTORS, 520])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_with_gradients_in_vectors(dtype, rows, in_vectors):
    x, weight, bias = layer(rows, 48, 64, dtype=dtype)
    dy = torch.randn(rows, 48).to(dtype)
    exact = gradients(F.linear, x.double(), weight.double(), bias.double(), dy.double())
    eager = gradients(F.linear, x, weight, bias, dy)
    for name, one, truth, usual in zip(
        ("y", "dx", "dw", "db"), gradients(linear, x, weight, bias, dy), exact, eager, strict=True
    ):
        verdict = judge(one, truth, usual, gradient=name != "y", terms=rows)
        assert verdict.ok, f"{name}: {verdict}"
    assert in_vectors == [((rows, 64), 0), ((rows, 48), 0), ((48, rows), 0)]  # forward, input's, weight's
    _, dx, dw, _ = gradients(linear, x, weight, bias, dy)
    assert torch.equal(input_gradient(dy, weight), dx) and torch.equal(weight_gradient(dy, x), dw)


@pytest.mark.parametrize("approximate, activation", [("tanh", 1), ("none", 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mlps_in_vectors(dtype, approximate, activation, in_vectors):
    x, fc1, fc2 = torch.randn(2, 100, 64).to(dtype), nn.Linear(64, 96).to(dtype), nn.Linear(96, 64).to(dtype)

    def plain(x, weight1, bias1, weight2, bias2):
        return F.linear(F.gelu(F.linear(x, weight1, bias1), approximate=approximate), weight2, bias2)

    with torch.no_grad():
        found = mlp(x, fc1, fc2, approximate)
    assert in_vectors == [((200, 64), activation), ((200, 96), 0)]
    tensors = [t.detach() for t in (x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)]
    verdict = judge(found, plain(*(t.double() for t in tensors)), plain(*tensors), terms=96)
    assert verdict.ok, str(verdict)
    mlp(x, fc1, fc2, approximate).float().sum().backward()
    assert len(in_vectors) == 2 + 2 + 3 and fc1.weight.grad is not None  # of x no gradient is wanted


def test_autocast_in_vectors(in_vectors):
    """The dtypes of result and gradients are those of F.linear."""
    x, weight, bias = layer(520, 48, 64, dtype=torch.float32)
    dy = torch.randn(520, 48).bfloat16()

    def run(function):
        leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
        with torch.autocast("cpu", torch.bfloat16):
            y = function(*leaves)
        y.backward(dy)
        return [y.detach(), *(t.grad for t in leaves)]

    exact = gradients(F.linear, x.double(), weight.double(), bias.double(), dy.double())
    for found, eager, truth in zip(run(linear), run(F.linear), exact, strict=True):
        assert found.dtype == eager.dtype
        verdict = judge(found.bfloat16(), truth, eager.bfloat16(), gradient=True, terms=520)
        assert verdict.ok, str(verdict)
    assert len(in_vectors) == 3


def test_gradients_of_gradients_in_vectors(in_vectors):
    x, weight, bias = layer(64, 48, 64)

    def second(function, tensors):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        (dx,) = torch.autograd.grad(function(*leaves).square().sum(), leaves[:1], create_graph=True)
        return torch.autograd.grad(dx.square().sum(), leaves[1:2])[0]

    tensors = (x, weight, bias)
    exact, eager = second(F.linear, [t.double() for t in tensors]), second(F.linear, tensors)
    verdict = judge(second(linear, tensors), exact, eager, gradient=True, terms=64)
    assert verdict.ok, str(verdict)


def test_many_gradients_at_once_in_vectors(in_vectors):
    """PyTorch's old vmap, for which the library has no rule."""
    x, weight, bias = layer(64, 48, 64)
    x.requires_grad_()
    weight.requires_grad_()
    y, several = linear(x, weight, bias), torch.randn(3, 64, 48).bfloat16()
    found = torch.autograd.grad(y, (x, weight), several, is_grads_batched=True)
    exact = several.double() @ weight.detach().double(), several.double().mT @ x.detach().double()
    for one, truth in zip(found, exact, strict=True):
        verdict = judge(one, truth, truth.bfloat16(), gradient=True, terms=64)
        assert verdict.ok, str(verdict)


@pytest.mark.parametrize("train", [False, True])
def test_torch_compile_in_vectors(train, lacking):
    """In one graph, for inference and for training: the library's operator is part of it."""
    torch.compiler.reset()
    x, fc1, fc2 = torch.randn(200, 64).bfloat16(), nn.Linear(64, 96).bfloat16(), nn.Linear(96, 64).bfloat16()
    targets: list[str] = []

    def backend(graph, inputs):
        return aot_autograd(fw_compiler=seen, bw_compiler=seen)(graph, inputs)

    def seen(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(lambda x: mlp(x, fc1, fc2), fullgraph=True, backend=backend)

    def run(function):
        fc1.weight.grad = None
        with torch.set_grad_enabled(train):
            y = function(x)
        if train:
            y.float().square().sum().backward()
            assert fc1.weight.grad is not None
            return y.detach(), fc1.weight.grad
        return (y,)

    with torch.no_grad():
        one, two = (t.double() for t in (fc1.weight, fc1.bias)), (t.double() for t in (fc2.weight, fc2.bias))
        exact = F.linear(F.gelu(F.linear(x.double(), *one), approximate="tanh"), *two)
    found, eager = run(compiled), run(lambda x: mlp(x, fc1, fc2))
    assert sum("auto_functionalized" in target for target in targets) == (5 if train else 2)
    verdict = judge(found[0], exact, eager[0], terms=96)
    assert verdict.ok, str(verdict)
    if train:
        verdict = judge(found[1], eager[1].double(), eager[1], gradient=True, terms=200)
        assert verdict.ok, str(verdict)


@pytest.mark.parametrize("case", ["few rows", "vmap", "float32", "narrow", "portable", "exported"])
def test_who_does_not_take_vectors(case, in_vectors):
    x, weight, bias = layer(520, 8 if case == "narrow" else 48, 64)
    if case == "float32":
        linear(x.float(), weight.float(), bias.float())
    elif case == "vmap":
        torch.func.vmap(lambda one: linear(one, weight, bias))(x.unsqueeze(0))
    elif case == "portable":
        with _native.forced_isa("portable"):
            linear(x, weight, bias)
    elif case == "exported":
        module = Linear(64, 48).bfloat16()
        program = torch.export.export(module, (x,))
        assert not any("vivit_kernels_native" in str(node.target) for node in program.graph.nodes)
    else:
        linear(x[:5] if case == "few rows" else x, weight, bias)
    assert not in_vectors


@pytest.mark.parametrize("approximate, activation", [("tanh", 1), ("none", 2)])
def test_a_gelu_behind_float32(calls, approximate, activation):
    """Where MKL runs 512 bits wide the product is the library's for the sake of its epilogue, and only then."""
    if not _linear_native.gains_by_a_gelu(torch.float32):
        pytest.skip("a processor whose float32 products are none of ours")
    x, weight, bias = layer(520, 48, 64, dtype=torch.float32)
    linear(x, weight, bias)
    assert not calls
    found = linear_gelu(x, weight, bias, approximate)
    assert calls == [((520, 64), activation)]
    hold(found, (x, weight, bias), lambda *t: F.gelu(F.linear(*t), approximate=approximate))
