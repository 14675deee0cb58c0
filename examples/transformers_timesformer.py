"""transformers' TimeSformer with accelerate(): its divided attention as a block, without the permutations around it.

python examples/transformers_timesformer.py [--dtype bfloat16]
"""

import copy
import sys

import torch
from _compare import compare, dtype_asked
from transformers import TimesformerConfig, TimesformerForVideoClassification

import vivit_kernels

dtype = dtype_asked(__doc__)
torch.manual_seed(0)
config = TimesformerConfig(
    num_frames=8, image_size=112, hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_hidden_layers=2
)
stock = TimesformerForVideoClassification(config).to(dtype).eval()
clip = torch.randn(1, 8, 3, 112, 112, dtype=dtype)  # [B, F, C, Y, X]

model = copy.deepcopy(stock)
print(vivit_kernels.accelerate(model))
sys.exit(not compare(stock, model, clip))
