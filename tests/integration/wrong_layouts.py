"""What a process of the self-test does in test_selftest.py: measures wrongly, fails or hangs."""

import os
import signal
import time
from unittest import mock

import torch.distributed as dist

from reinforcer_tp.mcore import model
from reinforcer_tp.selftest import measure as right
from reinforcer_tp.selftest.compare import Measured
from reinforcer_tp.selftest.processes import Task

DEVIATION = 3e-4  # of the final norm's gradient, relative


def measure(task: Task) -> Measured:
    """Wrong in a way of its own for each layout that the test runs; right in the others."""
    policy = task.config.policy
    if policy.megatron_cfg.sequence_parallel:
        # Only rank 0's shards count in the gradient norm then.
        with mock.patch.object(model, "_mark_tensor_parallel"):
            return right.measure(task)
    if policy.train_micro_batch_size == 1 and not task.config.data.share_prompts:
        with mock.patch.object(right, "full_tensors", one_gradient_off):
            return right.measure(task)
    if policy.megatron_cfg.tensor_model_parallel_size == 2 and dist.get_rank() == 1:
        raise ValueError("made up\nsecond line")  # rank 0 waits for it in a collective
    if policy.megatron_cfg.pipeline_model_parallel_size == 2 and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return right.measure(task)


def one_gradient_off(*args, **kwargs):
    for name, gradient in tensors(*args, **kwargs):
        yield name, gradient * (1 + DEVIATION) if name == "model.norm.weight" else gradient


tensors = right.full_tensors


def hang(task: Task) -> int:
    if dist.get_rank() == 1:
        time.sleep(600)
    return dist.get_rank()


def tell_rank(task: Task) -> int:
    return dist.get_rank()
