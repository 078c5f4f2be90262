"""DPO training from the command line.

    torchrun --nproc-per-node N reinforcer_tp/train.py --config configs/dpo.yaml key=value ...
    python reinforcer_tp/train.py --config configs/dpo.yaml --check

Exit status: 0 done, 65 data or model files, 70 a number that is not finite or a wrong first loss,
74 the disk of the reference store, 78 configuration, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import os
import shlex
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

# As a script this file's folder is first on sys.path, where `data` would shadow others.
if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    del sys.path[0]

# Only what is light: an error in the configuration must not wait for torch. The rest is imported
# where it is used.
from reinforcer_tp.config import (
    Config,
    ConfigError,
    find_model_shape,
    load_config,
    to_yaml,
    validate_model,
)

if TYPE_CHECKING:
    from reinforcer_tp.inputs import Inputs

_CONFIGS = Path(__file__).resolve().parents[1] / "configs"
_EXIT_DATA, _EXIT_SOFTWARE, _EXIT_IO, _EXIT_CONFIG, _EXIT_INTERRUPTED = 65, 70, 74, 78, 130
_SPEAKER_HEAD_START_S = 20.0


def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.check:
            return check(config)
        config.validate(_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        return prepare_and_train(config)
    except ConfigError as error:
        return fail(error, _EXIT_CONFIG)
    except KeyboardInterrupt:
        if _is_speaker():
            print("interrupted; the same command goes on from the newest checkpoint", flush=True)
        return _EXIT_INTERRUPTED


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="reinforcer_tp/train.py", description="DPO training")
    parser.add_argument("--config", default=str(_CONFIGS / "dpo.yaml"), help="YAML file")
    parser.add_argument(
        "--check", action="store_true", help="validate, print the resolved config, do not train"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. dpo.seed=1")
    return parser.parse_intermixed_args(argv)


def fail(error: Exception, status: int) -> int:
    """One line on stderr. Every rank finds the same error by itself; one of each node says it.

    The others wait: when the first process ends, torchrun ends the rest, and the line must be out.
    """
    if not _is_speaker():
        time.sleep(_SPEAKER_HEAD_START_S)
    print(f"error: {error}", file=sys.stderr, flush=True)
    return status


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _is_speaker() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def check(config: Config) -> int:
    """`--check`: everything that can be known without a GPU, weights or data."""
    world_size = _world_size() if "WORLD_SIZE" in os.environ else config.planned_world_size
    config.validate(world_size)
    name = config.policy.model_name
    if name == "embedded":
        from reinforcer_tp.embedded import ensure_embedded

        name = ensure_embedded().model
    shape, source = find_model_shape(name, _CONFIGS / "models")
    validate_model(config, shape)
    megatron = config.policy.megatron_cfg
    tp, pp = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    print(to_yaml(config), end="")
    print(f"# model shape from {source}")
    vpp = f" vpp={megatron.virtual_stages}" if megatron.virtual_stages > 1 else ""
    print(f"# {world_size} processes: tp={tp} pp={pp}{vpp} dp={world_size // (tp * pp)}")
    print("# configuration is valid; nothing was trained")
    return 0


def prepare_and_train(config: Config) -> int:
    """First what needs no process group, so that bad files end every rank alike; then the run."""
    from reinforcer_tp.run_directory import check_run_directory

    holds_run = check_run_directory(config)
    quiet_libraries()
    from reinforcer_tp.first_step import FirstStepError
    from reinforcer_tp.inputs import open_inputs
    from reinforcer_tp.nonfinite import NonFiniteError
    from reinforcer_tp.reference.store import StoreError

    try:
        inputs = open_inputs(config, holds_run=holds_run, world_size=_world_size())
    except ValueError as error:
        if isinstance(error, ConfigError) or "REINFORCER_TP_TRACEBACK" in os.environ:
            raise
        return fail(error, _EXIT_DATA)
    if inputs.finished_step == inputs.total_steps:
        if _is_speaker():
            print(f"{config.logger.log_dir} holds this run, finished: {inputs.total_steps} steps.")
            print(how_to_go_on(config, inputs))
        return 0
    try:
        run(config, inputs)
    except (NonFiniteError, FirstStepError) as error:
        return fail(error, _EXIT_SOFTWARE)
    except StoreError as error:
        return fail(error, _EXIT_IO)
    return 0


def run(config: Config, inputs: Inputs) -> None:
    """The table of contents: topology, reference, model, optimizer, loop, export."""
    from reinforcer_tp.data.prepare import format_report
    from reinforcer_tp.hf_files import write_companions
    from reinforcer_tp.loop import Run, train
    from reinforcer_tp.mcore.checkpoint import load_checkpoint
    from reinforcer_tp.mcore.optim import build_training
    from reinforcer_tp.mcore.topology import (
        check_same_everywhere,
        destroy_topology,
        init_topology,
    )
    from reinforcer_tp.mcore.weights import export_hf
    from reinforcer_tp.metrics import Progress, environment_info, open_loggers
    from reinforcer_tp.open_references import open_references
    from reinforcer_tp.run_directory import mark_finished, write_run_directory

    megatron, data = config.policy.megatron_cfg, inputs.data
    start_step, total_steps = inputs.start_step, inputs.total_steps
    log_dir = Path(config.logger.log_dir)
    topology = init_topology(
        megatron.tensor_model_parallel_size,
        megatron.pipeline_model_parallel_size,
        megatron.virtual_stages,
        seed=config.dpo.seed,
    )
    check_same_everywhere(
        {
            "the configuration": hashlib.sha256(to_yaml(config).encode()).hexdigest()[:16],
            "the tokenized data": data.fingerprint,
            "the step to start from": start_step,
            "the number of steps": total_steps,
        }
    )
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(total_steps, start_step, topology.is_rank_zero))
        logger = None
        if topology.is_rank_zero:
            report = with_token_savings(config, inputs, topology)
            write_run_directory(config, environment_info(topology.layout()), report)
            progress.message(format_report(report))
            logger = stack.enter_context(
                open_loggers(config.logger, str(log_dir), dataclasses.asdict(config), start_step)
            )
        references = open_references(config, inputs, topology, progress)
        stage = references.stage
        training = build_training(stage.model, config.policy, topology, total_steps=total_steps)
        if inputs.checkpoint is not None:
            load_checkpoint(inputs.checkpoint, stage.model, training, topology)
            progress.message(f"resumed {inputs.checkpoint}: {start_step} of {total_steps} steps")
        loop_state = Run(
            config=config,
            stage=dataclasses.replace(stage, modules=training.ddp),
            reference_stage=references.resident,
            training=training,
            train_set=references.train_set,
            validation_set=references.validation_set,
            logger=logger,
            progress=progress,
            data_fingerprint=data.fingerprint,
            reference_digest=references.digest,
            sweep_s=references.seconds,
            sweep_tokens=references.num_tokens,
            starts_at_reference=references.is_policy,
        )
        train(loop_state, start_step=start_step, total_steps=total_steps)

        if config.checkpointing.export_hf:
            companions = partial(
                write_companions, inputs.files, inputs.tokenizer, config.policy.precision
            )
            export_hf(stage.model, topology, log_dir / "hf", companions)
        progress.close()
        if topology.is_rank_zero:
            mark_finished(config, total_steps)
            progress.message(f"run folder:     {log_dir}")
            if config.checkpointing.export_hf:
                progress.message(f"exported model: {log_dir / 'hf'}")
            progress.message(how_to_go_on(config, inputs))
    # Not after an exception: a rank that fails must end at once, without waiting for its peers.
    destroy_topology()


def with_token_savings(config: Config, inputs: Inputs, topology: Any) -> dict[str, Any]:
    """The data report with what packing and sharing save in training."""
    from reinforcer_tp.batches import micro_batching, train_rows
    from reinforcer_tp.data.token_report import token_report

    pairs, report = inputs.data.train, inputs.data.report
    steps = range(1, inputs.total_steps + 1)
    savings = token_report(
        pairs,
        (train_rows(config, len(pairs), step) for step in steps),
        micro_batching(config, inputs.files.shape, topology),
    )
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
    launch = [launcher, "--nproc-per-node", str(_world_size()), os.path.relpath(__file__)]
    recorded = Path(config.logger.log_dir) / "config.yaml"
    return f"to go on:       {shlex.join([*launch, '--config', str(recorded), *extend])}"


def quiet_libraries() -> None:
    """Silences progress bars and advice of the libraries; ours say what matters."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
