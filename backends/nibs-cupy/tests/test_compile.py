"""Kernels through NVIDIA's compiler: no spills, no serialised wgmma, tensor cores in use.

What is written for tensor cores for every architecture; plain C++ for the oldest, the newest and Hopper, for it takes
as long as the rest: `python -m nibs_cupy.compile` compiles everything for all. Needs the wheel nvidia-cuda-nvrtc or
nvcc, no GPU. What is asked of whom is one table, `nibs_cupy.compile.LIMITS`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache

import pytest

from nibs.errors import BackendUnavailable
from nibs_cupy.compile import ARCHITECTURES, LIMITS, OPERATIONS, Kernel, compile_file, compile_source, faults, files_for
from nibs_cupy.device import flattened


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    try:
        compile_source('extern "C" __global__ void nothing() {}', "sm_80")
    except BackendUnavailable as cause:
        pytest.skip(str(cause))


WHOLE = ("sm_80", "sm_90a", "sm_120")


@lru_cache
def compiled(architecture: str) -> list[Kernel]:
    chosen = [file for file in files_for(architecture) if architecture in WHOLE or file != "general.cu"]
    with ThreadPoolExecutor(2) as pool:
        files = pool.map(lambda file: compile_file(file, architecture), chosen)
        return [kernel for file in files for kernel in file]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_keeps_to_the_table(architecture: str) -> None:
    kernels = compiled(architecture)
    assert [fault for kernel in kernels for fault in faults(kernel, architecture)] == []
    families = {kernel.name.split("_")[1] for kernel in kernels}
    assert "ampere" in families
    assert ("hopper" in families) == (architecture == "sm_90a")


def test_the_table_has_no_row_that_no_kernel_uses() -> None:
    kernels = compiled("sm_90a")
    assert {kernel.limit for kernel in kernels} == set(LIMITS)


def test_a_spill_is_seen() -> None:
    source = """extern "C" __global__ void __launch_bounds__(1024) nibs_pack_spills(float* x) {
        float v[120];
        for (int i = 0; i < 120; i++) v[i] = x[i * 1024 + threadIdx.x];
        __syncthreads();
        for (int i = 0; i < 120; i++) x[i * 1024 + threadIdx.x] = v[i] * v[119 - i] + v[(i * 7) % 120];
    }"""
    (kernel,) = compile_source(source, "sm_80")
    assert any("spilled" in fault for fault in faults(kernel, "sm_80"))


def test_serialised_wgmma_is_seen() -> None:
    """A sum that is touched between two instructions: the compiler waits after each, and says so in a remark."""
    source = flattened("instructions.cu")
    before = "multiply_group(Format(), c, a + 2 * step, b + 2 * step);"
    assert source.count(before) == 1
    kernels = compile_source(source.replace(before, f"{{ {before} c[step] += 1.0f; }}"), "sm_90a")
    found = [fault for kernel in kernels for fault in faults(kernel, "sm_90a")]
    assert any("serialized" in fault for fault in found)


def test_a_kernel_that_lost_its_tensor_cores_is_seen() -> None:
    source = 'extern "C" __global__ void nibs_ampere_lse_float16(float* x) { x[threadIdx.x] *= 2; }'
    (kernel,) = compile_source(source, "sm_80")
    assert any("no HMMA" in fault for fault in faults(kernel, "sm_80"))


def test_more_registers_than_granted_are_seen() -> None:
    (kernel,) = compile_source('extern "C" __global__ void nibs_pack_2(float* x) { x[threadIdx.x] *= 2; }', "sm_80")
    kernel.registers = kernel.limit.registers + 1
    assert any("registers, of which it may use" in fault for fault in faults(kernel, "sm_80"))


def test_too_few_registers_at_launch_for_warpgroups_that_share_them_out_are_seen() -> None:
    (kernel,) = (kernel for kernel in compiled("sm_90a") if kernel.name == "nibs_hopper_lse_bfloat16")
    assert faults(replace(kernel, registers=160), "sm_90a") != []


def test_times_is_rounded_by_itself_where_a_product_would_be_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPERATIONS, 0x023, "FFMA")
    source = flattened("device.cuh") + (
        'extern "C" __global__ void fused(float* x) { x[0] = nibs::times(x[1], x[2]) - x[3]; }'
    )
    (kernel,) = compile_source(source, "sm_80")
    assert kernel.counts["FFMA"] == 0
    (kernel,) = compile_source(source.replace("__fmul_rn(a, b)", "a * b"), "sm_80")
    assert kernel.counts["FFMA"] == 1
