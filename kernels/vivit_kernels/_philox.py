"""Attention dropout by counter: which pairs of tokens are dropped depends on (seed, offset) and on their names alone,
never on a tile, a backend or a device, so that every kernel reproduces the reference bit for bit and no mask is stored.

Philox-4x32-10 (Salmon et al. 2011), with the words of PyTorch's `at::Philox4_32` and Triton's `tl.philox`:

    key      (seed low 32 bits, seed high 32 bits)
    counter  (j // 4, offset low 32 bits, row low 32 bits, row high 32 bits)
    bits     word j % 4;  the pair is kept iff bits >= p * 2^32, and scaled by 1 / (1 - p)

row = (b * H + h) * N + n names the query: n is its token in the clip's N (joint: N_q; factorised: n = t * S + s of
T * S); j numbers the keys along the axis that the head attends over. Four neighbouring keys share one call: a counter
per pair would cost four times the integer work, which a kernel of this size feels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product; int64 wraps, its 64 bits are right."""
    product = word * multiplier
    return (product >> 32) & _LOW, product & _LOW


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words of Philox-4x32-10, as int64 tensors of the counters' broadcast shape."""
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def keep_mask(seed: Tensor, rows: Tensor, keys: int, p: float) -> Tensor:
    """Bool `[*rows.shape, keys]`, True where the pair (query row, key j) is kept.

    seed: int64 `[2]` (seed, offset); rows: int64, the query rows as named above.
    """
    groups = torch.arange((keys + 3) // 4, device=rows.device)
    rows = rows.unsqueeze(-1)
    words = philox(seed[0], groups, seed[1] & _LOW, rows & _LOW, (rows >> 32) & _LOW)
    bits = torch.stack(torch.broadcast_tensors(*words), -1).flatten(-2)  # [..., keys rounded up to 4]
    return bits[..., :keys] >= math.ceil(p * 2**32)


def draw_seed(device: torch.device) -> Tensor:
    """(seed, offset) from PyTorch's generator of that device: `torch.manual_seed` makes dropout repeatable."""
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device)
