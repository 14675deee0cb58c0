"""Block inputs that wait for their backward in the host's memory: `memory = "smallest"` with `offload`.

    forward    a block's input goes to the host while the block computes, and leaves the device when the next one begins
    backward   the input of the block before comes back while a block computes again and goes backward

So the device holds one block input at the end of a forward and two in a backward, whatever the depth. One transfer is
in hand at a time. On a GPU it is a copy between pinned memory and a stream of its own; on a CPU a plain copy, which
saves nothing there and is what the tests look at: the streams have not run on a GPU yet.

A transfer of n bytes is hidden where a block takes longer: with E numbers a token its forward is at least 24 E^2
operations for 2 E bytes, so at 25 GB/s of a bus and 400 TFLOP/s a block of E = 768 waits, and one of E = 2048 does not.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor


class Kept:
    """A tensor in the host's memory, where it came from, and the one that was kept before it."""

    def __init__(self, host: Tensor, device: torch.device, before: weakref.ref[Kept] | None):
        self.host, self.device, self.before = host, device, before


class Offload:
    """One for all blocks of a model. `with offload.hooks():` what autograd saves goes to the host and comes back."""

    def __init__(self):
        self.latest: weakref.ref[Kept] | None = None
        self.moving: tuple[Kept, Tensor, Any] | None = None  # of whom, its tensor on the device, when the copy is done
        self.stream: Any = None

    def __reduce__(self):  # copies and pickles of a model begin with none in hand
        return Offload, ()

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)

    def pack(self, x: Tensor) -> Kept:
        self.settle()  # the one before is on the host, and leaves the device
        kept = Kept(torch.empty_like(x, device="cpu", pin_memory=x.is_cuda), x.device, self.latest)
        self.moving = kept, x, self._copy(kept.host, x)
        self.latest = weakref.ref(kept)
        return kept

    def unpack(self, kept: Kept) -> Tensor:
        if self.moving is None or self.moving[0] is not kept:
            self.fetch(kept)
        x = self.settle()
        assert x is not None
        before = kept.before() if kept.before is not None else None
        if before is not None:
            self.fetch(before)
        return x

    def fetch(self, kept: Kept) -> None:
        """Begins to bring it back."""
        self.settle()
        x = torch.empty_like(kept.host, device=kept.device)
        self.moving = kept, x, self._copy(x, kept.host)

    def settle(self) -> Tensor | None:
        """The tensor of the transfer in hand: what this stream does from here on comes after it. So its memory, which
        is this stream's, may be freed or written."""
        if self.moving is None:
            return None
        (_, x, done), self.moving = self.moving, None
        self._wait(x, done)
        return x

    def _wait(self, x: Tensor, done: Any) -> None:
        if done is not None:
            torch.cuda.current_stream(x.device).wait_event(done)

    def _copy(self, target: Tensor, source: Tensor) -> Any:
        on_gpu = target if target.is_cuda else source
        if not on_gpu.is_cuda:
            target.copy_(source)
            return None
        self.stream = self.stream or torch.cuda.Stream(on_gpu.device)
        self.stream.wait_stream(torch.cuda.current_stream(on_gpu.device))  # the source is there, the target is free
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        return self.stream.record_event()
