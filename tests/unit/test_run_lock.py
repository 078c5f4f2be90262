"""One launch at a time in a run's folder."""

import subprocess
import sys
import time

import pytest

from reinforcer_tp.lifecycle.exits import Exit, known_exit
from reinforcer_tp.lifecycle.run_lock import RunInUseError, hold_run

HOLD = """
import sys, time
from pathlib import Path
from reinforcer_tp.lifecycle.run_lock import hold_run
hold_run(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_launch_is_refused_naming_the_first(holder, tmp_path, capsys):
    with pytest.raises(RunInUseError, match=rf"in use by process {holder.pid} on ") as error:
        hold_run(tmp_path, wait_s=0.5)
    assert known_exit(error.value, "start") == Exit.REQUEUE
    assert f"process {holder.pid}" in capsys.readouterr().err


def test_a_launch_that_is_killed_makes_way(holder, tmp_path):
    holder.kill()
    begin = time.monotonic()
    hold_run(tmp_path, wait_s=30.0)
    assert time.monotonic() - begin < 5.0


def test_a_folder_that_cannot_be_written_holds_nothing(tmp_path):
    (tmp_path / "attempts").write_text("a file")
    hold_run(tmp_path)
