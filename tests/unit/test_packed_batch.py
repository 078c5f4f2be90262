"""The tensors of a packed micro-batch, rebuilt the slow way."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reinforcer_tp.data.micro_batches import check_pairs_fit, check_token_ids
from reinforcer_tp.data.packed_batch import build_packed_batch, packed_lengths, response_rows
from reinforcer_tp.data.tokenized import TokenizedPair, TokenizedSet


@dataclass(frozen=True)
class Pair:
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    weight: float = 1.0
    row: int = 0
    margin: float = 0.0


def test_by_hand():
    pairs = [
        Pair([11, 12, 13], [21, 22], [31], row=7),
        Pair([14], [23], [32, 33, 34], weight=0.0, row=3, margin=-1.5),
    ]
    reference = [np.array([0.1, 0.2, 0.3]), np.array([0.4, 0.5, 0.6, 0.7])]
    batch = build_packed_batch(pairs, reference_logps=reference, divisible_by=8)
    #            0   1   2   3   4 | 5   6   7   8 | 9  10 |11  12  13  14 | 15
    tokens = [11, 12, 13, 21, 22, 11, 12, 13, 31, 14, 23, 14, 32, 33, 34, 0]
    assert batch.tokens.tolist() == tokens
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 0]
    assert batch.cu_seqlens_q.tolist() == [0, 5, 9, 11, 15, 16]
    assert batch.cu_seqlens_kv.tolist() == [0, 5, 9, 11, 15, 16]
    assert (batch.max_seqlen_q, batch.max_seqlen_kv, batch.kv_index) == (5, 5, None)
    assert batch.response_index.tolist() == [2, 3, 7, 9, 11, 12, 13]
    assert batch.labels.tolist() == [21, 22, 31, 23, 32, 33, 34]
    assert batch.sequence_id.tolist() == [0, 0, 1, 2, 3, 3, 3]
    assert batch.response_lengths.tolist() == [2, 1, 1, 3]
    assert batch.reference_logps.tolist() == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]  # in float64
    assert batch.pair_weights.tolist() == [1.0, 0.0]
    assert batch.pair_margins.tolist() == [0.0, -1.5]
    assert (batch.rows, batch.num_pairs, batch.num_tokens) == ((7, 3), 1, 15)


def test_a_shared_prompt_by_hand():
    pairs = [Pair([11, 12, 13], [21, 22], [31, 32], row=7), Pair([14], [23], [33], row=3)]
    reference = [np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.5, 0.6])]
    batch = build_packed_batch(pairs, shared=[3, 1], reference_logps=reference, divisible_by=4)
    #            0   1   2   3   4 | 5   6 | 7   8 | 9 |10  11
    tokens = [11, 12, 13, 21, 22, 31, 32, 14, 23, 33, 0, 0]
    assert batch.tokens.tolist() == tokens
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 4, 0, 1, 1, 0, 1]
    assert batch.cu_seqlens_q.tolist() == [0, 5, 7, 9, 10, 12]
    assert batch.cu_seqlens_kv.tolist() == [0, 5, 10, 12, 14, 16]
    keys = [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 7, 9, 10, 11]
    assert batch.kv_index.tolist() == keys
    assert (batch.max_seqlen_q, batch.max_seqlen_kv) == (5, 5)
    # The prompt's last position predicts the first token of both sides.
    assert batch.response_index.tolist() == [2, 3, 2, 5, 7, 7]
    assert batch.labels.tolist() == [21, 22, 31, 32, 23, 33]
    assert batch.sequence_id.tolist() == [0, 0, 1, 1, 2, 3]
    assert batch.response_lengths.tolist() == [2, 2, 1, 1]
    assert batch.reference_logps.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert (batch.rows, batch.num_pairs, batch.num_tokens) == ((7, 3), 2, 10)


def test_responses_that_begin_alike_by_hand():
    pairs = [Pair([11], [21, 22, 23], [21, 22, 31]), Pair([12], [24], [24, 32])]
    batch = build_packed_batch(pairs, shared=[3, 2])
    #                                0   1   2   3 | 4 | 5   6 | 7
    assert batch.tokens.tolist() == [11, 21, 22, 23, 31, 12, 24, 32]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 3, 0, 1, 2]
    assert batch.cu_seqlens_q.tolist() == [0, 4, 5, 7, 8]
    assert batch.cu_seqlens_kv.tolist() == [0, 4, 8, 10, 13]
    assert batch.kv_index.tolist() == [0, 1, 2, 3, 0, 1, 2, 4, 5, 6, 5, 6, 7]
    # Both sides count the tokens that they have in common.
    assert batch.response_index.tolist() == [0, 1, 2, 0, 1, 2, 5, 5, 6]
    assert batch.labels.tolist() == [21, 22, 23, 21, 22, 31, 24, 24, 32]
    assert batch.sequence_id.tolist() == [0, 0, 0, 1, 1, 1, 2, 3, 3]


@pytest.mark.parametrize(
    ("chosen", "rejected", "common"),
    [
        ([5, 6, 7], [5, 6, 8], 2),
        ([5, 6, 7], [4, 6, 7], 0),
        ([5, 6], [5, 6, 7], 2),  # chosen ends first
        ([5, 6, 7], [5, 6], 1),  # of the rejected one a token of its own is left
        ([5, 6], [5, 6], 1),
        ([5], [5], 0),
        ([5], [6], 0),
    ],
)
def test_what_a_pair_may_share(chosen, rejected, common):
    first = TokenizedPair(prompt=[5, 6], chosen=[5], rejected=[5])
    pair = TokenizedPair(prompt=[1, 2, 3], chosen=chosen, rejected=rejected)
    pairs = TokenizedSet.from_pairs([first, pair])
    assert pairs.shared_lengths([1, 0], "response").tolist() == [3 + common, 2]
    assert pairs.shared_lengths([1], "prompt").tolist() == [3]
    assert pairs.shared_lengths([0, 1, 1], "nothing").tolist() == [0, 0, 0]


def test_types_are_what_attention_and_the_operator_take():
    batch = build_packed_batch([Pair([1], [2], [3])], reference_logps=[torch.zeros(2)])
    for name in ("tokens", "position_ids", "response_index", "labels", "sequence_id"):
        assert getattr(batch, name).dtype == torch.int64, name
    assert batch.cu_seqlens_q.dtype == batch.cu_seqlens_kv.dtype == torch.int32
    assert batch.pair_margins.dtype == batch.pair_weights.dtype == torch.float32
    assert batch.reference_logps.dtype == torch.float64
    assert batch.reference_logps.is_contiguous()
    assert isinstance(batch.num_pairs, int) and isinstance(batch.max_seqlen_q, int)


TOKENS = st.lists(st.integers(1, 99), min_size=1, max_size=6)
PAIRS = st.lists(st.builds(Pair, TOKENS, TOKENS, TOKENS, st.sampled_from([0.0, 0.5, 1.0])))


@settings(deadline=None, max_examples=200)
@given(pairs=PAIRS, divisible_by=st.integers(1, 8))
def test_every_sequence_can_be_read_back(pairs, divisible_by):
    batch = build_packed_batch(pairs, divisible_by=divisible_by)
    sequences = [p.prompt + side for p in pairs for side in (p.chosen, p.rejected)]
    assert len(batch.tokens) % divisible_by == 0 and len(batch.tokens) >= 1
    assert batch.num_tokens == sum(map(len, sequences))
    assert len(batch.tokens) - batch.num_tokens < divisible_by or not pairs

    borders = batch.cu_seqlens_q.tolist()
    assert borders[0] == 0 and borders[-1] == len(batch.tokens)
    segments = [batch.tokens[a:b].tolist() for a, b in pairwise(borders)]
    assert segments[: len(sequences)] == sequences
    padding = segments[len(sequences) :]
    assert len(padding) <= 1 and not any(map(any, padding))  # at most one segment, all zeros
    positions = [i for segment in segments for i in range(len(segment))]
    assert batch.position_ids.tolist() == positions
    assert batch.max_seqlen_q == max(map(len, segments))

    responses = [side for p in pairs for side in (p.chosen, p.rejected)]
    assert batch.labels.tolist() == [token for side in responses for token in side]
    assert torch.equal(batch.tokens[batch.response_index + 1], batch.labels)
    segment_of = torch.bucketize(batch.response_index, batch.cu_seqlens_q[1:], right=True)
    assert torch.equal(segment_of, batch.sequence_id)
    assert batch.response_lengths.tolist() == [len(side) for side in responses]
    assert batch.num_pairs == sum(p.weight > 0 for p in pairs)


def test_response_rows_by_hand():
    index = torch.tensor([2, 3, 7, 9, 10, 11])
    first, second, third = (response_rows(index, 12, part=i, num_parts=3) for i in range(3))
    assert first.splits == second.splits == third.splits == (2, 1, 3)
    parts = [part.index.tolist() for part in (first, second, third)]
    assert parts == [[2, 3], [3], [1, 2, 3]]
    assert first.order is None and first.inverse is None

    back = response_rows(torch.tensor([9, 2, 9, 3]), 12, part=2, num_parts=3)  # order: 2, 3, 9, 9
    assert back.splits == (2, 0, 2) and back.index.tolist() == [1, 1]
    assert back.order.tolist() == [1, 3, 0, 2] and back.inverse.tolist() == [2, 0, 3, 1]
    assert response_rows(torch.tensor([9, 2]), 12, part=0, num_parts=1).order is None
    assert response_rows(torch.tensor([9, 2]), 12, part=1, num_parts=3).index.tolist() == []
    assert response_rows(torch.empty(0, dtype=torch.int64), 12, part=0, num_parts=2).splits == (
        0,
        0,
    )


@settings(deadline=None, max_examples=100)
@given(
    num_parts=st.integers(1, 5), part_length=st.integers(1, 7), data=st.data(),
    is_sorted=st.booleans(),
)  # fmt: skip
def test_the_rows_of_all_parts_are_the_response_tokens(num_parts, part_length, data, is_sorted):
    """Joined part by part and put back in order they are what one index_select takes."""
    length = num_parts * part_length
    index = data.draw(st.lists(st.integers(0, length - 1), max_size=12))
    index = torch.tensor(sorted(index) if is_sorted else index, dtype=torch.int64)
    hidden = torch.arange(100, 100 + length)
    parts = [response_rows(index, length, part=i, num_parts=num_parts) for i in range(num_parts)]
    shards = hidden.split(part_length)
    joined = torch.cat([shard[rows.index] for shard, rows in zip(shards, parts, strict=True)])
    for rows in parts:
        assert rows.splits == tuple(len(part.index) for part in parts)
        assert is_sorted <= (rows.order is None)
        if rows.order is None:
            assert torch.equal(joined, hidden[index])
        else:
            assert torch.equal(joined, hidden[index][rows.order])
            assert torch.equal(joined[rows.inverse], hidden[index])


@pytest.mark.parametrize(("row_length", "length"), [(None, 4), (12, 12)])
def test_no_pairs_give_a_row_of_padding(row_length, length):
    batch = build_packed_batch([], reference_logps=[], row_length=row_length, divisible_by=4)
    assert batch.tokens.tolist() == [0] * length
    assert batch.position_ids.tolist() == list(range(length))
    assert batch.cu_seqlens_q.tolist() == [0, length]
    assert len(batch.response_index) == len(batch.labels) == len(batch.sequence_id) == 0
    assert len(batch.reference_logps) == len(batch.response_lengths) == 0
    assert (batch.rows, batch.num_pairs, batch.num_tokens) == ((), 0, 0)


def test_a_row_length_is_reached_exactly():
    pairs = [Pair([1, 2], [3], [4])]
    batch = build_packed_batch(pairs, row_length=20, divisible_by=4)
    assert batch.cu_seqlens_q.tolist() == [0, 3, 6, 20]
    assert batch.max_seqlen_q == 14
    for row_length in (5, 18):
        with pytest.raises(ValueError, match=f"row_length={row_length}; expected a multiple of 4"):
            build_packed_batch(pairs, row_length=row_length, divisible_by=4)
    assert build_packed_batch(pairs, row_length=6).cu_seqlens_q.tolist() == [0, 3, 6]


def test_long_padding_is_many_short_segments():
    batch = build_packed_batch([Pair([1, 2], [3], [4])], row_length=140)
    assert batch.cu_seqlens_q.tolist() == [0, 3, 6, 70, 134, 140]
    assert batch.position_ids[6:].tolist() == [*range(64), *range(64), *range(6)]
    assert (batch.max_seqlen_q, batch.max_seqlen_kv) == (64, 64)


def test_to_moves_every_tensor_and_keeps_the_rest():
    batch = build_packed_batch([Pair([1], [2], [3], row=5)], reference_logps=[torch.zeros(2)])
    moved = batch.to("meta")
    assert moved.tokens.device.type == moved.reference_logps.device.type == "meta"
    assert moved.pair_weights.device.type == moved.cu_seqlens_kv.device.type == "meta"
    assert (moved.rows, moved.num_pairs, moved.kv_index) == ((5,), 1, None)
    assert batch.to("cpu").tokens is batch.tokens


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (Pair([], [1], [2], row=9), "row 9: the prompt side has no tokens"),
        (Pair([1], [], [2], row=9), "row 9: the chosen side has no tokens"),
        (Pair([1], [2], [], row=9), "row 9: the rejected side has no tokens"),
        (Pair([1], [2], [3], -1.0, 9), "row 9: weight=-1.0; expected a finite number >= 0"),
        (Pair([1], [2], [3], float("nan"), 9), "row 9: weight=nan"),
        (Pair([1], [2], [3], 1.0, 9, float("inf")), "row 9: margin=inf; expected a finite number"),
    ],
)
def test_a_pair_that_cannot_be_trained_on_is_named(pair, message):
    with pytest.raises(ValueError, match=message):
        build_packed_batch([pair])


def test_reference_log_probs_must_fit_their_pair():
    pair = Pair([1], [2, 3], [4], row=9)
    with pytest.raises(ValueError, match=r"row 9: .* shape \(2,\); expected \(3,\)"):
        build_packed_batch([pair], reference_logps=[np.zeros(2)])
    with pytest.raises(ValueError, match="2 reference log-prob rows for 1 pairs"):
        build_packed_batch([pair], reference_logps=[np.zeros(3)] * 2)


@pytest.mark.parametrize(
    ("pair", "bad"),
    [
        (TokenizedPair(prompt=[0], chosen=[9], rejected=[1], row=4), None),
        (TokenizedPair(prompt=[1], chosen=[2, 10], rejected=[3], row=4), 10),
        (TokenizedPair(prompt=[10], chosen=[2], rejected=[3], row=4), 10),  # the embedding's turn
        (TokenizedPair(prompt=[1], chosen=[2], rejected=[-1], row=4), -1),
    ],
)
def test_ids_beyond_the_vocabulary_are_found_before_a_run(pair, bad):
    first = TokenizedPair(prompt=[1, 2], chosen=[3], rejected=[4, 5], row=3)
    last = TokenizedPair(prompt=[99], chosen=[1], rejected=[1], row=6)
    check_token_ids(TokenizedSet.from_pairs([]), 10)
    if bad is None:
        check_token_ids(TokenizedSet.from_pairs([first, pair]), 10)
        return
    for pairs in ([first, pair], [pair, first], [first, pair, last]):
        with pytest.raises(ValueError, match=f"row 4 holds token id {bad}, .* ids 0 to 9;"):
            check_token_ids(TokenizedSet.from_pairs(pairs), 10)


@pytest.mark.parametrize(
    ("share", "most", "fix"),
    [
        ("nothing", 12, "12 or more, set data.share_prompts=true, or"),
        ("prompt", 9, "9 or more, or"),
    ],
)
def test_a_pair_that_fits_no_row_is_named_before_a_run(share, most, fix):
    short = TokenizedPair(prompt=[1], chosen=[2], rejected=[3], row=4)
    long = TokenizedPair(prompt=[1, 2, 3], chosen=[2, 3], rejected=[2, 3, 4, 5], row=8)
    pairs = TokenizedSet.from_pairs([short, long, short])
    check_pairs_fit(pairs, most, share)
    check_pairs_fit(pairs, None, share)
    check_pairs_fit(pairs, 7, "response")  # both responses begin with the same two tokens
    with pytest.raises(ValueError, match=f"row 8 takes {most} tokens.*={most - 1}; .*{fix}"):
        check_pairs_fit(pairs, most - 1, share)


def test_packed_lengths_count_shared_tokens_once():
    lengths = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.int32)
    assert packed_lengths(lengths, np.array([0, 0])).tolist() == [7, 19]
    assert packed_lengths(lengths, np.array([1, 6])).tolist() == [6, 13]
