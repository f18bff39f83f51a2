"""Products of bfloat16 matrices with float32 results, by a function of MKL that PyTorch carries and does not call.

PyTorch's own product of bfloat16 matrices on a CPU rounds its result to bfloat16, which would spoil a loss. But its
builds for x86 hold Intel's MKL, and that has

    cblas_gemm_bf16bf16f32      out [r, c] = beta out + alpha left [r, k] @ right [k, c]

(oneMKL's reference, BLAS-like extensions): bfloat16 factors as they are, float32 sums, no flag of the process. On
processors with tiles for bfloat16 (AMX) it is six times as fast as float32, and there it is used. It is looked up
among what PyTorch has loaded, then looked at. Builds for ARM have none, on Windows it does not show, others may link
theirs otherwise: there bfloat16 rows take float32 products, as they do on any processor without tiles.

What is not a bfloat16 value must not enter such a product: rows times a scale are none, so the scale multiplies what
comes out, or is its alpha. The two differ in the last bits, for a wide sum is made of parts and alpha multiplies each.
Gradient weights are rounded for it, as they may be. Numbers below 1.2e-38 count as zero, in factors and in sums: so
they do in PyTorch's own bfloat16 products on these processors.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from nibs_torch.precision import EXACT, largest_error

__all__ = ["narrows", "product"]

BY_ROWS, AS_IT_IS, TRANSPOSED = 101, 111, 112  # CBLAS's names for them: CblasRowMajor, CblasNoTrans, CblasTrans
LONGEST = 2**31 - 1  # its sizes and strides are 32-bit


def narrows(dtype: str, device: str) -> bool:
    """Whether rows of this dtype, on a device of this name, are multiplied by `product`."""
    return dtype == "bfloat16" and device.partition(":")[0] == "cpu" and _has_tiles() and _is_exact()


def product(left: Tensor, right: Tensor, out: Tensor, *, alpha: float = 1.0, beta: float = 0.0) -> None:
    """`out [r, c] = beta out + alpha left [r, k] @ right [k, c]`: bfloat16 factors of any strides, float32 rows out.

    With beta 0 it does not matter what `out` holds. As many threads run as `torch.set_num_threads` says.
    """
    # A wrapper around tensors (`__torch_dispatch__`: what a functional collective gives, a fake one) has no memory.
    memory = left.data_ptr() and right.data_ptr() and out.data_ptr()
    if not memory or max(*left.shape, *right.shape, out.stride(0)) > LONGEST:
        torch.addmm(out, left.float(), right.float(), beta=beta, alpha=alpha, out=out)
        return
    left, turned, step = _laid_out(left)
    right, other_turned, other_step = _laid_out(right)
    (rows, inner), columns = left.shape, right.shape[1]
    torch.get_num_threads()  # a thread that PyTorch has not seen yet would take all cores
    _function()(
        *(BY_ROWS, turned, other_turned, rows, columns, inner),
        *(alpha, left.data_ptr(), step, right.data_ptr(), other_step),
        *(beta, out.data_ptr(), max(out.stride(0), columns, 1)),
    )


def _laid_out(factor: Tensor) -> tuple[Tensor, int, int]:
    """A matrix as BLAS can read it, whether it is turned, and the step from a row (a column) to the next."""
    rows, columns = factor.shape
    down, across = factor.stride()
    if across == 1 and max(columns, 1) <= down <= LONGEST:
        return factor, AS_IT_IS, down
    if down == 1 and max(rows, 1) <= across <= LONGEST:
        return factor, TRANSPOSED, across
    return factor.clone(memory_format=torch.contiguous_format), AS_IT_IS, max(columns, 1)


@lru_cache
def _function() -> Any:
    """MKL's function, in PyTorch's own copy or in the one that it has loaded; None where neither shows it."""
    try:
        found = ctypes.CDLL(torch._C.__file__).cblas_gemm_bf16bf16f32  # a name is searched in what that file needs, too
    except (OSError, AttributeError):
        return None
    size, number, address = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    found.argtypes = [*[size] * 6, number, address, size, address, size, number, address, size]
    found.restype = None
    return found


def _has_tiles() -> bool:
    """Whether this processor multiplies bfloat16 values in tiles."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


@lru_cache
def _is_exact() -> bool:
    """Whether the function is here and does what it says, in each layout: float32 sums, added to what is there."""
    if _function() is None:
        return False

    def multiply(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
        product(left, right, out, alpha=0.5, beta=0.0)
        product(left, right, out, alpha=0.5, beta=1.0)
        return out

    return largest_error(multiply, torch.bfloat16) <= EXACT
