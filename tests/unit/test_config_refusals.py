"""Bad configurations: each is one clear line that says what, got, expected, fix."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reinforcer_tp.config import Config, ConfigError, load_config
from reinforcer_tp.config_keys import ALIASES, HINTS, all_keys, suggest

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MEGATRON = "policy.megatron_cfg"


def load(*overrides: str) -> Config:
    return load_config(str(CONFIGS / "dpo.yaml"), list(overrides))


def refusal(action, *arguments) -> str:
    """The message of the ConfigError that an action raises, which must be one line."""
    with pytest.raises(ConfigError) as caught:
        action(*arguments)
    assert str(caught.value).isprintable() and len(str(caught.value)) <= 1200
    return str(caught.value)


BAD_OVERRIDES = {
    "dpo.beta=0.1": ("dpo.beta", "did you mean dpo.reference_policy_kl_penalty?"),
    "dpo.betta=0.1": ("dpo.betta", "did you mean dpo.reference_policy_kl_penalty?"),
    "policy.lr=1": ("policy.lr", f"did you mean {MEGATRON}.optimizer.lr?"),
    "policy.tensor_model_parallel_size=2": (f"{MEGATRON}.tensor_model_parallel_size?",),
    "dpoo.seed=1": ("dpoo.seed", "did you mean dpo.seed?"),
    "dpo.max_num_stpes=1": ("did you mean dpo.max_num_steps?",),
    "seed=1": ("did you mean dpo.seed?",),
    "policy.qqqqq=1": ("policy.qqqqq", "expected one of model_name, tokenizer"),
    "policy.dtensor_cfg.enabled=true": ("policy.dtensor_cfg.enabled", "policy.megatron_cfg"),
    "policy.train_global_batch_size=abc": ("=abc", "expected a whole number"),
    "dpo.seed=1.5": ("dpo.seed=1.5", "expected a whole number"),
    "dpo.seed=1e3": ("dpo.seed=1000.0", "expected a whole number"),
    "dpo.seed=null": ("dpo.seed=null", "expected a whole number"),
    "dpo.seed=???": ("dpo.seed=???", "expected a whole number"),
    "dpo.seed=[1]": ("dpo.seed=[1]", "expected a whole number"),
    "dpo.seed={a": ("dpo.seed={a", "cannot be read"),
    "dpo.seed.x=1": ("dpo.seed={'x': 1}", "expected a whole number"),
    "dpo.seed=-1": ("dpo.seed=-1", "from 0 to"),
    "data.shuffle=maybe": ("data.shuffle=maybe", "true or false"),
    "data.shuffle=2": ("data.shuffle=2", "true or false"),
    "policy=3": ("policy=3", "model_name"),
    f"{MEGATRON}.optimizer=adam": (f"{MEGATRON}.optimizer=adam", "min_lr"),
    "policy.precision=bf16": ("policy.precision=bf16", "float32, bfloat16, float16"),
    "dpo.preference_loss=ipoo": ("dpo.preference_loss=ipoo", "did you mean ipo"),
    "reference.mode=memory": ("reference.mode=memory", "store, resident, none"),
    "reference={mode: none, model_name: a}": ("reference.model_name=a", "mode=store"),
    "reference={mode: resident, store_dir: a}": ("reference.store_dir", "mode=resident"),
    "reference.micro_batch_tokens=2": ("reference.micro_batch_tokens=2", "at least 3"),
    f"{MEGATRON}.optimizer.lr=nan": ("lr=nan", "finite"),
    f"{MEGATRON}.optimizer.lr=.nan": ("lr=nan", "finite"),
    f"{MEGATRON}.optimizer.lr=.inf": ("lr=inf", "finite"),
    f"{MEGATRON}.optimizer.adam_beta1=1": ("adam_beta1=1.0", "from 0 to 1"),
    "dpo.seed": ("'dpo.seed'", "not key=value"),
    "": ("''", "not key=value"),
    "=1": ("'=1'", "not key=value"),
    "dpo.seed=": ("'dpo.seed='", "no value"),
    "+dpo.seed=1": ("'+dpo.seed=1'", "write dpo.seed=1"),
    "++dpo.seed=1": ("'++dpo.seed=1'", "write dpo.seed=1"),
    "~dpo.seed": ("'~dpo.seed'", "dpo.seed"),
    "logger.wandb.name=${oc.env:HOME}": ("logger.wandb.name", "no resolvers"),
    "logger.wandb.name=${${dpo.preference_loss}:HOME}": ("logger.wandb.name", "no resolvers"),
    "dpo.seed=${oc.decode:'1'}": ("dpo.seed", "no resolvers"),
    "policy.tokenizer.chat_template_kwargs={a: ['${oc.env:HOME}']}": ("no resolvers",),
    "dpo.seed=${dpo.sed}": ("dpo.seed", "dpo.sed", "not found"),
    "dpo.seed=${policy.model_name}": ("dpo.seed", "embedded", "expected a whole number"),
    f"{MEGATRON}.enabled=false": (f"{MEGATRON}.enabled=false", "not built yet"),
    f"{MEGATRON}.context_parallel_size=2": ("context_parallel_size=2", "not built yet"),
    f"{MEGATRON}.expert_model_parallel_size=2": ("expert_model_parallel_size=2", "not built yet"),
    f"{MEGATRON}.virtual_pipeline_model_parallel_size=0": ("virtual_pipe", "at least 1"),
    f"{MEGATRON}.peft.enabled=true": ("peft.enabled=true", "LoRA is not built yet"),
    f"{MEGATRON}.peft.dim=8": ("peft.dim", "LoRA is not built yet"),
    f"{MEGATRON}.tp_comm_overlap=true": ("tp_comm_overlap", "rows of one length"),
    f"{MEGATRON}.fp8_cfg.enabled=true": ("fp8_cfg.enabled=true", "policy.fp8=hybrid"),
    "policy.fp8=e4m3": ("policy.fp8=e4m3", "off, hybrid, blockwise or null"),
    "policy.fp8=true": ("policy.fp8", "off, hybrid, blockwise or null"),
    f"{MEGATRON}.recompute_num_layers=0": ("recompute_num_layers=0", "at least 1"),
    f"{MEGATRON}.recompute_modules=[layernorm]": ("['layernorm']", "core_attn, mlp or both"),
    f"{MEGATRON}.recompute_modules=[]": ("recompute_modules=[]", "core_attn, mlp or both"),
    f"{MEGATRON}.recompute_modules=[mlp,mlp]": ("recompute_modules", "each once"),
    f"{MEGATRON}.recompute_modules=[mlp]": ("['mlp']", "recompute_granularity=selective"),
    "policy.kernel_impl=cuda": ("policy.kernel_impl=cuda", "auto, triton, torch"),
    "policy.kernel_cache_mib=-1": ("policy.kernel_cache_mib=-1", "at least 0"),
    "policy.kernel_cache_mib=nan": ("policy.kernel_cache_mib=nan", "expected a whole number"),
    "policy.kernel_cache_mib=.nan": ("policy.kernel_cache_mib=nan", "expected a whole number"),
    "policy.kernel_cache_mib=0.5": ("policy.kernel_cache_mib=0.5", "expected a whole number"),
    "policy.kernel_cache_mib=null": ("policy.kernel_cache_mib=null", "expected a whole number"),
    "policy.kernel_cache_mib=true": ("policy.kernel_cache_mib=true", "expected a whole number"),
    "data.share_prefix=all": ("data.share_prefix", "prompt"),
    "d\npo.s\u200beed=1": ("unknown key d\\npo.s\\u200beed",),
    "dpo.\x1b[31m=1": ("unknown key dpo.\\x1b[31m",),
    "data.prompt_key=\udcff": ("data.prompt_key=\\udcff", "half of a character"),
    "logger.log_dir=a\0b": ("logger.log_dir=a\\x00b", "NUL"),
    "data.ignore_columns=[[a]]": ("data.ignore_columns=[['a']]", "a list of text"),
    "data.ignore_columns=[1]": ("data.ignore_columns=[1]", "a list of text"),
    "dpo.loss_weights=[true]": ("dpo.loss_weights=[True]", "a list of numbers"),
    "x" * 5000 + "=1": ("unknown key xxx", "..."),
    "checkpointing.keep_top_k=0": ("checkpointing.keep_top_k=0", "at least 1"),
    "checkpointing.metric_name=accuracy": ("checkpointing.metric_name=accuracy", "validation/"),
}


@pytest.mark.parametrize("override", BAD_OVERRIDES)
def test_a_bad_override_is_one_clear_error(override):
    message = refusal(load, override)
    for part in BAD_OVERRIDES[override]:
        assert part in message


BAD_LAYOUTS = [
    (3, [f"{MEGATRON}.tensor_model_parallel_size=2"], ("tensor_model_parallel_size=2", "size 3")),
    (2, [f"{MEGATRON}.pipeline_model_parallel_size=3"], ("pipeline_model_parallel_size=3",)),
    (1, [f"{MEGATRON}.sequence_parallel=true"], ("sequence_parallel=true", "> 1")),
    (1, [f"{MEGATRON}.num_layers_in_last_pipeline_stage=2"], ("num_layers_in_last", "> 1")),
    (
        1,
        [f"{MEGATRON}.virtual_pipeline_model_parallel_size=2"],
        ("virtual_pipe", "=2 needs", "> 1"),
    ),
    (1, [f"{MEGATRON}.pipeline_model_parallel_layout=Et|tL"], ("layout=Et|tL needs", "> 1")),
    (2, ["policy.train_global_batch_size=1"], ("train_global_batch_size=1", "at least 2")),
    (2, ["cluster.gpus_per_node=2", "cluster.num_nodes=2"], ("is 4 processes", "but 2")),
    (2, ["cluster.gpus_per_node=8"], ("gpus_per_node=8", "--nproc-per-node 8")),
    (
        4,
        ["cluster.num_nodes=3"],
        ("cluster.num_nodes=3, but torchrun started 4 processes, 2 of them on this node",),
    ),
    (1, ["data.dataset_name=auto"], ("data.dataset_name=auto", "data.train_data_path")),
    (1, ["data.train_data_path=a.jsonl"], ("data.train_data_path", "data.dataset_name=auto")),
    (1, ["data.dataset_name=helpsteer3"], ("did you mean HelpSteer3?",)),
    (1, ["data.dataset_name=nvidia/HelpSteer3"], ("data.dataset_name=auto data.train_data_path",)),
    (
        1,
        [f"{MEGATRON}.scheduler.lr_decay_style=linear", f"{MEGATRON}.optimizer.min_lr=1"],
        ("min_lr=1.0 is above", "lr=0.00"),
    ),
    (
        1,
        [f"{MEGATRON}.scheduler.lr_decay_iters=5", f"{MEGATRON}.scheduler.lr_warmup_iters=5"],
        ("lr_warmup_iters=5", "lr_decay_iters=5"),
    ),
    (1, ["reference.mode=none"], ("reference.mode=none", "reference.mode=store", "simpo, orpo")),
]


@pytest.mark.parametrize(("world_size", "overrides", "parts"), BAD_LAYOUTS)
def test_sections_that_contradict_each_other(world_size, overrides, parts):
    config = load(*overrides)
    message = refusal(config.validate, world_size, min(world_size, 2))
    for part in parts:
        assert part in message


BAD_YAML = {
    "dpo:\n  seed: 1\n  val_period: 2\n  seed: 3\n": ("line 4", "duplicate key dpo.seed", "line 2"),
    "dpo: {seed: 1}\ndpo: {seed: 1}\n": ("line 2", "duplicate key dpo"),
    "- dpo\n": ("a.yaml", "a sequence"),
    "just words\n": ("a.yaml", "a scalar"),
    "# nothing\n": ("a.yaml", "nothing"),
    "dpo: {seed: 1\n": ("a.yaml line", "not valid YAML"),
    "a: 1\n---\nb: 2\n": ("a.yaml line", "not valid YAML"),
    "dpo: !!python/object/apply:os.getpid []\n": ("line 1", "not valid YAML"),
    "dpo: &a\n  seed: *a\n": ("line", "contains itself"),
    "dpo:\n  1: 2\n": ("line 2", "not text"),
    'dpo: {seed: "\\UFFFFFFFF"}': ("a.yaml", "not valid YAML"),
    '"a\\nb": 1\n': ("unknown key a\\nb",),
    "dpo:\n": ("dpo=null", "max_num_epochs"),
    "policy: {model_name: 8}\n": ("policy.model_name=8", "expected text", "quotes"),
    "policy: {lr: 1}\n": ("policy.lr", "a.yaml", f"did you mean {MEGATRON}.optimizer.lr?"),
    "logger: {wandb: {name: '${oc.env:HOME}'}}\n": ("logger.wandb.name", "no resolvers"),
    "dpo: {seed: 1:30}\n": ("dpo.seed=1:30", "whole number"),
    "dpo: {seed: 1}\n": ("policy.model_name is not set",),
    "policy: {precision: float32}\n": ("policy.model_name is not set",),
}


@pytest.mark.parametrize("text", BAD_YAML)
def test_a_bad_file_is_one_clear_error(text, yaml_file):
    message = refusal(load_config, yaml_file(text), [])
    for part in BAD_YAML[text]:
        assert part in message


def test_files_that_cannot_be_read(tmp_path):
    assert "no such file" in refusal(load_config, str(tmp_path / "none.yaml"), [])
    assert "did you mean" in refusal(load_config, str(CONFIGS / "dpo.yml"), [])
    assert "cannot be read" in refusal(load_config, str(tmp_path), [])
    (tmp_path / "latin.yaml").write_bytes(b"dpo: \xff\n")
    assert "cannot be read" in refusal(load_config, str(tmp_path / "latin.yaml"), [])


KEYS = all_keys(Config)
LEAVES = [key for key in KEYS if not any(other.startswith(f"{key}.") for other in KEYS)]


def test_hints_and_aliases_point_at_keys():
    assert set(ALIASES.values()) <= set(KEYS)
    assert not set(HINTS) & set(LEAVES)


HINTED = tuple(f"{key}." for key in HINTS)


@settings(max_examples=50, deadline=None)
@given(
    key=st.sampled_from([key for key in LEAVES if not key.startswith(HINTED)]),
    data=st.data(),
)
def test_one_wrong_letter_is_found(key, data):
    section, _, name = key.rpartition(".")
    place = data.draw(st.integers(0, len(name)))
    typo = f"{section}.{name[:place]}q{name[place:]}"
    assert suggest(Config, typo) == f"did you mean {key}?"
