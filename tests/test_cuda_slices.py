"""Sequences of more than 64 tokens on the host simulator, of heads whose rows Hopper's products take in slices
(csrc/cuda/hopper_rows.cuh); those of 64 channels are in tests/test_cuda_attention.py."""

import pytest
import torch
from parity_grid import grid
from test_cuda_attention import AXES, check_case, step

# Slices of 32 channels; of 64 and 16, 64 and 32, 64 and 64, 64 and 64 and 32.
SLICED_SIZES = [16, 32, 72, 80, 88, 96, 104, 128, 136, 160]
SLICED_GRIDS = [(1, S) for S in (65, 100, 128, 144)] + [(16, 66), (70, 3)]
SLICED_AXES = AXES | {
    "D": SLICED_SIZES,
    "grid": [*SLICED_GRIDS, (1, 80), (1, 112), (1, 160), (1, 196), (1, 197), (1, 256), (1, 257), (9, 129), (70, 66)],
    "mask": [None],
    "dropout_p": [0.0],
    "extra": [None, "scale"],
}
SLICED_CROSSES = [["D", "grid"], ["D", "layout"], ["D", "dtype", "heads"]]
SLICED_EVERY = {"D": [32, 72, 96, 128, 160], "grid": [(1, 65)], "schedule": [0, 3], "heads": [(1, 0)]}
SLICED_EVERY |= {"layout": ["packed", "sliced"], "inputs": ["normal"], "extra": [None]}
SLICED_OPTION_AXES = SLICED_AXES | {name: AXES[name] for name in ("mask", "dropout_p", "extra")}
SLICED_OPTION_CROSSES = [["D", "extra"], ["D", "mask", "dropout_p"]]


@pytest.mark.parametrize("case", grid(SLICED_AXES, SLICED_CROSSES, SLICED_EVERY))
def test_parity_of_long_sequences_in_slices(case, monkeypatch):
    check_case(case, monkeypatch)


@pytest.mark.parametrize(
    "case", grid(SLICED_OPTION_AXES, SLICED_OPTION_CROSSES, SLICED_EVERY | {"D": [80], "extra": AXES["extra"]})
)
def test_parity_of_long_sequences_in_slices_with_options(case, monkeypatch):
    check_case(case, monkeypatch)


@pytest.mark.full
@pytest.mark.parametrize("D", [32, 80, 96, 128, 160])
def test_the_same_bits_in_every_order(D):
    qkv, do = torch.randn(1, 2, 100, 3, 1, D).bfloat16(), torch.randn(1, 2, 100, 1, D).bfloat16()
    options = {"temporal_heads": 0, "dropout_p": 0.2, "seed": torch.tensor([1, 2])}
    first = step(qkv, do, **options)
    for schedule in range(1, 5):
        assert all(map(torch.equal, first, step(qkv, do, schedule=schedule, **options)))
