"""`make demo`, as the Makefile has it, and what transformers thinks of the model it leaves."""

import json
import math
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.integration.harness import REPOSITORY, run_train


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's overrides, run from another log_dir; its files are made anew."""
    text = subprocess.run(
        ["make", "-n", "demo"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.replace("\\\n", " ")
    [command] = [line for line in text.splitlines() if "reinforcer_tp/train.py" in line]
    words = shlex.split(command.split(" logger.log_dir=")[0])
    [nproc] = [int(words[i + 1]) for i, word in enumerate(words) if word == "--nproc-per-node"]
    config = words[words.index("--config") + 1]
    overrides = words[words.index("--config") + 2 :]
    cache = tmp_path_factory.mktemp("cache")
    result = run_train(
        overrides,
        nproc=nproc,
        config=config,
        log_dir=tmp_path_factory.mktemp("demo") / "run",
        env={"REINFORCER_TP_CACHE": str(cache)},
        timeout_s=400,
    )
    assert result.returncode == 0, result.describe()
    return result, cache


def test_the_demo_learns(demo):
    result, _ = demo
    steps = result.train_steps()
    assert steps[1]["preference_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert steps[1]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    validations = result.validations()
    assert validations[0]["preference_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert validations[max(validations)]["rewards/accuracies"] >= 0.9


def test_the_demo_says_where_things_are(demo):
    result, _ = demo
    for said in (str(result.log_dir), str(result.log_dir / "hf"), "dpo.max_num_steps="):
        assert said in result.stdout
    written = {path.name for path in result.log_dir.iterdir()}
    expected = {"config.yaml", "environment.json", "metrics.jsonl", "data_report.json"}
    assert written >= expected | {"tensorboard", "checkpoints", "hf"}
    report = json.loads((result.log_dir / "data_report.json").read_text())
    assert report["train"]["rows_read"] == report["train"]["used"] == 960


def side_logps(folder: Path, rows: list[dict]) -> torch.Tensor:
    """(rows, 2) log-prob sums of chosen and rejected, by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sums = []
    for row in rows:
        for side in ("chosen", "rejected"):
            prompt = tokenizer(row["prompt"]).input_ids
            whole = [*tokenizer(row["prompt"] + row[side]).input_ids, tokenizer.eos_token_id]
            assert whole[: len(prompt)] == prompt
            with torch.no_grad():
                logps = model(torch.tensor([whole])).logits[0, :-1].log_softmax(-1)
            picked = logps.gather(1, torch.tensor(whole)[1:, None])[len(prompt) - 1 :]
            sums.append(picked.sum())
    return torch.stack(sums).view(-1, 2)


def test_the_exported_model_is_the_trained_one(demo):
    """Rewards of held-out pairs, from the exported and the first model by transformers."""
    result, cache = demo
    [embedded] = [path for path in cache.iterdir() if (path / "model").is_dir()]
    lines = (embedded / "validation.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    trained = side_logps(result.log_dir / "hf", rows)
    before = side_logps(embedded / "model", rows)
    rewards = 0.1 * (trained - before)
    margins = rewards[:, 0] - rewards[:, 1]
    last = result.validations()[60]
    assert last["num_pairs"] == len(rows)
    assert last["rewards/margins"] == pytest.approx(margins.mean().item(), abs=1e-4)
    assert last["rewards/accuracies"] == pytest.approx((margins > 0).float().mean().item())
    assert last["logps/chosen"] == pytest.approx(trained[:, 0].mean().item(), rel=1e-5)
