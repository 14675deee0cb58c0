"""Attention as others compute it: every peer takes the packed projection and gives back what the next layer reads.

A peer is a core, a function of q, k, v with one sequence per row. `_honest` brings the grid to it and back, with the
permutes and copies that costs; `_ideal` hands it tensors that lie as it likes, and takes its output as it comes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .attention import Attention, unpacked
from .peers import Candidate, Missing, Refused, peer, require

Core = Callable[[Tensor, Tensor, Tensor], Tensor]
OPS = ("temporal", "spatial", "dot_product", "joint")


class Part(NamedTuple):
    """Heads that attend over the same axis."""

    heads: slice
    over_time: bool


def parts(x: Attention) -> list[Part]:
    case, split = x.case, x.case.temporal_heads
    return [Part(slice(0, split), True)] * (split > 0) + [Part(slice(split, case.H), False)] * (split < case.H)


def to_sequences(x: Tensor, over_time: bool) -> Tensor:
    """`[B, T, S, H, D]` -> `[G, N, H, D]`: along time a copy, within frames a view."""
    return (x.transpose(1, 2) if over_time else x).flatten(0, 1)


def to_grid(o: Tensor, over_time: bool, B: int) -> Tensor:
    """`[G, N, H, D]` -> `[B, T, S, H, D]`."""
    o = o.unflatten(0, (B, -1))
    return o.transpose(1, 2) if over_time else o


def heads_first(core: Core) -> Core:
    """A core over `[G, H, N, D]` as one over `[G, N, H, D]`; the transposes are views."""
    return lambda q, k, v: core(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _honest(x: Attention, core: Core) -> Candidate:
    qkv, split = x.qkv.detach().requires_grad_(), parts(x)

    def forward() -> Tensor:
        grids = []
        for part in split:
            sequences = (to_sequences(y[..., part.heads, :], part.over_time) for y in qkv.unbind(3))
            grids.append(to_grid(core(*sequences), part.over_time, x.case.B))
        return grids[0].contiguous() if len(grids) == 1 else torch.cat(grids, -2)

    return Candidate([qkv], forward, x.do, gradients=unpacked)


def _ideal(x: Attention, core: Core, transposed: bool) -> Candidate:
    """transposed: the core likes `[G, H, N, D]`; then the tensors lie so, and it is handed views of `[G, N, H, D]`."""

    def lay(y: Tensor) -> Tensor:
        return y.transpose(1, 2).contiguous().transpose(1, 2) if transposed else y.contiguous()

    ((_, over_time),) = parts(x)  # with heads of both kinds no one layout is ideal: not registered for them
    leaves = [lay(to_sequences(y, over_time)).detach().requires_grad_() for y in x.qkv.unbind(3)]
    do = lay(to_sequences(x.do, over_time))

    def grid(y: Tensor) -> Tensor:
        return to_grid(y, over_time, x.case.B)

    return Candidate(leaves, lambda: core(*leaves), do, output=grid, gradients=lambda ys: [grid(y) for y in ys])


def contestant(name: str, transposed: bool, ideal: bool = False) -> Callable:
    """Registers `name`, and with ideal=True `name_ideal`, from a function that makes the core for a case."""

    def add(make: Callable[[Attention], Core]) -> Callable[[Attention], Core]:
        def wrapped(x: Attention) -> Core:
            return heads_first(make(x)) if transposed else make(x)

        peer(*OPS, name=name)(lambda x: _honest(x, wrapped(x)))
        if ideal:
            peer(*OPS[:2], OPS[3], name=f"{name}_ideal", ideal=True)(lambda x: _ideal(x, wrapped(x), transposed))
        return make

    return add


def _without_softcap(x: Attention, who: str) -> None:
    if x.case.softcap:
        raise Refused(f"{who} has no soft-cap")


def matmul_softmax(x: Attention) -> Core:
    """The textbook: the N x N matrix in memory, four times over."""
    scale, cap = x.case.D**-0.5, x.case.softcap

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [G, H, N, D]
        scores = (q * scale) @ k.transpose(-2, -1)
        if cap:
            scores = cap * torch.tanh(scores / cap)
        return torch.softmax(scores, -1) @ v

    return core


contestant("eager", transposed=True)(matmul_softmax)


@peer(*OPS)
def compiled(x: Attention) -> Candidate:
    """torch.compile of the textbook with its permutes: what fusion alone can do."""
    candidate = _honest(x, heads_first(matmul_softmax(x)))
    candidate.forward = torch.compile(candidate.forward, dynamic=False)
    return candidate


def _sdpa(x: Attention, backend: SDPBackend | None) -> Core:
    _without_softcap(x, "scaled_dot_product_attention")
    if backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        if x.device.type == "cpu" and backend == SDPBackend.FLASH_ATTENTION:
            raise Missing("measured as `sdpa`: on a CPU it is this kernel")
        if x.device.type == "cpu":
            raise Missing("this kernel of PyTorch runs on GPUs only")

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [G, H, N, D]
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return core


contestant("sdpa", transposed=True, ideal=True)(lambda x: _sdpa(x, None))
contestant("sdpa_flash", transposed=True, ideal=True)(lambda x: _sdpa(x, SDPBackend.FLASH_ATTENTION))
contestant("sdpa_efficient", transposed=True)(lambda x: _sdpa(x, SDPBackend.EFFICIENT_ATTENTION))
contestant("sdpa_cudnn", transposed=True, ideal=True)(lambda x: _sdpa(x, SDPBackend.CUDNN_ATTENTION))
contestant("sdpa_math", transposed=True)(lambda x: _sdpa(x, SDPBackend.MATH))


@contestant("flex_attention", transposed=True)
def flex_attention(x: Attention) -> Core:
    from torch.nn.attention.flex_attention import flex_attention as flex

    compiled_flex, cap = torch.compile(flex, dynamic=False), x.case.softcap or 0.0

    def capped(score, b, h, q, k):
        return cap * torch.tanh(score / cap)

    return lambda q, k, v: compiled_flex(q, k, v, score_mod=capped if cap else None)  # pyright: ignore


@contestant("xformers", transposed=False, ideal=True)
def xformers(x: Attention) -> Core:
    _without_softcap(x, "xformers.ops.memory_efficient_attention")
    return require("xformers.ops", "pip install xformers").memory_efficient_attention


def _flash(x: Attention, module: str, version: str) -> Core:
    """flash-attn's functions take `[G, N, H, D]`; their optional arguments differ by version."""
    function = require(module, f"FlashAttention {version}").flash_attn_func
    if x.device.type == "cpu":
        raise Missing("FlashAttention runs on GPUs only")
    if x.dtype == torch.float32:
        raise Refused("FlashAttention takes fp16 and bf16")
    options = {}
    if x.case.softcap:
        if "softcap" not in inspect.signature(function).parameters:
            raise Refused(f"FlashAttention {version} has no soft-cap")
        options["softcap"] = x.case.softcap

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = function(q, k, v, **options)
        return result[0] if isinstance(result, tuple) else result

    return core


contestant("flash_attn_2", transposed=False, ideal=True)(lambda x: _flash(x, "flash_attn", "2"))
contestant("flash_attn_3", transposed=False, ideal=True)(lambda x: _flash(x, "flash_attn_interface", "3"))
contestant("flash_attn_4", transposed=False, ideal=True)(lambda x: _flash(x, "flash_attn.cute", "4"))
