"""The public functions factorized_attention, spatial_attention and temporal_attention."""

from __future__ import annotations

from torch import Tensor

from .._attention.call import call
from .._attention.options import Rotary, autocast, check_options, check_qkv
from . import op  # noqa: F401  registers torch.ops.vivit_kernels.factorized_attention_fwd
from .reference import factorized_attention as defined
from .support import SUPPORT, decide, order  # noqa: F401  decide: for explain()


def factorized_attention(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    temporal_heads: int,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    rotary: Rotary | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention along time for the first `temporal_heads` heads, within the frame for the others, on the grid in place.

    Equivalent to (without the options; h < temporal_heads on the left, the other heads on the right)

        s = einsum("btshd,bushd->bshtu", q, k) * scale          s = einsum("btshd,btzhd->bthsz", q, k) * scale
        o = einsum("bshtu,bushd->btshd", softmax(s, -1), v)     o = einsum("bthsz,btzhd->btshd", softmax(s, -1), v)

    q, k, v: `[B, T, S, H, D]`, any strides but a unit last one; or q alone, packed `[B, T, S, 3, H, D]`, read in place.
        fp16, bf16, fp32 or fp64. Differentiable in all three.
    temporal_heads: 0 is spatial attention, H temporal attention, H/2 model 4 of ViViT.
    key_mask: bool `[B, T, S]`, True may be attended. A query with no key left gives 0 and zero gradients.
    rotary: (cos, sin), fp32 `[T, S, D/2]` or `[T*S, D/2]`; `vivit_kernels.rotary_tables` makes them.
    scale, dropout_p, seed, softcap, backend: as for `joint_attention`.

    Returns `[B, T, S, H, D]`, contiguous, in q's dtype. Raises ValueError for shapes, dtypes or options that do not
    fit, NotImplementedError, with every reason, when no backend can run the call, or a second derivative is
    asked for outside of torch.func.
    Source: ViViT (arXiv 2103.15691) section 3.3, models 2, 3 (equations 4 to 6) and 4 (equation 7; there the spatial
    heads come first, in the published code the temporal ones, as here).

        o = factorized_attention(qkv.view(B, T, S, 3, H, D), temporal_heads=H // 2)
    """
    q, k, v = autocast(q, k, v)
    q_view, k_view, _ = check_qkv("factorized_attention", "B T S H D", q, k, v)
    _, T, S, H, _ = q_view.shape
    if k_view.shape != q_view.shape:
        raise ValueError(
            f"factorized_attention: q {tuple(q_view.shape)} and k {tuple(k_view.shape)} must lie on one token grid; "
            "joint_attention takes other lengths"
        )
    if isinstance(temporal_heads, float) or not 0 <= temporal_heads <= H:
        raise ValueError(
            f"factorized_attention: temporal_heads={temporal_heads} must lie between 0 (all spatial) "
            f"and H={H} (all temporal), a whole number"
        )
    options = check_options(
        "factorized_attention", q_view, T * S, (T, S),
        scale=scale, key_mask=key_mask, dropout_p=dropout_p, seed=seed, rotary=rotary, softcap=softcap,
    )  # fmt: skip

    def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return defined(q, k, v, temporal_heads, options).contiguous()

    shape = tuple(q_view.shape)
    return call("factorized_attention", SUPPORT, order, backend, shape, (q, k, v), options, definition, temporal_heads)


def spatial_attention(q: Tensor, k: Tensor | None = None, v: Tensor | None = None, **options) -> Tensor:
    """Attention within each frame: `factorized_attention` with `temporal_heads=0`.

    Same inputs, options and errors.

    o = spatial_attention(qkv.view(B, T, S, 3, H, D))
    """
    return factorized_attention(q, k, v, temporal_heads=0, **options)


def temporal_attention(q: Tensor, k: Tensor | None = None, v: Tensor | None = None, **options) -> Tensor:
    """Attention along time at each position: `factorized_attention` with `temporal_heads=H`.

    Same inputs, options and errors.

    o = temporal_attention(qkv.view(B, T, S, 3, H, D))
    """
    return factorized_attention(q, k, v, temporal_heads=q.shape[-2] if q.dim() > 1 else 0, **options)
