"""Fault points do what the environment asks for, nothing otherwise, and every one has its test."""

import ast
import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reinforcer_tp import faultpoints
from reinforcer_tp.config_check import ConfigError
from reinforcer_tp.faultpoints import FAULT_POINTS, POISON_POINTS, VARIABLE, fault_point, poison

ROOT = Path(__file__).resolve().parents[2]


def calls(function: str) -> list[str]:
    """The names that `function` is called with in the package, which must be literals."""
    found = []
    for path in ROOT.glob("reinforcer_tp/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == function:
                assert isinstance(node.args[0], ast.Constant), f"{path}:{node.lineno}: no literal"
                found.append(node.args[0].value)
    return found


@pytest.mark.parametrize(
    ("function", "table"), [("fault_point", FAULT_POINTS), ("poison", POISON_POINTS)]
)
def test_every_name_stands_in_the_source_and_every_call_has_a_name(function, table):
    assert set(calls(function)) == set(table)


def test_every_fault_point_has_kills():
    from tests.faults.kills import cases

    assert {case.point for case in cases()} == set(FAULT_POINTS)
    killed = {(case.point, case.layout, case.who) for case in cases()}
    whos = {who for _, _, who in killed}
    assert whos == {"rank 0", "rank 1", "both"}
    assert len(killed) == len(FAULT_POINTS) * len({layout for _, layout, _ in killed}) * len(whos)


def in_a_process(faults: str, *points: str, rank: str = "0") -> subprocess.CompletedProcess:
    lines = "\n".join(f"fault_point({point})" for point in points)
    return subprocess.run(
        [sys.executable, "-c", f"from reinforcer_tp.faultpoints import fault_point\n{lines}"],
        env={VARIABLE: faults, "RANK": rank, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("faults", "rank", "status"),
    [
        ("ckpt.begin:kill", "0", -9),
        ("ckpt.begin:exit", "0", 1),
        ("ckpt.begin:term", "0", -15),
        ("ckpt.begin@rank=1:kill", "0", 0),
        ("ckpt.begin@rank=1:kill", "1", -9),
        ("ckpt.begin@hit=2:kill", "0", -9),
        ("ckpt.begin@hit=3:kill", "0", 0),
        ("ckpt.begin@step=4:kill", "0", -9),
        ("ckpt.begin@step=5:kill", "0", 0),
        ("ckpt.begin@hit=1,step=4,rank=1:kill", "1", -9),
        ("ckpt.begin@hit=2,step=4:kill", "0", 0),
        ("ckpt.begin:sleep=0.01; ckpt.folder:exit", "0", 1),
    ],
)
def test_faults_act_where_rank_step_and_hit_say(faults, rank, status):
    points = ['"ckpt.begin"', '"step.begin", 4', '"ckpt.begin"', '"ckpt.folder"']
    result = in_a_process(faults, *points, rank=rank)
    assert result.returncode == status, result.stderr
    armed = [line for line in result.stderr.splitlines() if "faults are armed" in line]
    assert len(armed) == 1 and faults in armed[0]


def test_an_error_of_the_disk(monkeypatch):
    monkeypatch.setenv(VARIABLE, "ckpt.shard.mid@hit=2:raise=ENOSPC")
    fault_point("ckpt.shard.mid")
    with pytest.raises(OSError, match=r"armed at ckpt\.shard\.mid") as error:
        fault_point("ckpt.shard.mid")
    assert error.value.errno == errno.ENOSPC
    fault_point("ckpt.shard.mid")


@pytest.mark.parametrize(
    "faults",
    [
        "ckpt.begin",
        "ckpt.begin:",
        "ckpt.begun:kill",
        "ckpt.begin@rank=zero:kill",
        "ckpt.begin@when=1:kill",
        "ckpt.begin@rank=1:kill=3",
        "ckpt.begin:nan=0",
        "ckpt.begin:sleep=soon",
        "ckpt.begin:raise=ENOTHING",
        "ckpt.begin:__import__('os').abort()",
        "ckpt.begin:kill,ckpt.folder:kill",
    ],
)
def test_what_is_no_fault_is_refused(faults, monkeypatch):
    monkeypatch.setenv(VARIABLE, faults)
    with pytest.raises(ConfigError, match=f"{VARIABLE}: .* expected "):
        fault_point("step.end")


def test_nothing_is_armed_by_default(monkeypatch, capfd):
    monkeypatch.delenv(VARIABLE, raising=False)
    values = torch.zeros(3)
    fault_point("step.begin", 1)
    assert poison("unknown", values) is values
    assert capfd.readouterr() == ("", "")


def test_poison_spoils_one_element_once(monkeypatch):
    monkeypatch.setitem(faultpoints.POISON_POINTS, "values", "a test's")
    monkeypatch.setenv(VARIABLE, "values@hit=2:-inf=7")
    values = torch.ones(2, 2, requires_grad=True)
    assert poison("values", values) is values
    spoilt = poison("values", values)
    assert spoilt[1, 1] == -torch.inf and spoilt.isfinite().sum() == 3 and values.isfinite().all()
    spoilt[0].sum().backward()
    assert values.grad.tolist() == [[1, 1], [0, 0]]
    gradient = torch.ones(3)
    monkeypatch.setenv(VARIABLE, "values:nan=1")
    assert poison("values", gradient) is gradient and gradient.isnan().tolist() == [0, 1, 0]
