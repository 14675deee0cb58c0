"""explain(): the choice that the call itself makes, its reasons, and nothing run; golden reports."""

import importlib
import importlib.util
import inspect
from dataclasses import replace

import pytest
import torch

import vivit_kernels
from vivit_kernels import (
    _environment,
    _native,
    explain,
    factorized_attention,
    joint_attention,
    rotary_tables,
    spatial_attention,
    temporal_attention,
    temporal_block,
    tubelet_embedding,
)
from vivit_kernels._attention.support import cpu_attention_refusals
from vivit_kernels._dispatch import Answer, Call, Question, choose
from vivit_kernels._order import Ladder, Rung
from vivit_kernels.factorized_attention import composed as factorized_composed
from vivit_kernels.factorized_attention import order as factorized_order
from vivit_kernels.joint_attention import composed as joint_composed
from vivit_kernels.joint_attention import order as joint_order
from vivit_kernels.joint_attention.support import SUPPORT as JOINT
from vivit_kernels.tubelet_embedding import composed as tubelet_composed

QKV = torch.zeros(1, 9, 3, 2, 16)
GRID = torch.zeros(1, 3, 4, 3, 2, 16)
VIDEO = torch.zeros(2, 3, 4, 16, 16, dtype=torch.uint8)
WEIGHT = torch.zeros(8, 3, 2, 8, 8)
TOKENS, ROW = torch.randn(1, 3, 4, 8), torch.randn(8)
CALLS = {
    "tubelet_embedding": (tubelet_embedding, (VIDEO, WEIGHT), {}),
    "factorized_attention": (factorized_attention, (GRID,), {"temporal_heads": 1}),
    "spatial_attention": (spatial_attention, (GRID,), {}),
    "temporal_attention": (temporal_attention, (GRID,), {}),
    "joint_attention": (joint_attention, (QKV,), {}),
    "temporal_block": (temporal_block, (TOKENS, ROW, ROW, torch.randn(24, 8), torch.randn(24)), {"heads": 1}),
}


@pytest.fixture(autouse=True)
def an_install_without_others(monkeypatch, with_kernels):
    """Triton and the native library are there, other people's kernels are not: reports say the same everywhere."""
    monkeypatch.setattr(_environment, "HAS_TRITON", True)
    monkeypatch.setattr(_environment, "HAS_XFORMERS", False)
    monkeypatch.setattr(_environment, "FLASH_ATTN", ())
    monkeypatch.setattr(_environment, "RESTRICTED", ())
    monkeypatch.setattr(_native, "isa_name", lambda: "avx512_bf16")
    monkeypatch.setattr(_native, "HAS_AMX", False)
    for module in (joint_composed, factorized_composed, tubelet_composed):  # explain() runs nothing
        for launcher in ("launch_fwd", "launch_bwd"):
            monkeypatch.setattr(module, launcher, ran)


def ran(*_, **__):
    raise AssertionError("a kernel was run")


# ---- the report ----


def short(ladder: Ladder) -> Ladder:
    return replace(ladder, reason="Because it was measured.")


def test_report_of_a_call(monkeypatch):
    monkeypatch.setattr(_native, "CUDA", True)
    monkeypatch.setitem(joint_order.LADDERS, "cpu", short(joint_order.LADDERS["cpu"]))
    found = explain(joint_attention, QKV.clone().requires_grad_(), softcap=3.0)
    assert str(found) == (
        "joint_attention: backend 'cpu' runs this call.\n"
        "  call        (1, 9, 2, 16) float32 on cpu, needs_grad=True, with softcap\n"
        "  cpu         avx512_bf16\n"
        "  order       cpu, torch\n"
        "  why         Because it was measured.\n"
        "tried, the first that runs\n"
        "  cpu         runs\n"
        "  torch       runs\n"
        "not tried, only by name or in VIVIT_KERNELS_BACKENDS\n"
        "  cuda        the tensors are on cpu\n"
        "              -> move them to a CUDA device\n"
        "              float32: its products are those of tensor cores, of 16 bits\n"
        "              -> use backend='triton' or 'torch'\n"
        "  triton      the tensors are on cpu\n"
        "              -> move them to a GPU; or set TRITON_INTERPRET=1 before the start, to check a kernel slowly\n"
        "  sdpa        softcap: scaled_dot_product_attention has no soft-cap\n"
        "              -> leave backend out, or use backend='triton' or 'torch'\n"
        "              its float32 gradients on a CPU err more than numerics.py allows\n"
        "              -> use backend='torch'\n"
        "  flash_attn  FlashAttention (2.7 or later, 3 or 4) is not installed\n"
        "              -> pip install 'flash-attn>=2.7' --no-build-isolation\n"
        "              float32 is not one of float16, bfloat16\n"
        "              -> cast, or leave backend out, or use backend='triton' or 'torch'\n"
        "              the tensors are on cpu\n"
        "              -> move them to a CUDA device\n"
        "  xformers    xformers is not installed\n"
        "              -> pip install xformers\n"
        "              softcap: xformers has no soft-cap\n"
        "              -> leave backend out, or use backend='triton' or 'torch'\n"
        "              float32 is not one of float16, bfloat16\n"
        "              -> cast, or leave backend out, or use backend='triton' or 'torch'\n"
        "              the tensors are on cpu\n"
        "              -> move them to a CUDA device"
    )
    assert (found.chosen, found.order, found.backend) == ("cpu", ("cpu", "torch"), None)
    assert found.reasons == ("Because it was measured.",) and found.refusals["torch"] == ()


def test_report_of_a_call_that_the_first_refuses(monkeypatch):
    monkeypatch.setattr(_native, "AVAILABLE", False)
    monkeypatch.setattr(_native, "WHY", "the native library is not built")
    monkeypatch.setattr(_native, "REMEDY", "make build")
    monkeypatch.setattr(_native, "isa_name", lambda: "")
    monkeypatch.setitem(factorized_order.LADDERS, "cpu", short(factorized_order.LADDERS["cpu"]))
    found = explain("temporal_attention", GRID.double())
    assert str(found) == (
        "factorized_attention: backend 'torch' runs this call.\n"
        "  call    (1, 3, 4, 2, 16) float64 on cpu, needs_grad=False, temporal_heads=2\n"
        "  order   cpu, torch\n"
        "  why     Because it was measured.\n"
        "tried, the first that runs\n"
        "  cpu     the native library is not built\n"
        "          -> make build\n"
        "          float64 is not one of float16, bfloat16, float32\n"
        "          -> cast, or use backend='torch'\n"
        "  torch   runs\n"
        "not tried, only by name or in VIVIT_KERNELS_BACKENDS\n"
        "  cuda    the native library is not built\n"
        "          -> make build\n"
        "          the tensors are on cpu\n"
        "          -> move them to a CUDA device\n"
        "          float64 is not one of float16, bfloat16, float32\n"
        "          -> cast, or use backend='torch'\n"
        "  triton  the tensors are on cpu\n"
        "          -> move them to a GPU; or set TRITON_INTERPRET=1 before the start, to check a kernel slowly\n"
        "          float64 is not one of float16, bfloat16, float32\n"
        "          -> cast, or use backend='torch'"
    )


def test_report_of_a_backend_by_name():
    found = explain(spatial_attention, GRID, backend="cuda")
    assert str(found) == (
        "factorized_attention: backend 'cuda' cannot run this call.\n"
        "  call    (1, 3, 4, 2, 16) float32 on cpu, needs_grad=False, temporal_heads=0\n"
        "  cpu     avx512_bf16\n"
        "  order   cuda\n"
        "  why     backend='cuda' was asked for by name: no other is tried.\n"
        "tried, the first that runs\n"
        "  cuda    the tensors are on cpu\n"
        "          -> move them to a CUDA device\n"
        "not tried, only by name or in VIVIT_KERNELS_BACKENDS\n"
        "  triton  the tensors are on cpu\n"
        "          -> move them to a GPU; or set TRITON_INTERPRET=1 before the start, to check a kernel slowly\n"
        "  cpu     runs\n"
        "  torch   runs"
    )
    assert found.chosen is None and found.order == ("cuda",)
    assert explain(spatial_attention, GRID, backend="torch").chosen == "torch"


def test_report_of_a_rung(monkeypatch):
    """A rung that a call meets is named, described, and its reason given."""
    torch.use_deterministic_algorithms(False)
    rung = Rung("torch", "One EPYC, 2026-11-26: torch 3 us, cpu 5 us.", sizes=(("N", 1, 16),), isas=("avx512_bf16",))
    monkeypatch.setitem(joint_order.LADDERS, "cpu", replace(joint_order.LADDERS["cpu"], rungs=(rung,)))
    found = explain(joint_attention, QKV)
    assert found.chosen == "torch" and found.order == ("torch", "cpu")
    assert found.reasons == (
        "'torch' is first for calls like this one (avx512_bf16, N <= 16, without options). "
        "One EPYC, 2026-11-26: torch 3 us, cpu 5 us.",
    )
    assert explain(joint_attention, torch.zeros(1, 17, 3, 2, 16)).chosen == "cpu"


def test_restriction_is_shown(monkeypatch):
    monkeypatch.setattr(_environment, "RESTRICTED", ("triton", "sdpa"))
    found = explain(joint_attention, QKV)
    assert found.chosen == "sdpa" and found.order == ("triton", "sdpa")
    assert found.reasons == ("VIVIT_KERNELS_BACKENDS=triton,sdpa names these, in this order.",)
    nobody = explain(joint_attention, QKV, softcap=2.0)
    assert nobody.chosen is None and str(nobody).startswith("joint_attention: no allowed backend can run this call.\n")
    assert explain(joint_attention, QKV, softcap=2.0, backend="torch").chosen == "torch"


# ---- the same as the call ----


class Ran(Exception):
    """A stand-in for a kernel was called."""


def stand_in(backend: str):
    def launch_fwd(*_, **__):
        raise Ran(backend)

    return launch_fwd


@pytest.mark.parametrize("backend", [None, "cpu", "torch", "triton"])
@pytest.mark.parametrize("name", CALLS)
def test_the_call_makes_the_choice_that_is_explained(name, backend, monkeypatch):
    """Each of the public functions, by name and as a function: what is chosen is what runs."""
    function, args, kwargs = CALLS[name]
    found = explain(name, *args, **kwargs, backend=backend)
    assert str(found) == str(explain(function, *args, **kwargs, backend=backend))
    if found.chosen is None:
        with pytest.raises(NotImplementedError, match=f"backend '{backend}' cannot run this call"):
            function(*args, **kwargs, backend=backend)
        return
    for op in ("joint_attention", "factorized_attention", "tubelet_embedding", "temporal_block"):
        for one, file in (("torch", "composed"), ("cpu", "cpu_kernels")):
            if importlib.util.find_spec(f"vivit_kernels.{op}.{file}"):
                module = importlib.import_module(f"vivit_kernels.{op}.{file}")
                monkeypatch.setattr(module, "launch_fwd", stand_in(one))
    with pytest.raises(Ran, match=found.chosen):
        function(*args, **kwargs, backend=backend)


def test_every_operation_is_known():
    functions = {name: getattr(vivit_kernels, name) for name in vivit_kernels.__all__}
    operations = {
        name
        for name, function in functions.items()
        if inspect.isfunction(function)
        and ("backend" in inspect.signature(function).parameters or name.endswith("_attention"))
    }
    assert operations - {"explain", "temporal_block_pays"} == set(CALLS)  # which run nothing


def test_the_facts_are_those_of_the_call():
    cos, sin = rotary_tables(9, 1, 1, 16)
    leaf = QKV.clone().requires_grad_()
    options = {"key_mask": torch.ones(1, 9, dtype=torch.bool), "dropout_p": 0.5}
    options["rotary"] = (cos.flatten(0, 1), sin.flatten(0, 1))
    facts = explain(joint_attention, leaf, **options).call
    assert facts == Call(
        "joint_attention", (1, 9, 2, 16), torch.float32, "cpu", True, ("key_mask", "dropout", "rotary"), keys=9,
        isa="avx512_bf16",
    )  # fmt: skip
    q, k, v = QKV.unbind(2)
    facts = explain(joint_attention, q, k[:, :5], v[:, :5]).call
    assert facts.keys == 5 and str(facts).endswith("needs_grad=False, 5 keys")
    with torch.no_grad():
        assert not explain(joint_attention, leaf).call.needs_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert explain(joint_attention, leaf).call.dtype == torch.bfloat16
    for through in (leaf * 2, leaf.expand(4, 9, 3, 2, 16), torch.nn.Parameter(QKV)):
        assert explain(joint_attention, through).call.needs_grad
    with torch.inference_mode():
        assert explain(joint_attention, torch.zeros(1, 9, 3, 2, 16)).chosen == "cpu"


def test_nothing_is_computed_and_no_random_number_is_drawn():
    huge = torch.zeros(1).expand(1, 1 << 20, 3, 1 << 10, 160)  # 2 PB, were it copied
    before = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        found = explain(joint_attention, huge, dropout_p=0.5)
    assert found.call.dtype == torch.bfloat16 and found.call.uses == ("dropout",)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda: explain(torch.add, QKV), ValueError, "explain: op=add is not known; it is one of tubelet_embedding,"),
        (lambda: explain("joint", QKV), ValueError, "explain: op=joint is not known; it is one of tubelet_embedding,"),
        (lambda: explain(joint_attention, QKV, backend="trition"), ValueError, "backend='trition' is not known; it is"),
        (lambda: explain(joint_attention, QKV[0]), ValueError, "q alone must be packed [B N 3 H D], got (9, 3, 2, 16)"),
        (lambda: explain(joint_attention, QKV, dropout_p=2), ValueError, "dropout_p=2 must be a probability, 0 to 1"),
        (lambda: explain(spatial_attention, GRID, droput=0.1), TypeError, "unexpected keyword argument 'droput'"),
        (lambda: explain(factorized_attention, GRID), TypeError, "missing 1 required keyword-only argument"),
    ],
)
def test_mistakes_are_those_of_the_call(ask, error, message):
    with pytest.raises(error) as found:
        ask()
    assert message in str(found.value)


def test_a_function_of_another_project_with_the_same_name_is_not_ours():
    def joint_attention(q):
        return q

    with pytest.raises(ValueError, match="op=joint_attention is not known"):
        explain(joint_attention, QKV)


def test_only_a_question_is_answered():
    call = Call("joint_attention", (1, 9, 2, 16), torch.float32, "cpu", False)
    with pytest.raises(Answer) as answer:
        choose(call, JOINT, Question(), ("torch",))
    assert answer.value.call is call and answer.value.order == ("torch",)
    with pytest.raises(ValueError, match="backend='' is not known"):
        choose(call, JOINT, "", ("torch",))


# ---- backend cpu ----


def reasons(**changes) -> str:
    call = Call("factorized_attention", (1, 16, 196, 12, 64), torch.float32, "cpu", True, temporal_heads=12)
    return "; ".join(refusal.reason for refusal in cpu_attention_refusals(replace(call, **changes)))


@pytest.mark.parametrize("D", [16, 24, 64, 72, 160])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_the_cpu_kernels_take(dtype, D):
    assert reasons(dtype=dtype, shape=(1, 1, 1, 1, D), uses=("key_mask", "dropout", "rotary", "softcap")) == ""


def test_what_the_cpu_kernels_refuse(monkeypatch):
    for D in (8, 20, 168):
        assert reasons(shape=(1, 16, 196, 12, D)) == f"head size {D} is not one of 16, 24, ..., 160"
    assert reasons(dtype=torch.float64) == "float64 is not one of float16, bfloat16, float32"
    assert reasons(device="cuda") == "the tensors are on cuda"
    monkeypatch.setattr(_native, "AVAILABLE", False)
    monkeypatch.setattr(_native, "WHY", "no library")
    monkeypatch.setattr(_native, "REMEDY", "make build")
    assert reasons(dtype=torch.float64).startswith("no library; ")
    call = Call("joint_attention", (1, 9, 2, 16), torch.float32, "cpu", False)
    assert [refusal.remedy for refusal in cpu_attention_refusals(call)] == ["make build"]


def test_the_choice_of_a_cpu_is_traced():
    """Whatever is chosen: facts, predicates and order are plain Python over constants."""
    torch._dynamo.reset()

    def chosen(x):
        call = Call("joint_attention", tuple(x.shape), x.dtype, "cpu", True, isa=_native.BEST)
        return x.sum() + _environment.NAMES.index(choose(call, JOINT, None, joint_order.order(call)))

    compiled = torch.compile(chosen, fullgraph=True, backend="eager", dynamic=True)
    for D, expected in ((16, "cpu"), (64, "cpu"), (20, "torch")):
        x = torch.zeros(2, 9, 2, D)
        assert compiled(x).item() == chosen(x).item() == _environment.NAMES.index(expected)
