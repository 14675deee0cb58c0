"""`python -m vivit loader CONFIG --data ...`: clips a core makes ready, where its time goes, what workers add."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

from .augment import augment
from .data import Order, VideoClips, augment_rng, training_batches, training_clip
from .images import resize
from .video import Video, VideoError, open_video

STAGES = ("open and index", "decode", "resize", "crop and copy", "augment", "transfer")


class Speed(NamedTuple):
    """seconds: per clip, by stage, in one process. rates: workers -> clips a second of the whole loader."""

    seconds: dict[str, float]
    clips: int
    unreadable: int
    rates: dict[int, float]
    bytes: int = 0  # of a clip

    @property
    def per_core(self) -> float:
        return 1 / sum(self.seconds.values())

    def table(self) -> str:
        total = sum(self.seconds.values())
        lines = [f"{self.clips} clips in one process: {self.per_core:.2f} clips/s per core"]
        lines += [f"  a clip crosses the bus as {self.bytes / 1e6:.2f} MB, a byte for each value"]
        for stage, each in self.seconds.items():
            lines.append(f"  {stage.ljust(16)} {1e3 * each:8.1f} ms a clip  {each / total:6.1%}")
        if self.unreadable:
            lines.append(f"  {self.unreadable} videos could not be read")
        for workers, rate in self.rates.items():
            what = "in the training process" if workers == 0 else f"{workers} worker{'s' * (workers > 1)}"
            lines.append(f"  {what.ljust(24)} {rate:8.2f} clips/s")
        return "\n".join(lines)


class _Timed:
    """A video that adds up how long its decoder takes."""

    def __init__(self, video: Video, how: str):
        self.video, self.how, self.seconds, self.resizing = video, how, 0.0, 0.0
        self.frames, self.fps, self.height, self.width = video.frames, video.fps, video.height, video.width

    @property
    def damaged(self) -> int:
        return self.video.damaged

    def read(self, indices: Sequence[int] | np.ndarray, height: int, width: int) -> np.ndarray:
        began = time.perf_counter()
        if self.how == "decoder":
            frames = self.video.read(indices, height, width)
            self.seconds += time.perf_counter() - began
            return frames
        frames = self.video.read(indices, self.height, self.width)
        middle = time.perf_counter()
        frames = resize(frames, height, width, self.how)
        self.seconds += middle - began
        self.resizing += time.perf_counter() - middle
        return frames

    def at(self, seconds: float) -> int:
        return self.video.at(seconds)

    def close(self) -> None:
        self.video.close()


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measure(clips: VideoClips, count: int, batch: int, workers: Sequence[int] = (0, 1, 2)) -> Speed:
    """Of `count` training clips, taken in the order of training; each kind of loader makes as many."""
    seconds, unreadable = _stages(clips, count)
    rates = {each: _rate(clips, count, batch, each) for each in workers}
    size = clips.spec.frames * clips.spec.height * clips.spec.width * 3
    return Speed(seconds, count - unreadable, unreadable, rates, size)


def _stages(clips: VideoClips, count: int) -> tuple[dict[str, float], int]:
    spec, total, unreadable = clips.spec, dict.fromkeys(STAGES, 0.0), 0
    order = np.random.default_rng(clips.seed).permutation(len(clips))
    with _one_thread():
        for step in range(count):
            index = int(order[step % len(order)])
            began = time.perf_counter()
            try:
                opened = open_video(clips.items[index][0], spec.decoder, spec.fps)
            except VideoError:
                unreadable += 1
                continue
            ready = time.perf_counter()
            video = _Timed(opened, spec.resize)
            # what the decoder is asked for is then of the right size, so that `training_clip` resizes nothing
            rng = np.random.default_rng((clips.seed, 0, index))
            try:
                clip = np.ascontiguousarray(training_clip(video, dataclasses.replace(spec, resize="decoder"), rng))
            except VideoError:
                unreadable += 1
                continue
            finally:
                video.close()
            cut = time.perf_counter()
            if spec.augment.of_pixels:
                augment(torch.from_numpy(clip), spec.augment, augment_rng(clips.seed, 0, index))
            ended = time.perf_counter()
            spent = (ready - began, video.seconds, video.resizing)
            spent += (cut - ready - video.seconds - video.resizing, ended - cut, _transfer(clip))
            for stage, each in zip(STAGES, spent, strict=True):
                total[stage] += each
    read = max(count - unreadable, 1)
    names = {"decode": "decode and resize"} if spec.resize == "decoder" else {}
    kept = {names.get(stage, stage): each / read for stage, each in total.items()}
    return {stage: each for stage, each in kept.items() if each > 0}, unreadable


def _transfer(clip: np.ndarray) -> float:
    """Seconds that a clip takes to a GPU, as bytes from pinned memory; 0 where there is none."""
    if not torch.cuda.is_available():
        return 0.0
    pinned = torch.from_numpy(clip).pin_memory()
    torch.cuda.synchronize()
    began = time.perf_counter()
    pinned.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    return time.perf_counter() - began


def _rate(clips: VideoClips, count: int, batch: int, workers: int) -> float:
    """Clips a second after the first batch, whose wait is for processes to start."""
    size = min(batch, len(clips), max(count // 4, 1))
    steps_per_epoch = max(len(clips) // size, 1)
    epochs = -(-count // (size * steps_per_epoch)) + 1
    began, made = 0.0, 0
    for step, ready in enumerate(training_batches(clips, Order(len(clips), size, epochs, clips.seed), workers)):
        if step == 0:
            began = time.perf_counter()
            continue
        made += len(ready.label)
        if made >= count:
            break
    return made / max(time.perf_counter() - began, 1e-9)
