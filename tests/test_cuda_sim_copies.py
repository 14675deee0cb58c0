"""The host simulator's copies of boxes, barriers with phases, barriers of some warps and registers that warps pass on
(tests/cuda_sim/phases.h): against PyTorch, and the mistakes that it must find."""

import cuda_simulator
import pytest
import torch
from cuda_simulator import expect, view

DTYPES = [torch.bfloat16, torch.float16]
SEEDS = range(6)
FAULTS = ["none", "not made", "no phase fence", "no barrier", "wrong phase", "no wait", "no bytes", "too few bytes"]
FAULTS += [
    "expects twice",
    "no arrival",
    "arrives twice",
    "arrives early",
    "producer wrong",
    "producer does not wait",
    "wrong count",
]
FAULTS += ["no turn", "never empty", "too many registers", "swizzle", "misplaced", "no fence", "early fence"]
FAULTS += ["overwritten"]


# ---- a box ----

BEFORE = ["nothing", "read", "written"]


def one_box(
    x: torch.Tensor,
    first: list[int],
    rows: int,
    count: int,
    fault: str = "none",
    seed: int = 0,
    before: str = "nothing",
):
    """The box of `count` rows along dimension `rows` (0: the last one) of x from `first` on; coordinates from the last
    dimension on. None where x cannot be copied so. before: what a thread did where the box comes."""
    out = torch.full((count, 128 // x.element_size()), 7, dtype=x.dtype)
    found = cuda_simulator.made().one_box(
        FAULTS.index(fault), view(x), view(out), rows, first, BEFORE.index(before), seed
    )
    return out if found else None


def box_of(x: torch.Tensor, first: list[int], rows: int, count: int) -> torch.Tensor:
    """The same, by indices; zeros outside of x."""
    out = torch.zeros(count, 128 // x.element_size(), dtype=x.dtype)
    for i in range(count):
        at = [*first]
        at[rows] += i
        if all(0 <= place < size for place, size in zip(at[1:], x.shape[::-1][1:], strict=True)):
            row = x[tuple(reversed(at[1:]))]
            for j in range(max(0, -at[0]), min(out.shape[1], len(row) - at[0])):
                out[i, j] = row[at[0] + j]
    return out


def numbers(*shape: int, dtype=torch.float16) -> torch.Tensor:
    """No two alike that are near each other, and none 0."""
    return (torch.arange(torch.Size(shape).numel()) % 1999 + 1).to(dtype).view(shape)


def packed_head(shape: tuple[int, ...], which: int, D: int = 64) -> torch.Tensor:
    """One of q, k, v of packed projections [..., 3, H, D], in place."""
    return numbers(*shape, 3, 2, D)[..., which, :, :]


GRIDS = [
    (numbers(100, 64), 1, [[0, 0], [0, 70], [0, -3], [8, 96], [-8, 0]]),
    (numbers(3, 50, 64), 1, [[0, 8, 1], [0, 45, 2], [0, 0, 3]]),
    (packed_head((2, 37), 0), 2, [[0, 0, 0, 0], [0, 1, 5, 1], [0, 1, 30, 0]]),
    (packed_head((2, 37), 2), 2, [[0, 1, 36, 1], [0, 0, 37, 1]]),
    (packed_head((2, 3, 11), 1), 2, [[0, 1, 0, 2, 1], [0, 0, 5, 1, 0]]),  # [B, T, S, 3, H, D] over space
    (packed_head((2, 11, 3), 1), 3, [[0, 1, 2, 0, 1], [0, 0, 1, 8, 0]]),  # and over time
    (packed_head((2, 37), 1, 40), 2, [[0, 1, 3, 1]]),  # a row of fewer than 64
    (numbers(1, 20, 64).expand(4, 20, 64)[1:2], 1, [[0, 5, 0]]),  # one of them: its stride is nobody's
    (numbers(30, 32, dtype=torch.float32), 1, [[0, 25]]),
]


@pytest.mark.parametrize("x, rows, places", GRIDS, ids=[f"{i}" for i in range(len(GRIDS))])
@pytest.mark.parametrize("count", [1, 8, 24])
def test_a_box_is_what_lies_there_and_zeros_outside(x, rows, places, count):
    for seed, first in enumerate(places):
        found = one_box(x, first, rows, count, seed=seed)
        assert found is not None and torch.equal(found, box_of(x, first, rows, count)), first


def test_what_cannot_be_copied_in_boxes_is_refused_beforehand():
    """The launcher then takes another kernel: it is no error."""
    whole = numbers(40, 128)
    assert one_box(whole[:, :64], [0, 0], 1, 8) is not None
    assert one_box(whole[:, 4:68], [0, 0], 1, 8) is None, "begins at 8 bytes"
    assert one_box(numbers(40, 68)[:, :64], [0, 0], 1, 8) is None, "rows 136 bytes apart"
    assert one_box(numbers(1, 64).expand(40, 64), [0, 0], 1, 8) is None, "all rows the same"
    assert one_box(numbers(300, 64), [0, 0], 1, 257) is None, "a box of more than 256 rows"
    assert one_box(numbers(1, 1, 1, 1, 8, 64), [0] * 6, 1, 8) is None, "six dimensions"


def test_a_wrong_swizzle_shows():
    x = numbers(16, 64)
    found = one_box(x, [0, 0], 1, 16, "swizzle")
    assert found is not None and not torch.equal(found, box_of(x, [0, 0], 1, 16))
    with expect("copy_box .*to a multiple of 128 bytes"):
        one_box(x, [0, 0], 1, 16, "misplaced")


@pytest.mark.parametrize("before", BEFORE[1:])
def test_a_box_comes_where_threads_were_before_once_they_have_fenced_that(before):
    x = numbers(16, 64)
    for seed in SEEDS:
        found = one_box(x, [0, 0], 1, 16, seed=seed, before=before)
        assert found is not None and torch.equal(found, box_of(x, [0, 0], 1, 16))
        for fault in ("no fence", "early fence"):
            with expect(f"copy_box .*byte 0 .* was {before} by thread 63 .*did not reach group_fence since"):
                one_box(x, [0, 0], 1, 16, fault, seed, before)


# ---- stages ----


def streamed(fault: str = "none", dtype=torch.bfloat16, seed: int = 0, N: int = 200) -> tuple:
    """(what both warpgroups find, what is right): x x^T of each 64 rows of k of one head, of whole numbers."""
    qkv = torch.randint(-8, 9, (2, N, 3, 2, 64)).to(dtype)
    x, boxes = qkv[:, :, 1], -(-N // 64)
    c = torch.full((2, boxes, 64, 64), float("nan"))
    cuda_simulator.made().streamed(FAULTS.index(fault), dtype == torch.float16, view(x), view(c), 1, 1, seed)
    rows = torch.zeros(boxes * 64, 64)
    rows[:N] = x[1, :, 1].float()
    rows = rows.view(boxes, 64, 64)
    return c, (rows @ rows.mT).expand(2, -1, -1, -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [1, 64, 200, 321])
def test_stages_are_right_in_every_order(dtype, N):
    for seed in SEEDS:
        found, right = streamed(dtype=dtype, seed=seed, N=N)
        assert torch.equal(found, right)


# What the simulator says of a mistake, under every seed.
READ = r"being read by group_across_step|was read by .* group_across_step|does not know that they are done"
NAMED = {
    "not made": "phase_(wait|arrive) .*the barrier was not made: phase_init comes before",
    "no phase fence": "was made by thread 0, but no phase_fence of that thread and block barrier lie between",
    "no barrier": "was made by thread 0, but no phase_fence .* lie between|was not made",
    "wrong phase": "still being copied to by thread 0|whose phase the thread has not waited for|nobody can go on",
    "no wait": "still being copied to by thread 0|whose phase the thread has not waited for|no barrier lies between",
    "no bytes": "copy_box .*brings 8192 bytes, but phase .* expects (0|-?[0-9]+) more",
    "too few bytes": "copy_box .*brings 8192 bytes, but phase 0 of barrier 2 expects 4096 more",
    "expects twice": "phase_arrive .*more than the 1 arrivals of a phase: 8192 bytes of it are still to come",
    "no arrival": r"nobody can go on.*at phase_wait .*phase 0 of barrier \d wants 1 of 8 arrivals and 0 bytes",
    "arrives twice": f"nobody has waited for the one before|nobody can go on|{READ}",
    "arrives early": READ,
    "producer wrong": f"nobody can go on|{READ}",
    "producer does not wait": f"more than the 1 arrivals|whose phase|still being copied|{READ}",
    "wrong count": "named_wait .*barrier 2 of 192 threads is one of 256|barrier 2 of 256 threads is one of 192",
    "no turn": "nobody can go on.*at named_wait .*barrier 1 has 128 of 256 threads",
    "never empty": "block 0 ends at named_arrive .*barrier 1 has 128 of 256 threads",
    "too many registers": "nobody can go on.*at registers_grow .* registers are free",
    "overwritten": "something else wrote to the barrier's words",
}


@pytest.mark.parametrize("fault", NAMED)
def test_a_mistake_is_named(fault):
    for seed in SEEDS:
        with expect(NAMED[fault]):
            streamed(fault, seed=seed)
    found, right = streamed()
    assert torch.equal(found, right)
