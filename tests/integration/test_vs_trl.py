"""benchmarks.vs_trl with our real train.py: beside a stand-in that writes what TRL's run does, and
beside TRL itself where REINFORCER_TP_TRL_PYTHON names the python of an environment that has it."""

import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks import vs_trl
from benchmarks.measure import read_rows
from benchmarks.vs_trl_rows import SIDES, tokenize
from reinforcer_tp.data.tokenizer import load_tokenizer
from reinforcer_tp.embedded import ensure_embedded

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
STAND_IN = """#!{python}
import json, sys, time
from pathlib import Path
settings = json.loads(Path(sys.argv[-1]).read_text())
folder = Path(settings["folder"])
steps = json.loads(Path({steps!r}).read_text())
for step in steps:
    with (folder / "steps.jsonl").open("a") as file:
        file.write(json.dumps(step) + chr(10))
    time.sleep(0.3)
run = dict(precompute_s=0.0, versions=dict(trl="none"))
(folder / "run.json").write_text(json.dumps(run))
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, Path]:
    """(model folder with a chat template, rows of messages)."""
    folder, embedded = tmp_path_factory.mktemp("vs_trl"), ensure_embedded()
    model = folder / "model"
    shutil.copytree(embedded.model, model)
    (model / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    lines = Path(embedded.train).read_text(encoding="utf-8").splitlines()[:8]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(_messages(json.loads(line))) + "\n" for line in lines))
    return model, data


def _messages(row: dict[str, str]) -> dict:
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {key: [{"role": role, "content": row[key].strip()}] for key, role in roles.items()}


def bench(inputs: tuple[Path, Path], results: Path, *args: str) -> int:
    model, data = inputs
    few = ["--quick", "--precision", "float32", "--threads", "1", "--results", str(results)]
    return vs_trl.main(["--model", str(model), "--data", str(data), *few, *args])


@pytest.fixture(scope="module")
def our_run(inputs, tmp_path_factory) -> dict:
    """The row of our own half, run once."""
    results = tmp_path_factory.mktemp("ours")
    assert bench(inputs, results, "--contenders", "ours") == 0
    (row,) = [row for path in results.glob("*.jsonl") for row in read_rows(path)]
    return row


def test_our_half_runs_the_real_entry_point(our_run):
    assert our_run["steps"][0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert len(our_run["steps"]) == 2 and len(our_run["step_s"]) == 1
    assert our_run["steps"][1]["lr"] == our_run["steps"][0]["lr"] == 1e-6
    assert 0 < our_run["step_s"][0] < our_run["first_step_s"] < 120
    assert 0.2 < our_run["peak_gib"] < 3 and our_run["info"]["pairs_used"] == 8


@pytest.fixture
def beside(inputs, our_run, tmp_path, monkeypatch):
    """Runs the benchmark beside a stand-in for TRL with the given losses; ours is the run above."""

    def run(losses: list[float], reverse: bool = False) -> int:
        model, data = inputs
        tokenizer = load_tokenizer(str(model), None)
        pairs = [tokenize(json.loads(line), tokenizer) for line in data.read_text().splitlines()]
        given = [{side: getattr(pair, side) for side in SIDES} for pair in pairs]
        steps = [
            {**our_run["steps"][i], "step": i + 1, "loss": loss, "pairs": given[4 * i : 4 * i + 4]}
            for i, loss in enumerate(losses)
        ]
        if reverse:
            steps[1]["pairs"].reverse()
        (tmp_path / "steps.json").write_text(json.dumps(steps))
        python = tmp_path / "python"
        python.write_text(
            STAND_IN.format(python=sys.executable, steps=str(tmp_path / "steps.json"))
        )
        python.chmod(0o755)
        real = vs_trl.run_contender

        def recorded(name, round_, case, setting, folder):
            if name != "ours":
                return real(name, round_, case, setting, folder)
            keys = ("steps", "stamps", "peak_gib", "prepare_s", "info")
            return vs_trl.Result(
                contender=name, round=round_, case=case, **{key: our_run[key] for key in keys}
            )

        monkeypatch.setattr(vs_trl, "run_contender", recorded)
        return bench(inputs, tmp_path / "results", "--trl-python", str(python))

    return run


def test_losses_that_agree_give_a_table(beside, our_run, tmp_path):
    losses = [step["loss"] for step in our_run["steps"]]
    assert beside([losses[0], losses[1] * (1 + 5e-5)]) in (0, 3)  # the stand-in is not slow
    (table,) = (tmp_path / "results").glob("*.md")
    assert "| trl | float32 |" in table.read_text() and "5.0e-05 relative" in table.read_text()
    assert len(list((tmp_path / "results").glob("*.png"))) == 1


def test_losses_that_differ_are_no_comparison(beside, our_run, tmp_path, capsys):
    losses = [step["loss"] for step in our_run["steps"]]
    assert beside([losses[0], 0.7002]) == 1
    said = capsys.readouterr().out
    assert f"step 2: the loss is {losses[1]:.7g} (ours) and 0.7002 (trl)" in said
    assert "pairs/s" not in said and not (tmp_path / "results").exists()


def test_other_pairs_are_no_comparison(beside, our_run, capsys):
    assert beside([step["loss"] for step in our_run["steps"]], reverse=True) == 1
    assert "trl was given other tokens: step 2, pair 0, chosen: token" in capsys.readouterr().out


def test_the_same_as_trl(inputs, tmp_path, capsys):
    python = os.environ.get("REINFORCER_TP_TRL_PYTHON")
    if not python:
        pytest.skip("REINFORCER_TP_TRL_PYTHON is not set: no environment with TRL")
    code = bench(inputs, tmp_path, "--trl-python", python, "--reference", "precomputed")
    assert code in (0, 3), capsys.readouterr().out
    (file,) = tmp_path.glob("*.jsonl")
    ours, trl = read_rows(file)
    for a, b in zip(ours["steps"], trl["steps"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["logps_chosen"] == pytest.approx(b["logps_chosen"], rel=1e-5)
