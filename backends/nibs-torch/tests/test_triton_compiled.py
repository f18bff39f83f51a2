"""The kernels compile ahead of time, for GPUs that are not here: no spills, within their limits, on tensor cores.

What is compiled is what the table of `nibs_torch.kernels.tuning` would launch, so that a choice there that spills, or
does not fit the card it is for, fails here. Nothing is run: speed and numbers are other tests' business, or a GPU's.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton's wheels are for Linux")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nibs_torch.kernels import lse, product, rows, sigmoid, tuning, weights

KIB = 1024
# By architecture: its target, the shared memory that a program may have there, and the instructions that say that
# products go to tensor cores. Registers end at 255 everywhere: what does not fit is spilled, and counted.
LIMITS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 99 * KIB, r"\bHMMA\."),  # sm_86 and 89 run the same, in less memory
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB, r"\bHGMMA\."),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KIB, r"\bUTC\w*MMA"),
    "sm_120": (GPUTarget("cuda", 120, 32), 99 * KIB, r"\bHMMA\."),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB, r"v_mfma_"),
}
KERNELS = {
    "lse": lse.lse,
    "weights": weights.weights,
    "sigmoid": sigmoid.sigmoid,
    "repair": lse.repair,
    "wide": weights.wide,
    "fold": lse.fold,
    "lift": rows.lift,
    "poison": rows.poison,
    "round_rows": rows.round_rows,
    "product": product.product,
}
ELEMENTS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
ROWS = ("Q", "K", "G", "A", "B", "X")  # in the input's dtype
TYPES = {"QM": "*i1", "KM": "*i1", "M": "*i1", "QID": "*i64", "KID": "*i64", "T": "*i64", "MARK": "*i32"}
UNIT = ("sq1", "sk1", "s1", "sa1", "sb1")  # strides that are 1 in contiguous rows
WIDE = ("sq0", "sk0", "s0", "sg", "sp", "d")  # divisible by 16 in ordinary ones
OPTIONAL = {
    "QM",
    "KM",
    "M",
    "QID",
    "KID",
    "T",
    "EXACT",
    "QLIM",
    "KLIM",
    "AW",
    "RM",
    "CM",
    "LIFTED",
    "KEPT",
    "SP",
    "FACTOR",
}
FLAGS = {
    "ROWS": True,
    "COLUMNS": True,
    "DESIGNATED": 1,
    "EXCLUDE": False,
    "MULTI": False,
    "SELF": False,
    "SUMS": False,
    "STATS": False,
    "RAGGED": True,
    "TF32": False,
    "GUARD": True,
    "UPCAST": False,
    "PRECISION": "ieee",
    "GROUP": 8,
    "SM": 32,
    "SN": 32,
    "TILE": 128,
    "BLOCK": 64,
    "PARTS": 16,
    "f_positive": 0,
    "f_weight": 0,
    "f_allowed": 0,
    "f_max": 0,
}
EXCLUDES = {"DESIGNATED": 2, "EXCLUDE": True, "SELF": True, "SUMS": True, "STATS": True}
SEVERAL = {"DESIGNATED": 2, "MULTI": True, "SUMS": True, "STATS": True}
MASKS = ("QM", "KM", "T")


def compiled(name: str, arch: str, dtype: str, config: Any, given: tuple[str, ...] = (), **flags: Any) -> Any:
    """A kernel as `nibs_torch.fused` would launch it with `config`; `given`: optional arguments that are there."""
    kernel = KERNELS[name]
    sizes = {"BM": config.rows, "BN": config.columns, "BK": config.width}
    described = config.descriptors and name in ("lse", "weights", "sigmoid")
    known = {**FLAGS, **sizes, "DESC": described, "PERSISTENT": config.per_sm > 0, **flags}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    for argument in kernel.arg_names:
        if argument in known and not (argument == "ROWS" and name == "round_rows"):
            signature[argument], constants[argument] = "constexpr", known[argument]
        elif argument in OPTIONAL and argument not in given:
            signature[argument], constants[argument] = "constexpr", None
        elif argument in UNIT:
            signature[argument], constants[argument] = "constexpr", 1
        elif argument in ("Q", "K") and described:
            shape = f"{sizes['BM' if argument == 'Q' else 'BN']}, {sizes['BK']}"
            signature[argument] = f"tensordesc<{ELEMENTS[dtype]}[{shape}]>"
        elif argument in ROWS:
            signature[argument] = f"*{ELEMENTS['float32' if name == 'lift' else dtype]}"
        elif argument.isupper() or argument in FOLDED:
            signature[argument] = TYPES.get(argument, "*fp32")
        else:
            signature[argument] = "i32"
    even = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(kernel.arg_names)
        if signature[argument].startswith("*") or (argument in WIDE and signature[argument] == "i32")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=even)
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=LIMITS[arch][0], options=options)


FOLDED = (
    "mass",
    "shift",
    "positive_sum",
    "positive_count",
    "weight_sum",
    "allowed_sum",
    "allowed_count",
    "positive_max",
    "negative_max",
)


def spills(built: Any, folder: Path) -> int:
    """Bytes of registers that went to memory (AMD: vector registers)."""
    if "amdgcn" in built.asm:
        return sum(map(int, re.findall(r"\.vgpr_spill_count:\s*(\d+)", built.asm["amdgcn"])))
    return sum(map(int, re.findall(r"STACK:(\d+)", dumped(built, "-res-usage", folder))))


def machine_code(built: Any, folder: Path) -> str:
    return built.asm["amdgcn"] if "amdgcn" in built.asm else dumped(built, "-sass", folder)


def dumped(built: Any, what: str, folder: Path) -> str:
    """What the disassembler that comes with Triton says about a cubin."""
    path = folder / "kernel.cubin"
    path.write_bytes(built.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, what, str(path)], capture_output=True, text=True, check=True).stdout


def hold_to_limits(built: Any, arch: str, folder: Path, *, tensor_cores: bool = True) -> None:
    assert spills(built, folder) == 0
    assert built.metadata.shared <= LIMITS[arch][1]
    if tensor_cores:
        assert re.search(LIMITS[arch][2], machine_code(built, folder))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled here and now, and nothing left behind."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ["lse", "weights", "sigmoid"])
@pytest.mark.parametrize("arch", list(LIMITS))
def test_the_first_choice_for_each_architecture_does_not_spill(arch: str, name: str, tmp_path: Path) -> None:
    card = tuning.Card("", arch, 100, LIMITS[arch][1])
    config = tuning.config(card, name, 2, ragged=True)
    built = compiled(name, arch, "bfloat16", config)
    hold_to_limits(built, arch, tmp_path)
    assert built.metadata.shared <= tuning.shared_bytes(config, 2)  # what the choice was made by


@pytest.mark.parametrize("name", ["lse", "weights", "sigmoid"])
def test_whole_tiles_on_hopper_do_not_spill_and_come_through_the_copy_engine(name: str, tmp_path: Path) -> None:
    config = tuning.choices("sm_90", name, 2)[0]
    built = compiled(name, "sm_90", "bfloat16", config, RAGGED=False)
    hold_to_limits(built, "sm_90", tmp_path)
    assert "UTMALDG" in machine_code(built, tmp_path)


@pytest.mark.parametrize("name", ["lse", "weights", "sigmoid"])
@pytest.mark.parametrize(
    "arch, given, flags",
    [
        ("sm_90", (*MASKS, "QID", "KID", "SP"), EXCLUDES),
        ("sm_80", (*MASKS, "QID", "KID", "AW", "SP", "LIFTED"), SEVERAL),
    ],
    ids=["exclusions", "several-positives"],
)
def test_kernels_with_every_option_do_not_spill(
    name: str, arch: str, given: tuple[str, ...], flags: dict[str, Any], tmp_path: Path
) -> None:
    config = tuning.choices(arch, name, 2, busy=True)[0]
    hold_to_limits(compiled(name, arch, "float16", config, given, **flags), arch, tmp_path)


@pytest.mark.parametrize("name", ["lse", "weights"])
def test_kernels_with_a_margin_do_not_spill(name: str, tmp_path: Path) -> None:
    config = tuning.choices("sm_90", name, 2, busy=True)[0]
    given = (*MASKS, "EXACT", "QLIM", "KLIM", "RM", "CM")
    hold_to_limits(compiled(name, "sm_90", "bfloat16", config, given, DESIGNATED=2, SUMS=True), "sm_90", tmp_path)


@pytest.mark.parametrize("name", ["lse", "weights", "sigmoid"])
def test_float32_rows_take_tf32_tensor_cores_when_allowed(name: str, tmp_path: Path) -> None:
    config = tuning.config(tuning.Card("", "sm_80", 100, LIMITS["sm_80"][1]), name, 4)
    built = compiled(name, "sm_80", "float32", config, TF32=name != "lse", PRECISION="tf32")
    hold_to_limits(built, "sm_80", tmp_path)


@pytest.mark.parametrize("name", ["lse", "weights", "sigmoid"])
def test_ieee_float32_does_not_spill_and_leaves_the_tensor_cores_alone(name: str, tmp_path: Path) -> None:
    config = tuning.choices("sm_90", name, 4, ieee=True)[0]
    built = compiled(name, "sm_90", "float32", config)
    hold_to_limits(built, "sm_90", tmp_path, tensor_cores=False)
    assert not re.search(r"\bH\w*MMA\.", machine_code(built, tmp_path))


@pytest.mark.parametrize("name, over", [("repair", "lse"), ("wide", "weights")])
def test_repairs_do_not_spill(name: str, over: str, tmp_path: Path) -> None:
    whole, small = tuning.choices("sm_90", over, 2)[0], tuning.SMALL[name]
    config = tuning.Config(whole.rows, whole.columns, small.width, small.warps, small.stages)
    built = compiled(name, "sm_90", "bfloat16", config, SM=small.rows, SN=small.columns)
    assert spills(built, tmp_path) == 0
    assert built.metadata.shared <= 99 * KIB


def test_our_own_product_does_not_spill(tmp_path: Path) -> None:
    card = tuning.Card("", "sm_80", 100, 99 * KIB)
    hold_to_limits(compiled("product", "sm_80", "float16", tuning.config(card, "product", 2)), "sm_80", tmp_path)


@pytest.mark.parametrize("name", ["fold", "lift", "poison", "round_rows"])
def test_the_kernels_over_vectors_compile(name: str, tmp_path: Path) -> None:
    flags = {"BLOCK": 1024} if name == "lift" else {"BM": 16, "BK": 256} if name == "poison" else {}
    dtype = "float32" if name == "round_rows" else "bfloat16"
    built = compiled(name, "sm_80", dtype, tuning.Config(32, 32, 128, 4, 2), **flags)
    assert spills(built, tmp_path) == 0
