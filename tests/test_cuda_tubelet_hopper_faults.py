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
FILES = {"forward": "hopper.cuh", "weight": "hopper_weights.cuh", "video": "hopper_video.cuh"}
FILES = {kernel: f"/tubelet_{name}" for kernel, name in FILES.items()}
SIZE, TUBELET, C, E = (1, 160, 128), (1, 4, 8), 4, 128  # more steps than a ring has stages, in every kernel


@pytest.fixture
def run(simulate, monkeypatch):  # noqa: F811
    """run(kernel, mistake): its tokens, or the gradient of the weight, in one part, or of the video."""
    monkeypatch.setattr(cuda_kernels, "_multiprocessors", lambda device: 1)
    plant = cuda_simulator.made().plant
    video = torch.randint(0, 256, (2, C, *SIZE), dtype=torch.uint8)
    values = parameters(E, C, TUBELET, SIZE, torch.bfloat16)
    dout = torch.randn(2, SIZE[1] * SIZE[2] // 32 + 1, E).bfloat16()

    def call(kernel: str, mistake: str) -> torch.Tensor:
        simulate(1)
        if kernel == "forward":
            plant(MISTAKES.index(mistake), FILES[kernel])
            return tubelet_embedding(video, *(x.detach() for x in values))
        clips = 1 if kernel == "weight" else 2
        given = video[:clips] if kernel == "weight" else (video / 255).bfloat16().requires_grad_()
        tokens = tubelet_embedding(given, *values)
        plant(MISTAKES.index(mistake), FILES[kernel])
        return torch.autograd.grad(tokens, values[0] if kernel == "weight" else given, dout[:clips])[0]

    yield call
    plant(0, "")


# What the simulator says. Where tubelets begin is NaN before it is written: an address far behind everything.
_FAR = r"load_one .*(behind the end of|is not a multiple)"
_PRODUCT = r"group_(across|along)_(registers|shared) \(tubelet_hopper(_weights|_video)?.cuh:\d+\)"
FOUND = {
    "no phase wait": rf"{_PRODUCT}: byte 0 of shared memory is still being copied to by thread 128 at copy_box",
    "other phase": r"nobody can go on: .*thread 128 at phase_wait .* phase 0 of barrier",
    "no arrival": r"nobody can go on: .*thread 128 at phase_wait .* wants 8 of 8 arrivals",
    "fewer bytes": r"copy_box .*: the copy brings \d+ bytes, but phase 0 of barrier 0 expects \d+ more",
    "no product wait": rf"copy_box .*is being read by {_PRODUCT}, which was not waited for",
    "waits too little": rf"registers that {_PRODUCT} reads were written|read by thread \d+ at {_PRODUCT}, and no",
    "no warp barrier": rf"{_FAR}|read_offsets .*no barrier lies between",
    "other lane": rf"{_FAR}|read_(offsets|places) .*(no barrier lies between|not in the)",
}


@pytest.mark.parametrize("kernel", list(FILES))
def test_a_mistake_is_named(kernel, run):
    left_out = {"forward": ["no warp barrier"], "weight": [], "video": ["no warp barrier", "other lane"]}  # has none
    for mistake, found in FOUND.items():
        if mistake not in left_out[kernel]:
            with cuda_simulator.expect(found):
                run(kernel, mistake)


@pytest.mark.parametrize("kernel", list(FILES))
def test_operands_that_are_mixed_up_show_in_the_result(kernel, run):
    """In registers, or in shared memory."""
    mistakes = {"forward": ["other column", "other row"], "video": ["other slab"]}
    right = run(kernel, "none").double()
    for mistake in mistakes.get(kernel, ["other column", "other row", "other slab"]):
        wrong = run(kernel, mistake).double() - right
        assert wrong.norm() > 0.5 * right.norm(), mistake
    assert torch.equal(run(kernel, "none").double(), right)
