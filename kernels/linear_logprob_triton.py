"""The inner parts of the linear log-prob as Triton kernels: statistics forward, dz backward.

Legend: N tokens, D hidden, V real vocab rows of this rank, S slices of a row of logits.

Logits count in base 2: z2 = softcap((hidden . weight + bias) / temperature) log2 e, float32 in
registers only. The forward GEMM's epilogue writes, for each row and slice of a tile, an anchor
a = ceil(max z2) and the sum of 2^(z2 - a), both without the label's column, and the label's z2:
8 N S + 4 N bytes for S = V / (BLOCK_V / SLICES). An anchor is an integer, so that rescaling by
2^(a - b) is exact. A second kernel merges the slices in a fixed order.

Backward's dz is written by the same GEMM with the row's sum known (strict), or made in
one pass over the E = 2^(z2 - a) that forward stored (cached; 4 N V bytes moved). Nothing here uses
atomics. dz's GEMMs are the library's (`kernels.linear_logprob`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.blocks import Blocks, blocks_for, check_compiler_bugs
from kernels.head import LOWEST, Chunk, Head, RowFactors, gradient_dtype
from kernels.linear_logprob_kernels import (
    cached_dlogits_kernel,
    linear_logprob_bwd_kernel,
    linear_logprob_fwd_kernel,
    merge_kernel,
)

UNIT = math.log(2)  # logits and their statistics are in base 2
# Largest dz, or copy of weight's rows, held at once. A chunk of dz w columns wide costs one more
# read and write of float32 dhidden, 279 / w of its time at an H100's rates: 4.5 % at N = 8192.
SCRATCH_BYTES = 96 * 2**20
MERGE_ROWS = 32
PANEL_BYTES = 16 * 2**20  # of hidden, stays in the L2 cache while weight streams past
INTERPRETED = triton.knobs.runtime.interpret


@dataclass(kw_only=True)
class _Cache:
    """What forward keeps of the first columns."""

    e: Tensor  # (N, columns padded to whole tiles)
    anchors: Tensor | None  # (slices, N)
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
    labels, bias = _contiguous(labels, bias)
    blocks = _blocks(hidden, weight, head)
    tiles, dtype = triton.cdiv(v, blocks.block_v), gradient_dtype(hidden, weight)
    # What one tile of columns costs: E, and an anchor for each row and slice.
    tile_bytes = n * (blocks.block_v * dtype.itemsize + 4 * blocks.slices)
    cached_tiles = min(cache_budget_bytes // tile_bytes, tiles)
    num_cached = cached_tiles * blocks.block_v
    e = hidden.new_empty(n, num_cached, dtype=_stored(dtype))
    partial = hidden.new_empty(2 + head.with_entropy, tiles * blocks.slices, n, dtype=torch.float32)
    anchors, totals, weighted = partial[0], partial[1], partial[-1]
    _launch(
        linear_logprob_fwd_kernel,
        *(hidden, weight[:v], bias, head, blocks),
        pointers=(labels, anchors, totals, weighted, stats[2], e),
        numbers=(e.stride(0), head.vocab_start, num_cached),
        WITH_ENTROPY=head.with_entropy,
        STORE_E=num_cached > 0,
    )
    merge_kernel[(triton.cdiv(n, MERGE_ROWS),)](
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
    labels, bias = _contiguous(labels, bias)
    begin, dtype = 0, gradient_dtype(hidden, weight)
    if cache is not None:
        _cached_dlogits(cache, labels, head, factors)
        begin = cache.num_columns
        cache.anchors = None  # not needed again; the caller still holds the cache
        yield from _pieces(cache.e[:, :begin], 0, weight, dtype)
    blocks = _blocks(hidden, weight, head)
    width = max(SCRATCH_BYTES // (n * dtype.itemsize * blocks.block_v), 1) * blocks.block_v
    columns = min(width, triton.cdiv(v - begin, blocks.block_v) * blocks.block_v)
    dz = hidden.new_empty(n, columns, dtype=_stored(dtype))
    with_entropy = factors.grad_entropy is not None
    entropy = (factors.grad_entropy, factors.entropy) if with_entropy else (factors.grad,) * 2
    while begin < v:
        end = min(begin + width, v)
        _launch(
            linear_logprob_bwd_kernel,
            *(hidden, weight[begin:end], None if bias is None else bias[begin:end], head, blocks),
            pointers=(labels, factors.anchor, factors.grad, factors.at_target, *entropy, dz),
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
    constants = {
        "BLOCK_N": blocks.block_n,
        "BLOCK_V": blocks.block_v,
        "BLOCK_D": blocks.block_d,
        "SLICES": blocks.slices,
        "DESCRIPTORS": blocks.descriptors,
        "EVEN_D": d % blocks.block_d == 0,
        "PRECISION": "ieee",  # of float32 operands: tf32 would round them
        "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": head.softcap is not None,
        "FLATTEN": blocks.flatten,
        "WARP_SPECIALIZE": blocks.warp_specialize,
        **flags,
    }
    check_compiler_bugs(architecture(hidden.device), constants)
    kernel[(grid,)](
        *(*operands, hidden if bias is None else bias, *pointers, n, v, d),
        *(*hidden.stride(), *weight.stride(), *numbers, panel_blocks, *scales),
        **constants,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        **({"maxnreg": blocks.maxnreg} if blocks.maxnreg else {}),
    )


def _cached_dlogits(cache: _Cache, labels: Tensor, head: Head, factors: RowFactors) -> None:
    """dz of the cached columns, in the place of E, which holds the softcap's slope already."""
    n, num_slices = len(cache.e), len(cache.anchors)
    at_target = factors.at_target
    if head.softcap is not None:
        at_target = at_target * (1 - (factors.target * (UNIT / head.softcap)).square())
    width = cache.e.shape[1] // num_slices
    block_n = max(2048 // width, 1)  # at least 16 bytes a thread
    cached_dlogits_kernel[(triton.cdiv(n, block_n) * num_slices,)](
        *(cache.e, cache.anchors, labels, factors.anchor, factors.grad, at_target),
        *(n, cache.num_columns, cache.e.stride(0), head.vocab_start),
        BLOCK_N=block_n,
        WIDTH=width,
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


def _blocks(hidden: Tensor, weight: Tensor, head: Head) -> Blocks:
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    row_multiple = 1
    if hidden.dtype == weight.dtype and all(
        t.stride(1) == 1 and t.data_ptr() % 16 == 0 for t in (hidden, weight)
    ):
        row_multiple = math.gcd(hidden.stride(0), weight.stride(0))
    arch, d = architecture(hidden.device), hidden.shape[1]
    return blocks_for(arch, d, dtype, row_multiple, head.softcap is not None)


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


def _contiguous(labels: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return labels.contiguous(), None if bias is None else bias.contiguous()


def _stored(dtype: torch.dtype) -> torch.dtype:
    # The interpreter truncates where it stores float32 as bfloat16: torch rounds there instead.
    return torch.float32 if INTERPRETED else dtype
