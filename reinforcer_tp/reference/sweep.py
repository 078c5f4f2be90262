"""Reference log-probs: one forward sweep before training, while the weights are the reference's.

Mode `memory`: every rank of the last pipeline stage keeps the per-token float32 log-probs of the
pairs that this run will use. There is never a second model.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist

from reinforcer_tp.data.micro_batches import MicroBatching, micro_batches
from reinforcer_tp.data.prepare import TokenizedSet
from reinforcer_tp.mcore.schedule import Stage, forward_logps


def sweep_reference(
    stage: Stage,
    pairs: TokenizedSet,
    rows: Sequence[int],
    cut: MicroBatching,
    *,
    batch_size: int,
    on_progress: Callable[[str], None],
) -> dict[int, np.ndarray]:
    """Log-probs of the response tokens under the weights that `stage` holds now. Collective.

    `rows` are indices into `pairs`; `batch_size` pairs (over all ranks) are swept at a time and
    `on_progress` is told about it about ten times. Returns index -> (C + R,) float32, chosen then
    rejected, on the last stage; {} elsewhere.
    """
    found: dict[int, np.ndarray] = {}
    unique = sorted(set(rows))
    index_of_row = {int(pairs.rows[i]): i for i in unique}
    for begin in range(0, len(unique), batch_size):
        part = unique[begin : begin + batch_size]
        batches = micro_batches(pairs, part, cut).batches
        for batch, logps in zip(batches, forward_logps(stage, batches), strict=False):
            counts = batch.response_lengths.reshape(-1, 2).sum(1).tolist()
            values = logps.to("cpu", torch.float32).split(counts)
            found |= {index_of_row[r]: v.numpy() for r, v in zip(batch.rows, values, strict=True)}
        done = begin + len(part)
        if done == len(unique) or done * 10 // len(unique) > begin * 10 // len(unique):
            on_progress(f"{done} of {len(unique)} pairs")
    if stage.topology.is_last_stage and stage.topology.dp_size > 1:
        gathered: list = [None] * stage.topology.dp_size
        dist.all_gather_object(gathered, found, group=stage.topology.dp_group)
        found = {row: logps for part in gathered for row, logps in part.items()}
    return found
