"""Backend `torch` of temporal_block: norm, product and attention one after another; backward makes all three again."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from .._attention import groups
from .._attention.options import Options, without_autocast
from .._rows.passes import Norm, layer_norm, layer_norm_backward


def _groups(qkv: Tensor, options: Options, *others: Tensor) -> Iterator[tuple]:
    """For each clip its positions as a group, and the same view of other grids; qkv `[B, T, S, 3, H, D]`."""
    for b in range(qkv.shape[0]):
        q, k, v, *rest = (x[b].transpose(0, 1).transpose(1, 2) for x in (*qkv.unbind(3), *others))  # [S, H, T, D]
        yield groups.Group(q, k, v, None, None), rest


def _options(D: int) -> Options:
    return Options(D**-0.5, 0.0, 0.0, None, None, None, None)


@without_autocast
def launch_fwd(x, norm_weight, norm_bias, weight, bias, heads: int, eps: float) -> Tensor:
    n = layer_norm(x, None, Norm(norm_weight, norm_bias, eps), x.dtype).n
    qkv = F.linear(n, weight, bias).unflatten(-1, (3, heads, -1))
    o = qkv.new_empty(*qkv.shape[:3], *qkv.shape[4:])
    for group, (o_view,) in _groups(qkv, options := _options(o.shape[-1]), o):
        groups.forward(group, o_view, options)
    return o.flatten(-2)


@without_autocast
def launch_bwd(do, x, norm_weight, norm_bias, weight, bias, heads: int, eps: float) -> list[Tensor]:
    norm = Norm(norm_weight, norm_bias, eps)
    found = layer_norm(x, None, norm, x.dtype)
    qkv = F.linear(found.n, weight, bias).unflatten(-1, (3, heads, -1))
    dqkv, options = qkv.new_empty(qkv.shape), _options(qkv.shape[-1])
    for group, (do_view, dq, dk, dv) in _groups(qkv, options, do.unflatten(-1, (heads, -1)), *dqkv.unbind(3)):
        groups.backward(group, do_view, dq, dk, dv, options)
    rows, n = dqkv.flatten(0, 2).flatten(1), found.n.flatten(0, 2)
    dx, dnorm_weight, dnorm_bias = layer_norm_backward(
        (rows @ weight).view(x.shape), None, found, norm, (True, True, True)
    )
    assert dx is not None and dnorm_weight is not None and dnorm_bias is not None
    return [dx, dnorm_weight, dnorm_bias, rows.t() @ n, rows.sum(0)]
