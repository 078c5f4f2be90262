"""What became of the rows of one tokenized set, as its counts.json keeps it beside the arrays."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa

from reinforcer_tp.data.tokenized import TokenizedSet


def set_counts(encoded: pa.Table, pairs: TokenizedSet) -> dict[str, Any]:
    """Counts for the data report, as JSON: `encoded` has every row, `pairs` those that are used.

    tokens and longest count tokens by part; margins are those other than 0, None where all are 0.
    """
    ends, rows = encoded["prompt_end"].to_pylist(), encoded["row"].to_pylist()
    mismatches = [(row, end) for row, end in zip(rows, ends, strict=True) if end is not None]
    lengths = pairs.lengths()
    longest = np.append(lengths, np.zeros((1, 3), np.int32), axis=0)
    return {
        "used": len(pairs),
        "dropped": dict(Counter(filter(None, encoded["dropped"].to_pylist()))),
        "boundary_mismatches": len(mismatches),
        "boundary_example": _example(*mismatches[0]) if mismatches else None,
        "surprises": _surprises(encoded),
        "truncated": sum(encoded["is_truncated"].to_pylist()),
        "zero_weight": int((pairs.weights == 0).sum()),
        "margins": _margin_counts(pairs.margins),
        "has_reference": pairs.has_reference,
        "tokens": _by_part(lengths.sum(axis=0, dtype=np.int64)),
        "longest": _by_part(longest.max(axis=0))
        | {"sequence": int((longest[:, 0] + longest[:, 1:].max(axis=1)).max())},
    }


def _example(row: int, prompt_end: str) -> dict[str, Any]:
    return {"row": row, "prompt_end": prompt_end[-200:]}


def _surprises(encoded: pa.Table) -> dict[str, dict[str, Any]]:
    """Kind -> number of rows, and the first of them with its example."""
    found: dict[str, dict[str, Any]] = {}
    texts, rows = encoded["surprises"].to_pylist(), encoded["row"].to_pylist()
    for row, text in zip(rows, texts, strict=True):
        for kind, example in (json.loads(text) if text else {}).items():
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
