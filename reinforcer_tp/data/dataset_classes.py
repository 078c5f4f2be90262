"""The dataset classes.

A dataset class has `formatted_ds`, a mapping with "train" and maybe "validation" whose values are
rows of one of the shapes of shapes.py, and `task_spec`, a TaskDataSpec. It may have `on_bad_row`:
"error" (the default) or "drop" for published sets, whose rows a user cannot mend.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets

from reinforcer_tp.data.hub import load_hub_dataset
from reinforcer_tp.data.pairs import TaskDataSpec
from reinforcer_tp.data.shapes import format_helpsteer3
from reinforcer_tp.data.sources import Source, home_path, load_rows, row_range


class FileDataset:
    """Rows of files, folders or hub datasets, with the keys of any shape that is recognised.

    `prompt_key`, `chosen_key` and `rejected_key` name columns that stand for prompt, chosen and
    rejected (or chosen_response and rejected_response, where one of them is called so); null keeps
    the file's own names. ValueError naming the columns there are.
    """

    def __init__(
        self,
        train_data_path: str,
        val_data_path: str | None = None,
        prompt_key: str | None = None,
        chosen_key: str | None = None,
        rejected_key: str | None = None,
        subset: str | None = None,
        split: str | None = None,
        val_split: str | None = None,
    ):
        is_chat = chosen_key == "chosen_response" or rejected_key == "rejected_response"
        suffix = "_response" if is_chat else ""
        names = {
            "prompt": prompt_key,
            f"chosen{suffix}": chosen_key,
            f"rejected{suffix}": rejected_key,
        }
        self.formatted_ds = _load_splits(
            train_data_path, val_data_path, names, subset, split, val_split
        )
        self.task_spec = TaskDataSpec(dataset_name=Path(train_data_path).name)


class DPODataset:
    """Rows with prompt, chosen_response and rejected_response, through the chat template."""

    def __init__(self, train_data_path: str, val_data_path: str | None = None):
        self.formatted_ds = _load_splits(train_data_path, val_data_path, {})
        _require_columns(self.formatted_ds, "prompt", "chosen_response", "rejected_response")
        self.task_spec = TaskDataSpec(dataset_name="DPO")


class BinaryPreferenceDataset:
    """Rows of a prompt (text or messages) and two texts, through the chat template."""

    def __init__(
        self,
        train_data_path: str,
        val_data_path: str | None = None,
        prompt_key: str = "prompt",
        chosen_key: str = "chosen",
        rejected_key: str = "rejected",
    ):
        names = {
            "prompt": prompt_key,
            "chosen_response": chosen_key,
            "rejected_response": rejected_key,
        }
        self.formatted_ds = _load_splits(train_data_path, val_data_path, names)
        self.task_spec = TaskDataSpec(dataset_name="BinaryPreferenceDataset")


class PreferenceDataset:
    """Rows of a context and two ranked completions; the lower rank is chosen, equal ones tie."""

    def __init__(self, train_data_path: str, val_data_path: str | None = None):
        self.formatted_ds = _load_splits(train_data_path, val_data_path, {})
        _require_columns(self.formatted_ds, "context", "completions")
        self.task_spec = TaskDataSpec(dataset_name="PreferenceDataset")


class HelpSteer3Dataset:
    """nvidia/HelpSteer3, preference subset; rows of preference 0 carry tie = true."""

    on_bad_row = "drop"

    def __init__(self) -> None:
        found = load_hub_dataset("nvidia/HelpSteer3", "preference")
        self.formatted_ds = {
            name: rows.map(_format_helpsteer3_row, desc=f"Formatting {name}")
            for name, rows in found.items()
        }
        self.task_spec = TaskDataSpec(dataset_name="HelpSteer3")


class Tulu3PreferenceDataset:
    """allenai/llama-3.1-tulu-3-8b-preference-mixture: whole conversations that share the prompt."""

    on_bad_row = "drop"

    def __init__(self) -> None:
        found = load_hub_dataset("allenai/llama-3.1-tulu-3-8b-preference-mixture")
        self.formatted_ds = {"train": found["train"].select_columns(["chosen", "rejected"])}
        self.task_spec = TaskDataSpec(dataset_name="Tulu3Preference")


def _load_splits(
    train_data_path: str | None,
    val_data_path: str | None,
    names: dict[str, str | None],
    subset: str | None = None,
    split: str | None = None,
    val_split: str | None = None,
) -> dict[str, datasets.Dataset | None]:
    """Both splits, with the columns of `names` (new -> old; None leaves it) renamed."""
    if train_data_path is None:
        raise ValueError("data.train_data_path=null; expected a file, a folder or a hub id")
    train = Source(path=train_data_path, key="data.train_data_path", subset=subset, split=split)
    splits: dict[str, datasets.Dataset | None] = {"train": _load_renamed(train, names)}
    splits["validation"] = None
    if val_data_path is None and val_split is not None:
        _check_held_out(train, val_split)
        val_data_path = train_data_path
    if val_data_path is not None:
        validation = Source(
            path=val_data_path,
            key="data.val_data_path",
            subset=None if home_path(val_data_path).is_file() else subset,
            split=val_split,
            split_key="data.val_split",
            default_splits=("validation", "test", "train"),
        )
        splits["validation"] = _load_renamed(validation, names)
    return splits


def _check_held_out(train: Source, val_split: str) -> None:
    """ValueError where both splits of the same source share a row."""
    trained = train.split or "train"
    names = {part.partition("[")[0].strip() for part in (trained, val_split)}
    if len(names) > 1:
        return
    is_sliced = "[" in trained and "[" in val_split
    if is_sliced:
        num_rows = len(load_rows(replace(train, split=names.pop())))
        validated = replace(train, split=val_split, split_key="data.val_split")
        a, b = row_range(train, num_rows), row_range(validated, num_rows)
    if not is_sliced or max(a.start, b.start) < min(a.stop, b.stop):
        raise ValueError(
            f"data.val_split={val_split} and data.split={trained} of {train.path} share rows, so "
            "that validation would see what was trained on; expected parts, as in "
            "data.split=train[:1000] data.val_split=train[1000:]"
        )


def _load_renamed(source: Source, names: dict[str, str | None]) -> datasets.Dataset:
    rows = load_rows(source)
    renamed = {old: new for new, old in names.items() if old is not None and old != new}
    for old in filter(None, names.values()):
        if old not in rows.column_names:
            raise ValueError(
                f"{source}: no column {old!r}; it has {', '.join(rows.column_names)}; set "
                "data.prompt_key, data.chosen_key and data.rejected_key"
            )
    clashing = [new for new in renamed.values() if new in rows.column_names and new not in renamed]
    return rows.remove_columns(clashing).rename_columns(renamed) if renamed else rows


def _require_columns(splits: dict[str, datasets.Dataset | None], *columns: str) -> None:
    for name, rows in splits.items():
        missing = [] if rows is None else [key for key in columns if key not in rows.column_names]
        if missing:
            raise ValueError(
                f"the {name} rows have the keys {', '.join(rows.column_names)}; expected "
                f"{' and '.join(missing)} too; data.dataset_name=auto recognises other shapes"
            )


def _format_helpsteer3_row(row: dict[str, Any]) -> dict[str, Any]:
    return format_helpsteer3(row) | {"tie": row["overall_preference"] == 0}
