"""Bad input: one clear line of error within seconds on every rank, and nothing half-written."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.integration.harness import RunResult, run_train
from tests.integration.oracle import OracleConfig
from tests.integration.overrides import trainer_overrides
from tests.integration.random_model import make_rows, write_jsonl

SECONDS = 60.0  # imports alone take up to 15 on a loaded machine with two cores
MEGATRON = "policy.megatron_cfg"
# These start as a user starts them; the others are forks of a process that has done the imports.
REAL_STARTS = {"mistyped-key", "missing-data-file", "two-misshapen-tensor"}


@dataclass(frozen=True, kw_only=True)
class Bad:
    """One mistake: extra overrides, or a function that writes bad files and returns overrides."""

    overrides: tuple[str, ...] = ()
    files: Callable[[Path, Path], list[str]] | None = None  # (scratch folder, good model)
    says: tuple[str, ...]  # all of it in one line of stderr
    nproc: int | None = None  # None = not distributed


def edited_model(folder: Path, model: Path, *, tensors=None, config=None, tokenizer=None):
    """A copy of the model folder with its parts changed by functions from dict to dict."""
    shutil.copytree(model, folder / "model")
    path = folder / "model" / "model.safetensors"
    if tensors is not None:
        save_file(tensors(load_file(path)), path, metadata={"format": "pt"})
    for name, edit in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        if edit is not None:
            path = folder / "model" / name
            path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    return [f"policy.model_name={folder / 'model'}"]


def without(*keys: str) -> Callable[[dict], dict]:
    def edit(source: dict) -> dict:
        missing = set(keys) - set(source)
        assert not missing, f"nothing to take away: {missing}"
        return {key: value for key, value in source.items() if key not in keys}

    return edit


def missing_tensor(folder: Path, model: Path) -> list[str]:
    return edited_model(folder, model, tensors=without("model.layers.4.mlp.up_proj.weight"))


def misshapen_tensor(folder: Path, model: Path) -> list[str]:
    name = "model.layers.1.self_attn.k_proj.weight"
    return edited_model(folder, model, tensors=lambda t: t | {name: t[name][:-1].clone()})


def no_weights(folder: Path, model: Path) -> list[str]:
    overrides = edited_model(folder, model)
    (folder / "model" / "model.safetensors").unlink()
    return overrides


def unknown_architecture(folder: Path, model: Path) -> list[str]:
    change = {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    return edited_model(folder, model, config=lambda c: c | change)


def no_eos(folder: Path, model: Path) -> list[str]:
    return edited_model(folder, model, tokenizer=without("eos_token"))


def data(*rows: dict, path_key: str = "train_data_path", tail: str = "", name: str = "bad.jsonl"):
    """Eight good rows, then the bad ones."""

    def write(folder: Path, model: Path) -> list[str]:
        path = write_jsonl(folder / name, [*make_rows(8), *rows])
        with open(path, "a", encoding="utf-8") as file:
            file.write(tail)
        return [f"data.{path_key}={path}"]

    return write


def with_columns(**columns: object):
    """Twelve good rows with more columns."""

    def write(folder: Path, model: Path) -> list[str]:
        path = write_jsonl(folder / "more.jsonl", [row | columns for row in make_rows(12)])
        return [f"data.train_data_path={path}"]

    return write


def reference_of_another_vocabulary(folder: Path, model: Path) -> list[str]:
    def longer(tensors: dict) -> dict:
        names = ("model.embed_tokens.weight", "lm_head.weight")
        more = {n: torch.cat([tensors[n], tensors[n][:8]]) for n in names if n in tensors}
        return tensors | more

    edited_model(
        folder, model, tensors=longer, config=lambda c: c | {"vocab_size": c["vocab_size"] + 8}
    )
    return [f"reference.model_name={folder / 'model'}"]


def chat_rows(folder: Path, model: Path) -> list[str]:
    def say(role: str, text: str) -> list[dict]:
        return [{"role": role, "content": text}]

    rows = [
        {
            "prompt": say("user", row["prompt"]),
            "chosen": say("assistant", row["chosen"]),
            "rejected": say("assistant", row["rejected"]),
        }
        for row in make_rows(9)
    ]
    return [f"data.train_data_path={write_jsonl(folder / 'chat.jsonl', rows)}"]


def class_without_formatted_ds(folder: Path, model: Path) -> list[str]:
    (folder / "custom_without.py").write_text(
        "class Custom:\n"
        "    def __init__(self, train_data_path, val_data_path, prompt_key, chosen_key,\n"
        "                 rejected_key):\n"
        "        self.task_spec = None\n"
    )
    return ["data.dataset_name=custom_without.Custom"]


def duplicate_yaml_key(folder: Path, model: Path) -> list[str]:
    path = folder / "twice.yaml"
    path.write_text("dpo:\n  seed: 1\n  seed: 2\n")
    return [f"--config={path}"]


def two(**kwargs) -> Bad:
    return Bad(nproc=2, **kwargs)


CASES = {
    "mistyped-key": Bad(
        overrides=("dpo.reference_policy_kl_penatly=0.1",),
        says=("dpo.reference_policy_kl_penatly", "dpo.reference_policy_kl_penalty"),
    ),
    "wrong-type": Bad(
        overrides=("policy.train_global_batch_size=many",),
        says=("policy.train_global_batch_size", "many"),
    ),
    "wrong-choice": Bad(
        overrides=("policy.precision=float8",), says=("policy.precision", "float8", "bfloat16")
    ),
    "duplicate-yaml-key": Bad(files=duplicate_yaml_key, says=("twice.yaml", "seed")),
    "no-such-config": Bad(overrides=("--config=/nowhere/x.yaml",), says=("/nowhere/x.yaml",)),
    "not-key-value": Bad(overrides=("dpo.seed",), says=("dpo.seed",)),
    "world-smaller-than-tp": Bad(
        overrides=(f"{MEGATRON}.tensor_model_parallel_size=2",),
        says=("tensor_model_parallel_size=2", "torchrun"),
    ),
    "cluster-is-not-what-was-started": Bad(
        overrides=("cluster.gpus_per_node=8",), says=("cluster.gpus_per_node=8", "1")
    ),
    "context-parallel": Bad(
        overrides=(f"{MEGATRON}.context_parallel_size=2",),
        says=(f"{MEGATRON}.context_parallel_size", "not built yet"),
    ),
    "expert-parallel": Bad(
        overrides=(f"{MEGATRON}.expert_model_parallel_size=2",),
        says=(f"{MEGATRON}.expert_model_parallel_size", "not built yet"),
    ),
    "lora": Bad(
        overrides=(f"{MEGATRON}.peft.enabled=true",), says=("peft.enabled", "not built yet")
    ),
    "fp8": Bad(
        overrides=(f"{MEGATRON}.fp8_cfg.enabled=true",),
        says=("fp8_cfg.enabled", "policy.fp8=hybrid"),
    ),
    "fp8-without-a-gpu": Bad(
        overrides=("policy.fp8=hybrid", "policy.precision=bfloat16"),
        says=("policy.fp8=hybrid needs a CUDA device", "policy.fp8=off"),
    ),
    "missing-data-file": Bad(
        overrides=("data.train_data_path=/nowhere/pairs.jsonl",),
        says=("/nowhere/pairs.jsonl", "data.train_data_path"),
    ),
    "missing-validation-file": Bad(
        overrides=("data.val_data_path=/nowhere/held_out.jsonl", "dpo.val_period=1"),
        says=("/nowhere/held_out.jsonl", "data.val_data_path"),
    ),
    "broken-json": Bad(files=data(tail='{"prompt": "a", "chosen"\n'), says=("bad.jsonl", "9")),
    "missing-key": Bad(files=data({"prompt": "a", "chosen": "b"}), says=("bad.jsonl", "rejected")),
    "content-is-no-string": Bad(
        files=data({"prompt": "a", "chosen": 7, "rejected": "b"}), says=("chosen", "7")
    ),
    "smaller-than-a-batch": Bad(
        overrides=("policy.train_global_batch_size=100",),
        says=("policy.train_global_batch_size", "100", "12"),
    ),
    "every-weight-is-zero": Bad(files=with_columns(weight=0.0), says=("weight 0",)),
    "margins-that-the-loss-does-not-use": Bad(
        files=with_columns(margin=0.5),
        overrides=("dpo.preference_loss=ipo",),
        says=("margin", "ipo", "data.ignore_columns=[margin]"),
    ),
    "reference-columns-and-a-resident-reference": Bad(
        files=with_columns(ref_chosen_logps=-3.0, ref_rejected_logps=-4.0),
        overrides=("reference.mode=resident",),
        says=("ref_chosen_logps", "reference.mode=resident", "data.ignore_columns"),
    ),
    "reference-columns-and-single-tokens": Bad(
        files=with_columns(ref_chosen_logps=-3.0, ref_rejected_logps=-4.0),
        overrides=("dpo.ld_alpha=0.5",),
        says=("ref_chosen_logps", "dpo.ld_alpha"),
    ),
    "a-reference-of-another-vocabulary": Bad(
        files=reference_of_another_vocabulary, says=("embeds", "reference.model_name")
    ),
    "chat-rows-without-template": Bad(files=chat_rows, says=("policy.tokenizer.chat_template",)),
    "no-eos": Bad(files=no_eos, says=("EOS",)),
    "no-such-class": Bad(
        overrides=("data.dataset_name=nowhere.to.be.Found",), says=("nowhere.to.be.Found",)
    ),
    "class-without-formatted-ds": Bad(
        files=class_without_formatted_ds, says=("custom_without.Custom", "formatted_ds")
    ),
    "no-such-model": Bad(
        overrides=("policy.model_name=/nowhere/model",),
        says=("/nowhere/model", "policy.model_name"),
    ),
    "missing-tensor": Bad(files=missing_tensor, says=("model.layers.4.mlp.up_proj.weight",)),
    "misshapen-tensor": Bad(
        files=misshapen_tensor, says=("model.layers.1.self_attn.k_proj.weight", "15", "16")
    ),
    "no-weights": Bad(files=no_weights, says=("model", "safetensors")),
    "unknown-architecture": Bad(
        files=unknown_architecture, says=("MambaForCausalLM", "LlamaForCausalLM")
    ),
    "two-world-does-not-fit": two(
        overrides=(f"{MEGATRON}.tensor_model_parallel_size=3",),
        says=("tensor_model_parallel_size=3", "2"),
    ),
    "two-tp-does-not-divide-kv-groups": two(
        files=lambda folder, model: edited_model(
            folder, model, config=lambda c: c | {"num_key_value_heads": 3}
        ),
        overrides=(f"{MEGATRON}.tensor_model_parallel_size=2",),
        says=("tensor_model_parallel_size=2", "3"),
    ),
    "two-layers-do-not-divide": two(
        overrides=(f"{MEGATRON}.pipeline_model_parallel_size=2",),
        says=("pipeline_model_parallel_size", "5", "num_layers_in_first_pipeline_stage"),
    ),
    "two-broken-json": two(files=data(tail="nonsense\n"), says=("bad.jsonl", "9")),
    "two-missing-tensor-of-one-stage": two(
        files=missing_tensor,
        overrides=(
            f"{MEGATRON}.pipeline_model_parallel_size=2",
            f"{MEGATRON}.num_layers_in_first_pipeline_stage=3",
        ),
        says=("model.layers.4.mlp.up_proj.weight",),
    ),
    "two-misshapen-tensor": two(
        files=misshapen_tensor,
        overrides=(f"{MEGATRON}.tensor_model_parallel_size=2",),
        says=("model.layers.1.self_attn.k_proj.weight", "15", "16"),
    ),
}


@pytest.fixture(scope="module")
def results(request, random_llama, tmp_path_factory) -> dict[str, RunResult]:
    """Every collected case's run, two at a time."""
    wanted = [
        item.callspec.params["name"]
        for item in request.session.items
        if getattr(item, "function", None) is test_bad_input_is_refused
    ]
    folders = {name: tmp_path_factory.mktemp(name) for name in wanted}

    def run(name: str) -> RunResult:
        fork = name not in REAL_STARTS
        return run_case(CASES[name], Path(random_llama), folders[name], fork=fork)

    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(wanted, pool.map(run, wanted)))


def run_case(case: Bad, model: Path, folder: Path, *, fork: bool) -> RunResult:
    good = OracleConfig(
        model=str(model),
        data=write_jsonl(folder / "good.jsonl", make_rows(12)),
        batch_size=4,
        num_steps=2,
    )
    overrides = [*trainer_overrides(good), *case.overrides]
    if case.files is not None:
        overrides += case.files(folder, model)
    return run_train(
        [text for text in overrides if not text.startswith("--")],
        flags=[text for text in overrides if text.startswith("--")],
        log_dir=folder / "run",
        nproc=case.nproc,
        timeout_s=SECONDS,
        env={"PYTHONPATH": str(folder)},
        fork=fork,
    )


@pytest.mark.timeout(1200)  # the first one waits for the runs of all
@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused(name, results):
    under_torchrun = CASES[name].nproc is not None and name in REAL_STARTS
    assert_refused(results[name], CASES[name], under_torchrun)


def assert_refused(result: RunResult, case: Bad, under_torchrun: bool) -> None:
    assert result.returncode not in (0, None), result.describe()
    lines = [line for line in result.stderr.splitlines() if all(part in line for part in case.says)]
    assert lines, f"no line of stderr has all of {case.says}\n{result.describe()}"
    if not under_torchrun:  # which adds its own report
        assert len(lines) == 1, result.describe()
        assert "Traceback" not in result.stderr, result.describe()
    files = {str(p.relative_to(result.log_dir)) for p in result.log_dir.rglob("*") if p.is_file()}
    records = ("lock", "0001/attempt.json", "0001/exit.json")
    left = files - {"heartbeat", *(f"attempts/{name}" for name in records)}
    assert not left, f"half-written output: {left}\n{result.describe()}"
    if files:  # a mistake in the configuration is found before anything is written
        ended = json.loads((result.log_dir / "attempts/0001/exit.json").read_text())
        assert ended["code"] in (65, 78) and f"error[{ended['code']}]" in lines[0]
        assert ended["code"] == result.returncode or case.nproc is not None
