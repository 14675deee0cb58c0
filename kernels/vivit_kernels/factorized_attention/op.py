"""Registers vivit_kernels::factorized_attention_fwd and _bwd; what they run is chosen by the backend's name."""

from .._attention.registration import register


def _flops(q: tuple, _: tuple, temporal_heads: int) -> int:
    B, T, S, H, D = q
    return 4 * B * T * S * D * (temporal_heads * T + (H - temporal_heads) * S)


def _key_lengths(q: tuple, k: tuple, temporal_heads: int) -> tuple:
    _, T, S, H, _ = q
    return (T, S) if 0 < temporal_heads < H else (T,) if temporal_heads else (S,)


register("factorized_attention", __package__ or "", _flops, _key_lengths)
