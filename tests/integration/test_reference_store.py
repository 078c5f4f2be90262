"""Where the reference log-probs come from, through the real train.py: the numbers stay the same."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reinforcer_tp.data.tokenized import TokenizedPair, TokenizedSet
from reinforcer_tp.reference.store import ReferenceStore, read_description
from tests.integration.harness import RunResult, run_train
from tests.integration.oracle import OracleConfig, OraclePair, load_model, load_pairs, pair_logps
from tests.integration.overrides import trainer_overrides
from tests.integration.random_model import make_rows, write_jsonl

STEPS, BATCH = 4, 4  # of the first run: all rows once
TP2 = (
    "policy.megatron_cfg.tensor_model_parallel_size=2",
    "policy.megatron_cfg.sequence_parallel=true",
)


@pytest.fixture(scope="module")
def config(random_llama, tmp_path_factory) -> OracleConfig:
    """A model folder of this module's own: one test changes it for a while."""
    folder = tmp_path_factory.mktemp("reference")
    shutil.copytree(random_llama, folder / "model")
    return OracleConfig(
        model=str(folder / "model"),
        data=write_jsonl(folder / "pairs.jsonl", make_rows(STEPS * BATCH)),
        num_steps=STEPS,
        batch_size=BATCH,
        lr=3e-3,
    )


@pytest.fixture(scope="module")
def pairs(config) -> list[OraclePair]:
    return load_pairs(config)


@pytest.fixture(scope="module")
def first(config, tmp_path_factory) -> tuple[RunResult, Path]:
    """A run that swept into an empty store and left a checkpoint; and the store."""
    root = tmp_path_factory.mktemp("first")
    extra = ("checkpointing.enabled=true", "checkpointing.metric_name=null")
    return succeed(config, root / "run", store(root / "store"), *extra), root / "store"


def store(root: Path) -> str:
    return f"reference.store_dir={root}"


def run(config: OracleConfig, log_dir: Path, *extra: str, **how) -> RunResult:
    overrides = [*trainer_overrides(config), *extra]
    return run_train(overrides, log_dir=log_dir, fork=True, **how)


def succeed(config: OracleConfig, log_dir: Path, *extra: str, **how) -> RunResult:
    result = run(config, log_dir, *extra, **how)
    assert result.returncode == 0, result.describe()
    return result


def refusal(result: RunResult, code: int) -> str:
    """The one line of a run that ended with `code` (a run under a launcher ends with 1)."""
    assert result.returncode == code, result.describe()
    errors = [line for line in result.stderr.splitlines() if line.startswith("error[")]
    assert len(errors) == 1 and "Traceback" not in result.stderr, result.describe()
    return errors[0]


def reference_tokens(result: RunResult) -> list[int]:
    return [line["perf/reference_tokens"] for line in result.metrics if "train/loss" in line]


def tokens_of(pairs: list[OraclePair]) -> int:
    """With the prompt laid out once."""
    return sum(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)


def assert_same_losses(result: RunResult, expected: RunResult, tolerance: float) -> None:
    got, want = result.train_steps(), expected.train_steps()
    assert got.keys() == want.keys()
    for step in want:
        for name in ("loss", "rewards/margins", "logps/chosen", "grad_norm"):
            bar = pytest.approx(want[step][name], rel=tolerance, abs=tolerance)
            assert got[step][name] == bar, (step, name)


def test_a_second_run_computes_no_reference_and_gives_the_same_bits(config, pairs, first, tmp_path):
    """Longer by half an epoch; both start from the same weights and read the same numbers."""
    straight, root = first
    assert reference_tokens(straight) == [tokens_of(pairs), 0, 0, 0]
    longer = replace(config, num_steps=6)
    again = succeed(longer, tmp_path / "again", store(root))
    assert reference_tokens(again) == [0] * 6
    for step, metrics in straight.train_steps().items():
        assert again.train_steps()[step] == metrics, step
    # A resumed run sweeps with the first weights, not with those of its checkpoint.
    log_dir = tmp_path / "run"
    shutil.copytree(straight.log_dir, log_dir)
    extra = ("checkpointing.enabled=true", "checkpointing.metric_name=null")
    with changed_weight(config.model):
        changed = run(longer, log_dir, store(tmp_path / "new"), *extra, nproc=None)
        error = refusal(changed, 78)
        assert "the reference's weights have changed since" in error and str(log_dir) in error
    resumed = succeed(longer, log_dir, store(tmp_path / "new"), *extra)
    assert reference_tokens(resumed)[STEPS:] == [tokens_of(pairs[: 2 * BATCH]), 0]
    assert_same_losses(resumed, again, 1e-6)


@contextmanager
def changed_weight(folder: str) -> Iterator[None]:
    path = Path(folder) / "model.safetensors"
    content = path.read_bytes()
    tensors = load_file(path)
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})
    try:
        yield
    finally:
        path.write_bytes(content)


def test_tensor_parallel_ranks_read_a_store_of_one_process(config, first, tmp_path):
    straight, root = first
    result = succeed(config, tmp_path / "tp2", store(root), *TP2, nproc=2)
    assert reference_tokens(result) == [0] * STEPS
    step, expected = result.train_steps()[1], straight.train_steps()[1]
    assert step["preference_loss"] == pytest.approx(expected["preference_loss"], abs=1e-5)
    assert abs(step["rewards/margins"]) < 1e-5
    assert_same_losses(result, straight, 1e-4)


def test_a_reference_that_runs_each_step_gives_the_same_losses(config, pairs, first, tmp_path):
    result = succeed(config, tmp_path / "run", "reference.mode=resident")
    batches = [pairs[i : i + BATCH] for i in range(0, len(pairs), BATCH)]
    assert reference_tokens(result) == [tokens_of(batch) for batch in batches]
    assert_same_losses(result, first[0], 1e-6)


def test_log_probs_that_come_with_the_rows_give_the_same_losses(config, pairs, first, tmp_path):
    """Sums by transformers in float64, as TRL's columns hold them; nothing is swept or hashed."""
    model = load_model(replace(config, dtype=torch.float64))
    rows = [json.loads(line) for line in Path(config.data).read_text().splitlines()]
    with torch.no_grad():
        for row, pair in zip(rows, pairs, strict=True):
            row["ref_chosen_logps"], row["ref_rejected_logps"] = map(float, pair_logps(model, pair))
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    result = succeed(replace(config, data=data), tmp_path / "run", store(tmp_path / "store"))
    assert reference_tokens(result) == [0] * STEPS
    assert not (tmp_path / "store").exists()
    stated = re.search(r"^first step: log-ratios of (\S+) nats a response", result.stdout, re.M)
    assert float(stated[1]) < 1e-4
    assert_same_losses(result, first[0], 1e-5)


def test_a_killed_sweep_goes_on_where_it_stopped(config, pairs, first, tmp_path):
    """Killed when the training set's shard is there and the validation set is being swept."""
    held_out = write_jsonl(tmp_path / "held_out.jsonl", make_rows(400, seed=5))
    extra = (
        f"data.val_data_path={held_out}",
        "dpo.val_period=100",
        "dpo.val_batches=0",
        "dpo.val_global_batch_size=80",
        "reference.micro_batch_tokens=64",
        store(tmp_path / "store"),
    )

    def has_shard() -> bool:
        return any((tmp_path / "store").glob("*/*.parquet"))

    killed = run(config, tmp_path / "run", *extra, kill_when=has_shard)
    assert killed.returncode != 0 and killed.metrics == [], killed.describe()
    result = succeed(config, tmp_path / "run", *extra)
    validation = load_pairs(replace(config, data=held_out))
    assert reference_tokens(result) == [tokens_of(validation), 0, 0, 0]
    assert_same_losses(result, first[0], 1e-6)


@pytest.fixture(scope="module")
def planted(pairs, first, tmp_path_factory) -> Path:
    """A store with the first run's keys and wrong values: each token off by 0.01 nats, and those
    of the chosen response of row 2 by 0.51.
    """
    root = tmp_path_factory.mktemp("planted")
    [folder] = first[1].iterdir()
    description = read_description(folder)
    own, wrong = (
        ReferenceStore(path, description.key, model=description.model) for path in (first[1], root)
    )
    tokenized = TokenizedSet.from_pairs(
        TokenizedPair(prompt=p.prompt, chosen=p.chosen, rejected=p.rejected) for p in pairs
    )
    found, _ = own.read(tokenized, range(len(pairs)))
    with wrong.writer() as writer:
        for index, pair in enumerate(tokenized):
            values = found[index] - 0.01
            values[: len(pair.chosen)] -= 0.5 * (index == 2)
            writer.add(pair, values)
    return root


def test_wrong_values_in_a_store_stop_the_first_step(config, pairs, planted, tmp_path):
    result = run(config, tmp_path / "run", store(planted), nproc=None)
    error = refusal(result, 70)
    assert result.metrics == []
    stated = re.search(r"worst of 4 pairs is source row 2: log-ratio (\S+) over (\d+) ", error)
    tokens = len(pairs[2].chosen)
    assert float(stated[1]) == pytest.approx(0.51 * tokens, abs=2e-3)
    assert int(stated[2]) == tokens
    assert "reinforcer_tp.reference verify" in error and "first_step_check=warn" in error


def test_a_warning_about_the_first_step_lets_the_run_go_on(config, planted, tmp_path):
    result = succeed(config, tmp_path / "run", store(planted), "dpo.first_step_check=warn")
    warnings = [line for line in result.stdout.splitlines() if line.startswith("warning: first")]
    assert len(warnings) == 1 and "source row 2:" in warnings[0]
    assert len(result.train_steps()) == STEPS


def test_a_reference_with_another_tokenizer_is_refused(config, tmp_path):
    shutil.copytree(config.model, tmp_path / "reference")
    path = tmp_path / "reference" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(content))
    extra = f"reference.model_name={tmp_path / 'reference'}"
    error = refusal(run(config, tmp_path / "run", extra, store(tmp_path / "store"), nproc=None), 65)
    assert "another tokenizer than the policy" in error and "2 tokens differ" in error
    assert not (tmp_path / "store").exists()


def test_a_store_that_cannot_be_written_is_one_line(config, tmp_path):
    (tmp_path / "file").write_text("")
    result = run(config, tmp_path / "run", store(tmp_path / "file" / "store"), nproc=None)
    error = refusal(result, 74)
    assert str(tmp_path / "file") in error and "reference.mode=resident" in error
