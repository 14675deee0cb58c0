"""What Triton computes in bfloat16, operation by operation and bit for bit against torch: interpreted as repaired by
triton_interpreter.py, and on a GPU, which the repair stands for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402
import triton_interpreter  # noqa: E402

from vivit_kernels import _philox  # noqa: E402

pytestmark = pytest.mark.interpreted
N = 1024
BF16, FP32 = torch.bfloat16, torch.float32


# ---- inputs: every kind of number ----


def any_bits(dtype: torch.dtype, count: int, device) -> torch.Tensor:
    """Random bits of a 16-bit float: every exponent, subnormals, infinities and NaN among them."""
    bits = torch.randint(-(2**15), 2**15, (count,), dtype=torch.int16)
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan"), 2.0**-133], dtype=dtype)
    bits[: len(special)] = special.view(torch.int16)
    return bits[torch.randperm(count)].view(dtype).to(device)


def ties_and_others(count: int, device) -> torch.Tensor:
    """float32 that lie on, and one bit beside, the middle between two bfloat16, of every exponent."""
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])[torch.randint(0, 6, (count,))]
    high = torch.randint(0, 2**16, (count,))
    # the largest finite number rounds to infinity, a NaN stays one even if all of it is in the lower half
    high[:4], low[:4] = torch.tensor([0x7F7F, 0xFF7F, 0x7F80, 0x7FFF]), torch.tensor([0x8000, 0x7FFF, 1, 0xFFFF])
    return torch.from_numpy(((high << 16) | low).numpy().astype(np.uint32).view(np.float32)).to(device)


def differing(found: torch.Tensor, expected: torch.Tensor) -> int:
    """Elements whose bits differ; of a NaN the bits are free."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    if not found.is_floating_point():
        return int((found != expected).sum())
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[found.itemsize]
    return int(((found.view(whole) != expected.view(whole)) & ~(found.isnan() & expected.isnan())).sum())


# ---- elementwise ----


@triton.jit
def elementwise(x_ptr, y_ptr, z_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    y = tl.load(y_ptr + at)
    z = tl.load(z_ptr + at)
    if OP == "x + y":
        out = x + y
    elif OP == "x - y":
        out = x - y
    elif OP == "x * y":
        out = x * y
    elif OP == "x / y":
        out = x / y
    elif OP == "0.0 + -x":  # Triton 3.6 makes 0 - x of -x, and so loses the sign of 0
        out = 0.0 + -x
    elif OP == "abs":
        out = tl.abs(x)
    elif OP == "x * 0.3":
        out = x * 0.3
    elif OP == "full":
        out = tl.full([BLOCK], 0.7, tl.bfloat16)
    elif OP == "x < y":
        out = x < y
    elif OP == "x == y":
        out = x == y
    elif OP == "x != 0":
        out = x != 0
    elif OP == "minimum":
        out = tl.minimum(x, y)
    elif OP == "maximum":
        out = tl.maximum(x, y)
    elif OP == "clamp":
        out = tl.clamp(x, tl.minimum(y, z), tl.maximum(y, z))
    elif OP == "where":
        out = tl.where(x < y, y, z)
    elif OP == "where both":
        out = tl.where((x < y) & (y < z), x, z)
    elif OP == "fma":
        out = tl.fma(x, y, z)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty))


def double_then_once(x, y, z):
    return (x.double() * y.double() + z.double()).to(x.dtype)


ELEMENTWISE = {
    "x + y": lambda x, y, z: x + y,
    "x - y": lambda x, y, z: x - y,
    "x * y": lambda x, y, z: x * y,
    "0.0 + -x": lambda x, y, z: 0.0 + -x,
    "abs": lambda x, y, z: x.abs(),
    "x * 0.3": lambda x, y, z: x * torch.tensor(0.3).to(x),
    "full": lambda x, y, z: torch.full_like(x, 0.7),
    "x < y": lambda x, y, z: (x < y).to(x),
    "x == y": lambda x, y, z: (x == y).to(x),
    "x != 0": lambda x, y, z: (x != 0).to(x),
    "minimum": lambda x, y, z: torch.fmin(x, y),
    "maximum": lambda x, y, z: torch.fmax(x, y),
    "where": lambda x, y, z: torch.where(x < y, y, z),
    "where both": lambda x, y, z: torch.where((x < y) & (y < z), x, z),
    "fma": double_then_once,
}


def run_elementwise(op: str, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(Triton's result, torch's)"""
    x, y, z = (any_bits(BF16, N, device) for _ in range(3))
    x[::7] = y[::7]  # random numbers are never equal
    if op in ("minimum", "maximum"):
        x, y = x + 0.0, y + 0.0  # which of 0 and -0 is the smaller is nobody's promise
    if op == "fma":
        x, y, z = exact_factors(3, N, device=device)  # torch rounds float64 twice, which shows otherwise
    out = torch.empty_like(x)
    elementwise[(1,)](x, y, z, out, OP=op, BLOCK=N)
    return out, ELEMENTWISE[op](x, y, z)


@pytest.mark.parametrize("op", ELEMENTWISE)
def test_elementwise(op, device):
    assert differing(*run_elementwise(op, device)) == 0


def test_division(device):
    """A GPU divides by an approximate reciprocal, so no special numbers there: near 1 its bfloat16 has all bits."""
    x, y = any_bits(BF16, N, device), any_bits(BF16, N, device)
    if device.type == "cuda":
        x, y = torch.rand(2, N, device=device).add(1).to(BF16)
    out = torch.empty_like(x)
    elementwise[(1,)](x, y, y, out, OP="x / y", BLOCK=N)
    assert differing(out, x / y) == 0


def test_clamp(device):
    x, y, z = (any_bits(BF16, N, device).nan_to_num(0.5) for _ in range(3))
    out = torch.empty_like(x)
    elementwise[(1,)](x, y, z, out, OP="clamp", BLOCK=N)
    assert differing(out, torch.clamp(x, torch.minimum(y, z), torch.maximum(y, z))) == 0


def test_a_number_beats_a_nan_in_float32_too(device):
    x, y, z = (any_bits(BF16, N, device).float() + 0.0 for _ in range(3))
    for op in ("minimum", "maximum"):
        out = torch.empty_like(x)
        elementwise[(1,)](x, y, z, out, OP=op, BLOCK=N)
        assert differing(out, ELEMENTWISE[op](x, y, z)) == 0


def test_a_comparison_of_float32_is_a_truth_value(device):
    x, y, z = torch.randn(3, N, device=device)
    out = torch.empty(N, dtype=BF16, device=device)
    elementwise[(1,)](x, y, z, out, OP="x < y", BLOCK=N)
    assert differing(out, (x < y).to(BF16)) == 0 and 0 < out.sum() < N


# ---- casts ----


@triton.jit
def cast(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(out_ptr.dtype.element_ty))


def to_cast(kind: torch.dtype, device) -> torch.Tensor:
    if kind in (torch.bfloat16, torch.float16):
        return any_bits(kind, N, device)
    if kind == FP32:
        return ties_and_others(N, device)
    if kind == torch.float64:
        return torch.cat([ties_and_others(N // 2, device).double(), torch.randn(N // 2, device=device).double()])
    lowest, highest = (torch.iinfo(kind).min, torch.iinfo(kind).max) if kind != torch.int64 else (-(2**40), 2**40)
    return torch.randint(lowest, highest, (N,), device=device).to(kind)


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


def run_cast(source: torch.dtype, target: torch.dtype, device) -> tuple[torch.Tensor, torch.Tensor]:
    x = to_cast(source, device)
    if target in INTEGERS:  # what an integer cannot hold is nobody's promise
        x = (torch.randn(N, device=device) * 40).clamp(0 if target == torch.uint8 else -120, 120).to(source)
    out = torch.empty(N, dtype=target, device=device)
    cast[(1,)](x, out, BLOCK=N)
    return out, x.to(target)


@pytest.mark.parametrize("source", [torch.float16, FP32, torch.float64, *INTEGERS])
def test_cast_to_bfloat16(source, device):
    assert differing(*run_cast(source, BF16, device)) == 0


@pytest.mark.parametrize("target", [torch.float16, FP32, torch.float64, *INTEGERS])
def test_cast_from_bfloat16(target, device):
    assert differing(*run_cast(BF16, target, device)) == 0


# ---- products ----


@triton.jit
def product(a_ptr, b_ptr, d_ptr, out_ptr, M: tl.constexpr, K: tl.constexpr):
    i = tl.arange(0, M)
    k = tl.arange(0, K)
    # [M, K]
    a = tl.load(a_ptr + i[:, None] * K + k[None, :])
    b = tl.load(b_ptr + i[:, None] * K + k[None, :])
    # [M, M]
    d = tl.load(d_ptr + i[:, None] * M + i[None, :])
    d = tl.dot(a, tl.trans(b), d)
    tl.store(out_ptr + i[:, None] * M + i[None, :], d.to(out_ptr.dtype.element_ty))


@triton.jit
def products(a_ptr, b_ptr, out_ptr, B: tl.constexpr, M: tl.constexpr):
    c = tl.arange(0, B)
    i = tl.arange(0, M)
    at = c[:, None, None] * M * M + i[None, :, None] * M + i[None, None, :]
    # [B, M, M]
    out = tl.dot(tl.load(a_ptr + at), tl.permute(tl.load(b_ptr + at), (0, 2, 1)))
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty))


def exact_factors(*shape: int, device) -> torch.Tensor:
    """bfloat16 of 7 bits: their products and sums are exact in float32, in whatever order."""
    return (torch.randint(-127, 128, shape, device=device) / 64).to(BF16)


@pytest.mark.parametrize("target", [BF16, FP32])
def test_dot(target, device):
    a, b = exact_factors(2, 64, 32, device=device)
    d = torch.randint(-99, 99, (64, 64), device=device).float()
    out = torch.empty(64, 64, dtype=target, device=device)
    product[(1,)](a, b, d, out, M=64, K=32)
    assert differing(out, (a.double() @ b.double().T + d.double()).to(target)) == 0


def test_batched_dot(device):
    a, b = exact_factors(2, 4, 16, 16, device=device)
    out = torch.empty(4, 16, 16, dtype=FP32, device=device)
    products[(1,)](a, b, out, B=4, M=16)
    assert differing(out, (a.double() @ b.double().mT).float()) == 0


def test_dot_of_infinities_and_nan(device):
    a, b = exact_factors(2, 64, 32, device=device)
    a[3, 5], a[7, 1], b[9, 5] = float("inf"), float("nan"), -1.0
    d, out = torch.zeros(64, 64, device=device), torch.empty(64, 64, device=device)
    product[(1,)](a, b, d, out, M=64, K=32)
    assert out[7].isnan().all() and out[3, 9] == -float("inf")
    assert differing(out, (a.double() @ b.double().T).float()) == 0


# ---- reductions ----


@triton.jit
def _bare_max(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def reduction(x_ptr, out_ptr, OP: tl.constexpr, M: tl.constexpr, K: tl.constexpr):
    i = tl.arange(0, M)
    k = tl.arange(0, K)
    # [M, K]
    x = tl.load(x_ptr + i[:, None] * K + k[None, :])
    if OP == "sum":
        out = tl.sum(x, 1)
    elif OP == "sum, kept":
        out = tl.reshape(tl.sum(x, 1, keep_dims=True), [M])
    elif OP == "sum in float32":
        out = tl.sum(x.to(tl.float32), 1)
    elif OP == "max":
        out = tl.max(x, 1)
    elif OP == "min":
        out = tl.min(x, 1)
    elif OP == "argmax":
        out = tl.argmax(x, 1)
    elif OP == "custom":
        out = tl.reduce(x, 1, _bare_max)
    tl.store(out_ptr + i, out.to(out_ptr.dtype.element_ty))


@triton.jit
def total(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK))))


@triton.jit
def _plus(a, b):
    return a + b


@triton.jit
def running(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.associative_scan(tl.load(x_ptr + at), 0, _plus))


REDUCTIONS = {
    "sum": lambda x: x.sum(1),
    "sum, kept": lambda x: x.sum(1),
    "sum in float32": lambda x: x.double().sum(1).to(BF16),
    "max": lambda x: x.amax(1),
    "min": lambda x: x.amin(1),
    "argmax": lambda x: x.float().argmax(1).to(BF16),
    "custom": lambda x: x.amax(1),
}


@pytest.mark.parametrize("op", REDUCTIONS)
def test_reductions(op, device):
    """Numbers whose sums are exact in bfloat16, so that the order is free."""
    x = (torch.randint(-8, 9, (16, 16), device=device) / 4).to(BF16)
    if "sum" not in op:
        x = torch.randn(16, 16, device=device).to(BF16)
        x[0, 3], x[1, 2], x[2] = float("inf"), -float("inf"), -float("inf")
    if op == "sum in float32":
        x = exact_factors(16, 16, device=device)
    out = torch.empty(16, dtype=BF16, device=device)
    reduction[(1,)](x, out, OP=op, M=16, K=16)
    assert differing(out, REDUCTIONS[op](x)) == 0


def test_sum_of_everything(device):
    x = torch.ones(256, device=device).to(BF16)
    out = torch.empty(1, dtype=BF16, device=device)
    total[(1,)](x, out, BLOCK=256)
    assert out == 256


def test_a_sum_is_rounded_after_every_addition():
    """As hardware does: whoever sums bfloat16 in a kernel must see what it costs."""
    x = torch.randn(16, 64).to(BF16)
    halves = x
    while halves.shape[1] > 1:
        left, right = halves.chunk(2, 1)
        halves = left + right
    out = torch.empty(16, dtype=BF16)
    reduction[(1,)](x, out, OP="sum", M=16, K=64)
    assert differing(out, halves[:, 0]) == 0
    assert differing(out, x.float().sum(1).to(BF16)) > 0


def test_scans_are_refused():
    x = torch.randn(64).to(BF16)
    with pytest.raises(Exception, match="scans of bfloat16"):
        running[(1,)](x, torch.empty_like(x), BLOCK=64)
    out = torch.empty(64)
    running[(1,)](torch.arange(64.0), out, BLOCK=64)
    assert out[-1] == 63 * 32


# ---- what kernels do besides arithmetic ----


@triton.jit
def moved(x_ptr, out_ptr, OP: tl.constexpr):
    i = tl.arange(0, 8)
    x = tl.load(x_ptr + i[:, None] * 8 + i[None, :])
    if OP == "trans":
        x = tl.trans(x)
    elif OP == "reshape":
        x = tl.reshape(x, [8, 8])
        x = tl.reshape(tl.permute(tl.reshape(x, [4, 2, 8]), (1, 0, 2)), [8, 8])
    elif OP == "join":
        a, b = tl.split(tl.reshape(x, [8, 4, 2]))
        x = tl.reshape(tl.join(b, a), [8, 8])
    elif OP == "broadcast":
        x = tl.broadcast_to(tl.max(x, 1)[:, None], [8, 8])
    tl.store(out_ptr + i[:, None] * 8 + i[None, :], x)


MOVED = {
    "trans": lambda x: x.T,
    "reshape": lambda x: x.view(4, 2, 8).permute(1, 0, 2).reshape(8, 8),
    "join": lambda x: x.view(8, 4, 2).flip(-1).reshape(8, 8),
    "broadcast": lambda x: x.amax(1, keepdim=True).expand(8, 8),
}


@pytest.mark.parametrize("op", MOVED)
def test_moved(op, device):
    x = torch.randn(8, 8, device=device).to(BF16)
    out = torch.empty_like(x)
    moved[(1,)](x, out, OP=op)
    assert differing(out, MOVED[op](x).contiguous()) == 0


@triton.jit
def kept(seed_ptr, row_ptr, out_ptr, THRESHOLD: tl.constexpr, M: tl.constexpr, G: tl.constexpr):
    i = tl.arange(0, M)
    g = tl.arange(0, G)
    row = tl.load(row_ptr + i)[:, None]
    zero = row.to(tl.uint32) * 0 + g[None, :].to(tl.uint32) * 0
    offset = (tl.load(seed_ptr + 1) & 0xFFFFFFFF).to(tl.uint32)
    low, high = (row & 0xFFFFFFFF).to(tl.uint32), ((row >> 32) & 0xFFFFFFFF).to(tl.uint32)
    groups = zero + g[None, :].to(tl.uint32)
    words = tl.philox(tl.load(seed_ptr), groups, zero + offset, zero + low, zero + high)
    w0, w1, w2, w3 = words  # pyright: ignore[reportGeneralTypeIssues]
    bits = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [M, 4 * G])
    j = tl.arange(0, 4 * G)
    tl.store(out_ptr + i[:, None] * 4 * G + j[None, :], (bits >= THRESHOLD).to(tl.int8))


def test_philox_drops_what_the_reference_drops(device):
    """Negative seeds, offsets and rows beyond 32 bits; four words joined in the order of their keys."""
    seed = torch.tensor([-(2**62) + 12345, 2**40 + 7], device=device)
    rows = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 3, 77, 78], device=device)
    out = torch.empty(8, 64, dtype=torch.int8, device=device)
    kept[(1,)](seed, rows, out, THRESHOLD=int(0.25 * 2**32), M=8, G=16)
    expected = _philox.keep_mask(seed, rows, 64, 0.25)
    assert torch.equal(out.bool(), expected) and 0.6 < expected.float().mean() < 0.9


# ---- that the tests above would notice ----


def truncated(values: np.ndarray) -> np.ndarray:
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def ties_up(values: np.ndarray) -> np.ndarray:
    bits = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return np.where(np.isnan(values), np.uint16(0x7FFF), ((bits + 0x8000) >> 16).astype(np.uint16))


@pytest.mark.parametrize("planted", [truncated, ties_up])
def test_a_planted_rounding_is_noticed(planted, monkeypatch):
    monkeypatch.setattr(triton_interpreter, "narrow", planted)
    assert differing(*run_elementwise("x + y", "cpu")) > 0
    assert differing(*run_cast(FP32, BF16, "cpu")) > 0


def test_without_the_repair_bfloat16_is_wrong():
    """When this fails, Triton has learnt it, and the repair of what is right may go."""
    a, b = exact_factors(2, 64, 32, device="cpu")
    d, out = torch.zeros(64, 64), torch.empty(64, 64)
    with triton_interpreter.uninstalled():
        assert differing(*run_elementwise("x + y", "cpu")) > 0
        assert differing(*run_cast(FP32, BF16, "cpu")) > 0
        product[(1,)](a, b, d, out, M=64, K=32)
        assert differing(out, (a.double() @ b.double().T).float()) > 0
    assert differing(*run_elementwise("x + y", "cpu")) == 0


def test_packages_that_do_not_fit_are_named(monkeypatch):
    assert triton_interpreter.complaint() == ""
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(np, "__version__", "2.4.6")
    assert "Triton 3.6.0 cannot use numpy 2.4.6" in triton_interpreter.complaint()
    monkeypatch.setattr(triton, "__version__", "3.9.0")
    assert triton_interpreter.complaint() == ""
