"""The benchmark of the reference store: what its rows say, and that it refuses other losses."""

import json

import pytest

from benchmarks import reference_store


def epochs(monkeypatch, *, step_s: dict[str, float], loss: dict[str, float]) -> None:
    """In place of runs of train.py: two steps each, the store's with a second before them."""

    def epoch(own, overrides, folder, args):
        assert "dpo.max_num_steps=2" in overrides
        way = "resident" if "reference.mode=resident" in own else "store"
        way = "cold" if "cold" in own[-1] else way
        steps = [{"train/loss": loss.get(way, 0.5), "perf/step_s": step_s[way]} for _ in range(2)]
        steps[0]["perf/sweep_s"] = 1.0
        return steps

    monkeypatch.setattr(reference_store, "epoch", epoch)


def run(tmp_path) -> int:
    few = ["--model", "embedded", "--rounds", "3", "--steps", "2", "--threads", "1"]
    return reference_store.main([*few, "--results", str(tmp_path)])


@pytest.mark.parametrize(("resident", "code"), [(5.0, 0), (2.0, 3)])
def test_rows_and_the_bar(resident, code, tmp_path, monkeypatch, capsys):
    epochs(monkeypatch, step_s={"resident": resident, "store": 2.0, "cold": 4.0}, loss={})
    assert run(tmp_path) == code
    [file] = tmp_path.glob("*.jsonl")
    row = json.loads(file.read_text())
    resident_s = 2 * resident + 1  # its digest is taken before the first step as well
    assert row["epoch"]["store"]["median_s"] == 5.0
    assert row["speed_up"] == pytest.approx(resident_s / 5)
    assert row["speed_up_with_sweep"] == pytest.approx(resident_s / 9)
    assert ("met" if code == 0 else "missed") in capsys.readouterr().out


def test_no_time_is_told_when_losses_differ(tmp_path, monkeypatch, capsys):
    epochs(monkeypatch, step_s={"resident": 5, "store": 2, "cold": 4}, loss={"store": 0.6})
    assert run(tmp_path) == 1
    assert "no time is reported" in capsys.readouterr().out and not list(tmp_path.iterdir())
