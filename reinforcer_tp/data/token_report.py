"""Lengths, and tokens that packing and sharing save, for the data report."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np

from reinforcer_tp.data.micro_batches import MicroBatching, plan_rows
from reinforcer_tp.data.packed_batch import packed_lengths
from reinforcer_tp.data.tokenized import TokenizedSet

_PADDED_BATCH = 8  # pairs: the default per_device_train_batch_size of transformers' Trainer
_MAX_BINS = 50  # of a histogram
_MAX_PAIRS = 10_000  # looked at, so that a set of any size takes well under a second


def token_report(
    pairs: TokenizedSet, batches: Iterable[Sequence[int]], cut: MicroBatching
) -> dict[str, Any]:
    """What the first global batches (indices into `pairs`; at least one) take, as JSON:

    steps: global batches looked at, at most 10,000 pairs of them but never less than one batch
    naive_padded: both sequences of each pair, padded to the longest of its 8 pairs
    naive: the tokens of both sequences
    packed: slots of the rows as `cut` packs them but nothing shared; where a pair is then longer
        than a row may be, rows may be as long as that pair
    shared: slots of the rows as `cut` packs and shares them
    share: nothing | prompt | response, of `cut`
    padding_fraction: padding in the slots of `shared`
    ratio: naive / shared

    Tokens and slots are sums over those steps and all data-parallel ranks.
    """
    steps = [_step_tokens(pairs, rows, cut) for rows in _first(batches)]
    assert steps, "no global batch"
    totals = {name: sum(step[name] for step in steps) for name in steps[0]}
    num_tokens = totals.pop("num_tokens")
    return totals | {
        "steps": len(steps),
        "share": cut.share,
        "padding_fraction": 1 - num_tokens / totals["shared"],
        "ratio": totals["naive"] / totals["shared"],
    }


def length_histograms(pairs: TokenizedSet) -> dict[str, Any]:
    """How many pairs have how many tokens, as JSON, in at most 50 bins:

    bin_tokens: width w of a bin; bin i counts lengths from i * w up to but not (i + 1) * w
    prompt, chosen, rejected: pairs in each bin
    """
    lengths = pairs.lengths()
    longest = int(lengths.max(initial=0))
    width = next(w for w in _nice_widths() if longest < w * _MAX_BINS)
    num_bins = longest // width + 1
    counts = {
        part: np.bincount(lengths[:, i] // width, minlength=num_bins).tolist()
        for i, part in enumerate(("prompt", "chosen", "rejected"))
    }
    return {"bin_tokens": width} | counts


def _nice_widths() -> Iterator[int]:
    return (digit * 10**power for power in count() for digit in (1, 2, 5))


def _first(batches: Iterable[Sequence[int]]) -> Iterable[Sequence[int]]:
    num_pairs = 0
    for rows in batches:
        num_pairs += len(rows)
        if num_pairs > max(_MAX_PAIRS, len(rows)):
            return
        yield rows


def _step_tokens(pairs: TokenizedSet, rows: Sequence[int], cut: MicroBatching) -> dict[str, int]:
    lengths = pairs.lengths()[np.asarray(rows)]
    nothing, shared = np.zeros(len(lengths), np.int64), pairs.shared_lengths(rows, cut.share)
    naive = packed_lengths(lengths, nothing)
    longest = lengths[:, 0].astype(np.int64) + lengths[:, 1:].max(axis=1)
    padded = [longest[i : i + _PADDED_BATCH] for i in range(0, len(longest), _PADDED_BATCH)]
    roomy = cut
    if cut.max_tokens is not None:
        roomy = replace(cut, max_tokens=max(cut.max_tokens, int(naive.max())))
    return {
        "naive_padded": sum(2 * len(batch) * int(batch.max()) for batch in padded),
        "naive": int(naive.sum()),
        "packed": _num_slots(lengths, nothing, roomy),
        "shared": _num_slots(lengths, shared, cut),
        "num_tokens": int(packed_lengths(lengths, shared).sum()),
    }


def _num_slots(lengths: np.ndarray, shared: np.ndarray, cut: MicroBatching) -> int:
    _, row_lengths = plan_rows(lengths, shared, cut)
    return sum(map(sum, row_lengths))
