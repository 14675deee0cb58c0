"""Starting from weights: every kind of file by one config line, other clip sizes, frozen parts, slower layers."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from flax_files import flax_bytes, nested
from parity import same, small
from test_image_vit import DEPTH, HEADS, MLP, PATCH, E, image_vit, video_vit
from test_train import Noise, config

from vivit import ViViT, ViViTConfig, finetune
from vivit import weights as W
from vivit.finetune import InitConfig, initialise, layer_of, resize_position
from vivit.train import Run

EPS = torch.finfo(torch.float32).eps


def scenic_vivit(T=3, side=2, cls=True, over_time=False):
    """A random ViViT of model 1, 3 or 4 under Scenic's names, made of an image ViT's parameters."""
    flat, rng = image_vit(side, cls, classes=5), np.random.default_rng(1)
    flat["embedding/kernel"] = rng.normal(size=(2, PATCH, PATCH, 3, E)).astype(np.float32)
    flat["Transformer/posembed_input/pos_embedding"] = rng.normal(size=(1, T * side * side + cls, E)).astype(np.float32)
    if over_time:
        names = {"Attention_0/": "Attention_space/", "LayerNorm_0": "LayerNorm_space", "LayerNorm_1": "LayerNorm_mlp"}
        for name in [n for n in flat if "encoderblock" in n]:
            value, new = flat.pop(name), name.replace("MlpBlock_0", "MlpBlock")
            for old, other in names.items():
                new = new.replace(old, other)
            flat[new] = value
            if "space" in new:
                flat[new.replace("space", "time")] = value + 1
    return flat


# ---- every kind of file by one line ----


def test_an_image_vit(tmp_path):
    flat = image_vit()
    np.savez(tmp_path / "vit.npz", **flat)
    model, same_way = video_vit("m2"), video_vit("m2")
    same_way.load_state_dict(model.state_dict())
    told = initialise(model, InitConfig(path=str(tmp_path / "vit.npz")))
    W.init_from_image_vit(same_way, flat, "central", "tile")
    assert same(model.state_dict(), same_way.state_dict())
    assert "image ViT" in told and "position tile" in told and "temporal" in told and "head" in told
    larger = video_vit("m1", side=3)
    assert "position resize_tile" in initialise(larger, InitConfig(path=str(tmp_path / "vit.npz"), kernel="inflate"))
    assert "position resize;" in initialise(video_vit("m2", side=3), InitConfig(path=str(tmp_path / "vit.npz")))


@pytest.mark.parametrize("kind", ["vivit", "run", "huggingface", "scenic"])
def test_a_vivit_of_every_origin(tmp_path, kind):
    source = small(height=16, width=16, tubelet=(2, 8, 8))
    path = tmp_path / "weights"
    if kind in ("vivit", "run"):
        path.mkdir()
        W.save(source, path / "model.safetensors")
        path = path if kind == "run" else path / "model.safetensors"
    elif kind == "huggingface":
        W.save_hf(source, source.config, path)
    else:
        flat = scenic_vivit()
        path.write_bytes(flax_bytes({"optimizer": {"target": nested(flat)}}))
        source = ViViT(W.scenic_config(flat, frames=6))
        W.load_into(source, W.load_scenic(flat, source.config), "flat")
    target = ViViT(dataclasses.replace(source.config, classes=9))
    told = initialise(target, InitConfig(path=str(path), frames=6))
    assert "a new head" in told and ("vivit" if kind == "run" else kind) in told
    new, old = target.state_dict(), source.state_dict()
    assert all(torch.equal(new[name], old[name]) for name in old if not name.startswith("head."))
    assert not new["head.weight"].any() and len(new["head.weight"]) == 9
    again = ViViT(source.config)
    initialise(again, InitConfig(path=str(path), frames=6, head="keep"))
    assert same(again.state_dict(), old)
    with pytest.raises(ValueError, match=r"init\.head='keep': .* has 5 classes, the data 9"):
        initialise(target, InitConfig(path=str(path), frames=6, head="keep"))


def test_scenics_configuration_is_read_from_its_parameters():
    found = W.scenic_config(scenic_vivit(), frames=6)
    expected = ViViTConfig(
        frames=6, height=16, width=16, tubelet=(2, 8, 8), embedding=E, depth=DEPTH, heads=HEADS, mlp=MLP, classes=5
    )
    assert found == expected
    assert W.scenic_config(scenic_vivit(cls=False), 6, "factorized_dot_product") == dataclasses.replace(
        expected, attention="factorized_dot_product", pool="mean"
    )
    over_time = scenic_vivit(cls=False, over_time=True)
    config = W.scenic_config(over_time, 6)
    assert config == dataclasses.replace(expected, attention="factorized_self_attention", pool="mean")
    W.load_into(ViViT(config), W.load_scenic(over_time, config), "flat")
    with pytest.raises(ValueError, match="models 1 and 4 have the same names"):
        W.scenic_config(scenic_vivit(cls=False), 6)
    with pytest.raises(ValueError, match="12 positions are no square grid of 8 frames"):
        W.scenic_config(scenic_vivit(), 8)
    with pytest.raises(ValueError, match="five dimensions"):
        W.scenic_config(image_vit())


def test_scenics_factorised_encoder_is_read_from_its_parameters():
    one = image_vit()
    flat = {n.replace("Transformer/", "SpatialTransformer/"): x for n, x in one.items() if n != "cls"}
    flat |= {
        n.replace("Transformer/", "TemporalTransformer/"): x for n, x in one.items() if n.startswith("Transformer")
    }
    flat["embedding/kernel"] = np.zeros((2, PATCH, PATCH, 3, E), np.float32)
    flat["TemporalTransformer/posembed_input/pos_embedding"] = np.zeros((1, 5, E), np.float32)
    flat |= {f"cls_{name}Transformer": np.zeros((1, 1, E), np.float32) for name in ("Spatial", "Temporal")}
    config = W.scenic_config(flat)
    assert (config.attention, config.frames, config.temporal_depth) == ("factorized_encoder", 8, DEPTH)
    W.load_into(ViViT(config), W.load_scenic(flat, config), "flat")


# ---- longer clips, larger frames ----


def along(table, axis, size):
    """Linear interpolation of an axis, ends on ends, by numpy."""
    at = np.linspace(0, table.shape[axis] - 1, size)
    return np.apply_along_axis(lambda line: np.interp(at, np.arange(len(line)), line), axis, table)


@pytest.mark.parametrize("attention", ["joint", "factorized_encoder", "factorized_self_attention"])
def test_positions_are_interpolated_to_longer_clips_and_larger_frames(tmp_path, attention):
    more = {"temporal_depth": 2} if attention == "factorized_encoder" else {}
    source = small(height=16, width=16, tubelet=(2, 8, 8), attention=attention, **more)
    W.save(source, tmp_path / "a.safetensors")
    target = ViViT(dataclasses.replace(source.config, frames=10, height=24, width=32))  # 3x2x2 -> 5x3x4
    told = initialise(target, InitConfig(path=str(tmp_path / "a.safetensors")))
    assert "positions 3x2x2 -> 5x3x4" in told
    rows = int(source.config.has_class_token)
    per_frame = attention == "factorized_encoder"
    table = source.position.detach().double().numpy()[0]
    grid = table[rows:].reshape(1 if per_frame else 3, 2, 2, -1)
    for axis, size in enumerate((1 if per_frame else 5, 3, 4)):
        grid = along(grid, axis, size)
    expected = np.concatenate([table[:rows], grid.reshape(-1, table.shape[-1])])
    assert np.abs(target.position.detach().numpy()[0] - expected).max() <= 4 * EPS * np.abs(expected).max()
    if per_frame:
        line = source.temporal.position.detach().double().numpy()[0]
        expected = np.concatenate([line[:1], along(line[1:], 0, 5)])
        found = target.temporal.position.detach().numpy()[0]
        assert np.abs(found - expected).max() <= 4 * EPS * np.abs(expected).max()
    kept = "blocks.1.attentions.0.qkv.weight"
    assert torch.equal(target.state_dict()[kept], source.state_dict()[kept])


def test_resizing_to_the_same_grid_changes_nothing():
    table = torch.randn(1, 1 + 12, 8)
    assert torch.equal(resize_position(table, (3, 2, 2), (3, 2, 2), 1), table)
    with pytest.raises(ValueError, match="12 positions are no grid of 3x2x3"):
        resize_position(table, (3, 2, 3), (3, 2, 2), 1)


def test_a_shorter_temporal_encoder_takes_the_first_layers(tmp_path):
    source = small(attention="factorized_encoder", temporal_depth=3)
    W.save(source, tmp_path / "a.safetensors")
    target = ViViT(dataclasses.replace(source.config, temporal_depth=1))
    assert "2 temporal layers left out" in initialise(target, InitConfig(path=str(tmp_path / "a.safetensors")))
    name = "temporal.blocks.0.mlp.fc1.weight"
    assert torch.equal(target.state_dict()[name], source.state_dict()[name])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tubelet": (3, 8, 4)}, r"its tubelets are \(2, 8, 4\) \(tubelet\), the model's \(3, 8, 4\)"),
        (
            {"attention": "factorized_dot_product", "pool": "mean"},
            "a model of attention 'joint', pool 'cls'; this one is",
        ),
        ({"depth": 3}, r"has no 'blocks\.2\.norms\.0\.weight'"),
        ({"embedding": 48}, r"is \[32, 3, 2, 8, 4\], the model's is \[48, 3, 2, 8, 4\]"),
    ],
)
def test_a_model_that_differs_is_refused_whole(tmp_path, changes, message):
    W.save(small(), tmp_path / "a.safetensors")
    target = ViViT(dataclasses.replace(small().config, **changes))
    before = {name: x.clone() for name, x in target.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        initialise(target, InitConfig(path=str(tmp_path / "a.safetensors")))
    assert same(before, target.state_dict())


# ---- frozen parts and slower layers ----


@pytest.mark.parametrize(
    "parts, moving",
    [
        (("trunk",), {"head"}),
        (("tubelets", "position"), {"class_token", "blocks", "norm", "temporal", "head"}),
        (("blocks.0-1",), {"tubelet_weight", "tubelet_bias", "class_token", "position", "norm", "temporal", "head"}),
        (
            ("blocks.0", "temporal"),
            {"tubelet_weight", "tubelet_bias", "class_token", "position", "blocks", "norm", "head"},
        ),
    ],
)  # fmt: skip
def test_frozen_parts_do_not_move(tmp_path, parts, moving):
    run = Run(config(init__freeze=list(parts), optimizer__weight_decay=0.1), Noise(), tmp_path)
    torch.nn.init.normal_(run.model.head.weight)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.step = 3
    run.train_step(torch.stack([Noise()[0, i].video[0] for i in range(4)]), torch.tensor([0, 1, 1, 0]))
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert {name.split(".")[0] for name in moved} == moving
    if parts[0] == "blocks.0":
        assert not any(name.startswith("blocks.0.") for name in moved) and "blocks.1.mlp.fc1.weight" in moved


def test_parts_that_are_not_there_are_named():
    model = small()
    with pytest.raises(ValueError, match=r"init\.freeze: no part 'blok'; .*did you mean|no part 'blok' in this model"):
        finetune.freeze(model, ("blok",))
    with pytest.raises(ValueError, match=r"no part 'blocks\.2'"):
        finetune.freeze(model, ("blocks.0-2",))
    with pytest.raises(ValueError, match="leaves nothing to train"):
        finetune.freeze(model, ("trunk", "head"))


def test_layers_learn_the_slower_the_lower_they_are(tmp_path):
    changes = {
        "optimizer__name": "sgd",
        "optimizer__momentum": 0.0,
        "init__layer_decay": 0.5,
        "optimizer__clip_norm": 0.0,
    }
    run = Run(config(**changes), Noise(), tmp_path)
    torch.nn.init.normal_(run.model.head.weight)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.step = 3
    _, rate, _ = run.train_step(torch.stack([Noise()[0, i].video[0] for i in range(4)]), torch.tensor([0, 1, 1, 0]))
    layers = {"tubelet_weight": 0, "position": 0, "class_token": 0, "blocks.0.mlp.fc1.weight": 1,
              "blocks.1.norms.0.bias": 2, "norm.weight": 2, "temporal.class_token": 2,
              "temporal.blocks.0.mlp.fc2.bias": 3, "temporal.norm.bias": 4, "head.weight": 4}  # fmt: skip
    for name, p in run.model.named_parameters():
        layer = layer_of(name, run.config.model)
        assert layer == layers.get(name, layer)
        expected = before[name] - rate * 0.5 ** (4 - layer) * p.grad
        assert (p.detach() - expected).abs().max() <= 4 * EPS * before[name].abs().max().clamp(min=1)
    assert len(run.optimizer.param_groups) == 10 and {g["scale"] for g in run.optimizer.param_groups} == {
        1.0, 0.5, 0.25, 0.125, 0.0625
    }  # fmt: skip


def test_a_run_that_was_started_from_weights_resumes_without_them(tmp_path):
    values = config(epochs=1, init__freeze=["blocks.0"], init__layer_decay=0.8)
    source = ViViT(values.model)
    torch.nn.init.normal_(source.position)
    W.save(source, tmp_path / "w" / "model.safetensors")
    values = dataclasses.replace(values, init=dataclasses.replace(values.init, path=str(tmp_path / "w")))
    run = Run(values, Noise(), tmp_path / "run")
    assert torch.equal(run.model.position, source.position) and "init: vivit" in run.started
    assert torch.equal(run.model.blocks[0].mlp.fc1.weight, source.blocks[0].mlp.fc1.weight)
    run.fit(quiet=True)
    shutil.rmtree(tmp_path / "w")
    assert Run(values, Noise(), tmp_path / "run", resume=True).step == run.total
    with pytest.raises(FileNotFoundError, match=r"init\.path"):
        Run(values, Noise(), tmp_path / "other")
