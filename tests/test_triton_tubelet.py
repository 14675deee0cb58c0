"""Backend `triton` of tubelet_embedding: the grid of the `torch` backend, and what only a kernel can get wrong."""

import itertools
from typing import ClassVar

import pytest
import torch
from parity_grid import check, grid
from test_tubelet_embedding import AXES, CROSSES, check_case

from vivit_kernels import _triton, tubelet_embedding
from vivit_kernels.tubelet_embedding import api, reference, tiles

triton_kernels = pytest.importorskip("vivit_kernels.tubelet_embedding.triton_kernels", reason="needs Triton")
from vivit_kernels.tubelet_embedding import triton_gather  # noqa: E402

pytestmark = pytest.mark.interpreted
HALVES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("case", grid(AXES | {"dtype": HALVES}, CROSSES))
def test_parity(case, device):
    check_case(case, device, "triton")


def embed(video, *parameters, layout="BCFYX", backend="triton", **options):
    weight, bias, position, token = [*parameters, None, None, None][:4]
    return tubelet_embedding(video, weight, bias, position, token, layout=layout, backend=backend, **options)


def parity(video, parameters, dtype, device, per="clip", **options):
    """Output and every gradient; parameters: weight, bias, position, class token, all there."""
    pixels = video.permute(api._LAYOUTS[options.get("layout", "BCFYX")])
    names = ["tokens", *(["dvideo"] if video.is_floating_point() else []), "dweight", "dbias", "dposition", "dclass"]

    def given(x):
        return (x[0], x[1:]) if video.is_floating_point() else (video, x)

    def defined(*x):
        (clip, rest), mean, std = given(x), options.get("mean"), options.get("std")
        clip = clip.permute(api._LAYOUTS[options.get("layout", "BCFYX")])
        return reference.tubelet_embedding(clip, *rest, per == "frame", *api._normalisation(pixels, mean, std))

    def actual(*x):
        clip, rest = given(x)
        return embed(clip, *rest, class_token_per=per, **options)

    tensors = [*([video] if video.is_floating_point() else []), *parameters]
    do = torch.randn(defined(*tensors).shape, device=device)
    check(actual, defined, tensors, do, dtype, names, terms=parameters[0][0].numel())


def parameters(E, C, tubelet, size, per="clip", device="cpu"):
    T, rows, columns = (n // part for n, part in zip(size, tubelet, strict=True))
    table = rows * columns * (T if per == "clip" else 1) + 1
    shapes = ((E, C, *tubelet), (E,), (1, table, E), (1, 1, E))
    return [torch.randn(shape, device=device) * (0.05 if len(shape) == 5 else 1.0) for shape in shapes]


@pytest.mark.gpu
@pytest.mark.parametrize("x", [16, 14])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_full_size_again_and_again(dtype, x):
    """The benchmark's case, outside the budget on a GPU once: a race, right or wrong with the timing. Other memory at
    every call, and the same bits."""
    size, device = (32, 224, 224), "cuda"
    video = torch.randint(0, 256, (8, 3, *size), dtype=torch.uint8, device=device)
    values = parameters(768, 3, (2, x, x), size, device=device)
    parity(video, values, dtype, device, mean=0.5, std=0.5)
    kept = [[video, *(y.to(dtype) for y in values)]]
    first = embed(*kept[0])
    for _ in range(20):
        kept.append([y.clone() for y in kept[-1]])
        assert torch.equal(embed(*kept[-1]), first)


# Blocks are powers of two: widths below, at and above one, a tail of one column; two blocks of tubelets and a tail.
@pytest.mark.parametrize("E", [1, 16, 65, 192, 257, 768])
@pytest.mark.parametrize("per", ["clip", "frame"])
def test_widths(E, per, device):
    size = (2, 37, 35)
    video = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, device=device)
    parity(video, parameters(E, 3, (2, 4, 4), size, per, device), torch.bfloat16, device, per)


@pytest.mark.parametrize("tile", [tiles.Forward(128, 256, 64, 8, 3), tiles.Forward(32, 256, 16, 4, 2)])
def test_columns_stored_in_halves(tile, device):
    size = (2, 37, 35)
    video = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, device=device)
    with tiles.forced(tile):
        parity(video, parameters(300, 3, (1, 8, 4), size, "frame", device), torch.float16, device, "frame")


# Fewer columns and taps than a block has, a tail of both; even and odd columns, whose rows of the weight lie behind one
# another; rows of 54 bytes, and a weight 2 bytes off, which TMA cannot take.
@pytest.mark.parametrize(
    "E, tubelet, taken", [(40, (1, 8, 4), 1), (300, (2, 4, 4), 1), (24, (1, 7, 14), 1), (24, (1, 3, 3), 0)]
)
@pytest.mark.parametrize("off", [0, 1])
@pytest.mark.parametrize("std", [0.5, [0.5, 0.6, 0.7]])
def test_weights_by_tma(std, off, E, tubelet, taken, device, monkeypatch):
    made = []
    descriptor = triton_kernels.TensorDescriptor
    monkeypatch.setattr(triton_kernels, "TensorDescriptor", lambda *x: made.append(x) or descriptor(*x))
    size = (2, 21, 56)
    video = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, device=device)
    values = [x.bfloat16() for x in parameters(E, 3, tubelet, size, device=device)]
    wide = torch.empty(values[0].numel() + off, dtype=torch.bfloat16, device=device)
    values[0] = wide[off:].view(values[0].shape).copy_(values[0])
    with tiles.forced(tiles.Forward(16, 32, 32, 4, 2, described=True)):
        found = embed(video, *values, std=std)
    copied = std != 0.5 or tubelet[2] == 14
    if _triton.arch_of(video.device) == 90:
        assert len(made) == (taken if copied or not off else 0)
    with tiles.forced(tiles.Forward(16, 32, 32, 4, 2)):
        assert torch.equal(found, embed(video, *values, std=std))


def test_a_launch_made_again_takes_addresses_and_descriptors():
    taken = []

    class Kernel:
        arg_names: ClassVar = ["x", "described"]

        def __getitem__(self, grid):
            return lambda *given, **named: taken.append((*given, *named.values())) or self

    x = torch.zeros(32, 32)
    described = triton_kernels.TensorDescriptor(x, [32, 32], [32, 1], [16, 16])
    launch = _triton.Launch(Kernel(), 1, True)
    for _ in range(2):
        launch(x=launch.take(x), described=launch.take(described))
    assert taken[0][0] is x and taken[1] == (x.data_ptr(), described)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("channels", [1, 2, 4, 5])
@pytest.mark.parametrize("layout", ["BCFYX", "BFYXC"])
def test_channels(channels, layout, dtype, device):
    size = (2, 9, 13)
    video = torch.randint(0, 256, (1, channels, *size), dtype=torch.uint8, device=device)
    video = video.permute(0, 2, 3, 4, 1).contiguous() if layout == "BFYXC" else video
    mean, std = [0.3 + 0.1 * c for c in range(channels)], [0.2 + 0.1 * c for c in range(channels)]
    values = parameters(24, channels, (1, 3, 4), size, device=device)
    parity(video, values, dtype, device, layout=layout, mean=mean, std=std)


# Runs of 14 bytes: even and odd columns are two products where columns come in pairs and rows at multiples of 4 bytes.
@pytest.mark.parametrize("layout", ["BCFYX", "BFYXC"])
@pytest.mark.parametrize("columns, pitch, phases", [(4, 56, 2), (3, 44, 1), (2, 30, 1), (2, 40, 2)])
def test_runs_that_begin_between_words(columns, pitch, phases, layout, device):
    size = (2, 15, columns * 14)
    video = torch.randint(0, 256, (2, 3, *size[:2], pitch), dtype=torch.uint8, device=device)
    video = video.permute(0, 2, 3, 4, 1).contiguous() if layout == "BFYXC" else video
    video = video.narrow(layout.index("X"), 0, size[2])
    values = parameters(24, 3, (2, 7, 14), size, device=device)
    seen = triton_kernels._gathering(video.permute(api._LAYOUTS[layout]), values[0])
    assert seen.phases == phases or layout == "BFYXC"
    with tiles.forced(tiles.Forward(16, 16, 64, 4, 2)):
        parity(video, values, torch.bfloat16, device, layout=layout, std=[0.5, 0.6, 0.7])


@pytest.mark.parametrize("dtype", HALVES)
def test_every_byte_is_exact(dtype, device):
    """Scale 1 and shift -128: a token of a unit weight is a pixel, a gradient of one token is that token's pixels."""
    video = torch.arange(256, dtype=torch.uint8, device=device).view(1, 1, 1, 16, 16)
    weight = torch.eye(256, dtype=dtype, device=device).view(256, 1, 1, 16, 16).requires_grad_()
    tokens = embed(video, weight, mean=128 / 255, std=1 / 255)
    expected = torch.arange(256, device=device) - 128
    assert torch.equal(tokens.view(256).long(), expected)
    (gradient,) = torch.autograd.grad(tokens.sum(), weight)
    assert torch.equal(gradient.view(256, 256).long(), expected.expand(256, 256))


def run_ptx(text, inputs):
    """The registers `$i` and named ones after the straight code of the bytes' conversion, 32 bits each as an int."""
    registers = dict(inputs)

    def value(name):
        return registers[name] if name in registers else int(name, 0)

    def halves(name):
        return [value(name) & 0xFFFF, value(name) >> 16]

    def rounded(dtype, combine, *names):
        numbers = [torch.tensor(halves(name), dtype=torch.uint16).view(dtype).double() for name in names]
        low, high = combine(*numbers).to(dtype).view(torch.uint16).tolist()
        return low | high << 16

    def permuted(a, b, selector):
        pool = value(a) | value(b) << 32
        places = [value(selector) >> 4 * i & 15 for i in range(4)]
        assert max(places) < 8, "no sign is spread"
        return sum((pool >> 8 * place & 255) << 8 * i for i, place in enumerate(places))

    meaning = {
        "mov.b32": value,
        "cvt.u32.u16": value,
        "prmt.b32": permuted,
        "fma.rn.bf16x2": lambda *names: rounded(torch.bfloat16, lambda a, b, c: a * b + c, *names),
        "sub.rn.f16x2": lambda *names: rounded(torch.float16, lambda a, b: a - b, *names),
    }
    code = " ".join(line.partition("//")[0] for line in text.splitlines()).strip(" {}")
    for statement in filter(None, map(str.strip, code.split(";"))):
        opcode, _, operands = statement.partition(" ")
        if opcode != ".reg":
            result, *names = (name.strip() for name in operands.split(","))
            registers[result] = meaning[opcode](*names)
    return registers


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name, dtype", [("_BFLOAT16", torch.bfloat16), ("_FLOAT16", torch.float16)])
def test_bytes_are_converted_in_ptx(name, dtype, count):
    """What no interpreter runs: every byte in every place, beside others, becomes itself less 128, in its place; in
    bfloat16 a 64th of that."""
    unit = 64 if dtype == torch.bfloat16 else 1
    text = getattr(triton_gather, f"{name}_OF_{count}").value
    for byte, place in itertools.product(range(256), range(count)):
        given = [(byte + 77 * (i - place)) % 256 for i in range(count)]
        word = sum(u << 8 * i for i, u in enumerate(given))
        after = run_ptx(text, {f"${count // 2}": word})
        made = [after[f"${i // 2}"] >> 16 * (i % 2) & 0xFFFF for i in range(count)]
        found = torch.tensor(made, dtype=torch.uint16).view(dtype)
        assert found.tolist() == [(u - 128) / unit for u in given]


# Grids that no rectangle of tubelets fills, of one column, with fewer frames than a step has room for.
@pytest.mark.parametrize("splits", [1, 3, 50])
@pytest.mark.parametrize("grid", [(1, 5, 3), (5, 7, 1), (3, 2, 9), (2, 4, 4), (1, 1, 1)])
def test_rectangles_and_parts_of_the_weight_gradient(grid, splits, device):
    size = tuple(n * part for n, part in zip(grid, (2, 4, 4), strict=True))
    video = torch.rand(3, 3, *size, device=device)
    with tiles.forced(tiles.Backward(32, 32, 64, 4, 2, splits)):
        parity(video, parameters(24, 3, (2, 4, 4), size, device=device), torch.bfloat16, device)


def test_rectangles_fill_what_can_be_filled():
    for frames, rows, columns in itertools.product([1, 8, 16, 128], [1, 7, 14, 16, 24], [1, 7, 8, 14, 24]):
        for block_m in (16, 32, 64, 128):
            tall, wide = tiles.abreast(frames, rows, columns, block_m)
            assert block_m % (tall * wide) == 0
            if frames * min(2, rows & -rows) * min(2, columns & -columns) % block_m == 0:
                assert rows % tall == 0 and columns % wide == 0 and frames % (block_m // (tall * wide)) == 0


def test_plans_are_of_a_call_not_of_its_tensors(device):
    """Same shapes, other numbers; the same memory 2 bytes further on; another tile; other constants."""
    size, tubelet = (2, 8, 8), (1, 4, 4)
    wide = torch.randint(0, 256, (2 * 3 * 2 * 64 + 16,), dtype=torch.uint8, device=device)
    videos = [wide[at : at + 768].view(2, 3, *size) for at in (0, 16, 2, 1)]
    values = parameters(24, 3, tubelet, size, device=device)
    for video, rows in itertools.product(videos, (16, 32)):
        for std in (0.5, 0.25):
            with tiles.forced(tiles.Forward(rows, 16, 16, 4, 1)):
                found = embed(video, *values, std=std)
            torch.testing.assert_close(found, embed(video, *values, std=std, backend="torch"))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("layout", ["BCFYX", "BFCYX", "BFYXC"])
@pytest.mark.parametrize("normalise", [{}, {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}])
def test_nothing_around_the_video_is_read(normalise, layout, dtype, device):
    """Every margin of the video is NaN, and so are the pixels that fill no tubelet: one of them read would show."""
    size, tubelet = (5, 18, 26), (2, 4, 8)
    inside = torch.rand(2, 3, *size, device=device)
    video = torch.full((3, 5, *(n + 3 for n in size)), float("nan"), device=device, dtype=dtype)
    order = api._LAYOUTS[layout]
    inverse = [order.index(i) for i in range(5)]
    clip = (
        video.permute(inverse).contiguous().permute(order)[:2, 1:4, 1 : 1 + size[0], 2 : 2 + size[1], 1 : 1 + size[2]]
    )
    clip.copy_(inside)
    for dim, n, part in zip((2, 3, 4), size, tubelet, strict=True):
        clip.narrow(dim, n // part * part, n % part).fill_(float("nan"))
    values = parameters(24, 3, tubelet, size, device=device)
    parity(clip.permute(inverse), values, dtype, device, layout=layout, **normalise)


@pytest.mark.parametrize("dtype", HALVES)
def test_nothing_around_the_parameters_or_the_gradient_is_read(dtype, device):
    size, tubelet = (2, 12, 12), (1, 4, 4)
    video = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, device=device)
    values = [x.to(dtype) for x in parameters(40, 3, tubelet, size, device=device)]

    def poisoned(x):
        wide = torch.full([n + 2 for n in x.shape], float("nan"), dtype=x.dtype, device=device)
        inner = wide[tuple(slice(1, n + 1) for n in x.shape)]
        return inner.copy_(x)

    do = torch.randn(embed(video, *values).shape, device=device).to(dtype)
    results = []
    for wrap in (poisoned, torch.clone):
        leaves = [wrap(x).detach().requires_grad_() for x in values]
        tokens = embed(video, *leaves)
        results.append([tokens, *torch.autograd.grad(tokens, leaves, wrap(do))])
    for found, clean in zip(*results, strict=True):
        assert torch.equal(found, clean)


@pytest.mark.parametrize("per", ["clip", "frame"])
def test_twice_the_same_bits(per, device):
    size, tubelet = (4, 24, 24), (2, 4, 4)
    video = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, device=device)
    values = [x.bfloat16().requires_grad_() for x in parameters(24, 3, tubelet, size, per, device)]
    tile = tiles.Backward(16, 16, 64, 4, 2, splits=3)  # several parts, whose order must not matter

    def once():
        tokens = embed(video, *values, class_token_per=per)
        do = torch.linspace(-1, 1, tokens.numel(), device=device).view(tokens.shape).bfloat16()
        with tiles.forced(tile):
            return [tokens, *torch.autograd.grad(tokens, values, do)]

    for one, other in zip(once(), once(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("splits", [1, 2, 5, 1000])
def test_parts_of_the_weight_gradient(splits, device):
    size = (2, 20, 28)
    video = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, device=device)
    with tiles.forced(tiles.Backward(16, 32, 32, 4, 2, splits)):
        parity(video, parameters(40, 3, (2, 4, 4), size, device=device), torch.bfloat16, device)


@pytest.mark.parametrize("wanted", range(5))
def test_one_gradient_alone(wanted, device):
    """What is not wanted is not computed, and does not change what is."""
    size, tubelet = (2, 8, 12), (1, 4, 4)
    tensors = [torch.rand(2, 3, *size, device=device), *parameters(24, 3, tubelet, size, device=device)]
    do = torch.randn(2, 13, 24, device=device)

    def gradients(leaves, backend):
        tokens = embed(*tensors, backend=backend, mean=0.5, std=0.25)
        return torch.autograd.grad(tokens, leaves, do)

    together = gradients([x.requires_grad_() for x in tensors], "triton")[wanted]
    for i, x in enumerate(tensors):
        x.requires_grad_(i == wanted)
    assert torch.equal(gradients([tensors[wanted]], "triton")[0], together)


def test_expanded_gradient_and_expanded_parameters(device):
    """sum() sends a gradient of strides 0; a position that all tokens share has strides 0 too."""
    size, tubelet = (2, 8, 8), (1, 4, 4)
    video = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, device=device)
    weight, bias, position, token = parameters(24, 3, tubelet, size, device=device)
    leaves = [weight.transpose(3, 4), bias[:1].expand(24), position[:, :1].expand(1, 9, 24), token]
    leaves = [x.detach().requires_grad_() for x in leaves]
    results = {}
    for backend in ("triton", "torch"):
        tokens = embed(video, *leaves, backend=backend)
        results[backend] = [tokens, *torch.autograd.grad(tokens.sum(), leaves)]
    for one, other in zip(*results.values(), strict=True):
        torch.testing.assert_close(one, other)


def test_no_clip(device):
    weight = torch.randn(8, 3, 1, 4, 4, device=device, requires_grad=True)
    tokens = embed(torch.zeros(0, 3, 2, 8, 8, dtype=torch.uint8, device=device), weight)
    assert tokens.shape == (0, 8, 8)
    assert torch.equal(torch.autograd.grad(tokens.sum(), weight)[0], torch.zeros_like(weight))


@pytest.mark.parametrize("kind", ["uint8", "float32"])
@pytest.mark.parametrize("per", ["clip", "frame"])
def test_opcheck(kind, per, device):
    size, tubelet = (2, 8, 8), (1, 4, 4)
    video = torch.randint(0, 256, (2, 2, *size), dtype=torch.uint8, device=device)
    video = video if kind == "uint8" else (video / 255).requires_grad_()
    values = [x.requires_grad_() for x in parameters(8, 2, tubelet, size, per, device)]
    arguments = (video, *values, per == "frame", [0.5, 0.25], [-1.0, 0.5], "triton")
    torch.library.opcheck(torch.ops.vivit_kernels.tubelet_embedding_fwd, arguments)


def test_float64_is_refused(device):
    with pytest.raises(NotImplementedError, match="float64 is not one of float16, bfloat16, float32"):
        embed(torch.zeros(1, 3, 2, 8, 8, device=device), torch.zeros(8, 3, 1, 4, 4, dtype=torch.float64, device=device))


@pytest.mark.parametrize("arch", [None, 80, 90, 100, 120])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_keep_their_promises(itemsize, arch):
    """Powers of two that the hardware can multiply, at most 64 MiB of parts, stages that fit; one direction forced."""
    for clips, E, (x, X) in itertools.product([0, 1, 8, 200], [1, 24, 768, 1280], [(16, 224), (14, 224), (7, 40)]):
        facts = (clips, 3, 32, 224, X, (2, x, x), E)
        pixels = itertools.product((("forward", tiles.Forward), ("backward", tiles.Backward)), (1, 2, 4))
        for (direction, kind), pixel_bytes in pixels:
            chosen = tiles.choose(*facts, direction, itemsize, pixel_bytes, arch)
            for tile in [chosen, *tiles.candidates(*facts, direction, itemsize, pixel_bytes, arch)]:
                assert isinstance(tile, kind)
                blocks = [tile.block_m, tile.block_e, tile.block_k]
                assert all(n >= 16 and n & (n - 1) == 0 for n in blocks)
                assert all(1 <= tile.stages(size, itemsize, arch or 90) <= tile.num_stages for size in (1, 2, 4))
                if isinstance(tile, tiles.Backward):
                    padded = E * 3 * 2 * x * (x + 2) * 2
                    assert tile.splits == 1 or tile.splits * E * 3 * 2 * x * x * 4 <= 64 << 20
                    assert x != 14 or tile.splits == 1 or tile.splits * padded * 4 <= 64 << 20
            with tiles.forced(tiles.Forward(16, 16, 16, 4, 1)):
                forced = tiles.current(*facts, direction, itemsize, pixel_bytes, arch)
                assert forced == (chosen if direction == "backward" else tiles.Forward(16, 16, 16, 4, 1))
