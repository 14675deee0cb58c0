"""Golden messages: which op, what it got, the rule, the remedy; and never a silent fallback."""

import subprocess
import sys

import pytest
import torch

from vivit_kernels import (
    JointAttention,
    VideoMultiheadAttention,
    _environment,
    _native,
    factorized_attention,
    joint_attention,
    rotary_tables,
    spatial_attention,
    temporal_attention,
    tubelet_embedding,
)

Q = torch.zeros(1, 9, 2, 8)
GRID = torch.zeros(1, 3, 4, 2, 8)
VIDEO = torch.zeros(2, 3, 4, 16, 16, dtype=torch.uint8)
WEIGHT = torch.zeros(8, 3, 2, 8, 8)


def test_a_backend_that_is_asked_for_never_falls_back():
    with pytest.raises(NotImplementedError) as error:
        spatial_attention(GRID, GRID, GRID, backend="sdpa")
    assert str(error.value) == (
        "factorized_attention: backend 'sdpa' cannot run this call.\n"
        "  call    (1, 3, 4, 2, 8) float32 on cpu, needs_grad=False, temporal_heads=0\n"
        "  sdpa    this release has no sdpa kernel for factorized_attention\n"
        "          -> use backend='torch', or leave backend out\n"
        "  `python -m vivit_kernels` shows what this install can run."
    )


def test_a_library_without_cuda_kernels_is_named(monkeypatch):
    monkeypatch.setattr(_native, "AVAILABLE", True)
    monkeypatch.setattr(_native, "CUDA", False)
    monkeypatch.setattr(_native, "NO_CUDA", "the native library has no CUDA kernels (no nvcc)")
    with pytest.raises(NotImplementedError) as error:
        spatial_attention(*[torch.zeros(1, 3, 4, 2, 16, dtype=torch.bfloat16)] * 3, backend="cuda")
    assert str(error.value) == (
        "factorized_attention: backend 'cuda' cannot run this call.\n"
        "  call    (1, 3, 4, 2, 16) bfloat16 on cpu, needs_grad=False, temporal_heads=0\n"
        "  cuda    the native library has no CUDA kernels (no nvcc)\n"
        "          -> pip install -e . --no-build-isolation on a machine with nvcc (or there: make build)\n"
        "          the tensors are on cpu\n"
        "          -> move them to a CUDA device\n"
        "  `python -m vivit_kernels` shows what this install can run."
    )


def test_restriction_is_obeyed_and_named(monkeypatch):
    monkeypatch.setattr(_environment, "RESTRICTED", ("triton",))
    with pytest.raises(NotImplementedError) as error:
        spatial_attention(GRID, GRID, GRID)
    assert "no allowed backend can run this call" in str(error.value)
    assert "VIVIT_KERNELS_BACKENDS=triton restricts the choice" in str(error.value)


def test_restriction_by_environment_variable():
    def run(value):
        code = "import torch, vivit_kernels as k; print(k.joint_attention(torch.ones(1, 2, 3, 1, 8)).sum().item())"
        return subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=environment | {"VIVIT_KERNELS_BACKENDS": value},
        )

    import os

    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    assert run("torch").stdout.strip() == "16.0"
    assert "NotImplementedError" in run("triton").stderr
    unknown = run("tritn").stderr
    assert "'tritn' is not a backend; use some of cuda, triton, cpu, torch, sdpa, flash_attn, xformers," in unknown


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: joint_attention(Q), "joint_attention: q alone must be packed [B N 3 H D], got (1, 9, 2, 8); or give k and v"),
        (lambda: joint_attention(Q, Q), "joint_attention: give q, k and v, or q alone packed as [B N 3 H D]; got k without the other"),
        (lambda: joint_attention(Q, Q, Q[0]), "joint_attention: v must be [B N H D], got (9, 2, 8)"),
        (lambda: joint_attention(Q, Q.double(), Q), "q is torch.float32 on cpu, k torch.float64 on cpu"),
        (lambda: joint_attention(Q.int(), Q.int(), Q.int()), "must share one floating-point dtype"),
        (lambda: joint_attention(Q, Q[..., :4], Q[..., :4]), "must agree in clips, heads and head size"),
        (lambda: joint_attention(Q, Q[:, :0], Q[:, :0]), "must hold at least one token"),
        (lambda: joint_attention(*[torch.zeros(1, 9, 8, 2).transpose(2, 3)] * 3), "q must have unit stride along D, got strides (144, 1, 2, 16)"[:40]),
        (lambda: joint_attention(Q, Q, Q, scale=float("nan")), "scale=nan must be finite"),
        (lambda: joint_attention(Q, Q, Q, scale=1e39), "scale=1e+39 must be finite"),
        (lambda: joint_attention(Q, Q, Q, scale=torch.tensor(0.1, requires_grad=True)), "scale requires a gradient, which is not computed; multiply q by it"),  # pyright: ignore[reportArgumentType]  # on purpose
        (lambda: joint_attention(Q, Q, Q, softcap=0.0), "softcap=0.0 must be positive and finite"),
        (lambda: joint_attention(Q, Q, Q, softcap=float("inf")), "softcap=inf must be positive and finite"),
        (lambda: joint_attention(Q, Q, Q, softcap=1e-46), "softcap=1e-46 must be positive and finite"),
        (lambda: joint_attention(*[Q.to(torch.float8_e4m3fn)] * 3), "must share one floating-point dtype, of 16, 32 or 64 bits"),
        (lambda: joint_attention(torch.nested.nested_tensor([Q[0], Q[0, :4]], layout=torch.jagged)), "nested tensors are not taken; pad them"),
        (lambda: joint_attention(Q, Q, Q, rotary=rotary_tables(9, 1, 1, 8)[0]), "rotary must be two tables, (cos, sin), got 9"),  # pyright: ignore[reportArgumentType]  # on purpose
        (lambda: joint_attention(Q, Q, Q, dropout_p=1.5), "dropout_p=1.5 must be a probability, 0 to 1"),
        (lambda: joint_attention(Q, Q, Q, dropout_p=0.5, seed=7), "seed must be an int64 tensor of two, (seed, offset), on cpu; got 7"),  # pyright: ignore[reportArgumentType]  # on purpose
        (lambda: joint_attention(Q, Q, Q, key_mask=torch.ones(1, 8, dtype=torch.bool)), "key_mask must be bool (1, 9) on cpu"),
        (lambda: joint_attention(Q, Q, Q, key_mask=torch.ones(1, 9)), "True where a key may be attended; got torch.float32"),
        (lambda: joint_attention(Q, Q[:, :5], Q[:, :5], rotary=rotary_tables(9, 1, 1, 8)), "rotary needs as many keys as queries"),
        (lambda: joint_attention(Q, Q, Q, rotary=rotary_tables(8, 1, 1, 8)), "rotary cos must be float32 [(9, 4)] on cpu"),
        (lambda: joint_attention(Q, Q, Q, backend="trition"), "backend='trition' is not known; it is one of cuda, triton, cpu, torch, sdpa, flash_attn, xformers or None"),
        (lambda: factorized_attention(GRID, GRID, GRID, temporal_heads=3), "temporal_heads=3 must lie between 0 (all spatial) and H=2"),
        (lambda: factorized_attention(GRID, GRID, GRID, temporal_heads=2 / 2), "temporal_heads=1.0 must lie between 0 (all spatial) and H=2 (all temporal), a whole number"),  # pyright: ignore[reportArgumentType]  # on purpose
        (lambda: temporal_attention(torch.zeros(8)), "factorized_attention: q alone must be packed [B T S 3 H D], got (8,)"),
        (lambda: factorized_attention(GRID, GRID[:, :2], GRID[:, :2], temporal_heads=1), "must lie on one token grid; joint_attention takes other lengths"),
        (lambda: rotary_tables(2, 2, 2, 8, split=(1, 1, 1)), "split=(1, 1, 1) must add up to head_size / 2 = 4"),
        (lambda: rotary_tables(2, 2, 2, 8, split=(5, -1, 0)), "split=(5, -1, 0) must add up to head_size / 2 = 4"),
        (lambda: rotary_tables(2, 2, 2, 8, split=(2, 2)), "split=(2, 2) must add up to head_size / 2 = 4"),  # pyright: ignore[reportArgumentType]  # on purpose
        (lambda: rotary_tables(0, 2, 2, 8), "T=0, rows=2, columns=2 must be at least 1"),
        (lambda: rotary_tables(2, 2, 2, 8, base=0.0), "base=0.0 positive and finite"),
        (lambda: tubelet_embedding(VIDEO, WEIGHT, layout="BTCHW"), "layout='BTCHW' is not known; it is one of BCFYX, BFCYX, BFYXC"),
        (lambda: tubelet_embedding(VIDEO.int(), WEIGHT), "video must be BCFYX, uint8 or floating point; got (2, 3, 4, 16, 16) torch.int32"),
        (lambda: tubelet_embedding(VIDEO, WEIGHT, layout="BFCYX"), "weight must be floating point [E, C=4, f, y, x]"),
        (lambda: tubelet_embedding(VIDEO, WEIGHT[:, :, :0]), "weight (8, 3, 0, 8, 8) [E, C, f, y, x] must hold at least one number each way"),
        (lambda: tubelet_embedding(VIDEO.float().to(torch.float8_e4m3fn), WEIGHT), "video must be BCFYX, uint8 or floating point"),
        (lambda: tubelet_embedding(VIDEO, WEIGHT, torch.zeros(8).int()), "bias must be [E=8], got (8,), and floating point, got torch.int32"),
        (lambda: tubelet_embedding(VIDEO, WEIGHT, None, torch.zeros(1, 8, 8).int()), "position must be floating point, got torch.int32"),
        (lambda: tubelet_embedding(VIDEO[:, :, :1], WEIGHT), "a clip of (1, 16, 16) frames, rows, columns holds no tubelet of (2, 8, 8)"),
        (lambda: tubelet_embedding(VIDEO, WEIGHT, torch.zeros(7)), "bias must be [E=8], got (7,)"),
        (lambda: tubelet_embedding(VIDEO, WEIGHT, None, torch.zeros(1, 9, 8)), "position must be [1, 8, 8] on cpu for a grid of 2x2x2 tokens"),
        (lambda: tubelet_embedding(VIDEO, WEIGHT, class_token_per="tube"), "class_token_per='tube' is not known; it is 'clip' or 'frame'"),
        (lambda: tubelet_embedding(VIDEO, WEIGHT, std=0.0), "std=0.0 must be positive and finite"),
        (lambda: tubelet_embedding(VIDEO, WEIGHT, std=float("nan")), "std=nan must be positive and finite"),
        (lambda: tubelet_embedding(VIDEO, WEIGHT, mean=float("nan")), "mean=nan must be finite"),
        (lambda: tubelet_embedding(VIDEO, WEIGHT, mean=[0.5, 0.5]), "mean has 2 numbers, the video 3 channels"),
    ],
)  # fmt: skip
def test_bad_input_is_explained(call, message):
    with pytest.raises(ValueError) as error:
        call()
    text = str(error.value)
    assert message in text
    assert text.split(":")[0] in {"joint_attention", "factorized_attention", "tubelet_embedding", "rotary_tables"}


@pytest.mark.parametrize("op", [joint_attention, spatial_attention, tubelet_embedding])
def test_double_backward_is_refused_clearly(op):
    args = (VIDEO.float(), WEIGHT) if op is tubelet_embedding else (Q if op is joint_attention else GRID,) * 3
    x = args[0].clone().requires_grad_()
    (g,) = torch.autograd.grad(op(x, *args[1:]).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"double backward \(a gradient of a gradient\) is not implemented"):
        g.sum().backward()


def test_rotary_tables_that_want_a_gradient_are_refused():
    cos, sin = rotary_tables(9, 1, 1, 8)
    with pytest.raises(ValueError, match="requires a gradient, which is not computed; detach it"):
        joint_attention(Q, Q, Q, rotary=(cos.flatten(0, 1).requires_grad_(), sin.flatten(0, 1)))


def test_report_of_this_install(capsys):
    from vivit_kernels.__main__ import main

    main()
    text = capsys.readouterr().out
    for op in ("tubelet_embedding", "factorized_attention", "joint_attention"):
        assert op in text
    assert "torch   runs" in text
    assert text.count("-> move them to a CUDA device") >= 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: JointAttention(16, 2)(x, key_mask=torch.ones(6, dtype=torch.bool)), "joint_attention: key_mask must be bool (2, 6)"),
        (lambda x: JointAttention(16, 2)(x, rotary=(torch.ones(4), torch.ones(4))), "joint_attention: rotary cos must be float32 [(6, 4)]"),
        (lambda x: VideoMultiheadAttention(16, 2)(x, key_padding_mask=torch.zeros(2, 6, dtype=torch.uint8)), "VideoMultiheadAttention: key_padding_mask must be bool, True is ignored, or floating-point, -inf is ignored and 0 is not; got torch.uint8"),
        (lambda x: VideoMultiheadAttention(16, 0), "VideoMultiheadAttention: embed_dim=16 must be a multiple of num_heads=0"),
    ],
)  # fmt: skip
def test_modules_say_what_does_not_fit(call, message):
    with pytest.raises(ValueError) as error:
        call(torch.randn(2, 6, 16))
    assert message in str(error.value)
