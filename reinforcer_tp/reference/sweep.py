"""The reference's log-probs: forward passes that keep nothing for backward, in long rows."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from reinforcer_tp.data.micro_batches import MicroBatching, micro_batches
from reinforcer_tp.data.packed_batch import packed_lengths
from reinforcer_tp.data.prepare import TokenizedSet
from reinforcer_tp.mcore.schedule import Stage, forward_logps

_ROOM = 4  # a forward pass holds one layer's activations: its rows may be longer by this
_ROWS_A_CALL = 8  # rows of each rank in one pass through a pipeline, which fills and drains once


def sweep_batching(cut: MicroBatching, max_tokens: int | None, longest_pair: int) -> MicroBatching:
    """Training's `cut` with the rows of a sweep: `max_tokens` each (None: 4 times training's)."""
    if max_tokens is None and cut.max_tokens is not None:
        max_tokens = _ROOM * cut.max_tokens
    max_pairs = cut.max_pairs
    if max_tokens is not None:
        max_tokens, max_pairs = max(max_tokens, longest_pair), None
    return replace(cut, max_tokens=max_tokens, max_pairs=max_pairs)


def sweep(
    stage: Stage,
    pairs: TokenizedSet,
    rows: Sequence[int],  # indices into `pairs`, none twice
    cut: MicroBatching,
    *,
    pairs_a_call: int,  # at most, over all ranks; counts where `cut` has no limit of tokens
) -> Iterator[tuple[int, int, dict[int, np.ndarray]]]:
    """Yields (pairs, tokens of all ranks, this rank's values) after each pass. Collective.

    Values: index -> (C + R,) float32 log-probs of the response tokens, chosen then rejected, under
    the weights that `stage` holds now; of this rank's pairs on the last stage, {} elsewhere. The
    longest pairs come first, so that too little memory shows at once.
    """
    shared = pairs.shared_lengths(rows, cut.share)
    tokens = packed_lengths(pairs.lengths()[np.asarray(rows, np.int64)], shared)
    order = np.argsort(-tokens, kind="stable")
    rows, tokens = np.asarray(rows, np.int64)[order], tokens[order]
    for begin, end in _calls(tokens, cut, pairs_a_call):
        part = rows[begin:end].tolist()
        batches = micro_batches(pairs, part, cut).batches
        index_of_row = {int(pairs.rows[i]): i for i in part}
        found: dict[int, np.ndarray] = {}
        for batch, logps in zip(batches, forward_logps(stage, batches), strict=False):
            counts = batch.response_lengths.reshape(-1, 2).sum(1).tolist()
            values = logps.to("cpu", torch.float32).split(counts)
            found |= {index_of_row[r]: v.numpy() for r, v in zip(batch.rows, values, strict=True)}
        yield len(part), int(tokens[begin:end].sum()), found


def _calls(tokens: np.ndarray, cut: MicroBatching, pairs_a_call: int) -> Iterator[tuple[int, int]]:
    """Borders of what goes through the pipeline together."""
    if cut.max_tokens is None:
        starts = range(0, len(tokens), pairs_a_call)
        yield from ((start, min(start + pairs_a_call, len(tokens))) for start in starts)
        return
    budget = cut.max_tokens * cut.dp_size * _ROWS_A_CALL
    ends = np.cumsum(tokens)
    begin, done = 0, 0
    while begin < len(tokens):
        end = max(int(np.searchsorted(ends, done + budget, side="right")), begin + 1)
        yield begin, end
        begin, done = end, int(ends[end - 1])


def sweep_reference(
    stage: Stage, pairs: TokenizedSet, rows: Sequence[int], cut: MicroBatching
) -> dict[int, np.ndarray]:
    """All the values of `sweep` on every rank of the last stage; {} elsewhere. Collective."""
    found: dict[int, np.ndarray] = {}
    for _, _, values in sweep(stage, pairs, rows, cut, pairs_a_call=len(rows)):
        found |= values
    if stage.topology.is_last_stage and stage.topology.dp_size > 1:
        gathered: list = [None] * stage.topology.dp_size
        dist.all_gather_object(gathered, found, group=stage.topology.dp_group)
        found = {row: logps for part in gathered for row, logps in part.items()}
    return found
