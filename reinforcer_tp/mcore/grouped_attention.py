"""Attention over padded batches of segments: explicit products for short ones, SDPA for long ones.

Legend: T packed tokens (one row), H query heads and G key-value heads of this rank, R = H / G, E
head dim; S, L, M as in segments.py. `dtype` is the tensors', `wide` at least float32.

Short segments, with the R query heads of a key-value head folded into the rows:
    scores = scale Q K^T + bias, P = softmax(scores), O = P V
    dV = P^T dO, dP = dO V^T, dS = scale P (dP - rowsum(P dP)), dQ = dS K, dK = dS^T Q
Scores, dP and P are `wide`, because a product of half tensors on a CPU comes out rounded: the
operands of those two are converted. The other products take `dtype` operands, as SDPA's do.
Saved: Q, K and V. Backward computes P again: keeping it would save 5 to 25 % of the time and take
up to twice the memory of the three.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from reinforcer_tp.mcore.gather import gather_rows
from reinforcer_tp.mcore.segments import GroupedSegments, SegmentGroup


def grouped_attention(
    q: Tensor,  # (T, H, E)
    k: Tensor,  # (T, G, E)
    v: Tensor,  # (T, G, E)
    segments: GroupedSegments,
    scale: float | None = None,  # None = E ** -0.5
) -> Tensor:  # (T, H, E)
    """Softmax attention of each query over the keys that its segment shows it."""
    (_, heads, width), kv_heads = q.shape, k.shape[1]
    scale = width**-0.5 if scale is None else scale
    padded_q = gather_rows(q.reshape(-1, width), segments.queries)
    padded_k, padded_v = (gather_rows(x.reshape(-1, width), segments.keys) for x in (k, v))
    batches = [segments.short] if segments.short else []
    batches += [(group,) for group in segments.long]
    outs = []
    for groups, *qkv in zip(
        batches,
        _split(padded_q, [sum(_query_sizes(groups, heads)) for groups in batches]),
        _split(padded_k, [sum(_key_sizes(groups, kv_heads)) for groups in batches]),
        _split(padded_v, [sum(_key_sizes(groups, kv_heads)) for groups in batches]),
        strict=True,
    ):
        if groups is segments.short:
            outs.append(_ShortAttention.apply(*qkv, groups, heads, kv_heads, scale))
        else:
            outs.append(_long_attention(*qkv, groups[0], scale))
    out = torch.cat(outs) if len(outs) > 1 else outs[0]
    return gather_rows(out, segments.outputs).view_as(q)


def _split(x: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    return x.split(sizes) if len(sizes) > 1 else (x,)  # a split's backward copies


def _query_sizes(groups: tuple[SegmentGroup, ...], heads: int) -> list[int]:
    return [g.num_segments * heads * g.num_queries for g in groups]


def _key_sizes(groups: tuple[SegmentGroup, ...], kv_heads: int) -> list[int]:
    return [g.num_segments * kv_heads * g.num_keys for g in groups]


def _long_attention(q: Tensor, k: Tensor, v: Tensor, group: SegmentGroup, scale: float) -> Tensor:
    """SDPA, which on a CPU never holds P. q (S H L, E), k and v (S G M, E) -> as q."""
    queries = q.view(group.num_segments, -1, group.num_queries, q.shape[-1])
    keys, values = (x.view(group.num_segments, -1, group.num_keys, x.shape[-1]) for x in (k, v))
    out = F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=group.bias,
        is_causal=group.bias is None,
        scale=scale,
        enable_gqa=True,
    )
    return out.reshape(q.shape)


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, groups: tuple[SegmentGroup, ...], heads, kv_heads, scale: float):
        # q: (Q, E), all slots of all groups; k, v: (K, E)
        ctx.save_for_backward(q, k, v)
        ctx.arguments = groups, heads, kv_heads, scale
        out = torch.empty_like(q)
        q_blocks, out_blocks = _query_blocks(groups, heads, kv_heads, q, out)
        k_blocks, v_blocks = _key_blocks(groups, kv_heads, k, v)
        for group, q, k, v, out_block in zip(
            groups, q_blocks, k_blocks, v_blocks, out_blocks, strict=True
        ):
            p = _probabilities(q, k, group, scale).to(v.dtype)
            torch.bmm(p, v, out=out_block)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        groups, heads, kv_heads, scale = ctx.arguments
        grads = tuple(torch.empty_like(x) for x in ctx.saved_tensors)
        q, k, v = ctx.saved_tensors
        query_blocks = _query_blocks(groups, heads, kv_heads, q, grad.contiguous(), grads[0])
        key_blocks = _key_blocks(groups, kv_heads, k, v, *grads[1:])
        for group, *blocks in zip(groups, *query_blocks, *key_blocks, strict=True):
            _short_backward(group, scale, *blocks)
        return *grads, None, None, None, None


def _short_backward(
    group: SegmentGroup,
    scale: float,
    q: Tensor,  # (S G, R L, E)
    grad: Tensor,  # (S G, R L, E), of the output
    dq: Tensor,  # written
    k: Tensor,  # (S G, M, E)
    v: Tensor,  # (S G, M, E)
    dk: Tensor,  # written
    dv: Tensor,  # written
) -> None:
    p = _probabilities(q, k, group, scale)
    torch.bmm(p.to(v.dtype).mT, grad, out=dv)
    dp = torch.bmm(grad.to(p.dtype), v.to(p.dtype).mT)
    ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype).mul_(scale).to(q.dtype)
    torch.bmm(ds, k, out=dq)
    torch.bmm(ds.mT, q, out=dk)


def _probabilities(q: Tensor, k: Tensor, group: SegmentGroup, scale: float) -> Tensor:
    """P (S G, R L, M) in `wide`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.bmm(q.to(wide), (k.to(wide) * scale).mT)
    scores.view(group.num_segments, -1, group.num_queries, group.num_keys).add_(group.bias)
    return scores.softmax(-1)


def _query_blocks(groups, heads: int, kv_heads: int, *tensors: Tensor) -> list[list[Tensor]]:
    """Of each (Q, E) tensor, each group's (S G, R L, E)."""
    sizes = _query_sizes(groups, heads)
    return [_blocks(x, sizes, groups, kv_heads) for x in tensors]


def _key_blocks(groups, kv_heads: int, *tensors: Tensor) -> list[list[Tensor]]:
    """Of each (K, E) tensor, each group's (S G, M, E)."""
    sizes = _key_sizes(groups, kv_heads)
    return [_blocks(x, sizes, groups, kv_heads) for x in tensors]


def _blocks(x: Tensor, sizes: list[int], groups, kv_heads: int) -> list[Tensor]:
    return [
        part.view(group.num_segments * kv_heads, -1, x.shape[-1])
        for group, part in zip(groups, x.split(sizes), strict=True)
    ]
