"""DPO training from the command line.

    torchrun --nproc-per-node N reinforcer_tp/train.py --config configs/dpo.yaml key=value ...
    python reinforcer_tp/train.py --config configs/dpo.yaml --check

Exit status: see exits.MEANING; torchrun hides it, <log_dir>/attempts/NNNN/exit.json has it.
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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

# As a script this file's folder is first on sys.path, where `data` would shadow others.
if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    del sys.path[0]

# Only what is light: signals must be heard, and an error in the configuration must not wait for
# torch. The rest is imported where it is used.
from reinforcer_tp.lifecycle.ending import leave
from reinforcer_tp.lifecycle.stops import Stopped, Stops
from reinforcer_tp.secrecy import make_files_private

if TYPE_CHECKING:
    from reinforcer_tp.config import Config
    from reinforcer_tp.inputs import Inputs

_CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def main(argv: list[str]) -> int:
    make_files_private()
    with Stops() as stops:
        return exit_code(argv, stops)


def exit_code(argv: list[str], stops: Stops) -> int:
    try:
        return configure_and_train(argv, stops)
    except Stopped as stopped:
        if stopped.saved is not None:
            stops.position.saved_step = stopped.step
        return stops.ending.stopped(str(stopped))
    except Exception as error:
        return stops.ending.failed(error)


def configure_and_train(argv: list[str], stops: Stops) -> int:
    from reinforcer_tp.config import load_config

    arguments = parse_arguments(argv)
    config = load_config(arguments.config, arguments.overrides)
    if arguments.check:
        return check(config)
    config.validate(_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return prepare_and_train(config, stops)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        from reinforcer_tp.config import ConfigError

        raise ConfigError(f"{message}; see {self.prog} --help")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="reinforcer_tp/train.py", description="DPO training")
    parser.add_argument("--config", default=str(_CONFIGS / "dpo.yaml"), help="YAML file")
    parser.add_argument(
        "--check", action="store_true", help="validate, print the resolved config, do not train"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. dpo.seed=1")
    return parser.parse_intermixed_args(argv)


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _is_speaker() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def check(config: Config) -> int:
    """`--check`: everything that can be known without a GPU, weights or data."""
    from reinforcer_tp.config import find_model_shape, to_yaml, validate_model

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


def prepare_and_train(config: Config, stops: Stops) -> int:
    """First what needs no process group, so that bad files end every rank alike; then the run."""
    from reinforcer_tp.config_check import duration_s
    from reinforcer_tp.run_directory import check_run_directory

    holds_run = check_run_directory(config)
    limit_s = duration_s(config.checkpointing.checkpoint_must_save_by)
    stops.open_run(Path(config.logger.log_dir), limit_s)
    quiet_libraries()
    from reinforcer_tp.inputs import open_inputs

    stops.phase("data")
    inputs = open_inputs(config, holds_run=holds_run)
    if inputs.finished_step == inputs.total_steps:
        if _is_speaker():
            print(f"{config.logger.log_dir} holds this run, finished: {inputs.total_steps} steps.")
            print(how_to_go_on(config, inputs))
    else:
        run(config, inputs, stops)
    return stops.ending.done()


def run(config: Config, inputs: Inputs, stops: Stops) -> None:
    """The table of contents: topology, reference, model, optimizer, loop, export."""
    from reinforcer_tp.config import to_yaml
    from reinforcer_tp.data.prepare import format_report
    from reinforcer_tp.hf_files import write_companions
    from reinforcer_tp.lifecycle.peers import watch_peers
    from reinforcer_tp.loop import Run, train
    from reinforcer_tp.mcore.optim import build_training
    from reinforcer_tp.mcore.restore import load_checkpoint
    from reinforcer_tp.mcore.topology import (
        check_same_everywhere,
        destroy_topology,
        init_topology,
    )
    from reinforcer_tp.mcore.weights import export_hf
    from reinforcer_tp.metrics import Progress, environment_info, open_loggers
    from reinforcer_tp.nonfinite import SkippedSteps
    from reinforcer_tp.open_checkpoints import open_writer, settle_resume
    from reinforcer_tp.open_references import open_references
    from reinforcer_tp.run_directory import mark_finished, write_run_directory

    megatron, data = config.policy.megatron_cfg, inputs.data
    total_steps = inputs.total_steps
    log_dir = Path(config.logger.log_dir)
    stops.phase("rendezvous")
    watch_peers(stops.ending, _world_size(), config.cluster.hang_timeout_s)
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
            "the checkpoints to go on from": [str(p.folder) for p in inputs.resume_points],
            "the number of steps": total_steps,
        }
    )
    inputs = settle_resume(config, inputs, topology)
    start_step = inputs.start_step
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(
            Progress(total_steps, start_step, topology.is_rank_zero, stops)
        )
        logger = None
        if topology.is_rank_zero:
            report = with_token_savings(config, inputs, topology)
            write_run_directory(config, environment_info(topology.layout()), report)
            progress.message(format_report(report))
            for damage in inputs.passed_over:
                progress.message(f"warning: passed over a damaged checkpoint: {damage}")
            logger = stack.enter_context(
                open_loggers(config.logger, str(log_dir), dataclasses.asdict(config), start_step)
            )
        stops.phase("reference")
        references = open_references(config, inputs, topology, progress)
        stage = references.stage
        stops.phase("load")
        training = build_training(stage.model, config.policy, topology, total_steps=total_steps)
        restored: dict[str, Any] = {}
        if inputs.resumed is not None:
            folder = inputs.resumed.folder
            restored = load_checkpoint(folder, stage.model, training, topology, is_verified=True)
            progress.message(f"resumed {folder}: {start_step} of {total_steps} steps")
        resident = references.resident
        if resident is not None:
            resident = dataclasses.replace(resident, tick=stops.tick)
        loop_state = Run(
            config=config,
            stops=stops,
            stage=dataclasses.replace(stage, modules=training.ddp, tick=stops.tick),
            reference_stage=resident,
            training=training,
            train_set=references.train_set,
            validation_set=references.validation_set,
            logger=logger,
            progress=progress,
            writer=open_writer(config, inputs, topology, references.digest),
            identity=inputs.identity,
            restored=restored,
            skips=SkippedSteps.from_json(restored["skips"]) if restored else SkippedSteps(),
            sweep_s=references.seconds,
            sweep_tokens=references.num_tokens,
            starts_at_reference=references.is_policy,
        )
        train(loop_state, start_step=start_step, total_steps=total_steps)

        stops.phase("export")
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
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost peer is told of in one line


if __name__ == "__main__":
    stops = Stops()
    code = exit_code(sys.argv[1:], stops)
    stops.ignore()
    if code == 0:
        sys.exit(0)
    leave(code)
