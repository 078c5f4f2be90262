"""G3: poisoned files in every place that a run reads: nothing in them is executed.

Each case is a fresh copy of good files with one of them replaced, edited or added, loaded by the
function that a run calls, in a forked process. An audit hook there writes down what would be an
execution: it stands below Python's own code, so nothing that is imported can avoid it.
"""

import contextlib
import gzip
import hashlib
import json
import os
import random
import resource
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.figures import Figures
from tests.faults.payloads import MARK, code, contents, edits
from tests.faults.poison_targets import TARGETS, Target, make_good

TITLE = "poisoned files: nothing is executed"
CPU_S, WALL_S = 6.0, 120.0  # that a case may take; the machine may do other things, too
_STARTS = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "pty.spawn",
    "socket.connect",
    "socket.getaddrinfo",
    "pickle.find_class",
    "winreg.ConnectRegistry",
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One file of a target and what becomes of it."""

    target: str
    file: str
    payload: str

    def __str__(self) -> str:
        return f"{self.target}: {self.file} <- {self.payload}"


def run(budget: float, seed: int, folder: Path) -> Figures:
    """`budget` 1.0 = every payload in every file, about 1,500 cases."""
    good = folder / "good"
    make_good(good)
    canary = folder / "canary"
    cases = all_cases(canary)
    if budget < 1.0:
        cases = random.Random(seed).sample(cases, max(round(len(cases) * budget), 50))
    counts: Counter = Counter()
    failures: list[str] = []
    by_target: dict[str, list[Case]] = {}
    for case in cases:
        by_target.setdefault(case.target, []).append(case)
    for name, some in by_target.items():
        for case, outcome, problems in _in_fork(name, some, good, folder, canary):
            counts[outcome] += 1
            failures += [f"{case}: {problem}" for problem in problems]
    lost = len(cases) - sum(counts.values())
    failures += [f"{lost} cases gave no answer"] if lost else []
    executed = sum("executed" in failure for failure in failures)
    return Figures("G3", TITLE, {"files": len(cases), "executed": executed, **counts}, failures)


def all_cases(canary: Path) -> list[Case]:
    names = {"replaced": sorted(contents(canary)), "edited": sorted(edits(canary))}
    return [
        Case(target=target.name, file=file, payload=f"{how}: {name}")
        for target in TARGETS
        for file in (*target.files, *target.extra)
        for how in ("replaced", "edited")
        if how == "replaced" or file.endswith(".json")
        for name in names[how]
        if how == "edited" or _fits(file, name)
    ]


def _fits(file: str, name: str) -> bool:
    """Templates are tried where templates are, the large header where tensors are."""
    if name.startswith("template:"):
        return file.endswith((".jinja", ".yaml"))
    if name == "safetensors: a header of 100 MB":
        return file.endswith(".safetensors")
    return True


def _in_fork(
    name: str, cases: list[Case], good: Path, folder: Path, canary: Path
) -> Iterator[tuple[Case, str, list[str]]]:
    """The outcomes of one target's cases; each loader sees a process that no case has crashed."""
    target = next(target for target in TARGETS if target.name == name)
    begin = 0
    while begin < len(cases):
        results = folder / f"results_{hashlib.sha256(str(cases[begin]).encode()).hexdigest()[:8]}"
        pid = os.fork()
        if pid == 0:
            try:
                _child(target, cases[begin:], good, folder, canary, results)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        _, status = os.waitpid(pid, 0)
        lines = results.read_text().splitlines() if results.exists() else []
        for line, case in zip(lines, cases[begin:], strict=False):
            outcome, problems = json.loads(line)
            yield case, outcome, problems
        begin += len(lines)
        if begin < len(cases):
            yield cases[begin], "crashed", [f"the process died, status {status}"]
            begin += 1


def _child(
    target: Target, cases: list[Case], good: Path, folder: Path, canary: Path, results: Path
) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    target.load(good / target.folder)  # must work, and imports what it needs
    payloads, changes = contents(canary), edits(canary)
    watch = Watch(folder / "watched.log")
    with open(results, "w") as output:
        for number, case in enumerate(cases):
            place = folder / f"case_{os.getpid()}_{number}"
            shutil.copytree(good / target.folder, place, symlinks=True)
            _poison(place, case, payloads, changes, canary, target)
            outcome, problems = _try(target, place, case, watch)
            if canary.exists():
                problems.append("executed: the canary is there")
                canary.unlink()
            output.write(json.dumps([outcome, problems]) + "\n")
            output.flush()
            shutil.rmtree(place, ignore_errors=True)


def _poison(
    place: Path, case: Case, payloads: dict, changes: dict, canary: Path, target: Target
) -> None:
    how, _, name = case.payload.partition(": ")
    file = place / case.file
    for folder in {place, file.parent}:  # what auto_map and tokenizer_class name
        (folder / "evil.py").write_text(f"{code(canary)}\nclass Evil: pass\n")
    file.unlink(missing_ok=True)
    if how == "edited":
        original = file_of_good(place, case, target)
        change = changes[name]
        edited = original | change if isinstance(original, dict) else [*original, change]
        content = json.dumps(edited).encode()
    else:
        content = payloads[name]
        content = gzip.compress(content) if file.suffix == ".gz" else content
    file.write_bytes(content)
    target.seal(place, case.file)


def file_of_good(place: Path, case: Case, target: Target) -> Any:
    good = place.parent / "good" / target.folder / case.file
    return json.loads(good.read_text()) if good.exists() else {}


def _try(target: Target, place: Path, case: Case, watch: "Watch") -> tuple[str, list[str]]:
    problems: list[str] = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin, begin_cpu = time.monotonic(), _cpu_s()
    with watch.of(place, place / case.file):
        try:
            target.load(place)
            outcome = "never read" if case.file in target.extra else "harmless"
        except target.refusals as error:
            outcome = "refused"
            if "\n" in str(error):
                problems.append(f"its error has several lines: {str(error)[:200]!r}")
        except Exception as error:  # a crash is no refusal
            outcome = "crashed"
            trace = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(trace.filename).name}:{trace.lineno}"
            problems.append(f"{type(error).__name__} at {where}: {str(error)[:200]}")
    if case.file in target.extra and watch.was_read:
        problems.append("it was opened, though no run needs it")
    seconds, cpu_s = time.monotonic() - begin, _cpu_s() - begin_cpu
    if seconds > WALL_S or cpu_s > CPU_S:
        problems.append(f"it took {seconds:.1f} s, {cpu_s:.1f} s of processor time")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if grown > 600 << 10:  # KiB
        problems.append(f"it took {grown >> 10} MiB more memory")
    return outcome, problems + [f"executed: {what}" for what in watch.found()]


def _cpu_s() -> float:
    """Of this process and of the children that it has waited for."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


class Watch:
    """The audit hook. It also works in forks of this process, so it writes to a file."""

    def __init__(self, log: Path) -> None:
        self._log, self._place, self._file = str(log), None, None
        self.was_read = False
        self._busy = False
        sys.addaudithook(self._hook)

    @contextlib.contextmanager
    def of(self, place: Path, file: Path) -> Iterator[None]:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._log)
        self.was_read = False
        self._place, self._file = str(place), str(file)
        try:
            yield
        finally:
            self._place = None

    def found(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return Path(self._log).read_text().splitlines()
        return []

    def _hook(self, event: str, arguments: tuple) -> None:
        if self._place is None or self._busy:
            return
        self._busy = True
        try:
            if event == "open" and arguments[0] == self._file:
                self.was_read = True
            elif self._is_execution(event, arguments):
                with open(self._log, "a") as log:
                    log.write(f"{event} {str(arguments)[:300]!r}\n")
        finally:
            self._busy = False

    def _is_execution(self, event: str, arguments: tuple) -> bool:
        if event in _STARTS:
            return True
        if event == "compile":
            source, name = arguments[0], str(arguments[1])
            return name.startswith(self._place) or (_has_mark(source) and not _is_template(name))
        if event == "exec":
            name = arguments[0].co_filename
            return name.startswith(self._place) or (
                MARK in arguments[0].co_names and not _is_template(name)
            )
        if event in ("import", "ctypes.dlopen"):
            return any(str(part).startswith(self._place) for part in arguments if part)
        return event == "marshal.loads" and _has_mark(arguments[0])


def _is_template(name: str) -> bool:
    return name in ("<template>", "<unknown>")  # of Jinja's sandbox, where the text is a constant


def _has_mark(source: object) -> bool:
    if isinstance(source, bytes | bytearray):
        return MARK.encode() in source
    return isinstance(source, str) and MARK in source
