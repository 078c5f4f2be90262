"""One split: rows -> checked pairs -> `datasets.map` -> arrays on disk, every row accounted for."""

import hashlib
import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerBase

from reinforcer_tp.data.chat import EncodeOptions, PairEncoder
from reinforcer_tp.data.files import progress_bars
from reinforcer_tp.data.hub import one_line
from reinforcer_tp.data.pairs import (
    BadRow,
    PreferencePair,
    TaskDataSpec,
    UnusableRow,
    half_character,
)
from reinforcer_tp.data.set_counts import set_counts
from reinforcer_tp.data.shapes import pair_from_row
from reinforcer_tp.data.templates import stop_rendering
from reinforcer_tp.data.tokenized import TokenizedSet
from reinforcer_tp.data.tokenizer import check_tokenizer, tokenizer_fingerprint
from reinforcer_tp.untrusted import INDEX_BYTES, read_json

VERSION = 3  # of the arrays and of how rows become them: part of every set's key
BATCH_SIZE = 64  # pairs that are tokenized together
MANY_ROWS = 5_000  # that take long enough for a progress bar

_PAIRS = datasets.Features(
    {
        "pair": datasets.Value("large_string"),  # PreferencePair.to_json
        "row": datasets.Value("int64"),
    }
)
_ENCODED = datasets.Features(
    {
        "ids": datasets.List(datasets.Value("int32")),  # prompt, chosen, rejected; none if dropped
        "lengths": datasets.List(datasets.Value("int32")),  # 3
        "dropped": datasets.Value("string"),  # reason, "" = used
        "mistake": datasets.Value("string"),
        "prompt_end": datasets.Value("string"),  # of a boundary mismatch, else null
        "is_truncated": datasets.Value("bool"),
        "surprises": datasets.Value("string"),  # JSON, "" = none
        "weight": datasets.Value("float64"),
        "margin": datasets.Value("float64"),
        "reference": datasets.List(datasets.Value("float64")),  # 2, NaN where there are none
        "row": datasets.Value("int64"),
    }
)


@dataclass(frozen=True, kw_only=True)
class SetOptions:
    """What decides which rows are used and how they are tokenized."""

    encode: EncodeOptions
    ties: str = "drop"  # drop | keep
    on_bad_row: str = "error"  # error | drop
    num_workers: int = 1  # processes; the result is the same for any number


@dataclass(kw_only=True)
class _RowCounts:
    rows_read: int = 0
    dropped: Counter = field(default_factory=Counter)
    shapes: Counter = field(default_factory=Counter)
    ties_kept: int = 0
    zero_weight: int = 0
    with_reference: int = 0  # of the pairs that are tokenized
    kinds: set[bool] = field(default_factory=set)  # is_chat of the pairs
    mistakes: list[tuple[int, str]] = field(default_factory=list)  # (row, what is wrong)
    digest: Any = field(default_factory=hashlib.sha256)


def tokenize_set(
    rows: Iterable[Mapping[str, Any]],
    source: str,
    *,
    spec: TaskDataSpec,
    tokenizer: PreTrainedTokenizerBase,
    options: SetOptions,
    cache_dir: Path,
) -> tuple[Path, dict[str, Any]]:
    """The folder of the TokenizedSet of `rows`, and the report on every row.

    `source` names the rows in messages. ValueError for mistakes in rows, naming the first ones, for
    a tokenizer that lacks what they need, and where no row can be used.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=cache_dir, prefix=".building-", ignore_cleanup_errors=True
    ) as name:
        building = Path(name)
        counts = _write_pairs(rows, building / "pairs.arrow", spec, options)
        _raise_mistakes(counts.mistakes, counts.rows_read, source)
        _check_reference(counts, source)
        check_tokenizer(tokenizer, counts.kinds)
        folder = cache_dir / _key(counts, tokenizer, options)
        if not folder.exists():
            encoded = _encode(building / "pairs.arrow", tokenizer, options)
            if options.on_bad_row == "error":
                _raise_mistakes(_mistakes(encoded), counts.rows_read, source)
            _save(encoded, building / "set")
            _rename(building / "set", folder)
    report = _report(source, counts, read_json(folder / "counts.json", INDEX_BYTES))
    if report["used"] == 0:
        reasons = ", ".join(f"{name} {count}" for name, count in report["dropped"].items())
        raise ValueError(
            f"{source}: none of its {report['rows_read']} rows can be used: "
            f"{reasons or 'there are none'}; see data.ties, data.overlong, "
            "data.on_boundary_mismatch and policy.max_total_sequence_length"
        )
    return folder, report


def _write_pairs(
    rows: Iterable[Mapping[str, Any]], path: Path, spec: TaskDataSpec, options: SetOptions
) -> _RowCounts:
    counts = _RowCounts()
    with ArrowWriter(features=_PAIRS, path=str(path)) as writer:
        for index, row in enumerate(rows):
            counts.rows_read += 1
            found = _read_pair(row, index, spec, options, counts)
            if found is None:
                continue
            pair, text = found
            counts.digest.update(f"{index}\n{text}\n".encode())
            counts.kinds.add(pair.is_chat)
            counts.with_reference += pair.reference is not None
            writer.write({"pair": text, "row": index})
        writer.finalize()
    return counts


def _read_pair(
    row: Mapping[str, Any], index: int, spec: TaskDataSpec, options: SetOptions, counts: _RowCounts
) -> tuple[PreferencePair, str] | None:
    """The pair of a row, also as JSON; None where it is dropped or wrong, as `counts` learns."""
    try:
        if not isinstance(row, Mapping):
            raise BadRow("not_a_row", f"got {type(row).__name__}; expected named columns")
        pair, text = _pair_and_json(row, spec)
        counts.shapes[pair.shape] += 1
        if pair.tie and options.ties == "drop":
            raise UnusableRow("tie")
    except UnusableRow as reason:
        counts.dropped[reason.reason] += 1
        return None
    except BadRow as mistake:
        if options.on_bad_row == "error":
            counts.mistakes.append((index, str(mistake)))
        counts.dropped[mistake.reason] += 1
        return None
    counts.ties_kept += pair.tie
    return pair, text


def _pair_and_json(row: Mapping[str, Any], spec: TaskDataSpec) -> tuple[PreferencePair, str]:
    pair = pair_from_row(row, spec)
    try:
        text = pair.to_json()
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow("not_unicode", half_character(error)) from None
    except (TypeError, ValueError) as error:  # bytes, dates, numbers of 5,000 digits
        raise BadRow(
            "not_json",
            f"the row holds what is no JSON: {one_line(error)}; expected text, numbers, lists and "
            "mappings in messages and tools",
        ) from None
    return pair, text


def _check_reference(counts: _RowCounts, source: str) -> None:
    num_pairs = counts.rows_read - counts.dropped.total()
    if 0 < counts.with_reference < num_pairs:
        raise ValueError(
            f"{source}: {counts.with_reference} of {num_pairs} usable rows have ref_chosen_logps "
            "and ref_rejected_logps; expected all or none; fill in the others, or leave both "
            "columns out with data.ignore_columns=[ref_chosen_logps,ref_rejected_logps]"
        )


def _raise_mistakes(mistakes: list[tuple[int, str]], rows_read: int, source: str) -> None:
    if not mistakes:
        return
    (row, text), *others = mistakes
    if others:
        text += f"; {len(others)} more of {rows_read} rows are wrong, the next is {others[0][0]}"
    raise ValueError(f"{source}, row {row} (counted from 0): {text}")


def _key(counts: _RowCounts, tokenizer: PreTrainedTokenizerBase, options: SetOptions) -> str:
    """Everything that decides the arrays and their counts, but the number of workers."""
    parts = [
        VERSION,
        counts.digest.hexdigest(),
        tokenizer_fingerprint(tokenizer),
        asdict(options.encode),
        options.on_bad_row,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()[:32]


def _encode(path: Path, tokenizer: PreTrainedTokenizerBase, options: SetOptions) -> pa.Table:
    pairs = datasets.Dataset.from_file(str(path))
    if len(pairs) == 0:
        return _ENCODED.arrow_schema.empty_table()
    num_proc = min(options.num_workers, len(pairs))
    with progress_bars(shown=len(pairs) >= MANY_ROWS):
        encoded = pairs.map(
            _encode_batch,
            batched=True,
            batch_size=BATCH_SIZE,
            fn_kwargs={"tokenizer": tokenizer, "options": options.encode},
            remove_columns=["pair"],
            features=_ENCODED,
            num_proc=num_proc if num_proc > 1 else None,
            load_from_cache_file=False,  # the set's own key decides
            new_fingerprint="encoded",
            desc="Tokenizing pairs",
        )
    stop_rendering()
    return encoded.with_format("arrow")[:]


def _encode_batch(
    batch: dict[str, list], tokenizer: PreTrainedTokenizerBase, options: EncodeOptions
) -> dict[str, list]:
    pairs = [PreferencePair.from_json(text) for text in batch["pair"]]
    encoded = PairEncoder(tokenizer, options).encode(pairs)
    return {
        "ids": [[*pair.prompt, *pair.chosen, *pair.rejected] for pair in encoded],
        "lengths": [[len(pair.prompt), len(pair.chosen), len(pair.rejected)] for pair in encoded],
        "dropped": [pair.dropped for pair in encoded],
        "mistake": [pair.mistake for pair in encoded],
        "prompt_end": [pair.boundary_mismatch for pair in encoded],
        "is_truncated": [pair.is_truncated for pair in encoded],
        "surprises": [json.dumps(pair.surprises) if pair.surprises else "" for pair in encoded],
        "weight": [pair.weight for pair in pairs],
        "margin": [pair.margin for pair in pairs],
        "reference": [pair.reference or (math.nan, math.nan) for pair in pairs],
        "row": batch["row"],
    }


def _mistakes(encoded: pa.Table) -> list[tuple[int, str]]:
    rows, texts = encoded["row"].to_pylist(), encoded["mistake"].to_pylist()
    return [(row, text) for row, text in zip(rows, texts, strict=True) if text]


def _save(encoded: pa.Table, folder: Path) -> None:
    is_used = np.array([reason == "" for reason in encoded["dropped"].to_pylist()], dtype=bool)
    pairs = TokenizedSet(
        tokens=_numbers(encoded["ids"]),  # dropped rows have none
        lengths=_numbers(encoded["lengths"]).reshape(-1, 3)[is_used],
        weights=encoded["weight"].to_numpy()[is_used].astype(np.float32),
        rows=encoded["row"].to_numpy()[is_used],
        margins=encoded["margin"].to_numpy()[is_used].astype(np.float32),
        reference_sums=_numbers(encoded["reference"], np.float64).reshape(-1, 2)[is_used],
    )
    folder.mkdir()
    pairs.save(folder)
    (folder / "counts.json").write_text(json.dumps(set_counts(encoded, pairs)))


def _numbers(column: pa.ChunkedArray, dtype: type = np.int32) -> np.ndarray:
    chunks = [chunk.flatten().to_numpy() for chunk in column.chunks]
    return np.concatenate([np.empty(0, dtype), *chunks])


def _rename(building: Path, folder: Path) -> None:
    try:
        building.rename(folder)
    except OSError:
        if not folder.exists():  # else another node was first, with the same arrays
            raise


def _report(source: str, counts: _RowCounts, encoded: dict[str, Any]) -> dict[str, Any]:
    dropped = counts.dropped + Counter(encoded["dropped"])
    report = {
        "source": source,
        "shapes": dict(counts.shapes.most_common()),
        "rows_digest": counts.digest.hexdigest(),
        "rows_read": counts.rows_read,
        **encoded,
        "dropped": dict(sorted(dropped.items())),
        "ties_kept": counts.ties_kept,
    }
    assert report["rows_read"] == report["used"] + sum(report["dropped"].values())
    return report
