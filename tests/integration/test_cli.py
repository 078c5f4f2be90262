"""`train.py --check`, the shipped configurations, and a user's own dataset class."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from tests.integration.harness import REPOSITORY, run_train
from tests.integration.oracle import OracleConfig, run_oracle
from tests.integration.overrides import trainer_overrides
from tests.integration.random_model import make_rows, write_jsonl

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
NEMO_RL_OVERRIDES = (  # as the documentation of NeMo-RL's DPO has them
    "cluster.gpus_per_node=8",
    "dpo.sft_loss_weight=0.1",
    "dpo.preference_average_log_probs=True",
    'logger.wandb.name="dpo-dev-8-gpu"',
)


def resolved(stdout: str) -> dict:
    """The configuration that --check printed; other lines may stand around it."""
    lines = stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if re.fullmatch(r"\w+:", line))
    return yaml.safe_load("\n".join(lines[start:]))


@pytest.mark.parametrize("config", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_every_shipped_config_passes_check(config, tmp_path):
    made = ["policy.model_name=embedded"] if config.stem == "dpo_smollm2" else []  # by make model
    result = run_train(made, flags=["--check"], config=config, nproc=None, log_dir=tmp_path / "run")
    assert result.returncode == 0, result.describe()
    assert not result.log_dir.exists(), "--check must write nothing"


def test_there_are_shipped_configs():
    assert "dpo" in [path.stem for path in CONFIGS]


def test_check_prints_the_resolved_config_with_nemo_rl_overrides(tmp_path):
    result = run_train(NEMO_RL_OVERRIDES, flags=["--check"], nproc=None, log_dir=tmp_path / "run")
    assert result.returncode == 0, result.describe()
    config = resolved(result.stdout)
    assert config["cluster"]["gpus_per_node"] == 8
    assert config["dpo"]["sft_loss_weight"] == 0.1
    assert config["dpo"]["preference_average_log_probs"] is True
    assert config["logger"]["wandb"]["name"].strip('"') == "dpo-dev-8-gpu"
    assert config["logger"]["log_dir"] == str(result.log_dir)
    assert config["policy"]["model_name"] == "embedded"  # from configs/dpo.yaml, the default
    assert not result.log_dir.exists()


def test_check_sees_a_model_that_does_not_fit(random_llama, tmp_path):
    result = run_train(
        [
            f"policy.model_name={random_llama}",
            "policy.max_total_sequence_length=128",
            "policy.megatron_cfg.tensor_model_parallel_size=4",
            "cluster.gpus_per_node=4",
        ],
        flags=["--check"],
        nproc=None,
        log_dir=tmp_path / "run",
    )
    assert result.returncode != 0, result.describe()
    assert "tensor_model_parallel_size=4" in result.stderr, result.describe()


def test_check_output_is_a_config_file(random_llama, tmp_path):
    first = run_train(
        [
            f"policy.model_name={random_llama}",
            "policy.max_total_sequence_length=128",
            "dpo.seed=7",
        ],
        flags=["--check"],
        nproc=None,
        log_dir=tmp_path / "run",
    )
    config = resolved(first.stdout)
    path = tmp_path / "resolved.yaml"
    path.write_text(yaml.safe_dump(config))
    second = run_train([], flags=["--check"], config=path, nproc=None, log_dir=tmp_path / "run")
    assert second.returncode == 0, second.describe()
    assert resolved(second.stdout) == config


def documented_dataset_class() -> str:
    """The docs' code block that defines CustomDPODataset."""
    text = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    return next(block for block in blocks if "class CustomDPODataset" in block)


def test_dataset_class_of_the_docs_trains_as_transformers_does(random_llama, tmp_path):
    """Strings under the keys of a dataset class are one user and one assistant message."""
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in make_rows(14)]
    renamed = [
        {"question": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in rows
    ]
    messages = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in rows
    ]
    (tmp_path / "documented_dataset.py").write_text(documented_dataset_class())
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    config = OracleConfig(
        model=random_llama,
        data=write_jsonl(tmp_path / "messages.jsonl", messages),
        chat_template=str(template),
        dtype=torch.float64,
        num_steps=2,
        batch_size=6,
    )
    file = write_jsonl(tmp_path / "renamed.jsonl", renamed)
    result = run_train(
        [
            *trainer_overrides(replace(config, data=file)),
            "data.dataset_name=documented_dataset.CustomDPODataset",
            f"data.val_data_path={file}",
            "data.prompt_key=question",
            "data.chosen_key=good",
            "data.rejected_key=bad",
        ],
        log_dir=tmp_path / "run",
        nproc=None,
        env={"PYTHONPATH": str(tmp_path)},
        fork=True,
    )
    assert result.returncode == 0, result.describe()
    assert sorted(result.train_steps()) == [1, 2]
    for got, want in zip(result.train_steps().values(), run_oracle(config)):
        for name in ("loss", "logps/chosen", "logps/rejected", "grad_norm"):
            assert got[name] == pytest.approx(want[name], rel=1e-4), (name, result.describe())


def test_help_names_the_config_option(tmp_path):
    result = run_train([], flags=["--help"], nproc=None, log_dir=tmp_path / "run")
    assert result.returncode == 0, result.describe()
    assert "--config" in result.stdout and "--check" in result.stdout
    assert not Path(tmp_path / "run").exists()
