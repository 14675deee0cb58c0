"""Modules over the ops: the arithmetic of nn.MultiheadAttention and of plain PyTorch within the error budget, weights
of every layout they claim to load, and the company modules keep: autocast, checkpointing, compilation, copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vivit_kernels
from vivit_kernels import (
    FactorizedAttention,
    JointAttention,
    SpatialAttention,
    TemporalAttention,
    TubeletEmbedding,
    VideoMultiheadAttention,
)
from vivit_kernels.numerics import judge

B, T, S, H, D = 2, 5, 7, 4, 16
E = H * D
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
ATTENTIONS = [SpatialAttention, TemporalAttention, FactorizedAttention, JointAttention]
OVER = {SpatialAttention: "space", TemporalAttention: "time", FactorizedAttention: H // 2, JointAttention: "joint"}


def randomised(module: nn.Module) -> nn.Module:
    """Zero biases would hide that one is not read."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2)
    return module


def tokens(dtype: torch.dtype = torch.float32, *shape: int) -> Tensor:
    return torch.randn(*(shape or (B, T, S, E)), dtype=torch.float64).to(dtype)


def by_multihead(module: nn.MultiheadAttention, x: Tensor, over: str | int) -> Tensor:
    """What the grid's attention is in terms of PyTorch's module: sequences cut out and put back, heads told apart."""
    if isinstance(over, int):
        return by_heads(module, x, over)
    b, t, s, e = x.shape
    if over == "joint":
        return module(*[x.reshape(b, t * s, e)] * 3, need_weights=False)[0].reshape(x.shape)
    if over == "space":
        return module(*[x.reshape(b * t, s, e)] * 3, need_weights=False)[0].reshape(x.shape)
    rows = x.transpose(1, 2).reshape(b * s, t, e)
    return module(rows, rows, rows, need_weights=False)[0].reshape(b, s, t, e).transpose(1, 2)


def by_heads(module: nn.MultiheadAttention, x: Tensor, temporal_heads: int) -> Tensor:
    q, k, v = F.linear(x, module.in_proj_weight, module.in_proj_bias).unflatten(-1, (3, module.num_heads, -1)).unbind(3)
    space = F.scaled_dot_product_attention(*(y[..., temporal_heads:, :].transpose(2, 3) for y in (q, k, v)))
    time = F.scaled_dot_product_attention(*(y[..., :temporal_heads, :].permute(0, 2, 3, 1, 4) for y in (q, k, v)))
    o = torch.cat([time.permute(0, 3, 1, 2, 4), space.transpose(2, 3)], -2)
    return module.out_proj(o.flatten(-2))


def results(module: nn.Module, function, x: Tensor) -> dict[str, Tensor]:
    """Output, and gradients of the input and of every parameter, under names that do not depend on the layout."""
    x = x.detach().requires_grad_()
    out = function(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    (out * weights).sum().backward()
    found = {"out": out.detach(), "dx": x.grad}
    names = {"in_proj_weight": "qkv.weight", "in_proj_bias": "qkv.bias"}
    for name, parameter in module.named_parameters():
        found[names.get(name, name.replace("out_proj", "proj"))] = parameter.grad
        parameter.grad = None
    return found


def assert_within_budget(actual: dict, exact: dict, eager: dict) -> None:
    assert actual.keys() == exact.keys() == eager.keys()
    for name in exact:
        # the keys' bias moves every score of a row alike: its gradient is zero, made of terms of the size of the others
        size = exact["qkv.bias"].abs().max().item() if name == "qkv.bias" else None
        verdict = judge(actual[name], exact[name], eager[name], gradient=name != "out", scale=size)
        assert verdict.ok, f"{name}: {verdict}"


def reference(module: nn.Module) -> nn.MultiheadAttention:
    """PyTorch's with the same values."""
    theirs = nn.MultiheadAttention(E, H, batch_first=True, dtype=next(module.parameters()).dtype)
    state = module.state_dict()
    theirs.load_state_dict(
        {
            "in_proj_weight": state["qkv.weight"],
            "in_proj_bias": state["qkv.bias"],
            "out_proj.weight": state["proj.weight"],
            "out_proj.bias": state["proj.bias"],
        }
    )
    return theirs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention_modules_are_multihead_attention_on_the_grid(kind, dtype):
    module, x = randomised(kind(E, H, dtype=dtype)), tokens(dtype)
    theirs = reference(module)
    exact = copy.deepcopy(theirs).double()
    assert_within_budget(
        results(module, module, x),
        results(exact, lambda x: by_multihead(exact, x, OVER[kind]), x.double()),
        results(theirs, lambda x: by_multihead(theirs, x, OVER[kind]), x),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("over", ["joint", "space", "time", 1])
def test_video_multihead_attention_is_multihead_attention(over, dtype):
    theirs, x = randomised(nn.MultiheadAttention(E, H, batch_first=True, dtype=dtype)), tokens(dtype)
    ours = VideoMultiheadAttention(E, H, over=over, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    exact = copy.deepcopy(theirs).double()
    assert_within_budget(
        results(ours, lambda x: ours(x, x, x)[0], x),
        results(exact, lambda x: by_multihead(exact, x, over), x.double()),
        results(theirs, lambda x: by_multihead(theirs, x, over), x),
    )
    flat = x.flatten(1, 2)
    assert torch.equal(ours(flat, flat, flat, grid=(T, S))[0], ours(x, x, x)[0].flatten(1, 2))


@pytest.mark.parametrize("masked", [False, True])
def test_video_multihead_attention_across_sequences(masked):
    theirs = randomised(nn.MultiheadAttention(E, H, batch_first=True))
    ours = VideoMultiheadAttention(E, H)
    ours.load_state_dict(theirs.state_dict())
    q, k, v = tokens(torch.float32, B, 3, E), tokens(torch.float32, B, 9, E), tokens(torch.float32, B, 9, E)
    mask = torch.rand(B, 9) < 0.4 if masked else None
    if mask is not None:
        mask[:, 0] = False
    exact = copy.deepcopy(theirs).double()
    verdict = judge(
        ours(q, k, v, key_padding_mask=mask)[0],
        exact(q.double(), k.double(), v.double(), key_padding_mask=mask, need_weights=False)[0],
        theirs(q, k, v, key_padding_mask=mask, need_weights=False)[0],
    )
    assert verdict.ok, verdict


def test_masks_reach_the_op():
    x, mask = tokens(), torch.rand(B, T, S) < 0.6
    for kind in ATTENTIONS:
        module = randomised(kind(E, H))
        changed = torch.where(mask[..., None], x, x + 1)  # what is masked is read by its own query alone
        same = module(x, key_mask=mask)[mask] == module(changed, key_mask=mask)[mask]
        assert same.all(), kind
        assert not torch.equal(module(x), module(changed))
    ours = VideoMultiheadAttention(E, H, over="time")
    assert torch.equal(
        ours(x, x, x, key_padding_mask=~mask)[0],
        TemporalAttentionFrom(ours)(x, key_mask=mask),
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_the_mask_of_an_encoder_layer(compiled):
    """nn.TransformerEncoderLayer hands its attention 0 and -inf for what its caller said with False and True."""
    theirs = nn.TransformerEncoderLayer(E, H, 2 * E, dropout=0.0, batch_first=True).eval()
    ours = copy.deepcopy(theirs)
    ours.self_attn = VideoMultiheadAttention(E, H)
    ours.load_state_dict(theirs.state_dict())
    exact, x, mask = copy.deepcopy(theirs).double(), tokens(torch.float32, B, 9, E), torch.rand(B, 9) < 0.4
    mask[:, 0] = False
    layer = torch.compile(ours, fullgraph=True) if compiled else ours
    with torch.enable_grad():  # without gradients the layer computes all by itself, and gives 0 for what is ignored
        plain = theirs(x, src_key_padding_mask=mask)
        verdict = judge(layer(x, src_key_padding_mask=mask), exact(x.double(), src_key_padding_mask=mask), plain)
    assert verdict.ok, verdict


@pytest.mark.parametrize("compiled", [False, True])
def test_a_mask_that_adds_is_refused(compiled):
    ours = VideoMultiheadAttention(E, H)
    module, mask = torch.compile(ours) if compiled else ours, torch.linspace(0, 1, 9).expand(B, 9)
    with pytest.raises(RuntimeError if compiled else ValueError, match="key_padding_mask adds to the scores"):
        module(tokens(torch.float32, B, 9, E), key_padding_mask=mask)


def test_a_mask_without_numbers():
    ours = VideoMultiheadAttention(E, H, device="meta")
    x, mask = torch.empty(B, 9, E, device="meta"), torch.empty(B, 9, device="meta")
    assert ours(x, key_padding_mask=mask)[0].shape == x.shape


def TemporalAttentionFrom(multihead: VideoMultiheadAttention) -> TemporalAttention:
    module = TemporalAttention(E, H)
    module.load_state_dict(multihead.state_dict())
    return module


def test_rotary_softcap_and_dropout_reach_the_op():
    x, rotary = tokens(), vivit_kernels.rotary_tables(T, 1, S, D)
    for kind in ATTENTIONS:
        module = randomised(kind(E, H, attention_dropout=0.5)).eval()
        plain = module(x)
        assert not torch.equal(module(x, rotary=rotary), plain)
        module.softcap = 0.1
        assert not torch.equal(module(x), plain)
        module.softcap = None
        module.train()
        torch.manual_seed(1)
        dropped = module(x)
        torch.manual_seed(1)
        assert torch.equal(module(x), dropped) and not torch.equal(dropped, plain)


# ---- state dicts ----


def split(state: dict[str, Tensor], names: tuple[str, str, str], out: str) -> dict[str, Tensor]:
    """qkv.* and proj.* under other names."""
    found = {f"{out}.{kind}": state[f"proj.{kind}"] for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        found |= {f"{n}.{kind}": x for n, x in zip(names, state[f"qkv.{kind}"].chunk(3), strict=True)}
    return found


@pytest.mark.parametrize(
    "names, out",
    [
        (("q_proj", "k_proj", "v_proj"), "o_proj"),
        (("q_proj", "k_proj", "v_proj"), "out_proj"),
        (("query", "key", "value"), "proj"),
        (("attention.query", "attention.key", "attention.value"), "output.dense"),
        (("to_q", "to_k", "to_v"), "to_out.0"),
    ],
)
@pytest.mark.parametrize("kind", [JointAttention, VideoMultiheadAttention])
def test_layouts_of_three_projections_load(kind, names, out):
    source = randomised(JointAttention(E, H)).eval()
    model = nn.ModuleDict({"layer": kind(E, H)}).eval()  # below a prefix, as in a model
    state = split(source.state_dict(), names, out)
    given = {f"layer.{k}": x for k, x in state.items()}
    model.load_state_dict(given)
    assert set(given) == {f"layer.{k}" for k in state}, "the caller's dictionary is not touched"
    x = tokens(torch.float32, B, T * S, E)
    out_ = model["layer"](x)
    assert torch.equal(out_[0] if isinstance(out_, tuple) else out_, source(x))


def test_packed_layouts_load():
    multihead = randomised(nn.MultiheadAttention(E, H, batch_first=True)).state_dict()
    timm = JointAttention(E, H)
    timm.load_state_dict(multihead)
    assert torch.equal(timm.qkv.weight, multihead["in_proj_weight"])
    assert torch.equal(timm.proj.bias, multihead["out_proj.bias"])
    timesformer = {
        "attention.qkv.weight": multihead["in_proj_weight"],
        "attention.qkv.bias": multihead["in_proj_bias"],
        "output.dense.weight": multihead["out_proj.weight"],
        "output.dense.bias": multihead["out_proj.bias"],
    }
    other = TemporalAttention(E, H)
    other.load_state_dict(timesformer)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), timm.parameters(), strict=True))
    back = VideoMultiheadAttention(E, H)
    back.load_state_dict(timm.state_dict())
    assert list(back.state_dict()) == list(multihead)
    assert all(torch.equal(back.state_dict()[k], multihead[k]) for k in multihead)


@pytest.mark.parametrize("prefix", ["", "attention."])
def test_keys_without_bias_get_zeros(prefix):
    state = split(randomised(JointAttention(E, H)).state_dict(), ("query", "key", "value"), "proj")
    biases = {n: state.pop(f"{n}.bias") for n in ("query", "key", "value")}
    module = JointAttention(E, H)
    module.load_state_dict(state | {f"{prefix}q_bias": biases["query"], f"{prefix}v_bias": biases["value"]})
    q, k, v = module.qkv.bias.chunk(3)
    assert torch.equal(q, biases["query"]) and torch.equal(v, biases["value"]) and not k.any()


def test_what_does_not_fit_is_told():
    state = split(randomised(JointAttention(E, H)).state_dict(), ("query", "key", "value"), "proj")
    without = {k: x for k, x in state.items() if k != "key.weight"}
    with pytest.raises(RuntimeError, match=r"Missing key.*qkv\.weight"):
        JointAttention(E, H).load_state_dict(without)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*q_norm"):
        JointAttention(E, H).load_state_dict(state | {"q_norm.weight": torch.ones(D)})


# ---- tubelets ----

VIDEO = (B, 3, 4, 8, 6)  # [B, C, F, Y, X]
TUBELET, GRID = (2, 4, 3), (2, 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tubelet_embedding_is_a_convolution(dtype):
    conv, video = randomised(nn.Conv3d(3, E, TUBELET, TUBELET, dtype=dtype)), torch.randn(VIDEO).to(dtype)
    module = TubeletEmbedding(E, TUBELET, dtype=dtype)
    module.load_state_dict(conv.state_dict())
    exact = copy.deepcopy(conv).double()
    assert_within_budget(
        results(module, module, video),
        results(exact, lambda x: exact(x).flatten(2).transpose(1, 2), video.double()),
        results(conv, lambda x: conv(x).flatten(2).transpose(1, 2), video),
    )


@pytest.mark.parametrize("per, shape", [("clip", (B, 9, E)), ("frame", (B, 2, 5, E))])
def test_tubelet_embedding_with_positions_and_class_token(per, shape):
    module = randomised(TubeletEmbedding(E, TUBELET, grid=GRID, class_token=True, per=per, layout="BFCYX"))
    video = torch.randint(0, 256, VIDEO, dtype=torch.uint8)
    out = module(video.transpose(1, 2))
    assert out.shape == shape
    plain = vivit_kernels.tubelet_embedding(
        video, module.weight, module.bias, module.position, module.class_token, class_token_per=per
    )
    assert torch.equal(out, plain)
    state = module.state_dict()
    assert set(state) == {"weight", "bias", "position", "class_token"}
    names = {
        "patch_embeddings.projection.weight": state["weight"],
        "patch_embeddings.projection.bias": state["bias"],
        "position_embeddings": state["position"],
        "cls_token": state["class_token"],
    }
    other = TubeletEmbedding(E, TUBELET, grid=GRID, class_token=True, per=per, layout="BFCYX")
    other.load_state_dict(names)
    assert torch.equal(other(video.transpose(1, 2)), out)


def test_an_image_kernel_is_a_tubelet_of_one_frame():
    conv = nn.Conv2d(3, E, 4, 4)
    state = {f"proj.{k}": x for k, x in conv.state_dict().items()}
    module = TubeletEmbedding(E, (1, 4, 4))
    module.load_state_dict(state)
    assert torch.equal(module.weight[:, :, 0], conv.weight)
    with pytest.raises(RuntimeError, match="size mismatch"):
        TubeletEmbedding(E, (2, 4, 4)).load_state_dict(state)


# ---- company ----


def multihead(over: str | int) -> nn.Module:
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = randomised(VideoMultiheadAttention(E, H, over=over))

        def forward(self, x):
            return self.attention(x, x, x)[0]

    return First()


EVERY = {
    **{kind.__name__: lambda kind=kind: randomised(kind(E, H)) for kind in ATTENTIONS},
    "VideoMultiheadAttention": lambda: multihead("time"),
    "VideoMultiheadAttention joint": lambda: multihead("joint"),
}


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_autocast_takes_its_dtype(make):
    module, x = make(), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    exact, eager = copy.deepcopy(module).double(), copy.deepcopy(module).bfloat16()
    verdict = judge(out, exact(x.double()), eager(x.bfloat16()))
    assert verdict.ok, verdict
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_checkpointing_gives_the_same_gradients(make):
    module, x = make(), tokens()
    plain = results(module, module, x)
    again = results(module, lambda x: checkpoint(module, x, use_reentrant=False), x)
    assert all(torch.equal(plain[k], again[k]) for k in plain)


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_the_whole_compiles(make):
    module, x = make(), tokens()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    plain, found = results(module, module, x), results(module, compiled, x)
    for name in plain:
        verdict = judge(found[name], plain[name].double(), plain[name], gradient=name != "out")
        assert verdict.ok, f"{name}: {verdict}"


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_copies_compute_the_same(make):
    module, x = make(), tokens()
    for other in (
        copy.deepcopy(module),
        *([pickle.loads(pickle.dumps(module))] if "First" not in repr(module) else []),
    ):
        assert torch.equal(other(x), module(x))


def test_an_encoder_layer_in_inference_does_not_pass_it_by():
    """nn.TransformerEncoderLayer has a fused path of its own, which knows joint attention alone."""
    layer = nn.TransformerEncoderLayer(E, H, 2 * E, dropout=0.0, batch_first=True, norm_first=True).eval()

    class Grid(VideoMultiheadAttention):
        def forward(self, x, *_, **options):  # pyright: ignore
            return super().forward(x, x, x, grid=(T, S))

    layer.self_attn = randomised(Grid(E, H, over="time"))
    x = tokens(torch.float32, B, T * S, E)
    with_grad = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), with_grad)


# ---- refusals ----


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: JointAttention(30, 4), "JointAttention: embedding=30 must be a multiple of heads=4"),
        (lambda: FactorizedAttention(E, H, 5), "temporal_heads=5 must lie between 0"),
        (lambda: TubeletEmbedding(E, per="video"), "per='video' is not known"),
        (lambda: VideoMultiheadAttention(30, 4), "embed_dim=30 must be a multiple of num_heads=4"),
        (lambda: VideoMultiheadAttention(E, H, over="width"), "over='width' is not known"),
        (lambda: JointAttention(E, H)(torch.zeros(B, E)), r"x must be \[B, N, E\] or \[B, T, S, E\]"),
        (lambda: SpatialAttention(E, H)(torch.zeros(B, S, E)), r"SpatialAttention: x must be \[B, T, S, E\]"),
        (lambda: VideoMultiheadAttention(E, H)(torch.zeros(S, E)), r"query must be \[B, N, E\]"),
        (lambda: VideoMultiheadAttention(E, H, over="time")(torch.zeros(B, 6, E), grid=(2, 4)), r"grid=\(2, 4\)"),
        (
            lambda: VideoMultiheadAttention(E, H, over="space")(tokens(), tokens(), tokens()),
            "takes one tensor as query, key and value",
        ),
    ],
)
def test_wrong_sizes_are_told(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "option",
    [{"need_weights": True}, {"is_causal": True}, {"attn_mask": torch.ones(S, S)}],
    ids=lambda x: next(iter(x)),
)
def test_a_matrix_of_pairs_is_refused(option):
    x = torch.zeros(B, S, E)
    with pytest.raises(NotImplementedError, match=f"{next(iter(option))}.*use torch.nn.MultiheadAttention"):
        VideoMultiheadAttention(E, H)(x, x, x, **option)
