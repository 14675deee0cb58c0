"""joint_attention against its reference in float64: output and gradients, over the parity grid."""

import pytest
import torch
from parity_grid import ATTENTION_AXES, cancels, check, gradient_scales, grid, lay_out, make_inputs, make_options

from vivit_kernels import joint_attention
from vivit_kernels._attention.options import check_options
from vivit_kernels.joint_attention import reference

AXES = ATTENTION_AXES | {"N": [1, 2, 17, 64, 128, 197], "N_k": ["same", 33, 150]}
CROSSES = [["dtype", "layout", "mask", "dropout_p", "extra"], ["dtype", "N", "N_k", "D"]]


def check_case(case, device, backend, B=2):
    """One combination of the grid, against the reference."""
    H, N, D = 3, case["N"], case["D"]
    N_k = N if case["N_k"] == "same" else case["N_k"]
    q, k, v = make_inputs(case["inputs"], (B, N, H, D), (B, N_k, H, D), device)
    options = make_options(case, (B, N), (B, N_k), device)
    do = torch.randn(B, N, H, D, device=device)
    tensors = lay_out(q, k, v, case["layout"])

    def defined(q, k=None, v=None):
        q, k, v = q.unbind(2) if k is None or v is None else (q, k, v)
        given = {"scale": None, "key_mask": None, "rotary": None, "softcap": None} | options
        return reference.joint_attention(
            q, k, v, check_options("joint_attention", q, N, (N,), key_grid=(N_k,), **given)
        )

    scales = gradient_scales(q, k, v, do, options.get("scale", D**-0.5)) if cancels(case, N_k) else None
    check(
        lambda *x: joint_attention(*x, backend=backend, **options),
        defined,
        tensors,
        do,
        case["dtype"],
        ["o", "dq", "dk", "dv"],
        scales,
    )


@pytest.mark.parametrize("case", grid(AXES, CROSSES))
def test_parity(case, device):
    check_case(case, device, "torch")


def test_the_reference_is_scaled_dot_product_attention():
    q, k, v = (torch.randn(2, 19, 3, 16, dtype=torch.float64) for _ in range(3))
    nothing = {"scale": None, "key_mask": None, "dropout_p": 0.0, "seed": None, "rotary": None, "softcap": None}
    ours = reference.joint_attention(q, k, v, check_options("joint_attention", q, 19, (19,), **nothing))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    torch.testing.assert_close(ours, theirs)


def test_no_square_matrix_is_kept():
    """Bytes saved for backward grow with N, not with N^2: the packed projection alone is kept."""
    saved = []
    qkv = torch.randn(1, 512, 3, 2, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        joint_attention(qkv, dropout_p=0.5)
    assert {x.data_ptr() for x in saved if x.is_floating_point()} == {qkv.data_ptr()}
    assert max(x.numel() for x in saved) == qkv.numel()
