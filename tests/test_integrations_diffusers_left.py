"""integrations/diffusers.py: what it leaves, and calls that go the way of the host."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: its models cannot be accelerated")

from diffusers_models import T, cast, exact_of, hold, inputs, make, output, results  # noqa: E402

from vivit_kernels import _native  # noqa: E402
from vivit_kernels.accelerate import accelerate  # noqa: E402
from vivit_kernels.integrations import diffusers_attention, pytorch  # noqa: E402
from vivit_kernels.numerics import judge  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("every_call_counts", "no_matrix_unit"),
    pytest.mark.skipif(not _native.AVAILABLE, reason=f"without kernels nothing is replaced: {_native.WHY}"),
]


def replaced(report):
    """Paths of what is replaced beside linear layers, which are where a CPU has a faster product."""
    return [entry.path for entry in report.replaced if entry.what != "Linear"]


def left(report):
    return {entry.path: entry.why for entry in report.left}


def exactly(model, given):
    return output(copy.deepcopy(model).double(), cast(given, torch.float64))


def motion(**changes):
    """One motion module, as in AnimateDiff, and tokens of two clips."""
    from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D

    sizes = dict(num_attention_heads=2, attention_head_dim=16, in_channels=32, norm_num_groups=8)
    places = dict(positional_embeddings="sinusoidal", num_positional_embeddings=8)
    return AnimateDiffTransformer3D(**{**sizes, **places, **changes}).eval(), torch.randn(2 * T, 32, 3, 3)


def own(cls):
    return type("Mine", (cls,), {})


class Own(nn.Module):
    """A processor as people write them."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return attn.to_out[0](attn.to_v(hidden_states))


# ---- what is left ----


@pytest.mark.parametrize("family", ["latte", "wan"])
def test_twice(family):
    model, given = make(family), inputs(family)
    before = output(model, given)
    first = accelerate(model)
    once = output(model, given)
    second = accelerate(model)
    assert not second.replaced and all("already" in entry.why for entry in second.left)
    second.restore()
    assert torch.equal(output(model, given), once)
    first.restore()
    assert torch.equal(output(model, given), before)


def test_other_models_are_left_with_a_reason():
    sizes = dict(block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=16)
    sizes |= dict(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"))
    sizes |= dict(up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    model = nn.ModuleDict({"image": diffusers.UNet2DConditionModel(**sizes), "other": nn.Linear(2, 2)})
    classes = [type(module) for module in model.modules()]
    report = accelerate(model, only="diffusers")
    assert left(report) == {"image": "nothing to replace is known in this model of diffusers"} and not report.replaced
    assert [type(module) for module in model.modules()] == classes


def test_an_unsupported_version(monkeypatch):
    model = make("latte")
    monkeypatch.setattr(diffusers, "__version__", "0.29.2")
    report = accelerate(model)
    assert not report.replaced
    assert left(report)[""] == "diffusers 0.29.2 is not supported; install diffusers>=0.35,<0.43"
    with pytest.raises(RuntimeError, match="is not supported"):
        accelerate(model, only="diffusers")


def test_a_processor_of_the_user_stays():
    model, given = make("unet3d"), inputs("unet3d")
    module = model.mid_block.temp_attentions[0]
    module.transformer_blocks[0].attn1.set_processor(own := Own())
    model.down_blocks[0].attentions[0].transformer_blocks[0].attn1.set_processor(own)
    host = copy.deepcopy(model)
    exact = exactly(model, given)
    report = accelerate(model)
    reasons = left(report)
    assert "a temporal attention: its processor is a Own" in reasons["mid_block.temp_attentions.0"]
    assert "never replaced" in reasons["down_blocks.0.attentions.0.transformer_blocks.0.attn1"]
    assert module.transformer_blocks[0].attn1.processor is own
    replaced = {entry.path for entry in report.replaced}
    assert "mid_block.temp_attentions.0.transformer_blocks.0.attn2" in replaced, "its neighbour by itself"
    assert judge(output(model, given), exact, output(host, given)).ok


def test_a_processor_of_the_user_in_the_spatial_attention_of_latte():
    model, given = make("latte"), inputs("latte")
    model.transformer_blocks[0].attn1.set_processor(Own())
    exact, eager = exactly(model, given), output(model, given)
    report = accelerate(model)
    assert replaced(report) == [""] and "Own" in left(report)["transformer_blocks.0.attn1"]
    assert judge(output(model, given), exact, eager).ok


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda block: setattr(block.attn1, "residual_connection", True), "adds its input"),
        (lambda block: setattr(block.attn1, "group_norm", nn.GroupNorm(2, 32)), "normalises its input"),
        (lambda block: setattr(block.attn1, "norm_q", nn.LayerNorm(16)), "normalises queries"),
        (lambda block: setattr(block.attn1, "added_kv_proj_dim", 8), "adds keys"),
        (lambda block: setattr(block.attn1, "inner_kv_dim", 16), "fewer heads"),
        (lambda block: block.attn1.set_attention_slice(1), "SlicedAttnProcessor"),
        (lambda block: setattr(block, "norm_type", "ada_norm"), "goes by sequences"),
        (lambda block: setattr(block, "__class__", own(type(block))), "a Mine, which may do more"),
        (
            lambda block: setattr(block.attn1, "__class__", type("Mine", (type(block.attn1),), {})),
            "made from Attention",
        ),
        (lambda block: block.double(), "no kernel runs float64"),
    ],
)
def test_the_reason_is_told(change, why):
    module, _ = motion()
    change(module.transformer_blocks[0])
    report = accelerate(module)
    assert why in left(report)[""] and not any(entry.path == "" for entry in report.replaced)


def test_head_sizes_without_a_kernel():
    module, _ = motion(attention_head_dim=12)
    assert "head size 12" in left(accelerate(module))[""]


def test_a_class_made_from_one_of_diffusers():
    module, _ = motion()
    module.__class__ = own(type(module))
    assert "a class of its own, made from AnimateDiffTransformer3D" in left(accelerate(module))[""]


def test_a_processor_made_from_a_known_one():
    model = make("wan")
    processor = model.blocks[0].attn1.processor
    processor.__class__ = own(type(processor))
    report = accelerate(model)
    assert left(report) == {"blocks.0.attn1": "its processor is made from WanAttnProcessor"}
    assert replaced(report) == ["blocks.0.attn2", "blocks.1.attn1", "blocks.1.attn2"]


# ---- what changes after accelerate() ----


def own_processor(module):
    module.transformer_blocks[0].attn1.set_processor(Own())


def hooked_attention(module):
    module.transformer_blocks[0].attn2.register_forward_hook(lambda module, arguments, result: result * 2)


def hooked_block(module):
    module.transformer_blocks[0].register_forward_pre_hook(lambda module, arguments: None)


def replaced_forward(module):
    """As offloading and caches do it."""
    attention = module.transformer_blocks[0].attn1
    host = next(cls for cls in type(attention).__mro__ if cls.__module__.startswith("diffusers."))
    attention.forward = Doubled(attention, host)


class Doubled:
    def __init__(self, module, host):
        self.module, self.host = module, host

    def __call__(self, *args, **kwargs):
        return self.host.forward(self.module, *args, **kwargs) * 2


def another_block(module):
    """As FreeNoise does it."""
    block = module.transformer_blocks[0]
    host = next(cls for cls in type(block).__mro__ if cls.__module__.startswith("diffusers."))
    block.__class__ = type("FreeNoise", (host,), {})


def chunks(module):
    module.transformer_blocks[0].set_chunk_feed_forward(1, 0)


@pytest.mark.parametrize(
    "change", [own_processor, hooked_attention, hooked_block, replaced_forward, another_block, chunks]
)
def test_what_the_user_does_later_is_as_with_the_host(change):
    module, x = motion()
    host = copy.deepcopy(module)
    accelerate(module)
    for one in (host, module):
        change(one)
    expected, exact = host(x, num_frames=T), copy.deepcopy(host).double()(x.double(), num_frames=T)
    assert judge(module(x, num_frames=T), exact, expected).ok


def test_hooks_see_the_sequences_of_the_host():
    module, x = motion()
    accelerate(module)
    seen = []
    handle = module.transformer_blocks[0].attn1.register_forward_hook(lambda *args: seen.append(tuple(args[2].shape)))
    module(x, num_frames=T)
    handle.remove()
    module(x, num_frames=T)
    assert seen == [(18, T, 32)]


class Adapted(nn.Module):
    """A linear with what LoRA adds to it."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.down, self.up = linear, nn.Linear(32, 2, bias=False), nn.Linear(2, 32, bias=False)

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


def test_adapters_of_the_projections():
    module, x = motion()
    accelerate(module)
    plain = module(x, num_frames=T)
    attention = module.transformer_blocks[0].attn1
    for name in ("to_q", "to_v"):
        setattr(attention, name, Adapted(getattr(attention, name)))
    host = copy.deepcopy(module)
    accelerated = module(x, num_frames=T)
    for one in host.modules():
        if cls := next((c for c in type(one).__mro__ if c.__module__.startswith("diffusers.")), None):
            one.__class__ = cls
    exact = copy.deepcopy(host).double()(x.double(), num_frames=T)
    assert judge(accelerated, exact, host(x, num_frames=T)).ok and not torch.allclose(accelerated, plain)


# ---- calls that stay the host's ----


@pytest.fixture
def taken(monkeypatch):
    """Calls of joint_attention by what is under test."""
    calls = []
    real = diffusers_attention.joint_attention

    def spy(*args, **options):
        calls.append(tuple(args[0].shape))
        return real(*args, **options)

    monkeypatch.setattr(diffusers_attention, "joint_attention", spy)
    return calls


def test_more_arguments_of_a_motion_module():
    module, x = motion()
    host = copy.deepcopy(module)
    accelerate(module)
    for more in (dict(encoder_hidden_states=torch.randn(18, T, 32)), dict(cross_attention_kwargs={"scale": None})):
        expected = host(x, num_frames=T, **more)
        exact = copy.deepcopy(host).double()
        more = {name: y.double() if isinstance(y, torch.Tensor) else y for name, y in more.items()}
        exact = exact(x.double(), num_frames=T, **more)
        more = {name: y.float() if isinstance(y, torch.Tensor) else y for name, y in more.items()}
        assert judge(module(x, num_frames=T, **more), exact, expected).ok


def test_a_mask_of_the_caption_of_latte():
    model, given = make("latte"), inputs("latte")
    given["encoder_attention_mask"] = torch.zeros(2 * T, 1, 6)
    given["encoder_attention_mask"][:T, :, 3:] = -10000.0
    exact, expected = exactly(model, given), output(model, given)
    accelerate(model)
    assert judge(output(model, given), exact, expected).ok


def test_temporal_attention_switched_off():
    model, given = make("latte"), inputs("latte")
    given["enable_temporal_attentions"] = False
    exact, expected = exactly(model, given), output(model, given)
    accelerate(model)
    assert judge(output(model, given), exact, expected).ok


def test_small_calls_are_the_hosts(monkeypatch, taken):
    model, given = make("cogvideox"), inputs("cogvideox")
    plain = output(model, given)
    accelerate(model)
    monkeypatch.setattr(pytorch, "_LEAST_KEYS", 2000)
    assert torch.equal(output(model, given), plain) and not taken
    monkeypatch.setattr(pytorch, "_LEAST_KEYS", 0)
    output(model, given)
    assert len(taken) == 2


@pytest.mark.parametrize("family", ["unet3d", "wan"])
def test_a_matrix_unit_of_the_processor(family, monkeypatch, taken):
    """In bfloat16 PyTorch's attention is faster there; along time ours is."""
    monkeypatch.setattr(diffusers_attention, "AMX", True)
    model, given = make(family).to(torch.bfloat16), inputs(family, torch.bfloat16)
    report = accelerate(model)
    assert any("matrix unit" in entry.gain for entry in report.replaced)
    output(model, given)
    assert not taken
    monkeypatch.setattr(diffusers_attention, "AMX", False)
    output(model, given)
    assert taken


def test_backends_of_the_user(taken):
    from diffusers.models.attention_dispatch import attention_backend

    model, given = make("wan"), inputs("wan")
    plain = output(model, given)
    accelerate(model)
    with attention_backend("_native_math"):
        output(model, given)
    assert not taken
    ours = output(model, given)
    assert len(taken) == 4 and not torch.equal(ours, plain)
    model.set_attention_backend("_native_math")
    output(model, given)
    assert len(taken) == 4
    model.set_attention_backend("native")
    assert torch.equal(output(model, given), ours) and len(taken) == 8


MASKS = {
    "none": (lambda: None, True),
    "keys": (lambda: torch.rand(2, 1, 1, 7) > 0.3, True),
    "keys of all": (lambda: torch.rand(1, 1, 1, 7) > 0.3, True),
    "pairs": (lambda: torch.rand(2, 1, 5, 7) > 0.1, False),
    "heads": (lambda: torch.rand(2, 3, 5, 7) > 0.1, False),
    "bias": (lambda: torch.randn(2, 1, 1, 7), False),
}


@pytest.mark.parametrize("mask, is_ours", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("function", ["dispatch", "scaled_dot_product_attention"])
def test_masks(function, mask, is_ours, taken):
    """Both of what processors call, N_q other than N_k."""
    q, k, v, mask = torch.randn(2, 5, 3, 16), *torch.randn(2, 2, 7, 3, 16), mask()
    if mask is not None and mask.dtype == torch.bool:
        mask[..., 0] = True

    def host(*qkv):
        bias = mask.to(qkv[0].dtype) if mask is not None and mask.is_floating_point() else mask
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv), bias).transpose(1, 2)

    if function == "dispatch":
        found = diffusers_attention.dispatch(q, k, v, attn_mask=mask)
    else:
        heads = (x.transpose(1, 2) for x in (q, k, v))
        found = diffusers_attention.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2)
    assert judge(found, host(q.double(), k.double(), v.double()), host(q, k, v)).ok
    assert len(taken) == is_ours


@pytest.mark.parametrize("options", [dict(is_causal=True), dict(enable_gqa=True)])
def test_options_of_the_host(options, taken):
    q, k, v = torch.randn(3, 2, 7, 4, 16)
    keys = (k[:, :, :2], v[:, :, :2]) if "enable_gqa" in options else (k, v)
    heads = [x.transpose(1, 2) for x in (q, *keys)]
    expected = F.scaled_dot_product_attention(*heads, **options)
    assert torch.equal(diffusers_attention.scaled_dot_product_attention(*heads, **options), expected)
    assert torch.equal(diffusers_attention.dispatch(q, *keys, **options), expected.transpose(1, 2)) and not taken


def test_adapted_latents_of_another_length():
    """More frames than a motion module has positions for are the host's error, word for word."""
    module, x = motion(num_positional_embeddings=4)
    messages = []
    for _ in range(2):
        with pytest.raises(RuntimeError) as error:
            module(x, num_frames=T)
        messages.append(str(error.value))
        accelerate(module)
    assert messages[0] == messages[1]


@pytest.mark.full
def test_training_with_a_processor_of_the_user_in_between():
    """The host's blocks in the middle of ours: gradients, too."""
    exact = exact_of("animatediff", torch.float32)
    model, given = make("animatediff"), inputs("animatediff")
    eager = results(model, given)
    model.mid_block.motion_modules[0].transformer_blocks[0].attn1.set_processor(
        diffusers.models.attention_processor.AttnProcessor()
    )
    assert "mid_block.motion_modules.0" in left(accelerate(model))
    hold(results(model, given), exact, eager)
