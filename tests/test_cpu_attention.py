"""Backend `cpu` of both attention ops: parity grids on every instruction set, and what only a kernel gets wrong."""

import pytest
import test_factorized_attention as factorized
import test_joint_attention as joint
import torch
from parity_grid import grid

from vivit_kernels import _native, factorized_attention, joint_attention, temporal_attention
from vivit_kernels._attention import cpu_grid

pytestmark = [
    pytest.mark.skipif(not _native.AVAILABLE, reason=f"the native library is not here: {_native.WHY}"),
    pytest.mark.usefixtures("poisoned_scratch"),
]
DTYPES = [torch.bfloat16, torch.float32, torch.float16]
SIZES = [16, 24, 32, 40, 64, 72, 80, 88, 96, 104, 128, 136, 160]  # of heads; vectors have 4, 8 or 16 lanes
# Lengths around vectors (16), blocks of queries (64) and of keys (128), and what users have.
GRIDS = [
    (1, 1),
    (2, 3),
    (7, 2),
    (8, 5),
    (13, 2),
    (15, 1),
    (16, 4),
    (17, 2),
    (25, 3),
    (49, 1),
    (63, 1),
    (64, 2),
    (65, 1),
]
GRIDS += [(1, 16), (2, 49), (1, 127), (1, 129), (2, 144), (1, 196), (1, 197), (1, 257)]
FACTORIZED = {name: axis for name, axis in factorized.AXES.items() if name not in "TS"} | {
    "dtype": DTYPES,
    "D": SIZES,
    "grid": GRIDS,
    "heads": [(2, 2), (2, 0), (2, 1), (3, 1)],
}
JOINT = joint.AXES | {"dtype": DTYPES, "D": SIZES, "N": [1, 2, 17, 63, 64, 65, 130], "N_k": ["same", 1, 33, 129, 600]}
CROSSES = [["dtype", "grid"], ["dtype", "D"], ["dtype", "mask", "dropout_p", "extra", "heads"]]
JOINT_CROSSES = [["dtype", "N", "N_k"], ["dtype", "N_k", "mask", "dropout_p", "extra"]]


@pytest.mark.parametrize("case", grid(FACTORIZED, CROSSES))
def test_factorized_parity(case, isa):
    (T, S), clips = case["grid"], 1 if case["mask"] != "a clip has none" else 2
    factorized.check_case(case | {"T": T, "S": S}, torch.device("cpu"), "cpu", clips)


@pytest.mark.parametrize("case", grid(JOINT, JOINT_CROSSES))
def test_joint_parity(case, isa):
    # of a few rows eager PyTorch may hit all by luck, and a budget of three times its error is then none
    joint.check_case(case, torch.device("cpu"), "cpu", max(2, 16 // case["N"]))


def step(qkv, do, threads=None, **options):
    """o and the gradient of qkv, with that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        x = qkv.detach().requires_grad_()
        o = factorized_attention(x, backend="cpu", **options)
        return o, torch.autograd.grad(o, x, do)[0]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("scale", [0.0, -0.2])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("N", [70, 530])
def test_scores_may_fall_with_their_products(scale, softcap, N, isa, monkeypatch):
    monkeypatch.setattr(
        joint, "make_options", lambda *_: {"scale": scale, "softcap": softcap, "dropout_p": 0.0, "seed": None}
    )
    case = {"N": N, "N_k": "same", "D": 40, "inputs": "normal", "layout": "packed", "dtype": torch.float32}
    joint.check_case(case, torch.device("cpu"), "cpu")


@pytest.mark.parametrize("T, S, temporal_heads", [(16, 5, 2), (2, 197, 0), (8, 65, 1), (1, 530, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_with_any_number_of_threads(T, S, temporal_heads, dtype, isa):
    qkv, do = torch.randn(2, T, S, 3, 2, 40, dtype=dtype), torch.randn(2, T, S, 2, 40, dtype=dtype)
    options = {"temporal_heads": temporal_heads, "dropout_p": 0.2, "seed": torch.tensor([1, 2])}
    first = step(qkv, do, 1, **options)
    for threads in (1, 2, 5):
        assert all(map(torch.equal, first, step(qkv, do, threads, **options)))


def test_bounds_are_those_of_the_library():
    assert torch.ops.vivit_kernels_native.resident_keys() == cpu_grid.RESIDENT_KEYS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("S", [cpu_grid.RESIDENT_KEYS, cpu_grid.RESIDENT_KEYS + 1])
def test_what_a_backward_keeps(S, dtype):
    """The projection alone in float32 and up to RESIDENT_KEYS; beyond also o and two numbers a query and head."""
    saved = []
    qkv = torch.randn(1, 2, S, 3, 2, 16, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        factorized_attention(qkv, temporal_heads=1, backend="cpu")
    streams = S > cpu_grid.RESIDENT_KEYS and dtype != torch.float32
    sizes = sorted(x.numel() for x in saved)
    assert sizes == sorted([qkv.numel()] + [qkv.numel() // 3, 2 * 2 * 2 * S] * streams)


@pytest.mark.parametrize("shape", ["noncontiguous", "expanded"])
def test_gradient_of_the_output_may_lie_anyhow(shape):
    qkv, do = torch.randn(1, 8, 3, 3, 2, 16), torch.randn(1, 8, 3, 2, 16)
    do = do.transpose(3, 4).contiguous().transpose(3, 4) if shape == "noncontiguous" else do[..., :1].expand(do.shape)
    assert torch.equal(step(qkv, do, temporal_heads=1)[1], step(qkv, do.contiguous(), temporal_heads=1)[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_start_at_any_element(dtype, isa):
    """Rows that no 32-bit word starts with are gathered first."""
    wide = torch.full((1, 5, 3, 3, 2, 27), float("nan"), dtype=dtype)
    qkv = wide[..., 1:25].copy_(torch.randn(1, 5, 3, 3, 2, 24))
    apart, whole = (factorized_attention(x, temporal_heads=1, backend="cpu") for x in (qkv, qkv.contiguous()))
    assert torch.equal(apart, whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_conversions_are_pytorchs(dtype, isa):
    """With one key o is v: large, small, denormal and infinite values come back bit for bit."""
    values = torch.randn(4096) * torch.logspace(-9, 5, 4096)
    v = torch.cat([values, torch.tensor([0.0, -0.0, float("inf"), -float("inf")] * 4)]).to(dtype).view(-1, 1, 1, 16)
    q = torch.zeros_like(v)
    o = joint_attention(q, q, v, backend="cpu")
    assert torch.equal(o, v)


def test_no_clips():
    qkv = torch.randn(0, 4, 5, 3, 2, 16, requires_grad=True)
    o = factorized_attention(qkv, temporal_heads=1, backend="cpu")
    o.sum().backward()
    assert o.shape == (0, 4, 5, 2, 16) and qkv.grad is not None and qkv.grad.shape == qkv.shape


@pytest.mark.parametrize(
    "function, shape", [(factorized_attention, (1, 4, 3, 3, 2, 16)), (joint_attention, (1, 530, 3, 2, 16))]
)
def test_opcheck(function, shape):
    qkv = torch.randn(*shape).requires_grad_()
    op = getattr(torch.ops.vivit_kernels, f"{function.__name__}_fwd")
    arguments = (qkv, None, None, None, None, None, None, 1 if len(shape) == 6 else 0, 0.25, 0.0, 0.0, "cpu")
    torch.library.opcheck(op, arguments)


def test_compiles_without_a_graph_break():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: factorized_attention(x, temporal_heads=1), fullgraph=True, backend="aot_eager")
    for B in (1, 2, 3):
        qkv = torch.randn(B, 4, 5, 3, 2, 16)
        assert torch.equal(compiled(qkv), factorized_attention(qkv, temporal_heads=1, backend="cpu"))


def test_autocast_casts_as_for_pytorchs_attention():
    qkv = torch.randn(1, 8, 3, 3, 2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        o = factorized_attention(qkv, temporal_heads=1, backend="cpu")
    assert o.dtype == torch.bfloat16
    assert torch.equal(o, factorized_attention(qkv.bfloat16(), temporal_heads=1, backend="cpu"))


def test_checkpointing_drops_the_same_pairs_again():
    qkv, do = torch.randn(1, 8, 5, 3, 2, 16).requires_grad_(), torch.randn(1, 8, 5, 2, 16)

    def block(x):
        return factorized_attention(x, temporal_heads=1, dropout_p=0.3, backend="cpu")

    torch.manual_seed(3)
    plain = torch.autograd.grad(block(qkv), qkv, do)[0]
    torch.manual_seed(3)
    again = torch.autograd.grad(torch.utils.checkpoint.checkpoint(block, qkv, use_reentrant=False), qkv, do)[0]
    assert torch.equal(plain, again)


def test_second_derivatives_are_refused():
    qkv = torch.randn(1, 8, 3, 3, 2, 16).requires_grad_()
    (gradient,) = torch.autograd.grad(factorized_attention(qkv, temporal_heads=1).sum(), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        gradient.sum().backward()


def test_more_sequences_than_a_grid_dimension():
    q, k, v = (torch.randn(1, 2, 33_000, 2, 16) for _ in range(3))
    o = temporal_attention(q, k, v, backend="cpu")
    few = temporal_attention(*(x[:, :, -7:] for x in (q, k, v)), backend="cpu")
    assert torch.equal(o[:, :, -7:], few)


@pytest.mark.parametrize("wrong", ["dtype", "shape", "stats"])
def test_the_library_checks_what_it_is_given(wrong):
    q = torch.randn(1, 1, 600, 2, 16).bfloat16()
    o = torch.empty(q.shape, dtype=torch.float64 if wrong == "dtype" else q.dtype)
    if wrong == "shape":
        o = o[:, :, :-1]
    options = None, None, None, None, 0, 0.25, 0.0, 0.0, -1
    with pytest.raises(RuntimeError, match="vivit_kernels_native"):
        if wrong == "stats":
            torch.ops.vivit_kernels_native.attention_bwd(q, q, q, q, None, None, o, o, o, *options)
        torch.ops.vivit_kernels_native.attention_fwd(q, q, q, o, None, *options)
