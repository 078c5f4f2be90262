"""Exit codes, error lines, and what an attempt leaves behind."""

import copy
import errno
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from reinforcer_tp.config_check import ConfigError
from reinforcer_tp.lifecycle import attempts
from reinforcer_tp.lifecycle.attempts import Attempt
from reinforcer_tp.lifecycle.exits import KNOWN, MEANING, Exit, describe, error_line, known_exit
from reinforcer_tp.lifecycle.position import Position
from reinforcer_tp.reference.store import StoreError

ROOT = Path(__file__).resolve().parents[2]


def test_every_code_has_a_meaning():
    assert [int(code) for code in Exit] == [0, 65, 70, 74, 75, 78, 93]
    assert set(MEANING) == set(Exit)


@pytest.mark.parametrize("name", KNOWN)
def test_known_errors_exist(name):
    """By name, so that nothing is imported for them."""
    texts = [path.read_text() for path in (ROOT / "reinforcer_tp").rglob("*.py")]
    assert sum(bool(re.search(rf"^class {name}\(", text, re.MULTILINE)) for text in texts) == 1


@pytest.mark.parametrize(
    ("error", "phase", "code"),
    [
        (ConfigError("x"), "data", Exit.CONFIG),
        (StoreError("x"), "sweep", Exit.IO),
        (ValueError("x"), "data", Exit.DATA),
        (ValueError("x"), "step", None),
        (OSError(errno.ENOSPC, "no space"), "save", Exit.IO),
        (FileNotFoundError(errno.ENOENT, "x"), "save", None),
        (RuntimeError("x"), "data", None),
    ],
)
def test_codes_of_errors(error, phase, code):
    assert known_exit(error, phase) == code


def test_an_error_is_one_line_without_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 30)
    line = error_line(Exit.INTERNAL, f"first\nsecond hf_{'a' * 30}")
    assert line == "error[70]: first second ***"
    assert describe(KeyError("a")) == "KeyError: 'a'"
    assert describe(ConfigError("a is b")) == "a is b"


def test_running_out_of_memory_comes_with_what_to_do():
    import torch

    text = describe(torch.OutOfMemoryError("Tried to allocate 2.00 GiB"))
    assert "Tried to allocate 2.00 GiB; lower policy.micro_batch_tokens" in text


@pytest.fixture
def launched(monkeypatch):
    """Environments of the ranks of two launches on two nodes."""
    monkeypatch.setattr(os, "environ", copy.deepcopy(os.environ))  # as Dataset.map does

    def launch(name: str) -> None:
        values = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": name}
        for key, value in values.items():
            monkeypatch.setenv(key, value)

    return launch


def test_all_ranks_of_a_launch_share_a_folder_and_the_first_end_counts(launched, tmp_path):
    launched("1")
    with ThreadPoolExecutor(8) as pool:
        ranks = [Attempt(tmp_path / "run", rank, 4) for rank in range(8)]
        assert {a.folder() for a in ranks} == {tmp_path / "run/attempts/0001"}
        ended = pool.map(lambda a: a.end(Exit.DATA, "error", f"{a}", Position()), ranks)
        assert sorted(ended) == 7 * [False] + [True]
    launched("2")
    assert Attempt(tmp_path / "run", 1, 4).folder() == tmp_path / "run/attempts/0002"
    names = {p.name for p in (tmp_path / "run/attempts/0001").iterdir()}
    assert names == {"attempt.json", "exit.json"}, "no file that is not whole"
    assert len(list((tmp_path / "run/attempts").iterdir())) == 2


def test_ranks_at_the_same_time_claim_one_number(launched, tmp_path):
    launched("1")
    with ThreadPoolExecutor(16) as pool:
        for _ in range(10):
            folder = tmp_path / os.urandom(4).hex()
            ranks = [Attempt(folder, rank, 4) for rank in range(16)]
            found = set(pool.map(Attempt.folder, ranks))
            assert found == {folder / "attempts/0001"}
            assert [p.name for p in (folder / "attempts").iterdir()] == ["0001"]


@pytest.mark.parametrize(("restart", "said"), [(None, "7.0"), ("2", "7.2")])
def test_a_slurm_job_knows_its_attempt(restart, said, monkeypatch, tmp_path):
    """slurm/outcome.sh reads it by line."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    if restart is not None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
    [line] = (Attempt(tmp_path, 0, 1).folder() / "attempt.json").read_text().splitlines()
    assert f'"slurm_job": "{said}"' in line


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").touch()
    attempt = Attempt(tmp_path / "file" / "run", 0, 1)
    assert attempt.folder() is None and attempt.write("a", "b") is None
    assert attempt.end(Exit.DONE, "done", "", Position()) is None
    attempt.beat(Position())


def failures(folder: Path, *ends: tuple[Exit, str, int, int]) -> Attempt:
    """An attempt after others that ended with (code, cause, start step, step)."""
    for number, (code, cause, start_step, step) in enumerate(ends, start=1):
        path = folder / "attempts" / f"{number:04d}"
        path.mkdir(parents=True)
        end = {"code": int(code), "cause": cause, "start_step": start_step, "step": step}
        (path / "exit.json").write_text(json.dumps(end))
    return Attempt(folder, 0, 1)


CRASH, LOST, STOP = (70, "error", 4, 7), (75, "lost", 4, 7), (75, "stop", 4, 7)


@pytest.mark.parametrize(
    ("ends", "lacks"),
    [
        ([CRASH, CRASH], True),
        ([LOST, CRASH], True),
        ([CRASH, (93, "error", 4, 7)], True),
        ([CRASH], False),
        ([CRASH, STOP], False),
        ([CRASH, (70, "error", 4, 6)], False),
        ([(70, "error", 0, 7), CRASH], True),  # wherever it began, it ends at the same step
        ([CRASH, CRASH, (0, "done", 4, 7)], False),
        ([CRASH, CRASH, (78, "error", 4, 7)], False),
    ],
)
def test_three_failures_at_a_step_are_no_progress(ends, lacks, tmp_path):
    here = Position()
    here.start_step, here.step = 4, 7
    attempt = failures(tmp_path, *ends)
    assert attempt.lacks_progress(Exit.INTERNAL, "error", here) is lacks
    assert attempt.lacks_progress(Exit.REQUEUE, "lost", here) is lacks
    assert not attempt.lacks_progress(Exit.REQUEUE, "stop", here)
    assert not attempt.lacks_progress(Exit.DATA, "error", here)


def test_the_heartbeat_is_rewritten_whole(tmp_path):
    attempt, here = Attempt(tmp_path, 0, 1), Position()
    attempt.folder()
    for step in (3, 4):
        here.step = step
        attempt.beat(here)
        beat = json.loads((tmp_path / "heartbeat").read_text())
        assert (beat["step"], beat["phase"], beat["attempt"]) == (step, "start", 1)
    assert {p.name for p in tmp_path.iterdir()} <= set(attempts.NAMES)
