"""Megatron's DDP wrap, optimizer and LR schedule, and the one optimizer step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from reinforcer_tp.faultpoints import poison
from reinforcer_tp.mcore.cpu import cuda_type_names
from reinforcer_tp.mcore.model import PolicyModel
from reinforcer_tp.mcore.topology import Topology, any_rank


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a training step needs besides the model."""

    ddp: tuple[DistributedDataParallel, ...]  # one for each chunk of the model
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    max_grad_norm: float  # 0 = no clipping
    topology: Topology


def build_training(
    model: PolicyModel, policy: Any, topology: Topology, *, total_steps: int
) -> Training:
    """Wraps the model for data parallelism and makes its AdamW and LR schedule.

    `policy` is the config section; `total_steps` (optimizer steps) is the decay's default length.
    """
    megatron = policy.megatron_cfg
    # At dp=1 the distributed optimizer shards nothing and costs time on a CPU.
    use_distributed = megatron.optimizer.use_distributed_optimizer and topology.dp_size > 1
    section = megatron.distributed_data_parallel_config
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=section.grad_reduce_in_fp32,
        overlap_grad_reduce=section.overlap_grad_reduce,
        overlap_param_gather=section.overlap_param_gather and use_distributed,
        use_distributed_optimizer=use_distributed,
    )
    ddp = tuple(
        # Later chunks' communication hides behind other chunks' work: one bucket, as Megatron-LM.
        DistributedDataParallel(model.config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(model.chunks)
    )
    with cuda_type_names():
        optimizer = get_megatron_optimizer(
            _optimizer_config(policy, model.config.params_dtype, use_distributed), list(ddp)
        )
    if topology.device.type == "cpu":
        fuse_adam(optimizer)
    model.config.grad_scale_func = optimizer.scale_loss
    model.config.finalize_model_grads_func = partial(_finalize_gradients, topology)
    if section.overlap_grad_reduce:
        # Each chunk's own hooks reduce and gather; grad_sync_func and param_sync_func would only
        # move those collectives to moments that all pipeline ranks share.
        no_sync = [chunk.no_sync for chunk in ddp]
        model.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return Training(
        ddp=ddp,
        optimizer=optimizer,
        scheduler=_scheduler(optimizer, megatron, total_steps),
        max_grad_norm=policy.clip_grad,
        topology=topology,
    )


def fuse_adam(optimizer: MegatronOptimizer) -> None:
    """One pass over weight, gradient and moments where torch's AdamW makes ten: half the time."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not part.is_stub_optimizer:
            for group in part.optimizer.param_groups:
                group.update(fused=True, foreach=False)


def _finalize_gradients(
    topology: Topology,
    chunks: Sequence[DistributedDataParallel],
    num_pairs: Tensor,  # () int, of this rank's micro-batches, on the last stage
    **kwargs: Any,
) -> None:
    """Reduces gradients and divides them by the pairs of the global batch.

    Megatron divides where `num_tokens > 0`, for which the host waits, once a chunk. Without a pair
    gradients are 0, whatever divides them.
    """
    finalize_model_grads(chunks, None, **kwargs)
    if topology.pp_size > 1:
        last = dist.get_global_rank(topology.pp_group, topology.pp_size - 1)
        dist.broadcast(num_pairs, src=last, group=topology.pp_group)
    dist.all_reduce(num_pairs, group=topology.dp_group)
    for chunk in chunks:
        chunk.scale_gradients(1.0 / num_pairs.clamp(min=1))


def _optimizer_config(policy: Any, dtype: torch.dtype, use_distributed: bool) -> OptimizerConfig:
    section = policy.megatron_cfg.optimizer
    return OptimizerConfig(
        optimizer="adam",
        lr=section.lr,
        min_lr=section.min_lr,
        weight_decay=section.weight_decay,  # Megatron's rule: 1-D parameters are not decayed
        adam_beta1=section.adam_beta1,
        adam_beta2=section.adam_beta2,
        adam_eps=section.adam_eps,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        initial_loss_scale=2.0**16,  # float16 only; Megatron's 2**32 begins with 15 lost steps
        clip_grad=0.0,  # optimizer_step clips, after it has looked at the norm
        use_distributed_optimizer=use_distributed,
    )


def _scheduler(
    optimizer: MegatronOptimizer, megatron: Any, total_steps: int
) -> OptimizerParamScheduler:
    section = megatron.scheduler
    weight_decay = megatron.optimizer.weight_decay
    warmup = section.lr_warmup_iters
    return OptimizerParamScheduler(
        optimizer,
        init_lr=min(section.lr_warmup_init, megatron.optimizer.lr),
        max_lr=megatron.optimizer.lr,
        min_lr=min(megatron.optimizer.min_lr, megatron.optimizer.lr),
        lr_warmup_steps=warmup,
        # Megatron demands a decay longer than the warm-up, whatever the style.
        lr_decay_steps=max(section.lr_decay_iters or total_steps, warmup + 1),
        lr_decay_style=section.lr_decay_style,
        start_wd=weight_decay,
        end_wd=weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def current_lr(training: Training) -> float:
    """The learning rate that the next optimizer step will use."""
    return float(training.optimizer.param_groups[0]["lr"])


@torch.no_grad()
def optimizer_step(training: Training) -> tuple[bool, float]:
    """Clips and steps, unless the gradient norm is not finite on some rank. Collective.

    Returns:
        (whether weights were updated, which is alike on all ranks; gradient norm before clipping).
        With float16's dynamic loss scale an overflow is an ordinary event: the scale is halved and
        the step is skipped.
    """
    topology = training.topology
    poison("nonfinite.reduced", next(training.ddp[0].parameters()).main_grad)
    with cuda_type_names():
        found_inf = training.optimizer.prepare_grads()
        grad_norm = math.inf if found_inf else float(training.optimizer.get_grad_norm())
        # Replicas have one gradient, unless that of one was damaged after the reduction.
        is_bad = not math.isfinite(grad_norm)
        if any_rank(is_bad, topology.dp_group, topology.device):
            return False, grad_norm if is_bad else math.nan
        if training.max_grad_norm:
            clip_grad_by_total_norm_fp32(
                training.optimizer.get_parameters(), training.max_grad_norm, grad_norm
            )
        training.optimizer.step_with_ready_grads()
    training.scheduler.step(increment=1)
    return True, grad_norm


def gather_weights(training: Training) -> None:
    """Makes every rank's weights those of the last step. Collective over data parallelism.

    Under `overlap_param_gather` a rank holds its own new shard only until the next training step
    gathers the others: before anything else reads weights (validation, a checkpoint, the export)
    this must be called.
    """
    for chunk in training.ddp:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def zero_grad(training: Training) -> None:
    """Both are needed: DDP's buffer holds main_grad, the optimizer its own float32 copies."""
    for chunk in training.ddp:
        chunk.zero_grad_buffer()
    training.optimizer.zero_grad()
