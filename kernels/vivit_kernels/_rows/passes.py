"""Passes over the rows of a transformer block, forward and backward: layer norm, residual and layer norm, GELU.

Each is defined by PyTorch's ops, which run on every device. On a CUDA device (and, where TRITON_INTERPRET=1 was set, on
a CPU) it is one Triton kernel (triton_passes.py) in float32, float16 and bfloat16, rounded once, unless
VIVIT_KERNELS_BACKENDS leaves Triton out. Bytes for a row of E (M for the GELU) elements of 2 bytes, with float32
weights under autocast; what PyTorch's ops take is for the same result in the same dtype:

    pass                                              fused              PyTorch's ops
    layer norm                                        x in, n out: 4 E   to float32, norm, to bfloat16: 20 E
    residual + layer norm                             8 E                26 E
    layer norm backward                               6 E                to float32 twice, norm, to bfloat16: 30 E
    layer norm backward + gradient of the residual    8 E                36 E
    GELU again, its backward and the bias's gradient  8 M                12 M

Predicted from the reads and writes of each op, not measured. The norm's parameters are not counted: they are as good as
cached; the partial sums of the parameters' gradients are at most 512 rows. Every sum has one order: no atomics, the
same bits in every run.

Not here: bias + GELU of the forward. The bias is the product's epilogue already, and F.gelu is one pass. Nor are mean
and deviation kept from forward to backward: whoever makes the norm's output again finds them on the way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _environment, _triton
from .._dispatch import Call
from .._triton import arch_of, triton_refusals

_WIDEST = 8192  # elements of a normalised row: a warp group holds all of them in registers


class Norm(NamedTuple):
    """Parameters `[E]` of a layer norm, either None."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


class Normed(NamedTuple):
    """sum `[..., E]`: what was normalised; n: its norm; mean, rstd: of each row, fp32, in a shape of their maker's."""

    sum: Tensor
    n: Tensor
    mean: Tensor
    rstd: Tensor


def fused(*tensors: Tensor | None) -> bool:
    """Whether Triton's kernels take these tensors of one device; never of float64, nor where nothing lies in them."""
    given = [x for x in tensors if x is not None]
    x = given[0]
    if "triton" not in _environment.allowed_backends() or not all(t.numel() for t in given):
        return False
    device = "cuda" if _triton.compiling_for else x.device.type
    arch = arch_of(x.device) if device == "cuda" else 0
    calls = (Call("rows", tuple(t.shape), t.dtype, device, True, arch=arch) for t in given)
    return not any(triton_refusals(call) for call in calls)


def add(branch: Tensor, x: Tensor) -> Tensor:
    """x + branch, in the branch's memory where that has the sum's dtype: nobody else may have it."""
    return branch.add_(x) if branch.dtype == torch.promote_types(branch.dtype, x.dtype) else branch + x


# ---- layer norm ----


def layer_norm(x: Tensor, branch: Tensor | None, norm: Norm, dtype: torch.dtype) -> Normed:
    """sum = x + branch (x without one), n = F.layer_norm(sum, [E], *norm), x and branch `[..., E]`.

    The sum is in the branch's memory where `add` may put it there. dtype: of the product that n is for; a kernel rounds
    to it, PyTorch's op leaves n in the dtype in which F.layer_norm computes here.
    """
    if x.shape[-1] <= _WIDEST and fused(x, branch, norm.weight, norm.bias):
        from .triton_passes import norm_forward

        return norm_forward(x, branch, norm, dtype)
    x = x if branch is None else add(branch, x)
    wide, (weight, bias, eps) = x, norm
    if weight is not None and weight.dtype != x.dtype and x.device.type != "cpu":
        wide = x.to(weight.dtype)  # a CPU's kernel takes a bfloat16 x beside a float32 weight
    return Normed(x, *torch.native_layer_norm(wide, x.shape[-1:], weight, bias, eps))


def layer_norm_backward(
    dn: Tensor, dsum: Tensor | None, found: Normed, norm: Norm, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x (and so of the branch), weight and bias, each where `needs` says so.

    dn: of n. dsum: of the sum, beside what comes through n; None where nobody else read it.
    """
    weight, bias, _ = norm
    if found.sum.shape[-1] <= _WIDEST and fused(found.sum, dn, dsum, weight, bias):
        from .triton_passes import norm_backward

        return norm_backward(dn, dsum, found, norm, needs)
    same = found.sum.to(found.n.dtype)
    gradients = torch.ops.aten.native_layer_norm_backward(
        dn.to(found.n.dtype), same, list(same.shape[-1:]), found.mean, found.rstd, weight, bias, list(needs)
    )
    dx, dweight, dbias = (g if need else None for g, need in zip(gradients, needs, strict=True))
    if dx is not None:
        dx = dx.to(found.sum.dtype)
        dx = dx if dsum is None else add(dx, dsum.to(dx.dtype))
    return dx, cast_like(dweight, weight), cast_like(dbias, bias)


def cast_like(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return gradient if gradient is None or parameter is None else gradient.to(parameter.dtype)


# ---- GELU ----


def gelu_backward(
    dactive: Tensor, hidden: Tensor, approximate: str, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """(active = F.gelu(hidden) again, the gradient of hidden from that of active, its sum over the rows `[M]`).

    dactive, hidden `[..., M]` of one dtype; approximate: "tanh" or "none" (the exact one, by erf), as of F.gelu.
    needs: whether active and the sum are asked for, else None. dactive may be overwritten.
    """
    if fused(dactive, hidden):
        from .triton_passes import gelu_backward as launch

        return launch(dactive, hidden, approximate, needs)
    active = F.gelu(hidden, approximate=approximate) if needs[0] else None
    dhidden = torch.ops.aten.gelu_backward(dactive, hidden, approximate=approximate)
    return active, dhidden, dhidden.reshape(-1, dhidden.shape[-1]).sum(0) if needs[1] else None
