"""The CUDA C++ kernels of joint attention (csrc/cuda/joint.h) on the host simulator: the parity grid, and what only
they can get wrong. On sm_80 those for every GPU; on sm_90 forwards are Hopper's (test_cuda_joint_hopper.py).

Outputs are views of buffers of NaN, and so is what a backward keeps: a number that nobody wrote is seen, and the
simulator ends a run that reads or writes anything but rows of this call's tensors, or writes one twice.
"""

from __future__ import annotations

import math

import cuda_simulator
import pytest
import test_joint_attention as joint
import torch
from cuda_simulator import expect
from parity_grid import grid
from test_cuda_attention import poisoned

from vivit_kernels._attention.options import check_options
from vivit_kernels.numerics import judge

DTYPES = [torch.bfloat16, torch.float16]
# Queries are kept by 128 or 64, keys by 64; both go by in tiles of 64 or 32, in steps of 16 to 64.
TOKENS = [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200]
AXES = joint.AXES | {
    "dtype": DTYPES,
    "D": [16, 24, 40, 64, 72, 80, 96, 128, 160],
    "N": TOKENS,
    "N_k": ["same", "same", 1, 17, 33, 65, 150],
    "schedule": [0, 1, 2, 3, 4],
    "arch": [80, 90],
}
EVERY_RUN = {"N": [1, 15, 17, 64, 65, 129], "N_k": ["same", "same", 1, 33, 150], "schedule": [0, 1, 2]}
CROSSES = [["D", "extra", "mask"], ["N", "N_k"], ["D", "layout", "schedule"]]


def room_to_turn(q, options):
    """As the launchers make it."""
    turns = options["cos"] is not None and options["arch"] == 90
    return torch.full((2, *q.shape), math.nan, dtype=q.dtype) if turns else None


class Simulated(torch.autograd.Function):
    """As the launchers of a GPU call it."""

    @staticmethod
    def forward(ctx, q, k, v, packed, options):
        o, lse = poisoned(q), torch.full((q.shape[0], q.shape[2], q.shape[1]), math.nan)
        cuda_simulator.joint_forward(q, k, v, o, lse, turned=room_to_turn(q, options), **options)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.call = packed, options
        return o

    @staticmethod
    def backward(ctx, *grads):
        q, k, v, o, lse = ctx.saved_tensors
        packed, options = ctx.call
        gradients = poisoned(torch.stack([q, k, v], 2)).unbind(2) if packed else [poisoned(x) for x in (q, k, v)]
        delta, do = torch.full_like(lse, math.nan), grads[0].contiguous()
        turned = room_to_turn(q, options)
        cuda_simulator.joint_backward(do, q, k, v, o, lse, delta, *gradients, turned=turned, **options)
        return *gradients, None, None


def simulated(q, k=None, v=None, *, schedule=0, arch=80, backend="", **options):
    """joint_attention by the simulator."""
    packed = k is None
    q, k, v = q.unbind(2) if k is None or v is None else (q, k, v)
    N, N_k = q.shape[1], k.shape[1]
    given = {"scale": None, "key_mask": None, "rotary": None, "softcap": None, "dropout_p": 0.0, "seed": None} | options
    checked = check_options("joint_attention", q, N, (N,), key_grid=(N_k,), **given)._asdict()
    return Simulated.apply(q, k, v, packed, checked | {"schedule_seed": schedule, "arch": arch})


@pytest.mark.parametrize("case", grid(AXES, CROSSES, EVERY_RUN))
def test_parity(case, monkeypatch):
    def run(*x, **given):
        return simulated(*x, schedule=case["schedule"], arch=case["arch"], **given)

    monkeypatch.setattr(joint, "joint_attention", run)
    joint.check_case(case, torch.device("cpu"), "cuda", B=2 if case["mask"] == "a clip has none" else 1)


SHORT = [(1, 1), (1, 65), (2, 2), (70, 1), (70, 2)]
WAYS = [{}, {"D": 80}, {"D": 40, "mask": "some", "extra": "softcap"}, {"dropout_p": 0.3, "extra": "rotary"}]


def check_short(N, N_k, dtype, inputs, way, seed, monkeypatch):
    torch.manual_seed(seed)
    monkeypatch.setattr(joint, "joint_attention", simulated)
    case = {"D": 64, "layout": "separate", "mask": None, "dropout_p": 0.0, "extra": None} | way
    case |= {"N": N, "N_k": N_k, "inputs": inputs, "dtype": dtype}
    if case["extra"] == "rotary" and N_k != N:
        case["extra"] = None
    joint.check_case(case, torch.device("cpu"), "cuda", B=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, N_k", SHORT)
def test_few_rows_do_not_show_how_o_is_rounded(N, N_k, dtype, monkeypatch):
    """delta is then summed from probabilities. That o is not read for it is seen where it is NaN."""
    check_short(N, N_k, dtype, "dominant", {}, 0, monkeypatch)
    q, k, v, do = tensors(N, N_k, dtype=dtype)
    lse, gradients = torch.zeros(1, 2, N), [poisoned(x) for x in (q, k, v)]
    cuda_simulator.joint_forward(q, k, v, poisoned(q), lse)
    cuda_simulator.joint_backward(do, q, k, v, poisoned(q), lse, torch.full_like(lse, math.nan), *gradients)
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "N, N_k", [*SHORT, (2, 1), (3, 3), (1, 200), (5, 70), (15, 15), (15, 130), (200, 3), (130, 15)]
)
@pytest.mark.parametrize("inputs", ["normal", "constant", "dominant"])
def test_few_rows(N, N_k, dtype, inputs, monkeypatch):
    for way in WAYS:
        for seed in range(2):
            check_short(N, N_k, dtype, inputs, way, seed, monkeypatch)


def step(q, k, v, do, **options):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = simulated(*leaves, **options)
    return o, *torch.autograd.grad(o, leaves, do)


def tensors(N, N_k, D=32, dtype=torch.bfloat16, B=1, H=2):
    """q, k, v, do."""
    return [torch.randn(B, n, H, D, dtype=dtype) for n in (N, N_k, N_k, N)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, N_k, D", [(130, 70, 64), (20, 129, 80)])
def test_the_same_bits_in_every_order_of_threads(N, N_k, D, dtype):
    given = tensors(N, N_k, D, dtype)
    options = {"dropout_p": 0.2, "seed": torch.tensor([1, 2])}
    first = step(*given, **options)
    for schedule in range(1, 4):
        assert all(map(torch.equal, first, step(*given, schedule=schedule, **options)))


@pytest.mark.parametrize("dropped", [0.0, 1.0])
@pytest.mark.parametrize("N, N_k", [(5, 3), (17, 70)])
def test_rows_without_a_key_are_zeros(N, N_k, dropped):
    """No key may be attended, or every pair is dropped."""
    none = None if dropped else torch.zeros(1, N_k, dtype=torch.bool)
    for result in step(*tensors(N, N_k), key_mask=none, dropout_p=dropped, seed=torch.tensor([3, 4])):
        assert (result == 0).all()


@pytest.mark.parametrize("scale", [0.0, -0.2, 3.0])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_scores_may_fall_with_their_products(scale, softcap, monkeypatch):
    options = {"scale": scale, "softcap": softcap, "dropout_p": 0.0, "seed": None}
    monkeypatch.setattr(joint, "make_options", lambda *_: options)
    monkeypatch.setattr(joint, "joint_attention", simulated)
    case = {"N": 33, "N_k": 70, "D": 40, "inputs": "normal", "layout": "separate", "mask": None}
    joint.check_case(case | {"dtype": torch.bfloat16, "extra": None}, torch.device("cpu"), "cuda", B=1)


def test_a_masked_key_is_as_none():
    """To the bit where those that are left lie as they would without it: behind them, and in a block of their own."""
    q, k, v, do = tensors(40, 150)
    mask = torch.arange(150)[None] < 64
    less = step(q, k[:, :64], v[:, :64], do, softcap=30.0)
    for i, found in enumerate(step(q, k, v, do, key_mask=mask, softcap=30.0)):
        assert torch.equal(found[:, :64] if i > 1 else found, less[i])
        assert i < 2 or (found[:, 64:] == 0).all()


@pytest.mark.parametrize("N_k", [1, 64, 100])
def test_lse(N_k):
    """To base 2, of every query; of one without a key plus infinity."""
    q, k, v, o = tensors(70, N_k, 24, torch.float16, B=2, H=3)
    mask = torch.ones(2, N_k, dtype=torch.bool)
    mask[1] = False
    lse = torch.full((2, 3, 70), math.nan)
    cuda_simulator.joint_forward(q, k, v, o, lse, mask=mask)

    def defined(x, y):
        return torch.logsumexp(torch.einsum("bqhd,bkhd->bhqk", x, y) * 24**-0.5, -1) / math.log(2)

    assert judge(lse[:1], defined(q[:1].double(), k[:1].double()), defined(q[:1].float(), k[:1].float())).ok
    assert lse[1].isposinf().all()


def test_a_row_at_half_of_16_bytes_is_found():
    q, k, v, _ = tensors(4, 4, 40)
    with expect("copy_16 .*not a multiple of 16"):
        simulated(q[..., 4:36], k[..., :32], v[..., :32])


@pytest.mark.full
@pytest.mark.parametrize("N, N_k, D", [(700, 700, 64), (300, 1100, 64), (1100, 130, 128)])
def test_parity_over_many_tiles(N, N_k, D, monkeypatch):
    monkeypatch.setattr(joint, "joint_attention", simulated)
    case = {"N": N, "N_k": N_k, "D": D, "inputs": "large", "layout": "separate", "mask": "some", "dropout_p": 0.3}
    joint.check_case(case | {"dtype": torch.bfloat16, "extra": "softcap"}, torch.device("cpu"), "cuda", B=1)


def test_which_forwards_take_hoppers_kernel():
    """All on sm_90 whose rows the copy engine takes; those with a rotary embedding where there is room to turn in."""

    def products(N=70, D=64, **options) -> int:
        q, k, v, o = tensors(N, N, D)
        cuda_simulator.joint_forward(q, k, v, o, **{"arch": 90} | options)
        return cuda_simulator.made().products_of_launch()

    table = torch.randn(70, 32)
    turns = {"cos": table, "sin": table}
    hopper = [{}, {"D": 16}, {"D": 72}, {"D": 160}, {"scale": -1.0}, {"softcap": 3.0}]
    hopper += [{"mask": torch.ones(1, 70, dtype=torch.bool)}, {"seed": torch.tensor([1, 2]), "dropout_p": 0.5}]
    hopper += [turns | {"turned": torch.empty(2, 1, 70, 2, 64, dtype=torch.bfloat16)}]
    assert all(products(**options) > 0 for options in hopper)
    assert [products(**options) for options in [{"arch": 80}, turns]] == [0, 0]


def test_which_backwards_take_hoppers_kernels():
    """Those with heads of up to 128 channels, on sm_90, but those with few rows; with a rotary embedding where there is
    room to turn in."""

    def products(N, D=64, **options) -> int:
        step(*tensors(N, N, D), **options)
        return cuda_simulator.made().products_of_launch()

    assert products(70, arch=90) > 0 and products(16, D=40, arch=90) > 0 and products(20, D=128, arch=90) > 0
    assert products(20, softcap=3.0, arch=90) > 0 and products(20, scale=-1.0, arch=90) > 0
    assert products(20, rotary=(torch.randn(20, 16),) * 2, D=32, arch=90) > 0
    assert products(70, arch=80) == products(15, arch=90) == products(20, D=136, arch=90) == 0
    q, k, v, do = tensors(20, 20)
    table, lse, outputs = torch.randn(20, 16), torch.zeros(1, 2, 20), [poisoned(x) for x in (q, k, v)]
    cuda_simulator.joint_backward(do, q, k, v, q.clone(), lse, lse.clone(), *outputs, cos=table, sin=table)
    assert cuda_simulator.made().products_of_launch() == 0
