"""What training minimises: cross entropy with label smoothing, of one head or of two, of plain or of mixed labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .augment import mixed
from .config import ViViTConfig


def heads(logits: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A model's answer as one tensor `[B, classes]` per head."""
    return (logits,) if isinstance(logits, Tensor) else tuple(logits)


def targets(label: Tensor, sizes: tuple[int, ...], weight: float | None = None) -> tuple[Tensor, ...]:
    """Per head: class numbers `[B]`, or with mixup's weight `[B, classes]`, one-hot rows mixed."""
    columns = label.reshape(len(label), -1).unbind(1)  # [B] for each head
    if weight is None:
        return columns
    return tuple(mixed(F.one_hot(c, size).float(), weight) for c, size in zip(columns, sizes, strict=True))


def classification(logits: Tensor | Sequence[Tensor], wanted: Sequence[Tensor], smoothing: float = 0.0) -> Tensor:
    """Mean over heads and examples of -sum(y * log softmax), y * (1-a) + a/K in place of y (Scenic's order: mixup, then
    smoothing). wanted: as `targets` gives."""
    losses = [
        F.cross_entropy(x.float(), y, label_smoothing=smoothing) for x, y in zip(heads(logits), wanted, strict=True)
    ]
    return torch.stack(losses).mean() if len(losses) > 1 else losses[0]


def normalised(video: Tensor, config: ViViTConfig) -> Tensor:
    """uint8 `[B, F, Y, X, C]` -> float, as the model does it with uint8; for mixtures, which bytes cannot hold."""
    mean, std = (
        torch.tensor(v, dtype=torch.float32, device=video.device) for v in (config.pixel_mean, config.pixel_std)
    )
    return (video.float() / 255 - mean) / std


def pair_scores(logits: Sequence[Tensor]) -> Tensor:
    """Two heads -> `[B, first * second]`: products of their softmaxes, the first head slowest (Scenic)."""
    first, second = (x.float().softmax(-1) for x in logits)
    return (first[:, :, None] * second[:, None, :]).flatten(1)
