"""Registers vivit_kernels::tubelet_embedding_fwd and _bwd: schema, fake, autograd."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import _transforms

_LIBRARY = torch.library.Library("vivit_kernels", "FRAGMENT")
_NAME = "vivit_kernels::tubelet_embedding"
_ARGUMENTS = (
    "Tensor video, Tensor weight, Tensor? bias, Tensor? position, Tensor? class_token, "
    "bool per_frame, float[] scale, float[] shift"
)
_MODULES = {"torch": "composed", "cpu": "cpu_kernels", "cuda": "cuda_kernels", "triton": "triton_kernels"}


def _launcher(backend: str, name: str):
    return getattr(importlib.import_module(f"{__package__}.{_MODULES[backend]}"), name)


def _fwd(video, weight, bias, position, class_token, per_frame, scale, shift, backend):
    return _launcher(backend, "launch_fwd")(video, weight, bias, position, class_token, per_frame, scale, shift)


def _fwd_fake(video, weight, bias, position, class_token, per_frame, scale, shift, backend):
    B, (T, rows, columns) = video.shape[0], (video.shape[2 + i] // weight.shape[2 + i] for i in range(3))
    first = int(class_token is not None)
    shape = (B, T, rows * columns + first) if per_frame else (B, T * rows * columns + first)
    return weight.new_empty(*shape, weight.shape[0])


def _bwd(dout, video, weight, bias, position, class_token, per_frame, scale, shift, needs, backend):
    return _launcher(backend, "launch_bwd")(
        dout, video, weight, bias, position, class_token, per_frame, scale, shift, needs
    )


def _bwd_fake(dout, video, weight, bias, position, class_token, per_frame, scale, shift, needs, backend):
    inputs = (video, weight, bias, position, class_token)
    return [x.new_empty(x.shape) if need else video.new_empty(0) for x, need in zip(inputs, needs, strict=True)]


def _setup_context(ctx, inputs, output):
    *tensors, per_frame, scale, shift, backend = inputs
    ctx.save_for_backward(*tensors)  # the video as it came (uint8: a byte per pixel) and parameters: nothing else
    ctx.options = per_frame, scale, shift
    ctx.backend = backend


def _backward(ctx, dout: Tensor):
    needs = list(ctx.needs_input_grad[:5])
    gradients = _run_bwd(dout, *ctx.saved_tensors, *ctx.options, needs, ctx.backend)
    return (*(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None, None, None)


def _no_double_backward(ctx, *_):
    raise NotImplementedError(
        "tubelet_embedding: double backward (a gradient of a gradient) is not implemented; "
        "got create_graph=True through it. Use a plain Conv3d where second derivatives are needed"
    )


_LIBRARY.define(f"tubelet_embedding_fwd({_ARGUMENTS}, str backend) -> Tensor")
_LIBRARY.define(f"tubelet_embedding_bwd(Tensor dout, {_ARGUMENTS}, bool[] needs, str backend) -> Tensor[]")
_LIBRARY.impl("tubelet_embedding_fwd", _fwd, "CompositeExplicitAutograd")
_LIBRARY.impl("tubelet_embedding_bwd", _bwd, "CompositeExplicitAutograd")
torch.library.register_fake(f"{_NAME}_fwd", _fwd_fake, lib=_LIBRARY)
torch.library.register_fake(f"{_NAME}_bwd", _bwd_fake, lib=_LIBRARY)
torch.library.register_autograd(f"{_NAME}_fwd", _backward, setup_context=_setup_context, lib=_LIBRARY)
torch.library.register_autograd(f"{_NAME}_bwd", _no_double_backward, lib=_LIBRARY)

# Of a checked call; arguments: of the registered ops.
run, _run_bwd = _transforms.registered("tubelet_embedding", _setup_context, _backward, _no_double_backward)


def _products(video: tuple, weight: tuple) -> int:
    """FLOPs of one product of all tubelets with the weight."""
    tokens = video[0]
    for i in range(3):
        tokens *= video[2 + i] // weight[2 + i]
    return 2 * tokens * weight[0] * weight[1] * weight[2] * weight[3] * weight[4]


@register_flop_formula(torch.ops.vivit_kernels.tubelet_embedding_fwd)
def _fwd_flops(video, weight, *_, **__) -> int:
    return _products(video, weight)


@register_flop_formula(torch.ops.vivit_kernels.tubelet_embedding_bwd)
def _bwd_flops(dout, video, weight, bias, position, class_token, per_frame, scale, shift, needs, *_, **__) -> int:
    return _products(video, weight) * (needs[0] + needs[1])
