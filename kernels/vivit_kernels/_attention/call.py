"""From checked inputs to the registered op: what joint and factorised attention do alike at the end of their api."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .. import _dispatch, _environment
from .._triton import arch_of
from .options import Options
from .registration import run

Order = Callable[[_dispatch.Call], "tuple[str, ...]"]


def _arch(index: int | None) -> int:
    return arch_of(torch.device("cuda") if index is None else torch.device("cuda", index))


# A graph is compiled for one device. torch.compiler.assume_constant_result does this, but imports the whole compiler.
setattr(_arch, "_dynamo_marked_constant", True)  # noqa: B010


def _uses(options: Options) -> tuple[str, ...]:
    given = (
        ("key_mask", options.mask is not None),
        ("dropout", options.seed is not None),
        ("rotary", options.cos is not None),
        ("softcap", options.softcap > 0),
    )
    return tuple(name for name, used in given if used)


def call(
    op: str,
    support: Mapping[str, _dispatch.Predicate],
    backend: str | None,
    shape: tuple,
    tensors: tuple[Tensor, Tensor | None, Tensor | None],
    temporal_heads: int,
    options: Options,
    order: Order | None = None,
) -> Tensor:
    """Chooses a backend for q of `shape`, runs `vivit_kernels::<op>_fwd`; tensors: q, k, v, or packed q, None, None.

    order: in which backends are tried, from the facts of the call, where that is not everywhere the same.
    """
    q = tensors[0]
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    arch = _arch(q.device.index) if q.device.type == "cuda" else 0
    facts = _dispatch.Call(op, shape, q.dtype, q.device.type, needs_grad, _uses(options), arch)
    chosen = _dispatch.choose(facts, support, backend, _environment.BACKENDS if order is None else order(facts))
    scale, softcap, dropout_p, mask, seed, cos, sin = options
    arguments = *tensors, mask, seed, cos, sin, temporal_heads, scale, softcap, dropout_p, chosen, needs_grad
    return run(op, arguments, needs_grad)
