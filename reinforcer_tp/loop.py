"""train(), train_step(), evaluate(): the only place that steps the optimizer."""

import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reinforcer_tp.batches import micro_batching, train_rows, validation_batches
from reinforcer_tp.checkpoint_folder import told_as_damage
from reinforcer_tp.config import Config
from reinforcer_tp.config_check import METRICS
from reinforcer_tp.data.micro_batches import MicroBatches, micro_batches
from reinforcer_tp.data.packed_batch import PackedBatch
from reinforcer_tp.data.packing import pair_costs
from reinforcer_tp.data.prepare import TokenizedSet
from reinforcer_tp.events import append_event
from reinforcer_tp.faultpoints import fault_point, poison
from reinforcer_tp.first_step import (
    FirstStepError,
    check_first_step,
    describe_first_step,
    sweep_alone,
)
from reinforcer_tp.flops import pair_cost
from reinforcer_tp.health import SUMS as HEALTH_SUMS
from reinforcer_tp.health import HealthWatch, health_metrics, health_sums
from reinforcer_tp.lifecycle.stops import Reason, Stopped, Stops
from reinforcer_tp.loss import LossOptions, dpo_loss
from reinforcer_tp.mcore.checkpoint import CheckpointWriter
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
from reinforcer_tp.memory import Memory
from reinforcer_tp.metrics import MetricLogger, Progress, validation_line
from reinforcer_tp.nonfinite import (
    SkippedSteps,
    Trouble,
    look_at_gradient,
    look_at_loss,
    loss_scale_trouble,
)
from reinforcer_tp.peak_rates import peak_tflops
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
    writer: CheckpointWriter | None  # None = no checkpoints are written
    identity: Mapping[str, Any]  # what a resumed run must have in common with this one
    restored: Mapping[str, Any]  # state of the checkpoint that the run goes on from
    stops: Stops
    sweep_s: float  # seconds of reading and sweeping, reported with the first step
    sweep_tokens: int  # that the reference computed then, likewise
    before_model_gib: float  # memory held before there was a model, reported with the first step
    starts_at_reference: bool  # before the first step the policy's weights are the reference's
    skips: SkippedSteps = field(default_factory=SkippedSteps)


def loss_function(config: Config, *, token_reference: bool = True) -> LossFunction:
    """The loss of one micro-batch from its response tokens' log-probs, and what is reported.

    `token_reference=False`: of the reference only the sums of whole responses are known.
    """
    options = LossOptions(**config.dpo.loss_options)

    def loss(logps: torch.Tensor, entropies: torch.Tensor, batch: PackedBatch):
        reference = batch.reference_logps
        logps = poison("nonfinite.logps", logps, batch.rows)
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
    """Steps from `start_step` (done so far) to `total_steps`, validating and saving on schedule.

    Raises Stopped, on every rank, when one of them was asked to stop: after a checkpoint.
    """
    dpo, stops, topology = run.config.dpo, run.stops, run.stage.topology
    validates = run.validation_set is not None and dpo.val_period > 0
    memory = _memory(run)
    throughput = Throughput(run.sweep_s)
    if topology.device.type == "cuda":  # the sweep's rows are longer than training's
        torch.cuda.reset_peak_memory_stats(topology.device)
    stops.begin_loop(start_step)
    is_due = start_step % max(dpo.val_period, 1) == 0 and memory.lacks_validation(start_step)
    if validates and is_due and (start_step > 0 or dpo.val_at_start):
        memory.validated(start_step, evaluate(run, step=start_step))
    for step in range(start_step + 1, total_steps + 1):
        stops.phase("step")
        metrics = train_step(run, step, is_first=step == start_step + 1)
        stops.step(step)
        fault_point("step.end")
        _show(run, step, metrics, memory.watch)
        throughput.add(metrics)
        memory.trained(metrics)
        is_last, reason = step == total_steps, _asked_to_stop(run)
        if is_last:
            reason = None  # it stops anyway, and finishes
        is_validated = step % max(dpo.val_period, 1) == 0 or (is_last and dpo.val_at_end)
        is_validated = validates and is_validated and reason is None
        is_saved = run.writer is not None and (
            is_last or reason is not None or step % run.config.checkpointing.save_period == 0
        )
        if is_validated or is_saved or is_last:  # the export follows the last step
            gather_weights(run.training)
        if is_validated:
            memory.validated(step, evaluate(run, step=step))
        if is_saved:
            _save(run, step, memory, at_once=is_last or reason is not None)
        if reason is not None:
            folder = Path(run.config.checkpoint_dir) / f"step_{step}" if is_saved else None
            raise Stopped(reason, step=step, total_steps=total_steps, saved=folder)
    stops.end_loop()
    if total_steps > start_step:
        run.progress.message(throughput.panel())


def _memory(run: Run) -> Memory:
    options = LossOptions(**run.config.dpo.loss_options)
    watch = HealthWatch(
        beta=options.beta,
        sft_loss_weight=options.sft_loss_weight,
        losses=[name for name, _ in options.losses],
        averages=options.preference_average_log_probs,
    )
    memory = Memory(watch=watch)
    if run.restored:
        with told_as_damage("health, latest or history"):
            memory.restore(run.restored)
    return memory


def _show(run: Run, step: int, metrics: Mapping[str, float | None], watch: HealthWatch) -> None:
    run.progress.update(step, metrics)
    for hint in watch.hints(step, metrics):
        tell(run, "hint", step, hint)
    if run.logger is not None:
        run.logger.log(step, metrics)


def tell(run: Run, kind: str, step: int, text: str) -> None:
    """A message that also stands in events.jsonl; `kind` of events.KINDS."""
    run.progress.message(text)
    if run.logger is not None:
        append_event(Path(run.config.logger.log_dir), kind, step, text)


def _asked_to_stop(run: Run) -> Reason | None:
    """Why every rank stops after this step, None = it goes on. Collective."""
    _tell_saved(run)
    if run.writer is not None and run.writer.has_failed:
        run.stops.request(Reason.SAVE)  # and the next save raises its error
    return run.stops.agree(run.stage.topology)


def train_step(run: Run, step: int, *, is_first: bool) -> dict[str, float]:
    """One optimizer step; returns the metrics under their names in metrics.jsonl, on every rank.

    A step that is skipped (dpo.on_nonfinite) says so and has NaN for what it would have learnt.

    Raises, on every rank, before the optimizer has touched a weight:
        NonFiniteError: a log-prob, the loss or the gradient norm is not finite.
        FirstStepError: the first loss is not that of a policy that is the reference.
    """
    begin = time.perf_counter()
    fault_point("step.begin", step)
    config, stage = run.config, run.stage
    rows = train_rows(config, len(run.train_set.pairs), step)
    part = _cut(run, run.train_set, rows)
    after_data = time.perf_counter()
    part = _with_reference(run, part)
    after_reference = time.perf_counter()

    zero_grad(run.training)
    lr = current_lr(run.training)
    loss = loss_function(config, token_reference=run.train_set.token_reference)
    run.stops.phase("compute")
    reports = forward_backward(stage, part.batches, loss)
    sums = reduce_metrics(local_sums(reports), SUMS, stage.topology)  # waits for the device
    after_compute = time.perf_counter()
    fault_point("step.compute")
    trouble, grad_norm = look_at_loss(step, sums, reports, part.batches, run.training), math.nan
    if trouble is None and run.skips.total == step - 1:  # no weight has moved
        _look_at_first_step(run, rows, part, reports)
    run.stops.phase("optimizer")
    before_optimizer = time.perf_counter()
    if trouble is None:
        fault_point("step.optimizer.before")
        trouble, grad_norm = _update(run, step, part, loss)
        fault_point("step.optimizer.after")
    if trouble is not None:
        tell(run, "skip", step, run.skips.skip(trouble, config.dpo))
    _wait_for(stage.topology.device)
    end = time.perf_counter()
    means = _means(sums) if trouble is None else _learnt_nothing()
    metrics = means | {
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
    if config.dpo.on_nonfinite == "skip":
        metrics["skipped_steps"] = run.skips.total
    if is_first:
        speed["perf/sweep_s"] = run.sweep_s
        speed["memory/before_model_gib"] = run.before_model_gib
    return {f"train/{name}": value for name, value in metrics.items()} | speed


def _update(
    run: Run, step: int, part: MicroBatches, loss: LossFunction
) -> tuple[Trouble | None, float]:
    """(why the weights are as they were, gradient norm); float16's overflow is no trouble."""
    was_updated, grad_norm = optimizer_step(run.training)
    if was_updated:
        run.skips.in_row = 0
        return None, grad_norm
    if run.config.policy.precision != "float16":
        run.stops.tick()  # that computes the step again
        return look_at_gradient(step, run.stage, run.training, part.batches, loss), grad_norm
    trouble = loss_scale_trouble(step, run.training, grad_norm)
    if trouble is None:
        overflow = "a gradient overflowed float16; the loss scale is halved"
        tell(run, "skip", step, f"step {step} changed no weight: {overflow}")
    return trouble, grad_norm


def evaluate(run: Run, *, step: int) -> dict[str, float]:
    """Means over the validation pairs, logged under validation/."""
    begin = time.perf_counter()
    run.stops.phase("validation")
    fault_point("validation")
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
    if run.reference_stage is not None:
        logps = forward_logps(run.reference_stage, part.batches)
        _wait_for(run.stage.topology.device)
        if run.stage.topology.is_last_stage:
            batches = zip(part.batches, logps, strict=True)
            batches = (replace(b, reference_logps=x) for b, x in batches)
            part = replace(part, batches=tuple(batches))
    for batch in part.batches:
        if batch.reference_logps is not None:
            poison("nonfinite.reference", batch.reference_logps, batch.rows)
    return part


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
        tell(run, "warning", 1, f"warning: {error}")
    else:
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


def _learnt_nothing() -> dict[str, float]:
    return dict.fromkeys(METRICS, math.nan) | {"num_pairs": 0}


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


def held_gib(device: torch.device) -> float:
    """Memory that this process holds now, as `memory/peak_gib` counts it."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**30
    pages = int(Path("/proc/self/statm").read_text().split()[1])  # resident
    return pages * resource.getpagesize() / 2**30


def _peak_gib(device: torch.device) -> float:
    """Most memory this process has held: of the device with CUDA, of the host without."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _save(run: Run, step: int, memory: Memory, *, at_once: bool) -> None:
    """Writes a checkpoint; `at_once` waits also for an asynchronous one."""
    assert run.writer is not None
    state = {
        "identity": run.identity,
        "pairs_seen": step * run.config.policy.train_global_batch_size,
        "skips": run.skips.to_json(),
        **memory.to_json(),
    }
    run.stops.phase("save")
    run.writer.save(step, run.stage.model, run.training, state=state, metrics=memory.latest)
    if at_once:
        run.writer.wait()
    _tell_saved(run)


def _tell_saved(run: Run) -> None:
    for saved in run.writer.finished() if run.writer is not None else ():
        run.stops.saved(saved.step, saved.seconds)
        tell(run, "save", saved.step, f"saved {saved.folder}")
        if saved.warning is not None:
            tell(run, "warning", saved.step, f"warning: {saved.warning}")
