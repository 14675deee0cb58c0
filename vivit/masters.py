"""Parameters in bfloat16 whose optimiser works in float32: 16 bits of each number in the parameter, 16 beside it.

    master     the float32 number that steps are added to
    parameter  the nearest bfloat16, a tie away from zero: what forward and backward read
    rest       int16, the master less the parameter, in units of the master's last bit

No bit of a master is lost, and none is stored twice: both halves together are the 4 bytes of a float32 parameter, a
gradient is 2 bytes instead of 4, and products read the parameter itself, where autocast makes a copy of 2 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

CHUNK = 1 << 24  # numbers whose masters and float32 gradients exist at a time in a step: 128 MiB


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """float32 -> (bfloat16, int16), of the same shape."""
    bits = master.detach().view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def joined(parameter: Tensor, rest: Tensor) -> Tensor:
    """(bfloat16, int16) -> float32: `joined(*split(x))` is x to the bit."""
    high = parameter.detach().view(torch.int16).to(torch.int32)
    return ((high << 16) + rest).view(torch.float32)


class Masters:
    """Makes every parameter of `model`, frozen ones too, a bfloat16 one, and holds the rest of each.

    In the place of `model` where weights are read or written whole: checkpoints, exports and the running mean see
    float32. Who writes a parameter itself moves its master along.
    """

    def __init__(self, model: nn.Module):
        self.model, self.rest = model, {}
        for p in model.parameters():
            p.data, self.rest[p] = split(p.data.float())

    def value(self, p: Tensor) -> Tensor:
        """The master of a parameter: a new float32 tensor."""
        return joined(p, self.rest[p])

    def put(self, p: Tensor, master: Tensor) -> None:
        high, rest = split(master)
        p.data.copy_(high)
        self.rest[p].copy_(rest)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: self.value(p) for name, p in self.model.named_parameters()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, p in self.model.named_parameters():
            self.put(p, state[name].to(p.device, torch.float32))


class _OnMasters(torch.optim.Optimizer):
    """An optimiser of PyTorch whose groups hold a float32 stand-in for each parameter, empty but within `step`.

    A step is the optimiser's own on the masters, some tensors after others, so that few of them exist at a time. Its
    state dict is that of the same optimiser on float32 parameters.
    """

    def __init__(self, groups: list[dict[str, Any]], masters: Masters, **options: Any):
        self.masters, self.pairs = masters, []
        of_masters = []
        for group in groups:
            stand_ins = [nn.Parameter(torch.empty(0, device=p.device)) for p in group["params"]]
            self.pairs += zip(group["params"], stand_ins, strict=True)
            of_masters.append({**group, "params": stand_ins})
        super().__init__(of_masters, **options)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for chunk in self._chunks():
            for p, master in chunk:
                master.data, master.grad = self.masters.value(p), p.grad.float()
            super().step()
            for p, master in chunk:
                self.masters.put(p, master)
                master.data, master.grad = master.new_empty(0), None

    def _chunks(self) -> Iterator[list[tuple[Any, nn.Parameter]]]:
        chunk, size = [], 0
        for p, master in self.pairs:
            if p.grad is None:
                continue
            if chunk and size + p.numel() > CHUNK:
                yield chunk
                chunk, size = [], 0
            chunk.append((p, master))
            size += p.numel()
        if chunk:
            yield chunk

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p, _ in self.pairs:
            if set_to_none:
                p.grad = None
            elif p.grad is not None:
                p.grad.zero_()


class SGD(_OnMasters, torch.optim.SGD):
    pass


class AdamW(_OnMasters, torch.optim.AdamW):
    pass
