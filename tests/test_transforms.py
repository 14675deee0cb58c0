"""The ops within torch.func's transformations: gradients are autograd's, bit for bit; what does not work says so."""

from __future__ import annotations

import pytest
import torch
from parity import F32_BUDGET, assert_same
from torch.autograd import forward_ad

from vivit_kernels import factorized_attention, joint_attention, temporal_block, tubelet_embedding

E = 16
ROWS = [torch.rand(E) + 0.5, torch.randn(E), torch.randn(3 * E, E) / 4, torch.randn(3 * E)]
WEIGHT = torch.randn(4, 3, 2, 4, 4)
OPS = {
    "joint_attention": (joint_attention, (2, 6, 3, 2, 8)),
    "factorized_attention": (lambda x: factorized_attention(x, temporal_heads=1, softcap=3.0), (2, 3, 4, 3, 2, 8)),
    "tubelet_embedding": (lambda x: tubelet_embedding(x, WEIGHT, mean=0.4, std=[0.2, 0.3, 0.4]), (2, 3, 4, 9, 8)),
    "temporal_block": (lambda x: temporal_block(x, *ROWS, heads=2), (2, 3, 4, E)),
}


@pytest.fixture(params=list(OPS))
def case(request):
    function, shape = OPS[request.param]
    return request.param, lambda x: function(x).square().sum(), function, torch.randn(shape)


def gradient(loss, x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


def test_reverse_mode_and_vmap_are_autograds(case):
    _, loss, function, x = case
    expected, several = gradient(loss, x), torch.stack([x, 2 * x])
    assert torch.equal(torch.func.grad(loss)(x), expected)
    assert torch.equal(torch.func.vjp(loss, x)[1](torch.tensor(1.0))[0], expected)
    assert torch.equal(torch.func.jacrev(loss)(x), expected)
    assert torch.equal(torch.func.vmap(torch.func.grad(loss))(several)[0], expected)
    assert torch.equal(torch.func.grad(lambda y: torch.func.vmap(loss)(y).sum())(several)[0], expected)
    by_last = torch.func.vmap(function, in_dims=-1, out_dims=1)(several.movedim(0, -1))
    assert torch.equal(by_last[:, 1], function(2 * x))
    assert torch.equal(torch.func.functionalize(function)(x), function(x))


def test_pytorchs_old_vmap_is_refused(case):
    name, _, function, x = case
    y = function(x.requires_grad_())
    with pytest.raises(NotImplementedError, match=f"{name}: kernels have no rule for is_grads_batched=True"):
        torch.autograd.grad(y, x, torch.randn(3, *y.shape), is_grads_batched=True)


def by_dual_numbers(function, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent


@pytest.mark.parametrize("fullgraph", [True, False])
def test_within_a_graph_derivatives_are_right(case, fullgraph):
    name, loss, function, x = case
    forward = [
        lambda y: torch.func.jvp(loss, (y,), (y.cos(),))[1],
        lambda y: by_dual_numbers(function, y, y.cos()),
    ]
    if name == "temporal_block":
        forward = []  # PyTorch (2.13) fails to trace forward-mode derivatives of its own layer_norm
    twice = torch.func.grad(lambda y: (torch.func.grad(loss)(y) * y.cos()).sum())
    for derivative in (*forward, torch.func.grad(loss), twice):
        torch._dynamo.reset()
        found = torch.compile(derivative, backend="eager", fullgraph=fullgraph)(x)
        assert_same(found, derivative(x), F32_BUDGET)
    several, graph = torch.stack([x, 2 * x]), torch.compile(torch.func.vmap(function), backend="eager", fullgraph=True)
    assert torch.equal(graph(several)[1], function(2 * x))


def test_derivatives_of_a_graph_are_right(case):
    """Compiled before, where nobody asked for any: none of them is a zero that is left over from then."""
    _, loss, _, x = case
    torch._dynamo.reset()
    graph = torch.compile(loss, backend="eager")
    assert torch.equal(graph(x), loss(x))
    assert_same(by_dual_numbers(graph, x, x.cos()), by_dual_numbers(loss, x, x.cos()), F32_BUDGET)
    found, expected = (torch.func.jvp(f, (x,), (x.cos(),))[1] for f in (graph, loss))
    assert_same(found, expected, F32_BUDGET)
    assert torch.equal(gradient(graph, x), gradient(loss, x))


def test_a_second_derivative_outside_of_torch_func_is_refused(case):
    name, loss, _, x = case
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{name}: double backward"):
        torch.autograd.grad(first.sum(), leaf)


def test_shapes_alone_are_enough():
    """Meta tensors, of which autocast knows nothing."""
    assert joint_attention(torch.randn(2, 6, 3, 2, 8, device="meta")).shape == (2, 6, 2, 8)
    assert factorized_attention(torch.randn(2, 3, 4, 3, 2, 8, device="meta"), temporal_heads=1).shape == (2, 3, 4, 2, 8)
    assert tubelet_embedding(torch.randn(2, 3, 4, 9, 8, device="meta"), WEIGHT.to("meta")).shape == (2, 8, 4)
    assert temporal_block(*(x.to("meta") for x in (torch.randn(2, 3, 4, E), *ROWS)), heads=2).shape == (2, 3, 4, E)
