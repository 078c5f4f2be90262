"""What the GPU suite reads out of its parts, and how its table shows it."""

import json

import pytest

from benchmarks import gpu_suite
from benchmarks.suite_parts import Part
from benchmarks.suite_targets import judged
from tests.unit.suite_stubs import python, run

ROW = {
    "date": "2026-01-02T00:00:00+00:00", "shape": "llama8b-131072", "n": 8192, "pass": "both",
    "dtype": "bfloat16", "device_type": "cuda", "tflops": 500.0, "extra_bytes": 2**30,
}  # fmt: skip


def test_targets_are_beside_the_numbers(tmp_path):
    rows = [
        ROW | {"contender": "ours-cached", "median_s": 0.040},
        ROW | {"contender": "ours-strict", "median_s": 0.060},
        ROW | {"contender": "liger", "median_s": 0.050},
        ROW | {"contender": "ours-strict", "median_s": 0.001, "date": "2026-01-01T00:00:00+00:00"},
    ]
    (tmp_path / "gpu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recent = gpu_suite.rows_since(tmp_path, "2026-01-01T12:00:00+00:00")
    assert recent == rows[:3]
    verdicts = {
        (t["contender"], t["pass_name"], t["key"]): t["verdict"]
        for t in judged(recent)
        if t["shape"] == "llama8b-131072"
    }
    assert verdicts["ours-cached", "both", "median_s"] == "met"
    assert verdicts["ours-strict", "both", "median_s"] == "MISSED"
    assert verdicts["ours-strict", "forward", "median_s"] == "NOT MEASURED"
    _, report, table = run([python("benchmark", "pass", read=lambda _: {"rows": recent})], tmp_path)
    assert report["parts"]["benchmark"]["found"]["rows"] == recent
    assert [t["verdict"] for t in report["targets"]].count("met") == 1
    assert "| llama8b-131072 ours-cached both | 40.00 ms | 42.00 ms | met; best" in table
    assert "| llama8b-131072 ours-strict both | 60.00 ms | 54.00 ms | MISSED; best" in table
    assert "| llama8b-131072 ours-strict forward | - | 13.50 ms | NOT MEASURED; best" in table
    assert "| llama8b-131072 liger both | 50.00 ms |  | 500 TFLOP/s, 1.000 GiB extra |" in table


PYTEST = """
from pathlib import Path
import pytest, sys
Path(sys.argv[1], "test_it.py").write_text('''
import pytest, time
@pytest.mark.parametrize("what", ["a b", "c"])
def test_good(what): pass
def test_bad(): assert False
@pytest.mark.skip(reason="no such thing: here")
def test_skipped(): pass
@pytest.fixture
def broken(): raise OSError
def test_error(broken): pass
def test_slow(): time.sleep(float(%r))
''' % sys.argv[2])
sys.exit(pytest.main(["-v", "-ra", "-p", "no:cacheprovider", "-c", "/dev/null", sys.argv[1]]))
"""


@pytest.mark.parametrize("killed", [False, True])
def test_counts_and_names_of_tests_are_read(tmp_path, killed):
    """Also of a session that hung and was killed."""
    arguments = ["-c", PYTEST, str(tmp_path), "600" if killed else "0"]
    part = Part(name="tests", arguments=arguments, limit_s=20, read=gpu_suite.read_tests)
    code, report, table = run([part], tmp_path, budget_s=12 if killed else 60)
    found = report["parts"]["tests"]["found"]
    assert code == 1
    assert (found["failed"], found["skipped"], found["error"]) == (1, 1, 1)
    assert found["passed"] == (2 if killed else 3)
    assert [name.split("::")[1] for name in found["failures"]] == ["test_bad", "test_error"]
    assert found["skipped_because"] == ([] if killed else ["no such thing: here"])
    assert f"{found['passed']} passed, 2 failed, 1 skipped" in table
    assert "::test_bad |" in table
    assert found["selected"] == 6
    assert ("1 did not run" in table) == killed
    assert (found["killed_in"] or "").endswith("::test_slow") == killed
    assert ("| killed in |" in table) == killed


def test_a_session_of_skipped_tests_has_not_passed(tmp_path):
    """So it would be where the tests do not see the device."""
    said = "print('tests/a.py::test_b SKIPPED (no CUDA) [100%]')"
    code, report, _ = run([python("tests", said, read=gpu_suite.read_tests)], tmp_path)
    assert code == 1 and report["parts"]["tests"]["verdict"] == "FAILED: no test passed"
    assert report["parts"]["tests"]["found"]["skipped"] == 1


PLAN = {"predicted": {"step_s": 0.5, "peak_gib": 40.0}, "measured": {"step_s": 0.6, "peak_gib": 38},
        "ratio": {"step_s": 1.2, "peak_gib": 0.95}}  # fmt: skip


def test_the_plan_is_beside_what_was_measured(tmp_path):
    said = f"print('some words'); print({json.dumps(PLAN)!r})"
    part = python("plan", said, read=gpu_suite.read_plan, needs=tmp_path)
    code, report, table = run([part], tmp_path)
    assert code == 0 and report["parts"]["plan"]["found"] == PLAN
    assert "| plan step_s | 0.600 s | 0.500 s | 1.20 of the plan |" in table
    assert "| plan peak_gib | 38.00 GiB | 40.00 GiB | 0.95 of the plan |" in table


def test_a_plan_without_a_prediction_fails(tmp_path):
    part = python("plan", "print('{\"measured\": {}}')", read=gpu_suite.read_plan)
    code, report, _ = run([part], tmp_path)
    assert code == 1 and "no predicted" in report["parts"]["plan"]["verdict"]
