"""A number that is not finite stops the run before the weights are touched, and says where."""

import json
import re
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.integration.harness import RunResult, run_train
from tests.integration.oracle import OracleConfig
from tests.integration.overrides import trainer_overrides


@pytest.fixture
def config(random_llama, random_rows) -> OracleConfig:
    return OracleConfig(
        model=random_llama, data=random_rows["random"], num_steps=6, batch_size=4, lr=1e-4
    )


def start(config: OracleConfig, tmp_path, *extra: str) -> tuple[RunResult, list[str]]:
    """The run, one pair a micro-batch on two ranks, and its lines of error."""
    overrides = [*trainer_overrides(config), "policy.train_micro_batch_size=1", *extra]
    overrides += ["checkpointing.enabled=true", "checkpointing.save_period=1"]
    overrides += [f"reference.store_dir={tmp_path / 'store'}"]
    result = run_train(overrides, log_dir=tmp_path / "run", nproc=2, fork=True)
    assert result.returncode != 0, result.describe()
    assert "Traceback" not in result.stderr, result.describe()
    errors = [line for line in result.stderr.splitlines() if line.startswith("error[70]: ")]
    assert errors, result.describe()
    return result, errors


def run(config: OracleConfig, tmp_path, *extra: str) -> tuple[RunResult, str]:
    """The run and its one line of error, which names the step."""
    result, errors = start(config, tmp_path, *extra)
    failed = max(result.train_steps()) + 1
    assert f"step {failed}: " in errors[0]
    assert f"The weights of step {failed - 1} are untouched" in errors[0]
    assert not (result.log_dir / "checkpoints" / f"step_{failed}").exists()
    assert not (result.log_dir / "hf").exists()
    return result, errors[0]


def broken_at_row_6(config: OracleConfig, tmp_path) -> OracleConfig:
    """One token's embedding is broken; only row 6, in the second batch, has that token."""
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    shutil.copytree(config.model, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    [token] = tokenizer("~", add_special_tokens=False).input_ids
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    rows = [{"prompt": f"the dog {i}", "chosen": " sings", "rejected": " runs"} for i in range(8)]
    rows[6]["chosen"] = " sings ~ green"
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return replace(config, model=str(tmp_path / "model"), data=str(path))


def test_a_loss_that_is_not_finite_names_rank_and_row(config, tmp_path):
    broken = broken_at_row_6(config, tmp_path)
    result, error = run(broken, tmp_path, f"reference.model_name={config.model}")
    assert list(result.train_steps()) == [1]
    assert "the loss is not finite" in error
    assert re.search(r"\(rank [01], micro-batch [01], log-probs of source row 6 chosen", error), (
        error
    )
    assert set(re.findall(r"row (\d+)", error)) == {"6"}, error


def test_a_reference_that_is_not_finite_is_named_before_training(config, tmp_path):
    result, errors = start(broken_at_row_6(config, tmp_path), tmp_path)
    assert result.metrics == []
    assert "source row 6, chosen side, are not finite" in errors[0]
    assert not list((tmp_path / "store").rglob("*.parquet")), "nothing of it may be kept"


def test_a_gradient_that_is_not_finite_is_named(config, tmp_path):
    _, error = run(replace(config, lr=1e30), tmp_path)
    assert "the gradient norm is not finite" in error
