"""The GPU suite's orchestration, with stand-ins for its parts."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_suite, suite_parts
from benchmarks.contenders import SHAPES
from benchmarks.suite_parts import run_part
from benchmarks.suite_targets import TARGETS
from tests.unit.suite_stubs import python, run

LIST_KEYS = {"verdict", "seconds", "limit_s", "found", "tail"}
# Starts a process in a session of its own, says its id, and waits for ever.
WITH_GRANDCHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"],
                         start_new_session=True)
print("grandchild", child.pid, flush=True)
{then}
"""


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_without_cuda_nothing_is_run(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_suite, "run_suite", None)
    assert gpu_suite.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().out


def test_a_part_that_fails_does_not_keep_the_others_from_running(tmp_path, capsys):
    parts = [
        python("good", "print('seen 7')", read=lambda out: {"seen": int(out.split()[1])}),
        python("bad", "import sys; print('why'); print('oh', file=sys.stderr); sys.exit(3)"),
        python("unreadable", "print('x')", read=lambda out: {"seen": int(out)}),
        python("wrong", "pass", read=lambda _: {"wrong": ["not ln 2", "not finite"]}),
        python("orphan", "pass", needs=tmp_path / "nowhere"),
        python("last", "pass"),
    ]
    code, report, table = run(parts, tmp_path)
    assert code == 1
    found = report["parts"]
    assert list(found) == [part.name for part in parts]
    assert all(part.keys() == LIST_KEYS for part in found.values())
    assert found["good"]["verdict"] == "passed" and found["good"]["found"] == {"seen": 7}
    assert found["good"]["tail"] == [] and found["good"]["limit_s"] == 60
    assert found["bad"]["verdict"] == "FAILED: exit code 3"
    assert sorted(found["bad"]["tail"]) == ["oh\n", "why\n"]
    assert found["unreadable"]["verdict"].startswith(
        "FAILED: its result cannot be read (ValueError"
    )
    assert found["wrong"]["verdict"] == "FAILED: not ln 2; not finite"
    assert found["orphan"]["verdict"].endswith(f"part has left {tmp_path.name}/nowhere")
    assert found["last"]["verdict"] == "passed"
    for name, part in found.items():
        assert re.search(rf"\| \*\*{name}\*\* \|.*\| {re.escape(part['verdict'])} \|", table)
    out, err = capsys.readouterr()
    assert "seen 7" in out and "oh" in err, "a part's output is shown"


def test_all_parts_passed_is_exit_code_0(tmp_path):
    assert run([python("one", "pass"), python("two", "pass")], tmp_path)[0] == 0


def test_machine_and_versions_are_told(tmp_path):
    _, report, table = run([python("one", "pass")], tmp_path)
    about = report["machine"]
    assert about["torch"] == torch.__version__ == about["versions"]["torch"]
    assert {"driver", "cuda", "python", "commit", "num_devices"} <= about.keys()
    names = {"triton", "megatron-core", "transformer-engine", "liger-kernel"}
    assert names <= about["versions"].keys()
    assert f"megatron-core {about['versions']['megatron-core']}" in table
    assert f"# {about['device']}, {about['date']}" in table
    assert report["seconds"] < report["budget_s"] == 300
    assert os.uname().nodename not in json.dumps(report), "results are published"


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize("then", ["time.sleep(600)", "pass"], ids=["hangs", "ends"])
def test_nothing_that_a_part_started_is_left(then):
    part = python(
        "stuck",
        WITH_GRANDCHILD.format(then=then),
        limit_s=2 if "sleep" in then else 60,
        read=lambda out: {"pid": int(re.search(r"grandchild (\d+)", out)[1])},
    )
    begin = time.monotonic()
    outcome = run_part(part, part.limit_s)
    assert time.monotonic() - begin < 30
    if "sleep" in then:
        assert outcome.verdict == "FAILED: not done after 2 s"
    else:
        assert outcome.verdict == "passed"
    assert not is_alive(outcome.found["pid"]), "what it said before it was killed is read as well"


def test_a_signal_just_after_the_start_leaves_nothing(monkeypatch):
    started, start = [], suite_parts._start

    def start_and_keep(*args):
        started.append(start(*args))
        return started[0]

    def end(*_):
        raise SystemExit

    monkeypatch.setattr(suite_parts, "_start", start_and_keep)
    monkeypatch.setattr(suite_parts.Thread, "start", end)
    with pytest.raises(SystemExit):
        run_part(python("one", "import time; time.sleep(600)"), 60)
    assert not is_alive(started[0].pid)


def test_killing_spares_processes_with_another_mark():
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    other = subprocess.Popen(command, env=os.environ | {suite_parts.MARK: "mine-2"})
    try:
        assert run_part(python("one", "pass"), 60).passed
        assert other.poll() is None
        assert suite_parts.marked_processes("mine-2") == [other.pid]
        assert suite_parts.marked_processes("mine") == []
    finally:
        other.kill()
        other.wait()


def test_the_budget_holds_for_all_parts_together(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "LEAST_S", 1)
    slow = python("slow", "import time; time.sleep(600)", limit_s=400)
    begin = time.monotonic()
    code, report, table = run([slow, python("next", "pass", limit_s=100)], tmp_path, budget_s=3)
    assert code == 1 and 3 <= time.monotonic() - begin < 20
    assert report["parts"]["slow"]["verdict"].startswith("FAILED: not done after ")
    assert report["parts"]["slow"]["limit_s"] == pytest.approx(3, abs=0.1)
    assert report["parts"]["next"]["verdict"] == "not run: the budget of 3 s is spent"
    assert "not run: the budget of 3 s is spent" in table


def test_a_part_has_its_limit_and_what_earlier_ones_left(tmp_path, monkeypatch):
    limits = []

    def instant(part, limit_s):
        limits.append(limit_s)
        return suite_parts.Outcome(verdict="passed")

    monkeypatch.setattr(gpu_suite, "run_part", instant)
    run([python(str(i), "pass", limit_s=100) for i in range(3)], tmp_path, budget_s=300)
    assert limits == pytest.approx([100, 200, 300], abs=2)
    limits.clear()
    run([python(str(i), "pass", limit_s=100) for i in range(3)], tmp_path, budget_s=90)
    assert limits == pytest.approx([90, 90, 90], abs=2)


def test_results_are_written_after_every_part(tmp_path, monkeypatch):
    """A machine that is lost keeps what was measured before."""
    done = []

    def lost(part, limit_s):
        if done:
            raise ConnectionError
        done.append(part.name)
        return run_part(part, limit_s)

    monkeypatch.setattr(gpu_suite, "run_part", lost)
    with pytest.raises(ConnectionError):
        run([python("first", "pass"), python("second", "pass")], tmp_path)
    report = json.loads((tmp_path / "gpu" / "a-b.json").read_text())
    verdicts = {name: part["verdict"] for name, part in report["parts"].items()}
    assert verdicts == {"first": "passed", "second": "not run: not yet"}
    assert "not run: not yet" in (tmp_path / "gpu" / "a-b.md").read_text()


def test_a_suite_that_is_stopped_takes_its_part_along(tmp_path):
    code = f"""
import sys
from pathlib import Path
import torch
from benchmarks import gpu_suite
from benchmarks.suite_parts import Part
torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda: "A device"
gpu_suite.about_machine = dict
stub = "import os, time; print('part', os.getpid(), flush=True); time.sleep(600)"
gpu_suite.parts = lambda *_: [Part(name="tests", arguments=["-c", stub], limit_s=100)]
sys.exit(gpu_suite.main(["--results", {str(tmp_path)!r}]))
"""
    suite = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    found = None
    for line in suite.stdout:
        if found := re.match(r"part (\d+)", line):
            break
    suite.send_signal(signal.SIGTERM)
    assert suite.wait(30) == 1
    suite.stdout.close()
    assert not is_alive(int(found[1]))


def test_the_real_parts_fit_into_their_budget(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    parts = gpu_suite.parts("NVIDIA H200", tmp_path, tmp_path, datetime.now(UTC))
    assert tuple(part.name for part in parts) == gpu_suite.NAMES
    assert sum(part.limit_s for part in parts) <= gpu_suite.BUDGET_S < 600
    command = {part.name: part.arguments for part in parts}
    run_folder = str(tmp_path / "dpo" / "run")
    expected = ["--compare", run_folder, "--gpu", "NVIDIA H200", "--json"]
    assert command["plan"] == ["-m", "reinforcer_tp.plan", *expected]
    assert command["codegen"][-2:] == ["--arch", "90"]
    shapes = command["benchmark"][command["benchmark"].index("--shape") + 1 :][:2]
    assert set(shapes) == {target.shape for target in TARGETS} and shapes[0] == "llama70b-tp8"
    assert set(shapes) <= SHAPES.keys()


@pytest.mark.parametrize(
    ("capability", "arch"), [((9, 0), "90"), ((8, 6), "80"), ((12, 0), "100"), ((7, 5), "80")]
)
def test_the_codegen_gate_is_that_of_the_device(capability, arch, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert gpu_suite.own_arch() == arch
