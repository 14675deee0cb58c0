"""Backend `cuda` around its kernels: what it refuses and says, what the library checks. What PyTorch sees of it on a
GPU is in tests/test_cuda_on_gpu.py, its parity in tests/test_cuda_attention.py."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vivit_kernels import _native, explain, spatial_attention
from vivit_kernels._attention import cuda_grid
from vivit_kernels._dispatch import Call, Refusal
from vivit_kernels.factorized_attention import cuda_kernels, cuda_tiles
from vivit_kernels.factorized_attention.support import SUPPORT

CSRC = Path(__file__).resolve().parent.parent / "csrc"
CALL = Call("factorized_attention", (8, 16, 196, 12, 64), torch.bfloat16, "cuda", True, (), 90, temporal_heads=6)
in_library = pytest.mark.usefixtures("cuda_library")
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
