"""The README is true: its table, its example class and its commands."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reinforcer_tp.health import SUMS as HEALTH_SUMS
from reinforcer_tp.health import health_metrics
from reinforcer_tp.lifecycle.exits import MEANING, Exit
from reinforcer_tp.preference_losses import LOSSES

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.S)


def commands() -> list[str]:
    found = []
    for language, text in BLOCKS:
        if language == "bash":
            lines = text.replace("\\\n", " ").splitlines()
            found += [line for line in lines if line and not line.startswith("#")]
    return found


def test_the_table_of_keys_is_up_to_date():
    spec = importlib.util.spec_from_file_location("config_table", ROOT / "docs" / "config_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.with_table(README) == README, "run python docs/config_table.py --write"
    for cells in module.rows(module.Config):
        assert all(cells), f"{cells[0]} has no comment in config.py"


def test_the_table_of_losses_is_complete():
    listed = re.findall(r"^\| `(\w+)` \| .*\|.*\|$", section("Losses"), flags=re.M)
    assert listed == list(LOSSES)


def test_the_table_of_exit_codes_is_complete():
    listed = re.findall(r"^\| (\d+) \| (\w+) \| (.*) \|$", README, flags=re.M)
    assert listed == [(str(int(code)), code.name, MEANING[code]) for code in Exit]


def test_the_metrics_of_health_are_listed():
    listed = re.findall(r"`((?:health|kl)/\w+|entropy)`", section("Is it going well?"))
    sums = dict.fromkeys(HEALTH_SUMS, 2.0) | {"health/margin": 0.5, "health/length": 0.5}
    assert set(listed) == set(health_metrics(sums))


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


TRAINING = [c for c in commands() if "reinforcer_tp/train.py" in c]


@pytest.mark.parametrize("command", TRAINING, ids=range(len(TRAINING)))
def test_every_training_command_is_valid(command):
    """With --check, and a model that is here in place of one of the hub's or of `make model`."""
    arguments = shlex.split(command)
    script = arguments.index("reinforcer_tp/train.py")
    overrides = [a for a in arguments[script + 1 :] if not a.startswith("policy.model_name=")]
    if "configs/dpo_smollm2.yaml" in overrides:
        overrides.append("policy.model_name=embedded")
    if "--check" not in overrides:
        overrides.append("--check")
    result = subprocess.run(
        [sys.executable, "reinforcer_tp/train.py", *overrides],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "configuration is valid" in result.stdout


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("make ")])
def test_every_make_target_exists(command):
    target = command.split()[1]
    result = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"@@|TODO|TBD|XXX", README)


def test_every_file_it_names_exists():
    for name in re.findall(r"(?:configs|slurm|docs)/[\w./]+\.(?:yaml|sh|py)", README):
        assert (ROOT / name).is_file(), name


def test_the_example_class_works(tmp_path):
    [source] = [text for language, text in BLOCKS if "class CustomDPODataset" in text]
    names: dict = {}
    exec(compile(source, "README.md", "exec"), names)  # our own file
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "What is 2+2?", "good": "4", "bad": "5"}\n')
    made = names["CustomDPODataset"](str(path), str(path), "question", "good", "bad")
    assert made.task_spec.dataset_name == "custom_dpo"
    assert made.formatted_ds["train"][0] == {
        "prompt": "What is 2+2?",
        "chosen_response": "4",
        "rejected_response": "5",
    }


def test_the_operators_example_works():
    [source] = [text for _, text in BLOCKS if "import vocab_parallel_linear_logprob" in text]
    names = {"hidden": torch.randn(6, 8), "weight": torch.randn(20, 8), "labels": torch.arange(6)}
    names |= {"tp_rank": 0, "tp_group": None, "vocab_size": 20}
    exec(compile(source, "README.md", "exec"), names)  # our own file
    expected = (
        (names["hidden"] @ names["weight"].T).log_softmax(1).gather(1, names["labels"][:, None])
    )
    torch.testing.assert_close(names["logps"], expected[:, 0])


def test_every_benchmark_it_names_exists():
    named = set(re.findall(r"python -m (benchmarks\.\w+)", README))
    assert len(named) >= 5 and all(importlib.util.find_spec(name) for name in named)
