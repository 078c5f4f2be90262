"""Other layouts of the same run: which fit, and which is quickest; and the cheapest way to fit.

Layers are alike, so all that is counted of a rank grows by the same amount with each: layouts are
looked at with models of one and two layers a chunk. The winner is planned in full.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

from reinforcer_tp.config import Config, ConfigError
from reinforcer_tp.data.packed_batch import PackedBatch
from reinforcer_tp.flops import pair_cost
from reinforcer_tp.pipeline_layout import even_layout
from reinforcer_tp.plan.estimate import Plan, Subject, assemble, check_layout
from reinforcer_tp.plan.layout import Layout, layout_of
from reinforcer_tp.plan.memory import GIB
from reinforcer_tp.plan.probe import RankWork, probe_rank
from reinforcer_tp.plan.rows import Rows, rows_of

_MEGATRON = "policy.megatron_cfg."
_MOST_STAGES = 16
_RECOMPUTE = {  # how much of it, as the granularity has it by default
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
    "recompute_modules": ["core_attn"],
}
_PIPELINE_KEYS = (
    "virtual_pipeline_model_parallel_size",
    "pipeline_model_parallel_layout",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A changed configuration and what came of it."""

    overrides: dict[str, Any]  # dotted key -> value, where it differs from the configuration
    plan: Plan | None
    refusal: str = ""  # why there is no plan


def search(config: Config, subject: Subject) -> Iterator[Candidate]:
    """Every layout of the world that the model allows, as they are planned."""
    probes = Probes()
    for overrides in layouts(config, subject):
        yield _candidate(config, subject, overrides, probes)


def fixes(config: Config, subject: Subject) -> Iterator[Candidate]:
    """Changes of single keys that need less memory, then layouts; the cheapest kinds first."""
    megatron, probes = config.policy.megatron_cfg, Probes()
    tp, tokens = megatron.tensor_model_parallel_size, config.policy.micro_batch_tokens
    single: list[dict[str, Any]] = []
    if tp > 1 and not megatron.sequence_parallel:
        single.append({f"{_MEGATRON}sequence_parallel": True})
    if not megatron.optimizer.use_distributed_optimizer:
        single.append({f"{_MEGATRON}optimizer.use_distributed_optimizer": True})
    if config.policy.kernel_cache_mib:
        single.append({"policy.kernel_cache_mib": 0})
    if tokens is not None and tokens // 2 >= 2 * config.policy.max_total_sequence_length:
        single.append({"policy.micro_batch_tokens": tokens // 2})
    if not megatron.activation_checkpointing:
        for granularity in ("selective", "full"):
            single.append({
                f"{_MEGATRON}activation_checkpointing": True,
                f"{_MEGATRON}recompute_granularity": granularity,
                **{f"{_MEGATRON}{key}": value for key, value in _RECOMPUTE.items()},
            })  # fmt: skip
    elif megatron.recompute_granularity == "selective":
        keys = {"recompute_granularity": "full", **_RECOMPUTE}
        single.append({f"{_MEGATRON}{key}": value for key, value in keys.items()})
    for overrides in single:
        if megatron.recompute_num_layers == 1:  # one and two layers say nothing of units of more
            yield _candidate(config, subject, _differing(config, overrides), probes)
    for overrides in layouts(config, subject):
        yield _candidate(config, subject, overrides, probes)


def layouts(config: Config, subject: Subject) -> Iterator[dict[str, Any]]:
    """What each layout changes: tensor, pipeline and virtual sizes, recompute."""
    world, layers = subject.world_size, subject.shape.num_layers
    for tp in _powers(subject.gpus_per_node):
        if subject.shape.num_kv_heads % tp or subject.shape.ffn_hidden_size % tp or world % tp:
            continue
        for pp in _powers(min(world // tp, layers, _MOST_STAGES)):
            dp = world // tp // pp
            if world % (tp * pp) or config.policy.train_global_batch_size < dp:
                continue
            for vpp in (1, 2, 4) if pp > 1 else (1,):
                if pp * vpp > layers:
                    continue
                for recompute in (None, "selective", "full"):
                    yield _changed(config, layers, tp, pp, vpp, recompute)


def _powers(most: int) -> Iterator[int]:
    size = 1
    while size <= most:
        yield size
        size *= 2


def _changed(
    config: Config, layers: int, tp: int, pp: int, vpp: int, recompute: str | None
) -> dict[str, Any]:
    is_even = layers % (pp * vpp) == 0
    wanted = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vpp if vpp > 1 and is_even else None,
        "pipeline_model_parallel_layout": None if is_even else even_layout(layers, pp * vpp),
        "num_layers_in_first_pipeline_stage": None,
        "num_layers_in_last_pipeline_stage": None,
        "sequence_parallel": tp > 1,
        "activation_checkpointing": recompute is not None,
        "recompute_granularity": recompute or config.policy.megatron_cfg.recompute_granularity,
    } | _RECOMPUTE
    return _differing(config, {f"{_MEGATRON}{key}": value for key, value in wanted.items()})


def _differing(config: Config, overrides: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in overrides.items() if attrgetter(k)(config) != v}


def changed(config: Config, overrides: dict[str, Any]) -> Config:
    """The configuration with dotted keys set, all at once; each section checks itself again."""
    nested: dict[str, Any] = {}
    for key, value in overrides.items():
        *sections, name = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return _with(config, nested)


def _with(section: Any, values: dict[str, Any]) -> Any:
    is_section = {name: dataclasses.is_dataclass(getattr(section, name)) for name in values}
    return dataclasses.replace(
        section,
        **{k: _with(getattr(section, k), v) if is_section[k] else v for k, v in values.items()},
    )


def _candidate(
    config: Config, subject: Subject, overrides: dict[str, Any], probes: Probes
) -> Candidate:
    try:
        config = changed(config, overrides)
        config.validate(subject.world_size, subject.gpus_per_node)
        check_layout(config, subject)
        layout = layout_of(
            config, subject.shape.num_layers, subject.world_size, subject.gpus_per_node
        )
        _check_weights(config, subject, layout)
        rows = rows_of(config, subject.shape, layout, subject.pairs)
        rows = dataclasses.replace(rows, longest=probes.row(config, subject, layout, rows))
        works = [
            rank_at_depth(config, subject, layout, rows, r, probes) for r in range(layout.pp_size)
        ]
    except ValueError as error:
        return Candidate(overrides=overrides, plan=None, refusal=str(error))
    return Candidate(overrides=overrides, plan=assemble(config, subject, layout, rows, works))


def _check_weights(config: Config, subject: Subject, layout: Layout) -> None:
    """Raises ConfigError where weights, gradients and optimizer alone are too much."""
    shape, megatron = subject.shape, config.policy.megatron_cfg
    layer = pair_cost(shape).token / 6 / shape.num_layers
    weights = max(
        sum(layout.chunk_layers(rank)) * layer / layout.tp_size for rank in range(layout.pp_size)
    )
    size = 4 if config.policy.precision == "float32" else 2
    states = 8 if size == 4 else 12  # moments, and masters in 16 bits
    if megatron.optimizer.use_distributed_optimizer:
        states /= layout.dp_size
    gradient = 4 if megatron.distributed_data_parallel_config.grad_reduce_in_fp32 else size
    needed = weights * (size + gradient + states) / GIB
    if needed > subject.limit_gib:
        raise ConfigError(
            f"weights, gradients and optimizer of a rank need {needed:.0f} GiB of "
            f"{subject.limit_gib:.1f}"
        )


class Probes:
    """Ranks that were built, by what decides what they do; and the row they were given."""

    def __init__(self) -> None:
        self._works: dict[tuple, RankWork] = {}
        self._rows: dict[tuple, PackedBatch] = {}

    def row(self, config: Config, subject: Subject, layout: Layout, rows: Rows) -> PackedBatch:
        """One row for all layouts whose rows are packed alike, but for a few tokens."""
        policy = config.policy
        limits = (policy.micro_batch_tokens, policy.train_micro_batch_size)
        key = (*limits, layout.tp_size, layout.pp_size, policy.megatron_cfg.sequence_parallel)
        return self._rows.setdefault(key, rows.longest)

    def work(
        self, config: Config, subject: Subject, layout: Layout, rows: Rows, rank: int, depth: int
    ) -> RankWork:
        """A rank of `depth` layers in a pipeline without chunks."""
        plain = dataclasses.replace(layout, vpp_size=1, stage_layers=(depth,) * layout.pp_size)
        even = changed(config, {f"{_MEGATRON}{key}": None for key in _PIPELINE_KEYS})
        key = (repr(even.policy), layout.dp_size, rank, depth, len(rows.longest.tokens))
        if key not in self._works:
            hf_config = copy.deepcopy(subject.hf_config)
            hf_config.num_hidden_layers = depth * layout.pp_size
            self._works[key] = probe_rank(
                even,
                hf_config,
                plain,
                rank,
                rows.longest,
                rows.sweep,
                on_gpu=subject.device.is_gpu,
            )
        return self._works[key]


def rank_at_depth(
    config: Config, subject: Subject, layout: Layout, rows: Rows, rank: int, probes: Probes
) -> RankWork:
    """What building the rank gives, from ranks of one and two layers."""
    last = layout.pp_size - 1

    def line(role: int, depth: float) -> RankWork:
        one, two = (probes.work(config, subject, layout, rows, role, d) for d in (1, 2))
        return _line(one, two, depth)

    layers = layout.chunk_layers(rank)
    whole = line(rank if rank in (0, last) else 1, sum(layers))
    chunks = []
    for index, depth in enumerate(layers):
        is_first, is_last = index == 0 and rank == 0, index == layout.vpp_size - 1 and rank == last
        # Of two ranks none stands in the middle: there the first one's embedding is too much.
        role = rank if is_first or is_last else min(1, last - 1)
        chunks.append(line(role, depth).chunks[0])
    return dataclasses.replace(whole, pp_rank=rank, num_layers=sum(layers), chunks=tuple(chunks))


def _line(one: Any, two: Any, depth: float) -> Any:
    """The straight line through what one and two layers gave, at `depth`."""
    if isinstance(one, (int, float)):
        value = one + (two - one) * (depth - 1)
        return round(value) if isinstance(one, int) else value
    if dataclasses.is_dataclass(one):
        values = {
            f.name: _line(getattr(one, f.name), getattr(two, f.name), depth) for f in fields(one)
        }
        return dataclasses.replace(one, **values)
    if isinstance(one, dict):
        return type(one)({k: _line(one.get(k, 0), two.get(k, 0), depth) for k in {*one, *two}})
    if isinstance(one, tuple):
        return tuple(_line(a, b, depth) for a, b in zip(one, two, strict=True))
    return one
