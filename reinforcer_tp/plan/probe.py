"""What one rank does, measured on a fake cluster: memory, FLOPs, bytes moved, collectives.

The functions are those of training: build_model, build_training, the schedule's forward step, the
loss, the optimizer step. One micro-batch goes through each chunk; the order in which a pipeline
takes micro-batches is pipeline.py's.
"""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reinforcer_tp.config import Config
from reinforcer_tp.data.packed_batch import PackedBatch
from reinforcer_tp.loop import loss_function
from reinforcer_tp.mcore import schedule
from reinforcer_tp.mcore.fake_cluster import fake_rank
from reinforcer_tp.mcore.model import PolicyModel, build_model
from reinforcer_tp.mcore.optim import Training, build_training, gather_weights, optimizer_step
from reinforcer_tp.mcore.schedule import Stage, open_stage
from reinforcer_tp.mcore.topology import Topology
from reinforcer_tp.plan.layout import Layout
from reinforcer_tp.plan.meter import Meter, Work


@dataclass(frozen=True, kw_only=True)
class ChunkWork:
    """One micro-batch through one chunk of a rank's layers; the head counts by itself."""

    forward: Work
    backward: Work
    head_forward: Work | None  # log-probs and loss, on the last chunk of the last rank
    head_backward: Work | None


@dataclass(frozen=True, kw_only=True)
class RankWork:
    """All that a rank holds and does; bytes of this rank alone."""

    pp_rank: int
    num_layers: int
    num_parameters: int  # with a tied or padded vocabulary as the rank holds it
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int  # float32 masters and both moments
    buffer_bytes: int  # that Megatron keeps between steps
    reference_bytes: int  # of a resident reference
    message_bytes: int  # of one micro-batch, to the next stage
    chunks: tuple[ChunkWork, ...]
    sweep: Work  # a row of the reference's sweep, or of a resident reference
    reduce: Work  # of gradients, once a step
    optimizer: Work
    gather: Work  # of weights, once a step


def fake_stage(
    layout: Layout, pp_rank: int, *, on_gpu: bool
) -> contextlib.AbstractContextManager[Topology]:
    """The first rank of a pipeline stage, on a fake cluster."""
    return fake_rank(
        rank=pp_rank * layout.tp_size * layout.dp_size,
        world_size=layout.world_size,
        tp_size=layout.tp_size,
        pp_size=layout.pp_size,
        vpp_size=layout.vpp_size,
        on_gpu=on_gpu,
    )


def probe_rank(
    config: Config,
    hf_config: Any,
    layout: Layout,
    pp_rank: int,
    batch: PackedBatch,
    sweep_batch: PackedBatch | None,  # None = nothing is swept
    *,
    on_gpu: bool,
) -> RankWork:
    """Builds the rank's part of the model and takes one step; `batch` is on the host.

    Transformer Engine's layers are planned as local ones, and FP8 as 16 bits: they are not here.
    """
    policy = dataclasses.replace(config.policy, layer_spec="local", fp8=None)
    with fake_stage(layout, pp_rank, on_gpu=on_gpu) as topology, Meter() as meter:
        with meter.measure() as building:
            model = build_model(hf_config, policy, topology)
        stage = open_stage(model, policy, topology)
        with meter.measure() as sweep, torch.no_grad():
            for chunk in model.chunks if sweep_batch is not None else ():
                chunk.eval()
                _forward(stage, chunk, sweep_batch)
                chunk.train()
        with meter.measure() as wrapping:
            training = build_training(model, policy, topology, total_steps=10)
        gradient_bytes = sum(b.grad_data.nbytes for d in training.ddp for b in d.buffers)
        stage = dataclasses.replace(stage, modules=training.ddp)
        with meter.measure() as first, torch.no_grad():
            for chunk in training.ddp:  # buffers that stay are made now
                _forward(stage, chunk, batch)
        with meter.measure() as moments:
            optimizer_step(training)
        chunks = tuple(_chunk_work(meter, stage, config, module, batch) for module in stage.modules)
        reduce, optimizer, gather = _once_a_step(meter, training, model)
        resident = config.reference_mode == "resident"
        return RankWork(
            pp_rank=pp_rank,
            num_layers=sum(layout.chunk_layers(pp_rank)),
            num_parameters=sum(p.numel() for _, p in model.named_parameters()),
            parameter_bytes=sum(p.nbytes for _, p in model.named_parameters()),
            gradient_bytes=gradient_bytes,
            optimizer_bytes=wrapping.saved_bytes - gradient_bytes + moments.saved_bytes,
            buffer_bytes=sweep.saved_bytes + first.saved_bytes,
            reference_bytes=building.saved_bytes if resident else 0,
            message_bytes=_message(stage, batch).nbytes,
            chunks=chunks,
            sweep=sweep,
            reduce=reduce,
            optimizer=optimizer,
            gather=gather,
        )


def _forward(stage: Stage, module: torch.nn.Module, batch: PackedBatch) -> tuple[Any, Tensor]:
    """(what the schedule prepares of the batch, hidden states)."""
    [item] = schedule.prepared(stage, [batch])
    chunk = getattr(module, "module", module)  # out of DDP's wrap
    if not chunk.pre_process:
        received = _message(stage, batch)
        chunk.set_input_tensor(received.requires_grad_(torch.is_grad_enabled()))
    hidden = schedule.hidden_states(module, item[0], item[1])
    if not chunk.pre_process:
        chunk.set_input_tensor(None)
    if chunk.post_process and not torch.is_grad_enabled():
        schedule.response_logps(stage, hidden, item[0], item[2])
    return item, hidden


def _message(stage: Stage, batch: PackedBatch) -> Tensor:
    """What a stage hands to the next one for a micro-batch."""
    config, rows = stage.model.config, len(batch.tokens)
    if config.sequence_parallel:
        rows //= stage.topology.tp_size
    return torch.empty(rows, 1, config.hidden_size, dtype=config.params_dtype)


def _chunk_work(
    meter: Meter, stage: Stage, config: Config, module: torch.nn.Module, batch: PackedBatch
) -> ChunkWork:
    head_forward = head_backward = None
    with module.no_sync():
        with meter.measure() as forward:
            item, hidden = _forward(stage, module, batch)
        if not module.module.post_process:
            with meter.measure() as backward:
                hidden.backward(torch.empty_like(hidden))
                hidden = item = None
        else:
            report = schedule.loss_report(stage, loss_function(config))
            with meter.measure() as head_forward:
                loss = report(item[0], item[2], hidden)[0]
            head_backward, backward = _split_backward(meter, loss, hidden)
            hidden = item = loss = None
    return ChunkWork(
        forward=forward,
        backward=backward,
        head_forward=head_forward,
        head_backward=head_backward,
    )


def _split_backward(meter: Meter, loss: Tensor, hidden: Tensor) -> tuple[Work, Work]:
    """(until the hidden states have their gradient, from there on)."""
    found = [meter.begin()]

    def reached(gradient: Tensor) -> None:
        meter.end(found[0])
        found.append(meter.begin())

    hidden.register_hook(reached)
    loss.backward()
    meter.end(found[1])
    return found[0], found[1]


def _once_a_step(meter: Meter, training: Training, model: PolicyModel) -> tuple[Work, Work, Work]:
    num_pairs = torch.zeros((), dtype=torch.int)
    with meter.measure() as reduce:
        model.config.finalize_model_grads_func(list(training.ddp), num_pairs)
    with meter.measure() as optimizer:
        optimizer_step(training)
    with meter.measure() as gather:
        gather_weights(training)
    return reduce, optimizer, gather
