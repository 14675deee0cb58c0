"""The optimiser of a run, and how it is computed: momentum SGD or AdamW, their states in 32 bits or in 8, parameters
in float32 or in bfloat16 (masters.py).

Bytes per parameter beside the parameter and its gradient: SGD 4, AdamW 8; AdamW in 8 bits 2 and a scale per block, for
matrices of 4096 numbers and more (Dettmers et al. 2022, arXiv 2110.02861), by torchao or bitsandbytes where one of them
is installed: a choice by name, never taken by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from . import finetune, masters
from .masters import Masters
from .model import ViViT
from .recipe import OptimizerConfig

_INSTALL = "\n  -> pip install torchao (any device), or bitsandbytes (GPUs); or states = 'float32'"


def make_optimizer(
    model: ViViT, config: OptimizerConfig, layer_decay: float = 1.0, wide: Masters | None = None
) -> torch.optim.Optimizer:
    """Heavy-ball SGD (m = momentum*m + g, w -= lr*m), or AdamW that decays matrices only.

    config.kernel: "auto" is PyTorch's choice, "foreach" and "fused" work on many tensors at once, "loop" on one after
    the other with no workspace. config.states: "float32", "torchao" or "bitsandbytes", 8 bits by that package. wide:
    the float32 masters of a model whose parameters are bfloat16.
    Raises ModuleNotFoundError where the package is not installed.
    """
    groups = finetune.parameter_groups(model, config.weight_decay, layer_decay)
    if config.states != "float32":
        return _eight_bits(groups, config)
    how: dict[str, Any] = {
        "auto": {},
        "foreach": {"foreach": True},
        "fused": {"fused": True},
        "loop": {"foreach": False},
    }
    options = how[config.kernel]
    if config.name == "sgd":
        options |= dict(lr=config.lr, momentum=config.momentum)
        return torch.optim.SGD(groups, **options) if wide is None else masters.SGD(groups, wide, **options)
    options |= dict(lr=config.lr, betas=config.betas)
    return torch.optim.AdamW(groups, **options) if wide is None else masters.AdamW(groups, wide, **options)


@torch.no_grad()
def clip(parameters: Iterable[nn.Parameter], most: float) -> Tensor:
    """The norm of all gradients together; where it is larger than `most` (0: any may be), they are cut to that norm.

    As nn.utils.clip_grad_norm_, whose norm of bfloat16 gradients is a bfloat16 number: here it is a float32 one.
    """
    learning = [p for p in parameters if p.grad is not None]
    gradients = [p.grad for p in learning if p.grad is not None]
    if not any(g.dtype == torch.bfloat16 for g in gradients):
        return nn.utils.clip_grad_norm_(learning, most or math.inf)
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if most:
        nn.utils.clip_grads_with_norm_(learning, most, norm)
    return norm


def set_rate(group: dict[str, Any], rate: float) -> None:
    """The learning rate of the group's next step; torchao keeps it in a tensor."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _eight_bits(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    try:
        if config.states == "torchao":
            from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
        else:
            from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        message = f"optimizer.states = {config.states!r}: {config.states} is not installed here ({error}){_INSTALL}"
        raise ModuleNotFoundError(message, name=config.states) from error
    return AdamW8bit(groups, lr=config.lr, betas=config.betas)
