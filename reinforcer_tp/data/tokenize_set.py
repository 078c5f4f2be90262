"""One split: rows -> checked pairs -> token ids -> arrays on disk, every row accounted for.

Rows pass through by the batch, so that memory does not grow with their number.
"""

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from reinforcer_tp.data.chat import EncodeOptions, PairEncoder
from reinforcer_tp.data.encode_set import (
    Mistakes,
    PairWriter,
    encode_pairs,
    find_mistakes,
    save_set,
)
from reinforcer_tp.data.hub import one_line
from reinforcer_tp.data.pairs import (
    BadRow,
    PreferencePair,
    TaskDataSpec,
    UnusableRow,
    half_character,
)
from reinforcer_tp.data.shapes import pair_from_row
from reinforcer_tp.data.tokenizer import check_tokenizer, tokenizer_fingerprint
from reinforcer_tp.untrusted import INDEX_BYTES, read_json

VERSION = 3  # of the arrays and of how rows become them: part of every set's key
ROWS_AT_ONCE = 256  # read from a Dataset and written as pairs


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
    mistakes: Mistakes = field(default_factory=Mistakes)
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
            encoder = PairEncoder(tokenizer, options.encode)
            encoded = encode_pairs(building / "pairs.arrow", encoder, options.num_workers)
            if options.on_bad_row == "error":
                _raise_mistakes(find_mistakes(encoded), counts.rows_read, source)
            save_set(encoded, building / "set")
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


def each_row(rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """`rows`; those of a Dataset come by the batch, as its own iterator takes them one by one."""
    if not isinstance(rows, datasets.Dataset) or rows.format["type"] is not None:
        yield from rows
        return
    for batch in rows.iter(ROWS_AT_ONCE):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _write_pairs(
    rows: Iterable[Mapping[str, Any]], path: Path, spec: TaskDataSpec, options: SetOptions
) -> _RowCounts:
    counts = _RowCounts()
    with PairWriter(path) as writer:
        for index, row in enumerate(each_row(rows)):
            counts.rows_read += 1
            found = _read_pair(row, index, spec, options, counts)
            if found is None:
                continue
            pair, text = found
            counts.digest.update(f"{index}\n{text}\n".encode())
            counts.kinds.add(pair.is_chat)
            counts.with_reference += pair.reference is not None
            writer.write(text, index)
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
            counts.mistakes.add(index, str(mistake))
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


def _raise_mistakes(mistakes: Mistakes, rows_read: int, source: str) -> None:
    if not mistakes.first:
        return
    (row, text), *others = mistakes.first
    if others:
        text += (
            f"; {mistakes.count - 1} more of {rows_read} rows are wrong, the next is {others[0][0]}"
        )
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
