"""Registers vivit_kernels::factorized_attention_fwd and _bwd; what they run is chosen by the backend's name."""

from .._attention.registration import register


def _flops(q: tuple, _: tuple, temporal_heads: int) -> int:
    B, T, S, H, D = q
    return 4 * B * T * S * D * (temporal_heads * T + (H - temporal_heads) * S)


register("factorized_attention", __package__ or "", _flops)
