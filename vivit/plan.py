"""What fits: the memory of a training step by category, and the largest batch, clip and picture for a given GPU.

A step's largest moment is one of three: the end of the forward (all that is kept, and under autocast the copies of the
weights), the beginning of the backward (what a block's backward works on instead of the copies), or the optimiser's
step (all gradients, nothing kept). tests/test_plan.py holds it to what PyTorch allocates in a step.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from . import sequence_parallel
from .config import ViViTConfig
from .flops import block_parameters, parameters
from .footprint import Step, activations, block_kept, weight_copies
from .masters import CHUNK
from .memory import LEVELS
from .parallel import ALONE, World
from .recipe import OptimizerConfig, TrainConfig

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_MOST = 1 << 16  # clips, frames or rows: nobody asks for more


@dataclass(frozen=True)
class Need:
    """Bytes of a training step. activations: kept from the forward; workspace: what is there beside them at most.

    stay: whether gradients have memory all the time, as DDP's do, and not from their backward on alone.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int
    stay: bool = False

    @property
    def peak(self) -> int:
        always = self.parameters + self.optimizer + self.workspace
        if self.stay:
            return always + self.gradients + self.activations
        return always + max(self.activations, self.gradients)

    @property
    def parts(self) -> dict[str, int]:
        return {kind: size for kind, size in dataclasses.asdict(self).items() if kind != "stay"}


def size_of(text: str) -> int:
    """Bytes of "24GB" (10^9), "24GiB" (2^30) or a plain number. Raises ValueError."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([KMG]?I?B?)\s*", text.upper())
    if not found or found[2] not in UNITS or found[1].count(".") > 1 or not found[1].strip("."):
        raise ValueError(f"memory {text!r}: give a size such as 24GB or 24GiB")
    return int(float(found[1]) * UNITS[found[2]])


def processes(run: TrainConfig, count: int = 0) -> World:
    """One of `count` processes (0: as few as the run's sequence_parallel asks for) that train as `run` says.

    Raises ValueError or TrainingError for a number that the run's batch, clips or sequence_parallel do not go with.
    """
    P = run.sequence_parallel
    count = count or P
    if count < 1 or count % P:
        raise ValueError(f"--processes {count}: sequence_parallel = {P} takes a multiple of it\n  -> --processes {P}")
    if P > 1:
        sequence_parallel.check(run.model, P)
    world = World(0, count, kind=run.parallel, sequence=P)
    world.check(run.batch, run.augment.mixup)
    return world


def held(run: TrainConfig, device: str, world: World = ALONE) -> str:
    """A line on what a process of a run holds all the time, and its gradients."""
    found = need(run.model, Step(run.memory, 1, run.precision, device), run.optimizer, world)
    parts = ", ".join(f"{kind} {size / 2**20:,.0f} MiB" for kind, size in list(found.parts.items())[:3])
    return f"weights      {parts} ({run.optimizer.name}, optimizer.parameters = {run.optimizer.parameters!r})"


def need(config: ViViTConfig, step: Step, optimizer: OptimizerConfig | None = None, world: World = ALONE) -> Need:
    """What one training step of `ViViT(config, memory=step.memory)` takes in a process of `world`, which gets
    `step.clips` of the batch; momentum SGD unless said otherwise."""
    step = dataclasses.replace(step, sequence=world.sequence)
    count, workspace = parameters(config), _workspace(config, step)
    weights = count * (4 if step.precision == "autocast" else step.size)
    states = float(optimizer is None or optimizer.momentum > 0)
    if optimizer and optimizer.name == "adamw":
        states = 2.0 if optimizer.states == "float32" else 2 * (1 / 4 + 1 / 256)  # 8 bits, a float32 for a block of 256
    kept = int(states * weights)
    if world.together and world.kind == "fsdp":  # float32 in any case
        part = 4 * math.ceil(count / world.size)
        workspace += _gathered(config, count, 2 if step.precision == "bfloat16" else 4)
        return Need(part, part, int(states * part), activations(config, step).total(), workspace)
    if (
        optimizer and optimizer.parameters == "bfloat16"
    ):  # states in float32, and what a master has beside its parameter
        kept = int(states * 4 * count) + 2 * count
        workspace = max(workspace, 8 * min(CHUNK, count))  # masters and their gradients in the optimiser's step
    return Need(weights, weights, kept, activations(config, step).total(), workspace, stay=world.together)


def _workspace(config: ViViTConfig, step: Step) -> int:
    """Beside what is kept: in a block's backward the hidden rows' gradients, and the copies that products read."""
    E, mlp, size = config.embedding, config.mlp, step.size
    tokens = step.clips * math.ceil(config.T / step.sequence) * (config.S + config.has_class_token)
    hidden = {"fast": 2, "balanced": 2, "small": 3, "smallest": 2}[step.memory]
    backward = tokens * size * (max(hidden * mlp, 3 * E) + 4 * E) + E * mlp * (2 * size + 4)
    if step.memory == "smallest":
        backward += block_kept(config, dataclasses.replace(step, memory="balanced", offload=False)).total()
    if step.offload:
        backward += block_kept(config, step).total()  # the input that comes back meanwhile
    copies = weight_copies(config, step) if step.memory != "fast" and step.precision == "autocast" else 0
    return max(backward, tokens * size * 2 * mlp + copies)


def _gathered(config: ViViTConfig, count: int, size: int) -> int:
    """What FSDP has whole, in `size` bytes a number: what is in no block, a block at work, the next one on its way, and
    the gradients of one, which it adds up in float32."""
    block, blocks = block_parameters(config)
    return size * (count - blocks + 2 * block) + 4 * block + (size * block if size < 4 else 0)


# ---- the largest that fits ----


def largest(fits: Callable[[int], bool]) -> int:
    """The largest n >= 1 for which `fits`, which holds up to some n and not beyond; 0 where not even 1 fits."""
    if not fits(1):
        return 0
    low = 1
    while low < _MOST and fits(2 * low):
        low *= 2
    high = 2 * low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class Fit:
    """For one level: the largest batch of the configured clips, and frames or rows of one clip.

    Of several processes the batch is that of all of them, `need` what one takes.
    """

    memory: str
    batch: int
    frames: int
    rows: int
    need: Need  # of that batch, or of one clip where none fits
    offload: bool = False
    shares: int = 1  # of a batch, one for each process or for those that share clips

    @property
    def setting(self) -> str:
        return f"memory = {self.memory!r}" + (", offload = true" if self.offload else "")

    def accumulation(self, wanted: int) -> tuple[int, int]:
        """(steps, clips at once) that make a batch of `wanted`: as few steps as fit, as even as they can be."""
        mine, most = math.ceil(wanted / self.shares), self.batch // self.shares
        steps = math.ceil(mine / max(min(most, mine), 1))
        return steps, math.ceil(mine / steps) * self.shares


def fits(run: TrainConfig, room: int, device: str = "cuda", world: World = ALONE) -> Iterator[Fit]:
    """A Fit for each level and for "smallest" with offload, of `room` bytes in each process of `world`."""
    config, precision = run.model, run.precision
    _, y, x = config.tubelet
    per_step = 1 if config.tokenization == "uniform" else config.tubelet[0]
    for level, offload in (*((level, False) for level in LEVELS), ("smallest", True)):

        def enough(changed: ViViTConfig, clips: int, level: str = level, offload: bool = offload) -> bool:
            return need(changed, Step(level, clips, precision, device, offload), run.optimizer, world).peak <= room

        def longer(n: int, enough=enough) -> bool:
            frames = {"frames": n * per_step}
            if config.tokenization == "uniform":
                frames = {"frames": max(n, config.frames), "uniform_frames": n}
            return enough(dataclasses.replace(config, **frames), 1)

        def wider(n: int, enough=enough) -> bool:
            width = max(n * y * config.width // config.height, x)
            return enough(dataclasses.replace(config, height=n * y, width=width), 1)

        batch = largest(lambda clips, enough=enough: enough(config, clips))
        step = Step(level, max(batch, 1), precision, device, offload)
        found = need(config, step, run.optimizer, world)
        longest, widest, shares = largest(longer) * per_step, largest(wider) * y, world.shares
        yield Fit(level, batch * shares, longest, widest, found, offload, shares)


def report(run: TrainConfig, room: int, device: str = "cuda", world: World = ALONE) -> list[str]:
    """Lines for a terminal."""
    found = list(fits(run, room, device, world))
    names = "".join(f"{kind:>12}" for kind in found[0].need.parts)
    lines = [f"{'memory':<10}{'batch':>7}{'frames':>8}{'rows':>6}   GiB of that batch:{names}"]
    if world.together:
        lines.insert(0, f"each of{str(world).lstrip(',')}; batch: of all of them, GiB: of one")
    for fit in found:
        parts = "".join(f"{size / 2**30:>12.2f}" for size in fit.need.parts.values())
        name = "+ offload" if fit.offload else fit.memory
        lines.append(f"{name:<10}{fit.batch:>7}{fit.frames:>8}{fit.rows:>6}   {'':<18}{parts}")
    lines.append("frames, rows: of one clip, the rest as configured; what does not fit at all is 0")
    whole = [fit for fit in found if fit.batch >= run.batch]
    if whole:
        lines.append(f"batch = {run.batch} fits at once with {whole[0].setting}")
        return lines
    ours = [fit for fit in found if fit.batch and not fit.offload] or found  # a batch in parts needs no bus
    best = max(ours, key=lambda fit: fit.batch)
    if not best.batch:
        return [*lines, "not even one clip fits: fewer frames, fewer rows, or a smaller preset"]
    steps, clips = best.accumulation(run.batch)
    advice = f"{best.setting} and accumulate = {steps} take {clips} clips at once"
    return [*lines, f"batch = {run.batch} does not fit at once: {advice}"]
