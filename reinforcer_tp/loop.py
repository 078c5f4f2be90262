"""train(), train_step(), evaluate(): the only place that steps the optimizer."""

import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from reinforcer_tp.config import Config, fingerprint
from reinforcer_tp.config_check import METRICS
from reinforcer_tp.data.loader import (
    global_batch_rows,
    steps_per_epoch,
    validation_batch_rows,
)
from reinforcer_tp.data.micro_batches import MicroBatches, MicroBatching, micro_batches
from reinforcer_tp.data.packed_batch import PackedBatch
from reinforcer_tp.data.packing import pair_costs
from reinforcer_tp.data.prepare import TokenizedSet
from reinforcer_tp.flops import pair_cost, peak_tflops
from reinforcer_tp.loss import dpo_loss, sequence_sums
from reinforcer_tp.mcore.checkpoint import prune_checkpoints, save_checkpoint
from reinforcer_tp.mcore.optim import (
    Training,
    current_lr,
    gather_weights,
    optimizer_step,
    zero_grad,
)
from reinforcer_tp.mcore.schedule import LossFunction, Stage, forward_backward, reduce_metrics
from reinforcer_tp.mcore.shape import ModelShape
from reinforcer_tp.mcore.topology import Topology
from reinforcer_tp.metrics import MetricLogger, Progress, validation_line

SUMS = (*METRICS, "num_pairs")  # what dpo_loss sums over pairs; reported as means


class NonFiniteError(RuntimeError):
    """A loss or gradient norm that is not finite; weights are untouched since the last step."""


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """Tokenized pairs and, on the last pipeline stage, their reference log-probs."""

    pairs: TokenizedSet
    reference: Mapping[int, np.ndarray]  # index -> (C + R,) float32


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything the loop works with; built once by train.py."""

    config: Config
    stage: Stage
    training: Training
    train_set: PairSet
    validation_set: PairSet | None
    logger: MetricLogger | None  # rank 0 only
    progress: Progress
    data_fingerprint: str  # of the tokenized sets
    reference_s: float  # seconds of the reference sweep, reported with the first step


def num_steps(config: Config, num_pairs: int) -> int:
    """Optimizer steps of the whole run. Raises ValueError when there is no whole global batch."""
    steps = config.dpo.max_num_epochs * steps_per_epoch(
        num_pairs, config.policy.train_global_batch_size
    )
    limit = config.dpo.max_num_steps
    return steps if limit is None else min(steps, limit)


def train_rows(config: Config, num_pairs: int, step: int) -> list[int]:
    """Indices of the pairs of optimizer step `step` (from 1)."""
    return global_batch_rows(
        num_pairs,
        config.policy.train_global_batch_size,
        seed=config.dpo.seed,
        step=step - 1,
        shuffle=config.data.shuffle,
    )


def validation_batches(config: Config, num_pairs: int) -> list[list[int]]:
    """Indices of the pairs of each validation batch."""
    dpo = config.dpo
    return list(
        validation_batch_rows(num_pairs, dpo.val_global_batch_size, max_batches=dpo.val_batches)
    )


def micro_batching(
    config: Config, shape: ModelShape, topology: Topology, *, is_validation: bool = False
) -> MicroBatching:
    """How this run cuts global batches."""
    policy, megatron = config.policy, config.policy.megatron_cfg
    max_pairs = policy.train_micro_batch_size
    if is_validation and config.dpo.val_micro_batch_size is not None:
        max_pairs = config.dpo.val_micro_batch_size
    return MicroBatching(
        max_tokens=policy.micro_batch_tokens,
        max_pairs=max_pairs,
        dp_rank=topology.dp_rank,
        dp_size=topology.dp_size,
        divisible_by=topology.tp_size if megatron.sequence_parallel else 1,
        equal_rows=topology.pp_size > 1,
        share=config.data.share,
        # Rows of one length cost the same: there the fewest tokens in the longest one count.
        cost=None if topology.pp_size > 1 else pair_cost(shape),
        count_multiple=topology.micro_batch_multiple,
    )


def loss_function(config: Config) -> LossFunction:
    """The loss of one micro-batch from its response tokens' log-probs."""
    dpo = config.dpo

    def loss(logps: torch.Tensor, batch: PackedBatch):
        num_sequences = batch.response_lengths.shape[0]
        return dpo_loss(
            sequence_sums(logps, batch.sequence_id, num_sequences),
            sequence_sums(batch.reference_logps, batch.sequence_id, num_sequences),
            batch.response_lengths,
            batch.pair_weights,
            beta=dpo.reference_policy_kl_penalty,
            preference_loss_weight=dpo.preference_loss_weight,
            sft_loss_weight=dpo.sft_loss_weight,
            preference_average_log_probs=dpo.preference_average_log_probs,
            sft_average_log_probs=dpo.sft_averages,
        )

    return loss


def train(run: Run, *, start_step: int, total_steps: int) -> None:
    """Steps from `start_step` (done so far) to `total_steps`, validating and saving on schedule."""
    dpo, checkpointing = run.config.dpo, run.config.checkpointing
    validates = run.validation_set is not None and dpo.val_period > 0
    latest: dict[str, float] = {}
    if validates and dpo.val_at_start and start_step == 0:
        latest |= evaluate(run, step=0)
    for step in range(start_step + 1, total_steps + 1):
        metrics = train_step(run, step, is_first=step == start_step + 1)
        run.progress.update(step, metrics)
        if not np.isfinite(metrics["train/grad_norm"]):
            run.progress.message(
                f"step {step} changed no weight: a gradient overflowed float16; the loss scale is "
                "halved"
            )
        if run.logger is not None:
            run.logger.log(step, metrics)
        latest |= metrics
        is_last = step == total_steps
        is_validated = validates and (step % dpo.val_period == 0 or (is_last and dpo.val_at_end))
        is_saved = checkpointing.enabled and (is_last or step % checkpointing.save_period == 0)
        if is_validated or is_saved or is_last:  # the export follows the last step
            gather_weights(run.training)
        if is_validated:
            latest |= evaluate(run, step=step)
        if is_saved:
            _save(run, step, latest)


def train_step(run: Run, step: int, *, is_first: bool) -> dict[str, float]:
    """One optimizer step; returns the metrics under their names in metrics.jsonl, on every rank.

    Raises:
        NonFiniteError: on every rank, before the optimizer has touched a weight.
    """
    begin = time.perf_counter()
    config, stage = run.config, run.stage
    rows = train_rows(config, len(run.train_set.pairs), step)
    part = _cut(run, run.train_set, rows)
    data_wait_s = time.perf_counter() - begin

    zero_grad(run.training)
    lr = current_lr(run.training)
    reports = forward_backward(stage, part.batches, loss_function(config))
    sums = reduce_metrics(local_sums(reports), SUMS, stage.topology)
    if not np.isfinite(sums["loss"]):
        raise NonFiniteError(_blame(step, "loss", reports, part.batches, stage))
    was_updated, grad_norm = optimizer_step(run.training)
    if not was_updated and config.policy.precision != "float16":
        raise NonFiniteError(_blame(step, "gradient norm", reports, part.batches, stage))

    step_s = time.perf_counter() - begin
    metrics = _means(sums) | {
        "grad_norm": grad_norm,
        "lr": lr,
        "num_tokens": part.num_tokens,
        "padding_fraction": 1.0 - part.num_tokens / part.num_slots,
    }
    speed = _speed(run, rows, part, step_s) | {
        "perf/step_s": step_s,
        "perf/data_wait_s": data_wait_s,
        "perf/reference_s": run.reference_s if is_first else 0.0,
        "memory/peak_gib": _peak_gib(stage.topology.device),
    }
    return {f"train/{name}": value for name, value in metrics.items()} | speed


def evaluate(run: Run, *, step: int) -> dict[str, float]:
    """Means over the validation pairs, logged under validation/."""
    begin = time.perf_counter()
    assert run.validation_set is not None
    totals = dict.fromkeys(SUMS, 0.0)
    for rows in validation_batches(run.config, len(run.validation_set.pairs)):
        part = _cut(run, run.validation_set, rows, is_validation=True)
        reports = forward_backward(
            run.stage, part.batches, loss_function(run.config), forward_only=True
        )
        for name, value in local_sums(reports).items():
            totals[name] += value
    sums = reduce_metrics(totals, SUMS, run.stage.topology)
    metrics = {f"validation/{name}": value for name, value in _means(sums).items()}
    metrics["perf/validation_s"] = time.perf_counter() - begin
    run.progress.message(validation_line(step, metrics))
    if run.logger is not None:
        run.logger.log(step, metrics)
    return metrics


def _cut(
    run: Run, pair_set: PairSet, rows: Sequence[int], *, is_validation: bool = False
) -> MicroBatches:
    stage = run.stage
    cut = micro_batching(run.config, stage.model.shape, stage.topology, is_validation=is_validation)
    reference = pair_set.reference if stage.topology.is_last_stage else None
    return micro_batches(pair_set.pairs, rows, cut, reference)


def local_sums(reports: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, float]:
    """Sums over this rank's micro-batches; one wait for the device. {} before the last stage."""
    if not reports:
        return {}
    table = torch.stack([torch.stack([r[name] for name in SUMS]) for r in reports])
    return dict(zip(SUMS, table.sum(0).tolist(), strict=True))


def _means(sums: Mapping[str, float]) -> dict[str, float]:
    """Per pair of weight > 0 in the global batch."""
    num_pairs = sums["num_pairs"]
    means = {n: v / max(num_pairs, 1) for n, v in sums.items() if n != "num_pairs"}
    return means | {"num_pairs": int(num_pairs)}


def _speed(
    run: Run, rows: Sequence[int], part: MicroBatches, step_s: float
) -> dict[str, float | None]:
    """Rates over all devices together, but for the last two, which are per device."""
    topology = run.stage.topology
    lengths = run.train_set.pairs.lengths()[rows]
    flops = sum(pair_costs(lengths, part.shared, pair_cost(run.stage.model.shape)))
    tflops = flops / step_s / topology.world_size / 1e12
    speed = {
        "perf/tokens_per_s": part.num_tokens / step_s,
        "perf/pairs_per_s": len(rows) / step_s,
        "perf/tflops_per_gpu": tflops,
    }
    if topology.device.type == "cuda":
        peak = peak_tflops(torch.cuda.get_device_name(topology.device))
        if peak is not None:
            speed["perf/mfu"] = tflops / peak
    return speed


def _peak_gib(device: torch.device) -> float:
    """Most memory this process has held: of the device with CUDA, of the host without."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _blame(
    step: int,
    what: str,
    reports: Sequence[Mapping[str, torch.Tensor]],
    batches: Sequence[PackedBatch],
    stage: Stage,
) -> str:
    """Rank, micro-batch and rows wherever the loss is not finite. Collective."""
    local = [
        f"rank {stage.topology.rank}, micro-batch {i}, source rows {list(batch.rows)}"
        for i, (report, batch) in enumerate(zip(reports, batches, strict=False))
        if not np.isfinite(report["loss"].item())
    ]
    everyone: list = [None] * stage.topology.world_size
    dist.all_gather_object(everyone, local)
    places = [place for part in everyone for place in part]
    where = "; ".join(places) or "no single micro-batch: every loss is finite, the gradient is not"
    return (
        f"step {step}: the {what} is not finite ({where}). The weights of step {step - 1} are "
        "untouched; lower policy.megatron_cfg.optimizer.lr, or look at the rows and at the "
        "model's weights"
    )


def _save(run: Run, step: int, metrics: dict[str, float]) -> None:
    stage, section = run.stage, run.config.checkpointing
    directory = Path(run.config.checkpoint_dir)
    folder = save_checkpoint(
        directory,
        step,
        stage.model,
        run.training,
        stage.topology,
        fingerprint=fingerprint(run.config),
        data_fingerprint=run.data_fingerprint,
        metrics=metrics,
    )
    if stage.topology.is_rank_zero:
        prune_checkpoints(
            directory, section.keep_top_k, section.metric_key, section.higher_is_better
        )
    run.progress.message(f"saved {folder}")
