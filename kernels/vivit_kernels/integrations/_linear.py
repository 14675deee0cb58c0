"""Linear layers of a host's models, which all integrations replace alike: where this CPU has a faster product."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..accelerate import Replacement, swap_class
from ..linear import Linear, faster_dtypes


def replacement(path: str, module: nn.Module, gain: Callable[[], str]) -> Replacement | None:
    """Of a plain linear layer that is not on a GPU; gain: what the report expects of it."""
    dtypes = [str(dtype).removeprefix("torch.") for dtype in faster_dtypes()]
    if type(module) is not nn.Linear or not dtypes or module.weight.device.type == "cuda":
        return None
    why = f"on this CPU: the product by a faster route than PyTorch's in {' and '.join(dtypes)}"
    return Replacement(path, "Linear", why, gain(), swap_class(module, Linear))
