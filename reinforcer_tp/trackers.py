"""Experiment trackers: Weights & Biases, MLflow, SwanLab and trackio, one function each.

None of them is imported unless it is enabled. The id of each run is kept in
<log_dir>/tracker_runs.json, so that a resumed run goes on in the same place.
"""

import json
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from reinforcer_tp.config import ConfigError
from reinforcer_tp.config_keys import flatten
from reinforcer_tp.untrusted import read_json

_MAX_MLFLOW_PARAMS = 100  # in one request (mlflow.utils.validation.MAX_PARAMS_TAGS_PER_BATCH)


@dataclass(frozen=True, kw_only=True)
class Tracker:
    """An open run of one service."""

    run_id: str  # finds the run again; trackio's is the run's name
    log: Callable[[Mapping[str, float], int], object]  # (metrics, step)
    close: Callable[[], object]


def check_trackers(logger_config) -> None:
    """Raise ConfigError naming the extra to install when an enabled package is missing."""
    for package in _enabled(logger_config):
        if not _is_installed(package):
            raise ConfigError(
                f"logger.{package}_enabled=true, but the package {package} is not installed; "
                f"run: pip install 'reinforcer-tp[{package}]', or set "
                f"logger.{package}_enabled=false"
            )


def open_trackers(
    logger_config, log_dir: Path, config_dict: dict, resume_step: int
) -> list[Tracker]:
    """Start the enabled trackers' runs, or go on with the recorded ones when `resume_step` > 0."""
    record = log_dir / "tracker_runs.json"
    run_ids = read_json(record) if resume_step > 0 and record.exists() else {}
    trackers = []
    for package in _enabled(logger_config):
        section = getattr(logger_config, package)
        tracker = _OPEN[package](section, log_dir, config_dict, run_ids.get(package))
        run_ids[package] = tracker.run_id
        trackers.append(tracker)
    if run_ids:
        record.write_text(json.dumps(run_ids, indent=2) + "\n")
    return trackers


def _open_wandb(section, log_dir: Path, config_dict: dict, run_id: str | None) -> Tracker:
    import wandb

    run = wandb.init(
        project=section.project,
        name=section.name,
        entity=section.entity,
        id=run_id,
        resume=None if run_id is None else "allow",
        dir=str(log_dir),
        config=config_dict,
        allow_val_change=run_id is not None,  # a resumed run may have a new max_num_steps
    )

    def log(metrics: Mapping[str, float], step: int) -> None:
        run.log(dict(metrics), step=step)

    return Tracker(run_id=run.id, log=log, close=run.finish)


def _open_mlflow(section, log_dir: Path, config_dict: dict, run_id: str | None) -> Tracker:
    import mlflow

    if section.tracking_uri is not None:
        mlflow.set_tracking_uri(section.tracking_uri)
    if section.experiment_name is not None:
        mlflow.set_experiment(section.experiment_name)
    run = mlflow.start_run(run_id=run_id, run_name=section.run_name)
    if run_id is None:  # MLflow refuses a parameter's second value
        params = list(flatten(config_dict).items())
        for start in range(0, len(params), _MAX_MLFLOW_PARAMS):
            mlflow.log_params(dict(params[start : start + _MAX_MLFLOW_PARAMS]))

    def log(metrics: Mapping[str, float], step: int) -> None:
        mlflow.log_metrics(dict(metrics), step=step)

    return Tracker(run_id=run.info.run_id, log=log, close=mlflow.end_run)


def _open_swanlab(section, log_dir: Path, config_dict: dict, run_id: str | None) -> Tracker:
    import swanlab

    run_id = run_id or uuid.uuid4().hex[:21]  # SwanLab's ids have 21 characters
    # experiment_name and logdir: older versions know only these, newer ones take them too.
    swanlab.init(
        project=section.project,
        experiment_name=section.name,
        config=config_dict,
        logdir=str(log_dir / "swanlab"),
        id=run_id,
        resume="allow",
    )

    def log(metrics: Mapping[str, float], step: int) -> None:
        swanlab.log(dict(metrics), step=step)

    return Tracker(run_id=run_id, log=log, close=swanlab.finish)


def _open_trackio(section, log_dir: Path, config_dict: dict, run_id: str | None) -> Tracker:
    import trackio

    name = run_id or section.name or f"run-{uuid.uuid4().hex[:8]}"
    trackio.init(
        project=section.project or "reinforcer_tp",  # it has no default of its own
        name=name,
        config=config_dict,
        resume="never" if run_id is None else "allow",
    )

    def log(metrics: Mapping[str, float], step: int) -> None:
        trackio.log(dict(metrics), step=step)

    return Tracker(run_id=name, log=log, close=trackio.finish)


_OPEN = {
    "wandb": _open_wandb,
    "mlflow": _open_mlflow,
    "swanlab": _open_swanlab,
    "trackio": _open_trackio,
}


def _enabled(logger_config) -> list[str]:
    return [package for package in _OPEN if getattr(logger_config, f"{package}_enabled")]


def _is_installed(package: str) -> bool:
    if sys.modules.get(package) is not None:
        return True
    spec = find_spec(package)
    return spec is not None and spec.origin is not None  # a plain folder ./wandb has no origin
