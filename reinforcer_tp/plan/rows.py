"""The pairs that a plan counts on, and the rows that they are packed into.

From the user's own data where they can be read here, else from an assumption that is stated.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reinforcer_tp.batches import micro_batching, num_steps, train_rows
from reinforcer_tp.config import Config
from reinforcer_tp.data.micro_batches import MicroBatching, check_pairs_fit, plan_rows
from reinforcer_tp.data.packed_batch import PackedBatch, build_packed_batch, packed_lengths
from reinforcer_tp.data.packing import pair_costs
from reinforcer_tp.data.tokenized import TokenizedSet
from reinforcer_tp.embedded import ensure_embedded
from reinforcer_tp.flops import pair_cost
from reinforcer_tp.inputs import with_embedded_paths
from reinforcer_tp.mcore.shape import ModelShape
from reinforcer_tp.plan.layout import Layout
from reinforcer_tp.reference.sweep import sweep_batching

STEPS = 50  # of a run are packed; more say the same
_SPREAD = 0.6  # sigma of the log-normal lengths that are assumed; about hh-rlhf's


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """Lengths where there are no data to read: log-normal, with these means."""

    prompt_tokens: int = 400
    response_tokens: int = 300
    num_pairs: int = 40_000


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What a step packs, over the steps looked at."""

    total_steps: int
    micro_batches: float  # of each data-parallel rank in a step, mean
    most_micro_batches: int
    row_tokens: float  # with padding, mean: times micro_batches, a rank's tokens of a step
    step_tokens: float  # real tokens of a global batch, mean
    step_flops: float  # of a global batch, forward and backward, mean
    attention_share: float  # of step_flops
    head_share: float  # of step_flops
    longest: PackedBatch  # the row that takes the most memory
    sweep: PackedBatch | None  # likewise of the reference's sweep; None = nothing is swept
    sweep_tokens: int  # that the whole sweep computes


def read_pairs(config: Config, assumed: Assumed) -> tuple[TokenizedSet, str]:
    """(training pairs, where they come from)."""
    problem = _why_unreadable(config)
    if problem is None:
        from reinforcer_tp.data.prepare import prepare_data
        from reinforcer_tp.data.tokenizer import load_tokenizer

        data, name = config.data, config.policy.tokenizer.name or config.policy.model_name
        if data.dataset_name == "embedded":
            data = with_embedded_paths(data, ensure_embedded())
        if name == "embedded":
            name = ensure_embedded().model
        tokenizer = load_tokenizer(name, config.policy.tokenizer.chat_template)
        prepared = prepare_data(
            dataclasses.replace(data, val_data_path=None, val_split=None),
            tokenizer=tokenizer,
            max_total_sequence_length=config.policy.max_total_sequence_length,
            chat_template_kwargs=config.policy.tokenizer.chat_template_kwargs,
        )
        return prepared.train, f"the {len(prepared.train):,} pairs of {data.train_data_path}"
    pairs = assumed_pairs(assumed, config.policy.max_total_sequence_length)
    return pairs, (
        f"assumed, since {problem}: {assumed.num_pairs:,} pairs, log-normal lengths with means of "
        f"{assumed.prompt_tokens} prompt and {assumed.response_tokens} response tokens, at most "
        f"{config.policy.max_total_sequence_length} together (--prompt-tokens, --response-tokens, "
        "--pairs)"
    )


def _why_unreadable(config: Config) -> str | None:
    data, policy = config.data, config.policy
    path = data.train_data_path
    if data.dataset_name != "embedded" and (path is None or not Path(path).expanduser().exists()):
        return f"the data ({path or data.dataset_name}) are not on disk"
    tokenizer = policy.tokenizer.name or policy.model_name
    if tokenizer != "embedded" and not (Path(tokenizer).expanduser() / "tokenizer.json").is_file():
        return f"the tokenizer {tokenizer} is not on disk"
    return None


def assumed_pairs(assumed: Assumed, longest: int) -> TokenizedSet:
    """Pairs without content; each side at most `longest` tokens."""
    rng = np.random.default_rng(0)
    means = np.array([assumed.prompt_tokens, assumed.response_tokens, assumed.response_tokens])
    normal = rng.normal(size=(min(assumed.num_pairs, 20_000), 3))
    lengths = np.exp(np.log(means) - _SPREAD**2 / 2 + _SPREAD * normal).astype(np.int64) + 1
    over = lengths[:, 0] + lengths[:, 1:].max(axis=1) > longest
    lengths[over] = np.maximum(lengths[over] * longest // (lengths[over].sum(axis=1)[:, None]), 1)
    count = assumed.num_pairs
    lengths = np.resize(lengths, (count, 3)).astype(np.int32)
    ends = np.cumsum(lengths.sum(axis=1, dtype=np.int64))
    return TokenizedSet(
        tokens=_apart(lengths, ends),
        lengths=lengths,
        weights=np.ones(count, np.float32),
        rows=np.arange(count),
    )


def _apart(lengths: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Token ids of which only the first of the responses differ: they share no beginning."""
    tokens = np.zeros(int(ends[-1]), np.int8)
    tokens[ends - lengths[:, 2]] = 1  # the first of the rejected one
    return tokens


def rows_of(config: Config, shape: ModelShape, layout: Layout, pairs: TokenizedSet) -> Rows:
    """Packs the first steps as the trainer does. Raises ValueError where a pair does not fit."""
    check_pairs_fit(pairs, config.policy.micro_batch_tokens, config.data.share)
    cut: MicroBatching = micro_batching(config, shape, layout)  # type: ignore[arg-type]
    total_steps = num_steps(config, len(pairs))
    cost, lengths = pair_cost(shape), pairs.lengths()
    counts, slots, tokens, flops, attention, head = [], [], [], [], [], []
    longest: tuple[int, int, list[int]] = (0, 0, [])
    for step in range(1, min(total_steps, STEPS) + 1):
        rows = np.array(train_rows(config, len(pairs), step))
        shared = pairs.shared_lengths(rows, cut.share)
        plan, row_lengths = plan_rows(lengths[rows], shared, cut)
        counts.append(len(plan[0]))
        slots.append(sum(map(sum, row_lengths)) / cut.dp_size)
        tokens.append(packed_lengths(lengths[rows], shared).sum())
        flops.append(sum(pair_costs(lengths[rows], shared, cost)))
        head.append(cost.response_token * lengths[rows][:, 1:].sum())
        attention.append(flops[-1] - cost.token * tokens[-1] - head[-1])  # the rest of pair_costs
        for members, width in _all_rows(plan, row_lengths):
            responses = int(lengths[rows[members]][:, 1:].sum())
            longest = max(longest, (width, responses, rows[members].tolist()))
    sweep, sweep_tokens = _sweep_row(config, pairs, cut, total_steps)
    return Rows(
        total_steps=total_steps,
        micro_batches=float(np.mean(counts)),
        most_micro_batches=max(counts),
        row_tokens=float(np.sum(slots) / np.sum(counts)),
        step_tokens=float(np.mean(tokens)),
        step_flops=float(np.mean(flops)),
        attention_share=float(np.sum(attention) / np.sum(flops)),
        head_share=float(np.sum(head) / np.sum(flops)),
        longest=_row(
            pairs, longest[2], cut, longest[0], with_reference=config.reference_mode != "none"
        ),
        sweep=sweep,
        sweep_tokens=sweep_tokens,
    )


def _all_rows(plan: list, row_lengths: list) -> Any:
    for rank, widths in zip(plan, row_lengths, strict=True):
        yield from zip(rank, widths, strict=True)


def _row(
    pairs: TokenizedSet, members: list[int], cut: MicroBatching, width: int, *, with_reference: bool
) -> PackedBatch:
    chosen = [pairs[index] for index in members]
    references = [np.zeros(len(pair.chosen) + len(pair.rejected)) for pair in chosen]
    return build_packed_batch(
        chosen,
        shared=pairs.shared_lengths(members, cut.share).tolist(),
        reference_logps=references if with_reference else None,
        row_length=width,
        divisible_by=cut.divisible_by,
    )


def _sweep_row(
    config: Config, pairs: TokenizedSet, cut: MicroBatching, total_steps: int
) -> tuple[PackedBatch | None, int]:
    """The longest pairs that a row of the sweep holds (they go first), and what it computes."""
    if config.reference_mode == "none" or pairs.has_reference:
        return None, 0
    lengths = packed_lengths(pairs.lengths(), pairs.shared_lengths(range(len(pairs)), cut.share))
    total = 0  # of a resident one, which runs each step
    if config.reference_mode == "store":
        seen = min(total_steps * config.policy.train_global_batch_size, len(pairs))
        total = int(lengths.sum() * (seen / len(pairs)))
        cut = sweep_batching(cut, config.reference.micro_batch_tokens, int(lengths.max()))
    order = np.argsort(-lengths, kind="stable")
    room = cut.max_tokens or math.inf
    most = cut.max_pairs or config.policy.train_global_batch_size
    fitting = int(np.searchsorted(np.cumsum(lengths[order]), room, side="right"))
    members = order[: max(min(fitting, most), 1)].tolist()
    width = -(-int(lengths[members].sum()) // cut.divisible_by) * cut.divisible_by
    return _row(pairs, members, cut, width, with_reference=False), total
