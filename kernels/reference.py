"""The inner parts of the linear log-prob in plain torch: the CPU implementation and the reference.

Legend: N tokens, D hidden, V vocab rows of this rank, w columns of one chunk.

Both parts go through the vocabulary in chunks and hold one (N, w) chunk of float32 logits at a
time. On a CPU a bfloat16 GEMM rounds its result to bfloat16, so logits are products of float32
copies (of hidden whole, of weight by the chunk); the gradients' GEMMs take dz and weight as they
are. Everything is in base 2, as in the Triton kernels; exp2 is also the quicker function.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.gemm import add_product
from kernels.head import LOWEST, Chunk, Head, RowFactors, gradient_dtype, statistics_dtype

UNIT = math.log(2)  # logits and their statistics are in bits
# Largest temporary of the operator. Big enough for efficient GEMMs, small beside any model.
SCRATCH_BYTES = 32 * 2**20
MIN_CHUNK = 64  # columns; less starves the GEMM, and other than multiples of it slows it down
LOWEST_BITS = -4096.0  # 2^ this is 0 in float64 too
MAX_SUM = 2.0**64  # of a row's exponentials in one chunk; above it the row needs a higher anchor


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Forward's exponentials 2^(z - anchor) times the softcap's slope; the label's is missing."""

    anchor: Tensor  # (N,) whole numbers, so that a change of anchor rescales without rounding
    chunks: list[Tensor]  # of the leading vocab rows, (N, w) each


def forward_statistics(hidden, weight, bias, labels, head: Head, cache_budget_bytes: int):
    """(3 or 4, N) statistics of this rank's columns (see `_merge_ranks`) and backward's cache."""
    buffers = 1 + (head.softcap is not None) + head.with_entropy
    logits = _Logits(hidden, weight, bias, labels, head, buffers)
    anchor = hidden.new_full((len(hidden),), LOWEST, dtype=logits.dtype)
    target = torch.full_like(anchor, -math.inf)
    total, weighted = torch.zeros_like(anchor), torch.zeros_like(anchor)
    dtype, kept = gradient_dtype(hidden, weight), []
    num_kept = _num_kept(cache_budget_bytes, anchor, dtype)
    bits = logits.scratch.new_empty(logits.scratch.shape if head.with_entropy else 0)
    for begin, end in logits.borders(0):
        z = logits.without_label(begin, end, target)
        fits = bool((anchor > LOWEST).all())
        if fits:
            part = _exponentials(logits.minus(z, anchor), bits).sum(1)
            fits = bool((part < MAX_SUM).all())
            if not fits:
                z = logits.without_label(begin, end, target)  # their exponentials took its place
        if not fits:  # the first chunk, or logits far above the earlier ones
            highest = z.amax(1).mul_(logits.scale).ceil_()
            lower, anchor = anchor, torch.maximum(anchor, highest)
            part = _exponentials(logits.minus(z, anchor), bits).sum(1)
            scale = (lower - anchor).exp2_()
            weighted = (weighted + total * (lower - anchor)) * scale
            total *= scale
            for chunk in kept:
                chunk *= scale.to(dtype)[:, None]
        total += part
        if head.with_entropy:
            weighted += bits[: z.numel()].view(z.shape).mul_(z).sum(1)
        if begin < num_kept:
            if head.softcap is not None:
                z *= _slope(z.log2().add_(anchor[:, None]), head.softcap)
            kept.append(z[:, : num_kept - begin].to(dtype, copy=True))
    stats = torch.stack([anchor, total, target, weighted][: 3 + head.with_entropy])
    return stats, Cache(anchor=anchor, chunks=kept) if kept else None


def _exponentials(z: Tensor, bits: Tensor) -> Tensor:
    """2^z in z's place; z itself goes to `bits` unless that is empty (a logarithm is slower)."""
    if bits.numel():  # what gives 0 stays finite: the label's -inf times 0 would be NaN
        torch.clamp(z, min=LOWEST_BITS, out=bits[: z.numel()].view(z.shape))
    return z.exp2_()


def dlogit_chunks(
    hidden, weight, bias, labels, head: Head, factors: RowFactors, cache: Cache | None
) -> Iterator[Chunk]:
    """dL/d(hidden . weight + bias) of every real column, the cached ones first."""
    buffers = 1 + (head.softcap is not None) + 2 * (factors.grad_entropy is not None)
    logits = _Logits(hidden, weight, bias, labels, head, buffers)
    dtype = gradient_dtype(hidden, weight)
    at_target = factors.at_target
    if head.softcap is not None:
        at_target = at_target * _slope(factors.target.clone(), head.softcap)
    at_target = at_target.to(dtype)

    def finished(begin: int, dz: Tensor) -> Chunk:
        end = begin + dz.shape[1]
        rows, columns = logits.label_positions(begin, end)
        dz[rows, columns] = at_target[rows]
        return Chunk(begin=begin, end=end, dz=dz, weight=logits.columns(begin, end, dtype))

    begin = 0
    if cache is not None:
        scale = (cache.anchor - factors.anchor).exp2_().mul_(-factors.grad)[:, None]
        for dz in cache.chunks:
            yield finished(begin, _scale_rows(dz, scale, logits.scratch))
            begin += dz.shape[1]
    rounded = hidden.new_empty(0, dtype=dtype)
    for start, end in logits.borders(begin):
        z = logits.minus(logits.of(start, end), factors.anchor)
        dz = _dlogits(z, factors, head.softcap)
        if dtype != dz.dtype:
            dz = rounded.resize_(dz.shape).copy_(dz)
        yield finished(start, dz)


def _scale_rows(kept: Tensor, scale: Tensor, scratch: Tensor) -> Tensor:
    """kept *= scale in place, rounded once."""
    if kept.dtype == scale.dtype:
        return kept.mul_(scale)
    # By way of the scratch: torch would make whole float32 copies of both operands.
    product = scratch[: kept.numel()].view(kept.shape)
    return kept.copy_(product.copy_(kept).mul_(scale))


def _dlogits(z: Tensor, factors: RowFactors, softcap: float | None) -> Tensor:
    """-p times the upstream gradients, in the place of z (N, w) = logits - anchor."""
    slope = None if softcap is None else _slope(z + factors.anchor[:, None], softcap)
    if factors.grad_entropy is None:
        dz = z.exp2_().mul_(-factors.grad[:, None])
    else:
        per_logit = (z * UNIT).add_(factors.entropy[:, None]).mul_(factors.grad_entropy[:, None])
        dz = z.exp2_().mul_(per_logit.add_(factors.grad[:, None])).neg_()
    return dz if slope is None else dz.mul_(slope)


def _slope(z: Tensor, softcap: float) -> Tensor:
    """d softcap(z) / dz = 1 - (softcap(z) / c)^2 from the capped logits, which are overwritten."""
    return z.mul_(UNIT / softcap).clamp_(-1, 1).square_().neg_().add_(1)


class _Logits:
    """Logits of this rank's real rows, chunk by chunk in one scratch."""

    def __init__(self, hidden, weight, bias, labels, head: Head, buffers: int):
        """`buffers` counts the (N, w) float32 temporaries of the caller, the scratch among them."""
        self.weight, self.bias, self.labels, self.head = weight, bias, labels, head
        self.hidden = hidden.to(_gemm_dtype(hidden, weight))
        self.dtype, (n, d) = statistics_dtype(hidden, weight), hidden.shape
        self.width = min(chunk_width(n, d, self.dtype.itemsize, buffers), max(head.num_rows, 1))
        self.scratch = hidden.new_empty(n * self.width, dtype=self.dtype)
        self.converted = hidden.new_empty(0)
        self.scale = (head.softcap or 1 / head.temperature) / UNIT

    def borders(self, begin: int) -> Iterator[tuple[int, int]]:
        for start in range(begin, self.head.num_rows, self.width):
            yield start, min(start + self.width, self.head.num_rows)

    def columns(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:  # (end - begin, D)
        """Rows of the weight; a copy in `dtype` lasts until the next one."""
        rows = self.weight[begin:end]
        if rows.dtype == dtype:
            return rows
        if self.converted.dtype != dtype or not self.converted.numel():
            self.converted = rows.new_empty(self.width * rows.shape[1], dtype=dtype)
        return self.converted[: rows.numel()].view(rows.shape).copy_(rows)

    def of(self, begin: int, end: int) -> Tensor:  # (N, end - begin)
        """The scratch with the logits; times `scale` they count in bits."""
        n = len(self.hidden)
        z = self.scratch[: n * (end - begin)].view(n, end - begin)
        columns = self.columns(begin, end, self.hidden.dtype)
        add_product(z, self.hidden, columns.t(), accumulate=False)
        if self.bias is not None:
            z += self.bias[begin:end]
        if self.head.softcap is not None:
            z.mul_(1 / (self.head.temperature * self.head.softcap)).tanh_()
        return z

    def minus(self, z: Tensor, offset: Tensor) -> Tensor:  # offset (N,)
        """`of`'s logits in bits, less `offset` per row, in place: one rounding for both."""
        return torch.add(-offset[:, None], z, alpha=self.scale, out=z)

    def without_label(self, begin: int, end: int, target: Tensor) -> Tensor:
        """`of`, with labels at -inf; their logits in bits go to `target` (N,)."""
        z = self.of(begin, end)
        rows, columns = self.label_positions(begin, end)
        target[rows] = z[rows, columns] * self.scale
        z[rows, columns] = -math.inf
        return z

    def label_positions(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Rows whose label lies between two vocab rows of this rank, and its column from there."""
        column = self.labels.long() - (self.head.vocab_start + begin)
        (rows,) = ((column >= 0) & (column < end - begin)).nonzero(as_tuple=True)
        return rows, column[rows]


def chunk_width(n: int, d: int, itemsize: int, buffers: int = 1) -> int:
    """Vocab columns of one chunk: logits, a weight slice and its gradient within SCRATCH_BYTES."""
    fitting = SCRATCH_BYTES // (itemsize * (buffers * n + 2 * d))
    return max(fitting // MIN_CHUNK, 1) * MIN_CHUNK


def _num_kept(budget_bytes: int, anchor: Tensor, dtype: torch.dtype) -> int:
    """Columns whose exponentials, with the anchor (N,), fit into the budget."""
    n = len(anchor)
    return max(budget_bytes - anchor.nbytes, 0) // (n * dtype.itemsize) if n else 0


def _gemm_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    # A CPU GEMM of bfloat16 rounds its result to bfloat16: multiply float32 copies there.
    if hidden.device.type == "cpu":
        return statistics_dtype(hidden, weight)
    return torch.promote_types(hidden.dtype, weight.dtype)
