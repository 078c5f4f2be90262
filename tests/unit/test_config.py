"""Loading and checking the configuration: what works, what is refused, and with which words."""

import dataclasses
import math
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reinforcer_tp import config as config_module
from reinforcer_tp.config import Config, ConfigError, fingerprint, load_config, to_yaml
from reinforcer_tp.config_keys import all_keys, field_type

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DEFAULT = str(CONFIGS / "dpo.yaml")
MEGATRON = "policy.megatron_cfg"
NEMO_RL_OVERRIDES = ["cluster.gpus_per_node=8", "dpo.sft_loss_weight=0.1"]
NEMO_RL_OVERRIDES += ["dpo.preference_average_log_probs=True"]


def load(*overrides: str) -> Config:
    return load_config(DEFAULT, list(overrides))


@pytest.mark.parametrize("name", ['"dpo-dev-8-gpu"', "dpo-dev-8-gpu", "'dpo-dev-8-gpu'"])
def test_overrides_of_nemo_rl_work_verbatim(name):
    config = load(*NEMO_RL_OVERRIDES, f"logger.wandb.name={name}")
    assert config.cluster.gpus_per_node == 8
    assert config.dpo.sft_loss_weight == 0.1
    assert config.dpo.preference_average_log_probs is True
    assert config.logger.wandb.name == "dpo-dev-8-gpu"
    assert config.planned_world_size == 8
    config.validate(8)


def test_names_shared_with_nemo_rl_do_not_drift():
    expected = {
        "dpo": "max_num_epochs max_num_steps val_period val_batches val_global_batch_size "
        "val_micro_batch_size val_at_start val_at_end seed reference_policy_kl_penalty "
        "preference_loss preference_loss_weight sft_loss_weight preference_average_log_probs "
        "sft_average_log_probs",
        "policy": "model_name tokenizer precision train_global_batch_size train_micro_batch_size "
        "max_total_sequence_length max_grad_norm",
        "policy.tokenizer": "name chat_template chat_template_kwargs",
        MEGATRON: "enabled tensor_model_parallel_size pipeline_model_parallel_size "
        "virtual_pipeline_model_parallel_size num_layers_in_first_pipeline_stage "
        "num_layers_in_last_pipeline_stage pipeline_model_parallel_layout context_parallel_size "
        "sequence_parallel activation_checkpointing recompute_granularity",
        f"{MEGATRON}.optimizer": "optimizer lr min_lr weight_decay adam_beta1 adam_beta2 adam_eps "
        "clip_grad use_distributed_optimizer",
        f"{MEGATRON}.scheduler": "lr_decay_style lr_decay_iters lr_warmup_iters lr_warmup_init",
        "data": "dataset_name train_data_path val_data_path prompt_key chosen_key rejected_key "
        "shuffle num_workers",
        "checkpointing": "enabled checkpoint_dir save_period keep_top_k metric_name "
        "higher_is_better",
        "logger": "log_dir tensorboard_enabled wandb_enabled mlflow_enabled swanlab_enabled",
        "logger.wandb": "project name",
        "cluster": "gpus_per_node num_nodes",
    }
    keys = set(all_keys(Config))
    for section, names in expected.items():
        assert {f"{section}.{name}" for name in names.split()} <= keys


def test_merge_order_is_defaults_then_yaml_then_overrides(yaml_file):
    path = yaml_file("policy: {model_name: m}\ndpo: {seed: 1, val_period: 7}\n")
    config = load_config(path, ["dpo.seed=2", "dpo.seed=3"])
    assert (config.dpo.seed, config.dpo.val_period, config.dpo.val_batches) == (3, 7, 8)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("policy.megatron_cfg.optimizer.lr=5e-7", "policy.megatron_cfg.optimizer.lr", 5e-7),
        ("policy.megatron_cfg.optimizer.lr=1", "policy.megatron_cfg.optimizer.lr", 1.0),
        ("data.shuffle=True", "data.shuffle", True),
        ("data.shuffle=false", "data.shuffle", False),
        ("dpo.seed=010", "dpo.seed", 10),  # not the octal 8 of YAML 1.1
        ("dpo.max_num_steps=null", "dpo.max_num_steps", None),
        ("dpo.max_num_steps=None", "dpo.max_num_steps", None),
        ("checkpointing.metric_name=None", "checkpointing.metric_name", None),
        ("logger.wandb.name=null", "logger.wandb.name", None),
        ('logger.wandb.name="null"', "logger.wandb.name", "null"),
        ("logger.wandb.name=007", "logger.wandb.name", "007"),
        ("logger.wandb.name=1e5", "logger.wandb.name", "1e5"),
        ("logger.wandb.name=on", "logger.wandb.name", "on"),
        ("logger.wandb.name=2024-01-01", "logger.wandb.name", "2024-01-01"),
        ("logger.wandb.name=a=b: [c", "logger.wandb.name", "a=b: [c"),
        ("logger.wandb.name=run-${dpo.seed}", "logger.wandb.name", "run-42"),
        ("policy.tokenizer.chat_template={{ a }}", "policy.tokenizer.chat_template", "{{ a }}"),
        (
            "policy.tokenizer.chat_template_kwargs={enable_thinking: false}",
            "policy.tokenizer.chat_template_kwargs",
            {"enable_thinking": False},
        ),
    ],
)
def test_values_keep_their_meaning(override, key, value):
    found = load(override)
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("world_size", "local", "overrides"),
    [
        (1, 1, []),
        (32, 32, []),
        (16, 8, ["cluster.gpus_per_node=8"]),
        (16, 8, ["cluster.gpus_per_node=8", "cluster.num_nodes=2"]),
        (8, None, [f"{MEGATRON}.tensor_model_parallel_size=2", f"{MEGATRON}.sequence_parallel=on"]),
        (2, 2, [f"{MEGATRON}.optimizer.lr=0"]),
        (1, 1, ["policy.precision=float16", "data.dataset_name=my.module.CustomDPODataset"]),
    ],
)
def test_layouts_that_fit(world_size, local, overrides):
    load(*overrides).validate(world_size, local)


def leaves(section: type, prefix: str = ""):
    for key in all_keys(section):
        if not dataclasses.is_dataclass(field_type(section, key)):
            yield prefix + key


def test_default_yaml_lists_every_key():
    tree = yaml.safe_load(Path(DEFAULT).read_text())
    for key in leaves(Config):
        found = tree
        for part in key.split("."):
            assert part in found, f"{key} is missing in configs/dpo.yaml"
            found = found[part]


@settings(max_examples=30, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"])).filter(
        lambda s: "${" not in s and s != "???" and "\0" not in s
    ),
    rate=st.floats(0, 1),
    value=st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False),
)
@example(text="\x85", rate=0.0, value=None)
@example(text="one\u2028two\u2029 three", rate=0.0, value=None)
def test_to_yaml_is_read_back_equal(text, rate, value, tmp_path_factory):
    config = load_config(None, ["policy.model_name=m", f"{MEGATRON}.optimizer.lr={rate!r}"])
    kwargs = {"text": text, "value": value}
    tokenizer = dataclasses.replace(
        config.policy.tokenizer, chat_template=text, chat_template_kwargs=kwargs
    )
    policy = dataclasses.replace(config.policy, tokenizer=tokenizer)
    config = dataclasses.replace(config, policy=policy)
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(to_yaml(config), encoding="utf-8", newline="")
    assert load_config(str(path), []) == config


def other_value(base: Config, key: str) -> str:
    hint = field_type(Config, key)
    options = typing.get_args(hint) or (hint,)
    if bool in options:
        found = base
        for part in key.split("."):
            found = getattr(found, part)
        return "false" if found else "true"
    if int in options:
        return "17"
    if float in options:
        return "0.25"
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)[-1]
    return "{a: 1}" if dict in options else "validation/sft_loss"


def test_fingerprint_changes_with_what_determines_the_numbers_only():
    base = load_config(None, ["policy.model_name=m"])
    assert len(fingerprint(base)) == 16
    ignored = config_module.NOT_IN_FINGERPRINT
    assert set(ignored) <= set(all_keys(Config))
    changed = 0
    for key in leaves(Config):
        try:
            config = load_config(None, ["policy.model_name=m", f"{key}={other_value(base, key)}"])
        except ConfigError:  # not built yet
            continue
        is_ignored = any(key == name or key.startswith(f"{name}.") for name in ignored)
        if config != base:
            changed += 1
            assert (fingerprint(config) == fingerprint(base)) is is_ignored, key
    assert changed > 60


def test_fingerprint_does_not_depend_on_the_process():
    code = "from reinforcer_tp.config import *; import sys; "
    code += "print(fingerprint(load_config(sys.argv[1], [])))"
    run = subprocess.run([sys.executable, "-c", code, DEFAULT], capture_output=True, text=True)
    assert run.stdout.strip() == fingerprint(load())


def test_importing_the_configuration_is_cheap():
    code = "import reinforcer_tp.config, sys; "
    code += "print(sorted({m.split('.')[0] for m in sys.modules} & set(sys.argv[1:])))"
    heavy = ["torch", "transformers", "datasets", "megatron", "huggingface_hub", "numpy"]
    run = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("val:validation-default_loss", "validation/loss"),
        ("val:validation-my_set_accuracy", "validation/rewards/accuracies"),
        ("val:validation-default_rewards_chosen_mean", "validation/rewards/chosen"),
        ("val:accuracy", "validation/rewards/accuracies"),
        ("train:loss", "train/loss"),
        ("val_loss", "validation/loss"),
        ("validation/rewards/margins", "validation/rewards/margins"),
        ("null", None),
    ],
)
def test_metric_names_of_nemo_rl_are_mapped(name, key):
    assert load(f"checkpointing.metric_name={name}").checkpointing.metric_key == key


def test_nulls_that_stand_for_another_key():
    config = load("policy.max_grad_norm=0.5", "logger.log_dir=/runs/a")
    assert config.policy.clip_grad == 0.5
    assert config.checkpoint_dir == "/runs/a/checkpoints"
    assert load(f"{MEGATRON}.optimizer.clip_grad=2").policy.clip_grad == 2.0
    assert load("policy.max_grad_norm=null").policy.clip_grad == 0.0
    averages = "dpo.preference_average_log_probs=true"
    assert load(averages).dpo.loss_options["sft_average_log_probs"] is True
    both = load(averages, "dpo.sft_average_log_probs=false")
    assert both.dpo.loss_options["sft_average_log_probs"] is False
    assert load("dpo.rpo_alpha=0.5").dpo.loss_options["sft_average_log_probs"] is True
    assert load("dpo.sft_loss_weight=1").dpo.loss_options["sft_average_log_probs"] is False
    assert math.isclose(load().policy.clip_grad, 1.0)
