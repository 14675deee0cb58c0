"""transformers: MLPs whose GELU is part of the product before it, and linear layers where a CPU has a faster product.

Two forms: a whole MLP (fc1, activation, fc2), and the first half of one (dense, activation, dropout) whose second half
also adds the residual. Parameters, hooks and adapters stay the host's: a layer that is watched, or is no plain Linear
any more, is called as it was. Source: transformers 5.23, `VivitMLP`, `VideoPrismMLP`, `VJEPA2MLP`,
`VideoMAEIntermediate`, `TimesformerIntermediate`, activations.py; 4.57.6, `VivitIntermediate`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..linear import Linear, linear_gelu, mlp
from ._mixin import Mixin
from .transformers_embeddings import is_bare

# Classes of activations.py, ours of the same name included: which GELU they compute
_TANH = ("FastGELUActivation", "NewGELUActivation", "GELUTanh", "PytorchGELUTanh")
_EXACT = ("GELUActivation",)


class OurMLP(Mixin):
    """Mixed in before an MLP: what it computes, by `mlp`."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        act, fc1, fc2 = activation(self), self.fc1, self.fc2
        kind = _gelu(act)
        if kind is None or not _plain(fc1, fc2) or not is_bare(act, fc1, fc2):
            return super().forward(*args, **kwargs)
        (x,) = (*args, *kwargs.values())
        return mlp(x, fc1, fc2, kind)


class OurIntermediate(Mixin):
    """Mixed in before the first half of an MLP: what it computes, by `linear_gelu`."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        act, dense = activation(self), self.dense
        kind = _gelu(act)
        if kind is None or not _plain(dense) or not is_bare(act, dense):
            return super().forward(*args, **kwargs)
        (x,) = (*args, *kwargs.values())
        hidden = linear_gelu(x, dense.weight, dense.bias, kind)
        return self.dropout(hidden) if "dropout" in self._modules else hidden


def why_no_gelu(module: nn.Module) -> str:
    """Why an MLP is none of a linear layer and a GELU; "" if it is."""
    first = getattr(module, "fc1", None) or getattr(module, "dense", None)
    if not _plain(first):
        return f"its first layer is a {type(first).__name__}, which may do more than a linear layer"
    act = activation(module)
    return "" if _gelu(act) else f"its activation {type(act).__name__} is no GELU"


def activation(module: Any) -> Any:
    """Of an MLP or its first half; a config may give a function."""
    names = ("activation_fn", "activation", "intermediate_act_fn")
    return next((found for name in names if (found := getattr(module, name, None)) is not None), None)


def _gelu(act: object) -> str | None:
    """`approximate` of F.gelu, where that is what an activation computes."""
    if type(act) is nn.GELU:
        return act.approximate
    names = [cls.__name__ for cls in type(act).__mro__ if cls.__module__ == "transformers.activations"][:1]
    return "tanh" if names and names[0] in _TANH else "none" if names and names[0] in _EXACT else None


def _plain(*layers: object) -> bool:
    return all(type(layer) in (nn.Linear, Linear) for layer in layers)
