"""Joint attention's backward by Hopper's own instructions (csrc/cuda/joint_hopper_backward.cuh) on the host simulator.

Tensors are views of buffers of NaN, which the simulator lets nobody read or write between their rows. o and lse are
those of the kernel for every GPU.
"""

import cuda_simulator
import pytest
import torch
from cuda_simulator import view
from test_cuda_joint_hopper import DTYPES, NUMBERS, between_nan, inputs, plain
from torch import Tensor

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


def saved(given: tuple[Tensor, ...], scale: float | None = None) -> tuple[Tensor, Tensor]:
    q, k, v, _ = given
    B, N_q, H, D = q.shape
    o, lse = between_nan(torch.zeros_like(q.contiguous())), torch.full((B, H, N_q), float("nan"))
    cuda_simulator.joint_forward(q, k, v, o, lse, arch=80, scale=D**-0.5 if scale is None else scale)
    return o, lse


def defined(given: tuple[Tensor, ...], dtype: torch.dtype, scale: float | None) -> tuple[Tensor, ...]:
    q, k, v, do = (x.detach().to(dtype) for x in given)
    leaves = q, k, v = [x.clone().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(joint_attention(q, k, v, plain(q, scale)), leaves, do)


def gradients_of(given: tuple[Tensor, ...], seed: int, scale: float | None = None, kept=None) -> list[Tensor]:
    q, k, v, _ = given
    o, lse = kept or saved(given, scale)
    found = [between_nan(torch.full_like(x.contiguous(), float("nan"))) for x in (q, k, v)]
    delta = torch.full_like(lse, float("nan"))
    assert launched(given, o, lse, delta, found, seed, scale=scale) and delta.isfinite().all()
    return found


def check(given: tuple[Tensor, ...], seeds=(0,), scale: float | None = None) -> None:
    """Under each schedule the same bits, and within the budget."""
    kept = saved(given, scale)
    found = [gradients_of(given, seed, scale, kept) for seed in seeds]
    assert all(torch.equal(x, y) for run in found[1:] for x, y in zip(run, found[0], strict=True))
    exact, eager = (defined(given, dtype, scale) for dtype in (torch.float64, given[0].dtype))
    for name, x, right, rounded in zip(("dq", "dk", "dv"), found[0], exact, eager, strict=True):
        verdict = judge(x, right, rounded, row=x.shape[-1], gradient=True)
        assert verdict.ok, (name, verdict)


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
        assert saved(given)[1].max() < -128
        check(given)


def test_who_runs_other_calls():
    """False, and nothing is written: the caller takes the kernels of sm_80."""

    def runs(q, k, v, **options) -> bool:
        o, lse = torch.zeros_like(q.contiguous()), torch.zeros(q.shape[0], q.shape[2], q.shape[1])
        gradients = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)]
        return launched((q, k, v, o.clone()), o, lse, lse.clone(), gradients, **options)

    q, k, v = inputs("plain", 1, 20, 20, 2, 64, torch.bfloat16)
    assert runs(q, k, v)
    assert not runs(q, k, v, softcap=20.0) and not runs(q, k, v, scale=-1.0) and not runs(q, k, v, arch=80)
    wide = torch.randn(1, 20, 2, 68).bfloat16()[..., :64]  # rows 136 bytes apart
    assert not runs(q, wide, v)
    assert not runs(*inputs("plain", 1, 20, 20, 2, 72, torch.bfloat16))
    assert not runs(*inputs("plain", 1, 20, 20, 2, 32, torch.bfloat16))
