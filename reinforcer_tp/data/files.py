"""Data files -> datasets.Dataset.

Read here, not by `load_dataset`: a mistake is named with its file and line, text that looks like a
date stays text, and messages keep exactly the keys they have. Nothing is unpickled.
"""

import codecs
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.builder import Key

from reinforcer_tp.data.hub import one_line
from reinforcer_tp.data.pairs import brief
from reinforcer_tp.strict_json import parse_json

FORMATS = ("jsonl", "ndjson", "json", "parquet")
EXPECTED = "files that end in .jsonl, .json or .parquet (or those with .gz)"
VERSION = 2  # of how files are read: part of the key of the cached rows
BIG = 10 << 20  # bytes of files that take seconds to read
ROWS_AT_ONCE = 1000
_TO_JSON = json.JSONEncoder().encode  # json.dumps


def load_files(paths: list[Path]) -> datasets.Dataset:
    """The rows of all `paths`, JSON or parquet. ValueError naming the broken file (and line)."""
    formats = {file_format(path) for path in paths}
    if None in formats or len({name == "parquet" for name in formats}) != 1:
        names = ", ".join(path.name for path in paths[:3])
        raise ValueError(f"cannot read {names} as one set; expected {EXPECTED}, not mixed")
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} is no regular file; expected {EXPECTED}")
    digest = _digest(paths)
    features = _parquet_features(paths) if formats == {"parquet"} else _json_features(paths)
    kwargs = {
        "paths": tuple(map(str, paths)),
        "json_columns": tuple(key for key, value in features.items() if value == datasets.Json()),
        "digest": f"{VERSION}-{digest}",
    }
    with progress_bars(shown=sum(path.stat().st_size for path in paths) > BIG):
        try:
            if formats == {"parquet"}:
                return datasets.Dataset.from_generator(
                    _iterate, features=features, gen_kwargs=kwargs
                )
            builder = _JsonFiles(column_features=features, **kwargs)
            builder.download_and_prepare()
            return builder.as_dataset(split="train")
        except datasets.exceptions.DatasetGenerationError as error:
            cause = one_line(error.__cause__ or error)
            raise ValueError(f"cannot read {', '.join(map(str, paths))}: {cause}") from error


@contextlib.contextmanager
def progress_bars(*, shown: bool) -> Iterator[None]:
    """Without the bars of `datasets`, but for work that takes a while."""
    silenced = not shown and datasets.are_progress_bars_disabled() is False
    if silenced:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if silenced:
            datasets.enable_progress_bars()


@dataclass
class _JsonConfig(datasets.BuilderConfig):
    """All of it is in the name under which `datasets` keeps the rows."""

    paths: tuple[str, ...] = ()
    json_columns: tuple[str, ...] = ()
    digest: str = ""
    column_features: datasets.Features | None = None


class _JsonFiles(datasets.ArrowBasedBuilder):
    """JSON files as `from_generator` would give them, but by the table."""

    BUILDER_CONFIG_CLASS = _JsonConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=self.config.column_features)

    def _split_generators(self, dl_manager: object) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(name="train")]

    def _generate_tables(self) -> Iterator[tuple[Any, pa.Table]]:
        config = self.config
        rows = (row for path in config.paths for _, row in _json_rows(Path(path)))
        for index, batch in enumerate(_batched(rows, ROWS_AT_ONCE)):
            columns = {
                name: _column(batch, name, feature, name in config.json_columns)
                for name, feature in config.column_features.items()
            }
            yield Key(0, index), pa.table(columns)
        _check_unchanged(config.paths, config.digest)


def _column(batch: list[dict], name: str, feature: Any, is_json: bool) -> pa.Array:
    if is_json:
        # As JSON text: left to itself, datasets.Json takes the text "4" for the number.
        texts = [_TO_JSON(row[name]) if name in row else None for row in batch]
        return pa.ExtensionArray.from_storage(feature.pa_type, pa.array(texts, pa.string()))
    values = [row.get(name) for row in batch]
    if feature.dtype == "float64":
        values = [None if value is None else float(value) for value in values]
    return pa.array(values, feature())


def _batched(rows: Iterator[dict], size: int) -> Iterator[list[dict]]:
    while batch := list(itertools.islice(rows, size)):
        yield batch


def _iterate(paths: tuple[str, ...], json_columns: tuple[str, ...], digest: str) -> Iterator[dict]:
    """Rows of parquet files; the cache of `from_generator` keeps them under `digest`."""
    for path in map(Path, paths):
        with readable(path):
            for batch in _parquet(path).iter_batches():
                yield from batch.to_pylist()
    _check_unchanged(paths, digest)


def _check_unchanged(paths: tuple[str, ...], digest: str) -> None:
    if digest != f"{VERSION}-{_digest(list(map(Path, paths)))}":
        raise ValueError("a file changed while it was read; start again once it is whole")


def _json_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number, object) of every line; a .json file may hold one list of objects instead."""
    with readable(path), _open(path) as stream:
        if file_format(path) == "json" and _first_character(stream) == b"[":
            rows = _parse(stream.read(), path, None)
            for index, row in enumerate(rows):
                yield index, _check_object(row, f"{path}, item {index} of the list")
            return
        for number, line in enumerate(stream, start=1):
            if line.strip():
                row = _parse(line, path, number)
                yield number, _check_object(row, f"{path}, line {number}")


def _parse(line: bytes, path: Path, number: int | None) -> Any:
    try:
        return parse_json(line.decode("utf-8-sig"))
    except ValueError as error:
        if number is None and isinstance(error, json.JSONDecodeError):
            number = error.lineno
        where = str(path) if number is None else f"{path}, line {number}"
        raise ValueError(
            f"{where}: not valid JSON ({error}); expected one JSON object a line"
            f"{', or one list of objects' if file_format(path) == 'json' else ''}; fix or remove it"
        ) from error


def _check_object(row: object, where: str) -> dict:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: got {type(row).__name__}; expected an object with named values")
    return row


def _json_features(paths: list[Path]) -> datasets.Features:
    """Columns of all rows: text, whole numbers and numbers as such, anything else as JSON."""
    kinds: dict[str, set[type]] = {}
    for path in paths:
        for _, row in _json_rows(path):
            for key, value in row.items():
                kinds.setdefault(key, set()).add(type(value))
    if not kinds:
        raise ValueError(f"{paths[0]} has no rows; expected at least one object with named values")
    nul = next((key for key in kinds if "\0" in key), None)
    if nul is not None:  # at which Arrow would cut the name
        raise ValueError(f"{paths[0]}: the key {brief(nul)} has a NUL character; rename the key")
    return datasets.Features({key: _feature(found) for key, found in kinds.items()})


def _feature(kinds: set[type]) -> Any:
    kinds = kinds - {type(None)}
    for allowed, name in (({str}, "string"), ({int}, "int64"), ({int, float}, "float64")):
        if kinds <= allowed:
            return datasets.Value(name)
    return datasets.Json()


def _parquet_features(paths: list[Path]) -> datasets.Features:
    schemas, num_rows = [], 0
    for path in paths:
        with readable(path), _parquet(path) as file:
            schemas.append(file.schema_arrow.remove_metadata())
            num_rows += file.metadata.num_rows
        twice = [name for name in schemas[-1].names if schemas[-1].names.count(name) > 1]
        if twice:
            raise ValueError(f"{path} has the column {brief(twice[0])} twice; remove one of them")
    if num_rows == 0:
        raise ValueError(f"{paths[0]} has no rows; expected at least one")
    try:
        return datasets.Features.from_arrow_schema(pa.unify_schemas(schemas))
    except pa.ArrowException as error:
        raise ValueError(
            f"{paths[0].parent}: the parquet files differ in columns ({one_line(error)})"
        ) from error
    except ValueError as error:  # a type that datasets does not know
        raise ValueError(f"{paths[0]} cannot be read: {one_line(error)}") from error


def _parquet(path: Path) -> pq.ParquetFile:
    return pq.ParquetFile(_seekable(path), page_checksum_verification=True)


def file_format(path: Path) -> str | None:
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    return suffix[1:] if suffix[1:] in FORMATS else None


def _open(path: Path) -> BinaryIO:
    return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")


def _seekable(path: Path) -> BinaryIO | str:
    if path.suffix != ".gz":
        return str(path)
    with gzip.open(path) as stream:
        return io.BytesIO(stream.read())


def _first_character(stream: BinaryIO) -> bytes:
    start = stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    stream.seek(0)
    return start


def _digest(paths: list[Path]) -> str:
    """Of the content of the files."""
    digest = hashlib.sha256()
    for path in paths:
        with readable(path), open(path, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Failures of the file system, of gzip and of parquet as one line that names the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from error
