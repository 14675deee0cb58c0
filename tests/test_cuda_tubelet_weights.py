"""Hopper's own weight gradient of tubelet_embedding (csrc/cuda/tubelet_hopper_weights.cuh) on the host simulator, by
the launchers of backend `cuda`: which calls it takes, how they are shared out, and that it is as right, and reads
nothing else, as the kernel of sm_80. What the simulator would find wrong: test_cuda_tubelet_hopper_faults.py.
"""

from __future__ import annotations

import math

import cuda_simulator
import pytest
import test_tubelet_embedding as tubelets
import torch
from test_cuda_tubelet import (  # noqa: F401  simulate: a fixture
    CASE,
    HALVES,
    among_nan,
    as_laid_out,
    parameters,
    simulate,
    step,
)

from vivit_kernels import tubelet_embedding
from vivit_kernels.tubelet_embedding import cuda_kernels

MULTIPROCESSORS = 3  # of the simulated GPU
CPU = torch.device("cpu")


def box_rows(tokens: int, has_class: bool) -> int:
    """Tokens of a box of dout: plan_hopper_weights of csrc/cuda/tubelet_hopper_weights_launch.cuh."""
    return 64 if not has_class or tokens % 64 == 0 else 32 if tokens % 32 == 0 else 16


def products(size, tubelet, E: int, rows: str) -> int:
    """That all parts together ask for: each of 64 taps, 128 channels and 16 tokens, in pairs of steps of 32 tokens."""
    frames, *area = (n // part for n, part in zip(size[2:], tubelet, strict=True))
    tokens = math.prod(area) * (frames if rows.startswith("clip") else 1)
    groups, has_class = size[0] * (1 if rows.startswith("clip") else frames), rows.endswith("token")
    if not has_class:
        tokens, groups = tokens * groups, 1
    box = box_rows(tokens, has_class)
    pairs = -(-groups * -(-tokens // box) * box // 64)
    taps = -(-size[1] * math.prod(tubelet) // 8) * 8
    return pairs * -(-taps // 256) * -(-E // 128) * 4 * 4


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """Products of every weight gradient from here on, for which there are three multiprocessors."""
    monkeypatch.setattr(cuda_kernels, "_multiprocessors", lambda device: MULTIPROCESSORS)
    return cuda_simulator.counted(monkeypatch, "tubelet_weight_gradient")


# (size, tubelet, E, changes of CASE): boxes of 64, 32 and 16 tokens, whole and not; parts that differ, several tiles of
# a block; taps and channels that fill no tile.
CASES = [
    ((2, 3, 2, 28, 42), (2, 14, 14), 128, {"rows": "frame+token"}),
    ((1, 1, 1, 64, 64), (1, 4, 8), 136, {"rows": "clip+token", "normalise": "per channel", "dtype": torch.float16}),
    ((3, 2, 1, 8, 64), (1, 2, 8), 136, {"layout": "BFYXC", "normalise": "per channel", "dtype": torch.float16}),
    ((1, 1, 2, 24, 26), (1, 2, 2), 264, {"video": "same", "layout": "BFCYX", "rows": "frame"}),
    ((1, 2, 2, 36, 28), (1, 4, 4), 128, {"video": "float32", "normalise": "per channel", "strides": "cropped"}),
    ((2, 1, 3, 24, 40), (1, 8, 8), 128, {"video": "same", "normalise": "common", "rows": "frame+token"}),
    ((1, 3, 4, 32, 32), (2, 16, 16), 136, {"normalise": "common", "position": False, "layout": "BFCYX"}),
    ((2, 2, 1, 30, 36), (1, 6, 2), 128, {"layout": "BFYXC", "video": "float32", "dtype": torch.float16}),
]


@pytest.mark.parametrize("size, tubelet, E, changes", CASES)
def test_parity(size, tubelet, E, changes, simulate, counted):  # noqa: F811
    simulate(1)
    case = CASE | {"size": size, "tubelet": tubelet, "E": E} | changes
    tubelets.check_case(case, CPU, "cuda")
    assert set(counted) == {products(size, tubelet, E, case["rows"])}


def test_the_cases_have_boxes_of_every_size_and_blocks_of_several_tiles():
    boxes, whole = set(), set()
    for size, tubelet, _, changes in CASES:
        frames, *area = (n // part for n, part in zip(size[2:], tubelet, strict=True))
        rows = (CASE | changes)["rows"]
        tokens = math.prod(area) * (frames if rows.startswith("clip") else 1)
        boxes.add(box_rows(tokens, rows.endswith("token")))
        whole.add(tokens % box_rows(tokens, rows.endswith("token")) == 0)
    assert boxes == {16, 32, 64} and whole == {True, False}
    tiles = [-(-E // 128) * -(-size[1] * math.prod(tubelet) // 256) for size, tubelet, E, _ in CASES]
    assert max(tiles) > MULTIPROCESSORS > min(tiles)


@pytest.mark.full
@pytest.mark.parametrize("schedule", range(4))
@pytest.mark.parametrize("video", ["uint8", "same", "float32"])
@pytest.mark.parametrize("layout", list(tubelets.LAYOUTS))
@pytest.mark.parametrize("tubelet", [(2, 16, 16), (2, 14, 14), (1, 2, 8), (3, 8, 6)])
def test_every_kind_of_video(schedule, video, layout, tubelet, simulate, counted):  # noqa: F811
    simulate(schedule)
    size, E = (2, 3, 5, 50, 66), [128, 200, 264, 328][schedule]
    normalise = [None, "common", "per channel"][len(layout) * schedule % 3]
    rows = ["frame+token", "clip+token", "clip", "frame"][schedule]
    changes = {
        "dtype": HALVES[schedule % 2],
        "video": video,
        "layout": layout,
        "normalise": normalise,
        "rows": rows,
    }
    tubelets.check_case(CASE | {"size": size, "tubelet": tubelet, "E": E} | changes, CPU, "cuda")
    assert set(counted) == {products(size, tubelet, E, rows)}


@pytest.mark.parametrize("video", ["uint8", pytest.param("float32", marks=pytest.mark.full)])
def test_the_same_bits_under_every_schedule(video, simulate, counted):  # noqa: F811
    """Twelve pairs of steps for each of two tiles, in parts: stages and phases go on from tile to tile."""
    size, tubelet = (1, 128, 96), (1, 4, 4)
    pixels = torch.randint(0, 256, (1, 1, *size), dtype=torch.uint8)
    clip = pixels if video == "uint8" else (pixels / 255).requires_grad_()
    values = parameters(136, 1, tubelet, size, torch.bfloat16)
    found = []
    for schedule in range(3):
        simulate(schedule)
        found.append(step(clip, values))
    assert set(counted) == {products((1, 1, *size), tubelet, 136, "clip+token")}
    assert all(map(torch.equal, run, found[0]) for run in found)


@pytest.mark.parametrize("layout", list(tubelets.LAYOUTS))
def test_nothing_around_the_video_and_no_class_row_is_used(layout, simulate, counted):  # noqa: F811
    """Every margin of the video is NaN, and so are the pixels that fill no tubelet and dout of the class rows; a NaN
    within a tubelet stays with its tap, one in a token of dout with its channel. Two channels of four are no run."""
    simulate(2)
    size, tubelet = (5, 18, 26), (2, 4, 6)
    clip = among_nan(layout, torch.bfloat16, size, tubelet, 2)
    values = parameters(136, 2, tubelet, size, torch.bfloat16)
    shown = clip.permute(as_laid_out(layout))
    tokens = tubelet_embedding(shown, *values, layout=layout, mean=0.4, std=0.3)
    dout = torch.randn(tokens.shape).bfloat16()
    dout[:, 0] = float("nan")

    def of_weight() -> torch.Tensor:
        return torch.autograd.grad(tokens, values[0], dout, retain_graph=True)[0]

    assert of_weight().isfinite().all()
    pixels = clip.data  # whose changes autograd does not see
    pixels[1, 1, 3, 5, 7] = float("nan")  # row 1, column 1 of tubelet (1, 1, 1) of the second clip, its second frame
    found = of_weight()
    assert found[:, 1, 1, 1, 1].isnan().all() and int(found.isnan().sum()) == 136
    pixels[1, 1, 3, 5, 7] = 0.0
    dout[1, 5, 17] = float("nan")
    found = of_weight()
    assert found[17].isnan().all() and int(found.isnan().sum()) == found[17].numel()
    assert set(counted) == {0 if layout == "BFYXC" else products((2, 2, *size), tubelet, 136, "clip+token")}


@pytest.mark.parametrize(
    "changes, arch",
    [
        ({}, 80),
        ({"E": 120}, 90),  # fewer channels than a tile
        ({"tubelet": (1, 4, 5)}, 90),  # runs of odd length
        ({"strides": "cropped"}, 90),  # rows that begin anywhere
    ],
)
def test_who_runs_other_calls(changes, arch, simulate, counted):  # noqa: F811
    """The kernel of sm_80, by products of single warps."""
    simulate(0, arch)
    tubelets.check_case(CASE | {"size": (1, 1, 2, 8, 24), "tubelet": (1, 4, 8), "E": 136} | changes, CPU, "cuda")
    assert set(counted) == {0}
