"""Backend `cuda` of factorized_attention on a GPU: what PyTorch sees of it, beside what it computes."""

from __future__ import annotations

import pytest
import torch
from allocations import allocations
from test_cuda_binding import in_library, ops, options

from vivit_kernels import factorized_attention, temporal_attention
from vivit_kernels._attention import cuda_grid
from vivit_kernels.factorized_attention import cuda_kernels
from vivit_kernels.numerics import judge

pytestmark = pytest.mark.gpu
# packed along time; resident within frames; both at once
CASES = [(16, 5, 2), (8, 7, 2), (2, 67, 0), (16, 40, 1), (70, 3, 2)]


def on_gpu(B=2, T=16, S=5, H=2, D=32, dtype=torch.bfloat16):
    qkv = torch.randn(B, T, S, 3, H, D, dtype=dtype, device="cuda").requires_grad_()
    return qkv, torch.randn(B, T, S, H, D, dtype=dtype, device="cuda")


def step(qkv, do, temporal_heads, **options):
    o = factorized_attention(qkv, temporal_heads=temporal_heads, backend="cuda", **options)
    return o, torch.autograd.grad(o, qkv, do)[0]


@in_library
@pytest.mark.parametrize("T, S, temporal_heads", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_allocated(T, S, temporal_heads, dtype):
    """o and one packed gradient; lse, four bytes a query and head, where the backward reads it. Nothing else."""
    qkv, do = on_gpu(T=T, S=S, dtype=dtype)
    _, found = allocations(lambda: step(qkv, do, temporal_heads))
    kept = cuda_grid.keeps_output(T, S, 2, temporal_heads, dtype.itemsize)
    expected = [(do.shape, do.dtype)] + [((2, 2, T * S), torch.float32)] * kept + [(qkv.shape, qkv.dtype)]
    assert [(x.shape, x.dtype) for x in found] == expected


@in_library
def test_nothing_is_waited_for_and_a_graph_repeats_it():
    """A synchronisation, a default stream or an allocation of CUDA's own would break the capture."""
    for T, S, heads in CASES:
        qkv, do = on_gpu(T=T, S=S)
        expected = step(qkv, do, heads)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step(qkv, do, heads)
        for x in found:
            x.detach().zero_()
        graph.replay()
        assert all(map(torch.equal, found, expected))


@in_library
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="another GPU than the current one: there are not two")
def test_another_device_than_the_current_one():
    qkv, do = on_gpu()
    expected = step(qkv, do, 1)
    other = [x.detach().to("cuda:1") for x in (qkv, do)]
    found = step(other[0].requires_grad_(), other[1], 1)
    assert torch.cuda.current_device() == 0 and all(x.device.index == 1 for x in found)
    assert all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(found, expected, strict=True))


@in_library
@pytest.mark.parametrize("T, S, temporal_heads", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_same_bits_every_time(T, S, temporal_heads, dtype):
    qkv, do = on_gpu(T=T, S=S, dtype=dtype)
    seed = torch.tensor([3, 4], device="cuda")
    runs = [step(qkv, do, temporal_heads, dropout_p=0.3, seed=seed) for _ in range(3)]
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(run, runs[0], strict=True))


@in_library
@pytest.mark.parametrize("offset, width", [(1, 48), (0, 36), (8, 48)])
def test_rows_may_start_at_any_element(offset, width):
    for T, S, heads in CASES:
        wide = torch.full((1, T, S, 3, 2, width), float("nan"), dtype=torch.float16, device="cuda")
        apart = wide[..., offset : offset + 32].copy_(torch.randn(1, T, S, 3, 2, 32))
        found = [factorized_attention(x, temporal_heads=heads, backend="cuda") for x in (apart, apart.contiguous())]
        assert torch.equal(*found)


@in_library
@pytest.mark.parametrize("shape", ["noncontiguous", "expanded"])
@pytest.mark.parametrize("T, S, temporal_heads", CASES)
def test_gradient_of_the_output_may_lie_anyhow(T, S, temporal_heads, shape):
    qkv, do = on_gpu(T=T, S=S)
    do = do.transpose(3, 4).contiguous().transpose(3, 4) if shape == "noncontiguous" else do[..., :1].expand(do.shape)
    assert torch.equal(step(qkv, do, temporal_heads)[1], step(qkv, do.contiguous(), temporal_heads)[1])


@in_library
@pytest.mark.parametrize("T, S, temporal_heads", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_kept_for_the_backward(T, S, temporal_heads, dtype):
    saved, (qkv, do) = [], on_gpu(T=T, S=S, dtype=dtype)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        factorized_attention(qkv, temporal_heads=temporal_heads, backend="cuda")
    kept = [do.shape, (2, 2, T * S)] * cuda_grid.keeps_output(T, S, 2, temporal_heads, dtype.itemsize)
    assert [tuple(x.shape) for x in saved] == [tuple(qkv.shape), *map(tuple, kept)]


@in_library
@pytest.mark.parametrize("T, S, temporal_heads", CASES)
def test_the_backward_writes_gradients_alone(T, S, temporal_heads):
    """Packed heads of a call whose others are resident write no output a second time."""
    qkv, do = on_gpu(T=T, S=S)
    q, k, v = qkv.detach().unbind(3)
    _, lse = cuda_kernels.launch_fwd(q, k, v, temporal_heads, options(), True)
    gradients = [torch.empty_like(do) for _ in range(3)]
    anything = torch.full_like(do, 7.0)
    cuda_kernels.launch_bwd(do, q, k, v, anything, lse, *gradients, temporal_heads, options())
    assert bool((anything == 7.0).all()) and all(bool(x.isfinite().all()) for x in gradients)


@in_library
@pytest.mark.parametrize("T, S, temporal_heads", [(16, 5, 1), (7, 3, 2), (3, 16, 0)])
def test_output_again(T, S, temporal_heads):
    """What a packed backward recomputes for the projection's weight gradient is the forward's output."""
    qkv, do = on_gpu(T=T, S=S)
    again, *gradients = torch.empty(4, *do.shape, dtype=do.dtype, device="cuda").unbind()
    arguments = do, *qkv.detach().unbind(3), None, None, *gradients, temporal_heads
    cuda_kernels.launch_bwd(*arguments, options(scale=32**-0.5), o_again=again)
    exact, eager = (
        factorized_attention(x, temporal_heads=temporal_heads, backend="torch") for x in (qkv.double(), qkv)
    )
    verdict = judge(again, exact, eager, row=32)
    assert verdict.ok, str(verdict)
    packed = step(qkv, do, temporal_heads)[1]
    assert all(map(torch.equal, gradients, packed.unbind(3)))


@in_library
@pytest.mark.parametrize("T, S, temporal_heads", [(16, 5, 2), (2, 67, 0), (16, 40, 1)])
def test_opcheck(T, S, temporal_heads):
    qkv, _ = on_gpu(B=1, T=T, S=S, dtype=torch.float16)
    arguments = (qkv, None, None, None, None, None, None, temporal_heads, 0.25, 0.0, 0.0, "cuda")
    torch.library.opcheck(torch.ops.vivit_kernels.factorized_attention_fwd, arguments)


@in_library
@pytest.mark.parametrize("T, S, temporal_heads", [(4, 5, 1), (16, 40, 1)])
def test_compiles_without_a_graph_break(T, S, temporal_heads):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: factorized_attention(x, temporal_heads=temporal_heads, backend="cuda"),
        fullgraph=True,
        backend="aot_eager",
    )
    for B in (1, 2, 3):
        qkv, do = on_gpu(B=B, T=T, S=S)
        o = compiled(qkv)
        gradient = torch.autograd.grad(o, qkv, do)[0]
        assert all(map(torch.equal, (o, gradient), step(qkv, do, temporal_heads)))


@in_library
def test_autocast_casts_as_for_pytorchs_attention():
    qkv = torch.randn(1, 8, 3, 3, 2, 16, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        o = temporal_attention(qkv, backend="cuda")
    assert o.dtype == torch.bfloat16 and torch.equal(o, temporal_attention(qkv.bfloat16(), backend="cuda"))


@in_library
@pytest.mark.parametrize("T, S, temporal_heads", CASES)
def test_checkpointing_runs_the_forward_twice_and_drops_the_same_pairs(T, S, temporal_heads):
    qkv, do = on_gpu(T=T, S=S)

    def block(x):
        return factorized_attention(x, temporal_heads=temporal_heads, dropout_p=0.3, backend="cuda")

    torch.manual_seed(3)
    plain = torch.autograd.grad(block(qkv), qkv, do)[0]
    torch.manual_seed(3)
    again = torch.autograd.grad(torch.utils.checkpoint.checkpoint(block, qkv, use_reentrant=False), qkv, do)[0]
    assert torch.equal(plain, again)


@in_library
def test_no_clips():
    qkv, _ = on_gpu(B=0)
    o = factorized_attention(qkv, temporal_heads=1, backend="cuda")
    o.sum().backward()
    assert o.shape == (0, 16, 5, 2, 32) and qkv.grad is not None and qkv.grad.shape == qkv.shape


@in_library
@pytest.mark.parametrize("wrong", ["device", "dtype", "shape", "rows", "lse", "again"])
def test_the_library_checks_what_it_is_given(wrong):
    q = torch.randn(1, 1, 60, 2, 32, device="cuda").bfloat16()
    o, none = torch.empty_like(q), (None, None, None, None, 0, 0.25, 0.0, 0.0)
    if wrong == "lse":
        with pytest.raises(RuntimeError, match="the backward of sequences longer than 16 tokens needs o and lse"):
            ops.cuda_attention_bwd(q, q, q, q, None, None, o, o, o, *none)
        return
    if wrong == "again":
        lse = torch.empty(1, 2, 60, device="cuda")
        with pytest.raises(RuntimeError, match="longer than 16 tokens does not write o again"):
            ops.cuda_attention_bwd(q, q, q, q, o, lse, o, o, o, *none, o_again=o)
        return
    bad = {
        "device": o.cpu(),
        "dtype": o.float(),
        "shape": o[:, :, :-1],
        "rows": torch.empty(1, 1, 60, 2, 36, device="cuda").bfloat16()[..., :32],
    }[wrong]
    with pytest.raises(RuntimeError, match=r"vivit_kernels_native.cuda_attention: (rows of )?o "):
        ops.cuda_attention_fwd(q, q, q, bad, None, *none)


@in_library
def test_a_launch_that_fails_is_explained_and_forgotten():
    """What a predicate would have refused; the next call starts as if nothing had been."""
    long = torch.zeros(1, 1, 5000, 2, 64, dtype=torch.bfloat16, device="cuda")
    none = (None, None, None, None, None, 0, 0.125, 0.0, 0.0)
    with pytest.raises(RuntimeError) as error:
        ops.cuda_attention_fwd(long, long, long, torch.empty_like(long), *none)
    assert (
        "factorized_attention: the forward of backend 'cuda' did not start for q [1, 1, 5000, 2, 64], bfloat16, "
        "temporal_heads=0: the launch asks for more than this GPU has\n"
        "  -> use backend='triton' or 'torch' for such a call\n"
    ) in str(error.value)
    short, o = long[:, :, :64], torch.full_like(long[:, :, :64], 7.0)
    ops.cuda_attention_fwd(short, short, short, o, *none)
    assert not o.any()
