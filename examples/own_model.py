"""A video transformer of one's own: the modules of vivit_kernels in the place of PyTorch's, which they load.

`Stock` is what one writes with PyTorch: sequences cut out by permuting, nn.MultiheadAttention, and put back. `Ours` has
the same parameters under the same paths; its attention reads frames and positions where they lie.

python examples/own_model.py [--dtype bfloat16]
"""

import sys

import torch
from _compare import compare, dtype_asked
from torch import Tensor, nn

from vivit_kernels import SpatialAttention, TemporalAttention, TubeletEmbedding

E, HEADS, T, SIDE = 384, 6, 8, 7  # embedding, heads, temporal tokens, rows and columns of spatial ones


class Stock(nn.Module):
    def __init__(self, depth: int = 2):
        super().__init__()
        self.tubelets = nn.Conv3d(3, E, (2, 16, 16), (2, 16, 16))
        self.blocks = nn.ModuleList(nn.ModuleDict(self.block()) for _ in range(depth))
        self.head = nn.Linear(E, 10)

    def block(self) -> dict[str, nn.Module]:
        norms = {f"norm_{name}": nn.LayerNorm(E) for name in ("space", "time", "mlp")}
        mlp = nn.Sequential(nn.Linear(E, 4 * E), nn.GELU(), nn.Linear(4 * E, E))
        return {**norms, "space": self.attention("space"), "time": self.attention("time"), "mlp": mlp}

    def attention(self, over: str) -> nn.Module:
        return nn.MultiheadAttention(E, HEADS, batch_first=True)

    def tokens(self, clip: Tensor) -> Tensor:
        return self.tubelets(clip).flatten(3).permute(0, 2, 3, 1)  # [B, T, S, E]

    def attend(self, block: nn.ModuleDict, over: str, x: Tensor) -> Tensor:
        B, T, S, _ = x.shape
        rows = x.flatten(0, 1) if over == "space" else x.transpose(1, 2).flatten(0, 1)
        rows = block[over](rows, rows, rows, need_weights=False)[0]
        return rows.unflatten(0, (B, T)) if over == "space" else rows.unflatten(0, (B, S)).transpose(1, 2)

    def forward(self, clip: Tensor) -> Tensor:
        x = self.tokens(clip)
        for block in self.blocks:
            x = x + self.attend(block, "space", block["norm_space"](x))
            x = x + self.attend(block, "time", block["norm_time"](x))
            x = x + block["mlp"](block["norm_mlp"](x))
        return self.head(x.mean((1, 2)))


class Ours(Stock):
    def __init__(self, depth: int = 2):
        super().__init__(depth)
        self.tubelets = TubeletEmbedding(E, (2, 16, 16))

    def attention(self, over: str) -> nn.Module:
        return SpatialAttention(E, HEADS) if over == "space" else TemporalAttention(E, HEADS)

    def tokens(self, clip: Tensor) -> Tensor:
        return self.tubelets(clip).unflatten(1, (T, SIDE * SIDE))

    def attend(self, block: nn.ModuleDict, over: str, x: Tensor) -> Tensor:
        return block[over](x)


dtype = dtype_asked(__doc__)
torch.manual_seed(0)
stock, ours = Stock().to(dtype).eval(), Ours().to(dtype).eval()
ours.load_state_dict(stock.state_dict())  # in_proj_weight, out_proj, ... become qkv, proj
print(ours.blocks[0])
sys.exit(not compare(stock, ours, torch.randn(2, 3, 2 * T, 16 * SIDE, 16 * SIDE, dtype=dtype)))
