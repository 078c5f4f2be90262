"""One run of one trainer in a process of its own, watched from outside: for benchmarks.vs_trl.

Both trainers get the same rows, threads and caches (empty ones, in the run's folder).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TRL_RUN = Path(__file__).with_name("trl_run.py")
OPTIMIZER = {
    "lr": 1e-6,  # TRL's default
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.01,  # of matrices alone, in both trainers
    "max_grad_norm": 1.0,
}
BETA = 0.1
MAX_LENGTH = 512  # tokens of a side
TRL_MICRO_BATCH_PAIRS = 4
POLL_S = 0.02
MEMORY_POLL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is asked of every contender alike."""

    pairs: int  # in an optimizer step
    precision: str  # float32 | bfloat16
    reference: str  # resident: run in every step; precomputed: once, before the first
    steps: int


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all cases share."""

    model: str  # folder
    rows: str  # file of the selected pairs
    threads: int
    micro_batch_tokens: int  # ours
    trl_python: str


@dataclass(kw_only=True)
class Result:
    contender: str
    round: int
    case: Case
    steps: list[dict]  # loss, grad_norm, logps_chosen, logps_rejected, tokens (ours), pairs (TRL)
    stamps: list[float]  # seconds from the start of the process to the end of each step
    peak_gib: float  # of all its processes together
    prepare_s: float  # of the reference, before the first step
    info: dict = field(default_factory=dict)

    @property
    def step_s(self) -> list[float]:
        """Between ends of steps: all of it, data and logging too. The first step is no part."""
        return [b - a for a, b in zip(self.stamps, self.stamps[1:], strict=False)]

    def to_row(self) -> dict:
        row = asdict(self) | {"first_step_s": self.stamps[0], "step_s": self.step_s}
        row["steps"] = [{k: v for k, v in step.items() if k != "pairs"} for step in self.steps]
        return row


@dataclass(frozen=True, kw_only=True)
class Watched:
    stamps: list[float]  # seconds from the start to the end of each step
    peak_gib: float
    held_kib: list[tuple[float, int]]  # (seconds from the start, memory then)


# What sets one TRL contender apart from another; README.md of the results says what they mean.
TRL_CONTENDERS = {
    "trl": {"weights": "as asked", "autocast": False, "checkpointing": False},
    "trl-checkpointing": {"weights": "as asked", "autocast": False, "checkpointing": True},
    "trl-autocast": {"weights": "float32", "autocast": True, "checkpointing": False},
}
CONTENDERS = ("ours", *TRL_CONTENDERS)


def run_contender(name: str, round_: int, case: Case, setting: Setting, folder: Path) -> Result:
    """Raises RuntimeError where the run fails or ends early."""
    folder.mkdir(parents=True)
    run = _run_ours if name == "ours" else _run_trl
    result = run(name, round_, case, setting, folder)
    if len(result.steps) != case.steps or len(result.stamps) != case.steps:
        raise RuntimeError(f"{name} did {len(result.steps)} steps, expected {case.steps}")
    return result


def our_overrides(case: Case, setting: Setting, folder: Path) -> list[str]:
    mode = {"resident": "resident", "precomputed": "store"}[case.reference]
    optimizer = "policy.megatron_cfg.optimizer"
    values = {
        "policy.model_name": setting.model,
        "policy.precision": case.precision,
        "policy.train_global_batch_size": case.pairs,
        "policy.micro_batch_tokens": setting.micro_batch_tokens,
        "policy.max_total_sequence_length": MAX_LENGTH,
        "policy.max_grad_norm": OPTIMIZER["max_grad_norm"],
        f"{optimizer}.lr": OPTIMIZER["lr"],
        f"{optimizer}.adam_beta1": OPTIMIZER["beta1"],
        f"{optimizer}.adam_beta2": OPTIMIZER["beta2"],
        f"{optimizer}.adam_eps": OPTIMIZER["eps"],
        f"{optimizer}.weight_decay": OPTIMIZER["weight_decay"],
        "policy.megatron_cfg.scheduler.lr_decay_style": "constant",
        "policy.megatron_cfg.scheduler.lr_warmup_iters": 0,
        "data.dataset_name": "auto",
        "data.train_data_path": setting.rows,
        "data.shuffle": "false",
        "dpo.reference_policy_kl_penalty": BETA,
        "dpo.max_num_steps": case.steps,
        "dpo.max_num_epochs": 1,
        "dpo.val_period": 0,
        "reference.mode": mode,
        "checkpointing.enabled": "false",
        "checkpointing.export_hf": "false",
        "logger.tensorboard_enabled": "false",
        "logger.log_dir": folder / "run",
    }
    if mode == "store":
        values["reference.store_dir"] = folder / "store"
    return [f"{key}={value}" for key, value in values.items()]


def _run_ours(name: str, round_: int, case: Case, setting: Setting, folder: Path) -> Result:
    script = str(ROOT / "reinforcer_tp" / "train.py")
    command = [sys.executable, script, *our_overrides(case, setting, folder)]
    environment = _environment(setting, folder) | {"PYTHONPATH": str(ROOT)}
    metrics = folder / "run" / "metrics.jsonl"
    watched = watch(command, environment, metrics, folder / "output.txt")
    lines = read_lines(metrics)
    report = json.loads((folder / "run" / "data_report.json").read_text(encoding="utf-8"))
    names = {"loss": "loss", "grad_norm": "grad_norm", "lr": "lr", "tokens": "num_tokens"}
    names |= {"logps_chosen": "logps/chosen", "logps_rejected": "logps/rejected"}
    return Result(
        contender=name,
        round=round_,
        case=case,
        steps=[{k: line[f"train/{v}"] for k, v in names.items()} for line in lines],
        stamps=watched.stamps,
        peak_gib=watched.peak_gib,
        prepare_s=lines[0]["perf/sweep_s"] if lines else 0.0,
        info={"pairs_used": report["train"]["used"]},
    )


def trl_settings(name: str, case: Case, setting: Setting, folder: Path) -> dict:
    own = TRL_CONTENDERS[name]
    micro_batch = min(case.pairs, TRL_MICRO_BATCH_PAIRS)
    return {
        "model": setting.model,
        "data": setting.rows,
        "folder": str(folder),
        "weights": case.precision if own["weights"] == "as asked" else own["weights"],
        "autocast": own["autocast"] and case.precision == "bfloat16",
        "checkpointing": own["checkpointing"],
        "micro_batch_pairs": micro_batch,
        "accumulation": case.pairs // micro_batch,
        "precompute": case.reference == "precomputed",
        "steps": case.steps,
        "max_length": MAX_LENGTH,
        "beta": BETA,
        "optimizer": OPTIMIZER,
    }


def _run_trl(name: str, round_: int, case: Case, setting: Setting, folder: Path) -> Result:
    settings = folder / "settings.json"
    settings.write_text(json.dumps(trl_settings(name, case, setting, folder)), encoding="utf-8")
    # -P: this folder's files must not shadow what TRL imports.
    command = [setting.trl_python, "-P", str(TRL_RUN), str(settings)]
    steps = folder / "steps.jsonl"
    watched = watch(command, _environment(setting, folder), steps, folder / "output.txt")
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return Result(
        contender=name,
        round=round_,
        case=case,
        steps=read_lines(steps),
        stamps=watched.stamps,
        peak_gib=watched.peak_gib,
        prepare_s=run.pop("precompute_s"),
        info=run,
    )


def _environment(setting: Setting, folder: Path) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    threads = str(setting.threads)
    return environment | {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "REINFORCER_TP_CACHE": str(folder / "cache"),
    }


def watch(command: list[str], environment: dict[str, str], steps: Path, output: Path) -> Watched:
    """Runs `command`; `steps` is the file to which it adds a line as each step ends. RuntimeError
    with the end of its output where it fails."""
    stamps: list[float] = []
    held: list[tuple[float, int]] = []
    peak_kib = 0
    begin = time.perf_counter()
    with output.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            while process.poll() is None:
                time.sleep(POLL_S)
                now = time.perf_counter() - begin
                stamps += [now] * (_count_lines(steps) - len(stamps))  # one, but for tiny models
                if not held or now >= held[-1][0] + MEMORY_POLL_S:
                    now_kib, most_kib = memory_kib(process.pid)
                    peak_kib = max(peak_kib, most_kib)
                    held += [(now, now_kib)] * (now_kib > 0)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if process.returncode != 0:
        said = output.read_text(encoding="utf-8", errors="replace").strip()[-1500:]
        raise RuntimeError(f"{command[1:3]} ended with {process.returncode}: {said}")
    stamps += [time.perf_counter() - begin] * (_count_lines(steps) - len(stamps))
    return Watched(stamps=stamps, peak_gib=peak_kib / 2**20, held_kib=held)


def memory_kib(pid: int) -> tuple[int, int]:
    """What the process and its children hold (VmRSS), and the most that the process has held
    (VmHWM) with what its children hold."""
    children = sum(_status(child, "VmRSS") for child in _descendants(pid))
    return _status(pid, "VmRSS") + children, _status(pid, "VmHWM") + children


def _status(pid: int, name: str) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:  # it has just ended
        return 0
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith(name)), 0)


def _descendants(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in path.read_text(encoding="utf-8").split()]
        except OSError:
            continue
        found += [d for child in children for d in (child, *_descendants(child))]
    return found


def _count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
