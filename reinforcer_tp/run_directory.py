"""The run directory: who may write into it, and what it says about the run."""

import json
import os
from pathlib import Path
from typing import Any

from reinforcer_tp.checkpoint_folder import CheckpointError, read_json
from reinforcer_tp.config import Config, ConfigError, decisive, load_config, to_yaml
from reinforcer_tp.faultpoints import fault_point
from reinforcer_tp.lifecycle import attempts
from reinforcer_tp.resume import check_same_run
from reinforcer_tp.whole_files import BUILDING_NAME, write_whole

_FINISHED = "finished.json"


def check_run_directory(config: Config) -> bool:
    """Whether `logger.log_dir` already holds this run.

    Reads only, so every rank may call it before any process group exists.

    Raises:
        ConfigError: the folder holds something else, a run of another configuration, or a run
            that `checkpointing.resume=never` forbids to go on with.
    """
    folder = Path(config.logger.log_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"logger.log_dir={folder} is a file; expected a folder; choose another")
    if not folder.exists():
        parent = next(p for p in folder.absolute().parents if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise ConfigError(
                f"logger.log_dir={folder} cannot be made: {parent} is no folder that this user may "
                "write to; choose another"
            )
        return False
    if all(path.name in attempts.NAMES or _is_nothing(path) for path in folder.iterdir()):
        return False
    recorded = folder / "config.yaml"
    if not recorded.is_file():
        raise ConfigError(
            f"logger.log_dir={folder} is not empty and holds no run (no config.yaml); "
            "expected a new or empty folder; choose another"
        )
    before = load_config(str(recorded), [])
    check_same_run(
        f"logger.log_dir={folder}",
        decisive(before),
        decisive(config),
        config.checkpointing.allow_changed,
    )
    if config.checkpointing.resume == "never":
        raise ConfigError(
            f"logger.log_dir={folder} holds a run already and checkpointing.resume=never; "
            "choose another folder, or use checkpointing.resume=auto"
        )
    return True


def _is_nothing(path: Path) -> bool:
    """Whether it is what a run leaves that was killed at once: part of a file, empty folders."""
    if path.is_dir() and not path.is_symlink():
        return all(map(_is_nothing, path.iterdir()))
    return BUILDING_NAME.fullmatch(path.name) is not None


def write_run_directory(config: Config, environment: dict[str, Any], report: dict) -> None:
    """Writes config.yaml, environment.json and data_report.json. Rank 0 only."""
    folder = Path(config.logger.log_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"logger.log_dir={folder} cannot be made: {error}") from error
    fault_point("run.config")
    write_whole(folder / "config.yaml", to_yaml(config).encode())
    for name, content in (("environment.json", environment), ("data_report.json", report)):
        write_whole(folder / name, json.dumps(content, indent=2).encode() + b"\n")


def finished_steps(config: Config) -> int | None:
    """The number of steps after which this run ended, None when it has not."""
    path = Path(config.logger.log_dir) / _FINISHED
    if not path.is_file():
        return None
    steps = read_json(path).get("steps")
    if not isinstance(steps, int):
        raise CheckpointError(f"{path} holds no number of steps; remove it")
    return steps


def mark_finished(config: Config, steps: int) -> None:
    """Rank 0 only, after everything else is written."""
    path = Path(config.logger.log_dir) / _FINISHED
    write_whole(path, json.dumps({"steps": steps}).encode() + b"\n")
