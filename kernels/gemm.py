"""Library matrix products with float32 accumulation, whatever the operands' and results' types."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def add_product(
    out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool, may_round: bool = False
) -> None:
    """out = a @ b, or out += a @ b, rounded once to out's type; a and b have one type.

    On a CPU a half GEMM rounds its result: `may_round` allows that before it is added to a wider
    `out`. Without it the operands are converted first, which is slower.
    """
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=int(accumulate), out=out)
    elif a.is_cuda and out.dtype == torch.float32:  # half operands, float32 result
        torch.addmm(out, a, b, beta=int(accumulate), out_dtype=out.dtype, out=out)
    elif not may_round and torch.promote_types(a.dtype, out.dtype) == out.dtype:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=int(accumulate), out=out)
    elif accumulate:
        out += a @ b
    else:
        out.copy_(a @ b)


@contextmanager
def exact_matmul(hidden: Tensor, weight: Tensor) -> Iterator[None]:
    """No autocast and no silent rounding of operands or partial sums.

    On the CPU float32 GEMMs stay float32, but copies of bfloat16 operands go to the bfloat16
    units, which is exact (float32 accumulator and result).
    """
    both_bfloat16 = hidden.dtype == weight.dtype == torch.bfloat16
    if hidden.is_cuda:
        settings = {
            "fp32_precision": "ieee",
            "allow_bf16_reduced_precision_reduction": False,
            "allow_fp16_reduced_precision_reduction": False,
        }
        backend = torch.backends.cuda.matmul
    else:
        settings = {"fp32_precision": "bf16" if both_bfloat16 else "ieee"}
        backend = torch.backends.mkldnn.matmul
    saved = {name: getattr(backend, name) for name in settings}
    with torch.autocast(hidden.device.type, enabled=False):
        try:
            for name, value in settings.items():
                setattr(backend, name, value)
            yield
        finally:
            for name, value in saved.items():
                setattr(backend, name, value)
