"""Library matrix products with float32 accumulation, whatever the operands' and results' types."""

from __future__ import annotations

import threading
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


_ONE_THREAD = threading.RLock()


@contextmanager
def exact_matmul(hidden: Tensor, weight: Tensor) -> Iterator[None]:
    """No autocast, no TF32, no partial sums in half precision; the settings found come back. They
    are the process's, so one thread at a time is inside.

    On the CPU float32 GEMMs stay float32, but those of bfloat16 values go to the bfloat16 units
    where there are any (AMX), which is exact (float32 accumulator and result).
    """
    if hidden.is_cuda:
        settings = _exact_cuda_matmul()
    else:
        both_bfloat16 = hidden.dtype == weight.dtype == torch.bfloat16
        settings = _cpu_matmul_precision("bf16" if both_bfloat16 else "ieee")
    with _ONE_THREAD, torch.autocast(hidden.device.type, enabled=False), settings:
        yield


@contextmanager
def _cpu_matmul_precision(precision: str) -> Iterator[None]:
    backend = torch.backends.mkldnn
    saved = backend.matmul.fp32_precision
    if saved == backend.fp32_precision:
        saved = "none"  # inherited; written back as it reads, it would no longer follow
    backend.matmul.fp32_precision = precision
    try:
        yield
    finally:
        backend.matmul.fp32_precision = saved


@contextmanager
def _exact_cuda_matmul() -> Iterator[None]:
    backend = torch.backends.cuda.matmul
    precision = backend.fp32_precision
    try:
        allowed_tf32 = backend.allow_tf32
    except RuntimeError:  # set through fp32_precision only; torch refuses to read the older switch
        allowed_tf32 = False
    reductions = (
        "allow_bf16_reduced_precision_reduction",
        "allow_fp16_reduced_precision_reduction",
    )
    saved = {
        name: (getattr(backend, name), getattr(backend, name + "_split_k")) for name in reductions
    }
    try:
        backend.allow_tf32 = False  # sets both switches alike, or float32 GEMMs raise
        for name, (_, split_k) in saved.items():
            setattr(backend, name, (False, split_k))
        yield
    finally:
        if allowed_tf32:
            backend.allow_tf32 = True
        backend.fp32_precision = precision
        for name, value in saved.items():
            setattr(backend, name, value)
