"""A global batch -> this rank's packed micro-batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reinforcer_tp.data.loader import PackedBatch, build_packed_batch, packed_lengths
from reinforcer_tp.data.packing import pack
from reinforcer_tp.data.prepare import TokenizedSet


@dataclass(frozen=True, kw_only=True)
class MicroBatching:
    """How global batches are cut; the same value on every rank but for `dp_rank`."""

    max_tokens: int | None  # tokens of a packed row; None = no limit
    max_pairs: int | None  # pairs of a packed row; None = no limit
    dp_rank: int
    dp_size: int
    divisible_by: int  # row lengths are multiples of this: tp under sequence parallelism
    equal_rows: bool  # pad all rows of a batch to the longest: pipeline stages need one shape


@dataclass(frozen=True, kw_only=True)
class MicroBatches:
    """One global batch, cut."""

    batches: tuple[PackedBatch, ...]  # this rank's
    num_tokens: int  # real tokens of all ranks
    num_slots: int  # their tokens with padding


def micro_batches(
    pairs: TokenizedSet,
    rows: Sequence[int],  # indices into `pairs`: one global batch
    cut: MicroBatching,
    reference: Mapping[int, np.ndarray] | None = None,  # index -> (C + R,) float32
) -> MicroBatches:
    """Packs the global batch over all ranks and builds this rank's rows.

    Raises ValueError when a pair is longer than `max_tokens`.
    """
    lengths = packed_lengths(pairs.lengths(), rows)
    plan = pack(lengths, max_tokens=cut.max_tokens, max_pairs=cut.max_pairs, num_ranks=cut.dp_size)
    row_lengths = [
        _round_up(sum(lengths[i] for i in positions), cut.divisible_by)
        for rank in plan
        for positions in rank
    ]
    longest = max(row_lengths)
    batches = []
    for positions in plan[cut.dp_rank]:
        members = [rows[i] for i in positions]
        batches.append(
            build_packed_batch(
                [pairs[i] for i in members],
                reference_logps=None if reference is None else [reference[i] for i in members],
                row_length=longest if cut.equal_rows else None,
                divisible_by=cut.divisible_by,
            )
        )
    return MicroBatches(
        batches=tuple(batches),
        num_tokens=sum(lengths),
        num_slots=longest * len(row_lengths) if cut.equal_rows else sum(row_lengths),
    )


def check_pairs_fit(pairs: TokenizedSet, max_tokens: int | None) -> None:
    """Raises ValueError, before anything is built, when a pair is longer than a row may be."""
    lengths = packed_lengths(pairs.lengths(), range(len(pairs)))
    longest = int(np.argmax(lengths))
    if max_tokens is not None and lengths[longest] > max_tokens:
        raise ValueError(
            f"the pair of row {pairs[longest].row} takes {lengths[longest]} tokens, both sides "
            f"with their prompt, more than policy.micro_batch_tokens={max_tokens}; raise that to "
            f"{lengths[longest]} or more, or lower policy.max_total_sequence_length"
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
