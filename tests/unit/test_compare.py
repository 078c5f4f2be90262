"""The regression check: what it finds, what it leaves to noise, what it refuses to compare."""

import json

import pytest

from benchmarks import cases, compare
from benchmarks.measure import RESULTS
from benchmarks.table import Benchmark
from tests.unit.result_files import (
    MACHINE,
    attention_row,
    operator_row,
    prompts_row,
    store_row,
    write_report,
    write_rows,
)


@pytest.fixture
def run(tmp_path, capsys):
    """(exit code, output) of a comparison of these rows."""

    def run(old: list[dict], new: list[dict], *args: str) -> tuple[int, str]:
        files = [write_rows(tmp_path / f"{name}.jsonl", *rows)
                 for name, rows in (("old", old), ("new", new))]  # fmt: skip
        return compare.main([*map(str, files), *args]), capsys.readouterr().out

    return run


def worse(out: str) -> list[str]:
    return [line.strip() for line in out.splitlines() if line.startswith("  ")]


def test_what_is_slower_is_named(run):
    rows = [operator_row(0.2), store_row(4.0), attention_row(0.1)]
    assert run(rows, rows)[0] == 0
    code, out = run(rows, [operator_row(0.2), store_row(4.6), attention_row(0.1)])
    assert code == 1
    assert worse(out) == ["SLOWER: reference_store embedded float32 30 32: epoch store 1.15x"]
    assert "1 of 6 measurements are worse by more than 10%" in out
    code, out = run(rows, [operator_row(0.23), store_row(4.0), attention_row(0.05)])
    assert code == 1
    assert worse(out) == ["SLOWER: linear_logprob smollm2 512 float32 ours-strict both: time 1.15x"]
    assert "faster" in out


def test_memory_is_compared_as_well(run):
    rows = [operator_row(extra_bytes=100 * 2**20)]
    code, out = run(rows, [operator_row(extra_bytes=120 * 2**20)])
    assert code == 1 and worse(out)[0].startswith("MORE MEMORY") and worse(out)[0].endswith("1.20x")
    assert run(rows, [operator_row(extra_bytes=108 * 2**20)])[0] == 0
    assert run([operator_row(extra_bytes=0)], [operator_row(extra_bytes=64)])[0] == 1
    assert run([operator_row(extra_bytes=0)], [operator_row(extra_bytes=0)])[0] == 0


def test_noise_is_no_regression(run):
    code, out = run([operator_row(0.2, spread=0.15)], [operator_row(0.25, spread=0.15)])
    assert code == 0 and "noise" in out and worse(out) == []  # 0.2125 to 0.2875 and up to 0.23
    assert run([operator_row(0.2, spread=0.05)], [operator_row(0.25, spread=0.05)])[0] == 1


@pytest.mark.parametrize(("tolerance", "code"), [("0.3", 0), ("0.2", 1)])
def test_tolerance(run, tolerance, code):
    rows = [operator_row(0.2)], [operator_row(0.25)]
    assert run(*rows, "--tolerance", tolerance)[0] == code


def test_a_rate_is_worse_when_it_falls(run):
    fast, slow = (operator_row(pairs_per_s=rate) for rate in (2000, 1500))
    code, out = run([fast], [slow])
    assert code == 1 and worse(out)[0].endswith("pairs_per_s 0.75x")
    assert run([slow], [fast])[0] == 0


def test_what_is_not_ours_is_shown_but_does_not_count(run):
    names = ("gemms-3", "materialised", "ours-strict")
    old = [operator_row(0.2, contender=name) for name in names]
    new = [operator_row(0.3, contender=name) for name in names[:2]] + old[2:]
    code, out = run(old, new)
    assert code == 0 and out.count("not ours: worse") == 2 and "was the machine busy?" in out


def test_the_newest_row_of_a_case_counts(run):
    assert run([operator_row(0.2)], [operator_row(0.4), operator_row(0.2)])[0] == 0
    assert run([operator_row(0.2)], [operator_row(0.2), operator_row(0.4)])[0] == 1


def test_cases_of_one_file_only_are_listed(run):
    code, out = run([operator_row(), store_row()], [operator_row(), prompts_row()])
    assert code == 0
    assert "old.jsonl: reference_store embedded float32 30 32" in out
    assert "new.jsonl: shared_prompts tiny d float32 8 4096" in out
    code, out = run([operator_row()], [store_row()])
    assert code == 2 and "no case in common" in out


@pytest.mark.parametrize(
    ("field", "value"),
    [("device", "Other CPU"), ("torch", "2.14.0"), ("threads", 1), ("cpu_flags", {"amx": False})],
)
def test_another_machine_is_refused(run, field, value):
    rows = [operator_row(0.2)], [operator_row(0.4, **{field: value})]
    code, out = run(*rows)
    assert code == 2 and f"{field} differs" in out and json.dumps(value) in out
    assert "--across-machines" in out and "new / old" not in out
    code, out = run(*rows, "--across-machines")
    assert code == 1 and f"warning: {field} differs" in out and "SLOWER" in out


def test_samples_and_keys_of_several_fields(run, monkeypatch):
    """Rows of a benchmark that keeps its samples, and names its case in an object."""
    other = Benchmark(name="other", keys=("case", "times"), arguments=[], quick=[], limit_s=1)
    monkeypatch.setitem(cases.BY_NAME, "other", other)

    def row(pairs: int, *samples: float, **fields) -> dict:
        case = {"benchmark": "other", "case": {"pairs": pairs, "precision": "float32"}}
        return MACHINE | case | {"step_s": [*samples], "empty_s": []} | fields

    old = [row(4, 1.0, 1.1, 1.2), row(16, 4.0, 4.0), row(4, 1.0, times=2)]
    code, out = run(old, [row(4, 1.05, 1.3, 1.4), row(16, 5.0, 5.1), row(4, 1.0, times=2)])
    assert code == 1 and "noise" in out
    assert worse(out) == ["SLOWER: other 16 float32: step_s 1.26x"]


def test_threads_tell_cases_of_attention_apart(run):
    rows = [attention_row(0.2, threads=1), attention_row(0.1, threads=2)]
    code, out = run(rows, rows[::-1])
    assert code == 0 and "warning" not in out and out.count("1.000") == 2


def test_reports_are_compared_with_rows(tmp_path, capsys):
    old = write_rows(tmp_path / "old.jsonl", operator_row(0.2))
    rows = {"linear_logprob": [operator_row(0.3)]}
    new = write_report(tmp_path / "new.json", rows)
    assert compare.main([str(old), str(new)]) == 1
    assert "SLOWER" in capsys.readouterr().out
    failed = write_report(tmp_path / "failed.json", rows, verdict="FAILED: exit code 1")
    assert compare.main([str(new), str(failed)]) == 1
    assert "newly failing: linear_logprob: FAILED: exit code 1" in capsys.readouterr().out
    assert compare.main([str(failed), str(failed)]) == 0


ROW = json.dumps(operator_row())
PART = '{"parts": {"x": {"verdict": "passed", "found": %s}}}'


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", f"{ROW}\n{ROW[:40]}", "a.jsonl, line 2: not JSON"),
        ("a.jsonl", f"{ROW}\n\n[1]\n", "a.jsonl, line 3: [1]; expected an object"),
        ("a.jsonl", json.dumps({"benchmark": "nobody's"}), 'line 1: benchmark "nobody\'s"'),
        ("a.jsonl", '{"benchmark": "attention", "median_s": 1}', "row of attention without case"),
        ("a.jsonl", json.dumps(operator_row(median_s=None)), "line 1: no number in time"),
        ("a.jsonl", json.dumps(operator_row(p80_s=float("nan"))), "line 1: no number in time"),
        ("a.json", "{", "a.json: not JSON"),
        ("a.json", "{}", "a.json: KeyError: 'parts'; expected"),
        ("a.json", '{"parts": {"x": 1}}', "a.json: TypeError"),
        ("a.json", PART % '{"rows": [{}]}', "a.json, part x, row 1: "),
        ("a.json", PART % "3", "a.json: AttributeError"),
        ("a.jsonl", None, "a.jsonl: cannot be read"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, capsys, name, text, says):
    good = write_rows(tmp_path / "good.jsonl", operator_row())
    if text is not None:
        (tmp_path / name).write_text(text)
    for files in ([good, tmp_path / name], [tmp_path / name, good]):
        assert compare.main([str(path) for path in files]) == 2
        out = capsys.readouterr().out
        assert out.startswith("error: ") and says.replace('"', "'") in out.replace('"', "'"), out


def test_the_files_of_this_repository_are_read(capsys):
    """Those of before each row said its benchmark."""
    files = [RESULTS / "amd-epyc-2-cores.jsonl", RESULTS / "attention" / "amd-epyc-2-cores.jsonl"]
    for file in files:
        assert compare.main([str(file), str(file)]) == 0
        out = capsys.readouterr().out
        assert "ours" in out and "0 of " in out and "0 of 0" not in out
