"""A thin PyTorch ViViT over vivit_kernels: model, weights, data, training, evaluation."""

from .config import ViViTConfig
from .model import ViViT

__all__ = ["ViViT", "ViViTConfig"]
