"""vivit_kernels/linear.py against F.linear: values, gradients, and what else is asked of a linear layer."""

from __future__ import annotations

import copy
import importlib
import io
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import F32_BUDGET, F64_BUDGET, assert_same
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from vivit import ViViT, ViViTConfig
from vivit_kernels import Linear, linear, linear_gelu, mlp, unwatched
from vivit_kernels.numerics import judge

routes = importlib.import_module("vivit_kernels.linear")  # `vivit_kernels.linear` is the function
ROWS = 520  # more than the fewest that take the convolution
SMALL: dict[str, Any] = dict(
    frames=4, height=256, width=256, tubelet=(2, 16, 16), embedding=32, depth=2, heads=2, mlp=48, classes=5
)
TAKEN = pytest.mark.skipif(not routes._ONEDNN, reason="no AVX-512, or PyTorch without oneDNN: all of it is F.linear")
NATIVE = pytest.mark.skipif(not routes._BFLOAT16, reason="this CPU has no products in bfloat16")
DTYPES = [pytest.param(torch.float32, marks=TAKEN), pytest.param(torch.bfloat16, marks=[TAKEN, NATIVE])]


@pytest.fixture(autouse=True)
def convolutions(monkeypatch):
    """Proved on every CPU that can, also where another route is the faster one."""
    monkeypatch.setattr(routes, "_CONVOLVES", routes._ONEDNN)


def layer(
    inputs: int, outputs: int, dtype: torch.dtype = torch.float32, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    x = torch.randn(2, ROWS // 2, inputs).to(dtype)
    weight = (torch.randn(outputs, inputs) * inputs**-0.5).to(dtype)
    return x, weight, torch.randn(outputs).to(dtype) if bias else None


def gradients(function, tensors, dy: Tensor) -> list[Tensor]:
    """The result and the gradients of those tensors that are there."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy.to(y.dtype))]


def assert_within(function, plain, tensors, terms: int) -> None:
    dy = torch.randn(plain(*tensors).shape)
    exact = gradients(plain, [None if t is None else t.double() for t in tensors], dy.to(tensors[0].dtype).double())
    eager = gradients(plain, tensors, dy)
    for name, one, truth, usual in zip(
        ("y", "dx", *"wbwb"), gradients(function, tensors, dy), exact, eager, strict=False
    ):
        verdict = judge(one, truth, usual, gradient=name != "y", terms=terms)
        assert verdict.ok, f"{name}: {verdict}"


# ---- values and gradients ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs, outputs", [(64, 192), (192, 64), (100, 60), (16, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(dtype, inputs, outputs, bias):
    tensors = layer(inputs, outputs, dtype, bias)
    assert routes._takes(tensors[0], tensors[1:])
    assert_within(linear, F.linear, tensors, terms=ROWS)


def plain_mlp(x, weight1, bias1, weight2, bias2, approximate="tanh"):
    return F.linear(F.gelu(F.linear(x, weight1, bias1), approximate=approximate), weight2, bias2)


def our_mlp(x, weight1, bias1, weight2, bias2, approximate="tanh"):
    """`mlp` on layers that hold these very tensors."""
    layers = []
    for weight, bias in ((weight1, bias1), (weight2, bias2)):
        one = Linear(weight.shape[1], weight.shape[0], device="meta")
        del one.weight, one.bias
        one.weight, one.bias = weight, bias
        layers.append(one)
    return mlp(x, *layers, approximate)


@pytest.mark.parametrize("convolves", [True, False])
@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp(dtype, approximate, convolves, monkeypatch):
    monkeypatch.setattr(routes, "_CONVOLVES", convolves)
    ours, plain = (partial(function, approximate=approximate) for function in (our_mlp, plain_mlp))
    x, weight1, bias1 = layer(64, 96, dtype)
    _, weight2, bias2 = layer(96, 64, dtype)
    tensors = (x, weight1, bias1, weight2, bias2)
    assert routes._takes(x, tensors[1:3], tensors[3:]) and not routes._takes(x, tensors[3:], tensors[1:3])
    assert_within(ours, plain, tensors, terms=ROWS)
    with torch.no_grad():
        found, first = ours(*tensors), linear_gelu(x, weight1, bias1, approximate)
    verdict = judge(found, plain(*(t.double() for t in tensors)), plain(*tensors), terms=96)
    assert verdict.ok, str(verdict)
    exact, eager = (
        F.gelu(F.linear(*one), approximate=approximate)
        for one in ((x.double(), weight1.double(), bias1.double()), (x, weight1, bias1))
    )
    verdict = judge(first, exact, eager, terms=64)
    assert verdict.ok, str(verdict)


@TAKEN
@pytest.mark.parametrize(
    "convolves, op, dtype",
    [(True, "_CONVOLUTION", torch.float32), pytest.param(False, "_MATMUL", torch.bfloat16, marks=NATIVE)],
)
def test_the_gelu_is_part_of_the_product(convolves, op, dtype, monkeypatch):
    """Where nothing has to be kept for a backward."""
    monkeypatch.setattr(routes, "_CONVOLVES", convolves)
    monkeypatch.setattr(routes.native, "OP", None)
    x, weight, bias = layer(64, 96, dtype)
    real, calls = getattr(routes, op), []
    monkeypatch.setattr(routes, op, lambda *args: calls.append(args) or real(*args))
    linear_gelu(x, weight, bias)
    linear_gelu(x.requires_grad_(), weight, bias).sum().backward()
    assert len(calls) == 1 and "gelu" in calls[0]


def test_where_convolutions_are_no_faster_all_else_is_plain(monkeypatch):
    monkeypatch.setattr(routes, "_CONVOLVES", False)
    monkeypatch.setattr(F, "conv2d", None)
    x, weight1, bias1 = layer(64, 96)
    _, weight2, bias2 = layer(96, 64)
    assert torch.equal(linear(x, weight1, bias1), F.linear(x, weight1, bias1))
    tensors = [t.requires_grad_() for t in (x, weight1, bias1, weight2, bias2)]
    dy = torch.randn(2, ROWS // 2, 64)
    for one, other in zip(gradients(our_mlp, tensors, dy), gradients(plain_mlp, tensors, dy), strict=True):
        assert torch.equal(one, other)


@TAKEN
@pytest.mark.parametrize("without", ["_MATMUL", "_CONVOLUTION"])
def test_without_a_private_operation_the_results_are_the_same(without, monkeypatch):
    monkeypatch.setattr(routes, without, None)
    x, weight1, bias1 = layer(64, 96)
    _, weight2, bias2 = layer(96, 64)
    assert_within(linear, F.linear, (x, weight1, bias1), terms=ROWS)
    assert_within(our_mlp, plain_mlp, (x, weight1, bias1, weight2, bias2), terms=ROWS)


@TAKEN
def test_results_do_not_depend_on_where_the_rows_lie():
    x, weight, bias = layer(64, 96)
    expected = linear(x, weight, bias)
    wide = torch.randn(2, ROWS // 2, 128)
    wide[..., 32:96] = x
    assert torch.equal(linear(wide[..., 32:96], weight, bias), expected)
    assert torch.equal(linear(x.transpose(0, 1).contiguous().transpose(0, 1), weight, bias), expected)
    assert torch.equal(linear(x, weight.t().contiguous().t(), bias), expected)
    assert torch.equal(linear(x[:, :, None], weight, bias), expected[:, :, None])
    assert linear(x, weight, bias).is_contiguous()


@TAKEN
def test_one_thread_has_the_same_layout():
    """There PyTorch itself prefers another convolution."""
    x, weight, bias = layer(64, 96)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        found = linear(x, weight, bias)
    finally:
        torch.set_num_threads(threads)
    exact = F.linear(x.double(), weight.double(), bias.double())
    verdict = judge(found, exact, F.linear(x, weight, bias))
    assert found.is_contiguous() and verdict.ok, str(verdict)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "none"])
def test_only_what_is_wanted_has_a_gradient(wanted):
    tensors = dict(zip(("x", "weight", "bias"), layer(64, 96), strict=True))
    for name, t in tensors.items():
        t.requires_grad_(name == wanted)
    y = linear(**tensors)
    assert y.requires_grad == (wanted != "none")
    if wanted == "none":
        return
    y.sum().backward()
    assert [name for name, t in tensors.items() if t.grad is not None] == [wanted]


@TAKEN
def test_frozen_weights_keep_no_input():
    """As F.linear: only the weight's gradient needs it."""
    x, weight, bias = layer(64, 96)
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        linear(x.requires_grad_(), weight, bias)
    assert [t.shape for t in kept] == [weight.shape]


@TAKEN
def test_the_hidden_tensor_is_kept_once():
    x, weight1, bias1 = layer(64, 96)
    _, weight2, bias2 = layer(96, 64)
    kept: set[int] = set()

    def keep(t: Tensor) -> Tensor:
        if t.shape[-1] == 96 and t.shape[0] == ROWS:
            kept.add(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        our_mlp(x, weight1.requires_grad_(), bias1, weight2.requires_grad_(), bias2)
    assert len(kept) == 1


@TAKEN
def test_gradients_of_gradients():
    x, weight, bias = layer(32, 48)

    def second(function, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
        first = torch.autograd.grad(function(*leaves).tanh().sum(), leaves, create_graph=True)
        loss = torch.stack([gradient.square().sum() for gradient in first]).sum()
        return list(torch.autograd.grad(loss, leaves))

    found, eager, exact = second(linear, x.dtype), second(F.linear, x.dtype), second(F.linear, torch.float64)
    for one, usual, truth in zip(found, eager, exact, strict=True):
        verdict = judge(one, truth, usual, gradient=True, terms=ROWS)
        assert verdict.ok, str(verdict)


# ---- what is left to F.linear ----


@pytest.mark.parametrize(
    "call",
    ["few rows", "no rows", "float64", "float16", "one column", "mixed", "meta"],
)
def test_calls_that_are_plain(call, monkeypatch):
    monkeypatch.setattr(routes.native, "_LACKING", ())  # as of a processor that has products of every dtype
    x, weight, bias = layer(64, 96)
    if call in ("few rows", "no rows"):
        x = x[:, : 3 if call == "few rows" else 0]
    if call in ("float64", "float16", "meta"):
        to = torch.device("meta") if call == "meta" else getattr(torch, call)
        x, weight, bias = x.to(to), weight.to(to), bias.to(to)
    if call == "one column":
        weight, bias = weight[:1], bias[:1]
    if call == "mixed":
        with pytest.raises(RuntimeError, match="dtype"):
            linear(x, weight.double(), bias.double())
        return
    assert not routes._takes(x, (weight, bias))
    found, expected = linear(x, weight, bias), F.linear(x, weight, bias)
    assert found.shape == expected.shape and found.dtype == expected.dtype and found.device == expected.device
    assert call == "meta" or torch.equal(found, expected)


def test_wrong_shapes_are_told_as_ever():
    x, weight, bias = layer(64, 96)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(x[..., :48], weight, bias)


# ---- as a module, and what PyTorch does with modules ----


def test_the_module_is_an_nn_linear():
    ours, plain = Linear(64, 96), nn.Linear(64, 96)
    assert isinstance(ours, nn.Linear) and ours.state_dict().keys() == plain.state_dict().keys()
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(3, 64)
    assert torch.equal(ours(x), plain(x))
    assert torch.equal(copy.deepcopy(ours)(x), plain(x))
    ours.weight.data.mul_(2)  # nothing of the weight is remembered
    x = torch.randn(ROWS, 64)
    assert_same(ours(x), F.linear(x, plain.weight * 2, plain.bias), F32_BUDGET)


@TAKEN
@NATIVE
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_autocast(weights):
    """The dtypes of result and gradients are those of F.linear, and the values as near to the truth."""
    x, weight, bias = layer(64, 96)
    tensors, dy = (x, weight.to(weights), bias.to(weights)), torch.randn(2, ROWS // 2, 96)

    def run(function) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        with torch.autocast("cpu", torch.bfloat16):
            y = function(*leaves)
        y.backward(dy.to(y.dtype))
        return [y.detach(), *(gradient for t in leaves if (gradient := t.grad) is not None)]

    exact = gradients(F.linear, [t.double() for t in tensors], dy.bfloat16().double())
    for found, eager, truth in zip(run(linear), run(F.linear), exact, strict=True):
        assert found.dtype == eager.dtype
        verdict = judge(found.bfloat16(), truth, eager.bfloat16(), gradient=True, terms=ROWS)
        assert verdict.ok, str(verdict)


def test_hooks_are_called_and_see_the_whole():
    """A layer that someone watches is called as a module: nothing of it is fused or left out."""
    config = ViViTConfig(**SMALL)
    model, video = ViViT(config).eval(), torch.randn(1, 3, 4, 256, 256)
    nn.init.normal_(model.head.weight)
    seen: dict[str, Tensor] = {}
    with torch.no_grad():
        free = model(video)
        assert unwatched(*model.modules())
        last = model.blocks[-1]
        handles = [
            last.mlp.fc1.register_forward_hook(lambda _, __, y: seen.update(fc1=y)),
            last.register_forward_hook(lambda _, __, y: seen.update(block=y)),
        ]
        watched = model(video)
        assert not unwatched(*model.modules())
        assert seen["fc1"].shape == (1, config.T * config.S + 1, config.mlp)
        assert (seen["fc1"] < -0.5).any()  # before the GELU
        assert seen["block"].shape == (1, config.T * config.S + 1, config.embedding)
        assert_same(free, watched, F32_BUDGET)
        for handle in handles:
            handle.remove()
        assert torch.equal(model(video), free)


@TAKEN
def test_a_model_takes_these_routes(monkeypatch):
    """Every product of all tokens is a convolution; GELU is fused, or made again in backward."""
    model, video = ViViT(ViViTConfig(**SMALL)), torch.randn(1, 3, 4, 256, 256)
    layers: list[tuple] = []
    convolved, with_gelu = routes._convolved, routes._with_gelu

    def seen(rows, weight, bias):
        layers.append((*weight.shape, False))
        return convolved(rows, weight, bias)

    def seen_with_gelu(rows, weight, bias, approximate):
        layers.append((*weight.shape, True))
        return with_gelu(rows, weight, bias, approximate)

    monkeypatch.setattr(routes, "_convolved", seen)
    monkeypatch.setattr(routes, "_with_gelu", seen_with_gelu)
    E, mlp = SMALL["embedding"], SMALL["mlp"]
    with torch.no_grad():
        model(video)
    qkv, proj, fc2 = (3 * E, E, False), (E, E, False), (E, mlp, False)
    assert layers == [qkv, proj, (mlp, E, True), fc2, qkv]  # of the last block, the rest is one row
    layers.clear()
    kinds = set()
    loss = model(video).sum()
    assert layers == [qkv, proj, (mlp, E, False), fc2, qkv]
    nodes = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        kinds.add(type(node).__name__)
        nodes += [before for before, _ in node.next_functions if before is not None]
    assert {"_LinearBackward", "_GeluLinearBackward"} <= kinds


@pytest.mark.parametrize("attention", ["joint", "factorized_encoder"])
def test_the_class_row_alone_has_every_gradient(attention):
    """The last block's other rows go unread: leaving them out changes nothing, in the result or for a parameter."""
    depth = dict(temporal_depth=1) if attention == "factorized_encoder" else {}
    model = ViViT(ViViTConfig(**SMALL, attention=attention, **depth)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.1)
    video = torch.randn(2, 3, 4, 256, 256, dtype=torch.float64)
    logits, found = [], []
    for alone in (True, False):
        model.class_row_alone = alone
        model.zero_grad()
        logits.append(model(video))
        logits[-1].square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert_same(logits[0], logits[1], F64_BUDGET)
    for one, other in zip(*found, strict=True):
        assert_same(one, other, F64_BUDGET)


@TAKEN
def test_flops_are_counted_whatever_the_route():
    x, weight1, bias1 = layer(64, 96)
    _, weight2, bias2 = layer(96, 64)
    product = 2 * ROWS * 64 * 96
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        our_mlp(x, weight1, bias1, weight2, bias2)
    assert counter.get_total_flops() == 2 * product
    tensors = [t.requires_grad_() for t in (x, weight1, bias1, weight2, bias2)]
    with FlopCounterMode(display=False) as counter:
        our_mlp(*tensors).sum().backward()
    assert counter.get_total_flops() == 6 * product


@TAKEN
@pytest.mark.parametrize("function", [linear, linear_gelu])
def test_forward_mode_of_a_graph(function):
    """Compiled before, where nobody asked for a derivative: its jvp is not a zero that is left over from then."""
    x, weight, bias = layer(64, 96)

    def tangent(f):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent

    torch._dynamo.reset()
    graph = torch.compile(lambda x: function(x, weight, bias), backend="eager")
    graph(x)
    expected = tangent(lambda x: function(x, weight, bias))
    for found in (tangent(graph), torch.func.jvp(graph, (x,), (x.cos(),))[1]):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("train", [False, True])
def test_torch_compile_in_one_graph(train):
    model, video = ViViT(ViViTConfig(**SMALL)), torch.randn(1, 3, 4, 256, 256)
    nn.init.normal_(model.head.weight)
    compiled = torch.compile(model.train(train), fullgraph=True, backend="aot_eager")
    results = []
    for run in (model, compiled):
        model.zero_grad()
        with torch.set_grad_enabled(train):
            logits = run(video)
        if train:
            logits.square().sum().backward()
        results.append([logits, *(p.grad.clone() for p in model.parameters() if train)])
    assert len(results[0]) > 1 or not train
    for found, expected in zip(*results, strict=True):
        assert_same(found, expected, F32_BUDGET)


def test_export():
    model, video = ViViT(ViViTConfig(**SMALL)).eval(), torch.randn(1, 3, 4, 256, 256)
    nn.init.normal_(model.head.weight)
    with torch.no_grad():
        saved = io.BytesIO()
        torch.export.save(torch.export.export(model, (video,)), saved)
        saved.seek(0)
        assert_same(torch.export.load(saved).module()(video), model(video), F32_BUDGET)


@TAKEN
def test_per_sample_gradients():
    """torch.func: a gradient for each of three inputs."""
    _, weight, bias = layer(64, 96)
    xs = torch.randn(3, ROWS, 64)

    def loss(function):
        return torch.func.vmap(torch.func.grad(lambda w, x: function(x, w, bias).tanh().sum()), (None, 0))(weight, xs)

    assert_same(loss(linear), loss(F.linear), F32_BUDGET)
