"""Which pairs make up a global batch.

Everything here runs on the host and is a pure function of its arguments, so each rank can compute
any rank's part and a resumed run continues exactly where the first one stopped.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np


def steps_per_epoch(num_pairs: int, batch_size: int) -> int:
    """Whole global batches in one pass over the data; the last partial one is dropped.

    Raises ValueError when the set is smaller than one batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} pairs; expected at least 1")
    if num_pairs < batch_size:
        raise ValueError(
            f"the training set has {num_pairs} usable pairs, fewer than one global batch of "
            f"{batch_size}; lower policy.train_global_batch_size or give more data"
        )
    return num_pairs // batch_size


def global_batch_rows(
    num_pairs: int, batch_size: int, *, seed: int, step: int, shuffle: bool
) -> list[int]:
    """Indices of the pairs of global batch `step` (from 0), alike for any number of ranks.

    Each epoch has its own permutation, a function of `seed` and the epoch alone.
    """
    if step < 0:
        raise ValueError(f"step={step}; expected 0 or more")
    epoch, index = divmod(step, steps_per_epoch(num_pairs, batch_size))
    begin = index * batch_size
    if not shuffle:
        return list(range(begin, begin + batch_size))
    return _permutation(num_pairs, seed, epoch)[begin : begin + batch_size].tolist()


def validation_batch_rows(
    num_pairs: int, batch_size: int, *, max_batches: int = 0
) -> Iterator[list[int]]:
    """Indices of the validation batches, in order, the last one possibly partial.

    `max_batches` <= 0 means the whole set.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} pairs; expected at least 1")
    stop = num_pairs if max_batches <= 0 else min(num_pairs, max_batches * batch_size)
    for begin in range(0, stop, batch_size):
        yield list(range(begin, min(begin + batch_size, stop)))


@functools.lru_cache(maxsize=2)
def _permutation(num_pairs: int, seed: int, epoch: int) -> np.ndarray:
    # RandomState, because numpy promises that its stream never changes: a resumed run sees the
    # same order under another numpy.
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed}; expected an integer in [0, 2**64)")
    words = [seed & 0xFFFFFFFF, seed >> 32, epoch]
    return np.random.RandomState(words).permutation(num_pairs)
