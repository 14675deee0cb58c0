"""vivit/plan.py: what a step is said to need against what PyTorch allocates, and the largest that fits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from bench.footprint import measure
from vivit import ViViT, ViViTConfig, footprint, memory, plan, recipe
from vivit.__main__ import main
from vivit.footprint import Step
from vivit.masters import Masters
from vivit.optimizers import make_optimizer

CLIPS = 4
# Share by which a predicted peak may be off: a block's backward is known to the tensor, not to the moment, and which
# tensors live at a time depends on the processor's route for products (up to 17 % seen).
FOUND = 0.2
CONFIG = ViViTConfig(
    frames=16, height=64, width=64, tubelet=(2, 8, 8), attention="factorized_dot_product", embedding=64, depth=6,
    heads=4, mlp=256, classes=5,
)  # fmt: skip


@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("level", [*memory.LEVELS, "offload"])
def test_the_peak_of_a_step(level, precision):
    """With offload the host's part is beside the device's: here they are the same memory."""
    offload, level = level == "offload", "smallest" if level == "offload" else level
    model = ViViT(CONFIG, memory=level, offload=offload)
    chosen = recipe.OptimizerConfig(parameters="bfloat16" if precision == "bfloat16" else "float32")
    optimizer = make_optimizer(model, chosen, wide=Masters(model) if precision == "bfloat16" else None)
    video = torch.zeros(CLIPS, 3, 16, 64, 64, dtype=torch.uint8)

    def step() -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            logits = model(video)
        F.cross_entropy(logits.float(), torch.zeros(CLIPS, dtype=torch.long)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return []

    step()  # makes the momentum
    found = measure(step, torch.device("cpu"))["peak"]
    taken = Step(level, CLIPS, precision, offload=offload)
    need = plan.need(CONFIG, taken, chosen)
    predicted = need.peak - need.parameters - need.optimizer - video.numel()  # what was there before is not counted
    predicted += footprint.on_host(CONFIG, taken)
    assert abs(predicted / found - 1) < FOUND, (predicted, found)


def test_parameters_and_optimiser():
    need = plan.need(CONFIG, Step(), recipe.OptimizerConfig("adamw"))
    bytes_ = 4 * sum(p.numel() for p in ViViT(CONFIG).parameters())
    assert need.parameters == need.gradients == bytes_ and need.optimizer == 2 * bytes_
    assert plan.need(CONFIG, Step(), recipe.OptimizerConfig(momentum=0.0)).optimizer == 0


def test_the_largest_fits_and_one_more_does_not():
    run = recipe.load("kinetics400_B16x2_factorized_encoder")
    room = 24 * 10**9
    found = list(plan.fits(run, room))
    assert [fit.memory for fit in found] == [*memory.LEVELS, "smallest"] and found[-1].offload

    def step(fit: plan.Fit, clips: int) -> Step:
        return Step(fit.memory, clips, "autocast", "cuda", fit.offload)

    for fit in found:
        for clips, fits in ((fit.batch, True), (fit.batch + 1, False)):
            assert (plan.need(run.model, step(fit, clips)).peak <= room) == fits
        for frames, fits in ((fit.frames, True), (fit.frames + 2, False)):
            longer = dataclasses.replace(run.model, frames=frames)
            assert (plan.need(longer, step(fit, 1)).peak <= room) == fits
        for rows, fits in ((fit.rows, True), (fit.rows + 16, False)):
            wider = dataclasses.replace(run.model, height=rows, width=rows)
            assert (plan.need(wider, step(fit, 1)).peak <= room) == fits
    assert [fit.batch for fit in found] == sorted({fit.batch for fit in found})  # each level takes more


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 1000])
def test_largest(limit):
    assert plan.largest(lambda n: n <= limit) == limit


def test_accumulation_is_even():
    need = plan.need(CONFIG, Step())
    assert plan.Fit("fast", 20, 1, 1, need).accumulation(64) == (4, 16)
    assert plan.Fit("fast", 20, 1, 1, need).accumulation(20) == (1, 20)
    assert plan.Fit("fast", 64, 1, 1, need).accumulation(20) == (1, 20)


@pytest.mark.parametrize(
    "text, size",
    [("24GB", 24 * 10**9), ("24 GiB", 24 * 2**30), ("1.5gb", 1_500_000_000), ("80", 80), ("512MiB", 2**29)],
)
def test_sizes(text, size):
    assert plan.size_of(text) == size


@pytest.mark.parametrize("text", ["", "GB", "24XB", "-1GB", "1.2.3GB", ".", "24 G B"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="give a size such as 24GB"):
        plan.size_of(text)


def test_the_command(capsys):
    kinetics = ["plan", "kinetics400_B16x2_factorized_encoder", "--gpu-memory"]
    assert main([*kinetics, "24GB"]) == 0
    assert "fits at once with memory = 'smallest'" in capsys.readouterr().out
    assert main([*kinetics, "8GB"]) == 0
    assert "memory = 'smallest' and accumulate = " in capsys.readouterr().out
    assert main([*kinetics, "2GB"]) == 0
    assert "not even one clip fits" in capsys.readouterr().out
    assert main([*kinetics, "1GB"]) == 2
    assert "leaves nothing beside --reserve 1GB" in capsys.readouterr().err
