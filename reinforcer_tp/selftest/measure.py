"""One layout of the self-test, in one of its processes: log-probs, loss, gradients."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from reinforcer_tp.batches import micro_batching
from reinforcer_tp.config import Config
from reinforcer_tp.data.micro_batches import micro_batches
from reinforcer_tp.hf_files import open_model
from reinforcer_tp.loop import loss_function
from reinforcer_tp.mcore.cpu import cuda_type_names
from reinforcer_tp.mcore.optim import Training, build_training, zero_grad
from reinforcer_tp.mcore.schedule import Stage, forward_backward, load_stage, reduce_metrics
from reinforcer_tp.mcore.shape import ModelShape
from reinforcer_tp.mcore.topology import Topology, init_topology
from reinforcer_tp.mcore.weights import full_tensors, hf_shape
from reinforcer_tp.reference.sweep import sweep_reference
from reinforcer_tp.selftest.compare import Measured
from reinforcer_tp.selftest.processes import Task

_PERTURBATION = 0.05  # relative standard deviation of the policy's weights about the given ones


class Perturbed:
    """A reader whose weights are another's, each times 1 + noise; equal in every layout."""

    def __init__(self, reader: Any, shape: ModelShape) -> None:
        self.reader, self.shape = reader, shape

    def read(self, name: str, rows: Any = None, columns: Any = None) -> Tensor:
        digest = hashlib.sha256(name.encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        noise = torch.randn(hf_shape(name, self.shape), generator=generator)
        noise = noise[slice(*rows)] if rows else noise
        noise = noise[:, slice(*columns)] if columns else noise
        return self.reader.read(name, rows, columns).float() * (1 + _PERTURBATION * noise)


def measure(task: Task) -> Measured:
    """Runs the global batch in the layout of `task.config`. Collective over all processes."""
    config = task.config
    policy, megatron = config.policy, config.policy.megatron_cfg
    topology = init_topology(
        megatron.tensor_model_parallel_size,
        megatron.pipeline_model_parallel_size,
        megatron.virtual_stages,
        seed=config.dpo.seed,
    )
    reference = _sweep(_stage(config, config.reference.model_name, False, topology), task)
    stage = _stage(config, policy.model_name, True, topology)
    logps = _sweep(stage, task)
    training = build_training(stage.model, policy, topology, total_steps=1)
    cut = micro_batching(config, stage.model.shape, topology)
    known = reference.__getitem__ if topology.is_last_stage else None
    batches = micro_batches(task.pairs, range(len(task.pairs)), cut, known).batches

    zero_grad(training)
    reports = forward_backward(replace(stage, modules=training.ddp), batches, loss_function(config))
    names = ("loss", "num_pairs")
    local = {name: float(sum(report[name] for report in reports)) for name in names}
    sums = reduce_metrics(local, names, topology)
    with cuda_type_names():
        assert not training.optimizer.prepare_grads(), "a gradient is not finite"
        grad_norm = float(training.optimizer.get_grad_norm())
    _gather_shards(training, topology)
    return Measured(
        loss=sums["loss"] / max(sums["num_pairs"], 1),
        grad_norm=grad_norm,
        logps=logps,
        gradients=_gradients(stage, task),
        num_micro_batches=len(batches),
        num_empty=sum(len(batch.rows) == 0 for batch in batches),
    )


def _stage(config: Config, model_name: str | None, perturbed: bool, topology: Topology) -> Stage:
    files = open_model(config, model_name or config.policy.model_name, None)
    reader = Perturbed(files.reader, files.shape) if perturbed else files.reader
    return load_stage(files.hf_config, reader, config.policy, topology)


def _sweep(stage: Stage, task: Task) -> dict[int, np.ndarray]:
    return sweep_reference(
        stage,
        task.pairs,
        range(len(task.pairs)),
        micro_batching(task.config, stage.model.shape, stage.topology),
    )


def _gather_shards(training: Training, topology: Topology) -> None:
    """With the distributed optimizer a rank has the gradients of its own shard only; all after."""
    if topology.dp_size == 1:
        return
    for chunk in training.ddp:
        if not chunk.ddp_config.use_distributed_optimizer:
            continue
        for bucket in (bucket for buffer in chunk.buffers for bucket in buffer.buckets):
            shards = list(bucket.grad_data.chunk(topology.dp_size))
            own = shards[topology.dp_rank].clone()
            dist.all_gather(shards, own, group=topology.dp_group)


def _gradients(stage: Stage, task: Task) -> dict[str, float]:
    """Norms by Hugging Face name, as `Measured.gradients` has them; {} where tp_rank > 0."""
    found = full_tensors(stage.model, stage.topology, of=lambda p: p.main_grad)
    whole = ((name, gradient) for name, gradient in found if gradient is not None)
    if task.is_baseline:
        gradients = {name: gradient.clone() for name, gradient in whole}
        save_file(gradients, Path(task.gradients))
        return {name: _norm(gradient) for name, gradient in gradients.items()}
    if stage.topology.tp_rank:
        for _ in whole:  # gathering takes all ranks
            pass
        return {}
    with safe_open(task.gradients, framework="pt") as expected:
        return {name: _norm(g - expected.get_tensor(name)) for name, g in whole}


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
