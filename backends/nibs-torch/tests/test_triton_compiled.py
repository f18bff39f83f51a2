"""What calls launch compiles ahead of time, for GPUs that are not here: within their limits, on tensor cores.

A call runs on a pretended card (pretended_gpu.py), by the table's choices, and what it launched is compiled as it was
launched: the same arguments, specialised the same, with the same options. Nothing is run: speed and numbers are other
tests' business, or a GPU's.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton's wheels are for Linux")

import triton
from pretended_gpu import CARDS, Launch, calls, compiled
from triton.backends.compiler import GPUTarget

import nibs
from nibs_torch.kernels import tuning, weights

# By architecture: its target, and the instructions that say that products go to tensor cores. Registers end at 255
# everywhere: what does not fit is spilled, and counted.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), r"\bHMMA\."),
    "sm_89": (GPUTarget("cuda", 89, 32), r"\bHMMA\."),
    "sm_90": (GPUTarget("cuda", 90, 32), r"\bHGMMA\."),
    "sm_100": (GPUTarget("cuda", 100, 32), r"\bUTC\w*MMA"),
    "sm_120": (GPUTarget("cuda", 120, 32), r"\bHMMA\."),
    "gfx942": (GPUTarget("hip", "gfx942", 64), r"v_mfma_"),
}
SPILLED = 96
"""Bytes a thread that a kernel may put by in local memory: once a tile, outside the loop of products.

A tile of 128 x 256 by 768 takes an SM 7 microseconds at its full rate; 24 numbers out and in again by each of its 256
threads are 48 KiB of the L1 cache's 128 bytes a cycle, 0.2 microseconds. Narrower tiles read a third more.
"""

LARGE = {"lse", "weights", "sigmoid"}
WHOLE, CUT, KEPT, D = 16384, 16400, 1024, 128  # rows: more than keep their logits, the same cut off, and few


def launched(
    card: str, patch: pytest.MonkeyPatch, n: int = WHOLE, d: int = D, dtype: str = "bfloat16", **options: Any
) -> Any:
    """A step's launches by kernel, the last of each: where rows are cut off, one that is.

    options: of the call; dtypes stand for vectors of theirs.
    """

    def vector(kind: torch.dtype) -> Any:
        return torch.empty(n, dtype=kind, device="cuda")

    with calls(CARDS[card], patch) as launches:
        rows = [torch.empty(n, d, dtype=getattr(torch, dtype), device="cuda", requires_grad=True) for _ in range(2)]
        scale = torch.empty((), device="cuda", requires_grad=True)
        given = {name: vector(value) if isinstance(value, torch.dtype) else value for name, value in options.items()}
        nibs.contrastive_loss(*rows, scale=scale, **given)
    return {one.name: one for one in launches}


def hold_to_limits(launch: Launch, card: str, patch: pytest.MonkeyPatch, folder: Path, *, cores: bool = True) -> Any:
    """Compile, and look at registers, shared memory and instructions; returns the kernel and its machine code."""
    target, instruction = TARGETS[card]
    built = compiled(launch, target, patch)
    assert built.metadata.shared <= CARDS[card].shared
    code = machine_code(built, folder)
    if card == "gfx942":
        assert sum(map(int, re.findall(r"\.vgpr_spill_count:\s*(\d+)", code))) == 0
    else:
        assert sum(map(int, re.findall(r"STACK:(\d+)", dumped(built, "-res-usage", folder)))) <= SPILLED
        products = [one.start() for one in re.finditer(instruction, code)]
        if products:
            assert not re.search(r"\b(LDL|STL)\b", code[products[0] : products[-1]])
    assert bool(re.search(instruction, code)) == cores
    # A logit is made in several kernels, and has to be one number: the sums of the older instruction are others.
    assert instruction == r"\bHMMA\." or not re.search(r"\bHMMA\.", code)
    return built, code


def rounds_its_logits(built: Any, pairs: int) -> bool:
    """Whether each of a thread's `pairs` logits is a fused product and sum as it is written, with 0 for its sum, and
    nothing else is multiplied by the scale.
    """
    scales = re.findall(r"fma\.rn\.f32\s+\S+, \S+, (\S+), 0f00000000;", built.asm["ptx"])
    used = re.findall(r"(?:fma\.rn|mul(?:\.rn)?)\.f32\s+\S+, (\S+), (\S+?)[,;]", built.asm["ptx"])
    return len(scales) >= pairs and sum(bool({*one} & {*scales}) for one in used) == len(scales)


def finish(code: str) -> int:
    """Instructions after the products of a tile, both ways of each branch."""
    return code[code.rindex("HGMMA") :].count(";")


def machine_code(built: Any, folder: Path) -> str:
    return built.asm["amdgcn"] if "amdgcn" in built.asm else dumped(built, "-sass", folder)


def dumped(built: Any, what: str, folder: Path) -> str:
    """What the disassembler that comes with Triton says about a cubin."""
    path = folder / "kernel.cubin"
    path.write_bytes(built.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, what, str(path)], capture_output=True, text=True, check=True).stdout


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled here and now, and nothing left behind."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("objective", [nibs.InfoNCE(), nibs.Sigmoid()], ids=["infonce", "sigmoid"])
@pytest.mark.parametrize("card", list(TARGETS))
def test_the_large_kernels_of_a_step_fit_their_card(
    card: str, objective: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = launched(card, monkeypatch, objective=objective)
    for name in LARGE & found.keys():
        built, code = hold_to_limits(found[name], card, monkeypatch, tmp_path)
        # The table chooses by no less shared memory than a kernel takes.
        assert built.metadata.shared <= tuning.shared_bytes(tuning.config(CARDS[card], name, 2), 2)
        if card == "sm_90":  # wide tiles, through the copy engine, by programs that stay, one exponential a pair
            flags = found[name].named
            assert min(flags["BM"], flags["BN"]) >= 128
            assert flags["PERSISTENT"] and flags["enable_fp_fusion"]
            assert "UTMALDG" in code
            assert code.count("MUFU.EX2") <= 1.1 * 128  # each of 256 threads has 128 pairs
            assert name == "sigmoid" or rounds_its_logits(built, 128)
            assert name != "sigmoid" or finish(code) <= 32 * 128  # of which a tile without positives takes 21


@triton.jit
def unrounded(acc, scale, bias):  # type: ignore[no-untyped-def]
    return acc * scale


def test_a_logit_that_is_fused_into_its_shift_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = launched("sm_90", monkeypatch)["weights"]
    monkeypatch.setattr(weights, "logit", unrounded)
    for one in (weights.shared, weights.part_weights, weights.weights_tile, weights.weights):
        monkeypatch.setattr(one, "hash", None)  # else Triton takes their sources for unchanged
    monkeypatch.setattr(launch.kernel, "device_caches", defaultdict(launch.kernel.create_binder))
    assert not rounds_its_logits(compiled(launch, TARGETS["sm_90"][0], monkeypatch), 128)


@pytest.mark.parametrize("d", [D, D + 1], ids=["fetched", "loose"])
@pytest.mark.parametrize("objective", [nibs.InfoNCE(), nibs.Sigmoid()], ids=["infonce", "sigmoid"])
def test_kernels_whose_tiles_are_cut_off_fit_too(
    objective: Any, d: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, launch in launched("sm_90", monkeypatch, n=CUT, d=d, objective=objective).items():
        if name in LARGE:
            assert launch.named["RAGGED"] and launch.named["DESC"] == (d == D)
            hold_to_limits(launch, "sm_90", monkeypatch, tmp_path)


def test_every_other_kernel_of_a_step_fits_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = launched("sm_90", monkeypatch, dtype="float16")
    assert found.keys() - LARGE == {"poison", "repair", "fold", "spans", "wide", "lift", "product", "tally"}
    for name in found.keys() - LARGE:
        cores = name in ("product", "repair", "wide")
        built, _ = hold_to_limits(found[name], "sm_90", monkeypatch, tmp_path, cores=cores)
        if name in ("repair", "wide"):
            assert rounds_its_logits(built, 16)  # each of 256 threads has 16 pairs of 64 x 64


def test_kernels_that_keep_logits_fit_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = launched("sm_90", monkeypatch, n=KEPT)
    hold_to_limits(found["lse"], "sm_90", monkeypatch, tmp_path)
    hold_to_limits(found["weights"], "sm_90", monkeypatch, tmp_path, cores=False)


IDS = {"query_ids": torch.int64, "key_ids": torch.int64}
MASKS = {"query_mask": torch.bool, "key_mask": torch.bool, "targets": torch.int64}
BUSY: dict[str, Any] = {
    "exclusions": {"objective": nibs.InfoNCE(same_id="exclude"), **IDS, **MASKS},
    "several positives": {"objective": nibs.InfoNCE(same_id="positive", label_smoothing=0.1), **IDS, **MASKS},
    "margin": {"objective": nibs.InfoNCE(false_negative_margin=0.1, label_smoothing=0.1), **MASKS},
    "sigmoid": {"objective": nibs.Sigmoid(same_id="positive"), **IDS, **MASKS},
}


@pytest.mark.parametrize(
    "card, options", list(zip(("sm_90", "sm_80", "sm_90", "sm_80"), BUSY.values())), ids=list(BUSY)
)
def test_kernels_with_options_compiled_in_fit_too(
    card: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, launch in launched(card, monkeypatch, n=CUT, dtype="float16", **options).items():
        if name in LARGE:
            hold_to_limits(launch, card, monkeypatch, tmp_path)


@pytest.mark.parametrize("objective", [nibs.InfoNCE(), nibs.Sigmoid()], ids=["infonce", "sigmoid"])
@pytest.mark.parametrize("precision, card, cores", [("high", "sm_80", True), ("highest", "sm_90", False)])
def test_float32_takes_tensor_cores_where_it_may_be_coarse_and_leaves_them_alone_where_not(
    precision: str, card: str, cores: bool, objective: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = launched(card, monkeypatch, dtype="float32", precision=precision, objective=objective)
    assert ("round_rows" in found) == cores
    for name, launch in found.items():
        if name in LARGE:
            hold_to_limits(launch, card, monkeypatch, tmp_path, cores=cores)
