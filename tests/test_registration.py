"""The ops as PyTorch sees them: opcheck, torch.compile, export, autocast, FLOPs, dropout's bits."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import vivit_kernels
from vivit import ViViT, ViViTConfig
from vivit_kernels import factorized_attention, joint_attention, tubelet_embedding
from vivit_kernels._philox import keep_mask, philox

ops = torch.ops.vivit_kernels
OPTIONS = (0.25, 0.0, 0.0, "torch")
QUICK = [(True, 0.4, torch.float32), (False, 0.0, torch.bfloat16)]


def leaves(*shapes, dtype=torch.float32):
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


@pytest.mark.parametrize(
    "packed, dropout_p, dtype",
    [
        pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.full])
        for case in itertools.product((True, False), (0.0, 0.4), (torch.float32, torch.bfloat16))
    ],
)
def test_opcheck_attention(packed, dropout_p, dtype):
    seed = torch.tensor([5, 0]) if dropout_p else None
    mask = torch.ones(2, 12, dtype=torch.bool)
    options = (0.25, 3.0, dropout_p, "torch")
    joint = (
        [*leaves((2, 12, 3, 2, 8), dtype=dtype), None, None] if packed else leaves(*[(2, 12, 2, 8)] * 3, dtype=dtype)
    )
    torch.library.opcheck(ops.joint_attention_fwd.default, (*joint, mask, seed, None, None, 0, *options))
    factorized = (
        [*leaves((2, 3, 4, 3, 2, 8), dtype=dtype), None, None]
        if packed
        else leaves(*[(2, 3, 4, 2, 8)] * 3, dtype=dtype)
    )
    torch.library.opcheck(ops.factorized_attention_fwd.default, (*factorized, mask, seed, None, None, 1, *options))


@pytest.mark.parametrize("video", ["uint8", "float"])
@pytest.mark.parametrize("per_frame", [True, False])
def test_opcheck_tubelet_embedding(video, per_frame):
    pixels = (
        torch.randint(0, 256, (2, 3, 4, 8, 9), dtype=torch.uint8)
        if video == "uint8"
        else torch.randn(2, 3, 4, 8, 9, requires_grad=True)
    )
    weight, bias, position, token = leaves((6, 3, 2, 4, 4), (6,), (1, (4 if per_frame else 8) + 1, 6), (1, 1, 6))
    torch.library.opcheck(
        ops.tubelet_embedding_fwd.default,
        (pixels, weight, bias, position, token, per_frame, [0.1] * 3, [-0.5] * 3, "torch"),
    )


def small(attention="factorized_encoder", **changes):
    depth = {"temporal_depth": 1} if attention == "factorized_encoder" else {}
    config = ViViTConfig(
        frames=4,
        height=16,
        width=16,
        tubelet=(1 if "uniform_frames" in changes else 2, 8, 8),
        embedding=32,
        depth=2,
        heads=4,
        mlp=48,
        classes=5,
        attention=attention,
        **depth,
        **changes,
    )
    model = ViViT(config)
    torch.nn.init.normal_(model.head.weight)
    return model


VIDEO = torch.arange(3 * 3 * 4 * 16 * 16).view(3, 3, 4, 16, 16).remainder(251).to(torch.uint8)
MODELS = ["joint", "factorized_encoder", "factorized_self_attention", "factorized_dot_product"]
ONE_QUICK = [pytest.param(name, marks=[pytest.mark.full] if name != "factorized_encoder" else []) for name in MODELS]


@pytest.mark.parametrize("attention", ONE_QUICK)
def test_compile_fullgraph_with_any_batch_size(attention):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = small(attention)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for B in (2, 3, 5, 8):
        video = VIDEO[:1].expand(B, -1, -1, -1, -1).contiguous()
        out = compiled(video)
        torch.testing.assert_close(out, model(video))
        out.sum().backward()
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1, f"a new batch size recompiled the model: {graphs} graphs so far"


def test_compile_with_every_dropout_and_uniform_frames():
    torch._dynamo.reset()
    model = small(
        "joint", dropout=0.1, attention_dropout=0.2, drop_path=0.3, tokenization="uniform", uniform_frames=2
    ).train()
    torch.compile(model, fullgraph=True, backend="aot_eager")(VIDEO).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_compile_with_inductor_trains():
    torch._dynamo.reset()
    model = small().double()
    torch.compile(model, fullgraph=True)(VIDEO).sum().backward()
    compiled = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(VIDEO).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(compiled[name], p.grad, msg=name)


@pytest.mark.parametrize("attention", ONE_QUICK)
def test_export_with_a_dynamic_batch(attention, tmp_path):
    model = small(attention).eval()
    program = torch.export.export(model, (VIDEO,), dynamic_shapes=({0: torch.export.Dim("B", min=1, max=64)},))
    torch.export.save(program, tmp_path / "vivit.pt2")
    loaded = torch.export.load(tmp_path / "vivit.pt2").module()
    torch.testing.assert_close(loaded(VIDEO[:2]), model(VIDEO[:2]))


@pytest.mark.parametrize("attention", MODELS)
def test_a_training_step_keeps_no_square_matrix(attention):
    """With attention dropout too, where scaled_dot_product_attention keeps one on a CPU."""
    depth = {"temporal_depth": 1} if attention == "factorized_encoder" else {}
    sizes = dict(frames=8, height=64, width=64, tubelet=(2, 8, 8), embedding=32, depth=1, heads=4, mlp=64)
    model = ViViT(ViViTConfig(**sizes, attention=attention, attention_dropout=0.1, **depth)).train()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        model(torch.randint(0, 256, (1, 3, 8, 64, 64), dtype=torch.uint8))
    N, S, H = 256, 64, 4
    square = H * (N * N if attention == "joint" else 4 * S * S)
    assert max(x.numel() for x in saved if x.is_floating_point()) < square / 2  # the hidden layer of an MLP


def test_autocast_gives_its_dtype():
    q = torch.randn(1, 6, 3, 2, 8)
    video, weight = torch.randn(1, 3, 2, 8, 8), torch.randn(4, 3, 2, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert joint_attention(q).dtype == torch.bfloat16
        assert tubelet_embedding(video, weight, torch.zeros(4)).dtype == torch.bfloat16
        assert joint_attention(q.double()).dtype == torch.float64  # as scaled_dot_product_attention
        model = small()
        model(VIDEO).float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_autocast_does_not_reach_into_a_composition():
    """What backend torch computes in float32 stays so: the bits are those of inputs that were cast before."""
    qkv, grid = torch.randn(1, 37, 3, 2, 12), torch.randn(1, 5, 7, 3, 2, 12)
    video, weight = torch.randint(0, 256, (1, 3, 2, 8, 8), dtype=torch.uint8), torch.randn(4, 3, 2, 4, 4)
    for function, x in (
        (lambda x: joint_attention(x, backend="torch"), qkv),
        (lambda x: factorized_attention(x, temporal_heads=1, backend="torch"), grid),
        (lambda x: tubelet_embedding(video, x, mean=0.9, std=0.1, backend="torch"), weight),
    ):
        leaf = x.bfloat16().requires_grad_()
        expected = function(leaf)
        (gradient,) = torch.autograd.grad(expected, leaf, torch.ones_like(expected))
        with torch.autocast("cpu", torch.bfloat16):
            leaf = x.clone().requires_grad_()
            found = function(leaf)
            assert torch.equal(found, expected)
            assert torch.equal(torch.autograd.grad(found, leaf, torch.ones_like(found))[0], gradient.float())


def test_gradcheck():
    q, k, v = leaves(*[(1, 2, 3, 2, 4)] * 3, dtype=torch.float64)
    seed = torch.tensor([1, 0])
    assert torch.autograd.gradcheck(
        lambda *x: factorized_attention(*x, temporal_heads=1, softcap=2.0, dropout_p=0.3, seed=seed), (q, k, v)
    )
    assert torch.autograd.gradcheck(lambda *x: joint_attention(*x), [x.flatten(1, 2) for x in (q, k, v)])
    assert torch.autograd.gradcheck(
        lambda *x: tubelet_embedding(*x, mean=0.3, std=[0.2, 0.5]),
        leaves((1, 2, 2, 4, 5), (3, 2, 1, 2, 2), (3,), (1, 9, 3), (1, 1, 3), dtype=torch.float64),
    )


@pytest.mark.parametrize("op", [joint_attention, lambda q: factorized_attention(q, temporal_heads=1)])
def test_gradients_of_any_stride_and_of_a_batch_of_none(op):
    shape = (2, 6, 3, 2, 8) if op is joint_attention else (2, 3, 2, 3, 2, 8)
    qkv = torch.randn(shape, requires_grad=True)
    o = op(qkv)
    do = torch.randn(*o.shape[:-1], 2 * o.shape[-1])[..., ::2]
    torch.testing.assert_close(
        torch.autograd.grad(op(qkv), qkv, do), torch.autograd.grad(op(qkv), qkv, do.contiguous())
    )
    torch.autograd.grad(op(qkv).sum(), qkv)  # an expanded scalar
    assert op(qkv[:0]).shape == o[:0].shape


def test_activation_checkpointing_draws_the_same_dropout():
    qkv = torch.randn(1, 6, 3, 2, 8, requires_grad=True)
    torch.manual_seed(3)
    plain = torch.autograd.grad(joint_attention(qkv, dropout_p=0.5).square().sum(), qkv)[0]
    torch.manual_seed(3)
    o = checkpoint(lambda x: joint_attention(x, dropout_p=0.5), qkv, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(o.square().sum(), qkv)[0], plain)


def test_philox_is_philox():
    """Known answers of Random123 for philox4x32-10: all zeros, all ones, and the digits of pi."""
    known = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, (k0, k1), words in known:
        seed = (k1 << 32) | k0
        seed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
        assert tuple(int(w) for w in philox(seed, *(torch.tensor(c) for c in counter))) == words


def test_dropout_keeps_the_right_share_and_does_not_depend_on_its_neighbours():
    seed = torch.tensor([123, 4])
    keep = keep_mask(seed, torch.arange(1000), 333, 0.25)
    assert abs(keep.float().mean().item() - 0.75) < 0.005
    assert torch.equal(keep[17:19, :5], keep_mask(seed, torch.arange(17, 19), 5, 0.25))
    assert not torch.equal(keep, keep_mask(torch.tensor([123, 5]), torch.arange(1000), 333, 0.25))


def test_manual_seed_repeats_dropout():
    qkv = torch.randn(1, 6, 3, 2, 8)
    torch.manual_seed(1)
    first = joint_attention(qkv, dropout_p=0.5)
    assert not torch.equal(first, joint_attention(qkv, dropout_p=0.5))
    torch.manual_seed(1)
    assert torch.equal(first, joint_attention(qkv, dropout_p=0.5))
    assert joint_attention(qkv, dropout_p=1.0).abs().max() == 0


def test_flop_counter_sees_the_products():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        joint_attention(torch.randn(2, 10, 3, 4, 8))
        factorized_attention(torch.randn(2, 3, 5, 3, 4, 8), temporal_heads=1)
        tubelet_embedding(torch.randn(1, 3, 4, 8, 8), torch.randn(6, 3, 2, 4, 4))
    joint = 4 * 2 * 4 * 10 * 10 * 8
    factorized = 4 * 2 * 8 * (1 * 5 * 3 * 3 + 3 * 3 * 5 * 5)
    tubelets = 2 * 8 * 6 * 96
    assert counter.get_total_flops() == joint + factorized + tubelets


def test_public_names():
    for name in vivit_kernels.__all__:
        assert getattr(vivit_kernels, name).__doc__
