"""Registers vivit_kernels::joint_attention_fwd and _bwd; what they run is chosen by the backend's name."""

from .._attention.registration import register

register("joint_attention", __package__ or "")
