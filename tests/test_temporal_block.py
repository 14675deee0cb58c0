"""temporal_block on a CPU: results and gradients against the definition, PyTorch's checks, what it refuses."""

from __future__ import annotations

import pytest
import torch
from parity_grid import DTYPES, check

from vivit_kernels import explain, temporal_block
from vivit_kernels.temporal_block import tiles
from vivit_kernels.temporal_block.reference import temporal_block as reference

NAMES = ["o", "dx", "dnorm_weight", "dnorm_bias", "dweight", "dbias"]


def inputs(B: int, T: int, S: int, E: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(x, norm's weight and bias, weight, bias; the gradient of the output), rows of another mean than 0."""
    x = torch.randn(B, T, S, E) + 0.5
    norm = [torch.rand(E) + 0.5, torch.randn(E) * 0.2]
    return [x, *norm, torch.randn(3 * E, E) * E**-0.5, torch.randn(3 * E) * 0.2], torch.randn(B, T, S, E)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B, T, S, E, heads", [(2, 5, 3, 24, 3), (1, 1, 4, 16, 1), (1, 70, 2, 32, 2)])
def test_against_the_definition(B, T, S, E, heads, dtype):
    tensors, do = inputs(B, T, S, E)
    scales = {"dweight": 1.0, "dbias": 1.0} if T == 1 else None  # of q and k they are zero
    check(
        lambda *x: temporal_block(*x, heads=heads, eps=1e-5),
        lambda *x: reference(*x, heads, 1e-5),
        tensors, do, dtype, NAMES, scales=scales,
    )  # fmt: skip


def test_pytorch_accepts_the_operation():
    tensors, _ = inputs(1, 3, 2, 16)
    leaves = [x.requires_grad_() for x in tensors]
    torch.library.opcheck(torch.ops.vivit_kernels.temporal_block_fwd.default, (*leaves, 2, 1e-6, "torch"))


def test_only_the_inputs_are_kept():
    tensors, _ = inputs(1, 4, 3, 16)
    leaves, found = [x.requires_grad_() for x in tensors], []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (found.append(x.data_ptr()), x)[1], lambda x: x):
        temporal_block(*leaves, heads=2)
    assert set(found) == {x.data_ptr() for x in leaves}


def test_autocast_decides_the_dtype():
    tensors, _ = inputs(1, 4, 3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        o = temporal_block(*tensors, heads=2)
    assert o.dtype == torch.bfloat16


def test_a_second_derivative_is_refused():
    tensors, _ = inputs(1, 3, 2, 16)
    x = tensors[0].requires_grad_()
    (dx,) = torch.autograd.grad(temporal_block(*tensors, heads=2).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="temporal_block: double backward"):
        dx.sum().backward()


@pytest.mark.parametrize(
    "change, heads, said",
    [
        ({0: torch.randn(3, 4, 16)}, 2, r"x \(3, 4, 16\) torch.float32 must be \[B, T, S, E\]"),
        ({}, 3, "heads=3 must divide E=16"),
        ({3: torch.randn(48, 8)}, 2, r"weight \(48, 8\) must be \[48, 16\]"),
        ({1: torch.randn(16).double()}, 2, "bring all to one dtype and device"),
        ({0: torch.randn(1, 0, 4, 16)}, 2, r"x \(1, 0, 4, 16\) torch.float32 must be .* at least one token"),
        ({4: None}, 2, r"bias is None; give zeros \[48\] where a layer has no bias"),
        ({}, 2.0, "heads=2.0 must divide E=16"),
    ],
)
def test_what_does_not_fit_is_said(change, heads, said):
    tensors, _ = inputs(1, 3, 2, 16)
    for i, x in change.items():
        tensors[i] = x
    with pytest.raises(ValueError, match=f"temporal_block: .*{said}"):
        temporal_block(*tensors, heads=heads)


def test_a_kernel_that_cannot_run_says_why():
    tensors, _ = inputs(1, 33, 2, 24)
    with pytest.raises(NotImplementedError) as error:
        temporal_block(*tensors, heads=2, backend="triton")
    for said in ("T=33: its tiles hold whole sequences", "head size 12 is not one of 16, 24, ..., 64"):
        assert said in str(error.value)


def test_the_choice_is_explained():
    tensors, _ = inputs(1, 4, 3, 16)
    found = explain(temporal_block, *tensors, heads=1)
    assert found.chosen == "torch" and "by name" in str(found)


def test_where_one_kernel_may_win():
    """The figures that order.py states."""
    wins = {E: tiles.floors(E, heads) for E, heads in ((192, 3), (384, 6), (512, 8), (768, 12), (1024, 16))}
    assert [E for E, (one, apart) in wins.items() if one < apart] == [192, 384, 512]
    assert [round(x, 1) for x in wins[768]] == [8.4, 7.5]
