"""Backend `triton` of both attention ops: the grids of the `torch` backend, and what only a kernel can get wrong."""

from dataclasses import replace

import pytest
import test_factorized_attention as factorized
import test_joint_attention as joint
import torch
from allocations import scratch
from parity_grid import grid

from vivit_kernels import factorized_attention, joint_attention
from vivit_kernels._attention import triton_tiles
from vivit_kernels.factorized_attention import tiles as factorized_tiles
from vivit_kernels.joint_attention import tiles as joint_tiles
from vivit_kernels.numerics import judge

pytest.importorskip("triton", reason="Triton is not installed")

from triton.tools.tensor_descriptor import TensorDescriptor

from vivit_kernels._attention import triton_arguments, triton_grid

pytestmark = pytest.mark.interpreted
BOTH = ("forward", "backward")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIZES = [16, 32, 40, 64, 72, 80, 96, 128, 160]  # of heads
# Interpreted programs cost a second each: few sequences. Lengths around blocks of 16, 32 and 64, and what users have.
GRIDS = [(1, 1), (2, 3), (7, 2), (8, 5), (13, 2), (16, 4), (17, 2), (24, 1), (25, 3), (49, 1), (64, 2)]
GRIDS += [(1, 16), (2, 49), (1, 65), (1, 80), (2, 70), (1, 101), (1, 128), (1, 129), (1, 144), (70, 1)]
FACTORIZED = {name: axis for name, axis in factorized.AXES.items() if name not in "TS"} | {
    "dtype": DTYPES,
    "D": SIZES,
    "grid": GRIDS,
    "heads": [(2, 2), (2, 0), (2, 1), (3, 1)],
}
EVERY_RUN = {"D": [16, 40, 64, 80], "grid": [(1, 1), (7, 2), (16, 4), (25, 3), (64, 1), (1, 65), (1, 101), (1, 130)]}
JOINT = joint.AXES | {
    "dtype": DTYPES,
    "D": SIZES,
    "N": [1, 2, 17, 63, 64, 65, 100, 128, 129],
    "N_k": ["same", 1, 33, 129],
}
CROSSES = [["dtype", "grid"], ["dtype", "D"], ["dtype", "mask", "dropout_p", "extra"]]


@pytest.mark.parametrize(
    "direction, N, N_k, D, itemsize, arch, regime",
    [
        *(("forward", N, N, 64, 2, 90, "packed") for N in (1, 16, 64)),
        *((direction, N, N, 64, 2, arch, "resident") for N in (65, 128) for arch in (90, 100) for direction in BOTH),
        ("forward", 100, 100, 128, 2, 90, "resident"),
        ("backward", 100, 100, 72, 2, 90, "streaming"),
        ("forward", 100, 100, 136, 2, 90, "streaming"),
        *((direction, 100, 100, 64, 2, arch, "streaming") for arch in (80, 89, 120) for direction in BOTH),
        *((direction, *lengths, 64, 2, 90, "streaming") for lengths in ((129, 129), (64, 65)) for direction in BOTH),
        *(
            (direction, N, N, 64, 4, 90, regime)
            for N, regime in ((32, "packed"), (33, "streaming"))
            for direction in BOTH
        ),
    ],
)
def test_which_sequences_are_cut_how(direction, N, N_k, D, itemsize, arch, regime):
    tile = triton_tiles.tiles(direction, D, itemsize, arch, None, (N, N_k))
    assert tile.space.regime == regime
    assert (tile.keys is not None) == ((direction, regime) == ("backward", "streaming")), "a launch for dk and dv"


def test_both_axes_of_a_launch_share_its_warps():
    """A short axis is packed whatever lies beside it; a resident one beside a streamed one is streamed, too."""

    def regimes(T, S, direction="backward"):
        tile = triton_tiles.tiles(direction, 64, 2, 90, (T, T), (S, S))
        return tile.time.regime, tile.space.regime, tile.warps

    assert regimes(16, 100) == ("packed", "resident", 8)
    assert regimes(100, 196) == ("streaming", "streaming", 4)
    assert regimes(16, 196) == ("packed", "streaming", 4)
    assert regimes(16, 16) == ("packed", "packed", 1)


@pytest.mark.parametrize("case", grid(FACTORIZED, CROSSES, EVERY_RUN))
def test_factorized_parity(case, device):
    (T, S), clips = case["grid"], 1 if case["mask"] != "a clip has none" else 2
    factorized.check_case(case | {"T": T, "S": S}, device, "triton", clips)


@pytest.mark.full
@pytest.mark.parametrize("N", [196, 197, 256, 257, 400, 576])
@pytest.mark.parametrize("temporal_heads", [0, 1], ids=["frames", "time"])
def test_lengths_that_models_have(N, temporal_heads, device):
    """Frames of 14 x 14 patches to 24 x 24, with and without a class token; clips as long."""
    T, S = (N, 1) if temporal_heads else (1, N)
    case = {name: values[0] for name, values in FACTORIZED.items()}
    case |= {"T": T, "S": S, "D": 64, "dtype": torch.bfloat16, "heads": (1, temporal_heads)}
    factorized.check_case(case, device, "triton", 1)


@pytest.mark.parametrize("case", grid(JOINT, [["dtype", "N", "N_k"]], {"D": [16, 40, 64, 80], "N": [1, 17, 65, 100]}))
def test_joint_parity(case, device):
    joint.check_case(case, device, "triton", 1 if case["mask"] != "a clip has none" else 2)


@pytest.mark.parametrize("layout", ["packed", "separate", "expanded", "narrow", "rotary", "40 channels"])
def test_keys_by_tma_are_the_same_keys(layout, device, monkeypatch):
    """Whole blocks of keys by descriptors, where rows allow it: the same bits as by addresses."""
    made = []
    monkeypatch.setattr(triton_grid, "TensorDescriptor", lambda *given: made.append(given) or TensorDescriptor(*given))
    B, N, H, D = 2, 150, 2, 40 if layout == "40 channels" else 64
    qkv = torch.randn(B, N, 3, H, D + 4 * (layout == "narrow"), dtype=torch.bfloat16, device=device)[..., :D]
    given = [qkv] if layout == "packed" else list(qkv.unbind(2))
    if layout == "expanded":
        given[1] = given[1][:1].expand(B, N, H, D)
    options = {"rotary": tuple(torch.randn(2, N, D // 2, device=device))} if layout == "rotary" else {}
    found = []
    for described in (False, True):
        tile = replace(triton_tiles.tiles("forward", D, 2, 90, None, (N, N)), described=described)
        with joint_tiles.forced(tile):
            found.append(joint_attention(*given, backend="triton", **options))
    assert torch.equal(*found)
    assert len(made) == (2 if layout in ("packed", "separate") else 0)


def test_strides_of_a_descriptor():
    qkv = torch.empty(2, 1, 150, 3, 1, 64, dtype=torch.bfloat16)  # one frame, one head
    axis, columns = triton_tiles.Axis("streaming", 64, 32), ((0, 64, 64),)
    k, v = qkv[..., 1, :, :], torch.empty(2, 1, 150, 1, 64, dtype=torch.bfloat16)
    of_k, of_v = triton_arguments.descriptors_of(axis, (k, v), columns)
    assert of_k == ([2, 1, 150, 1, 64], [150 * 192, 150 * 192, 192, 64, 1], [1, 1, 32, 1, 64])
    assert of_v[1] == [150 * 64, 150 * 64, 64, 64, 1]
    assert triton_arguments.descriptors_of(axis, (k, v[:1].expand(2, 1, 150, 1, 64)), columns) is None
    assert triton_arguments.descriptors_of(axis, (k, v), ((0, 64, 56),)) is None
    assert triton_arguments.descriptors_of(axis, (k, v), ((0, 64, 64), (64, 16, 16))) is None
    assert triton_arguments.descriptors_of(axis, (qkv.flatten()[1:-191].view(-1, 1, 1, 1, 64)[:2], v), columns) is None


def test_keys_of_every_frame_by_tma(device):
    q, k, v = torch.randn(3, 2, 3, 70, 2, 64, dtype=torch.bfloat16, device=device)
    plain = triton_tiles.tiles("forward", 64, 2, 80, (3, 3), (70, 70))
    found = []
    for described in (False, True):
        with factorized_tiles.forced(replace(plain, described=described)):
            found.append(factorized_attention(q, k, v, temporal_heads=1, backend="triton"))
    assert torch.equal(*found)


def candidates():
    """(lengths, direction, tile): what `bench tune` tries; in every run what is no other size of the choice."""
    for N, D in ((70, 32), (130, 40)):
        for direction in BOTH:
            choice = triton_tiles.tiles(direction, D, 2, 90, None, (N, N))
            for i, tile in enumerate(triton_tiles.alternatives(choice)):
                quick = tile.persistent or (tile.space.regime != choice.space.regime)
                yield pytest.param(N, D, tile, id=f"{N}-{direction}-{i}", marks=[] if quick else [pytest.mark.full])


@pytest.mark.parametrize("N, D, tile", list(candidates()))
def test_what_is_tried_is_right(N, D, tile, device):
    case = {name: values[0] for name, values in JOINT.items()} | {"N": N, "N_k": "same", "D": D}
    with joint_tiles.forced(tile):
        joint.check_case(case | {"dtype": torch.bfloat16}, device, "triton", 1)


def test_long_sequences_come_by_tma():
    def described(D, itemsize, arch, N):
        return triton_tiles.tiles("forward", D, itemsize, arch, None, (N, N)).described

    assert described(64, 2, 90, 1024) and described(128, 2, 90, 3137)
    assert not described(64, 2, 90, 1023) and not described(64, 2, 100, 3136)
    assert not described(80, 2, 90, 4096) and not described(64, 4, 90, 4096)


MANY = {"N": [17], "N_k": [1090], "D": [64, 128], "dtype": DTYPES[:2], "mask": JOINT["mask"][:2]}
MANY = {name: values[:1] for name, values in JOINT.items()} | MANY


@pytest.mark.parametrize("case", grid(MANY, [["dtype", "D"]]))
def test_joint_parity_with_keys_by_tma(case, device):
    joint.check_case(case, device, "triton", 1 if case["mask"] != "a clip has none" else 2)


@pytest.mark.parametrize("T, S, temporal_heads", [(16, 5, 2), (25, 3, 2), (2, 67, 0), (8, 65, 1), (2, 130, 1)])
def test_the_same_bits_every_time(T, S, temporal_heads, device):
    qkv = torch.randn(1, T, S, 3, 2, 32, dtype=torch.bfloat16, device=device).requires_grad_()
    do = torch.randn(1, T, S, 2, 32, dtype=torch.bfloat16, device=device)
    runs = []
    for _ in range(2):
        o = factorized_attention(qkv, temporal_heads=temporal_heads, backend="triton")
        runs.append([o, *torch.autograd.grad(o, qkv, do)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    "T, S, temporal_heads", [(16, 5, 2), (5, 16, 0), (8, 7, 1), (2, 67, 0), (8, 65, 1), (1, 130, 0), (2, 129, 1)]
)
def test_what_is_allocated_and_not_returned(T, S, temporal_heads, device):
    """Nothing by packed and resident sequences; by streamed ones delta, four bytes a query and head, between
    backward's passes."""
    qkv = torch.randn(1, T, S, 3, 2, 16, dtype=torch.bfloat16, device=device).requires_grad_()
    do = torch.randn(1, T, S, 2, 16, dtype=torch.bfloat16, device=device)

    def step():
        o, lse = torch.ops.vivit_kernels.factorized_attention_fwd(
            qkv, None, None, None, None, None, None, temporal_heads, 0.25, 0.0, 0.0, "triton"
        )
        return o, lse, *torch.autograd.grad(o, qkv, do)

    found = scratch(step)
    assert [(x.shape, x.dtype) for x in found] == ([((1, 2, T * S), torch.float32)] if S > 128 else [])


def test_statistics_are_written_for_a_backward_only(device):
    """A packed or resident sequence needs none; without a gradient nobody does."""
    for T, S, heads, needs in ((8, 3, 2, True), (2, 66, 0, True), (2, 130, 0, False)):
        qkv = torch.randn(1, T, S, 3, 2, 16, dtype=torch.bfloat16, device=device)
        lse = torch.ops.vivit_kernels.factorized_attention_fwd(
            qkv, None, None, None, None, None, None, heads, 0.25, 0.0, 0.0, "triton", needs
        )[1]
        assert lse.numel() == 0


@pytest.mark.parametrize("shape", ["noncontiguous", "expanded"])
def test_gradient_of_the_output_may_lie_anyhow(shape, device):
    qkv = torch.randn(1, 8, 3, 3, 2, 16, device=device)
    do = torch.randn(1, 8, 3, 2, 16, device=device)
    do = do.transpose(3, 4).contiguous().transpose(3, 4) if shape == "noncontiguous" else do[..., :1].expand(do.shape)
    gradients = []
    for grad in (do, do.contiguous()):
        x = qkv.clone().requires_grad_()
        factorized_attention(x, temporal_heads=1, backend="triton").backward(grad)
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_options_may_lie_anyhow(device):
    qkv = torch.randn(1, 5, 3, 3, 2, 16, device=device)
    given = {"seed": torch.tensor([7, 1, 8, 1], device=device), "mask": torch.rand(1, 5, 6, device=device) < 0.7}
    tables = torch.randn(2, 15, 16, device=device)
    seed, mask, (cos, sin) = given["seed"][::2], given["mask"][..., ::2], tables[..., ::2]
    found = [
        factorized_attention(qkv, temporal_heads=1, dropout_p=0.5, backend="triton", **options)
        for options in (
            {"seed": seed, "key_mask": mask, "rotary": (cos, sin)},
            {"seed": seed.clone(), "key_mask": mask.contiguous(), "rotary": (cos.contiguous(), sin.contiguous())},
        )
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "function, shape", [(factorized_attention, (1, 4, 3, 3, 2, 16)), (joint_attention, (1, 70, 3, 2, 16))]
)
def test_opcheck(function, shape, device):
    qkv = torch.randn(*shape, dtype=torch.float32, device=device).requires_grad_()
    op = getattr(torch.ops.vivit_kernels, f"{function.__name__}_fwd")
    arguments = (qkv, None, None, None, None, None, None, 1 if len(shape) == 6 else 0, 0.25, 0.0, 0.0, "triton")
    torch.library.opcheck(op, arguments)


def test_checkpointing_runs_the_forward_twice_and_drops_the_same_pairs(device):
    qkv = torch.randn(1, 8, 5, 3, 2, 16, device=device).requires_grad_()
    do = torch.randn(1, 8, 5, 2, 16, device=device)

    def block(x):
        return factorized_attention(x, temporal_heads=1, dropout_p=0.3, backend="triton")

    torch.manual_seed(3)
    plain = torch.autograd.grad(block(qkv), qkv, do)[0]
    torch.manual_seed(3)
    again = torch.autograd.grad(torch.utils.checkpoint.checkpoint(block, qkv, use_reentrant=False), qkv, do)[0]
    assert torch.equal(plain, again)


def test_compiles_without_a_graph_break(device):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: factorized_attention(x, temporal_heads=1, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    for B in (1, 2, 3):
        qkv = torch.randn(B, 4, 5, 3, 2, 16, device=device)
        assert torch.equal(compiled(qkv), factorized_attention(qkv, temporal_heads=1, backend="triton"))


def test_autocast_casts_as_for_pytorchs_attention(device):
    qkv = torch.randn(1, 8, 3, 3, 2, 16, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        o = factorized_attention(qkv, temporal_heads=1, backend="triton")
    assert o.dtype == torch.bfloat16
    assert torch.equal(o, factorized_attention(qkv.bfloat16(), temporal_heads=1, backend="triton"))


def test_second_derivatives_are_refused(device):
    qkv = torch.randn(1, 8, 3, 3, 2, 16, device=device).requires_grad_()
    o = factorized_attention(qkv, temporal_heads=1, backend="triton")
    (gradient,) = torch.autograd.grad(o.sum(), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        gradient.sum().backward()


@pytest.mark.parametrize("S, heads, dtype", [(5, 2, torch.float32), (70, 0, torch.float16)], ids=["packed", "resident"])
def test_output_again(S, heads, dtype, device):
    """The output that such a backward recomputes for the projection's weight gradient is as good as the forward's."""
    from vivit_kernels._attention.options import Options
    from vivit_kernels.factorized_attention import triton_kernels

    q, k, v = torch.randn(3, 1, 16 if heads else 1, S, 2, 32, dtype=dtype, device=device)
    options = Options(0.2)
    o, _ = triton_kernels.launch_fwd(q, k, v, heads, options)
    again, *gradients = (torch.empty_like(q) for _ in range(4))
    triton_kernels.launch_bwd(torch.randn_like(q), q, k, v, None, None, *gradients, heads, options, o_again=again)
    plain = {"temporal_heads": heads, "scale": options.scale, "backend": "torch"}
    exact, eager = (factorized_attention(*given, **plain) for given in ([x.double() for x in (q, k, v)], (q, k, v)))
    assert judge(o, exact, eager).ok and judge(again, exact, eager).ok


def test_more_sequences_than_a_grid_dimension(device):
    q, k, v = (torch.randn(1, 2, 33_000, 2, 16, device=device, dtype=torch.float16) for _ in range(3))
    if device.type == "cpu":  # interpreted one program at a time: the last ones only, by their strides
        q, k, v = (x.as_strided((1, 2, 3, 2, 16), x.stride()) for x in (q, k, v))
    o = factorized_attention(q, k, v, temporal_heads=2, backend="triton")
    few = [x[:, :, -3:].contiguous() for x in (q, k, v)]
    torch.testing.assert_close(o[:, :, -3:], factorized_attention(*few, temporal_heads=2, backend="triton"))
