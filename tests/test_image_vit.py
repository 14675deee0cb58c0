"""Starting from an image ViT: what lands where, written out in numpy, and the same function on still images."""

from __future__ import annotations

import re

import msgpack
import numpy as np
import pytest
import torch
from flax_files import flax_bytes, nested
from parity import F64_BUDGET, assert_same
from safetensors.torch import save_file

from vivit import ViViT, ViViTConfig
from vivit import weights as W

E, HEADS, MLP, DEPTH, PATCH = 16, 2, 24, 2, 8
ROUNDING = torch.finfo(torch.float32).eps
M = "MultiHeadDotProductAttention"
MODELS = {
    "m1": dict(attention="joint"),
    "m2": dict(attention="factorized_encoder", temporal_depth=2),
    "m3": dict(attention="factorized_self_attention"),
    "m3_time_first": dict(attention="factorized_self_attention", attention_order="time_space"),
    "m4": dict(attention="factorized_dot_product"),
}


def image_vit(side: int = 2, cls: bool = True, classes: int = 10) -> dict[str, np.ndarray]:
    """A random image ViT of side x side patches under Scenic's names."""
    rng, D = np.random.default_rng(side), E // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "embedding/kernel": (PATCH, PATCH, 3, E),
        "embedding/bias": (E,),
        "Transformer/posembed_input/pos_embedding": (1, side * side + cls, E),
        "output_projection/kernel": (E, classes),
        "output_projection/bias": (classes,),
        "Transformer/encoder_norm/scale": (E,),
        "Transformer/encoder_norm/bias": (E,),
        **({"cls": (1, 1, E)} if cls else {}),
    }
    for i in range(DEPTH):
        block = f"Transformer/encoderblock_{i}"
        for norm in ("LayerNorm_0", "LayerNorm_1"):
            shapes |= {f"{block}/{norm}/scale": (E,), f"{block}/{norm}/bias": (E,)}
        for x in ("query", "key", "value"):
            shapes |= {f"{block}/{M}_0/{x}/kernel": (E, HEADS, D), f"{block}/{M}_0/{x}/bias": (HEADS, D)}
        shapes |= {f"{block}/{M}_0/out/kernel": (HEADS, D, E), f"{block}/{M}_0/out/bias": (E,)}
        for dense, (into, out) in {"Dense_0": (E, MLP), "Dense_1": (MLP, E)}.items():
            shapes |= {f"{block}/MlpBlock_0/{dense}/kernel": (into, out), f"{block}/MlpBlock_0/{dense}/bias": (out,)}
    return {name: rng.normal(size=shape, scale=0.3).astype(np.float32) for name, shape in shapes.items()}


def video_vit(model: str, side: int = 2, **changes) -> ViViT:
    sizes = dict(frames=6, height=side * PATCH, width=side * PATCH, tubelet=(2, PATCH, PATCH), classes=5)
    sizes |= dict(embedding=E, depth=DEPTH, heads=HEADS, mlp=MLP)
    return ViViT(ViViTConfig(**{**sizes, **MODELS[model], **changes}))


def flat_kernel(vit: dict[str, np.ndarray], path: str) -> torch.Tensor:
    """A projection of the image ViT as a Linear's weight."""
    kernel = vit[f"{path}/kernel"]
    return torch.tensor(kernel.reshape(-1, E) if path.endswith("/out") else kernel.reshape(E, -1)).T


# ---- what lands where ----


@pytest.mark.parametrize("frames, central", [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2)])
def test_kernels(frames, central):
    vit = image_vit()
    image = torch.tensor(vit["embedding/kernel"]).permute(3, 2, 0, 1)  # [E, C, y, x]
    for kernel in ("central", "inflate"):
        model = video_vit("m1", frames=10, tubelet=(frames, PATCH, PATCH))
        W.init_from_image_vit(model, vit, kernel=kernel)
        for f in range(frames):
            expected = image / frames if kernel == "inflate" else image * (f == central)
            assert torch.equal(model.tubelet_weight[:, :, f], expected), (kernel, f)
        assert torch.equal(model.tubelet_bias, torch.tensor(vit["embedding/bias"]))


def test_a_kernel_that_agrees_is_copied():
    vit = image_vit()
    vit["embedding/kernel"] = np.random.default_rng(0).normal(size=(2, PATCH, PATCH, 3, E)).astype(np.float32)
    model = video_vit("m4")
    W.init_from_image_vit(model, vit)
    assert torch.equal(model.tubelet_weight, torch.tensor(vit["embedding/kernel"]).permute(4, 3, 0, 1, 2))


TEMPORAL_ENCODER = [name for name, _ in video_vit("m2").named_parameters() if name.startswith("temporal.")]
HEAD = ["head.bias", "head.weight"]
NORMS = {i: [f"blocks.{b}.norms.{i}.{x}" for b in range(DEPTH) for x in ("bias", "weight")] for i in (0, 1)}


@pytest.mark.parametrize(
    "model, left",
    [
        ("m1", HEAD),
        ("m2", ["class_token", *HEAD, *TEMPORAL_ENCODER]),
        ("m3", [*NORMS[1], *HEAD]),
        ("m3_time_first", [*NORMS[0], *HEAD]),
        ("m4", HEAD),
    ],
)
@pytest.mark.parametrize("temporal_attention", ["copy", "zero_out"])
def test_blocks(model, left, temporal_attention):
    vit, target = image_vit(), video_vit(model)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    unchanged = W.init_from_image_vit(target, vit, temporal_attention=temporal_attention)
    assert unchanged == sorted(left)
    state = target.state_dict()
    assert all(torch.equal(state[k], before[k]) for k in left)
    if "class_token" not in left and target.config.has_class_token:
        assert torch.equal(state["class_token"], torch.tensor(vit["cls"]))
    for i, block in enumerate(target.blocks):
        source = f"Transformer/encoderblock_{i}"
        assert torch.equal(block.mlp.fc1.weight, torch.tensor(vit[f"{source}/MlpBlock_0/Dense_0/kernel"]).T)
        assert torch.equal(block.mlp.fc2.bias, torch.tensor(vit[f"{source}/MlpBlock_0/Dense_1/bias"]))
        assert torch.equal(block.norm_mlp.weight, torch.tensor(vit[f"{source}/LayerNorm_1/scale"]))
        for norm, attention in zip(block.norms, block.attentions, strict=True):
            for part, x in zip(attention.qkv.weight.chunk(3), ("query", "key", "value"), strict=True):
                assert torch.equal(part, flat_kernel(vit, f"{source}/{M}_0/{x}"))
            out = flat_kernel(vit, f"{source}/{M}_0/out")
            zeroed = attention.over == "time" and temporal_attention == "zero_out"
            assert torch.equal(attention.proj.weight, out * 0 if zeroed else out)
            assert (attention.proj.bias == 0).all() == zeroed
            is_time = attention.over == "time"
            expected = torch.ones(E) if is_time else torch.tensor(vit[f"{source}/LayerNorm_0/scale"])
            assert torch.equal(norm.weight, expected)


def test_zeroed_out_projection_still_trains():
    """With q, k and v zero too, their gradients would be zero for ever."""
    model = video_vit("m3")
    W.init_from_image_vit(model, image_vit(), temporal_attention="zero_out")
    time = model.blocks[0].attentions[1]
    with torch.no_grad():
        model.head.weight.normal_()
    for step in range(2):
        model.zero_grad()
        model(torch.randn(2, 3, 6, 16, 16)).square().sum().backward()
        moves = [bool(x.grad.abs().max() > 0) for x in (time.proj.weight, time.qkv.weight)]
        assert moves == [True, step == 1]
        with torch.no_grad():
            time.proj.weight -= 0.1 * time.proj.weight.grad


# ---- positions ----


def grid_of(vit: dict[str, np.ndarray]) -> np.ndarray:
    return vit["Transformer/posembed_input/pos_embedding"][:, "cls" in vit :]


def linear(x: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Linear interpolation along an axis, first on first, last on last."""
    at = np.linspace(0, x.shape[axis] - 1, size)
    return np.apply_along_axis(lambda line: np.interp(at, np.arange(len(line)), line), axis, x.astype(np.float64))


@pytest.mark.parametrize("model, cls_in, pool", [
    ("m1", True, "cls"), ("m1", True, "mean"), ("m1", False, "cls"), ("m3", True, None), ("m4", False, None),
])  # fmt: skip
def test_tile_repeats_the_grid_over_time(model, cls_in, pool):
    vit, target = image_vit(cls=cls_in), video_vit(model, pool=pool)
    with torch.no_grad():
        target.position.fill_(7.0)
    W.init_from_image_vit(target, vit)
    expected = np.tile(grid_of(vit), (1, 3, 1))
    if target.config.has_class_token:
        table = vit["Transformer/posembed_input/pos_embedding"]
        row = table[:, :1] if cls_in else np.full((1, 1, E), 7.0)
        expected = np.concatenate([row, expected], 1)
    assert np.array_equal(target.position.detach().numpy(), expected)


@pytest.mark.parametrize("side, wide", [(4, 4), (3, 5), (2, 1)])
@pytest.mark.parametrize("model", ["m1", "m4", "m2"])
def test_resize_aligns_corners(model, side, wide):
    vit = image_vit(side=2)
    target = video_vit(model, height=side * PATCH, width=wide * PATCH)
    W.init_from_image_vit(target, vit, position="resize" if model == "m2" else "resize_tile")
    resized = linear(linear(grid_of(vit).reshape(2, 2, E), 0, side), 1, wide).reshape(1, side * wide, E)
    expected = np.tile(resized, (1, 1 if model == "m2" else 3, 1))
    found = target.position.detach()
    if target.config.has_class_token:
        assert np.array_equal(found[:, :1], vit["Transformer/posembed_input/pos_embedding"][:, :1])
        found = found[:, 1:]
    assert_same(found, expected, ROUNDING)


def test_a_table_of_the_same_shape_is_copied_whole():
    vit, target = image_vit(), video_vit("m2")
    for position in ("tile", "resize", "resize_tile"):
        W.init_from_image_vit(target, vit, position=position)
        assert np.array_equal(target.position.detach(), vit["Transformer/posembed_input/pos_embedding"])


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize("cls", [True, False])
def test_resize_temporal_position(kind, cls):
    table = np.random.default_rng(0).normal(size=(1, 3 + cls, E)).astype(np.float32)
    for tokens in (1, 2, 3, 6, 7):
        found = W.resize_temporal_position(kind(table), tokens, cls=cls)
        assert type(found) is type(kind(table)) and found.dtype == kind(table).dtype
        assert np.array_equal(found[:, : int(cls)], table[:, : int(cls)])
        assert_same(found[:, int(cls) :], linear(table[:, int(cls) :], 1, tokens), ROUNDING)
    with pytest.raises(ValueError, match=r"\[1, T\+1, E\] and tokens positive, got \[4, 16\] and 3"):
        W.resize_temporal_position(kind(np.zeros((4, E))), 3)


# ---- refusals ----


@pytest.mark.parametrize(
    "model, changes, arguments, message",
    [
        ("m1", {}, dict(kernel="centre"), "did you mean 'central'"),
        ("m1", {}, dict(position="tiled"), "did you mean 'tile'"),
        ("m3", {}, dict(temporal_attention="zero"), "did you mean 'zero_out'"),
        ("m1", dict(side=4), {}, "cannot make 3x4x4 tokens of a 2x2 grid; use position='resize_tile'"),
        ("m1", dict(side=4), dict(position="resize"), "use position='resize_tile'"),
        ("m2", dict(side=4), {}, "cannot make 1x4x4 tokens of a 2x2 grid; use position='resize'"),
        ("m1", dict(depth=3), {}, "has 2 blocks, the model 3"),
        ("m1", dict(heads=4), {}, r"query/kernel' is \[16, 2, 8\], \[16, 4, 4\] is needed"),
        ("m1", dict(mlp=32), {}, r"Dense_0/kernel' is \[16, 24\], \[16, 32\]"),
        ("m1", dict(tubelet=(2, 4, 4)), {}, r"embedding/kernel' is \[8, 8, 3, 16\], \[4, 4, 3, 16\]"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(model, changes, arguments, message):
    target = video_vit(model, **changes)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        W.init_from_image_vit(target, image_vit(), **arguments)
    assert all(torch.equal(x, before[k]) for k, x in target.state_dict().items())


# ---- files ----


def augreg(vit: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The names in the .npz files of the JAX models."""
    there = {f"{M}_0": f"{M}_1", "LayerNorm_1": "LayerNorm_2", "MlpBlock_0": "MlpBlock_3", "output_projection": "head"}
    return {"/".join(there.get(part, part) for part in name.split("/")): x for name, x in vit.items()}


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("prefix", ["", "opt/target/", "params/"])
def test_reads_npz(tmp_path, prefix):
    vit = image_vit()
    np.savez(tmp_path / "vit.npz", **{prefix + name: x for name, x in augreg(vit).items()})
    assert equal(W.read_image_vit(tmp_path / "vit.npz"), vit)


def test_reads_scenic(tmp_path):
    vit = image_vit()
    (tmp_path / "checkpoint").write_bytes(flax_bytes({"optimizer": {"target": nested(vit)}}))
    assert equal(W.read_image_vit(tmp_path), vit) and equal(W.read_image_vit(tmp_path / "checkpoint"), vit)
    (tmp_path / "checkpoint").write_bytes(msgpack.packb({"params": {"a": 1}}))
    with pytest.raises(ValueError, match="is this an image ViT"):
        W.read_image_vit(tmp_path)


def test_other_models_are_refused(tmp_path):
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "resnet.safetensors")
    with pytest.raises(ValueError, match=r"'conv1\.weight' in .*resnet\.safetensors is no name of a Hugging Face ViT"):
        W.read_image_vit(tmp_path / "resnet.safetensors")


def old_names(name: str) -> str:
    """transformers 5's module names as those of 4.x and the hub."""
    new = {"attention.o_proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    new |= {f"attention.{x[0]}_proj": f"attention.attention.{x}" for x in ("query", "key", "value")}
    name = name.replace("layers.", "encoder.layer.")
    for module, old in new.items():
        name = re.sub(rf"(\d\.){re.escape(module)}\.", rf"\1{old}.", name)
    return name


@pytest.mark.parametrize("form", ["saved folder", "4.x names, file", "5.x names, file", "no config"])
@pytest.mark.parametrize("kernel", ["central", "inflate"])
def test_a_still_clip_is_its_image(tmp_path, form, kernel):
    """Model 2's spatial encoder, started from transformers' ViT, gives every frame of a still clip what the ViT gives
    the image. (The class token, which the loading leaves alone as Scenic does, is set by hand.)"""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=2 * PATCH, patch_size=PATCH, hidden_size=E, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
        intermediate_size=MLP, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6,
    )  # fmt: skip
    theirs = transformers.ViTForImageClassification._from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path)
    path = tmp_path
    if form != "saved folder":
        path = tmp_path / "model.safetensors"
        rename = old_names if form == "4.x names, file" else str
        save_file({rename(name): x for name, x in theirs.state_dict().items()}, path)
    if form == "no config":
        (tmp_path / "config.json").unlink()
    vit = W.read_image_vit(path)
    heads_known = vit[f"Transformer/encoderblock_0/{M}_0/query/kernel"].ndim == 3
    assert heads_known == (form != "no config")
    ours = video_vit("m2", temporal_depth=0).eval()
    W.init_from_image_vit(ours, vit, kernel=kernel)
    with torch.no_grad():
        ours.class_token.copy_(torch.tensor(vit["cls"]))
        image = torch.randn(2, 3, 16, 16, dtype=torch.float64)
        expected = theirs.double().vit(image).last_hidden_state[:, 0]
        features = ours.double().forward_features(image[:, :, None].expand(-1, -1, 6, -1, -1))
    assert_same(features, expected, F64_BUDGET)
