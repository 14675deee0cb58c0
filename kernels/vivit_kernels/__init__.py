"""Fast attention and tubelet embedding for video transformers: the public names.

    tubelet_embedding       clip (uint8 or float) -> tokens with bias, position and class row
    factorized_attention    the first heads along time, the others within the frame, on the token grid in place
    spatial_attention, temporal_attention           its two ends
    temporal_block          layer norm, QKV projection and attention along time: one kernel, for narrow models
    temporal_block_pays     whether it should be faster than the three, for a call
    joint_attention         every token to every token, in O(N) memory
    Linear, linear, linear_gelu, mlp                nn.Linear, F.linear, one with a GELU behind it, two around one: on a
                            CPU by the fastest route of PyTorch
    low_memory              a module: layers of a block that keep less for backward, and make the rest again
    unwatched               whether no hook wants to see what goes in and out of these modules
    rotary_tables           cos and sin of a three-axis rotary embedding, for rotary=
    accelerate              replaces, in any model, the modules that this package has faster ones for; with a report
    TubeletEmbedding, SpatialAttention, TemporalAttention, FactorizedAttention, JointAttention, VideoMultiheadAttention
                            modules over these, which load the weights of PyTorch, timm and transformers
    sdpa_override           context in which F.scaled_dot_product_attention is joint_attention, for any caller
    explain                 which backend a call would run, and why not another; runs nothing

`python -m vivit_kernels` shows what this install can run, and why not the rest.
"""

from . import low_memory
from ._attention.rotary import rotary_tables
from .accelerate import accelerate
from .explain import explain
from .factorized_attention.api import factorized_attention, spatial_attention, temporal_attention
from .integrations.pytorch import sdpa_override
from .joint_attention.api import joint_attention
from .linear import Linear, linear, linear_gelu, mlp, unwatched
from .modules import (
    FactorizedAttention,
    JointAttention,
    SpatialAttention,
    TemporalAttention,
    TubeletEmbedding,
    VideoMultiheadAttention,
)
from .temporal_block.api import temporal_block, temporal_block_pays
from .tubelet_embedding.api import tubelet_embedding

__all__ = [
    "FactorizedAttention",
    "JointAttention",
    "Linear",
    "SpatialAttention",
    "TemporalAttention",
    "TubeletEmbedding",
    "VideoMultiheadAttention",
    "accelerate",
    "explain",
    "factorized_attention",
    "joint_attention",
    "linear",
    "linear_gelu",
    "low_memory",
    "mlp",
    "rotary_tables",
    "sdpa_override",
    "spatial_attention",
    "temporal_attention",
    "temporal_block",
    "temporal_block_pays",
    "tubelet_embedding",
    "unwatched",
]
