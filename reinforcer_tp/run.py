"""One run, once its inputs are checked: the table of contents."""

import contextlib
import dataclasses
import hashlib
import os
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

from reinforcer_tp.batches import micro_batching, train_rows
from reinforcer_tp.checkpoint_folder import SaveError, told_as_damage
from reinforcer_tp.config import Config, to_yaml
from reinforcer_tp.data.prepare import format_report
from reinforcer_tp.data.token_report import length_histograms, token_report
from reinforcer_tp.events import append_event
from reinforcer_tp.first_step import FirstStepError
from reinforcer_tp.hf_files import write_companions
from reinforcer_tp.inputs import Inputs
from reinforcer_tp.lifecycle.peers import watch_peers
from reinforcer_tp.lifecycle.stops import Stops, deaf_children
from reinforcer_tp.loop import Run, held_gib, train
from reinforcer_tp.mcore.optim import build_training
from reinforcer_tp.mcore.restore import load_checkpoint
from reinforcer_tp.mcore.topology import (
    Topology,
    check_same_everywhere,
    destroy_topology,
    init_topology,
)
from reinforcer_tp.mcore.weights import export_hf
from reinforcer_tp.metrics import MetricLogger, Progress, environment_info, open_loggers
from reinforcer_tp.nonfinite import NonFiniteError, SkippedSteps
from reinforcer_tp.open_checkpoints import open_writer, settle_resume
from reinforcer_tp.open_references import open_references
from reinforcer_tp.run_directory import mark_finished, write_run_directory

_TRAIN = Path(__file__).with_name("train.py")


def run(config: Config, inputs: Inputs, stops: Stops) -> None:
    """Topology, resume point, logs, reference, model, optimizer, loop, export."""
    stops.phase("rendezvous")
    watch_peers(stops.ending, _world_size(), config.cluster.hang_timeout_s)
    topology = _open_topology(config, inputs)
    stops.phase("load")
    inputs = settle_resume(config, inputs, topology)
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(
            Progress(inputs.total_steps, inputs.start_step, topology.is_rank_zero, stops)
        )
        logger = None
        if topology.is_rank_zero:
            logger = stack.enter_context(_open_logs(config, inputs, topology, progress))
        opened = _open_run(config, inputs, stops, topology, progress, logger)
        try:
            train(opened, start_step=inputs.start_step, total_steps=inputs.total_steps)
        except (FirstStepError, NonFiniteError):  # on all ranks: a save under way may finish
            if opened.writer is not None:
                with contextlib.suppress(SaveError):
                    opened.writer.wait()
            raise
        stops.phase("export")
        _finish(config, inputs, opened)
    # Not after an exception: a rank that fails must end at once, without waiting for its peers.
    destroy_topology()


def _open_topology(config: Config, inputs: Inputs) -> Topology:
    megatron = config.policy.megatron_cfg
    topology = init_topology(
        megatron.tensor_model_parallel_size,
        megatron.pipeline_model_parallel_size,
        megatron.virtual_stages,
        seed=config.dpo.seed,
    )
    check_same_everywhere(
        {
            "the configuration": hashlib.sha256(to_yaml(config).encode()).hexdigest()[:16],
            "the tokenized data": inputs.data.fingerprint,
            "the number of steps": inputs.total_steps,
        }
    )
    return topology


def _open_logs(
    config: Config, inputs: Inputs, topology: Topology, progress: Progress
) -> MetricLogger:
    """The run directory, what the data are, and the loggers. Rank 0 only."""
    report = with_token_savings(config, inputs, topology)
    write_run_directory(config, environment_info(topology.layout()), report)
    progress.message(format_report(report))
    for damage in inputs.passed_over:
        progress.message(f"warning: {damage}")
        append_event(Path(config.logger.log_dir), "warning", inputs.start_step, damage)
    settings = dataclasses.asdict(config)
    # A tracker's own process has metrics to send when the ranks are signalled.
    with deaf_children():
        return open_loggers(config.logger, config.logger.log_dir, settings, inputs.start_step)


def _open_run(
    config: Config,
    inputs: Inputs,
    stops: Stops,
    topology: Topology,
    progress: Progress,
    logger: MetricLogger | None,
) -> Run:
    """Reference, model and optimizer, as the checkpoint has them where there is one. Collective."""
    stops.phase("reference")
    before_model_gib = held_gib(topology.device)
    references = open_references(config, inputs, topology, progress)
    stage, resident = references.stage, references.resident
    stops.phase("load")
    training = build_training(stage.model, config.policy, topology, total_steps=inputs.total_steps)
    restored: dict[str, Any] = {}
    if inputs.resumed is not None:
        folder = inputs.resumed.folder
        restored = load_checkpoint(folder, stage.model, training, topology, is_verified=True)
        text = f"resumed {folder}: {inputs.start_step} of {inputs.total_steps} steps"
        progress.message(text)
        if logger is not None:
            append_event(Path(config.logger.log_dir), "resume", inputs.start_step, text)
    skips = SkippedSteps()
    if restored:
        with told_as_damage("skips"):
            skips = SkippedSteps.from_json(restored["skips"])
    return Run(
        config=config,
        stops=stops,
        stage=dataclasses.replace(stage, modules=training.ddp, tick=stops.tick),
        reference_stage=resident and dataclasses.replace(resident, tick=stops.tick),
        training=training,
        train_set=references.train_set,
        validation_set=references.validation_set,
        logger=logger,
        progress=progress,
        writer=open_writer(config, inputs, topology, references.digest),
        identity=inputs.identity,
        restored=restored,
        skips=skips,
        sweep_s=references.seconds,
        sweep_tokens=references.num_tokens,
        before_model_gib=before_model_gib,
        starts_at_reference=references.is_policy,
    )


def _finish(config: Config, inputs: Inputs, opened: Run) -> None:
    """The export, and where everything is. Collective."""
    log_dir, topology, progress = (
        Path(config.logger.log_dir),
        opened.stage.topology,
        opened.progress,
    )
    if config.checkpointing.export_hf:
        companions = partial(
            write_companions, inputs.files, inputs.tokenizer, config.policy.precision
        )
        export_hf(opened.stage.model, topology, log_dir / "hf", companions)
    progress.close()
    if topology.is_rank_zero:
        mark_finished(config, inputs.total_steps)
        progress.message(f"run folder:     {log_dir}")
        if config.checkpointing.export_hf:
            progress.message(f"exported model: {log_dir / 'hf'}")
        progress.message(how_to_go_on(config, inputs))


def with_token_savings(config: Config, inputs: Inputs, topology: Topology) -> dict[str, Any]:
    """The data report with what packing and sharing save in training, and all lengths."""
    pairs, report = inputs.data.train, inputs.data.report
    sets = {"train": pairs, "validation": inputs.data.validation}
    lengths = {name: {"lengths": length_histograms(found)} for name, found in sets.items() if found}
    steps = range(1, inputs.total_steps + 1)
    savings = token_report(
        pairs,
        (train_rows(config, len(pairs), step) for step in steps),
        micro_batching(config, inputs.files.shape, topology),
    )
    report = report | {name: report[name] | extra for name, extra in lengths.items()}
    return report | {"train": report["train"] | {"token_savings": savings}}


def how_to_go_on(config: Config, inputs: Inputs) -> str:
    """How to make the run twice as long: the command, where it is this simple."""
    if not config.checkpointing.enabled:
        return "without checkpointing.enabled there is nothing to go on from"
    steps = 2 * inputs.total_steps
    extend = [f"dpo.max_num_steps={steps}"]
    an_epoch = len(inputs.data.train) // config.policy.train_global_batch_size  # steps
    epochs = -(-steps // an_epoch)
    if epochs > config.dpo.max_num_epochs:
        extend.append(f"dpo.max_num_epochs={epochs}")
    if _world_size() != int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        return f"to go on:       the same command with {' '.join(extend)}"
    torchrun = Path(sys.executable).with_name("torchrun")  # of this environment, active or not
    launcher = (
        "torchrun" if shutil.which("torchrun") == str(torchrun) else os.path.relpath(torchrun)
    )
    launch = [launcher, "--nproc-per-node", str(_world_size()), os.path.relpath(_TRAIN)]
    recorded = Path(config.logger.log_dir) / "config.yaml"
    return f"to go on:       {shlex.join([*launch, '--config', str(recorded), *extend])}"


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
