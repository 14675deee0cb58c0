"""Backend `cuda` around its kernels: what it refuses and says, what the library checks; on a GPU, what PyTorch sees of
it. Its parity is in tests/test_cuda_attention.py."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from allocations import allocations

from vivit_kernels import _native, explain, factorized_attention, spatial_attention, temporal_attention
from vivit_kernels._attention import cuda_grid
from vivit_kernels._dispatch import Call, Refusal
from vivit_kernels.factorized_attention import cuda_kernels, cuda_tiles
from vivit_kernels.factorized_attention.support import SUPPORT
from vivit_kernels.numerics import judge

CSRC = Path(__file__).resolve().parent.parent / "csrc"
CALL = Call("factorized_attention", (8, 16, 196, 12, 64), torch.bfloat16, "cuda", True, (), 90, temporal_heads=6)
in_library = pytest.mark.usefixtures("cuda_library")
gpu = pytest.mark.gpu
PACKED, RESIDENT, TOO_LONG = range(3)  # Regime of csrc/cuda/attention.h
ops = torch.ops.vivit_kernels_native


# ---- what it can run ----


def refused(**changes) -> list[Refusal]:
    return SUPPORT["cuda"](replace(CALL, **changes))


def shaped(T: int, S: int, D: int = 64) -> tuple:
    return (1, T, S, 2, D)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": torch.float16},
        {"dtype": torch.float32},
        {"dtype": torch.float32, "arch": 80, "uses": ("key_mask", "dropout", "rotary", "softcap")},
        {"arch": 80},
        {"arch": 100},
        {"uses": ("key_mask", "dropout", "rotary", "softcap")},
        {"shape": shaped(1, 1), "temporal_heads": 2},
        {"shape": shaped(16, 3000), "temporal_heads": 2},
        {"shape": shaped(3000, 16), "temporal_heads": 0},
        *({"shape": shaped(16, 16, D)} for D in range(16, 161, 8)),
    ],
)
def test_what_it_runs(changes, with_kernels):
    assert refused(**{"temporal_heads": 1} | changes) == []


@pytest.mark.parametrize(
    "changes, reason, remedy",
    [
        ({"device": "cpu", "arch": 0}, "the tensors are on cpu", "move them to a CUDA device"),
        ({"arch": 75}, "this GPU is sm_75", "use one of sm_80 or later, or backend='torch'"),
        ({"dtype": torch.float64}, "float64 is not one of float16, bfloat16, float32", "cast, or use backend='torch'"),
        (
            {"shape": shaped(16, 16, 8)},
            "head size 8 is not one of 16, 24, ..., 160",
            "use backend='torch', or pad the heads",
        ),
        (
            {"shape": shaped(16, 1000)},
            "S=1000 tokens take {taken} KiB of shared memory in the backward at head size 64, a block on sm_90 has 227",
            "use backend='triton', or leave backend out",
        ),
        (
            {"shape": shaped(1000, 16), "needs_grad": False, "arch": 89},
            "T=1000 tokens take {taken} KiB of shared memory in the forward at head size 64, a block on sm_89 has 99",
            "use backend='triton', or leave backend out",
        ),
        (
            {"shape": shaped(16, 1000), "dtype": torch.float32},
            "S=1000 tokens take {taken} KiB of shared memory in the backward at head size 64, a block on sm_90 has 227",
            "use backend='triton', or leave backend out",
        ),
    ],
)
def test_what_it_refuses_and_says(changes, reason, remedy, with_kernels):
    itemsize = changes.get("dtype", CALL.dtype).itemsize
    taken = -(-cuda_grid.shared_bytes(1000, 64, itemsize, changes.get("needs_grad", True), False) // 1024)
    assert refused(**{"temporal_heads": 1} | changes) == [Refusal(reason.format(taken=taken), remedy)]


def test_a_library_without_its_kernels_comes_first(monkeypatch):
    monkeypatch.setattr(_native, "AVAILABLE", False)
    monkeypatch.setattr(_native, "WHY", "it is not built")
    monkeypatch.setattr(_native, "REMEDY", "make build")
    assert refused() == [Refusal("it is not built", "make build")]
    monkeypatch.setattr(_native, "AVAILABLE", True)
    monkeypatch.setattr(_native, "CUDA", False)
    monkeypatch.setattr(_native, "NO_CUDA", "no nvcc took part")
    (found,) = refused()
    assert found.reason == "no nvcc took part" and "--no-build-isolation on a machine with nvcc" in found.remedy


BOTH = False, True


def test_shared_memory_holds_every_tensor_of_a_sequence_and_more_of_a_longer_one():
    """Of float32, which goes over the rows of two tensors with those of others, these two."""
    for D, itemsize, backward, rotary in itertools.product(range(16, 161, 8), (2, 4), BOTH, BOTH):
        taken = [cuda_grid.shared_bytes(N, D, itemsize, backward, rotary) for N in range(65, 700, 16)]
        assert taken[0] >= 65 * D * itemsize * (2 if itemsize == 4 else 4 if backward else 3)
        assert taken == sorted(taken)
        longer = [cuda_grid.shared_bytes(65, D, itemsize, True, x) for x in (rotary, True)]
        assert taken[0] <= longer[0] <= longer[1]
    # what it is for: frames of ViT-B/16, with a class token
    for arch, itemsize, rotary in itertools.product((80, 90, 100), (2, 4), BOTH):
        assert cuda_grid.fits(arch, 197, 64, itemsize, True, rotary)


def test_whoever_runs_a_sequence_runs_every_shorter_one():
    found, archs = {}, (80, 86, 90, 100)
    for arch, D, *way in itertools.product(archs, range(16, 161, 8), (2, 4), BOTH, BOTH):
        fits = [N for N in range(1, 4097) if cuda_grid.fits(arch, N, D, *way)]
        if gaps := sorted(set(range(1, fits[-1])) - set(fits)):
            found[(arch, D, *way)] = gaps
        assert fits[-1] > cuda_grid.PACKED_TOKENS or arch == 86
    assert found == {}


def test_an_axis_that_no_head_attends_along_may_be_of_any_length(with_kernels):
    long = shaped(16, 5000)
    assert refused(shape=long, temporal_heads=2) == [] and len(refused(shape=long, temporal_heads=1)) == 1
    assert len(refused(shape=shaped(5000, 5000), temporal_heads=1)) == 2


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_code_can_ask_for_it(dynamic, dtype, with_kernels):
    def asked(x):
        call = replace(CALL, dtype=dtype, shape=(x.shape[0], x.shape[1], x.shape[2], 2, 64), temporal_heads=1)
        return x + len(SUPPORT["cuda"](call))

    torch._dynamo.reset()
    compiled = torch.compile(asked, fullgraph=True, dynamic=dynamic, backend="eager")
    for shape, refusals in (((2, 3, 4), 0), ((3, 16, 196), 0), ((3, 16, 1000), 1), ((2, 3000, 2000), 2)):
        assert compiled(torch.zeros(shape)).max() == refusals


@pytest.mark.parametrize("arch, fits", [(90, True), (80, True), (86, False), (89, False), (120, False)])
def test_a_gpu_with_less_shared_memory_takes_the_forward_alone(arch, fits, with_kernels):
    assert (refused(arch=arch) == []) == fits
    assert refused(arch=arch, needs_grad=False) == []


def test_explain_names_the_length(with_kernels, monkeypatch):
    """On a GPU that is not here: the length is judged only where nothing else speaks against the call."""
    q = torch.empty(1, 2, 4000, 2, 64, dtype=torch.bfloat16)
    found = explain(spatial_attention, q, q, q, backend="cuda")
    assert [x.reason for x in found.refusals["cuda"]] == ["the tensors are on cpu"]


@pytest.mark.parametrize(
    "T, S, heads, kept",
    [(64, 64, 1, False), (65, 64, 2, True), (65, 64, 0, False), (64, 65, 2, False), (1, 65, 1, True)],
)
def test_what_a_backward_reads(T, S, heads, kept):
    """float32 recomputes everything."""
    for itemsize, expected in ((2, kept), (4, False)):
        assert cuda_grid.keeps_output(T, S, 2, heads, itemsize) == expected
        if _native.CUDA:
            assert ops.cuda_keeps_output(T, S, 2, heads, itemsize) == expected


# ---- what the library says and checks ----


@in_library
def test_bounds_are_those_of_the_library():
    heads = [16, 24, 40, 64, 72, 80, 88, 96, 104, 128, 136, 160]
    lengths = [1, 16, 17, 32, 33, 48, 49, 64, 65, 80, 81, 128, 196, 197, 257, 416, 417, 433, 577, 593, 1024, 5000]
    for D, N, itemsize, backward, rotary in itertools.product(heads, lengths, (2, 4), BOTH, BOTH):
        if itemsize == 4 or N > cuda_grid.PACKED_TOKENS:  # to the byte
            bytes_ = cuda_grid.shared_bytes(N, D, itemsize, backward, rotary)
            found = [ops.cuda_regime(N, D, itemsize, backward, rotary, limit) for limit in (bytes_ - 1, bytes_)]
            assert found == [TOO_LONG, RESIDENT if N < 4096 else TOO_LONG], (N, D, itemsize, backward, rotary)
        else:
            assert ops.cuda_regime(N, D, itemsize, backward, rotary, 0) == PACKED


def test_constants_are_those_of_the_sources():
    text = (CSRC / "cuda" / "attention.h").read_text()
    found = dict(re.findall(r"constexpr int k(\w+)Tokens = (\d+);", text))
    assert found == {"Packed": str(cuda_grid.PACKED_TOKENS), "Short": str(cuda_grid.SHORT_TOKENS)}
    numbered = dict(re.findall(r"k(\w+) = (\d)", text[text.index("enum class Regime") :].partition("}")[0]))
    assert numbered == {"Packed": str(PACKED), "Resident": str(RESIDENT), "TooLong": str(TOO_LONG)}


@in_library
def test_a_tensor_of_another_device_is_named():
    q = torch.zeros(1, 2, 3, 2, 16, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"vivit_kernels_native.cuda_attention: q is not on a CUDA device"):
        ops.cuda_attention_fwd(q, q, q, q, None, None, None, None, None, 0, 0.25, 0.0, 0.0)
    with pytest.raises(RuntimeError, match=r"vivit_kernels_native.cuda_attention: q is not on a CUDA device"):
        ops.cuda_attention_bwd(q, q, q, q, None, None, q, q, q, None, None, None, None, 0, 0.25, 0.0, 0.0)


# ---- the launchers, with the library's ops replaced ----


@pytest.fixture
def given(monkeypatch):
    """What the launchers give to the library."""
    calls: list[tuple] = []

    class Ops:
        def __getattr__(self, name):
            return lambda *arguments: calls.append((name, *arguments))

    monkeypatch.setattr(torch.ops, "vivit_kernels_native", Ops())
    return calls


def options(**changes):
    from vivit_kernels._attention.options import Options

    return Options(0.25)._replace(**changes)


def test_rows_that_are_not_aligned_are_copied_once_and_others_are_not(given):
    wide = torch.randn(2, 3, 4, 2, 48, dtype=torch.bfloat16)
    qkv = torch.randn(2, 3, 4, 3, 2, 16, dtype=torch.bfloat16)
    off, step, lying = wide[..., 1:17], torch.randn(2, 3, 4, 2, 20).bfloat16()[..., :16], qkv.unbind(3)[0]
    cuda_kernels.launch_fwd(off, step, lying, 1, options())
    _, q, k, v, *_ = given.pop()
    for x, copied in ((q, off), (k, step)):
        assert x.is_contiguous() and torch.equal(x, copied) and x.data_ptr() != copied.data_ptr()
    assert v is lying
    one = wide[:1].transpose(0, 1)[..., 16:32]  # of dimensions of size 1 no stride counts
    cuda_kernels.launch_fwd(
        one.as_strided(one.shape, (*one.stride()[:1], 3, *one.stride()[2:])), lying, lying, 1, options()
    )
    assert given.pop()[1].data_ptr() == one.data_ptr()


def test_the_gradient_of_the_output_is_copied_where_it_lies_otherwise(given):
    q = torch.randn(2, 3, 4, 2, 16, dtype=torch.bfloat16)
    outputs = [torch.empty_like(q) for _ in range(3)]
    for do in (q[..., :1].expand(q.shape), q.transpose(3, 4).contiguous().transpose(3, 4)):
        cuda_kernels.launch_bwd(do, q, q, q, None, None, *outputs, 1, options())
        _, first, *rest = given.pop()
        assert first.is_contiguous() and torch.equal(first, do)
        assert all(x is y for x, y in zip(rest[5:8], outputs, strict=True)) and rest[-1] is None


@pytest.mark.parametrize("T, S, heads", [(64, 4, 1), (64, 65, 2), (65, 64, 0), (65, 4, 1), (64, 65, 1), (65, 65, 2)])
def test_output_is_written_again_where_every_sequence_is_short(given, T, S, heads):
    """And refused, with nothing launched, where a sequence of some head is not."""
    q = torch.randn(1, T, S, 2, 16, dtype=torch.bfloat16)
    again, *gradients = (torch.empty_like(q) for _ in range(4))

    def launch():
        cuda_kernels.launch_bwd(q, q, q, q, q, None, *gradients, heads, options(), o_again=again)

    if cuda_grid.keeps_output(T, S, 2, heads, q.element_size()):
        got = f"factorized_attention: backend 'cuda' got o_again for T={T}, S={S}, temporal_heads={heads} of 2; "
        with pytest.raises(ValueError, match=f"^{re.escape(got)}.* 64 tokens at most\n  -> leave it out"):
            launch()
        assert not given
    else:
        launch()
        assert given.pop()[-1] is again


@pytest.mark.parametrize("T, S, heads, kept", [(64, 4, 2, False), (16, 65, 1, True), (65, 4, 2, True)])
@pytest.mark.parametrize("keep", [True, False])
def test_the_forward_leaves_what_the_backward_reads(given, T, S, heads, kept, keep):
    q = torch.randn(2, T, S, 2, 16, dtype=torch.bfloat16)
    o, lse = cuda_kernels.launch_fwd(q, q, q, heads, options(), keep)
    assert o.shape == q.shape and given.pop()[5] is lse
    if kept and keep:
        assert lse is not None and lse.shape == (2, 2, T * S) and lse.dtype == torch.float32
    else:
        assert lse is None


@pytest.mark.parametrize(
    "dtype, allowed, tf32", [("float32", True, True), ("float32", False, False), ("bfloat16", True, False)]
)
def test_float32_is_taken_by_tf32_where_pytorch_allows_it(given, dtype, allowed, tf32):
    before = torch.backends.cuda.matmul.allow_tf32
    q = torch.empty(1, 3, 4, 2, 16, dtype=getattr(torch, dtype))
    try:
        torch.backends.cuda.matmul.allow_tf32 = allowed
        o, _ = cuda_kernels.launch_fwd(q, q, q, 1, options(), True)
        cuda_kernels.launch_bwd(q, q, q, q, o, None, q, q, q, 1, options())
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    backward, forward = given.pop(), given.pop()
    assert forward[-3:] == (tf32, 0, 0) and backward[-4:] == (tf32, 0, 0, None)


def test_a_forced_tiling_is_that_of_its_direction(given):
    q = torch.empty(1, 3, 4, 2, 16, dtype=torch.bfloat16)
    forward, backward = cuda_tiles.Tiling("forward", packed_warps=3), cuda_tiles.Tiling("backward", stages=2)
    with cuda_tiles.forced(forward), cuda_tiles.forced(backward):
        cuda_kernels.launch_fwd(q, q, q, 1, options())
        cuda_kernels.launch_bwd(q, q, q, q, None, None, q, q, q, 1, options())
    cuda_kernels.launch_fwd(q, q, q, 1, options())
    after, backward, forward = given.pop(), given.pop(), given.pop()
    assert forward[-2:] == (3, 0) and backward[-3:] == (0, 2, None) and after[-2:] == (0, 0)


def test_sizes_of_a_launch_are_those_of_the_sources():
    """Which calls stages can be asked for, as the launcher has it."""
    text = "".join((CSRC / "cuda" / name).read_text() for name in ("attention.cuh", "resident.cuh", "hopper_rows.cuh"))
    found = dict(re.findall(r"constexpr int k(PackedWarps|MostStages|GroupRows) = (\d+)", text))
    sizes = cuda_tiles.PACKED_WARPS, cuda_tiles.MOST_STAGES, cuda_tiles.GROUP_ROWS
    assert tuple(int(found[name]) for name in ("PackedWarps", "MostStages", "GroupRows")) == sizes
    assert "kBlocksAtATime = kSteps <= 4 && kPlain && !kBackward ? 2 : 1;" in text
    assert "kBlocksAtATime<kSteps, kPlain, kBackward> == 1 && (kPlain || !kBackward || kSteps < 8);" in text


def test_no_clips_are_no_launch(given):
    q = torch.empty(0, 3, 4, 2, 16, dtype=torch.bfloat16)
    o, _ = cuda_kernels.launch_fwd(q, q, q, 1, options(), True)
    cuda_kernels.launch_bwd(q, q, q, q, o, None, q, q, q, 1, options())
    assert given == [] and o.shape == q.shape


def test_tables_and_mask_are_given_without_gaps(given):
    q = torch.randn(1, 3, 4, 2, 16, dtype=torch.bfloat16)
    mask, table = torch.ones(1, 24, dtype=torch.bool)[:, ::2], torch.randn(8, 12).t()
    seed = torch.tensor([1, 0, 2])[::2]
    cuda_kernels.launch_fwd(q, q, q, 1, options(mask=mask, cos=table, sin=table, seed=seed, dropout_p=0.5))
    given_now = given.pop()
    assert all(x.is_contiguous() for x in given_now[6:10]) and given_now[10:14] == (1, 0.25, 0.0, 0.5)
    assert torch.equal(given_now[6], mask) and torch.equal(given_now[8], table)


# ---- on a GPU ----

# packed along time; resident within frames; both at once
CASES = [(16, 5, 2), (8, 7, 2), (2, 67, 0), (16, 40, 1), (70, 3, 2)]


def on_gpu(B=2, T=16, S=5, H=2, D=32, dtype=torch.bfloat16):
    qkv = torch.randn(B, T, S, 3, H, D, dtype=dtype, device="cuda").requires_grad_()
    return qkv, torch.randn(B, T, S, H, D, dtype=dtype, device="cuda")


def step(qkv, do, temporal_heads, **options):
    o = factorized_attention(qkv, temporal_heads=temporal_heads, backend="cuda", **options)
    return o, torch.autograd.grad(o, qkv, do)[0]


@gpu
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


@gpu
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


@gpu
@in_library
def test_the_current_stream_is_used():
    """Two streams, the second waits long before it fills the input that the kernel then reads."""
    source, do = on_gpu(T=16, S=40)
    expected = step(source, do, 1)
    qkv, stream = torch.zeros_like(source).requires_grad_(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            qkv.copy_(source)
        found = step(qkv, do, 1)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(map(torch.equal, found, expected))


@gpu
@in_library
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="another GPU than the current one: there are not two")
def test_another_device_than_the_current_one():
    qkv, do = on_gpu()
    expected = step(qkv, do, 1)
    other = [x.detach().to("cuda:1") for x in (qkv, do)]
    found = step(other[0].requires_grad_(), other[1], 1)
    assert torch.cuda.current_device() == 0 and all(x.device.index == 1 for x in found)
    assert all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(found, expected, strict=True))


@gpu
@in_library
@pytest.mark.parametrize("T, S, temporal_heads", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_same_bits_every_time(T, S, temporal_heads, dtype):
    qkv, do = on_gpu(T=T, S=S, dtype=dtype)
    seed = torch.tensor([3, 4], device="cuda")
    runs = [step(qkv, do, temporal_heads, dropout_p=0.3, seed=seed) for _ in range(3)]
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(run, runs[0], strict=True))


@gpu
@in_library
@pytest.mark.parametrize("offset, width", [(1, 48), (0, 36), (8, 48)])
def test_rows_may_start_at_any_element(offset, width):
    for T, S, heads in CASES:
        wide = torch.full((1, T, S, 3, 2, width), float("nan"), dtype=torch.float16, device="cuda")
        apart = wide[..., offset : offset + 32].copy_(torch.randn(1, T, S, 3, 2, 32))
        found = [factorized_attention(x, temporal_heads=heads, backend="cuda") for x in (apart, apart.contiguous())]
        assert torch.equal(*found)


@gpu
@in_library
@pytest.mark.parametrize("shape", ["noncontiguous", "expanded"])
@pytest.mark.parametrize("T, S, temporal_heads", CASES)
def test_gradient_of_the_output_may_lie_anyhow(T, S, temporal_heads, shape):
    qkv, do = on_gpu(T=T, S=S)
    do = do.transpose(3, 4).contiguous().transpose(3, 4) if shape == "noncontiguous" else do[..., :1].expand(do.shape)
    assert torch.equal(step(qkv, do, temporal_heads)[1], step(qkv, do.contiguous(), temporal_heads)[1])


@gpu
@in_library
@pytest.mark.parametrize("T, S, temporal_heads", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_kept_for_the_backward(T, S, temporal_heads, dtype):
    saved, (qkv, do) = [], on_gpu(T=T, S=S, dtype=dtype)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        factorized_attention(qkv, temporal_heads=temporal_heads, backend="cuda")
    kept = [do.shape, (2, 2, T * S)] * cuda_grid.keeps_output(T, S, 2, temporal_heads, dtype.itemsize)
    assert [tuple(x.shape) for x in saved] == [tuple(qkv.shape), *map(tuple, kept)]


@gpu
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


@gpu
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


@gpu
@in_library
@pytest.mark.parametrize("T, S, temporal_heads", [(16, 5, 2), (2, 67, 0), (16, 40, 1)])
def test_opcheck(T, S, temporal_heads):
    qkv, _ = on_gpu(B=1, T=T, S=S, dtype=torch.float16)
    arguments = (qkv, None, None, None, None, None, None, temporal_heads, 0.25, 0.0, 0.0, "cuda")
    torch.library.opcheck(torch.ops.vivit_kernels.factorized_attention_fwd, arguments)


@gpu
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


@gpu
@in_library
def test_autocast_casts_as_for_pytorchs_attention():
    qkv = torch.randn(1, 8, 3, 3, 2, 16, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        o = temporal_attention(qkv, backend="cuda")
    assert o.dtype == torch.bfloat16 and torch.equal(o, temporal_attention(qkv.bfloat16(), backend="cuda"))


@gpu
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


@gpu
@in_library
def test_no_clips():
    qkv, _ = on_gpu(B=0)
    o = factorized_attention(qkv, temporal_heads=1, backend="cuda")
    o.sum().backward()
    assert o.shape == (0, 16, 5, 2, 32) and qkv.grad is not None and qkv.grad.shape == qkv.shape


@gpu
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


@gpu
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
