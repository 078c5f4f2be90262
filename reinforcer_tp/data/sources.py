"""Data files, folders and hub datasets -> datasets.Dataset.

Files are read here, not by `load_dataset`: a mistake is named with its file and line, text that
looks like a date stays text, and messages keep exactly the keys they have. Nothing is unpickled.
"""

import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from reinforcer_tp.data.hub import load_hub_dataset, looks_like_path

FORMATS = ("jsonl", "ndjson", "json", "parquet")
SPLITS = {  # words in a file's name or folder -> the split it belongs to
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where rows come from, as the user gave it."""

    path: str  # a file, a folder, or a hub id
    key: str  # the configuration key that holds it, for messages
    subset: str | None = None
    split: str | None = None  # may have a slice: train[:1000]
    default_splits: tuple[str, ...] = ("train",)  # where split is None: the first that there is

    def __str__(self) -> str:
        return f"{self.key}={self.path}"


def load_rows(source: Source) -> datasets.Dataset:
    """The rows of a jsonl, json or parquet file (or .gz), of a folder of them, or of a hub dataset.

    ValueError naming file (and line) where it is missing, broken, of an unknown format or empty.
    """
    path = Path(source.path).expanduser()
    if path.is_dir():
        rows = _load_folder(path, source)
    elif path.exists():
        if source.subset is not None or _split_name(source) not in (None, "train"):
            raise ValueError(
                f"{source} is a file, which has neither subset nor splits; got "
                f"subset={source.subset}, split={source.split}; set data.subset and data.split to null"
            )
        rows = _load_files([path])
    elif looks_like_path(source.path) or _format(path) is not None:
        raise ValueError(f"{source}: there is no such file or folder{_similar(path)}")
    else:
        rows = _load_hub(source)
    rows = _slice(rows, source)
    if not len(rows):
        raise ValueError(f"{source} has no rows; expected at least one")
    return rows


def _load_hub(source: Source) -> datasets.Dataset:
    found = load_hub_dataset(source.path, source.subset, _split_name(source))
    if isinstance(found, datasets.DatasetDict):
        return found[_choose_split(set(found), source)]
    return found


def _load_folder(folder: Path, source: Source) -> datasets.Dataset:
    if source.subset is not None:
        folder = folder / source.subset
        if not folder.is_dir():
            raise ValueError(f"{source} has no folder for data.subset={source.subset}")
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        found = datasets.load_from_disk(str(folder))
        if isinstance(found, datasets.DatasetDict):
            return found[_choose_split(set(found), source)]
        return found
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        is_hidden = any(part.startswith((".", "_")) for part in relative.parts)
        if not is_hidden and path.is_file() and _format(path) is not None:
            files.setdefault(_split_of(relative), []).append(path)
    if not files:
        raise ValueError(f"{source} holds no data file; expected {_expected_formats()}")
    return _load_files(files[_choose_split(set(files), source)])


def _split_of(relative: Path) -> str:
    words = set(re.split(r"[^a-z0-9]+", str(relative).lower()))
    return next((split for split, names in SPLITS.items() if words & set(names)), "train")


def _split_name(source: Source) -> str | None:
    return None if source.split is None else source.split.partition("[")[0].strip()


def _choose_split(available: set[str], source: Source) -> str:
    wanted = _split_name(source)
    for name in source.default_splits if wanted is None else (wanted,):
        if name in available:
            return name
    if wanted is None and len(available) == 1:
        return available.pop()
    raise ValueError(
        f"{source} has the splits {', '.join(sorted(available))}; expected "
        f"{wanted or ' or '.join(source.default_splits)}; set data.split"
    )


def _slice(rows: datasets.Dataset, source: Source) -> datasets.Dataset:
    if source.split is None or "[" not in source.split:
        return rows
    name = _split_name(source)
    try:
        part = datasets.ReadInstruction.from_spec(source.split).to_absolute({name: len(rows)})[0]
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"data.split={source.split} is no slice ({error}); expected train[:1000] or train[:10%]"
        ) from error
    return rows.select(range(part.from_ or 0, len(rows) if part.to is None else part.to))


def _load_files(paths: list[Path]) -> datasets.Dataset:
    formats = {_format(path) for path in paths}
    if None in formats or len({name == "parquet" for name in formats}) != 1:
        names = ", ".join(path.name for path in paths[:3])
        raise ValueError(f"cannot read {names} as one set; expected {_expected_formats()}, not mixed")
    features = _parquet_features(paths) if formats == {"parquet"} else _json_features(paths)
    hidden = not len(features) or sum(path.stat().st_size for path in paths) < 10 << 20
    with _progress_bars(hidden):
        return datasets.Dataset.from_generator(
            _iterate,
            features=features,
            gen_kwargs={"paths": tuple(map(str, paths)), "digest": _digest(paths)},
        )


def _iterate(paths: tuple[str, ...], digest: str) -> Iterator[dict]:
    """Rows of all files; `digest` is there for the cache of `from_generator`."""
    for path in map(Path, paths):
        if _format(path) == "parquet":
            for batch in pq.ParquetFile(_seekable(path)).iter_batches():
                yield from batch.to_pylist()
        else:
            for _, row in _json_rows(path):
                yield row
