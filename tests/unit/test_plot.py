"""What the figures of the benchmarks show."""

import pytest

from benchmarks import plot
from benchmarks.cases import newest
from tests.unit.result_files import (
    attention_row,
    operator_row,
    prompts_row,
    store_row,
    write_report,
    write_rows,
)


def bars(panel: plot.Panel) -> list[tuple[str, float]]:
    return [(bar.name, bar.what.value) for bar in panel.bars]


def test_the_newest_row_of_each_bar_is_taken():
    written = [("a", 1.0, 8), ("b", 2.0, 8), ("a", 3.0, 8), ("a", 4.0, 9)]
    rows = [operator_row(seconds, contender=name, n=n) for name, seconds, n in written]
    lines = plot.operator(list(newest(rows).values()))
    assert [line[0].title for line in lines] == [
        "smollm2 N=8 float32, both",
        "smollm2 N=9 float32, both",
    ]
    assert [bars(line[0]) for line in lines] == [[("b", 2.0), ("a", 3.0)], [("a", 4.0)]]


def test_the_operators_passes_are_side_by_side_with_memory():
    rows = [operator_row(i, **{"pass": p}) for i, p in enumerate(("forward", "backward", "both"))]
    rows[0]["extra_bytes"], rows[1]["extra_bytes"] = 7, None
    [line] = plot.operator([*rows, operator_row(9, contender="gemms-3", extra_bytes=0)])
    assert [bars(panel) for panel in line] == [
        [("ours-strict", 0)],
        [("ours-strict", 1)],
        [("ours-strict", 2), ("gemms-3", 9)],
        [("ours-strict", 2**20)],
    ]


def test_attention_by_case_and_dtype():
    rows = [
        attention_row(seconds, contender, threads=threads, dtype=dtype)
        for dtype in ("bfloat16", "float32")
        for threads in (1, 2)
        for contender, seconds in (("sdpa loop", 0.3 / threads), ("ours", 0.1 / threads))
    ]
    lines = plot.attention(rows)
    assert [[panel.title for panel in line] for line in lines] == [
        ["64 short, bfloat16"],
        ["64 short, float32"],
    ]
    assert bars(lines[1][0]) == [
        ("sdpa loop, 1 thread", 0.3),
        ("ours, 1 thread", 0.1),
        ("sdpa loop, 2 threads", 0.15),
        ("ours, 2 threads", 0.05),
    ]
    assert [bar.note for bar in lines[1][0].bars] == ["", "3.00x", "", "3.00x"]


def test_shared_prompts_and_the_store():
    [[step, tokens]] = plot.shared_prompts([prompts_row()])
    assert bars(step) == [("prompt twice", 1.4), ("once", 1.0)]
    assert bars(tokens) == [("prompt twice", 150), ("once", 100)]
    assert (step.bars[1].note, tokens.bars[1].note) == ("1.40x", "1.50x fewer")
    [[epoch]] = plot.reference_store([store_row()])
    assert bars(epoch) == [("resident", 5.0), ("store", 4.0), ("cold", 6.0)]
    assert [bar.note for bar in epoch.bars] == ["", "1.25x", "0.83x, swept first"]


def test_a_kind_without_a_drawing_of_its_own_is_drawn(monkeypatch, tmp_path):
    monkeypatch.setattr(plot, "KINDS", {})
    lines = plot.anything([store_row(4.0)])
    assert [line[0].title for line in lines] == ["epoch resident", "epoch store", "epoch cold"]
    assert bars(lines[1][0]) == [("embedded float32 30 32", 4.0)]
    assert plot.main([str(write_rows(tmp_path / "a.jsonl", store_row()))]) == 0


def test_every_file_has_its_figure(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    assert plot.main([]) == 1
    assert "benchmarks.run_all" in capsys.readouterr().out
    rows = {
        "linear_logprob": [operator_row(), operator_row(0.1, contender="gemms-3", extra_bytes=0)],
        "attention": [attention_row(0.1), attention_row(0.3, "sdpa loop")],
        "shared_prompts": [prompts_row()],
        "reference_store": [store_row()],
    }
    files = [write_rows(tmp_path / "a.jsonl", *rows["linear_logprob"])]
    files += [write_rows(tmp_path / name / "a.jsonl", *of) for name, of in rows.items()]
    files.append(write_report(tmp_path / "runs" / "a.json", rows | {"failed": []}))
    assert plot.main([]) == 0
    for path in files:
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG"), path
    height = [int.from_bytes(p.with_suffix(".png").read_bytes()[20:24], "big") for p in files]
    assert height[-1] > sum(height[1:-1]) - 200, "a report shows all that it has"


@pytest.mark.parametrize("names", [["bad.jsonl"], ["good.jsonl", "bad.jsonl"], ["none.jsonl"]])
def test_a_file_that_cannot_be_drawn_is_named(tmp_path, names, capsys):
    write_rows(tmp_path / "good.jsonl", store_row())
    (tmp_path / "bad.jsonl").write_text("{")
    assert plot.main([str(tmp_path / name) for name in names]) == 1
    assert f"error: {tmp_path / names[-1]}" in capsys.readouterr().out
    assert (tmp_path / "good.png").exists() == ("good.jsonl" in names)
