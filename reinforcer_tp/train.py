"""DPO training from the command line.

    torchrun --nproc-per-node N reinforcer_tp/train.py --config configs/dpo.yaml key=value ...
    python reinforcer_tp/train.py --config configs/dpo.yaml --check

Exit status: 0 done, 65 data or model files, 70 a number that is not finite, 78 configuration.
"""

import argparse
import contextlib
import dataclasses
import os
import shlex
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

# As a script this file's folder is first on sys.path, where `data` would shadow others.
if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    del sys.path[0]

# Only what is light: an error in the configuration must not wait for torch. The rest is imported
# where it is used.
from reinforcer_tp.config import (
    Config,
    ConfigError,
    find_model_shape,
    fingerprint,
    load_config,
    to_yaml,
    validate_model,
)

_CONFIGS = Path(__file__).resolve().parents[1] / "configs"
_EXIT_DATA, _EXIT_SOFTWARE, _EXIT_CONFIG = 65, 70, 78
_SPEAKER_HEAD_START_S = 5.0


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
    print(f"# {world_size} processes: tp={tp} pp={pp} dp={world_size // (tp * pp)}")
    print("# configuration is valid; nothing was trained")
    return 0


class Inputs(NamedTuple):
    """What a run reads before any process group exists."""

    files: Any  # hf_files.ModelFiles of the policy
    reference_files: Any  # of the reference; None = the policy's
    tokenizer: Any
    data: Any  # data.prepare.PreparedData
    total_steps: int
    checkpoint: Path | None  # to go on from
    start_step: int  # optimizer steps that it holds


def prepare_and_train(config: Config) -> int:
    """First what needs no process group, so that bad files end every rank alike; then the run."""
    from reinforcer_tp.run_directory import check_run_directory, finished_steps

    holds_run = check_run_directory(config)
    quiet_libraries()
    from reinforcer_tp.loop import NonFiniteError

    try:
        inputs = open_inputs(config)
    except ValueError as error:
        if isinstance(error, ConfigError) or "REINFORCER_TP_TRACEBACK" in os.environ:
            raise
        return fail(error, _EXIT_DATA)
    done = finished_steps(config) if holds_run else None
    if done is not None and done >= inputs.total_steps:
        if _is_speaker():
            print(f"{config.logger.log_dir} holds this run, finished after {done} steps.")
            print(f"to go on:       {continue_command(config, inputs)}")
        return 0
    try:
        run(config, inputs)
    except NonFiniteError as error:
        return fail(error, _EXIT_SOFTWARE)
    return 0


def open_inputs(config: Config) -> Inputs:
    """Raises ConfigError or ValueError, one line, alike on every rank."""
    from reinforcer_tp.data.micro_batches import check_pairs_fit
    from reinforcer_tp.data.prepare import prepare_data
    from reinforcer_tp.data.tokenizer import load_tokenizer
    from reinforcer_tp.embedded import ensure_embedded
    from reinforcer_tp.hf_files import check_tokenizer, open_model
    from reinforcer_tp.loop import num_steps
    from reinforcer_tp.metrics import check_loggers

    check_loggers(config.logger)
    checkpoint, start_step = resume_point(config)
    policy, data_section, reference_name = config.policy, config.data, config.reference.model_name
    embedded = None
    if "embedded" in (policy.model_name, reference_name, data_section.dataset_name):
        embedded = ensure_embedded()
    if data_section.dataset_name == "embedded":
        data_section = dataclasses.replace(
            data_section,
            dataset_name="auto",
            train_data_path=embedded.train,
            val_data_path=embedded.validation,
        )
    files = open_model(config, policy.model_name, embedded)
    reference_files = None
    if reference_name not in (None, policy.model_name):
        reference_files = open_model(config, reference_name, embedded)
    tokenizer = load_tokenizer(
        policy.tokenizer.name or str(files.folder), policy.tokenizer.chat_template
    )
    check_tokenizer(tokenizer, files, reference_files)
    data = prepare_data(
        data_section,
        tokenizer=tokenizer,
        max_total_sequence_length=policy.max_total_sequence_length,
        chat_template_kwargs=policy.tokenizer.chat_template_kwargs,
        is_local_leader=_is_speaker(),
    )
    for pairs in filter(None, (data.train, data.validation)):
        check_pairs_fit(pairs, policy.micro_batch_tokens)
    total_steps = num_steps(config, len(data.train))
    return Inputs(files, reference_files, tokenizer, data, total_steps, checkpoint, start_step)


def resume_point(config: Config) -> tuple[Path | None, int]:
    """(checkpoint to go on from, optimizer steps done): the newest one of this run, if any."""
    from reinforcer_tp.mcore.checkpoint import check_resumable, list_checkpoints, read_state

    found = list_checkpoints(Path(config.checkpoint_dir))
    if not config.checkpointing.enabled or not found:
        return None, 0
    step, folder = list(found.items())[-1]
    if config.checkpointing.resume == "never":
        raise ConfigError(
            f"{folder} exists and checkpointing.resume=never; "
            "choose another checkpointing.checkpoint_dir, or use checkpointing.resume=auto"
        )
    state = read_state(folder)
    if state["fingerprint"] != fingerprint(config):
        raise ConfigError(
            f"{folder} belongs to a run of another configuration; "
            "choose another checkpointing.checkpoint_dir"
        )
    megatron = config.policy.megatron_cfg
    tp, pp = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    check_resumable(folder, state, world_size=_world_size(), tp_size=tp, pp_size=pp)
    return folder, step


def run(config: Config, inputs: Inputs) -> None:
    """The table of contents: topology, model, reference, optimizer, loop, export."""
    from reinforcer_tp.data.prepare import format_report
    from reinforcer_tp.hf_files import write_companions
    from reinforcer_tp.loop import PairSet, Run, train
    from reinforcer_tp.mcore.checkpoint import load_checkpoint
    from reinforcer_tp.mcore.optim import build_training
    from reinforcer_tp.mcore.topology import (
        check_same_everywhere,
        destroy_topology,
        init_topology,
    )
    from reinforcer_tp.mcore.weights import export_hf
    from reinforcer_tp.metrics import Progress, environment_info, open_loggers
    from reinforcer_tp.run_directory import mark_finished, write_run_directory

    megatron, data = config.policy.megatron_cfg, inputs.data
    start_step, total_steps = inputs.start_step, inputs.total_steps
    log_dir = Path(config.logger.log_dir)
    with contextlib.ExitStack() as stack:
        topology = init_topology(
            megatron.tensor_model_parallel_size,
            megatron.pipeline_model_parallel_size,
            seed=config.dpo.seed,
        )
        stack.callback(destroy_topology)
        check_same_everywhere("the tokenized data", data.fingerprint)
        progress = stack.enter_context(Progress(total_steps, start_step, topology.is_rank_zero))
        logger = None
        if topology.is_rank_zero:
            write_run_directory(config, environment_info(topology.layout()), data.report)
            progress.message(format_report(data.report))
            logger = stack.enter_context(
                open_loggers(config.logger, str(log_dir), dataclasses.asdict(config), start_step)
            )

        begin = time.perf_counter()
        stage = build_stage(config, inputs.files, topology)
        train_reference, validation_reference = sweep(config, stage, inputs, progress)
        reference_s = time.perf_counter() - begin

        training = build_training(stage.model, config.policy, topology, total_steps=total_steps)
        if inputs.checkpoint is not None:
            load_checkpoint(inputs.checkpoint, stage.model, training, topology)
            progress.message(f"resumed {inputs.checkpoint}: {start_step} of {total_steps} steps")
        validation_set = None
        if data.validation is not None:
            validation_set = PairSet(pairs=data.validation, reference=validation_reference)
        loop_state = Run(
            config=config,
            stage=dataclasses.replace(stage, module=training.ddp),
            training=training,
            train_set=PairSet(pairs=data.train, reference=train_reference),
            validation_set=validation_set,
            logger=logger,
            progress=progress,
            reference_s=reference_s,
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
            progress.message(f"to go on:       {continue_command(config, inputs)}")


def build_stage(config: Config, files: Any, topology: Any) -> Any:
    """This rank's stage of a model, with its weights."""
    from reinforcer_tp.mcore.model import build_model
    from reinforcer_tp.mcore.schedule import Stage
    from reinforcer_tp.mcore.weights import load_weights

    model = build_model(files.hf_config, config.policy, topology)
    load_weights(model, files.reader, topology)
    return Stage(
        model=model, module=model.core, topology=topology, kernel_impl=config.policy.kernel_impl
    )


def sweep(config: Config, stage: Any, inputs: Inputs, progress: Any) -> tuple[dict, dict]:
    """Reference log-probs of the training and validation pairs that this run will use.

    A reference of its own is built, swept and dropped before there is an optimizer.
    """
    from reinforcer_tp.loop import micro_batching, train_rows, validation_batches
    from reinforcer_tp.reference import sweep_reference

    if inputs.reference_files is not None:
        stage = build_stage(config, inputs.reference_files, stage.topology)
    data = inputs.data
    steps = range(inputs.start_step + 1, inputs.total_steps + 1)
    rows = [row for step in steps for row in train_rows(config, len(data.train), step)]
    sets = {"training": (data.train, rows)}
    if data.validation is not None:
        batches = validation_batches(config, len(data.validation))
        sets["validation"] = (data.validation, [row for batch in batches for row in batch])
    found = {"validation": {}}
    for name, (pairs, wanted) in sets.items():
        found[name] = sweep_reference(
            stage,
            pairs,
            wanted,
            micro_batching(config, stage, is_validation=name == "validation"),
            batch_size=config.policy.train_global_batch_size,
            on_progress=lambda text, name=name: progress.message(f"reference, {name}: {text}"),
        )
    return found["training"], found["validation"]


def continue_command(config: Config, inputs: Inputs) -> str:
    """A command that makes the run twice as long, whatever its overrides were."""
    steps = 2 * inputs.total_steps
    extend = [f"dpo.max_num_steps={steps}"]
    epochs = -(-steps * config.policy.train_global_batch_size // len(inputs.data.train))
    if epochs > config.dpo.max_num_epochs:
        extend.append(f"dpo.max_num_epochs={epochs}")
    recorded = Path(config.logger.log_dir) / "config.yaml"
    script = os.path.relpath(__file__)
    torchrun = Path(sys.executable).with_name("torchrun")  # of this environment, active or not
    launcher = (
        "torchrun" if shutil.which("torchrun") == str(torchrun) else os.path.relpath(torchrun)
    )
    launch = [launcher, "--nproc-per-node", str(_world_size()), script]
    return shlex.join([*launch, "--config", str(recorded), *extend])


def quiet_libraries() -> None:
    """Silences progress bars and advice of the libraries; ours say what matters."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
