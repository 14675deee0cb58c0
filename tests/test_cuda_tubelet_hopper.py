"""Hopper's own forward of tubelet_embedding (csrc/cuda/tubelet_hopper.cuh) on the host simulator, by the launchers of
backend `cuda`: which calls it takes, in what tiles, and that it is as right, and reads nothing else, as the kernel of
sm_80. The simulator ends a run that reads a stage before it is full, or fills one that is still read.
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
)

from vivit_kernels import tubelet_embedding

MULTIPROCESSORS = 3  # of the simulated GPU
CPU = torch.device("cpu")


def tiles(M: int, E: int) -> tuple[int, int]:
    """(columns of a tile, tiles): columns_of of csrc/cuda/tubelet_hopper_launch.cuh."""

    def count(columns: int) -> int:
        return -(-M // 128) * -(-E // columns)

    columns = min((256, 192, 128), key=lambda n: (-(-count(n) // MULTIPROCESSORS) * n, -n))
    return columns, count(columns)


def products(size, tubelet, E: int) -> int:
    """That all warpgroups ask for, each of 64 tubelets and 16 taps; steps of 64 taps come in pairs."""
    C, M = size[1], size[0] * math.prod(n // part for n, part in zip(size[2:], tubelet, strict=True))
    steps = -(-C * math.prod(tubelet) // 128) * 2
    return tiles(M, E)[1] * 2 * steps * 4


# (size, tubelet, E, changes of CASE): columns of a tile are 128, 192, 256; taps are less than a step, an odd number of
# steps, several rounds of the ring; tubelets are one, less than a warpgroup's, several tiles of a block.
CASES = [
    ((1, 3, 2, 28, 42), (2, 14, 14), 128, {"rows": "frame+token"}),
    ((1, 3, 2, 28, 42), (2, 14, 14), 136, {"layout": "BFYXC", "normalise": "per channel", "dtype": torch.float16}),
    ((1, 1, 1, 40, 26), (1, 2, 2), 520, {"video": "same", "layout": "BFCYX"}),
    ((1, 2, 2, 20, 28), (1, 4, 4), 264, {"video": "float32", "normalise": "per channel", "strides": "cropped"}),
    ((1, 1, 1, 8, 8), (1, 8, 8), 768, {"video": "same", "dtype": torch.float16, "normalise": "common", "bias": False}),
    ((1, 3, 4, 32, 32), (2, 16, 16), 200, {"normalise": "common", "position": False, "layout": "BFCYX"}),
    ((1, 2, 1, 30, 36), (1, 6, 2), 264, {"layout": "BFYXC", "video": "float32", "rows": "frame"}),
]


@pytest.mark.parametrize("size, tubelet, E, changes", CASES)
def test_parity(size, tubelet, E, changes, simulate, monkeypatch):  # noqa: F811
    simulate(1)
    found = cuda_simulator.counted(monkeypatch, "tubelet_forward")
    tubelets.check_case(CASE | {"size": size, "tubelet": tubelet, "E": E} | changes, CPU, "cuda")
    assert set(found) == {products(size, tubelet, E)}


def test_the_cases_have_every_width_and_blocks_of_several_tiles():
    found = []
    for size, tubelet, E, _ in CASES:
        M = size[0] * math.prod(n // part for n, part in zip(size[2:], tubelet, strict=True))
        found.append(tiles(M, E))
    assert {columns for columns, _ in found} == {128, 192, 256}
    assert max(count for _, count in found) > 2 * MULTIPROCESSORS
    assert 1 in {count for _, count in found}


@pytest.mark.full
@pytest.mark.parametrize("schedule", range(4))
@pytest.mark.parametrize("video", ["uint8", "same", "float32"])
@pytest.mark.parametrize("layout", list(tubelets.LAYOUTS))
@pytest.mark.parametrize("tubelet", [(2, 16, 16), (2, 14, 14), (1, 2, 8), (3, 8, 6)])
def test_every_kind_of_video(schedule, video, layout, tubelet, simulate, monkeypatch):  # noqa: F811
    simulate(schedule)
    found = cuda_simulator.counted(monkeypatch, "tubelet_forward")
    size, E = (2, 3, 5, 50, 66), [128, 200, 264, 328][schedule]
    normalise = [None, "common", "per channel"][len(layout) * schedule % 3]
    changes = {
        "dtype": HALVES[schedule % 2],
        "video": video,
        "layout": layout,
        "normalise": normalise,
        "rows": "frame+token",
    }
    tubelets.check_case(CASE | {"size": size, "tubelet": tubelet, "E": E} | changes, CPU, "cuda")
    assert set(found) == {products(size, tubelet, E)}


@pytest.mark.parametrize("video", ["uint8", "same"])
def test_the_same_bits_under_every_schedule(video, simulate):  # noqa: F811
    """Six tiles for three multiprocessors, four steps of each: stages and phases go on from tile to tile."""
    size, tubelet = (2, 3, 1, 96, 128), (1, 8, 8)
    pixels = torch.randint(0, 256, (size[0], size[1], *size[2:]), dtype=torch.uint8)
    clip = pixels if video == "uint8" else (pixels / 255).bfloat16()
    values = [x.detach() for x in parameters(264, 3, tubelet, size[2:], torch.bfloat16)]
    found = []
    for schedule in range(4):
        simulate(schedule)
        found.append(tubelet_embedding(clip, *values))
    assert all(torch.equal(x, found[0]) for x in found)


@pytest.mark.parametrize("layout", list(tubelets.LAYOUTS))
def test_nothing_around_the_video_is_used(layout, simulate):  # noqa: F811
    """Every margin of the video is NaN, and so are the pixels that fill no tubelet; a NaN within one stays there."""
    simulate(2)
    size, tubelet = (5, 18, 26), (2, 4, 6)
    clip = among_nan(layout, torch.bfloat16, size, tubelet, 2)
    values = [x.detach() for x in parameters(136, 2, tubelet, size, torch.bfloat16)]
    shown = clip.permute(as_laid_out(layout))
    assert tubelet_embedding(shown, *values, layout=layout, mean=0.4, std=0.3).isfinite().all()
    clip[1, 1, 3, 5, 7] = float("nan")  # of tubelet (1, 1, 1) of the second clip
    tokens = tubelet_embedding(shown, *values, layout=layout)[:, 1:].view(2, 2, 4, 4, 136)
    assert tokens[1, 1, 1, 1].isnan().all() and int(tokens.isnan().sum()) == 136


@pytest.mark.parametrize(
    "changes, arch",
    [
        ({}, 80),
        ({"E": 120}, 90),  # fewer channels than the narrowest tile
        ({"tubelet": (1, 4, 5)}, 90),  # runs of odd length
        ({"strides": "cropped"}, 90),  # rows that begin anywhere
    ],
)
def test_who_runs_other_calls(changes, arch, simulate, monkeypatch):  # noqa: F811
    """The kernel of sm_80, by products of single warps."""
    simulate(0, arch)
    found = cuda_simulator.counted(monkeypatch, "tubelet_forward")
    tubelets.check_case(CASE | {"size": (1, 1, 2, 8, 24), "tubelet": (1, 4, 8), "E": 136} | changes, CPU, "cuda")
    assert set(found) == {0}


@pytest.mark.full
def test_more_taps_than_a_table_fits_of(simulate, monkeypatch):  # noqa: F811
    simulate()
    found = cuda_simulator.counted(monkeypatch, "tubelet_forward")
    video = torch.zeros(1, 1, 1, 256, 256, dtype=torch.bfloat16)
    tubelet_embedding(video, torch.zeros(128, 1, 1, 256, 256, dtype=torch.bfloat16))
    assert found == [0]
