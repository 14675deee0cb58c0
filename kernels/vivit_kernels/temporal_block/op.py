"""Registers vivit_kernels::temporal_block_fwd and _bwd: schema, fake, autograd. Saves the inputs and nothing else."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import _transforms

_LIBRARY = torch.library.Library("vivit_kernels", "FRAGMENT")
_NAME = "vivit_kernels::temporal_block"
_ARGUMENTS = "Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor bias, int heads, float eps"
_MODULES = {"torch": "composed", "triton": "triton_kernels"}


def _launcher(backend: str, name: str):
    return getattr(importlib.import_module(f"{__package__}.{_MODULES[backend]}"), name)


def _fwd(x, norm_weight, norm_bias, weight, bias, heads, eps, backend):
    return _launcher(backend, "launch_fwd")(x, norm_weight, norm_bias, weight, bias, heads, eps)


def _bwd(do, x, norm_weight, norm_bias, weight, bias, heads, eps, backend):
    return _launcher(backend, "launch_bwd")(do, x, norm_weight, norm_bias, weight, bias, heads, eps)


def _fwd_fake(x, *_):
    return x.new_empty(x.shape)


def _bwd_fake(do, *tensors_and_options):
    return [x.new_empty(x.shape) for x in tensors_and_options[:5]]


def _setup_context(ctx, inputs, output):
    *tensors, heads, eps, backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = heads, eps, backend


def _backward(ctx, do: Tensor):
    gradients = _run_bwd(do, *ctx.saved_tensors, *ctx.options)
    needs = ctx.needs_input_grad[:5]
    return (*(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None, None)


def _no_double_backward(ctx, *_):
    raise NotImplementedError(
        "temporal_block: double backward (a gradient of a gradient) is not implemented; got create_graph=True through "
        "it. Use plain PyTorch layers where second derivatives are needed"
    )


_LIBRARY.define(f"temporal_block_fwd({_ARGUMENTS}, str backend) -> Tensor")
_LIBRARY.define(f"temporal_block_bwd(Tensor do, {_ARGUMENTS}, str backend) -> Tensor[]")
_LIBRARY.impl("temporal_block_fwd", _fwd, "CompositeExplicitAutograd")
_LIBRARY.impl("temporal_block_bwd", _bwd, "CompositeExplicitAutograd")
torch.library.register_fake(f"{_NAME}_fwd", _fwd_fake, lib=_LIBRARY)
torch.library.register_fake(f"{_NAME}_bwd", _bwd_fake, lib=_LIBRARY)
torch.library.register_autograd(f"{_NAME}_fwd", _backward, setup_context=_setup_context, lib=_LIBRARY)
torch.library.register_autograd(f"{_NAME}_bwd", _no_double_backward, lib=_LIBRARY)

# Of a checked call; arguments: of the registered ops.
run, _run_bwd = _transforms.registered("temporal_block", _setup_context, _backward, _no_double_backward)


def _flops(x: tuple, weight: tuple) -> tuple[int, int]:
    """(of the projection, of one product of the attention of all heads)."""
    B, T, S, E = x
    return 2 * B * T * S * E * weight[0], 2 * B * T * T * S * E


@register_flop_formula(torch.ops.vivit_kernels.temporal_block_fwd)
def _fwd_flops(x, norm_weight, norm_bias, weight, *_, **__) -> int:
    projection, product = _flops(x, weight)
    return projection + 2 * product


@register_flop_formula(torch.ops.vivit_kernels.temporal_block_bwd)
def _bwd_flops(do, x, norm_weight, norm_bias, weight, *_, **__) -> int:
    projection, product = _flops(x, weight)
    return 3 * projection + 5 * product
