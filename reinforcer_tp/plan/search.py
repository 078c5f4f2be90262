"""Other layouts of the same run: which fit, and which is quickest; and the cheapest way to fit.

Layers are alike, so all that is counted of a rank grows by the same amount with each: layouts are
looked at with models of one and two layers a chunk. The winner is planned in full.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from reinforcer_tp.config import Config, ConfigError
from reinforcer_tp.pipeline_layout import even_layout
from reinforcer_tp.plan.estimate import Plan, Subject, assemble, check_layout
from reinforcer_tp.plan.layout import Layout, layout_of
from reinforcer_tp.plan.meter import Work
from reinforcer_tp.plan.probe import RankWork, probe_rank
from reinforcer_tp.plan.rows import Rows, rows_of

_MEGATRON = "policy.megatron_cfg."
_MOST_STAGES = 32


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A changed configuration and what came of it."""

    overrides: dict[str, Any]  # dotted key -> value, where it differs from the configuration
    plan: Plan | None
    refusal: str = ""  # why there is no plan


def search(config: Config, subject: Subject) -> Iterator[Candidate]:
    """Every layout of the world that the model allows, as they are planned."""
    seen: dict[tuple, dict[int, RankWork]] = {}
    for overrides in layouts(config, subject):
        yield _candidate(config, subject, overrides, seen)


def fixes(config: Config, subject: Subject) -> Iterator[Candidate]:
    """Changes of one or two keys that need less memory, the cheapest kinds first."""
    megatron, seen = config.policy.megatron_cfg, {}
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
            })  # fmt: skip
    elif megatron.recompute_granularity == "selective":
        single.append({f"{_MEGATRON}recompute_granularity": "full"})
    for overrides in single:
        yield _candidate(config, subject, overrides, seen)
    for overrides in layouts(config, subject):
        yield _candidate(config, subject, overrides, seen)


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
    }
    now = config.policy.megatron_cfg
    return {f"{_MEGATRON}{k}": v for k, v in wanted.items() if getattr(now, k) != v}


def changed(config: Config, overrides: dict[str, Any]) -> Config:
    """The configuration with dotted keys set; each section checks itself again."""
    for key, value in overrides.items():
        config = _with(config, key.split("."), value)
    return config


def _with(section: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    value = _with(getattr(section, name), rest, value) if rest else value
    return dataclasses.replace(section, **{name: value})


def _candidate(
    config: Config, subject: Subject, overrides: dict[str, Any], seen: dict
) -> Candidate:
    try:
        changed_config = changed(config, overrides)
        changed_config.validate(subject.world_size, subject.gpus_per_node)
        check_layout(changed_config, subject)
        plan = _quick_plan(changed_config, subject, seen)
    except (ConfigError, ValueError) as error:
        return Candidate(overrides=overrides, plan=None, refusal=str(error))
    return Candidate(overrides=overrides, plan=plan)


def _quick_plan(config: Config, subject: Subject, seen: dict) -> Plan:
    shape = subject.shape
    layout = layout_of(config, shape.num_layers, subject.world_size, subject.gpus_per_node)
    rows = rows_of(config, shape, layout, subject.pairs, subject.pairs_source)
    works = few_layers(config, subject, layout, rows)
    return assemble(config, subject, layout, rows, works)


def few_layers(config: Config, subject: Subject, layout: Layout, rows: Rows) -> list[RankWork]:
    """What probing every rank gives, from one and two layers in a chunk."""
    chunks, roles = layout.pp_size * layout.vpp_size, {}
    for rank in sorted({0, min(1, layout.pp_size - 1), layout.pp_size - 1}):
        roles[rank] = []
        for depth in (1, 2):
            hf_config = copy.deepcopy(subject.hf_config)
            hf_config.num_hidden_layers = depth * chunks
            shallow = dataclasses.replace(layout, stage_layers=(depth,) * chunks)
            roles[rank].append(
                probe_rank(
                    _even(config, layout),
                    hf_config,
                    shallow,
                    rank,
                    rows.longest,
                    rows.sweep,
                    on_gpu=subject.device.is_gpu,
                )
            )
    return [_of_depth(layout, rank, roles) for rank in range(layout.pp_size)]


def _even(config: Config, layout: Layout) -> Config:
    """Its pipeline keys, where each chunk has as many layers."""
    keys = {
        "pipeline_model_parallel_layout": None,
        "num_layers_in_first_pipeline_stage": None,
        "num_layers_in_last_pipeline_stage": None,
        "virtual_pipeline_model_parallel_size": layout.vpp_size if layout.vpp_size > 1 else None,
    }
    return changed(config, {f"{_MEGATRON}{key}": value for key, value in keys.items()})


def _of_depth(layout: Layout, rank: int, roles: dict[int, list[RankWork]]) -> RankWork:
    role = rank if rank in roles else 1
    one, two = roles[role]
    layers = layout.stage_layers[rank :: layout.pp_size]
    chunks = tuple(
        _line(first, second, count)
        for first, second, count in zip(one.chunks, two.chunks, layers, strict=True)
    )
    mean = sum(layers) / len(layers)
    whole = _line(
        dataclasses.replace(one, chunks=()), dataclasses.replace(two, chunks=()), mean
    )
    return dataclasses.replace(whole, pp_rank=rank, num_layers=sum(layers), chunks=chunks)


def _line(one: Any, two: Any, depth: float) -> Any:
    """The straight line through what one and two layers gave, at `depth`."""
    if isinstance(one, (int, float)):
        value = one + (two - one) * (depth - 1)
        return round(value) if isinstance(one, int) else value
    if isinstance(one, Work) or dataclasses.is_dataclass(one):
        values = {
            f.name: _line(getattr(one, f.name), getattr(two, f.name), depth) for f in fields(one)
        }
        return dataclasses.replace(one, **values)
    if isinstance(one, dict):
        return type(one)({k: _line(one.get(k, 0), two.get(k, 0), depth) for k in {*one, *two}})
    return one
