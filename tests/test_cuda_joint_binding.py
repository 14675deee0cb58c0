"""Backend `cuda` of joint_attention around its kernels: what it refuses and says, what the library checks; on a GPU,
what PyTorch sees of it. Its parity on the simulator is in tests/test_cuda_joint.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from allocations import allocations
from parity_grid import grid
from test_cuda_joint import AXES, DTYPES
from test_joint_attention import check_case

from vivit_kernels import _environment, _native, explain, joint_attention
from vivit_kernels._attention.options import Options
from vivit_kernels._dispatch import Call, Refusal
from vivit_kernels.joint_attention import cuda_kernels, op, order
from vivit_kernels.joint_attention.support import SUPPORT

CALL = Call("joint_attention", (8, 3137, 12, 64), torch.bfloat16, "cuda", True, (), 90, keys=3137)
in_library = pytest.mark.usefixtures("cuda_library")
gpu = pytest.mark.gpu
ops = torch.ops.vivit_kernels_native


# ---- what it can run ----


def refused(**changes) -> list[Refusal]:
    return SUPPORT["cuda"](replace(CALL, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": torch.float16, "arch": 80},
        {"arch": 89},
        {"arch": 120},
        {"uses": ("key_mask", "dropout", "rotary", "softcap")},
        {"shape": (1, 1, 1, 64), "keys": 100_000},
        {"shape": (1, 100_000, 1, 64), "keys": 1},
        *({"shape": (1, 50, 2, D)} for D in range(16, 161, 8)),
    ],
)
def test_what_it_runs(changes, with_kernels):
    assert refused(**changes) == []


@pytest.mark.parametrize(
    "changes, reason, remedy",
    [
        ({"device": "cpu", "arch": 0}, "the tensors are on cpu", "move them to a CUDA device"),
        ({"arch": 75}, "this GPU is sm_75", "use one of sm_80 or later, or backend='torch'"),
        ({"dtype": torch.float64}, "float64 is not one of float16, bfloat16, float32", "cast, or use backend='torch'"),
        (
            {"dtype": torch.float32},
            "float32: its products are those of tensor cores, of 16 bits",
            "use backend='triton' or 'torch'",
        ),
        (
            {"shape": (1, 50, 2, 168)},
            "head size 168 is not one of 16, 24, ..., 160",
            "use backend='torch', or pad the heads",
        ),
    ],
)
def test_what_it_refuses_and_says(changes, reason, remedy, with_kernels):
    assert refused(**changes) == [Refusal(reason, remedy)]


def test_a_library_without_its_kernels_is_named(monkeypatch):
    monkeypatch.setattr(_native, "AVAILABLE", True)
    monkeypatch.setattr(_native, "CUDA", False)
    monkeypatch.setattr(_native, "NO_CUDA", "no nvcc took part")
    (found,) = refused()
    assert found.reason == "no nvcc took part" and "--no-build-isolation on a machine with nvcc" in found.remedy


def test_it_comes_after_all_that_have_run_on_a_gpu(monkeypatch, with_kernels):
    monkeypatch.setattr(_environment, "HAS_TRITON", True)
    tried = order.order(CALL)
    assert set(tried[tried.index("cuda") + 1 :]) == {"torch"} and not SUPPORT["triton"](CALL)


def test_explain_shows_it(with_kernels):
    q = torch.empty(1, 9, 2, 64, dtype=torch.bfloat16)
    found = explain(joint_attention, q, q, q, backend="cuda")
    assert [x.reason for x in found.refusals["cuda"]] == ["the tensors are on cpu"]


@in_library
def test_a_tensor_of_another_device_is_named():
    q, lse = torch.zeros(1, 5, 2, 16, dtype=torch.bfloat16), torch.zeros(1, 2, 5)
    none, scalars = (None, None, None, None), (0.25, 0.0, 0.0)
    with pytest.raises(RuntimeError, match=r"vivit_kernels_native.cuda_joint: q is not on a CUDA device"):
        ops.cuda_joint_fwd(q, q, q, q, None, *none, None, *scalars)
    with pytest.raises(RuntimeError, match=r"vivit_kernels_native.cuda_joint: q is not on a CUDA device"):
        ops.cuda_joint_bwd(q, q, q, q, q, lse, lse, q, q, q, *none, None, *scalars)


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


def test_rows_that_are_not_aligned_are_copied_once_and_others_are_not(given):
    wide, qkv = torch.randn(2, 12, 2, 48).bfloat16(), torch.randn(2, 12, 3, 2, 16).bfloat16()
    off, step, lying = wide[..., 1:17], torch.randn(2, 12, 2, 20).bfloat16()[..., :16], qkv.unbind(2)[0]
    cuda_kernels.launch_fwd(off, step, lying, 0, Options(0.25))
    _, q, k, v, *_ = given.pop()
    for x, copied in ((q, off), (k, step)):
        assert x.is_contiguous() and torch.equal(x, copied) and x.data_ptr() != copied.data_ptr()
    assert v is lying


def test_the_gradient_of_the_output_is_copied_where_it_lies_otherwise(given):
    q, lse = torch.randn(2, 12, 2, 16).bfloat16(), torch.randn(2, 2, 12)
    dq, dk, dv = outputs = torch.empty(3, *q.shape, dtype=q.dtype).unbind()
    for do in (q[..., :1].expand(q.shape), q.transpose(2, 3).contiguous().transpose(2, 3)):
        cuda_kernels.launch_bwd(do, q, q, q, q, lse, dq, dk, dv, 0, Options(0.25))
        _, first, *rest = given.pop()
        assert first.is_contiguous() and torch.equal(first, do) and rest[4] is lse
        assert all(x is y for x, y in zip(rest[6:9], outputs, strict=True)) and rest[5].shape == lse.shape


def test_tables_and_mask_are_given_without_gaps(given):
    q = torch.randn(1, 12, 2, 16).bfloat16()
    mask, table = torch.ones(1, 24, dtype=torch.bool)[:, ::2], torch.randn(8, 12).t()
    seed = torch.tensor([1, 0, 2])[::2]
    cuda_kernels.launch_fwd(q, q, q, 0, Options(0.25)._replace(mask=mask, cos=table, sin=table, seed=seed))
    found = given.pop()
    assert all(x.is_contiguous() for x in found[6:10]) and found[11:] == (0.25, 0.0, 0.0)
    assert torch.equal(found[6], mask) and torch.equal(found[8], table)


def test_hopper_has_room_for_q_and_k_turned(given, monkeypatch):
    q, table = torch.randn(1, 12, 2, 16).bfloat16(), torch.randn(12, 8)
    for arch, options in ((90, Options(0.25, cos=table, sin=table)), (80, Options(0.25, cos=table, sin=table))):
        monkeypatch.setattr(cuda_kernels, "arch_of", lambda device, arch=arch: arch)
        cuda_kernels.launch_fwd(q, q, q, 0, options)
        turned = given.pop()[10]
        assert turned is None if arch == 80 else turned.shape == (2, *q.shape) and turned.dtype == q.dtype
        lse = torch.empty(1, 2, 12)
        cuda_kernels.launch_bwd(q, q, q, q, q, lse, q, q, q, 0, options)
        again = given.pop()[15]
        assert again is None if arch == 80 else again.shape == turned.shape and again.dtype == q.dtype
    monkeypatch.setattr(cuda_kernels, "arch_of", lambda device: 90)
    cuda_kernels.launch_fwd(q, q, q, 0, Options(0.25))
    assert given.pop()[10] is None
    long, table = torch.randn(1, 12, 2, 136).bfloat16(), torch.randn(12, 68)
    cuda_kernels.launch_bwd(*[long] * 5, lse, *[long] * 3, 0, Options(0.25, cos=table, sin=table))
    assert given.pop()[15] is None, "kernels of sm_80 turn rows on their way"


@pytest.mark.parametrize("keep", [True, False])
def test_the_forward_leaves_what_the_backward_reads(given, keep):
    q, k = torch.randn(2, 7, 3, 16).bfloat16(), torch.randn(2, 9, 3, 16).bfloat16()
    o, lse = cuda_kernels.launch_fwd(q, k, k, 0, Options(0.25), keep)
    assert o.shape == q.shape and given.pop()[5] is lse
    saved = op._SAVED["cuda"](tuple(q.shape), tuple(k.shape), q.dtype, 0)
    if keep:
        assert lse is not None and lse.shape == saved == (2, 3, 7) and lse.dtype == torch.float32
    else:
        assert lse is None


def test_no_clips_are_no_launch(given):
    q = torch.empty(0, 12, 2, 16, dtype=torch.bfloat16)
    o, lse = cuda_kernels.launch_fwd(q, q, q, 0, Options(0.25), True)
    cuda_kernels.launch_bwd(q, q, q, q, o, lse, q, q, q, 0, Options(0.25))
    assert given == [] and o.shape == q.shape


@pytest.mark.parametrize("packed", [True, False])
def test_what_is_allocated(given, packed):
    """o and lse; a gradient for each tensor that came in, and delta. Nothing else."""
    shape = (2, 70, 3, 2, 32) if packed else (2, 70, 2, 32)
    tensors = [torch.randn(shape).bfloat16() for _ in range(1 if packed else 3)]
    do, none = torch.randn(2, 70, 2, 32).bfloat16(), (None, None, None, None, 0, 0.25, 0.0, 0.0, "cuda")
    qkv = (*tensors, None, None)[:3]
    (o, lse), found = allocations(lambda: torch.ops.vivit_kernels.joint_attention_fwd(*qkv, *none))
    assert [(tuple(x.shape), x.dtype) for x in found] == [(do.shape, do.dtype), ((2, 2, 70), torch.float32)]
    _, found = allocations(lambda: torch.ops.vivit_kernels.joint_attention_bwd(do, *qkv, o, lse, *none))
    expected = [(shape, do.dtype)] * len(tensors) + [((2, 2, 70), torch.float32)]
    assert sorted((tuple(x.shape), str(x.dtype)) for x in found) == sorted((x, str(y)) for x, y in expected)


# ---- on a GPU ----


def step(qkv, do, **options):
    o = joint_attention(qkv, backend="cuda", **options)
    return o, torch.autograd.grad(o, qkv, do)[0]


def on_gpu(B=2, N=200, H=2, D=64, dtype=torch.bfloat16):
    qkv = torch.randn(B, N, 3, H, D, dtype=dtype, device="cuda").requires_grad_()
    return qkv, torch.randn(B, N, H, D, dtype=dtype, device="cuda")


GPU_AXES = {name: axis for name, axis in AXES.items() if name not in ("schedule", "arch")}
GPU_AXES["N"] = [*GPU_AXES["N"], 1000, 3137]


@gpu
@in_library
@pytest.mark.parametrize("case", grid(GPU_AXES, [["dtype", "N", "N_k", "D"]]))
def test_parity_on_a_gpu(case):
    check_case(case, torch.device("cuda"), "cuda")


@gpu
@in_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [64, 80, 128, 160])
def test_the_same_bits_every_time(D, dtype):
    qkv, do = on_gpu(N=1500, D=D, dtype=dtype)
    seed = torch.tensor([3, 4], device="cuda")
    runs = [step(qkv, do, dropout_p=0.3, seed=seed) for _ in range(3)]
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(run, runs[0], strict=True))


@gpu
@in_library
def test_nothing_is_waited_for_and_a_graph_repeats_it():
    """A synchronisation, a default stream or an allocation of CUDA's own would break the capture."""
    qkv, do = on_gpu()
    expected = step(qkv, do)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(qkv, do)
    for x in found:
        x.detach().zero_()
    graph.replay()
    assert all(map(torch.equal, found, expected))


@gpu
@in_library
@pytest.mark.parametrize("wrong", ["device", "dtype", "shape", "rows"])
def test_the_library_checks_what_it_is_given(wrong):
    q = torch.randn(1, 60, 2, 32, device="cuda").bfloat16()
    o = torch.empty_like(q)
    bad = {
        "device": o.cpu(),
        "dtype": o.half(),
        "shape": o[:, :-1],
        "rows": torch.empty(1, 60, 2, 36, device="cuda").bfloat16()[..., :32],
    }[wrong]
    with pytest.raises(RuntimeError, match=r"vivit_kernels_native.cuda_joint: (rows of )?o "):
        ops.cuda_joint_fwd(q, q, q, bad, *[None] * 6, 0.25, 0.0, 0.0)
