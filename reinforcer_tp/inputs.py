"""What a run reads before any process group exists: model, tokenizer, data, checkpoint.

Every rank reads alike and finds the same mistakes, so that bad input ends all of them at once.
"""

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

import torch

from reinforcer_tp.batches import num_steps
from reinforcer_tp.config import Config, ConfigError, DataConfig
from reinforcer_tp.data.micro_batches import check_pairs_fit, check_token_ids
from reinforcer_tp.data.prepare import PreparedData, TokenizedSet, prepare_data
from reinforcer_tp.data.tokenizer import load_tokenizer, tokenizer_digests
from reinforcer_tp.embedded import EmbeddedPaths, ensure_embedded
from reinforcer_tp.hf_files import (
    ModelFiles,
    check_same_vocabulary,
    check_vocabulary,
    open_model,
)
from reinforcer_tp.mcore.extensions import check_fp8, choose_layer_spec
from reinforcer_tp.mcore.schedule import check_kernel_impl
from reinforcer_tp.mcore.topology import check_device_count
from reinforcer_tp.metrics import check_loggers
from reinforcer_tp.preference_losses import WITH_MARGINS, uses_margins
from reinforcer_tp.resume import ResumePoint, find_resume_points, identity
from reinforcer_tp.run_directory import finished_steps


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Checked, and equal on every rank but for what lies on another node's disk."""

    files: ModelFiles
    reference_files: ModelFiles | None  # None = the policy's
    tokenizer: Any
    data: PreparedData
    total_steps: int  # optimizer steps of the whole run
    identity: dict[str, Any]  # what a resumed run must have in common with its checkpoint
    resume_points: tuple[ResumePoint, ...]  # checkpoints to go on from, the best first
    passed_over: tuple[str, ...]  # what is wrong with better ones, what became of later ones
    finished_step: int | None  # where this run ended before; None = it has not

    @property
    def resumed(self) -> ResumePoint | None:
        """The checkpoint to go on from."""
        return self.resume_points[0] if self.resume_points else None

    @property
    def start_step(self) -> int:
        """Optimizer steps done."""
        return self.resumed.step if self.resumed else 0


def open_inputs(config: Config, *, holds_run: bool) -> Inputs:
    """Raises ConfigError or ValueError, one line. `holds_run`: logger.log_dir has this run."""
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    check_device_count(local_world_size)
    check_loggers(config.logger)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_fp8(config.policy.fp8, device)
    choose_layer_spec(config.policy.layer_spec, device)  # refuses what is not there
    check_kernel_impl(config.policy.kernel_impl, device)
    policy, data_section, reference_name = config.policy, config.data, config.reference.model_name
    embedded = None
    if "embedded" in (policy.model_name, reference_name, data_section.dataset_name):
        embedded = ensure_embedded()
    if data_section.dataset_name == "embedded":
        data_section = with_embedded_paths(data_section, embedded)
    files = open_model(config, policy.model_name, embedded)
    reference_files = None
    if reference_name not in (None, policy.model_name):
        reference_files = open_model(config, reference_name, embedded)
    tokenizer = load_tokenizer(
        policy.tokenizer.name or str(files.folder), policy.tokenizer.chat_template
    )
    check_vocabulary(tokenizer, files, reference_files)
    if reference_files is not None:
        check_same_vocabulary(tokenizer, files, reference_files)
    data = prepare_data(
        data_section,
        tokenizer=tokenizer,
        max_total_sequence_length=policy.max_total_sequence_length,
        chat_template_kwargs=policy.tokenizer.chat_template_kwargs,
        is_local_leader=os.environ.get("LOCAL_RANK", "0") == "0",
    )
    if config.dpo.val_period <= 0:
        data = dataclasses.replace(data, validation=None)
    check_reference_columns(config, data)
    if not data.train.weights.any():
        raise ValueError("every training row has weight 0, so that nothing would be trained")
    for pairs in filter(None, (data.train, data.validation)):
        check_margins(config, pairs)
        check_pairs_fit(pairs, policy.micro_batch_tokens, config.data.share)
        check_token_ids(pairs, files.shape.vocab_size)  # the reference's is the same
    total_steps = num_steps(config, len(data.train))
    run_identity = identity(config, data.report, tokenizer_digests(tokenizer))
    points, errors = find_resume_points(config, run_identity)
    finished_step = finished_steps(config) if holds_run else None
    if finished_step is not None and points:
        finished_step = min(finished_step, points[0].step)  # it may go back to an earlier one
    _check_steps(config, total_steps, points[0].step if points else 0, finished_step)
    return Inputs(
        files=files,
        reference_files=reference_files,
        tokenizer=tokenizer,
        data=data,
        total_steps=total_steps,
        identity=run_identity,
        resume_points=tuple(points),
        passed_over=tuple(map(str, errors)),
        finished_step=finished_step,
    )


def with_embedded_paths(section: DataConfig, embedded: EmbeddedPaths) -> DataConfig:
    """The section `data` that says `embedded`, as one that names the files."""
    return dataclasses.replace(
        section,
        dataset_name="auto",
        train_data_path=embedded.train,
        val_data_path=embedded.validation,
    )


def check_margins(config: Config, pairs: TokenizedSet) -> None:
    """Raises ConfigError for margins that the loss would not read."""
    unused = [name for name, _ in config.dpo.loss_options["losses"] if not uses_margins(name)]
    if unused and pairs.margins.any():
        row = int(pairs.rows[pairs.margins.nonzero()[0][0]])
        raise ConfigError(
            f"source row {row} has a margin, which dpo.preference_loss={unused[0]} does not use; "
            f"set data.ignore_columns=[margin], or use {', '.join(WITH_MARGINS)}"
        )


def check_reference_columns(config: Config, data: PreparedData) -> None:
    """Raises ConfigError for the rows' own reference log-probs where they would not be read."""
    sets = {"training": data.train, "validation": data.validation}
    has = {name: pairs.has_reference for name, pairs in sets.items() if pairs is not None}
    if not any(has.values()):
        return
    what = "ref_chosen_logps and ref_rejected_logps"
    fix = "set data.ignore_columns=[ref_chosen_logps,ref_rejected_logps]"
    if not all(has.values()):
        without = next(name for name, found in has.items() if not found)
        raise ConfigError(
            f"the {without} rows have no {what}, the others do, and one run has one reference; "
            f"give them to both, or {fix}"
        )
    mode, model_name = config.reference_mode, config.reference.model_name
    if mode != "store" or model_name is not None:
        asked = f"model_name={model_name}" if mode == "store" else f"mode={mode}"
        raise ConfigError(
            f"the rows bring {what}, but reference.{asked} (or the loss) does not read them; {fix}"
        )
    if config.dpo.ld_alpha is not None:
        raise ConfigError(
            f"dpo.ld_alpha weights single tokens, but {what} are sums of whole responses; {fix}, "
            "or remove dpo.ld_alpha"
        )


def _check_steps(
    config: Config,
    total_steps: int,
    start_step: int,
    finished_step: int | None,
) -> None:
    if start_step > total_steps:
        raise ConfigError(
            f"the checkpoint of step {start_step} in {config.checkpoint_dir} is past the "
            f"{total_steps} steps of this run; raise dpo.max_num_steps or dpo.max_num_epochs, or "
            "choose another logger.log_dir"
        )
    if finished_step is not None and start_step < finished_step < total_steps:
        raise ConfigError(
            f"{config.logger.log_dir} holds this run, finished after {finished_step} steps without "
            "a checkpoint to go on from (checkpointing.enabled); choose another logger.log_dir"
        )
