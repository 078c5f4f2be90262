"""G4: data files that change while they are read (scenario 32 of the reliability report)."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from reinforcer_tp.data import files, prepare_data
from tests.faults.bad_files import LINE, _table
from tests.faults.generated_rows import unclear
from tests.unit.toy_tokenizer import toy_tokenizer

ROWS = LINE * 20


def _replace(path: Path) -> None:
    other = path.with_suffix(".other")
    other.write_bytes(path.read_bytes().replace(b"yes", b"YES"))  # as many bytes
    os.replace(other, path)


CHANGES: dict[str, Callable[[Path], object]] = {
    "truncated at a line": lambda path: os.truncate(path, len(LINE) * 7),
    "truncated in a line": lambda path: os.truncate(path, len(LINE) * 7 + 9),
    "emptied": lambda path: os.truncate(path, 0),
    "replaced": _replace,
    "longer": lambda path: path.write_bytes(path.read_bytes() + LINE),
    "deleted": lambda path: path.unlink(),
    "a folder now": lambda path: (path.unlink(), path.mkdir()),
}


def check_changes(folder: Path) -> tuple[Counter, list[str]]:
    """Each change, when the columns are known and the rows are about to be read."""
    counts, failures = Counter(), []
    contents = {"jsonl": ("_json_features", ROWS), "parquet": ("_parquet_features", _table())}
    for suffix, (name, content) in contents.items():
        for change, make in CHANGES.items():
            path = folder / f"{change.replace(' ', '_')}.{suffix}"
            path.write_bytes(content)
            with patch.object(files, name, _then(getattr(files, name), make, path)):
                wrong = _wrong(path, folder)
            counts["changes"] += 1
            failures += [f"{suffix} {change}: {wrong}"] if wrong else []
    return counts, failures


def _then(read: Callable, change: Callable[[Path], object], path: Path) -> Callable:
    def both(paths: list[Path]) -> object:
        found = read(paths)
        change(path)
        return found

    return both


def _wrong(path: Path, folder: Path) -> str:
    try:
        prepare_data(
            {"dataset_name": "auto", "train_data_path": str(path)},
            tokenizer=toy_tokenizer(),
            max_total_sequence_length=None,
            cache_dir=folder / "changes",
        )
    except Exception as error:
        return unclear(error, path.name)
    return "is accepted"
