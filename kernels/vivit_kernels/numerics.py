"""The error budget: one rule, and the only file where a tolerance is written.

    exact   the reference in float64 on the same (already quantised) inputs
    eager   the reference in the dtype under test
    actual  the result under test

`actual` passes when it is finite, its RMS error against `exact` is within 2 (gradients and float32: 3) times eager's
own and its maximum error within 3 (gradients and float32: 4) times, plus one rounding of the result: eps(dtype)/2 of
its largest value, eps(dtype)/4 of its RMS (a result that eager happens to hit exactly must still be allowed to round).
In float32 the maximum may be 4 eps of the largest value: a sum of 150 terms is off by as much in one order and exact in
another. The RMS half is not optional: a maximum alone lets through a scale that is wrong by 2 % or a few keys too many,
because one unlucky element of eager is already as far off.

The RMS factor is widened by 1 + 1/sqrt(n) for a result of n independent samples, since by so much (F distribution, one
standard deviation) the ratio of two RMS errors of the same size scatters. The channels of a query are one sample: they
share the errors of its scores and of its sum. Measured, float32, two orders of the sums, 32 to 150 keys: the logarithm
of the ratio scatters by 0.3 to 0.6 of 1/sqrt(queries), from 1 query, where it reached 9.6 in 600 draws, to 384.

In float64 there is no better reference: results of another summation order agree to FLOAT64_EPS_MULTIPLE eps of the
scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RMS_FACTOR = 2.0
LONG_SUM_RMS_FACTOR = 3.0  # gradients and all of float32: the order of a sum decides its error, and the order is free
MAX_FACTOR, LONG_SUM_MAX_FACTOR = 3.0, 4.0  # a maximum is one unlucky element: two right results may differ by 2 in it
MAX_EPS_SHARE, RMS_EPS_SHARE = 0.5, 0.25
FLOAT32_MAX_EPS_SHARE = 4.0
FLOAT64_EPS_MULTIPLE = 512.0  # exp magnifies the rounding of a score by its size, hundreds on the hardest inputs
_EPS_SHARES = {
    torch.float64: (FLOAT64_EPS_MULTIPLE, FLOAT64_EPS_MULTIPLE),
    torch.float32: (FLOAT32_MAX_EPS_SHARE, RMS_EPS_SHARE),
}


@dataclass(frozen=True)
class Verdict:
    """Errors and their budgets; `share` is the part of the budget used, 1 is the limit."""

    finite: bool
    max_error: float
    max_budget: float
    rms_error: float
    rms_budget: float

    @property
    def share(self) -> float:
        if not self.finite:
            return float("inf")
        return max(_ratio(self.max_error, self.max_budget), _ratio(self.rms_error, self.rms_budget))

    @property
    def ok(self) -> bool:
        return self.share <= 1.0

    def __str__(self) -> str:
        state = "within budget" if self.ok else "OUT OF BUDGET"
        return (
            f"{state}: finite={self.finite}, max error {self.max_error:.3g} of {self.max_budget:.3g}, "
            f"rms error {self.rms_error:.3g} of {self.rms_budget:.3g}"
        )


def _ratio(error: float, budget: float) -> float:
    if budget > 0:
        return error / budget
    return 0.0 if error == 0 else float("inf")


def _errors(x: Tensor, exact: Tensor) -> tuple[float, float]:
    if x.numel() == 0:
        return 0.0, 0.0
    difference = (x.to(torch.float64) - exact).abs()
    return difference.max().item(), difference.square().mean().sqrt().item()


def judge(
    actual: Tensor,
    exact: Tensor,
    eager: Tensor,
    *,
    gradient: bool = False,
    scale: float | None = None,
    terms: int = 1,
    row: int = 1,
) -> Verdict:
    """Holds `actual` to the budget.

    scale: where the exact result is zero by mathematics (the gradient of a key bias, dq with a single key), the size of
        the terms that cancel; else the tensor's own is taken.
    terms: products summed in float32 for one element, where they are many: in one chain, as a matrix unit adds them,
        their roundings make eps(float32)/2 * sqrt(terms/2) of the result, however eager happens to block its sums.
    row: elements that share an error, as the channels of a query do: numel/row samples are independent.
    """
    if exact.dtype != torch.float64:
        raise ValueError(f"judge: exact must be float64, got {exact.dtype}: run the reference on inputs.double()")
    if not actual.shape == exact.shape == eager.shape:
        raise ValueError(f"judge: shapes differ: {tuple(actual.shape)}, {tuple(exact.shape)}, {tuple(eager.shape)}")
    finite = bool(torch.isfinite(actual).all())
    max_error, rms_error = _errors(actual, exact)
    eager_max, eager_rms = _errors(eager, exact)
    exact_max, exact_rms = _errors(torch.zeros_like(exact), exact)
    long_sum = gradient or actual.dtype == torch.float32
    max_factor = LONG_SUM_MAX_FACTOR if long_sum else MAX_FACTOR
    scatter = math.sqrt(row / max(row, actual.numel()))
    rms_factor = (LONG_SUM_RMS_FACTOR if long_sum else RMS_FACTOR) * (1 + scatter)
    shares = _EPS_SHARES.get(actual.dtype, (MAX_EPS_SHARE, RMS_EPS_SHARE))
    chain = torch.finfo(torch.float32).eps / 2 * math.sqrt(terms / 2) if terms > 1 else 0.0
    sizes = (exact_max, exact_rms) if scale is None else (max(scale, exact_max), max(scale, exact_rms))
    max_slack, rms_slack = (
        (torch.finfo(actual.dtype).eps * share + chain) * size for share, size in zip(shares, sizes, strict=True)
    )
    return Verdict(finite, max_error, max_factor * eager_max + max_slack, rms_error, rms_factor * eager_rms + rms_slack)
