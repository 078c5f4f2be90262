"""Packed rows against a plain reading of their layout, over random pairs, budgets and sharing."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reinforcer_tp.data.micro_batches import MicroBatching, micro_batches
from reinforcer_tp.data.packed_batch import PackedBatch, build_packed_batch
from reinforcer_tp.data.packing import PairCost
from reinforcer_tp.data.tokenized import TokenizedPair, TokenizedSet
from tests.unit.toy_tokenizer import toy_tokenizer

COST = PairCost(token=100.0, response_token=50.0, visible_key=1.0)
IDS = st.integers(1, 3)  # few: responses often begin alike, and a wrong position is another token
SIDE = st.lists(IDS, min_size=1, max_size=6)
START = st.lists(IDS, max_size=4)
SHARES = st.sampled_from(["nothing", "prompt", "response"])


@st.composite
def random_pairs(draw, **sizes):
    """Responses with a common start, one of which may be all of it, or both alike."""
    pairs = []
    for row in range(draw(st.integers(**({"min_value": 0, "max_value": 7} | sizes)))):
        start = draw(START)
        ends = [draw(st.one_of(st.just([]), SIDE)) for _ in range(2)]
        chosen, rejected = (start + end or [1] for end in ends)
        pairs.append(
            TokenizedPair(
                prompt=draw(SIDE),
                chosen=chosen,
                rejected=rejected,
                weight=draw(st.sampled_from([0.0, 0.5, 1.0])),
                row=100 + row,
            )
        )
    return pairs


def common_start(chosen, rejected):
    """The longest list that both responses begin with, less than all of the rejected one."""
    length = 0
    while length < min(len(chosen), len(rejected) - 1) and chosen[length] == rejected[length]:
        length += 1
    return length


def shared_by_hand(pair, share):
    if share == "nothing":
        return 0
    extra = common_start(pair.chosen, pair.rejected) if share == "response" else 0
    return len(pair.prompt) + extra


def keys_of_queries(batch: PackedBatch) -> list[list[int]]:
    """For each row token the positions of the keys it sees: segment g's queries against segment
    g's keys, causal with the last query at the last key."""
    index = range(len(batch.tokens)) if batch.kv_index is None else batch.kv_index.tolist()
    queries, keys = batch.cu_seqlens_q.tolist(), batch.cu_seqlens_kv.tolist()
    assert queries[0] == keys[0] == 0 and len(queries) == len(keys)
    assert queries[-1] == len(batch.tokens) and keys[-1] == len(index)
    seen = []
    for (q_begin, q_end), (k_begin, k_end) in zip(pairwise(queries), pairwise(keys), strict=True):
        first = (k_end - k_begin) - (q_end - q_begin)  # keys before the first query's own
        assert first >= 0
        seen += [list(index[k_begin : k_begin + first + j + 1]) for j in range(q_end - q_begin)]
    longest_q = max(b - a for a, b in pairwise(queries))
    longest_kv = max(b - a for a, b in pairwise(keys))
    assert (batch.max_seqlen_q, batch.max_seqlen_kv) == (longest_q, longest_kv)
    return seen


def check_predictions(batch: PackedBatch, pairs: list[TokenizedPair]) -> None:
    """Each label is predicted by a query that sees exactly what precedes it in its sequence."""
    tokens, position_ids = batch.tokens.tolist(), batch.position_ids.tolist()
    seen = keys_of_queries(batch)
    entries = zip(
        batch.sequence_id.tolist(), batch.response_index.tolist(), batch.labels.tolist(),
        strict=True,
    )  # fmt: skip
    sequences = [(p.prompt, response) for p in pairs for response in (p.chosen, p.rejected)]
    for number, (prompt, response) in enumerate(sequences):
        for j, label in enumerate(response):
            sequence, position, actual = next(entries)
            assert (sequence, actual) == (number, label)
            before = prompt + response[:j]
            assert [tokens[key] for key in seen[position]] == before
            assert [position_ids[key] for key in seen[position]] == list(range(len(before)))
            assert seen[position][-1] == position  # a query comes last among its keys
    assert next(entries, None) is None


def check_padding(batch: PackedBatch, num_real: int) -> None:
    """Padding is zeros at the end that see padding alone and that nothing else sees."""
    assert batch.num_tokens == num_real
    assert not batch.tokens[num_real:].any()
    for position, keys in enumerate(keys_of_queries(batch)):
        assert all((key >= num_real) == (position >= num_real) for key in keys)
        assert keys[-1] == position
    padding = len(batch.tokens) - num_real
    assert batch.position_ids[num_real:].tolist() == [i % 64 for i in range(padding)]


PREFIX = TokenizedPair(prompt=[1], chosen=[2, 3], rejected=[2, 3, 1])
LONGER = TokenizedPair(prompt=[1, 2], chosen=[2, 3, 1], rejected=[2, 3])
ALIKE = TokenizedPair(prompt=[3], chosen=[1, 2], rejected=[1, 2])
SHORTEST = TokenizedPair(prompt=[1], chosen=[2], rejected=[2])


@settings(deadline=None, max_examples=300)
@given(pairs=random_pairs(), share=SHARES, divisible_by=st.integers(1, 8), room=st.integers(0, 3))
@example(pairs=[PREFIX, LONGER, ALIKE, SHORTEST], share="response", divisible_by=1, room=0)
@example(pairs=[PREFIX, LONGER, ALIKE, SHORTEST], share="prompt", divisible_by=4, room=1)
@example(pairs=[SHORTEST], share="response", divisible_by=1, room=0)
def test_every_response_token_is_predicted_from_its_own_sequence(pairs, share, divisible_by, room):
    shared = TokenizedSet.from_pairs(pairs).shared_lengths(range(len(pairs)), share).tolist()
    assert shared == [shared_by_hand(pair, share) for pair in pairs]
    sizes = [
        2 * len(p.prompt) + len(p.chosen) + len(p.rejected) - s
        for p, s in zip(pairs, shared, strict=True)
    ]
    shortest = max(-(-sum(sizes) // divisible_by), 1) * divisible_by
    row_length = None if room == 0 else shortest + room * divisible_by
    batch = build_packed_batch(
        pairs, shared=shared, row_length=row_length, divisible_by=divisible_by
    )
    assert len(batch.tokens) == (row_length or shortest)
    check_predictions(batch, pairs)
    check_padding(batch, sum(sizes))
    if batch.kv_index is None:
        assert share == "nothing" or not pairs
    else:  # what the gather of keys relies on
        places = batch.kv_index.tolist()
        assert max(map(places.count, places)) <= 2
    responses = [len(side) for p in pairs for side in (p.chosen, p.rejected)]
    assert batch.response_lengths.tolist() == responses
    assert batch.rows == tuple(p.row for p in pairs)
    assert batch.pair_weights.tolist() == [p.weight for p in pairs]
    assert batch.num_pairs == sum(p.weight > 0 for p in pairs)


@settings(deadline=None, max_examples=200)
@given(
    pairs=random_pairs(min_value=1, max_value=12), share=SHARES, max_tokens=st.integers(40, 120),
    max_pairs=st.one_of(st.none(), st.integers(1, 4)), dp_size=st.integers(1, 4),
    count_multiple=st.integers(1, 3), divisible_by=st.integers(1, 4), equal_rows=st.booleans(),
    cost=st.sampled_from([None, COST]), data=st.data(),
)  # fmt: skip
def test_a_global_batch_is_laid_out_once_over_all_ranks(
    pairs, share, max_tokens, max_pairs, dp_size, count_multiple, divisible_by, equal_rows, cost,
    data,
):  # fmt: skip
    rows = data.draw(st.permutations(range(len(pairs))))
    arguments = {
        "max_tokens": max_tokens,
        "max_pairs": max_pairs,
        "dp_size": dp_size,
        "divisible_by": divisible_by,
        "equal_rows": equal_rows,
        "share": share,
        "cost": cost,
        "count_multiple": count_multiple,
    }
    source = TokenizedSet.from_pairs(pairs)
    parts = [
        micro_batches(source, rows, MicroBatching(dp_rank=rank, **arguments))
        for rank in range(dp_size)
    ]
    everything = [batch for part in parts for batch in part.batches]
    assert sorted(row for batch in everything for row in batch.rows) == [p.row for p in pairs]
    assert len({len(part.batches) for part in parts}) == 1
    assert len(parts[0].batches) % count_multiple == 0
    for batch in everything:
        members = [pairs[row - 100] for row in batch.rows]
        check_predictions(batch, members)
        assert batch.num_tokens <= max_tokens and len(batch.tokens) % divisible_by == 0
        assert max_pairs is None or len(members) <= max_pairs
    row_lengths = [len(batch.tokens) for batch in everything]
    assert not equal_rows or len(set(row_lengths)) == 1
    for part in parts:
        assert part.num_slots == sum(row_lengths)
        assert part.num_tokens == sum(batch.num_tokens for batch in everything)


WORDS = st.text(alphabet="abc .", min_size=1, max_size=8)


@settings(deadline=None, max_examples=50)
@given(texts=st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1, max_size=5), share=SHARES)
def test_the_labels_of_a_sequence_decode_to_its_response(texts, share):
    tokenizer = toy_tokenizer()
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    pairs = [
        TokenizedPair(prompt=encode(prompt), chosen=encode(chosen), rejected=encode(rejected))
        for prompt, chosen, rejected in texts
    ]
    shared = TokenizedSet.from_pairs(pairs).shared_lengths(range(len(pairs)), share)
    batch = build_packed_batch(pairs, shared=shared.tolist())
    responses = [text for _, chosen, rejected in texts for text in (chosen, rejected)]
    for sequence, response in enumerate(responses):
        labels = batch.labels[batch.sequence_id == sequence]
        assert tokenizer.decode(labels.tolist()) == response


def test_a_wrong_position_would_be_seen():
    """The check above is no mirror: moved indices fail it."""
    pairs = [PREFIX, LONGER]
    good = build_packed_batch(pairs, shared=[3, 2])
    check_predictions(good, pairs)
    for name in ("response_index", "kv_index", "labels", "position_ids"):
        moved = getattr(good, name).roll(1)
        with pytest.raises(AssertionError):
            check_predictions(PackedBatch(**{**vars(good), name: moved}), pairs)
