"""Joint attention's backward by Hopper's own instructions (csrc/cuda/joint_hopper_backward.cuh) on the host simulator.

Tensors are views of buffers of NaN, which the simulator lets nobody read or write between their rows. o and lse are
those of the kernel for every GPU.
"""

import cuda_simulator
import pytest
import torch
from cuda_simulator import view
from test_cuda_joint_hopper import DTYPES, NUMBERS, OPTIONS, between_nan, call_of, inputs, plain, room_to_turn
from torch import Tensor

from vivit_kernels._attention.options import Options
from vivit_kernels.joint_attention.reference import joint_attention
from vivit_kernels.numerics import judge

# Pieces of 128 rows that are kept, 64 to a warpgroup; tiles of 64 that pass by, in four stages.
SIZES = [(16, 16), (63, 65), (64, 64), (65, 63), (127, 129), (128, 128), (129, 127), (197, 197), (300, 513)]


def launched(given: tuple[Tensor, ...], o, lse, delta, gradients, seed=0, arch=90, softcap=0.0, scale=None) -> bool:
    """given: q, k, v, do."""
    *qkv, do = given
    scale = do.shape[-1] ** -0.5 if scale is None else scale
    tensors = [view(x) for x in qkv], view(o), view(do), view(lse), view(delta), [view(x) for x in gradients]
    return cuda_simulator.made().joint_hopper_backward(*tensors, NUMBERS[do.dtype], scale, softcap, seed, arch)


def saved(given: tuple[Tensor, ...], options: Options) -> tuple[Tensor, Tensor]:
    q, k, v, _ = given
    B, N_q, H, _ = q.shape
    o, lse = between_nan(torch.zeros_like(q.contiguous())), torch.full((B, H, N_q), float("nan"))
    cuda_simulator.joint_forward(q, k, v, o, lse, arch=80, **options._asdict())
    return o, lse


def defined(given: tuple[Tensor, ...], dtype: torch.dtype, options: Options) -> tuple[Tensor, ...]:
    q, k, v, do = (x.detach().to(dtype) for x in given)
    leaves = q, k, v = [x.clone().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(joint_attention(q, k, v, options), leaves, do)


def gradients_of(given: tuple[Tensor, ...], kept: tuple[Tensor, Tensor], seed: int, options: Options) -> list[Tensor]:
    """By the dispatch, which is to have taken Hopper's kernels."""
    q, k, v, do = given
    found = [between_nan(torch.full_like(x.contiguous(), float("nan"))) for x in (q, k, v)]
    delta, turned = torch.full_like(kept[1], float("nan")), room_to_turn(q, options)
    cuda_simulator.joint_backward(
        do, q, k, v, *kept, delta, *found, turned=turned, schedule_seed=seed, **options._asdict()
    )
    assert cuda_simulator.made().products_of_launch() > 0 and delta.isfinite().all()
    return found


def check(given: tuple[Tensor, ...], seeds=(0,), scale: float | None = None, options: Options | None = None) -> None:
    """Under each schedule the same bits, and within the budget."""
    options = options or plain(given[0], scale)
    kept = saved(given, options)
    found = [gradients_of(given, kept, seed, options) for seed in seeds]
    assert all(torch.equal(x, y) for run in found[1:] for x, y in zip(run, found[0], strict=True))
    exact, eager = (defined(given, dtype, options) for dtype in (torch.float64, given[0].dtype))
    for name, x, right, rounded in zip(("dq", "dk", "dv"), found[0], exact, eager, strict=True):
        verdict = judge(x, right, rounded, row=x.shape[-1], gradient=True)
        assert verdict.ok, (name, verdict)
    if options.mask is not None:
        assert all((x[~options.mask] == 0).all() for x in found[0][1:]), "of keys that may not be attended"


def four(kind: str, B: int, N_q: int, N_k: int, H: int, D: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    q, k, v = inputs(kind, B, N_q, N_k, H, D, dtype)
    return q, k, v, between_nan(torch.randn(B, N_q, H, D).to(dtype))


@pytest.mark.parametrize("N_q, N_k", SIZES)
def test_parity(N_q, N_k):
    torch.manual_seed(N_q + N_k)
    dtype = DTYPES[(N_q + N_k) // 2 % 2]
    check(four("plain", 1, N_q, N_k, 1, 64, dtype), seeds=range(2 if N_q < 200 else 1))


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N_q, N_k", [*SIZES, (17, 1023), (1025, 16), (385, 640), (192, 192), (191, 256)])
def test_every_size(dtype, N_q, N_k):
    for seed in range(3):
        torch.manual_seed(seed)
        for kind in ("plain", "rising"):
            check(four(kind, 1, N_q, N_k, 2, 64, dtype), seeds=(0, 3 + seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["large", "constant", "dominant"])
def test_hard_inputs(dtype, kind):
    torch.manual_seed(1)
    check(four(kind, 1, 70, 150, 1, 64, dtype), seeds=(2,))


@pytest.mark.parametrize("D, dtype, scale", [(40, torch.bfloat16, None), (48, torch.float16, 0.3)])
def test_fewer_channels_are_padded_by_the_copy_engine(D, dtype, scale):
    torch.manual_seed(3)
    check(four("plain", 2, 70, 70, 2, D, dtype), seeds=(1,), scale=scale)


# Slabs of 64 channels, and one of 16 or 32 that has a swizzle of its own; stages of 64 rows, of 128 channels of 48.
@pytest.mark.parametrize("D, N_q, N_k", [(32, 129, 65), (80, 65, 129), (96, 63, 66), (128, 97, 65)])
def test_heads_of_other_sizes(D, N_q, N_k):
    torch.manual_seed(D)
    check(four("plain", 1, N_q, N_k, 1, D, DTYPES[D // 16 % 2]), seeds=(0, 2))


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", range(16, 129, 8))
def test_every_head_size(D, dtype):
    torch.manual_seed(6)
    for seed, (N_q, N_k) in enumerate([(16, 17), (47, 49), (129, 128), (63, 193), (200, 95)]):
        for kind in ("plain", "rising"):
            check(four(kind, 1, N_q, N_k, 2, D, dtype), seeds=(seed, 7))


def check_options_of(which: str, N_q: int, N_k: int, D: int, dtype: torch.dtype, seeds=(0,), layout="separate", H=2):
    q, k, v, options = call_of(which, N_q, N_k, D, dtype, layout, H)
    check((q, k, v, between_nan(torch.randn(q.shape).to(dtype))), seeds, options=options)


@pytest.mark.parametrize("which", OPTIONS)
def test_options(which):
    torch.manual_seed(8)
    check_options_of(which, 65, 131, 64, DTYPES[len(which) % 2], seeds=(3,), H=1)


@pytest.mark.parametrize("which", ["all", "turned"])
@pytest.mark.parametrize("D", [80, 128])
def test_options_of_other_heads(which, D):
    torch.manual_seed(9)
    check_options_of(which, 70, 97, D, DTYPES[D // 16 % 2], seeds=(1,), H=1)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", OPTIONS)
@pytest.mark.parametrize("D", [16, 24, 40, 64, 72, 80, 88, 96, 112, 128])
def test_options_of_every_head_size(dtype, which, D):
    torch.manual_seed(10)
    sizes = [(16, 16, "separate"), (129, 128, "heads_first"), (150, 150, "packed"), (33, 257, "sliced")]
    for seed, (N_q, N_k, layout) in enumerate(sizes):
        check_options_of(which, N_q, N_k, D, dtype, (seed, 9), layout)


def test_blocks_take_piece_after_piece_with_options():
    """Rows are turned back in a place of their own, while the next piece's come."""
    torch.manual_seed(11)
    check_options_of("turned", 140, 140, 32, torch.bfloat16, seeds=(5,), H=3)


def test_blocks_take_piece_after_piece():
    """Three multiprocessors, more pieces of several heads and clips: stages and phases go on from one to the next."""
    torch.manual_seed(4)
    check(four("plain", 2, 140, 70, 2, 64, torch.bfloat16), seeds=(5,))


def test_scores_far_below_zero_leave_nothing_behind():
    """2^-lse of keys that are not there is then beyond every number of 16 bits, and of 32."""
    torch.manual_seed(5)
    q, k = 1 + torch.rand(1, 66, 1, 64), -12 - 0.1 * torch.randn(1, 66, 1, 64)
    for dtype in DTYPES:
        given = tuple(x.to(dtype) for x in (q, k, torch.randn_like(q), torch.randn_like(q)))
        assert saved(given, plain(given[0]))[1].max() < -128
        check(given)


def test_who_runs_other_calls():
    """False, and nothing is written: the caller takes the kernels of sm_80."""

    def runs(q, k, v, **options) -> bool:
        o, lse = torch.zeros_like(q.contiguous()), torch.zeros(q.shape[0], q.shape[2], q.shape[1])
        gradients = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)]
        return launched((q, k, v, o.clone()), o, lse, lse.clone(), gradients, **options)

    q, k, v = inputs("plain", 1, 20, 20, 2, 64, torch.bfloat16)
    assert runs(q, k, v) and runs(q, k, v, softcap=20.0) and runs(q, k, v, scale=-1.0)
    assert not runs(q, k, v, arch=80)
    wide = torch.randn(1, 20, 2, 68).bfloat16()[..., :64]  # rows 136 bytes apart
    assert not runs(q, wide, v)
    assert all(runs(*inputs("plain", 1, 20, 20, 1, D, torch.bfloat16)) for D in (16, 72, 128))
    assert not runs(*inputs("plain", 1, 20, 20, 2, 136, torch.bfloat16))
