"""What a rank's optimizer owns of each parameter, and its counters, whatever Megatron's class is.

With the distributed optimizer a data-parallel rank owns a flat range of each local parameter, with
the plain ones all of it, like its data-parallel peers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from reinforcer_tp.mcore.optim import Training

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Owned:
    """The float32 numbers behind elements [start, stop) of a local parameter, flattened."""

    start: int
    stop: int
    main: Tensor  # the inner optimizer's parameter, of stop - start elements in any shape
    is_replicated: bool  # the data-parallel peers have the same numbers
    inner: torch.optim.Optimizer

    @property
    def state(self) -> dict[str, Any]:
        """Of the inner optimizer; empty before the first step."""
        return self.inner.state.get(self.main, {})


def owned_parts(training: Training) -> dict[Parameter, Owned]:
    """Model parameter -> what this rank owns of it; a parameter it owns nothing of is not there."""
    found = {}
    for part in _parts(training):
        if part.is_stub_optimizer:
            continue
        is_sharded = part.config.use_distributed_optimizer
        for parameter, start, stop, main in _sharded(part) if is_sharded else _whole(part):
            assert main.numel() == stop - start and main.dtype == torch.float32
            found[parameter] = Owned(
                start=start,
                stop=stop,
                main=main,
                is_replicated=not is_sharded,
                inner=part.optimizer,
            )
    return found


def _sharded(part: Any) -> Iterator[tuple[Parameter, int, int, Tensor]]:
    for parameter, (group, index) in part.model_param_group_index_map.items():
        owned = part._get_model_param_range_map(parameter)["param"]
        main = part.optimizer.param_groups[group]["params"][index]
        yield parameter, owned.start, owned.end, main


def _whole(part: Any) -> Iterator[tuple[Parameter, int, int, Tensor]]:
    if hasattr(part, "float16_groups"):
        for models, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            for parameter, main in zip(models, mains, strict=True):
                yield parameter, 0, main.numel(), main
        groups = part.fp32_from_fp32_groups
    else:
        groups = [group["params"] for group in part.optimizer.param_groups]
    for group in groups:
        for parameter in group:
            yield parameter, 0, parameter.numel(), parameter


def num_updates(training: Training) -> int:
    """Optimizer steps that changed weights, as Adam's bias correction counts them."""
    for owned in owned_parts(training).values():
        if "step" in owned.state:
            return int(owned.state["step"])
    groups = [group for part in _parts(training) for group in part.param_groups]
    return max((int(group.get("step", 0)) for group in groups), default=0)


def set_moments(owned: Owned, moments: dict[str, Tensor], updates: int) -> None:
    """Puts back both moments, flat (stop - start,), after `updates` optimizer steps."""
    state: dict[str, Any] = {
        name: moments[name].view(owned.main.shape).to(owned.main.device) for name in MOMENTS
    }
    if _counts_per_parameter(owned.inner):
        # On the CPU, as torch's AdamW keeps it unless it is capturable or fused.
        state["step"] = torch.tensor(float(updates))
    owned.inner.state[owned.main] = state


def set_updates(training: Training, updates: int) -> None:
    """Tells fused Adams, which count per group, how many steps are done."""
    for part in _parts(training):
        if not part.is_stub_optimizer and not _counts_per_parameter(part.optimizer):
            for group in part.param_groups:
                group["step"] = updates


def _counts_per_parameter(inner: torch.optim.Optimizer) -> bool:
    return type(inner).__module__.startswith("torch.optim")


def scaler_state(training: Training) -> dict[str, float] | None:
    """float16's dynamic loss scale, None without one."""
    scaler = _scaler(training)
    return scaler and {name: float(value) for name, value in scaler.state_dict().items()}


def set_scaler_state(training: Training, saved: dict[str, float] | None) -> None:
    scaler = _scaler(training)
    if scaler is None or saved is None:
        return
    scaler.load_state_dict(
        {
            name: torch.full_like(now, saved[name]) if torch.is_tensor(now) else int(saved[name])
            for name, now in scaler.state_dict().items()
        }
    )


def _parts(training: Training) -> list[Any]:
    return getattr(training.optimizer, "chained_optimizers", [training.optimizer])


def _scaler(training: Training) -> Any:
    return getattr(_parts(training)[0], "grad_scaler", None)
