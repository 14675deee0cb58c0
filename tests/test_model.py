"""vivit/model.py against the references' numbers, and beyond them: stochastic depth, two heads, mixed layers."""

from __future__ import annotations

import json
import math
import re

import parity
import pytest
import torch
import torch.nn.functional as F
from parity import F32_BUDGET, F64_BUDGET, assert_same

from vivit import ViViT, ViViTConfig
from vivit.model import Attention, DropPath, drop_path_rates, uniform_frame_indices
from vivit.weights import load_hf, load_scenic
from vivit_kernels import tubelet_embedding

SCENIC = parity.names("scenic_m[0-9]*.npz")
HF = [name for name in parity.names("hf_*.json") if "grads" not in name]
SMALL = dict(frames=6, height=16, width=12, tubelet=(2, 8, 4), embedding=32, depth=2, heads=2, mlp=48, classes=5)
FE = dict(attention="factorized_encoder", temporal_depth=2)
MODELS = {
    "joint": {},
    "factorized_encoder": FE,
    "factorized_self_attention": dict(attention="factorized_self_attention"),
    "factorized_dot_product": dict(attention="factorized_dot_product"),
}


def small(**changes) -> ViViT:
    """A model in float64 whose every parameter is random: a zero head or class token would hide mistakes."""
    model = ViViT(ViViTConfig(**{**SMALL, **changes})).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def clips(many: int = 2) -> torch.Tensor:
    return torch.randn(many, 3, 6, 16, 12, dtype=torch.float64)


# ---- the references ----


@pytest.mark.parametrize("name", SCENIC)
def test_scenic_in_float64(name):
    model, data = parity.scenic_model(name, torch.float64)
    video = parity.as_tensor(data["input"], torch.float64).requires_grad_()
    logits = model(video, layout="BFYXC")
    (logits * parity.as_tensor(data["loss_weight"], torch.float64)).sum().backward()
    assert_same(logits, data["logits_f64"], F64_BUDGET, "logits")
    assert_same(video.grad, data["grad_input_f64"], F64_BUDGET, "gradient of the input")


@pytest.mark.parametrize("name", SCENIC)
def test_scenic_in_float32_with_every_gradient(name):
    model, data = parity.scenic_model(name, torch.float32)
    video = torch.tensor(data["input"], requires_grad=True)
    logits = model(video, layout="BFYXC")
    loss = (logits * torch.tensor(data["loss_weight"])).sum()
    loss.backward()
    assert_same(logits, data["logits"], F32_BUDGET, "logits")
    assert_same(loss, data["loss"], F32_BUDGET, "loss")
    assert_same(video.grad, data["grad_input"], F32_BUDGET, "gradient of the input")
    # conversion permutes entries and nothing else, so it takes gradients too
    gradients = load_scenic(parity.under(data, "grads"), model.config)
    parameters = dict(model.named_parameters())
    assert gradients.keys() == parameters.keys()
    for key, parameter in parameters.items():
        assert_same(parameter.grad, gradients[key], F32_BUDGET, f"gradient of {key}")


@pytest.mark.parametrize("name", SCENIC)
def test_scenic_activations(name):
    model, data = parity.scenic_model(name, torch.float64)
    video = parity.as_tensor(data["input"], torch.float64)
    outputs: list[torch.Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda *a: outputs.append(a[2]))
    frames: list[torch.Tensor] = []
    if model.temporal is not None:
        model.temporal.register_forward_pre_hook(lambda _, args: frames.append(args[0]))
        model.temporal.blocks[-1].register_forward_hook(lambda *a: frames.append(model.temporal.norm(a[2])))
    with torch.no_grad():
        features = model.forward_features(video, layout="BFYXC")
        embedded = model.embed(video, layout="BFYXC")
        seen = {"prelogits": features, "encoder_input_with_pos": embedded}
        seen |= {f"block_output/encoderblock_{i}": x for i, x in enumerate(outputs)}
        seen["encoder_output"] = seen["spatial_encoder_output"] = model.norm(outputs[-1])
        seen |= dict(zip(("frame_repr", "temporal_encoder_output"), frames, strict=False))
        if model.config.tokenization == "tubelet":
            seen["embedding_conv_output"] = tubelet_embedding(
                video, model.tubelet_weight, model.tubelet_bias, layout="BFYXC"
            )
    compared = 0
    for key, found in seen.items():
        if key in data:
            assert_same(found.reshape(data[key].shape), data[key], F32_BUDGET, key)
            compared += 1
    assert compared >= 3


@pytest.mark.parametrize("name", [name for name in SCENIC if "logits_train_droplayer1" in parity.arrays(name)])
def test_scenic_drops_the_last_layer_at_rate_one(name):
    model_3 = "factorized_self_attention_block" in str(parity.arrays(name)["config_json"])  # there Scenic ignores it
    model, data = parity.scenic_model(name, torch.float32, drop_path=0.0 if model_3 else 1.0)
    logits = model.train()(torch.tensor(data["input"]), layout="BFYXC")
    assert_same(logits, data["logits_train_droplayer1"], F32_BUDGET)


@pytest.mark.parametrize("name", HF)
def test_hugging_face_in_float64(name):
    model, data = parity.hf_model(name, torch.float64)
    with torch.no_grad():
        assert_same(model(data["pixel_values"].double(), layout="BFCYX"), data["logits_f64"], F64_BUDGET)


@pytest.mark.parametrize("name", HF)
def test_hugging_face_in_float32_with_every_gradient(name):
    model, data = parity.hf_model(name, torch.float32)
    hidden: list[torch.Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda *a: hidden.append(a[2]))
    video = data["pixel_values"].clone().requires_grad_()
    logits = model(video, layout="BFCYX")
    hidden = [model.embed(video, layout="BFCYX"), *hidden]
    last = model.norm(hidden[-1])
    for i, x in enumerate(hidden):
        assert_same(x, data[f"hidden_states/{i}"], F32_BUDGET, f"hidden state {i}")
    assert_same(last, data["last_hidden_state"], F32_BUDGET)
    assert_same(logits, data["logits"], F32_BUDGET)
    losses = {
        "": (logits * data["loss_weight_logits"]).sum(),
        "_ce": F.cross_entropy(logits, data["labels"]),
        "_hidden": (last * data["loss_weight_hidden"]).sum(),
    }
    for kind, loss in losses.items():
        assert_same(loss, data[f"loss{kind or '_logits'}"], F32_BUDGET)
        wanted = [video, *model.parameters()]
        gradients = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
        assert_same(gradients[0], data[f"grad{kind}/pixel_values"], F32_BUDGET, f"loss{kind}: input")
        of = dict(zip((name for name, _ in model.named_parameters()), gradients[1:], strict=True))
        if kind == "_ce":
            assert_same(of["head.weight"], data["grad_ce/classifier.weight"], F32_BUDGET)
        if not kind:
            reference = load_hf(parity.under(parity.tensors(f"{name}_grads"), "grad"), model.config)
            assert reference.keys() == of.keys()
            for key, gradient in of.items():
                assert_same(gradient, reference[key], F32_BUDGET, f"gradient of {key}")


def test_float64_tells_a_wrong_epsilon():
    """What the two budgets are for: an eps of 1e-5 passes neither, though float32 noise comes near it."""
    model, data = parity.scenic_model("scenic_m1_token", torch.float64, eps=1e-5)
    with torch.no_grad():
        logits = model(parity.as_tensor(data["input"], torch.float64), layout="BFYXC")
    assert parity.error(logits, data["logits_f64"]) > F64_BUDGET


# ---- tokens ----


def test_uniform_frame_indices():
    cases = parity.under(parity.arrays("scenic_misc"), "uniform_frames")
    assert cases
    for case, indices in cases.items():
        frames, wanted = map(int, case.split("_"))
        assert uniform_frame_indices(frames, wanted) == list(indices), case


def test_uniform_frames_are_a_clip_of_those_frames():
    uniform = small(tokenization="uniform", uniform_frames=3, tubelet=(1, 8, 4))
    chosen = small(frames=3, tubelet=(1, 8, 4))
    chosen.load_state_dict(uniform.state_dict())
    video = clips()
    assert uniform_frame_indices(6, 3) == [2, 3, 4]
    assert_same(uniform(video), chosen(video[:, :, 2:5]), F64_BUDGET)


@pytest.mark.parametrize("attention", MODELS)
def test_the_layout_of_the_video_changes_nothing(attention):
    model, video = small(**MODELS[attention]).eval(), clips()
    channels_last = model(video.permute(0, 2, 3, 4, 1), layout="BFYXC")
    assert_same(channels_last, model(video), F64_BUDGET)
    assert_same(model(video.transpose(1, 2), layout="BFCYX"), channels_last, F64_BUDGET)


# ---- stochastic depth ----


def test_schedules():
    def rates(schedule, depth=4):
        return drop_path_rates(ViViTConfig(**SMALL, drop_path=0.3, drop_path_schedule=schedule), depth)

    assert rates("scenic") == rates("timm") == [0.3 * layer / 3 for layer in range(4)]
    assert rates("paper") == [0.3 * layer / 4 for layer in range(4)]
    assert rates("scenic", depth=1) == [0.0]


@pytest.mark.parametrize("attention", MODELS)
@pytest.mark.parametrize("schedule", ["scenic", "timm"])
def test_rate_one_drops_the_second_of_two_layers(attention, schedule):
    model = small(**MODELS[attention], drop_path=1.0, drop_path_schedule=schedule)
    video = clips()
    dropped = model.train()(video)
    plain = model.eval()(video)
    del model.blocks[1]
    if model.temporal is not None:
        del model.temporal.blocks[1]  # its schedule starts anew
    assert_same(dropped, model(video), F64_BUDGET)  # the last block computes fewer rows, and in another order
    assert (dropped - plain).abs().max() > F32_BUDGET


@pytest.mark.parametrize("schedule, survivor", [("scenic", 1.0), ("paper", 1.0), ("timm", 2.0)])
def test_survivors_are_rescaled_only_by_timm(schedule, survivor):
    rate = {"paper": 1.0}.get(schedule, 0.5)  # paper: 1.0 * layer 1 of 2
    model = small(drop_path=rate, drop_path_schedule=schedule)
    drop = model.blocks[1].drop_path
    assert drop.rate == 0.5
    out = drop.train()(torch.ones(2000, 3, 4))
    assert set(out.unique().tolist()) == {0.0, survivor}
    assert (out == out[:, :1, :1]).all()  # a whole clip, or nothing of it
    dropped = (out[:, 0, 0] == 0).double().mean()
    assert abs(dropped - 0.5) < 6 * math.sqrt(0.25 / 2000)
    assert_same(drop.eval()(out), out, 0.0)


def test_frames_of_a_clip_share_the_decision():
    model = small(**FE, drop_path=0.5, drop_path_schedule="paper").train()
    before_and_after: list[tuple[torch.Tensor, torch.Tensor]] = []
    for block in model.blocks:
        block.drop_path.register_forward_hook(lambda _, x, y: before_and_after.append((x[0], y)))
    model(clips(32))
    decisions = []
    for before, after in before_and_after:
        kept = (after == before).flatten(2).all(2)  # [B, T]
        gone = (after == 0).flatten(2).all(2)
        assert (kept ^ gone).all() and (kept == kept[:, :1]).all()
        decisions.append(kept[:, 0])
    assert len(decisions) == 4
    assert decisions[2].any() and not decisions[2].all()
    assert (decisions[2] != decisions[3]).any()  # attention and MLP are drawn separately


# ---- the models beyond the fixtures ----


def test_average_pool_baseline():
    """No temporal encoder: the head sees the mean over time of each frame's class row."""
    model, video = small(attention="factorized_encoder").eval(), clips()
    assert model.temporal is None
    frames = []
    for t in range(3):  # a clip of one temporal token is one frame of the baseline
        one = small(attention="factorized_encoder", frames=2).eval()
        one.load_state_dict(model.state_dict())
        frames.append(one.forward_features(video[:, :, 2 * t : 2 * t + 2]))
    assert_same(model(video), model.head(torch.stack(frames).mean(0)), F64_BUDGET)


@pytest.mark.parametrize("pool", ["mean", "max", "sum"])
def test_pooling_takes_every_token_after_the_norm(pool):
    model, video = small(pool=pool).eval(), clips()
    last: list[torch.Tensor] = []
    model.norm.register_forward_hook(lambda *a: last.append(a[2].flatten(1, 2)))
    features = model.forward_features(video)
    expected = {"mean": last[0].mean(1), "max": last[0].amax(1), "sum": last[0].sum(1)}[pool]
    assert_same(features, expected, F64_BUDGET)


def test_two_heads_are_one_dense_split():
    model, video = small(classes=(4, 3)).eval(), clips()
    first, second = model(video)
    assert first.shape == (2, 4) and second.shape == (2, 3)
    assert_same(torch.cat([first, second], 1), model.head(model.forward_features(video)), 0.0)


def test_a_mixed_model_is_its_layers_in_turn():
    kinds = ("joint", "factorized_dot_product", "factorized_self_attention")
    mixed = small(attention=kinds, depth=3, pool="mean").eval()
    video = clips()
    x = mixed.embed(video)
    for i, kind in enumerate(kinds):  # each layer as the first of a model of its own kind
        pure = small(attention=kind, depth=1, pool="mean").eval()
        pure.blocks[0].load_state_dict(mixed.blocks[i].state_dict())
        x = pure.blocks[0](x.reshape(2, 3, 6, 32)).reshape(2, 18, 32)
    features = mixed.norm(x).mean(1)
    assert_same(mixed.forward_features(video), features, F64_BUDGET)


def test_the_order_of_attention_is_the_order_of_its_modules():
    video = clips()
    one = small(attention="factorized_self_attention").eval()
    other = small(attention="factorized_self_attention", attention_order="time_space").eval()
    swapped = {
        re.sub(r"(norms|attentions)\.([01])", lambda m: f"{m[1]}.{1 - int(m[2])}", k): x
        for k, x in one.state_dict().items()
    }
    other.load_state_dict(swapped)  # each attention keeps its weights, and its axis
    assert (one(video) - other(video)).abs().max() > F32_BUDGET
    for block in other.blocks:
        block.norms, block.attentions = block.norms[::-1], block.attentions[::-1]
    assert_same(one(video), other(video), 0.0)


# ---- starting values (those of Scenic) ----


@pytest.mark.parametrize("attention", MODELS)
def test_initialisation(attention):
    size = dict(embedding=64, heads=4, mlp=96, frames=8, height=64, width=64)
    model = ViViT(ViViTConfig(**{**SMALL, **MODELS[attention], **size}))
    state = model.state_dict()

    def within(std: float, name: str):  # six standard errors of a sample's deviation
        x = state[name].double()
        assert abs(x.std() / std - 1) < 6 / math.sqrt(2 * x.numel()), name
        assert abs(x.mean()) < 6 * std / math.sqrt(x.numel()), name

    for name, x in state.items():
        if name.endswith("qkv.weight"):
            for part in x.chunk(3):  # Xavier of each E x E, not of the stacked 3E x E
                assert part.abs().max() <= math.sqrt(6 / 128)
                assert part.abs().max() > 0.98 * math.sqrt(6 / 128)
        elif name.endswith(("fc1.weight", "fc2.weight", "proj.weight")):
            assert 0.98 * math.sqrt(6 / sum(x.shape)) < x.abs().max() <= math.sqrt(6 / sum(x.shape))
        elif name.endswith(("fc1.bias", "fc2.bias")):
            within(1e-6, name)
        elif name.endswith("position"):
            within(0.02, name)
        elif "norm" in name:
            assert (x == (1.0 if name.endswith("weight") else 0.0)).all(), name
        elif name == "tubelet_weight":
            fan_in = 3 * 2 * 8 * 4
            within(fan_in**-0.5, name)
            assert x.abs().max() <= 2 * fan_in**-0.5 / 0.8796  # cut at two of the uncut normal's deviations
        else:
            assert name.endswith(("class_token", "bias", "head.weight")), name
            assert (x == 0).all(), name


def test_the_head_starts_at_zero_and_stops_gradients():
    model = ViViT(ViViTConfig(**SMALL))
    model(clips().float()).square().sum().add(model(clips().float()).sum()).backward()
    assert model.blocks[0].attentions[0].qkv.weight.grad.abs().max() == 0
    assert model.head.weight.grad.abs().max() > 0


# ---- sizes ----


def test_every_parameter_of_b16x2_has_its_size():
    """Names and shapes of the published models, through the loader, without memory for them."""
    names = json.loads((parity.FIXTURES / "state_dict_keys_B16x2.json").read_text())["scenic"]
    sources = {
        "model1_spacetime_B16x2_k400": "joint",
        "model2_factorized_encoder_B16x2_Lt4_k400": "factorized_encoder",
        "model3_factorized_self_attention_B16x2_k400": "factorized_self_attention",
        "model4_factorized_dot_product_B16x2_k400": "factorized_dot_product",
    }
    for source, attention in sources.items():
        with torch.device("meta"):
            config = ViViTConfig.preset("B/16x2", attention=attention)
            flat = {path: torch.empty(shape) for path, shape in names[source].items()}
            loaded, wanted = load_scenic(flat, config), ViViT(config).state_dict()
        assert {k: v.shape for k, v in loaded.items()} == {k: v.shape for k, v in wanted.items()}


def test_modules_carry_their_settings():
    model = small(dropout=0.1, attention_dropout=0.2, eps=1e-5)
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}
    assert {m.attention_dropout for m in model.modules() if isinstance(m, Attention)} == {0.2}
    assert all(m.rate == 0 for m in model.modules() if isinstance(m, DropPath))
