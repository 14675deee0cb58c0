"""The training loop: warm-up and cosine, clipping, a JSON-lines log, and checkpoints from which a run goes on exactly.

A run lives in one folder: log.jsonl, checkpoint.pt (training state), model.safetensors (weights and configuration, for
users; with `ema` their running mean), run.json (classes, sampling). With the same number of threads on the CPU, a run
that was killed at any step and resumed has the same loss curve, bit for bit, as one that was not. Of several processes
(parallel.py) the first writes, and the state is a folder, to which each adds its part (sharded.py).
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint, finetune, identity, losses, parallel, sharded
from .augment import augment, mixup_weight
from .averaging import Average
from .data import (
    Dataset,
    Order,
    Problems,
    Share,
    VideoClips,
    augment_rng,
    training_batches,
)
from .evaluate import Result, evaluate
from .log import Log, Silent
from .masters import Masters
from .model import ViViT
from .optimizers import clip, make_optimizer, set_rate
from .parallel import ALONE, World
from .progress import Bar, memory_gib
from .recipe import CLIP_KEYS, TrainConfig
from .trouble import NotFinite, Skips, TrainingError, explained, listed, names


class Interrupted(Exception):
    """Stopped by a signal after saving; `code` is the exit status."""

    def __init__(self, number: int, step: int, out: Path):
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}; state saved in {out}")
        self.code = 128 + number


def learning_rate(step: int, base: float, warmup: int, total: int) -> float:
    """base * min(1, s/W) * (1 + cos(pi * max(0, s-W) / (total-W))) / 2 for steps s = 0 .. total-1 (Scenic)."""
    rise = min(1.0, step / warmup) if warmup else 1.0
    return base * rise * 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(total - warmup, 1)))


def device_of(config: TrainConfig, world: World = ALONE) -> torch.device:
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise TrainingError(f"device={name!r}: PyTorch sees no GPU here\n  -> device = 'cpu', or 'auto'")
    if name == "cuda" and world.together:
        name = f"cuda:{world.local}"
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise TrainingError(f"device={name!r} is not known: auto, cpu or cuda") from error


@contextmanager
def signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM are noted, so that the step in hand ends and is saved; a second one stops at once."""
    caught: list[int] = []

    def note(number, _frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: nothing to catch
        before = {}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Run:
    """Model, optimizer and position of one training run."""

    def __init__(self, config: TrainConfig, dataset: Dataset, out: Path, resume: bool = False, world: World = ALONE):
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config, self.dataset, self.out, self.world = config, dataset, out, world
        self.device = device_of(config, world)
        order = Order(len(dataset), config.batch, config.epochs, config.seed)
        world.check(order.batch, config.augment.mixup)
        self.steps_per_epoch = order.steps_per_epoch
        self.total = config.epochs * self.steps_per_epoch
        self.warmup = int(config.optimizer.warmup_epochs * self.steps_per_epoch)
        out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(config.seed)
        self.model = ViViT(config.model, memory=config.memory, offload=config.offload).to(self.device)
        saved = world.from_first(sharded.latest(out))
        self.started = ""  # what the weights were at the start, in words
        if config.init.path and not (resume and saved):
            self.started = finetune.initialise(self.model, config.init)
        finetune.freeze(self.model, config.init.freeze)
        narrow = config.optimizer.parameters == "bfloat16"
        shards = world.together and world.kind == "fsdp"  # which keeps float32 masters by itself
        self.masters = Masters(self.model) if narrow and not shards else None
        self.weights = self.masters or self.model  # as they are stored, in float32
        dtype = torch.bfloat16 if narrow else torch.float32
        self.called = world.wrap(self.model, self.device, dtype)  # in a step; else the model itself
        self.optimizer = make_optimizer(self.model, config.optimizer, config.init.layer_decay, self.masters)
        self.average = Average(self.model, config.ema, config.ema_on, self.masters) if config.ema else None
        self.skips = Skips(config.skip_not_finite)
        self.step, self.problems = 0, Problems(note=getattr(dataset, "note", ""))
        self._place_augmentation()
        world.reseed(config.seed, 0)
        if resume and saved:
            self._restore(saved)
        elif saved:
            raise TrainingError(f"{out} holds a run already\n  -> --resume to go on with it, or another --out")
        self.log = Log(out / "log.jsonl", self.step, config.tensorboard) if world.first else Silent()
        if world.first:
            kept = config.to_dict()["data"]
            about = {key: kept[key] for key in CLIP_KEYS}
            write_json(out / "run.json", {"classes": list(dataset.classes), "data": about})

    def _place_augmentation(self) -> None:
        """Pixels are augmented once: by the loader, or here on the model's device. The clips are the same but for the
        device's rounding."""
        config = self.config.augment
        config.require()
        here = config.where == "model" or (config.where == "auto" and self.device.type != "cpu")
        self.augments = config.of_pixels and (here or not isinstance(self.dataset, VideoClips))
        if isinstance(self.dataset, VideoClips):
            self.dataset.spec = dataclasses.replace(self.dataset.spec, augment_here=not self.augments)

    def _restore(self, path: Path) -> None:
        """Of any number of processes; weights and states take the places that they have in this run."""
        if path.is_dir():
            state = sharded.load(self.world, path, self.model, self.optimizer)
        else:
            state = sharded.laid_out(checkpoint.load(path), self.model, self.optimizer)
        identity.check(path, state, self.config, self.dataset)
        self.weights.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load(state["average"])
        self.step = state["step"]
        self.problems.add([tuple(pair) for pair in state["problems"]])
        if path.is_dir() == self.world.together and state["random"] is not None:
            checkpoint.set_random_state(state["random"])
        else:  # of other processes than these: the clips are the same, what dropout and stochastic depth draw is not
            torch.manual_seed(self.config.seed)
            self.world.reseed(self.config.seed, self.step)

    def save(self) -> None:
        for pairs in self.world.gathered(self.problems.pairs()):
            self.problems.add(pairs)
        state = {
            **identity.about(self.config, self.dataset),
            "model": self.weights.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "finished": self.step == self.total,
            "problems": [list(pair) for pair in self.problems.pairs()],
        }
        if self.average is not None:
            state["average"] = self.average.values
        if self.world.together:
            sharded.save(self.world, self.out, state)
            return
        checkpoint.save({**state, "random": checkpoint.random_state()}, self.out / "checkpoint.pt")
        sharded.forget(self.out)

    def train_step(self, video: Tensor, label: Tensor) -> tuple[float, float, float]:
        """(loss, learning rate, gradient norm before clipping)."""
        opt = self.config.optimizer
        rate = learning_rate(self.step, opt.lr, self.warmup, self.total)
        for group in self.optimizer.param_groups:
            set_rate(group, rate * group["scale"])
        self.optimizer.zero_grad(set_to_none=True)
        value = self._backward(video, label)
        norm = clip(self.model.parameters(), opt.clip_norm)
        value, size = self.world.agreed(value, norm)
        if not (math.isfinite(value) and math.isfinite(size)):
            what = f"the loss is {value}" if not math.isfinite(value) else f"the gradient norm is {size}"
            self.optimizer.zero_grad(set_to_none=True)
            raise NotFinite(f"step {self.step}: {what} at learning rate {rate:.3g}")
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model)
        return value, rate, size

    def _backward(self, video: Tensor, label: Tensor) -> float:
        """The loss of this process's part of the batch, the gradients of the whole batch left in the parameters; in
        `accumulate` parts, one after another."""
        config, alpha = self.config, self.config.augment.mixup
        weight = mixup_weight(alpha, config.seed, self.step) if alpha else None
        wanted = losses.targets(label, config.model.head_sizes, weight)
        partner, total = video.flip(0) if weight is not None else video, 0.0
        for part in torch.arange(len(video)).chunk(config.accumulate):
            rows = slice(int(part[0]), int(part[-1]) + 1)
            clips = video[rows]
            if weight is not None:  # clips become floats here, on the device
                first, second = (losses.normalised(x[rows], config.model) for x in (video, partner))
                clips = weight * first + (1 - weight) * second
            with self.world.gradients(self.called, last=rows.stop == len(video)):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "autocast"):
                    logits = self.called(clips, layout="BFYXC")
                loss = losses.classification(logits, [y[rows] for y in wanted], config.label_smoothing)
                if len(part) < len(video):
                    loss = loss * (len(part) / len(video))
                loss.backward()
            total += loss.item()
        return total

    def fit(self, validation: Dataset | None = None, quiet: bool = False, name: str = "train") -> dict[str, Any]:
        """Trains from the current step to the end; returns the last evaluation's numbers."""
        config, data = self.config, self.config.data
        order = Order(len(self.dataset), config.batch, config.epochs, config.seed, first=self.step)
        result: dict[str, Any] = {}
        begun = time.monotonic()
        shown = Bar(name, self.total, start=self.step, quiet=quiet or not self.world.first)
        lost = parallel.losses_explained(self.world, lambda: self.step)
        with signals() as caught, lost, shown as bar:
            if self.step < self.total:
                self.model.train()
                mine = Share(order, self.world.share)
                batches = iter(training_batches(self.dataset, mine, data.workers, data.timeout))
                for keys in order:
                    with explained(config, self.step, names(self.dataset, keys)):
                        batch = next(batches)
                        self.problems.add(batch.problems)
                        if not len(batch.label):
                            raise TrainingError(f"none of the videos can be read\n{self.problems}")
                        self._one(batch.video[:, 0], batch.label, keys, bar)
                    result = self._after_step(validation, bar) or result
                    if number := self.world.signal(caught):
                        self.save()
                        raise Interrupted(number, self.step, self.out)
            if not result and validation is not None:
                result = self.evaluate(validation).numbers()
            self.save()
            self._export()
        if str(self.problems):
            bar.say(str(self.problems))
        return {**result, "seconds": round(time.monotonic() - begun, 1)}

    def evaluate(self, validation: Dataset) -> Result:
        """Of the running mean of the weights, where there is one."""
        config, data = self.config, self.config.data
        with self._averaged():
            return evaluate(
                self.model,
                validation,
                config.batch,
                self.device,
                config.precision == "autocast",
                data.workers,
                timeout=data.timeout,
                world=self.world,
            )

    def _averaged(self):
        return nullcontext() if self.average is None else self.average.inside(self.model)

    def _one(self, video: Tensor, label: Tensor, keys: list[tuple[int, int]], bar: Bar) -> None:
        video = video.to(self.device, non_blocking=True)  # bytes cross the bus, floats never do
        if self.augments:
            rngs = [augment_rng(self.config.seed, *key) for key in self.world.share(keys)]
            video = torch.stack([augment(clip, self.config.augment, r) for clip, r in zip(video, rngs, strict=True)])
        try:
            loss, rate, norm = self.train_step(video, label.to(self.device, non_blocking=True))
        except NotFinite as error:
            self._skip(error, names(self.dataset, keys), bar)
            return
        self.skips.good()
        self.step += 1
        epoch = (self.step - 1) // self.steps_per_epoch
        bar.advance(len(label) * self.world.shares, note=f"epoch {epoch + 1} loss {loss:.3f}")
        self.log.write(
            step=self.step, epoch=epoch, loss=loss, lr=rate, grad_norm=norm, clips_per_s=round(bar.rate(), 1)
        )

    def _skip(self, error: NotFinite, clips: list[str], bar: Bar) -> None:
        """Leaves a step out, or ends the run, its state saved."""
        try:
            self.skips.bad(error, clips)
        except TrainingError:
            self.save()
            raise
        self.step += 1
        bar.say(f"{error}: left out; {listed(clips)}")
        self.log.write(step=self.step, skipped=str(error), clips=clips)

    def _after_step(self, validation: Dataset | None, bar: Bar) -> dict[str, Any]:
        """Evaluates at the end of some epochs, saves then and every `checkpoint_every` steps."""
        config, result = self.config, {}
        epochs, within = divmod(self.step, self.steps_per_epoch)
        ends = within == 0 and (epochs % config.evaluate_every == 0 or epochs == config.epochs)
        if ends and validation is not None:
            found = self.evaluate(validation)
            self.model.train()
            self.problems.add(found.problems.pairs())
            result = found.numbers()
            kind, gib = memory_gib()
            self.log.write(step=self.step, epoch=epochs - 1, **result, **{f"{kind.lower()}_gib": round(gib, 2)})
            bar.say(f"epoch {epochs}: validation top-1 {result['val_top1']:.1%} of {result['val_clips']} clips")
        if within == 0 or self.step % config.checkpoint_every == 0:
            self.save()
        return result

    def _export(self) -> None:
        from . import weights

        with self._averaged():
            found = {name: parallel.whole(value) for name, value in self.weights.state_dict().items()}
            if self.world.first:
                weights.save(self.model, self.out / "model.safetensors", found)
        self.world.barrier()  # the others may not end while it is being written


def write_json(path: Path, value: Any) -> None:
    with checkpoint.whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")
