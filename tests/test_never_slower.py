"""accelerate() makes no model of transformers slower on a CPU: times of the process, in turns, with one thread."""

from __future__ import annotations

import statistics

import pytest
import torch

from bench import accelerate as bench
from bench.peers import Missing

pytestmark = pytest.mark.full
# What `python -m bench accelerate` keeps is above 1. Between two halves of one round a busy machine's ratio is off by a
# fifth, and the median of few rounds by a tenth: who is below gets more of them before the verdict.
LEAST, ROUNDS, MORE = 0.85, 3, 8


@pytest.mark.parametrize("step", ["forward", "train"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", list(bench.FAMILIES))
def test_never_slower(family, dtype, step):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ratios = bench.ratios(family, dtype, step, ROUNDS)
        if statistics.median(ratios) < LEAST:
            ratios = bench.ratios(family, dtype, step, MORE)
    except Missing as missing:
        pytest.skip(str(missing))
    finally:
        torch.set_num_threads(before)
    assert statistics.median(ratios) > LEAST, ratios
