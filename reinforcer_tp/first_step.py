"""The first-step gate: before any weight moves, policy and reference are one model.

Then every loss that reads the reference has a known value; another one means a wrong reference,
mask or layout. Nothing else would say so: such a run trains, towards the wrong thing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from reinforcer_tp.data.packed_batch import PackedBatch
from reinforcer_tp.loss import LossOptions, loss_at_reference, sequence_sums
from reinforcer_tp.mcore.schedule import reduce_metrics
from reinforcer_tp.mcore.topology import Topology

# Of the loss in float32, where it moves as sigmoid does at beta 0.1: by _SLOPE a nat of margin.
FLOAT32_TOLERANCE = 1e-5
_SLOPE = 0.05
# In 16 bits: so many times the noise between two packings, and at least that of two layouts.
NOISE_FACTOR = 4.0
LEAST_NOISE = 0.025  # nats in the sum of a response
NOISE_PAIRS = 64  # looked at
NAMES = ("preference_loss", "num_pairs", "expected", "slope")

# row in the source -> (2,) sums of log-probs, chosen and rejected
SumsByRow = dict[int, np.ndarray]


class FirstStepError(RuntimeError):
    """The first loss is not what it must be while policy and reference are the same model."""


def check_first_step(
    batches: Sequence[PackedBatch],  # this rank's, with reference_logps on the last stage
    reports: Sequence[Mapping[str, torch.Tensor]],  # of these, from dpo_loss
    options: LossOptions,
    topology: Topology,
    *,
    precision: str,
    swept_again: Callable[[], SumsByRow],  # 16 bits: this rank's policy sums in another packing
) -> str:
    """A line about the first loss. Collective, before the optimizer's first step.

    In float32 the mean preference loss may be off by 1e-5 times how much steeper the loss is than
    sigmoid at beta 0.1, at least 1e-5; in 16 bits by what 4 times the measured noise between two
    packings moves it.

    Raises:
        FirstStepError: on every rank, when it is off by more. Names the worst pair.
    """
    local = dict.fromkeys(NAMES, 0.0)
    for batch, report in zip(batches, reports, strict=False):
        expected, slope = loss_at_reference(
            batch.reference_logps, batch.sequence_id, batch.response_lengths,
            batch.pair_weights, batch.pair_margins, options,
        )  # fmt: skip
        values = (report["preference_loss"], report["num_pairs"], expected, slope)
        for name, value in zip(NAMES, values, strict=True):
            local[name] += value.item()
    sums = reduce_metrics(local, NAMES, topology)
    num_pairs = max(sums["num_pairs"], 1.0)
    got, expected, slope = (sums[n] / num_pairs for n in ("preference_loss", "expected", "slope"))
    if precision == "float32":
        tolerance, note = FLOAT32_TOLERANCE * max(1.0, slope / _SLOPE), ""
    else:
        noise = _noise(_sums(batches, reports), swept_again(), topology)
        tolerance = 2 * slope * max(NOISE_FACTOR * noise, LEAST_NOISE)
        note = f"; {noise:.1e} nats of noise in a response between two packings (rms)"
    off = abs(got - expected)
    text = (
        f"preference loss {got:.7g}, {expected:.7g} expected while the policy is the reference "
        f"(off by {off:.1e}, at most {tolerance:.1e}{note})"
    )
    if off <= tolerance:  # also false for a NaN
        return f"first step: {text}"
    raise FirstStepError(f"first step: {text}. {_worst(batches, reports, topology)}")


def _sums(
    batches: Sequence[PackedBatch], reports: Sequence[Mapping[str, torch.Tensor]]
) -> SumsByRow:
    """The policy's sums of this rank's pairs."""
    return {
        row: sums
        for batch, report in zip(batches, reports, strict=False)
        for row, sums in zip(
            batch.rows, report["sequence_logps"].cpu().view(-1, 2).numpy(), strict=True
        )
    }


def _noise(first: SumsByRow, second: SumsByRow, topology: Topology) -> float:
    """Root mean square over responses of the difference of two sweeps' sums. Collective."""
    everyone: list[Any] = [None] * topology.world_size
    dist.all_gather_object(everyone, (first, second))
    firsts = {row: sums for pair in everyone for row, sums in pair[0].items()}
    seconds = {row: sums for pair in everyone for row, sums in pair[1].items()}
    if not seconds:
        return 0.0
    differences = np.stack([firsts[row] - sums for row, sums in seconds.items()])
    return float(np.sqrt(np.mean(differences**2)))


def _worst(
    batches: Sequence[PackedBatch],
    reports: Sequence[Mapping[str, torch.Tensor]],
    topology: Topology,
) -> str:
    """Which pair is furthest from its reference, and what that looks like. Collective."""
    pairs = []  # (row, chosen log-ratio, rejected, response tokens of both)
    for batch, sums in zip(batches, (r["sequence_logps"] for r in reports), strict=False):
        count = len(batch.response_lengths)
        reference = sequence_sums(batch.reference_logps, batch.sequence_id, count)
        ratios = (sums.cpu() - reference.cpu()).view(-1, 2).tolist()
        lengths = batch.response_lengths.view(-1, 2).tolist()
        pairs += zip(batch.rows, ratios, lengths, strict=True)
    everyone: list[Any] = [None] * topology.world_size
    dist.all_gather_object(everyone, pairs)
    pairs = sorted({pair[0]: pair for part in everyone for pair in part}.values())
    if not pairs:
        return "There is no pair"
    by_token = [max(abs(r) / n for r, n in zip(*pair[1:], strict=True)) for pair in pairs]
    bad = max(range(len(pairs)), key=lambda i: math.inf if np.isnan(by_token[i]) else by_token[i])
    row, (chosen, rejected), lengths = pairs[bad]
    num_off = sum(not x < 1e-3 for x in by_token)
    return (
        f"The worst of {len(pairs)} pairs is source row {row}: log-ratio {chosen:+.4g} over "
        f"{lengths[0]} chosen tokens, {rejected:+.4g} over {lengths[1]} rejected ones; {num_off} "
        "pairs are off by more than 1e-3 nats a token. If all are: the reference's weights are not "
        "the policy's, or the layout computes something else (python -m reinforcer_tp.selftest "
        "--config ...); if some are: their reference belongs to other tokens (python -m "
        "reinforcer_tp.reference verify STORE). dpo.first_step_check=warn goes on all the same"
    )
