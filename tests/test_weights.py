"""vivit/weights: our own file, Scenic's checkpoints, and files that are not what they seem."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile

import msgpack
import numpy as np
import parity
import pytest
import torch
from flax_files import chunked, flax_bytes, nested
from parity import same, small
from safetensors.torch import save_file

from vivit import ViViT, ViViTConfig
from vivit import weights as W

FE = dict(attention="factorized_encoder", temporal_depth=2)


@pytest.fixture
def scenic():
    """(parameters, configuration) of a fixture."""
    data = parity.arrays("scenic_m1_token")
    params = parity.under(data, "params")
    return params, parity.scenic_config(json.loads(str(data["config_json"])), params)


# ---- into a model: all or nothing ----


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda s: s.update({"head.bias": torch.zeros(6)}), r"'head\.bias' in here is \[6\], the model's is \[5\]"),
        (lambda s: s.pop("blocks.1.norms.0.bias"), r"here has no 'blocks\.1\.norms\.0\.bias' \[32\] \(1 of 32"),
        (lambda s: s.update({"pooler.weight": torch.zeros(2)}), r"here has 'pooler\.weight' \[2\] \(1 such\)"),
        (lambda s: s.update({"head.bias": torch.zeros(5).int()}), r"'head\.bias' in here is torch\.int32"),
    ],
)
def test_load_into_is_all_or_nothing(spoil, message):
    model, state = small(), dict(small().state_dict())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    spoil(state)
    with pytest.raises(ValueError, match=message):
        W.load_into(model, state, "here")
    assert same(before, model.state_dict())


def test_load_into_converts_to_the_models_dtype():
    model, state = small().double(), small().state_dict()
    W.load_into(model, state, "here")
    assert model.head.weight.dtype == torch.float64
    assert torch.equal(model.head.weight.float(), state["head.weight"])


# ---- our own file ----


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        FE,
        dict(attention=("joint", "factorized_dot_product"), pool="mean", classes=(3, 4), pixel_mean=(0.1, 0.2, 0.3)),
        dict(attention="factorized_self_attention", attention_order="time_space", representation=8),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_save_and_load(tmp_path, changes, dtype):
    model = small(**changes).to(dtype)
    W.save(model, tmp_path / "model.safetensors")
    loaded = W.load(tmp_path / "model.safetensors", backend="torch")
    assert loaded.config == model.config and loaded.backend == "torch"
    assert same(model.state_dict(), loaded.state_dict())
    assert all(p.requires_grad and p.dtype == dtype for p in loaded.parameters())


def test_save_replaces_whole_files_or_none(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    W.save(small(), path)
    before = path.read_bytes()

    def half(tensors, name, metadata):
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr("vivit.weights.files.save_file", half)
    with pytest.raises(OSError, match="disk is full"):
        W.save(small(), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    monkeypatch.undo()
    W.save(small(), path)
    assert path.read_bytes() != before


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def strange(tmp_path):
    """Files that hold no whole model, by what they are."""
    W.save(small(), tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "header only").write_bytes(whole[:100])
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("<html>Not found</html>")
    (tmp_path / "pickle").write_bytes(pickle.dumps({"a": Evil(tmp_path / "ran")}))
    torch.save({"a": Evil(tmp_path / "ran")}, tmp_path / "evil.bin")
    torch.save({"a": Evil(tmp_path / "ran")}, tmp_path / "old evil.bin", _use_new_zipfile_serialization=False)
    torch.save({"a": torch.zeros(2)}, tmp_path / "cut.bin")
    (tmp_path / "cut.bin").write_bytes((tmp_path / "cut.bin").read_bytes()[:300])
    np.savez(tmp_path / "objects.npz", a=np.array([Evil(tmp_path / "ran")], dtype=object))
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    yield tmp_path
    assert not (tmp_path / "ran").exists(), "a weight file was executed"


STRANGE = ["cut", "header only", "empty", "text", "pickle", "evil.bin", "old evil.bin", "cut.bin", "objects.npz"]


@pytest.mark.parametrize("name", [*STRANGE, "other.safetensors"])
def test_load_says_what_a_file_is(strange, name):
    with pytest.raises(ValueError, match=re.escape(str(strange / name))) as caught:
        W.load(strange / name)
    assert ("pickle" in str(caught.value)) == (name == "pickle")


@pytest.mark.parametrize("name", STRANGE)
def test_other_readers_say_what_a_file_is(strange, name):
    readers = [lambda p: W.load_hf(p, small().config), W.read_image_vit, W.read_scenic]
    for read in readers:
        with pytest.raises(ValueError, match=re.escape(str(strange / name))):
            read(strange / name)


def test_a_missing_file_is_named(tmp_path):
    for read in (W.load, lambda p: W.load_hf(p, small().config), W.read_scenic, W.read_image_vit):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            read(tmp_path / "nowhere")


# ---- Scenic ----


def test_scenic_keeps_dtypes(scenic):
    params, config = scenic
    doubled = W.load_scenic({k: v.astype(np.float64) for k, v in params.items()}, config)
    assert {x.dtype for x in doubled.values()} == {torch.float64}
    assert {x.dtype for x in W.load_scenic(params, config).values()} == {torch.float32}


def test_scenic_owns_its_memory(scenic):
    params, config = scenic
    state = W.load_scenic(params, config)
    for x in state.values():
        x.zero_()
    assert np.abs(params["cls"]).max() > 0


def test_scenic_refuses_other_models(scenic):
    params, config = scenic
    values = config.to_dict()

    def load(changed=None, **changes):
        return W.load_scenic(params if changed is None else changed, ViViTConfig(**{**values, **changes}))

    with pytest.raises(ValueError, match=r"query/kernel' is \[48, 4, 12\], \[48, 2, 24\] is needed"):
        load(heads=2)  # as many entries, another model
    with pytest.raises(ValueError, match=r"pos_embedding' is \[1, 19, 48\], \[1, 25, 48\]"):
        load(frames=8)
    with pytest.raises(ValueError, match="'Transformer/encoderblock_3/LayerNorm_0/scale' is missing"):
        load(depth=4)
    with pytest.raises(ValueError, match="no place in this model for 'Transformer/encoderblock_2"):
        load(depth=2)
    with pytest.raises(ValueError, match=r"pos_embedding' is \[1, 19, 48\], \[1, 18, 48\]"):
        load(pool="mean")
    with pytest.raises(ValueError, match="SpatialTransformer/posembed_input/pos_embedding' is missing"):
        load(attention="factorized_encoder")
    with pytest.raises(ValueError, match="no mixed model"):
        load(attention=("joint",) * 3)
    with pytest.raises(ValueError, match="output_projection/bias' is missing"):
        load({k: v for k, v in params.items() if k != "output_projection/bias"})


def test_scenic_variants(scenic):
    """What no fixture here covers: a representation, two heads and uniform frames, on renamed parameters."""
    params, config = scenic
    rng = np.random.default_rng(0)
    changed = dict(params)
    changed["embedding/kernel"] = params["embedding/kernel"][0]
    changed["pre_logits/kernel"], changed["pre_logits/bias"] = rng.normal(size=(48, 10)), rng.normal(size=10)
    changed["output_projection/kernel"] = rng.normal(size=(10, 7))
    uniform = dict(tokenization="uniform", uniform_frames=3, tubelet=(1, 8, 4))
    config = ViViTConfig(**{**config.to_dict(), **uniform, "representation": 10, "classes": (4, 3)})
    state = W.load_scenic(changed, config)
    model = ViViT(config).eval()
    W.load_into(model, state, "variants")
    assert state["tubelet_weight"].shape == (48, 3, 1, 8, 4)
    assert state["tubelet_weight"][5, 2, 0, 7, 3] == changed["embedding/kernel"][7, 3, 2, 5]
    assert np.array_equal(state["representation.weight"], changed["pre_logits/kernel"].T)
    first, second = model(torch.zeros(1, 3, 6, 16, 12))
    assert first.shape == (1, 4) and second.shape == (1, 3)


@pytest.mark.parametrize("where", ["optimizer", "params", "params/params"])
def test_read_scenic(tmp_path, scenic, where):
    params, config = scenic
    tree = nested(params)
    tree["embedding"]["kernel"] = chunked(params["embedding/kernel"], 1000)
    rest = {"global_step": np.int64(7), "accum_train_time": 3, "oddity": 1 + 2j, "model_state": {}}
    if where == "optimizer":
        momentum = nested({k: np.zeros_like(v) for k, v in params.items()})
        whole = {"optimizer": {"target": tree, "state": {"step": np.int32(1), "param_states": momentum}}, **rest}
    else:
        whole = {"params": tree if where == "params" else {"params": tree}, **rest}
    (tmp_path / "checkpoint").write_bytes(flax_bytes(whole))
    for path in (tmp_path, tmp_path / "checkpoint"):
        flat = W.read_scenic(path)
        assert flat.keys() == params.keys()
        assert all(np.array_equal(flat[k], params[k]) and flat[k].dtype == params[k].dtype for k in params)
    assert same(W.load_scenic(flat, config), W.load_scenic(params, config))


def test_read_scenic_takes_the_last_of_a_folder(tmp_path):
    for step in (9, 10, 100):
        tree = {"params": {"x": np.array([step], np.float32)}}
        (tmp_path / f"checkpoint_{step}").write_bytes(flax_bytes(tree))
    (tmp_path / "checkpoint_200.tmp").write_bytes(b"half")
    assert W.read_scenic(tmp_path)["x"] == 100
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="checkpoint_N"):
        W.read_scenic(tmp_path / "empty")


def test_read_scenic_widens_bfloat16(tmp_path):
    x = torch.randn(3, 4).bfloat16()
    packed = msgpack.packb((x.shape, "bfloat16", x.view(torch.int16).numpy().tobytes()), use_bin_type=True)
    (tmp_path / "checkpoint").write_bytes(msgpack.packb({"params": {"x": msgpack.ExtType(1, packed)}}))
    assert np.array_equal(W.read_scenic(tmp_path)["x"], x.float().numpy())


@pytest.mark.parametrize(
    "content, message",
    [
        (flax_bytes({"params": {"x": np.zeros(9)}})[:-20], "no whole flax"),
        (flax_bytes({"params": {"x": np.zeros(9)}}) + b"more", "no whole flax"),
        (
            flax_bytes({"step": 3, "model_state": {}}),
            r"neither optimizer/target nor params \(found: model_state, step\)",
        ),
        (msgpack.packb({"params": {"x": msgpack.ExtType(9, b"")}}), "extension type 9"),
        (msgpack.packb({"params": {"x": msgpack.ExtType(1, msgpack.packb(((2,), "O", b"\0" * 16)))}}), "refused"),
        (msgpack.packb({"params": {"x": msgpack.ExtType(1, msgpack.packb(((3,), "float32", b"\0" * 8)))}}), "no whole"),
        (flax_bytes({"params": {"x": {**chunked(np.zeros(9), 4), "shape": {"0": 8}}}}), "chunks of 9 values"),
    ],
)
def test_read_scenic_refuses_what_is_not_whole(tmp_path, content, message):
    (tmp_path / "checkpoint").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        W.read_scenic(tmp_path)
    assert str(tmp_path / "checkpoint") in str(caught.value)


def test_zip_archives_are_told_apart(tmp_path):
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        archive.writestr("readme.txt", "no weights")
    with pytest.raises(ValueError, match=re.escape("some.zip")):
        W.load_hf(tmp_path / "some.zip", small().config)
