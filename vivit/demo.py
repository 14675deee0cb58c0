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
from .config import ViViTConfig
from .data import DataError, Dataset, VideoClips
from .evaluate import predict
from .recipe import TrainConfig, datasets
from .train import Run, write_json
from .trials import Trial, series, table, trained
from .video import open_video

MARGIN = 0.20  # over the per-frame baseline, on held-out film; fixed before the runs in docs/demo.md
CLIPS = {"train": 512, "val": 160, "test": 400}  # clips in an epoch; clips validated and tested
FEW, FEW_EPOCHS = 64, 40  # training clips where recipes are compared: with new ones all the time there is no need
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
    done = trained(config, parts, out, quiet, "train")
    metrics |= {"top1": done["test_top1"], "test_clips": done["test_clips"], "train_s": done["seconds"]}
    logs = {"ViViT, factorised encoder": out / "log.jsonl"}
    if baseline:
        epochs = max(1, round(config.epochs * baseline_epochs))
        plain = dataclasses.replace(config, model=per_frame(config.model), epochs=epochs, evaluate_every=epochs)
        other = trained(plain, parts, out / "per_frame", quiet, "baseline")
        metrics |= {
            "per_frame_top1": other["test_top1"],
            "per_frame_epochs": epochs,
            "margin": done["test_top1"] - other["test_top1"],
            "margin_wanted": MARGIN,
            "per_frame_train_s": other["seconds"],
        }
        logs["per-frame baseline"] = out / "per_frame" / "log.jsonl"
    picture.learning_curve(logs, out / "learning_curve.png", 1 / len(parts["train"].classes))
    metrics["predictions"] = _predict(done["run"], parts["test"], film, out, say)
    metrics |= {
        "prepare_s": round(ready - began, 1),
        "total_s": round(time.monotonic() - began, 1),
        "epochs": config.epochs,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, torch {torch.__version__}",
    }
    write_json(out / "metrics.json", metrics)
    return metrics


def compare(plain: TrainConfig, full: TrainConfig, out: Path, video: str, seeds: int) -> list[str]:
    """Both recipes on a small set of the same film, FEW clips, tested on the same held-out ones; what to print."""

    def say(text: str) -> None:
        print(text, flush=True)

    film, _, plain = _data(plain, "", video, say, False)
    assert film is not None
    full = dataclasses.replace(full, data=plain.data)
    both = [Trial("plain", "plain", plain), Trial("full", "full recipe", full, "plain")]
    clips = {**CLIPS, "train": FEW}
    found = series(both, range(seeds), lambda config: films.parts(film, config, clips, few=True), out, say)
    drawn = picture.recipes(found, out / "recipes.svg")
    about = f"{FEW} training clips, {plain.epochs} epochs of them; what it shows and what not: docs/demo.md"
    return [*table(found), about, str(drawn)]


def _data(
    config: TrainConfig, data: str, video: str, say, quiet: bool
) -> tuple[films.Film | None, dict[str, Dataset], TrainConfig]:
    """(film or None, data sets train, val, test, config that fits them)."""
    if data:
        training, held, config = datasets(dataclasses.replace(config, data=dataclasses.replace(config.data, path=data)))
        if held is None:
            raise DataError(f"{data}: no class has two videos, so none can be held out")
        return None, {"train": training, "val": held, "test": held}, config
    film = films.decode(Path(video), quiet=quiet) if video else films.bunny(say, quiet)
    say(f"film: {len(film.frames)} frames kept of {film.path.name}; {film.credit}")
    # `predict` reads the file itself, where the same clip has this stride; clips come from memory, without processes
    changed = dataclasses.replace(config.data, stride=films.STRIDE * film.step, short_side=films.SHORT_SIDE, workers=0)
    config = dataclasses.replace(config, data=changed)
    return film, films.parts(film, config, CLIPS), config


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
