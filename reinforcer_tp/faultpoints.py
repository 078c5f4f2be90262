"""Places where a test can make this process fail: named, and off unless the environment arms them.

    REINFORCER_TP_FAULTS='ckpt.manifest.mid@rank=0,hit=2:kill;step.begin@step=3:sleep=5'

Each fault is `NAME[@CONDITION=N,...]:ACTION`. Conditions are `rank`, `step` (of the latest
`step.begin`), `row` (poison points: a pair of the micro-batch, by its row in the source) and `hit`
(only the n-th call that fulfils the others); without `hit` every call acts.
Actions: kill, stop, term (signals to this process), loop (never returns), sleep=SECONDS, skip (the
next all_reduce of torch.distributed does nothing),
raise=ERRNO (an OSError, such as ENOSPC), exit (status 1, no clean-up); for poison points nan=INDEX,
inf=INDEX, -inf=INDEX, huge=INDEX (of the flat tensor, modulo its size). Imports no torch.
"""

import errno
import os
import re
import signal
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from reinforcer_tp.config_check import ConfigError

VARIABLE = "REINFORCER_TP_FAULTS"
FAULT_POINTS = {  # name -> where it stands
    "run.config": "the run's folders exist, its config.yaml does not, or is that of the last time",
    "ckpt.begin": "before the first write of a checkpoint",
    "ckpt.folder": "the attempt's folder exists and is empty",
    "ckpt.shard.open": "before a shard's file is made",
    "ckpt.shard.mid": "in a shard, with half of its bytes written",
    "ckpt.shard.close": "a shard is written and synced",
    "ckpt.state": "before state.json is written",
    "ckpt.manifest.open": "before manifest.json is made",
    "ckpt.manifest.mid": "in manifest.json, with half of its bytes written",
    "ckpt.manifest.close": "manifest.json is written and synced",
    "ckpt.rename.before": "before the attempt's folder gets its final name",
    "ckpt.rename.after": "after that, before the parent folder is synced",
    "ckpt.prune.rename": "before an old checkpoint is renamed to be deleted",
    "ckpt.prune.delete": "an old checkpoint is renamed and not deleted yet",
    "load.begin": "before a checkpoint is read",
    "load.shard": "before one of its files is read",
    "load.end": "weights and optimizer are restored",
    "step.begin": "before a training step reads its data",
    "step.compute": "after forward and backward of a step",
    "step.optimizer.before": "before the optimizer changes a weight",
    "step.optimizer.after": "the weights are those of the next step",
    "step.end": "before the step's metrics are written",
    "validation": "before a validation",
    "export.folder": "the export's folder exists and is empty",
    "export.rename": "before the export gets its final name",
}
POISON_POINTS = {  # name -> which tensor
    "nonfinite.logps": "the policy's log-probs (N,) of a micro-batch's response tokens",
    "nonfinite.reference": "the reference's, likewise",
    "nonfinite.gradient": "the gradient of a micro-batch's hidden states after a model chunk",
    "nonfinite.reduced": "the first gradient of the first model chunk, after the reduction",
}
# "huge" is finite in float32 and bfloat16, its square is not
_VALUES = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "huge": 3e38}
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
_FAULT = re.compile(r"(?P<name>[a-z_.]+)(@(?P<conditions>[a-z=0-9,]+))?:(?P<action>[^:;@]+)")


@dataclass
class _Fault:
    name: str
    conditions: dict[str, int]
    action: str
    argument: str
    hits: int = 0

    def is_due(self, step: int | None, rows: Collection[int] = ()) -> bool:
        here = {"rank": (int(os.environ.get("RANK", "0")),), "step": (step,), "row": rows}
        if any(n not in here.get(key, (n,)) for key, n in self.conditions.items()):
            return False
        self.hits += 1
        return self.conditions.get("hit", self.hits) == self.hits


@dataclass
class _Armed:
    """The faults of one value of the variable, and how far this process has come."""

    text: str
    faults: list[_Fault] = field(default_factory=list)
    step: int | None = None


_armed = _Armed("")  # counts hits over calls, so it cannot be an argument


def fault_point(name: str, step: int | None = None) -> None:
    """Does what the environment asks for here: nothing, unless REINFORCER_TP_FAULTS is set.

    `step`: the training step that begins here; later points belong to it.
    """
    if VARIABLE not in os.environ:
        return
    assert name in FAULT_POINTS, name
    armed = armed_faults()
    if step is not None:
        armed.step = step
    for fault in armed.faults:
        if fault.name == name and fault.is_due(armed.step):
            _act(fault)


def faults_armed() -> bool:
    """Whether a point may do anything: asked where even to stand ready has a cost."""
    return VARIABLE in os.environ


def poison(name: str, tensor: Any, rows: Collection[int] = ()) -> Any:
    """`tensor`, or where the environment asks for it one with a value that is not finite.

    It is changed in place where no gradient flows through it, else copied. `rows`: of the
    micro-batch that it belongs to.
    """
    if VARIABLE not in os.environ:
        return tensor
    assert name in POISON_POINTS, name
    armed = armed_faults()
    for fault in armed.faults:
        if fault.name == name and tensor.numel() and fault.is_due(armed.step, rows):
            tensor = tensor.clone() if tensor.requires_grad else tensor
            tensor.view(-1)[int(fault.argument) % tensor.numel()] = _VALUES[fault.action]
    return tensor


def armed_faults() -> _Armed:
    """What the environment arms; said once on stderr. Raises ConfigError for what is no fault."""
    global _armed
    text = os.environ.get(VARIABLE, "")
    if text != _armed.text:
        faults = [_parse(part.strip()) for part in text.split(";") if part.strip()]
        _armed = _Armed(text, faults)
        print(f"warning: faults are armed: {VARIABLE}={text}", file=sys.stderr, flush=True)
    return _armed


def _parse(text: str) -> _Fault:
    match = _FAULT.fullmatch(text)
    if match is None:
        raise _mistake(text, "is no fault", "NAME@rank=0,hit=2:kill")
    name, (action, _, argument) = match["name"], match["action"].partition("=")
    if name not in FAULT_POINTS and name not in POISON_POINTS:
        raise _mistake(text, f"names no fault point: {name}", "one of reinforcer_tp/faultpoints.py")
    conditions = {}
    for condition in filter(None, (match["conditions"] or "").split(",")):
        key, _, number = condition.partition("=")
        if key not in ("rank", "hit", "step", "row") or not number.isdecimal():
            raise _mistake(text, f"has the condition {condition}", "rank=N, hit=N, step=N or row=N")
        conditions[key] = int(number)
    if not _is_action(action, argument, is_poison=name in POISON_POINTS):
        expected = "kill, stop, term, loop, skip, exit, sleep=SECONDS or raise=ENOSPC"
        if name in POISON_POINTS:
            expected = "nan=INDEX, inf=INDEX, -inf=INDEX or huge=INDEX"
        raise _mistake(text, f"has the action {match['action']}", expected)
    return _Fault(name, conditions, action, argument)


def _is_action(action: str, argument: str, *, is_poison: bool) -> bool:
    if is_poison:
        return action in _VALUES and argument.isdecimal()
    if action == "sleep":
        return re.fullmatch(r"\d+(\.\d+)?", argument) is not None
    if action == "raise":
        return argument in errno.errorcode.values()
    return (action in _SIGNALS or action in ("loop", "skip", "exit")) and not argument


def _mistake(text: str, got: str, expected: str) -> ConfigError:
    return ConfigError(f"{VARIABLE}: {text[:80]!r} {got}; expected {expected}; mend or unset it")


def _act(fault: _Fault) -> None:
    if fault.action in ("stop", "loop", "skip"):  # the clock of a hang starts here
        print(f"warning: {fault.action} at {fault.name}", file=sys.stderr, flush=True)
    if fault.action in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[fault.action])
    elif fault.action == "loop":
        while True:
            pass
    elif fault.action == "skip":
        _skip_next_all_reduce()
    elif fault.action == "sleep":
        time.sleep(float(fault.argument))
    elif fault.action == "raise":
        number = getattr(errno, fault.argument)
        raise OSError(number, f"{os.strerror(number)} (armed at {fault.name})")
    else:
        os._exit(1)


def _skip_next_all_reduce() -> None:
    import torch.distributed as dist

    whole = dist.all_reduce

    def skipped(*_: Any, **__: Any) -> None:
        dist.all_reduce = whole

    dist.all_reduce = skipped
