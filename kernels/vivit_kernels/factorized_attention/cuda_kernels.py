"""Backend `cuda` of factorized_attention: the launchers; the kernels are those of the token grid (csrc/cuda). bfloat16
and float16 by tensor cores; float32 by plain multiply-adds, or where torch.backends.cuda.matmul.allow_tf32 is set by
tensor cores, of numbers rounded to ten bits: as PyTorch's own products. A backward goes by the setting when it runs."""

from __future__ import annotations

from torch import Tensor

from .._attention import cuda_grid
from .._attention.options import Options
from . import cuda_tiles


def _tiling(direction: str) -> cuda_grid.Tiling:
    tile = cuda_tiles.current(direction)
    return tile.packed_warps, tile.stages


def launch_fwd(q: Tensor, k: Tensor, v: Tensor, temporal_heads: int, options: Options, keep: bool = False):
    """q, k, v `[B, T, S, H, D]` -> (o like q, lse of every query for the backward of long axes, or None).

    One launch. A tensor whose rows do not begin at multiples of 16 bytes is copied first."""
    o = q.new_empty(q.shape)
    return o, cuda_grid.launch_fwd(q, k, v, o, temporal_heads, options, keep, _tiling("forward"))


def launch_bwd(
    do, q, k, v, o, lse, dq, dk, dv, temporal_heads: int, options: Options, o_again: Tensor | None = None
) -> None:
    """Writes dq, dk, dv, each once, in one launch; copies as the forward does. o_again: memory in which a backward that
    reads no o, of sequences of up to 64 tokens or of float32, recomputes it; ValueError of others."""
    cuda_grid.launch_bwd(do, q, k, v, o, lse, dq, dk, dv, temporal_heads, options, _tiling("backward"), o_again)
