"""Checkpoints, resume and the exported model, through the real train.py under torchrun."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.integration.harness import RunResult, run_train
from tests.integration.oracle import OracleConfig, load_pairs, pair_logps, train_oracle
from tests.integration.overrides import trainer_overrides
from tests.integration.random_model import make_rows, write_jsonl

MEGATRON = "policy.megatron_cfg"
# A resumed run sweeps the reference over the rows that are left, so in other micro-batches: the
# rewards (beta = 0.1 times sums of about 50 nats) differ by float32 rounding of those sums.
REFERENCE_NOISE = 1e-6
LAYOUTS = {
    "tp2-sequence-parallel": (
        f"{MEGATRON}.tensor_model_parallel_size=2",
        f"{MEGATRON}.sequence_parallel=true",
    ),
    "dp2-distributed-optimizer": (),
    "pp2": (
        f"{MEGATRON}.pipeline_model_parallel_size=2",
        f"{MEGATRON}.num_layers_in_first_pipeline_stage=3",
        "policy.train_micro_batch_size=2",
    ),
}


@pytest.fixture(scope="module")
def config(random_llama, tmp_path_factory) -> OracleConfig:
    folder = tmp_path_factory.mktemp("resume")
    return OracleConfig(
        model=random_llama,
        data=write_jsonl(folder / "pairs.jsonl", make_rows(20)),
        dtype=torch.float64,
        batch_size=4,
        lr=3e-4,
    )


def training(config: OracleConfig, steps: int, *extra: str) -> list[str]:
    """Overrides of a run with checkpoints; shuffled, five batches an epoch."""
    return [
        *trainer_overrides(replace(config, num_steps=steps)),
        "data.shuffle=true",
        "checkpointing.enabled=true",
        "checkpointing.save_period=2",
        "checkpointing.metric_name=null",
        *extra,
    ]


def succeed(overrides: list[str], log_dir: Path, nproc: int = 2) -> RunResult:
    result = run_train(overrides, log_dir=log_dir, nproc=nproc)
    assert result.returncode == 0, result.describe()
    return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resumed_run_equals_an_uninterrupted_one(layout, config, tmp_path):
    """3 of 7 steps, then the rest: step 6 begins the second epoch, in its own order."""
    extra = LAYOUTS[layout]
    straight = succeed(training(config, 7, *extra), tmp_path / "straight")
    first = succeed(training(config, 3, *extra), tmp_path / "resumed")
    assert sorted(first.train_steps()) == [1, 2, 3]
    resumed = succeed(training(config, 7, *extra), tmp_path / "resumed")
    steps = [line["step"] for line in resumed.metrics if "train/loss" in line]
    assert steps == list(range(1, 8)), "every step once, in order"
    for step, want in straight.train_steps().items():
        got = resumed.train_steps()[step]
        assert got == pytest.approx(want, rel=1e-6, abs=REFERENCE_NOISE), f"step {step}"


def test_killed_run_goes_on_from_its_last_checkpoint(config, tmp_path):
    """Killed without warning; steps after the checkpoint are done and written again, not twice."""
    overrides = training(config, 40)
    straight = succeed(overrides, tmp_path / "straight", nproc=1)
    checkpoints = tmp_path / "killed" / "checkpoints"
    killed = run_train(
        overrides, log_dir=tmp_path / "killed", kill_when=(checkpoints / "step_4").exists
    )
    assert killed.returncode != 0, killed.describe()
    assert 4 <= killed.metrics[-1]["step"] < 40, "killed too late to show anything"
    resumed = succeed(overrides, tmp_path / "killed", nproc=1)
    steps = [line["step"] for line in resumed.metrics if "train/loss" in line]
    assert steps == list(range(1, 41)), "every step once, in order"
    for step, want in straight.train_steps().items():
        got = resumed.train_steps()[step]
        assert got == pytest.approx(want, rel=1e-6, abs=REFERENCE_NOISE), f"step {step}"
    assert json.loads((tmp_path / "killed" / "data_report.json").read_text())


def test_finished_run_and_another_config(config, tmp_path):
    """Started again it says so, exits 0, names what extends it; another config is refused."""
    overrides = training(config, 2)
    succeed(overrides, tmp_path / "run", nproc=1)
    before = contents(tmp_path / "run")
    again = run_train(overrides, log_dir=tmp_path / "run", nproc=None)
    assert again.returncode == 0, again.describe()
    assert "dpo.max_num_steps" in again.stdout + again.stderr, again.describe()
    assert contents(tmp_path / "run")["metrics.jsonl"] == before["metrics.jsonl"]
    after_again = contents(tmp_path / "run")
    other = run_train([*overrides, "dpo.seed=43"], log_dir=tmp_path / "run", nproc=None)
    assert other.returncode != 0, other.describe()
    assert "Traceback" not in other.stderr, other.describe()
    refusals = [line for line in other.stderr.splitlines() if str(tmp_path / "run") in line]
    assert len(refusals) == 1 and "logger.log_dir" in refusals[0], other.describe()
    assert contents(tmp_path / "run") == after_again, "a refused run must not touch the folder"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_folder_of_something_else_is_refused(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    result = run_train(training(config, 2), log_dir=tmp_path / "run", nproc=None)
    assert result.returncode != 0, result.describe()
    assert contents(tmp_path / "run") == {"thesis.txt": b"mine"}


@pytest.mark.parametrize("layout", ["tp2-sequence-parallel", "pp2"])
def test_exported_folder_is_the_model_that_was_trained(layout, config, tmp_path):
    """Weights against the oracle's own; held-out log-probs against transformers on the export.

    Adam turns a gradient that is rounding only into a whole step either way, so a few single
    weights may differ by up to two steps a turn; hence the bound on the mean and the log-probs.
    """
    config = replace(config, num_steps=4)
    held_out = write_jsonl(tmp_path / "held_out.jsonl", make_rows(7, seed=5))
    result = succeed(
        [
            *trainer_overrides(config),
            *LAYOUTS[layout],
            "checkpointing.export_hf=true",
            f"data.val_data_path={held_out}",
            "dpo.val_period=100",
            "dpo.val_at_start=true",
            "dpo.val_at_end=true",
            "dpo.val_batches=0",
            "dpo.val_global_batch_size=4",
        ],
        tmp_path / "run",
    )
    folder = tmp_path / "run" / "hf"
    exported = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert exported.dtype == torch.float32
    trained, _ = train_oracle(config)
    start = AutoModelForCausalLM.from_pretrained(config.model).state_dict()
    weights, wanted = exported.state_dict(), trained.state_dict()
    assert weights.keys() == wanted.keys()
    for name, weight in weights.items():
        move = (wanted[name] - start[name].double()).abs().mean()
        error = (weight.double() - wanted[name]).abs().mean()
        assert error <= 1e-3 * move, f"{name}: mean error {error:.2e} of a mean move {move:.2e}"
    check_validation(result, folder, replace(config, data=held_out))
    old, new = (AutoTokenizer.from_pretrained(path) for path in (config.model, folder))
    assert new("the cat: never").input_ids == old("the cat: never").input_ids
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"


def check_validation(result: RunResult, folder: Path, config: OracleConfig) -> None:
    """The run's own validation, before and after, equals transformers' on the folders on disk."""
    pairs = [pair for pair in load_pairs(config) if pair.weight > 0]
    sums = {}
    for name in (config.model, folder):
        model = AutoModelForCausalLM.from_pretrained(name).double().eval()
        with torch.no_grad():
            sums[name] = torch.stack([torch.stack(pair_logps(model, pair)) for pair in pairs])
    validations = result.validations()
    assert sorted(validations) == [0, 4]
    for step, name in ((0, config.model), (4, folder)):
        chosen, rejected = sums[name].mean(0).tolist()
        assert validations[step]["logps/chosen"] == pytest.approx(chosen, rel=1e-5)
        assert validations[step]["logps/rejected"] == pytest.approx(rejected, rel=1e-5)
    rewards = config.beta * (sums[folder] - sums[config.model])
    margins = rewards[:, 0] - rewards[:, 1]
    weights = torch.tensor([pair.weight for pair in pairs])
    losses = -torch.nn.functional.logsigmoid(margins) * weights
    assert validations[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert validations[4]["rewards/margins"] == pytest.approx(float(margins.mean()), abs=1e-5)
    assert validations[4]["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert validations[4]["rewards/accuracies"] == pytest.approx(
        float((margins > 0).double().mean())
    )
    assert validations[0]["loss"] == pytest.approx(math.log(2) * float(weights.mean()), abs=1e-5)
