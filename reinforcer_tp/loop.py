"""train(), train_step(), evaluate(): the only place that steps the optimizer."""

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from reinforcer_tp.batches import micro_batching, train_rows, validation_batches
from reinforcer_tp.config import Config, fingerprint
from reinforcer_tp.config_check import METRICS
from reinforcer_tp.data.micro_batches import MicroBatches, micro_batches
from reinforcer_tp.data.packed_batch import PackedBatch
from reinforcer_tp.data.packing import pair_costs
from reinforcer_tp.data.prepare import TokenizedSet
from reinforcer_tp.first_step import (
    FirstStepError,
    check_first_step,
    describe_first_step,
    sweep_alone,
)
from reinforcer_tp.flops import pair_cost, peak_tflops
from reinforcer_tp.health import SUMS as HEALTH_SUMS
from reinforcer_tp.health import HealthWatch, health_metrics, health_sums
from reinforcer_tp.loss import LossOptions, dpo_loss
from reinforcer_tp.mcore.checkpoint import prune_checkpoints, save_checkpoint
from reinforcer_tp.mcore.optim import (
    Training,
    current_lr,
    gather_weights,
    optimizer_step,
    zero_grad,
)
from reinforcer_tp.mcore.schedule import (
    LossFunction,
    Stage,
    forward_backward,
    forward_logps,
    reduce_metrics,
)
from reinforcer_tp.metrics import MetricLogger, Progress, validation_line
from reinforcer_tp.nonfinite import NonFiniteError, blame
from reinforcer_tp.throughput import Throughput, step_rates

# What dpo_loss sums over pairs, reported as means; their number; what health_sums counts.
SUMS = (*METRICS, "num_pairs", *HEALTH_SUMS)


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """Tokenized pairs and where their reference log-probs are read."""

    pairs: TokenizedSet
    # index -> (C + R,), on the last pipeline stage; None = there are none to read
    reference: Callable[[int], np.ndarray] | None
    token_reference: bool = True  # False: only their sums over whole responses mean something


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything the loop works with; built once by train.py."""

    config: Config
    stage: Stage
    reference_stage: Stage | None  # a second copy that runs each step; None = log-probs are read
    training: Training
    train_set: PairSet
    validation_set: PairSet | None
    logger: MetricLogger | None  # rank 0 only
    progress: Progress
    data_fingerprint: str  # of the tokenized sets
    reference_digest: str | None  # of the reference's weights
    sweep_s: float  # seconds of reading and sweeping, reported with the first step
    sweep_tokens: int  # that the reference computed then, likewise
    starts_at_reference: bool  # before the first step the policy's weights are the reference's


def loss_function(config: Config, *, token_reference: bool = True) -> LossFunction:
    """The loss of one micro-batch from its response tokens' log-probs, and what is reported.

    `token_reference=False`: of the reference only the sums of whole responses are known.
    """
    options = LossOptions(**config.dpo.loss_options)

    def loss(logps: torch.Tensor, entropies: torch.Tensor, batch: PackedBatch):
        reference = batch.reference_logps
        pairs = (batch.sequence_id, batch.response_lengths, batch.pair_weights)
        loss_sum, report = dpo_loss(logps, reference, *pairs, batch.pair_margins, options)
        health = health_sums(
            logps.detach(),
            entropies,
            reference,
            *pairs,
            report["rewards"],
            token_reference=token_reference,
        )
        return loss_sum, report | health

    return loss


def train(run: Run, *, start_step: int, total_steps: int) -> None:
    """Steps from `start_step` (done so far) to `total_steps`, validating and saving on schedule."""
    dpo, checkpointing = run.config.dpo, run.config.checkpointing
    validates = run.validation_set is not None and dpo.val_period > 0
    options = LossOptions(**dpo.loss_options)
    watch = HealthWatch(
        beta=options.beta,
        sft_loss_weight=options.sft_loss_weight,
        losses=[name for name, _ in options.losses],
        averages=options.preference_average_log_probs,
    )
    throughput = Throughput(run.sweep_s)
    if run.stage.topology.device.type == "cuda":  # the sweep's rows are longer than training's
        torch.cuda.reset_peak_memory_stats(run.stage.topology.device)
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
        for hint in watch.hints(step, metrics):
            run.progress.message(hint)
        throughput.add(metrics)
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
    if total_steps > start_step:
        run.progress.message(throughput.panel())


def train_step(run: Run, step: int, *, is_first: bool) -> dict[str, float]:
    """One optimizer step; returns the metrics under their names in metrics.jsonl, on every rank.

    Raises, on every rank, before the optimizer has touched a weight:
        NonFiniteError: the loss or the gradient norm is not finite.
        FirstStepError: the first loss is not that of a policy that is the reference.
    """
    begin = time.perf_counter()
    config, stage = run.config, run.stage
    rows = train_rows(config, len(run.train_set.pairs), step)
    part = _cut(run, run.train_set, rows)
    after_data = time.perf_counter()
    part = _with_reference(run, part)
    after_reference = time.perf_counter()

    zero_grad(run.training)
    lr = current_lr(run.training)
    loss = loss_function(config, token_reference=run.train_set.token_reference)
    reports = forward_backward(stage, part.batches, loss)
    sums = reduce_metrics(local_sums(reports), SUMS, stage.topology)  # waits for the device
    after_compute = time.perf_counter()
    if not np.isfinite(sums["loss"]):
        raise NonFiniteError(blame(step, "loss", reports, part.batches, stage.topology))
    if step == 1:
        _look_at_first_step(run, rows, part, reports)
    before_optimizer = time.perf_counter()
    was_updated, grad_norm = optimizer_step(run.training)
    if not was_updated and config.policy.precision != "float16":
        raise NonFiniteError(blame(step, "gradient norm", reports, part.batches, stage.topology))

    _wait_for(stage.topology.device)
    end = time.perf_counter()
    metrics = _means(sums) | {
        "grad_norm": grad_norm,
        "lr": lr,
        "num_tokens": part.num_tokens,
        "padding_fraction": 1.0 - part.num_tokens / part.num_slots,
    }
    speed = _speed(run, rows, part, end - begin) | {
        "perf/step_s": end - begin,
        "perf/data_wait_s": after_data - begin,
        "perf/reference_s": after_reference - after_data,
        "perf/reference_tokens": _reference_tokens(run, part, is_first),
        "perf/compute_s": after_compute - after_reference,
        "perf/optimizer_s": end - before_optimizer,
        "memory/peak_gib": _peak_gib(stage.topology.device),
    }
    if is_first:
        speed["perf/sweep_s"] = run.sweep_s
    return {f"train/{name}": value for name, value in metrics.items()} | speed


def evaluate(run: Run, *, step: int) -> dict[str, float]:
    """Means over the validation pairs, logged under validation/."""
    begin = time.perf_counter()
    assert run.validation_set is not None
    loss = loss_function(run.config, token_reference=run.validation_set.token_reference)
    totals = dict.fromkeys(SUMS, 0.0)
    for rows in validation_batches(run.config, len(run.validation_set.pairs)):
        part = _with_reference(run, _cut(run, run.validation_set, rows, is_validation=True))
        reports = forward_backward(run.stage, part.batches, loss, forward_only=True)
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


def _with_reference(run: Run, part: MicroBatches) -> MicroBatches:
    """`part` with the log-probs of a resident reference, which runs now."""
    if run.reference_stage is None:
        return part
    logps = forward_logps(run.reference_stage, part.batches)
    _wait_for(run.stage.topology.device)
    if not run.stage.topology.is_last_stage:
        return part
    batches = zip(part.batches, logps, strict=True)
    return replace(part, batches=tuple(replace(b, reference_logps=x) for b, x in batches))


def _look_at_first_step(
    run: Run, rows: Sequence[int], part: MicroBatches, reports: Sequence[Mapping[str, torch.Tensor]]
) -> None:
    """Says how far the policy is from the reference, which must be nothing where it is the policy.

    Raises FirstStepError.
    """
    config, stage = run.config, run.stage
    check, looked_at = config.dpo.first_step_check, (part.batches, reports)
    if check == "off" or config.reference_mode == "none":
        return
    if not run.starts_at_reference:
        run.progress.message(describe_first_step(*looked_at, stage.topology))
        return
    cut = micro_batching(config, stage.model.shape, stage.topology)
    try:
        line = check_first_step(
            *looked_at,
            LossOptions(**config.dpo.loss_options),
            stage.topology,
            precision=config.policy.precision,
            swept_again=lambda: sweep_alone(stage, run.train_set.pairs, rows, cut),
        )
    except FirstStepError as error:
        if check == "error":
            raise
        line = f"warning: {error}"
    run.progress.message(line)


def local_sums(reports: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, float]:
    """Sums over this rank's micro-batches; one wait for the device. {} before the last stage."""
    if not reports:
        return {}
    table = torch.stack([torch.stack([r[name] for name in SUMS]) for r in reports])
    return dict(zip(SUMS, table.sum(0).tolist(), strict=True))


def _means(sums: Mapping[str, float]) -> dict[str, float]:
    """Per pair of weight > 0 in the global batch, and the run's health."""
    num_pairs = sums["num_pairs"]
    means = {name: sums[name] / max(num_pairs, 1) for name in METRICS}
    return means | {"num_pairs": int(num_pairs)} | health_metrics(sums)


def _speed(
    run: Run, rows: Sequence[int], part: MicroBatches, step_s: float
) -> dict[str, float | None]:
    topology = run.stage.topology
    lengths = run.train_set.pairs.lengths()[rows]
    peak = None
    if topology.device.type == "cuda":
        name = torch.cuda.get_device_name(topology.device)
        peak = peak_tflops(name, run.config.policy.precision)
    return step_rates(
        step_s=step_s,
        num_tokens=part.num_tokens,
        num_slots=part.num_slots,
        num_pairs=len(rows),
        flops=sum(pair_costs(lengths, part.shared, pair_cost(run.stage.model.shape))),
        world_size=topology.world_size,
        peak_tflops=peak,
    )


def _reference_tokens(run: Run, part: MicroBatches, is_first: bool) -> int:
    """Tokens that the reference computed for this step."""
    swept = run.sweep_tokens if is_first else 0
    return swept + (part.num_tokens if run.reference_stage is not None else 0)


def _wait_for(device: torch.device) -> None:
    """Once a step after what runs on its own: its seconds must not count as the next part's."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_gib(device: torch.device) -> float:
    """Most memory this process has held: of the device with CUDA, of the host without."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


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
        reference=run.reference_digest,
        metrics=metrics,
    )
    if stage.topology.is_rank_zero:
        prune_checkpoints(
            directory, section.keep_top_k, section.metric_key, section.higher_is_better
        )
    run.progress.message(f"saved {folder}")
