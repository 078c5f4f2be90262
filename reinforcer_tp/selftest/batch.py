"""The global batch of the self-test and the model it goes through: its own, or the user's.

Imports torch and transformers only in functions: `--help` and a wrong key must not wait for them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reinforcer_tp.config import Config, ConfigError, load_config, validate_model
from reinforcer_tp.selftest.layouts import (
    BASELINE,
    MAX_PROCESSES,
    ON_CPU,
    Layout,
    bytes_needed,
    free_memory,
    layouts,
    own_layout,
    tied_layouts,
)

if TYPE_CHECKING:
    from reinforcer_tp.data.tokenized import TokenizedSet

# Both terms matter alike, at weights that are not ln 2's.
_OWN_LOSS = ("dpo.reference_policy_kl_penalty=0.3", "dpo.sft_loss_weight=0.02")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The global batch, the model that it goes through, and the layouts to try."""

    pairs: TokenizedSet
    shape: Mapping[str, Any]  # config.json
    layouts: tuple[Layout, ...]
    load: Callable[[Layout], Config]  # raises ConfigError
    may_refuse: bool  # the model, a user's, may not fit every layout
    note: str  # for the user


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout that will run."""

    layout: Layout
    config: Config


def own_making(folder: Path, overrides: Sequence[str]) -> Batch:
    """The self-test's own models, written below `folder`, and its own pairs."""
    refused = [text for text in overrides if not text.startswith("dpo.")]
    if refused:
        raise ConfigError(
            f"{refused[0]}: without --config the self-test brings its own model, data and layouts; "
            "only dpo.* keys can be set, or give --config FILE"
        )
    pairs = small_batch()
    for is_tied in (False, True):
        (folder / f"tied_{is_tied}").mkdir()
        (folder / f"tied_{is_tied}" / "config.json").write_text(json.dumps(small_model(is_tied)))

    def load(layout: Layout) -> Config:
        model = (
            f"policy.model_name={folder / f'tied_{layout.tied}'}",
            "policy.load_weights=false",
            "policy.max_total_sequence_length=128",
            f"policy.train_global_batch_size={len(pairs)}",
            "data.dataset_name=embedded",
        )
        keys = (*_OWN_LOSS, *overrides, *ON_CPU, *BASELINE, *(layout.overrides or ()), *model)
        return load_config(None, list(keys))

    shape = small_model(False)
    return Batch(
        pairs=pairs,
        shape=shape,
        layouts=(
            *layouts(shape["num_hidden_layers"], pairs.lengths()),
            *tied_layouts(shape["num_hidden_layers"]),
        ),
        load=load,
        may_refuse=False,
        note=f"{len(pairs)} made-up pairs through a random Llama of 8 layers (tied_: its head is "
        "its embedding); the policy is the reference with 5 % of noise on its weights",
    )


def of_configuration(path: str, overrides: Sequence[str], max_pairs: int) -> Batch:
    """The model of the user's configuration and at most `max_pairs` of its first global batch.

    Raises ConfigError or ValueError, as training would.
    """
    own = load_config(path, list(overrides))
    own.validate(own_layout(own).processes)
    from reinforcer_tp.batches import train_rows
    from reinforcer_tp.data.tokenized import TokenizedSet
    from reinforcer_tp.inputs import open_inputs

    alone = load_config(path, [*overrides, *ON_CPU, *BASELINE])
    inputs = open_inputs(alone, holds_run=False)
    shape, train = inputs.files.hf_config.to_dict(), inputs.data.train
    validate_model(own, shape)
    rows = train_rows(own, len(train), 1)
    count, free_bytes = min(max_pairs, len(rows)), free_memory()
    while count > 1 and bytes_needed(shape, train.lengths()[rows[:count]], 1, 1) > free_bytes:
        count -= 1
    forced = [
        f"policy.model_name={inputs.files.folder}",
        f"policy.train_global_batch_size={count}",
    ]
    if inputs.reference_files is not None:
        forced.append(f"reference.model_name={inputs.reference_files.folder}")

    def load(layout: Layout) -> Config:
        of_layout = () if layout.overrides is None else (*BASELINE, *layout.overrides)
        return load_config(path, [*overrides, *ON_CPU, *of_layout, *forced])

    pairs = TokenizedSet.from_pairs(train[i] for i in rows[:count])
    return Batch(
        pairs=pairs,
        shape=shape,
        layouts=(*layouts(shape["num_hidden_layers"], pairs.lengths()), own_layout(own)),
        load=load,
        may_refuse=True,
        note=f"{count} of the {len(rows)} pairs of the first global batch (as many as --pairs and "
        f"the memory allow) through {own.policy.model_name}; 5 % of noise on the policy's "
        "weights, so that it is not the reference",
    )


def fit(layout: Layout, batch: Batch, free_bytes: int) -> Case | Layout:
    """The case to run, or the layout with the reason why this model or machine cannot hold it."""
    try:
        if layout.processes > MAX_PROCESSES:
            raise ConfigError(f"{layout.processes} processes; at most {MAX_PROCESSES} are started")
        config = batch.load(layout)
        config.validate(layout.processes)
        validate_model(config, dict(batch.shape))
        if layout.name == "dp2_empty" and len(batch.pairs) % 2 == 0:
            raise ConfigError(
                f"{len(batch.pairs)} pairs leave no micro-batch empty, an odd number does"
            )
    except ConfigError as error:
        if not batch.may_refuse:
            raise
        return replace(layout, skip=str(error))
    megatron = config.policy.megatron_cfg
    stages = megatron.tensor_model_parallel_size * megatron.pipeline_model_parallel_size
    copies = layout.processes // stages
    needed = bytes_needed(batch.shape, batch.pairs.lengths(), layout.processes, copies)
    if needed > free_bytes:
        sizes = f"about {needed / 2**30:.1f} GiB, {free_bytes / 2**30:.1f} GiB are free"
        return replace(layout, skip=f"needs {sizes}")
    return Case(layout=layout, config=config)


def small_model(tied: bool) -> dict[str, Any]:
    """config.json of the self-test's own Llama; no parallel size divides its vocabulary."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 131,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.12,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }


def small_batch() -> TokenizedSet:
    """Seven pairs (odd: dp=2 with one pair a micro-batch leaves one empty) with every oddity."""
    from reinforcer_tp.data.tokenized import TokenizedPair, TokenizedSet

    source = random.Random(5)

    def ids(count: int) -> list[int]:
        return [source.randrange(3, 131) for _ in range(count)]

    # tokens of prompt, chosen, rejected, of these with which both responses begin; weight
    table = [
        (5, 9, 4, 0, 1.0),
        (40, 30, 38, 3, 1.0),
        (1, 1, 1, 0, 1.0),
        (7, 12, 12, 6, 0.5),
        (3, 8, 5, 0, 0.0),
        (20, 1, 6, 0, 2.0),
        (4, 11, 7, 7, 1.0),  # the rejected response is the beginning of the chosen one
    ]
    pairs = []
    for row, (num_prompt, num_chosen, num_rejected, common, weight) in enumerate(table):
        prompt, chosen = ids(num_prompt), ids(num_chosen)
        rejected = chosen[:common] + ids(num_rejected - common)
        pairs.append(
            TokenizedPair(prompt=prompt, chosen=chosen, rejected=rejected, weight=weight, row=row)
        )
    return TokenizedSet.from_pairs(pairs)
