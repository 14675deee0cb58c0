"""What csrc/cuda/tensor_map.cu asks of the driver: compiled as it is, against a driver of this file's own.

The host simulator copies boxes by the tensor's own shape, so nothing else here sees how a map is encoded. What is
expected follows from CUDA's manual alone (driver API, cuTensorMapEncodeTiled).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from native_tree import ROOT

CUDA = ROOT / "csrc" / "cuda"
pytestmark = pytest.mark.skipif(not shutil.which("nvcc"), reason="CUDA's headers come with nvcc: it is not here")

# A driver that makes no map in a thread to which the runtime has bound no context, and says what it was asked for.
DRIVER = """
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "tensor_map.h"

bool bound = true, binds = true, knows = true;

template <class T>
void say(const char* name, const T* numbers, cuuint32_t count) {
    std::printf("%s", name);
    for (cuuint32_t i = 0; i < count; ++i) std::printf(" %lld", static_cast<long long>(numbers[i]));
    std::printf("\\n");
}

CUresult CUDAAPI encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                        const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                        const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                        CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
    if (reinterpret_cast<uintptr_t>(map) % 64 != 0) return CUDA_ERROR_INVALID_VALUE;
    if (!bound) return CUDA_ERROR_INVALID_CONTEXT;
    const int modes[] = {type, interleave, swizzle, fill};
    say("modes", modes, 4), say("sizes", sizes, rank), say("strides", strides, rank - 1), say("box", box, rank);
    say("steps", steps, rank);
    std::memset(map, 7, sizeof *map);
    return data == reinterpret_cast<void*>(0x1000) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned version, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
    *found = reinterpret_cast<void*>(encode);
    *result = knows && version >= 12000 && std::strcmp(name, "cuTensorMapEncodeTiled") == 0
                  ? cudaDriverEntryPointSuccess
                  : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 3, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
    bound = binds && device == 3;
    return bound ? cudaSuccess : cudaErrorDevicesUnavailable;
}

// element bytes, rank, then size, stride and box of each dimension.
int main(int, char** word) {
    knows = std::getenv("NO_DRIVER") == nullptr, binds = std::getenv("NO_CONTEXT") == nullptr;
    bound = binds && std::getenv("NEW_THREAD") == nullptr;
    vivit::cuda::TensorShape x;
    x.data = reinterpret_cast<void*>(0x1000);
    x.element_bytes = std::atoi(*++word), x.rank = std::atoi(*++word);
    for (int i = 0; i < x.rank; ++i)
        x.sizes[i] = std::atoll(*++word), x.strides[i] = std::atoll(*++word), x.box[i] = std::atoi(*++word);
    vivit::cuda::TensorMap map = {};
    if (!vivit::cuda::make_tensor_map(map, x)) return 3;
    return map.words[0] == 0x0707070707070707u && map.words[15] == map.words[0] ? 0 : 4;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """nvcc knows where CUDA's headers are; its runtime is left out, the file above has what is called of it."""
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.cpp").write_text(DRIVER)
    sources = [str(folder / "driver.cpp"), str(CUDA / "tensor_map.cu")]
    command = ["nvcc", "-std=c++17", "-x", "c++", "-cudart", "none", f"-I{CUDA}", *sources, "-o", "driver"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "driver"


def asked(program: Path, element_bytes: int, *dimensions: tuple[int, int, int], **environ: str) -> dict | None:
    """What the driver is asked for of a tensor with these (size, stride in bytes, box), neighbours first; None where no
    map is made."""
    words = [element_bytes, len(dimensions), *(number for dimension in dimensions for number in dimension)]
    done = subprocess.run([program, *map(str, words)], env=os.environ | environ, capture_output=True, text=True)
    assert done.returncode in (0, 3), done.returncode
    lines = [line.split() for line in done.stdout.splitlines()]
    return None if done.returncode else {name: [int(number) for number in numbers] for name, *numbers in lines}


# k of packed projections [2, 100, 3, 6, 72] of 16 bits, boxes of 64 channels of 48 tokens of one head.
HEADS = [(72, 2, 64), (6, 144, 1), (100, 2592, 48), (2, 259200, 1)]
UINT8, UINT16, UINT32 = 0, 1, 2
NO_INTERLEAVE, ZEROS = 0, 0


def test_a_map_is_what_the_manual_names(program):
    found = asked(program, 2, *HEADS)
    assert found == {
        "modes": [UINT16, NO_INTERLEAVE, 3, ZEROS],
        "sizes": [72, 6, 100, 2],
        "strides": [144, 2592, 259200],
        "box": [64, 1, 48, 1],
        "steps": [1, 1, 1, 1],
    }


@pytest.mark.parametrize("element_bytes, kind", [(1, UINT8), (2, UINT16), (4, UINT32)])
@pytest.mark.parametrize("row_bytes, swizzle", [(32, 1), (64, 2), (128, 3)])
def test_rows_are_swizzled_by_their_size(program, element_bytes, kind, row_bytes, swizzle):
    found = asked(program, element_bytes, (512, element_bytes, row_bytes // element_bytes), (9, 4096, 8))
    assert found and found["modes"] == [kind, NO_INTERLEAVE, swizzle, ZEROS]


def test_the_stride_of_a_single_one_is_made_up(program):
    found = asked(program, 2, (40, 2, 64), (1, 0, 1), (20, 96, 16), (1, 7, 1))
    assert found and found["strides"] == [80, 96, 1920]


def test_a_thread_that_has_launched_nothing_yet_gets_its_map(program):
    """As one of autograd's: the current device's context is made its own."""
    found = asked(program, 2, *HEADS, NEW_THREAD="1")
    assert found is not None and found == asked(program, 2, *HEADS)


@pytest.mark.parametrize("missing", ["NO_CONTEXT", "NO_DRIVER"])
def test_without_a_context_or_a_driver_that_knows_how_there_is_no_map(program, missing):
    assert asked(program, 2, *HEADS, **{missing: "1"}) is None
