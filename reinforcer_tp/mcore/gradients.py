"""A second look at gradients and weights, after a step whose gradient is not finite.

Nothing here runs in a step that is fine. "Bad" is a tensor whose norm is not finite in float32:
one of its numbers is not, or is so large that its square is not.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reinforcer_tp.data.packed_batch import PackedBatch, build_packed_batch
from reinforcer_tp.mcore.optim import Training, zero_grad
from reinforcer_tp.mcore.schedule import LossFunction, Stage, forward_backward

_LIMIT = math.sqrt(torch.finfo(torch.float32).max)


@dataclass(frozen=True, kw_only=True)
class Glance:
    """What one rank saw in its tensors."""

    rank: int
    # The last model chunk with a bad one, in the order of the layers over all ranks; -1 = none.
    # Backward spreads from there to every chunk before it.
    chunk: int
    num_bad: int
    num: int
    norm: float  # of all together
    first_bad: str  # a parameter's name, "" = none


def glance_at_weights(training: Training) -> Glance:
    return _glance(training, (p.data for _, _, p in _parameters(training)))


def glance_at_gradients(training: Training) -> Glance:
    """As they are: reduced after a step, this rank's own after `backward_alone`."""
    return _glance(training, (p.main_grad for _, _, p in _parameters(training)))


def glance_at_own_part(training: Training) -> Glance | None:
    """What is still this rank's own in gradients that were reduced; None = nothing is.

    A sharded optimizer's reduction writes the rank's own shard only.
    """
    if not training.ddp[0].ddp_config.use_distributed_optimizer:
        return None
    places = {  # parameter -> (its buffer, where it lies in it, where this rank's shard does)
        parameter: (buffer, first, last, *_own_shard(buffer.buckets[bucket], training))
        for chunk in training.ddp
        for buffer in chunk.buffers
        for parameter, (first, last, bucket) in buffer.param_index_map.items()
    }

    def outside(parameter: torch.nn.Parameter) -> Tensor:
        buffer, first, last, begin, end = places[parameter]
        before, after = (first, max(min(last, begin), first)), (min(max(first, end), last), last)
        return torch.cat([buffer.grad_data[slice(*part)] for part in (before, after)])

    return _glance(training, (outside(p) for _, _, p in _parameters(training)))


def _own_shard(bucket: Any, training: Training) -> tuple[int, int]:
    size = bucket.grad_data.numel() // training.topology.dp_size
    begin = bucket.offset + training.topology.dp_rank * size
    return begin, begin + size


def backward_alone(
    stage: Stage,
    training: Training,
    batches: Sequence[PackedBatch],
    index: int,
    loss_function: LossFunction,
) -> None:
    """Leaves each rank its own gradient of micro-batch `index`, of this step, and of no other.

    Collective: pipeline and tensor-parallel ranks work together, data-parallel ones do not. Not
    divided by the number of pairs.
    """
    batch = batches[index]
    padding = build_packed_batch(
        [],
        reference_logps=None if batch.reference_logps is None else [],
        row_length=batch.tokens.shape[0],
    )
    zero_grad(training)  # before the next line: it also makes the next backward reduce
    with _no_reduction(stage, training):
        alone = [batch, *[padding] * (stage.topology.micro_batch_multiple - 1)]
        forward_backward(stage, alone, loss_function)


@contextmanager
def _no_reduction(stage: Stage, training: Training) -> Iterator[None]:
    config = stage.model.config
    saved = config.finalize_model_grads_func, config.no_sync_func
    config.finalize_model_grads_func = config.no_sync_func = None
    try:
        with ExitStack() as stack:
            for chunk in training.ddp:
                stack.enter_context(chunk.no_sync())
            yield
    finally:
        config.finalize_model_grads_func, config.no_sync_func = saved


def _parameters(training: Training) -> Iterator[tuple[int, str, torch.nn.Parameter]]:
    """(chunk in the order of the layers, name, parameter)"""
    topology = training.topology
    for index, chunk in enumerate(training.ddp):
        for name, parameter in chunk.module.named_parameters():
            if parameter.requires_grad:
                yield index * topology.pp_size + topology.pp_rank, name, parameter


@torch.no_grad()
def _glance(training: Training, tensors: Iterable[Tensor]) -> Glance:
    names = [(chunk, name) for chunk, name, _ in _parameters(training)]
    norms = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]
    values = torch.stack(norms).tolist() if norms else []
    bad = [where for where, norm in zip(names, values, strict=True) if not norm < _LIMIT]
    return Glance(
        rank=training.topology.rank,
        chunk=max((chunk for chunk, _ in bad), default=-1),
        num_bad=len(bad),
        num=len(values),
        norm=math.sqrt(sum(norm * norm for norm in values)),
        first_bad=bad[0][1] if bad else "",
    )
