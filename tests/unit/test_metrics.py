"""Loggers, progress lines and environment.json."""

import io
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from reinforcer_tp import environment, trackers
from reinforcer_tp.config import ConfigError, LoggerConfig
from reinforcer_tp.metrics import (
    Progress,
    check_loggers,
    environment_info,
    open_loggers,
    train_line,
    validation_line,
)

_JSONL_ONLY = LoggerConfig(tensorboard_enabled=False)
_CONFIG = {"dpo": {"seed": 42}, "policy": {"megatron_cfg": {"lr": 1e-3}, "fp8": None}}
_STEP = {
    "train/loss": 0.65123,
    "train/rewards/accuracies": 0.7125,
    "train/rewards/margins": 0.12345,
    "train/grad_norm": 1.304,
    "train/lr": 1e-3,
    "perf/step_s": 0.412,
}


def read_lines(folder) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def log_steps(folder, steps, *, resume_step=0, config=_JSONL_ONLY):
    with open_loggers(config, str(folder), _CONFIG, resume_step) as logger:
        for step in steps:
            logger.log(step, {"train/loss": 1 / (step + 1)})


def test_jsonl_is_valid_for_any_number(tmp_path):
    with open_loggers(_JSONL_ONLY, str(tmp_path / "new"), _CONFIG, 0) as logger:
        values = [math.nan, math.inf, -math.inf, None, torch.tensor(0.5), np.float32(0.25), 7]
        logger.log(3, {f"m{i}": value for i, value in enumerate(values)})
        flushed = read_lines(tmp_path / "new")
    expected = {"step": 3, "m0": None, "m1": None, "m2": None, "m3": None}
    assert flushed == [{**expected, "m4": 0.5, "m5": 0.25, "m6": 7}]


def test_resume_cuts_later_lines(tmp_path):
    log_steps(tmp_path, [0, 1, 2, 2, 3])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "train/lo')  # the process died while it wrote
    log_steps(tmp_path, [3, 4], resume_step=2)
    assert [line["step"] for line in read_lines(tmp_path)] == [0, 1, 2, 2, 3, 4]
    log_steps(tmp_path, [0, 1])
    assert [line["step"] for line in read_lines(tmp_path)] == [0, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("bad", ["nonsense", "[1]", '{"loss": 1}'])
def test_resume_refuses_a_damaged_file(tmp_path, bad):
    log_steps(tmp_path, [1])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(bad + "\n")
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"metrics.jsonl line 2 is .* expected a JSON object"):
        open_loggers(_JSONL_ONLY, str(tmp_path), _CONFIG, 1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_tensorboard_has_the_same_names_and_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_steps(tmp_path, [1, 2, 3], config=LoggerConfig())
    log_steps(tmp_path, [3, 4], resume_step=2, config=LoggerConfig())
    with open_loggers(LoggerConfig(), str(tmp_path), _CONFIG, 4) as logger:
        logger.log(5, {"train/loss": 0.125, "train/grad_norm": math.nan})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    expected = [(s, 1 / (s + 1)) for s in (1, 2, 3, 4)] + [(5, 0.125)]
    assert found == [(step, pytest.approx(value)) for step, value in expected]


@pytest.mark.parametrize("package", ["wandb", "mlflow", "swanlab", "trackio"])
def test_missing_package_names_the_extra(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)  # as if not installed
    config = replace(_JSONL_ONLY, **{f"{package}_enabled": True})
    expected = rf"logger.{package}_enabled=true.*pip install 'reinforcer-tp\[{package}\]'"
    with pytest.raises(ConfigError, match=expected):
        check_loggers(config)
    with pytest.raises(ConfigError, match=expected):
        open_loggers(config, str(tmp_path / "run"), _CONFIG, 0)
    assert not (tmp_path / "run").exists()
    check_loggers(_JSONL_ONLY)


def test_a_plain_folder_is_no_package(tmp_path, monkeypatch):
    """wandb and mlflow leave such folders in the working directory."""
    (tmp_path / "some_tracker_folder").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not trackers._is_installed("some_tracker_folder")
    assert trackers._is_installed("json")


class FakeService:
    """A module that records its calls as (name, args, kwargs)."""

    def __init__(self, monkeypatch, name: str):
        self.calls: list[tuple] = []
        self.num_runs = 0
        self.module = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, self.module)

    def record(self, name: str, result=None):
        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return result(kwargs) if callable(result) else result

        return call

    def add(self, name: str, result=None) -> None:
        setattr(self.module, name, self.record(name, result))

    def new_id(self, given: str | None) -> str:
        self.num_runs += 1
        return given or f"id{self.num_runs}"


def log_two_runs(folder, service: FakeService, config) -> list[list[tuple]]:
    """The calls of a run of two steps, of its resumption after step 1, and of a fresh start."""
    calls = []
    for resume_step in (0, 1, 0):
        with open_loggers(config, str(folder), _CONFIG, resume_step) as logger:
            logger.log(resume_step + 1, {"train/loss": 0.5, "train/lr": math.nan})
        calls.append(list(service.calls))
        service.calls.clear()
    return calls


def test_wandb(tmp_path, monkeypatch):
    service = FakeService(monkeypatch, "wandb")

    def start(kwargs):
        run_id = service.new_id(kwargs["id"])
        log, finish = service.record("log"), service.record("finish")
        return SimpleNamespace(id=run_id, log=log, finish=finish)

    service.add("init", start)
    config = replace(
        _JSONL_ONLY,
        wandb_enabled=True,
        wandb=replace(_JSONL_ONLY.wandb, project="p", name="dpo-dev-8-gpu", entity="team"),
    )
    first, resumed, fresh = log_two_runs(tmp_path, service, config)
    asked = {
        "project": "p",
        "name": "dpo-dev-8-gpu",
        "entity": "team",
        "dir": str(tmp_path),
        "config": _CONFIG,
    }
    assert first == [
        ("init", (), {**asked, "id": None, "resume": None, "allow_val_change": False}),
        ("log", ({"train/loss": 0.5},), {"step": 1}),
        ("finish", (), {}),
    ]
    assert resumed[0][2] == {**asked, "id": "id1", "resume": "allow", "allow_val_change": True}
    assert resumed[1] == ("log", ({"train/loss": 0.5},), {"step": 2})
    assert fresh[0] == first[0]


def test_mlflow(tmp_path, monkeypatch):
    service = FakeService(monkeypatch, "mlflow")

    def start(kwargs):
        return SimpleNamespace(info=SimpleNamespace(run_id=service.new_id(kwargs["run_id"])))

    service.add("start_run", start)
    for name in ("set_tracking_uri", "set_experiment", "log_params", "log_metrics", "end_run"):
        service.add(name)
    section = replace(
        _JSONL_ONLY.mlflow, experiment_name="e", run_name="r", tracking_uri="sqlite:///x.db"
    )
    config = replace(_JSONL_ONLY, mlflow_enabled=True, mlflow=section)
    first, resumed, fresh = log_two_runs(tmp_path, service, config)
    opening = [("set_tracking_uri", ("sqlite:///x.db",), {}), ("set_experiment", ("e",), {})]
    params = {"dpo.seed": 42, "policy.megatron_cfg.lr": 1e-3, "policy.fp8": None}
    assert first == [
        *opening,
        ("start_run", (), {"run_id": None, "run_name": "r"}),
        ("log_params", (params,), {}),
        ("log_metrics", ({"train/loss": 0.5},), {"step": 1}),
        ("end_run", (), {}),
    ]
    assert resumed == [  # MLflow refuses parameters a second time
        *opening,
        ("start_run", (), {"run_id": "id1", "run_name": "r"}),
        ("log_metrics", ({"train/loss": 0.5},), {"step": 2}),
        ("end_run", (), {}),
    ]
    assert fresh == first


def test_mlflow_gets_at_most_100_parameters_at_once(tmp_path, monkeypatch):
    service = FakeService(monkeypatch, "mlflow")
    service.add("start_run", SimpleNamespace(info=SimpleNamespace(run_id="x")))
    for name in ("set_experiment", "log_params", "end_run"):
        service.add(name)
    config = replace(_JSONL_ONLY, mlflow_enabled=True)
    many = {f"k{i}": i for i in range(250)}
    open_loggers(config, str(tmp_path), many, 0).close()
    sent = [args[0] for name, args, _ in service.calls if name == "log_params"]
    assert [len(part) for part in sent] == [100, 100, 50]
    assert {k: v for part in sent for k, v in part.items()} == many


def test_swanlab(tmp_path, monkeypatch):
    service = FakeService(monkeypatch, "swanlab")
    for name in ("init", "log", "finish"):
        service.add(name)
    section = replace(_JSONL_ONLY.swanlab, project="p", name="n")
    config = replace(_JSONL_ONLY, swanlab_enabled=True, swanlab=section)
    first, resumed, fresh = log_two_runs(tmp_path, service, config)
    asked = first[0][2]
    assert asked == {
        "project": "p",
        "experiment_name": "n",
        "config": _CONFIG,
        "logdir": str(tmp_path / "swanlab"),
        "id": asked["id"],
        "resume": "allow",
    }
    assert len(asked["id"]) == 21 and asked["id"].isalnum()
    assert first[1:] == [("log", ({"train/loss": 0.5},), {"step": 1}), ("finish", (), {})]
    assert resumed[0] == first[0]
    assert resumed[1] == ("log", ({"train/loss": 0.5},), {"step": 2})
    assert fresh[0][2]["id"] != asked["id"]


def test_trackio(tmp_path, monkeypatch):
    service = FakeService(monkeypatch, "trackio")
    for name in ("init", "log", "finish"):
        service.add(name)
    section = replace(_JSONL_ONLY.trackio, project="p")
    config = replace(_JSONL_ONLY, trackio_enabled=True, trackio=section)
    first, resumed, fresh = log_two_runs(tmp_path, service, config)
    asked = first[0][2]
    assert asked == {"project": "p", "name": asked["name"], "config": _CONFIG, "resume": "never"}
    assert first[1:] == [("log", ({"train/loss": 0.5},), {"step": 1}), ("finish", (), {})]
    assert resumed[0][2] == {**asked, "resume": "allow"}
    assert fresh[0][2]["name"] != asked["name"]


def test_nothing_of_the_environment_is_written(tmp_path, monkeypatch):
    secret = "canary-d41d8cd98f"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "SWANLAB_API_KEY"):
        monkeypatch.setenv(name, secret)
    log_steps(tmp_path, [1], config=LoggerConfig())
    assert secret not in json.dumps(environment_info({"tp": 1}))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 2
    assert all(secret.encode() not in path.read_bytes() for path in files)


def test_close_runs_every_closer_once(tmp_path, monkeypatch):
    service = FakeService(monkeypatch, "trackio")
    for name in ("init", "log", "finish"):
        service.add(name)
    config = replace(_JSONL_ONLY, trackio_enabled=True)
    with (
        pytest.raises(RuntimeError, match="training failed"),
        open_loggers(config, str(tmp_path), _CONFIG, 0) as logger,
    ):
        raise RuntimeError("training failed")
    logger.close()
    assert [name for name, _, _ in service.calls] == ["init", "finish"]


def test_train_line():
    expected = (
        "step 12/60 | loss 0.6512 | acc 0.713 | margin 0.1235 | grad_norm 1.30 | lr 1.0e-03"
        " | 0.41 s | ETA 0:00:20"
    )
    assert train_line(12, 60, _STEP, "0:00:20") == expected
    bare = {name.removeprefix("train/"): value for name, value in _STEP.items()}
    assert train_line(12, 60, bare, "0:00:20") == expected
    assert train_line(1, 2, {"train/loss": 0.5, "train/lr": None}) == "step 1/2 | loss 0.5000"


def test_validation_line():
    metrics = {
        "validation/loss": 0.63124,
        "validation/rewards/accuracies": 0.9948,
        "validation/rewards/margins": -0.12,
        "validation/num_pairs": 192,
    }
    assert validation_line(25, metrics) == (
        "validation after step 25 | loss 0.6312 | acc 0.995 | margin -0.1200 | 192 pairs"
    )


def test_plain_progress(capsys):
    """Steps at 100.5, 101, 103 s; the first took 0.5 s: the pace after step 13 is 1 s."""
    times = iter([100.5, 101.0, 103.0])
    progress = Progress(60, 10, True, console=Console(file=io.StringIO()), clock=times.__next__)
    for step in (11, 12, 13):
        progress.update(step, {"train/loss": 0.5, "perf/step_s": 0.5})
        progress.message(f"saved [step_{step}]")
    progress.close()
    assert capsys.readouterr().out.splitlines() == [
        "step 11/60 | loss 0.5000 | 0.50 s | ETA 0:00:24",
        "saved [step_11]",
        "step 12/60 | loss 0.5000 | 0.50 s | ETA 0:00:24",
        "saved [step_12]",
        "step 13/60 | loss 0.5000 | 0.50 s | ETA 0:00:47",
        "saved [step_13]",
    ]


def test_progress_is_silent_on_other_ranks(capsys):
    terminal = Console(file=io.StringIO(), force_terminal=True)
    for console in (terminal, None):
        with Progress(60, 0, False, console=console) as progress:
            progress.update(1, _STEP)
            progress.message("text")
    assert terminal.file.getvalue() == ""
    assert capsys.readouterr() == ("", "")


def test_progress_bar_on_a_terminal(capsys):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=150, _environ={"TERM": "xterm"})
    with Progress(60, 10, True, console=console, clock=iter([5.0, 6.0]).__next__) as progress:
        progress.update(11, _STEP)
        progress.message("saved [step_11]")
        progress.update(12, _STEP)
    shown = screen.getvalue()
    assert "12/60" in shown and "loss 0.6512" in shown and "acc 0.71" in shown
    assert "ETA 0:00:34" in shown  # (1 + 0.412) / 2 * 48
    assert "saved [step_11]" in shown
    assert shown.rstrip().endswith("\x1b[?25h")  # the cursor is back
    assert capsys.readouterr().out == ""


def run_git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, timeout=60)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_state(tmp_path, monkeypatch):
    unknown = {"commit": None, "dirty": None}
    package = tmp_path / "reinforcer_tp"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert environment.git_state(package) == unknown  # no repository
    run_git(tmp_path, "init", "-q")
    assert environment.git_state(package) == unknown  # no commit
    (tmp_path / "other").write_text("")
    run_git(tmp_path, "add", "other")
    run_git(tmp_path, "commit", "-q", "-m", "other")
    assert environment.git_state(package) == unknown  # the repository of somebody else
    run_git(tmp_path, "add", "reinforcer_tp")
    run_git(tmp_path, "commit", "-q", "-m", "ours")
    state = environment.git_state(package)
    head = (tmp_path / ".git" / "logs" / "HEAD").read_text().split()
    assert state == {"commit": state["commit"], "dirty": False}
    assert len(state["commit"]) == 40 and state["commit"] in head
    (package / "__init__.py").write_text("changed")
    assert environment.git_state(package) == {**state, "dirty": True}
    monkeypatch.setenv("PATH", "")
    assert environment.git_state(package) == unknown  # no git


def test_environment_info(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    info = json.loads(json.dumps(environment_info({"tp": 2, "pp": 4})))
    assert info["layout"] == {"tp": 2, "pp": 4}
    assert (info["world_size"], info["num_nodes"]) == (16, 2)
    assert info["git"] == {"commit": None, "dirty": None}
    assert info["versions"]["torch"] == torch.__version__
    for package in ("megatron-core", "transformers", "datasets"):
        assert info["versions"][package]
    assert environment._version("no-such-package-at-all") is None
    assert len(info["devices"]) == max(1, torch.cuda.device_count())
