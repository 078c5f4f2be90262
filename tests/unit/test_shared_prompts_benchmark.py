"""The benchmark of shared prompts: what its rows say, and that it refuses other numbers."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import sys
from dataclasses import replace
import numpy as np
from benchmarks import shared_prompts

results, is_wrong = sys.argv[1], sys.argv[2] == "wrong"
build = shared_prompts.micro_batches

def wrong(pairs, rows, cut, references):
    if cut.share == "prompt":  # one reference log-prob is off
        return build(pairs, rows, cut, lambda i: references(i) + np.float32(0.01) * (i == 0))
    return build(pairs, rows, cut, references)

if is_wrong:
    shared_prompts.micro_batches = wrong
few = ["--model", "tiny", "--pairs", "8", "--rounds", "2", "--threads", "1"]
sys.exit(shared_prompts.main([*few, "--results", results]))
"""


@pytest.mark.parametrize("kind", ["right", "wrong"])
def test_rows_and_refusal(kind, tmp_path):
    """In a process of its own, since it starts Megatron."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "rows"), kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    if kind == "wrong":
        assert done.returncode == 1, done.stderr
        assert "no speed is reported" in done.stdout and not (tmp_path / "rows").exists()
        return
    assert done.returncode in (0, 3), done.stderr  # how fast it is, this machine decides
    [file] = (tmp_path / "rows").glob("*.jsonl")
    [row] = [json.loads(line) for line in file.read_text().splitlines()]
    medians = {share: times["median_s"] for share, times in row["step"].items()}
    assert row["speed_up"] == pytest.approx(medians["nothing"] / medians["prompt"])
    assert row["token_ratio"] == row["tokens"]["nothing"] / row["tokens"]["prompt"]
    assert (row["speed_up"] / row["token_ratio"] >= 0.85) == (done.returncode == 0)
    # Embedded pairs: 15 to 18 tokens of prompt, 16 to 25 of each response.
    assert 1.2 < row["token_ratio"] < 1.4
    assert {"date", "commit", "device", "threads"} <= row.keys()
