"""The CUDA C++ kernels of float32 (csrc/cuda/float32.cuh) on the host simulator: as tests/test_cuda_attention.py has
those of 16 bits, and in some tests both."""

import itertools
import math

import cuda_simulator
import pytest
import torch
from parity_grid import grid
from test_cuda_attention import AXES, check_case

from vivit_kernels._attention import cuda_grid
from vivit_kernels.numerics import judge

FLOAT32_GRIDS = [(1, 1), (1, 9), (2, 17), (4, 33), (7, 9), (13, 3), (16, 5), (16, 49), (33, 2), (2, 65), (1, 81)]
# Several short sequences to a block, and rows in fours, eight to a warp.
FLOAT32_AXES = AXES | {"dtype": [torch.float32]}
FLOAT32_CROSSES = [["grid", "heads"], ["D", "layout"], ["mask", "dropout_p", "extra", "heads"], ["grid", "schedule"]]


@pytest.mark.parametrize("case", grid(FLOAT32_AXES, FLOAT32_CROSSES, {"grid": FLOAT32_GRIDS, "schedule": [0, 3]}))
def test_parity_of_float32(case, monkeypatch):
    check_case(case, monkeypatch)


@pytest.mark.parametrize("T, S, temporal_heads", [(1, 197, 0), (16, 66, 1)])
def test_parity_of_long_sequences_of_float32(T, S, temporal_heads, monkeypatch):
    case = {"grid": (T, S), "heads": (1 + temporal_heads, temporal_heads), "D": 64, "inputs": "normal", "schedule": 2}
    case |= {"layout": "packed", "mask": None, "extra": "rotary", "dropout_p": 0.0, "dtype": torch.float32}
    check_case(case, monkeypatch)


def test_bounds_of_float32_are_those_of_the_predicate():
    """To the byte; of 16 bits and of the library tests/test_cuda_binding.py says the same."""
    resident, too_long = 1, 2
    for N, D, backward in itertools.product([*range(1, 70), 196, 197, 256, 577], (16, 64, 72, 160), (False, True)):
        least = cuda_grid.shared_bytes(N, D, 4, backward, False)
        found = [cuda_simulator.regime_of(N, D, torch.float32, backward, False, n) for n in (least - 1, least)]
        assert found == [too_long, resident], (N, D, backward)


def lse_of(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """`[B, H, S]` within frames of one, to base 2."""
    scores = torch.einsum("btshd,btzhd->bhsz", q, k) * scale
    return torch.logsumexp(scores, -1) / math.log(2)


@pytest.mark.parametrize("S", [5, 70])
def test_float32_writes_lse_where_it_is_wanted(S):
    q, k, v, o = torch.randn(4, 2, 1, S, 3, 24).unbind()
    lse = torch.full((2, 3, S), float("nan"))
    cuda_simulator.forward(q, k, v, o, lse, temporal_heads=0)
    exact, eager = lse_of(q.double(), k.double(), 24**-0.5), lse_of(q, k, 24**-0.5)
    assert judge(lse, exact, eager).ok
