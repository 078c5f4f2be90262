"""The keys and types of a tree of dataclasses, and what to say about a key it does not have."""

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Mapping

# What people call a key elsewhere -> our key. Also searched for near misses.
ALIASES = {
    "beta": "dpo.reference_policy_kl_penalty",
    "cpo_alpha": "dpo.sft_loss_weight",
    "loss_type": "dpo.preference_loss",
    "pref_loss": "dpo.preference_loss",
    "num_train_epochs": "dpo.max_num_epochs",
    "epochs": "dpo.max_num_epochs",
    "max_steps": "dpo.max_num_steps",
    "steps": "dpo.max_num_steps",
    "eval_steps": "dpo.val_period",
    "learning_rate": "policy.megatron_cfg.optimizer.lr",
    "warmup_steps": "policy.megatron_cfg.scheduler.lr_warmup_iters",
    "lr_scheduler_type": "policy.megatron_cfg.scheduler.lr_decay_style",
    "betas": "policy.megatron_cfg.optimizer.adam_beta1",
    "tp": "policy.megatron_cfg.tensor_model_parallel_size",
    "tensor_parallel_size": "policy.megatron_cfg.tensor_model_parallel_size",
    "pp": "policy.megatron_cfg.pipeline_model_parallel_size",
    "pipeline_parallel_size": "policy.megatron_cfg.pipeline_model_parallel_size",
    "gradient_checkpointing": "policy.megatron_cfg.activation_checkpointing",
    "model": "policy.model_name",
    "model_name_or_path": "policy.model_name",
    "batch_size": "policy.train_global_batch_size",
    "global_batch_size": "policy.train_global_batch_size",
    "micro_batch_size": "policy.train_micro_batch_size",
    "max_length": "policy.max_total_sequence_length",
    "max_seq_length": "policy.max_total_sequence_length",
    "max_input_seq_length": "policy.max_total_sequence_length",
    "dtype": "policy.precision",
    "dataset": "data.dataset_name",
    "train_file": "data.train_data_path",
    "output_dir": "logger.log_dir",
    "save_steps": "checkpointing.save_period",
    "gpus": "cluster.gpus_per_node",
    "nodes": "cluster.num_nodes",
}
# NeMo-RL's keys without a counterpart of the same meaning -> what to do instead.
HINTS = {
    "defaults": "configurations do not inherit; copy the file and change it",
    "policy.dtensor_cfg": "Megatron-core is the only backend; see policy.megatron_cfg",
    "policy.sequence_packing": "rows are always packed; see policy.micro_batch_tokens",
    "policy.dynamic_batching": "rows are always packed; see policy.micro_batch_tokens",
    "policy.make_sequence_length_divisible_by": "rows are padded as the layout needs",
    "policy.optimizer": "did you mean policy.megatron_cfg.optimizer?",
    "policy.scheduler": "did you mean policy.megatron_cfg.scheduler?",
    "policy.megatron_cfg.peft": "LoRA is not built yet; only enabled=false is accepted",
    "policy.megatron_cfg.fp8_cfg": "only enabled=false is accepted; see policy.fp8",
    "policy.megatron_cfg.tp_comm_overlap": "not built: its buffers hold rows of one length only",
    **dict.fromkeys(
        (
            "policy.megatron_cfg.account_for_embedding_in_pipeline_split",
            "policy.megatron_cfg.account_for_loss_in_pipeline_split",
        ),
        "write the stages in policy.megatron_cfg.pipeline_model_parallel_layout",
    ),
    "data.train": "did you mean data.train_data_path?",
    "data.validation": "did you mean data.val_data_path?",
}


def _options(hint: object) -> tuple:
    """The members of `X | None`, or (X,)."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


@functools.cache
def fields_of(section: type) -> dict[str, object]:
    hints = typing.get_type_hints(section)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


def is_text(hint: object) -> bool:
    return str in _options(hint)


def is_list(hint: object) -> bool:
    return any(typing.get_origin(option) is list for option in _options(hint))


def field_type(schema: type, key: str) -> object | None:
    """The type of a dotted key, or None where there is no such key."""
    hint: object = schema
    for part in key.split("."):
        if not dataclasses.is_dataclass(hint) or part not in fields_of(hint):
            return None
        hint = fields_of(hint)[part]
    return hint


def all_keys(section: type, prefix: str = "") -> list[str]:
    """Every dotted key below a section, sections included."""
    keys = []
    for name, hint in fields_of(section).items():
        keys.append(prefix + name)
        if dataclasses.is_dataclass(hint):
            keys += all_keys(hint, f"{prefix}{name}.")
    return keys


def describe(hint: object) -> str:
    """A field's type in words."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    names |= {list[float]: "a list of numbers", list[str]: "a list of text"}
    names |= {typing.Any: "text or a list of text"}
    parts = []
    for option in _options(hint):
        if typing.get_origin(option) is typing.Literal:
            choices = typing.get_args(option)
            parts.append(f"{'one of ' if len(choices) > 1 else ''}{', '.join(choices)}")
        elif option is type(None):
            parts.append("null")
        else:
            parts.append(names.get(option, "a mapping"))
    return " or ".join(parts)


def suggest(schema: type, key: str) -> str:
    """What to say about an unknown key: a hint, "did you mean", or the keys there are."""
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in HINTS:
            return HINTS[".".join(parts[:end])]
    near = _nearest(all_keys(schema), key) if len(key) < 200 else None
    if near is not None:
        return f"did you mean {near}?"
    section = field_type(schema, ".".join(parts[:-1])) if len(parts) > 1 else schema
    owner = section if dataclasses.is_dataclass(section) else schema
    return f"expected one of {', '.join(fields_of(owner))}"


def _nearest(keys: list[str], key: str) -> str | None:
    """The key (or the key of an alias) most like `key` by its last part and as a whole."""
    last = key.rpartition(".")[2]
    pairs = [(other.rpartition(".")[2], other) for other in keys] + list(ALIASES.items())
    scored = [(_alike(last, name), _alike(key, other), other) for name, other in pairs]
    close = [entry for entry in scored if entry[0] >= 0.8 or entry[1] >= 0.8]
    return max(close, key=lambda entry: entry[0] + 0.5 * entry[1])[2] if close else None


def _alike(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def flatten(tree: Mapping, prefix: str = "") -> dict:
    """Nested mappings as one, keys joined by dots."""
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat
