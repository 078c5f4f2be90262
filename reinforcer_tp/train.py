"""DPO training from the command line.

    torchrun --nproc-per-node N reinforcer_tp/train.py --config configs/dpo.yaml key=value ...
    python reinforcer_tp/train.py --config configs/dpo.yaml --check

Exit status: 0 done, 65 data or model files, 70 a number that is not finite, 78 configuration.
"""

import argparse
import dataclasses
import os
import shlex
import sys
import time
from functools import partial
from pathlib import Path

# As a script, this file's folder is first on sys.path, where `data` or `metrics` would shadow others.
if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    del sys.path[0]

from reinforcer_tp.config import Config, ConfigError, find_model_shape, load_config, to_yaml
from reinforcer_tp.config import validate_model as validate_model_shape

_CONFIGS = Path(__file__).resolve().parents[1] / "configs"
_EXIT_DATA, _EXIT_SOFTWARE, _EXIT_CONFIG = 65, 70, 78


def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    is_speaker = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        config = load_config(arguments.config, arguments.overrides)
        world_size = int(os.environ.get("WORLD_SIZE", "0"))
        if arguments.check:
            config.validate(world_size or config.planned_world_size)
            return check(config, world_size or config.planned_world_size)
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        config.validate(world_size or 1, local_world_size)
        return prepare_and_train(config, arguments.config)
    except ConfigError as error:
        # Every rank finds the same error by itself; one of each node says it.
        return fail(str(error), _EXIT_CONFIG, is_speaker)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="reinforcer_tp/train.py", description="DPO training")
    parser.add_argument("--config", default=str(_CONFIGS / "dpo.yaml"), help="YAML file")
    parser.add_argument(
        "--check", action="store_true", help="validate, print the resolved config, do not train"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. dpo.seed=1")
    return parser.parse_intermixed_args(argv)


def fail(message: str, status: int, is_speaker: bool) -> int:
    if is_speaker:
        print(f"error: {message}", file=sys.stderr, flush=True)
    return status


def check(config: Config, world_size: int) -> int:
    """`--check`: everything that can be known without a GPU, weights or data."""
    name = config.policy.model_name
    if name == "embedded":
        from reinforcer_tp.embedded import ensure_embedded

        name = ensure_embedded().model
    shape, source = find_model_shape(name, _CONFIGS / "models")
    validate_model_shape(config, shape)
    megatron = config.policy.megatron_cfg
    tp, pp = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    print(to_yaml(config), end="")
    print(f"# model shape from {source}")
    print(f"# {world_size} processes: tp={tp} pp={pp} dp={world_size // (tp * pp)}")
    print("# configuration is valid; nothing was trained")
    return 0


def prepare_and_train(config: Config, config_path: str) -> int:
    """First what needs no process group, so that bad files end every rank alike; then the run."""
    from reinforcer_tp.run_directory import check_run_directory, finished_steps

    holds_run = check_run_directory(config)
    quiet_libraries()
    from reinforcer_tp.loop import NonFiniteError, num_steps

    is_speaker = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        files, reference_files, tokenizer, data = open_inputs(config)
        total_steps = num_steps(config, len(data.train))
    except ConfigError:
        raise
    except ValueError as error:
        if os.environ.get("REINFORCER_TP_TRACEBACK"):
            raise
        return fail(str(error), _EXIT_DATA, is_speaker)

    done = finished_steps(config) if holds_run else None
    if done is not None and done >= total_steps:
        if is_speaker:
            print(f"{config.logger.log_dir} holds this run, finished after {done} steps.")
            print(f"To go on: {continue_command(config_path, config, 2 * done)}")
        return 0
    try:
        run(config, files, reference_files, tokenizer, data, total_steps, config_path)
    except NonFiniteError as error:
        return fail(str(error), _EXIT_SOFTWARE, is_speaker)
    return 0


def open_inputs(config: Config) -> tuple:
    """Model files, the reference's (None = the policy's), tokenizer, and tokenized data."""
    from reinforcer_tp.data import load_tokenizer, prepare_data
    from reinforcer_tp.embedded import ensure_embedded
    from reinforcer_tp.hf_files import open_model

    policy, data = config.policy, config.data
    embedded_model = None
    if "embedded" in (policy.model_name, config.reference.model_name, data.dataset_name):
        embedded = ensure_embedded()
        embedded_model = embedded.model
        if data.dataset_name == "embedded":
            data = dataclasses.replace(
                data,
                dataset_name="auto",
                train_data_path=embedded.train,
                val_data_path=embedded.validation,
            )
    files = open_model(config, policy.model_name, embedded_model)
    reference_files = None
    if config.reference.model_name not in (None, policy.model_name):
        reference_files = open_model(config, config.reference.model_name, embedded_model)
    tokenizer = load_tokenizer(
        policy.tokenizer.name or str(files.folder), policy.tokenizer.chat_template
    )
    prepared = prepare_data(
        data,
        tokenizer=tokenizer,
        max_total_sequence_length=policy.max_total_sequence_length,
        chat_template_kwargs=policy.tokenizer.chat_template_kwargs,
        is_local_leader=os.environ.get("LOCAL_RANK", "0") == "0",
    )
    for shape in (files.shape, reference_files.shape if reference_files else files.shape):
        if len(tokenizer) > shape.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, the model only {shape.vocab_size}; "
                "give the model's own with policy.tokenizer.name"
            )
    return files, reference_files, tokenizer, prepared


def run(
    config: Config, files, reference_files, tokenizer, data, total_steps: int, config_path: str
) -> None:
    """The table of contents: topology, model, reference, optimizer, loop, export."""
    from reinforcer_tp.hf_files import write_companions
    from reinforcer_tp.loop import PairSet, Run, train
    from reinforcer_tp.mcore.checkpoint import load_checkpoint
    from reinforcer_tp.mcore.model import build_model
    from reinforcer_tp.mcore.optim import build_training
    from reinforcer_tp.mcore.schedule import Stage
    from reinforcer_tp.mcore.topology import destroy_topology, init_topology
    from reinforcer_tp.mcore.weights import export_hf, load_weights
    from reinforcer_tp.metrics import Progress, environment_info, open_loggers
    from reinforcer_tp.run_directory import mark_finished, write_run_directory

    megatron = config.policy.megatron_cfg
    topology = init_topology(
        megatron.tensor_model_parallel_size,
        megatron.pipeline_model_parallel_size,
        seed=config.dpo.seed,
    )
    checkpoint, start_step = resume_point(config, topology)
    if topology.is_rank_zero:
        write_run_directory(config, environment_info(topology.layout()), data.report)
        print(format_report(data.report), flush=True)
    progress = Progress(total_steps, start_step, topology.is_rank_zero)

    def build(model_files) -> Stage:
        model = build_model(model_files.hf_config, config.policy, topology)
        load_weights(model, model_files.reader, topology)
        return Stage(
            model=model, module=model.core, topology=topology, kernel_impl=config.policy.kernel_impl
        )

    begin = time.perf_counter()
    stage = build(files)
    train_reference, validation_reference = sweep(
        config, build(reference_files) if reference_files else stage, data, progress,
        start_step, total_steps,
    )
    reference_s = time.perf_counter() - begin

    training = build_training(stage.model, config.policy, topology, total_steps=total_steps)
    if checkpoint is not None:
        load_checkpoint(checkpoint, stage.model, training, topology)
        progress.message(f"resumed {checkpoint}: {start_step} of {total_steps} steps are done")
    logger = None
    if topology.is_rank_zero:
        logger = open_loggers(
            config.logger, config.logger.log_dir, dataclasses.asdict(config), start_step
        )
    validation_set = None
    if data.validation is not None:
        validation_set = PairSet(pairs=data.validation, reference=validation_reference)
    train(
        Run(
            config=config,
            stage=dataclasses.replace(stage, module=training.ddp),
            training=training,
            train_set=PairSet(pairs=data.train, reference=train_reference),
            validation_set=validation_set,
            logger=logger,
            progress=progress,
            reference_s=reference_s,
        ),
        start_step=start_step,
        total_steps=total_steps,
    )
    progress.close()
    if logger is not None:
        logger.close()
    export = Path(config.logger.log_dir) / "hf"
    if config.checkpointing.export_hf:
        companions = partial(write_companions, files, tokenizer, config.policy.precision)
        export_hf(stage.model, topology, export, companions)
    if topology.is_rank_zero:
        mark_finished(config, total_steps)
        print(f"run folder:     {config.logger.log_dir}")
        if config.checkpointing.export_hf:
            print(f"exported model: {export}")
        print(f"to go on:       {continue_command(config_path, config, 2 * total_steps)}")
    destroy_topology()


def resume_point(config: Config, topology) -> tuple[Path | None, int]:
    """(checkpoint to go on from, optimizer steps done): the newest one of this run, if any."""
    from reinforcer_tp.config import fingerprint
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
    check_resumable(folder, state, topology.layout())
    return folder, step


def sweep(config: Config, stage, data, progress, start_step: int, total_steps: int) -> tuple:
    """Reference log-probs of the training and validation pairs that this run will use."""
    from reinforcer_tp.loop import micro_batching, train_rows, validation_batches
    from reinforcer_tp.reference import sweep_reference

    steps = range(start_step + 1, total_steps + 1)
    rows = [row for step in steps for row in train_rows(config, len(data.train), step)]
    sets = [(data.train, rows, False)]
    if data.validation is not None:
        batches = validation_batches(config, len(data.validation))
        sets.append((data.validation, [row for batch in batches for row in batch], True))
    found = [
        sweep_reference(
            stage,
            pairs,
            rows,
            micro_batching(config, stage, is_validation=is_validation),
            batch_size=config.policy.train_global_batch_size,
            on_progress=lambda done, total: progress.message(f"reference: {done} of {total} pairs"),
        )
        for pairs, rows, is_validation in sets
    ]
    return found[0], found[1] if len(found) > 1 else {}


def continue_command(config_path: str, config: Config, steps: int) -> str:
    """A command that extends the run, for the configuration that config.yaml recorded."""
    world_size = os.environ.get("WORLD_SIZE", "1")
    script = Path(__file__).resolve()
    recorded = Path(config.logger.log_dir) / "config.yaml"
    extend = [f"dpo.max_num_steps={steps}"]
    epochs_needed = config.dpo.max_num_epochs * 2
    return shlex.join(
        ["torchrun", "--nproc-per-node", world_size, str(script), "--config", str(recorded)]
        + extend
        + [f"dpo.max_num_epochs={epochs_needed}"]
    )


def quiet_libraries() -> None:
    """Silences, but for one rank a node, the libraries' progress bars."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if os.environ.get("LOCAL_RANK", "0") != "0":
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
