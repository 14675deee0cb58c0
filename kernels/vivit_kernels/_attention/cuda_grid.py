"""Attention on the token grid by the native library's CUDA C++ kernels (csrc/cuda): launchers, limits of length."""

from __future__ import annotations

import torch
from torch import Tensor

from .._triton import precision
from .options import Options

# csrc/cuda/attention.h and regime_of decide; tests/test_cuda_binding.py holds these copies to a library that has them.
PACKED_TOKENS = 16  # longer sequences lie in shared memory
SHORT_TOKENS = 64  # the backward of longer sequences of 16 bits reads o and lse of the forward
_KIB = 1 << 10
_SHORT_BYTES = {2: 48 * _KIB, 4: 80 * _KIB}  # several sequences share a block as far as they take no more
_MOST_WARPS = 8  # of a block, of float32 of one that sequences share
_STEPS = (2, 2, 4, 4, 5, 6, 8, 8, 10, 10)  # of 16 channels, as kernels are compiled, for heads of 1 to 10 of them
_ROW_ALIGNMENT = 16  # bytes
# Bytes that a block may have (CUDA programming guide, compute capabilities), by architecture.
_SHARED = {80: 163 * _KIB, 87: 163 * _KIB, 90: 227 * _KIB, 100: 227 * _KIB, 103: 227 * _KIB, 110: 227 * _KIB}
_LEAST_SHARED = 99 * _KIB  # of the others: sm_86, sm_89, sm_120, sm_121


def most_shared_bytes(arch: int) -> int:
    """Of a block, on sm_<arch>."""
    return _SHARED.get(arch, _LEAST_SHARED)


def shared_bytes(N: int, D: int, itemsize: int, backward: bool, rotary: bool) -> int:
    """What a block needs at least that holds a sequence of N tokens, of 16 bits N > PACKED_TOKENS, or several short
    ones as far as they fit in _SHORT_BYTES."""
    return _float32_bytes(N, D, backward) if itemsize == 4 else _half_bytes(N, D, backward, rotary)


def _half_bytes(N: int, D: int, backward: bool, rotary: bool) -> int:
    """Of 16 bits: q, k and v, in a backward also do, of every token a number or two, and where gradients are turned
    back a tile of float32 for each warp that a block may have."""
    steps = _STEPS[-(-D // 16) - 1]
    rows = -(-N // 16) * 16
    pitch = 16 * (2 * steps + (0 if steps in (2, 4, 8) else 1))
    sequence = rows * (4 * pitch + 8 if backward else 3 * pitch + 4)
    sequences = 1 if rows > 64 else max(1, min(128 // rows, _SHORT_BYTES[2] // sequence))
    scratch = 16 * (16 * steps + 4) * 4 if backward and rotary else 0
    return sequences * sequence + _MOST_WARPS * scratch


def _float32_bytes(N: int, D: int, backward: bool) -> int:
    """Of float32: two tensors and of every token two numbers or four; and for one warp 8 rows and their scores, in a
    backward twice. A block has more warps where they fit."""
    rows, tiles = -(-N // 4) * 4, -(-N // 8)
    sequence = 4 * rows * (2 * (D + 4) + (4 if backward else 2))
    warp = (64 if backward else 32) * (D + 4 + (rows // 4 | 1) * 4)
    sequences = max(1, _MOST_WARPS // tiles)
    while sequences > 1 and sequences * (sequence + tiles * warp) > _SHORT_BYTES[4]:
        sequences -= 1
    return sequences * sequence + warp


def fits(arch: int, N: int, D: int, itemsize: int, backward: bool, rotary: bool) -> bool:
    """Whether a sequence is run in one direction: of 16 bits any packed one, and what shared memory holds."""
    packed = itemsize < 4 and N <= PACKED_TOKENS
    return packed or shared_bytes(N, D, itemsize, backward, rotary) <= most_shared_bytes(arch)


def keeps_output(T: int, S: int, H: int, temporal_heads: int, itemsize: int) -> bool:
    """Whether the backward reads o and lse of the forward: not of float32, which recomputes everything; of 16 bits
    where some head attends along more than SHORT_TOKENS."""
    long = (temporal_heads > 0 and T > SHORT_TOKENS) or (temporal_heads < H and S > SHORT_TOKENS)
    return itemsize < 4 and long


def aligned_rows(x: Tensor) -> Tensor:
    """x, copied once where a row of it does not begin at a multiple of 16 bytes, or has gaps."""
    size = x.element_size()
    starts = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    fits = x.stride(-1) == 1 and x.data_ptr() % _ROW_ALIGNMENT == 0
    fits = fits and all(n == 1 or step * size % _ROW_ALIGNMENT == 0 for n, step in starts)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def flat(options: Options) -> tuple[Tensor | None, ...]:
    """Mask, seed and tables as the kernels read them: without gaps."""
    _, _, _, mask, seed, cos, sin = options
    return tuple(None if x is None else x.contiguous() for x in (mask, seed, cos, sin))


def _scalars(q: Tensor, temporal_heads: int, options: Options) -> tuple[int, float, float, float, bool]:
    """The last: whether products of float32 are those of tensor cores, as PyTorch's own then are."""
    return temporal_heads, options.scale, options.softcap, options.dropout_p, precision(q.dtype) == "tf32"


Tiling = tuple[int, int]  # packed_warps, stages: `Tiling` of csrc/cuda/attention.h, 0 the launcher's own choice


def launch_fwd(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, temporal_heads: int, options: Options, keep: bool, tiling: Tiling
) -> Tensor | None:
    """Writes o, of q's shape `[B, T, S, H, D]`; returns, if `keep`, the lse `[B, H, T * S]` that a backward will ask
    for, if any. Of q, k and v those are copied whose rows do not begin at multiples of 16 bytes."""
    B, T, S, H, _ = q.shape
    kept = keep and keeps_output(T, S, H, temporal_heads, q.element_size())
    lse = q.new_empty((B, H, T * S), dtype=torch.float32) if kept else None
    if q.numel():
        given = *map(aligned_rows, (q, k, v)), o, lse, *flat(options)
        torch.ops.vivit_kernels_native.cuda_attention_fwd(*given, *_scalars(q, temporal_heads, options), *tiling)
    return lse


def launch_bwd(
    do,
    q,
    k,
    v,
    o,
    lse,
    dq,
    dk,
    dv,
    temporal_heads: int,
    options: Options,
    tiling: Tiling,
    o_again: Tensor | None = None,
) -> None:
    """Writes dq, dk, dv, each once; o and lse are the forward's, None where it keeps none. Copies as the
    forward does, and do likewise.

    o_again: of q's shape; o is recomputed into it. ValueError where o was kept: of 16 bits, of which some sequence is
    longer than SHORT_TOKENS."""
    _, T, S, H, _ = q.shape
    if o_again is not None and keeps_output(T, S, H, temporal_heads, q.element_size()):
        raise ValueError(
            f"factorized_attention: backend 'cuda' got o_again for T={T}, S={S}, temporal_heads={temporal_heads} of "
            f"{H}; o is written again in float32, or where every head attends along {SHORT_TOKENS} tokens at most\n"
            "  -> leave it out: such a backward reads o, which the forward's caller keeps"
        )
    if q.numel():
        given = *map(aligned_rows, (do, q, k, v)), o, lse, dq, dk, dv, *flat(options)
        torch.ops.vivit_kernels_native.cuda_attention_bwd(
            *given, *_scalars(q, temporal_heads, options), *tiling, o_again
        )
