"""Checkpoints through the real train.py: other layouts, beside the training, damaged, disk full."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.harness import RunResult, run_train
from tests.integration.test_resume import LAYOUTS, assert_same_steps, config, succeed, training

__all__ = ["config"]  # a fixture


def test_a_run_moves_from_layout_to_layout(config, tmp_path):
    """dp2 with a sharded optimizer -> tp2 -> pp2 -> one process: the numbers of a straight run."""
    store = f"reference.store_dir={tmp_path}/store"
    straight = succeed(training(config, 8, store), tmp_path / "straight")
    moves = ["dp2-distributed-optimizer", "tp2-sequence-parallel", "pp2", None]
    for index, name in enumerate(moves, start=1):
        layout = LAYOUTS[name] if name else ()
        moved = succeed(
            training(config, 2 * index, store, *layout), tmp_path / "moved", 2 if name else 1
        )
    assert sorted(moved.train_steps()) == list(range(1, 9))
    for step, want in straight.train_steps().items():
        got = moved.train_steps()[step]
        for metric in ("loss", "rewards/margins", "logps/chosen", "grad_norm"):
            assert got[metric] == pytest.approx(want[metric], rel=1e-5, abs=1e-5), (step, metric)
        assert got["lr"] == want["lr"]


def test_saving_beside_the_training_changes_nothing(config, tmp_path):
    """And what it saved while later steps ran is the state of its own step, bit for bit."""
    store = f"reference.store_dir={tmp_path}/store"
    straight = succeed(training(config, 8, store), tmp_path / "straight")
    slow = {"REINFORCER_TP_FAULTS": "ckpt.shard.mid:sleep=0.3"}
    overrides = training(config, 8, store, "checkpointing.async_save=true")
    beside = run_train(overrides, log_dir=tmp_path / "beside", nproc=2, fork=True, env=slow)
    assert beside.returncode == 0, beside.describe()
    assert_same_steps(beside, straight)
    for step in (4, 6, 8):
        name = f"checkpoints/step_{step}"
        assert_same_tensors(tmp_path / "beside" / name, tmp_path / "straight" / name)
        known = [known_metrics(tmp_path / run / name) for run in ("beside", "straight")]
        assert known[0] == known[1]


def known_metrics(folder: Path) -> list[dict]:
    """What the state says of the last steps, but for times."""
    state = json.loads((folder / "state.json").read_text())
    known = [state["latest"], *state["health"]["window"]]
    return [{n: v for n, v in part.items() if n.startswith("train/")} for part in known]


def assert_same_tensors(folder: Path, wanted: Path) -> None:
    """Masters and moments; other generators than torch's decide nothing."""
    for path in wanted.glob("*.safetensors"):
        got, want = load_file(folder / path.name), load_file(path)
        assert got.keys() == want.keys()
        for name in want:
            if not name.startswith(("random.python", "random.numpy")):
                assert torch.equal(got[name], want[name]), (path, name)


def test_a_failed_save_beside_the_training_ends_the_run(config, tmp_path):
    full = {"REINFORCER_TP_FAULTS": "ckpt.shard.mid@rank=1,hit=2:raise=ENOSPC"}
    overrides = training(config, 12, "checkpointing.async_save=true")
    result = run_train(overrides, log_dir=tmp_path / "run", nproc=2, fork=True, env=full)
    assert_disk_is_full(result, tmp_path / "run")


def test_a_full_disk_leaves_the_earlier_checkpoints(config, tmp_path):
    """One line, code 74, nothing half-written; with room again the same command finishes."""
    store = f"reference.store_dir={tmp_path}/store"
    straight = succeed(training(config, 6, store), tmp_path / "straight")
    full = {"REINFORCER_TP_FAULTS": "ckpt.shard.mid@rank=1,hit=2:raise=ENOSPC"}
    overrides = training(config, 6, store)
    result = run_train(overrides, log_dir=tmp_path / "run", nproc=2, fork=True, env=full)
    assert_disk_is_full(result, tmp_path / "run")
    assert_same_steps(succeed(overrides, tmp_path / "run"), straight)


def assert_disk_is_full(result: RunResult, log_dir: Path) -> None:
    assert result.returncode != 0, result.describe()
    errors = [line for line in result.stderr.splitlines() if line.startswith("error[74]")]
    assert len(errors) == 1, result.describe()
    assert "No space left on device" in errors[0] and "(rank 1)" in errors[0]
    assert "checkpointing.checkpoint_dir" in errors[0] and "Traceback" not in result.stderr
    assert [p.name for p in (log_dir / "checkpoints").iterdir()] == ["step_2"]
    assert last_exit(log_dir)["code"] == 74


def last_exit(log_dir: Path) -> dict:
    return json.loads(sorted(log_dir.glob("attempts/*/exit.json"))[-1].read_text())


def test_a_flipped_bit_is_found_before_it_is_used(config, tmp_path):
    overrides = training(config, 4)
    succeed(overrides, tmp_path / "run")
    shard = tmp_path / "run" / "checkpoints" / "step_4" / "rank_00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1000] ^= 1
    shard.write_bytes(content)
    longer = training(config, 6)
    refused = run_train(longer, log_dir=tmp_path / "run", nproc=2, fork=True)
    assert refused.returncode != 0
    errors = [line for line in refused.stderr.splitlines() if line.startswith("error[65]")]
    assert len(errors) == 1 and str(shard) in errors[0], refused.describe()
    assert "checkpointing.on_damaged=previous" in errors[0]

    longer.append("checkpointing.on_damaged=previous")
    result = succeed(longer, tmp_path / "run")
    assert f"passed over a damaged checkpoint: {shard}" in result.stdout
    assert "step_2: 2 of 6 steps" in result.stdout, result.describe()
    assert sorted(result.train_steps()) == list(range(1, 7))
    assert any((tmp_path / "run" / "checkpoints").glob("aside_step_4.*"))


def test_a_change_is_refused_unless_allowed_by_name(config, tmp_path):
    succeed(training(config, 2), tmp_path / "run")
    changed = training(config, 4, "data.shuffle=true", "policy.megatron_cfg.optimizer.lr=1e-4")
    refused = run_train(changed, log_dir=tmp_path / "run", nproc=2, fork=True)
    [error] = [line for line in refused.stderr.splitlines() if line.startswith("error[78]")]
    for key in ("data.shuffle: false there, true here", "optimizer.lr: 0.0003 there, 0.0001 here"):
        assert key in error
    rows = Path(config.data).read_text().splitlines()
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(rows[::-1]) + "\n")
    changed += [f"data.train_data_path={other}"]
    allowed = "checkpointing.allow_changed=[data.shuffle,policy.megatron_cfg.optimizer,{}]"
    refused = run_train(
        [*changed, allowed.format("data.train_data_path")],
        log_dir=tmp_path / "run",
        nproc=2,
        fork=True,
    )
    [error] = [line for line in refused.stderr.splitlines() if line.startswith("error[78]")]
    assert "data.train: " in error and "data.shuffle" not in error.split("; set it back")[0]
    succeed([*changed, allowed.format("data")], tmp_path / "run")


def test_a_run_begins_from_a_named_checkpoint(config, tmp_path):
    """Of another run; the same command again goes on from what it has saved itself."""
    store = f"reference.store_dir={tmp_path}/store"
    straight = succeed(training(config, 6, store), tmp_path / "straight")
    named = f"checkpointing.resume={tmp_path}/straight/checkpoints/step_2"
    first = succeed(training(config, 4, store, named), tmp_path / "branch")
    assert sorted(first.train_steps()) == [3, 4]
    again = succeed(training(config, 6, store, named), tmp_path / "branch")
    assert "branch/checkpoints/step_4: 4 of 6 steps" in again.stdout, again.describe()
    for step in (3, 4, 5, 6):
        assert again.train_steps()[step] == straight.train_steps()[step]
    back = succeed(training(config, 6, store, named), tmp_path / "straight")
    assert "step_2: 2 of 6 steps" in back.stdout, "a finished run goes back as well"
    assert_same_steps(back, straight)
    modes = {path: path.stat().st_mode & 0o777 for path in (tmp_path / "branch").rglob("*")}
    assert set(modes.values()) == {0o700, 0o600}, modes  # nobody else can read them
