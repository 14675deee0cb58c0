"""Top-1, top-5 and the confusion matrix of a data set; the most probable classes of one video."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import ClipSpec, Dataset, Problems, evaluation_batches, evaluation_views
from .model import ViViT
from .progress import Bar
from .video import open_video


@dataclass
class Result:
    """confusion[i, j]: clips of class i taken for class j. A video counts once, its views' logits averaged."""

    classes: tuple[str, ...]
    confusion: Tensor
    top5_right: int = 0
    loss_sum: float = 0.0
    problems: Problems = field(default_factory=Problems)

    @property
    def clips(self) -> int:
        return int(self.confusion.sum())

    def numbers(self) -> dict[str, Any]:
        count = max(self.clips, 1)
        return {
            "val_top1": int(self.confusion.trace()) / count,
            "val_top5": self.top5_right / count,
            "val_loss": self.loss_sum / count,
            "val_clips": self.clips,
        }

    def table(self, most: int = 20) -> str:
        """The confusion matrix as text: rows are true classes, columns predictions."""
        names = [name[:12] for name in self.classes[:most]]
        width = max(len(n) for n in [*names, "true \\ told"]) + 1
        lines = ["true \\ told".ljust(width) + "".join(n.rjust(width) for n in names)]
        for name, row in zip(names, self.confusion[:most, :most].tolist(), strict=True):
            lines.append(name.ljust(width) + "".join(str(v).rjust(width) for v in row))
        if len(self.classes) > most:
            lines.append(f"(the first {most} of {len(self.classes)} classes)")
        return "\n".join(lines)


@torch.no_grad()
def logits_of(model: ViViT, video: Tensor, autocast: bool = False) -> Tensor:
    """uint8 `[B, V, F, Y, X, C]` -> `[B, classes]`: raw logits averaged over the views (Scenic)."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        logits = model(video.flatten(0, 1).to(device), layout="BFYXC")
    return logits.float().unflatten(0, video.shape[:2]).mean(1)


def evaluate(
    model: ViViT,
    dataset: Dataset,
    batch: int,
    device: torch.device,
    autocast: bool = False,
    workers: int = 0,
    show: str = "",
) -> Result:
    """`show`: the name of a progress bar, none if empty. Files that cannot be read are left out and reported."""
    was_training = model.training
    model.to(device).eval()
    K = len(dataset.classes)
    result = Result(dataset.classes, torch.zeros(K, K, dtype=torch.long))
    with Bar(show, len(dataset), quiet=not show) as bar:
        for part in evaluation_batches(dataset, batch, workers):
            result.problems.add(part.problems)
            if not len(part.label):
                continue
            logits = logits_of(model, part.video, autocast).cpu()
            best = logits.topk(min(5, logits.shape[-1]), -1).indices  # [B, 5]
            result.confusion.index_put_((part.label, best[:, 0]), torch.ones_like(part.label), accumulate=True)
            result.top5_right += int((best == part.label[:, None]).any(-1).sum())
            result.loss_sum += F.cross_entropy(logits, part.label, reduction="sum").item()
            bar.advance(len(part.label), steps=len(part.label))
    model.train(was_training)
    return result


class Prediction(NamedTuple):
    top: list[tuple[str, float]]  # (class, probability), most probable first
    clip: Tensor  # uint8 [F, Y, X, C]: the central view
    file: str


def predict(model: ViViT, path: str, classes: tuple[str, ...], spec: ClipSpec, k: int = 5) -> Prediction:
    """The k most probable classes of a video file, its views' logits averaged."""
    video = open_video(path, spec.decoder)
    try:
        views = torch.from_numpy(evaluation_views(video, spec).copy())
    finally:
        video.close()
    return predict_clip(model, views, classes, str(path), k)


def predict_clip(model: ViViT, views: Tensor, classes: tuple[str, ...], file: str, k: int = 5) -> Prediction:
    """views: uint8 `[V, F, Y, X, C]`."""
    model.eval()
    probabilities = logits_of(model, views[None])[0].softmax(-1).cpu()
    if len(classes) != len(probabilities):
        classes = tuple(f"class {i}" for i in range(len(probabilities)))
    values, indices = probabilities.topk(min(k, len(classes)))
    top = [(classes[i], p) for i, p in zip(indices.tolist(), values.tolist(), strict=True)]
    return Prediction(top, views[len(views) // 2], file)
