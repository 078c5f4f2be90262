"""Data files, folders and hub datasets, as the configuration names them -> datasets.Dataset."""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

import datasets

from reinforcer_tp.data.files import EXPECTED, file_format, load_files, readable
from reinforcer_tp.data.hub import load_hub_dataset, looks_like_path, one_line
from reinforcer_tp.untrusted import INDEX_BYTES, inside, read_json

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
    split_key: str = "data.split"  # the configuration key that holds it
    default_splits: tuple[str, ...] = ("train",)  # where split is None: the first that there is

    def __str__(self) -> str:
        return f"{self.key}={self.path}"


def load_rows(source: Source) -> datasets.Dataset:
    """The rows of a jsonl, json or parquet file (or .gz), of a folder of them, or of a hub dataset.

    ValueError naming file (and line) where it is missing, broken, of an unknown format or empty.
    """
    path = home_path(source.path)
    with readable(path):
        if path.is_dir():
            rows = _load_folder(path, source)
        elif path.exists():
            rows = _load_file(path, source)
        elif looks_like_path(source.path) or file_format(path) is not None:
            raise ValueError(f"{source}: there is no such file or folder{_similar(path)}")
        else:
            rows = _load_hub(source)
    rows = _slice(rows, source)
    if len(rows) == 0:
        raise ValueError(f"{source} has no rows; expected at least one")
    return rows


def home_path(name: str) -> Path:
    """`name` with its ~ resolved, or as it is where there is no such home."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def _load_file(path: Path, source: Source) -> datasets.Dataset:
    if source.subset is not None or _split_name(source) not in (None, "train"):
        raise ValueError(
            f"{source} is a file and has no subsets or splits; got subset={source.subset}, "
            f"split={source.split}; set data.subset and {source.split_key} to null, or to a slice "
            "of it: train[:1000]"
        )
    return load_files([path])


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
        found = _load_saved(folder, source)
        if isinstance(found, datasets.DatasetDict):
            return found[_choose_split(set(found), source)]
        return found
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        is_hidden = any(part.startswith((".", "_")) for part in relative.parts)
        if not is_hidden and path.is_file() and file_format(path) is not None:
            files.setdefault(_split_of(relative), []).append(path)
    if not files:
        raise ValueError(f"{source} holds no data file; expected {EXPECTED}")
    return load_files(files[_choose_split(set(files), source)])


def _load_saved(folder: Path, source: Source) -> datasets.Dataset | datasets.DatasetDict:
    """What `save_to_disk` wrote; its JSON names files, which must be in their folder."""
    parts = [folder]
    try:
        if (folder / "dataset_dict.json").exists():
            splits = read_json(inside(folder, "dataset_dict.json")).get("splits")
            parts = [inside(folder, name) for name in splits]
        for part in parts:
            read_json(inside(part, "dataset_info.json"), INDEX_BYTES)
            for file in read_json(inside(part, "state.json"), INDEX_BYTES)["_data_files"]:
                inside(part, file["filename"])
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # the edge to files that others wrote
        reason = f"{type(error).__name__}: " if isinstance(error, KeyError | TypeError) else ""
        raise ValueError(
            f"{source} cannot be loaded: {reason}{one_line(error)}; expected a folder that "
            "datasets.save_to_disk wrote"
        ) from error


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
        f"{wanted or ' or '.join(source.default_splits)}; set {source.split_key}"
    )


def _slice(rows: datasets.Dataset, source: Source) -> datasets.Dataset:
    if source.split is None or "[" not in source.split:
        return rows
    return rows.select(row_range(source, len(rows)))


def row_range(source: Source, num_rows: int) -> range:
    """The rows that `source.split` takes of the `num_rows` of its split. ValueError: no slice."""
    name = _split_name(source)
    if name is None or "[" not in source.split:
        return range(num_rows)
    try:
        parts = datasets.ReadInstruction.from_spec(source.split).to_absolute({name: num_rows})
        if len(parts) != 1:
            raise ValueError("several parts")
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"{source.split_key}={source.split} is no slice ({error}); expected train[:1000] "
            "or train[:10%]"
        ) from error
    return range(parts[0].from_ or 0, num_rows if parts[0].to is None else parts[0].to)


def _similar(path: Path) -> str:
    names = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""
