"""timm's ViT on the frames of a clip, within sdpa_override(): the model is not touched at all.

python examples/timm_vit.py [--dtype bfloat16]
"""

import sys

import timm
import torch
from _compare import compare, dtype_asked

from vivit_kernels import explain, joint_attention, sdpa_override

dtype = dtype_asked(__doc__)
torch.manual_seed(0)
model = timm.create_model("vit_small_patch16_224", depth=2, num_classes=10).to(dtype).eval()
frames = torch.randn(4, 3, 224, 224, dtype=dtype)

print(explain(joint_attention, torch.empty(4, 197, 3, 6, 64, dtype=dtype, requires_grad=True)))  # what its calls become
sys.exit(not compare(model, model, frames, within=sdpa_override))
