"""Joint attention's forward by Hopper's own instructions (csrc/cuda/joint_hopper.cuh) on the host simulator; more of
its options, and what the backward makes of its lse, in the parity grid of test_cuda_joint.py, on sm_90.

Tensors are views of buffers of NaN, which the simulator lets nobody read or write between their rows; a zero that the
copy engine puts for what lies outside of a tensor is none of the tensor's.
"""

import math

import cuda_simulator
import pytest
import torch
from cuda_simulator import DTYPES as NUMBERS
from cuda_simulator import maybe, view
from parity_grid import lay_out, make_options
from torch import Tensor

from vivit_kernels._attention.options import Options, check_options
from vivit_kernels._attention.rotary import rotate
from vivit_kernels.joint_attention.reference import joint_attention
from vivit_kernels.numerics import judge

DTYPES = [torch.bfloat16, torch.float16]
CHOSEN: tuple[int, ...] = ()
# (warpgroups that compute, of 16 exponentials those by polynomial, how far scores rise before their base does)
VARIANTS = [(2, 0, 0), (3, 2, 8), (2, 8, 8)]
# Tiles of 128 queries (192 of three warpgroups), 64 a warpgroup, and of 128 or 176 keys, in three stages.
SIZES = [(1, 1), (1, 300), (63, 65), (64, 64), (65, 63), (127, 129), (128, 128), (129, 127), (200, 200), (300, 513)]


def plain(q: Tensor, scale: float | None = None) -> Options:
    return Options(scale=q.shape[-1] ** -0.5 if scale is None else scale)


def launched(q, k, v, o, lse, variant=CHOSEN, seed=0, arch=90, softcap=0.0, scale: float | None = None) -> bool:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    of = NUMBERS[q.dtype]
    run = cuda_simulator.made().joint_hopper
    return run(view(q), view(k), view(v), view(o), maybe(lse), of, scale, softcap, list(variant), seed, arch)


def between_nan(x: Tensor) -> Tensor:
    B, N, H, D = x.shape
    wide = torch.full((B, N + 2, H + 1, D + 8), float("nan"), dtype=x.dtype)[:, 1:-1, :H, :D]
    wide.copy_(x)
    return wide


def inputs(kind: str, B: int, N_q: int, N_k: int, H: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(B, N_q, H, D), torch.randn(B, N_k, H, D), torch.randn(B, N_k, H, D)
    if kind == "large":
        q = 8 * q
    elif kind == "constant":
        k = k[:, :1].expand(-1, N_k, -1, -1)
    elif kind == "dominant":
        k[:, N_k // 3] = 4 * q.mean(1)
    elif kind == "rising":  # tiles go by from the last keys to the first: every tile has larger scores than the last
        k = k + 0.3 * q.sign().mean(1, keepdim=True) * torch.linspace(12, 0, N_k)[:, None, None]
        q = q.abs() * q.sign().mean(1, keepdim=True)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    if N_q == N_k:  # packed, [B, N, 3, H, D]
        return torch.stack([q, k, v], 2).unbind(2)  # type: ignore[return-value]
    return between_nan(q), between_nan(k), between_nan(v)


def check(q: Tensor, k: Tensor, v: Tensor, variant=CHOSEN, seed: int = 0, scale: float | None = None) -> Tensor:
    B, N_q, H, D = q.shape
    o = between_nan(torch.full_like(q, float("nan"), memory_format=torch.contiguous_format))
    lse = torch.full((B, H, N_q), float("nan"))
    assert launched(q, k, v, o, lse, variant, seed, scale=scale)
    options = plain(q, scale)
    exact = joint_attention(q.double(), k.double(), v.double(), options)
    verdict = judge(o, exact, joint_attention(q, k, v, options), row=D)
    assert verdict.ok, verdict
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * options.scale
    in_dtype = (torch.einsum("bqhd,bkhd->bhqk", q, k) * options.scale).logsumexp(-1)
    verdict = judge(lse * math.log(2), scores.logsumexp(-1), in_dtype)
    assert verdict.ok, verdict
    return o.clone()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N_q, N_k", SIZES)
def test_parity(dtype, N_q, N_k):
    """Under several schedules, with the same bits."""
    torch.manual_seed(N_q + N_k)
    given = inputs("plain", 1, N_q, N_k, 2, 64, dtype)
    found = [check(*given, seed=seed) for seed in range(3 if N_q < 200 else 2)]
    assert all(torch.equal(x, found[0]) for x in found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["large", "constant", "dominant", "rising"])
@pytest.mark.parametrize("variant", [CHOSEN, *VARIANTS])
def test_hard_inputs(dtype, kind, variant):
    torch.manual_seed(1)
    check(*inputs(kind, 1, 130, 300, 1, 64, dtype), variant=variant, seed=2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_as_right(variant):
    torch.manual_seed(2)
    for dtype, (N_q, N_k) in zip(DTYPES, [(193, 257), (64, 384)], strict=True):
        check(*inputs("plain", 1, N_q, N_k, 1, 64, dtype), variant=variant, seed=1)


# Slabs of 64 channels, and one of 16 or 32 that has a swizzle of its own; what a head has not is padded.
@pytest.mark.parametrize("D", [16, 32, 40, 72, 80, 96, 128, 160])
def test_heads_of_other_sizes(D):
    torch.manual_seed(3)
    check(*inputs("plain", 2, 70, 70, 2, D, torch.bfloat16), seed=1)
    check(*inputs("rising", 1, 65, 290, 1, D, torch.float16), seed=1, scale=0.3 * (40 / D) ** 0.5)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", range(16, 161, 8))
def test_every_head_size(D, dtype):
    torch.manual_seed(6)
    for seed, (N_q, N_k) in enumerate([(1, 1), (63, 97), (129, 128), (200, 385), (3, 700)]):
        for kind in ("plain", "large", "rising"):
            check(*inputs(kind, 1, N_q, N_k, 2, D, dtype), seed=seed)


def test_blocks_take_tile_after_tile():
    """Three multiprocessors, 20 tiles of several heads and clips: stages and phases go on from one to the next."""
    torch.manual_seed(4)
    for seed in range(3):
        check(*inputs("plain", 2, 140, 140, 5, 64, torch.bfloat16), seed=seed)
        check(*inputs("plain", 5, 3, 400, 4, 64, torch.bfloat16), seed=seed)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", [CHOSEN, *VARIANTS])
@pytest.mark.parametrize("N_q, N_k", [*SIZES, (2, 1023), (385, 640), (64, 1), (192, 192), (191, 256), (700, 31)])
def test_every_size_with_every_variant(dtype, variant, N_q, N_k):
    torch.manual_seed(5)
    for kind in ("plain", "rising"):
        given = inputs(kind, 1, N_q, N_k, 2, 64, dtype)
        assert torch.equal(check(*given, variant=variant, seed=0), check(*given, variant=variant, seed=7))


def test_lse_may_be_left_out():
    q, k, v = inputs("plain", 1, 70, 70, 1, 64, torch.bfloat16)
    o, again = torch.empty_like(q.contiguous()), torch.empty_like(q.contiguous())
    assert launched(q, k, v, o, None) and launched(q, k, v, again, torch.empty(1, 1, 70))
    assert torch.equal(o, again)


def test_who_runs_other_calls():
    """False, and nothing is written: the caller takes the kernel of sm_80."""

    def runs(q, k, v, **options) -> bool:
        return launched(q, k, v, torch.empty(q.shape, dtype=q.dtype), None, **options)

    q, k, v = inputs("plain", 1, 20, 20, 2, 64, torch.bfloat16)
    assert runs(q, k, v) and runs(q, k, v, softcap=20.0) and runs(q, k, v, scale=-1.0)
    assert not runs(q, k, v, arch=80)
    wide = torch.randn(1, 20, 2, 68).bfloat16()[..., :64]  # rows 136 bytes apart
    assert not runs(q, wide, v)
    shifted = torch.randn(1, 20, 2, 72).bfloat16()[..., 4:68]
    assert not runs(shifted, k, v)
    assert not runs(q, k[:, :1].expand(1, 20, 2, 64), v), "every row the same one: a stride of 0"


def test_nan_is_not_lost():
    """Of a score whose exponential the FMA pipes take, too."""
    for key in range(16):
        q, k, v = (x.clone() for x in inputs("plain", 1, 5, 130, 1, 64, torch.bfloat16))
        k[0, key + 100, 0, 0] = float("nan")
        o = torch.zeros_like(q)
        assert launched(q, k, v, o, None, variant=(2, 8, 8))
        assert not o.isfinite().any()


@pytest.mark.parametrize("row_bytes, period", [(128, 1), (64, 2), (32, 4)])
def test_swizzles(row_bytes, period):
    """Of rows of 64 and 32 bytes two and four neighbours are permuted alike (PTX manual, swizzling modes)."""
    chunks = row_bytes // 16
    for row in range(24):
        for chunk in range(chunks):
            place = row * row_bytes + 16 * (chunk ^ row // period % chunks)
            assert cuda_simulator.made().swizzled_address(row * row_bytes + 16 * chunk, row_bytes) == place


# ---- options ----

# Tiles of 128, 96 and 64 keys; heads of whole slabs, of one that is not, and of that alone.
OPTIONS = {
    "mask": {"mask": "some"},
    "no key": {"mask": "a clip has none"},
    "softcap": {"extra": "softcap"},
    "rotary": {"extra": "rotary"},
    "dropout": {"dropout_p": 0.3},
    "dropped": {"dropout_p": 0.999},
    "all": {"mask": "some", "extra": "softcap", "dropout_p": 0.3, "inputs": "large"},
    "turned": {"mask": "some", "extra": "rotary", "dropout_p": 0.3, "inputs": "rising"},
    "negative": {"mask": "some", "scale": -0.2},
}
NOTHING = {"mask": None, "dropout_p": 0.0, "extra": None, "inputs": "plain", "layout": "separate"}


def log_of_sums(q: Tensor, k: Tensor, options: Options) -> Tensor:
    """lse as the reference would have it, natural."""
    if options.cos is not None and options.sin is not None:
        q, k = rotate(q, options.cos, options.sin), rotate(k, options.cos, options.sin)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if options.mask is not None:
        scores = scores.masked_fill(~options.mask[:, None, None], -math.inf)
    return scores.logsumexp(-1)


def call_of(which: str, N_q: int, N_k: int, D: int, dtype: torch.dtype, layout="separate", H=2):
    """q, k, v and the options of a call."""
    case = NOTHING | {"D": D} | OPTIONS[which]
    B = 2 if case["mask"] == "a clip has none" else 1
    N_k = N_q if case["extra"] == "rotary" else N_k
    q, k, v = (x.clone() for x in inputs(case["inputs"], B, N_q, N_k, H, D, dtype))
    given = {"scale": case.get("scale"), "key_mask": None, "rotary": None, "softcap": None}
    given |= make_options(case, (B, N_q), (B, N_k), torch.device("cpu"))
    options = check_options("joint_attention", q, N_q, (N_q,), key_grid=(N_k,), **given)
    tensors = lay_out(q, k, v, layout)
    return (*(tensors[0].unbind(2) if len(tensors) == 1 else tensors), options)


def room_to_turn(q: Tensor, options: Options) -> Tensor | None:
    """As the launchers make it."""
    return torch.full((2, *q.shape), float("nan"), dtype=q.dtype) if options.cos is not None else None


def check_call(which: str, N_q: int, N_k: int, D: int, dtype: torch.dtype, seed: int = 0, layout="separate", H=2):
    """o and lse of a call with options, against float64."""
    q, k, v, options = call_of(which, N_q, N_k, D, dtype, layout, H)
    B = q.shape[0]
    o = between_nan(torch.full((B, N_q, H, D), float("nan"), dtype=dtype))
    lse, turned = torch.full((B, H, N_q), float("nan")), room_to_turn(q, options)
    cuda_simulator.joint_forward(q, k, v, o, lse, turned=turned, schedule_seed=seed, **options._asdict())
    assert cuda_simulator.made().products_of_launch() > 0
    exact = joint_attention(q.double(), k.double(), v.double(), options)
    verdict = judge(o, exact, joint_attention(q, k, v, options), row=D)
    assert verdict.ok, verdict
    right, eager = log_of_sums(q.double(), k.double(), options), log_of_sums(q, k, options)
    some = right.isfinite()
    assert (lse[~some] == math.inf).all() and (o.transpose(1, 2)[~some] == 0).all()
    verdict = judge(lse[some] * math.log(2), right[some], eager[some])
    assert verdict.ok, verdict
    return o.clone()


@pytest.mark.parametrize("which", OPTIONS)
@pytest.mark.parametrize("D, N_q, N_k", [(64, 65, 150), (80, 70, 131)])
def test_options(which, D, N_q, N_k):
    torch.manual_seed(7)
    dtype = DTYPES[(D // 16 + len(which)) % 2]
    check_call(which, N_q, N_k, D, dtype, seed=D % 3)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", OPTIONS)
@pytest.mark.parametrize("D", [16, 24, 40, 64, 72, 80, 88, 96, 112, 120, 128, 136, 160])
def test_options_of_every_head_size(dtype, which, D):
    torch.manual_seed(8)
    sizes = [(1, 1, "separate"), (129, 128, "heads_first"), (200, 200, "packed"), (33, 385, "separate")]
    for seed, (N_q, N_k, layout) in enumerate([*sizes, (130, 515, "separate")]):
        check_call(which, N_q, N_k, D, dtype, seed, layout)


def test_dropout_drops_the_same_pairs_as_on_sm_80():
    """Keys' values are unit vectors: each channel of o is one weight."""
    q, k = torch.randn(1, 70, 1, 64).bfloat16(), torch.randn(1, 64, 1, 64).bfloat16()
    v = torch.eye(64)[None, :, None].bfloat16()
    found = []
    for arch in (80, 90):
        o = torch.empty_like(q)
        given = {"seed": torch.tensor([2**40 + 7, 3]), "dropout_p": 0.5, "scale": 0.1, "softcap": 0.0}
        cuda_simulator.joint_forward(q, k, v, o, arch=arch, **given)
        found.append(o != 0)
    assert torch.equal(*found) and 0.4 < found[0].float().mean() < 0.6


# ---- exponentials by polynomial ----

POLYNOMIAL_ERROR = 1.02e-4  # relative; what the source states
HALF = 0x3F000000  # bits of 0.5
SIGN = 0x80000000


def worst(first: int, last: int, step: int) -> float:
    return max(cuda_simulator.made().worst_exponential(sign + first, sign + last, step) for sign in (0, SIGN))


def test_the_polynomial_is_within_its_bound():
    """Every 61st f of [-1/2, 1/2] above 2^-20; a whole number more changes the exponent alone."""
    found = worst(0x35800000, HALF, 61)
    assert POLYNOMIAL_ERROR / 1.02 < found < POLYNOMIAL_ERROR
    assert cuda_simulator.made().worst_exponential(0x3F000001, 0x41200000, 61) < POLYNOMIAL_ERROR, "up to 10"
    assert cuda_simulator.made().worst_exponential(0xBF000001, 0xC2FA0000, 61) < POLYNOMIAL_ERROR, "down to -125"


@pytest.mark.full
def test_the_polynomial_is_within_its_bound_for_every_number():
    """From 2^-30 on, where 1 + 0.69 f is 1, to 1/2, of both signs; and all whole numbers with some f."""
    assert worst(0x30800000, HALF, 1) < POLYNOMIAL_ERROR


def test_ends_of_the_polynomial():
    of = cuda_simulator.made().exp2_polynomial
    assert of(0.0) == 1 and of(1.0) == 2 and of(-3.0) == 0.125 and of(8.0) == 256
    assert of(float("-inf")) == 0 and of(-1000.0) == 0
    for x in torch.linspace(-130, -126, 4001).tolist():
        assert 0 <= of(x) <= 2.0**-125.9
    assert not math.isfinite(torch.tensor(of(float("nan"))).half().item())
