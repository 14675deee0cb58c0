"""How backend `torch` of both attention ops cuts its work: the choice, its measured reasons, and what else to try.

Every tiles.py, of this backend or of a kernel, has the same parts; `python -m bench tune OP` knows no others:

    BACKENDS                the backends whose launchers read it
    a frozen dataclass      one tile
    choose(facts)           the heuristic: pure, each rung with the measurement that put it there
    candidates(facts)       tiles worth trying
    current(facts)          what launchers call: the forced tile, or choose's
    forced(tile)            a context in which every launcher takes this tile
    plan(tile, facts)       optional: what a tile comes to in one case; of tiles with one plan only one is timed

Facts go by the names of the parameters: a function declares those it reads, of the names that bench/tune.py lists.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

BACKENDS = ("torch",)


@dataclass(frozen=True)
class Blocks:
    """Sizes of a block of blockwise.py, and where PyTorch's fused attention (sdpa.py) takes over.

    scores: in a block; on a CPU for each head that is computed at once, on a GPU for all of them.
    inputs: elements of q, k and v of many short sequences, copied once into rows; None: no limit.
    sdpa_from: number of keys from which the forward is scaled_dot_product_attention.
    """

    scores: int
    inputs: int | None
    sdpa_from: int

    def cut(self, G: int, H: int, Q: int, K: int, D: int, threads: int | None) -> tuple[int, int, int]:
        """(sequences, heads, queries) of a block of G sequences: of several whole ones, or of one long one a part.

        threads: of a CPU; None on a GPU.
        """
        together = H if threads is None else min(H, threads)
        budget = self.scores if threads is None else self.scores * together
        sequences = min(G, budget // (H * Q * K))
        if self.inputs is not None:
            sequences = min(sequences, self.inputs // (H * (Q + 2 * K) * D))
        if sequences >= 1:
            return sequences, H, Q
        return 1, together, min(Q, max(1, budget // (together * K)))


def choose(on_cpu: bool) -> Blocks:
    if not on_cpu:  # a GPU wants few large products: 128 MB of scratch
        return Blocks(scores=1 << 25, inputs=None, sdpa_from=128)
    # All measured on Ice Lake, 2 cores, 12 heads of 64.
    # scores: 1.6 MB: blocks of 128 of 3,137 queries took 336 ms, of 32 queries 366, and in backward 926 and 1,141.
    # Scratch is kept from block to block: fresh memory costs page faults, 10 to 25 % here.
    # inputs: 28 positions of 16 frames; 7 or 98 were 1.7x slower in bfloat16, equal in float32.
    # sdpa_from: below, blockwise.py is as fast.
    return Blocks(scores=400_000, inputs=1 << 20, sdpa_from=128)


def candidates(on_cpu: bool) -> list[Blocks]:
    """The choice with one size, or both sizes of a block, four times smaller to four times larger."""
    choice, found = choose(on_cpu), []
    for down, up in ((4, 1), (2, 1), (1, 2), (1, 4)):
        scores, sdpa_from = (x * up // down for x in (choice.scores, choice.sdpa_from))
        found += [replace(choice, scores=scores), replace(choice, sdpa_from=sdpa_from)]
        if choice.inputs is not None:
            inputs = choice.inputs * up // down
            found += [replace(choice, inputs=inputs), replace(choice, scores=scores, inputs=inputs)]
    return found


def plan(
    tile: Blocks, direction: str, sequences: list[tuple[int, int, int]], D: int, threads: int | None, softcap: bool
) -> tuple:
    """The engine of each kind of sequence (count, heads, length), and the block where it is blockwise.py."""
    fused = direction == "forward" and not softcap
    return tuple("sdpa" if fused and tile.sdpa_from <= N else tile.cut(G, H, N, N, D, threads) for G, H, N in sequences)


_forced: Blocks | None = None


@contextmanager
def forced(tile: Blocks) -> Iterator[None]:
    """Every call in the process takes this tile, on all threads: autograd runs a GPU's backward on one of its own."""
    global _forced
    before, _forced = _forced, tile
    try:
        yield
    finally:
        _forced = before


def current(on_cpu: bool) -> Blocks:
    return _forced or choose(on_cpu)
