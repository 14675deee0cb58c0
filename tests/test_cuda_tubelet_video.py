"""Hopper's own video gradient of tubelet_embedding (csrc/cuda/tubelet_hopper_video.cuh) on the host simulator, by the
launchers of backend `cuda`: which calls it takes, and that it is as right, and writes nothing else, as the kernel of
sm_80. What the simulator would find wrong: test_cuda_tubelet_hopper_faults.py.
"""

from __future__ import annotations

import math

import cuda_simulator
import pytest
import test_tubelet_embedding as tubelets
import torch
from test_cuda_tubelet import CASE, HALVES, parameters, simulate, step  # noqa: F401  simulate: a fixture
from test_cuda_tubelet_weights import box_rows

CPU = torch.device("cpu")


def products(size, tubelet, E: int, rows: str) -> int:
    """That all tiles together ask for: each of 64 tokens, 256 taps and 16 channels, in steps of 64 channels."""
    frames, *area = (n // part for n, part in zip(size[2:], tubelet, strict=True))
    tokens = math.prod(area) * (frames if rows.startswith("clip") else 1)
    groups, has_class = size[0] * (1 if rows.startswith("clip") else frames), rows.endswith("token")
    box = box_rows(tokens, has_class)
    in_boxes = groups * -(-tokens // box) * box if has_class else -(-tokens * groups // box) * box
    return -(-in_boxes // 128) * -(-size[1] * math.prod(tubelet) // 256) * -(-E // 64) * 4 * 2


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """Products of every video gradient from here on."""
    return cuda_simulator.counted(monkeypatch, "tubelet_video_gradient")


# (size, tubelet, E, changes of CASE): boxes of 64, 32 and 16 tokens, whole and not; several tiles of a block; taps side
# by side in eights, pairs and not at all; channels and taps that fill no step.
CASES = [
    ((2, 3, 2, 28, 42), (2, 14, 14), 128, {"rows": "frame+token", "video": "same"}),
    ((3, 1, 1, 64, 64), (1, 4, 8), 136, {"normalise": "per channel", "dtype": torch.float16, "video": "float32"}),
    ((3, 2, 1, 8, 64), (1, 2, 8), 264, {"layout": "BFYXC", "normalise": "per channel", "video": "float32"}),
    ((1, 1, 2, 24, 26), (1, 2, 2), 200, {"layout": "BFCYX", "rows": "frame", "video": "same"}),
    ((1, 2, 2, 36, 30), (1, 4, 5), 128, {"video": "same", "normalise": "per channel", "strides": "cropped"}),
    ((1, 3, 2, 32, 48), (2, 16, 16), 136, {"normalise": "common", "video": "float32", "dtype": torch.float16}),
]


@pytest.mark.parametrize("size, tubelet, E, changes", CASES)
def test_parity(size, tubelet, E, changes, simulate, counted):  # noqa: F811
    simulate(1)
    case = CASE | {"size": size, "tubelet": tubelet, "E": E} | changes
    tubelets.check_case(case, CPU, "cuda")
    assert set(counted) == {products(size, tubelet, E, case["rows"])}


@pytest.mark.full
@pytest.mark.parametrize("schedule", range(4))
@pytest.mark.parametrize("video", ["same", "float32"])
@pytest.mark.parametrize("layout", list(tubelets.LAYOUTS))
@pytest.mark.parametrize("tubelet", [(2, 16, 16), (2, 14, 14), (1, 5, 7), (3, 8, 6)])
def test_every_kind_of_video(schedule, video, layout, tubelet, simulate, counted):  # noqa: F811
    simulate(schedule)
    size, E = (2, 3, 5, 50, 66), [128, 200, 264, 328][schedule]
    rows = ["frame+token", "clip+token", "clip", "frame"][schedule]
    changes = {
        "dtype": HALVES[schedule % 2],
        "video": video,
        "layout": layout,
        "normalise": "per channel",
        "rows": rows,
    }
    tubelets.check_case(CASE | {"size": size, "tubelet": tubelet, "E": E} | changes, CPU, "cuda")
    assert set(counted) == {products(size, tubelet, E, rows)}


def test_the_same_bits_under_every_schedule(simulate, counted):  # noqa: F811
    """Six tiles for three multiprocessors, three steps of each: stages and phases go on from tile to tile."""
    size, tubelet = (1, 64, 96), (1, 4, 4)
    values = parameters(136, 1, tubelet, size, torch.bfloat16)
    clip = torch.rand(2, 1, *size).requires_grad_()
    found = []
    for schedule in range(3):
        simulate(schedule)
        found.append(step(clip, values)[-1])
    assert set(counted) == {products((2, 1, *size), tubelet, 136, "clip+token")}
    assert all(torch.equal(x, found[0]) for x in found)


@pytest.mark.parametrize("E, arch", [(136, 80), (120, 90)])
def test_who_runs_other_calls(E, arch, simulate, counted):  # noqa: F811
    """The kernel of sm_80, by products of single warps: also of fewer channels than two steps."""
    simulate(0, arch)
    changes = {"size": (1, 1, 2, 8, 24), "tubelet": (1, 4, 8), "E": E, "video": "same"}
    tubelets.check_case(CASE | changes, CPU, "cuda")
    assert set(counted) == {0}
