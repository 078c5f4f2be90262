"""benchmarks.dpo_run: the GPU suite's DPO part, here with a tiny Llama on the CPU."""

import json
import math

import pytest
import yaml

from benchmarks import dpo_run, gpu_suite
from benchmarks.suite_parts import Part
from reinforcer_tp.config import load_config
from reinforcer_tp.data.tokenizer import load_tokenizer
from tests.integration.harness import REPOSITORY, run_train

STEPS = 3


@pytest.fixture(scope="module")
def suite_report(tmp_path_factory):
    """A suite of this part alone: (its JSON, its Markdown, the run's folder)."""
    root = tmp_path_factory.mktemp("suite")
    run = root / "dpo" / "run"
    arguments = ["--work", str(run.parent), "--shape", "tiny", "--steps", str(STEPS)]
    part = Part(
        name="dpo",
        arguments=["-m", "benchmarks.dpo_run", *arguments],
        limit_s=200,
        read=lambda _: dpo_run.summary(run, "tiny"),
    )
    code = gpu_suite.run_suite([part], root / "out", gpu_suite.about_machine(), 200)
    report = json.loads((root / "out.json").read_text())
    assert code == 0, report["parts"]["dpo"]
    return report, (root / "out.md").read_text(), run


def test_every_number_is_there(suite_report):
    report, table, run = suite_report
    found = report["parts"]["dpo"]["found"]
    assert found["num_steps"] == len(found["steps"]) == STEPS and found["wrong"] == []
    for key in ("step_s", "tokens_per_s", "pairs_per_s", "tflops_per_gpu", "peak_gib", "sweep_s"):
        assert found[key] > 0, key
    assert found["mfu"] is None, "the peak rate of this CPU is not known"
    assert found["first_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert all(math.isfinite(step["loss"]) for step in found["steps"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last_two = sorted(line["perf/step_s"] for line in lines)
    assert found["step_s"] in last_two or last_two[0] < found["step_s"] < last_two[-1]
    assert "| DPO first loss | 0.693147 | 0.693147 |" in table
    assert "| DPO MFU | - |" in table and "| DPO tokens/s |" in table
    assert (run / "config.yaml").is_file(), "the plan is made for it"


def test_a_wrong_first_loss_or_one_that_is_not_finite_is_told():
    assert dpo_run.wrong_losses([math.log(2), 0.5], "float32") == []
    assert dpo_run.wrong_losses([], "float32") == ["the run has left no step"]
    assert dpo_run.wrong_losses([0.7, 0.5], "float32") == [
        "the first loss is 0.700000, 0.693147 expected"
    ]
    assert dpo_run.wrong_losses([math.log(2) + 5e-3, 0.5], "bfloat16") == []
    assert dpo_run.wrong_losses([math.log(2), None], "bfloat16") == ["step 2: the loss is None"]


def test_the_gpus_run_is_a_llama_of_1_24_billion_with_usual_lengths(tmp_path):
    setting = dpo_run.SETTINGS["llama1b"]
    path = dpo_run.prepare(setting, tmp_path / "work", steps=20)
    checked = run_train([], flags=["--check"], config=path, nproc=None, log_dir=tmp_path / "run")
    assert checked.returncode == 0, checked.describe()
    config = load_config(str(path), [])
    assert config.policy.load_weights is False and config.dpo.max_num_steps == 20
    shape = json.loads((tmp_path / "work" / "model" / "config.json").read_text())
    assert shape == json.loads((REPOSITORY / dpo_run.LLAMA_1B).read_text())
    rows = [json.loads(line) for line in (tmp_path / "work" / "pairs.jsonl").open()]
    assert len(rows) == 20 * config.policy.train_global_batch_size
    tokenizer = load_tokenizer(config.policy.model_name)
    assert len(tokenizer) <= shape["vocab_size"]
    lengths = {key: [len(tokenizer(row[key]).input_ids) for row in rows] for key in rows[0]}
    means = {key: sum(values) / len(values) for key, values in lengths.items()}
    assert means["prompt"] == pytest.approx(400, rel=0.05)
    assert means["chosen"] == pytest.approx(300, rel=0.05)
    assert means["rejected"] == pytest.approx(300, rel=0.05)
    longest = max(p + max(c, r) for p, c, r in zip(*lengths.values(), strict=True))
    assert longest + 2 <= config.policy.max_total_sequence_length, "no pair is dropped"
    assert 2 * config.policy.max_total_sequence_length <= config.policy.micro_batch_tokens
    again = dpo_run.make_pairs(setting, 3, config.policy.model_name)
    assert again == rows[:3], "the same pairs on every machine"
    assert yaml.safe_load(path.read_text())["policy"]["model_name"] == config.policy.model_name
