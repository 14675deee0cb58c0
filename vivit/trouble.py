"""What goes wrong in long runs, and what a run then does and says.

A loss or gradient that is not finite: the step is left out, at most so many times in a row. Memory that runs out, a
worker that dies: an error that says which, of what, and what to try. What a disk cannot take: checkpoint.py.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from .memory import LEVELS

if TYPE_CHECKING:
    from .recipe import TrainConfig

_SHOWN = 8  # clips that a message names


class TrainingError(Exception):
    """The run cannot go on, with what to try."""


class LoaderError(TrainingError):
    """A process that reads videos died or hung."""


class NotFinite(TrainingError):
    """A step whose loss or gradient is no number; nothing was updated."""


def names(dataset: Any, keys: Sequence[tuple[int, int]]) -> list[str]:
    """The clips of a batch as a reader finds them: the file, or the number in the data set where there is none."""
    items = getattr(dataset, "items", None)
    return [str(items[index][0]) if items else f"clip {index}" for _, index in keys]


def listed(clips: Sequence[str]) -> str:
    more = f" and {len(clips) - _SHOWN} more" if len(clips) > _SHOWN else ""
    return ", ".join(clips[:_SHOWN]) + more


class Skips:
    """Counts the steps in a row that were left out."""

    def __init__(self, most: int):
        self.most, self.row = most, 0

    def good(self) -> None:
        self.row = 0

    def bad(self, error: NotFinite, clips: Sequence[str]) -> None:
        """Raises TrainingError where it was one too many."""
        self.row += 1
        if self.row > self.most:
            times = f"; {self.row} steps in a row, skip_not_finite = {self.most} may be" if self.most else ""
            raise TrainingError(
                f"{error}{times}; nothing was updated, the checkpoint is good\n  clips: {listed(clips)}"
                "\n  -> a lower optimizer.lr, a longer optimizer.warmup_epochs, or optimizer.clip_norm = 1"
            ) from error


@contextmanager
def explained(config: TrainConfig, step: int, clips: Sequence[str]) -> Iterator[None]:
    """Memory that ran out and workers that died, in words; every other error as it is."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if _out_of_memory(error):
            raise TrainingError(f"step {step}: out of memory; {_smaller(config, _of_device(error))}") from error
        with loader_explained(f"step {step}", clips):
            raise


@contextmanager
def loader_explained(where: str, clips: Sequence[str]) -> Iterator[None]:
    """Processes that read videos and died or hung, of a broken file for instance, are one message that says whose."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        raise LoaderError(_lost_worker(f"{error} {error.__cause__} {error.__context__}", where, clips)) from error


def _out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or "DefaultCPUAllocator: can't allocate memory" in text
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    )


def _of_device(error: BaseException) -> bool:
    """Whether it was a GPU's memory that ran out, and not the host's."""
    return isinstance(error, torch.OutOfMemoryError)


def _smaller(config: TrainConfig, on_device: bool) -> str:
    level = LEVELS.index(config.memory)
    found = (
        f"batch = {config.batch} in {config.accumulate} part{'s' * (config.accumulate > 1)}, memory = {config.memory!r}"
        + ", offload = true" * config.offload
    )
    remedies = [f"memory = {LEVELS[level + 1]!r}"] if level + 1 < len(LEVELS) else []
    if not remedies and on_device and not config.offload:  # on a CPU it saves nothing
        waits = "" if config.model.embedding >= 2000 else ", and steps of a model as narrow as this for the bus"
        remedies.append(f"offload = true (the inputs of blocks wait in the host's memory{waits})")
    if config.accumulate < config.batch:
        remedies.append(f"accumulate = {min(2 * config.accumulate, config.batch)} (the same batch in more parts)")
    remedies.append("smaller clips; `python -m vivit plan CONFIG --gpu-memory SIZE` says what fits")
    return found + "".join(f"\n  -> {remedy}" for remedy in remedies)


def _lost_worker(text: str, where: str, clips: Sequence[str]) -> str:
    reading = f"reading, among others: {listed(clips)}"
    finds = "data.workers = 0 reads in this process, and shows an error where it happens"
    if "timed out" in text:
        return (
            f"{where}: a loader process took longer than data.timeout for a batch\n  {reading}"
            f"\n  -> --resume goes on from the last checkpoint; {finds}; a higher data.timeout waits longer"
        )
    number = re.search(r"pid\(?s?\)?:? ?([\d, ]+)", text)
    reason = re.search(r"killed by signal: (.+?)\.", text)
    which = f"process {number[1].strip(' ,')}" if number else "a process"
    how = f"was killed ({reason[1]}: often no memory left)" if reason else "ended unexpectedly"
    return (
        f"{where}: {which} of the workers that read videos {how}\n  {reading}"
        f"\n  -> --resume goes on from the last checkpoint; fewer data.workers, or another data.decoder; {finds}"
    )
