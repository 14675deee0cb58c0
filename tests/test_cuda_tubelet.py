"""The CUDA C++ kernels of tubelet_embedding on the host simulator, called by the launchers of backend `cuda`: the
parity grid, and what only they can get wrong. On a GPU the same by the public function.

Uninitialised memory is NaN, and the simulator ends a run that reads or writes anything but rows of this call's tensors,
or writes one twice.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import cuda_simulator
import pytest
import test_tubelet_embedding as tubelets
import torch
from cuda_simulator import maybe, view
from parity_grid import grid
from torch import Tensor

from vivit_kernels import _native, tubelet_embedding
from vivit_kernels._dispatch import Call, Refusal
from vivit_kernels.tubelet_embedding import api, cuda_kernels
from vivit_kernels.tubelet_embedding.support import SUPPORT

ELEMENTS = {torch.uint8: 0} | cuda_simulator.DTYPES  # Element of csrc/cuda/tubelet.h
HALVES = [torch.bfloat16, torch.float16]


class Simulated:
    """The library's ops, with the launches of csrc/cuda/tubelet/bindings.cpp on the simulator."""

    def __init__(self, schedule: int = 0, arch: int = 90):
        self.options = {"schedule_seed": schedule, "arch": arch}
        self.options["shared_bytes"] = cuda_simulator.MOST_SHARED[f"sm_{arch}"]
        self.module = cuda_simulator.made()

    def call(self, video: Tensor, weight: Tensor, affine: Tensor, per_frame: bool, has_class: bool):
        return self.module.TubeletCall(
            video=view(video), weight=view(weight), per_frame=per_frame, has_class=has_class,
            affine=tuple(affine.tolist()), types=(ELEMENTS[video.dtype], ELEMENTS[weight.dtype]), **self.options,
        )  # fmt: skip

    def operand(self, call, weight: Tensor, operand: Tensor | None, backward: bool) -> Tensor:
        assert self.module.tubelet_needs_operand(call, backward) == (operand is not None)
        return weight.flatten(1) if operand is None else operand

    def cuda_tubelet_fwd(
        self, video, weight, operand, bias, row, position, class_token, out, affine, per_frame: bool
    ) -> None:
        call = self.call(video, weight, affine, per_frame, class_token is not None)
        of_weight = self.operand(call, weight, operand, False)
        if row is not None or operand is not None:
            self.module.tubelet_prepare(call, maybe(bias), maybe(row), maybe(operand), False)
        self.module.tubelet_forward(
            call, view(of_weight), maybe(row), maybe(position), maybe(class_token), view(out.flatten(0, -2))
        )

    def cuda_tubelet_bwd(
        self, dout, video, weight, parts, strips, dweight, dbias, dposition, dclass, operand, dvideo, affine,
        per_frame: bool, has_class: bool,
    ) -> None:  # fmt: skip
        call, module = self.call(video, weight, affine, per_frame, has_class), self.module
        do = view(dout.flatten(0, -2))
        dposition, dclass, dbias = (None if x is None else x.view(-1, x.shape[-1]) for x in (dposition, dclass, dbias))
        if strips is not None or dposition is not None or dclass is not None:
            module.tubelet_row_sums(call, do, maybe(dposition), maybe(dclass), maybe(strips))
        if parts is not None:
            module.tubelet_weight_gradient(call, do, view(parts))
        if dweight is not None or dbias is not None:
            flat = None if dweight is None else dweight.flatten(1)
            module.tubelet_finish(call, maybe(parts), maybe(strips), maybe(flat), maybe(dbias))
        if dvideo is not None:
            of_weight = self.operand(call, weight, operand, True)
            if operand is not None:
                module.tubelet_prepare(call, None, None, view(operand), True)
            module.tubelet_video_gradient(call, do, view(of_weight), view(dvideo))


@pytest.fixture
def simulate(monkeypatch):
    """From its call on, backend `cuda` runs on CPU tensors, on the simulator."""

    def start(schedule: int = 0, arch: int = 90) -> None:
        ops = Simulated(schedule, arch)
        monkeypatch.setattr(torch.ops, "vivit_kernels_native", ops)
        monkeypatch.setattr(api._dispatch, "choose", lambda *_: "cuda")
        monkeypatch.setattr(_native, "isa_name", lambda: "")

    return start


AXES = tubelets.AXES | {
    "dtype": HALVES,
    "video": ["uint8", "same", "float32"],
    "E": [24, 72, 136],
    "tubelet": [(2, 16, 16), (1, 14, 14), (1, 18, 18), (2, 8, 8), (4, 16, 16), (1, 5, 7), (2, 4, 12)],
    "size": [(1, 3, 4, 36, 50), (2, 1, 5, 42, 56), (3, 2, 4, 32, 36)],
    "schedule": [0, 1, 2, 3],
    "arch": [80, 90],
}
CROSSES = [["dtype", "video", "layout", "normalise"], ["tubelet", "video", "layout", "strides"]]


@pytest.mark.parametrize("case", grid(AXES, CROSSES))
def test_parity(case, simulate):
    simulate(case["schedule"], case["arch"])
    tubelets.check_case(case, torch.device("cpu"), "cuda")


CASE = {"dtype": torch.bfloat16, "video": "uint8", "layout": "BCFYX", "rows": "clip+token", "position": True}
CASE |= {"bias": True, "normalise": None, "strides": "contiguous", "E": 24}


# More than a tile of 128 tubelets, channels and taps, and of each one row too many; parts of several steps.
@pytest.mark.parametrize(
    "size, tubelet, E, changes",
    [
        ((1, 1, 1, 129, 4), (1, 1, 4), 136, {}),
        ((2, 2, 3, 40, 44), (1, 4, 4), 8, {"rows": "frame+token", "dtype": torch.float16}),
        ((1, 3, 2, 8, 88), (2, 8, 8), 264, {"normalise": "per channel", "layout": "BFYXC"}),
        ((1, 1, 2, 260, 3), (2, 1, 1), 24, {"video": "same", "rows": "frame"}),
        ((1, 8, 1, 8, 8), (1, 8, 8), 24, {"video": "float32", "normalise": "common"}),
    ],
)
def test_tiles_and_what_is_beyond_them(size, tubelet, E, changes, simulate):
    simulate(3)
    tubelets.check_case(CASE | {"size": size, "tubelet": tubelet, "E": E} | changes, torch.device("cpu"), "cuda")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("x, pitch", [(16, 16), (14, 14), (14, 15), (5, 5)])
def test_every_byte_is_exact(dtype, x, pitch, simulate):
    """Scale 1 and shift -128: a token of a unit weight is a pixel, a gradient of one token is that token's pixels. By
    eights, by pairs, one by one."""
    simulate()
    rows = -(-256 // x)
    wide = torch.arange(rows * pitch).remainder(256).to(torch.uint8).view(1, 1, 1, rows, pitch)
    video = wide[..., :x]
    taps = rows * x
    E = -(-taps // 8) * 8
    weight = torch.eye(E, taps, dtype=dtype).view(E, 1, 1, rows, x).requires_grad_()
    tokens = tubelet_embedding(video, weight, mean=128 / 255, std=1 / 255)
    expected = video.flatten().long() - 128
    assert torch.equal(tokens.view(E)[:taps].long(), expected)
    (gradient,) = torch.autograd.grad(tokens.sum(), weight)
    assert torch.equal(gradient.view(E, taps).long(), expected.expand(E, taps))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("x", [16, 14])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_numbers_are_picked_exactly(device, x, dtype, simulate, request):
    """Weights, or gradients of tokens, are ones and zeros: every number of a result is one of the other factor's, or a
    sum of two, exactly. What a layout mixes up shows by which one came instead: the first to run on a new GPU."""
    simulate(2) if device == "cpu" else request.getfixturevalue("cuda_library")
    E, M, taps = 264, 144, x * x  # more than a tile of tubelets, of channels
    video = torch.randint(0, 256, (2, 1, 1, 9 * x, 8 * x), dtype=torch.uint8, device=device)
    pixels = video.view(2, 9, x, 8, x).transpose(2, 3).reshape(M, taps).long() - 128
    e = torch.arange(E, device=device)
    tap, token = e * 37 % taps, e * 5 % M
    weight, dout = (torch.zeros(n, m, dtype=dtype, device=device) for n, m in ((E, taps), (M, E)))
    weight[e, tap], dout[token, e] = 1, 1
    kernel = weight.view(E, 1, 1, x, x).requires_grad_()
    tokens = tubelet_embedding(video, kernel, mean=128 / 255, std=1 / 255, backend="cuda")
    assert torch.equal(tokens.view(M, E).long(), pixels[:, tap])
    (dweight,) = torch.autograd.grad(tokens, kernel, dout.view_as(tokens))
    assert torch.equal(dweight.view(E, taps).long(), pixels[token])
    clip, dout = video.to(dtype).requires_grad_(), torch.randint(-9, 10, (M, E), device=device)
    tokens = tubelet_embedding(clip, kernel, backend="cuda")
    (dvideo,) = torch.autograd.grad(tokens, clip, dout.view_as(tokens).to(dtype))
    dvideo = dvideo.view(2, 9, x, 8, x).transpose(2, 3).reshape(M, taps)
    assert torch.equal(dvideo.double(), dout.double() @ weight.double())


def parameters(E, C, tubelet, size, dtype, per="clip"):
    T, rows, columns = (n // part for n, part in zip(size, tubelet, strict=True))
    table = rows * columns * (T if per == "clip" else 1) + 1
    shapes = ((E, C, *tubelet), (E,), (1, table, E), (1, 1, E))
    return [(torch.randn(shape) * 0.1).to(dtype).requires_grad_() for shape in shapes]


def step(video, values, **options):
    """Tokens and all gradients, the video's last if it has one."""
    leaves = [*values, video] if video.is_floating_point() else values
    tokens = tubelet_embedding(video, *values, **options)
    dout = torch.linspace(-1, 1, tokens.numel()).view(tokens.shape).to(tokens.dtype)
    return [tokens.detach(), *torch.autograd.grad(tokens, leaves, dout)]


@pytest.mark.parametrize("x", [8, 14])
@pytest.mark.parametrize("video", ["uint8", "float32"])
def test_the_same_bits_in_every_order_of_threads(x, video, simulate):
    size = (2, 24, 5 * x)
    pixels = torch.randint(0, 256, (3, 2, *size), dtype=torch.uint8)
    clip = pixels if video == "uint8" else (pixels / 255).requires_grad_()
    values = parameters(136, 2, (1, 8, x), size, torch.bfloat16)
    simulate()
    first = step(clip, values)
    for schedule in range(1, 4):
        simulate(schedule)
        assert all(map(torch.equal, first, step(clip, values)))


def among_nan(layout: str, dtype: torch.dtype, size: tuple, tubelet: tuple, column: int) -> torch.Tensor:
    """Two clips of two channels as `[B, C, F, Y, X]`, laid out in memory as `layout` says and cut out of NaN, from a
    column on; pixels that fill no tubelet are NaN, too."""
    video = torch.full((3, 4, *(n + 8 for n in size)), float("nan"), dtype=dtype)
    order = api._LAYOUTS[layout]
    video = video.permute(as_laid_out(layout)).contiguous().permute(order)
    clip = video[:2, 1:3, 1 : 1 + size[0], 2 : 2 + size[1], column : column + size[2]]
    clip.copy_(torch.rand(clip.shape))
    for dim, n, part in zip((2, 3, 4), size, tubelet, strict=True):
        clip.narrow(dim, n // part * part, n % part).fill_(float("nan"))
    return clip


def as_laid_out(layout: str) -> list[int]:
    """The permutation of `[B, C, F, Y, X]` into `layout`."""
    return [api._LAYOUTS[layout].index(i) for i in range(5)]


@pytest.mark.parametrize("layout", ["BCFYX", "BFCYX", "BFYXC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_around_the_video_is_used(layout, dtype, simulate):
    """Every margin of the video is NaN, and so are the pixels that fill no tubelet."""
    simulate(1)
    size, tubelet = (5, 18, 26), (2, 4, 8)
    clip = among_nan(layout, dtype, size, tubelet, 3)
    values = parameters(24, 2, tubelet, size, torch.bfloat16)
    shown = clip.permute(as_laid_out(layout)).detach().requires_grad_()
    found = step(shown, values, layout=layout, mean=0.4, std=0.3)
    assert all(bool(x.isfinite().all()) for x in found)
    gradient = found[-1].permute(api._LAYOUTS[layout])
    assert not gradient[:, :, 4:].any() and not gradient[..., 16:, :].any() and not gradient[..., 24:].any()


def test_parameters_may_lie_anyhow_and_have_another_dtype(simulate):
    """Under autocast the weight is cast, what is added to the tokens is not; gradients come in the dtype of each."""
    simulate()
    size = (2, 8, 16)
    video = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
    weight, *others = (x.detach() for x in parameters(24, 3, (1, 4, 8), size, torch.float32))
    weight = weight.bfloat16()
    apart = [torch.stack([x, x], -1)[..., 0] for x in (weight, *others)]
    wide = [torch.zeros(*x.shape[:-1], x.shape[-1] + 4, dtype=torch.float64)[..., :-4].copy_(x) for x in others]
    runs = [step(video, [x.requires_grad_() for x in given]) for given in ([weight, *others], apart, [weight, *wide])]
    assert [x.dtype for x in runs[0]] == [torch.bfloat16] * 2 + [torch.float32] * 3
    assert all(x.dtype == torch.float64 for x in runs[2][2:])
    for run in runs[1:]:
        assert all(torch.equal(x, y.to(x.dtype)) for x, y in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("kind", ["expanded", "transposed"])
def test_gradient_of_the_tokens_may_lie_anyhow(kind, simulate):
    simulate()
    size = (2, 8, 16)
    video = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    values = parameters(24, 3, (1, 4, 8), size, torch.bfloat16)
    tokens = tubelet_embedding(video, *values)
    dout = torch.randn(2, 24, tokens.shape[1]).bfloat16().mT if kind == "transposed" else tokens[..., :1].detach()
    dout = dout.expand(tokens.shape)
    found = [torch.autograd.grad(tokens, values, x, retain_graph=True) for x in (dout, dout.contiguous())]
    assert all(map(torch.equal, *found))


def test_one_gradient_alone(simulate):
    """Of every parameter, and of the video, whatever else is wanted; of none but the class row no product runs."""
    simulate()
    size = (1, 8, 24)
    values = [torch.rand(2, 2, *size), *parameters(24, 2, (1, 4, 8), size, torch.float16)]
    whole = step(values[0].requires_grad_(), values[1:])
    whole = [whole[-1], *whole[1:-1]]
    for i in range(5):
        leaves = [x.detach().requires_grad_(i == j) for j, x in enumerate(values)]
        tokens = tubelet_embedding(leaves[0], *leaves[1:])
        dout = torch.linspace(-1, 1, tokens.numel()).view(tokens.shape).to(tokens.dtype)
        assert torch.equal(torch.autograd.grad(tokens, leaves[i], dout)[0], whole[i])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_video_of_another_dtype_beside_a_frozen_weight(dtype, simulate):
    """The backward reads no pixel, and is launched all the same."""
    simulate()
    values = parameters(24, 2, (1, 4, 8), (1, 8, 24), torch.bfloat16)
    video, weight, others = torch.rand(2, 2, 1, 8, 24).to(dtype), values[0].detach(), values[1:]
    found = torch.autograd.grad(tubelet_embedding(video, weight, *others).sum(), others)
    assert torch.equal(found[0], torch.full((24,), 12.0).bfloat16())


def test_no_clips(simulate):
    simulate()
    values = parameters(24, 3, (1, 4, 8), (2, 8, 16), torch.bfloat16)
    tokens = tubelet_embedding(torch.zeros(0, 3, 2, 8, 16, dtype=torch.uint8), *values)
    assert tokens.shape == (0, 9, 24) and all(not x.any() for x in torch.autograd.grad(tokens.sum(), values))


# ---- what it can run ----

CALL = Call("tubelet_embedding", (8, 3, 32, 224, 224), torch.bfloat16, "cuda", True, arch=90, channels=768)
OTHERS = "use backend='triton', or leave backend out"


@pytest.mark.parametrize(
    "changes, reason, remedy",
    [
        ({}, None, None),
        ({"dtype": torch.float16, "arch": 80, "channels": None}, None, None),
        ({"shape": (8, 8, 2, 7, 9), "channels": 8}, None, None),
        (
            {"dtype": torch.float32},
            "float32 weights: these kernels multiply in 16 bits",
            "cast the weight to bfloat16 or float16, or use backend='triton'",
        ),
        ({"channels": 36}, "tokens of 36 channels, no multiple of 8: their rows begin between 16 bytes", OTHERS),
        ({"shape": (8, 9, 2, 8, 8)}, "9 channels of the video, 8 at most", OTHERS),
        ({"device": "cpu", "arch": 0}, "the tensors are on cpu", "move them to a CUDA device"),
        ({"arch": 75}, "this GPU is sm_75", "use one of sm_80 or later, or backend='torch'"),
        ({"dtype": torch.float64}, "float64 is not one of float16, bfloat16, float32", "cast, or use backend='torch'"),
    ],
)
def test_what_it_runs_and_what_it_refuses(changes, reason, remedy, with_kernels):
    found = SUPPORT["cuda"](replace(CALL, **changes))
    assert found == ([] if reason is None else [Refusal(reason, remedy)])


def test_a_call_by_name_says_what_is_wrong_with_it():
    video, weight = torch.zeros(1, 3, 2, 8, 8, dtype=torch.uint8), torch.zeros(12, 3, 2, 4, 4)
    with pytest.raises(NotImplementedError, match=r"(?s)float32 weights: .*-> cast the weight.*tokens of 12 channels"):
        tubelet_embedding(video, weight, backend="cuda")


def test_parts_and_strips_leave_nobody_without_work():
    for clips, E, x in itertools.product([1, 3, 8, 40], [8, 768, 1280], [4, 14, 16]):
        video = torch.zeros(1, dtype=torch.uint8).expand(clips, 3, 32, 224, 224)
        weight = torch.zeros(1, dtype=torch.bfloat16).expand(E, 3, 2, x, x)
        parts, tubelets_of_clip = cuda_kernels._parts(video, weight), 16 * (224 // x) ** 2
        steps = -(-clips * tubelets_of_clip // 64)
        assert -(-steps // -(-steps // len(parts))) == len(parts)
        assert len(parts) == 1 or parts.numel() * 4 <= 64 << 20
    for rows in [*range(1, 600), 3137]:
        strips = len(cuda_kernels._strips(torch.zeros(1, 1, 1).expand(1, rows, 8)))
        assert -(-rows // -(-rows // strips)) == strips <= 128


# ---- in the library ----

in_library = pytest.mark.usefixtures("cuda_library")


@in_library
def test_the_library_asks_for_tensors_on_a_gpu():
    video, weight = torch.zeros(1, 3, 2, 8, 8, dtype=torch.uint8), torch.zeros(8, 3, 2, 4, 4).bfloat16()
    ops, affine = torch.ops.vivit_kernels_native, torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"cuda_tubelet: video must be \[B, C, F, Y, X\] on a CUDA device"):
        ops.cuda_tubelet_fwd(video, weight, None, None, None, None, None, weight, affine, False)


GPU_SIZES = [((8, 3, 32, 224, 224), (2, 16, 16), 768), ((2, 3, 16, 224, 224), (2, 14, 14), 1280)]


@pytest.mark.gpu
@in_library
@pytest.mark.parametrize("size, tubelet, E", GPU_SIZES)
@pytest.mark.parametrize("video", ["uint8", "same"])
@pytest.mark.parametrize("dtype", HALVES)
def test_full_size_on_a_gpu(size, tubelet, E, video, dtype):
    case = CASE | {"size": size, "tubelet": tubelet, "E": E, "video": video, "dtype": dtype}
    tubelets.check_case(case, torch.device("cuda"), "cuda")


@pytest.mark.gpu
@in_library
@pytest.mark.parametrize("case", grid(AXES, CROSSES))
def test_parity_on_a_gpu(case):
    tubelets.check_case(case, torch.device("cuda"), "cuda")


@pytest.mark.gpu
@in_library
@pytest.mark.parametrize("x", [16, 14])
def test_the_same_bits_every_time_on_a_gpu_and_in_a_graph(x):
    """Nothing is waited for: a synchronisation or an allocation of CUDA's own would break the capture."""
    size = (8, 224, 224)
    video = torch.randint(0, 256, (4, 3, *size), dtype=torch.uint8, device="cuda")
    values = [x.detach().cuda().requires_grad_() for x in parameters(768, 3, (2, x, x), size, torch.bfloat16)]
    first = step(video, values, backend="cuda")
    assert all(map(torch.equal, first, step(video, values, backend="cuda")))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(video, values, backend="cuda")
    graph.replay()
    assert all(map(torch.equal, first, found))
