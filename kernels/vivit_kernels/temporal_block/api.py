"""The public function temporal_block."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch, _transforms
from .._attention.options import autocast
from .._attention.registration import plain
from .._triton import arch_of
from . import op
from .reference import temporal_block as defined
from .support import SUPPORT, decide, obstacle, order  # noqa: F401  decide: for explain()


def temporal_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    heads: int,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Layer norm, QKV projection and attention along time as one operation: what a temporal block does before `proj`.

    Equivalent to

        qkv = F.linear(F.layer_norm(x, [E], norm_weight, norm_bias, eps), weight, bias)
        o = temporal_attention(qkv.view(B, T, S, 3, heads, E // heads)).view(B, T, S, E)

    x: `[B, T, S, E]`. norm_weight, norm_bias: `[E]`. weight `[3 E, E]`, bias `[3 E]`: of nn.Linear, q, k, v one after
        the other. All in one dtype, fp16, bf16, fp32 or fp64 (under autocast all are cast to its own) and on one
        device. Differentiable in all five; backward has x and the parameters alone and makes the rest again.
    backend: "triton": one kernel, QKV never reaches memory; "torch": three steps. None chooses. For wide models, from
        E = 768 on, a linear layer and temporal_attention should be faster than either: `temporal_block_pays` says for
        which calls, `explain` why. That is computed: no GPU has run or timed the kernel.

    Returns `[B, T, S, E]`, contiguous, in x's dtype. Raises ValueError for shapes or dtypes that do not fit,
    NotImplementedError, with every reason, when no backend can run the call, or a second derivative is
    asked for outside of torch.func.
    Source: ViViT (arXiv 2103.15691) section 3.3, model 3, equation 5.

        o = temporal_block(x, norm.weight, norm.bias, qkv.weight, qkv.bias, heads=12, eps=norm.eps)
    """
    x, norm_weight, weight = _three(x, norm_weight, weight)
    _, norm_bias, bias = _three(x, norm_bias, bias)
    _check(x, norm_weight, norm_bias, weight, bias, heads)
    if not 0 <= eps < float("inf"):
        raise ValueError(f"temporal_block: eps={eps} must be finite, and not negative")
    call = _call((x, norm_weight, norm_bias, weight, bias), heads)
    chosen = _dispatch.choose(call, SUPPORT, backend, order(call))
    arguments = x, norm_weight, norm_bias, weight, bias, heads, eps
    return defined(*arguments) if call.beyond_kernels else op.run(*arguments, chosen)


def temporal_block_pays(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    heads: int,
    backend: str | None = None,
) -> bool:
    """Whether temporal_block's one kernel is to run in the place of a norm, a linear layer and temporal_attention.

    Equivalent to: on a GPU, in fp16 or bf16 without a cast, no gradient needed, and the kernel's least time, computed
    from bytes and products, is below that of the three steps: widths up to E = 512 where tiles fill the GPU, narrower
    ones for fewer clips. The rates are one H100's, another GPU's are not asked for; no GPU has timed either side.

    x, ..., heads: as temporal_block takes them, but for parameters of other dtypes, or None of a layer without: False.
    backend: whom those three would be given. None: VIVIT_KERNELS_BACKENDS may name another than Triton first, then
        False. "triton": as None; but on CPU tensors with TRITON_INTERPRET=1, where kernels are checked, True. Another:
        False.

    Looks at no value, and can be traced by torch.compile; False in a model that is exported, which may run anywhere.
    Raises ValueError for shapes that do not fit.

        if temporal_block_pays(*tensors, heads=12):
            o = temporal_block(*tensors, heads=12, eps=norm.eps, backend="triton")
    """
    if norm_weight is None or norm_bias is None or bias is None:
        return False
    tensors = (x, norm_weight, norm_bias, weight, bias)
    if _dispatch.autocast_dtype(x.device.type) not in (None, x.dtype) or any(
        t.dtype != x.dtype or t.device != x.device for t in tensors
    ):
        return False
    seen = torch.compiler.is_exporting() if torch.compiler.is_compiling() else not plain(*tensors)
    if seen:  # by who may know the three, but not the one
        return False
    _check(*tensors, heads)
    return obstacle(_call(tensors, heads), backend) == ""


def _call(tensors: tuple[Tensor, ...], heads: int) -> _dispatch.Call:
    x = tensors[0]
    needs_grad = torch.is_grad_enabled() and (any(t.requires_grad for t in tensors) or _transforms.active())
    device, (B, T, S, E) = x.device.type, x.shape
    arch = arch_of(x.device) if device == "cuda" else 0
    return _dispatch.Call(
        "temporal_block", (B, T, S, heads, E // heads), x.dtype, device, needs_grad, arch=arch,
        beyond_kernels=_transforms.beyond_kernels(),
    )  # fmt: skip


def _three(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, a, b = autocast(x, a, b)  # pyright: ignore[reportAssignmentType]
    return x, a, b


def _check(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, heads: int) -> None:
    if x.dim() != 4 or 0 in x.shape[1:] or not x.is_floating_point():
        raise ValueError(
            f"temporal_block: x {tuple(x.shape)} {x.dtype} must be [B, T, S, E], floating point, of at least one token "
            "and channel; tokens of a clip are x.unflatten(1, (T, S))"
        )
    E = x.shape[-1]
    if isinstance(heads, float) or heads < 1 or E % heads:
        raise ValueError(f"temporal_block: heads={heads} must divide E={E}, the last dimension of x")
    shapes = {"norm_weight": (E,), "norm_bias": (E,), "weight": (3 * E, E), "bias": (3 * E,)}
    for (name, shape), given in zip(shapes.items(), (norm_weight, norm_bias, weight, bias), strict=True):
        if given is None:
            raise ValueError(f"temporal_block: {name} is None; give zeros {list(shape)} where a layer has no bias")
        if tuple(given.shape) != shape:
            raise ValueError(
                f"temporal_block: {name} {tuple(given.shape)} must be {list(shape)}, for x of E={E} channels"
            )
        if given.dtype != x.dtype or given.device != x.device:
            raise ValueError(
                f"temporal_block: x is {x.dtype} on {x.device}, {name} {given.dtype} on {given.device}; "
                "bring all to one dtype and device, or use autocast"
            )
