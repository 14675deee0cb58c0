"""From checked inputs to the registered op: what joint and factorised attention do alike at the end of their api."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .. import _dispatch
from .options import Options


def call(
    op: str,
    support: Mapping[str, _dispatch.Predicate],
    backend: str | None,
    shape: tuple,
    tensors: tuple[Tensor, Tensor | None, Tensor | None],
    temporal_heads: int,
    options: Options,
) -> Tensor:
    """Chooses a backend for q of `shape`, runs `vivit_kernels::<op>_fwd`; tensors: q, k, v, or packed q, None, None."""
    q = tensors[0]
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    facts = _dispatch.Call(op, shape, q.dtype, q.device.type, needs_grad)
    chosen = _dispatch.choose(facts, support, backend)
    scale, softcap, dropout_p, mask, seed, cos, sin = options
    fwd = getattr(torch.ops.vivit_kernels, f"{op}_fwd")
    return fwd(*tensors, mask, seed, cos, sin, temporal_heads, scale, softcap, dropout_p, chosen, needs_grad)[0]
