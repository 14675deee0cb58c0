"""F.scaled_dot_product_attention as joint_attention within a context: what is taken and what is not, forward and
backward within the error budget, and no trace of it before, after or by an import."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, current_flash_attention_impl, sdpa_kernel
from torch.utils.checkpoint import CheckpointError, checkpoint

import vivit_kernels
from vivit_kernels import _native, sdpa_override
from vivit_kernels.integrations import pytorch
from vivit_kernels.numerics import judge

B, H, N, D = 2, 3, 37, 32


pytestmark = pytest.mark.usefixtures("every_call_counts")


@pytest.fixture
def has_kernels(device):
    if device.type == "cpu" and not _native.AVAILABLE:
        pytest.skip(f"without kernels it stays PyTorch's: {_native.WHY}")
    return device


@pytest.fixture
def taken(monkeypatch):
    """Calls that went to joint_attention."""
    calls: list[tuple] = []

    def spy(q, *rest, **options):
        calls.append(tuple(q.shape))
        return vivit_kernels.joint_attention(q, *rest, **options)

    monkeypatch.setattr(pytorch, "joint_attention", spy)
    # explain() knows the function itself; which backends there are was asked with it
    monkeypatch.setattr(pytorch, "_chosen", lambda *args, _real=pytorch._chosen, **kw: _undisturbed(_real, *args, **kw))
    return calls


def _undisturbed(real, *args, **kw):
    spy, pytorch.joint_attention = pytorch.joint_attention, vivit_kernels.joint_attention
    try:
        return real(*args, **kw)
    finally:
        pytorch.joint_attention = spy


def qkv(device, dtype=torch.float32, keys: int = N, size: int = D, requires_grad: bool = False) -> list[Tensor]:
    """`[B, H, N, D]` as models have it, a view of `[B, N, H, D]`."""
    drawn = [torch.randn(B, n, H, size, dtype=torch.float64).to(device, dtype) for n in (N, keys, keys)]
    return [x.transpose(1, 2).detach().requires_grad_(requires_grad) for x in drawn]


def results(function, tensors: list[Tensor], **options) -> dict[str, Tensor]:
    tensors = [x.detach().requires_grad_() for x in tensors]
    out = function(*tensors, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(out, tensors, weights.to(out))
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *gradients), strict=True))


def assert_within_budget(actual, exact, eager) -> None:
    for name in exact:
        verdict = judge(actual[name].cpu(), exact[name].cpu(), eager[name].cpu(), gradient=name != "out", row=D)
        assert verdict.ok, f"{name}: {verdict}"


def textbook(q, k, v, attn_mask=None, scale=None):
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        s = s.masked_fill(~attn_mask, float("-inf"))
    return s.softmax(-1) @ v


def key_mask(device) -> Tensor:
    mask = torch.rand(B, 1, 1, N) < 0.7
    mask[..., 0] = True
    return mask.to(device)


OPTIONS = {
    "plain": lambda device: {},
    "scale": lambda device: {"scale": 0.3},
    "key mask": lambda device: {"attn_mask": key_mask(device)},
    "expanded mask": lambda device: {"attn_mask": key_mask(device)[:1].expand(B, H, N, N)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_forward_and_backward_are_within_the_budget(options, dtype, has_kernels, taken):
    tensors, given = qkv(has_kernels, dtype), options(has_kernels)
    with sdpa_override():
        actual = results(F.scaled_dot_product_attention, tensors, **given)
    assert taken == [(B, N, H, D)]
    exact = results(textbook, [x.double() for x in tensors], **given)
    assert_within_budget(actual, exact, results(textbook, tensors, **given))


def test_queries_and_keys_may_differ_in_number(has_kernels, taken):
    tensors = qkv(has_kernels, keys=11)
    with sdpa_override():
        actual = results(F.scaled_dot_product_attention, tensors)
    assert taken
    assert_within_budget(actual, results(textbook, [x.double() for x in tensors]), results(textbook, tensors))


def test_dropout_is_joint_attentions(has_kernels, taken):
    q, k, v = qkv(has_kernels)
    torch.manual_seed(1)
    with sdpa_override():
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(1)
    assert torch.equal(out, vivit_kernels.joint_attention(*tokens_first(q, k, v), dropout_p=0.5).transpose(1, 2))
    assert taken and not torch.equal(out, F.scaled_dot_product_attention(q, k, v))


def tokens_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


# What PyTorch must keep: the call as PyTorch answers it, or its error.
KEPT = {
    "is_causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "pair mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.ones(N, N, dtype=torch.bool).tril()),
    "mask per head": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, torch.ones(B, H, 1, N, dtype=torch.bool).index_fill(1, torch.tensor([1]), False)
    ),
    "bias": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.linspace(-1, 1, N).expand(B, 1, 1, N)),
    "float64": lambda q, k, v: F.scaled_dot_product_attention(q.double(), k.double(), v.double()),
    "head size 20": lambda q, k, v: F.scaled_dot_product_attention(*(x[..., :20].contiguous() for x in (q, k, v))),
    "values of another size": lambda q, k, v: F.scaled_dot_product_attention(q, k, v[..., :16]),
    "three dimensions": lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0]),
    "one head for all": lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1]),
    "enable_gqa": lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True),
    "channels apart": lambda q, k, v: F.scaled_dot_product_attention(*(x.mT.contiguous().mT for x in (q, k, v))),
    "dropout of all": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=1.0),
    "causal and a key mask": lambda q, k, v: F.scaled_dot_product_attention(
        q[:, :, :1], k, v, torch.ones(1, 1, 1, N, dtype=torch.bool), is_causal=True
    ),
    "mask of two dimensions": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.ones(N, N).tril().bool()),
    "bias of queries": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.linspace(-1, 1, N)[:, None]),
    "torch.func.grad": lambda q, k, v: torch.func.grad(lambda x: F.scaled_dot_product_attention(x, k, v).sum())(q),
    "jagged": lambda q, k, v: F.scaled_dot_product_attention(*(jagged(x) for x in (q, k, v))).values(),
    "meta": lambda q, k, v: torch.zeros_like(
        F.scaled_dot_product_attention(*(x.to("meta") for x in (q, k, v))), device="cpu"
    ),
    "no queries": lambda q, k, v: F.scaled_dot_product_attention(q[:, :, :0], k, v),
    "no clips": lambda q, k, v: F.scaled_dot_product_attention(q[:0], k[:0], v[:0]),
    "vmap": lambda q, k, v: torch.vmap(lambda a, b, c: F.scaled_dot_product_attention(a[None], b[None], c[None]))(
        q, k, v
    ),
}


def jagged(x: Tensor) -> Tensor:
    """Two clips of different length, `[2, H, ?, D]`."""
    clips = [x[0].transpose(0, 1).contiguous(), x[1, :, :11].transpose(0, 1).contiguous()]
    return torch.nested.nested_tensor(clips, layout=torch.jagged).transpose(1, 2)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("call", KEPT.values(), ids=KEPT)
def test_other_calls_stay_pytorchs(call, taken):
    tensors = qkv("cpu")
    plain = call(*tensors)
    with sdpa_override():
        found = call(*tensors)
    assert not taken
    assert torch.equal(found, plain) and found.stride() == plain.stride()


@pytest.mark.parametrize("name, least", [("_LEAST_ELEMENTS", B * H * N * D + 1), ("_LEAST_KEYS", N + 1)])
def test_small_calls_stay_pytorchs(name, least, monkeypatch, taken):
    monkeypatch.setattr(pytorch, name, least)
    with sdpa_override():
        F.scaled_dot_product_attention(*qkv("cpu"))
    assert not taken


def mask_of(*shape: int) -> Tensor:
    return torch.ones(B, 1, 1, N, dtype=torch.bool).expand(*shape)


WRONG = {
    "two dtypes": lambda q, k, v: F.scaled_dot_product_attention(q, k.double(), v),
    "a mask for other heads": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask_of(B, H + 2, 1, N)),
    "a mask for other queries": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask_of(B, 1, N - 2, N)),
    "dropout below 0": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=-0.1),
    "dropout above 1": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=1.5),
    "forward-mode AD": lambda q, k, v: tangent(q, k, v),
}


def tangent(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        out = F.scaled_dot_product_attention(forward_ad.make_dual(q, torch.ones_like(q)), k, v)
        return forward_ad.unpack_dual(out).tangent


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_wrong_calls_are_told_by_pytorch(call, taken):
    q, k, v = qkv("cpu")
    with pytest.raises(RuntimeError) as plain:
        call(q, k, v)
    with sdpa_override(), pytest.raises(RuntimeError) as within:
        call(q, k, v)
    assert str(within.value) == str(plain.value) and not taken


@pytest.mark.parametrize("scale", [0.0, -0.3, float("inf"), float("nan")])
def test_odd_scales(scale, has_kernels, taken):
    tensors = qkv(has_kernels)
    plain = F.scaled_dot_product_attention(*tensors, scale=scale)
    with sdpa_override():
        out = F.scaled_dot_product_attention(*tensors, scale=scale)
    if math.isfinite(scale):
        exact = textbook(*[x.double().cpu() for x in tensors], scale=scale)
        assert taken and judge(out.cpu(), exact, textbook(*tensors, scale=scale).cpu(), row=D).ok
    else:
        assert not taken and out.isnan().all() and plain.isnan().all()


def test_pytorchs_switches_are_heeded(taken):
    q, k, v = qkv("cpu")
    with sdpa_override(), sdpa_kernel(SDPBackend.MATH):
        F.scaled_dot_product_attention(q, k, v)
    assert not taken


def test_the_output_lies_as_pytorchs_does(taken):
    for tensors in (qkv("cpu"), [x.contiguous() for x in qkv("cpu")]):
        plain = F.scaled_dot_product_attention(*tensors)
        with sdpa_override():
            assert F.scaled_dot_product_attention(*tensors).stride() == plain.stride()


def test_a_backward_after_the_context_is_that_of_its_forward(has_kernels, taken):
    tensors = qkv(has_kernels, torch.bfloat16, requires_grad=True)
    with sdpa_override():
        within = torch.autograd.grad(F.scaled_dot_product_attention(*tensors).sum(), tensors)
        out = F.scaled_dot_product_attention(*tensors)
    after = torch.autograd.grad(out.sum(), tensors)
    assert len(taken) == 2 and all(torch.equal(a, b) for a, b in zip(after, within, strict=True))
    plain = F.scaled_dot_product_attention(*tensors)
    backward = torch.autograd.grad(plain.sum(), tensors)
    with sdpa_override():
        again = torch.autograd.grad(F.scaled_dot_product_attention(*tensors).sum(), tensors)
    assert len(taken) == 3
    assert not all(torch.equal(a, b) for a, b in zip(backward, again, strict=True)), "two kernels, two roundings"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, has_kernels, taken):
    with mode(), sdpa_override():
        tensors = qkv(has_kernels)
        out = F.scaled_dot_product_attention(*tensors)
    assert len(taken) == 1 and not out.requires_grad
    assert judge(out.cpu(), textbook(*[x.double().cpu() for x in tensors]), textbook(*tensors).cpu()).ok


def test_autocast(has_kernels, taken):
    with torch.autocast(has_kernels.type, torch.bfloat16), sdpa_override():
        assert F.scaled_dot_product_attention(*qkv(has_kernels)).dtype == torch.bfloat16
    # where products in bfloat16 by AMX are PyTorch's alone, its own attention stays first
    assert bool(taken) != (_native.call_isa(has_kernels.type) == _native.BESIDE_AMX)


def test_modules_of_others_are_reached(has_kernels, taken):
    module = nn.MultiheadAttention(H * D, H, batch_first=True, device=has_kernels)
    x = torch.randn(B, N, H * D, device=has_kernels)
    plain = module(x, x, x, need_weights=False)[0]
    with sdpa_override():
        out = module(x, x, x, need_weights=False)[0]
    assert len(taken) == 1
    exact = module.double()(*[x.double()] * 3, need_weights=False)[0]
    assert judge(out, exact, plain).ok


def doubled(attention):
    return lambda q, k, v: attention(q * 2, k, v)


def compiled(tensors: list[Tensor]) -> tuple[Tensor, list[str]]:
    """The output of what is compiled now, and all that its graphs call, that of the backward once it has run."""
    called: list[str] = []

    def compiler(graph, _):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler, inference_compiler=compiler)
    torch._dynamo.reset()
    return torch.compile(doubled(F.scaled_dot_product_attention), fullgraph=True, backend=backend)(*tensors), called


def calls_ours(called: list[str]) -> bool:
    assert any("attention" in target for target in called), called
    return any("joint_attention" in target for target in called)


@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd:UserWarning")
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_what_is_compiled_within_keeps_it(mode, has_kernels):
    """Also after a compilation outside of it, and one after it is PyTorch's again."""
    tensors = qkv(has_kernels, requires_grad=mode is torch.enable_grad)
    with mode():
        before = compiled(tensors)[1]
        with sdpa_override():
            out, called = compiled(tensors)
        after = compiled(tensors)[1]
    assert not calls_ours(before) and not calls_ours(after)
    exact, eager = (doubled(textbook)(*(x.detach().to(t) for x in tensors)) for t in (torch.float64, torch.float32))
    assert judge(out.detach().cpu(), exact.cpu(), eager.cpu(), row=D).ok
    if out.requires_grad:
        out.sum().backward()
    wanted = ["joint_attention_fwd", *(["joint_attention_bwd"] if out.requires_grad else [])]
    assert [sum(name in target for target in called) for name in wanted] == [1] * len(wanted), called


@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd:UserWarning")
def test_what_another_thread_compiles_meanwhile_goes_to_the_caches_as_what_it_is(has_kernels):
    """Settings of compilation are a thread's own in newer versions of PyTorch; without the tag it is their graph."""
    tensors, found = qkv(has_kernels), []

    def compile_there():
        found.append((torch.compiler.config.cache_key_tag, calls_ours(compiled(tensors)[1])))

    with sdpa_override():
        tag = torch.compiler.config.cache_key_tag
        thread = threading.Thread(target=compile_there)
        thread.start()
        thread.join()
        assert calls_ours(compiled(tensors)[1])
    assert tag and found in ([(tag, True)], [("", False)])
    assert not torch.compiler.config.cache_key_tag


@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ for the C++ that Inductor writes")
def test_pytorchs_caches_keep_graphs_apart(tmp_path):
    """A process that compiles what another one compiled within the context has PyTorch's, and the other way round."""
    if not _native.AVAILABLE:
        pytest.skip(f"without kernels it stays PyTorch's: {_native.WHY}")
    script = """
import contextlib, sys, torch, torch.nn.functional as F
from torch.profiler import profile
within = sys.argv[1] == "within"
if within:
    from vivit_kernels import sdpa_override
tensors = [torch.ones(2, 4, 128, 64) for _ in range(3)]
with torch.no_grad(), sdpa_override() if within else contextlib.nullcontext():
    called = torch.compile(lambda q, k, v: F.scaled_dot_product_attention(q * 2, k, v), fullgraph=True)
    called(*tensors)
    with profile() as found:
        called(*tensors)
hits = torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"]
print("ours" if any("joint_attention" in event.key for event in found.key_averages()) else "PyTorch's", hits)
"""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_AUTOGRAD_CACHE": "1"}

    def run(how: str) -> str:
        command = [sys.executable, "-c", script, how]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    found = [run(how) for how in ("within", "outside", "within", "outside")]
    assert found == ["ours 0", "PyTorch's 0", "ours 1", "PyTorch's 1"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_query_without_keys_gives_zero_as_pytorchs_does(dtype, has_kernels, taken):
    tensors, mask = qkv(has_kernels, dtype), key_mask(has_kernels)
    mask[0] = False
    plain = results(F.scaled_dot_product_attention, tensors, attn_mask=mask)
    with sdpa_override():
        found = results(F.scaled_dot_product_attention, tensors, attn_mask=mask)
    assert taken and not plain["out"][0].any()
    assert not any(x[0].any() for x in found.values()) and all(x[1].any() for x in found.values())


def test_the_context_leaves_no_trace(taken):
    tensors = qkv("cpu")
    before = F.scaled_dot_product_attention(*tensors)
    for _ in range(2):
        with pytest.raises(KeyError), sdpa_override():
            assert current_flash_attention_impl() == "vivit_kernels"
            raise KeyError
        assert current_flash_attention_impl() is None
    assert torch.equal(F.scaled_dot_product_attention(*tensors), before) and not taken
    table = torch._C._dispatch_dump("aten::scaled_dot_product_attention")
    assert "AutogradCPU" not in table


def test_contexts_nest_and_give_back_what_was_active(monkeypatch):
    removed = []

    class Other:
        def remove(self):
            removed.append(True)

    torch.nn.attention.register_flash_attention_impl("other", register_fn=Other)
    try:
        torch.nn.attention.activate_flash_attention_impl("other")
        with sdpa_override():
            assert removed == [True]
            with sdpa_override():
                pass
            assert current_flash_attention_impl() == "vivit_kernels"
        assert current_flash_attention_impl() == "other"
    finally:
        torch.nn.attention.restore_flash_attention_impl(_raise_warn=False)
        torch.nn.attention._registry._FLASH_ATTENTION_IMPLS.pop("other")


def test_other_threads_run_it_too(has_kernels, taken):
    tensors = qkv(has_kernels)
    with sdpa_override():
        thread = threading.Thread(target=lambda: F.scaled_dot_product_attention(*tensors))
        thread.start()
        thread.join()
    assert len(taken) == 1


def test_contexts_of_two_threads_may_end_in_any_order(taken):
    first, second = sdpa_override(), sdpa_override()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert current_flash_attention_impl() == "vivit_kernels", "the second goes on"
    second.__exit__(None, None, None)
    assert current_flash_attention_impl() is None and not pytorch._contexts


@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd:UserWarning")
def test_a_compiled_function_may_enter_it(has_kernels, taken):
    """With a break in its graph: the switch is no operation on tensors."""

    def function(q, k, v):
        with sdpa_override():
            return F.scaled_dot_product_attention(q * 2, k, v)

    tensors = qkv(has_kernels)
    torch._dynamo.reset()
    out = torch.compile(function, backend="eager")(*tensors)
    q, k, v = (x.double().cpu() for x in tensors)
    assert len(taken) == 1
    assert judge(
        out.cpu(), textbook(q * 2, k, v), F.scaled_dot_product_attention(tensors[0] * 2, *tensors[1:]).cpu()
    ).ok
    assert current_flash_attention_impl() is None


def test_checkpoints_within_it(has_kernels, taken):
    tensors = qkv(has_kernels, requires_grad=True)
    with sdpa_override():
        plain = torch.autograd.grad(F.scaled_dot_product_attention(*tensors).sum(), tensors)
        out = checkpoint(F.scaled_dot_product_attention, *tensors, use_reentrant=False)
        again = torch.autograd.grad(out.sum(), tensors)
        kept = checkpoint(F.scaled_dot_product_attention, *tensors, use_reentrant=False)
    assert len(taken) == 4 and all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    with pytest.raises(CheckpointError):  # after it, PyTorch's attention is computed again, and saves other tensors
        kept.sum().backward()


def test_layers_with_a_fused_path_of_their_own(has_kernels):
    """nn.TransformerEncoderLayer in inference calls neither its attention module nor F.scaled_dot_product_attention."""
    layer = nn.TransformerEncoderLayer(H * D, H, 64, batch_first=True, device=has_kernels).eval()
    x = torch.randn(B, N, H * D, device=has_kernels)
    with torch.no_grad():
        plain = layer(x)
        with sdpa_override():
            out = layer(x)
        exact = layer.double()(x.double())
    assert judge(out, exact, plain).ok


def test_where_there_are_no_kernels_it_stays_pytorchs(monkeypatch, taken):
    monkeypatch.setattr(pytorch, "_chosen", lambda *_, **__: "torch")
    with sdpa_override():
        F.scaled_dot_product_attention(*qkv("cpu"))
    assert not taken


@pytest.mark.parametrize("backend", ["torch", "sdpa"])
def test_a_backend_asked_for_by_name_is_that_one(backend, has_kernels, taken):
    """Backend `torch` calls PyTorch's attention over long sequences, which must not be joint_attention again."""
    qkv = torch.randn(1, 2048, 3, 1, D, device=has_kernels)
    plain = vivit_kernels.joint_attention(qkv, backend=backend)
    with sdpa_override():
        out = vivit_kernels.joint_attention(qkv, backend=backend)
    assert torch.equal(out, plain) and not taken


def test_an_import_changes_nothing():
    code = """if True:
        import torch
        def state():
            known, table = torch.nn.attention, torch._C._dispatch_dump("aten::scaled_dot_product_attention")
            return table, known.list_flash_attention_impls(), known.current_flash_attention_impl()
        before = state()
        import vivit_kernels, vivit_kernels.integrations.pytorch
        assert state() == before
    """
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
