"""Backend `cpu` of tubelet_embedding: the parity grid on every instruction set, and what only kernels get wrong."""

import pytest
import test_tubelet_embedding as tubelets
import torch
from parity_grid import grid

from vivit_kernels import _native, tubelet_embedding
from vivit_kernels.numerics import judge

pytestmark = [
    pytest.mark.skipif(not _native.AVAILABLE, reason=f"the native library is not here: {_native.WHY}"),
    pytest.mark.usefixtures("poisoned_scratch"),
]
DTYPES = [torch.bfloat16, torch.float32, torch.float16]
# Embeddings around vectors (4, 8, 16) and panels (64); tubelets with an odd number of taps, runs of 1 to 20 pixels (of
# a gradient of one number eager PyTorch may hit all by luck);
# videos with less than a block of tokens (112), more than one, and more than are gathered at a time (256).
AXES = tubelets.AXES | {
    "dtype": DTYPES,
    "E": [1, 7, 24, 63, 64, 65, 130],
    "video": ["uint8", "same"],
    "tubelet": [(2, 4, 4), (1, 8, 4), (3, 5, 7), (2, 14, 14), (4, 1, 1), (1, 3, 1), (2, 16, 20), (1, 2, 2)],
}
CROSSES = [["dtype", "video", "layout", "rows", "normalise"], ["tubelet", "size", "video", "layout", "strides"]]
CROSSES += [["dtype", "E", "video"], ["dtype", "E", "tubelet"]]


@pytest.mark.parametrize("case", grid(AXES, CROSSES))
def test_parity(case, isa):
    tubelets.check_case(case, torch.device("cpu"), "cpu")


def make(dtype, video="uint8", size=(2, 3, 4, 28, 45), tubelet=(2, 7, 5), E=40, per_frame=False):
    C, *shape = size[1:]
    tokens = [n // t for n, t in zip(shape, tubelet, strict=True)]
    count = tokens[1] * tokens[2] * (1 if per_frame else tokens[0])
    parameters = [
        torch.randn(E, C, *tubelet) * 0.05,
        torch.randn(E),
        torch.randn(1, count + 1, E),
        torch.randn(1, 1, E),
    ]
    pixels = torch.randint(0, 256, size, dtype=torch.uint8) if video == "uint8" else torch.randn(size).to(dtype)
    return pixels, [x.to(dtype) for x in parameters]


def step(video, parameters, threads=None, backend="cpu", dout=None, **options):
    """Tokens and all gradients, with that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        leaves = [x.detach().requires_grad_() for x in ([video] if video.is_floating_point() else []) + parameters]
        pixels = leaves[0] if video.is_floating_point() else video
        out = tubelet_embedding(pixels, *leaves[-4:], backend=backend, **options)
        dout = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype) if dout is None else dout
        return [out, *torch.autograd.grad(out, leaves, dout)]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("video", ["uint8", "same"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(2, 3, 4, 28, 45), (3, 1, 6, 70, 70)])
def test_the_same_bits_with_any_number_of_threads(dtype, video, size, isa):
    given = make(dtype, video, size, E=100)
    first = step(*given, 1)
    for threads in (1, 2, 5):
        assert all(map(torch.equal, first, step(*given, threads)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tokens(dtype, isa):
    """More than a backward gathers at a time, an odd number of them, and sums as long as a batch makes them."""
    case = {"size": (3, 2, 1, 61, 69), "tubelet": (1, 3, 3), "video": "uint8", "layout": "BCFYX", "rows": "clip+token"}
    case |= {"position": True, "bias": True, "normalise": "common", "strides": "contiguous", "dtype": dtype, "E": 72}
    tubelets.check_case(case, torch.device("cpu"), "cpu")


@pytest.mark.parametrize("video", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_video_of_another_dtype(video, normalised, dtype, isa):
    pixels, parameters = make(dtype, "same")
    pixels, options = pixels.to(video), {"mean": [0.4, 0.5, 0.3], "std": [0.2, 0.3, 0.25]} if normalised else {}
    dout = torch.randn(2, 2 * 4 * 9 + 1, 40).to(dtype)
    actual, eager = (step(pixels, parameters, backend=name, dout=dout, **options) for name in ("cpu", "torch"))
    exact = step(pixels.double(), [x.double() for x in parameters], backend="torch", dout=dout.double(), **options)
    for i, (one, other, right) in enumerate(zip(actual, eager, exact, strict=True)):
        assert one.dtype == other.dtype
        verdict = judge(one, right, other, gradient=i > 0, terms=parameters[0][0].numel() if i == 0 else 1)
        assert verdict.ok, f"{i}: {verdict}"


@pytest.mark.parametrize("video", ["uint8", "same"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frames", [1, 2])
def test_pixels_around_the_view_are_not_used(video, dtype, frames, isa):
    """A crop's neighbours are NaN, or other pixels; its last row ends the memory. One frame: an odd number of taps."""
    pixels, parameters = make(dtype, video, tubelet=(frames, 7, 5))
    wide = torch.empty((2, 3, 4, 30, 50), dtype=pixels.dtype)
    for crop in (wide[..., 2:, 5:], wide[..., :28, :45]):
        wide.fill_(255 if video == "uint8" else float("nan"))
        crop.copy_(pixels)
        assert all(map(torch.equal, step(pixels, parameters), step(crop, parameters)))


@pytest.mark.parametrize("layout", ["BFCYX", "BFYXC", "flipped"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_do_not_depend_on_where_pixels_lie(layout, dtype, isa):
    """Where the order of taps is the same, so is every bit."""
    pixels, parameters = make(dtype, "same")
    order = {"BFCYX": (0, 2, 1, 3, 4), "BFYXC": (0, 2, 3, 4, 1), "flipped": (4, 3, 2, 1, 0)}[layout]
    back = [order.index(i) for i in range(5)]
    moved = pixels.permute(order).contiguous().permute(back)
    here, there = step(pixels, parameters), step(moved, parameters)
    if layout == "BFYXC":  # channels first or last: other sums
        torch.testing.assert_close(here[0], there[0])
    else:
        assert all(map(torch.equal, here, there))


@pytest.mark.parametrize("shape", ["noncontiguous", "expanded"])
@pytest.mark.parametrize("per_frame", [True, False])
@pytest.mark.parametrize("clips", [1, 2])
def test_gradient_of_the_tokens_may_lie_anyhow(shape, per_frame, clips):
    pixels, parameters = make(torch.float32, size=(clips, 3, 4, 28, 45), per_frame=per_frame)
    options = {"class_token_per": "frame" if per_frame else "clip"}
    dout = torch.randn(step(pixels, parameters, **options)[0].shape)
    dout = dout.mT.contiguous().mT if shape == "noncontiguous" else dout[..., :1].expand(dout.shape)
    given = step(pixels, parameters, dout=dout, **options)
    assert all(map(torch.equal, given, step(pixels, parameters, dout=dout.contiguous(), **options)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_may_lie_anyhow_and_have_another_dtype(dtype, isa):
    """Under autocast the weight is cast, what is added to the tokens is not."""
    pixels, parameters = make(torch.float32)
    apart = [torch.stack([x, x], -1)[..., 0] for x in parameters]
    assert all(map(torch.equal, step(pixels, parameters), step(pixels, apart)))
    weight = parameters[0].to(dtype)
    mixed = tubelet_embedding(pixels, weight, *parameters[1:], backend="cpu")
    exact = tubelet_embedding(pixels, *(x.double() for x in (weight, *parameters[1:])), backend="torch")
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed, exact.to(dtype))


def test_one_gradient_alone():
    """Of every parameter, and of the video, whatever else is wanted."""
    pixels, parameters = make(torch.float32, "same")
    whole = step(pixels, parameters)
    for i in range(5):
        leaves = [x.detach().requires_grad_(i == j) for j, x in enumerate([pixels, *parameters])]
        out = tubelet_embedding(*leaves, backend="cpu")
        dout = torch.linspace(-1, 1, out.numel()).view(out.shape)
        (gradient,) = torch.autograd.grad(out, leaves[i], dout)
        torch.testing.assert_close(gradient, whole[i + 1])


@pytest.mark.parametrize("video", ["uint8", "same"])
def test_no_clips(video):
    pixels, parameters = make(torch.float32, video, size=(0, 3, 4, 28, 45))
    out, *gradients = step(pixels, parameters)
    assert out.shape == (0, 2 * 4 * 9 + 1, 40) and all(not x.any() for x in gradients)


@pytest.mark.parametrize("per_frame", [True, False])
@pytest.mark.parametrize("video", ["uint8", "same"])
@pytest.mark.parametrize("clips", [1, 2])
def test_opcheck(video, per_frame, clips):
    pixels, parameters = make(
        torch.float32, video, size=(clips, 3, 4, 8, 9), tubelet=(2, 4, 4), E=6, per_frame=per_frame
    )
    leaves = [x.requires_grad_() for x in ([pixels] if video == "same" else []) + parameters]
    arguments = (*([pixels] if video == "uint8" else []), *leaves, per_frame, [0.1] * 3, [-0.5] * 3, "cpu")
    torch.library.opcheck(torch.ops.vivit_kernels.tubelet_embedding_fwd.default, arguments)


def test_compiles_without_a_graph_break():
    torch._dynamo.reset()
    parameters = make(torch.float32)[1]
    compiled = torch.compile(lambda x: tubelet_embedding(x, *parameters), fullgraph=True, backend="aot_eager")
    for B in (1, 2, 3):
        pixels, _ = make(torch.float32, size=(B, 3, 4, 28, 45))
        assert torch.equal(compiled(pixels), tubelet_embedding(pixels, *parameters, backend="cpu"))


def test_autocast_casts_the_weight():
    pixels, parameters = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = tubelet_embedding(pixels, *parameters, backend="cpu")
    assert torch.equal(out, tubelet_embedding(pixels, parameters[0].bfloat16(), *parameters[1:], backend="cpu"))


def test_refuses_float64():
    pixels, parameters = make(torch.float64)
    with pytest.raises(NotImplementedError, match="float64 is not one of float16, bfloat16, float32"):
        tubelet_embedding(pixels, *parameters, backend="cpu")


@pytest.mark.parametrize("wrong", ["tokens", "weight", "position", "scale", "uint8"])
def test_the_library_checks_what_it_is_given(wrong):
    native = torch.ops.vivit_kernels_native
    pixels, weight = torch.zeros(1, 1, 2, 3, 1, 1, 4, 4), torch.zeros(8, 16)
    out, position, scale = torch.zeros(1, 6, 8), torch.zeros(6, 8), torch.zeros(32)
    native.tubelet_fwd(pixels, weight, None, position, out, None, None, 1.0, scale, None, -1)
    out = out[:, :-1] if wrong == "tokens" else out
    weight = weight.mT.contiguous().mT if wrong == "weight" else weight
    position = position[:-1] if wrong == "position" else position
    scale = scale[:-1] if wrong == "scale" else scale
    with pytest.raises(RuntimeError, match="vivit_kernels_native"):
        if wrong == "uint8":
            native.tubelet_video_gradient(out, weight, pixels.byte(), None, -1)
        native.tubelet_fwd(pixels, weight, None, position, out, None, None, 1.0, scale, None, -1)
