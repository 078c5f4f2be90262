"""Which pairs of a global batch go to which rank and micro-batch.

Pure and deterministic: every rank computes the whole plan from the lengths alone.
1. Pairs are dealt to ranks of equal work, the costliest first.
2. First-fit decreasing finds how many micro-batches a rank's share needs (at most 11/9 of the
   fewest, plus 6/9: Dosa, ESCAPE 2007); every rank takes as many as the rank that needs most.
3. Each share is spread evenly over that many: the longest row decides how much memory a step
   takes, and what all rows are padded to under pipeline parallelism.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from reinforcer_tp.data.packed_batch import packed_lengths

Bin = list[int]  # positions in the global batch


@dataclass(frozen=True, kw_only=True)
class PairCost:
    """FLOPs of forward and backward for one of each."""

    token: float  # laid out in the row
    response_token: float  # with a label: what the head adds
    visible_key: float  # of one query: what attention adds


def pair_costs(
    lengths: np.ndarray,  # (n, 3): tokens of prompt P, chosen C, rejected R
    shared: np.ndarray,  # (n,) first tokens s of both sequences that are laid out once
    cost: PairCost,
) -> list[float]:
    """FLOPs of each pair: 2P + C + R - s tokens, of which C + R labels.

    The queries of a sequence of n tokens see 1 + 2 + ... + n = n (n + 1) / 2 keys; the rejected
    side has no queries for its first s tokens. Padding costs nothing here.
    """
    prompt, chosen, rejected = lengths.astype(np.float64).T
    tokens = packed_lengths(lengths, shared)
    visible_keys = _triangle(prompt + chosen) + _triangle(prompt + rejected) - _triangle(shared)
    flops = cost.token * tokens + cost.response_token * (chosen + rejected)
    return (flops + cost.visible_key * visible_keys).tolist()


def _triangle(count: np.ndarray) -> np.ndarray:
    return count * (count + 1) / 2


def pack(
    lengths: Sequence[int],
    *,
    costs: Sequence[float] | None = None,
    max_tokens: int | None,
    max_pairs: int | None,
    num_ranks: int,
    count_multiple: int = 1,
) -> list[list[Bin]]:
    """Pairs of the given packed lengths (tokens) -> [rank][micro-batch] -> positions.

    `costs`: the work of each pair, by which ranks are balanced; None = the lengths. Every position
    appears once, no micro-batch exceeds `max_tokens` or `max_pairs` (None: no such limit; both
    None: one micro-batch a rank), and every rank has the same number of micro-batches, a multiple
    of `count_multiple`, at least one, the largest first; some may be empty.

    Raises ValueError for limits below 1 and for a pair of more than `max_tokens`.
    """
    _check(lengths, max_tokens, max_pairs, num_ranks, count_multiple)
    if max_tokens is None:
        max_tokens = sum(lengths)
    if max_pairs is None:
        max_pairs = max(len(lengths), 1)
    costs = lengths if costs is None else costs
    # A rank may take as many pairs as fill the fewest micro-batches that the pair limit allows.
    fewest = _round_up(-(-len(lengths) // (num_ranks * max_pairs)), count_multiple)
    shares = _deal(costs, range(len(lengths)), num_ranks, fewest * max_pairs)
    shares = [sorted(share, key=lengths.__getitem__, reverse=True) for share in shares]
    packed = [_first_fit(lengths, share, max_tokens, max_pairs) for share in shares]
    count = _round_up(max(1, *map(len, packed)), count_multiple)
    return [
        _even_out(lengths, share, bins + [[] for _ in range(count - len(bins))], max_pairs)
        for share, bins in zip(shares, packed, strict=True)
    ]


def _deal(
    weights: Sequence[float], positions: Iterable[int], num_bins: int, max_pairs: int
) -> list[Bin]:
    """Bins of about equal weight: the heaviest pair first, each to the lightest that has room."""
    bins: list[Bin] = [[] for _ in range(num_bins)]
    heap: list[tuple[float, int]] = [(0, slot) for slot in range(num_bins)]
    for position in sorted(positions, key=weights.__getitem__, reverse=True):
        weight, slot = heapq.heappop(heap)
        bins[slot].append(position)
        if len(bins[slot]) < max_pairs:
            heapq.heappush(heap, (weight + weights[position], slot))
    return bins


def _even_out(lengths: Sequence[int], share: Bin, bins: list[Bin], max_pairs: int) -> list[Bin]:
    """As many micro-batches as `bins`, none longer than the longest of those.

    The share, which comes longest first, dealt one by one or, where that is shorter, in the least
    room that first-fit decreasing needs (MULTIFIT: bisection, three steps or to within 1 %).
    """
    bins = min(
        _deal(lengths, share, len(bins), max_pairs), bins, key=partial(_longest_row, lengths)
    )
    least = -(-_tokens(lengths, share) // len(bins))
    if share:
        least = max(least, lengths[share[0]])
    for _ in range(3):
        most = _longest_row(lengths, bins)
        if most - least <= most // 100:
            break
        room = (least + most) // 2
        tighter = _first_fit(lengths, share, room, max_pairs)
        if len(tighter) <= len(bins):
            bins = tighter + [[] for _ in range(len(bins) - len(tighter))]
        else:
            least = room + 1
    bins = sorted(bins, key=partial(_tokens, lengths), reverse=True)
    return [sorted(bin_) for bin_ in bins]


def _longest_row(lengths: Sequence[int], bins: list[Bin]) -> int:
    return max(_tokens(lengths, bin_) for bin_ in bins)


def _tokens(lengths: Sequence[int], bin_: Bin) -> int:
    return sum(map(lengths.__getitem__, bin_))


def _first_fit(lengths: Sequence[int], share: Bin, max_tokens: int, max_pairs: int) -> list[Bin]:
    """Micro-batches of `share`, each pair in the first that has room; O(n log n)."""
    leaves = 1 << max(len(share) - 1, 0).bit_length()
    room = [max_tokens] * (2 * leaves)  # a max-tree: node i has children 2i and 2i + 1
    bins: list[Bin] = []
    for position in share:
        length, node = lengths[position], 1
        while node < leaves:
            node *= 2
            if room[node] < length:
                node += 1
        slot = node - leaves
        if slot == len(bins):
            bins.append([])
        bins[slot].append(position)
        room[node] = room[node] - length if len(bins[slot]) < max_pairs else -1
        while node > 1:
            most = room[node] if room[node] > room[node ^ 1] else room[node ^ 1]
            node >>= 1
            if room[node] == most:
                break
            room[node] = most
    return bins


def _check(
    lengths: Sequence[int],
    max_tokens: int | None,
    max_pairs: int | None,
    num_ranks: int,
    count_multiple: int,
) -> None:
    limits = {
        "max_tokens": max_tokens,
        "max_pairs": max_pairs,
        "num_ranks": num_ranks,
        "count_multiple": count_multiple,
    }
    for name, limit in limits.items():
        if limit is not None and limit < 1:
            raise ValueError(f"{name}={limit}; expected at least 1")
    longest = max(lengths, default=0)
    if max_tokens is not None and longest > max_tokens:
        raise ValueError(
            f"pair {lengths.index(longest)} of the global batch takes {longest} packed tokens, "
            f"more than policy.micro_batch_tokens={max_tokens}; raise that to {longest} or more, "
            "or lower policy.max_total_sequence_length"
        )


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
