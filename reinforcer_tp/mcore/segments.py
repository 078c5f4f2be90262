"""Packed segments as padded batches of segments of similar length, planned on the host.

Legend: T packed tokens (one row), H query heads and G key-value heads of this rank, S segments of
a group, L and M its padded numbers of queries and keys.

Query j of a segment with n queries and m keys sees its keys 0 .. j + m - n: causal, aligned at the
end. Padding stands behind the real queries and keys and repeats the segment's last one, so it holds
ordinary values; no real query sees it, and its gradients are dropped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from reinforcer_tp.data.packed_batch import move
from reinforcer_tp.mcore.gather import Gather, gather_plan

# Segments join a group while at least this share of its (query, key) pairs is not padding
_MIN_FILL = 0.85
# and while its scores, of all heads, are at most these many: 1 MiB of float32, a core's L2 cache.
# Without this bound 64 segments of 30 to 90 tokens take 1.1 times as long.
_MAX_SCORES = 2**18
# Largest segment, in (query, key) pairs, that takes explicit products. On an AMD EPYC (AVX512_BF16)
# they beat SDPA up to 192 tokens in bfloat16, are even at 256, and even up to 128 in float32.
# Beyond, SDPA wins: it skips the pairs that causality hides.
_MOST_SHORT_PAIRS = 192 * 192


@dataclass(frozen=True, kw_only=True)
class SegmentGroup:
    """Segments of similar length as one padded batch."""

    num_segments: int  # S
    num_queries: int  # L
    num_keys: int  # M
    # float32, 0 where a query sees a key, else -inf: (S, 1, L, M); (1, 1, L, L) where every segment
    # has as many keys as queries; None where it has and the group is long: SDPA's causal form.
    bias: Tensor | None


@dataclass(frozen=True, kw_only=True)
class GroupedSegments:
    """One micro-batch's segments.

    In the padded tensors the short groups come first, then the long ones; each is
    (S, heads, L or M, head dim).
    """

    queries: Gather  # padded queries from the T * H rows
    keys: Gather  # padded keys (values) from the T * G rows
    outputs: Gather  # the T * H rows from the padded queries' places
    short: tuple[SegmentGroup, ...]
    long: tuple[SegmentGroup, ...]


def group_segments(
    cu_seqlens_q: Tensor,  # (segments + 1,) integers on the host, from 0 to T
    cu_seqlens_kv: Tensor,  # (segments + 1,)
    kv_index: Tensor | None,  # (keys,) int64 rows of the keys, None = the tokens in their order
    *,
    num_heads: int,
    num_kv_heads: int,
    device: torch.device | str = "cpu",
) -> GroupedSegments:
    """Groups the segments that have queries and moves the plan to `device`.

    A segment has at least as many keys as queries.
    """
    num_q, num_kv = cu_seqlens_q.diff().long(), cu_seqlens_kv.diff().long()
    short, long, query_parts, key_parts = [], [], [], []
    for segments in _batches(num_q.tolist(), num_kv.tolist(), num_heads):
        index = torch.tensor(segments)
        n, m = num_q[index], num_kv[index]
        is_short = bool((n * m <= _MOST_SHORT_PAIRS).all())
        (short if is_short else long).append(_group(n, m, is_short, device))
        query_parts.append(_slots(cu_seqlens_q[index].long(), n, num_heads))
        key_parts.append(_slots(cu_seqlens_kv[index].long(), m, num_kv_heads, kv_index))
    queries = _join(query_parts)
    [(rows, slots)] = queries.copies  # a query stands in one segment, so there is one level
    outputs = Gather(index=slots, copies=((slots, rows),))  # sorted by row: every row, in order
    return GroupedSegments(
        queries=queries.to(device),
        keys=_join(key_parts).to(device),
        outputs=outputs.to(device),
        short=tuple(short),
        long=tuple(long),
    )


def _batches(num_q: list[int], num_kv: list[int], heads: int) -> list[list[int]]:
    """The segments of each group, short groups first."""

    def order(segment: int) -> tuple:
        n, m = num_q[segment], num_kv[segment]
        # Those with as many keys as queries apart: they share one bias, or need none.
        return n * m > _MOST_SHORT_PAIRS, m > n, -m, -n

    batches: list[list[int]] = []
    kind, most_q, most_kv, real = None, 0, 0, 0
    for segment in sorted((s for s, n in enumerate(num_q) if n), key=order):
        n, m = num_q[segment], num_kv[segment]
        padded = (len(batches[-1]) + 1 if batches else 1) * max(most_q, n) * most_kv
        fits = real + n * m >= _MIN_FILL * padded and heads * padded <= _MAX_SCORES
        if kind == order(segment)[:2] and fits:
            batches[-1].append(segment)
            most_q, real = max(most_q, n), real + n * m
        else:
            batches.append([segment])
            kind, most_q, most_kv, real = order(segment)[:2], n, m, n * m
    return batches


def _group(
    num_q: Tensor, num_kv: Tensor, is_short: bool, device: torch.device | str
) -> SegmentGroup:
    longest_q, longest_kv = int(num_q.max()), int(num_kv.max())
    shared = num_kv - num_q
    if not bool(shared.any()):
        shared = shared[:1]
    bias = None
    if is_short or bool(shared.any()):
        last_seen = torch.arange(longest_q) + shared[:, None]  # (S or 1, L)
        hidden = torch.arange(longest_kv) > last_seen[..., None]
        bias = torch.zeros(hidden.shape).masked_fill_(hidden, -math.inf)[:, None]
        bias = move(bias, torch.device(device))
    return SegmentGroup(
        num_segments=len(num_q), num_queries=longest_q, num_keys=longest_kv, bias=bias
    )


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
