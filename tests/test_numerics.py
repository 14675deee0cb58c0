"""The error budget must let rounding through and nothing else: errors are planted, and each must be caught."""

import pytest
import torch

from vivit_kernels._attention.options import Options
from vivit_kernels.joint_attention.reference import joint_attention
from vivit_kernels.numerics import judge

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=DTYPES, ids=str)
def problem(request):
    dtype = request.param
    q, k, v = (torch.randn(2, 197, 3, 64).to(dtype) for _ in range(3))
    options = Options(scale=64**-0.5)
    exact = joint_attention(q.double(), k.double(), v.double(), options)
    return dtype, (q, k, v), exact, joint_attention(q, k, v, options)


def attention(tensors, scale=64**-0.5):
    """A right result in the dtype: computed in fp64 and rounded once, as the best kernel could."""
    q, k, v = (x.double() for x in tensors)
    return joint_attention(q, k, v, Options(scale=scale)).to(tensors[0].dtype)


def test_a_right_result_passes(problem):
    _, tensors, exact, eager = problem
    assert judge(attention(tensors), exact, eager).ok
    assert judge(eager, exact, eager).ok


def plant_wrong_row(o, tensors):
    o[1, 100, 2] = o[1, 99, 2]
    return o


def plant_dropped_key_block(o, tensors):
    q, k, v = tensors
    return attention((q, k[:, :-16], v[:, :-16]))


def plant_unmasked_tail(o, tensors):
    """197 keys in tiles of 32 read as 224: the tail of zeros takes part in the softmax."""
    q, k, v = tensors
    return attention((q, *(torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 27)) for x in (k, v))))


def plant_wrong_scale(o, tensors):
    return attention(tensors, scale=64**-0.5 * 1.02)


def plant_output_off_by_two_percent(o, tensors):
    return o * 1.02


def plant_nan(o, tensors):
    o[0, 0, 0, 0] = float("nan")
    return o


@pytest.mark.parametrize(
    "plant",
    [
        plant_wrong_row,
        plant_dropped_key_block,
        plant_unmasked_tail,
        plant_wrong_scale,
        plant_output_off_by_two_percent,
        plant_nan,
    ],
)
def test_planted_errors_fail(problem, plant):
    _, tensors, exact, eager = problem
    wrong = plant(attention(tensors), tensors)
    verdict = judge(wrong, exact, eager)
    assert not verdict.ok, str(verdict)
    assert "OUT OF BUDGET" in str(verdict)


def test_a_lost_key_in_a_long_row_is_seen_by_the_rms():
    """3137 keys read as 3200 (zeros): in bf16 the maximum alone would let this through."""
    q, k, v = (torch.randn(1, n, 1, 64).bfloat16() for n in (256, 3137, 3137))
    exact = joint_attention(q.double(), k.double(), v.double(), Options(scale=0.125))
    eager = joint_attention(q, k, v, Options(scale=0.125))
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 63)).double() for x in (k, v))
    verdict = judge(joint_attention(q.double(), k, v, Options(scale=0.125)).bfloat16(), exact, eager)
    assert not verdict.ok and verdict.rms_error > verdict.rms_budget


@pytest.mark.parametrize("queries, most", [(1, 6.0), (100, 3.3)])
def test_a_few_samples_may_scatter_and_no_more(queries, most):
    """Errors of queries of 64 channels, as multiples of eager's in RMS, whose maximum is far above it."""
    exact = torch.zeros(queries, 64, dtype=torch.float64)
    eager = torch.full((queries, 64), 1e-3)
    eager[:, 0] *= 100
    rms = judge(eager, exact, eager).rms_error
    for factor, ok in ((0.99 * most, True), (1.01 * most, False)):
        assert judge(torch.full((queries, 64), factor * rms), exact, eager, row=64).ok is ok
    assert not judge(torch.full((queries, 64), 0.99 * most * rms), exact, eager).ok  # as many samples as elements


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_lost_block_of_keys_is_seen_in_a_single_query(dtype):
    """Where the budget is widest."""
    q, k, v = (torch.randn(1, n, 1, 64).to(dtype) for n in (1, 150, 150))
    exact = joint_attention(q.double(), k.double(), v.double(), Options(0.125))
    eager = joint_attention(q, k, v, Options(0.125))
    assert not judge(attention((q, k[:, :-16], v[:, :-16])), exact, eager, row=64).ok


def test_exactly_zero_results_are_judged_by_their_factors():
    zero = torch.zeros(4, dtype=torch.float64)
    noise = torch.full((4,), 2e-8)
    assert not judge(noise, zero, torch.zeros(4), gradient=True).ok
    assert judge(noise, zero, torch.zeros(4), gradient=True, scale=1.0).ok


def test_a_long_float32_sum_may_err_like_a_chain_and_no_more():
    """1,536 products added one by one (a matrix unit) against eager's blocked sum; a lost product still fails."""
    a, b = torch.rand(64, 1536), torch.randn(1536, 32)
    exact, eager = a.double() @ b.double(), a @ b
    chain = torch.zeros(64, 32)
    for i in range(1536):
        chain += a[:, i : i + 1] * b[i]
    assert judge(chain, exact, eager, terms=1536).ok
    assert not judge(chain - a[:, :1] * b[0], exact, eager, terms=1536).ok


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="float64"):
        judge(torch.zeros(2), torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="shapes differ"):
        judge(torch.zeros(2), torch.zeros(3, dtype=torch.float64), torch.zeros(2))
