"""What an earlier start found: the same files, settings and tokenizer need no second reading.

A record names the folders of the sets and holds the report. Its key is all that decides them: the
content of every file, the section, the tokenizer, and the code that reads and tokenizes, with the
versions of the libraries that it uses.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from reinforcer_tp.data.chat import EncodeOptions
from reinforcer_tp.data.files import file_format
from reinforcer_tp.data.sources import home_path
from reinforcer_tp.data.tokenizer import tokenizer_fingerprint
from reinforcer_tp.untrusted import INDEX_BYTES, read_json

FILE_DATASETS = (None, "auto", "DPODataset", "BinaryPreferenceDataset", "PreferenceDataset")
_READERS = ("strict_json.py", "untrusted.py")
_LIBRARIES = ("datasets", "jinja2", "tokenizers", "transformers")
_CONTENTS = ("train_data_path", "val_data_path", "prompt_file", "system_prompt_file")


def start_key(
    section: dict[str, Any],
    contents: dict[str, str],  # content_digests
    tokenizer: PreTrainedTokenizerBase,
    encode: EncodeOptions,
) -> str:
    """The key of a start with these."""
    settings = {name: value for name, value in section.items() if name != "num_workers"}
    folder = Path(__file__).parent
    ours = sorted(folder.glob("*.py")) + [folder.parent / name for name in _READERS]
    code = [_files_digest(ours), *map(version, _LIBRARIES)]
    parts = [code, settings, contents, tokenizer_fingerprint(tokenizer), asdict(encode)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()[:32]


def content_digests(section: dict[str, Any]) -> dict[str, str] | None:
    """Of every file that the section names; None where rows come from elsewhere than from files."""
    if section.get("dataset_name") not in FILE_DATASETS:
        return None
    named = {name: section[name] for name in _CONTENTS if section.get(name) is not None}
    found = {name: _content_digest(home_path(str(path))) for name, path in named.items()}
    return None if None in found.values() else found


def find_start(folder: Path, key: str, sets: Path) -> dict[str, Any] | None:
    """What `remember_start` was given under `key`, if the sets are still there."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        record = read_json(folder / f"{key}.json", INDEX_BYTES)
        names = record["folders"].items()
        folders = {split: str(sets / Path(name).name) for split, name in names}
        if all(map(os.path.isdir, folders.values())):
            return {"folders": folders, "report": record["report"]}
    return None


def remember_start(folder: Path, key: str, result: dict[str, Any]) -> None:
    """Writes the record, whole or not at all. OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {split: Path(path).name for split, path in result["folders"].items()}
    descriptor, name = tempfile.mkstemp(dir=folder, prefix=".", suffix=".tmp")
    try:
        with open(descriptor, "w", encoding="utf-8") as stream:
            json.dump({"folders": names, "report": result["report"]}, stream)
        os.replace(name, folder / f"{key}.json")
    finally:
        with contextlib.suppress(OSError):  # gone when all went well
            os.unlink(name)


def _content_digest(path: Path) -> str | None:
    """Of a file, or of every data file in a folder and their names; None for anything else."""
    try:
        if path.is_file():
            return _files_digest([path])
        if path.is_dir():
            files = sorted(found for found in path.rglob("*") if _is_data(found))
            return _files_digest(files, within=path)
    except OSError:  # said where the rows are read
        pass
    return None


def _is_data(path: Path) -> bool:
    is_data = file_format(path) is not None or path.suffix == ".arrow"
    return is_data and path.is_file()


def _files_digest(files: list[Path], within: Path | None = None) -> str:
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        name = path.name if within is None else path.relative_to(within)
        digest.update(f"{len(str(name))} {name} {content}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
