"""The public function joint_attention."""

from __future__ import annotations

from torch import Tensor

from .._attention.call import call
from .._attention.options import Rotary, autocast, check_options, check_qkv
from . import op  # noqa: F401  registers torch.ops.vivit_kernels.joint_attention_fwd
from .reference import joint_attention as defined
from .support import SUPPORT, decide, order  # noqa: F401  decide: for explain()


def joint_attention(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    rotary: Rotary | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of every query to every key of its clip, in O(N) memory: no N x N matrix is kept, forward or backward.

    Equivalent to (without the options)

        s = einsum("bqhd,bkhd->bhqk", q, k) * scale
        o = einsum("bhqk,bkhd->bqhd", softmax(s, -1), v)

    q: `[B, N_q, H, D]`; k, v: `[B, N_k, H, D]`, any strides but a unit last one; or q alone, packed `[B, N, 3, H, D]`
        (q, k, v along the third dimension), read in place. fp16, bf16, fp32 or fp64. Differentiable in all three.
    scale: multiplies q.k; default 1/sqrt(D).
    key_mask: bool `[B, N_k]`, True may be attended. A query with no key left gives 0 and zero gradients.
    dropout_p: probability of dropping a pair after softmax; kept pairs are scaled by 1/(1-p). `seed`, int64 `[2]`
        (seed, offset) on q's device, decides which (see _philox.py); None draws it from PyTorch's generator.
    rotary: (cos, sin), fp32 `[N, D/2]`, rotates q and k in channel pairs (i, i + D/2) first; not differentiated.
    softcap: scores become softcap * tanh(score / softcap).
    backend: "cuda", "triton", "cpu", "torch"; "sdpa" (PyTorch's fused kernels), "flash_attn" (2, 3 or 4), "xformers";
        or None for the first that can run the call, in an order that comes from measurements (order.py). One asked for
        by name never falls back. Those of others take no key_mask, dropout or rotary, no softcap (FlashAttention 2 and
        3 do), and 16-bit dtypes on GPUs; "sdpa" runs on a CPU too, in float32 without gradients.
        Under autocast the inputs take autocast's dtype. Within forward-mode AD and torch.func's second derivatives it
        is the lines above in plain PyTorch, which keeps an N x N matrix.

    Returns `[B, N_q, H, D]`, contiguous, in q's dtype. Raises ValueError for shapes, dtypes or options that do not fit,
    NotImplementedError, with every reason, when no backend can run the call, or a second derivative is
    asked for outside of torch.func.
    Source: Vaswani et al. 2017; ViViT (arXiv 2103.15691) section 3.3, model 1; RoFormer (2104.09864) for rotary.

        o = joint_attention(qkv.view(B, N, 3, H, D))
    """
    q, k, v = autocast(q, k, v)
    q_view, k_view, _ = check_qkv("joint_attention", "B N H D", q, k, v)
    N, N_k = q_view.shape[1], k_view.shape[1]
    options = check_options(
        "joint_attention", q_view, N, (N,), key_grid=(N_k,),
        scale=scale, key_mask=key_mask, dropout_p=dropout_p, seed=seed, rotary=rotary, softcap=softcap,
    )  # fmt: skip

    def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return defined(q, k, v, options)

    shape = tuple(q_view.shape)
    return call("joint_attention", SUPPORT, order, backend, shape, (q, k, v), options, definition, keys=N_k)
