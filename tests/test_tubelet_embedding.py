"""tubelet_embedding against its reference in float64, and against Conv3d + flatten + concatenation + position."""

import numpy as np
import pytest
import torch
from parity_grid import DTYPES, check, grid

from vivit_kernels import tubelet_embedding
from vivit_kernels.tubelet_embedding import api, reference

LAYOUTS = {"BCFYX": (0, 1, 2, 3, 4), "BFCYX": (0, 2, 1, 3, 4), "BFYXC": (0, 2, 3, 4, 1)}  # from [B, C, F, Y, X]
AXES = {
    "dtype": DTYPES,
    "video": ["uint8", "same", "float32"],
    "tubelet": [(2, 4, 4), (1, 8, 4), (3, 5, 7), (2, 14, 14)],
    "size": [(1, 3, 6, 28, 28), (2, 1, 7, 30, 33), (3, 4, 4, 16, 45)],
    "layout": list(LAYOUTS),
    "rows": ["clip+token", "clip", "frame+token", "frame"],
    "position": [True, False],
    "bias": [True, False],
    "normalise": [None, "common", "per channel"],
    "strides": ["contiguous", "cropped"],
}
CROSSES = [["dtype", "video", "layout", "rows", "normalise"], ["tubelet", "size", "video", "layout", "strides"]]


def make_video(case, device):
    """[B, C, F, Y, X] values, uint8 or floating point, laid out and strided as the case asks."""
    B, C, F, Y, X = case["size"]
    if case["video"] == "uint8":
        video = torch.randint(0, 256, (B, C, F, Y, X + 3), dtype=torch.uint8, device=device)
    else:
        video = torch.rand(B, C, F, Y, X + 3, device=device)
    video = video.permute(LAYOUTS[case["layout"]]).contiguous()
    crop = video.narrow(case["layout"].index("X"), 2, X)  # its neighbours are other pixels
    return crop if case["strides"] == "cropped" else crop.contiguous()


def make_parameters(case, grid, device):
    C, (T, rows, columns), E = case["size"][1], grid, case.get("E", 24)
    per, token = case["rows"].split("+")[0], "token" in case["rows"]
    tokens = rows * columns * (T if per == "clip" else 1) + token
    weight = torch.randn(E, C, *case["tubelet"], device=device) * 0.05
    bias = torch.randn(E, device=device) if case["bias"] else None
    position = torch.randn(1, tokens, E, device=device) if case["position"] else None
    return per, [weight, bias, position, torch.randn(1, 1, E, device=device) if token else None]


@pytest.mark.parametrize("case", grid(AXES, CROSSES))
def test_parity(case, device):
    check_case(case, device, "torch")


def check_case(case, device, backend):
    case = case | {"tubelet": tuple(min(a, b) for a, b in zip(case["tubelet"], case["size"][2:], strict=True))}
    C = case["size"][1]
    video = make_video(case, device)
    if case["video"] == "same":
        video = video.to(case["dtype"])
    sizes = [n // t for n, t in zip(case["size"][2:], case["tubelet"], strict=True)]
    per, parameters = make_parameters(case, sizes, device)
    present = [x is not None for x in parameters]
    mean, std = {
        None: (None, None),
        "common": (0.45, 0.3),
        "per channel": ([0.4, 0.5, 0.3, 0.6][:C], [0.2, 0.3, 0.25, 0.4][:C]),
    }[case["normalise"]]

    def fill(values):
        values = iter(values)
        weight = next(values)
        bias, position, token = (next(values) if there else None for there in present[1:])
        return weight, bias, position, token

    def actual(*x):
        pixels, x = (x[0], x[1:]) if video.is_floating_point() else (video, x)
        return tubelet_embedding(
            pixels, *fill(x), class_token_per=per, mean=mean, std=std, layout=case["layout"], backend=backend
        )

    def defined(*x):
        pixels, x = (x[0], x[1:]) if video.is_floating_point() else (video, x)
        pixels = pixels.permute(api._LAYOUTS[case["layout"]])
        return reference.tubelet_embedding(pixels, *fill(x), per == "frame", *api._normalisation(pixels, mean, std))

    tensors = ([video] if video.is_floating_point() else []) + [x for x in parameters if x is not None]
    names = ["tokens"] + (["dvideo"] if video.is_floating_point() else [])
    names += [n for n, there in zip(["dweight", "dbias", "dposition", "dclass"], present, strict=True) if there]
    rows = sizes[1] * sizes[2]
    shape = (
        case["size"][0],
        *((sizes[0], rows + present[3]) if per == "frame" else (sizes[0] * rows + present[3],)),
        case.get("E", 24),
    )
    terms = parameters[0][0].numel()
    check(actual, defined, tensors, torch.randn(shape, device=device), case["dtype"], names, terms=terms)


def test_equals_conv3d_flatten_cat_position():
    video = torch.randn(2, 3, 7, 17, 25, dtype=torch.float64)
    weight, bias = torch.randn(8, 3, 2, 4, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    cls, position = torch.randn(1, 1, 8, dtype=torch.float64), torch.randn(1, 3 * 4 * 3 + 1, 8, dtype=torch.float64)
    tokens = torch.nn.functional.conv3d(video, weight, bias, stride=(2, 4, 8)).flatten(2).transpose(1, 2)
    expected = torch.cat([cls.expand(2, 1, 8), tokens], 1) + position
    torch.testing.assert_close(tubelet_embedding(video, weight, bias, position, cls), expected)


def test_uint8_is_vivits_range():
    """uint8 without mean and std is x / 127.5 - 1 (vivit_spec: never the double normalisation)."""
    video = torch.randint(0, 256, (1, 3, 2, 8, 8), dtype=torch.uint8)
    weight = torch.randn(4, 3, 2, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(tubelet_embedding(video, weight), tubelet_embedding(video.double() / 127.5 - 1, weight))


def test_only_the_video_and_parameters_are_kept():
    saved = []
    video = torch.randint(0, 256, (2, 3, 4, 16, 16), dtype=torch.uint8)
    weight = torch.randn(8, 3, 2, 4, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        tubelet_embedding(video, weight)
    assert {x.data_ptr() for x in saved} == {video.data_ptr(), weight.data_ptr()}


def test_rows_of_fewer_digits_are_added_in_the_weights():
    """A class token and positions in bfloat16 beside a float32 weight: their sum is not rounded to bfloat16."""
    video, weight = torch.rand(1, 3, 2, 8, 8), torch.randn(8, 3, 2, 4, 4)
    token, position = torch.randn(1, 1, 8).bfloat16(), torch.randn(1, 5, 8).bfloat16()
    found = tubelet_embedding(video, weight, None, position, token, backend="torch")
    assert torch.equal(found[0, 0], token[0, 0].float() + position[0, 0].float())


def test_no_clips_at_all():
    video, weight = torch.rand(0, 3, 2, 8, 8, requires_grad=True), torch.randn(8, 3, 2, 4, 4, requires_grad=True)
    defined = reference.tubelet_embedding(video, weight, None, None, None, False, [1.0] * 3, [0.0] * 3)
    found = tubelet_embedding(video, weight)
    assert found.shape == defined.shape == (0, 4, 8)
    dvideo, dweight = torch.autograd.grad(found.sum(), (video, weight))
    assert dvideo.shape == video.shape and not dweight.any()


def test_means_come_as_numpy_and_torch_give_them():
    video, weight = torch.randint(0, 256, (1, 3, 2, 8, 8), dtype=torch.uint8), torch.randn(8, 3, 2, 4, 4)
    expected = tubelet_embedding(video, weight, mean=0.5, std=[0.25, 0.5, 0.125])
    for std in (np.array([0.25, 0.5, 0.125]), torch.tensor([0.25, 0.5, 0.125])):
        for mean in (np.float32(0.5), np.array(0.5), torch.tensor(0.5)):
            assert torch.equal(tubelet_embedding(video, weight, mean=mean, std=std), expected)  # pyright: ignore[reportArgumentType]
