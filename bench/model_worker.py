"""The process of one whole model, driven through JSON lines by models.py and memory.py: its peak memory is its own.

    {"build": spec, "limit": bytes}    makes model, video and optimiser; `limit` is of the process's memory
    {"expect": path}                   writes what the reference gives, in float64 and in the dtype, to a file
    {"check": path}                    holds the model's own results against that file
    {"warm": true}                     two steps, and memory in bytes; from here on its peak counts
    {"time": seconds, "estimate_ms"}   times of steps in ms, and memory so far in bytes

A training step is forward, cross-entropy, backward, one step of SGD with momentum, gradients freed.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vivit_kernels.numerics import judge

from . import zoo
from .timing import Timer
from .worker import explain, serve, worst
from .workers import Worker

STEP = "cross-entropy, SGD with momentum 0.9"
_LR = 1e-5  # so small that the weights stay what they are: steps must cost the same from the first to the last
_RESERVE = 1 << 30  # left to the machine, so that an allocation fails before the kernel has to kill something
# FLOPs of one forward of the clips that are compared; all of them on a GPU
_MOST_FLOPS = {"cpu": 1e12, "cuda": 1e15}
_FIRST, _LAST = 5, 1  # matrices whose gradients are compared: every part of a backward reaches the first of them


class ModelWorker(Worker):
    """The parent's side."""

    def __init__(self, spec: zoo.Spec, tuned_malloc: bool = False):
        super().__init__(spec.device, [], tuned_malloc=tuned_malloc)
        self.command = [sys.executable, "-m", "bench.model_worker", spec.device]


# ---- memory of this process ----


def _fields(path: str) -> dict[str, int]:
    """`name: n kB` lines as bytes; empty where there is no such file."""
    try:
        text = Path(path).read_text()
    except OSError:
        return {}
    return {name: int(kib) << 10 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}


def _number(path: str) -> int | None:
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def available() -> int | None:
    """Bytes that this machine, or the container we are in, can still give; None where it does not say."""
    free = _fields("/proc/meminfo").get("MemAvailable")
    most, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    if most is not None and used is not None:
        free = min(free or most, max(most - used, 0))
    return free


class Memory:
    """now(), and peak() since reset(), in bytes: on a GPU what PyTorch has allocated, on a CPU the resident process."""

    def __init__(self, device: torch.device):
        self.device = device

    def now(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return _fields("/proc/self/status").get("VmRSS") or self.peak()

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with contextlib.suppress(OSError):  # without /proc the peak is that of the whole process
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        found = _fields("/proc/self/status").get("VmHWM")
        unit = 1 if sys.platform == "darwin" else 1024
        return found or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def allow(self, limit: int | None) -> None:
        """An allocation beyond `limit` (None: beyond what is free now) fails here, as an error that can be told."""
        if self.device.type == "cuda":
            if limit is not None:
                whole = torch.cuda.get_device_properties(self.device).total_memory
                torch.cuda.set_per_process_memory_fraction(min(limit / whole, 1.0), self.device)
            return
        free, data = available(), _fields("/proc/self/status").get("VmData")
        if limit is None and (free is None or data is None):
            return
        most = limit if limit is not None else (data or 0) + max((free or 0) - _RESERVE, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))


# ---- the model ----


def checked_clips(spec: zoo.Spec, one_clip: int) -> list[int]:
    """The clips whose results are compared: from both ends inwards, as many as the reference can do in a while."""
    many = int(max(1, min(spec.clips, _MOST_FLOPS[torch.device(spec.device).type] // max(one_clip, 1))))
    inwards = [i // 2 if i % 2 == 0 else spec.clips - 1 - i // 2 for i in range(spec.clips)]
    return sorted(inwards[:many])


class Session:
    """One model, its video on the device, and for training its optimiser."""

    def __init__(self, device: torch.device):
        self.device, self.memory, self.timer = device, Memory(device), Timer(device)
        # "float32" means the same for a convolution as for a matrix product
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32

    def build(self, spec: dict[str, Any], limit: int | None = None) -> dict[str, Any]:
        self.spec, self.limit = zoo.Spec(**spec), limit
        self.memory.allow(limit)
        self.train = self.spec.step == "train"
        self.model = zoo.build(self.spec)
        self.model.module.to(self.device, self.spec.weight_dtype).train(self.train)
        if self.model.video.is_floating_point():
            self.model.video = self.model.video.to(self.spec.weight_dtype)
        self.video = self.model.video.to(self.device)
        self.labels = (torch.arange(self.spec.clips, device=self.device) * 37 + 11) % zoo.CLASSES
        self.weights = torch.full((self.spec.clips,), 1 / self.spec.clips, device=self.device)
        if self.train:
            self.optimizer = torch.optim.SGD(self.model.module.parameters(), lr=_LR, momentum=0.9)
        self.timer.flush.zero_()
        self.loaded = self.memory.now()
        return {"loaded": self.loaded}

    def forward(self, video: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.spec.dtype == "autocast"):
            return self.model.call(video)  # [B, classes]

    def loss(self, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return (F.cross_entropy(wide, labels, reduction="none") * weights.to(wide.dtype)).sum()

    def step(self) -> Tensor:
        """One step; its loss, or the logits."""
        with torch.set_grad_enabled(self.train):
            logits = self.forward(self.video)
            if not self.train:
                return logits
            loss = self.loss(logits, self.labels, self.weights)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    # -- is it right? -------------------------------------------------------------------------------------------------
    def results(self, parts: Iterable[list[int]], checked: list[int]) -> dict[str, Tensor]:
        """Logits of the `checked` clips and, when training, gradients of their share of the loss.

        parts: the clips that run together.
        """
        logits, weights = {}, torch.zeros_like(self.weights)
        weights[checked] = self.weights[checked]
        for clips in parts:
            with torch.set_grad_enabled(self.train):
                found = self.forward(self.video[clips])
            logits |= dict(zip(clips, found.detach(), strict=True))
            if self.train:
                self.loss(found, self.labels[clips], weights[clips]).backward()
        results = {"logits": torch.stack([logits[clip] for clip in checked])}
        gradients = {name: p.grad for name, p in self.model.module.named_parameters() if p.grad is not None}
        if self.train:
            results |= self.model.named(gradients)
        self.model.module.zero_grad(set_to_none=True)
        return {name: x.cpu() for name, x in results.items()}

    def expect(self, path: str) -> dict[str, Any]:
        """Writes logits and the gradients of the first matrices and the head.

        exact: in float64 from the same rounded weights; eager: in the dtype; checked: the clips.
        """
        one_clip = self.spec.forward_flops() or self.counted_flops()
        checked = checked_clips(self.spec, one_clip)
        alone = [[clip] for clip in checked]
        eager = self.results(alone, checked)
        matrices = [name for name, x in eager.items() if name != "logits" and x.squeeze().dim() > 1]
        kept = {"logits", *matrices[:_FIRST], *matrices[-_LAST:]}
        self.model.module.double()
        self.video = self.video.double() if self.video.is_floating_point() else self.video
        self.spec = replace(self.spec, dtype="float64")
        exact = self.results(alone, checked)
        whole = {"eager": {name: eager[name] for name in kept}, "exact": {name: exact[name] for name in kept}}
        torch.save(whole | {"checked": checked, "flops": one_clip}, f"{path}.part")
        os.replace(f"{path}.part", path)
        return {"flops": one_clip}

    def counted_flops(self) -> int:
        """Of one clip forward, two per multiply-accumulate: for models that vivit.flops does not know."""
        with FlopCounterMode(display=False) as counter, torch.enable_grad():  # without gradients its hooks fail
            self.forward(self.video[:1])
        return counter.get_total_flops()

    def check(self, path: str) -> dict[str, Any]:
        """The worst of logits and gradients under the budget; the whole batch runs, as it is timed.

        In bfloat16 the linears' own rounding hides what an operation's own check shows: one key of 785 left out, or
        scores 2 % off, pass here; 2 % of the output, a few keys, a head or 5 % of a gradient do not (S/16x2).
        """
        expected = torch.load(path)
        checked, exact, eager = expected["checked"], expected["exact"], expected["eager"]
        found = self.results([list(range(self.spec.clips))], checked)
        verdicts = {
            name: judge(found[name], exact[name], eager[name], gradient=name != "logits", terms=self.spec.longest_sum)
            for name in exact
        }
        return {"error": worst(verdicts, len(checked) / self.spec.clips), "flops": expected["flops"]}

    # -- time and memory ----------------------------------------------------------------------------------------------
    def warm(self) -> dict[str, Any]:
        self.memory.reset()
        finite = bool(self.step().isfinite().all())
        self.held = self.memory.now()
        found = {"estimate_ms": self.timer.once(self.step), "finite": finite, "memory": self.used()}
        self.make_room()
        return found

    def times(self, seconds: float, estimate_ms: float) -> dict[str, Any]:
        if self.device.type == "cuda":
            self.step()  # takes back from the driver what the last turn has returned
        found = self.timer.calls(self.step, seconds, estimate_ms, fewest=1)
        self.make_room()
        return {"ms": found, "memory": self.used()}

    def make_room(self) -> None:
        """For the other models on the GPU; PyTorch keeps what it has once had."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def used(self) -> dict[str, int]:
        """loaded: before the first step. held, peak: above that, between steps and at most. reserved: GPUs only."""
        found = {
            "loaded": self.loaded,
            "held": max(self.held - self.loaded, 0),
            "peak": max(self.memory.peak() - self.loaded, 0),
        }
        if self.device.type == "cuda":
            found["reserved"] = torch.cuda.max_memory_reserved(self.device)
        return found

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            if "build" in request:
                return self.build(request["build"], request.get("limit"))
            self.memory.allow(self.limit)
            if "expect" in request:
                return self.expect(request["expect"])
            if "check" in request:
                return self.check(request["check"])
            if "warm" in request:
                return self.warm()
            return self.times(request["time"], request["estimate_ms"])
        except Exception as error:  # whatever a model throws is its result
            status, reason = explain(error)
            return {"status": status, "reason": reason}


def main() -> None:
    on = torch.device(sys.argv[1])
    serve(on, lambda: Session(on).answer)


if __name__ == "__main__":
    main()
