"""Linear layers of a host's models, which all integrations replace alike: where this CPU has a faster product."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..accelerate import Replacement, swap_class
from ..linear import Linear, is_faster

WHY = "on this CPU: the product by a faster route than PyTorch's"


def replacement(path: str, module: nn.Module, gain: Callable[[], str]) -> Replacement | None:
    """Of a plain linear layer that is not on a GPU; gain: what the report expects of it."""
    if type(module) is not nn.Linear or not is_faster() or module.weight.device.type == "cuda":
        return None
    return Replacement(path, "Linear", WHY, gain(), swap_class(module, Linear))
