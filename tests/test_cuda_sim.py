"""The host simulator of CUDA (tests/cuda_sim): its verbs against numpy and PyTorch, and the mistakes that it must find.

Fragment layouts are written here a second time, from the PTX manual (9.7.14): lane 4 g + t.
"""

import threading

import cuda_simulator
import numpy as np
import pytest
import torch
from cuda_simulator import expect, view

VERBS = ["multiply_add", "transposed", "load_blocks", "load_blocks_transposed", "packed", "unpacked", "exp2", "lane"]
FAULTS = ["none", "no barrier", "no wait", "waits too little", "wrong lane", "barrier in a branch", "verb in a branch"]
FAULTS += ["returns early", "reads beyond", "misaligned", "shared beyond", "copy beyond", "writes input"]
FAULTS += ["writes twice", "no warp barrier"]
DTYPES = [torch.bfloat16, torch.float16]
SEEDS = range(6)
LANES = np.arange(32)
G, T = LANES // 4, LANES % 4


def one_verb(name: str, words: np.ndarray, dtype=torch.bfloat16, mask: int = 0) -> np.ndarray:
    """uint32 [32, up to 12] in a warp's registers -> [32, 4]."""
    given = torch.zeros(32, 12, dtype=torch.int32)
    given[:, : words.shape[1]] = torch.from_numpy(words.astype(np.uint32).view(np.int32))
    found = torch.empty(32, 4, dtype=torch.int32)
    cuda_simulator.made().one_verb(VERBS.index(name), dtype == torch.float16, view(given), view(found), mask)
    return found.numpy().view(np.uint32)


def bits(x: torch.Tensor) -> np.ndarray:
    """The 16 or 32 bits of each number, as uint32."""
    if x.element_size() == 4:
        return x.contiguous().view(torch.int32).numpy().view(np.uint32)
    return x.contiguous().view(torch.int16).numpy().view(np.uint16).astype(np.uint32)


def pairs(matrix: np.ndarray, rows: np.ndarray, columns: np.ndarray, down: bool = False) -> np.ndarray:
    """Words of two neighbours of a matrix of 16 bits, along a row or down a column."""
    second = matrix[rows + 1, columns] if down else matrix[rows, columns + 1]
    return matrix[rows, columns] | second << 16


@pytest.mark.parametrize("dtype", DTYPES)
def test_multiply_add(dtype):
    """Small whole numbers: every order of the sum gives the same."""
    a, b = torch.randint(-8, 9, (16, 16)).to(dtype), torch.randint(-8, 9, (16, 8)).to(dtype)
    c = torch.randint(-1000, 1000, (16, 8)).float()
    of_a = [pairs(bits(a), G + 8 * (i % 2), 2 * T + 8 * (i // 2)) for i in range(4)]
    of_b = [pairs(bits(b), 2 * T + 8 * i, G, down=True) for i in range(2)]
    places = [(G + 8 * (i // 2), 2 * T + i % 2) for i in range(4)]
    found = one_verb("multiply_add", np.stack([*of_a, *of_b, *(bits(c)[place] for place in places)], 1), dtype)
    d = np.zeros((16, 8), np.float32)
    for i, place in enumerate(places):
        d[place] = found[:, i].view(np.float32)
    assert np.array_equal(d, (a.float() @ b.float() + c).numpy())


def random_bits(*shape: int) -> np.ndarray:
    return torch.randint(0, 1 << 16, shape).numpy().astype(np.uint32)


def test_transposed():
    block = random_bits(8, 8)
    found = one_verb("transposed", pairs(block, G, 2 * T)[:, None])
    assert np.array_equal(found[:, 0], pairs(block.T, G, 2 * T))


@pytest.mark.parametrize("name", ["load_blocks", "load_blocks_transposed"])
@pytest.mark.parametrize("mask", [0, 5, 31])
def test_load_blocks(name, mask):
    """Lane 8 i + r brings row r of block i; the lane that reads names the place, whatever it is."""
    blocks = random_bits(4, 8, 8)
    rows = blocks.reshape(32, 8)
    found = one_verb(name, rows[:, ::2] | rows[:, 1::2] << 16, mask=mask)
    for i, block in enumerate(blocks):
        assert np.array_equal(found[:, i], pairs(block.T if name.endswith("transposed") else block, G, 2 * T))


@pytest.mark.parametrize("mask", [1, 2, 4, 31])
def test_from_lane_xor(mask):
    words = random_bits(32, 2)
    found = one_verb("lane", words, mask=mask)
    assert np.array_equal(found[:, :2], words[LANES ^ mask])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_pytorchs(dtype):
    """Of every size, ties, the largest numbers, subnormal ones, infinities and NaN."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = torch.cat([every, (every[:-1] + every[1:]) / 2, torch.randn(1024) * torch.logspace(-12, 8, 1024)])
    every = torch.cat([every, torch.zeros(-every.numel() % 64)]).view(-1, 32, 2)
    for numbers in every[:: 1 if dtype == torch.float16 else 7]:
        found = one_verb("packed", bits(numbers), dtype)[:, 0]
        rounded = torch.from_numpy(np.stack([found & 0xFFFF, found >> 16], 1).astype(np.uint16).view(np.int16))
        expected = numbers.to(dtype)
        nan = expected.isnan()
        assert torch.equal(rounded.view(dtype).isnan(), nan)
        assert torch.equal(rounded[~nan], expected.view(torch.int16)[~nan])


@pytest.mark.parametrize("dtype", DTYPES)
def test_widening_is_pytorchs(dtype):
    every = np.arange(1 << 16, dtype=np.uint32).reshape(-1, 32, 2)
    for words in every[::5]:
        found = torch.from_numpy(
            one_verb("unpacked", (words[:, :1] | words[:, 1:] << 16), dtype)[:, :2].view(np.float32)
        )
        expected = torch.from_numpy(words.astype(np.uint16).view(np.int16)).view(dtype).float()
        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert torch.equal(found.signbit() | found.isnan(), expected.signbit() | expected.isnan())


def test_exp2_has_no_subnormal_numbers():
    x = torch.tensor([0.0, 1.0, -1.0, -126.0, -126.5, -149.0, -1000.0, 1e-40, 128.0, float("-inf"), float("nan")])
    x = torch.cat([x, torch.linspace(-125, 125, 21)])[:, None]
    found = torch.from_numpy(one_verb("exp2", bits(x))[:, :1].view(np.float32))
    expected = torch.exp2(x.double()).float()
    expected[expected < 2.0**-126] = 0
    assert found[7] == 1 and found[9] == 0 and found[10].isnan() and (found[4:7] == 0).all() and found[3] > 0
    assert (found[:10].view(torch.int32) - expected[:10].view(torch.int32)).abs().max() <= 2
    assert (found[11:].view(torch.int32) - expected[11:].view(torch.int32)).abs().max() <= 2


# ---- kernels ----


def product(fault: str = "none", dtype=torch.bfloat16, seed: int = 0, K: int = 80) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the kernel finds, what is right), of whole numbers."""
    a, b = torch.randint(-8, 9, (64, K)).to(dtype), torch.randint(-8, 9, (16, K)).to(dtype)
    c = torch.full((64, 16), float("nan"))
    cuda_simulator.made().product(FAULTS.index(fault), dtype == torch.float16, view(a), view(b), view(c), seed)
    return c, a.float() @ b.float().T


def softmax(fault: str = "none", seed: int = 0, rows: int = 10, shared_bytes: int = 227 << 10):
    x = torch.randn(rows, 128)
    y = torch.full((rows, 128), float("nan"))
    cuda_simulator.made().softmax(FAULTS.index(fault), view(x), view(y), seed, shared_bytes)
    return y, torch.softmax(x.double() * np.log(2), -1).float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [16, 32, 80])
def test_the_product_is_right_in_every_order(dtype, K):
    for seed in SEEDS:
        found, right = product(dtype=dtype, seed=seed, K=K)
        assert torch.equal(found, right)


@pytest.mark.parametrize("rows", [1, 4, 10])
def test_the_softmax_is_the_same_in_every_order(rows):
    runs = []
    for seed in SEEDS:
        torch.manual_seed(1)
        found, right = softmax(seed=seed, rows=rows)
        torch.testing.assert_close(found, right)
        runs.append(found)
    assert all(torch.equal(run, runs[0]) for run in runs)


# What the simulator says of a mistake, under every seed.
NAMED = [
    (product, "no barrier", "no barrier lies between|still being copied"),
    (product, "no wait", "load_blocks .* still being copied to by thread .* copy_16"),
    (product, "waits too little", "load_blocks .* still being copied to by thread .* copy_16"),
    (product, "barrier in a branch", "nobody can go on|no barrier lies between|ended|still being copied"),
    (product, "verb in a branch", "multiply_add .*not reached by all lanes of the warp together"),
    (product, "returns early", "ended|thread ends"),
    (product, "reads beyond", r"copy_16 \(examples.cuh:\d+\): reads 16 bytes .* bytes behind the end of b"),
    (product, "misaligned", "copy_16 .* not a multiple of 16: byte .* of a"),
    (product, "copy beyond", "copy_16 .* not in the .* bytes of shared memory"),
    (product, "writes input", "store_16 .*writes 16 bytes that are not all in a row of an output"),
    (product, "writes twice", "store_one .*writes a second time"),
    (softmax, "shared beyond", "the block wrote outside of its .* bytes of shared memory"),
]


@pytest.mark.parametrize("kernel, fault, found", NAMED, ids=[f"{k.__name__}-{f}" for k, f, _ in NAMED])
def test_a_mistake_is_named(kernel, fault, found):
    for seed in SEEDS:
        with expect(found):
            kernel(fault, seed=seed)
    result, right = kernel()  # what was left of the failed runs harms nobody
    torch.testing.assert_close(result, right)


@pytest.mark.parametrize(
    "kernel, fault",
    [(product, "wrong lane"), (softmax, "no wait"), (softmax, "no barrier"), (softmax, "no warp barrier")],
)
def test_a_mistake_in_plain_accesses_shows_in_the_result(kernel, fault):
    wrong = []
    for seed in SEEDS:
        result, right = kernel(fault, seed=seed)
        wrong.append(not torch.allclose(result, right))
    assert any(wrong)


def test_a_launch_is_refused_as_a_gpu_refuses_it():
    softmax(shared_bytes=2560)
    with expect("cudaError_t 1"):
        softmax(shared_bytes=2559)
    with expect("cudaError_t 9"):
        softmax(rows=0)


def test_several_threads_of_python():
    """One machine, which they use in turn."""
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(5):
            found, right = product(seed=seed)
            if not torch.equal(found, right):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in SEEDS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
