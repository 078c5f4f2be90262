"""forward_step and Megatron's pipeline schedule; owns the loss-scaling contract with Megatron.

The contract: `calculate_per_token_loss=True` and a loss function that returns
`(sum over pairs, number of pairs as an int tensor, report)`. Megatron then divides nothing per
micro-batch; mcore/optim.py divides the gradients once by the pairs of the global batch, summed over
data-parallel ranks. So unequal and empty micro-batches are exact.

Legend: T packed tokens, N response tokens, B pairs of a micro-batch, D hidden.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from kernels import vocab_parallel_linear_logprob
from reinforcer_tp.config_check import ConfigError
from reinforcer_tp.data.packed_batch import PackedBatch, ResponseRows, response_rows
from reinforcer_tp.faultpoints import faults_armed, poison
from reinforcer_tp.mcore.attention import PackedAttentionParams
from reinforcer_tp.mcore.gather import Gather, gather_plan, gather_rows
from reinforcer_tp.mcore.model import PolicyModel, build_model
from reinforcer_tp.mcore.topology import Topology
from reinforcer_tp.mcore.weights import load_weights

# (policy log-probs (N,) float32, entropies (N,) without gradient, batch) -> (sum of the loss over
# pairs, what is reported of the micro-batch)
LossFunction = Callable[[Tensor, Tensor, PackedBatch], tuple[Tensor, dict[str, Tensor]]]


# (response rows of this rank's part of the sequence, how they are taken from the hidden states)
OwnRows = tuple[ResponseRows, Gather]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The model as the schedule runs it."""

    model: PolicyModel
    modules: tuple[torch.nn.Module, ...]  # model.chunks, or their DDP wraps while training
    topology: Topology
    kernel_impl: str
    kernel_cache_bytes: int = 0  # of the head's forward, kept for backward; 0 = recompute
    tick: Callable[[], None] = lambda: None  # called before each micro-batch: the run moves


def open_stage(model: PolicyModel, policy: Any, topology: Topology) -> Stage:
    """The stage without DDP; `policy` is the config section."""
    return Stage(
        model=model,
        modules=model.chunks,
        topology=topology,
        kernel_impl=policy.kernel_impl,
        kernel_cache_bytes=policy.kernel_cache_mib * 2**20,
    )


def load_stage(hf_config: Any, reader: Any, policy: Any, topology: Topology) -> Stage:
    """A new model of `hf_config` with the weights that `reader` gives (weights.load_weights)."""
    model = build_model(hf_config, policy, topology)
    load_weights(model, reader, topology)
    return open_stage(model, policy, topology)


def check_kernel_impl(wanted: str, device: torch.device) -> None:
    """Raises ConfigError where `policy.kernel_impl` asks for Triton and it cannot run.

    Asked when a run starts, not by `--check`, which must pass on a login node without a GPU.
    """
    if wanted != "triton" or device.type == "cuda":
        return
    import triton

    if not triton.knobs.runtime.interpret:
        raise ConfigError(
            "policy.kernel_impl=triton needs a CUDA device and this machine shows none; use "
            "policy.kernel_impl=auto (Triton on CUDA, torch elsewhere) or torch, start it on a "
            "machine with a GPU, or set TRITON_INTERPRET=1 to debug the kernels on the CPU"
        )


def response_logps(
    stage: Stage,
    hidden: Tensor,  # (T[/tp], 1, D) from the last stage
    batch: PackedBatch,
    own_rows: OwnRows,
    *,
    return_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs (N,) float32 of the response tokens, on every tensor-parallel rank, and, if asked,
    the entropies (N,) at their positions, which carry no gradient.

    Under sequence parallelism the operator gathers the response rows and scatters their gradients.
    """
    model, topology = stage.model, stage.topology
    rows, gather = own_rows
    weight = model.head.output_weight()
    labels = batch.labels
    if rows.order is not None:
        labels = labels.index_select(0, rows.order)
    out = vocab_parallel_linear_logprob(
        gather_rows(hidden.squeeze(1), gather),
        weight,
        labels,
        vocab_start=topology.tp_rank * weight.shape[0],
        vocab_size=model.shape.vocab_size,
        tp_group=topology.tp_group if topology.tp_size > 1 else None,
        row_splits=rows.splits if model.config.sequence_parallel else None,
        return_entropy=return_entropy,
        entropy_grad=False,
        cache_budget_bytes=stage.kernel_cache_bytes if torch.is_grad_enabled() else 0,
        impl=stage.kernel_impl,
    )
    found = out if return_entropy else (out,)
    if rows.inverse is not None:
        found = tuple(each.index_select(0, rows.inverse) for each in found)
    return (*found, None)[:2]


def forward_backward(
    stage: Stage,
    batches: Sequence[PackedBatch],
    loss_function: LossFunction,
    *,
    forward_only: bool = False,
) -> list[dict[str, Tensor]]:
    """Runs every micro-batch; leaves gradients of (sum over pairs) / (pairs of the global batch).

    `batches` are this data-parallel rank's; the number must be equal on all ranks. Returns what
    `loss_function` reports of each micro-batch on the last stage, [] elsewhere.
    """

    report = loss_report(stage, loss_function)
    return _run(stage, batches, report, forward_only=forward_only, collect_non_loss_data=False)


def loss_report(stage: Stage, loss_function: LossFunction) -> Callable:
    """What the last stage does with its hidden states: (loss, number of pairs, metrics)."""

    def report(batch: PackedBatch, own_rows: OwnRows, hidden: Tensor):
        logps, entropies = response_logps(stage, hidden, batch, own_rows, return_entropy=True)
        loss_sum, metrics = loss_function(logps, entropies, batch)
        num_pairs = torch.full((), batch.num_pairs, dtype=torch.int, device=hidden.device)
        return loss_sum, num_pairs, metrics

    return report


@torch.no_grad()
def forward_logps(stage: Stage, batches: Sequence[PackedBatch]) -> list[Tensor]:
    """Log-probs (N,) float32 of each micro-batch on the last stage, [] elsewhere. Saves nothing."""

    def report(batch: PackedBatch, own_rows: OwnRows, hidden: Tensor, non_loss_data: bool):
        return response_logps(stage, hidden, batch, own_rows)[0]

    return _run(stage, batches, report, forward_only=True, collect_non_loss_data=True)


def _run(
    stage: Stage,
    batches: Sequence[PackedBatch],
    report: Callable,
    *,
    forward_only: bool,
    collect_non_loss_data: bool,
) -> list:
    row_length = batches[0].tokens.shape[0]
    topology, multiple = stage.topology, stage.topology.micro_batch_multiple
    # Without variable_seq_lengths stages exchange tensors of one shape; a peer would hang.
    assert topology.pp_size == 1 or all(b.tokens.shape[0] == row_length for b in batches)
    assert len(batches) % multiple == 0, (
        f"{len(batches)} micro-batches, but an interleaved pipeline of {topology.pp_size} ranks "
        f"takes a multiple of {multiple}: add empty ones"
    )

    def forward_step(iterator, module):
        batch, attention_params, own_rows = next(iterator)
        hidden = hidden_states(module, batch, attention_params)
        if hidden.requires_grad and faults_armed():
            hidden.register_hook(lambda g: poison("nonfinite.gradient", g, batch.rows))
        return hidden, partial(report, batch, own_rows)

    with _mode(stage, forward_only=forward_only):
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=_fan_out(prepared(stage, batches), len(stage.modules)),
            model=list(stage.modules),
            num_microbatches=len(batches),
            seq_length=row_length,
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=collect_non_loss_data,
        )


def hidden_states(
    module: torch.nn.Module, batch: PackedBatch, attention_params: PackedAttentionParams
) -> Tensor:  # (T[/tp], 1, D)
    """One chunk's forward pass. Later stages take what was put into it by set_input_tensor."""
    return module(
        input_ids=batch.tokens[None],
        position_ids=None,
        attention_mask=None,
        packed_seq_params=attention_params,
    )


def prepared(stage: Stage, batches: Sequence[PackedBatch]) -> Iterator[tuple]:
    """(batch on the device, attention parameters, rows of the responses) of each micro-batch."""
    for host_batch in batches:
        stage.tick()
        attention_params = stage.model.attention_params(host_batch)
        own_rows = None  # only the last stage looks at responses
        if stage.topology.is_last_stage:
            own_rows = _own_rows(stage, host_batch)
        yield host_batch.to(stage.topology.device), attention_params, own_rows


def _fan_out(items: Iterator, count: int) -> list[Iterator]:
    """`count` iterators over `items`, each item made once and held until the last one took it.

    (itertools.tee frees items in blocks of 57: as many micro-batches would stay in memory.)
    """
    queues: list[deque] = [deque() for _ in range(count)]

    def read(queue: deque) -> Iterator:
        while True:
            if not queue:
                try:
                    item = next(items)
                except StopIteration:
                    return
                for each in queues:
                    each.append(item)
                del item
            yield queue.popleft()

    return [read(queue) for queue in queues]


@contextmanager
def _mode(stage: Stage, *, forward_only: bool) -> Iterator[None]:
    """Training or evaluation: of the modules, of autograd, and of the gradients' reduction."""
    config, was_training = stage.model.config, stage.modules[0].training
    no_sync = config.no_sync_func
    if forward_only:
        # The pipeline schedules enter it and leave it in backward alone.
        config.no_sync_func = None
    for module in stage.modules:
        module.train(not forward_only)
    try:
        with torch.no_grad() if forward_only else torch.enable_grad():
            yield
    finally:
        config.no_sync_func = no_sync
        for module in stage.modules:
            module.train(was_training)


def _own_rows(stage: Stage, host_batch: PackedBatch) -> OwnRows:
    """The response rows among the hidden states that this rank has after the last layer."""
    topology = stage.topology
    is_split = stage.model.config.sequence_parallel
    rows = response_rows(
        host_batch.response_index,
        host_batch.tokens.shape[0],
        part=topology.tp_rank if is_split else 0,
        num_parts=topology.tp_size if is_split else 1,
    )
    # The row that predicts both sides' first tokens is taken twice.
    return rows.to(topology.device), gather_plan(rows.index).to(topology.device)


def reduce_metrics(
    sums: dict[str, float], names: Sequence[str], topology: Topology
) -> dict[str, float]:
    """Sums over data-parallel ranks of what the last stage counted, known to every rank after.

    `sums` is read on the last stage only; `names` fixes the order on all of them.
    """
    values = torch.zeros(len(names), dtype=torch.float64, device=topology.device)
    if topology.is_last_stage:
        values += torch.tensor([sums[n] for n in names], dtype=torch.float64, device=values.device)
        dist.all_reduce(values, group=topology.dp_group)
    if topology.pp_size > 1:
        last = dist.get_global_rank(topology.pp_group, topology.pp_size - 1)
        dist.broadcast(values, src=last, group=topology.pp_group)
    return dict(zip(names, values.tolist(), strict=True))
