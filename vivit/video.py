"""Video files behind one small interface: `open_video(path)` -> frames, fps, size, `read(indices, rows, columns)`.

PyAV installs everywhere and carries its own FFmpeg; torchcodec fills the same interface where it is installed.
Frames are uint8 `[F, Y, X, 3]`, red, green, blue; normalisation belongs to the model.
"""

from __future__ import annotations

import bisect
import functools
import importlib
import math
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

EXTENSIONS = frozenset(
    (".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm", ".wmv")
)
DECODERS = ("auto", "pyav", "torchcodec")


class Segment(NamedTuple):
    """Part of a video file, in seconds: an action of a long recording."""

    path: Path
    start: float
    stop: float

    @property
    def name(self) -> str:
        return f"{self.path.name}@{self.start:.2f}"

    @property
    def parent(self) -> Path:
        return self.path.parent

    def __str__(self) -> str:
        return f"{self.path} ({self.start:.2f} to {self.stop:.2f} s)"


class VideoError(Exception):
    """A file that gives no frames: corrupt, empty, not a video. Loaders skip and report it."""


class Video(Protocol):
    """One opened video. `frames` can be indexed; `damaged` counts those that read() had to replace by a neighbour."""

    frames: int
    fps: float
    height: int
    width: int

    @property
    def damaged(self) -> int: ...

    def read(self, indices: Sequence[int] | np.ndarray, height: int, width: int) -> np.ndarray:
        """uint8 `[F, height, width, 3]`: the frames at `indices` (any order, repeats allowed), resized."""
        ...

    def at(self, seconds: float) -> int:
        """Index of the frame that is shown `seconds` after the first one, at most the last."""
        ...

    def close(self) -> None: ...


def open_video(source: str | Path | Segment, decoder: str = "pyav", fps: float = 0.0) -> Video:
    """Opens a file or a segment of one; raises VideoError, with the reason, for one without a readable video stream.

    decoder: "pyav", "torchcodec", or "auto": torchcodec where it works, else PyAV (`which_decoder` tells).
    fps: frames at this rate whatever the file's, which may vary: frame i is the one shown at i/fps. 0: the file's own
        frames, each counted once, however long it is shown.
    """
    path = source.path if isinstance(source, Segment) else Path(source)
    if decoder not in DECODERS:
        raise ValueError(f"open_video: decoder {decoder!r} is not known; it is one of {', '.join(DECODERS)}")
    try:
        about = path.stat()
    except OSError as error:
        raise VideoError(f"{path}: {error.strerror or error}") from error
    if not stat.S_ISREG(about.st_mode):
        raise VideoError(f"{path}: not a file")  # opening a named pipe would wait for ever
    if about.st_size == 0:
        raise VideoError(f"{path}: the file is empty")
    video = PyAVVideo(path) if which_decoder(decoder) == "pyav" else TorchCodecVideo(path)
    if not isinstance(source, Segment) and not fps:
        return video
    try:
        part = source if isinstance(source, Segment) else Segment(path, 0.0, math.inf)
        return Section(video, part, fps)
    except VideoError:
        video.close()
        raise


@functools.cache
def which_decoder(decoder: str) -> str:
    """What "auto" stands for on this machine; other names are returned as they are."""
    if decoder != "auto":
        return decoder
    try:
        _module("torchcodec.decoders", "torchcodec", "")
    except ModuleNotFoundError:
        return "pyav"
    return "torchcodec"


def decoder_line(decoder: str) -> str:
    """What a run says about how it reads video."""
    used = which_decoder(decoder)
    if decoder != "auto" or used == "torchcodec":
        return f"video is decoded by {used}"
    return "video is decoded by pyav (torchcodec is not installed here, or does not load)"


class Section:
    """A segment of a video, or its frames at a fixed rate, as a video of its own."""

    def __init__(self, video: PyAVVideo | TorchCodecVideo, part: Segment, fps: float = 0.0):
        self.video, self.height, self.width = video, video.height, video.width
        stop = min(part.stop, video.seconds)
        if part.start >= stop:
            raise VideoError(f"{part.path}: a segment from {part.start:.2f} s of a video of {video.seconds:.2f} s")
        if fps:
            count = max(math.ceil((stop - part.start) * fps - 1e-6), 1)
            self.index = np.array([video.at(part.start + i / fps) for i in range(count)])
        else:
            first = video.at(part.start)
            last = video.frames if part.stop >= video.seconds else video.at(stop)
            self.index = np.arange(first, max(last, first + 1))
        self.start, self.frames, self.fps = part.start, len(self.index), fps or video.fps

    @property
    def damaged(self) -> int:
        return self.video.damaged

    def read(self, indices: Sequence[int] | np.ndarray, height: int, width: int) -> np.ndarray:
        return self.video.read(self.index[np.asarray(indices)], height, width)

    def at(self, seconds: float) -> int:
        found = int(np.searchsorted(self.index, self.video.at(self.start + seconds), "right")) - 1
        return min(max(found, 0), self.frames - 1)

    def close(self) -> None:
        self.video.close()


def _module(name: str, package: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"reading video needs {package}, which is not installed here ({error})\n  -> pip install {extra}", name=name
        ) from error
    except (RuntimeError, OSError) as error:  # torchcodec without the FFmpeg libraries it was built for
        raise ModuleNotFoundError(
            f"{package} is installed, but cannot be loaded here: {_reason(error)[:200]}\n"
            "  -> install FFmpeg with its shared libraries, or use the decoder 'pyav'",
            name=name,
        ) from error


def pyav() -> Any:
    av = _module("av", "PyAV", '"vivit-kernels[video]"')
    av.logging.set_level(None)  # FFmpeg writes to stderr what is also raised
    return av


@functools.lru_cache(maxsize=1024)
def _timestamps(path: Path, size: int, modified: int) -> tuple[tuple[int, ...], bool]:
    """Sorted timestamps of all packets, read without decoding (what the header promises is often wrong).

    True beside them when they are decoding times: a format without presentation times, such as AVI.
    """
    with pyav().open(str(path)) as container:
        packets = [(p.pts, p.dts) for p in container.demux(container.streams.video[0]) if p.size]
    by_dts = any(pts is None for pts, _ in packets)
    times = {dts if by_dts else pts for pts, dts in packets}
    return tuple(sorted(t for t in times if t is not None)), by_dts


class PyAVVideo:
    """Seeks to the keyframe before what is wanted and decodes from there; swscale resizes."""

    def __init__(self, path: Path):
        self.path, self.damaged = path, 0
        av = pyav()
        self._errors = (av.error.FFmpegError, OSError, ValueError, EOFError, MemoryError)
        try:
            self._container = av.open(str(path))
        except self._errors as error:
            raise VideoError(f"{path}: {_reason(error)}") from error
        try:
            if not self._container.streams.video:
                raise VideoError(f"{path}: no video stream in it")
            self._stream = self._container.streams.video[0]
            self._stream.thread_type = "AUTO"
            about = os.stat(path)
            self._times, self._by_dts = _timestamps(path, about.st_size, about.st_mtime_ns)
        except self._errors as error:
            self.close()
            raise VideoError(f"{path}: {_reason(error)}") from error
        except VideoError:
            self.close()
            raise
        self.frames = len(self._times)
        self.fps = float(self._stream.average_rate or self._stream.guessed_rate or 25)
        self.height, self.width = self._stream.height or 0, self._stream.width or 0
        if not self.frames or not self.height or not self.width:
            self.close()
            raise VideoError(f"{path}: no frames in it")
        self._tick = float(self._stream.time_base or 0) or 1 / self.fps
        self.seconds = (self._times[-1] - self._times[0]) * self._tick + 1 / self.fps

    def at(self, seconds: float) -> int:
        found = bisect.bisect_right(self._times, self._times[0] + round(seconds / self._tick)) - 1
        return min(max(found, 0), self.frames - 1)

    def read(self, indices: Sequence[int] | np.ndarray, height: int, width: int) -> np.ndarray:
        wanted = [int(i) for i in indices]
        if not wanted or min(wanted) < 0 or max(wanted) >= self.frames:
            raise IndexError(f"read: indices {wanted} of a video of {self.frames} frames")
        found: dict[int, np.ndarray] = {}
        missing = set(wanted)
        position = {time: i for i, time in enumerate(self._times)}
        for frame in self._decoded_from(min(wanted)):
            time = frame.dts if self._by_dts else frame.pts
            index = position.get(time, -1)
            if index in missing:
                small = frame.reformat(width, height, format="rgb24", interpolation="AREA")
                found[index] = small.to_ndarray()
                missing.discard(index)
            if not missing or index > max(missing):
                break
        if not found:
            raise VideoError(f"{self.path}: none of the frames {min(wanted)} to {max(wanted)} could be decoded")
        self.damaged += len(missing)
        known = np.array(sorted(found))
        return np.stack([found[int(known[max(np.searchsorted(known, i, "right") - 1, 0)])] for i in wanted])

    def every(self, step: int, height: int, width: int) -> Iterator[np.ndarray]:
        """Frames 0, step, 2*step, ... in order, decoding the file once: for reading a whole film."""
        for index, frame in enumerate(self._decoded_from(0)):
            if index % step == 0:
                yield frame.reformat(width, height, format="rgb24", interpolation="AREA").to_ndarray()

    def _decoded_from(self, first: int) -> Iterator[Any]:
        """Frames from the keyframe before `first` to the end; a packet that cannot be decoded is passed over."""
        try:
            self._container.seek(self._times[first], stream=self._stream, backward=True)
        except self._errors:
            self._container.seek(0)
        try:
            for packet in self._container.demux(self._stream):
                try:
                    yield from packet.decode()
                except self._errors:
                    continue
        except self._errors:
            return  # the file ends here: read() repeats the last frame it got

    def close(self) -> None:
        self._container.close()


class TorchCodecVideo:
    """The same through torchcodec, which needs the system's FFmpeg."""

    def __init__(self, path: Path):
        decoders = _module("torchcodec.decoders", "torchcodec", "torchcodec (one built for this torch)")
        self.path, self.damaged = path, 0
        try:
            self._decoder = decoders.VideoDecoder(str(path))
        except (RuntimeError, ValueError) as error:
            raise VideoError(f"{path}: {_reason(error)}") from error
        data = self._decoder.metadata
        self.frames, self.fps = int(data.num_frames or 0), float(data.average_fps or 25)
        self.height, self.width = int(data.height or 0), int(data.width or 0)
        if not self.frames:
            raise VideoError(f"{path}: no frames in it")
        self.seconds = float(data.duration_seconds or self.frames / self.fps)

    def at(self, seconds: float) -> int:
        """By the mean rate: torchcodec does not tell an index for a time, so that this is exact at constant rates."""
        return min(max(math.floor(seconds * self.fps + 1e-6), 0), self.frames - 1)

    def read(self, indices: Sequence[int] | np.ndarray, height: int, width: int) -> np.ndarray:
        import torch

        try:
            frames = self._decoder.get_frames_at([int(i) for i in indices]).data  # [F, 3, Y, X]
        except (RuntimeError, ValueError) as error:
            raise VideoError(f"{self.path}: {_reason(error)}") from error
        if frames.shape[-2:] != (height, width):
            frames = torch.nn.functional.interpolate(frames, (height, width), mode="bilinear", antialias=True)
        return frames.permute(0, 2, 3, 1).contiguous().numpy()

    def close(self) -> None:
        del self._decoder


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
