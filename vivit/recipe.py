"""A training run in one small TOML file: what the model is, where the clips come from, how it is trained.

`load("demo")` reads vivit/configs/demo.toml, `load("my.toml")` a file. A wrong key or value is a ValueError that names
it and the nearest valid one.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import annotations
from . import memory as memory_levels
from .annotations import DataError
from .augment import AugmentConfig
from .config import MODELS, ViViTConfig, check_types, from_dict, nearest
from .data import ClipSpec, VideoClips, find_splits, listing, split
from .finetune import KINDS, InitConfig
from .images import RESIZES
from .video import DECODERS

CONFIGS = Path(__file__).parent / "configs"
OPTIMIZERS = ("sgd", "adamw")
PARALLEL = ("ddp", "fsdp")
CLIP_KEYS = ("stride", "short_side", "flip", "views", "decoder", "fps", "resize")  # [data] that ClipSpec has too


@dataclass(frozen=True)
class DataConfig:
    """path: a folder per class or a list file; with train and val (folders, or train.txt and val.txt) inside, those.

    Otherwise val, another such path, is held out, or without it `val_fraction` of each class's files. Or path and val
    are annotation files as a data set is published with, and `videos` the folder that holds their videos at any depth.
    format: "auto", "folder", "list", or one of annotations.KINDS. labels: class names, where they are not in `path`.
    fps: frames by the clock, for videos of different or varying rates; 0: as they are in the file.
    resize: whose resizing: "decoder" (fastest), "scenic", "pillow" (Hugging Face's).
    """

    path: str = ""
    val: str = ""
    videos: str = ""
    format: str = "auto"
    labels: str = ""
    val_fraction: float = 0.2
    stride: int = 2
    short_side: int = 256
    flip: bool = True
    views: tuple[int, int] = (1, 1)  # evaluation: clips along time, crops (1 or 3); logits are averaged
    val_views: tuple[int, int] = (1, 1)  # the same of what is held out while training
    decoder: str = "auto"
    fps: float = 0.0
    resize: str = "decoder"
    workers: int = 2
    timeout: float = 1800.0  # seconds that a worker may take for a batch before it counts as hung; 0: for ever

    def __post_init__(self):
        check_types(self, "data")
        _check(self.stride >= 1, "data.stride", self.stride, "must be at least 1")
        _check(self.short_side >= 1, "data.short_side", self.short_side, "must be at least 1")
        _check(self.timeout >= 0, "data.timeout", self.timeout, "must not be negative (0: for ever)")
        _check(self.workers >= 0, "data.workers", self.workers, "must be 0 (no processes) or more")
        _check(0 < self.val_fraction < 1, "data.val_fraction", self.val_fraction, "must lie between 0 and 1")
        for key in ("views", "val_views"):
            views = getattr(self, key)
            good = len(views) == 2 and views[0] >= 1 and views[1] in (1, 3)
            _check(good, f"data.{key}", views, "must be [clips, crops]: crops is 1 or 3")
        _choice("data.decoder", self.decoder, DECODERS)
        _choice("data.format", self.format, ("auto", "folder", "list", *annotations.KINDS))
        _choice("data.resize", self.resize, RESIZES)
        _check(self.fps >= 0, "data.fps", self.fps, "must not be negative")

    def spec(self, model: ViViTConfig) -> ClipSpec:
        values = {key: getattr(self, key) for key in CLIP_KEYS}
        return ClipSpec(model.frames, model.height, model.width, **values)


@dataclass(frozen=True)
class OptimizerConfig:
    """sgd: heavy-ball momentum, no weight decay unless given (the paper's). adamw: for training from scratch."""

    name: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    warmup_epochs: float = 2.5
    clip_norm: float = 1.0  # global norm; 0 does not clip
    kernel: str = "auto"  # auto, foreach, fused or loop: see optimizers.py
    states: str = "float32"  # or torchao, bitsandbytes: adamw's in 8 bits, by that package
    parameters: str = "float32"  # or bfloat16: what the model computes in, beside float32 masters (masters.py)

    def __post_init__(self):
        check_types(self, "optimizer")
        _choice("optimizer.kernel", self.kernel, ("auto", "foreach", "fused", "loop"))
        _choice("optimizer.states", self.states, ("float32", "torchao", "bitsandbytes"))
        _choice("optimizer.parameters", self.parameters, ("float32", "bfloat16"))
        eight = self.states != "float32"
        _check(not eight or self.name == "adamw", "optimizer.states", self.states, "is for name = 'adamw'")
        _check(not eight or self.kernel == "auto", "optimizer.kernel", self.kernel, "goes with states = 'float32'")
        rule = "goes with states = 'float32': 8-bit states were not tried on masters"
        _check(not eight or self.parameters == "float32", "optimizer.parameters", self.parameters, rule)
        _choice("optimizer.name", self.name, OPTIMIZERS)
        _check(self.lr > 0, "optimizer.lr", self.lr, "must be positive")
        for key in ("weight_decay", "warmup_epochs", "clip_norm"):
            _check(getattr(self, key) >= 0, f"optimizer.{key}", getattr(self, key), "must not be negative")
        _check(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "must be in [0, 1)")
        _check(all(0 <= beta < 1 for beta in self.betas), "optimizer.betas", self.betas, "must be in [0, 1), both")


@dataclass(frozen=True)
class TrainConfig:
    model: ViViTConfig = field(default_factory=ViViTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    init: InitConfig = field(default_factory=InitConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    epochs: int = 30
    batch: int = 64
    accumulate: int = 1  # parts of a batch that go through the model one after another, for less memory
    label_smoothing: float = 0.0
    ema: float = 0.0  # decay of a running mean of the weights, evaluated and exported in their place; 0: none
    ema_on: str = "model"  # where the mean lives: beside the model, or "cpu" (a copy of the weights per step)
    tensorboard: bool = False  # besides log.jsonl
    autocast: bool = False  # bf16; parameters that are bfloat16 themselves need none
    skip_not_finite: int = 3  # steps in a row left out for a loss or gradient that is no number; one more ends the run
    memory: str = "fast"  # what stays for the backward: fast, balanced, small, smallest (memory.py)
    offload: bool = False  # with smallest: the inputs of blocks wait in the host's memory (offload.py)
    parallel: str = "ddp"  # of several processes: each the whole model, or "fsdp", a part of its weights and states
    sequence_parallel: int = 1  # processes that share the frames of a clip (sequence_parallel.py)
    seed: int = 0
    threads: int = 0  # 0: PyTorch's choice. A curve repeats bit for bit with the same number of threads
    device: str = "auto"  # auto: a GPU where there is one
    checkpoint_every: int = 200  # steps, besides the end of an epoch
    evaluate_every: int = 1  # epochs; the last one always

    def __post_init__(self):
        check_types(self, "")
        for key in ("epochs", "batch", "accumulate", "checkpoint_every", "evaluate_every", "sequence_parallel"):
            _check(getattr(self, key) >= 1, key, getattr(self, key), "must be at least 1")
        for key in ("seed", "threads", "skip_not_finite"):
            _check(getattr(self, key) >= 0, key, getattr(self, key), "must not be negative")
        memory_levels.check(self.memory, "recipe", self.offload)
        known = self.device in ("auto", "cpu") or re.fullmatch(r"cuda(:\d+)?", self.device) is not None
        _check(known, "device", self.device, "is not known: auto, cpu, cuda, or cuda:1 for another than the first GPU")
        _check(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "must be in [0, 1)")
        _choice("parallel", self.parallel, PARALLEL)
        _choice("ema_on", self.ema_on, ("model", "cpu"))
        _check(0 <= self.ema < 1, "ema", self.ema, "must be in [0, 1): a decay such as 0.999, 0 for none")
        rule = f"is more parts than a batch of {self.batch} has clips"
        _check(self.accumulate <= self.batch, "accumulate", self.accumulate, rule)
        check_augment(self.augment)
        check_init(self.init)

    @property
    def precision(self) -> str:
        """What products are computed in, as footprint.PRECISIONS names it."""
        if self.optimizer.parameters == "bfloat16":
            return "bfloat16"
        return "autocast" if self.autocast else "float32"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _check(good: bool, key: str, value: Any, rule: str) -> None:
    if not good:
        raise ValueError(f"{key}={value!r} {rule}")


def _choice(key: str, value: str, allowed) -> None:
    _check(value in allowed, key, value, f"is not known; {nearest(value, allowed)}")


def check_augment(config: AugmentConfig) -> None:
    check_types(config, "augment")
    scale, layers = config.scale_jitter, config.randaugment
    good = not scale or (len(scale) == 2 and 0 < scale[0] <= scale[1])
    _check(good, "augment.scale_jitter", scale, "must be [lowest, highest] factors, for example [0.9, 1.33]")
    good = not layers or (len(layers) == 2 and min(layers) >= 0)
    _check(good, "augment.randaugment", layers, "must be [layers, magnitude], for example [2, 15]")
    for key in ("color_jitter", "greyscale"):
        value = getattr(config, key)
        _check(0 <= value <= 1, f"augment.{key}", value, "must be a probability, 0 to 1")
    _check(config.mixup >= 0, "augment.mixup", config.mixup, "must not be negative (0: no mixup)")
    _choice("augment.where", config.where, ("auto", "loader", "model"))


def check_init(config: InitConfig) -> None:
    check_types(config, "init")
    _choice("init.kind", config.kind, ("auto", *KINDS))
    _choice("init.kernel", config.kernel, ("central", "inflate"))
    _choice("init.position", config.position, ("auto", "tile", "resize", "resize_tile"))
    _choice("init.temporal_attention", config.temporal_attention, ("copy", "zero_out"))
    _choice("init.head", config.head, ("new", "keep"))
    _choice("init.attention", config.attention, ("", *MODELS))
    _check(0 < config.layer_decay <= 1, "init.layer_decay", config.layer_decay, "must be in (0, 1]")
    _check(config.frames >= 1, "init.frames", config.frames, "must be at least 1")


def datasets(config: TrainConfig) -> tuple[VideoClips, VideoClips | None, TrainConfig]:
    """(training, validation or None, the config with the data's number of classes)."""
    if not config.data.path:
        raise DataError(
            "no videos named\n  -> --data FOLDER (a folder per class) or --data LIST, or data.path in CONFIG"
        )
    data, held, notes = config.data, [], []
    as_given = (data.videos, data.format, data.labels)
    if data.val or Path(data.path).is_file():
        training, classes, _ = whole = listing(data.path, *as_given)
        notes.append(whole.report(data.path, data.videos or Path(data.path).parent))
        if data.val:
            other = listing(data.val, *as_given, classes)
            held = other.items
            notes.append(other.report(data.val, data.videos or Path(data.val).parent))
        else:
            training, held = split(training, data.val_fraction)
    else:
        training, held, classes = find_splits(data.path, data.val_fraction)
    sizes = annotations.head_sizes(classes)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, classes=sizes))
    config.augment.require()
    spec = dataclasses.replace(data.spec(config.model), augment=config.augment)
    note = "\n".join(filter(None, notes))
    once = dataclasses.replace(spec, views=data.val_views)
    validation = VideoClips(held, classes, once, config.seed) if held else None
    return VideoClips(training, classes, spec, config.seed, note), validation, config


# ---- reading ----

_TABLES = {
    "model": ViViTConfig,
    "data": DataConfig,
    "augment": AugmentConfig,
    "init": InitConfig,
    "optimizer": OptimizerConfig,
}


def toml():
    if sys.version_info >= (3, 11):
        import tomllib

        return tomllib
    try:
        import tomli  # pyright: ignore[reportMissingImports]  # only Python 3.10 has it
    except ImportError as error:
        raise ModuleNotFoundError("Python 3.10 reads TOML with tomli\n  -> pip install tomli", name="tomli") from error
    return tomli


def parse(values: dict[str, Any], where: str) -> TrainConfig:
    """A TrainConfig from nested plain values."""
    values = dict(values)
    names = [f.name for f in dataclasses.fields(TrainConfig)]
    for key in values:
        if key not in names:
            raise ValueError(f"{where}: unknown key {key!r}; {nearest(key, names)}")
    try:
        for table, cls in _TABLES.items():
            inner = values.get(table, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{table} must be a table, [{table}] with its keys below")
            if table == "model" and "preset" in inner:
                inner = _preset(dict(inner), f"{where} [model]")
            values[table] = inner if isinstance(inner, ViViTConfig) else from_dict(cls, inner, f"{where} [{table}]")
        return from_dict(TrainConfig, values, where)
    except (ValueError, TypeError) as error:
        message = str(error)
        raise ValueError(message if message.startswith(where) else f"{where}: {message}") from error


def _preset(values: dict[str, Any], where: str) -> ViViTConfig:
    name = values.pop("preset")
    names = [f.name for f in dataclasses.fields(ViViTConfig)]
    for key in values:
        if key not in names:
            raise ValueError(f"{where}: unknown key {key!r}; {nearest(key, [*names, 'preset'])}")
    return ViViTConfig.preset(str(name), **values)


def find(name: str) -> Path:
    """A file, or the name of one that comes with the package."""
    if Path(name).is_file():
        return Path(name)
    shipped = {path.stem: path for path in sorted(CONFIGS.glob("*.toml"))}
    if name in shipped:
        return shipped[name]
    raise ValueError(f"CONFIG {name!r}: no such file, and no config of that name; {nearest(name, shipped)}")


def load(name: str, changes: typing.Iterable[str] = ()) -> TrainConfig:
    """`changes` are `key=value` with dotted keys and TOML values: `optimizer.lr=0.05`, `model.pool=mean`."""
    path = find(name)
    try:
        values = toml().loads(path.read_text())
    except (toml().TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a TOML file: {error}") from error
    for change in changes:
        _apply(values, change)
    return parse(values, str(path))


def _apply(values: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise ValueError(f"--set {change!r}: give it as key=value, for example optimizer.lr=0.05")
    try:
        value = toml().loads(f"x = {text}")["x"]
    except toml().TOMLDecodeError:
        value = text  # text without quotes
    *tables, last = key.split(".")
    for table in tables:
        if not isinstance(values.setdefault(table, {}), dict):
            raise ValueError(f"--set {change!r}: {table!r} is a value, not a table")
        values = values[table]
    values[last] = value
