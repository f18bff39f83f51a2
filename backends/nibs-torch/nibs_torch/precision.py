"""Matrix products in the precision that a call asks for, whatever the framework is set to, by the fastest kernels.

    "default"   as the framework is set
    "high"      TF32 class: 10 bits of mantissa or more into each product, where the device has such products
    "highest"   IEEE float32

PyTorch keeps this in flags of the whole process. They are set for the one product that is being computed (on a GPU:
launched; of a small batch: for its three), and put back after it; threads that want the same flag at once share it, and
others wait, those too that want it as the framework is set. Where a flag stands right already, nothing is touched.
Products of another thread that are not nibs's may see it meanwhile, and get more or less precision than they asked for,
but no wrong numbers.

On a CPU the flag also says whose kernels run. PyTorch gives float32 products to MKL, which goes by the maker of the
processor: on an AMD EPYC with AVX-512 it reaches half of what oneDNN does. `fp32_precision = "bf16"` allows oneDNN
bfloat16 products, and with that its kernels; it takes bfloat16 only where the processor has tiles for it (AMX).
On any other it computes in float32, to the last bit of IEEE (`_one_dnn_is_exact` looks), so that there the flag costs
nothing and nobody else's products change by more than their order of summation.

Products of bfloat16 rows on a processor with those tiles need no flag: they are `nibs_torch.mkl`'s.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch

__all__ = ["largest_error", "of_rows", "products"]

LARGE = 1 << 22
"""Flops of a product from which oneDNN's kernels, which are set up anew for each, are worth their start."""

EXACT = 1e-5
"""Relative error of a sum of positive products that float32 keeps to, and bfloat16 does not: there it is 1e-4 or so."""

GOLDEN = 0.6180339887498949  # its multiples are spread evenly between whole numbers

_NOTHING = nullcontext()


class _Lent:
    """One flag of the process: `with` sets it for as long as anybody who wants this value needs it. Not nested."""

    def __init__(self, holder: Any, name: str) -> None:
        self.holder, self.name = holder, name
        self.turn = threading.Lock()  # of who comes next: whoever waits is not passed by
        self.free = threading.Condition()
        self.users, self.value, self.before = 0, None, None

    def stands(self) -> Any:
        """What the framework is set to, whoever has borrowed the flag meanwhile."""
        return self.before if self.users else getattr(self.holder, self.name)

    def to(self, value: Any) -> AbstractContextManager[Any]:
        return _Loan(self, value)

    def put_back(self) -> None:
        """The flag as it was: one that followed a wider setting (`torch.backends.fp32_precision`) follows it again."""
        if self.name == "fp32_precision":
            setattr(self.holder, self.name, "none")
        if getattr(self.holder, self.name) != self.before:
            setattr(self.holder, self.name, self.before)


class _Loan:
    """One use of a lent flag. value: None for as the framework is set."""

    def __init__(self, lent: _Lent, value: Any) -> None:
        self.lent, self.value = lent, value

    def __enter__(self) -> None:
        lent = self.lent
        with lent.turn, lent.free:
            stands = lent.stands()
            value = stands if self.value is None else self.value
            if lent.users and lent.value != value:
                lent.free.wait_for(lambda: not lent.users)
            if not lent.users:
                lent.before, lent.value = stands, value
                if stands != value:
                    setattr(lent.holder, lent.name, value)
            lent.users += 1

    def __exit__(self, *_: object) -> None:
        lent = self.lent
        with lent.free:
            lent.users -= 1
            if not lent.users:
                if lent.before != lent.value:
                    lent.put_back()
                lent.free.notify_all()


def of_rows(dtype: str, precision: str) -> str:
    """The precision of products of rows of a dtype, in a call that asks for `precision`: that is float32 rows'.

    Half-precision rows are exact numbers, and what is made of them is right to the float32 level, whatever is set.
    """
    return "highest" if dtype in ("bfloat16", "float16") else precision


def products(precision: str, dtype: torch.dtype, device: torch.device, flops: int = 0) -> AbstractContextManager[Any]:
    """A context for one matrix product of `dtype` on `device`, of so many flops."""
    lent = _flag(device.type) if dtype == torch.float32 else None
    if lent is None:
        return _NOTHING
    if device.type == "cpu" and flops >= LARGE:
        asked = precision == "highest" or (precision == "default" and lent.stands() in ("none", "ieee"))
        if asked and _one_dnn_is_exact():
            return lent.to("bf16")
    if precision == "default":
        return lent.to(None)
    fast = precision == "high"
    return lent.to(fast if lent.name == "allow_tf32" else "tf32" if fast else "ieee")


@lru_cache
def _flag(device: str) -> _Lent | None:
    """The flag of a kind of device; None where there is none."""
    if device == "cuda":
        holder: Any = torch.backends.cuda.matmul
    elif device in ("cpu", "xpu"):
        holder = getattr(torch.backends.mkldnn, "matmul", None)
    else:
        return None
    if hasattr(holder, "fp32_precision"):
        return _Lent(holder, "fp32_precision")
    return _Lent(holder, "allow_tf32") if device == "cuda" else None  # before 2.9


@lru_cache
def _one_dnn_is_exact() -> bool:
    """Whether the flag that opens oneDNN's kernels leaves products in float32 here; the same in every call.

    Looked up, then looked at: products of numbers that bfloat16 cannot hold.
    """
    cpu = torch.cpu
    has_tiles = getattr(cpu, "_is_amx_tile_supported", lambda: True)()
    if has_tiles or not getattr(cpu, "_is_avx512_supported", lambda: False)():
        return False
    lent = _flag("cpu")
    if lent is None or not torch.backends.mkldnn.is_available():
        return False

    def multiply(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False), lent.to("bf16"):
            return torch.addmm(out, left, right)

    return largest_error(multiply, torch.float32) <= EXACT


def largest_error(
    multiply: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor], values: torch.dtype
) -> float:
    """The largest relative error of products of positive numbers of a dtype, in each layout, on a CPU.

    multiply: of `out` (float32 zeros that it may write to), `left` and `right`. Nothing around the call (autocast,
    default dtype and device, a transform) may enter: the answer is kept.
    """

    def drawn(rows: int, columns: int) -> torch.Tensor:
        """Numbers between 1 and 2, none like the other, and no random ones: vmap would refuse those."""
        steps = torch.arange(rows * columns, dtype=torch.float64, device="cpu")
        return steps.mul_(GOLDEN).frac_().add_(1).view(rows, columns).to(values)

    worst = torch.zeros((), dtype=torch.float64, device="cpu")
    for rows, width, columns in ((64, 64, 64), (256, 512, 384), (384, 256, 128)):
        one, other = drawn(rows, width), drawn(columns, width)
        exact = one.double() @ other.double().T
        for left, right in ((one, other.T), (one.T.contiguous().T, other.T.contiguous()), (one, other.T.contiguous())):
            found = multiply(torch.zeros((rows, columns), dtype=torch.float32, device="cpu"), left, right)
            worst = torch.maximum(worst, ((found - exact).abs() / exact).max())  # NaN stays
    return worst.item()
