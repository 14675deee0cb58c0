"""Registers vivit_kernels::joint_attention_fwd and _bwd; what they run is chosen by the backend's name."""

from .._attention.registration import register


def _flops(q: tuple, k: tuple, _: int) -> int:
    B, N, H, D = q
    return 4 * B * H * N * k[1] * D


register("joint_attention", __package__ or "", _flops)
