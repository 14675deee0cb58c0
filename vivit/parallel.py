"""The processes of a run: who they are, what each does of a batch, and what they agree on after each step.

`torchrun --nproc-per-node 4 -m vivit train CONFIG` starts four. `config.batch` stays the batch of all of them, so that
a run is the same run with any number: DDP gives each the whole model, FSDP a part of every block's weights and states,
and `sequence_parallel = P` every P neighbours the same clips, of which each computes a part (sequence_parallel.py).

With one process, `ALONE`, none of this does anything, and nothing of torch.distributed is touched.
"""

from __future__ import annotations

import datetime
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import sequence_parallel
from .trouble import TrainingError

if TYPE_CHECKING:
    from .model import ViViT
    from .recipe import TrainConfig

T = TypeVar("T")
_ENDED: list[Any] = []  # process groups: see started
_LEAST_TIMEOUT = 1800.0  # seconds that one process may wait for the others; loading a batch may take data.timeout


class World:
    """One process among `size`; `data` of `shares` of each batch is its own, a clip lies on `sequence` of them."""

    def __init__(self, rank: int = 0, size: int = 1, local: int = 0, kind: str = "ddp", sequence: int = 1):
        self.rank, self.size, self.local, self.kind, self.sequence = rank, size, local, kind, sequence
        self.data, self.shares = rank // sequence, size // sequence
        self.first = rank == 0  # the one that writes logs, pictures and messages
        self.group: Any = None  # of the processes that have the same clips
        self.mesh: Any = None  # of all processes
        self.groups: list[Any] = []  # those made for this world, besides the default one

    def __str__(self) -> str:
        if not self.together:
            return ""
        clips = f", each clip on {self.sequence}" if self.sequence > 1 else ""
        return f", {self.size} processes ({self.kind}{clips})"

    @property
    def together(self) -> bool:
        return self.size > 1

    # -- the batch ----------------------------------------------------------------------------------------------------
    def check(self, batch: int, mixup: float) -> None:
        """Raises TrainingError where a batch has no equal shares."""
        each, rest = divmod(batch, self.shares)
        if rest or not each:
            raise TrainingError(
                f"a batch of {batch} clips has no equal parts for {self.shares} processes"
                f"\n  -> a batch that is a multiple of {self.shares}, or sequence_parallel, where several share a clip"
            )
        if mixup and self.shares > 1 and each % 2:
            raise TrainingError(
                f"augment.mixup mixes the clips of one process in pairs, and each of {self.shares} has {each} of a "
                f"batch of {batch}\n  -> a batch that is a multiple of {2 * self.shares}"
            )

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of a batch: with an even number, as many of its end as of its beginning, so that who is
        mixed with whom (the batch turned round) is the same with any number of processes."""
        each, n = len(items) // self.shares, len(items)
        half, odd = divmod(each, 2)
        if odd:
            return list(items[self.data * each : (self.data + 1) * each])
        first = self.data * half
        return [*items[first : first + half], *items[n - first - half : n - first]]

    def reseed(self, seed: int, step: int) -> None:
        """Other random numbers for other clips, the same ones where a clip lies."""
        if self.together:
            state = np.random.SeedSequence((seed, step, self.data)).generate_state(1, np.uint64)
            torch.manual_seed(int(state[0] >> np.uint64(1)))

    # -- the model ----------------------------------------------------------------------------------------------------
    def wrap(self, model: ViViT, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
        """What a step calls: `model` itself where there is one process, or FSDP's, whose parameters become DTensors:
        float32 masters, of which FSDP makes the weights that a block computes with, in `dtype`."""
        if not self.together:
            return model
        if self.sequence > 1:
            sequence_parallel.shard(model, self.group)
        if self.kind == "fsdp":
            _fully_shard(model, self.mesh, dtype)
            return model
        from torch.nn.parallel import DistributedDataParallel

        ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(model, ids, gradient_as_bucket_view=True)

    @contextmanager
    def gradients(self, wrapped: nn.Module, last: bool) -> Iterator[None]:
        """Around a part of a batch: DDP's processes add their gradients up with the last one's alone. FSDP's do with
        each, since a process that kept whole gradients until then would need the memory that FSDP saves."""
        if not last and self.together and self.kind == "ddp":
            with wrapped.no_sync():  # pyright: ignore[reportCallIssue, reportGeneralTypeIssues, reportAttributeAccessIssue]
                yield
        else:
            yield

    # -- agreement ----------------------------------------------------------------------------------------------------
    def agreed(self, loss: float, norm: Tensor) -> tuple[float, float]:
        """(mean loss of all processes, gradient norm): not finite in all where it is not in one."""
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        size = norm.item()
        if not self.together:
            return loss, size
        told = torch.tensor([loss / self.size, 0.0 if math.isfinite(size) else math.nan], dtype=torch.float64)
        dist.all_reduce(told)
        return told[0].item(), size if math.isfinite(told[1].item()) else (math.nan if math.isfinite(size) else size)

    def signal(self, caught: list[int]) -> int:
        """The signal that one of the processes caught, or 0: they stop after the same step."""
        if not self.together:
            return caught[0] if caught else 0
        number = torch.tensor(caught[0] if caught else 0)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number)

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, in each of them."""
        if not self.together:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def from_first(self, value: T) -> T:
        """The first process's value; what others give is not looked at."""
        if not self.together:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        if self.together:
            self.gathered(None)

    def added(self, tensor: Tensor) -> Tensor:
        """The sum over those who have clips of their own, of a tensor on the CPU."""
        if self.together:
            tensor = tensor.clone() if self.rank % self.sequence == 0 else torch.zeros_like(tensor)
            dist.all_reduce(tensor)
        return tensor


ALONE = World()


# ---- tensors that lie on several processes ----


def whole(tensor: Tensor) -> Tensor:
    """A DTensor's value in each process; another tensor as it is. All processes call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, in the tensor's own memory."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


def laid_out(value: Tensor, like: Tensor) -> Tensor:
    """`value`, known whole to every process, as `like` lies on them."""
    if not hasattr(like, "to_local") or hasattr(value, "to_local") or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    there = like.device_mesh, like.placements  # pyright: ignore[reportAttributeAccessIssue]
    return distribute_tensor(value.to(like.device), *there, src_data_rank=None)  # nobody sends what all have


def on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors in the host's memory; of DTensors each process has there what it has of them now."""
    meshes = [t.device_mesh for t in tensors.values() if hasattr(t, "to_local")]  # pyright: ignore[reportAttributeAccessIssue]
    if not meshes:
        return {name: t.cpu() for name, t in tensors.items()}
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", tuple(meshes[0].shape))
    found = {}
    for name, t in tensors.items():
        assert isinstance(t, DTensor)
        shape = {"shape": t.shape, "stride": t.stride()}
        found[name] = DTensor.from_local(local(t).cpu(), mesh, t.placements, run_check=False, **shape)
    return found


def settled(model: nn.Module) -> None:
    """FSDP leaves the root's weights gathered after a forward without a backward, plain tensors in the place of its
    DTensors: back to them, for who goes through the parameters."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # pyright: ignore[reportCallIssue]


def _fully_shard(model: ViViT, mesh: Any, dtype: torch.dtype) -> None:
    """FSDP2: each block a unit, the rest of the model another; the weights of a unit are gathered, in `dtype`, while it
    computes."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    narrow = dtype != torch.float32  # gradients are added up in float32, as the masters are
    policy = MixedPrecisionPolicy(dtype, torch.float32) if narrow else MixedPrecisionPolicy()
    blocks = [*model.blocks, *(model.temporal.blocks if model.temporal is not None else ())]
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
        register_fsdp_forward_method(block, "class_row")
    fully_shard(model, mesh=mesh, mp_policy=policy)


# ---- start and end ----


@contextmanager
def started(config: TrainConfig) -> Iterator[World]:
    """The processes that torchrun started, or `ALONE`. Raises TrainingError where they cannot work as `config` asks."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    _check_start(config, size)
    if size == 1:
        yield ALONE
        return
    local, cuda = int(os.environ.get("LOCAL_RANK", "0")), _on_gpu(config.device)
    if cuda and local >= torch.cuda.device_count():
        raise TrainingError(
            f"process {local} of this machine has no GPU of its own: there are {torch.cuda.device_count()}"
            f"\n  -> torchrun --nproc-per-node {torch.cuda.device_count()}, or device = 'cpu'"
        )
    if cuda:
        torch.cuda.set_device(local)
    patience = max(_LEAST_TIMEOUT, 2 * config.data.timeout)
    # small agreements go between CPUs even where gradients go between GPUs: no step waits for the device for them
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=patience))
    world = joined(config.parallel, config.sequence_parallel, "cuda" if cuda else "cpu", local)
    # Held until the process ends. Else DDP, which is freed later than this, lets go of the last reference while it has
    # the GIL, and waits for a thread of gloo that frees a tensor and waits for the GIL.
    _ENDED.extend([dist.group.WORLD, *world.groups])
    yield world
    dist.destroy_process_group()  # after an error the others may be gone, and the process ends anyway


def joined(kind: str, sequence: int, device: str, local: int = 0) -> World:
    """The processes of the default group as `kind`, with `sequence` of them to a clip. All of them call it."""
    from torch.distributed.device_mesh import init_device_mesh

    world = World(dist.get_rank(), dist.get_world_size(), local, kind, sequence)
    world.mesh = init_device_mesh(device, (world.size,))
    if sequence > 1:  # neighbours, which are on one machine, share clips
        grid = init_device_mesh(device, (world.shares, sequence), mesh_dim_names=("data", "sequence"))
        world.group = grid["sequence"].get_group()
        world.groups = grid.get_all_groups()
    return world


def _on_gpu(device: str) -> bool:
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def _check_start(config: TrainConfig, size: int) -> None:
    if size > 1 and not dist.is_available():
        raise TrainingError("this build of PyTorch has no torch.distributed\n  -> another build, or one process")
    P = config.sequence_parallel
    if size % P:
        raise TrainingError(
            f"sequence_parallel = {P}: {size} process{'es are' if size > 1 else ' is'} no multiple of it"
            f"\n  -> torchrun --nproc-per-node {math.ceil(size / P) * P} -m vivit train ..."
        )
    if P > 1:
        sequence_parallel.check(config.model, P)
    if size > 1 and config.optimizer.states != "float32":
        raise TrainingError(
            f"optimizer.states = {config.optimizer.states!r} with {size} processes: states of 8 bits are for one, as "
            "checkpoints of several hold plain tensors\n  -> states = 'float32'; parallel = 'fsdp' gives each process "
            "its part of them"
        )


_LOST = re.compile(r"gloo|Connection (closed|reset) by peer|NCCL|ProcessGroup|Broken pipe|Socket", re.IGNORECASE)


@contextmanager
def losses_explained(world: World, step: Any) -> Iterator[None]:
    """A process that is gone, or hangs, as those that wait for it see it. step: a function, asked when it happens."""
    try:
        yield
    except RuntimeError as error:
        if not world.together or not (isinstance(error, dist.DistError) or _LOST.search(str(error))):
            raise
        said = str(error).splitlines()[0][:160]
        raise TrainingError(
            f"step {step()}: another of the {world.size} processes ended or does not answer ({said})"
            "\n  -> its own message, or torchrun's summary, says why; --resume goes on from the last checkpoint"
        ) from error
