"""Top-1, top-5 and the confusion matrix of a data set; the most probable classes of one video."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import losses
from .annotations import Classes, Heads
from .data import ClipSpec, Dataset, Problems, evaluation_batches, evaluation_views
from .model import ViViT
from .parallel import ALONE, World, settled
from .progress import Bar
from .trouble import loader_explained, names
from .video import open_video


@dataclass
class HeadResult:
    """One head: confusion[i, j] counts clips of class i taken for class j."""

    classes: tuple[str, ...]
    confusion: Tensor
    top5_right: int = 0

    @classmethod
    def of(cls, classes: tuple[str, ...]) -> HeadResult:
        return cls(classes, torch.zeros(len(classes), len(classes), dtype=torch.long))

    def add(self, logits: Tensor, label: Tensor) -> None:  # [B, classes], [B]
        best = logits.topk(min(5, logits.shape[-1]), -1).indices  # [B, 5]
        self.confusion.index_put_((label, best[:, 0]), torch.ones_like(label), accumulate=True)
        self.top5_right += int((best == label[:, None]).any(-1).sum())

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


@dataclass
class Result:
    """Of one head, or of two and of the pair: an action is right when both its parts are. A video counts once, its
    views' logits averaged."""

    heads: dict[str, HeadResult]  # by name; "" for the only one
    action_right: int = 0
    action_top5_right: int = 0
    loss_sum: float = 0.0
    problems: Problems = field(default_factory=Problems)

    @classmethod
    def of(cls, classes: Classes) -> Result:
        named = classes._asdict() if isinstance(classes, Heads) else {"": classes}
        return cls({name: HeadResult.of(names) for name, names in named.items()})

    def add(self, logits: tuple[Tensor, ...], label: Tensor) -> None:
        """logits: `[B, classes]` per head; label: `[B]`, or `[B, 2]`."""
        wanted = losses.targets(label, tuple(x.shape[-1] for x in logits))
        for head, x, y in zip(self.heads.values(), logits, wanted, strict=True):
            head.add(x, y)
        if len(logits) == 2:
            best = losses.pair_scores(logits).topk(min(5, logits[0].shape[-1] * logits[1].shape[-1]), -1).indices
            right = best == (wanted[0] * logits[1].shape[-1] + wanted[1])[:, None]  # [B, 5]
            self.action_right += int(right[:, 0].sum())
            self.action_top5_right += int(right.any(-1).sum())
        self.loss_sum += losses.classification(logits, wanted).item() * len(label)

    def add_up(self, world: World) -> None:
        """Of the processes of a run: each read other videos, none twice."""
        for head in self.heads.values():
            head.confusion = world.added(head.confusion)
        names = ("action_right", "action_top5_right")
        heads = list(self.heads.values())
        counts = torch.tensor([*(h.top5_right for h in heads), *(getattr(self, name) for name in names)])
        *of_heads, self.action_right, self.action_top5_right = world.added(counts).tolist()
        for head, right in zip(heads, of_heads, strict=True):
            head.top5_right = right
        self.loss_sum = world.added(torch.tensor(self.loss_sum, dtype=torch.float64)).item()
        for pairs in world.gathered(self.problems.pairs()):
            self.problems.add(pairs)

    @property
    def confusion(self) -> Tensor:
        """Of the (first) head."""
        return next(iter(self.heads.values())).confusion

    @property
    def clips(self) -> int:
        return int(self.confusion.sum())

    def numbers(self) -> dict[str, Any]:
        """val_top1, val_top5 (of the action where there are two heads, each head's beside it), val_loss, val_clips."""
        count = max(self.clips, 1)
        found: dict[str, Any] = {}
        for name, head in self.heads.items():
            prefix = f"val_{name}_" if name else "val_"
            found[f"{prefix}top1"] = int(head.confusion.trace()) / count
            found[f"{prefix}top5"] = head.top5_right / count
        if len(self.heads) > 1:
            found |= {"val_top1": self.action_right / count, "val_top5": self.action_top5_right / count}
        return {**found, "val_loss": self.loss_sum / count, "val_clips": self.clips}

    def summary(self) -> str:
        numbers = self.numbers()
        names = ["action", *self.heads] if len(self.heads) > 1 else [""]
        parts = []
        for name in names:
            prefix = f"val_{name}_" if name and name != "action" else "val_"
            words = f"top-1 {numbers[prefix + 'top1']:.1%}  top-5 {numbers[prefix + 'top5']:.1%}"
            parts.append(f"{name} {words}" if name else words)
        return f"{'   '.join(parts)}  of {self.clips} videos"

    def table(self, most: int = 20) -> str:
        tables = [f"{name}\n{head.table(most)}" if name else head.table(most) for name, head in self.heads.items()]
        return "\n\n".join(tables)


@torch.no_grad()
def logits_of(model: ViViT, video: Tensor, autocast: bool = False) -> tuple[Tensor, ...]:
    """uint8 `[B, V, F, Y, X, C]` -> `[B, classes]` per head: raw logits averaged over the views (Scenic)."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        logits = model(video.flatten(0, 1).to(device, non_blocking=True), layout="BFYXC")
    return tuple(x.float().unflatten(0, video.shape[:2]).mean(1) for x in losses.heads(logits))


def evaluate(
    model: ViViT,
    dataset: Dataset,
    batch: int,
    device: torch.device,
    autocast: bool = False,
    workers: int = 0,
    show: str = "",
    timeout: float = 0,
    world: World = ALONE,
) -> Result:
    """`show`: the name of a progress bar, none if empty. Files that cannot be read are left out and reported.

    world: the processes that share the work; each has the result of all.
    """
    was_training = model.training
    model.to(device).eval()
    result = Result.of(dataset.classes)
    result.problems.note = getattr(dataset, "note", "")
    mine = range(world.data, len(dataset), world.shares)
    each = max(batch // world.shares, 1)
    rounds = -(-len(dataset) // (world.shares * each))  # of the process that has the most
    with Bar(show, len(mine), quiet=not show) as bar:
        batches = iter(evaluation_batches(dataset, each, workers, timeout, mine))
        for number in range(rounds):
            reading = [(0, i) for i in mine[number * each : (number + 1) * each]]
            with loader_explained("evaluation", names(dataset, reading)):
                part = next(batches, None)
            result.problems.add(part.problems if part else [])
            if part is None or not len(part.label):
                if world.together:  # the others' weights, or parts of clips, pass through this process
                    logits_of(model, _nothing(model), autocast)
                continue
            logits = logits_of(model, part.video, autocast)
            result.add(tuple(x.cpu() for x in logits), part.label)
            bar.advance(len(part.label), steps=len(part.label))
        result.add_up(world)
    settled(model)
    model.train(was_training)
    return result


def _nothing(model: ViViT) -> Tensor:
    config = model.config
    return torch.zeros(1, 1, config.frames, config.height, config.width, config.channels, dtype=torch.uint8)


class Prediction(NamedTuple):
    top: list[tuple[str, float]]  # (class, probability), most probable first
    clip: Tensor  # uint8 [F, Y, X, C]: the central view
    file: str


def predict(model: ViViT, path: str, classes: Classes, spec: ClipSpec, k: int = 5) -> Prediction:
    """The k most probable classes of a video file, its views' logits averaged."""
    video = open_video(path, spec.decoder, spec.fps)
    try:
        views = torch.from_numpy(evaluation_views(video, spec).copy())
    finally:
        video.close()
    return predict_clip(model, views, classes, str(path), k)


def predict_clip(model: ViViT, views: Tensor, classes: Classes, file: str, k: int = 5) -> Prediction:
    """views: uint8 `[V, F, Y, X, C]`. Two heads: the most probable pairs, as `verb noun`."""
    model.eval()
    logits = logits_of(model, views[None])
    if len(logits) == 2:
        nouns, verbs = classes if isinstance(classes, Heads) else (_numbers(logits[0]), _numbers(logits[1]))
        classes = tuple(f"{verb} {noun}" for noun in nouns for verb in verbs)
        probabilities = losses.pair_scores(logits)[0].cpu()
    else:
        probabilities = logits[0][0].softmax(-1).cpu()
    if len(classes) != len(probabilities):
        classes = _numbers(logits[0])
    values, indices = probabilities.topk(min(k, len(classes)))
    top = [(str(classes[i]), p) for i, p in zip(indices.tolist(), values.tolist(), strict=True)]
    return Prediction(top, views[len(views) // 2], file)


def _numbers(logits: Tensor) -> tuple[str, ...]:
    return tuple(f"class {i}" for i in range(logits.shape[-1]))
