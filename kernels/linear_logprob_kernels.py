"""Triton kernels of the linear log-prob: the GEMM with forward's or backward's epilogue, the merge
of its slices, and the pass over what forward kept.

Legend: N tokens, D hidden, V real vocab rows of the launch. Logits count in base 2: z2 =
softcap((hidden . weight + bias) / temperature) log2 e, float32 and in registers only.
`kernels.linear_logprob_triton` launches them and says what passes through memory.
"""

import triton
import triton.language as tl


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
def _tile_range(N, V, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """Tiles of this program: one, or with descriptors (a persistent grid) every num_programs-th."""
    first = tl.program_id(0)
    if DESCRIPTORS:
        last = tl.cdiv(N, BLOCK_N) * tl.cdiv(V, BLOCK_V)
        step = tl.num_programs(0)
    else:
        last = first + 1
        step = 1
    return first, last, step


@triton.jit
def _dot_tile(
    hidden, weight, tile, panel_blocks, N, V, D, stride_hn, stride_hd, stride_wv, stride_wd,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """hidden[rows] @ weight[cols].T (BLOCK_N, BLOCK_V) in float32, garbage past the last row; its
    rows, and its first column."""
    row0, col0 = _tile_position(tile, N, V, panel_blocks, BLOCK_N, BLOCK_V)
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
    return acc, row0 + tl.arange(0, BLOCK_N), col0


@triton.jit
def _halves(x):
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _slices(x, SLICES: tl.constexpr):
    """The columns of x in SLICES parts, left to right; smaller parts need fewer registers."""
    if SLICES == 1:
        parts = (x,)
    else:
        a, b = _halves(x)
        if SLICES == 2:
            parts = (a, b)
        else:
            a0, a1 = _halves(a)
            b0, b1 = _halves(b)
            parts = (a0, a1, b0, b1)
    return parts


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


# N changes every step, and with it the alignment of rows of the statistics: one binary for all.
@triton.jit(
    do_not_specialize=["N", "V", "vocab_start", "num_cached", "panel_blocks"],
    do_not_specialize_on_alignment=["anchor_ptr", "total_ptr", "weighted_ptr", "target_ptr"],
)
def linear_logprob_fwd_kernel(
    hidden, weight, bias_ptr, labels_ptr, anchor_ptr, total_ptr, weighted_ptr, target_ptr, e_ptr,
    N, V, D, stride_hn, stride_hd, stride_wv, stride_wd, stride_e, vocab_start, num_cached,
    panel_blocks, scale_in, scale_out,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, SLICES: tl.constexpr,
    DESCRIPTORS: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WITH_ENTROPY: tl.constexpr,
    STORE_E: tl.constexpr, FLATTEN: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    first, last, step = _tile_range(N, V, BLOCK_N, BLOCK_V, DESCRIPTORS)
    WIDTH: tl.constexpr = BLOCK_V // SLICES
    for tile in tl.range(first, last, step, flatten=FLATTEN, warp_specialize=WARP_SPECIALIZE):
        acc, rows, col0 = _dot_tile(
            hidden, weight, tile, panel_blocks, N, V, D, stride_hn, stride_hd, stride_wv, stride_wd,
            BLOCK_N, BLOCK_V, BLOCK_D, DESCRIPTORS, EVEN_D, PRECISION,
        )  # fmt: skip
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
            if STORE_E:  # noqa: SIM102 - known at compile time
                if begin < num_cached:
                    kept = e * slope if HAS_SOFTCAP else e
                    e_ptrs = e_ptr + rows.to(tl.int64)[:, None] * stride_e + cols[None, :]
                    tl.store(e_ptrs, kept.to(e_ptr.dtype.element_ty), mask=(rows < N)[:, None])
            at = (begin // WIDTH).to(tl.int64) * N + rows
            tl.store(anchor_ptr + at, anchor, mask=rows < N)
            tl.store(total_ptr + at, tl.sum(e, 1), mask=rows < N)
            if WITH_ENTROPY:
                weighted = tl.sum(e * tl.where(e > 0, above, 0.0), 1)
                tl.store(weighted_ptr + at, weighted, mask=rows < N)


@triton.jit(do_not_specialize=["N", "V", "vocab_start", "panel_blocks"])
def linear_logprob_bwd_kernel(
    hidden, weight, bias_ptr, labels_ptr, row_anchor_ptr, grad_ptr, at_target_ptr,
    grad_entropy_ptr, entropy_ptr, dz_ptr, N, V, D, stride_hn, stride_hd, stride_wv, stride_wd,
    stride_dz, vocab_start, panel_blocks, scale_in, scale_out,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, SLICES: tl.constexpr,
    DESCRIPTORS: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WITH_ENTROPY: tl.constexpr,
    FLATTEN: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    first, last, step = _tile_range(N, V, BLOCK_N, BLOCK_V, DESCRIPTORS)
    WIDTH: tl.constexpr = BLOCK_V // SLICES
    for tile in tl.range(first, last, step, flatten=FLATTEN, warp_specialize=WARP_SPECIALIZE):
        acc, rows, col0 = _dot_tile(
            hidden, weight, tile, panel_blocks, N, V, D, stride_hn, stride_hd, stride_wv, stride_wd,
            BLOCK_N, BLOCK_V, BLOCK_D, DESCRIPTORS, EVEN_D, PRECISION,
        )  # fmt: skip
        labels = _local_labels(labels_ptr, rows, N, V, vocab_start)
        row_anchor = tl.load(row_anchor_ptr + rows, mask=rows < N, other=0.0)
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
            above = z2 - row_anchor[:, None]
            factor = grad[:, None]
            if WITH_ENTROPY:
                finite = tl.where((cols < V)[None, :], above, 0.0)
                per_logit = finite * 0.6931471805599453 + entropy[:, None]
                factor += per_logit * grad_entropy[:, None]
            dz = -tl.exp2(above) * factor
            dz = tl.where(labels[:, None] == cols[None, :], at_target[:, None], dz)
            if HAS_SOFTCAP:
                dz *= slope
            dz_ptrs = dz_ptr + rows.to(tl.int64)[:, None] * stride_dz + cols[None, :]
            tl.store(dz_ptrs, dz.to(dz_ptr.dtype.element_ty), mask=(rows < N)[:, None])


@triton.jit(
    do_not_specialize=["N", "num_slices"],
    do_not_specialize_on_alignment=["anchor_ptr", "total_ptr", "weighted_ptr"],
)
def merge_kernel(
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
def cached_dlogits_kernel(
    e_ptr, anchor_ptr, labels_ptr, row_anchor_ptr, grad_ptr, at_target_ptr,
    N, V, stride_e, vocab_start,
    BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """E -> dz in its place, one slice of some rows. No anchor exceeds its row's: no overflow."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    index = tl.program_id(0) // blocks_n
    rows = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = index * WIDTH + tl.arange(0, WIDTH)
    labels = _local_labels(labels_ptr, rows, N, V, vocab_start)
    anchor = tl.load(anchor_ptr + index.to(tl.int64) * N + rows, mask=rows < N, other=0.0)
    row_anchor = tl.load(row_anchor_ptr + rows, mask=rows < N, other=0.0)
    grad = tl.load(grad_ptr + rows, mask=rows < N, other=0.0)
    at_target = tl.load(at_target_ptr + rows, mask=rows < N, other=0.0)
    ptrs = e_ptr + rows.to(tl.int64)[:, None] * stride_e + cols[None, :]
    e = tl.load(ptrs, mask=(rows < N)[:, None], other=0.0).to(tl.float32)
    dz = e * (-tl.exp2(anchor - row_anchor) * grad)[:, None]
    dz = tl.where(labels[:, None] == cols[None, :], at_target[:, None], dz)
    tl.store(ptrs, dz.to(e_ptr.dtype.element_ty), mask=(rows < N)[:, None])
