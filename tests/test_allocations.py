"""tests/allocations.py: that it sees what is allocated, inside the registered operations too, and nothing else."""

from __future__ import annotations

import pytest
import torch
from allocations import allocations, scratch

from vivit_kernels import joint_attention
from vivit_kernels.joint_attention import composed


def test_outputs_are_no_scratch_and_views_are_no_allocations():
    x = torch.randn(8, 4)
    y, found = allocations(lambda: x.t()[1:].reshape(-1, 2).view(4, 3, 2)[:0].new_empty(6).view(2, 3))
    assert len(found) == 2, "one for the reshape, which copies"
    assert [a.shape for a in found] == [(3, 8), (6,)] and y.shape == (2, 3)
    assert "24 bytes" in str(found[1]) and "float32" in str(found[1])
    assert scratch(lambda: (x, x[1:], x.add_(1.0), torch.empty(3), x.new_empty(0))) == []


@pytest.mark.parametrize(
    "planted",
    [
        lambda x: x.t().contiguous(),
        lambda x: torch.zeros(5),
        lambda x: x + 1,
        lambda x: x.float().sum(),
        lambda x: x.double(),
        lambda x: torch.empty_like(x, memory_format=torch.contiguous_format),
    ],
)
def test_planted_scratch_is_noticed(planted):
    def function(x):
        planted(x)
        return torch.empty(7)

    x = torch.randn(8, 4)
    assert len(scratch(lambda: function(x))) == 1
    assert scratch(lambda: torch.empty(7)) == []


def test_memory_used_again_is_two_allocations():
    """The second tensor may get the address of the first, which is gone."""

    def function():
        for _ in range(3):
            x = torch.empty(1000)
            del x
        return torch.empty(1000)

    assert len(scratch(function)) == 3


def planted(monkeypatch, extra):
    """Backend `torch` of joint_attention that does nothing but allocate: its outputs, and `extra()`."""

    def launch_fwd(q, k, v, temporal_heads, options):
        extra()
        return torch.zeros(q.shape), None

    def launch_bwd(do, q, k, v, o, lse, dq, dk, dv, temporal_heads, options):
        extra()
        for gradient in (dq, dk, dv):
            gradient.zero_()

    monkeypatch.setattr(composed, "launch_fwd", launch_fwd)
    monkeypatch.setattr(composed, "launch_bwd", launch_bwd)


def both_directions():
    qkv = torch.randn(2, 5, 3, 2, 8, requires_grad=True)
    do = torch.randn(2, 5, 2, 8)

    def function():
        o = joint_attention(qkv, backend="torch")
        (gradient,) = torch.autograd.grad(o, qkv, do)
        return o, gradient

    return function


def test_inside_the_registered_operations(monkeypatch):
    planted(monkeypatch, lambda: None)
    result, found = allocations(both_directions())
    assert [tuple(x.shape) for x in result] == [a.shape for a in found] == [(2, 5, 2, 8), (2, 5, 3, 2, 8)]
    assert scratch(both_directions()) == []
    planted(monkeypatch, lambda: torch.empty(11))
    assert [a.shape for a in scratch(both_directions())] == [(11,), (11,)]
