"""What transformers' own model tests ask of every model, here of each family as it comes and accelerated: same passes.

transformers ships no tests of its models; these are the common ones again: the signature of forward, tuples as outputs,
hidden states, attentions, embeddings that a caller gets and sets, saving and loading in another dtype, a training step
that fits a batch, gradient checkpointing, one clip alone as in its batch, and evaluation that repeats itself.
Source: transformers 5.23, tests/test_modeling_common.py and test_training_mixin.py, by what they check.
"""

from __future__ import annotations

import inspect

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers_models import FAMILIES, clip, make  # noqa: E402

from vivit_kernels.accelerate import accelerate  # noqa: E402
from vivit_kernels.numerics import judge  # noqa: E402

pytestmark = [
    pytest.mark.parametrize("family", FAMILIES),
    pytest.mark.parametrize("accelerated", [False, True], ids=["stock", "accelerated"]),
]


def made(family, accelerated, attention=None, **changes):
    model = make(family, attention, **changes)
    assert not accelerated or accelerate(model, only="transformers").replaced
    return model


def test_forward_signature(family, accelerated):
    model = made(family, accelerated)
    assert next(iter(inspect.signature(model.forward).parameters)).startswith("pixel_values")


def test_outputs_as_a_tuple(family, accelerated):
    model, pixels = made(family, accelerated), clip()
    with torch.no_grad():
        named = model(pixels, output_hidden_states=True)
        plain = model(pixels, output_hidden_states=True, return_dict=False)
    assert torch.equal(plain[0], named.logits) and len(plain) == len(named.to_tuple())


def test_hidden_states(family, accelerated):
    model, pixels = made(family, accelerated), clip()
    states = model(pixels, output_hidden_states=True).hidden_states
    assert len(states) >= 3  # of two layers, and their input
    assert all(state.shape[-1] == 64 and state.isfinite().all() for state in states)
    assert len({state.shape for state in states}) <= 2  # VideoPrism's are of frames, then of positions


def test_attentions(family, accelerated):
    attention = None if family == "timesformer" else "eager"
    model, pixels = made(family, accelerated, attention), clip()
    attentions = model(pixels, output_attentions=True).attentions
    assert len(attentions) >= 2
    for one in attentions:
        assert one.dim() >= 4 and judge(one.sum(-1), torch.ones(one.shape[:-1]).double(), one.sum(-1)).ok


def test_saved_and_loaded_in_another_dtype(family, accelerated, tmp_path):
    model, pixels = made(family, accelerated), clip()
    model.save_pretrained(tmp_path)
    key = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    loaded = type(model).from_pretrained(tmp_path, **{key: torch.bfloat16}).eval()
    if accelerated:
        accelerate(loaded, only="transformers")
    floating = [p.dtype for p in loaded.parameters()]
    assert set(floating) == {torch.bfloat16} and list(loaded.state_dict()) == list(model.state_dict())
    assert loaded(pixels.bfloat16()).logits.dtype == torch.bfloat16


def test_training_fits_a_batch(family, accelerated):
    torch.manual_seed(0)
    model, pixels, labels = made(family, accelerated).train(), clip(), torch.tensor([1, 3])
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(pixels, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(p.grad is not None for name, p in model.named_parameters() if "predictor" not in name)


def test_gradient_checkpointing(family, accelerated):
    model, pixels = made(family, accelerated), clip()
    model.gradient_checkpointing_enable()
    model.train()
    model(pixels, labels=torch.tensor([1, 3])).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "predictor" not in name)


def test_evaluation_repeats_itself_and_a_clip_alone_is_as_in_its_batch(family, accelerated):
    model, pixels = made(family, accelerated), clip()
    exact = make(family).double()
    with torch.no_grad():
        both, again, alone = model(pixels).logits, model(pixels).logits, model(pixels[:1]).logits
        assert torch.equal(both, again)
        truth = exact(pixels[:1].double()).logits
    assert judge(alone, truth, both[:1]).ok
