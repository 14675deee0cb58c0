"""transformers' Vivit with accelerate(): tubelets, attention, activations; weights and state dict as before.

python examples/transformers_vivit.py [--dtype bfloat16]
"""

import copy
import sys

import torch
from _compare import compare, dtype_asked
from transformers import VivitConfig, VivitForVideoClassification

import vivit_kernels

dtype = dtype_asked(__doc__)
torch.manual_seed(0)
config = VivitConfig(
    num_frames=16, image_size=112, hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_hidden_layers=2
)
stock = VivitForVideoClassification(config).to(dtype).eval()  # or from_pretrained(...)
clip = torch.randn(1, 16, 3, 112, 112, dtype=dtype)  # [B, F, C, Y, X]

model = copy.deepcopy(stock)
report = vivit_kernels.accelerate(model)
print(report)
passed = compare(stock, model, clip)

report.restore()
print("restored, the same bits:", torch.equal(model(clip).logits, stock(clip).logits))
sys.exit(not passed)
