"""Linear layers of the native library (csrc/cpu/linear_*.h), and for which calls they are faster than PyTorch's.

- Narrow dtypes on a processor without products of them, as are all with AVX2 and many with AVX-512: in vectors, with
  products and sums in float32. PyTorch's oneDNN converts there again and again. ViT-B's four layers at 3137 tokens on 2
  cores of a Xeon with AVX-512 and without bfloat16 (peak 380 in float32, MKL 280..330), GFLOP/s, PyTorch's -> here:

                         bfloat16             float16
      forward            59..63 -> 280..300   27..29 -> 290..300
      input gradient     60..63 -> 280..305   1..2 -> 285..305
      weight gradient    61..62 -> 240..280   2..3 -> 250..285

  The same processor, all libraries held to AVX2, at 1024 tokens (MKL 150..170 in float32):

      forward            25..28 -> 139..147   26..30 -> 141..150
      input gradient     1..2 -> 110..144     1..2 -> 131..145
      weight gradient    12..17 -> 134..150   3 -> 145..152

- bfloat16 with AMX, without gradients and up to a width of 1024: in tiles (figures in linear.py).
- float32 where MKL runs 512 bits wide: only a GELU as the product's epilogue, as the products are level.

(2026-11-28 and, AMX, 2026-11-27.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native

ACTIVATIONS = {"": 0, "tanh": 1, "none": 2}  # csrc/cpu/linear.h: none, and F.gelu's two of `approximate`
_WIDEST_IN_TILES = 1024

# Private beside the library's other operators; None where it is not there
OP = getattr(torch.ops.vivit_kernels_native, "linear", None) if _native.AVAILABLE else None

if OP is not None:

    @torch.library.register_fake("vivit_kernels_native::linear")
    def _(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, activation: int, isa: int) -> None:
        """It writes y alone, so that a compiler need not run it to know of what it makes."""


def _has_products(dtype: torch.dtype) -> bool:
    """Whether the processor has products of a dtype that PyTorch then takes. Where PyTorch cannot tell: as if."""
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    told = getattr(torch.cpu, "get_capabilities", dict)()
    return told.get("avx512_fp16", True) or told.get("amx_fp16", True)


_LACKING = tuple(dtype for dtype in (torch.bfloat16, torch.float16) if not _has_products(dtype))


def in_vectors(dtype: torch.dtype) -> bool:
    """Whether every product of a layer in this dtype, forward and backward, is faster here."""
    return OP is not None and dtype in _LACKING and _native.isa_name() not in ("", "portable")


def in_tiles(dtype: torch.dtype, width: int) -> bool:
    """Whether the product is faster here, of rows of this width."""
    return has_tiles() and dtype == torch.bfloat16 and width <= _WIDEST_IN_TILES


def has_tiles() -> bool:
    return OP is not None and _native.isa_name() == "avx512_amx"


def gains_by_a_gelu(dtype: torch.dtype) -> bool:
    """Whether a product with a GELU behind it is faster here, where one without is not."""
    return OP is not None and dtype == torch.float32 and _native.isa_name() in ("avx512", "avx512_amx")


def multiplied(rows: Tensor, weight: Tensor, bias: Tensor | None, gelu: str = "") -> Tensor:
    """rows `[M, K]`, weight `[N, K]`, either a matrix or the transposed view of one -> `[M, N]`.

    gelu: of which F.gelu's `approximate` comes behind it.
    """
    y = rows.new_empty(rows.shape[0], weight.shape[0])
    assert OP is not None
    OP(rows, weight, None if bias is None else bias.contiguous(), y, ACTIVATIONS[gelu], _native.isa())
    return y
