"""What became of the rows of one tokenized set, as its counts.json keeps it beside the arrays."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reinforcer_tp.data.tokenized import TokenizedSet


def set_counts(encoded: pa.Table, pairs: TokenizedSet) -> dict[str, Any]:
    """Counts for the data report, as JSON: `encoded` has every row, `pairs` those that are used.

    tokens and longest count tokens by part; margins are those other than 0, None where all are 0.
    """
    lengths = pairs.lengths()
    mismatches = _with_text(encoded, "prompt_end", None)
    num_mismatches = len(encoded) - encoded["prompt_end"].null_count
    return {
        "used": len(pairs),
        "dropped": _dropped(encoded),
        "boundary_mismatches": num_mismatches,
        "boundary_example": _example(*next(mismatches)) if num_mismatches else None,
        "surprises": _surprises(encoded),
        "truncated": pc.sum(encoded["is_truncated"]).as_py() or 0,
        "zero_weight": int((pairs.weights == 0).sum()),
        "margins": _margin_counts(pairs.margins),
        "has_reference": pairs.has_reference,
        "tokens": _by_part(lengths.sum(axis=0, dtype=np.int64)),
        "longest": _by_part(lengths.max(axis=0, initial=0))
        | {"sequence": int((lengths[:, 0] + lengths[:, 1:].max(axis=1)).max(initial=0))},
    }


def _dropped(encoded: pa.Table) -> dict[str, int]:
    counts = pc.value_counts(encoded["dropped"]).to_pylist()  # in the order of their first rows
    return {found["values"]: found["counts"] for found in counts if found["values"]}


def _with_text(encoded: pa.Table, name: str, nothing: str | None) -> Iterator[tuple[int, str]]:
    """(row, text) where the column has another text than `nothing`."""
    for batch in encoded.select(["row", name]).to_batches():
        column = batch[name]
        is_there = column.is_valid() if nothing is None else pc.not_equal(column, nothing)
        found = batch.filter(is_there)
        yield from zip(*(column.to_pylist() for column in found.columns), strict=True)


def _example(row: int, prompt_end: str) -> dict[str, Any]:
    return {"row": row, "prompt_end": prompt_end[-200:]}


def _surprises(encoded: pa.Table) -> dict[str, dict[str, Any]]:
    """Kind -> number of rows, and the first of them with its example."""
    found: dict[str, dict[str, Any]] = {}
    for row, text in _with_text(encoded, "surprises", ""):
        for kind, example in json.loads(text).items():
            entry = found.setdefault(kind, {"rows": 0, "row": row, "example": example})
            entry["rows"] += 1
    return dict(sorted(found.items()))


def _margin_counts(margins: np.ndarray) -> dict[str, float] | None:
    found = margins[margins != 0].astype(np.float64)
    if len(found) == 0:
        return None
    values = {"min": found.min(), "mean": found.mean(), "max": found.max()}
    return {"rows": len(found)} | {name: float(value) for name, value in values.items()}


def _by_part(values: np.ndarray) -> dict[str, int]:
    return dict(zip(("prompt", "chosen", "rejected"), values.tolist(), strict=True))
