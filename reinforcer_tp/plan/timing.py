"""Seconds of a step, from what was measured of each rank and the rates of a card."""

from __future__ import annotations

from dataclasses import dataclass

from reinforcer_tp.plan.devices import Device
from reinforcer_tp.plan.layout import Layout
from reinforcer_tp.plan.meter import Work
from reinforcer_tp.plan.pipeline import duration_s
from reinforcer_tp.plan.probe import RankWork
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
    is_half: bool,
    recomputes_attention: bool,
) -> StepTime:
    """`works`: of every pipeline rank."""
    clock = _Clock(device, efficiency, layout, is_half)
    count = max(round(rows.micro_batches), 1)
    count = -(-count // layout.micro_batch_multiple) * layout.micro_batch_multiple
    # Measured on the longest row; a step's rows are shorter where nothing pads them.
    scale = rows.row_tokens / len(rows.longest.tokens)
    per_layer = _attention_s(rows, layout, clock, count) / sum(layout.stage_layers)
    head_s = _head_s(rows, layout, clock, count)
    parts, seconds = [], []
    for work in works:
        mine = layout.stage_layers[work.pp_rank :: layout.pp_size]
        chunks = []
        for chunk, layers in zip(work.chunks, mine, strict=True):
            forward = {**clock.parts(chunk.forward, scale), "attention": per_layer * layers}
            backward = {**clock.parts(chunk.backward, scale)}
            # FlashAttention's backward does 2.5 times the work of its forward.
            backward["attention"] = per_layer * layers * (2.5 + recomputes_attention)
            if chunk.head_forward is not None:
                for into, head, share in (
                    (forward, chunk.head_forward, 0.25),
                    (backward, chunk.head_backward, 0.75),
                ):
                    _add(into, clock.parts(head, scale))
                    into["head"] = head_s * share
            chunks.append((forward, backward))
        parts.append(_sum_parts(chunks, count))
        seconds.append([(sum(f.values()), sum(b.values())) for f, b in chunks])
    send_s = _send_s(works, layout, clock)
    pipelined = duration_s(layout, count, seconds, send_s)
    slowest = max(parts, key=lambda found: sum(found.values()))
    messages_s = send_s * 2 * (layout.pp_size - 1) if layout.pp_size > 1 else 0.0
    first_last = max(f + b for chunks in seconds for f, b in chunks)
    data_s = max(_exposed(clock, work, first_last) for work in works)
    optimizer_s = max(clock.seconds(work.optimizer) for work in works)
    sweep_s, reference_s = _reference_s(works, rows, layout, clock, count)
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


class _Clock:
    """Work -> seconds."""

    def __init__(self, device: Device, efficiency: Efficiency, layout: Layout, is_half: bool):
        self.efficiency, self.layout, self.device = efficiency, layout, device
        self.flops = (device.tflops if is_half else device.tflops_float32) * 1e12
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

    def seconds(self, work: Work) -> float:
        return sum(self.parts(work).values())

    def rate(self, stride: int) -> float:
        """Bytes a second between ranks that are up to `stride` apart."""
        if stride <= self.layout.gpus_per_node:
            return self.device.link_gb_s * 1e9 * self.efficiency.link
        return self.device.network_gb_s * 1e9 * self.efficiency.network

    def collective_s(self, kind: str, ranks: int, size: float) -> float:
        if ranks == 1 or kind in ("send", "recv_", "broadcast_"):
            return 0.0
        is_data = "coalesced" in kind
        span = self.layout.tp_size * (self.layout.dp_size if is_data else 1)
        times = 2 if kind.startswith("allreduce") else 1
        return times * size * (ranks - 1) / ranks / self.rate(span)


def _attention_s(rows: Rows, layout: Layout, clock: _Clock, count: int) -> float:
    """Forward of one micro-batch through all layers, on one tensor-parallel rank."""
    if not clock.device.is_gpu:
        return 0.0  # there it is made of products that were counted
    flops = rows.step_flops * rows.attention_share / 3 / layout.dp_size / count / layout.tp_size
    return flops / (clock.flops * clock.efficiency.attention)


def _head_s(rows: Rows, layout: Layout, clock: _Clock, count: int) -> float:
    """Forward and backward of one micro-batch, 8 / 6 of what the model's FLOPs say (strict)."""
    if not clock.device.is_gpu:
        return 0.0
    flops = rows.step_flops * rows.head_share / layout.dp_size / count / layout.tp_size
    return flops * 8 / 6 / (clock.flops * clock.efficiency.head)


def _send_s(works: list[RankWork], layout: Layout, clock: _Clock) -> float:
    """One message between stages."""
    if layout.pp_size == 1:
        return 0.0
    return works[0].message_bytes / clock.rate(layout.world_size // layout.pp_size + 1)


def _exposed(clock: _Clock, work: RankWork, hidden_s: float) -> float:
    """Reduction and gather beyond what the last backward and the first forward hide."""
    return max(clock.seconds(work.reduce) + clock.seconds(work.gather) - hidden_s, 0.0)


def _reference_s(
    works: list[RankWork], rows: Rows, layout: Layout, clock: _Clock, count: int
) -> tuple[float, float]:
    """(sweep before training, a resident reference in each step)."""
    if rows.sweep is None:
        return 0.0, 0.0
    row_s = max(clock.seconds(work.sweep) for work in works)
    if rows.sweep_tokens == 0:
        scale = rows.row_tokens / len(rows.sweep.tokens)
        return 0.0, row_s * scale * (count + layout.pp_size - 1)
    num_rows = rows.sweep_tokens / len(rows.sweep.tokens) / layout.dp_size
    return row_s * (num_rows + layout.pp_size - 1), 0.0


def _sum_parts(chunks: list, count: int) -> dict[str, float]:
    total: dict[str, float] = {}
    for pair in chunks:
        for part in pair:
            _add(total, {name: value * count for name, value in part.items()})
    return total


def _add(into: dict[str, float], more: dict[str, float]) -> None:
    for name, value in more.items():
        into[name] = into.get(name, 0.0) + value
