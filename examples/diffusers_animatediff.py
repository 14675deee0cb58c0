"""AnimateDiff's UNet of diffusers, accelerated by one line: how far its output and gradients move, and how much faster.

A small configuration with random weights, 16 frames: no download, under a minute on a CPU.

    python examples/diffusers_animatediff.py [--dtype bfloat16]

Of a pipeline it is the same line, accelerate(pipe.unet); of Latte, Wan or CogVideoX accelerate(pipe.transformer).
"""

import copy
import sys

import diffusers
import torch
from _compare import compare, dtype_asked
from torch import Tensor, nn

from vivit_kernels import accelerate


class Step(nn.Module):
    """One step of denoising: latents `[B, C, F, Y, X]` -> the noise in them."""

    def __init__(self, unet: nn.Module, frames: int) -> None:
        super().__init__()
        self.unet = unet
        self.register_buffer("prompt", torch.randn(frames, 77, 64))  # repeated for every frame, as the pipeline does

    def forward(self, latents: Tensor) -> Tensor:
        return self.unet(latents, timestep=torch.tensor(500), encoder_hidden_states=self.prompt).sample


def main() -> bool:
    dtype = dtype_asked(__doc__)
    torch.manual_seed(0)
    unet = diffusers.UNetMotionModel(
        block_out_channels=(80, 160),
        norm_num_groups=16,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        layers_per_block=1,
        cross_attention_dim=64,
        num_attention_heads=2,
        motion_num_attention_heads=2,
    )
    stock = Step(unet, frames=16).to(dtype).eval()
    ours = copy.deepcopy(stock)
    print(accelerate(ours))
    return compare(stock, ours, torch.randn(1, 4, 16, 16, 16, dtype=dtype))


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
