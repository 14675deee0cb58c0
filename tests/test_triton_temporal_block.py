"""temporal_block's Triton kernels against its definition in float64."""

from __future__ import annotations

import pytest
import torch
from parity_grid import check
from test_temporal_block import NAMES, inputs

pytest.importorskip("triton", reason="Triton is not installed")
from vivit import ViViT, ViViTConfig
from vivit_kernels import temporal_block
from vivit_kernels.numerics import judge
from vivit_kernels.temporal_block import tiles, triton_kernels
from vivit_kernels.temporal_block.reference import temporal_block as reference

pytestmark = pytest.mark.interpreted
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# positions that end within a tile, clips that do too, odd lengths, widths that are no multiple of a step, padded heads
SHAPES = [(1, 16, 5, 64, 2), (2, 5, 7, 72, 3)]
MORE = [(1, 16, 9, 160, 4), (3, 32, 1, 64, 4), (1, 19, 2, 80, 5), (1, 2, 40, 128, 2), (2, 8, 3, 192, 3)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [*(SHAPES), *(pytest.param(shape, marks=pytest.mark.full) for shape in MORE)], ids=str
)
def test_against_the_definition(shape, dtype, device):
    *sizes, heads = shape
    tensors, do = inputs(*sizes)
    tensors = [x.to(device) for x in tensors]
    check(
        lambda *x: temporal_block(*x, heads=heads, eps=1e-5, backend="triton"),
        lambda *x: reference(*x, heads, 1e-5),
        tensors, do.to(device), dtype, NAMES,
    )  # fmt: skip


def test_a_position_does_not_see_another(device):
    """Nor another clip: what changes at one position of a tile changes nothing else, in any tile."""
    tensors, _ = inputs(2, 4, 6, 32)
    tensors = [x.to(device).bfloat16() for x in tensors]
    first = temporal_block(*tensors, heads=2, backend="triton")
    with tiles.forced(tiles.Tile("forward", 16, 32, 4, 1)):
        smaller = temporal_block(*tensors, heads=2, backend="triton")
    changed = [tensors[0].clone(), *tensors[1:]]
    changed[0][0, :, 2] += 1
    second = temporal_block(*changed, heads=2, backend="triton")
    same = (first == second).all(-1)
    assert same.sum() == 2 * 4 * 6 - 4 and not same[0, :, 2].any()
    assert (first - smaller).abs().max() <= 2**-7 * first.abs().max()


def test_a_model_that_asks_for_triton_by_name_takes_it(monkeypatch):
    """Model 3: its temporal steps are one kernel each, and the logits those of the three steps, within the budget."""
    monkeypatch.setattr(
        triton_kernels, "launch_fwd", lambda *a, run=triton_kernels.launch_fwd: (ran.append(1), run(*a))[1]
    )
    ran: list[int] = []
    sizes = dict(frames=4, height=8, width=8, tubelet=(2, 8, 4), embedding=32, depth=1, heads=2, mlp=16, classes=40)
    config = ViViTConfig(attention="factorized_self_attention", **sizes)  # pyright: ignore[reportArgumentType]
    model, video = ViViT(config, backend="triton").eval(), torch.randn(2, 3, 4, 8, 8)
    others = {name: ViViT(config, backend=name).eval() for name in ("torch", None)}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        for other in others.values():
            other.load_state_dict(model.state_dict())
        eager = {name: other(video) for name, other in others.items()}
        assert not ran  # on a CPU it is nobody's first choice
        found = model(video)
    assert len(ran) == 1
    verdict = judge(found, others["torch"].double()(video.double()).detach(), eager["torch"])
    assert verdict.ok, verdict
    assert torch.is_grad_enabled() and model(video).requires_grad and len(ran) == 1
