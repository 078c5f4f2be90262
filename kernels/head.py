"""What the implementations of the linear log-prob share: the head's numbers and per-row factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

LOWEST = -3e38  # anchor of "no column yet"; finite, so that differences of anchors stay defined


@dataclass(frozen=True, kw_only=True)
class Head:
    """What the operator knows about the head beside its tensors; checked by the public operator."""

    vocab_start: int  # id of this rank's first row
    num_rows: int  # real rows of this rank
    tp_group: dist.ProcessGroup | None  # None when the vocabulary is not sharded
    row_splits: Sequence[int] | None  # tokens that each rank of tp_group brings; None: all of them
    temperature: float
    softcap: float | None
    with_entropy: bool


@dataclass(frozen=True, kw_only=True)
class RowFactors:
    """dz[n, v] = at_target[n] if v is the label, else -p (g + g_entropy (log p + H)), in both cases
    times the softcap's slope. p = exp(z - anchor) / sum, and log p = z - anchor - log sum: one
    number for anchor + log sum would lose digits, so the sum is in the other factors."""

    anchor: Tensor  # (N,) near the row's largest z, a whole number in the implementation's unit
    grad: Tensor  # (N,) upstream gradient / temperature / sum
    at_target: Tensor  # (N,) the label's dz, written with 1 - p where onehot - p loses its digits
    target: Tensor  # (N,) the label's logit in the implementation's unit
    grad_entropy: Tensor | None  # (N,) / temperature / sum
    entropy: Tensor | None  # (N,) H - log sum, in nats


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """dL/d(hidden . weight + bias) of some vocab rows; the next chunk overwrites the tensors."""

    begin: int
    end: int
    dz: Tensor  # (N, end - begin)
    weight: Tensor  # (end - begin, D) in dz's type


def softplus(x: Tensor) -> Tensor:
    # torch's own softplus is linear above 20, which is wrong in float64.
    return x.clamp(min=0) + x.abs().neg().exp().log1p()


def statistics_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def gradient_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Type of dz: the operands', but float32 for float16, where g p underflows."""
    operands = torch.promote_types(hidden.dtype, weight.dtype)
    return torch.float32 if operands == torch.float16 else operands
