"""Checked pairs in a file -> token ids of all of them -> the arrays of a set.

Arrow files hold what comes in between, memory-mapped: of a set of any size only a batch is in
memory.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reinforcer_tp.data.chat import PairEncoder
from reinforcer_tp.data.files import progress_bars
from reinforcer_tp.data.pairs import PreferencePair
from reinforcer_tp.data.set_counts import set_counts
from reinforcer_tp.data.templates import stop_rendering
from reinforcer_tp.data.tokenized import TokenizedSet, write_arrays

BATCH_SIZE = 256  # pairs that are tokenized together
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


@dataclass(kw_only=True)
class Mistakes:
    """Rows that are wrong: how many, and what is wrong with the first two."""

    count: int = 0
    first: list[tuple[int, str]] = field(default_factory=list)  # (row, what is wrong)

    def add(self, row: int, text: str) -> None:
        self.count += 1
        if len(self.first) < 2:
            self.first.append((row, text))


class PairWriter:
    """Writes pairs, as JSON, with their rows to an Arrow file."""

    def __init__(self, path: Path):
        self._writer = pa.ipc.new_stream(str(path), _PAIRS.arrow_schema)
        self._unwritten: tuple[list[str], list[int]] = ([], [])

    def write(self, pair: str, row: int) -> None:
        pairs, rows = self._unwritten
        pairs.append(pair)
        rows.append(row)
        if len(rows) == BATCH_SIZE:
            self._flush()

    def _flush(self) -> None:
        columns = dict(zip(_PAIRS, self._unwritten, strict=True))
        self._writer.write_table(pa.Table.from_pydict(columns, schema=_PAIRS.arrow_schema))
        self._unwritten = ([], [])

    def __enter__(self) -> "PairWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._flush()
        self._writer.close()


def encode_pairs(path: Path, encoder: PairEncoder, num_workers: int) -> pa.Table:
    """A row of _ENCODED for every pair in the file, memory-mapped."""
    pairs = datasets.Dataset.from_file(str(path))
    if len(pairs) == 0:
        return _ENCODED.arrow_schema.empty_table()
    num_proc = min(num_workers, len(pairs))
    with progress_bars(shown=len(pairs) >= MANY_ROWS):
        encoded = pairs.with_format("arrow").map(
            _encode_batch,
            batched=True,
            batch_size=BATCH_SIZE,
            fn_kwargs={"encoder": encoder},
            remove_columns=["pair"],
            features=_ENCODED,
            num_proc=num_proc if num_proc > 1 else None,
            load_from_cache_file=False,  # the set's own key decides
            new_fingerprint="encoded",
            desc="Tokenizing pairs",
        )
    stop_rendering()
    return encoded.with_format("arrow")[:]


def _encode_batch(batch: pa.Table, encoder: PairEncoder) -> pa.Table:
    pairs = [PreferencePair.from_json(text) for text in batch["pair"].to_pylist()]
    encoded = encoder.encode(pairs)
    columns = {
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
    return pa.Table.from_pydict(columns, schema=_ENCODED.arrow_schema)


def find_mistakes(encoded: pa.Table) -> Mistakes:
    mistakes = Mistakes()
    for batch in encoded.select(["row", "mistake"]).to_batches():
        wrong = batch.filter(pc.not_equal(batch["mistake"], ""))
        for row, text in zip(*(column.to_pylist() for column in wrong.columns), strict=True):
            mistakes.add(row, text)
    return mistakes


def save_set(encoded: pa.Table, folder: Path) -> None:
    """The TokenizedSet of the used rows, and counts.json, in a new folder."""
    used = [int(pc.sum(pc.equal(chunk, "")).as_py() or 0) for chunk in encoded["dropped"].chunks]
    num_tokens = [len(chunk.flatten()) for chunk in encoded["ids"].chunks]  # dropped ones have none
    folder.mkdir()
    write_arrays(folder, _used(encoded), num_pairs=sum(used), num_tokens=sum(num_tokens))
    counts = set_counts(encoded, TokenizedSet.open(folder))
    (folder / "counts.json").write_text(json.dumps(counts))


def _used(encoded: pa.Table) -> Iterator[dict[str, np.ndarray]]:
    for batch in encoded.to_batches():
        batch = batch.filter(pc.equal(batch["dropped"], ""))
        yield {
            "tokens": batch["ids"].flatten().to_numpy(),
            "lengths": batch["lengths"].flatten().to_numpy().reshape(-1, 3),
            "weights": batch["weight"].to_numpy(),
            "rows": batch["row"].to_numpy(),
            "margins": batch["margin"].to_numpy(),
            "reference_sums": batch["reference"].flatten().to_numpy().reshape(-1, 2),
        }
