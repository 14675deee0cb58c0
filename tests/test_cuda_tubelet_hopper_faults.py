"""Mistakes planted in Hopper's own kernels of tubelet_embedding (cuda_faults.py): each must end the simulator's run, or
show in the result, so that the tests beside this one can fail."""

from __future__ import annotations

import cuda_simulator
import pytest
import torch
from cuda_faults import Fault, planted
from test_cuda_tubelet import parameters, simulate  # noqa: F401  simulate: a fixture

from vivit_kernels import tubelet_embedding
from vivit_kernels.tubelet_embedding import cuda_kernels

SIZE, TUBELET, C, E = (1, 160, 128), (1, 4, 8), 4, 128  # more steps than a ring has stages, in every kernel
SOURCES = {"forward": "tubelet_hopper_bf16.cu"} | dict.fromkeys(["weight", "video"], "tubelet_hopper_backward_bf16.cu")
FILES = {"forward": "hopper.cuh", "weight": "hopper_weights.cuh", "video": "hopper_video.cuh"}
FILES = {kernel: f"tubelet_{name}" for kernel, name in FILES.items()}


# ---- what the simulator says ----

# Where tubelets begin is NaN before it is written: an address far behind everything.
_FAR = r"load_one .*(behind the end of|is not a multiple)"
_PRODUCT = r"group_(across|along)_(registers|shared) \(tubelet_hopper(_weights|_video)?.cuh:\d+\)"
_UNFINISHED = rf"copy_box .*is being read by {_PRODUCT}, which was not waited for"
_UNFINISHED += rf"|registers that {_PRODUCT} reads were written|read by thread \d+ at {_PRODUCT}, and no"
FOUND = {
    "no phase wait": rf"{_PRODUCT}: byte 0 of shared memory is still being copied to by thread 128 at copy_box",
    "other phase": r"nobody can go on: .*thread 128 at phase_wait .* phase 0 of barrier",
    "no arrival": r"nobody can go on: .*thread 128 at phase_wait .* wants 8 of 8 arrivals",
    "fewer bytes": r"copy_box .*: the copy brings \d+ bytes, but phase 0 of barrier 0 expects \d+ more",
    "no product wait": _UNFINISHED,
    "waits too little": _UNFINISHED,
    "no warp barrier": rf"{_FAR}|read_offsets .*no barrier lies between",
    "other lane": rf"{_FAR}|read_(offsets|places) .*(no barrier lies between|not in the)",
}
SHOWS = "the result"  # where operands are mixed up

# ---- the faults: what is replaced, by what, and where that stands several times in what ----

OF_RING = {  # which all kernels share
    "no phase wait": ("phase_wait(memory.full + at.stage, at.parity);", ""),
    "other phase": ("at.parity ^ 1", "at.parity"),
    "no arrival": ("release(memory.empty + at.last());", ""),
    "fewer bytes": ("Memory::kStageBytes", "Memory::kStageBytes / 2", "phase_expect(full, Memory::kStageBytes)"),
}
OF_EACH = OF_RING | {
    "no product wait": ("group_wait<1>();", ""),
    "waits too little": ("group_wait<1>();", "group_wait<2>();"),
}
_NUMBER = "numbers[i / 4][i % 4]"
_PAIR_UP = "pair_up({}, {}, tokens[two][i % 2], tokens[two + 1][i % 2]);"
_TWO = _PAIR_UP.format("to[two]", "to[two + 1]")
OF_KERNEL = {
    "forward": OF_EACH
    | {
        "other lane": ("table + step * kPairsOfStep + c", "table + step * kPairsOfStep + c + 8"),
        "other column": ("i % 4", "i % 4 ^ 2", _NUMBER),
        "other row": ("i % 4", "i % 4 ^ 1", _NUMBER),
    },
    "weight": OF_EACH
    | {
        "no warp barrier": ("warp_barrier();", "", "warp_barrier();  // what was looked up"),
        "other lane": ("from + 8 * i + 2 * (tile_lane() % 4)", "from + 8 * i + 2 * (tile_lane() % 4) + 2"),
        "other column": (_TWO, _PAIR_UP.format("to[two ^ 2]", "to[(two ^ 2) + 1]")),
        "other row": (_TWO, _PAIR_UP.format("to[two + 1]", "to[two]")),
        "other slab": ("kWeightSlabBytes", "kWeightSlabBytes / 2", "slabs_descriptor(ring.stage(), kWeightSlabBytes)"),
    },
    "video": OF_EACH | {"other slab": ("kVideoSlabBytes", "kVideoSlabBytes / 2", "kVideoTokenBytes, kVideoSlabBytes)")},
}


def fault(kernel: str, name: str) -> Fault:
    before, after, *within = OF_KERNEL[kernel][name]
    file = "tubelet_hopper_ring.cuh" if name in OF_RING else FILES[kernel]
    return Fault(file, before, after, FOUND.get(name, SHOWS), *within)


FAULTS = {(kernel, name): fault(kernel, name) for kernel, faults in OF_KERNEL.items() for name in faults}


@pytest.fixture
def run(simulate, monkeypatch):  # noqa: F811
    """run(kernel, mistake): its tokens, or the gradient of the weight, in one part, or of the video."""
    monkeypatch.setattr(cuda_kernels, "_multiprocessors", lambda device: 1)
    video = torch.randint(0, 256, (2, C, *SIZE), dtype=torch.uint8)
    values = parameters(E, C, TUBELET, SIZE, torch.bfloat16)
    dout = torch.randn(2, SIZE[1] * SIZE[2] // 32 + 1, E).bfloat16()

    def call(kernel: str) -> torch.Tensor:
        simulate(1)
        if kernel == "forward":
            return tubelet_embedding(video, *(x.detach() for x in values))
        clips = 1 if kernel == "weight" else 2
        given = video[:clips] if kernel == "weight" else (video / 255).bfloat16().requires_grad_()
        tokens = tubelet_embedding(given, *values)
        return torch.autograd.grad(tokens, values[0] if kernel == "weight" else given, dout[:clips])[0]

    def with_mistake(kernel: str, name: str) -> torch.Tensor:
        source = SOURCES[kernel]
        faults = tuple(fault for (other, _), fault in FAULTS.items() if SOURCES[other] == source)
        with planted(source, faults, FAULTS.get((kernel, name))):
            return call(kernel)

    return with_mistake


@pytest.mark.parametrize("kernel", OF_KERNEL)
def test_a_mistake_is_named(kernel, run):
    for name in OF_KERNEL[kernel]:
        if name in FOUND:
            with cuda_simulator.expect(FOUND[name]):
                run(kernel, name)


@pytest.mark.parametrize("kernel", OF_KERNEL)
def test_operands_that_are_mixed_up_show_in_the_result(kernel, run):
    """In registers, or in shared memory."""
    right = run(kernel, "none").double()
    for name in OF_KERNEL[kernel]:
        if name not in FOUND:
            wrong = run(kernel, name).double() - right
            assert wrong.norm() > 0.5 * right.norm(), name
    assert torch.equal(run(kernel, "none").double(), right)
