"""Clips for training and evaluation: a folder per class, a list file, or the annotation files of annotations.py; uint8
`[F, Y, X, C]`, never normalised here.

What a clip holds depends on (seed, epoch, index) alone: a resumed run sees the same clips with any number of workers.
The rule for bad files: in training the next readable file of the list takes the place of one that gives no frames; in
evaluation it is left out of the result. Frames that cannot be decoded repeat the last good one, short videos go on from
their first frame. Videos of a rate that varies are read frame by frame, or by the clock with `ClipSpec.fps`. All of it
is counted in `Problems` and reported at the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from . import annotations
from .annotations import Classes, DataError, Items, Label, Listing, Source
from .augment import NOTHING, AugmentConfig, augment
from .images import read_resized
from .sampling import central_start, frame_indices, random_crop, random_start, test_crops, test_starts
from .video import EXTENSIONS, Video, VideoError, open_video


class Sample(NamedTuple):
    video: Tensor | None  # uint8 [V, F, Y, X, C]: V views; None: the file gives no frames
    label: Label  # a pair for two heads
    problems: list[tuple[str, str]]  # (file, what was wrong)


class Batch(NamedTuple):
    video: Tensor  # uint8 [B, V, F, Y, X, C]
    label: Tensor  # [B], or [B, 2] for two heads
    problems: list[tuple[str, str]]


class Dataset(Protocol):
    """`dataset[epoch, index]` is a training clip, `dataset[None, index]` what is evaluated."""

    @property
    def classes(self) -> Classes: ...
    def __len__(self) -> int: ...
    def __getitem__(self, key: tuple[int | None, int]) -> Sample: ...


SHORT = "shorter than a clip"


@dataclass
class Problems:
    """What was wrong with which file, each counted once; videos that are merely short are counted apart."""

    files: dict[str, str] = field(default_factory=dict)
    short: dict[str, str] = field(default_factory=dict)
    note: str = ""  # what the data set's own list had to say: videos that are not there

    def add(self, problems: list[tuple[str, str]]) -> None:
        for path, what in problems:
            (self.short if what == SHORT else self.files).setdefault(path, what)

    def pairs(self) -> list[tuple[str, str]]:
        """What `add` of another takes."""
        return [*self.files.items(), *self.short.items()]

    def __str__(self) -> str:
        short = f"{len(self.short)} video(s) are {SHORT}: they go on from their first frame" if self.short else ""
        return "\n".join(part for part in (self.note, short, self._broken()) if part)

    def _broken(self) -> str:
        if not self.files:
            return ""
        lines = [f"  {what}" if path in what else f"  {path}: {what}" for path, what in list(self.files.items())[:10]]
        more = [f"  ... and {len(self.files) - 10} more"] if len(self.files) > 10 else []
        return "\n".join([f"{len(self.files)} file(s) had problems:", *lines, *more])


@dataclass(frozen=True)
class ClipSpec:
    """Shape of a clip and how it is cut from a video."""

    frames: int
    height: int
    width: int
    stride: int = 2
    short_side: int = 256
    flip: bool = True
    views: tuple[int, int] = (1, 1)  # evaluation: (clips along time, crops)
    decoder: str = "pyav"
    fps: float = 0.0  # frames by the clock; 0: as they are in the file
    resize: str = "decoder"  # one of images.RESIZES
    augment: AugmentConfig = NOTHING
    augment_here: bool = True  # pixels are augmented by the loader; no: by whoever trains, with `augment_rng`


def augment_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator that decides how this clip's pixels are augmented, wherever that is done."""
    return np.random.default_rng((seed, epoch, index, 0x4155))


class VideoClips:
    """Clips of a list of (file or segment of one, label)."""

    def __init__(self, items: Items, classes: Classes, spec: ClipSpec, seed: int = 0, note: str = ""):
        if not items:
            raise DataError("no videos to take clips from")
        self.items, self.classes, self.spec, self.seed, self.note = items, classes, spec, seed, note

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: tuple[int | None, int]) -> Sample:
        epoch, index = key
        problems: list[tuple[str, str]] = []
        for attempt in range(1 if epoch is None else len(self)):
            path, label = self.items[(index + attempt) % len(self)]
            try:
                views = self._views(path, epoch, index, problems)
            except VideoError as error:
                problems.append((str(path), str(error)))
                continue
            return Sample(torch.from_numpy(np.ascontiguousarray(views)), label, problems)
        return Sample(None, self.items[index][1], problems)

    def _views(self, path: Source, epoch: int | None, index: int, problems: list[tuple[str, str]]) -> np.ndarray:
        spec, video = self.spec, open_video(path, self.spec.decoder, self.spec.fps)
        try:
            if epoch is None:
                views = evaluation_views(video, spec)
            else:
                rng = np.random.default_rng((self.seed, epoch, index))
                views = training_clip(video, spec, rng)[None]
                if spec.augment_here and spec.augment.of_pixels:
                    clip = torch.from_numpy(np.ascontiguousarray(views[0]))
                    views = augment(clip, spec.augment, augment_rng(self.seed, epoch, index)).numpy()[None]
            if video.frames <= (spec.frames - 1) * spec.stride:
                problems.append((str(path), SHORT))
            if video.damaged:
                problems.append((str(path), "frames that could not be decoded were replaced by their neighbours"))
            return views
        finally:
            video.close()


def training_clip(video: Video, spec: ClipSpec, rng: np.random.Generator) -> np.ndarray:
    """`[F, Y, X, C]`: random start, random scale and crop, mirrored half of the time."""
    start = random_start(video.frames, spec.frames, spec.stride, rng)
    size, crop_size, scales = (video.height, video.width), (spec.height, spec.width), spec.augment.scale_jitter
    crop = random_crop(size, crop_size, spec.short_side, spec.flip, rng, scales)
    indices = frame_indices(start, spec.frames, spec.stride, video.frames)
    clip = read_resized(video, indices, crop.rows, crop.columns, spec.resize)
    clip = clip[:, crop.top : crop.top + spec.height, crop.left : crop.left + spec.width]
    return clip[:, :, ::-1] if crop.flip else clip


def evaluation_views(video: Video, spec: ClipSpec) -> np.ndarray:
    """`[V, F, Y, X, C]`: clips at equal distances, of each the centre or three crops; crop-major as in Scenic."""
    clips, crops = spec.views
    starts = test_starts(video.frames, spec.frames, spec.stride, clips) if clips > 1 else [_central(video, spec)]
    boxes = test_crops((video.height, video.width), (spec.height, spec.width), spec.short_side, crops)
    indices = [frame_indices(start, spec.frames, spec.stride, video.frames) for start in starts]
    read = [read_resized(video, each, boxes[0].rows, boxes[0].columns, spec.resize) for each in indices]
    return np.stack(
        [clip[:, b.top : b.top + spec.height, b.left : b.left + spec.width] for b in boxes for clip in read]
    )


def _central(video: Video, spec: ClipSpec) -> int:
    return central_start(video.frames, spec.frames, spec.stride)


# ---- what is in a data set ----


def read_folder(root: Path) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    """A folder per class, `root/<class>/**/<video>`: (file, label) and the class names, both sorted."""
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    items = [
        (path, label)
        for label, folder in enumerate(folders)
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in EXTENSIONS and not path.is_dir()  # a pipe or a broken link is reported when read
    ]
    if not items:
        raise DataError(
            f"{root}: no videos in it. Expected a folder per class, {root.name}/<class>/<video>, "
            f"videos ending in {', '.join(sorted(EXTENSIONS))}"
        )
    return items, tuple(folder.name for folder in folders)


def read_list(file: Path, classes: tuple[str, ...] = ()) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    """A list file, `path label` per line: paths relative to the file, may hold spaces; `#` begins a comment line.

    Labels are names, or numbers 0, 1, ... `classes` fixes the names: those of training, for a validation list.
    """
    rows: list[tuple[Path, str]] = []
    for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        path, _, label = line.rpartition(" ") if " " in line else line.rpartition("\t")
        if not path:
            raise DataError(f"{file}:{number}: {line!r} is not `path label`")
        if classes and label not in classes:
            raise DataError(f"{file}:{number}: label {label!r} is none of the classes {', '.join(classes[:20])}")
        rows.append((file.parent / path.strip(), label))
    if not rows:
        raise DataError(f"{file}: no `path label` line in it")
    if not classes:
        names = {label for _, label in rows}
        numbers = all(name.isdigit() for name in names)
        classes = tuple(map(str, range(max(map(int, names)) + 1))) if numbers else tuple(sorted(names))
    index = {name: i for i, name in enumerate(classes)}
    return [(path, index[str(int(label)) if label not in index else label]) for path, label in rows], classes


def read_items(path: str | Path, classes: tuple[str, ...] = ()) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    path = Path(path)
    if path.is_dir():
        items, found = read_folder(path)
        unknown = [name for name in found if classes and name not in classes]
        if unknown:
            raise DataError(f"{path}: class {unknown[0]!r} was not trained; the classes are {', '.join(classes[:20])}")
        index = {name: i for i, name in enumerate(classes or found)}
        return [(file, index[found[label]]) for file, label in items], classes or found
    if path.is_file():
        return read_list(path, classes)
    raise DataError(f"{path}: no such folder (one sub-folder per class) or list file (`path label` per line)")


def listing(path: str | Path, videos: str = "", kind: str = "auto", labels: str = "", classes: Classes = ()) -> Listing:
    """What any data set holds: a folder per class, a list file, or an annotation file with its folder of `videos`."""
    file = Path(path)
    if kind == "auto":
        kind = annotations.detect(file) if file.is_file() else "folder"
    if kind in annotations.KINDS:
        return annotations.read(file, videos, kind, labels, classes)
    if kind != ("folder" if file.is_dir() else "list") and file.exists():
        raise DataError(f"data.format={kind!r}, but {file} is a {'folder' if file.is_dir() else 'file'}")
    if isinstance(classes, annotations.Heads):
        raise DataError(f"{file}: a folder per class or a list file has one label a video, the model has two heads")
    return Listing(*read_items(file, classes), [])


def split(items: Items, fraction: float) -> tuple[Items, Items]:
    """(training, validation): of each class, the `fraction` whose file names hash lowest; at least one if it has two.

    By name, so that a file stays on its side when others are added.
    """
    held: set[Source] = set()
    by_label: dict[Label, list[Source]] = {}
    for path, label in items:
        by_label.setdefault(label, []).append(path)
    for paths in by_label.values():
        files = sorted(paths, key=lambda p: hashlib.sha256(p.name.encode()).digest())
        held.update(files[: max(1, round(fraction * len(files))) if len(files) > 1 else 0])
    return [i for i in items if i[0] not in held], [i for i in items if i[0] in held]


def find_splits(root: str | Path, fraction: float):
    """Items of training and validation, and the classes: sub-folders or lists train and val of `root`, else a split."""
    root = Path(root)
    for first, second in (("train", "val"), ("train", "test"), ("train.txt", "val.txt"), ("train.txt", "test.txt")):
        if (root / first).exists() and (root / second).exists():
            training, classes = read_items(root / first)
            return training, read_items(root / second, classes)[0], classes
    items, classes = read_items(root)
    return *split(items, fraction), classes


# ---- batches ----


class Order:
    """The keys (epoch, index) of every batch from step `first` on; a permutation per epoch, drawn from the seed."""

    def __init__(self, count: int, batch: int, epochs: int, seed: int, first: int = 0):
        self.count, self.batch, self.epochs, self.seed, self.first = count, min(batch, count), epochs, seed, first
        self.steps_per_epoch = max(count // batch, 1)

    def __len__(self) -> int:
        return self.epochs * self.steps_per_epoch - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.first, self.epochs * self.steps_per_epoch):
            epoch, within = divmod(step, self.steps_per_epoch)
            if within == 0 or step == self.first:
                order = np.random.default_rng((self.seed, epoch)).permutation(self.count)
            yield [(epoch, int(i)) for i in order[within * self.batch : (within + 1) * self.batch]]


class Share:
    """The part of each batch of `order` that `part` takes."""

    def __init__(self, order: Order, part: Callable[[list[tuple[int, int]]], list[tuple[int, int]]]):
        self.order, self.part = order, part

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return map(self.part, self.order)


def collate(samples: list[Sample]) -> Batch:
    problems = [problem for sample in samples for problem in sample.problems]
    good = [sample for sample in samples if sample.video is not None]
    video = torch.stack([s.video for s in good if s.video is not None]) if good else torch.empty(0)
    return Batch(video, torch.tensor([s.label for s in good], dtype=torch.long), problems)


def training_batches(dataset: Dataset, order: Order | Share, workers: int, timeout: float = 0) -> DataLoader:
    return _batches(dataset, order, workers, timeout)


def evaluation_batches(
    dataset: Dataset, batch: int, workers: int, timeout: float = 0, indices: Iterable[int] | None = None
) -> DataLoader:
    """indices: which of the data set's; None: all."""
    keys = [(None, i) for i in (range(len(dataset)) if indices is None else indices)]
    return _batches(dataset, [keys[i : i + batch] for i in range(0, len(keys), batch)], workers, timeout)


def _batches(dataset: Dataset, keys: Any, workers: int, timeout: float) -> DataLoader:
    """timeout: seconds that a batch of a worker may take; 0: for ever."""
    return DataLoader(
        dataset,  # pyright: ignore[reportArgumentType]  # anything with __getitem__ serves
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=_one_thread,
        generator=torch.Generator(),  # its own: iterating must not move the model's random numbers
        pin_memory=torch.cuda.is_available(),
        timeout=timeout if workers else 0,
    )


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
