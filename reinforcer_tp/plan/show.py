"""A plan as tables, a JSON object, and every assumption it rests on."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from reinforcer_tp.plan.estimate import (
    COMPILED_GIB,
    CONTEXT_GIB,
    GAPS,
    HEAP,
    LIBRARIES_GIB,
    Plan,
)
from reinforcer_tp.plan.memory import GIB
from reinforcer_tp.plan.rows import STEPS
from reinforcer_tp.plan.search import Candidate

_TIME_PARTS = (
    ("matrices_s", "matrix products"),
    ("attention_s", "attention"),
    ("head_s", "log-prob operator"),
    ("other_s", "norms, rope, activations"),
    ("tensor_parallel_s", "tensor-parallel collectives"),
    ("pipeline_s", "messages between stages"),
    ("bubble_s", "pipeline bubble"),
    ("data_parallel_s", "gradients and weights, not hidden"),
    ("optimizer_s", "optimizer"),
    ("reference_s", "reference"),
)


def memory_table(plan: Plan) -> str:
    """One row for each pipeline stage, GiB of one rank.

    The peak is that of the worst moment: temporaries and what the card loses are in it as well.
    """
    columns = ("weights", "gradients", "optimizer", "activations", "head", "other", "peak")
    table = Table("stage", "layers", "parameters", *columns, "at its worst in", box=SIMPLE_HEAD)
    for column in table.columns[1:-1]:
        column.justify = "right"
    for rank, (work, memory) in enumerate(zip(plan.works, plan.memories, strict=True)):
        parts = (
            memory.parameters,
            memory.gradients,
            memory.optimizer,
            memory.activations,
            memory.head,
            memory.reference + memory.buffers,
        )
        table.add_row(
            str(rank),
            str(work.num_layers),
            f"{work.num_parameters:,}",
            *(f"{size / GIB:.2f}" for size in parts),
            f"{plan.rank_peak_gib(rank):.2f}",
            memory.worst_moment,
        )
    return _text(table)


def time_table(plan: Plan) -> str:
    table = Table("a step, slowest rank", "seconds", "share", box=SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    whole = plan.time.step_s
    for name, label in _TIME_PARTS:
        seconds = getattr(plan.time, name)
        if seconds >= 0.0005:
            table.add_row(label, f"{seconds:.3f}", f"{seconds / whole:.1%}")
    table.add_row("whole step", f"{whole:.3f}", "")
    return _text(table)


def headline(plan: Plan) -> Iterator[str]:
    subject, device = plan.subject, plan.subject.device
    yield (
        f"{plan.layout.text()} on {subject.world_size} x {device.name}, "
        f"{subject.gpus_per_node} on a node"
    )
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    where = "" if device.is_gpu else " over the resident size without a model"
    yield (
        f"memory: {plan.peak_gib:.1f} GiB{where}, of {subject.limit_gib:.1f} "
        f"({device.memory_gib:g} less {subject.headroom:.0%} headroom): {verdict}"
    )


def run_lines(plan: Plan, price: float | None) -> Iterator[str]:
    rows, hours = plan.rows, plan.run_s / 3600
    per_device, mfu = rates(plan)
    yield (
        f"a step: {rows.step_flops / 1e15:,.3g} PFLOP for {rows.step_tokens:,.0f} tokens in "
        f"{rows.micro_batches:.1f} micro-batches a rank; {per_device:,.0f} TFLOP/s a device, "
        f"MFU {mfu:.1%}"
    )
    gpu_hours = hours * plan.layout.world_size
    cost = "" if price is None else f", {gpu_hours * price:,.0f} at {price:g} a GPU-hour"
    sweep = f", {plan.time.sweep_s / 60:.0f} min of it the reference's sweep"
    yield (
        f"the run: {rows.total_steps:,} steps, {hours:,.1f} h"
        f"{sweep if plan.time.sweep_s > 0 else ''}; {gpu_hours:,.1f} GPU-hours{cost}"
    )


def rates(plan: Plan) -> tuple[float, float]:
    """(TFLOP/s of a device, MFU)."""
    per_device = plan.rows.step_flops / plan.time.step_s / plan.layout.world_size / 1e12
    return per_device, per_device / plan.subject.device.rate(plan.config.policy.precision)


def assumptions(plan: Plan) -> Iterator[str]:
    subject, device, shares = plan.subject, plan.subject.device, plan.subject.efficiency
    rate = device.rate(plan.config.policy.precision)
    yield f"model shape: {subject.shape_source}"
    yield f"tokens: {subject.pairs_source}"
    yield (
        f"memory is that of the longest row of the first {STEPS} steps, "
        f"{len(plan.rows.longest.tokens):,} tokens with {len(plan.rows.longest.labels):,} response "
        "tokens, in every micro-batch"
    )
    yield (
        f"rates: {rate:g} TFLOP/s x {shares.matrices:g} in matrix products, x "
        f"{shares.attention:g} in attention, x {shares.head:g} in the operator; "
        f"{device.memory_gb_s:g} GB/s x {shares.memory:g} of memory; links "
        f"{device.link_gb_s:g} GB/s x {shares.link:g} in a node, {device.network_gb_s:g} GB/s x "
        f"{shares.network:g} between nodes"
    )
    if not device.is_gpu:
        yield (
            f"CPU memory: besides what was counted {LIBRARIES_GIB:g} GiB of libraries "
            f"({COMPILED_GIB:g} more in 16 bits), and {HEAP:.0%} of the activations that the heap "
            "keeps"
        )
        return
    yield f"launches: {shares.launch_s * 1e6:g} us of the host for an operator that is not hidden"
    yield (
        f"card memory: besides what was counted {CONTEXT_GIB:g} GiB for CUDA and NCCL, and "
        f"{GAPS:.0%} that the allocator loses to gaps"
    )
    yield (
        "kernels: the local layer spec and torch's AdamW; Transformer Engine's, Apex's and FP8 "
        "(planned as 16 bits) differ. Validation, checkpoints and start-up are not counted. No "
        "figure here was measured on a GPU"
    )


def rank(candidate: Candidate) -> tuple:
    """The quickest that fit first, then what does not fit, then what cannot be."""
    plan = candidate.plan
    return (2, 0.0) if plan is None else (int(not plan.fits), plan.time.step_s)


def candidates_table(candidates: Iterable[Candidate], most: int) -> str:
    """Of candidates by `rank`."""
    table = Table("layout", "changes", "GiB", "step s", "run h", "", box=SIMPLE_HEAD)
    planned = [each for each in candidates if each.plan is not None]
    for candidate in planned[:most]:
        plan = candidate.plan
        table.add_row(
            plan.layout.text(),
            changes_text(candidate.overrides) or "(as configured)",
            f"{plan.peak_gib:.1f}",
            f"{plan.time.step_s:.2f}",
            f"{plan.run_s / 3600:.1f}",
            "" if plan.fits else "does not fit",
        )
    return _text(table)


def changes_text(overrides: dict[str, Any]) -> str:
    """As one would type them."""
    names = {True: "true", False: "false", None: "null"}
    return " ".join(
        f"{key}={names[value] if value is None or isinstance(value, bool) else _quoted(value)}"
        for key, value in overrides.items()
    )


def _quoted(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) and set(value) & set("|*()' ") else str(value)


def candidate_json(candidate: Candidate) -> dict[str, Any]:
    """One layout of a search."""
    if candidate.plan is None:
        return {"changes": candidate.overrides, "refusal": candidate.refusal}
    return {
        "changes": candidate.overrides,
        "layout": candidate.plan.layout.text(),
        "fits": candidate.plan.fits,
        "peak_gib": candidate.plan.peak_gib,
        "step_s": candidate.plan.time.step_s,
        "hours": candidate.plan.run_s / 3600,
    }


def as_json(plan: Plan, price: float | None) -> dict[str, Any]:
    gpu_hours = plan.run_s / 3600 * plan.layout.world_size
    tflops, mfu = rates(plan)
    return {
        "layout": {
            "world_size": plan.layout.world_size,
            "tensor_model_parallel_size": plan.layout.tp_size,
            "pipeline_model_parallel_size": plan.layout.pp_size,
            "virtual_pipeline_model_parallel_size": plan.layout.vpp_size,
            "data_parallel_size": plan.layout.dp_size,
        },
        "fits": plan.fits,
        "limit_gib": plan.subject.limit_gib,
        "peak_gib": plan.peak_gib,
        "stages": [
            {
                "layers": work.num_layers,
                "parameters": work.num_parameters,
                "parameter_bytes": work.parameter_bytes,
                "peak_gib": plan.rank_peak_gib(rank),
                "held_gib": plan.held_gib(rank),
                "worst_moment": memory.worst_moment,
                **{
                    f"{name}_gib": getattr(memory, name) / GIB
                    for name in (
                        *("parameters", "gradients", "optimizer", "activations", "head"),
                        *("reference", "buffers"),
                    )
                },
            }
            for rank, (work, memory) in enumerate(zip(plan.works, plan.memories, strict=True))
        ],
        "time": dataclasses.asdict(plan.time),
        "step_flops": plan.rows.step_flops,
        "steps": plan.rows.total_steps,
        "hours": plan.run_s / 3600,
        "gpu_hours": gpu_hours,
        "cost": None if price is None else gpu_hours * price,
        "tflops_per_gpu": tflops,
        "mfu": mfu,
        "step_tokens": plan.rows.step_tokens,
        "micro_batches": plan.rows.micro_batches,
        "assumptions": list(assumptions(plan)),
    }


def _text(table: Table) -> str:
    text = io.StringIO()
    Console(file=text, width=150).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().strip("\n").splitlines())
