"""`python -m vivit`: train CONFIG, evaluate, predict VIDEO, info, plan, verify-weights PATH, loader, demo, ablate."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from . import ablation, recipe, verify
from .annotations import Classes, DataError, from_json
from .config import nearest
from .data import ClipSpec, Problems, VideoClips, listing
from .video import VideoError, decoder_line

CREDIT_EPILOG = "`make demo` runs `python -m vivit demo`. Configs that come with the package: "


def parser() -> argparse.ArgumentParser:
    shipped = ", ".join(sorted(path.stem for path in recipe.CONFIGS.glob("*.toml")))
    top = argparse.ArgumentParser(prog="vivit", description=__doc__, epilog=CREDIT_EPILOG + shipped)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train on a folder per class or a list file")
    train.add_argument("config", metavar="CONFIG", help=f"a TOML file, or one of: {shipped}")
    train.add_argument("--data", help="videos: a folder per class, a list file, or a data set's annotation file")
    train.add_argument("--val", help="what is held out, in the same form; left out, a part of --data")
    train.add_argument("--videos", help="the folder of the videos that an annotation file names")
    train.add_argument("--init", help="weights to start from: an image ViT or a ViViT")
    train.add_argument("--out", default="", help="folder of the run (runs/<config>)")
    train.add_argument("--memory", default="", metavar="LEVEL", help="fast, balanced, small or smallest (see info)")
    train.add_argument("--parallel", default="", metavar="KIND", help="of the processes of torchrun: ddp or fsdp")
    train.add_argument("--resume", action="store_true", help="go on with the run in --out, exactly")
    train.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting: optimizer.lr=0.05"
    )

    evaluate = commands.add_parser("evaluate", help="top-1, top-5 and the confusion matrix of a trained run")
    evaluate.add_argument("--run", default="runs/demo", help="folder of the run (%(default)s)")
    evaluate.add_argument("--data", required=True, help="videos: a folder per class, a list or an annotation file")
    evaluate.add_argument("--videos", default="", help="the folder of the videos that an annotation file names")
    evaluate.add_argument("--views", default="", help="clips x crops, for example 4x3; logits are averaged")
    evaluate.add_argument("--batch", type=int, default=8)
    evaluate.add_argument("--workers", type=int, default=2)
    evaluate.add_argument("--bf16", action="store_true", help="bf16 autocast")

    predict = commands.add_parser("predict", help="the most probable classes of one video, and a picture why")
    predict.add_argument("video", metavar="VIDEO")
    predict.add_argument("--run", default="runs/demo", help="folder of the run (%(default)s)")
    predict.add_argument("--views", default="", help="clips x crops, for example 4x3")
    predict.add_argument("-k", type=int, default=5, help="how many classes (%(default)s)")
    predict.add_argument("--png", default="", help="write frames, attention roll-out and probabilities here")
    predict.add_argument("--credit", default="", help="a line below the picture")

    of_each = "memory of each of N, by `parallel` and `sequence_parallel` (sequence_parallel's own number)"
    info = commands.add_parser("info", help="shapes, parameters and FLOPs of a config or a run")
    info.add_argument(
        "config", metavar="CONFIG", nargs="?", default="demo", help="a TOML file, a name or a run's folder"
    )
    info.add_argument("--processes", type=int, default=0, metavar="N", help=of_each)
    info.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")

    plan = commands.add_parser("plan", help="the largest batch, clip and picture that fit a GPU, for each memory level")
    plan.add_argument("config", metavar="CONFIG", nargs="?", default="demo", help="a TOML file or a name")
    plan.add_argument("--gpu-memory", required=True, metavar="SIZE", help="of the device: 24GB, or 24GiB")
    plan.add_argument(
        "--reserve", default="1GB", metavar="SIZE", help="left to driver, libraries and gaps (%(default)s)"
    )
    plan.add_argument("--processes", type=int, default=0, metavar="N", help=of_each)
    plan.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")

    verified = commands.add_parser(
        "verify-weights", help="published weights: whole, and what they reach on your videos"
    )
    verify.add_arguments(verified)

    loader = commands.add_parser(
        "loader", help="speed of decoding and augmenting: clips/s per core, share of each stage"
    )
    loader.add_argument("config", metavar="CONFIG", help=f"a TOML file, or one of: {shipped}")
    loader.add_argument("--data", required=True, help="videos: a folder per class, a list or an annotation file")
    loader.add_argument("--videos", help="the folder of the videos that an annotation file names")
    loader.add_argument("--clips", type=int, default=32, help="clips to time (%(default)s)")
    loader.add_argument("--workers", default="0,1,2", help="numbers of workers to try (%(default)s)")
    loader.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")

    _demo_arguments(commands.add_parser("demo", help="train, test and predict on a real film, in minutes"))
    ablation.add_arguments(
        commands.add_parser("ablate", help="regularisers added one by one on a small set: table and plot, by seeds")
    )
    return top


def _demo_arguments(demo: argparse.ArgumentParser) -> None:
    demo.add_argument("--data", default="", help="instead of the film: videos, a folder per class")
    demo.add_argument("--video", default="", help="instead of Big Buck Bunny: a film of two minutes or longer")
    demo.add_argument("--out", default="runs/demo", help="where results go (%(default)s)")
    demo.add_argument("--no-baseline", action="store_true", help="leave the per-frame baseline out")
    demo.add_argument(
        "--baseline-epochs", type=float, default=None, help="the baseline's epochs, as a share of the model's"
    )
    demo.add_argument(
        "--recipe", choices=("plain", "full"), default="plain",
        help="full: the paper's regularisers (demo_full.toml) against none of them, on a small set, in a plot",
    )  # fmt: skip
    demo.add_argument("--seeds", type=int, default=1, help="runs of both with --recipe full (%(default)s)")
    demo.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")


def command_train(args: argparse.Namespace) -> int:
    from . import parallel

    words = {"memory": args.memory, "parallel": args.parallel}
    config = recipe.load(args.config, [*args.set, *(f"{key}={word}" for key, word in words.items() if word)])
    config = _with_data(config, path=args.data, val=args.val, videos=args.videos)
    if args.init:
        config = dataclasses.replace(config, init=dataclasses.replace(config.init, path=args.init))
    with parallel.started(config) as world:
        return _train(config, Path(args.out or f"runs/{Path(args.config).stem}"), args.resume, world)


def _train(config: recipe.TrainConfig, out: Path, resume: bool, world: Any) -> int:
    from .train import Run

    training, validation, config = recipe.datasets(config)
    run = Run(config, training, out, resume, world)
    held = len(validation) if validation else 0
    tell = print if world.first else lambda *_, **__: None
    tell(decoder_line(config.data.decoder))
    if training.note:
        tell(training.note)
    parameters = sum(p.numel() for p in run.model.parameters())
    tell(
        f"{len(training)} videos of {config.model.classes} classes, {held} held out; "
        f"{run.total} steps from {run.step}, {parameters:,} parameters on {run.device}{world}",
        flush=True,
    )
    if run.started:
        tell(run.started, flush=True)
    result = run.fit(validation)
    tell(" ".join(f"{key}={value:.4g}" for key, value in result.items()))
    if world.first:
        state = "a checkpoint folder" if world.together else "checkpoint.pt"
        print(f"{out}: model.safetensors, run.json, log.jsonl, {state}{_curve(out, config.model.classes)}")
    return 0


def _curve(out: Path, classes: int | tuple[int, int]) -> str:
    """Draws learning_curve.png where matplotlib is installed."""
    from . import picture

    try:
        picture.learning_curve(
            {"train": out / "log.jsonl"}, out / "learning_curve.png", 1 / math.prod(np.ravel(classes))
        )
    except ModuleNotFoundError as error:
        print(f"no learning curve: {error}", file=sys.stderr)
        return ""
    return ", learning_curve.png"


def _trained(folder: str, views: str) -> tuple[Any, Classes, ClipSpec]:
    """Model, classes and sampling of a run's folder."""
    from . import weights

    root = Path(folder)
    if not (root / "model.safetensors").exists():
        raise DataError(f"{root}: no finished run in it (model.safetensors)\n  -> python -m vivit train, or make demo")
    about = json.loads((root / "run.json").read_text())
    model = weights.load(root / "model.safetensors")
    data = recipe.DataConfig(**{**about["data"], "views": _views(views) or tuple(about["data"]["views"])})
    return model, from_json(about["classes"]), data.spec(model.config)


def _views(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    clips, _, crops = text.partition("x")
    if not (clips.isdigit() and crops.isdigit()):
        raise ValueError(f"--views {text!r}: give clips x crops, for example 4x3")
    return int(clips), int(crops)


def command_evaluate(args: argparse.Namespace) -> int:
    import torch

    from .evaluate import evaluate

    model, classes, spec = _trained(args.run, args.views)
    found = listing(args.data, args.videos, classes=classes)
    print(decoder_line(spec.decoder), flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    note = found.report(args.data, args.videos or Path(args.data).parent)
    clips = VideoClips(found.items, classes, spec, note=note)
    patience = recipe.DataConfig.timeout
    result = evaluate(model, clips, args.batch, device, args.bf16, args.workers, show="evaluate", timeout=patience)
    _report(result.problems)
    if not result.clips:
        raise DataError(f"{args.data}: none of its {len(found.items)} videos can be read")
    print(result.summary())
    print(result.table())
    return 0


def _report(problems: Problems) -> None:
    if str(problems):
        print(problems, file=sys.stderr)


def command_predict(args: argparse.Namespace) -> int:
    from .evaluate import predict

    model, classes, spec = _trained(args.run, args.views)
    found = predict(model, args.video, classes, spec, args.k)
    width = max(len(name) for name, _ in found.top)
    for name, probability in found.top:
        print(f"{name.ljust(width)}  {probability:6.1%}")
    if args.png:
        from .picture import prediction

        print(prediction(model, found, args.png, args.credit))
    return 0


def command_info(args: argparse.Namespace) -> int:
    import torch

    from .model import ViViT

    if (Path(args.config) / "model.safetensors").exists():
        run = recipe.TrainConfig(model=_trained(args.config, "")[0].config)
    else:
        run = recipe.load(args.config, args.set)
    config = run.model
    with torch.device("meta"):
        model = ViViT(config)
    names = {name for name, _ in model.named_children()}
    print(f"attention    {config.attention}, pool {config.pool}")
    print(f"clip         F={config.frames} Y={config.height} X={config.width} C={config.channels}, uint8 or float")
    print(f"tubelet      {config.tubelet}, {config.tokenization}")
    print(
        f"tokens       T={config.T} S={config.S}, {config.T * config.S} in all"
        + (", and the class token" if config.has_class_token else "")
    )
    print(f"layers       {config.depth}, temporal encoder {config.temporal_depth if 'temporal' in names else 0}")
    print(f"width        E={config.embedding} H={config.heads} D={config.embedding // config.heads} mlp={config.mlp}")
    print(f"classes      {config.classes}")
    print(f"parameters   {sum(p.numel() for p in model.parameters()):,}")
    try:
        from .flops import count
    except ImportError:
        return 0
    work = count(config)
    print(
        f"work         {work.paper_gflops:,.3f} GFLOPs a clip as the paper counts, "
        f"{work.macs / 1e9:,.3f} G multiply-adds"
    )
    from .footprint import table
    from .plan import held, processes

    device = "cuda" if run.device != "cpu" and torch.cuda.is_available() else "cpu"
    world = processes(run, args.processes)
    if world.together:
        print(f"processes    each of{str(world).lstrip(',')}")
    clips = run.batch // world.shares
    for line in [held(run, device, world), *table(config, clips, run.precision, device, world.sequence)]:
        print(line)
    return 0


def command_plan(args: argparse.Namespace) -> int:
    from . import plan

    room = plan.size_of(args.gpu_memory) - plan.size_of(args.reserve)
    if room <= 0:
        raise ValueError(f"--gpu-memory {args.gpu_memory} leaves nothing beside --reserve {args.reserve}")
    run = recipe.load(args.config, args.set)
    for line in plan.report(run, room, world=plan.processes(run, args.processes)):
        print(line)
    return 0


def command_verify_weights(args: argparse.Namespace) -> int:
    return verify.command(args, _views(args.views))


def command_loader(args: argparse.Namespace) -> int:
    from .loader_bench import measure

    config = _with_data(recipe.load(args.config, args.set), path=args.data, videos=args.videos)
    if not all(part.strip().isdigit() for part in args.workers.split(",")) or args.clips < 1:
        raise ValueError(f"--workers {args.workers!r} --clips {args.clips}: give numbers, for example 0,2,4 and 32")
    training, _, config = recipe.datasets(config)
    print(decoder_line(config.data.decoder))
    workers = [int(part) for part in args.workers.split(",")]
    print(measure(training, args.clips, config.batch, workers).table())
    return 0


def _with_data(config: recipe.TrainConfig, **given: str | None) -> recipe.TrainConfig:
    """The config with those of [data] that were given."""
    named = {key: value for key, value in given.items() if value}
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **named))


def command_ablate(args: argparse.Namespace) -> int:
    return ablation.command(args)


def command_demo(args: argparse.Namespace) -> int:
    from . import demo

    if args.recipe == "full":
        return _compare_recipes(args)
    config = recipe.load("demo", args.set)
    metrics = demo.run(
        config,
        Path(args.out),
        args.data,
        args.video,
        baseline=not args.no_baseline,
        baseline_epochs=demo.BASELINE_EPOCHS if args.baseline_epochs is None else args.baseline_epochs,
    )
    print(demo.report(metrics, Path(args.out)))
    missed = "margin" in metrics and not (args.data or args.video) and metrics["margin"] < metrics["margin_wanted"]
    return 1 if missed else 0


def _compare_recipes(args: argparse.Namespace) -> int:
    from . import demo

    if args.data or args.seeds < 1:
        given = f"--data {args.data}" if args.data else f"--seeds {args.seeds}"
        raise ValueError(
            f"demo --recipe full: {given}: it is of the film, by one seed or more; `vivit ablate` takes --data"
        )
    sets = [f"epochs={demo.FEW_EPOCHS}", f"evaluate_every={demo.FEW_EPOCHS // 5}", *args.set]
    plain, full = recipe.load("demo", sets), recipe.load("demo_full", sets)
    print("\n".join(demo.compare(plain, full, Path(args.out) / "recipes", args.video, args.seeds)))
    return 0


def _who() -> str:
    """Which of the processes of torchrun this is."""
    return f" [process {os.environ['RANK']}]" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


def main(argv: list[str] | None = None) -> int:
    """The exit status; a mistake of the user is one message on stderr and status 2."""
    argv = sys.argv[1:] if argv is None else argv
    found = {name: f for name, f in globals().items() if name.startswith("command_")}
    commands = {name.removeprefix("command_").replace("_", "-"): f for name, f in found.items()}
    if argv and not argv[0].startswith("-") and argv[0] not in commands:
        print(f"vivit: unknown command {argv[0]!r}; {nearest(argv[0], commands)}", file=sys.stderr)
        return 2
    args = parser().parse_args(argv)
    try:
        from .train import Interrupted, TrainingError
    except ImportError as error:
        print(f"vivit: {error}", file=sys.stderr)
        return 2
    try:
        return commands[args.command](args)
    except Interrupted as stop:
        again = "" if args.command in ("demo", "ablate") else " with --resume"
        if _who() in ("", " [process 0]"):  # all of them stop together
            print(f"vivit {args.command}: {stop}\n  -> the same command{again} goes on", file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print(f"vivit {args.command}: stopped", file=sys.stderr)
        return 130
    except (DataError, VideoError, TrainingError, ValueError, ModuleNotFoundError, OSError) as error:
        print(f"vivit {args.command}{_who()}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
