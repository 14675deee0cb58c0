"""Runs that differ in one thing, by seeds: each goes on where it was killed, and leaves one line in results.jsonl."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoint import load as load_checkpoint
from .checkpoint import whole
from .data import Dataset
from .evaluate import evaluate
from .recipe import TrainConfig
from .train import Run, TrainingError

Parts = Mapping[str, Dataset]  # "train", "val", "test"
RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Trial:
    """against: the name of the trial that this one adds something to. paper: points of top-1 that it brought there."""

    name: str
    label: str
    config: TrainConfig
    against: str = ""
    paper: float | None = None


def trained(config: TrainConfig, parts: Parts, out: Path, quiet: bool, name: str) -> dict[str, Any]:
    """Trains and tests. An interrupted run of the same settings is resumed, anything else in `out` is replaced.

    The last evaluation's numbers, those of the test as `test_...`, and the `run`.
    """
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
    data = config.data
    found = evaluate(run.model, parts["test"], config.batch, run.device, workers=data.workers, timeout=data.timeout)
    if not quiet:
        print(
            f"{name}: top-1 {found.numbers()['val_top1']:.1%} of {found.clips} held-out clips\n{found.table()}",
            flush=True,
        )
        if found.problems.files:
            print(found.problems)
    test = {key.replace("val_", "test_"): value for key, value in found.numbers().items()}
    return {**result, **test, "run": run}


def series(
    trials: Sequence[Trial],
    seeds: Iterable[int],
    parts_of: Callable[[TrainConfig], Parts],
    out: Path,
    say: Callable[[str], Any],
    known: Iterable[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """The records of every trial with every seed; those that `out` holds, or `known`, are not run again."""
    out.mkdir(parents=True, exist_ok=True)
    done = {key_of(record): record for record in [*read(out), *known]}
    found = []
    for seed in seeds:
        for trial in trials:
            config = dataclasses.replace(trial.config, seed=seed)
            key = (trial.name, seed, digest(config))
            if key not in done:
                folder = out / trial.name / f"seed{seed}"
                result = trained(config, parts_of(config), folder, True, trial.name)
                done[key] = record_of(trial, config, result, folder)
                (folder / "checkpoint.pt").unlink()  # finished: its record tells
            found.append(done[key])
            write(out, [*(r for k, r in done.items() if r not in found), *found])
            say(f"{trial.label}, seed {seed}: {found[-1]['top1']:.1%} of {found[-1]['clips']} held-out clips")
    return found


def record_of(trial: Trial, config: TrainConfig, result: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {
        "trial": trial.name,
        "label": trial.label,
        "against": trial.against,
        "paper": trial.paper,
        "seed": config.seed,
        "top1": result["test_top1"],
        "loss": round(result["test_loss"], 4),
        "clips": result["test_clips"],
        "classes": len(result["run"].dataset.classes),
        "train_loss": round(statistics.fmean(r["loss"] for r in logged[-30:] if "loss" in r), 4),
        "steps": result["run"].total,
        "seconds": result["seconds"],
        "curve": [[r["step"], r["val_top1"]] for r in logged if "val_top1" in r],
        "machine": f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads",
        "settings": digest(config),
    }


def digest(config: TrainConfig) -> str:
    """Of all that decides a result but the seed and the place of files."""
    values = config.to_dict()
    values.pop("seed")
    values["init"]["path"] = Path(config.init.path).name
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def key_of(record: Mapping[str, Any]) -> tuple[str, int, str]:
    return record["trial"], record["seed"], record["settings"]


def read(out: Path) -> list[dict[str, Any]]:
    file = out / RESULTS
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def write(out: Path, records: Iterable[dict[str, Any]]) -> None:
    with whole(out / RESULTS) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records))


# ---- what came out ----


@dataclass(frozen=True)
class Summary:
    """One trial over its seeds; effect: points over the trial that it adds to, seed by seed."""

    name: str
    label: str
    against: str
    paper: float | None
    top1: tuple[float, ...]
    loss: tuple[float, ...]
    effect: tuple[float, ...]

    @property
    def gain(self) -> float:
        return statistics.fmean(self.effect) if self.effect else 0.0

    @property
    def gain_error(self) -> float | None:
        """Standard error of `gain` over the seeds; None with fewer than two."""
        count = len(self.effect)
        return statistics.stdev(self.effect) / count**0.5 if count > 1 else None


def summaries(records: Sequence[Mapping[str, Any]]) -> list[Summary]:
    """In the order of the records, seeds ascending."""
    by_trial: dict[str, dict[int, Mapping[str, Any]]] = {}
    for record in records:
        by_trial.setdefault(record["trial"], {})[record["seed"]] = record
    found = []
    for name, of_seed in by_trial.items():
        first, base = next(iter(of_seed.values())), by_trial.get(next(iter(of_seed.values()))["against"], {})
        both = [seed for seed in sorted(of_seed) if seed in base]
        found.append(
            Summary(
                name, first["label"], first["against"], first["paper"],
                tuple(of_seed[seed]["top1"] for seed in sorted(of_seed)),
                tuple(of_seed[seed]["loss"] for seed in sorted(of_seed)),
                tuple(100 * (of_seed[seed]["top1"] - base[seed]["top1"]) for seed in both),
            )
        )  # fmt: skip
    return found


def table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown."""
    rows = summaries(records)
    labels = {row.name: row.label for row in rows}
    is_papers = any(row.paper is not None for row in rows)
    head = ["recipe", "held-out top-1", "seeds", "held-out loss", "points it adds", "to"]
    lines = ["| " + " | ".join([*head, *["in the paper"] * is_papers]) + " |"]
    lines.append("|" + "---|---:|---:|---:|---:|---|" + "---:|" * is_papers)
    for row in rows:
        cells = [row.label, f"**{statistics.fmean(row.top1):.1%}** ({min(row.top1):.1%} to {max(row.top1):.1%})"]
        cells += [str(len(row.top1)), f"{statistics.fmean(row.loss):.2f}"]
        error = "" if row.gain_error is None else f" ± {row.gain_error:.1f}"
        spread = f"{row.gain:+.1f}{error} ({min(row.effect):+.1f} to {max(row.effect):+.1f})" if row.effect else ""
        cells += [spread, labels.get(row.against, "")]
        cells += ["" if row.paper is None else f"{row.paper:+.1f}"] * is_papers
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def order(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The effects from the largest to the smallest, here and in the paper, of those that both have."""
    rows = [row for row in summaries(records) if row.paper is not None and row.effect]
    if len(rows) < 2:
        return []

    def ranked(value: Callable[[Summary], float]) -> str:
        return " > ".join(f"{row.label} {value(row):+.1f}" for row in sorted(rows, key=lambda row: -value(row)))

    pairs = [(a, b) for i, a in enumerate(rows) for b in rows[i + 1 :] if a.paper != b.paper]
    agree = sum((a.gain - b.gain) * ((a.paper or 0) - (b.paper or 0)) > 0 for a, b in pairs)
    return [
        f"Order here: {ranked(lambda row: row.gain)}.",
        f"Order in the paper: {ranked(lambda row: row.paper or 0.0)}.",
        f"Of {len(pairs)} pairs of effects that the paper tells apart, {agree} stand in its order here.",
    ]
