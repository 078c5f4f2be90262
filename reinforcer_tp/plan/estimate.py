"""A configuration on a card -> what each pipeline stage holds, and how long a step takes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinforcer_tp.config import Config, ConfigError, find_model_shape, validate_model
from reinforcer_tp.data.tokenized import TokenizedSet
from reinforcer_tp.embedded import ensure_embedded
from reinforcer_tp.hf_files import config_of
from reinforcer_tp.mcore.shape import ModelShape, model_shape
from reinforcer_tp.plan.devices import Device
from reinforcer_tp.plan.layout import Layout, layout_of
from reinforcer_tp.plan.memory import GIB, SWEEP, RankMemory, rank_memory
from reinforcer_tp.plan.probe import RankWork, probe_rank
from reinforcer_tp.plan.rows import Assumed, Rows, read_pairs, rows_of
from reinforcer_tp.plan.timing import Efficiency, StepTime, step_time

MODELS = Path(__file__).resolve().parents[2] / "configs" / "models"

# Of a card's memory: CUDA's context and NCCL's buffers, and what the allocator loses to gaps.
CONTEXT_GIB, GAPS = 2.0, 0.04
# Of a host's: libraries that the first step loads, in 16 bits also oneDNN's cache of compiled
# products, and what glibc's heap keeps of freed activations. Measured on small models.
LIBRARIES_GIB, COMPILED_GIB, HEAP = 0.13, 0.2, 0.20


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is planned for: read once, whatever layouts are tried."""

    hf_config: Any
    shape: ModelShape
    shape_source: str
    pairs: TokenizedSet
    pairs_source: str
    device: Device
    efficiency: Efficiency
    world_size: int
    gpus_per_node: int
    headroom: float  # share of a card to keep free

    @property
    def limit_gib(self) -> float:
        """Of a card, less the headroom."""
        return self.device.memory_gib * (1 - self.headroom)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The answer for one layout."""

    config: Config
    subject: Subject
    layout: Layout
    rows: Rows
    works: list[RankWork]  # by pipeline rank
    memories: list[RankMemory]  # likewise
    time: StepTime

    @property
    def peak_gib(self) -> float:
        """Of the worst rank, with what the process needs besides."""
        return max(self.rank_peak_gib(rank) for rank in range(len(self.memories)))

    def rank_peak_gib(self, rank: int) -> float:
        """What a rank takes of its card, or of the host over what it held without a model."""
        memory = self.memories[rank]
        if not self.subject.device.is_gpu:
            return self.host_gib(memory)
        return memory.peak / GIB * (1 + GAPS) + CONTEXT_GIB

    def held_gib(self, rank: int) -> float:
        """What the run's `memory/peak_gib` should read: tensors, since training began."""
        memory = self.memories[rank]
        if not self.subject.device.is_gpu:
            return self.host_gib(memory)
        return max(n for name, n in memory.moments.items() if name != SWEEP) / GIB

    def host_gib(self, memory: RankMemory) -> float:
        compiled = COMPILED_GIB if self.config.policy.precision != "float32" else 0.0
        kept = HEAP * memory.activations / GIB
        return memory.peak / GIB + kept + LIBRARIES_GIB + compiled

    @property
    def fits(self) -> bool:
        return self.peak_gib <= self.subject.limit_gib

    @property
    def run_s(self) -> float:
        return self.rows.total_steps * self.time.step_s + self.time.sweep_s


def open_subject(
    config: Config,
    device: Device,
    efficiency: Efficiency,
    assumed: Assumed,
    *,
    world_size: int,
    gpus_per_node: int,
    headroom: float = 0.1,
) -> Subject:
    """Reads the model's shape and the data. Raises ConfigError, ValueError."""
    name = config.policy.model_name
    if name == "embedded":
        name = ensure_embedded().model
    fields, source = find_model_shape(name, MODELS, shipped_first=True)
    validate_model(config, fields)
    hf_config = config_of(fields, Path(source))
    pairs, pairs_source = read_pairs(config, assumed)
    return Subject(
        hf_config=hf_config,
        shape=model_shape(hf_config),
        shape_source=source,
        pairs=pairs,
        pairs_source=pairs_source,
        device=device,
        efficiency=efficiency,
        world_size=world_size,
        gpus_per_node=gpus_per_node,
        headroom=headroom,
    )


def make_plan(config: Config, subject: Subject) -> Plan:
    """Builds a rank of every pipeline stage and takes a step. Raises ConfigError, ValueError."""
    config.validate(subject.world_size, subject.gpus_per_node)
    check_layout(config, subject)
    shape = subject.shape
    layout = layout_of(config, shape.num_layers, subject.world_size, subject.gpus_per_node)
    rows = rows_of(config, shape, layout, subject.pairs)
    built: dict[tuple, RankWork] = {}  # stages with as many layers that are no end do the same
    works = []
    for rank in range(layout.pp_size):
        key = (layout.chunk_layers(rank), rank == 0, rank == layout.pp_size - 1)
        if key not in built:
            batches = (rows.longest, rows.sweep)
            built[key] = probe_rank(
                config, subject.hf_config, layout, rank, *batches, on_gpu=subject.device.is_gpu
            )
        works.append(dataclasses.replace(built[key], pp_rank=rank))
    return assemble(config, subject, layout, rows, works)


def assemble(
    config: Config, subject: Subject, layout: Layout, rows: Rows, works: list[RankWork]
) -> Plan:
    return Plan(
        config=config,
        subject=subject,
        layout=layout,
        rows=rows,
        works=works,
        memories=[rank_memory(work, layout, rows.most_micro_batches) for work in works],
        time=step_time(works, rows, layout, subject.device, subject.efficiency, config=config),
    )


def check_layout(config: Config, subject: Subject) -> None:
    """What the trainer would find out on the cluster. Raises ConfigError."""
    validate_model(config, subject.hf_config.to_dict())
    megatron = config.policy.megatron_cfg
    tp, node = megatron.tensor_model_parallel_size, subject.gpus_per_node
    if tp > node:
        raise ConfigError(
            f"policy.megatron_cfg.tensor_model_parallel_size={tp} spans nodes of {node} GPUs: "
            f"every layer would wait for the network; use at most {node}, or --gpus-per-node"
        )
