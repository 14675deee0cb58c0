"""PyTorch's own fused attention on groups of long sequences: one of the two engines of backend `torch`.

On the CPU the two halves of `scaled_dot_product_attention` are called by name, so that a forward keeps o and lse for
its backward; elsewhere the backward runs the forward again under autograd. The other engine, blockwise.py, takes what
this one cannot express, and short sequences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .options import Options

# Below, blockwise.py is as fast and more accurate: this engine's backward takes delta from the rounded o, which cancels
# badly over a few keys (2 keys, scores of size 16: error 1.4 times the budget in float16, 0.1 times blockwise).
SHORTEST = 128
_GRID_LIMIT = 65_535  # PyTorch's CUDA kernels put sequences x heads in a grid dimension of this size


def takes(keys: int, seed: Tensor | None, softcap: float) -> bool:
    """Long sequences without dropout by counter and soft-cap, which scaled_dot_product_attention does not know."""
    return keys >= SHORTEST and seed is None and not softcap


def keeps_output(device: torch.device, keys: int, seed: Tensor | None, softcap: float) -> bool:
    """Does the backward of this call read the forward's o and lse?"""
    return device.type == "cpu" and takes(keys, seed, softcap)


def _bias(mask: Tensor | None, q: Tensor, k: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Additive mask `[G, 1, Q, K]` (no memory per query), and `[G, 1, 1, 1]` True where a sequence has no key at all.

    A sequence without keys attends to all of them, and its output and gradient are set to zero."""
    if mask is None:
        return None, None
    none = ~mask.any(-1, keepdim=True)  # [G, 1]
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~(mask | none), float("-inf"))
    return bias[:, None, None, :].expand(-1, 1, q.shape[2], k.shape[2]), none[:, :, None, None]


def forward(q: Tensor, k: Tensor, v: Tensor, o: Tensor, mask: Tensor | None, options: Options) -> Tensor | None:
    """Writes o `[G, H, Q, D]` for q `[G, H, Q, D]`, k, v `[G, H, K, D]`, mask bool `[G, K]`.

    Returns lse `[G, H, Q]` if it is kept for backward."""
    bias, none = _bias(mask, q, k)
    lse = None
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=bias, scale=options.scale
        )
    else:
        out = _chunked(q, k, v, bias, options.scale)
    o.copy_(out if none is None else out.masked_fill(none, 0.0))
    return lse


def _chunked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    step = max(1, _GRID_LIMIT // q.shape[1])
    parts = [slice(i, i + step) for i in range(0, q.shape[0], step)]
    outputs = [
        F.scaled_dot_product_attention(q[g], k[g], v[g], None if bias is None else bias[g], scale=scale) for g in parts
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def backward(do, q, k, v, o, lse, dq, dk, dv, mask: Tensor | None, options: Options) -> None:
    """Writes dq, dk, dv for the shapes of `forward`; o and lse are its results (unused where they are not kept)."""
    bias, none = _bias(mask, q, k)
    if none is not None:
        do = do.masked_fill(none, 0.0)
    if q.device.type == "cpu":
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, o, lse, 0.0, False, attn_mask=bias, scale=options.scale
        )
    else:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            gradients = torch.autograd.grad(_chunked(leaves[0], leaves[1], leaves[2], bias, options.scale), leaves, do)
    for written, gradient in zip((dq, dk, dv), gradients, strict=True):
        written.copy_(gradient)
