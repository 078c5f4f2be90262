"""The layouts of the self-test, and what a machine can hold.

Imports neither torch nor transformers.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reinforcer_tp.config import Config, ConfigError
from reinforcer_tp.pipeline_layout import even_layout

MAX_PROCESSES = 8  # of the user's own layout
_MEGATRON = "policy.megatron_cfg"
_PROCESS_BYTES = 700 << 20  # of a process that has imported torch and Megatron

# What a layout starts from: tp=1, one process, one micro-batch, nothing shared or recomputed.
BASELINE = (
    f"{_MEGATRON}.tensor_model_parallel_size=1",
    f"{_MEGATRON}.sequence_parallel=false",
    f"{_MEGATRON}.pipeline_model_parallel_size=1",
    f"{_MEGATRON}.virtual_pipeline_model_parallel_size=null",
    f"{_MEGATRON}.num_layers_in_first_pipeline_stage=null",
    f"{_MEGATRON}.num_layers_in_last_pipeline_stage=null",
    f"{_MEGATRON}.pipeline_model_parallel_layout=null",
    f"{_MEGATRON}.activation_checkpointing=false",
    f"{_MEGATRON}.recompute_granularity=full",
    f"{_MEGATRON}.recompute_method=uniform",
    f"{_MEGATRON}.recompute_num_layers=1",
    f"{_MEGATRON}.recompute_modules=[core_attn]",
    f"{_MEGATRON}.optimizer.use_distributed_optimizer=false",
    "policy.train_micro_batch_size=null",
    "policy.micro_batch_tokens=null",
    "data.share_prompts=false",
    "data.share_prefix=prompt",
)
# What every layout runs with, whatever the user's configuration says.
ON_CPU = (
    "policy.precision=float32",
    "policy.fp8=off",
    "policy.kernel_impl=torch",
    "policy.layer_spec=local",
    "cluster.gpus_per_node=null",
    "cluster.num_nodes=null",
    "checkpointing.enabled=false",
    "dpo.val_period=0",
    "data.val_data_path=null",
    *(f"logger.{name}_enabled=false" for name in ("tensorboard", "wandb", "mlflow", "swanlab")),
    "logger.trackio_enabled=false",
)

_TP2 = (f"{_MEGATRON}.tensor_model_parallel_size=2",)
_SP = (*_TP2, f"{_MEGATRON}.sequence_parallel=true")
_PP2 = (f"{_MEGATRON}.pipeline_model_parallel_size=2",)
_SHARDED = (f"{_MEGATRON}.optimizer.use_distributed_optimizer=true",)
_FULL = (f"{_MEGATRON}.activation_checkpointing=true",)
_SELECTIVE = (_FULL[0], f"{_MEGATRON}.recompute_granularity=selective")
_PROMPT = ("data.share_prompts=true",)
_RESPONSE = (*_PROMPT, "data.share_prefix=response")
_ONE_PAIR = ("policy.train_micro_batch_size=1",)
_TWO_PAIRS = ("policy.train_micro_batch_size=2",)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One row of the table."""

    name: str
    processes: int
    overrides: tuple[str, ...] | None  # over BASELINE; None = the user's own keys
    tied: bool = False  # run with the small model whose head is its embedding
    skip: str | None = None  # why it cannot run here


def layouts(num_layers: int, lengths: np.ndarray) -> list[Layout]:
    """Every layout, the baseline first. `lengths` (n, 3): tokens of prompt, chosen, rejected."""
    pp2, vpp2 = _pipeline(num_layers, 1), _pipeline(num_layers, 2)
    first = num_layers // 2 + 1
    uneven = (
        *_PP2,
        f"{_MEGATRON}.num_layers_in_first_pipeline_stage={first}",
        f"{_MEGATRON}.num_layers_in_last_pipeline_stage={max(num_layers - first, 1)}",
    )
    by_text = (*_PP2, f"{_MEGATRON}.pipeline_model_parallel_layout={_lopsided(num_layers, 4)}")
    budget = (f"policy.micro_batch_tokens={_token_budget(lengths)}",)
    table = {
        "baseline": (1, ()),
        "pairs1": (1, _ONE_PAIR),
        "tokens": (1, budget),
        "share_prompt": (1, _PROMPT),
        "share_response": (1, _RESPONSE),
        "share_response_tokens": (1, (*_RESPONSE, *budget)),
        "recompute_full": (1, (*_FULL, *_TWO_PAIRS, *_RESPONSE)),
        "recompute_selective": (1, (*_SELECTIVE, *_TWO_PAIRS, *_RESPONSE)),
        "tp2": (2, _TP2),
        "tp2_share": (2, (*_TP2, *_RESPONSE, *budget)),
        "tp2_sp": (2, _SP),
        "tp2_sp_share": (2, (*_SP, *_RESPONSE, *_ONE_PAIR)),
        "tp2_sp_recompute": (2, (*_SP, *_FULL, *_PROMPT, *_TWO_PAIRS)),
        "pp2": (2, (*pp2, *_TWO_PAIRS)),
        "pp2_share": (2, (*pp2, *_RESPONSE, *budget)),
        "pp2_recompute": (2, (*pp2, *_FULL, *_PROMPT, *_ONE_PAIR)),
        "pp2_uneven": (2, (*uneven, *_PROMPT, *_TWO_PAIRS)),
        "pp2_vpp2": (2, (*vpp2, *_TWO_PAIRS)),
        "pp2_vpp2_share": (2, (*vpp2, *_RESPONSE, *_SELECTIVE, *_ONE_PAIR)),
        "pp2_layout": (2, (*by_text, *_PROMPT, *_TWO_PAIRS)),
        "dp2": (2, (*_TWO_PAIRS, *_PROMPT)),
        "dp2_sharded": (2, (*_SHARDED, *_TWO_PAIRS, *_PROMPT)),
        "dp2_empty": (2, (*_SHARDED, *_ONE_PAIR, *_RESPONSE)),
        "tp2_sp_pp2": (4, (*_SP, *pp2, *_TWO_PAIRS, *_RESPONSE)),
        "tp2_sp_vpp2": (4, (*_SP, *vpp2, *_TWO_PAIRS, *_PROMPT, *_FULL)),
        "dp2_pp2": (4, (*pp2, *_SHARDED, *_ONE_PAIR, *_RESPONSE)),
        "dp2_vpp2": (4, (*vpp2, *_ONE_PAIR, *_PROMPT)),
        "dp2_tp2_sp": (4, (*_SP, *_SHARDED, *_TWO_PAIRS, *_RESPONSE)),
    }
    return [Layout(name=name, processes=n, overrides=keys) for name, (n, keys) in table.items()]


def tied_layouts(num_layers: int) -> list[Layout]:
    """Layouts in which a head that is the embedding matters, and the baseline of that model."""
    pp2, vpp2 = _pipeline(num_layers, 1), _pipeline(num_layers, 2)
    table = {
        "tied_baseline": (1, ()),
        "tied_tp2_sp": (2, (*_SP, *_RESPONSE, *_TWO_PAIRS)),
        "tied_pp2": (2, (*pp2, *_RESPONSE, *_TWO_PAIRS)),
        "tied_vpp2": (2, (*vpp2, *_PROMPT, *_ONE_PAIR)),
        "tied_dp2_pp2": (4, (*pp2, *_SHARDED, *_RESPONSE, *_ONE_PAIR)),
    }
    return [
        Layout(name=name, processes=n, overrides=keys, tied=True)
        for name, (n, keys) in table.items()
    ]


def own_layout(config: Config) -> Layout:
    """The layout of the user's own keys, on the processes that `cluster` names or needs."""
    megatron = config.policy.megatron_cfg
    stages = megatron.tensor_model_parallel_size * megatron.pipeline_model_parallel_size
    planned = config.planned_world_size
    processes = planned if planned % stages == 0 else stages
    return Layout(name="own", processes=processes, overrides=None)


def choose(known: Sequence[Layout], wanted: str | None) -> list[Layout]:
    """The layouts named by `wanted` (commas between), with their baselines; None = all.

    Raises ConfigError for a name that is not known.
    """
    if wanted is None:
        return list(known)
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    unknown = sorted(set(names) - {layout.name for layout in known})
    if unknown or not names:
        raise ConfigError(
            f"--layouts {wanted}: {', '.join(unknown) or 'nothing'} is no layout"
            f"{' without --config' if unknown == ['own'] else ''}; expected some of "
            f"{', '.join(layout.name for layout in known)}"
        )
    tied = {layout.tied for layout in known if layout.name in names}
    needed = {"tied_baseline" if is_tied else "baseline" for is_tied in tied}
    return [layout for layout in known if layout.name in needed.union(names)]


def bytes_needed(shape: Mapping[str, Any], lengths: np.ndarray, processes: int, copies: int) -> int:
    """An estimate, generous: float32 weights, gradients and the buffers of their reduction for
    each data-parallel copy, the activations of the whole batch in one row, and the processes."""
    d, layers, heads = (
        shape[f"{key}"] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    )
    head_dim = shape.get("head_dim") or d // heads
    kv = (shape.get("num_key_value_heads") or heads) * head_dim
    per_layer = d * (2 * heads * head_dim + 2 * kv + 3 * shape["intermediate_size"])
    heads_of_vocabulary = 1 if shape.get("tie_word_embeddings") else 2
    weights = layers * per_layer + heads_of_vocabulary * shape["vocab_size"] * d
    prompt, chosen, rejected = lengths.astype(np.float64).T
    tokens = float((2 * prompt + chosen + rejected).sum())
    squares = float(((prompt + chosen) ** 2 + (prompt + rejected) ** 2).sum())
    saved = tokens * (14 * d + 4 * kv + 5 * shape["intermediate_size"]) + 2 * heads * squares
    floats = (
        3 * copies * weights
        + layers * saved
        + float((chosen + rejected).sum()) * shape["vocab_size"]
    )
    return int(4 * floats) + processes * _PROCESS_BYTES


def free_memory() -> int:
    """Bytes that new processes may take: of the machine, or of this container where that is less.

    A number that nothing exceeds where it cannot be known.
    """
    free = [1 << 60]
    info = Path("/proc/meminfo")
    if info.exists():
        fields = dict(line.split(":") for line in info.read_text().splitlines())
        free.append(int(fields["MemAvailable"].split()[0]) << 10)
    group = Path("/sys/fs/cgroup")
    limit = group / "memory.max"
    if limit.exists() and limit.read_text().strip() != "max":
        used = int((group / "memory.current").read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # The kernel gives back what files left in memory.
        free.append(int(limit.read_text()) - used + int(counts["inactive_file"]))
    return min(free)


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _token_budget(lengths: np.ndarray) -> int:
    """Tokens of a micro-batch: about a third of the batch, and room for the longest pair."""
    tokens = (2 * lengths[:, 0] + lengths[:, 1] + lengths[:, 2]).tolist()
    return max(max(tokens), sum(tokens) // 3)


def _pipeline(num_layers: int, chunks: int) -> tuple[str, ...]:
    """pp=2 with `chunks` on each rank; a layout text where the layers do not divide evenly."""
    if num_layers % (2 * chunks):
        text = even_layout(num_layers, 2 * chunks)
        return (*_PP2, f"{_MEGATRON}.pipeline_model_parallel_layout={text}")
    return (*_PP2, f"{_MEGATRON}.virtual_pipeline_model_parallel_size={chunks}")


def _lopsided(num_layers: int, stages: int) -> str:
    """A layout text with a layer moved from the third stage to the second, where it has two."""
    parts = even_layout(num_layers, stages).split("|")
    if len(parts) > 2 and len(parts[2]) > 1:
        parts[1], parts[2] = parts[1] + "t", parts[2][:-1]
    return "|".join(parts)
