"""Which pairs of a global batch go to which rank and micro-batch.

Pure and deterministic: every rank computes the whole plan from the lengths alone. Pairs are dealt
to ranks of equal work first, and each rank's share is packed first-fit decreasing (at most 11/9 of
the fewest micro-batches that hold it, plus 6/9: Dosa, ESCAPE 2007).
"""

from __future__ import annotations

import heapq

Bin = list[int]  # positions in the global batch, ascending


def pack(
    lengths: list[int], *, max_tokens: int | None, max_pairs: int | None, num_ranks: int
) -> list[list[Bin]]:
    """Pairs of the given packed lengths (tokens) -> [rank][micro-batch] -> positions.

    Every position appears once, no micro-batch exceeds `max_tokens` or `max_pairs` (None: no such
    limit; both None: one micro-batch a rank), and every rank has the same number of micro-batches,
    at least one, the largest first; some may be empty.

    Raises ValueError for limits below 1 and for a pair of more than `max_tokens`.
    """
    _check(lengths, max_tokens, max_pairs, num_ranks)
    if max_tokens is None:
        max_tokens = sum(lengths)
    if max_pairs is None:
        max_pairs = max(len(lengths), 1)
    # A rank may take as many pairs as fill the fewest micro-batches that the pair limit allows.
    num_bins = max(-(-len(lengths) // (num_ranks * max_pairs)), 1)
    shares = _deal(lengths, num_ranks, num_bins * max_pairs)
    plan = [_first_fit(lengths, share, max_tokens, max_pairs) for share in shares]
    count = max(1, *(len(bins) for bins in plan))
    return [bins + [[] for _ in range(count - len(bins))] for bins in plan]


def _deal(lengths: list[int], num_ranks: int, max_pairs: int) -> list[Bin]:
    """Positions for each rank, dealt longest first to the rank of fewest tokens that has room."""
    shares: list[Bin] = [[] for _ in range(num_ranks)]
    heap = [(0, rank) for rank in range(num_ranks)]
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        tokens, rank = heapq.heappop(heap)
        shares[rank].append(position)
        if len(shares[rank]) < max_pairs:
            heapq.heappush(heap, (tokens + lengths[position], rank))
    return shares


def _first_fit(lengths: list[int], share: Bin, max_tokens: int, max_pairs: int) -> list[Bin]:
    """Micro-batches of a rank's share, which comes longest first; the fullest one first.

    O(n log n): a max-tree over the room of all possible bins finds the first one that fits.
    """
    leaves = 1 << max(len(share) - 1, 0).bit_length()
    room = [max_tokens] * (2 * leaves)  # node i has children 2i and 2i + 1
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
        left = room[node] - length if len(bins[slot]) < max_pairs else -1
        _set_leaf(room, node, left)
    bins.sort(key=lambda bin_: -sum(lengths[i] for i in bin_))
    return [sorted(bin_) for bin_ in bins]


def _set_leaf(tree: list[int], node: int, value: int) -> None:
    tree[node] = value
    while node > 1:
        value = max(tree[node], tree[node ^ 1])
        node //= 2
        if tree[node] == value:
            return
        tree[node] = value


def _check(
    lengths: list[int], max_tokens: int | None, max_pairs: int | None, num_ranks: int
) -> None:
    limits = {"max_tokens": max_tokens, "max_pairs": max_pairs, "num_ranks": num_ranks}
    for name, limit in limits.items():
        if limit is not None and limit < 1:
            raise ValueError(f"{name}={limit}; expected at least 1")
    longest = max(lengths, default=0)
    if max_tokens is not None and longest > max_tokens:
        raise ValueError(
            f"pair {lengths.index(longest)} of the global batch takes {longest} packed tokens, "
            f"more than policy.micro_batch_tokens={max_tokens}; raise that, or lower "
            "policy.max_total_sequence_length"
        )
