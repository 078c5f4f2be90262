"""What the data report says about saved tokens: by hand, and on real dialogues."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from reinforcer_tp.data.loader import global_batch_rows
from reinforcer_tp.data.micro_batches import MicroBatching, micro_batches
from reinforcer_tp.data.packing import PairCost
from reinforcer_tp.data.prepare import format_report, prepare_data
from reinforcer_tp.data.token_report import length_histograms, token_report
from reinforcer_tp.data.tokenized import TokenizedPair, TokenizedSet

ASSETS = os.environ.get("REINFORCER_TP_ASSETS")


def cut(**changes) -> MicroBatching:
    values = {
        "max_tokens": 20,
        "max_pairs": None,
        "dp_rank": 0,
        "dp_size": 1,
        "divisible_by": 1,
        "equal_rows": False,
        "share": "prompt",
    }
    return MicroBatching(**values | changes)


def pair_set(*lengths) -> TokenizedSet:
    """Pairs of the given (P, C, R); the responses of a pair begin with the same token."""
    return TokenizedSet.from_pairs(
        TokenizedPair(
            prompt=[1] * prompt,
            chosen=[2] + [3] * (chosen - 1),
            rejected=[2] + [4] * (rejected - 1),
            row=row,
        )
        for row, (prompt, chosen, rejected) in enumerate(lengths)
    )


def test_by_hand():
    pairs = pair_set((4, 2, 3), (1, 3, 2), (5, 1, 1))  # naive 13, 7, 12; prompt shared 9, 6, 7
    report = token_report(pairs, [[0, 1, 2]], cut())
    assert report == {
        "steps": 1,
        "share": "prompt",
        "naive_padded": 2 * 3 * 7,  # the longest is 4 + 3
        "naive": 32,
        "packed": 32,
        "shared": 22,
        "padding_fraction": 0.0,
        "ratio": 32 / 22,
    }
    # Two rows of at most 20: 9 and 7 + 6 tokens, both padded to 13.
    equal = token_report(pairs, [[0, 1, 2]], cut(equal_rows=True))
    assert (equal["shared"], equal["padding_fraction"]) == (2 * 13, 1 - 22 / 26)
    # Unshared 13 and 12 + 7.
    assert equal["packed"] == 2 * 19
    # In multiples of 4 the rows of 9 and 13 take 12 + 16.
    assert token_report(pairs, [[0, 1, 2]], cut(divisible_by=4))["shared"] == 28
    # The common first token too, but a rejected response of one token keeps it.
    assert token_report(pairs, [[0, 1, 2]], cut(share="response"))["shared"] == 8 + 5 + 7
    nothing = token_report(pairs, [[0, 1, 2]], cut(share="nothing"))
    assert nothing["shared"] == nothing["packed"] == 32 and nothing["ratio"] == 1


def test_steps_are_summed_and_a_pair_that_fits_only_shared_is_counted():
    pairs = pair_set((8, 2, 2), (2, 1, 1))
    report = token_report(pairs, [[0], [1]], cut(max_tokens=12))  # unshared pair 0 takes 20
    assert (report["naive"], report["packed"], report["shared"]) == (26, 26, 12 + 4)
    assert (report["naive_padded"], report["steps"]) == (2 * 10 + 2 * 3, 2)


def test_padding_is_counted_in_batches_of_eight():
    pairs = pair_set((1, 2, 1), *[(1, 1, 1)] * 7, (10, 5, 1), (1, 1, 1))
    report = token_report(pairs, [list(range(10))], cut(max_tokens=100))
    assert report["naive_padded"] == 2 * 8 * 3 + 2 * 2 * 15


def test_a_large_set_is_looked_at_in_part():
    pairs = pair_set(*[(2, 1, 1)] * 10)
    drawn = []

    def batches():
        for step in range(1000):
            drawn.append(step)
            yield [step % 10] * 3000

    assert token_report(pairs, batches(), cut())["steps"] == 3
    assert len(drawn) == 4
    assert token_report(pairs, [[0] * 12_000] * 2, cut())["steps"] == 1


def report_of(pairs, batches, **changes):
    split = {
        "source": "a.jsonl",
        "shapes": {"messages": 3},
        "boundary_example": None,
        "surprises": {},
        "rows_read": 3,
        "used": 3,
        "dropped": {},
        "truncated": 0,
        "boundary_mismatches": 0,
        "ties_kept": 0,
        "zero_weight": 0,
        "margins": None,
        "has_reference": False,
        "tokens": {"prompt": 1, "chosen": 1, "rejected": 1},
        "longest": {"sequence": 1},
    }
    savings = token_report(pairs, batches, cut(**changes))
    return {
        "dataset": "d",
        "train": split | {"token_savings": json.loads(json.dumps(savings))},
        "validation": split,
    }


def test_the_printed_lines_tell_tokens_a_step():
    pairs = pair_set((400, 200, 300), (100, 300, 200), (500, 100, 100))
    batches = [[0, 1, 2], [0, 1, 2]]
    changes = {"max_tokens": 2000, "equal_rows": True}
    lines = format_report(report_of(pairs, batches, **changes)).splitlines()
    assert lines[-6:-1] == [
        "train: tokens a step, mean of the first 2 steps",
        "       4,200  both sides in full, padded to the longest of 8 pairs",
        "       3,200  both sides in full",
        "       3,800  both sides in full, packed into rows",
        "       2,600  this run: packed, prompts shared, 1.23x fewer than in full, 15.4% padding",
    ]
    assert lines[-1].startswith("validation: a.jsonl")
    lines = format_report(report_of(pairs, batches, share="nothing", **changes)).splitlines()
    assert lines[-2].startswith("       3,800  this run: packed, 15.8% padding")
    assert "padded to" in lines[-4] and lines[-3].endswith("both sides in full")


# Real dialogues

SMOLLM2 = PairCost(  # FLOPs of SmolLM2-135M
    token=6.0 * 30 * (576 * (2 * 576 + 2 * 192) + 3 * 576 * 1536),
    response_token=6.0 * 576 * 49152,
    visible_key=12.0 * 30 * 576,
)


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory):
    if not ASSETS:
        pytest.skip("REINFORCER_TP_ASSETS is not set: no hh_rlhf and no SmolLM2 tokenizer")
    from reinforcer_tp.data import load_tokenizer

    folder = tmp_path_factory.mktemp("hh")
    path = Path(ASSETS) / "datasets" / "hh_rlhf" / "helpful-base" / "test.pairs.jsonl.gz"
    (folder / "test.jsonl").write_bytes(gzip.decompress(path.read_bytes()))
    return prepare_data(
        {"dataset_name": "auto", "train_data_path": str(folder / "test.jsonl")},
        tokenizer=load_tokenizer(str(Path(ASSETS) / "smollm2_135m_instruct")),
        max_total_sequence_length=4096,
        cache_dir=folder / "cache",
    ).train


@pytest.mark.parametrize("batch_size", [32, 64, 128])
@pytest.mark.parametrize("dp_size", [1, 2, 3, 4])
def test_padding_of_real_dialogues_is_at_most_three_percent(dialogues, batch_size, dp_size):
    batches = [
        global_batch_rows(len(dialogues), batch_size, seed=1, step=step, shuffle=True)
        for step in range(len(dialogues) // batch_size)
    ]
    cuts = {"max_tokens": 4096, "dp_size": dp_size, "cost": SMOLLM2}
    equal = token_report(dialogues, batches, cut(equal_rows=True, **cuts))
    assert 0 < equal["padding_fraction"] <= 0.03
    free = token_report(dialogues, batches, cut(divisible_by=8, **cuts))
    assert free["padding_fraction"] <= 0.005
    unequal = token_report(dialogues, batches, cut(**cuts))
    assert unequal["padding_fraction"] == 0


def test_sharing_saves_38_percent_of_the_tokens_of_real_dialogues(dialogues):
    """naive / shared = 1.604 with prompts shared, 1.605 with common starts of responses too."""
    lengths = dialogues.lengths().sum(axis=0, dtype=np.int64)
    batches = [list(range(len(dialogues)))]
    expected = {"prompt": 1.6041, "response": 1.6055}
    for share, ratio in expected.items():
        report = token_report(dialogues, batches, cut(max_tokens=4096, share=share))
        assert report["ratio"] == pytest.approx(ratio, abs=1e-4)
    prompt, chosen, rejected = lengths.tolist()
    by_hand = (2 * prompt + chosen + rejected) / (prompt + chosen + rejected)
    assert by_hand == pytest.approx(expected["prompt"], abs=1e-4)


def test_the_report_counts_what_a_step_lays_out(dialogues):
    rows = list(range(64))
    for changes in ({"equal_rows": True}, {"divisible_by": 8, "share": "response"}):
        own = cut(max_tokens=4096, cost=SMOLLM2, **changes)
        built = micro_batches(dialogues, rows, own)
        report = token_report(dialogues, [rows], own)
        assert report["shared"] == sum(len(batch.tokens) for batch in built.batches)
        num_tokens = sum(batch.num_tokens for batch in built.batches)
        assert report["padding_fraction"] == 1 - num_tokens / report["shared"]


def test_histograms_of_lengths_by_hand():
    assert length_histograms(pair_set((4, 2, 3), (1, 3, 2), (5, 1, 1))) == {
        "bin_tokens": 1,
        "prompt": [0, 1, 0, 0, 1, 1],
        "chosen": [0, 1, 1, 1, 0, 0],
        "rejected": [0, 1, 1, 1, 0, 0],
    }


@pytest.mark.parametrize("longest", [49, 50, 99, 100, 249, 250, 8192, 131_072])
def test_histograms_stay_small_and_count_every_pair(longest):
    lengths = [(longest, 1, 2), (longest // 2, longest, 1), (1, 7, longest - 1)]
    found = length_histograms(pair_set(*lengths))
    width = found.pop("bin_tokens")
    assert list(found) == ["prompt", "chosen", "rejected"]
    for part, counts in enumerate(found.values()):
        assert len(counts) <= 50
        for i, count in enumerate(counts):
            assert count == sum(i * width <= pair[part] < (i + 1) * width for pair in lengths)
        assert sum(counts) == 3
