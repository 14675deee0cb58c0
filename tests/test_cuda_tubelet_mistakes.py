"""Mistakes planted in Hopper's own kernels of tubelet_embedding (tests/cuda_sim/mistakes.h): each must end the
simulator's run, or show in the result, so that the tests beside this one can fail."""

from __future__ import annotations

import cuda_simulator
import pytest
import torch
from test_cuda_tubelet import parameters, simulate  # noqa: F401  simulate: a fixture

from vivit_kernels import tubelet_embedding
from vivit_kernels.tubelet_embedding import cuda_kernels

MISTAKES = ["none", "no phase wait", "other phase", "no arrival", "fewer bytes", "no product wait", "waits too little"]
MISTAKES += ["no warp barrier", "other lane", "other column", "other row", "other slab"]  # Mistake of mistakes.h
FILES = {"forward": "/tubelet_hopper.cuh", "gradient": "/tubelet_hopper_weights.cuh"}
SIZE, TUBELET, E = (1, 160, 128), (1, 4, 8), 128  # more steps than a ring has stages, in either kernel


@pytest.fixture
def run(simulate, monkeypatch):  # noqa: F811
    """run(kernel, mistake, schedule): its tokens, or the weight's gradient, in one part."""
    monkeypatch.setattr(cuda_kernels, "_multiprocessors", lambda device: 1)
    plant = cuda_simulator.made().plant
    video = torch.randint(0, 256, (2, 1, *SIZE), dtype=torch.uint8)
    values = parameters(E, 1, TUBELET, SIZE, torch.bfloat16)
    dout = torch.randn(1, SIZE[1] * SIZE[2] // 32 + 1, E).bfloat16()

    def call(kernel: str, mistake: str, schedule: int = 1) -> torch.Tensor:
        simulate(schedule)
        if kernel == "forward":
            plant(MISTAKES.index(mistake), FILES[kernel])
            return tubelet_embedding(video, *(x.detach() for x in values))
        tokens = tubelet_embedding(video[:1], *values)
        plant(MISTAKES.index(mistake), FILES[kernel])
        return torch.autograd.grad(tokens, values[0], dout)[0]

    yield call
    plant(0, "")


# What the simulator says. Where tubelets begin is NaN before it is written: an address far behind everything.
_PRODUCT = r"group_(across|along)_registers \(tubelet_hopper(_weights)?.cuh:\d+\)"
FOUND = {
    "no phase wait": rf"{_PRODUCT}: byte 0 of shared memory is still being copied to by thread 128 at copy_box",
    "other phase": r"nobody can go on: threads 0-127 at phase_wait .* wants 1 of 1 arrivals and 0 bytes",
    "no arrival": r"nobody can go on: .*thread 128 at phase_wait .* wants 8 of 8 arrivals",
    "fewer bytes": r"copy_box .*: the copy brings \d+ bytes, but phase 0 of barrier 0 expects \d+ more",
    "no product wait": rf"copy_box .*is being read by {_PRODUCT}, which was not waited for",
    "waits too little": rf"group_wait .*registers that {_PRODUCT} reads were written before it was waited for",
    "no warp barrier": r"load_one .*(behind the end of|is not a multiple)|read_offsets .*no barrier lies between",
    "other lane": r"load_one .*(behind the end of|is not a multiple)|read_offsets .*no barrier lies between",
}


@pytest.mark.parametrize("kernel", list(FILES))
def test_a_mistake_is_named(kernel, run):
    for mistake, found in FOUND.items():
        if mistake == "no warp barrier" and kernel == "forward":
            continue  # it has none
        with cuda_simulator.expect(found):
            run(kernel, mistake)


@pytest.mark.parametrize("kernel", list(FILES))
def test_operands_that_are_mixed_up_show_in_the_result(kernel, run):
    right = run(kernel, "none").double()
    mistakes = ["other column", "other row", "other slab"][: 2 if kernel == "forward" else 3]  # it has no slabs
    for mistake in mistakes:
        wrong = run(kernel, mistake).double() - right
        assert wrong.norm() > 0.5 * right.norm(), mistake
    assert torch.equal(run(kernel, "none").double(), right)
