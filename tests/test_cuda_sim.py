"""The host simulator of CUDA (tests/cuda_sim): its verbs against numpy and PyTorch, and the mistakes that it must find.

Fragment layouts are written here a second time, from the PTX manual (9.7.14): lane 4 g + t.
"""

import threading

import cuda_simulator
import numpy as np
import pytest
import tf32
import torch
from cuda_simulator import expect, view

VERBS = ["multiply_add", "transposed", "load_blocks", "load_blocks_transposed", "packed", "unpacked", "exp2", "lane"]
VERBS += ["as_tf32", "multiply_add_tf32", "lanes where", "fours", "fours at once", "fours too early"]
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


def test_rounding_to_tf32():
    """Of every size, and ties; infinities stay, and NaN."""
    x = torch.randn(4096) * torch.logspace(-30, 30, 4096)
    ties = (torch.arange(64, dtype=torch.int32) * 0x1000 + 0x3F800000).view(torch.float32)
    for part in torch.cat([x, ties, -ties]).split(32):
        found = one_verb("as_tf32", bits(part)[:, None])[:, 0].view(np.float32)
        assert np.array_equal(found, tf32.rounded(part).numpy())
    ends = torch.full((32,), float("inf"))
    ends[1::2] = float("nan")
    found = one_verb("as_tf32", bits(ends)[:, None])[:, 0].view(np.float32)
    assert np.isinf(found[::2]).all() and np.isnan(found[1::2]).all()


def test_multiply_add_of_tf32():
    a, b = torch.randint(-1000, 1001, (16, 8)).float(), torch.randint(-1000, 1001, (8, 8)).float()
    c = torch.randint(-1000, 1000, (16, 8)).float()
    of_a = [bits(a)[G + 8 * (i % 2), T + 4 * (i // 2)] for i in range(4)]
    of_b = [bits(b)[T + 4 * i, G] for i in range(2)]
    places = [(G + 8 * (i // 2), 2 * T + i % 2) for i in range(4)]
    words = np.stack([*of_a, *of_b, *(bits(c)[place] for place in places)], 1)
    found = one_verb("multiply_add_tf32", words)
    d = np.zeros((16, 8), np.float32)
    for i, place in enumerate(places):
        d[place] = found[:, i].view(np.float32)
    assert np.array_equal(d, (a @ b + c).numpy())
    words[3, 4] |= 1
    with expect("multiply_add_tf32 .*an operand that as_tf32 has not rounded"):
        one_verb("multiply_add_tf32", words)


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


def test_lanes_where():
    words = random_bits(32, 1)
    found = one_verb("lanes where", words)[:, 0]
    assert (found == sum((int(word) & 1) << lane for lane, word in enumerate(words[:, 0]))).all()


@pytest.mark.parametrize("mask", [0, 1, 31])
def test_fours_pass_through_shared_memory(mask):
    words = random_bits(32, 4)
    assert np.array_equal(one_verb("fours", words, mask=mask), words[LANES ^ mask])
    with expect("(written|read) by thread .* at (write|read)_four .*no barrier"):
        one_verb("fours at once", words, mask=mask ^ 2)
    with expect("write_four .*: byte 0 .* read by thread 31 at read_four .*no barrier"):  # and by all lanes before
        one_verb("fours too early", words)


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


# ---- products of a warpgroup ----

ROWS_OF_A, ROWS_OF_B = 144, 160
GROUP_FAULTS = [
    "none",
    "no barrier",
    "no fence",
    "late fence",
    "no begin",
    "writes after begin",
    "no commit",
    "no wait",
]
GROUP_FAULTS += ["waits too little", "copies in flight", "writes in flight", "writes registers", "scales sums"]
GROUP_FAULTS += ["writes too early", "warp missing", "lane missing", "returns early", "barrier in a branch"]
GROUP_FAULTS += ["one thread elsewhere", "wrong phase", "half a step", "reads beyond", "runs over"]


def group_products(
    fault: str = "none", dtype=torch.bfloat16, seed: int = 0, columns: int = 64, first=(0, 0), by_address: bool = False,
    threads: int = 256, arch: int = 90,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(what the kernel finds, what is right) of both products side by side, of whole numbers."""
    rows = -(-threads // 128) * 64

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randint(-8, 9, shape).to(dtype)

    a, b, w, start = numbers(ROWS_OF_A, 64), numbers(ROWS_OF_B, 64), numbers(rows, 32), numbers(rows, 64).float()
    c, d = torch.full((rows, columns), float("nan")), torch.full((rows, 64), float("nan"))
    tensors, half = map(view, (a, b, w, start, c, d)), dtype == torch.float16
    number = GROUP_FAULTS.index(fault)
    cuda_simulator.made().group_products(number, half, *tensors, first, by_address, threads, seed, arch)
    of_a, of_b = (x.float()[at : at + n] for x, at, n in ((a, first[0], rows), (b, first[1], columns)))
    along = w.float() @ b.float()[first[1] : first[1] + 32]
    return torch.cat([c, d], 1), torch.cat([of_a @ of_b.T, start + along], 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [128, 64, 32, 16])
@pytest.mark.parametrize("first", [(0, 0), (16, 32), (8, 24)])
@pytest.mark.parametrize("by_address", [False, True])
def test_products_of_a_warpgroup(dtype, columns, first, by_address):
    for seed in SEEDS:
        found, right = group_products("none", dtype, seed, columns, first, by_address)
        assert torch.equal(found, right)


NAMED_OF_A_GROUP = {
    "no barrier": "no barrier lies between",
    "no fence": "group_across_step .*was written by thread .* at copy_16 .* did not reach group_fence since",
    "late fence": "was fenced by thread .* at group_fence .* no barrier lies between|did not reach group_fence since",
    "no begin": "group_along .*no group_begin since the last group_wait",
    "writes after begin": "group_along .*registers that it adds to were written after group_begin, by thread (0|128)",
    "no commit": r"group_wait .*group_along \(group_examples.cuh:\d+\) was not committed",
    "no wait": "registers .* sums in were written before it was waited for|ends before .* was waited for",
    "waits too little": r"ends before group_along \(group_examples.cuh:\d+\) was waited for",
    "copies in flight": "copy_16 .* is being read by group_along .* which was not waited for",
    "writes in flight": "group_wait .* shared memory was written while group_along .* read it",
    "writes registers": "registers that group_along .* reads were written before it was waited for, by thread 77",
    "scales sums": "registers that group_along .* sums in were written before it was waited for, by thread 77",
    "writes too early": "store_16 .* was read by thread .* at group_across_step .* no barrier lies|is being read",
    "warp missing": "not reached by all threads of the warpgroup together",
    "lane missing": "not reached by all threads of the warpgroup together",
    "returns early": "not reached by all threads of the warpgroup together|ended|thread ends",
    "barrier in a branch": "not reached by all threads of the warpgroup together|wait at a verb of all its threads",
    "one thread elsewhere": "thread 0 and thread 77 name different descriptors",
    "wrong phase": "group_across_step .*an operand starts at row 3 of eight",
    "half a step": "group_across_step .*an operand starts 16 bytes within a row",
    "reads beyond": "group_across_step .*not in the 38912 bytes of shared memory",
    "runs over": "group_across_step .*descriptor of another layout",
}


@pytest.mark.parametrize("fault", GROUP_FAULTS[1:])
def test_a_mistake_with_products_of_a_warpgroup_is_named(fault):
    for seed in SEEDS:
        with expect(NAMED_OF_A_GROUP[fault]):
            group_products(fault, seed=seed)
    found, right = group_products()
    assert torch.equal(found, right)


def test_who_has_no_products_of_a_warpgroup():
    with expect("group_begin .*sm_80 has no products of a warpgroup"):
        group_products(arch=80)
    with expect("group_begin .*the warpgroup has fewer than four warps: the block has 6"):
        group_products(threads=192)
