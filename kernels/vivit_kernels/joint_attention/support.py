"""What each backend of joint_attention can run."""

from .._attention.support import torch_refusals

SUPPORT = {"torch": torch_refusals}
