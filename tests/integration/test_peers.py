"""One of two ranks dies, hangs or fails: it is named at once or in time, and all end."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.integration.harness import RunResult, run_train
from tests.integration.oracle import OracleConfig
from tests.integration.overrides import trainer_overrides

TIMEOUT_S = 2.0
DP2 = ["policy.train_micro_batch_size=1"]
TP2 = ["policy.megatron_cfg.tensor_model_parallel_size=2"]
PP2 = [
    "policy.megatron_cfg.pipeline_model_parallel_size=2",
    "policy.megatron_cfg.num_layers_in_last_pipeline_stage=2",
]


@pytest.fixture
def overrides(random_llama, random_rows) -> list[str]:
    config = OracleConfig(
        model=random_llama, data=random_rows["random"], num_steps=2000, batch_size=4, lr=1e-4
    )
    return [
        *trainer_overrides(config),
        "dpo.max_num_epochs=100000",
        f"cluster.hang_timeout_s={TIMEOUT_S}",
        "checkpointing.enabled=true",
        "checkpointing.save_period=100000",
    ]


def run(overrides: list[str], tmp_path: Path, fault: str) -> tuple[RunResult, list[str], dict]:
    """The run, its lines of error and its exit.json; how long it lived after its last step."""
    began = time.monotonic()
    result = run_train(
        overrides,
        log_dir=tmp_path / "run",
        nproc=2,
        fork=True,
        timeout_s=60,
        env={"REINFORCER_TP_FAULTS": fault},
    )
    ended = time.time()
    assert time.monotonic() - began < 55 and result.returncode == 1, result.describe()
    assert "Traceback" not in result.stderr, result.describe()
    lines = [line for line in result.stderr.splitlines() if line.startswith("error[")]
    [path] = result.log_dir.glob("attempts/*/exit.json")
    return result, lines, json.loads(path.read_text()) | {"left": ended}


def last_step_at(log_dir: Path) -> float:
    return (log_dir / "metrics.jsonl").stat().st_mtime


def check_named(result: RunResult, lines: list[str], end: dict, rank: int, step: int) -> None:
    assert 1 <= len(lines) <= 2 and len(set(lines)) == 1, result.describe()
    pattern = rf"error\[75\]: lost rank {rank}, last step {step}, last phase \w+: "
    assert re.match(pattern, lines[0]), result.describe()
    assert (end["code"], end["cause"], end["step"], end["rank"]) == (75, "lost", step, 1 - rank)
    stacks = result.log_dir / "attempts" / "0001" / f"stacks_rank{1 - rank}.txt"
    assert "hread 0x" in stacks.read_text() and "train.py" in stacks.read_text()


@pytest.mark.parametrize(("layout", "rank"), [(DP2, 1), (TP2, 0), (PP2, 1)], ids=["dp", "tp", "pp"])
def test_a_killed_rank_is_named_at_once(layout, rank, overrides, tmp_path):
    fault = f"step.compute@rank={rank},step=3:kill"
    result, lines, end = run([*overrides, *layout], tmp_path, fault)
    check_named(result, lines, end, rank, 2)
    assert "is gone (killed, out of memory?)" in lines[0]
    assert end["left"] - last_step_at(result.log_dir) < 5


@pytest.mark.parametrize(
    ("fault", "layout", "why"),
    [
        ("step.compute@rank=1,step=3:stop", TP2, "(it is stopped)|does not answer"),
        ("step.optimizer.before@rank=0,step=3:stop", DP2, "(it is stopped)|does not answer"),
        ("step.begin@rank=1,step=3:loop", PP2, "the other ranks wait for it"),
    ],
)
def test_a_hanging_rank_is_named_in_time(fault, layout, why, overrides, tmp_path):
    result, lines, end = run([*overrides, *layout], tmp_path, fault)
    rank = int(fault.split("rank=")[1][0])
    check_named_hang(result, lines, end, rank, why)


def check_named_hang(result: RunResult, lines: list[str], end: dict, rank: int, why: str) -> None:
    assert 1 <= len(lines) <= 2 and len(set(lines)) == 1, result.describe()
    assert re.match(rf"error\[75\]: lost rank {rank}, last step 2, ", lines[0]), lines
    assert re.search(why, lines[0]), lines
    assert "lost rank" in end["message"] and (end["code"], end["cause"]) == (75, "lost")
    assert TIMEOUT_S - 1 < end["ended"] - last_step_at(result.log_dir) < TIMEOUT_S + 2
    assert end["left"] - end["ended"] < 4, "all processes are gone"


def test_a_rank_that_fails_alone_is_the_one_that_is_heard(overrides, tmp_path):
    fault = "step.compute@rank=1,step=3:raise=ENOSPC"
    result, lines, end = run([*overrides, *DP2], tmp_path, fault)
    assert len(lines) == 1 and lines[0].startswith("error[74]: OSError: "), result.describe()
    assert "No space left on device" in lines[0]
    assert (end["code"], end["rank"], end["step"]) == (74, 1, 2)
    assert end["left"] - last_step_at(result.log_dir) < 5


def test_saving_and_loading_may_take_longer(overrides, tmp_path):
    """The limit is for steps: a rank that writes for long, while others wait, is no lost rank."""
    result = run_train(
        [*overrides, *DP2, "dpo.max_num_steps=2", "cluster.hang_timeout_s=1"],
        log_dir=tmp_path / "run",
        nproc=2,
        fork=True,
        env={"REINFORCER_TP_FAULTS": "ckpt.state@rank=0:sleep=4;load.begin@rank=1:sleep=4"},
    )
    assert result.returncode == 0, result.describe()


def test_a_rank_stopped_before_the_loop_ends_the_others(overrides, tmp_path):
    fault = "load.begin@rank=1:kill"
    first = run_train(
        [*overrides, "dpo.max_num_steps=1"], log_dir=tmp_path / "run", nproc=2, fork=True
    )
    assert first.returncode == 0, first.describe()
    began = time.monotonic()
    result = run_train(
        [*overrides, "dpo.max_num_steps=2"],
        log_dir=tmp_path / "run",
        nproc=2,
        fork=True,
        env={"REINFORCER_TP_FAULTS": fault},
    )
    assert result.returncode == 1 and time.monotonic() - began < 20
    assert "error[75]: lost rank 1, last step none, last phase" in result.stderr, result.describe()


def test_no_child_of_a_rank_is_left(tmp_path):
    """`leave` ends what the process has started."""
    pid = os.fork()
    if pid == 0:
        import subprocess

        from reinforcer_tp.lifecycle.ending import leave

        child = subprocess.Popen(["sleep", "600"])
        (tmp_path / "child").write_text(str(child.pid))
        leave(75)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 5
    while os.path.exists(f"/proc/{child}") and time.monotonic() < deadline:
        state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":
            return
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{child}") or os.kill(child, signal.SIGKILL)
