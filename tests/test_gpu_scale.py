"""What only a GPU shows of this project's kernels: sizes beyond 32 bits, other streams, captured graphs."""

from __future__ import annotations

import fcntl
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vivit_kernels import (
    _environment,
    factorized_attention,
    joint_attention,
    spatial_attention,
    temporal_attention,
    tubelet_embedding,
)
from vivit_kernels.numerics import judge
from vivit_kernels.tubelet_embedding import api, reference

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
BACKENDS = ["triton", "cuda"]
BF16 = torch.bfloat16
LIMIT = 2**31

Call = Callable[[list[Tensor], str], Tensor]


def attending(function, **options) -> Call:
    return lambda x, backend: function(x[0], backend=backend, **options)


ATTENTION: dict[str, Call] = {
    "temporal": attending(temporal_attention),
    "spatial": attending(spatial_attention),
    "model 4": attending(factorized_attention, temporal_heads=6),
    "joint": attending(joint_attention),
}


def embed(x: list[Tensor], backend: str) -> Tensor:
    return tubelet_embedding(*x, mean=0.5, std=0.25, backend=backend)


@pytest.fixture
def memory(tmp_path_factory):
    """The GPU's memory: tests that want tens of GB of it wait for each other, in whichever processes they run."""
    with open(tmp_path_factory.getbasetemp().parent / "gpu_memory.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=BF16, device=DEVICE)


def like_output(qkv: Tensor) -> Tensor:
    return normal(*qkv.select(-3, 0).shape)


def step(call: Call, inputs: list[Tensor], do: Tensor, backend: str) -> list[Tensor]:
    """[output, *gradients of the floating-point inputs]; skips where the backend has no kernel for the call."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    try:
        output = call(leaves, backend)
    except NotImplementedError as refusal:
        if backend == "triton" and _environment.HAS_TRITON:
            raise  # it has one for every call here
        pytest.skip(str(refusal))
    return [output.detach(), *torch.autograd.grad(output, [x for x in leaves if x.requires_grad], do)]


def is_finite(x: Tensor) -> bool:
    return all(bool(part.isfinite().all()) for part in x.reshape(-1).split(2**28))


# ---- beyond 32 bits ----


# The clips of such a call, and then the last two of them alone: what is read or written elsewhere differs, or is NaN.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "op, clips, tokens",
    [
        ("temporal", None, (16, 196)),
        ("spatial", None, (16, 104)),  # 107,000 sequences
        ("joint", None, (1000,)),
        ("temporal", 17_000, (16, 2)),  # 204,000 pairs of clip and head; a dimension of a grid may have 65,535
        ("joint", 5_500, (104,)),
    ],
    ids=["temporal", "spatial", "joint", "temporal-sequences", "joint-sequences"],
)
def test_more_elements_or_sequences_than_an_index_may_have(op, clips, tokens, backend, memory):
    shape = (*tokens, 3, 12, 64)
    clips = clips or LIMIT // math.prod(shape) + 2
    assert clips * math.prod(shape) > LIMIT or clips * 12 > 65_535
    qkv = normal(clips, *shape)
    do = like_output(qkv)
    found = step(ATTENTION[op], [qkv], do, backend)
    alone = step(ATTENTION[op], [qkv[-2:].clone()], do[-2:].clone(), backend)
    for whole, part in zip(found, alone, strict=True):
        assert torch.equal(whole[-2:], part)
        assert is_finite(whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_pixels_and_more_tokens_than_an_index_may_have(backend, memory):
    """A gradient of zeros but at the last two clips: parameters' gradients are those of these clips alone."""
    size, tubelet, E = (3, 32, 224, 224), (2, 16, 16), 768
    clips = LIMIT // (3136 * E) + 2
    video = torch.randint(0, 256, (clips, *size), dtype=torch.uint8, device=DEVICE)
    values = [normal(E, 3, *tubelet) * 0.02, normal(E)]
    do = torch.zeros(clips, 3136, E, dtype=BF16, device=DEVICE)
    do[-2:].normal_()
    assert min(video.numel(), do.numel()) > LIMIT
    tokens, *found = step(embed, [video, *values], do, backend)
    assert is_finite(tokens)
    last = video[-2:].clone()
    scale, shift = api._normalisation(last, 0.5, 0.25)

    def defined(x: list[Tensor], _: str) -> Tensor:
        return reference.tubelet_embedding(x[0], x[1], x[2], None, None, False, scale, shift)

    exact = step(defined, [last, *(x.double() for x in values)], do[-2:].double(), "")
    eager = step(defined, [last, *values], do[-2:], "")
    for i, x in enumerate([tokens[-2:], *found]):
        verdict = judge(x, exact[i], eager[i], gradient=i > 0, terms=values[0][0].numel() if i == 0 else 1)
        assert verdict.ok, f"{('tokens', 'dweight', 'dbias')[i]}: {verdict}"


# ---- streams and graphs ----

SHAPES = {"temporal": (2, 16, 196), "model 4": (2, 16, 104), "joint": (2, 1000)}


def problem(op: str) -> tuple[Call, list[Tensor], Tensor]:
    """(call, its inputs, a gradient of its output)"""
    if op == "tubelet":
        video = torch.randint(0, 256, (2, 3, 4, 64, 64), dtype=torch.uint8, device=DEVICE)
        return embed, [video, normal(64, 3, 2, 16, 16) * 0.02, normal(64)], normal(2, 32, 64)
    qkv = normal(*SHAPES[op], 3, 12, 64)
    return ATTENTION[op], [qkv], like_output(qkv)


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", [*SHAPES, "tubelet"])
def test_another_stream(op, backend):
    """The inputs come late on a stream of their own, which waits for nobody and for which nobody waits."""
    call, inputs, do = problem(op)
    expected = step(call, inputs, do, backend)  # what is compiled has been compiled
    late = [torch.zeros_like(x) for x in (*inputs, do)]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # cycles, some 30 ms: whatever is launched on another stream runs before
        for x, there in zip(late, (*inputs, do), strict=True):
            x.copy_(there)
        found = step(call, late[:-1], late[-1], backend)
    side.synchronize()
    assert same(found, expected)


def captured(function: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("op", [*SHAPES, "tubelet"])
def test_a_captured_graph_takes_new_data(op, training, backend):
    call, inputs, do = problem(op)

    def once() -> list[Tensor]:
        if training:
            return step(call, inputs, do, backend)
        with torch.no_grad():
            return [call(inputs, backend)]

    step(call, inputs, do, backend)  # skips, before any capture, where there is no kernel
    graph, results = captured(once)
    for _ in range(2):
        for x in (*inputs, do):
            x.normal_() if x.is_floating_point() else x.random_(0, 256)
        for x in results:
            x.zero_()
        graph.replay()
        assert same(results, once())
