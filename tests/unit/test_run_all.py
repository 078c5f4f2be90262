"""One command for every benchmark: what it runs, what it goes on after, what it writes."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import run_all, table
from benchmarks.cases import measured, read_results
from benchmarks.table import Benchmark
from tests.unit.result_files import store_row
from tests.unit.test_gpu_suite import is_alive

WRITE = "import json, pathlib; folder = pathlib.Path(sys.argv[-1]); folder.mkdir(); "
ROW = json.dumps(store_row())
PROGRAMS = {
    "good": WRITE + f"(folder / 'cpu.jsonl').write_text({ROW!r} + '\\n'); print(sys.argv[1:-1])",
    "fails": WRITE + f"(folder / 'cpu.jsonl').write_text({ROW!r}); print('oh'); sys.exit(1)",
    "misses": WRITE + f"(folder / 'cpu.jsonl').write_text({ROW!r}); sys.exit(3)",
    "empty": "pass",
    "hangs": "import time; time.sleep(600)",
    "asking": WRITE + f"(folder / 'cpu.jsonl').write_text({ROW!r}); print(sys.argv[2:-1])",
    "elsewhere": "raise AssertionError('must not run')",
    "reports": WRITE + "(folder / 'gpu').mkdir(); (folder / 'gpu' / 'a.json').write_text('[7]')",
}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """(exit code, what was written); every benchmark is one of PROGRAMS, in that order."""
    monkeypatch.setattr(run_all, "about_machine", lambda: {"device": "A device, 2 cores"})
    monkeypatch.setattr(run_all, "stop_with_parts", lambda: None)  # pytest has its own handlers
    start = run_all.run_part

    def start_program(part, limit_s):
        [_, module, *rest] = part.arguments
        code = "import sys; " + PROGRAMS[module.removeprefix("benchmarks.")]
        return start(run_all.Part(**vars(part) | {"arguments": ["-c", code, *rest]}), limit_s)

    def run(names: str, *args: str) -> tuple[int, dict]:
        benchmarks = [
            Benchmark(
                name=name, keys=(), arguments=["--all"], quick=["--few"],
                limit_s=2 if name == "hangs" else 60,
                needs=lambda name=name: "no such device" if name == "elsewhere" else None,
                asks=("model", "data") if name == "asking" else (),
            )
            for name in names.split()
        ]  # fmt: skip
        monkeypatch.setattr(run_all, "BENCHMARKS", benchmarks)
        monkeypatch.setattr(run_all, "BY_NAME", {b.name: b for b in benchmarks})
        monkeypatch.setattr(run_all, "run_part", start_program)
        code = run_all.main([*args, "--results", str(tmp_path)])
        [path] = (tmp_path / "runs").glob("*.json")
        assert re.fullmatch(r"a-device-2-cores-\d{4}-\d\d-\d\d-\d{6}\.json", path.name)
        return code, json.loads(path.read_text())

    return run


def test_after_a_failure_the_others_run(run, capsys):
    code, report = run("fails good elsewhere hangs empty misses reports")
    assert code == 1
    parts = report["parts"]
    assert {name: part["verdict"] for name, part in parts.items()} == {
        "fails": "FAILED: exit code 1",
        "good": "passed",
        "elsewhere": "not run: no such device",
        "hangs": "FAILED: not done after 2 s: it left no rows",
        "empty": "FAILED: it left no rows",
        "misses": "missed: a bar of its own",
        "reports": "passed",
    }
    assert parts["good"]["found"]["rows"] == [json.loads(ROW)]
    assert parts["fails"]["found"]["rows"] == [json.loads(ROW)], "what it had measured before"
    assert parts["fails"]["tail"] == ["oh\n"] and parts["good"]["seconds"] > 0
    assert parts["reports"]["found"]["reports"] == {"a.json": [7]}
    assert report["machine"]["device"] == "A device, 2 cores" and not report["quick"]
    assert re.search(r"^good +[\d.]+ s  passed$", capsys.readouterr().out, re.M)


@pytest.mark.parametrize(
    ("names", "args", "code", "said"),
    [
        ("good elsewhere", (), 0, "['--all', '--results']"),
        ("good", ("--quick",), 0, "['--few', '--results']"),
        ("misses", (), 1, "missed"),
        ("misses", ("--quick",), 0, "missed"),
        ("good fails", ("--only", "good"), 0, "--all"),
        ("good fails", ("--skip", "fails"), 0, "--all"),
        ("elsewhere", (), 1, "no such device"),
        ("good asking", ("--model", "/m"), 0, "asking               0.0 s  not run: no --data"),
        ("asking", ("--model", "/m", "--data", "/d"), 0, "['--model', '/m', '--data', '/d', '--r"),
    ],
)
def test_exit_code_and_choice(run, names, args, code, said, capsys):
    found, report = run(names, *args)
    out = capsys.readouterr().out
    assert found == code and said in out
    assert ("fails" in report["parts"]) == (names == "good fails" and not args)


def test_an_unknown_name_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        run_all.main(["--only", "nobody"])
    assert end.value.code == 2 and "linear_logprob" in capsys.readouterr().err


def test_the_file_is_there_after_each_part(run, monkeypatch, tmp_path):
    """A machine that is lost keeps what was measured before."""
    kept = []

    def lost(benchmark, folder, args):
        kept.extend((tmp_path / "runs").glob("*.json"))
        if kept:
            raise ConnectionError
        return run_all.Outcome(verdict="passed")

    monkeypatch.setattr(run_all, "run", lost)
    with pytest.raises(ConnectionError):
        run("good misses")
    verdicts = read_results(kept[0]).verdicts
    assert verdicts == {"good": "passed", "misses": "not run: not yet"}


def test_the_operator_is_really_measured(monkeypatch, tmp_path):
    """And gpu_suite is left out where there is no GPU."""
    monkeypatch.setattr(run_all, "stop_with_parts", lambda: None)
    chosen = ["linear_logprob", *([] if torch.cuda.is_available() else ["gpu_suite"])]
    assert run_all.main(["--quick", "--only", *chosen, "--results", str(tmp_path)]) == 0
    [path] = (tmp_path / "runs").glob("*.json")
    report, results = json.loads(path.read_text()), read_results(path)
    about = report["machine"]
    assert about["cores"] == os.cpu_count() and about["host_memory_gib"] > 0
    assert {"commit", "cpu_flags", "threads", "torch", "versions"} <= about.keys()
    assert report["quick"] and {row["device"] for row in results.rows} == {about["device"]}
    if not torch.cuda.is_available():
        assert results.verdicts["gpu_suite"] == "not run: no CUDA device"
    assert {row["contender"] for row in results.rows} >= {"ours-strict", "ours-cached", "gemms-3"}
    assert all(measured(row)["time"].value > 0 for row in results.rows)


def test_a_run_that_is_stopped_takes_its_benchmark_along(tmp_path):
    """And what that has started, here with a mark of its own, as the GPU suite's parts are."""
    code = f"""
import sys
from benchmarks import run_all, table
from benchmarks.suite_parts import Part, run_part
run_all.about_machine = lambda: {{"device": "x"}}
def stuck(part, limit_s):
    inner = "import os, time; print('inner', os.getpid(), flush=True); time.sleep(600)"
    outer = ("from benchmarks.suite_parts import Part, run_part; "
             f"run_part(Part(name='in', arguments=['-c', {{inner!r}}], limit_s=600), 600)")
    return run_part(Part(name="out", arguments=["-c", outer], limit_s=600), 600)
run_all.run_part = stuck
sys.exit(run_all.main(["--only", "attention", "--results", {str(tmp_path)!r}]))
"""
    suite = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    found = next(filter(None, (re.match(r"inner (\d+)", line) for line in suite.stdout)))
    suite.send_signal(signal.SIGTERM)
    assert suite.wait(30) == 1
    suite.stdout.close()
    assert not is_alive(int(found[1]))


def test_each_benchmark_of_the_table_is_there_and_takes_its_arguments():
    for benchmark in table.BENCHMARKS:
        module = Path(run_all.__file__).with_name(f"{benchmark.name}.py")
        text = module.read_text()
        words = {word for word in benchmark.arguments + benchmark.quick if word[:2] == "--"}
        missing = {word for word in {*words, "--results"} if f'"{word}"' not in text}
        assert not missing, (benchmark.name, missing)
        assert f"benchmarks.{benchmark.name}" in text
