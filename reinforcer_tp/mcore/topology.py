"""Process groups, device and seeds of one run, as a frozen value.

Megatron's `parallel_state` is read here and nowhere else.
"""

import datetime
import math
import os
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from reinforcer_tp.config_check import ConfigError
from reinforcer_tp.mcore.cpu import apply_cpu_support

# Others may prepare data or write a checkpoint for hours: peers.py finds and names who hangs.
COLLECTIVE_S = 86_400.0


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Where this process stands in the world = tp x dp x pp (Megatron's order tp-cp-ep-dp-pp)."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    vpp_size: int  # model chunks on each pipeline rank; 1 = not interleaved
    dp_rank: int
    dp_size: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def micro_batch_multiple(self) -> int:
        """The number of micro-batches in a step must be a multiple of it (interleaved pipeline)."""
        return self.pp_size if self.vpp_size > 1 else 1

    def layout(self) -> dict[str, int]:
        """The sizes that environment.json and checkpoints record."""
        return layout_of(self.world_size, self.tp_size, self.pp_size, self.vpp_size)


def layout_of(world_size: int, tp_size: int, pp_size: int, vpp_size: int) -> dict[str, int]:
    """Names and sizes of a layout."""
    return {
        "world_size": world_size,
        "tensor_model_parallel_size": tp_size,
        "pipeline_model_parallel_size": pp_size,
        "virtual_pipeline_model_parallel_size": vpp_size,
        "data_parallel_size": world_size // (tp_size * pp_size),
    }


def init_topology(
    tp_size: int, pp_size: int, vpp_size: int = 1, *, seed: int, timeout_s: float = COLLECTIVE_S
) -> Topology:
    """Starts torch.distributed (gloo, plus nccl where there is CUDA) and Megatron's groups.

    RANK, WORLD_SIZE, LOCAL_RANK come from torchrun; without them this is a run of one process.
    `timeout_s` is the longest a collective, or a rank in the rendezvous, may wait.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        torch.cuda.set_device(local_rank)
    else:
        apply_cpu_support()
    if not dist.is_initialized():
        _init_process_group(
            "cpu:gloo,cuda:nccl" if has_cuda else "gloo", datetime.timedelta(seconds=timeout_s)
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp_size,
        pipeline_model_parallel_size=pp_size,
        virtual_pipeline_model_parallel_size=vpp_size if vpp_size > 1 else None,
        distributed_timeout_minutes=math.ceil(timeout_s / 60),
    )
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, te_rng_tracker=False)
    device = torch.device("cuda", local_rank) if has_cuda else torch.device("cpu")
    return megatron_topology(vpp_size, local_rank=local_rank, device=device)


def megatron_topology(vpp_size: int, *, local_rank: int, device: torch.device) -> Topology:
    """What Megatron's groups, which are there already, say of this process."""
    tp_group = parallel_state.get_tensor_model_parallel_group()
    pp_group = parallel_state.get_pipeline_model_parallel_group()
    dp_group = parallel_state.get_data_parallel_group()
    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=local_rank,
        device=device,
        tp_rank=tp_group.rank(),
        tp_size=tp_group.size(),
        pp_rank=pp_group.rank(),
        pp_size=pp_group.size(),
        vpp_size=vpp_size,
        dp_rank=dp_group.rank(),
        dp_size=dp_group.size(),
        tp_group=tp_group,
        pp_group=pp_group,
        dp_group=dp_group,
    )


def _init_process_group(backend: str, timeout: datetime.timedelta) -> None:
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )


def check_device_count(local_world_size: int) -> None:
    """Raises ConfigError when a node has CUDA devices, but fewer than processes."""
    count = torch.cuda.device_count()
    if torch.cuda.is_available() and count < local_world_size:
        raise ConfigError(
            f"{local_world_size} processes on a node with {count} CUDA devices; expected one each: "
            f"start torchrun with --nproc-per-node {count}, or hide the devices with "
            'CUDA_VISIBLE_DEVICES="" to run on the CPU'
        )


def check_same_everywhere(facts: dict[str, Any]) -> None:
    """Raises ConfigError on every rank when some rank knows otherwise. Collective.

    Ranks that do different things would wait for each other until a collective times out.
    """
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, facts)
    for name, value in everyone[0].items():
        others = [rank for rank, found in enumerate(everyone) if found[name] != value]
        if others:
            raise ConfigError(
                f"{name} differs between ranks: {value!r} on rank 0, "
                f"{everyone[others[0]][name]!r} on rank {others[0]} ({len(others)} in all); "
                "expected the same: logger.log_dir and the data must be the same on every node"
            )


def any_rank(flag: bool, group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether `flag` holds on some rank of `group`. Collective, where there is more than one."""
    if group.size() == 1:
        return flag
    found = torch.tensor(float(flag), device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    return bool(found.item())


def destroy_topology() -> None:
    """Ends Megatron's groups and torch.distributed; safe to call when neither was started."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
