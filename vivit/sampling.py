"""Which frames and which pixels of a video become a clip: pure functions, Scenic's rules (DMVR's for short videos)."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Crop(NamedTuple):
    """Resize the frame to (rows, columns), then take `height` x `width` from (top, left); mirror it if `flip`."""

    rows: int
    columns: int
    top: int
    left: int
    flip: bool = False


def frame_indices(start: int, frames: int, stride: int, length: int) -> np.ndarray:
    """`frames` indices from `start`; past the end of a short video they go on from its first frame."""
    return (start + stride * np.arange(frames)) % length


def random_start(length: int, frames: int, stride: int, rng: np.random.Generator) -> int:
    """Training: uniform in [0, max(L - (F-1)*stride, 1))."""
    return int(rng.integers(max(length - (frames - 1) * stride, 1)))


def central_start(length: int, frames: int, stride: int) -> int:
    """Validation: max(0, (L - F*stride) // 2)."""
    return max(0, (length - frames * stride) // 2)


def test_starts(length: int, frames: int, stride: int, clips: int) -> list[int]:
    """Test: `clips` starts at equal distances, floor(i*M / (clips-1)), M = max(0, L - F*stride); of one, the centre."""
    if clips == 1:
        return [central_start(length, frames, stride)]
    last = max(0, length - frames * stride)
    return [i * last // (clips - 1) for i in range(clips)]


test_starts.__test__ = False  # pyright: ignore[reportFunctionMemberAccess]  # a rule for tests of models, not a test


def resized(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(rows, columns) with the short side at `short_side`; the long side is rounded down."""
    if height <= width:
        return short_side, max(short_side, width * short_side // height)
    return max(short_side, height * short_side // width), short_side


def random_crop(
    size: tuple[int, int],
    crop: tuple[int, int],
    short_side: int,
    flip: bool,
    rng: np.random.Generator,
    scales: tuple[float, ...] = (),
) -> Crop:
    """scales: (lowest, highest) factor of the resized rows and columns, each drawn by itself; never below the crop.

    Scenic resizes twice, to the short side and by the factors; here the frame goes to the second size at once.
    """
    rows, columns = resized(*size, _enough(size, crop, short_side))
    if scales:
        rows = max(int(rows * rng.uniform(scales[0], scales[1])), crop[0])
        columns = max(int(columns * rng.uniform(scales[0], scales[1])), crop[1])
    top, left = rng.integers(rows - crop[0] + 1), rng.integers(columns - crop[1] + 1)
    return Crop(rows, columns, int(top), int(left), flip and bool(rng.random() < 0.5))


def test_crops(size: tuple[int, int], crop: tuple[int, int], short_side: int, count: int) -> list[Crop]:
    """1: the centre. 3: both ends and the centre of the longer side."""
    rows, columns = resized(*size, _enough(size, crop, short_side))
    down, right = rows - crop[0], columns - crop[1]
    centre = math.ceil(down / 2), math.ceil(right / 2)
    if count == 1:
        return [Crop(rows, columns, *centre)]
    if columns >= rows:
        return [Crop(rows, columns, centre[0], left) for left in (0, centre[1], right)]
    return [Crop(rows, columns, top, centre[1]) for top in (0, centre[0], down)]


test_crops.__test__ = False  # pyright: ignore[reportFunctionMemberAccess]


def _enough(size: tuple[int, int], crop: tuple[int, int], short_side: int) -> int:
    """A short side that holds the crop: wide crops of narrow videos need a larger one than asked for."""
    height, width = size
    short = min(height, width)
    return max(short_side, math.ceil(crop[0] * short / height), math.ceil(crop[1] * short / width))
