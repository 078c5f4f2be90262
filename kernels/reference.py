"""The inner parts of the linear log-prob in plain torch: the CPU implementation and the reference.

Legend: N tokens, D hidden, V vocab rows of this rank, w columns of one chunk.

Both parts go through the vocabulary in chunks and hold one (N, w) chunk of logits at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.gemm import add_product
from kernels.head import LOWEST, Chunk, Head, RowFactors, gradient_dtype, statistics_dtype

UNIT = 1.0  # logits and their statistics are in nats
# Largest temporary of the operator. Big enough for efficient GEMMs, small beside any model.
SCRATCH_BYTES = 32 * 2**20
MIN_CHUNK = 64  # columns; less starves the GEMM


def forward_statistics(hidden, weight, bias, labels, head: Head, cache_budget_bytes: int):
    """(3 or 4, N) statistics of this rank's columns (see `_merge_ranks`), and None: no cache."""
    dtype = statistics_dtype(hidden, weight)
    anchor = hidden.new_full((len(hidden),), LOWEST, dtype=dtype)
    target = torch.full_like(anchor, -math.inf)
    total, weighted = torch.zeros_like(anchor), torch.zeros_like(anchor)
    buffers = 1 + (head.softcap is not None) + head.with_entropy
    operand = hidden.to(_gemm_dtype(hidden, weight))
    for begin, z, _ in _logit_chunks(operand, weight, bias, head, buffers):
        column, inside = _target_column(labels, head.vocab_start + begin, z.shape[1])
        z_target = z.gather(1, column)
        target = torch.where(inside, z_target, target[:, None])[:, 0]
        z.scatter_(1, column, z_target.masked_fill(inside, -math.inf))
        new_anchor = torch.maximum(anchor, z.amax(1))
        scale = (anchor - new_anchor).exp_()
        exp_z = z.sub_(new_anchor[:, None]).exp_()
        if head.with_entropy:
            weighted += total * (anchor - new_anchor)
            weighted = weighted * scale - torch.special.entr(exp_z).sum(1)
        total = total * scale + exp_z.sum(1)
        anchor = new_anchor
    return torch.stack([anchor, total, target, weighted][: 3 + head.with_entropy]), None


def dlogit_chunks(
    hidden, weight, bias, labels, head: Head, factors: RowFactors, cache
) -> Iterator[Chunk]:
    """dL/d(hidden . weight + bias) of every real column."""
    operand = hidden.to(_gemm_dtype(hidden, weight))
    buffers = 1 + (head.softcap is not None) + 2 * (factors.grad_entropy is not None)
    for begin, z, columns in _logit_chunks(operand, weight, bias, head, buffers):
        end = begin + z.shape[1]
        column, inside = _target_column(labels, head.vocab_start + begin, z.shape[1])
        dz = _dlogits(z, column, inside, factors, head.softcap)
        dtype = dz.dtype if dz.device.type == "cpu" else gradient_dtype(hidden, weight)
        yield Chunk(begin=begin, end=end, dz=dz.to(dtype), weight=columns.to(dtype))


def _dlogits(z, column, inside, factors: RowFactors, softcap) -> Tensor:
    """dz of one chunk, in the place of its logits z."""
    slope = 1 - (z / softcap).square_() if softcap is not None else None
    z.sub_(factors.lse[:, None])
    if factors.grad_entropy is None:
        dz = z.exp_().mul_(-factors.grad[:, None])
    else:
        per_logit = (z + factors.entropy[:, None]).mul_(factors.grad_entropy[:, None])
        dz = z.exp_().mul_(per_logit.add_(factors.grad[:, None])).neg_()
    dz.scatter_(1, column, torch.where(inside, factors.at_target[:, None], dz.gather(1, column)))
    return dz if slope is None else dz.mul_(slope)


def _logit_chunks(operand, weight, bias, head, buffers) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields (first row, z (N, w), its weight rows (w, D)) over this rank's real rows.

    z is the same scratch every time. `buffers` counts the (N, w) temporaries of the caller.
    """
    dtype, (n, d) = statistics_dtype(operand, weight), operand.shape
    width = chunk_width(n, d, dtype.itemsize, buffers)
    scratch = operand.new_empty(n * min(width, head.num_rows), dtype=dtype)
    for begin in range(0, head.num_rows, width):
        end = min(begin + width, head.num_rows)
        columns = weight[begin:end].to(operand.dtype)
        z = scratch[: n * (end - begin)].view(n, end - begin)
        add_product(z, operand, columns.t(), accumulate=False)
        if bias is not None:
            z += bias[begin:end]
        if head.temperature != 1.0:
            z /= head.temperature
        if head.softcap is not None:
            z.div_(head.softcap).tanh_().mul_(head.softcap)
        yield begin, z, columns


def chunk_width(n: int, d: int, itemsize: int, buffers: int = 1) -> int:
    """Vocab columns of one chunk: logits, a weight slice and its gradient within SCRATCH_BYTES."""
    return max(SCRATCH_BYTES // (itemsize * (buffers * n + 2 * d)), MIN_CHUNK)


def _target_column(labels: Tensor, first_id: int, width: int) -> tuple[Tensor, Tensor]:
    """(N, 1) column of each label in a chunk, clamped into it, and whether it is really there."""
    column = labels.long()[:, None] - first_id
    return column.clamp(0, width - 1), (column >= 0) & (column < width)


def _gemm_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    # A CPU GEMM of bfloat16 rounds its result to bfloat16: multiply float32 copies there.
    if hidden.device.type == "cpu":
        return statistics_dtype(hidden, weight)
    return torch.promote_types(hidden.dtype, weight.dtype)
