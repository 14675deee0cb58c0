"""`python -m vivit ablate`: what the paper's regularisers do for a small data set, one added after the other, by seeds.

Without `--data` the set is a few clips of the demo's film. Table 4 of the paper does the same with EPIC-Kitchens, and
starts from Kinetics where this starts from an image ViT that it trains on single frames of the same film.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import film as films
from . import picture, recipe, trials, weights
from .annotations import DataError
from .config import ViViTConfig
from .recipe import DataConfig, OptimizerConfig, TrainConfig
from .trials import Parts, Trial

FEW = {"train": 64, "val": 160, "test": 400}  # clips of the film
EPOCHS = 40  # of the film's clips; a data set of its own has the config's
FRAMES, FRAME_EPOCHS = 1600, 12  # that the image ViT is trained on


class Step(NamedTuple):
    """keys: settings of the full recipe that the plain one takes over. paper: points in its table 4."""

    name: str
    label: str
    keys: tuple[str, ...]
    paper: float


STEPS = (
    Step("image_vit", "start from an image ViT", ("init.path",), 1.2),
    Step("stochastic_depth", "stochastic depth", ("model.drop_path",), 0.6),
    Step("randaugment", "RandAugment", ("augment.randaugment",), 0.9),
    Step("label_smoothing", "label smoothing", ("label_smoothing",), 2.0),
    Step("mixup", "mixup", ("augment.mixup",), 0.6),
)
# What fine-tuning does beside them, on top of the image ViT alone; the paper has no number for these
BESIDE = {
    "frozen": ("spatial transformer frozen", {"init.freeze": ("blocks", "norm")}),
    "layer_decay": ("layer-wise decay 0.75", {"init.layer_decay": 0.75}),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="", help="instead of the film: videos, a folder per class")
    parser.add_argument("--init", default="", help="an image ViT of the model's size (of the film one is trained)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each recipe (%(default)s)")
    parser.add_argument("--out", default="runs/ablation", help="where results go (%(default)s); what is there is kept")
    parser.add_argument("--report", action="store_true", help="train nothing: table and plot of the results in --out")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of every recipe")


def changed(config: Any, key: str, value: Any) -> Any:
    """The config with a setting, `model.drop_path`, in its place."""
    table, _, name = key.rpartition(".")
    if not table:
        return dataclasses.replace(config, **{name: value})
    return dataclasses.replace(config, **{table: dataclasses.replace(getattr(config, table), **{name: value})})


def value_of(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def planned(plain: TrainConfig, full: TrainConfig) -> list[Trial]:
    """The plain recipe, then one step of the full one after the other, then what is beside them."""
    found, config = [Trial("plain", "plain (crop, mirror)", plain)], plain
    for step in STEPS:
        if all(value_of(full, key) == value_of(plain, key) for key in step.keys):
            continue
        for key in step.keys:
            config = changed(config, key, value_of(full, key))
        found.append(Trial(step.name, f"+ {step.label}", config, found[-1].name, step.paper))
    base = next((trial for trial in found if trial.name == "image_vit"), None)
    for name, (label, changes) in BESIDE.items():
        if base is not None:
            config = base.config
            for key, value in changes.items():
                config = changed(config, key, value)
            found.append(Trial(name, f"image ViT, {label}", config, base.name))
    return found


def train_image_vit(film: films.Film, config: TrainConfig, path: Path, say: Callable[[str], Any]) -> None:
    """On which training segment a frame is from; of the spatial transformer's size."""
    m = config.model
    one = ViViTConfig(
        frames=1, height=m.height, width=m.width, tubelet=(1, *m.tubelet[1:]), attention="joint",
        embedding=m.embedding, depth=m.depth, heads=m.heads, mlp=m.mlp, classes=len(film.segments()["train"]),
    )  # fmt: skip
    optimizer = OptimizerConfig("adamw", lr=1e-3, weight_decay=0.05, warmup_epochs=1)
    frames = films.FilmFrames(film, FRAMES, (m.height, m.width), seed=0)
    data, threads = DataConfig(workers=0), config.threads
    of_frames = TrainConfig(one, data, optimizer=optimizer, epochs=FRAME_EPOCHS, batch=64, threads=threads)
    of_frames = dataclasses.replace(of_frames, evaluate_every=FRAME_EPOCHS)
    found = trials.trained(of_frames, {"train": frames, "val": frames, "test": frames}, path.parent, True, "image ViT")
    np.savez(path, **weights.image_vit_of(found["run"].model))  # pyright: ignore[reportArgumentType]
    say(f"image ViT: tells {len(frames.classes)} parts of the training film apart, {found['test_top1']:.1%} of frames")


def command(args: argparse.Namespace) -> int:
    out = Path(args.out)
    if args.report:
        return report(out)
    if args.seeds < 1:
        raise ValueError(f"--seeds {args.seeds}: at least 1")

    def say(text: str) -> None:
        print(text, flush=True)

    few = [] if args.data else [f"epochs={EPOCHS}", f"evaluate_every={EPOCHS}"]
    plain, full = (recipe.load(name, [*few, *args.set]) for name in ("demo", "demo_full"))
    parts_of, plain, full = _data(args, plain, full, say)
    found = trials.series(planned(plain, full), range(args.seeds), parts_of, out, say)
    trials.write(out, found)
    return report(out)


def _data(
    args: argparse.Namespace, plain: TrainConfig, full: TrainConfig, say: Callable[[str], Any]
) -> tuple[Callable[[TrainConfig], Parts], TrainConfig, TrainConfig]:
    """What gives a recipe its clips, and both recipes made to fit them; the full one knows where the image ViT is."""
    image = args.init
    if args.data:
        plain, full = (changed(config, "data.path", args.data) for config in (plain, full))
        *_, fitted = recipe.datasets(plain)
        plain, full = (changed(config, "model.classes", fitted.model.classes) for config in (plain, full))

        def parts_of(config: TrainConfig) -> Parts:
            training, held, _ = recipe.datasets(config)
            if held is None:
                raise DataError(f"{args.data}: no class has two videos, so none can be held out")
            return {"train": training, "val": held, "test": held}

    else:
        film = films.bunny(say)
        plain, full = (dataclasses.replace(c, data=dataclasses.replace(c.data, workers=0)) for c in (plain, full))
        if not image:
            image = str(Path(args.out) / "image_vit" / "vit.npz")
            if not Path(image).exists():
                train_image_vit(film, plain, Path(image), say)

        def parts_of(config: TrainConfig) -> Parts:
            return films.parts(film, config, FEW, few=True)

    return parts_of, plain, changed(full, "init.path", image)


def report(out: Path) -> int:
    """Writes ablation.md and ablation.svg of the results in `out`."""
    records = trials.read(out)
    if not records:
        raise DataError(f"{out}: no results.jsonl in it\n  -> python -m vivit ablate --out {out}")
    lines = [*trials.table(records), "", *trials.order(records)]
    (out / "ablation.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(picture.trials(records, out / "ablation.svg"))
    return 0
