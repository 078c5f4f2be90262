"""The helper that the distributed tests stand on: results, failures and time-outs."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.spawn import run_distributed


def _sum_of_ranks(offset):
    total = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(total)
    return dist.get_rank(), total


def _second_rank_fails():
    if dist.get_rank() == 1:
        raise KeyError("the cause")
    dist.barrier()


def _pid():
    dist.barrier()
    return os.getpid()


def _hangs(folder):
    with open(os.path.join(folder, f"pid{dist.get_rank()}"), "w") as file:
        file.write(str(os.getpid()))
    time.sleep(600)


def test_results_come_back_by_rank():
    results = run_distributed(_sum_of_ranks, 3, 10)
    assert [rank for rank, _ in results] == [0, 1, 2]
    assert all(total.item() == 33.0 for _, total in results)


def test_processes_are_used_again_with_a_new_group():
    first = run_distributed(_pid, 2)
    assert run_distributed(_pid, 2) == first
    assert len(set(first)) == 2 and os.getpid() not in first


def test_a_failing_rank_ends_its_peers_and_its_traceback_is_raised():
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 failed(.|\n)*the cause"):
        run_distributed(_second_rank_fails, 2)
    assert time.monotonic() - begin < 60


def test_a_hanging_rank_times_out_and_leaves_no_process(tmp_path):
    with pytest.raises(TimeoutError, match=r"\[0, 1\] of 2"):
        run_distributed(_hangs, 2, str(tmp_path), timeout_s=8)
    for pid in [int(path.read_text()) for path in tmp_path.iterdir()]:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
