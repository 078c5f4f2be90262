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
    """Overrides of a run with checkpoints: five batches an epoch."""
    return [
        *trainer_overrides(replace(config, num_steps=steps)),
        "checkpointing.enabled=true",
        "checkpointing.save_period=2",
        "checkpointing.metric_name=null",
        *extra,
    ]


def succeed(overrides: list[str], log_dir: Path, nproc: int = 2) -> RunResult:
    result = run_train(overrides, log_dir=log_dir, nproc=nproc, fork=True)
    assert result.returncode == 0, result.describe()
    return result


def assert_same_steps(result: RunResult, straight: RunResult) -> None:
    """Every step once, in order, with the numbers of the uninterrupted run, bit for bit.

    Both read one store: two sweeps may pack other pairs together, and round otherwise.
    """
    steps = [line["step"] for line in result.metrics if "train/loss" in line]
    assert steps == list(range(1, len(straight.train_steps()) + 1))
    for step, want in straight.train_steps().items():
        assert result.train_steps()[step] == want, f"step {step}"


def test_resumed_run_equals_an_uninterrupted_one(config, tmp_path):
    """3 of 7 steps, then the rest; step 6 begins the second epoch, which has its own order."""
    store = f"reference.store_dir={tmp_path}/store"
    extra = ("data.shuffle=true", store, *LAYOUTS["tp2-sequence-parallel"])
    straight = succeed(training(config, 7, *extra), tmp_path / "straight")
    first = succeed(training(config, 3, *extra), tmp_path / "resumed")
    assert sorted(first.train_steps()) == [1, 2, 3]
    resumed = succeed(training(config, 7, *extra), tmp_path / "resumed")
    assert_same_steps(resumed, straight)


@pytest.mark.parametrize("layout", ["dp2-distributed-optimizer", "pp2"])
def test_resumed_run_and_its_export_equal_transformers(layout, config, tmp_path):
    """3 of 6 steps, then the rest: the oracle, never interrupted, reaches the same weights.

    Adam turns a gradient that is rounding only into a whole step either way, so a few single
    weights may differ by up to two steps a turn; hence the bound on the mean of the difference.
    """
    held_out = write_jsonl(tmp_path / "held_out.jsonl", make_rows(7, seed=5))
    extra = (
        *LAYOUTS[layout],
        "checkpointing.export_hf=true",
        f"data.val_data_path={held_out}",
        "dpo.val_period=100",
        "dpo.val_at_start=true",
        "dpo.val_at_end=true",
        "dpo.val_batches=0",
        "dpo.val_global_batch_size=4",
    )
    succeed(training(config, 3, *extra), tmp_path / "run")
    result = succeed(training(config, 6, *extra), tmp_path / "run")
    trained, history = train_oracle(replace(config, num_steps=6))
    assert sorted(result.train_steps()) == [1, 2, 3, 4, 5, 6]
    for got, want in zip(result.train_steps().values(), history):
        for name in ("loss", "logps/chosen", "logps/rejected", "grad_norm"):
            assert got[name] == pytest.approx(want[name], rel=1e-4), name
    folder = tmp_path / "run" / "hf"
    assert_same_weights(folder, trained, config.model)
    assert_same_validation(result, 6, folder, replace(config, data=held_out))
    old, new = (AutoTokenizer.from_pretrained(path) for path in (config.model, folder))
    assert new("the cat: never").input_ids == old("the cat: never").input_ids
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"


def assert_same_weights(folder: Path, trained: torch.nn.Module, start_folder: str) -> None:
    exported = AutoModelForCausalLM.from_pretrained(folder)
    assert exported.dtype == torch.float32
    start = AutoModelForCausalLM.from_pretrained(start_folder).state_dict()
    weights, wanted = exported.state_dict(), trained.state_dict()
    assert weights.keys() == wanted.keys()
    for name, weight in weights.items():
        move = (wanted[name] - start[name].double()).abs().mean()
        error = (weight.double() - wanted[name]).abs().mean()
        assert error <= 1e-3 * move, f"{name}: mean error {error:.2e} of a mean move {move:.2e}"


def assert_same_validation(
    result: RunResult, last_step: int, folder: Path, config: OracleConfig
) -> None:
    """The run's own validation, at both ends, equals transformers' on the folders on disk."""
    pairs = [pair for pair in load_pairs(config) if pair.weight > 0]
    sums = {}
    for name in (config.model, folder):
        model = AutoModelForCausalLM.from_pretrained(name).double().eval()
        with torch.no_grad():
            sums[name] = torch.stack([torch.stack(pair_logps(model, pair)) for pair in pairs])
    before, after = (result.validations()[step] for step in (0, last_step))
    for validation, name in ((before, config.model), (after, folder)):
        chosen, rejected = sums[name].mean(0).tolist()
        assert validation["logps/chosen"] == pytest.approx(chosen, rel=1e-5)
        assert validation["logps/rejected"] == pytest.approx(rejected, rel=1e-5)
    rewards = config.beta * (sums[folder] - sums[config.model])
    margins = rewards[:, 0] - rewards[:, 1]
    weights = torch.tensor([pair.weight for pair in pairs])
    losses = -torch.nn.functional.logsigmoid(margins) * weights
    assert before["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert before["loss"] == pytest.approx(math.log(2) * float(weights.mean()), abs=1e-5)
    assert after["rewards/margins"] == pytest.approx(float(margins.mean()), abs=1e-5)
    assert after["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    accuracy = float((margins > 0).double().mean())
    assert after["rewards/accuracies"] == pytest.approx(accuracy)


def test_killed_run_goes_on_from_its_last_checkpoint(config, tmp_path):
    """Killed without warning; steps after the checkpoint are done and written again, not twice."""
    store = f"reference.store_dir={tmp_path}/store"
    overrides = training(config, 40, "data.shuffle=true", store)
    straight = succeed(overrides, tmp_path / "straight", nproc=1)
    checkpoints = tmp_path / "killed" / "checkpoints"
    killed = run_train(
        overrides, log_dir=tmp_path / "killed", kill_when=(checkpoints / "step_4").exists
    )
    assert killed.returncode != 0, killed.describe()
    assert 4 <= killed.metrics[-1]["step"] < 40, "killed too late to show anything"
    assert_same_steps(succeed(overrides, tmp_path / "killed", nproc=1), straight)
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
