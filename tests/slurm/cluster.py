"""A real Slurm on this machine, and the jobs that tests submit to it."""

import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
NUM_NODES = 3
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
CANNOT_RUN = 77  # of up.sh
WAIT_S = 2.5  # between a requeue and the next start


def start(root: Path) -> subprocess.CompletedProcess:
    """up.sh with ports of its own; installs Debian's packages where they are missing."""
    variables = {
        "SLURM_TEST_ROOT": str(root),
        "SLURM_TEST_NODES": str(NUM_NODES),
        "SLURM_TEST_PORT": str(free_ports(NUM_NODES + 1)),
        "SLURM_TEST_GRACE": "40",
    }
    return subprocess.run(
        ["bash", HERE / "up.sh"],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=400,
    )


def stop(root: Path) -> None:
    command = ["bash", HERE / "down.sh", "--purge"]
    subprocess.run(command, env=os.environ | {"SLURM_TEST_ROOT": str(root)}, timeout=60)


def free_ports(count: int) -> int:
    """The first of so many free ones in a row, below the ephemeral ones."""
    for first in range(16817 + os.getpid() % 1000, 20000, count):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for number, each in enumerate(sockets):
                each.bind(("127.0.0.1", first + number))
            return first
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
    raise RuntimeError("no free ports in a row")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Commands with this cluster's configuration."""

    root: Path
    folder: Path  # job.out files and run folders
    seen_waiting: dict[str, float] = field(default_factory=dict)  # requeued job -> since when

    def run(self, *words: object, **environment: str) -> subprocess.CompletedProcess:
        variables = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "DPO_"))}
        variables |= {"SLURM_CONF": str(self.root / "etc" / "slurm.conf")} | environment
        return subprocess.run(
            [str(word) for word in words],
            env=variables,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def ask(self, *words: object) -> str:
        result = self.run(*words)
        assert result.returncode == 0, (words, result.stderr)
        return result.stdout

    def wake_requeued(self) -> None:
        """Requeued jobs would wait two minutes; at once they fail with a credential revoked."""
        for line in self.ask("squeue", "-h", "-t", "PENDING", "-o", "%A %r").splitlines():
            number, reason = line.split(maxsplit=1)
            if reason != "BeginTime":
                continue
            since = self.seen_waiting.setdefault(number, time.monotonic())
            if time.monotonic() - since > WAIT_S:
                self.run("scontrol", "update", f"JobId={number}", "StartTime=now")
                del self.seen_waiting[number]

    def submit(self, name: str, options: list[str], words: list[str], **environment: str) -> "Job":
        output = self.folder / f"{name}.out"
        command = ["sbatch", "--parsable", f"--output={output}", f"--job-name={name}", *options]
        result = self.run(*command, *words, **environment)
        assert result.returncode == 0, result.stderr
        return Job(self, int(result.stdout), output, self.folder / name)


class Job:
    """A submitted job and its run folder."""

    def __init__(self, cluster: Cluster, number: int, output: Path, run: Path) -> None:
        self.cluster, self.number, self.output, self.run = cluster, number, output, run

    def show(self) -> dict[str, str]:
        text = self.cluster.ask("scontrol", "-o", "show", "job", self.number)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def state(self) -> str:
        return self.show()["JobState"]

    def wait_for(self, what: Callable[[], object], within: float, why: str) -> None:
        deadline = time.monotonic() + within
        while not what():
            if time.monotonic() > deadline:
                raise AssertionError(f"{why}: not within {within} s\n{self.story()}")
            self.cluster.wake_requeued()
            time.sleep(0.3)

    def end(self, within: float = 120) -> str:
        """The state it ends in."""
        self.wait_for(
            lambda: self._has_ended() and not time.sleep(1) and self._has_ended(), within, "the end"
        )
        return self.state()

    def _has_ended(self) -> bool:
        return self.state() in ENDED

    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def story(self) -> str:
        """All that is known of it, for a failed test."""
        logs = [self.output, *sorted(self.run.glob("slurm/*.log"))]
        parts = [f"--- {p}\n{p.read_text(errors='replace')[-6000:]}" for p in logs if p.exists()]
        return "\n".join([str(self.show()), *parts])

    def ends(self) -> list[dict]:
        """exit.json of each attempt; {} of one that has left none."""
        folders = sorted(self.run.glob("attempts/[0-9]*"))
        files = [folder / "exit.json" for folder in folders]
        return [json.loads(file.read_text()) if file.exists() else {} for file in files]

    def codes(self) -> list[int | None]:
        return [end.get("code") for end in self.ends()]

    def launches(self) -> list[list[dict]]:
        """What the toy was given: for each start, by node."""
        starts: dict[int, dict[int, dict]] = {}
        for path in self.run.glob("slurm/launch.*.json"):
            restart, rank = map(int, path.name.split(".")[1:3])
            starts.setdefault(restart, {})[rank] = json.loads(path.read_text())
        return [[starts[r][rank] for rank in sorted(starts[r])] for r in sorted(starts)]

    def heartbeat_step(self) -> int:
        try:
            return json.loads((self.run / "heartbeat").read_text())["step"] or 0
        except (OSError, ValueError):
            return 0
