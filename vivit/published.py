"""The weights that were published for ViViT, how they were evaluated, and what they reached."""

from __future__ import annotations

from typing import NamedTuple

from .config import ViViTConfig


class Published(NamedTuple):
    """One row of Scenic's table of checkpoints; top1 in percent, of actions for two heads."""

    name: str
    dataset: str
    attention: str
    embedding: int
    temporal_depth: int
    classes: int  # of all heads together
    top1: float
    views: tuple[int, int]
    stride: int
    fps: float  # of the decoded clips; 0: the files' own
    split: tuple[int, int] | None = None  # the heads, where there are two

    def is_of(self, config: ViViTConfig) -> bool:
        mine = (self.attention, self.embedding, self.temporal_depth, self.classes)
        return mine == (config.attention, config.embedding, config.temporal_depth, sum(config.head_sizes))


SCENIC = (
    Published("ViViT-B/16x2", "Kinetics-400", "joint", 768, 0, 400, 79.9, (4, 3), 2, 25.0),
    Published("ViViT-B/16x2 FE", "Kinetics-400", "factorized_encoder", 768, 4, 400, 78.4, (4, 3), 2, 25.0),
    Published("ViViT-L/16x2 FE", "Kinetics-400", "factorized_encoder", 1024, 24, 400, 80.3, (4, 3), 2, 25.0),
    Published("ViViT-L/16x2 FE", "Kinetics-600", "factorized_encoder", 1024, 24, 600, 81.6, (4, 3), 2, 25.0),
    Published("ViViT-L/16x2 FE", "EPIC-Kitchens", "factorized_encoder", 1024, 4, 397, 43.6, (4, 1), 1, 0.0, (300, 97)),
)  # fmt: skip


def find(config: ViViTConfig) -> Published | None:
    """The published model of this size; Hugging Face's google/vivit-b-16x2-kinetics400 is Scenic's first."""
    return next((row for row in SCENIC if row.is_of(config)), None)
