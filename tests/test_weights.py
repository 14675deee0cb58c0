"""vivit/weights: every format in, ours and Hugging Face's out, and files that are not what they seem."""

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
from parity import F32_BUDGET, F64_BUDGET, assert_same
from safetensors.torch import load_file, save_file

from vivit import ViViT, ViViTConfig
from vivit import weights as W
from vivit.weights.huggingface import hub_name, v5_name

SMALL = dict(frames=6, height=16, width=12, tubelet=(2, 8, 4), embedding=32, depth=2, heads=2, mlp=48, classes=5)
FE = dict(attention="factorized_encoder", temporal_depth=2)


def small(**changes) -> ViViT:
    model = ViViT(ViViTConfig(**{**SMALL, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


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


# ---- Hugging Face ----


def test_the_two_names_of_hugging_face():
    names = json.loads((parity.FIXTURES / "state_dict_keys_B16x2.json").read_text())
    for hub, v5 in names["hf_hub_name_to_transformers5_module_name"].items():
        assert v5_name(hub) == v5
        assert hub_name(v5) == hub_name(hub) == hub.removeprefix("vivit.")
    with torch.device("meta"):
        config = ViViTConfig.preset("B/16x2")
        shapes = {k: list(x.shape) for k, x in W.hf_state_dict(ViViT(config).state_dict(), config).items()}
    assert shapes == names["hf_hub_google_vivit_b_16x2_kinetics400_names"]


@pytest.mark.parametrize("names", ["hub", "v5"])
@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize("form", ["dict", "safetensors", "bin", "old bin", "shards"])
def test_load_hf_takes_every_name_and_file(tmp_path, names, prefixed, form):
    model = small()
    state = W.hf_state_dict(model.state_dict(), model.config, names)
    state = {k if prefixed else k.removeprefix("vivit."): x.contiguous() for k, x in state.items()}
    source: object = state
    if form == "safetensors":
        source = tmp_path
        save_file(state, tmp_path / "model.safetensors")
    if form.endswith("bin"):
        source = tmp_path / "pytorch_model.bin"
        torch.save(state, source, _use_new_zipfile_serialization=form == "bin")
    if form == "shards":
        source = tmp_path
        places = {k: f"model-{i % 2}.safetensors" for i, k in enumerate(state)}
        for name in set(places.values()):
            save_file({k: x for k, x in state.items() if places[k] == name}, tmp_path / name)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert same(W.load_hf(source, model.config), model.state_dict())


def test_load_hf_leaves_the_pooler_out_and_says_so():
    model = small()
    state = W.hf_state_dict(model.state_dict(), model.config)
    body = {k.removeprefix("vivit."): x for k, x in state.items() if not k.startswith("classifier")}
    body |= {"pooler.dense.weight": torch.zeros(32, 32), "pooler.dense.bias": torch.zeros(32)}
    with pytest.warns(UserWarning) as caught:
        loaded = W.load_hf(body, model.config)
    messages = " ".join(str(w.message) for w in caught)
    assert "pooler.dense is left out" in messages and "has no classifier; the head is zero" in messages
    assert loaded.pop("head.weight").abs().max() == 0 and loaded.pop("head.bias").abs().max() == 0
    assert all(torch.equal(x, model.state_dict()[k]) for k, x in loaded.items())


def test_load_hf_without_qkv_bias():
    model = small()
    state = {k: x for k, x in W.hf_state_dict(model.state_dict(), model.config).items()}
    biases = [k for k in state if re.search(r"(query|key|value)\.bias", k)]
    loaded = W.load_hf({k: x for k, x in state.items() if k not in biases}, model.config)
    assert loaded["blocks.1.attentions.0.qkv.bias"].abs().max() == 0
    with pytest.raises(ValueError, match=r"no 'encoder\.layer\.0\.attention\.attention\.query\.bias'"):
        W.load_hf({k: x for k, x in state.items() if k != biases[0]}, model.config)  # one only: a broken file


def test_load_hf_refuses_other_depths_and_strays():
    model = small()
    state = W.hf_state_dict(model.state_dict(), model.config)
    with pytest.raises(ValueError, match=r"has 'encoder\.layer\.1\..*for which a model of depth 1 has no place"):
        W.load_hf(state, small(depth=1).config)
    with pytest.raises(ValueError, match=r"no 'encoder\.layer\.2"):
        W.load_hf(state, small(depth=3).config)
    with pytest.raises(ValueError, match="twice"):
        W.load_hf({**state, "embeddings.cls_token": torch.zeros(1, 1, 32)}, model.config)


def test_shards_stay_in_their_folder(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match="outside its folder"):
        W.load_hf(tmp_path, small().config)
    save_file({"b": torch.zeros(1)}, tmp_path / "x.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    with pytest.raises(ValueError, match="promises 'a'"):
        W.load_hf(tmp_path, small().config)


@pytest.mark.parametrize(
    "changes, reason",
    [
        (FE, "not 'joint'"),
        (dict(attention="factorized_self_attention"), "not 'joint'.*no class token"),
        (dict(attention="factorized_dot_product"), "not 'joint'"),
        (dict(pool="mean"), "pool='mean' has no class token"),
        (dict(representation=8), "representation=8"),
        (dict(classes=(3, 4)), "two heads"),
        (dict(tokenization="uniform", uniform_frames=3, tubelet=(1, 8, 4)), "tokenization='uniform'"),
    ],
)
def test_hugging_face_has_model_1_only(tmp_path, changes, reason):
    model = small(**changes)
    with pytest.raises(ValueError, match=f"save_hf: .*{reason}"):
        W.save_hf(model, model.config, tmp_path / "out")
    with pytest.raises(ValueError, match=r"load_hf: .*model 1"):
        W.load_hf({}, model.config)
    assert not (tmp_path / "out").exists()


def test_hf_config():
    fixture = json.loads((parity.FIXTURES / "hf_a.json").read_text())["config"]
    config = W.hf_config({**fixture, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2})
    assert (config.frames, config.height, config.width, config.tubelet) == (8, 32, 32, (2, 8, 8))
    assert (config.dropout, config.attention_dropout, config.classes, config.eps) == (0.1, 0.2, 5, 1e-6)
    assert W.hf_config({"id2label": {"0": "a", "1": "b", "2": "c"}}).classes == 3
    assert W.hf_config({}) == ViViTConfig.preset("B/16x2", classes=2)  # transformers' defaults
    with pytest.raises(ValueError, match="hidden_act='gelu'"):
        W.hf_config({"hidden_act": "gelu"})
    with pytest.raises(ValueError, match="describes a 'vit'"):
        W.hf_config({"model_type": "vit"})


@pytest.mark.parametrize("names", ["hub", "v5"])
@pytest.mark.parametrize("width", [16, 24])
def test_transformers_loads_what_save_hf_writes(tmp_path, names, width):
    transformers = pytest.importorskip("transformers")
    model = small(width=width)
    W.save_hf(model, model.config, tmp_path, names=names)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert W.hf_config(tmp_path) == model.config
    assert set(load_file(tmp_path / "model.safetensors")) == set(
        W.hf_state_dict(model.state_dict(), model.config, names)
    )
    theirs, info = transformers.VivitForVideoClassification.from_pretrained(
        tmp_path, attn_implementation="sdpa", output_loading_info=True
    )
    assert not any(info.values()), info
    video = torch.randn(2, 3, 6, 16, width)
    compare(model, theirs.eval(), video)
    eager = transformers.VivitForVideoClassification.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        assert_same(model.float()(video), eager.eval()(video.transpose(1, 2)).logits, F32_BUDGET)


@pytest.mark.parametrize("size", [16, (16, 24)])
def test_we_load_what_transformers_writes(tmp_path, size):
    transformers = pytest.importorskip("transformers")
    config = transformers.VivitConfig(
        image_size=size, num_frames=6, tubelet_size=[2, 8, 8], hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=48, num_labels=5,
    )  # fmt: skip
    theirs = transformers.VivitForVideoClassification._from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path)
    ours = ViViT(W.hf_config(tmp_path)).eval()
    for source in (tmp_path, theirs.state_dict()):  # the hub's names in the file, the modules' in memory
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.zero_()
        W.load_into(ours, W.load_hf(source, ours.config), "transformers")
        compare(ours, theirs, torch.randn(2, 3, 6, ours.config.height, ours.config.width))


def compare(ours: ViViT, theirs, video: torch.Tensor) -> None:
    """Logits and every gradient, in float64."""
    ours, theirs, video = ours.double(), theirs.double(), video.double()
    mine, yours = ours(video), theirs(video.transpose(1, 2)).logits
    assert_same(mine, yours.detach(), F64_BUDGET, "logits")
    weight = torch.randn_like(mine)
    (mine * weight).sum().backward()
    (yours * weight).sum().backward()
    gradients = {v5_name(k): p.grad for k, p in theirs.named_parameters()}
    own = {k: p.grad for k, p in ours.named_parameters()}
    for key, gradient in W.hf_state_dict(own, ours.config, "v5").items():
        assert_same(gradient, gradients[key], F64_BUDGET, key)
    ours.zero_grad()
    theirs.zero_grad()


def test_zip_archives_are_told_apart(tmp_path):
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        archive.writestr("readme.txt", "no weights")
    with pytest.raises(ValueError, match=re.escape("some.zip")):
        W.load_hf(tmp_path / "some.zip", small().config)
