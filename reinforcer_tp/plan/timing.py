"""Seconds of a step, from what was measured of each rank and the rates of a card."""

from __future__ import annotations

from dataclasses import dataclass

from reinforcer_tp.config import Config
from reinforcer_tp.plan.devices import Device
from reinforcer_tp.plan.layout import Layout
from reinforcer_tp.plan.meter import Work
from reinforcer_tp.plan.pipeline import duration_s
from reinforcer_tp.plan.probe import ChunkWork, RankWork
from reinforcer_tp.plan.rows import Rows


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """The share of a datasheet's rate that is counted on. Printed with every plan."""

    matrices: float = 0.65
    attention: float = 0.45
    head: float = 0.55  # the fused operator: its GEMM, and as much in exponentials
    memory: float = 0.80
    link: float = 0.70
    network: float = 0.70
    launch_s: float = 6e-6  # of the host for one operator


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step. The parts of the slowest rank, then what waiting adds."""

    matrices_s: float
    attention_s: float
    head_s: float
    other_s: float  # norms, rope, activation functions, additions: memory traffic
    tensor_parallel_s: float
    pipeline_s: float  # messages between stages
    bubble_s: float
    data_parallel_s: float  # what backward and forward do not hide
    optimizer_s: float
    reference_s: float  # a resident reference; 0 = it is read
    step_s: float
    sweep_s: float  # once, before the first step


def step_time(
    works: list[RankWork],
    rows: Rows,
    layout: Layout,
    device: Device,
    efficiency: Efficiency,
    *,
    config: Config,
) -> StepTime:
    """`works`: of every pipeline rank."""
    clock = _Clock(device, efficiency, layout, config.policy.precision)
    # Measured on the longest row; a step's rows are shorter where nothing pads them.
    scale = rows.row_tokens / len(rows.longest.tokens)
    per_layer = _attention_s(rows, layout, clock) / sum(layout.stage_layers)
    again = _recomputes_attention(config)
    parts, seconds = [], []
    for work in works:
        mine = layout.chunk_layers(work.pp_rank)
        chunks = [
            _chunk_s(chunk, per_layer * layers, again, _head_s(rows, layout, clock), clock, scale)
            for chunk, layers in zip(work.chunks, mine, strict=True)
        ]
        parts.append(_sum_parts(chunks, rows.micro_batches))
        seconds.append([(sum(f.values()), sum(b.values())) for f, b in chunks])
    send_s = _send_s(works, layout, clock) * scale
    pipelined = _between_counts(layout, rows.micro_batches, seconds, send_s)
    slowest = max(parts, key=lambda found: sum(found.values()))
    messages_s = send_s * 2 * (layout.pp_size - 1)
    data_s = max(
        _data_parallel_s(clock, work, chunks, config)
        for work, chunks in zip(works, seconds, strict=True)
    )
    optimizer_s = max(clock.seconds(work.optimizer, but="collectives") for work in works)
    kernels_s = per_layer * max(work.num_layers for work in works)
    kernels_s += _head_s(rows, layout, clock) / 4
    sweep_s, reference_s = _reference_s(works, rows, layout, clock, kernels_s)
    return StepTime(
        matrices_s=slowest["matrices"],
        attention_s=slowest["attention"],
        head_s=slowest.get("head", 0.0),
        other_s=slowest["other"],
        tensor_parallel_s=slowest["collectives"],
        pipeline_s=messages_s,
        bubble_s=max(pipelined - sum(slowest.values()) - messages_s, 0.0),
        data_parallel_s=data_s,
        optimizer_s=optimizer_s,
        reference_s=reference_s,
        step_s=pipelined + data_s + optimizer_s + reference_s,
        sweep_s=sweep_s,
    )


def _recomputes_attention(config: Config) -> float:
    """The share of attention's forward that backward does again."""
    megatron = config.policy.megatron_cfg
    if not megatron.activation_checkpointing:
        return 0.0
    if megatron.recompute_granularity == "selective":
        return float("core_attn" in megatron.recompute_modules)
    return 1.0  # with recompute_method=block of fewer layers


def _chunk_s(
    chunk: ChunkWork,
    attention_s: float,
    again: float,
    head_s: float,
    clock: _Clock,
    scale: float,
) -> tuple[dict[str, float], dict[str, float]]:
    """(forward, backward) of one micro-batch: part -> seconds."""
    forward = clock.parts(chunk.forward, scale) | {"attention": attention_s}
    # FlashAttention's backward does 2.5 times the work of its forward.
    backward = clock.parts(chunk.backward, scale) | {"attention": attention_s * (2.5 + again)}
    if chunk.head_forward is not None and chunk.head_backward is not None:
        _add(forward, clock.parts(chunk.head_forward, scale))
        _add(backward, clock.parts(chunk.head_backward, scale))
        forward["head"], backward["head"] = head_s / 4, head_s * 3 / 4
    return forward, backward


def _between_counts(
    layout: Layout, count: float, seconds: list[list[tuple[float, float]]], send_s: float
) -> float:
    """The pipeline's seconds at a mean number of micro-batches, between those of whole numbers."""
    multiple = layout.micro_batch_multiple
    below = max(int(count // multiple) * multiple, multiple)
    low = duration_s(layout, below, seconds, send_s)
    if count <= below:
        return low * count / below
    high = duration_s(layout, below + multiple, seconds, send_s)
    return low + (high - low) * (count - below) / multiple


class _Clock:
    """Work -> seconds."""

    def __init__(self, device: Device, efficiency: Efficiency, layout: Layout, precision: str):
        self.efficiency, self.layout, self.device = efficiency, layout, device
        self.flops = device.rate(precision) * 1e12
        self._memory = device.memory_gb_s * 1e9 * efficiency.memory

    def parts(self, work: Work, scale: float = 1.0) -> dict[str, float]:
        matrices = scale * work.flops / (self.flops * self.efficiency.matrices)
        other = scale * work.moved_bytes / self._memory
        launches = work.launches * self.efficiency.launch_s if self.device.is_gpu else 0.0
        other += max(launches - matrices - other, 0.0)  # a host too slow for its device
        collectives = scale * sum(
            self.collective_s(kind, ranks, size) for (kind, ranks), size in work.collectives.items()
        )
        return {"matrices": matrices, "other": other, "collectives": collectives}

    def seconds(self, work: Work, but: str = "") -> float:
        return sum(seconds for name, seconds in self.parts(work).items() if name != but)

    def rate(self, span: int, ranks_on_node: int = 1) -> float:
        """Bytes a second of a group that spans `span` ranks; each rank has its network adapter."""
        link = self.device.link_gb_s * 1e9 * self.efficiency.link
        if span <= self.layout.gpus_per_node:
            return link
        adapter = self.device.network_gb_s * 1e9 * self.efficiency.network
        return min(link, ranks_on_node * adapter)

    def collective_s(self, kind: str, ranks: int, size: float) -> float:
        if ranks == 1 or kind in ("send", "recv_", "broadcast_"):
            return 0.0
        times, tp = (2 if kind.startswith("allreduce") else 1), self.layout.tp_size
        rate = self.rate(tp)
        if "coalesced" in kind:  # DDP's: every tp-th rank
            rate = self.rate(tp * self.layout.dp_size, max(self.layout.gpus_per_node // tp, 1))
        return times * size * (ranks - 1) / ranks / rate


def _attention_s(rows: Rows, layout: Layout, clock: _Clock) -> float:
    """Forward of one micro-batch through all layers, on one tensor-parallel rank."""
    if not clock.device.is_gpu:
        return 0.0  # there it is made of products that were counted
    flops = rows.step_flops * rows.attention_share / 3
    shares = layout.dp_size * layout.tp_size * rows.micro_batches
    return flops / shares / (clock.flops * clock.efficiency.attention)


def _head_s(rows: Rows, layout: Layout, clock: _Clock) -> float:
    """Forward and backward of one micro-batch, 8 / 6 of what the model's FLOPs say (strict)."""
    if not clock.device.is_gpu:
        return 0.0
    flops = rows.step_flops * rows.head_share * 8 / 6
    shares = layout.dp_size * layout.tp_size * rows.micro_batches
    return flops / shares / (clock.flops * clock.efficiency.head)


def _send_s(works: list[RankWork], layout: Layout, clock: _Clock) -> float:
    """One message between stages, to another node unless two stages share one."""
    if layout.pp_size == 1:
        return 0.0
    return works[0].message_bytes / clock.rate(2 * layout.tp_size * layout.dp_size)


def _data_parallel_s(
    clock: _Clock, work: RankWork, chunks: list[tuple[float, float]], config: Config
) -> float:
    """Reduction of gradients and gathering of weights, beyond what a micro-batch hides."""
    section = config.policy.megatron_cfg.distributed_data_parallel_config
    hides_reduce = sum(backward for _, backward in chunks) if section.overlap_grad_reduce else 0.0
    hides_gather = sum(forward for forward, _ in chunks) if section.overlap_param_gather else 0.0
    gather_s = sum(clock.parts(each)["collectives"] for each in (work.gather, work.optimizer))
    return max(clock.seconds(work.reduce) - hides_reduce, 0.0) + max(gather_s - hides_gather, 0.0)


def _reference_s(
    works: list[RankWork], rows: Rows, layout: Layout, clock: _Clock, kernels_s: float
) -> tuple[float, float]:
    """(sweep before training, a resident reference in each step).

    `kernels_s`: forward of attention and operator for a training row, on the rank with most.
    """
    if rows.sweep is None:
        return 0.0, 0.0
    row_s = max(clock.seconds(work.sweep) for work in works)
    row_s += kernels_s * len(rows.sweep.tokens) / rows.row_tokens
    if rows.sweep_tokens == 0:
        scale = rows.row_tokens / len(rows.sweep.tokens)
        return 0.0, row_s * scale * (rows.micro_batches + layout.pp_size - 1)
    num_rows = rows.sweep_tokens / len(rows.sweep.tokens) / layout.dp_size
    return row_s * (num_rows + layout.pp_size - 1), 0.0


def _sum_parts(chunks: list, count: float) -> dict[str, float]:
    total: dict[str, float] = {}
    for pair in chunks:
        for part in pair:
            _add(total, {name: value * count for name, value in part.items()})
    return total


def _add(into: dict[str, float], more: dict[str, float]) -> None:
    for name, value in more.items():
        into[name] = into.get(name, 0.0) + value
