"""Preflight: an all-reduce in each node, then over all nodes; NCCL with GPUs, gloo without.

torchrun ... slurm/allreduce.py FOLDER. Writes FOLDER/<node>.local and FOLDER/<node>.all as far as
this node has come, and FOLDER/rate.
"""

import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

_TIMEOUT = timedelta(seconds=120)
_NUMBERS = {"cpu": 1 << 16, "cuda": 1 << 25}  # 128 MiB: enough to see a slow link


def check_sum(device: torch.device, group: dist.ProcessGroup | None) -> float:
    """Seconds of the second all-reduce. Raises RuntimeError where the sum is wrong."""
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    expected = sum(rank + 1 for rank in ranks)
    seconds = 0.0
    for _ in range(2):  # the first one connects
        numbers = torch.full((_NUMBERS[device.type],), dist.get_rank() + 1.0, device=device)
        begin = time.perf_counter()
        dist.all_reduce(numbers, group=group)
        low, high = numbers.min().item(), numbers.max().item()  # waits for the device
        seconds = time.perf_counter() - begin
        if (low, high) != (expected, expected):
            raise RuntimeError(
                f"all-reduce over {len(ranks)} ranks on {socket.gethostname()}, {device}: sums from"
                f" {low:g} to {high:g}, expected {expected}"
            )
    return seconds


def main(folder: Path) -> None:
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    group, _ = dist.new_subgroups(local_size)
    check_sum(device, group)
    dist.barrier(group)  # not only this process
    if local_rank == 0:
        (folder / f"{node}.local").touch()
    seconds = check_sum(device, None)
    dist.barrier()
    if local_rank == 0:
        (folder / f"{node}.all").touch()
    if dist.get_rank() == 0:
        size, world_size = 4 * _NUMBERS[device.type], dist.get_world_size()
        rate = 2 * size * (world_size - 1) / world_size / seconds / 1e9
        text = f"{size / 2**20:g} MiB over {world_size} ranks in {1000 * seconds:.1f} ms, bus "
        (folder / "rate").write_text(f"{text}{rate:.1f} GB/s\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
