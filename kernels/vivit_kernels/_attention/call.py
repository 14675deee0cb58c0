"""From checked inputs to the registered op: what joint and factorised attention do alike at the end of their api."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .. import _dispatch, _native, _transforms
from .._triton import arch_of
from .options import Options
from .registration import run, unpack

Order = Callable[[_dispatch.Call], "tuple[str, ...]"]


def _arch(index: int | None) -> int:
    return arch_of(torch.device("cuda") if index is None else torch.device("cuda", index))


# A graph is compiled for one device. torch.compiler.assume_constant_result does this, but imports the whole compiler.
setattr(_arch, "_dynamo_marked_constant", True)  # noqa: B010


def _uses(options: Options) -> tuple[str, ...]:
    given = (options.mask is not None, options.seed is not None, options.cos is not None, options.softcap > 0)
    if not any(given):
        return ()
    return tuple(name for name, used in zip(("key_mask", "dropout", "rotary", "softcap"), given, strict=True) if used)


def call(
    op: str,
    support: Mapping[str, _dispatch.Predicate],
    order: Order,
    backend: str | None,
    shape: tuple,
    tensors: tuple[Tensor, Tensor | None, Tensor | None],
    options: Options,
    definition: Callable[[Tensor, Tensor, Tensor], Tensor],
    temporal_heads: int | None = None,
    keys: int | None = None,
) -> Tensor:
    """Chooses a backend for q of `shape`, runs `vivit_kernels::<op>_fwd`; tensors: q, k, v, or packed q, None, None.

    order: in which backends are tried, from the facts of the call. definition: of q, k, v, in plain PyTorch, where no
    kernel has the derivative that is asked for. temporal_heads, keys: as in _dispatch.Call.
    """
    q = tensors[0]
    needs_grad = torch.is_grad_enabled() and (
        any(x is not None and x.requires_grad for x in tensors) or _transforms.active()  # a batched tensor says no
    )
    needs_grad |= _dispatch.traced()  # what is traced is later run with a gradient or without
    device = q.device.type
    arch = _arch(q.device.index) if device == "cuda" else 0
    isa = _native.call_isa(device)
    uses = _uses(options)
    facts = _dispatch.Call(
        op, shape, q.dtype, device, needs_grad, uses, arch, temporal_heads, keys, isa,
        beyond_kernels=_transforms.beyond_kernels(),
    )  # fmt: skip
    chosen = _dispatch.choose(facts, support, backend, order(facts))
    if facts.beyond_kernels:
        return definition(*unpack(*tensors))
    scale, softcap, dropout_p, mask, seed, cos, sin = options
    arguments = *tensors, mask, seed, cos, sin, temporal_heads or 0, scale, softcap, dropout_p, chosen, needs_grad
    return run(op, arguments, needs_grad)
