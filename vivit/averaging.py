"""A running mean of the weights, which is often better than the last ones: evaluated and exported in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .masters import Masters
from .parallel import laid_out, local, on_cpu


class Average:
    """After each step `value = decay * value + (1 - decay) * weight`; beginning with the weights as they are.

    on: "model" keeps the mean beside the weights, "cpu" takes it off a GPU, for a copy of the weights in each step.
        With FSDP each process has the mean of its part, here or there.
    masters: of a model in bfloat16, whose mean is that of its masters, in float32.
    """

    def __init__(self, model: nn.Module, decay: float, on: str = "model", masters: Masters | None = None):
        self.decay, self.masters = decay, masters
        self.values = masters.state_dict() if masters else {n: p.detach().clone() for n, p in model.named_parameters()}
        if on == "cpu":
            self.values = on_cpu(self.values)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            value = local(self.values[name])
            weight = local(p) if self.masters is None else self.masters.value(p)
            value.lerp_(weight.to(value.device), 1 - self.decay)

    @contextmanager
    def inside(self, model: nn.Module) -> Iterator[None]:
        """The model has the mean's weights here and its own again afterwards, the very same."""
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            value = self.values[name]
            if self.masters is not None:
                before = self.masters.value(p)
                self.masters.put(p, value.to(p.device))
                value.copy_(before)
            elif hasattr(p, "to_local"):  # FSDP gathers from the memory that it gave the parameter: its contents change
                mine, mean = local(p), local(value)
                before = mine.clone()
                mine.copy_(mean)
                mean.copy_(before)
            else:
                p.data, self.values[name] = value.to(p.device), p.data.to(value.device)

    def load(self, values: dict[str, Tensor]) -> None:
        for name, value in self.values.items():
            local(value).copy_(local(laid_out(values[name], value)))
