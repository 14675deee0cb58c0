"""What each backend of joint_attention can run."""

from .._attention.support import torch_refusals, triton_attention_refusals

SUPPORT = {"triton": triton_attention_refusals, "torch": torch_refusals}
