"""What the curve of a run depends on, and whether a checkpoint was written by a run of the same.

Versions add settings and remove some. A setting that one side does not know counts there as having its default: who
adds one gives it the default that changes nothing, so a run that left it alone goes on in any version.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .data import Dataset
from .recipe import TrainConfig
from .trouble import TrainingError
from .video import which_decoder

# May change between parts of a run: where and how fast it runs, what it tells and keeps
FREE = {
    "threads",
    "device",
    "memory",
    "offload",
    "skip_not_finite",
    "checkpoint_every",
    "evaluate_every",
    "tensorboard",
    "parallel",
    "sequence_parallel",
    "data.workers",
    "data.timeout",
    "augment.where",
}


def settings(config: TrainConfig) -> dict[str, Any]:
    """Those that are not free, by dotted names, as JSON gives them back."""
    values = json.loads(json.dumps(config.to_dict()))
    values["data"]["decoder"] = which_decoder(config.data.decoder)
    tables = [(k, v) for k, v in values.items() if isinstance(v, dict)]
    flat = {f"{table}.{key}": value for table, inner in tables for key, value in inner.items()}
    flat |= {k: v for k, v in values.items() if not isinstance(v, dict)}
    return {k: v for k, v in flat.items() if k not in FREE}


def about(config: TrainConfig, dataset: Dataset) -> dict[str, str]:
    """What a checkpoint keeps for `check`, as JSON: `config`, and the names of the settings that are no defaults."""
    found, defaults = settings(config), settings(TrainConfig())
    facts = {"number of training videos": len(dataset), "classes": list(dataset.classes)}
    changed = [key for key in found if found[key] != defaults[key]]
    return {"config": json.dumps({**found, **facts}), "changed": json.dumps(changed)}


def check(path: Path, state: Mapping[str, Any], config: TrainConfig, dataset: Dataset) -> None:
    """Raises TrainingError where the checkpoint in `path` is that of another curve, and says which setting differs."""
    now, then = json.loads(about(config, dataset)["config"]), json.loads(state["config"])
    defaults = settings(TrainConfig())
    for key, value in now.items():
        before = then.get(key, defaults.get(key))
        if before != value:
            unknown = "" if key in then else " (its default: the version that wrote it had no such setting)"
            raise TrainingError(
                f"{path} was trained with other settings: {key} was {before}{unknown}, is {value}"
                "\n  -> resume with the config it was started with, or train into another --out"
            )
    changed = json.loads(state["changed"]) if "changed" in state else list(then)  # not said: any may be
    for key in changed:
        if key not in now and key in then and key not in FREE:
            why = "not its default" if "changed" in state else "which may not be its default: the checkpoint is older"
            raise TrainingError(
                f"{path} was trained with a setting that this version does not know: {key} was {then[key]}, {why}"
                "\n  -> resume with the version that wrote it, or train into another --out"
            )
