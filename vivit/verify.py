"""`python -m vivit verify-weights PATH`: are these published weights, whole, and what do they reach on my videos?"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import finetune, published, weights
from .annotations import Classes, DataError
from .config import ViViTConfig
from .data import ClipSpec, VideoClips, listing
from .evaluate import evaluate
from .finetune import InitConfig
from .model import ViViT
from .recipe import CLIP_KEYS, DataConfig
from .video import decoder_line

FILES = ["config.json", "preprocessor_config.json", "model.safetensors"]  # of a model on the hub
SCENIC_RANGE = (-1.0, 1.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a Scenic checkpoint, a Hugging Face folder, or a name on its hub")
    parser.add_argument("--data", default="", help="evaluate on these videos: an annotation file, a list, a folder")
    parser.add_argument("--videos", default="", help="the folder of the videos that an annotation file names")
    parser.add_argument("--labels", default="", help="class names in the order of the weights (else alphabetical)")
    parser.add_argument("--views", default="", help="clips x crops (as published)")
    parser.add_argument("--batch", type=int, default=1, help="videos at a time (%(default)s)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast")
    parser.add_argument("--frames", type=int, default=32, help="the clip's frames in training (%(default)s)")
    parser.add_argument("--attention", default="", help="of a Scenic checkpoint without class token")
    parser.add_argument(
        "--input-range", choices=("scenic", "stored"), default="scenic",
        help="what pixels become: Scenic's [-1, 1], or as the folder's preprocessor_config.json says (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--reference", action="store_true", help="compare the logits with transformers' model")
    parser.add_argument("--out", default="", help="keep the model as a run: for `predict`, `evaluate`, `init.path`")


def command(args: argparse.Namespace, views: tuple[int, int] | None) -> int:
    path = fetch(args.path)
    kind = finetune.detect(path)
    if kind not in ("huggingface", "scenic"):
        raise ValueError(f"{path}: {kind} weights, not a ViViT of Scenic or Hugging Face")
    state, config = finetune.read_vivit(path, kind, InitConfig(frames=args.frames, attention=args.attention))
    row = published.find(config)
    if row is not None and row.split is not None:
        config = dataclasses.replace(config, classes=row.split)
    if args.input_range == "stored":
        config = with_range(config, stored_range(path))
    model = ViViT(config)
    weights.load_into(model, state, path)
    check_finite(model, path)
    print(f"origin       {'Scenic' if kind == 'scenic' else 'Hugging Face'}, {path}")
    print(f"model        {row.name + ', ' + row.dataset if row else 'none that was published'}: {config.attention}")
    total = sum(p.numel() for p in model.parameters())
    print(f"parameters   {total:,} in {len(state)} tensors: all that this model has, no other, every value finite")
    print(f"input        {range_line(path, config)}")
    print(f"logits       {logits_line(model)}")
    if args.reference:
        print(f"reference    {reference_line(model, path, kind)}")
    data = {"stride": 2, "short_side": 256, "views": (4, 3), "decoder": "auto", "fps": 25.0, "resize": "scenic"}
    if row is not None:
        data |= {"stride": row.stride, "views": row.views, "fps": row.fps}
    if views:
        data["views"] = views
    classes: Classes = class_names(path, config)
    if args.data:
        classes = _evaluate(model, args, data, row, classes)
    elif row is not None:
        print(f"published    {_published(row)}\n  -> --data and --videos evaluate it on yours")
    if args.out:
        keep(model, classes, data, Path(args.out))
    return 0


def fetch(name: str) -> Path:
    """A path as it is; the name of a model on Hugging Face's hub is downloaded, or found in its cache."""
    if Path(name).exists():
        return Path(name)
    owner, _, model = name.partition("/")
    if not (owner and model) or "/" in model or name.startswith((".", "~")):
        raise FileNotFoundError(f"{name}: no such file or folder")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{name}: no such folder here, and to ask Hugging Face's hub for it needs huggingface_hub ({error})"
            "\n  -> pip install huggingface_hub",
            name="huggingface_hub",
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except Exception as error:  # whatever the network or the hub answered
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"{name}: no such folder here, and Hugging Face's hub does not give it: {reason}"
            f"\n  -> on a machine that is online, or copy {', '.join(FILES)} into a folder"
        ) from error


def check_finite(model: ViViT, path: Path) -> None:
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            bad = int((~p.isfinite()).sum())
            raise ValueError(f"{path}: {name} has {bad} values that are not finite; the file is damaged")


# ---- the range of the input ----


def stored_range(path: Path) -> tuple[float, float]:
    """What Hugging Face's processor makes of 0 and 255, by the preprocessor_config.json beside the weights.

    Its order: x * rescale_factor, minus 1 where `offset` is on (it is by default), then (x - mean) / std.
    """
    file = (path if path.is_dir() else path.parent) / "preprocessor_config.json"
    if not file.is_file():
        raise DataError(f"{file}: no such file\n  -> --input-range scenic")
    about = json.loads(file.read_text())
    low, high = 0.0, 255.0
    if about.get("do_rescale", True):
        scale = about.get("rescale_factor", 1 / 127.5)
        shift = 1.0 if about.get("offset", True) else 0.0
        low, high = low * scale - shift, high * scale - shift
    if about.get("do_normalize", True):
        mean, std = (_one(about.get(key, 0.5), key, file) for key in ("image_mean", "image_std"))
        low, high = (low - mean) / std, (high - mean) / std
    return low, high


def _one(value: Any, key: str, file: Path) -> float:
    values = {float(v) for v in (value if isinstance(value, list) else [value])}
    if len(values) != 1:
        raise DataError(f"{file}: {key} is {value}, of each channel another; a range is of all")
    return values.pop()


def with_range(config: ViViTConfig, span: tuple[float, float]) -> ViViTConfig:
    """The configuration whose bytes 0 and 255 become the ends of `span`."""
    low, high = span
    return dataclasses.replace(config, pixel_mean=-low / (high - low), pixel_std=1 / (high - low))


def range_line(path: Path, config: ViViTConfig) -> str:
    mean, std = (float(np.ravel(x)[0]) for x in (config.pixel_mean, config.pixel_std))
    line = f"bytes 0 to 255 become [{-mean / std:g}, {(1 - mean) / std:g}]"
    try:
        stored = stored_range(path)
    except DataError:
        return line + ", Scenic's range" * (mean == std == 0.5)
    if tuple(round(end, 3) for end in stored) == SCENIC_RANGE:
        return line + ", Scenic's range, and what preprocessor_config.json says"
    told = f"[{stored[0]:g}, {stored[1]:g}]"
    if mean == std == 0.5:
        return f"{line}, Scenic's range, which these weights were trained with; preprocessor_config.json says {told}"
    return f"{line}, as preprocessor_config.json says; Scenic trained with [-1, 1]"


# ---- the numbers ----


def _clip(config: ViViTConfig) -> torch.Tensor:
    """A clip that is the same everywhere: uint8 `[1, F, Y, X, C]`."""
    sizes = (1, config.frames, config.height, config.width, config.channels)
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, sizes, dtype=np.uint8))


def _logits(model: ViViT) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(_clip(model.config), layout="BFYXC")
    return torch.cat(found, -1) if isinstance(found, tuple) else found


def logits_line(model: ViViT) -> str:
    logits = _logits(model)[0]
    if not logits.isfinite().all():
        raise ValueError("the logits of a clip of noise are not finite; these weights cannot be used")
    spread = "" if logits.std() > 0 else "; all alike: the head is zero, and must be trained"
    return f"of a fixed clip of noise: {logits.min():.3f} to {logits.max():.3f}, first {logits[0]:.6f}{spread}"


def reference_line(model: ViViT, path: Path, kind: str) -> str:
    if kind != "huggingface" or not path.is_dir():
        raise DataError("--reference compares with transformers, which reads folders of Hugging Face only")
    try:
        from transformers import VivitForVideoClassification
    except ImportError as error:
        raise ModuleNotFoundError(f"--reference needs transformers ({error})", name="transformers") from error
    from .losses import normalised

    theirs = VivitForVideoClassification.from_pretrained(path).eval()
    video = normalised(_clip(model.config), model.config).permute(0, 1, 4, 2, 3)  # [B, F, C, Y, X]
    with torch.no_grad():
        expected = theirs(video).logits
    apart = (_logits(model) - expected).abs().max().item()
    return f"transformers' logits of the same clip differ by {apart:.2g} at most, of {expected.abs().max():.3g}"


def class_names(path: Path, config: ViViTConfig) -> tuple[str, ...]:
    """The names in Hugging Face's config.json; () where it has none but LABEL_i, or there is no such file."""
    file = path / "config.json"
    names = json.loads(file.read_text()).get("id2label") if path.is_dir() and file.is_file() else None
    if not names or len(names) != sum(config.head_sizes) or any(str(n).startswith("LABEL_") for n in names.values()):
        return ()
    return tuple(names[key] for key in sorted(names, key=int))


def _published(row: published.Published) -> str:
    what = "top-1 of actions" if row.split else "top-1"
    return f"{row.top1:.1f} % {what}, {row.views[0]}x{row.views[1]} views"


def _evaluate(
    model: ViViT, args: argparse.Namespace, data: dict[str, Any], row: published.Published | None, names: Classes
) -> Classes:
    config = model.config
    found = listing(args.data, args.videos, labels=args.labels, classes=() if args.labels else names)
    sizes = tuple(map(len, found.classes)) if config.head_sizes != (sum(config.head_sizes),) else (len(found.classes),)
    if sizes != config.head_sizes:
        raise DataError(
            f"{args.data}: {sizes} classes, the weights have {config.head_sizes}"
            "\n  -> --labels FILE with the class names in the order of the weights"
        )
    spec = ClipSpec(config.frames, config.height, config.width, **{key: data[key] for key in CLIP_KEYS if key in data})
    print(decoder_line(spec.decoder), flush=True)
    note = found.report(args.data, args.videos or Path(args.data).parent)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clips = VideoClips(found.items, found.classes, spec, note=note)
    patience = DataConfig.timeout
    result = evaluate(model, clips, args.batch, device, args.bf16, args.workers, show="evaluate", timeout=patience)
    if str(result.problems):
        print(result.problems, file=sys.stderr)
    if not result.clips:
        raise DataError(f"{args.data}: none of its {len(found.items)} videos can be read")
    print(f"published    {_published(row) if row else 'nothing for such a model'}")
    print(f"here         {result.summary()}, {spec.views[0]}x{spec.views[1]} views")
    return found.classes


def keep(model: ViViT, classes: Classes, data: dict[str, Any], out: Path) -> None:
    from .train import write_json

    out.mkdir(parents=True, exist_ok=True)
    weights.save(model, out / "model.safetensors")
    names = list(classes) or [f"class {i}" for i in range(sum(model.config.head_sizes))]
    write_json(out / "run.json", {"classes": names, "data": data})
    print(f"kept in      {out}: model.safetensors, run.json")
