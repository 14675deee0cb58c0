"""factorized_attention against its reference in float64: output and gradients, over the parity grid."""

import pytest
import torch
from parity_grid import ATTENTION_AXES, cancels, check, gradient_scales, grid, lay_out, make_inputs, make_options

from vivit_kernels import factorized_attention, joint_attention, spatial_attention, temporal_attention
from vivit_kernels._attention.options import check_options
from vivit_kernels.factorized_attention import reference

AXES = ATTENTION_AXES | {
    "T": [1, 2, 7, 8, 16, 17, 25, 49],
    "S": [1, 4, 16, 49, 130],
    "heads": [(2, 2), (2, 0), (4, 2), (3, 1), (4, 4)],  # (H, temporal heads)
}
CROSSES = [["dtype", "heads", "mask", "dropout_p", "extra"], ["dtype", "T", "S"], ["dtype", "D", "layout"]]


def check_case(case, device, backend, B=2):
    """One combination of the grid, against the reference."""
    (H, temporal_heads), T, S, D = case["heads"], case["T"], case["S"], case["D"]
    q, k, v = make_inputs(case["inputs"], (B, T, S, H, D), (B, T, S, H, D), device)
    options = make_options(case, (B, T, S), (B, T, S), device)
    do = torch.randn(B, T, S, H, D, device=device)
    tensors = lay_out(q, k, v, case["layout"])

    def defined(q, k=None, v=None):
        q, k, v = q.unbind(3) if k is None or v is None else (q, k, v)
        given = {"scale": None, "key_mask": None, "rotary": None, "softcap": None} | options
        return reference.factorized_attention(
            q, k, v, temporal_heads, check_options("factorized_attention", q, T * S, (T, S), **given)
        )

    hard = cancels(case, min(T, S))
    scales = gradient_scales(q, k, v, do, options.get("scale", D**-0.5)) if hard else None
    check(
        lambda *x: factorized_attention(*x, temporal_heads=temporal_heads, backend=backend, **options),
        defined, tensors, do, case["dtype"], ["o", "dq", "dk", "dv"], scales,
    )  # fmt: skip


@pytest.mark.parametrize("case", grid(AXES, CROSSES))
def test_parity(case, device):
    check_case(case, device, "torch")


def test_named_ends():
    qkv = torch.randn(2, 4, 6, 3, 2, 16)
    assert torch.equal(spatial_attention(qkv), factorized_attention(qkv, temporal_heads=0))
    assert torch.equal(temporal_attention(qkv), factorized_attention(qkv, temporal_heads=2))
    q, k, v = qkv.unbind(3)
    assert torch.equal(temporal_attention(q, k, v), temporal_attention(qkv))


def test_ends_are_joint_attention_of_each_frame_and_each_position():
    """Independent of the reference: a loop of joint attention, one sequence at a time."""
    qkv = torch.randn(2, 3, 5, 3, 2, 16, dtype=torch.float64)
    frames = torch.stack([joint_attention(qkv[:, t]) for t in range(3)], 1)
    torch.testing.assert_close(spatial_attention(qkv), frames)
    positions = torch.stack([joint_attention(qkv[:, :, s]) for s in range(5)], 2)
    torch.testing.assert_close(temporal_attention(qkv), positions)


def test_it_is_joint_attention_restricted_to_row_and_column():
    """With the grid's rows and columns as masks, scaled_dot_product_attention gives the same."""
    T, S, H = 4, 5, 4
    q, k, v = (torch.randn(2, T, S, H, 8, dtype=torch.float64) for _ in range(3))
    t, s = torch.arange(T * S) // S, torch.arange(T * S) % S
    same_position, same_frame = s[:, None] == s, t[:, None] == t
    mask = torch.stack([same_position] * 1 + [same_frame] * 3)
    flat = [x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)]
    theirs = torch.nn.functional.scaled_dot_product_attention(*flat, attn_mask=mask).transpose(1, 2).view(2, T, S, H, 8)
    torch.testing.assert_close(factorized_attention(q, k, v, temporal_heads=1), theirs)


def test_nothing_but_the_projection_is_kept():
    saved = []
    qkv = torch.randn(1, 16, 49, 3, 2, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        factorized_attention(qkv, temporal_heads=1)
    assert [x.data_ptr() for x in saved] == [qkv.data_ptr()]


def test_more_sequences_than_a_grid_dimension():
    """65,536 sequences x heads stop peers that put them in gridDim.y; here they are ordinary."""
    q, k, v = (torch.randn(1, 2, 33_000, 2, 8) for _ in range(3))
    o = temporal_attention(q, k, v)
    torch.testing.assert_close(o[:, :, -7:], temporal_attention(q[:, :, -7:], k[:, :, -7:], v[:, :, -7:]))
