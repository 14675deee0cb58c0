"""What each backend of factorized_attention can run."""

from .._attention.support import torch_refusals

SUPPORT = {"torch": torch_refusals}
