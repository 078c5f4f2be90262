"""The inner parts of the linear log-prob as Triton kernels: statistics forward, dz backward.

Legend: N tokens, D hidden, V real vocab rows of this rank, S slices of a row of logits.

Logits count in base 2: z2 = softcap((hidden . weight + bias) / temperature) log2 e, float32 in
registers only. The forward GEMM's epilogue writes, for each row and slice of a tile, an anchor
a = ceil(max z2) and the sum of 2^(z2 - a), both without the label's column, and the label's z2:
8 N S + 4 N bytes for S = V / (BLOCK_V / SLICES). An anchor is an integer, so that rescaling by
2^(a - b) is exact. A second kernel merges the slices in a fixed order.

Backward's dz is written by the same GEMM with the log of the whole sum known (strict), or made in
one pass over the E = 2^(z2 - a) that forward stored (cached; 4 N V bytes moved). Nothing here uses
atomics. dz's GEMMs are the library's (`kernels.linear_logprob`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.blocks import Blocks, blocks_for
from kernels.head import LOWEST, Chunk, Head, RowFactors, gradient_dtype

UNIT = math.log(2)  # logits and their statistics are in base 2
SCRATCH_BYTES = 256 * 2**20  # largest dz held at once
MERGE_ROWS = 32
PANEL_BYTES = 16 * 2**20  # of hidden, stays in the L2 cache while weight streams past
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def _tile_position(tile, N, V, panel_blocks, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """First row and column of a tile: panels of row blocks, in which weight streams once."""
    blocks_v = tl.cdiv(V, BLOCK_V)
    panel = tile // (panel_blocks * blocks_v)
    first = panel * panel_blocks
    rows = min(tl.cdiv(N, BLOCK_N) - first, panel_blocks)
    inside = tile - first * blocks_v
    return (first + inside % rows) * BLOCK_N, inside // rows * BLOCK_V


@triton.jit
def _dot_tile(
    hidden, weight, row0, col0, N, V, D, stride_hn, stride_hd, stride_wv, stride_wd,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """hidden[rows] @ weight[cols].T, (BLOCK_N, BLOCK_V) float32. Rows past the end are garbage."""
    acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    if DESCRIPTORS:
        for k in range(0, D, BLOCK_D):
            h = hidden.load([row0, k])
            w = weight.load([col0, k])
            acc = tl.dot(h, w.T, acc)
    else:
        rows = tl.minimum(row0 + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
        cols = tl.minimum(col0 + tl.arange(0, BLOCK_V), V - 1).to(tl.int64)
        d = tl.arange(0, BLOCK_D)
        h_ptrs = hidden + rows[:, None] * stride_hn + d[None, :] * stride_hd
        w_ptrs = weight + cols[None, :] * stride_wv + d[:, None] * stride_wd
        for k in range(0, D, BLOCK_D):
            if EVEN_D:
                h = tl.load(h_ptrs)
                w = tl.load(w_ptrs)
            else:
                h = tl.load(h_ptrs, mask=(d < D - k)[None, :], other=0.0)
                w = tl.load(w_ptrs, mask=(d < D - k)[:, None], other=0.0)
            acc = tl.dot(h, w.to(h.dtype), acc, input_precision=PRECISION)
            h_ptrs += BLOCK_D * stride_hd
            w_ptrs += BLOCK_D * stride_wd
    return acc


@triton.jit
def _slices(x, SLICES: tl.constexpr):
    """The columns of x in SLICES parts, left to right; smaller parts need fewer registers."""
    if SLICES == 1:
        return (x,)
    a, b = x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()
    if SLICES == 2:
        return (a, b)
    a0, a1 = a.reshape(a.shape[0], 2, a.shape[1] // 2).permute(0, 2, 1).split()
    b0, b1 = b.reshape(b.shape[0], 2, b.shape[1] // 2).permute(0, 2, 1).split()
    return (a0, a1, b0, b1)


@triton.jit
def _base2_logits(
    acc, cols, bias_ptr, V, scale_in, scale_out, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):
    """z2 of some columns, -inf past the real ones, and the softcap's slope."""
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    z2 = acc * scale_in
    slope = z2
    if HAS_SOFTCAP:
        small = tl.exp2(-2.885390081777927 * tl.abs(z2))  # exp(-2 |z2|), at most 1
        tanh = (1 - small) / (1 + small)
        slope = 4 * small / ((1 + small) * (1 + small))
        z2 = tl.where(z2 < 0, -tanh, tanh) * scale_out
    return tl.where((cols < V)[None, :], z2, float("-inf")), slope


@triton.jit
def _local_labels(labels_ptr, rows, N, V, vocab_start):
    """Columns of the rows' labels here, -1 or V for those elsewhere."""
    labels = tl.load(labels_ptr + rows, mask=rows < N, other=-1).to(tl.int64) - vocab_start
    return tl.minimum(tl.maximum(labels, -1), V).to(tl.int32)


@triton.jit(do_not_specialize=["N", "V", "vocab_start", "num_cached", "panel_blocks"])
def _linear_logprob_fwd_kernel(
    hidden, weight, bias_ptr, labels_ptr, anchor_ptr, total_ptr, weighted_ptr, target_ptr, e_ptr,
    N, V, D, stride_hn, stride_hd, stride_wv, stride_wd, stride_e, vocab_start, num_cached,
    panel_blocks, scale_in, scale_out,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, SLICES: tl.constexpr,
    DESCRIPTORS: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WITH_ENTROPY: tl.constexpr,
    STORE_E: tl.constexpr, FLATTEN: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0)
    if DESCRIPTORS:  # persistent: a program goes on to the next tile
        last = tl.cdiv(N, BLOCK_N) * tl.cdiv(V, BLOCK_V)
        step = tl.num_programs(0)
    else:
        last = first + 1
        step = 1
    WIDTH: tl.constexpr = BLOCK_V // SLICES
    for tile in tl.range(first, last, step, flatten=FLATTEN, warp_specialize=WARP_SPECIALIZE):
        row0, col0 = _tile_position(tile, N, V, panel_blocks, BLOCK_N, BLOCK_V)
        acc = _dot_tile(
            hidden, weight, row0, col0, N, V, D, stride_hn, stride_hd, stride_wv, stride_wd,
            BLOCK_N, BLOCK_V, BLOCK_D, DESCRIPTORS, EVEN_D, PRECISION,
        )  # fmt: skip
        rows = row0 + tl.arange(0, BLOCK_N)
        labels = _local_labels(labels_ptr, rows, N, V, vocab_start)
        parts = _slices(acc, SLICES)
        for i in tl.static_range(SLICES):
            begin = col0 + i * WIDTH
            cols = begin + tl.arange(0, WIDTH)
            z2, slope = _base2_logits(
                parts[i], cols, bias_ptr, V, scale_in, scale_out, HAS_BIAS, HAS_SOFTCAP
            )
            is_label = labels[:, None] == cols[None, :]
            owns = (labels >= begin) & (labels < begin + WIDTH) & (labels < V) & (rows < N)
            tl.store(target_ptr + rows, tl.sum(tl.where(is_label, z2, 0.0), 1), mask=owns)
            z2 = tl.where(is_label, float("-inf"), z2)
            anchor = tl.maximum(tl.ceil(tl.max(z2, 1)), -3e38)
            above = z2 - anchor[:, None]
            e = tl.exp2(above)
            at = (begin // WIDTH).to(tl.int64) * N + rows
            tl.store(anchor_ptr + at, anchor, mask=rows < N)
            tl.store(total_ptr + at, tl.sum(e, 1), mask=rows < N)
            if WITH_ENTROPY:
                weighted = tl.sum(e * tl.where(e > 0, above, 0.0), 1)
                tl.store(weighted_ptr + at, weighted, mask=rows < N)
            if STORE_E:  # noqa: SIM102 - known at compile time
                if begin < num_cached:
                    if HAS_SOFTCAP:
                        e *= slope
                    e_ptrs = e_ptr + rows.to(tl.int64)[:, None] * stride_e + cols[None, :]
                    tl.store(e_ptrs, e.to(e_ptr.dtype.element_ty), mask=(rows < N)[:, None])


@triton.jit(do_not_specialize=["N", "V", "vocab_start", "panel_blocks"])
def _linear_logprob_bwd_kernel(
    hidden, weight, bias_ptr, labels_ptr, lse_ptr, grad_ptr, at_target_ptr, grad_entropy_ptr,
    entropy_ptr, dz_ptr, N, V, D, stride_hn, stride_hd, stride_wv, stride_wd, stride_dz,
    vocab_start, panel_blocks, scale_in, scale_out,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, SLICES: tl.constexpr,
    DESCRIPTORS: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WITH_ENTROPY: tl.constexpr,
    FLATTEN: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0)
    if DESCRIPTORS:  # persistent: a program goes on to the next tile
        last = tl.cdiv(N, BLOCK_N) * tl.cdiv(V, BLOCK_V)
        step = tl.num_programs(0)
    else:
        last = first + 1
        step = 1
    WIDTH: tl.constexpr = BLOCK_V // SLICES
    for tile in tl.range(first, last, step, flatten=FLATTEN, warp_specialize=WARP_SPECIALIZE):
        row0, col0 = _tile_position(tile, N, V, panel_blocks, BLOCK_N, BLOCK_V)
        acc = _dot_tile(
            hidden, weight, row0, col0, N, V, D, stride_hn, stride_hd, stride_wv, stride_wd,
            BLOCK_N, BLOCK_V, BLOCK_D, DESCRIPTORS, EVEN_D, PRECISION,
        )  # fmt: skip
        rows = row0 + tl.arange(0, BLOCK_N)
        labels = _local_labels(labels_ptr, rows, N, V, vocab_start)
        lse = tl.load(lse_ptr + rows, mask=rows < N, other=0.0)
        grad = tl.load(grad_ptr + rows, mask=rows < N, other=0.0)
        at_target = tl.load(at_target_ptr + rows, mask=rows < N, other=0.0)
        if WITH_ENTROPY:
            grad_entropy = tl.load(grad_entropy_ptr + rows, mask=rows < N, other=0.0)
            entropy = tl.load(entropy_ptr + rows, mask=rows < N, other=0.0)
        parts = _slices(acc, SLICES)
        for i in tl.static_range(SLICES):
            cols = col0 + i * WIDTH + tl.arange(0, WIDTH)
            z2, slope = _base2_logits(
                parts[i], cols, bias_ptr, V, scale_in, scale_out, HAS_BIAS, HAS_SOFTCAP
            )
            log2_p = z2 - lse[:, None]
            factor = grad[:, None]
            if WITH_ENTROPY:
                finite = tl.where((cols < V)[None, :], log2_p, 0.0)
                per_logit = finite * 0.6931471805599453 + entropy[:, None]
                factor += per_logit * grad_entropy[:, None]
            dz = -tl.exp2(log2_p) * factor
            dz = tl.where(labels[:, None] == cols[None, :], at_target[:, None], dz)
            if HAS_SOFTCAP:
                dz *= slope
            dz_ptrs = dz_ptr + rows.to(tl.int64)[:, None] * stride_dz + cols[None, :]
            tl.store(dz_ptrs, dz.to(dz_ptr.dtype.element_ty), mask=(rows < N)[:, None])


@triton.jit(do_not_specialize=["N", "num_slices"])
def _merge_kernel(
    anchor_ptr, total_ptr, weighted_ptr, stats_ptr, N, num_slices,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, WITH_ENTROPY: tl.constexpr,
):  # fmt: skip
    """Statistics of all slices -> rows 0, 1 (and 3) of stats (3 or 4, N), in a fixed order."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    anchor = tl.full((BLOCK_N,), -3e38, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    weighted = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, num_slices, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        at = s.to(tl.int64)[:, None] * N + rows[None, :]
        inside = (s < num_slices)[:, None] & (rows < N)[None, :]
        anchors = tl.load(anchor_ptr + at, mask=inside, other=-3e38)
        totals = tl.load(total_ptr + at, mask=inside, other=0.0)
        new_anchor = tl.maximum(anchor, tl.max(anchors, 0))
        scales = tl.exp2(anchors - new_anchor[None, :])
        scale = tl.exp2(anchor - new_anchor)
        if WITH_ENTROPY:
            parts = tl.load(weighted_ptr + at, mask=inside, other=0.0)
            parts = (parts + totals * (anchors - new_anchor[None, :])) * scales
            weighted = (weighted + total * (anchor - new_anchor)) * scale + tl.sum(parts, 0)
        total = total * scale + tl.sum(totals * scales, 0)
        anchor = new_anchor
    tl.store(stats_ptr + rows, anchor, mask=rows < N)
    tl.store(stats_ptr + N + rows, total, mask=rows < N)
    if WITH_ENTROPY:
        tl.store(stats_ptr + 3 * N + rows, weighted, mask=rows < N)


@triton.jit(do_not_specialize=["N", "V", "vocab_start"])
def _cached_dlogits_kernel(
    e_ptr, anchor_ptr, labels_ptr, lse_ptr, grad_ptr, at_target_ptr, N, V, stride_e, vocab_start,
    BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """E -> dz in its place, one slice of some rows. 2^(a - lse) is at most 2: nothing overflows."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    index = tl.program_id(0) // blocks_n
    rows = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = index * WIDTH + tl.arange(0, WIDTH)
    labels = _local_labels(labels_ptr, rows, N, V, vocab_start)
    anchor = tl.load(anchor_ptr + index.to(tl.int64) * N + rows, mask=rows < N, other=0.0)
    lse = tl.load(lse_ptr + rows, mask=rows < N, other=0.0)
    grad = tl.load(grad_ptr + rows, mask=rows < N, other=0.0)
    at_target = tl.load(at_target_ptr + rows, mask=rows < N, other=0.0)
    ptrs = e_ptr + rows.to(tl.int64)[:, None] * stride_e + cols[None, :]
    e = tl.load(ptrs, mask=(rows < N)[:, None], other=0.0).to(tl.float32)
    dz = e * (-tl.exp2(anchor - lse) * grad)[:, None]
    dz = tl.where(labels[:, None] == cols[None, :], at_target[:, None], dz)
    tl.store(ptrs, dz.to(e_ptr.dtype.element_ty), mask=(rows < N)[:, None])


@dataclass(frozen=True, kw_only=True)
class _Cache:
    """What forward keeps of the first columns."""

    e: Tensor  # (N, columns padded to whole tiles)
    anchors: Tensor  # (slices, N)
    num_columns: int


def check_operands(hidden: Tensor, weight: Tensor) -> None:
    if not (hidden.is_cuda or INTERPRETED):
        raise ValueError(
            f"impl='triton' with tensors on {hidden.device}; expected CUDA; use impl='auto' or "
            "'torch' (or, to debug, TRITON_INTERPRET=1 in the environment)"
        )
    types = (torch.float32, torch.bfloat16, torch.float16)
    if hidden.dtype not in types or weight.dtype not in types:
        raise NotImplementedError(
            f"impl='triton' with {hidden.dtype} and {weight.dtype}; expected float32, bfloat16 or "
            "float16; use impl='torch'"
        )


def forward_statistics(hidden, weight, bias, labels, head: Head, cache_budget_bytes: int):
    """(3 or 4, N) statistics of this rank's columns (see `_merge_ranks`), and the cache or None."""
    n, v = len(hidden), head.num_rows
    stats = torch.zeros(3 + head.with_entropy, n, device=hidden.device)
    stats[0], stats[2] = LOWEST, -math.inf
    if n == 0 or v == 0:
        return stats, None
    blocks = _blocks(hidden, weight)
    tiles, dtype = triton.cdiv(v, blocks.block_v), gradient_dtype(hidden, weight)
    # What one tile of columns costs: E, and an anchor for each row and slice.
    tile_bytes = n * (blocks.block_v * dtype.itemsize + 4 * blocks.slices)
    cached_tiles = min(cache_budget_bytes // tile_bytes, tiles)
    num_cached = cached_tiles * blocks.block_v
    e = hidden.new_empty(n, num_cached, dtype=_stored(dtype))
    partial = hidden.new_empty(2 + head.with_entropy, tiles * blocks.slices, n, dtype=torch.float32)
    anchors, totals, weighted = partial[0], partial[1], partial[-1]
    _launch(
        _linear_logprob_fwd_kernel,
        *(hidden, weight[:v], bias, head, blocks),
        pointers=(labels, anchors, totals, weighted, stats[2], e),
        numbers=(e.stride(0), head.vocab_start, num_cached),
        WITH_ENTROPY=head.with_entropy,
        STORE_E=num_cached > 0,
    )
    _merge_kernel[(triton.cdiv(n, MERGE_ROWS),)](
        *(anchors, totals, weighted, stats, n, len(anchors)),
        BLOCK_N=MERGE_ROWS,
        BLOCK_S=64,
        WITH_ENTROPY=head.with_entropy,
    )
    if num_cached == 0:
        return stats, None
    if INTERPRETED:
        e.copy_(e.to(dtype))
    # A copy, so that the rest of the statistics is let go.
    anchors = anchors[: cached_tiles * blocks.slices].clone()
    return stats, _Cache(e=e, anchors=anchors, num_columns=min(num_cached, v))


def dlogit_chunks(
    hidden, weight, bias, labels, head: Head, factors: RowFactors, cache: _Cache | None
) -> Iterator[Chunk]:
    """dL/d(hidden . weight + bias) of every real column."""
    n, v = len(hidden), head.num_rows
    if n == 0 or v == 0:
        return
    begin, dtype = 0, gradient_dtype(hidden, weight)
    if cache is not None:
        _cached_dlogits(cache, labels, head, factors)
        begin = cache.num_columns
        yield from _pieces(cache.e[:, :begin], 0, weight, dtype)
    blocks = _blocks(hidden, weight)
    width = max(SCRATCH_BYTES // (n * dtype.itemsize * blocks.block_v), 1) * blocks.block_v
    columns = min(width, triton.cdiv(v - begin, blocks.block_v) * blocks.block_v)
    dz = hidden.new_empty(n, columns, dtype=_stored(dtype))
    with_entropy = factors.grad_entropy is not None
    entropy = (factors.grad_entropy, factors.entropy) if with_entropy else (factors.grad,) * 2
    while begin < v:
        end = min(begin + width, v)
        _launch(
            _linear_logprob_bwd_kernel,
            *(hidden, weight[begin:end], None if bias is None else bias[begin:end], head, blocks),
            pointers=(labels, factors.lse, factors.grad, factors.at_target, *entropy, dz),
            numbers=(dz.stride(0), head.vocab_start + begin),
            WITH_ENTROPY=with_entropy,
        )
        yield from _pieces(dz[:, : end - begin], begin, weight, dtype)
        begin = end


def _launch(kernel, hidden, weight, bias, head, blocks: Blocks, *, pointers, numbers, **flags):
    """A GEMM kernel over all tiles of (N, V); `weight` and `bias` are the columns it takes."""
    (n, d), v = hidden.shape, len(weight)
    hidden, weight = _kernel_operands(hidden, weight)
    if blocks.descriptors:
        operands = (
            TensorDescriptor.from_tensor(hidden, [blocks.block_n, blocks.block_d]),
            TensorDescriptor.from_tensor(weight, [blocks.block_v, blocks.block_d]),
        )
    else:
        operands = (hidden, weight)
    num_tiles = triton.cdiv(n, blocks.block_n) * triton.cdiv(v, blocks.block_v)
    grid = min(num_tiles, num_sms(hidden.device)) if blocks.descriptors else num_tiles
    panel_blocks = max(PANEL_BYTES // (blocks.block_n * d * hidden.itemsize), 1)
    if head.softcap is None:
        scales = (math.log2(math.e) / head.temperature, 1.0)
    else:
        scales = (1 / (head.temperature * head.softcap), head.softcap * math.log2(math.e))
    kernel[(grid,)](
        *(*operands, hidden if bias is None else bias, *pointers, n, v, d),
        *(*hidden.stride(), *weight.stride(), *numbers, panel_blocks, *scales),
        BLOCK_N=blocks.block_n,
        BLOCK_V=blocks.block_v,
        BLOCK_D=blocks.block_d,
        SLICES=blocks.slices,
        DESCRIPTORS=blocks.descriptors,
        EVEN_D=d % blocks.block_d == 0,
        PRECISION="ieee",
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=head.softcap is not None,
        FLATTEN=blocks.flatten,
        WARP_SPECIALIZE=blocks.warp_specialize,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        **({"maxnreg": blocks.maxnreg} if blocks.maxnreg else {}),
        **flags,
    )


def _cached_dlogits(cache: _Cache, labels: Tensor, head: Head, factors: RowFactors) -> None:
    """dz of the cached columns, in the place of E, which holds the softcap's slope already."""
    n, num_slices = len(cache.e), len(cache.anchors)
    at_target = factors.at_target
    if head.softcap is not None:
        at_target = at_target * (1 - (factors.target * (UNIT / head.softcap)).square())
    _cached_dlogits_kernel[(triton.cdiv(n, 16) * num_slices,)](
        *(cache.e, cache.anchors, labels, factors.lse, factors.grad, at_target),
        *(n, cache.num_columns, cache.e.stride(0), head.vocab_start),
        BLOCK_N=16,
        WIDTH=cache.e.shape[1] // num_slices,
    )


def _pieces(dz: Tensor, begin: int, weight: Tensor, dtype: torch.dtype) -> Iterator[Chunk]:
    """dz of columns from `begin` on, in pieces if weight's rows have to be copied in its type."""
    width = dz.shape[1]
    if weight.dtype != dtype:
        width = max(SCRATCH_BYTES // (weight.shape[1] * dtype.itemsize), 1)
    for part in dz.split(width, dim=1):
        end = begin + part.shape[1]
        rows = weight[begin:end].to(dtype)
        yield Chunk(begin=begin, end=end, dz=part.to(dtype), weight=rows)
        begin = end


def _blocks(hidden: Tensor, weight: Tensor) -> Blocks:
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    # What tensor descriptors and 16-byte loads need.
    aligned = hidden.dtype == weight.dtype and all(
        t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0
        for t in (hidden, weight)
    )
    return blocks_for(architecture(hidden.device), hidden.shape[1], dtype, aligned)


def architecture(device: torch.device) -> int:
    if INTERPRETED:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def num_sms(device: torch.device) -> int:
    return 4 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def _kernel_operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The kernels raise weight to hidden's type in registers, so hidden has the wider one."""
    if INTERPRETED:
        # Its bfloat16 dot multiplies bit patterns; float32 copies multiply exactly.
        return hidden.float(), weight.float()
    return hidden.to(torch.promote_types(hidden.dtype, weight.dtype)), weight


def _stored(dtype: torch.dtype) -> torch.dtype:
    # The interpreter truncates where it stores float32 as bfloat16: torch rounds there instead.
    return torch.float32 if INTERPRETED else dtype
