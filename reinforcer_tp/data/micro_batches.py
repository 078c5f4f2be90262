"""A global batch -> this rank's packed micro-batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from reinforcer_tp.data.packed_batch import PackedBatch, build_packed_batch, packed_lengths
from reinforcer_tp.data.packing import PairCost, pack, pair_costs
from reinforcer_tp.data.prepare import TokenizedSet


@dataclass(frozen=True, kw_only=True)
class MicroBatching:
    """How global batches are cut; the same value on every rank but for `dp_rank`."""

    max_tokens: int | None  # tokens of a packed row; None = no limit
    max_pairs: int | None  # pairs of a packed row; None = no limit
    dp_rank: int
    dp_size: int
    divisible_by: int  # row lengths are multiples of this: sequence parallelism's tp, FP8's rows
    equal_rows: bool  # pad all rows of a batch to the longest: pipeline stages need one shape
    share: str = "prompt"  # what a pair lays out once: nothing | prompt | response
    cost: PairCost | None = None  # ranks get equal work by it; None = by tokens
    count_multiple: int = 1  # micro-batches a rank come in multiples of this (interleaved pipeline)


@dataclass(frozen=True, kw_only=True)
class MicroBatches:
    """One global batch, cut."""

    batches: tuple[PackedBatch, ...]  # this rank's
    shared: np.ndarray  # (n,) tokens that each pair of the global batch lays out once
    num_tokens: int  # real tokens of all ranks
    num_slots: int  # their tokens with padding


def micro_batches(
    pairs: TokenizedSet,
    rows: Sequence[int],  # indices into `pairs`: one global batch
    cut: MicroBatching,
    # index -> (C + R,), chosen then rejected
    reference: Callable[[int], np.ndarray] | None = None,
) -> MicroBatches:
    """Packs the global batch over all ranks and builds this rank's rows.

    Raises ValueError when a pair is longer than `max_tokens`.
    """
    shared = pairs.shared_lengths(rows, cut.share)
    plan, row_lengths = plan_rows(pairs.lengths()[rows], shared, cut)
    batches = []
    for positions, row_length in zip(plan[cut.dp_rank], row_lengths[cut.dp_rank], strict=True):
        members = [rows[i] for i in positions]
        batches.append(
            build_packed_batch(
                [pairs[i] for i in members],
                shared=shared[positions].tolist(),
                reference_logps=None if reference is None else [reference(i) for i in members],
                row_length=row_length,
                divisible_by=cut.divisible_by,
            )
        )
    return MicroBatches(
        batches=tuple(batches),
        shared=shared,
        num_tokens=int(packed_lengths(pairs.lengths()[rows], shared).sum()),
        num_slots=sum(map(sum, row_lengths)),
    )


def plan_rows(
    lengths: np.ndarray,  # (n, 3): tokens of prompt, chosen, rejected of a global batch
    shared: np.ndarray,  # (n,)
    cut: MicroBatching,
) -> tuple[list[list[list[int]]], list[list[int]]]:
    """[rank][micro-batch] -> positions in the global batch, and -> tokens of its padded row."""
    tokens = packed_lengths(lengths, shared).tolist()
    plan = pack(
        tokens,
        costs=None if cut.cost is None else pair_costs(lengths, shared, cut.cost),
        max_tokens=cut.max_tokens,
        max_pairs=cut.max_pairs,
        num_ranks=cut.dp_size,
        count_multiple=cut.count_multiple,
    )
    rows = [
        [_round_up(sum(tokens[i] for i in positions), cut.divisible_by) for positions in rank]
        for rank in plan
    ]
    if cut.equal_rows:
        longest = max(max(rank) for rank in rows)
        rows = [[longest] * len(rank) for rank in rows]
    return plan, rows


def check_pairs_fit(pairs: TokenizedSet, max_tokens: int | None, share: str) -> None:
    """Raises ValueError, before anything is built, when a pair is longer than a row may be."""
    if max_tokens is None:
        return
    # Sharing only shortens: what fits without it need not be looked at token by token.
    in_full = packed_lengths(pairs.lengths(), np.zeros(len(pairs), np.int64))
    over = np.flatnonzero(in_full > max_tokens)
    lengths = packed_lengths(pairs.lengths()[over], pairs.shared_lengths(over, share))
    if lengths.max(initial=0) <= max_tokens:
        return
    longest, row = int(lengths.max()), pairs[int(over[lengths.argmax()])].row
    layout, fix = "the prompt and both responses", ""
    if share == "nothing":
        layout, fix = "both sides with their prompt", ", set data.share_prompts=true"
    raise ValueError(
        f"the pair of row {row} takes {longest} tokens, {layout}, more than "
        f"policy.micro_batch_tokens={max_tokens}; raise that to {longest} or more{fix}, or lower "
        "policy.max_total_sequence_length"
    )


def check_token_ids(pairs: TokenizedSet, vocab_size: int) -> None:
    """Raises ValueError for a token that the model has no row for, before anything is built.

    The only check of labels on a GPU, where the operator would have to wait for the device.
    """
    tokens = pairs.tokens
    if len(tokens) == 0 or (tokens.min() >= 0 and tokens.max() < vocab_size):
        return
    place = int(np.argmax((tokens < 0) | (tokens >= vocab_size)))
    ends = pairs.lengths().sum(axis=1, dtype=np.int64).cumsum()
    pair = pairs[int(np.searchsorted(ends, place, side="right"))]
    raise ValueError(
        f"the pair of row {pair.row} holds token id {tokens[place]}, but the model embeds ids 0 to "
        f"{vocab_size - 1}; give the model's own tokenizer with policy.tokenizer.name"
    )


def _round_up(length: int, multiple: int) -> int:
    return max(-(-length // multiple), 1) * multiple
