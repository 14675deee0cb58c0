"""Registers vivit_kernels::factorized_attention_fwd and _bwd; what they run is chosen by the backend's name."""

from .._attention.registration import register

register("factorized_attention", __package__ or "")
