"""vivit/weights/huggingface.py: both of its namings, every kind of file, and transformers itself in both directions."""

from __future__ import annotations

import json
import re

import parity
import pytest
import torch
from parity import F32_BUDGET, F64_BUDGET, assert_same, same, small
from safetensors.torch import load_file, save_file

from vivit import ViViT, ViViTConfig
from vivit import weights as W
from vivit.weights.huggingface import hub_name, v5_name

FE = dict(attention="factorized_encoder", temporal_depth=2)


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
