"""How products of warpgroups find operands in shared memory (csrc/cuda/verbs.cuh, verbs_hopper.cuh), against the tables
of the PTX manual: "Strides", "Canonical Layouts" and "Matrix Descriptor Format" of wgmma, written down here once more.

The host simulator's products take a descriptor as the same hand wrote it; here it is what nvcc compiles.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from itertools import product
from typing import NamedTuple

import pytest
from native_tree import ROOT

pytestmark = pytest.mark.skipif(not shutil.which("nvcc"), reason="descriptors are read from PTX: nvcc is not here")
KERNELS = """
#include "verbs_hopper.cuh"

using namespace vivit::cuda;

extern "C" __global__ void rows_of_128(uint64_t* x, int at) { *x = descriptor(shared_memory() + at); }
extern "C" __global__ void rows_of_64(uint64_t* x, int at) { *x = narrow_descriptor<64>(shared_memory() + at); }
extern "C" __global__ void rows_of_32(uint64_t* x, int at) { *x = narrow_descriptor<32>(shared_memory() + at); }
extern "C" __global__ void across(uint64_t a, uint64_t b, float* y) {
    float x[8][4];
    const uint32_t left[4] = {1, 2, 3, 4};
    group_across_step<BFloat16, 64>(x, a, b, false);
    group_across_step<BFloat16, 64>(x, left, b, true);
    *y = x[0][0];
}
extern "C" __global__ void along(uint64_t b, float* y) {
    float x[8][4] = {};
    const uint32_t left[4] = {1, 2, 3, 4};
    group_along<Float16>(x, left, b);
    group_along_step<Float16, 64>(x, left, b);
    *y = x[0][0];
}
"""
ROW_OF_SWIZZLE = {1: 128, 2: 64, 3: 32}  # bits 62 and 63, bytes


@pytest.fixture(scope="module")
def ptx(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("descriptors")
    (folder / "kernels.cu").write_text(KERNELS)
    command = ["nvcc", "-std=c++17", "-arch=sm_90a", "-ptx", f"-I{ROOT / 'csrc' / 'cuda'}", "kernels.cu"]
    subprocess.run(command, cwd=folder, check=True)
    parts = re.split(r"\.entry (\w+)\(", (folder / "kernels.ptx").read_text())
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def bits(x: int, first: int, count: int) -> int:
    return x >> first & (1 << count) - 1


def swizzled(address: int, row_bytes: int) -> int:
    """Swizzle<B, 4, 3>: of 16-byte chunks, by the bits three above theirs."""
    chunks = row_bytes // 16 - 1
    return address ^ (address >> 7 & chunks) << 4


class Descriptor(NamedTuple):
    """All but the address, in bytes where it is one."""

    row_bytes: int
    stride: int

    @classmethod
    def compiled(cls, kernel: str) -> Descriptor:
        """Of a kernel that stores one: the start address in sixteens, and a constant."""
        (constant,) = [int(x) & (1 << 64) - 1 for x in re.findall(r"or\.b64 .*, (-?\d+);", kernel)]
        assert re.search(r"and\.b32 .*, 262128;\s+shr\.u32 .*, 4;", kernel), "(x & 0x3ffff) >> 4"
        assert constant & ~(3 << 62 | 0x3FFF << 32 | 0x3FFF << 16) == 0, "base offset 0, the start address no constant"
        return cls(ROW_OF_SWIZZLE[bits(constant, 62, 2)], bits(constant, 32, 14) << 4)

    def address(self, start: int, major: str, mn: int, k: int) -> int:
        """The canonical layout of one atom along the leading dimension, whose own offset is then not used."""
        if major == "K":  # ((8, m), (T, 2k)) : ((row, stride), (1, T))
            at = mn % 8 * self.row_bytes + mn // 8 * self.stride + 2 * k
        else:  # ((T, row / T, m), (8, k)) : ((1, T, leading), (row, stride))
            at = 2 * mn + k % 8 * self.row_bytes + k // 8 * self.stride
        return swizzled(start + at, self.row_bytes)


@pytest.mark.parametrize("row_bytes", [128, 64, 32])
def test_operands_lie_where_a_copied_box_has_them(ptx, row_bytes):
    """Rows of a box, one behind the other, swizzled by the copy engine: as an operand that is summed over channels, 16
    at a step, 32 bytes further; and as one that is summed over rows, 16 at a step, of all channels."""
    found = Descriptor.compiled(ptx[f"rows_of_{row_bytes}"])
    assert found.row_bytes == row_bytes

    def in_box(start: int, row: int, channel: int) -> int:
        return swizzled(start + row * row_bytes + 2 * channel, row_bytes)

    channels = row_bytes // 2
    for start in (1024, 1024 + 3 * 8 * row_bytes):  # a base offset of 0: the pattern begins at a multiple of eight rows
        for step, row, k in product(range(channels // 16), range(64), range(16)):
            assert found.address(start + 32 * step, "K", row, k) == in_box(start, row, 16 * step + k)
        for step, row, channel in product(range(3), range(16), range(channels)):
            assert found.address(start + 16 * step * row_bytes, "MN", channel, row) == in_box(
                start, 16 * step + row, channel
            )


def test_products_say_how_their_operands_lie(ptx):
    """scale-d, a's sign, b's sign, then for each operand in shared memory whether it is MN-major."""
    endings = [re.findall(r"wgmma\.mma_async[^;]*\}[^;]*;", ptx[name]) for name in ("across", "along")]
    (both, left), along = ([line.split("}")[-1] for line in lines] for lines in endings)
    assert re.search(r"p\s*, 1, 1, 0, 0;$", both) and re.search(r"p\s*, 1, 1, 0;$", left)
    assert len(along) == 2 and all(re.search(r"%rd\d+, 1, 1, 1, 1;$", line) for line in along)
