"""joint_attention on kernels of others: `sdpa` against the definition, and what each of them refuses.

`flash_attn` and `xformers`: test_joint_peers.py. Which backend comes first: test_order.py.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from parity_grid import check, grid, make_inputs
from test_joint_attention import check_case
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from vivit_kernels import _environment, factorized_attention, joint_attention, rotary_tables
from vivit_kernels._attention.options import Options
from vivit_kernels._dispatch import Call, choose, refusals
from vivit_kernels.joint_attention import api, order, peer_views, reference, sdpa_kernels
from vivit_kernels.joint_attention.support import SUPPORT
from vivit_kernels.numerics import judge

ops = torch.ops.vivit_kernels
NARROW = [torch.bfloat16, torch.float16]
AXES = {
    "dtype": NARROW,
    "D": [16, 32, 40, 64, 72, 80, 96, 128, 160],
    "layout": ["packed", "separate", "heads_first", "sliced"],
    "inputs": ["normal", "large", "constant", "dominant"],
    "mask": [None],
    "dropout_p": [0.0],
    "extra": [None],
    "N": [17, 64, 128, 197],
    "N_k": ["same", 33, 150],
}
PLAIN = Call("joint_attention", (2, 3136, 12, 64), torch.bfloat16, "cuda", True, (), 90)


# ---- sdpa ----


@pytest.mark.parametrize("case", grid(AXES, [["dtype", "layout", "N", "N_k", "D"]]))
def test_sdpa_parity(case, device):
    check_case(case, device, "sdpa")


def check_scale(scale, device):
    q, k, v = make_inputs("normal", (2, 130, 3, 64), (2, 77, 3, 64), device)
    check(
        lambda q, k, v: joint_attention(q, k, v, backend="sdpa", scale=scale),
        lambda q, k, v: reference.joint_attention(q, k, v, Options(scale)),
        [q, k, v],
        torch.randn(2, 130, 3, 64, device=device),
        torch.bfloat16,
        ["o", "dq", "dk", "dv"],
    )


@pytest.mark.parametrize("scale", [0.02, 0.3])
def test_sdpa_takes_any_scale(scale, device):
    check_scale(scale, device)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
def test_each_kernel_of_a_gpu(kernel):
    """By PyTorch's switches, which the backend obeys."""
    backend = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}[kernel]
    q = torch.randn(2, 3, 130, 64, dtype=torch.bfloat16, device="cuda")
    with sdpa_kernel(backend):
        assert sdpa_kernels._kernel(q, q, q) == kernel
        check_scale(0.3, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
def test_a_kernel_of_a_gpu_reads_what_another_wrote(kernel):
    """Of one call, o and logsumexp from either kernel give gradients that agree as exactly as o does."""
    q, k, v, do = (torch.randn(2, 130, 3, 64, dtype=torch.bfloat16, device="cuda") for _ in range(4))
    first, second = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
    if kernel == "flash":
        first, second = second, first
    with sdpa_kernel(first):
        o, lse = sdpa_kernels.launch_fwd(q, k, v, 0, Options(0.125), keep=True)
    dq, dk, dv = (torch.empty_like(q) for _ in range(3))
    with sdpa_kernel(second):
        sdpa_kernels.launch_bwd(do, q, k, v, o, lse, dq, dk, dv, 0, Options(0.125))
    leaves = [[x.detach().to(dtype).requires_grad_() for x in (q, k, v)] for dtype in (torch.float64, q.dtype)]
    exact, eager = (
        torch.autograd.grad(reference.joint_attention(q, k, v, Options(0.125)), (q, k, v), do.to(q.dtype))
        for q, k, v in leaves
    )
    for name, found, right, usual in zip(("dq", "dk", "dv"), (dq, dk, dv), exact, eager, strict=True):
        assert (verdict := judge(found, right, usual, gradient=True)).ok, f"{name}: {verdict}"


@pytest.mark.parametrize("inputs", AXES["inputs"])
@pytest.mark.parametrize(("N", "N_k", "D"), [(1, 33, 12), (64, 150, 64), (197, 197, 80), (17, 64, 160)])
def test_sdpa_forward_in_float32_on_a_cpu(inputs, N, N_k, D):
    q, k, v = make_inputs(inputs, (2, N, 3, D), (2, N_k, 3, D), "cpu")
    exact = reference.joint_attention(q.double(), k.double(), v.double(), Options(D**-0.5))
    eager = reference.joint_attention(q, k, v, Options(D**-0.5))
    assert (verdict := judge(joint_attention(q, k, v, backend="sdpa"), exact, eager)).ok, verdict


def test_sdpa_keeps_o_and_one_number_a_row_and_nothing_without_a_gradient():
    qkv = torch.randn(2, 50, 3, 4, 16, dtype=torch.bfloat16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        o = joint_attention(qkv, backend="sdpa")
    assert sorted(x.numel() for x in saved) == [2 * 4 * 50, o.numel(), qkv.numel()]
    args = (qkv.detach(), None, None, None, None, None, None, 0, 0.25, 0.0, 0.0, "sdpa")
    assert ops.joint_attention_fwd(*args, keep=False)[1].shape == (0,)
    lse = ops.joint_attention_fwd(*args, keep=True)[1]
    assert lse.shape == (2, 4, 50) and lse.dtype == torch.float32 and lse.is_contiguous()
    scores = torch.einsum("bqhd,bkhd->bhqk", *(x.double() for x in qkv.detach().unbind(2)[:2])) * 0.25
    exact = scores.logsumexp(-1)  # compared as exactly as o is: ATen's exponential on a CPU errs by 1e-5
    assert judge(lse.bfloat16(), exact, exact.bfloat16()).ok


def test_sdpa_never_runs_its_forward_again(monkeypatch):
    qkv = torch.randn(1, 20, 3, 2, 16, dtype=torch.bfloat16, requires_grad=True)
    o = joint_attention(qkv, backend="sdpa")
    monkeypatch.setattr(sdpa_kernels, "launch_fwd", None)
    o.sum().backward()
    assert qkv.grad is not None and qkv.grad.isfinite().all()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", NARROW)
def test_opcheck_sdpa(packed, dtype):
    shapes = [(2, 12, 3, 2, 16)] if packed else [(2, 12, 2, 16), (2, 7, 2, 16), (2, 7, 2, 16)]
    tensors = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    qkv = [*tensors, None, None] if packed else tensors
    torch.library.opcheck(
        ops.joint_attention_fwd.default, (*qkv, None, None, None, None, 0, 0.25, 0.0, 0.0, "sdpa"), rtol=None, atol=None
    )


@pytest.mark.parametrize("deterministic", [True, False])
def test_compile_fullgraph(deterministic, device):
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(deterministic)
    compiled = torch.compile(joint_attention, fullgraph=True, backend="aot_eager")
    for B, backend in ((2, "sdpa"), (3, "sdpa"), (2, None)):
        qkv = torch.randn(B, 40, 3, 2, 16, dtype=torch.bfloat16, device=device, requires_grad=True)
        results = []
        for function in (compiled, joint_attention):
            o = function(qkv, backend=backend)
            results.append((o, *torch.autograd.grad(o.float().square().sum(), qkv)))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", [None, "sdpa"])
def test_the_choice_on_a_gpu_is_traced(backend):
    """Without one: the facts of a call as they would be there, chosen from inside a graph."""
    torch._dynamo.reset()

    def chosen(x):
        call = Call("joint_attention", (2, x.shape[1], 12, 64), x.dtype, "cuda", True, (), 90)
        return x + _environment.NAMES.index(choose(call, SUPPORT, backend, order.order(call)))

    x = torch.zeros(2, 3136, dtype=torch.bfloat16)
    for strictly in (True, False):
        torch.use_deterministic_algorithms(strictly)
        found = torch.compile(chosen, fullgraph=True, backend="eager")(x)
        assert torch.equal(found, chosen(x)) and (found[0, 0] == _environment.NAMES.index("sdpa")) == (
            backend == "sdpa" or not strictly
        )


class Named(TorchDispatchMode):
    """The operations of PyTorch that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
def test_kernels_of_a_gpu_are_called_as_pytorch_declares_them(kernel, monkeypatch):
    """On tensors without data: the schemas and the shapes, not the numbers."""
    monkeypatch.setattr(sdpa_kernels, "_kernel", lambda *_: kernel)
    monkeypatch.setattr(sdpa_kernels, "whole_vectors", lambda *tensors: tensors)
    q, _, _ = torch.empty(2, 130, 3, 4, 64, dtype=torch.bfloat16, device="meta").unbind(2)
    k, v = (torch.empty(2, 77, 4, 64, dtype=torch.bfloat16, device="meta") for _ in range(2))
    with Named() as called:
        o, lse = sdpa_kernels.launch_fwd(q, k, v, 0, Options(0.125), keep=True)
        assert o.shape == q.shape and o.is_contiguous()
        assert lse is not None and lse.shape == (2, 4, 130) and lse.dtype == torch.float32
        sdpa_kernels.launch_bwd(o, q, k, v, o, lse, torch.empty_like(q), k, v, 0, Options(0.125))
    names = [name for name in called.names if "attention" in name]
    assert names == [f"_scaled_dot_product_{kernel}_attention{what}" for what in ("", "_backward")]
    assert sdpa_kernels.launch_fwd(q, k, v, 0, Options(0.125))[1] is None


def test_sdpa_of_no_clips_and_of_any_gradient(device):
    qkv = torch.randn(2, 24, 3, 2, 16, dtype=torch.bfloat16, device=device, requires_grad=True)
    none = joint_attention(qkv[:0], backend="sdpa")
    assert none.shape == (0, 24, 2, 16) and torch.autograd.grad(none.sum(), qkv)[0].count_nonzero() == 0
    do = torch.randn(2, 24, 2, 32, dtype=torch.bfloat16, device=device)[..., ::2]
    gradients = [torch.autograd.grad(joint_attention(qkv, backend="sdpa"), qkv, x)[0] for x in (do, do.contiguous())]
    assert torch.equal(*gradients)
    torch.autograd.grad(joint_attention(qkv, backend="sdpa").sum(), qkv)  # an expanded scalar


def test_only_tensors_that_kernels_cannot_read_are_copied():
    wide = torch.randn(2, 6, 3, 2, 24, dtype=torch.float16)
    readable = [wide[:, :, 0], wide[..., 8:].unbind(2)[1], wide[:, :1, 0].expand(2, 1, 2, 24), wide.transpose(1, 3)]
    for x in readable:
        assert peer_views.whole_vectors(x)[0] is x
    unreadable = [
        wide[..., 1:17],
        wide[..., :16:2],
        wide[:1, :, 0].expand(2, 6, 2, 24),
        torch.randn(2, 3, 2, 20).half(),
    ]
    for x in unreadable:
        (copy,) = peer_views.whole_vectors(x)
        assert copy is not x and torch.equal(copy, x)
    assert all(peer_views.reads_whole_vectors(peer_views.whole_vectors(x)[0]) for x in unreadable[:3])


# ---- refusals ----


def reasons(backend: str, monkeypatch, installed=(2, 3), **changes) -> str:
    monkeypatch.setattr(_environment, "FLASH_ATTN", installed)
    monkeypatch.setattr(_environment, "HAS_XFORMERS", bool(installed))
    return "; ".join(refusal.reason for refusal in SUPPORT[backend](replace(PLAIN, **changes)))


PEERS = ["sdpa", "flash_attn", "xformers"]


@pytest.mark.parametrize("backend", PEERS)
def test_a_plain_call_on_a_gpu_is_taken(backend, monkeypatch):
    assert reasons(backend, monkeypatch) == ""


@pytest.mark.parametrize("backend", PEERS)
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"uses": ("dropout",)}, "drops other pairs than (seed, offset) names here"),
        ({"uses": ("key_mask",)}, "takes a mask as a bias of every pair of tokens, not of keys"),
        ({"uses": ("rotary",)}, "does not rotate q and k"),
        ({"dtype": torch.float32}, "float32 is not one of float16, bfloat16"),
        ({"dtype": torch.float64}, "float64 is not one of float16, bfloat16"),
        ({"shape": (2, 3136, 12, 168)}, "head size 168 is not one of 16, 24, ..., 160"),
        ({"shape": (2, 3136, 12, 60)}, "head size 60 is not one of 16, 24, ..., 160"),
        ({"shape": (8192, 17, 8, 64)}, "8192 clips x 8 heads are more than 65535 sequences"),
        ({"device": "mps", "arch": 0}, "the tensors are on mps"),
        ({"arch": 75}, "sm_75 is older than sm_80"),
    ],
)
def test_refused(backend, changes, reason, monkeypatch):
    assert reason in reasons(backend, monkeypatch, **changes)


def test_refused_by_some_only(monkeypatch):
    for backend in ("sdpa", "xformers"):
        assert "softcap: " in reasons(backend, monkeypatch, uses=("softcap",))
    assert reasons("flash_attn", monkeypatch, uses=("softcap",)) == ""
    assert "FlashAttention 4 has no soft-cap" in reasons("flash_attn", monkeypatch, (4,), uses=("softcap",))
    assert "head size 80 is not 64, 96 or 128" in reasons("flash_attn", monkeypatch, (4,), shape=(2, 3136, 12, 80))
    assert "FlashAttention 3 is not for sm_80" in reasons("flash_attn", monkeypatch, (3,), arch=80)
    torch.use_deterministic_algorithms(True)
    assert "its backward adds up in any order" in reasons("xformers", monkeypatch)
    assert reasons("xformers", monkeypatch, needs_grad=False) == ""
    assert "xformers is not installed" in reasons("xformers", monkeypatch, ())
    assert "FlashAttention (2.7 or later, 3 or 4) is not installed" in reasons("flash_attn", monkeypatch, ())
    assert "float32 gradients on a CPU" in reasons("sdpa", monkeypatch, device="cpu", arch=0, dtype=torch.float32)
    assert reasons("sdpa", monkeypatch, device="cpu", arch=0, dtype=torch.float32, needs_grad=False) == ""


def test_switched_off_kernels_are_refused_not_replaced(monkeypatch):
    cuda = torch.backends.cuda
    with sdpa_kernel(SDPBackend.MATH):
        assert reasons("sdpa", monkeypatch) == "its fused kernels are switched off"
    monkeypatch.setattr(cuda, "can_use_cudnn_attention", lambda params: False)
    monkeypatch.setattr(cuda, "can_use_flash_attention", lambda params: False)
    q = SimpleNamespace(device=torch.device("cuda", 0), shape=(1, 2, 3, 16), dtype=torch.float16)
    monkeypatch.setattr(cuda, "SDPAParams", lambda *_: None)
    monkeypatch.setattr(sdpa_kernels, "arch_of", lambda _: 90)
    with pytest.raises(NotImplementedError, match="the textbook is not run in their place"):
        sdpa_kernels._kernel(q, q, q)  # pyright: ignore[reportArgumentType]  # there is no GPU to make tensors on
    monkeypatch.setattr(cuda, "can_use_flash_attention", lambda params: True)
    assert sdpa_kernels._kernel(q, q, q) == "flash"  # pyright: ignore[reportArgumentType]


def test_a_refusal_says_what_and_what_to_do():
    q = torch.zeros(1, 9, 2, 8)
    with pytest.raises(NotImplementedError) as error:
        joint_attention(q, q, q, softcap=3.0, backend="sdpa")
    assert str(error.value) == (
        "joint_attention: backend 'sdpa' cannot run this call.\n"
        "  call    (1, 9, 2, 8) float32 on cpu, needs_grad=False, with softcap\n"
        "  sdpa    softcap: scaled_dot_product_attention has no soft-cap\n"
        "          -> leave backend out, or use backend='triton' or 'torch'\n"
        "  `python -m vivit_kernels` shows what this install can run."
    )
    grid_ = torch.zeros(1, 3, 4, 2, 8)
    with pytest.raises(NotImplementedError, match="this release has no sdpa kernel for factorized_attention"):
        factorized_attention(grid_, grid_, grid_, temporal_heads=1, backend="sdpa")


@pytest.mark.parametrize("option", ["key_mask", "dropout", "rotary", "softcap"])
def test_every_option_of_the_public_function_is_seen(option):
    q = torch.randn(1, 9, 2, 16, dtype=torch.float16)
    cos, sin = rotary_tables(9, 1, 1, 16)
    options = {
        "key_mask": {"key_mask": torch.ones(1, 9, dtype=torch.bool)},
        "dropout": {"dropout_p": 0.5},
        "rotary": {"rotary": (cos.flatten(0, 1), sin.flatten(0, 1))},
        "softcap": {"softcap": 2.0},
    }
    with pytest.raises(NotImplementedError, match=f"needs_grad=False, with {option}\n  sdpa    {option}: "):
        joint_attention(q, q, q, backend="sdpa", **options[option])


def test_the_public_function_asks_for_the_order(monkeypatch):
    monkeypatch.setattr(api, "order", lambda call: ("sdpa",) if call.dtype == torch.float64 else ("torch",))
    q = torch.zeros(1, 9, 2, 16)
    joint_attention(q, q, q)
    with pytest.raises(NotImplementedError, match=r"no allowed backend can run this call\.\n.*\n  sdpa    float64 is"):
        joint_attention(q.double(), q.double(), q.double())


def test_names_in_the_environment_variable(monkeypatch):
    assert _environment._read_restriction("sdpa, torch") == ("sdpa", "torch")
    monkeypatch.setattr(_environment, "RESTRICTED", ("sdpa", "torch"))
    cpu = replace(PLAIN, device="cpu", arch=0)
    assert choose(cpu, SUPPORT, order=order.order(cpu)) == "sdpa"
    assert choose(replace(cpu, uses=("dropout",)), SUPPORT, order=order.order(cpu)) == "torch"


def test_refusals_of_every_backend_are_listed():
    found = refusals(replace(PLAIN, arch=75, dtype=torch.float64), SUPPORT, _environment.NAMES)
    assert found["torch"] == [] and all(found[name] for name in _environment.NAMES if name != "torch")
