"""Which pairs both trainers get, and proof that they got them: for benchmarks.vs_trl.

The ids that are expected of both come from transformers' apply_chat_template here, by the rule that
both trainers state: the prompt is what its ids share with both whole sequences.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from reinforcer_tp.batches import train_rows
from reinforcer_tp.config import load_config
from reinforcer_tp.data.prepare import prepare_data
from reinforcer_tp.data.tokenizer import load_tokenizer

SIDES = ("chosen", "rejected")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A row, and each side as (ids of prompt and response, number of those that are prompt)."""

    row: dict
    chosen: tuple[list[int], int]
    rejected: tuple[list[int], int]


def select_pairs(
    path: Path, tokenizer: PreTrainedTokenizerBase, count: int, max_length: int
) -> tuple[list[Pair], int]:
    """The file's first `count` pairs whose sides both have at most `max_length` tokens and differ,
    and how many were passed over. ValueError where there are not as many."""
    pairs, passed_over = [], 0
    for row in read_rows(path):
        pair = tokenize(row, tokenizer)
        lengths = [len(getattr(pair, side)[0]) for side in SIDES]
        if max(lengths) > max_length or pair.chosen == pair.rejected:
            passed_over += 1
            continue
        pairs.append(pair)
        if len(pairs) == count:
            return pairs, passed_over
    raise ValueError(
        f"{path} has {len(pairs)} pairs of at most {max_length} tokens, expected {count}; "
        "take fewer steps or another file"
    )


def read_rows(path: Path) -> Iterator[dict]:
    """prompt, chosen and rejected, each a list of messages. ValueError for another row."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            row = json.loads(line)
            if not all(isinstance(row.get(key), list) for key in ("prompt", *SIDES)):
                raise ValueError(
                    f"{path} line {number}: expected lists of messages under prompt, chosen and "
                    f"rejected, got the keys {sorted(row)}"
                )
            yield {key: row[key] for key in ("prompt", *SIDES)}


def tokenize(row: dict, tokenizer: PreTrainedTokenizerBase) -> Pair:
    def ids(messages: list[dict], **kwargs) -> list[int]:
        return list(tokenizer.apply_chat_template(messages, return_dict=False, **kwargs))

    prompt = ids(row["prompt"], add_generation_prompt=True)
    whole = {side: ids(row["prompt"] + row[side]) for side in SIDES}
    shared = min(_common(prompt, side) for side in whole.values())
    return Pair(row=row, **{side: (whole[side], shared) for side in SIDES})


def shared_tokens(pair: Pair) -> int:
    """Of a pair whose prompt is computed once."""
    return len(pair.chosen[0]) + len(pair.rejected[0]) - pair.chosen[1]


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    both = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in both if a != b), min(len(first), len(second)))


def steps_of_ours(overrides: list[str], config: Path, num_steps: int) -> list[list[Pair]]:
    """The pairs of each step by our own reader, tokenizer and order under these overrides."""
    loaded = load_config(str(config), overrides)
    prepared = prepare_data(
        loaded.data,
        tokenizer=load_tokenizer(loaded.policy.model_name, None),
        max_total_sequence_length=loaded.policy.max_total_sequence_length,
    ).train
    steps = []
    for step in range(1, num_steps + 1):
        pairs = [prepared[row] for row in train_rows(loaded, len(prepared), step)]
        steps.append(
            [
                Pair(
                    row={},
                    chosen=(p.prompt + p.chosen, len(p.prompt)),
                    rejected=(p.prompt + p.rejected, len(p.prompt)),
                )
                for p in pairs
            ]
        )
    return steps


def steps_of_trl(steps: Sequence[dict]) -> list[list[Pair]]:
    """What its model was given, from a run's steps.jsonl."""
    return [
        [Pair(row={}, **{side: tuple(pair[side]) for side in SIDES}) for pair in step["pairs"]]
        for step in steps
    ]


def first_wrong_pair(
    found: Sequence[Sequence[Pair]], expected: Sequence[Pair], pairs_a_step: int
) -> str | None:
    """Where a trainer got other ids than `expected`, in order; None = nowhere."""
    for step, pairs in enumerate(found, start=1):
        wanted = expected[(step - 1) * pairs_a_step : step * pairs_a_step]
        if len(pairs) != len(wanted):
            return f"step {step} has {len(pairs)} pairs, expected {len(wanted)}"
        for index, (got, want) in enumerate(zip(pairs, wanted, strict=True)):
            for side in SIDES:
                if getattr(got, side) != getattr(want, side):
                    return (
                        f"step {step}, pair {index}, {side}: {_first_difference(got, want, side)}"
                    )
    return None


def _first_difference(got: Pair, want: Pair, side: str) -> str:
    (ids, prompt), (wanted, wanted_prompt) = getattr(got, side), getattr(want, side)
    if ids == wanted:
        return f"{prompt} tokens are prompt, expected {wanted_prompt}"
    at = _common(ids, wanted)
    return (
        f"token {at} of {len(ids)} is {ids[at : at + 1]}, expected {wanted[at : at + 1]} of "
        f"{len(wanted)}"
    )
