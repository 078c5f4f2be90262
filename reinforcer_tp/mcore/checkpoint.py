"""Checkpoints of one layout: safetensors and JSON, complete or not there at all, and their resume.

    step_N/state.json                            step, layout, scheduler, loss scale, metrics, files
    step_N/model_tp00_pp00.safetensors           parameters of one stage and shard
    step_N/optimizer_tp00_pp00_dp00.safetensors  float32 masters and both moments

The data position is the step itself: global batches are a pure function of seed and step. There is
no dropout, so no generator state decides anything after the weights are drawn.
"""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from reinforcer_tp.mcore.model import PolicyModel
from reinforcer_tp.mcore.optim import Training
from reinforcer_tp.mcore.topology import Topology

_FORMAT = 1


def list_checkpoints(directory: Path) -> dict[int, Path]:
    """step -> folder of every complete checkpoint (those with a state.json), ascending."""
    found = {}
    for path in directory.glob("step_*"):
        match = re.fullmatch(r"step_(\d+)", path.name)
        if match and (path / "state.json").is_file():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint. Raises ValueError when it is not one of ours."""
    try:
        state = json.loads((folder / "state.json").read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder}/state.json is not JSON ({error}); remove the folder") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(f"{folder}/state.json has format {state.get('format')!r}, not {_FORMAT}")
    return state


def save_checkpoint(
    directory: Path,
    step: int,
    model: PolicyModel,
    training: Training,
    topology: Topology,
    *,
    fingerprint: str,
    data_fingerprint: str,
    reference: str | None,  # digest of the reference's weights
    metrics: dict[str, float],
) -> Path:
    """Writes `directory/step_N`, built under another name and renamed when whole. Collective."""
    folder = directory / f"step_{step}"
    building = directory / f"step_{step}.partial"
    if topology.is_rank_zero:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
    dist.barrier()
    if topology.dp_rank == 0:
        parameters = {n: _owned(p) for n, p in model.named_parameters()}
        save_file(parameters, building / _model_file(topology))
    if topology.dp_rank == 0 or _is_sharded(training):
        save_file(_optimizer_tensors(training), building / _optimizer_file(training, topology))
    dist.barrier()
    if topology.is_rank_zero:
        state = {
            "format": _FORMAT,
            "step": step,
            "layout": topology.layout() | {"layers_of_stages": list(model.stage_layers)},
            "sharded_optimizer": _is_sharded(training),
            "fingerprint": fingerprint,
            "data_fingerprint": data_fingerprint,
            "reference": reference,
            "metrics": {n: v if math.isfinite(v) else None for n, v in metrics.items()},
            "scheduler": {"num_steps": training.scheduler.num_steps},
            "group_steps": _group_steps(training),
            "grad_scaler": _scaler_state(training),
        }
        (building / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        building.rename(folder)
    dist.barrier()
    return folder


def check_resumable(
    folder: Path,
    state: dict[str, Any],
    *,
    fingerprint: str,
    data_fingerprint: str,
    layout: dict[str, Any],
) -> None:
    """Raises ValueError when the checkpoint is of another configuration, data or layout."""
    if state["fingerprint"] != fingerprint:
        raise ValueError(
            f"{folder} belongs to a run of another configuration; "
            "choose another checkpointing.checkpoint_dir"
        )
    if state["data_fingerprint"] != data_fingerprint:
        raise ValueError(
            f"the data has changed since {folder} was written (rows, tokenizer or chat template); "
            "put it back, or choose another logger.log_dir"
        )
    changed = [
        f"{k}={v} there, {layout[k]} here" for k, v in state["layout"].items() if v != layout[k]
    ]
    if changed:
        raise ValueError(
            f"{folder} was written under another layout ({', '.join(changed)}), and resuming "
            "across layouts is not built: use the same sizes, or a new logger.log_dir"
        )


@torch.no_grad()
def load_checkpoint(
    folder: Path, model: PolicyModel, training: Training, topology: Topology
) -> dict[str, Any]:
    """Restores weights, optimizer, scheduler and loss scale; returns the state. Collective."""
    state = read_state(folder)
    saved = load_file(folder / _model_file(topology))
    for name, parameter in model.named_parameters():
        parameter.copy_(saved[name])
    _restore_optimizer(training, load_file(folder / _optimizer_file(training, topology)), state)
    training.scheduler.num_steps = 0
    training.scheduler.step(increment=state["scheduler"]["num_steps"])
    if state["grad_scaler"] is not None:
        _set_scaler_state(training, state["grad_scaler"])
    dist.barrier()
    return state


def prune_checkpoints(
    directory: Path, keep_top_k: int | None, metric_name: str | None, higher_is_better: bool
) -> None:
    """Keeps the newest and the `keep_top_k` best by `metric_name` (None = the newest ones).

    `keep_top_k=None` keeps all. A checkpoint without the metric counts as the worst.
    """
    found = list_checkpoints(directory)
    if keep_top_k is None or not found:
        return

    def badness(step: int) -> tuple[float, int]:
        value = None
        if metric_name is not None:
            value = read_state(found[step])["metrics"].get(metric_name)
        if value is None:
            return float("inf") if metric_name is not None else 0.0, -step
        return (-value if higher_is_better else value), -step

    kept = {max(found), *sorted(found, key=badness)[:keep_top_k]}
    for step, folder in found.items():
        if step not in kept:
            doomed = folder.with_name(folder.name + ".deleting")
            folder.rename(doomed)  # a half-deleted folder must not look like a checkpoint
            shutil.rmtree(doomed, ignore_errors=True)


def _model_file(topology: Topology) -> str:
    return f"model_tp{topology.tp_rank:02d}_pp{topology.pp_rank:02d}.safetensors"


def _optimizer_file(training: Training, topology: Topology) -> str:
    dp_rank = topology.dp_rank if _is_sharded(training) else 0
    return (
        f"optimizer_tp{topology.tp_rank:02d}_pp{topology.pp_rank:02d}_dp{dp_rank:02d}.safetensors"
    )


def _is_sharded(training: Training) -> bool:
    return training.optimizer.config.use_distributed_optimizer


def _parts(training: Training) -> list:
    return getattr(training.optimizer, "chained_optimizers", [training.optimizer])


def _inner_parameters(training: Training):
    """(key, inner torch optimizer, parameter) in the optimizer's own, deterministic order."""
    for part_index, part in enumerate(_parts(training)):
        for group_index, group in enumerate(part.optimizer.param_groups):
            for index, parameter in enumerate(group["params"]):
                yield f"{part_index}.{group_index}.{index}", part.optimizer, parameter


def _owned(tensor: Tensor) -> Tensor:
    """A copy on the CPU with memory of its own: safetensors refuses views into one buffer."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _optimizer_tensors(training: Training) -> dict[str, Tensor]:
    tensors = {}
    for key, inner, parameter in _inner_parameters(training):
        tensors[f"{key}.parameter"] = _owned(parameter)
        for name, value in inner.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = _owned(torch.as_tensor(value))
    return tensors


def _restore_optimizer(
    training: Training, tensors: dict[str, Tensor], state: dict[str, Any]
) -> None:
    names: dict[str, list[str]] = {}
    for full in tensors:
        key, name = full.rsplit(".", 1)
        names.setdefault(key, []).append(name)
    for key, inner, parameter in _inner_parameters(training):
        parameter.copy_(tensors[f"{key}.parameter"])
        inner.state[parameter] = {
            name: _placed(name, tensors[f"{key}.{name}"], parameter)
            for name in names[key]
            if name != "parameter"
        }
    groups = [g for part in _parts(training) for g in part.optimizer.param_groups]
    for group, step in zip(groups, state["group_steps"], strict=True):
        if step is not None:
            group["step"] = step


def _placed(name: str, tensor: Tensor, parameter: Tensor) -> Tensor:
    # torch's AdamW keeps `step` on the CPU unless it is capturable or fused.
    return tensor if name == "step" else tensor.to(parameter.device)


def _group_steps(training: Training) -> list[int | None]:
    """Fused Adams count steps per group instead of per parameter."""
    groups = [g for part in _parts(training) for g in part.optimizer.param_groups]
    return [int(g["step"]) if "step" in g else None for g in groups]


def _scaler(training: Training):
    return getattr(_parts(training)[0], "grad_scaler", None)


def _scaler_state(training: Training) -> dict[str, float] | None:
    scaler = _scaler(training)
    if scaler is None:
        return None
    return {k: float(v) for k, v in scaler.state_dict().items()}


def _set_scaler_state(training: Training, saved: dict[str, float]) -> None:
    scaler = _scaler(training)
    current = scaler.state_dict()
    scaler.load_state_dict(
        {
            k: torch.full_like(v, saved[k]) if torch.is_tensor(v) else int(saved[k])
            for k, v in current.items()
        }
    )
