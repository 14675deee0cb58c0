"""`python -m bench static`: resources read from binaries, occupancy, what launchers launch, and the least times."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys

import pytest

from bench import cubin, record, static
from bench.cases import CASES, select

KIB = 1 << 10
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


# ---- occupancy: by hand, from the limits of the programming guide ----


@pytest.mark.parametrize(
    "registers, shared, threads, blocks, limits",
    [
        (32, 0, 1024, 2, {"registers", "threads"}),  # 2 x 1024 threads x 32 registers = 65,536
        (33, 0, 1024, 1, {"registers"}),  # 33 are allocated as 40: 40 x 1024 x 2 > 65,536
        (16, 0, 32, 32, {"blocks"}),
        (255, 0, 128, 2, {"registers"}),  # 256 x 128 = 32,768
        (168, 0, 384, 1, {"registers"}),  # 12 warps of 5,376: 12 fit, 24 do not
        (72, 0, 128, 7, {"registers"}),  # 28 warps of 2,304
        (80, 0, 96, 8, {"registers"}),  # 24 warps of 2,560
        (168, 0, 480, 0, {"registers"}),  # 15 warps of 5,376 do not fit
        (32, 0, 1056, 0, {"threads"}),
        (32, 113 * KIB, 128, 2, {"shared memory"}),  # 2 x (113 + 1 of the system) = 228
        (32, 113 * KIB + 1, 128, 1, {"shared memory"}),
        (32, 227 * KIB, 128, 1, {"shared memory"}),
        (32, 227 * KIB + 1, 128, 0, {"shared memory"}),  # cannot be launched
    ],
)
def test_occupancy_of_an_h100(registers, shared, threads, blocks, limits):
    found = cubin.occupancy(90, registers, shared, threads)
    assert (found.blocks, set(found.limits)) == (blocks, limits)
    assert found.warps == blocks * (threads // 32)


def test_occupancy_of_an_a100_has_less_shared_memory():
    assert cubin.occupancy(80, 32, 81 * KIB, 128).blocks == 2
    assert cubin.occupancy(80, 32, 82 * KIB, 128).blocks == 1
    assert cubin.occupancy(80, 32, 164 * KIB, 128).blocks == 0


NVIDIAS = r"""
#include <cstdio>
#include <cuda_occupancy.h>

int main() {
    int registers, shared, threads;
    while (std::scanf("%d %d %d", &registers, &shared, &threads) == 3) {
        cudaOccDeviceProp gpu;
        gpu.computeMajor = 9, gpu.computeMinor = 0;
        gpu.maxThreadsPerBlock = 1024, gpu.maxThreadsPerMultiprocessor = 2048, gpu.warpSize = 32;
        gpu.regsPerBlock = gpu.regsPerMultiprocessor = 65536, gpu.numSms = 132;
        gpu.sharedMemPerBlock = 48 << 10, gpu.sharedMemPerBlockOptin = 227 << 10;
        gpu.sharedMemPerMultiprocessor = 228 << 10, gpu.reservedSharedMemPerBlock = 1 << 10;
        cudaOccFuncAttributes kernel;
        kernel.maxThreadsPerBlock = 1024, kernel.numRegs = registers;
        kernel.maxDynamicSharedSizeBytes = 227 << 10, kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
        cudaOccDeviceState state;
        cudaOccResult found;
        int failed = cudaOccMaxActiveBlocksPerMultiprocessor(&found, &gpu, &kernel, &state, threads, shared);
        std::printf("%d\n", failed ? -1 : found.activeBlocksPerMultiprocessor);
    }
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_occupancy_agrees_with_nvidias_own_header(tmp_path):
    source, program = tmp_path / "occupancy.cpp", tmp_path / "occupancy"
    source.write_text(NVIDIAS)
    subprocess.run(["nvcc", "-o", program, source], check=True)
    grid = list(itertools.product(
        (1, 8, 31, 32, 40, 41, 72, 80, 96, 128, 168, 255),
        (0, 1, 7000, 48 * KIB, 75 * KIB, 113 * KIB, 113 * KIB + 1, 227 * KIB),
        (1, 32, 96, 128, 160, 384, 1000, 1024),
    ))  # fmt: skip
    lines = "\n".join(" ".join(map(str, case)) for case in grid)
    answers = subprocess.run([program], input=lines, capture_output=True, text=True, check=True).stdout.split()
    assert {case: cubin.occupancy(90, *case).blocks for case in grid} == dict(zip(grid, map(int, answers), strict=True))


# ---- instructions ----

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                /* 0x00000a00ff017b82 */
                                                                         /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/               @P1 LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0030*/             @!UP0 UTMALDG.2D [UR8], [UR6] ;
        /*0040*/                   MUFU.EX2 R5, R5 ;
        /*0050*/                   MUFU.RCP R5, R5 ;
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], !UPT ;
        /*0070*/                   STS.128 [R4], R8 ;
        /*1080*/                   STL.64 [R1], R2 ;
"""


def test_instructions_are_counted_under_predicates_and_by_width():
    mix = cubin.instructions(SASS)
    assert {name: count for name, count in mix.items() if name != "LDC"} == {
        "LDG": 2, "LDG.128": 1, "LDG.16": 1, "UTMALDG": 1, "MUFU": 2, "MUFU.EX2": 1, "MUFU.RCP": 1, "HGMMA": 1,
        "STS": 1, "STS.128": 1, "STL": 1,
    }  # fmt: skip


def test_complaints():
    def launch(mix: str = "", registers: int = 32, shared: int = 0, columns: int = 0) -> static.Compiled:
        kernel = cubin.Kernel("k", 90, registers, 0, 0, 0, 128, cubin.instructions(mix), mix)
        return static.Compiled(kernel, (1,), 128, shared, columns)

    assert launch().complaints == []
    assert launch(SASS).complaints == ["spills: 1 loads and stores of local memory"]
    assert launch(shared=300 * KIB).complaints == ["no block fits: shared memory"]
    assert launch(columns=1).complaints == ["tensor memory: 1 columns, 0 at most"]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@needs_triton  # its wheel carries cuobjdump
def test_kernels_of_a_library_are_read(tmp_path):
    source = tmp_path / "a.cu"
    source.write_text("""
        extern "C" __global__ void __launch_bounds__(96) scale(float* x) {
            __shared__ float s[128];
            s[threadIdx.x] = x[threadIdx.x];
            __syncthreads();
            x[threadIdx.x] = exp2f(s[95 - threadIdx.x]);
        }
        __global__ void vector(float4* x, float4* y) { y[threadIdx.x] = x[threadIdx.x]; }
    """)
    library = tmp_path / "a.so"
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a")]
    subprocess.run(["nvcc", "-shared", "-Xcompiler", "-fPIC", *archs, "-o", library, source], check=True)
    found = {(kernel.arch, kernel.name): kernel for kernel in cubin.read(library)}
    assert {arch for arch, _ in found} == {80, 90} and len(found) == 4
    for arch in (80, 90):
        scale, vector = found[arch, "scale"], found[arch, "_Z6vectorP6float4S0_"]
        assert (scale.threads, scale.shared, vector.threads, vector.shared) == (96, 512, None, 0)
        assert scale.mix["MUFU.EX2"] == scale.mix["BAR"] == scale.mix["STS"] == 1 and scale.spills == 0
        assert vector.mix["LDG.128"] == vector.mix["STG.128"] == 1 and 0 < vector.registers < 64


# ---- Triton, in a process of its own: others may interpret their kernels ----

CHILD = """
import json, sys, types
import torch, triton, triton.language as tl
from bench import static

@triton.jit
def exps(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, at < n)
    tl.store(y_ptr + at, x + tl.exp2(x.to(tl.float32)), at < n)

@triton.jit
def product(a_ptr, b_ptr, c_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = tl.program_id(0) * BLOCK * BLOCK + i[:, None] * BLOCK + i[None, :]
    tl.store(c_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)).to(c_ptr.dtype.element_ty))

def launches():
    x = torch.empty(4992)
    exps[lambda meta: (triton.cdiv(meta["n"], meta["BLOCK"]),)](x, torch.empty_like(x), 4992, BLOCK=1024, num_warps=8)
    a = torch.empty(3, 64, 64, dtype=torch.bfloat16)
    product[(3, 2)](a, a, torch.empty_like(a), BLOCK=64)

found = {}
for arch in (90, 80):
    found[arch] = [
        dict(name=c.kernel.name, arch=c.kernel.arch, grid=c.grid, threads=c.threads, shared=c.shared, mix=c.kernel.mix,
             registers=c.kernel.registers, blocks=c.occupancy.blocks)
        for c in static.compile_launches(launches, arch)
    ]

# a backend `triton` of joint_attention that is there, and one of tubelet_embedding that asks for a GPU
def launch_fwd(q, k, v, temporal_heads, options, keep=False):
    assert q.shape == (2, 65, 2, 32) and q.stride(1) == 3 * 2 * 32 and options.scale == 32**-0.5
    o = q.new_empty(q.shape)
    product[(q.shape[0] * q.shape[2],)](q, k, o, BLOCK=32)
    return o, None

def launch_bwd(do, q, k, v, o, lse, dq, dk, dv, temporal_heads, options):
    assert dq.stride() == q.stride()
    exps[(7,)](do, dq, 65, BLOCK=128)

from vivit_kernels.tubelet_embedding import op as tubelet
tubelet._MODULES["triton"] = "triton_kernels"
for folder, names in (("joint_attention", dict(launch_fwd=launch_fwd, launch_bwd=launch_bwd)),
                      ("tubelet_embedding", dict(launch_fwd=lambda *_: torch.cuda.current_device()))):
    module = types.ModuleType(f"vivit_kernels.{folder}.triton_kernels")
    module.__spec__ = torch.__spec__
    vars(module).update(names)
    sys.modules[module.__name__] = module
print(json.dumps(found))
print("codes", static.main(["joint", "--case", "small.b2"]), static.main(["tubelet", "--case", "small.b2"]))
"""


@pytest.fixture(scope="module")
def child(tmp_path_factory):
    """(the launches by architecture, what the command printed)"""
    script = tmp_path_factory.mktemp("static") / "child.py"
    script.write_text(CHILD)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    first, _, printed = result.stdout.partition("\n")
    return json.loads(first), printed


@needs_triton
def test_launches_are_compiled_with_their_arguments(child):
    for arch, launches in child[0].items():
        exps, product = launches
        assert (exps["name"], exps["grid"], exps["threads"]) == ("exps", [5], 256)
        assert (product["name"], product["grid"], product["threads"]) == ("product", [3, 2], 128)
        assert exps["mix"]["MUFU.EX2"] >= 4 and exps["mix"]["LDG.128"] >= 1
        assert exps["shared"] == 0 and product["shared"] >= 64 * 64 * 2
        for launch in launches:
            assert launch["arch"] == int(arch) and 0 < launch["registers"] < 255 and launch["blocks"] >= 1


@needs_triton
def test_two_architectures_in_one_process_are_two_compilations(child):
    """The JIT caches by device: with one id for both, the second would get the first one's code."""
    hopper, ampere = child[0]["90"][1]["mix"], child[0]["80"][1]["mix"]
    assert "HGMMA" in hopper and "HMMA" not in hopper
    assert "HMMA" in ampere and "HGMMA" not in ampere


@needs_triton
def test_an_operation_with_triton_kernels_is_listed(child):
    """What its launchers launch through the registered operation, forward and backward apart."""
    printed = child[1]
    assert "grid 4 = 4 blocks: joint small.b2 bfloat16 forward" in printed
    assert "grid 7 = 7 blocks: joint small.b2 bfloat16 backward" in printed
    assert printed.count("grid ") == 2 and "this release has no" not in printed


@needs_triton
def test_a_launcher_that_wants_a_gpu_is_a_line(child):
    assert "could not be compiled: " in child[1]
    assert child[1].splitlines()[-1] == "codes 0 1"


@needs_triton
@pytest.mark.full
def test_the_ceilings_kernel_is_compiled_even_where_kernels_are_interpreted(monkeypatch, capfd):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="interpreted, not compiled"):
        static.compile_launches(lambda: None, 90)
    assert static.main(["ceilings"]) == 0
    printed = capfd.readouterr().out
    assert "exponentials  sm_90" in printed and "MUFU.EX2" in printed


def test_without_triton_it_says_so(monkeypatch, capsys):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else there(name, *rest)
    )
    assert static.main(["ceilings"]) == 1
    assert "Triton is not installed" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="pip install triton"):
        static.compile_launches(lambda: None, 90)


# ---- least times ----


def test_bounds_by_hand():
    """ViViT-B/16x2, 8 clips, bfloat16: q, k, v, o once; two products over 16 frames at each of 196 positions."""
    assumed = static.ASSUMED[90]
    case = select(["temporal"], ["vivit_b_16x2.b8"], False)[0]
    times, largest = static.bounds(case, "bfloat16", "forward", 90)
    tensor = 8 * 16 * 196 * 12 * 64
    assert times["copy"] == pytest.approx(4 * tensor * 2 / assumed["copy_gbps"] / 1e3)
    assert times["matmul"] == pytest.approx(2 * 2 * tensor * 16 / assumed["matmul_tflops"]["bfloat16"] / 1e6)
    assert times["exp"] == pytest.approx(tensor / 64 * 16 / assumed["exp_gops"] / 1e3)
    assert largest == "copy"
    joint = select(["joint"], ["vivit_b_16x2.b8"], False)[0]
    assert static.bounds(joint, "bfloat16", "backward", 90)[1] == "matmul"
    assert static.bounds(joint, "bfloat16", "backward", 80) == ({}, "")


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)

    def add(ms: float, day: str, device: str, backend: str = "triton", **changes) -> None:
        facts = dict(run=day, date=day, kind="op", op="joint", case="small.b2", shape="B=2", dtype="bfloat16")
        facts |= dict(direction="forward", backend=backend, ours=True, status="ok", ms={"median": ms}) | changes
        record.append(
            tmp_path / f"{device}.jsonl", record.Record(**facts, machine={"device": device}, error={"share": 0.5})
        )

    return add


def test_the_newest_record_of_such_a_gpu_stands_beside_the_bound(results, capsys):
    results(9.0, "2026-01-02", "NVIDIA H100 PCIe")
    results(0.25, "2026-02-01", "NVIDIA H100 80GB HBM3")
    results(7.0, "2026-03-01", "a CPU")
    results(6.0, "2026-03-01", "NVIDIA H100 80GB HBM3", "sdpa", ours=False)
    results(5.0, "2026-03-01", "NVIDIA H100 80GB HBM3", direction="forward+backward")
    case = select(["joint"], ["small.b2"], False)[0]
    times, largest = static.bounds(case, "bfloat16", "forward", 90)
    static.main(["joint", "--case", "small.b2"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("joint  ")]
    assert [row[3] for row in rows] == ["forward", "backward"]
    assert rows[0][-6:-4] == ["triton", "2026-02-01"] and "250.0" in rows[0] and "older" in " ".join(rows[0])
    assert rows[0][-1] == f"{250.0 / times[largest]:.2f}"
    assert rows[1][-4:] == ["-", "no", "record", "-"]


def test_what_is_not_there_is_said(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path / "none")
    monkeypatch.setattr(static, "has_kernel", lambda op: False)
    assert (
        static.main(["tubelet", "spatial", "--case", "vivit_b_16x2.b1", "--arch", "90", "80", "--dtype", "float32"])
        == 0
    )
    printed = capsys.readouterr().out
    for op in ("tubelet", "spatial"):
        assert f"{op}: this release has no triton kernel for {op}" in printed
    assert "no ceilings are assumed for this architecture" in printed and "float32 as TF32" in printed
    assert static.main(["joint", "--case", "nobody"]) == 2
    assert "no case 'nobody' of joint" in capsys.readouterr().err


def test_every_case_has_a_bound():
    for case in CASES:
        for dtype in ("float16", "bfloat16", "float32"):
            times, largest = static.bounds(case, dtype, "backward", 90)
            assert times[largest] == max(times.values()) > 0
