"""Backends `flash_attn` and `xformers`, which are not here: stand-ins with their published signatures, which compute by
the definition and hold every call to what those packages promise and demand.
"""

import sys
from types import ModuleType

import pytest
import torch
from parity_grid import check

from vivit_kernels import _environment
from vivit_kernels._attention.options import Options
from vivit_kernels.joint_attention import flash_attn_kernels, peer_views, reference, sdpa_kernels, xformers_kernels

ops = torch.ops.vivit_kernels


class Standin:
    """Forward and backward on `[B, N, H, D]`. The backward demands what the forward gave, and uses it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.given: tuple = ()

    def forward(self, q, k, v, scale, softcap=0.0):
        assert all(peer_views.reads_whole_vectors(x) for x in (q, k, v))
        self.calls.append("forward")
        q_, k_, v_ = (x.detach().float() for x in (q, k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q_, k_) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        self.given = (torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v_).to(q.dtype), scores.logsumexp(-1))
        return self.given

    def backward(self, do, q, k, v, o, lse, scale, softcap=0.0):
        self.calls.append("backward")
        assert torch.equal(o, self.given[0]) and torch.equal(lse, self.given[1])
        do_, q_, k_, v_, o_ = (x.float() for x in (do, q, k, v, o))
        scores, slope = torch.einsum("bqhd,bkhd->bhqk", q_, k_) * scale, 1.0
        if softcap:
            slope = 1 - torch.tanh(scores / softcap).square()
            scores = softcap * torch.tanh(scores / softcap)
        p = (scores - lse[:, :, : q.shape[1], None]).exp()
        delta = torch.einsum("bqhd,bqhd->bhq", do_, o_)[..., None]
        ds = p * (torch.einsum("bqhd,bkhd->bhqk", do_, v_) - delta) * slope * scale
        products = (("bhqk,bkhd->bqhd", ds, k_), ("bhqk,bqhd->bkhd", ds, q_), ("bhqk,bqhd->bkhd", p, do_))
        return [torch.einsum(*product).to(q.dtype) for product in products]


def install(monkeypatch, name: str, **contents) -> None:
    """Puts a module and its parents where an import finds them."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    vars(sys.modules[name]).update(contents)


def flash_attn_2(fake: Standin) -> dict:
    """2.7 and later; both are torch.library.custom_op, behind which `_init_fn` holds the function."""

    class Op:
        def __init__(self, function) -> None:
            self._init_fn = function

        def __call__(self, *args, **kwargs):
            return self._init_fn(*args, **kwargs)

    def forward(
        q, k, v, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int,
        softcap: float, alibi_slopes, return_softmax: bool,
    ):  # fmt: skip
        assert (dropout_p, causal, window_size_left, window_size_right, alibi_slopes, return_softmax) == (
            0.0, False, -1, -1, None, False,
        )  # fmt: skip
        return *fake.forward(q, k, v, softmax_scale, softcap), torch.empty(0), torch.empty(2)

    def backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p: float, softmax_scale: float, causal: bool,
        window_size_left: int, window_size_right: int, softcap: float, alibi_slopes, deterministic: bool,
        rng_state=None,
    ):  # fmt: skip
        assert (dropout_p, causal, window_size_left, window_size_right, alibi_slopes, rng_state) == (
            0.0, False, -1, -1, None, None,
        )  # fmt: skip
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        peer_views.write((dq, dk, dv), fake.backward(dout, q, k, v, out, softmax_lse, softmax_scale, softcap))
        return torch.empty(0)

    return {"_flash_attn_forward": Op(forward), "_flash_attn_backward": Op(backward)}


def flash_attn_3(fake: Standin) -> dict:
    """The beta of 2025: much of what is optional in later releases must be given."""

    def forward(
        q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k,
        max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary,
        q_descale, k_descale, v_descale, softmax_scale, causal, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
        rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        assert causal is False and window_size == (-1, -1) and rotary_cos is None and out is None and qv is None
        return *fake.forward(q, k, v, softmax_scale, softcap), None, None

    def backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k,
        dq, dk, dv, softmax_scale, causal, window_size=(-1, -1), softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        assert causal is False and window_size == (-1, -1) and cu_seqlens_q is None and max_seqlen_k is None
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        peer_views.write((dq, dk, dv), fake.backward(dout, q, k, v, out, softmax_lse, softmax_scale, softcap))
        return dq, dk, dv, None

    return {"_flash_attn_forward": forward, "_flash_attn_backward": backward}


def flash_attn_4(fake: Standin) -> dict:
    def forward(
        q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None, window_size_left=None,
        window_size_right=None, return_lse=False, out=None, lse=None,
    ):  # fmt: skip
        assert causal is False and softcap is None and window_size_left is None and return_lse
        return fake.forward(q, k, v, softmax_scale)

    def backward(q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, deterministic=False):
        assert causal is False and softcap == 0.0
        return fake.backward(dout, q, k, v, out, lse, softmax_scale)

    return {"_flash_attn_fwd": forward, "_flash_attn_bwd": backward}


FLASH = {
    2: ("flash_attn.flash_attn_interface", flash_attn_2),
    3: ("flash_attn_interface", flash_attn_3),
    4: ("flash_attn.cute.interface", flash_attn_4),
}


def xformers(fake: Standin) -> dict:
    def forward(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        return fake.forward(query, key, value, scale)[0]

    def forward_requires_grad(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        o, lse = fake.forward(query, key, value, scale)  # as its CUTLASS kernel does: rows up to a multiple of 32
        return o, torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)

    def backward(grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        assert lse.shape[-1] == query.shape[1]  # it pads by itself
        return tuple(fake.backward(grad, query, key, value, output, lse, scale))

    names = ("memory_efficient_attention_forward", "memory_efficient_attention_forward_requires_grad")
    return dict(
        zip((*names, "memory_efficient_attention_backward"), (forward, forward_requires_grad, backward), strict=True)
    )


def run_standin(backend: str, fake: Standin, layout: str, softcap: float = 0.0) -> None:
    """The registered op on `backend`, forward and backward, against the definition; then without a gradient."""
    if layout == "packed":
        tensors = [torch.randn(2, 19, 3, 3, 64)]
    else:  # rows that begin between two vectors
        tensors = [torch.randn(2, n, 3, 67)[..., 3:] for n in (19, 23, 23)]
    options, plain = Options(0.2, softcap), (None, None, None, None, 0, 0.2, softcap, 0.0, backend)

    def actual(q, k=None, v=None):
        return ops.joint_attention_fwd(q, k, v, *plain)[0]

    def defined(q, k=None, v=None):
        q, k, v = q.unbind(2) if k is None or v is None else (q, k, v)
        return reference.joint_attention(q, k, v, options)

    check(actual, defined, tensors, torch.randn(2, 19, 3, 64), torch.bfloat16, ["o", "dq", "dk", "dv"])
    assert fake.calls == ["forward", "backward"]
    q, *rest = (x.bfloat16() for x in tensors)
    k, v = rest or (None, None)
    lse = ops.joint_attention_fwd(q, k, v, *plain, keep=False)[1]
    assert lse.shape == (0,)


@pytest.mark.parametrize("layout", ["packed", "unaligned"])
@pytest.mark.parametrize(("version", "softcap"), [(2, 0.0), (2, 5.0), (3, 0.0), (3, 5.0), (4, 0.0)])
def test_flash_attn_by_its_published_signatures(version, softcap, layout, monkeypatch):
    module, contents = FLASH[version]
    fake = Standin()
    install(monkeypatch, module, **contents(fake))
    monkeypatch.setattr(_environment, "FLASH_ATTN", (version,))
    run_standin("flash_attn", fake, layout, softcap)


@pytest.mark.parametrize("layout", ["packed", "unaligned"])
def test_xformers_by_its_published_signatures(layout, monkeypatch):
    fake = Standin()
    install(monkeypatch, "xformers.ops", **xformers(fake))
    run_standin("xformers", fake, layout)


@pytest.mark.parametrize("version", [2, 3])
def test_flash_attn_fills_places_that_it_cannot_write(version, monkeypatch):
    module, contents = FLASH[version]
    install(monkeypatch, module, **contents(Standin()))
    monkeypatch.setattr(_environment, "FLASH_ATTN", (version,))
    q, k, v, do = (torch.randn(1, 9, 2, 16).half() for _ in range(4))
    o, lse = flash_attn_kernels.launch_fwd(q, k, v, 0, Options(0.25), keep=True)
    results = []
    for width in (16, 17):
        dq, dk, dv = (torch.full((1, 9, 2, width), torch.nan).half()[..., width - 16 :] for _ in range(3))
        flash_attn_kernels.launch_bwd(do, q, k, v, o, lse, dq, dk, dv, 0, Options(0.25))
        results.append((dq, dk, dv))
    assert all(torch.equal(x, y) and x.isfinite().all() for x, y in zip(*results, strict=True))


def test_a_flash_attn_that_lacks_an_argument_is_not_called(monkeypatch):
    called = []
    install(monkeypatch, FLASH[2][0], _flash_attn_forward=lambda q, k, v, causal: called.append(q))
    monkeypatch.setattr(_environment, "FLASH_ATTN", (2,))
    q = torch.zeros(1, 4, 2, 16, dtype=torch.float16)
    with pytest.raises(NotImplementedError, match="does not take softmax_scale; install another one"):
        flash_attn_kernels.launch_fwd(q, q, q, 0, Options(0.25))
    assert not called


@pytest.mark.parametrize("module", [flash_attn_kernels, xformers_kernels, sdpa_kernels])
def test_no_clips_launch_nothing(module):
    q = torch.zeros(0, 4, 2, 16, dtype=torch.float16)
    o, lse = module.launch_fwd(q, q, q, 0, Options(0.25), keep=True)
    assert o.shape == q.shape and lse is not None and lse.shape == (0, 2, 4)
    module.launch_bwd(q, q, q, q, o, lse, q, q, q, 0, Options(0.25))


@pytest.mark.parametrize(
    ("arch", "installed", "version"),
    [(90, (2, 3, 4), 3), (90, (2, 4), 4), (100, (2, 3, 4), 4), (100, (3,), None), (80, (2, 3, 4), 2),
     (80, (3, 4), None), (120, (2, 4), 2), (90, (), None), (0, (2,), 2)],
)  # fmt: skip
def test_which_flash_attn(arch, installed, version, monkeypatch):
    monkeypatch.setattr(_environment, "FLASH_ATTN", installed)
    assert _environment.flash_attn_for(arch) == version


def test_installed_versions_are_found_without_an_import(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for file, found in (
        ("flash_attn/__init__.py", ()),
        ("flash_attn/cute/interface.py", (4,)),
        ("flash_attn/flash_attn_interface.py", (2, 4)),
        ("flash_attn_interface.py", (2, 3, 4)),
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("raise RuntimeError('imported')")
        assert _environment._flash_attn_installed() == found
    old = tmp_path / "flash_attn-2.6.3.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.6.3\n")
    assert _environment._flash_attn_installed() == (3, 4)
