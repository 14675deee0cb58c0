"""Modules of vivit_kernels with the state dicts of the real classes of transformers and timm, as these libraries make
them: loaded strictly, and the same outputs within the error budget."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from vivit_kernels import JointAttention, TubeletEmbedding, VideoMultiheadAttention
from vivit_kernels.numerics import judge

E, H = 64, 4


def hold(ours: nn.Module, theirs: nn.Module, x: Tensor, as_theirs: Callable[[Tensor], Tensor] = lambda x: x) -> None:
    """ours(x) is theirs(as_theirs(x)), theirs in float64 being exact."""
    exact = first(copy.deepcopy(theirs).double()(as_theirs(x).double()))
    eager, found = first(theirs(as_theirs(x))), first(ours.eval()(x))
    verdict = judge(found.reshape(exact.shape), exact, eager, row=E)
    assert verdict.ok, verdict


def first(out: Tensor | tuple) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def randomised(module: nn.Module) -> nn.Module:
    """Large enough for softmax to matter, and no bias zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2)
    return module.eval()


# ---- transformers ----

ATTENTIONS = {
    "vivit": "vivit.layers.0.attention",
    "videomae": "videomae.encoder.layer.0.attention",  # no bias of keys
    "timesformer": "timesformer.encoder.layer.0.attention",
    "videoprism": "vision_model.spatial_layers.0.attention",
    "vjepa2": "pooler.self_attention_layers.0.self_attn",
}


@pytest.fixture(scope="module")
def hosts() -> ModuleType:
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip(f"paths within models are those of transformers 5, this is {transformers.__version__}")
    import transformers_models

    return transformers_models


@pytest.mark.parametrize("kind", [JointAttention, VideoMultiheadAttention])
@pytest.mark.parametrize("family", ATTENTIONS)
def test_attention_of_transformers(family, kind, hosts):
    theirs = hosts.make(family, None if family == "timesformer" else "eager").get_submodule(ATTENTIONS[family])
    ours, x = kind(E, H), torch.randn(2, 9, E)
    ours.load_state_dict(theirs.state_dict())
    if family == "videoprism":
        if kind is VideoMultiheadAttention:
            return  # it has no soft-cap
        ours.softcap = theirs.attn_logit_softcapping
    hold(ours, theirs, x)


def by_frames(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


TUBELETS: dict[str, tuple[str, tuple[int, int, int], dict, Callable]] = {
    "vivit": ("vivit.embeddings", (2, 8, 8), dict(grid=(4, 16), class_token=True), by_frames),
    "videomae": ("videomae.embeddings.patch_embeddings", (2, 8, 8), {}, by_frames),
    "timesformer": ("timesformer.embeddings.patch_embeddings", (1, 8, 8), {}, by_frames),
    "videoprism": ("vision_model.spatial_embeddings.patch_embeddings", (1, 8, 8), {}, by_frames),
    "vjepa2": ("vjepa2.encoder.embeddings.patch_embeddings", (2, 8, 8), {}, lambda x: x),
}


@pytest.mark.parametrize("family", TUBELETS)
def test_tubelets_of_transformers(family, hosts):
    path, tubelet, options, as_theirs = TUBELETS[family]
    theirs = hosts.make(family).get_submodule(path)
    ours = TubeletEmbedding(E, tubelet, **options)
    ours.load_state_dict(theirs.state_dict())
    hold(ours, theirs, torch.randn(2, 3, 8, 32, 32), as_theirs)


# ---- timm ----


@pytest.fixture(scope="module")
def timm() -> ModuleType:
    import timm_host

    try:
        return timm_host.load()
    except ImportError:
        pytest.skip("needs timm: pip install --no-deps timm torchvision")


@pytest.mark.parametrize("bias", [True, False])
def test_attention_of_timm(bias, timm):
    theirs = randomised(timm.layers.Attention(E, H, qkv_bias=bias))
    ours = JointAttention(E, H)
    if not bias:
        ours.qkv.bias = None
    ours.load_state_dict(theirs.state_dict())
    hold(ours, theirs, torch.randn(2, 9, E))


def test_attention_of_timm_without_bias_of_keys(timm):
    from timm.models.beit import Attention

    theirs = randomised(Attention(E, H, qkv_bias=True))
    assert "q_bias" in theirs.state_dict() and "qkv.bias" not in theirs.state_dict()
    for ours in (JointAttention(E, H), VideoMultiheadAttention(E, H)):
        ours.load_state_dict(theirs.state_dict())
        hold(ours, theirs, torch.randn(2, 9, E))


def test_attention_of_timm_that_is_another_is_refused(timm):
    state = timm.layers.Attention(E, H, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm).state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*q_norm\.weight"):
        JointAttention(E, H).load_state_dict(state)


def test_embedding_of_timm(timm):
    """Patches, class row and positions of a ViT for images: a tubelet of one frame."""
    sizes = dict(img_size=32, patch_size=8, embed_dim=E, num_heads=H, depth=1)
    vit = randomised(timm.create_model("vit_tiny_patch16_224", **sizes))
    names = ("patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed", "cls_token")
    ours = TubeletEmbedding(E, (1, 8, 8), grid=(1, 16), class_token=True)
    ours.load_state_dict({name: vit.state_dict()[name] for name in names})

    class Embedding(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = vit

        def forward(self, x: Tensor) -> Tensor:
            return self.vit._pos_embed(self.vit.patch_embed(x))

    hold(ours, Embedding(), torch.randn(2, 3, 1, 32, 32), lambda x: x[:, :, 0])
