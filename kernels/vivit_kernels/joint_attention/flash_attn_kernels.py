"""Backend `flash_attn` of joint_attention: FlashAttention 2, 3 or 4, whichever is installed for this GPU.

Its functions below autograd are called, which give and take the logsumexp. They are private to it and differ from
release to release in what else they take: `_invoke` passes by name what a release knows.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _environment
from .._attention.options import Options
from .._triton import arch_of
from .peer_views import whole_vectors, write

# version: module, its forward, its backward
_FUNCTIONS = {
    2: ("flash_attn.flash_attn_interface", "_flash_attn_forward", "_flash_attn_backward"),
    3: ("flash_attn_interface", "_flash_attn_forward", "_flash_attn_backward"),
    4: ("flash_attn.cute.interface", "_flash_attn_fwd", "_flash_attn_bwd"),
}
# What a plain call of any of them says, in the words of all releases. Every one of these means "without".
_PLAIN = {
    "dropout_p": 0.0,
    "causal": False,
    "is_causal": False,
    "window_size_left": -1,
    "window_size_right": -1,
    "window_size": (-1, -1),
    "return_softmax": False,
}


@functools.cache
def _parameters(function: Callable) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(getattr(function, "_init_fn", function)).parameters  # behind a torch.library.custom_op


def _invoke(function: Callable, needed: dict[str, Any], plain: dict[str, Any]) -> Any:
    """function(**needed) and of `plain` what it knows; None for whatever else it insists on."""
    known = _parameters(function)
    if missing := needed.keys() - known:
        raise NotImplementedError(
            f"joint_attention: backend 'flash_attn': the installed release's {getattr(function, '__name__', function)} "
            f"does not take {', '.join(sorted(missing))}; install another one, or use backend='triton'"
        )
    insisted = {name: None for name, parameter in known.items() if parameter.default is parameter.empty}
    return function(**insisted | {name: x for name, x in plain.items() if name in known} | needed)


def _function(q: Tensor, backward: bool) -> tuple[int, Callable]:
    version = _environment.flash_attn_for(arch_of(q.device))
    if version is None:
        raise NotImplementedError("joint_attention: backend 'flash_attn' is not installed for this GPU")
    module, *names = _FUNCTIONS[version]
    return version, getattr(importlib.import_module(module), names[backward])


def _softcap(version: int, options: Options) -> dict[str, Any]:
    return {"softcap": options.softcap} if options.softcap and version != 4 else {}


def launch_fwd(q: Tensor, k: Tensor, v: Tensor, _: int, options: Options, keep: bool = False):
    """q `[B, N_q, H, D]`, k, v `[B, N_k, H, D]` -> (o like q, logsumexp fp32 `[B, H, N_q]` or None)."""
    B, N, H, _ = q.shape
    if B == 0:
        return q.new_empty(q.shape), q.new_empty(B, H, N, dtype=torch.float32) if keep else None
    version, forward = _function(q, backward=False)
    q, k, v = whole_vectors(q, k, v)
    needed = {"q": q, "k": k, "v": v, "softmax_scale": options.scale} | _softcap(version, options)
    if version == 4:
        o, lse = _invoke(forward, needed | {"return_lse": True}, {"causal": False})[:2]
    else:
        o, lse = _invoke(forward, needed, {"softcap": 0.0} | _PLAIN)[:2]
    return o.contiguous(), lse.contiguous() if keep else None


def launch_bwd(do, q, k, v, o, lse, dq, dk, dv, _: int, options: Options) -> None:
    """Writes dq, dk, dv; versions 2 and 3 in place."""
    if q.shape[0] == 0:
        return
    version, backward = _function(q, backward=True)
    do, q, k, v, o = whole_vectors(do, q, k, v, o)
    needed = {"dout": do, "q": q, "k": k, "v": v, "out": o, "softmax_scale": options.scale}
    needed |= _softcap(version, options)
    plain: dict[str, Any] = {"deterministic": torch.are_deterministic_algorithms_enabled()}
    if version == 4:
        gradients = _invoke(backward, needed | {"lse": lse}, plain | {"causal": False})
        write((dq, dk, dv), gradients[:3])
        return
    places = (dq, dk, dv)
    written = whole_vectors(*places)  # copies only where a place begins between two vectors
    needed |= {"softmax_lse": lse} | dict(zip(("dq", "dk", "dv"), written, strict=True))
    _invoke(backward, needed, {"softcap": 0.0} | _PLAIN | plain)
    for place, made in zip(places, written, strict=True):
        if made is not place:
            place.copy_(made)
