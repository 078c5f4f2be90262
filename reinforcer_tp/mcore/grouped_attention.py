"""Attention of packed segments as padded batches of segments of similar length.

Legend: T packed tokens (one row), H query heads and G key-value heads of this rank, E head dim,
S segments of a group, L and M its padded numbers of queries and keys, Q and K all padded slots.

Query j of a segment with n queries and m keys sees its keys 0 .. j + m - n: causal, aligned at the
end. Padding stands after the real queries and keys and repeats the segment's last one, so it holds
ordinary values; no real query sees it, and its gradients are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from reinforcer_tp.mcore.gather import Gather, gather_plan, gather_rows

# Segments join a group while at least this share of its (query, key) pairs is not padding.
_MIN_FILL = 0.75


@dataclass(frozen=True, kw_only=True)
class SegmentGroup:
    """Segments of similar length as one padded batch."""

    num_segments: int
    num_queries: int  # L
    num_keys: int  # M
    hidden: Tensor | None  # (S, 1, L, M) bool, True = not seen; None = causal, as all have n = m


@dataclass(frozen=True, kw_only=True)
class GroupedSegments:
    """One micro-batch's segments: the padded layout, group after group, each (S, heads, L, E)."""

    queries: Gather  # Q slots from the T * H rows of the queries
    keys: Gather  # K slots from the T * G rows of the keys
    outputs: Gather  # T * H rows from the Q slots
    groups: tuple[SegmentGroup, ...]


def group_segments(
    cu_seqlens_q: Tensor,  # (S + 1,) integers on the host
    cu_seqlens_kv: Tensor,  # (S + 1,)
    kv_index: Tensor | None,  # (K,) int64, or None = the tokens in their order
    *,
    num_heads: int,
    num_kv_heads: int,
    device: torch.device | str = "cpu",
) -> GroupedSegments:
    """Groups the segments on the host and moves the plan to `device`."""
    num_q, num_kv = cu_seqlens_q.diff().long(), cu_seqlens_kv.diff().long()
    query_parts, key_parts, groups = [], [], []
    for segments in _batches(num_q.tolist(), num_kv.tolist()):
        index = torch.tensor(segments)
        n, m = num_q[index], num_kv[index]
        query_parts.append(_slots(cu_seqlens_q[index].long(), n, num_heads))
        key_parts.append(_slots(cu_seqlens_kv[index].long(), m, num_kv_heads, kv_index))
        groups.append(_group(n, m, device))
    queries = _join(query_parts)
    [(rows, slots)] = queries.copies  # a query stands in one segment
    outputs = Gather(index=slots[rows.argsort()], copies=((slots, rows),))
    return GroupedSegments(
        queries=queries.to(device),
        keys=_join(key_parts).to(device),
        outputs=outputs.to(device),
        groups=tuple(groups),
    )


def _batches(num_q: list[int], num_kv: list[int]) -> list[list[int]]:
    """Segments of each group: those alike in shape, longest first."""
    # Square ones apart, for they need no mask.
    order = sorted(range(len(num_q)), key=lambda s: (num_kv[s] > num_q[s], -num_kv[s], -num_q[s]))
    batches: list[list[int]] = []
    most_q = most_kv = real = 0
    is_square = True
    for s in order:
        if num_q[s] == 0:
            continue
        pairs = num_q[s] * num_kv[s]
        padded = (len(batches[-1]) + 1 if batches else 1) * max(most_q, num_q[s]) * most_kv
        same_kind = is_square == (num_kv[s] == num_q[s])
        if batches and same_kind and real + pairs >= _MIN_FILL * padded:
            batches[-1].append(s)
            most_q, real = max(most_q, num_q[s]), real + pairs
        else:
            batches.append([s])
            most_q, most_kv, real = num_q[s], num_kv[s], pairs
            is_square = num_kv[s] == num_q[s]
    return batches


def _slots(
    start: Tensor, length: Tensor, heads: int, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(row, is_real) of each padded slot (S, heads, longest), flattened."""
    offset = torch.arange(int(length.max()))
    is_real = offset < length[:, None]
    token = start[:, None] + torch.minimum(offset, length[:, None] - 1)
    if index is not None:
        token = index[token]
    row = token[:, None] * heads + torch.arange(heads)[:, None]
    return row.flatten(), is_real[:, None].expand_as(row).flatten()


def _join(parts: list[tuple[Tensor, Tensor]]) -> Gather:
    rows, is_real = zip(*parts, strict=True)
    return gather_plan(torch.cat(rows), torch.cat(is_real))


def _group(num_q: Tensor, num_kv: Tensor, device: torch.device | str) -> SegmentGroup:
    longest_q, longest_kv = int(num_q.max()), int(num_kv.max())
    hidden = None
    if not torch.equal(num_q, num_kv):
        last_seen = torch.arange(longest_q) + (num_kv - num_q)[:, None]  # (S, L)
        hidden = (torch.arange(longest_kv) > last_seen[..., None])[:, None].to(device)
    return SegmentGroup(
        num_segments=len(num_q), num_queries=longest_q, num_keys=longest_kv, hidden=hidden
    )


def grouped_attention(
    q: Tensor,  # (T, H, E)
    k: Tensor,  # (T, G, E)
    v: Tensor,  # (T, G, E)
    segments: GroupedSegments,
    scale: float | None = None,  # None = E ** -0.5
) -> Tensor:  # (T, H, E)
    """Attention of each query over the keys its segment shows it."""
    (_, heads, width), kv_heads = q.shape, k.shape[1]
    padded_q = gather_rows(q.reshape(-1, width), segments.queries)
    padded_k, padded_v = (gather_rows(x.reshape(-1, width), segments.keys) for x in (k, v))
    q_sizes = [g.num_segments * heads * g.num_queries for g in segments.groups]
    kv_sizes = [g.num_segments * kv_heads * g.num_keys for g in segments.groups]
    outs = []
    for group, group_q, group_k, group_v in zip(
        segments.groups,
        padded_q.split(q_sizes),
        padded_k.split(kv_sizes),
        padded_v.split(kv_sizes),
        strict=True,
    ):
        out = F.scaled_dot_product_attention(
            group_q.view(group.num_segments, heads, group.num_queries, width),
            group_k.view(group.num_segments, kv_heads, group.num_keys, width),
            group_v.view(group.num_segments, kv_heads, group.num_keys, width),
            attn_mask=None if group.hidden is None else ~group.hidden,
            is_causal=group.hidden is None,
            scale=scale,
            enable_gqa=True,
        )
        outs.append(out.reshape(-1, width))
    return gather_rows(torch.cat(outs), segments.outputs).view_as(q)
