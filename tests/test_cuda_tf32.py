"""float32 by tf32 (csrc/cuda/tf32_rows.cuh) on the host simulator: as tests/test_cuda_float32.py has float32, beside
an eager whose products round what they multiply as well."""

import cuda_simulator
import parity_grid
import pytest
import tf32
import torch
from parity_grid import grid
from test_cuda_attention import ASKED, check_case
from test_cuda_float32 import FLOAT32_AXES, FLOAT32_CROSSES

from vivit_kernels import spatial_attention

TF32_AXES = FLOAT32_AXES | {"heads": [(2, 1), (2, 2), (2, 0)]}
TF32_EVERY = {"grid": [(1, 9), (4, 13), (2, 17)], "D": [24, 64], "schedule": [0, 3], "layout": ["packed", "sliced"]}
TF32_EVERY |= {"inputs": ["normal", "dominant"], "mask": [None, "some"]}


@pytest.fixture
def tf32_allowed(monkeypatch):
    """Kernels and eager's products take float32 as a GPU does where PyTorch allows tf32; what they are held to does not
    change: float64, and eager's own error."""
    products = tf32.Products()

    def run(function, tensors, do, dtype, packed):
        with products:
            return plain(function, tensors, do, dtype, packed)

    plain = parity_grid.run
    monkeypatch.setattr(parity_grid, "run", run)
    monkeypatch.setitem(ASKED, "tf32", True)
    yield
    assert products.count, "eager multiplied in another way"


@pytest.mark.parametrize("case", grid(TF32_AXES, FLOAT32_CROSSES, TF32_EVERY))
@pytest.mark.usefixtures("tf32_allowed")
def test_parity_of_tf32(case, monkeypatch):
    check_case(case, monkeypatch)


@pytest.mark.full
@pytest.mark.parametrize("D", [64, 72, 128])
@pytest.mark.parametrize("S", [65, 197, 257])
@pytest.mark.usefixtures("tf32_allowed")
def test_parity_of_long_sequences_of_tf32(D, S, monkeypatch):
    case = {"grid": (1, S), "heads": (1, 0), "D": D, "inputs": "normal", "schedule": 2, "extra": None}
    case |= {"layout": "sliced", "mask": None, "dropout_p": 0.0, "dtype": torch.float32}
    check_case(case, monkeypatch)


def test_tf32_is_not_float32():
    """But of numbers that tf32 has, here weights of 1 and values; of others the error is that of ten bits."""
    q, k, v, plain, tenbit = torch.randn(5, 1, 1, 40, 2, 48).unbind()
    for tensors, same in (((q, k, v), False), ((torch.zeros_like(q), k, tf32.rounded(v)), True)):
        cuda_simulator.forward(*tensors, plain, temporal_heads=0)
        cuda_simulator.forward(*tensors, tenbit, temporal_heads=0, tf32=True)
        exact = spatial_attention(*(x.double() for x in tensors))
        assert torch.equal(plain, tenbit) == same
        assert same or 30 * (plain - exact).abs().max() < (tenbit - exact).abs().max()
