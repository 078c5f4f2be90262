"""Numbers that are not finite: the error, and where they came from."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist

from reinforcer_tp.data.packed_batch import PackedBatch
from reinforcer_tp.loss import sequence_sums
from reinforcer_tp.mcore.topology import Topology


class NonFiniteError(RuntimeError):
    """A number that is not finite; no weight has changed since the last step."""


def blame(
    step: int,
    what: str,
    reports: Sequence[Mapping[str, torch.Tensor]],
    batches: Sequence[PackedBatch],
    topology: Topology,
) -> str:
    """Rank, micro-batch, pair and side wherever a log-prob is not finite. Collective."""
    local = [
        f"rank {topology.rank}, micro-batch {i}, {_culprits(report, batch)}"
        for i, (report, batch) in enumerate(zip(reports, batches, strict=False))
        if not np.isfinite(report["loss"].item())
    ]
    everyone: list = [None] * topology.world_size
    dist.all_gather_object(everyone, local)
    places = list(dict.fromkeys(place for part in everyone for place in part))
    where = "; ".join(places) or "no single micro-batch: every loss is finite, the gradient is not"
    return (
        f"step {step}: the {what} is not finite ({where}). The weights of step {step - 1} are "
        "untouched; lower policy.megatron_cfg.optimizer.lr, or look at the rows and at the "
        "model's weights"
    )


def _culprits(report: Mapping[str, torch.Tensor], batch: PackedBatch) -> str:
    policy = report["sequence_logps"]
    of, sides = "log-probs", _bad_sides(policy, batch)
    if not sides and batch.reference_logps is not None:
        batch = batch.to("cpu")  # those of a resident reference are on the device
        sums = sequence_sums(batch.reference_logps, batch.sequence_id, len(policy))
        of, sides = "the reference's log-probs", _bad_sides(sums, batch)
    if not sides:
        return f"log-probs are finite in source rows {list(batch.rows)}, the loss is not"
    more = f" and {len(sides) - 4} more" if len(sides) > 4 else ""
    return f"{of} of {', '.join(sides[:4])}{more}"


def _bad_sides(sums: torch.Tensor, batch: PackedBatch) -> list[str]:  # sums (2B,)
    is_bad = (~sums.isfinite()).view(-1, 2).tolist()
    return [
        f"source row {row} {side}"
        for row, bad in zip(batch.rows, is_bad, strict=True)
        for side, is_bad_side in zip(("chosen", "rejected"), bad, strict=True)
        if is_bad_side
    ]
