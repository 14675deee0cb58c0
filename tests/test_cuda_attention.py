"""The CUDA C++ kernels of csrc/cuda on the host simulator: the parity grid, and what only they can get wrong. What is
of float32 alone: test_cuda_float32.py.

Outputs are views of buffers of NaN: a number that nobody wrote is seen, and the simulator ends a run that reads or
writes anything but rows of this call's tensors, or writes one twice.
"""

import contextlib
import itertools

import cuda_simulator
import pytest
import test_factorized_attention as factorized
import torch
from cuda_simulator import expect
from parity_grid import grid

from vivit_kernels import spatial_attention
from vivit_kernels._attention import cuda_grid
from vivit_kernels._attention.options import check_options
from vivit_kernels.numerics import judge

DTYPES = [torch.bfloat16, torch.float16]
SIZES = [16, 24, 40, 64, 72, 80, 96, 128, 160]  # of heads
# Packed in registers up to 16 tokens, two sequences to a tile up to 8; longer ones in shared memory, in sixteens.
GRIDS = [(1, 1), (1, 9), (2, 17), (4, 33), (7, 9), (8, 17), (13, 3), (14, 33), (16, 9), (16, 49), (8, 1), (9, 16)]
GRIDS += [(17, 3), (33, 2), (49, 1), (2, 65), (1, 81), (1, 130)]
EVERY_GRID = sorted({*GRIDS, *((T, S) for T in (1, 2, 4, 7, 8, 13, 14, 16) for S in (9, 17, 33, 49))})
AXES = {name: axis for name, axis in factorized.AXES.items() if name not in "TS"} | {
    "dtype": DTYPES,
    "D": SIZES,
    "grid": EVERY_GRID,
    "heads": [(2, 2), (2, 0), (2, 1), (3, 1)],
    "schedule": [0, 1, 2, 3, 4],
}
CROSSES = [["dtype", "grid", "heads"], ["dtype", "D", "layout"], ["dtype", "mask", "dropout_p", "extra", "heads"]]
CROSSES += [["grid", "schedule"]]
# Sequences of more than 64 tokens, of plain calls: by products of a warpgroup on sm_90, by those of a warp on sm_80;
# packed and resident sequences in one launch.
HOPPER_GRIDS = [(1, S) for S in (65, 80, 100, 196, 197, 250, 256)] + [(16, 65), (16, 100), (2, 128), (81, 7)]
HOPPER_AXES = AXES | {
    "D": [64],
    "mask": [None],
    "dropout_p": [0.0],
    "extra": [None, "scale"],
    "grid": [
        *HOPPER_GRIDS,
        *((1, S) for S in range(66, 260, 7)),
        (16, 196),
        (16, 256),
        (9, 129),
        (130, 3),
        (1, 430),
        (70, 66),
    ],
    "arch": [90, 80],
}
# The same with every option, up to lengths that leave rows to single warps.
HOPPER_OPTION_GRIDS = [(1, 65), (1, 100), (2, 80), (16, 66), (70, 3)]
HOPPER_OPTION_AXES = AXES | {
    "D": [64, 40, 56],
    "grid": [*HOPPER_OPTION_GRIDS, (1, 130), (1, 197), (9, 129)],
    "arch": [90],
}
HOPPER_OPTION_CROSSES = [["mask", "dropout_p", "extra"], ["grid", "extra"], ["dtype", "extra", "heads"]]
HOPPER_CROSSES = [["arch", "dtype", "grid"], ["arch", "layout", "inputs", "heads"]]


ASKED: dict = {}  # of every simulated launch, beside its call


def poisoned(like: torch.Tensor) -> torch.Tensor:
    """Rows of its sizes in wider ones, all NaN."""
    *sizes, D = like.shape
    return torch.full((*sizes, D + 8), float("nan"), dtype=like.dtype)[..., :D]


class Simulated(torch.autograd.Function):
    """As the launchers of a GPU call it: lse and o are kept where the backward reads them."""

    @staticmethod
    def forward(ctx, q, k, v, packed, temporal_heads, options):
        _, T, S, H, _ = q.shape
        keeps = cuda_simulator.keeps_output(T, S, H, temporal_heads, q.dtype)
        o = poisoned(q)
        lse = torch.full((q.shape[0], H, T * S), float("nan")) if keeps else None
        cuda_simulator.forward(q, k, v, o, lse, temporal_heads=temporal_heads, **options)
        ctx.save_for_backward(q, k, v, *((o, lse) if keeps else (None, None)))
        ctx.call = packed, temporal_heads, options
        return o

    @staticmethod
    def backward(ctx, *grads):
        q, k, v, o, lse = ctx.saved_tensors
        packed, temporal_heads, options = ctx.call
        gradients = poisoned(torch.stack([q] * 3, 3)).unbind(3) if packed else [poisoned(q) for _ in range(3)]
        do = grads[0].contiguous()
        cuda_simulator.backward(do, q, k, v, o, lse, *gradients, temporal_heads=temporal_heads, **options)
        return *gradients, None, None, None


class Again(Simulated):
    """Its output is what a backward that does not read o recomputes."""

    @staticmethod
    def forward(ctx, q, k, v, packed, temporal_heads, options):
        o = Simulated.forward(ctx, q, k, v, packed, temporal_heads, options)
        again, gradients = poisoned(o), [poisoned(o) for _ in range(3)]
        given = options | {"temporal_heads": temporal_heads, "o_again": again}
        cuda_simulator.backward(torch.ones_like(o), q, k, v, None, None, *gradients, **given)
        return again


def simulated(
    q, k=None, v=None, *, temporal_heads, schedule=0, backend="", shared_bytes=None, arch=90, by=Simulated, **options
):
    """factorized_attention by the simulator."""
    packed = k is None
    q, k, v = q.unbind(3) if packed else (q, k, v)
    _, T, S, _, _ = q.shape
    tiling = {name: options.pop(name) for name in ("stages", "packed_warps") if name in options}
    given = {"scale": None, "key_mask": None, "rotary": None, "softcap": None, "dropout_p": 0.0, "seed": None} | options
    checked = check_options("factorized_attention", q, T * S, (T, S), **given)._asdict()
    launch = (
        {"schedule_seed": schedule, "arch": arch}
        | ASKED
        | tiling
        | ({"shared_bytes": shared_bytes} if shared_bytes else {})
    )
    return by.apply(q, k, v, packed, temporal_heads, checked | launch)


def too_long(case: dict) -> bool:
    """Whether such a call's backward is left to another backend, by what its blocks would take."""
    (T, S), (H, temporal_heads), rotary = case["grid"], case["heads"], case["extra"] == "rotary"
    axes = [T] * (temporal_heads > 0) + [S] * (temporal_heads < H)
    most, refused = cuda_simulator.MOST_SHARED[f"sm_{case.get('arch', 90)}"], 2
    return any(cuda_simulator.regime_of(N, case["D"], case["dtype"], True, rotary, most) == refused for N in axes)


def check_case(case: dict, monkeypatch, by=Simulated) -> None:
    (T, S), clips = case["grid"], 1 if case["mask"] != "a clip has none" else 2

    def run(*x, **given):
        return simulated(*x, schedule=case["schedule"], arch=case.get("arch", 90), by=by, **given)

    monkeypatch.setattr(factorized, "factorized_attention", run)
    with expect("cudaError_t 1") if too_long(case) else contextlib.nullcontext():
        factorized.check_case(case | {"T": T, "S": S}, torch.device("cpu"), "cuda", clips)


@pytest.mark.parametrize("case", grid(AXES, CROSSES, {"grid": GRIDS}))
def test_parity(case, monkeypatch):
    check_case(case, monkeypatch)


@pytest.mark.parametrize("case", grid(HOPPER_AXES, HOPPER_CROSSES, {"grid": HOPPER_GRIDS}))
def test_parity_of_long_sequences(case, monkeypatch):
    check_case(case, monkeypatch)


@pytest.mark.parametrize("case", grid(HOPPER_OPTION_AXES, HOPPER_OPTION_CROSSES, {"grid": HOPPER_OPTION_GRIDS}))
def test_parity_of_long_sequences_with_options(case, monkeypatch):
    check_case(case, monkeypatch)


SHORT_GRIDS = [(1, 1), (2, 7), (8, 8), (9, 8), (8, 16), (13, 3), (16, 16), (17, 5), (33, 20), (64, 3), (3, 49)]
AGAIN_AXES = AXES | {"grid": SHORT_GRIDS, "heads": [(2, 1), (2, 2), (2, 0)]}
AGAIN_AXES["dtype"] = [*DTYPES, torch.float32]
AGAIN_CROSSES = [["dtype", "grid"], ["dtype", "D"], ["mask", "dropout_p", "extra"]]


@pytest.mark.parametrize("case", grid(AGAIN_AXES, AGAIN_CROSSES, {"grid": SHORT_GRIDS}))
def test_parity_of_output_again(case, monkeypatch):
    check_case(case, monkeypatch, Again)


BY_LENGTH = [(1, S, 0, arch) for S in (65, 80, 100, 196, 197, 250, 256) for arch in (90, 80)]
BY_LENGTH += [(16, 65, 1, 90), (16, 80, 1, 80), (16, 197, 1, 90), (70, 66, 1, 90), (66, 70, 1, 90)]


@pytest.mark.parametrize("T, S, temporal_heads, arch", BY_LENGTH)
def test_parity_of_long_sequences_by_length(T, S, temporal_heads, arch, monkeypatch):
    case = {"grid": (T, S), "heads": (1 + temporal_heads, temporal_heads), "D": 64, "inputs": "normal", "schedule": 2}
    case |= {"layout": "packed", "mask": None, "extra": None, "dropout_p": 0.0, "arch": arch, "dtype": torch.bfloat16}
    check_case(case, monkeypatch)


def least_shared(N: int, D: int, dtype: torch.dtype) -> int:
    """Bytes of a block from which on a sequence is run in shared memory, forward (more of them share one) and back."""

    def runs(limit: int, backward: bool) -> bool:
        return cuda_simulator.regime_of(N, D, dtype, backward, False, limit) == 1

    return max(next(n for n in range(0, 1 << 18, 16) if runs(n, backward)) for backward in (False, True))


def products(options: dict, T=1, S=65, H=2, D=64, temporal_heads=0) -> tuple[int, int]:
    """How many products of a warpgroup a call's forward and backward ask for."""
    q, k, v, o, do = torch.randn(5, 1, T, S, H, D).bfloat16().unbind()
    options = {"temporal_heads": temporal_heads} | options
    lse = torch.empty(1, H, T * S)
    cuda_simulator.forward(q, k, v, o, lse, **options)
    forward = cuda_simulator.made().products_of_launch()
    cuda_simulator.backward(do, q, k, v, o, lse, *torch.empty(3, *q.shape).bfloat16(), **options)
    return forward, cuda_simulator.made().products_of_launch()


def test_which_calls_take_products_of_a_warpgroup():
    """Each length at which they start or stop, and each option."""
    assert all(products({})) and all(products({}, T=16, S=65, temporal_heads=1)) and all(products({}, 81, 3, 2, 64, 2))
    assert all(all(products({}, D=D, H=1)) for D in (16, 72, 128, 160))
    angles = torch.rand(65, 32)
    for options in (
        {"scale": -1.0},
        {"softcap": 3.0},
        {"mask": torch.ones(1, 65, dtype=torch.bool)},
        {"seed": torch.tensor([1, 2]), "dropout_p": 0.5},
        {"cos": angles.cos(), "sin": angles.sin()},
    ):
        assert all(products(options)), options
    others = [
        ({"arch": 80}, {}),
        ({}, {"S": 64}),
        ({}, {"T": 17, "temporal_heads": 1}),
    ]
    for options, sizes in others:
        assert products(options, **sizes) == (0, 0)
    forward, backward = products({"softcap": 3.0}, D=160, H=1)
    assert forward > 0 and backward == 0, "no registers for its sums and an option"


def test_what_the_copy_engine_does_not_take_is_copied_by_threads():
    """Keys and values of one head for all of them: strides of 0."""
    q = torch.randn(1, 2, 70, 2, 64).bfloat16()
    k, v = (torch.randn(1, 2, 70, 1, 64).bfloat16() for _ in range(2))
    for keys, values, by_group in (
        (k.expand_as(q), v.expand_as(q), False),
        (k.repeat(1, 1, 1, 2, 1), v.repeat(1, 1, 1, 2, 1), True),
    ):
        o = torch.empty_like(q)
        cuda_simulator.forward(q, keys, values, o, temporal_heads=0)
        assert (cuda_simulator.made().products_of_launch() > 0) == by_group
        exact, eager = (spatial_attention(q.to(d), keys.to(d), values.to(d)) for d in (torch.float64, q.dtype))
        assert judge(o, exact, eager).ok


def test_products_of_a_warpgroup_need_room_beyond_the_last_rows():
    """Where a block may have just what a warp's products take, those run."""
    least = least_shared(197, 64, torch.bfloat16)
    runs = [products({"shared_bytes": least + more}, S=197, H=1) for more in (0, 16 * 128, 16 * 128 + 16)]
    assert [backward > 0 for _, backward in runs] == [False, False, True]


@pytest.mark.parametrize("scale", [0.0, -0.2, 3.0])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("tokens", [(8, 3), (16, 1), (1, 33), (2, 70)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scores_may_fall_with_their_products(scale, softcap, tokens, dtype, monkeypatch):
    options = {"scale": scale, "softcap": softcap, "dropout_p": 0.0, "seed": None}
    monkeypatch.setattr(factorized, "make_options", lambda *_: options)
    case = {"grid": tokens, "heads": (2, 1), "D": 40, "inputs": "normal", "layout": "packed", "mask": None}
    case["extra"] = None
    check_case(case | {"dtype": dtype, "schedule": 1}, monkeypatch)


def step(qkv, do, **options):
    x = qkv.detach().requires_grad_()
    o = simulated(x, **options)
    return o, torch.autograd.grad(o, x, do)[0]


@pytest.mark.parametrize("T, S, temporal_heads", [(16, 5, 2), (7, 3, 2), (4, 33, 1), (2, 70, 0), (33, 2, 2)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
def test_the_same_bits_in_every_order_of_threads(T, S, temporal_heads, dtype):
    qkv, do = torch.randn(2, T, S, 3, 2, 40, dtype=dtype), torch.randn(2, T, S, 2, 40, dtype=dtype)
    options = {"temporal_heads": temporal_heads, "dropout_p": 0.2, "seed": torch.tensor([1, 2])}
    first = step(qkv, do, **options)
    for schedule in range(1, 5):
        assert all(map(torch.equal, first, step(qkv, do, schedule=schedule, **options)))


def staged(qkv, do, stages: int, room: int = 1, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """step() with so many stages and memory for `room` blocks at a time, so that each takes several turns."""
    _, T, S, _, _, D = qkv.shape
    least = max(least_shared(N, D, qkv.dtype) for N in {T, S} if N > 16)
    return step(qkv, do, stages=stages, shared_bytes=min(room * stages * (least + 2048), 227 << 10), **options)


@pytest.mark.parametrize("T, S, temporal_heads", [(17, 7, 2), (64, 4, 2), (2, 33, 0), (9, 70, 0)])
@pytest.mark.parametrize("D", [24, 40, 80])
@pytest.mark.parametrize("schedule", [0, 3])
def test_the_same_bits_with_every_number_of_stages(T, S, temporal_heads, D, schedule):
    """Three multiprocessors and fewer blocks than there is work: rows arrive while others are computed upon."""
    qkv, do = torch.randn(2, T, S, 3, 2, D).bfloat16(), torch.randn(2, T, S, 2, D).bfloat16()
    mask = torch.rand(2, T, S) > 0.2
    options = {"temporal_heads": temporal_heads, "arch": 80, "dropout_p": 0.2, "seed": torch.tensor([1, 2])}
    options["key_mask"] = mask
    first = step(qkv, do, **options | {"stages": 1})
    for stages in (2, 3):
        assert all(map(torch.equal, first, staged(qkv, do, stages, schedule=schedule, **options)))


@pytest.mark.parametrize("warps", [1, 2, 3])
@pytest.mark.parametrize("T", [7, 16])
def test_the_same_bits_with_every_number_of_heads_in_a_block(T, warps):
    qkv, do = torch.randn(1, T, 5, 3, 3, 40).bfloat16(), torch.randn(1, T, 5, 3, 40).bfloat16()
    first = step(qkv, do, temporal_heads=3)
    assert all(map(torch.equal, first, step(qkv, do, temporal_heads=3, packed_warps=warps, schedule=1)))


@pytest.mark.parametrize("T, forced", [(16, {"packed_warps": 5}), (17, {"stages": 4})])
def test_a_launch_is_refused_that_no_kernel_is_compiled_for(T, forced):
    q, k, v, o = torch.randn(4, 1, T, 1, 1, 80).bfloat16().unbind()
    with expect("cudaError_t 1"):
        cuda_simulator.forward(q, k, v, o, temporal_heads=1, **forced)


def test_stages_are_the_fewest_that_keep_memory_busy():
    """By tiles.cuh: 32 KB on their way beside the block that computes, where they fit."""
    stages, most = cuda_simulator.made().stages_of, cuda_simulator.MOST_SHARED["sm_90"]
    assert stages(64, 64, True, False, most) == stages(32, 64, True, False, most) == 2
    assert stages(17, 32, False, False, most) == 3, "24 KB in a stage"
    assert stages(100, 80, False, False, most) == 2 and stages(256, 80, False, False, most) == 1, "135 KB"
    for N, D, backward in itertools.product(range(17, 400, 9), (16, 40, 80, 128, 160), (False, True)):
        if (least := cuda_grid.shared_bytes(N, D, 2, backward, True)) <= most:
            assert 1 <= stages(N, D, backward, True, most) <= 3 and stages(N, D, backward, True, least) == 1


@pytest.mark.parametrize("T, S, temporal_heads", [(1, 100, 0), (16, 66, 1), (1, 197, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", [90, 80])
def test_the_same_bits_of_long_sequences_in_every_order(T, S, temporal_heads, dtype, arch):
    qkv, do = torch.randn(2, T, S, 3, 2, 64, dtype=dtype), torch.randn(2, T, S, 2, 64, dtype=dtype)
    first = step(qkv, do, temporal_heads=temporal_heads, arch=arch)
    for schedule in range(1, 5):
        assert all(map(torch.equal, first, step(qkv, do, temporal_heads=temporal_heads, arch=arch, schedule=schedule)))


@pytest.mark.parametrize("dropped", [0.0, 1.0])
@pytest.mark.parametrize("T, S, temporal_heads", [(16, 2, 1), (5, 3, 1), (1, 33, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_without_a_key_are_zeros(T, S, temporal_heads, dropped, dtype):
    """No key may be attended, or every pair is dropped."""
    qkv, do = torch.randn(1, T, S, 3, 1, 32, dtype=dtype), torch.randn(1, T, S, 1, 32, dtype=dtype)
    none = None if dropped else torch.zeros(1, T, S, dtype=torch.bool)
    options = {"key_mask": none, "dropout_p": dropped, "seed": torch.tensor([3, 4])}
    for result in step(qkv, do, temporal_heads=temporal_heads, **options):
        assert (result == 0).all()


@pytest.mark.parametrize(
    "dtype, S", [(torch.bfloat16, 17), (torch.bfloat16, 197), (torch.float32, 3), (torch.float32, 70)]
)
def test_what_a_block_may_have_bounds_the_length(dtype, S):
    """A launch asks for what regime_of counts, and is refused where a block has less."""
    qkv, do = torch.randn(1, 1, S, 3, 1, 64, dtype=dtype), torch.randn(1, 1, S, 1, 64, dtype=dtype)
    least = least_shared(S, 64, dtype)
    step(qkv, do, temporal_heads=0, shared_bytes=least)
    with expect("cudaError_t 1"):
        step(qkv, do, temporal_heads=0, shared_bytes=least - 16)


def test_a_row_at_half_of_16_bytes_is_found():
    wide = torch.randn(1, 4, 3, 3, 2, 40).bfloat16()
    with expect("load_16 .*not a multiple of 16"):
        simulated(wide[..., 4:36], temporal_heads=2)
