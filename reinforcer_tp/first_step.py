"""The first-step gate: before any weight moves, policy and reference are one model.

Then every loss that reads the reference has a known value; another one means a wrong reference,
mask or layout. Nothing else would say so: such a run trains, towards the wrong thing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from reinforcer_tp.data.micro_batches import MicroBatching, micro_batches
from reinforcer_tp.data.packed_batch import PackedBatch
from reinforcer_tp.data.tokenized import TokenizedSet
from reinforcer_tp.loss import LossOptions, loss_at_reference, sequence_sums
from reinforcer_tp.mcore.schedule import Stage, forward_logps, reduce_metrics
from reinforcer_tp.mcore.topology import Topology

# Of the loss in float32, where it moves as sigmoid does at beta 0.1: by _SLOPE a nat of margin.
FLOAT32_TOLERANCE = 1e-5
_SLOPE = 0.05
# A mean loss hides log-ratios of both signs, so they are judged as well: in nats a response, per
# square root of its tokens, since errors of tokens add up like a random walk. Two layouts, between
# which a store may travel, differ by up to 0.07 in bfloat16 (tp=2 against tp=1, stories260k, 30
# tokens) and 2e-5 in float32; other weights or tokens by nats.
LAYOUT_NOISE = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.2}
NOISE_FACTOR = 10.0  # of what two packings differ by, where that is more; measured in 16 bits
NOISE_PAIRS = 64  # looked at for it
_SUMMED = ("preference_loss", "num_pairs", "expected", "slope", "tokens", "responses")

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
    sigmoid at beta 0.1, at least 1e-5. In every precision the log-ratios of the responses (root
    mean square) must be what another layout or packing may give.

    Raises:
        FirstStepError: on every rank, when they are more. Names the worst pair.
    """
    batches = [batch.to("cpu") for batch in batches]  # a resident reference left some on the GPU
    sums = reduce_metrics(_local_sums(batches, reports, options), _SUMMED, topology)
    num_pairs = max(sums["num_pairs"], 1.0)
    got, expected, slope = (sums[n] / num_pairs for n in ("preference_loss", "expected", "slope"))
    loss_off, is_float32 = abs(got - expected), precision == "float32"
    text = f"preference loss {got:.7g}, {expected:.7g} expected while the policy is the reference"
    text += f" (off by {loss_off:.1e}"
    loss_allowed, noise = math.inf, 0.0  # in 16 bits what the log-ratios below may do to it
    own = _policy_sums(batches, reports)
    if is_float32:
        loss_allowed = FLOAT32_TOLERANCE * max(1.0, slope / _SLOPE)
        text += f", at most {loss_allowed:.1e}"
    else:
        noise = _rms_difference(own, swept_again(), topology)
    off = _rms_difference(own, _reference_sums(batches), topology)
    length = sums["tokens"] / max(sums["responses"], 1.0)
    allowed = max(NOISE_FACTOR * noise, LAYOUT_NOISE[precision] * math.sqrt(length))
    text += f"); log-ratios of {off:.1e} nats a response, at most {allowed:.1e}"
    text += "" if is_float32 else f"; two packings differ by {noise:.1e}"
    if loss_off <= loss_allowed and off <= allowed:  # also false for a NaN
        return f"first step: {text}"
    raise FirstStepError(f"first step: {text}. {_worst(batches, reports, topology)}")


def _local_sums(
    batches: Sequence[PackedBatch],
    reports: Sequence[Mapping[str, torch.Tensor]],
    options: LossOptions,
) -> dict[str, float]:
    sums = dict.fromkeys(_SUMMED, 0.0)
    for batch, report in zip(batches, reports, strict=False):
        expected, slope = loss_at_reference(
            batch.reference_logps, batch.sequence_id, batch.response_lengths,
            batch.pair_weights, batch.pair_margins, options,
        )  # fmt: skip
        values = {
            "preference_loss": report["preference_loss"],
            "num_pairs": report["num_pairs"],
            "expected": expected,
            "slope": slope,
            "tokens": batch.response_lengths.sum(),
            "responses": len(batch.response_lengths),
        }
        for name, value in values.items():
            sums[name] += float(value)
    return sums


def describe_first_step(
    batches: Sequence[PackedBatch],
    reports: Sequence[Mapping[str, torch.Tensor]],
    topology: Topology,
) -> str:
    """A line for a reference that need not be the policy's first weights. Collective."""
    batches = [batch.to("cpu") for batch in batches]
    policy, reference = _policy_sums(batches, reports), _reference_sums(batches)
    off = _rms_difference(policy, reference, topology)
    return (
        f"first step: log-ratios of {off:.2g} nats a response (root mean square); about 0 where "
        "the reference is the policy's own model"
    )


def sweep_alone(
    stage: Stage, pairs: TokenizedSet, rows: Sequence[int], cut: MicroBatching
) -> SumsByRow:
    """The policy's sums of this rank's part of the first `rows`. Collective.

    Every pair in a row of its own and nothing shared: another packing than any `cut` gives.
    """
    cut = replace(cut, max_tokens=None, max_pairs=1, share="nothing")
    batches = micro_batches(pairs, rows[:NOISE_PAIRS], cut).batches
    found = zip(batches, forward_logps(stage, batches), strict=False)
    return {
        batch.rows[0]: sequence_sums(logps.cpu(), batch.sequence_id, 2).numpy()
        for batch, logps in found
        if batch.rows
    }


def _policy_sums(
    batches: Sequence[PackedBatch], reports: Sequence[Mapping[str, torch.Tensor]]
) -> SumsByRow:
    """Of this rank's pairs."""
    sums = (report["sequence_logps"].cpu().view(-1, 2).numpy() for report in reports)
    return {
        row: both
        for batch, part in zip(batches, sums, strict=False)
        for row, both in zip(batch.rows, part, strict=True)
    }


def _reference_sums(batches: Sequence[PackedBatch]) -> SumsByRow:
    """Likewise; {} before the last stage, which alone has a reference."""
    found: SumsByRow = {}
    for batch in batches:
        if batch.reference_logps is not None:
            count = len(batch.response_lengths)
            sums = sequence_sums(batch.reference_logps, batch.sequence_id, count)
            found |= dict(zip(batch.rows, sums.view(-1, 2).numpy(), strict=True))
    return found


def _rms_difference(first: SumsByRow, second: SumsByRow, topology: Topology) -> float:
    """Root mean square over the responses that both have, on whichever ranks. Collective."""
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
    policy, reference = _policy_sums(batches, reports), _reference_sums(batches)
    pairs = [  # (row, log-ratios of chosen and rejected, their response tokens)
        (row, (policy[row] - reference[row]).tolist(), lengths)
        for batch in batches
        for row, lengths, weight in zip(
            batch.rows,
            batch.response_lengths.view(-1, 2).tolist(),
            batch.pair_weights.tolist(),
            strict=True,
        )
        if row in policy and weight > 0
    ]
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
