"""Cheap runs of the real train.py on two gloo ranks, to be killed, stopped, and started again.

The runs are forks of a process that has imported everything (tests/integration/forks.py), the model
has two layers of 16, and all runs share one reference store: one takes about a second.
"""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.numpy import load_file

from tests.integration.fork_server import CODES, MARK, QUICK_EXIT
from tests.integration.harness import (
    REPOSITORY,
    kill_marked,
    marked_processes,
    run_environment,
    start,
)
from tests.integration.random_model import make_random_llama, make_rows, write_jsonl

MEGATRON = "policy.megatron_cfg"
LAYOUTS = {
    "dp2": (),
    "tp2": (f"{MEGATRON}.tensor_model_parallel_size=2",),
    "pp2": (f"{MEGATRON}.pipeline_model_parallel_size=2", "policy.train_micro_batch_size=2"),
    "one": (),
}
STEPS, PERIOD = 12, 3  # of a run; steps between its checkpoints
WHO = {"rank 0": (0,), "rank 1": (1,), "both": (0, 1)}
RESUMED = re.compile(r"resumed .*?: (\d+) of")


@dataclass(frozen=True)
class Toy:
    """A tiny model and rows, and the folder that the runs are in."""

    folder: Path
    model: str
    rows: str
    held_out: str

    def overrides(self, layout: str, *extra: str) -> list[str]:
        return [
            f"policy.model_name={self.model}",
            "policy.max_total_sequence_length=96",
            "policy.train_global_batch_size=4",
            "data.dataset_name=auto",
            f"data.train_data_path={self.rows}",
            f"data.val_data_path={self.held_out}",
            f"dpo.max_num_steps={STEPS}",
            "dpo.max_num_epochs=100",
            "dpo.val_period=6",
            "dpo.val_batches=1",
            "dpo.val_global_batch_size=4",
            "dpo.val_at_start=false",
            "checkpointing.enabled=true",
            f"checkpointing.save_period={PERIOD}",
            "checkpointing.keep_top_k=1",
            "checkpointing.metric_name=validation/loss",
            "logger.tensorboard_enabled=false",
            f"reference.store_dir={self.folder}/store",
            *LAYOUTS[layout],
            *extra,
        ]


def make_toy(folder: Path) -> Toy:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = make_random_llama(folder / "model", **shape, **heads)
    columns = ("prompt", "chosen", "rejected")
    rows = [{name: row[name] for name in columns} for row in make_rows(26)]
    train = write_jsonl(folder / "rows.jsonl", rows[:22])
    return Toy(folder, model, train, write_jsonl(folder / "held_out.jsonl", rows[22:]))


class Live:
    """One running train.py with its processes; a context that leaves none of them behind."""

    def __init__(
        self,
        toy: Toy,
        layout: str,
        log_dir: Path,
        *extra: str,
        faults: str = "",
        env: dict[str, str] | None = None,
    ):
        self.log_dir = log_dir
        self.nproc = 1 if layout == "one" else 2
        self.mark = f"{MARK}={uuid.uuid4()}"
        name, value = self.mark.split("=")
        self._codes = log_dir.parent / f"{log_dir.name}.codes"
        self._codes.unlink(missing_ok=True)
        own = {name: value, QUICK_EXIT: "1", CODES: str(self._codes)} | (
            {"REINFORCER_TP_FAULTS": faults} if faults else {}
        )
        self._streams = [log_dir.parent / f"{log_dir.name}.{s}" for s in ("stdout", "stderr")]
        self.began = time.monotonic()
        script = str(REPOSITORY / "reinforcer_tp" / "train.py")
        with open(self._streams[0], "w") as stdout, open(self._streams[1], "w") as stderr:
            self.process = start(
                [script, *toy.overrides(layout, *extra), f"logger.log_dir={log_dir}"],
                self.nproc,
                fork=True,
                stdout=stdout,
                stderr=stderr,
                cwd=REPOSITORY,
                env=run_environment(env) | own,
            )

    def __enter__(self) -> "Live":
        return self

    def __exit__(self, *_) -> None:
        kill_marked(self.mark)
        self.process.wait(timeout=30)

    @property
    def stdout(self) -> str:
        return self._streams[0].read_text()

    @property
    def stderr(self) -> str:
        return self._streams[1].read_text()

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def ranks(self) -> list[int]:
        """Process ids in order of rank; fewer where some have ended."""
        keeper = self.process.pid
        try:
            return [int(x) for x in _proc(keeper, f"task/{keeper}/children").split()]
        except OSError:
            return []

    def wait(self, timeout_s: float) -> int | None:
        """The status of the whole: 0, or 1 where a rank failed; None when it goes on."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout=timeout_s)
        return None

    def survivors(self, timeout_s: float = 2.0) -> list[int]:
        """What of the run is alive, at the latest `timeout_s` from now."""
        deadline = time.monotonic() + timeout_s
        while alive := [p for p in marked_processes(self.mark) if state_of(p) not in "ZX"]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        return alive

    def codes(self) -> dict[int, int]:
        """Exit code of each rank that has ended, minus the signal that killed it."""
        lines = self._codes.read_text().splitlines() if self._codes.exists() else []
        return {int(rank): int(code) for rank, code in (line.split() for line in lines)}

    def start_step(self) -> int | None:
        """The step that this run went on from; None where it did not come so far."""
        found = RESUMED.search(self.stdout)
        return int(found[1]) if found else None

    def describe(self) -> str:
        """The end of what it said, for a failure's line."""
        said = [line for line in self.stderr.splitlines() if "faults are armed" not in line]
        return " / ".join(said[-3:])[-400:]


def send(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def wait_until_stopped(live: Live, rank: int, timeout_s: float = 30.0) -> list[int]:
    """The ranks' process ids once `rank` stands still (SIGSTOP); [] when that does not happen."""
    deadline = time.monotonic() + timeout_s
    pids: list[int] = []
    while time.monotonic() < deadline and live.process.poll() is None:
        pids = pids if len(pids) == live.nproc else live.ranks()
        if len(pids) == live.nproc and state_of(pids[rank]) == "T":
            return pids
        time.sleep(0.005)
    return []


def state_of(pid: int) -> str:
    """R, S, D, T (stopped), Z or X as /proc tells; X for a process that is gone."""
    try:
        return _proc(pid, "stat").rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def _proc(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


def logged_steps(log_dir: Path) -> list[int]:
    """Training steps in metrics.jsonl, in order; a torn last line is not counted."""
    return [line["step"] for line in metrics(log_dir) if "train/loss" in line]


def metrics(log_dir: Path) -> list[dict]:
    path = log_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    whole = []
    for number, line in enumerate(lines, start=1):
        try:
            whole.append(json.loads(line))
        except json.JSONDecodeError:
            assert number == len(lines), f"{path}:{number} is torn"
    return whole


def checkpoints(log_dir: Path) -> dict[int, Path]:
    """step -> folder of all that bears a checkpoint's final name."""
    folders = (log_dir / "checkpoints").glob("step_*")
    named = ((re.fullmatch(r"step_(\d+)", path.name), path) for path in folders)
    return dict(sorted((int(match[1]), path) for match, path in named if match))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint by its own manifest, read without the trainer's code."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        there = {path.name for path in folder.iterdir()} - {"manifest.json"}
        if there != files.keys():
            return f"{folder.name} holds {sorted(there)}, its manifest {sorted(files)}"
        for name, entry in files.items():
            content = (folder / name).read_bytes()
            if hashlib.sha256(content).hexdigest() != entry["sha256"]:
                return f"{folder.name}/{name} is not what its manifest says"
    except (OSError, ValueError, KeyError) as error:
        return f"{folder.name}: {type(error).__name__} {error}"
    return None


def tensors(folder: Path) -> dict[str, bytes]:
    """file:tensor -> type, shape and bytes of all safetensors in a folder.

    Without the state of Python's own generator, from which threads may draw at any time.
    """
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, value in load_file(path).items():
            if name == "random.python":
                continue
            found[f"{path.name}:{name}"] = f"{value.dtype}{value.shape}".encode() + value.tobytes()
    return found


def differing(got: dict[str, bytes], want: dict[str, bytes]) -> str | None:
    """Names of the tensors that are not bit-equal."""
    names = sorted(n for n in got.keys() | want.keys() if got.get(n) != want.get(n))
    return f"{len(names)} of {len(want)} tensors differ, such as {names[0]}" if names else None


def training_numbers(log_dir: Path) -> dict[int, dict[str, float]]:
    """step -> everything of a step that does not depend on the machine's speed."""
    found: dict[int, dict[str, float]] = {}
    for line in metrics(log_dir):
        part = {k: v for k, v in line.items() if k.startswith(("train/", "validation/"))}
        if part:
            found.setdefault(line["step"], {}).update(part)
    return found


@dataclass(frozen=True)
class Finished:
    """What an uninterrupted run of a layout ends with."""

    tensors: dict[str, bytes]
    export: dict[str, bytes]
    numbers: dict[int, dict[str, float]]
    seconds: float


def straight(toy: Toy, layout: str, *extra: str) -> Finished:
    """An uninterrupted run; the second one, so that the store is filled and its seconds count."""
    steps = steps_of(extra)
    for attempt in range(2):
        log_dir = toy.folder / f"straight_{layout}_{steps}_{attempt}"
        with Live(toy, layout, log_dir, *extra) as live:
            if live.wait(120) != 0:
                raise RuntimeError(f"the uninterrupted run of {layout} failed: {live.describe()}")
            seconds = live.seconds()
    return finished(log_dir, steps, seconds)


def steps_of(overrides: Sequence[str]) -> int:
    """Optimizer steps of a run with these overrides."""
    given = [int(o.split("=")[1]) for o in overrides if o.startswith("dpo.max_num_steps=")]
    return given[-1] if given else STEPS


def finished(log_dir: Path, steps: int, seconds: float = 0.0) -> Finished:
    final = checkpoints(log_dir).get(steps)
    return Finished(
        tensors={} if final is None else tensors(final),
        export=tensors(log_dir / "hf"),
        numbers=training_numbers(log_dir),
        seconds=seconds,
    )


def compare(log_dir: Path, want: Finished, *, training_only: bool = False) -> list[str]:
    """How a finished run differs from the uninterrupted one."""
    steps = max(want.numbers)
    got = finished(log_dir, steps)
    wrong = []
    if difference := differing(got.tensors, want.tensors):
        wrong.append(f"final checkpoint: {difference}")
    if difference := differing(got.export, want.export):
        wrong.append(f"export: {difference}")
    if logged_steps(log_dir) != list(range(1, steps + 1)):
        wrong.append(f"metrics.jsonl has the steps {logged_steps(log_dir)}")
    for step, numbers in want.numbers.items():
        there = got.numbers.get(step, {})
        names = [n for n in numbers if n.startswith("train/") or not training_only]
        if any(there.get(name) != numbers[name] for name in names):
            wrong.append(f"step {step} has other numbers")
            break
    return wrong
