"""The whole way from the `data` section to tokenized sets and the report on every row.

The first process of each node reads, checks and tokenizes; the others wait on a file (handover.py)
and map the same arrays.
"""

import contextlib
import difflib
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from reinforcer_tp.data import handover
from reinforcer_tp.data.chat import EncodeOptions
from reinforcer_tp.data.earlier import content_digests, find_start, remember_start, start_key
from reinforcer_tp.data.load import as_dict, load_preference_dataset, task_spec_of
from reinforcer_tp.data.surprises import TEXTS
from reinforcer_tp.data.tokenize_set import SetOptions, each_row, tokenize_set
from reinforcer_tp.data.tokenized import TokenizedPair, TokenizedSet

__all__ = ["PreparedData", "TokenizedPair", "TokenizedSet", "format_report", "prepare_data"]


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """What the loop reads, and what became of the rows."""

    train: TokenizedSet
    validation: TokenizedSet | None
    report: dict[str, Any]  # content of data_report.json
    fingerprint: str  # equal on every node that prepared the same sets


def prepare_data(
    config: Any,  # the `data` section: an object with its fields, or a mapping
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_total_sequence_length: int | None,
    chat_template_kwargs: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    is_local_leader: bool = True,
    timeout_s: float = 24 * 3600,
    run_token: str | None = None,
) -> PreparedData:
    """Both sets of `config`, prepared by the local leader, or waited for up to `timeout_s` seconds.

    `cache_dir` None is `data` in $REINFORCER_TP_CACHE, or in the user's cache; `run_token` None is
    what the ranks of this node share.
    Every rank of a node must call alike. ValueError for every mistake of configuration, file or
    row, in one line, the same on all ranks of the node.
    """
    section = as_dict(config)
    root = _cache_root(cache_dir)
    asked = [section, max_total_sequence_length, chat_template_kwargs]
    token = run_token or handover.run_token(os.environ)
    token += "\n" + json.dumps(asked, sort_keys=True, default=str)
    name = hashlib.sha256(token.encode()).hexdigest()[:32]
    if is_local_leader:

        def work() -> dict[str, Any]:
            encode = EncodeOptions(
                max_total_sequence_length=max_total_sequence_length,
                overlong=section.get("overlong", "drop"),
                on_boundary_mismatch=section.get("on_boundary_mismatch", "longest_common_prefix"),
                chat_template_kwargs=chat_template_kwargs,
            )
            contents = content_digests(section)
            key = None if contents is None else start_key(section, contents, tokenizer, encode)
            found = None if key is None else find_start(root / "starts", key, root / "sets")
            if found is not None:
                return found
            result = _prepare(section, tokenizer, encode, root / "sets")
            # Files that changed meanwhile are those of another start.
            if key is not None and contents == content_digests(section):
                with contextlib.suppress(OSError):  # a full disk: the next start reads again
                    remember_start(root / "starts", key, result)
            return result

        result = handover.lead(root / "handover", name, work)
    else:
        result = handover.wait(root / "handover", name, timeout_s)
    sets = {key: Path(folder) for key, folder in result["folders"].items()}
    return PreparedData(
        train=TokenizedSet.open(sets["train"]),
        validation=TokenizedSet.open(sets["validation"]) if "validation" in sets else None,
        report=result["report"],
        fingerprint=result["report"]["fingerprint"],
    )


def format_report(report: dict[str, Any]) -> str:
    """The report as a small table and what a user should know about the rows."""
    splits = {name: report[name] for name in ("train", "validation") if report[name]}
    table = Table("rows", *splits, title=f"data: {report['dataset']}", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for label, values in _lines(list(splits.values())):
        table.add_row(label, *(f"{value:,}" for value in values))
    text = io.StringIO()
    Console(file=text, width=100).print(table)
    notes = [note for name, split in splits.items() for note in _notes(name, split)]
    return text.getvalue() + "\n".join(notes)


def _lines(splits: list[dict[str, Any]]) -> Iterator[tuple[str, list[int]]]:
    yield "read", [split["rows_read"] for split in splits]
    for reason in sorted({reason for split in splits for reason in split["dropped"]}):
        yield f"dropped: {reason}", [split["dropped"].get(reason, 0) for split in splits]
    for key in ("used", "truncated", "boundary_mismatches", "ties_kept", "zero_weight"):
        values = [split[key] for split in splits]
        if key == "used" or any(values):
            yield key.replace("_", " "), values
    for part in ("prompt", "chosen", "rejected"):
        yield f"{part} tokens", [split["tokens"][part] for split in splits]
    yield "longest sequence, tokens", [split["longest"]["sequence"] for split in splits]


def _notes(name: str, split: dict[str, Any]) -> Iterator[str]:
    yield f"{name}: {split['source']}, rows recognised as {'; '.join(split['shapes'])}"
    margins = split["margins"]
    if margins:
        yield (
            f"{name}: {margins['rows']:,} rows have a margin, from {margins['min']:.4g} to "
            f"{margins['max']:.4g}, mean {margins['mean']:.4g}"
        )
    if split["has_reference"]:
        yield f"{name}: reference log-probs come with the rows"
    example = split["boundary_example"]
    if example:
        yield (
            f"{name}: in {split['boundary_mismatches']:,} rows the prompt is not tokenized alike "
            f"with a response behind it; the response starts where they part. In row "
            f"{example['row']} the prompt's end {example['prompt_end']!r} is not kept"
        )
    for kind, found in split["surprises"].items():
        yield (
            f"{name}: in {found['rows']:,} rows {TEXTS[kind]}: {found['example']!r} in row "
            f"{found['row']}"
        )
    savings = split.get("token_savings")
    if savings is not None:
        yield from _savings(name, savings)


def _savings(name: str, savings: dict[str, Any]) -> Iterator[str]:
    """Tokens of a mean step, and what they would be without packing and sharing."""
    rows = {
        "naive_padded": "both sides in full, padded to the longest of 8 pairs",
        "naive": "both sides in full",
        "packed": "both sides in full, packed into rows",
    }
    if savings["share"] == "nothing":
        del rows["packed"]  # it is this run
    fewer = f", {savings['ratio']:.2f}x fewer than in full"
    shared = {
        "nothing": "",
        "prompt": f", prompts shared{fewer}",
        "response": f", common starts shared{fewer}",
    }
    this_run = (
        f"this run: packed{shared[savings['share']]}, {savings['padding_fraction']:.1%} padding"
    )
    steps = savings["steps"]
    yield f"{name}: tokens a step, mean of the first {steps:,} steps"
    for key, text in (rows | {"shared": this_run}).items():
        yield f"{round(savings[key] / steps):>12,}  {text}"


def _cache_root(cache_dir: str | Path | None) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    package = os.environ.get("REINFORCER_TP_CACHE") or Path(base, "reinforcer_tp")
    root = Path(cache_dir or Path(package, "data")).expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot make the cache folder {root} ({error.strerror}); set REINFORCER_TP_CACHE to a "
            "writable folder"
        ) from error
    if not os.access(root, os.W_OK):
        raise ValueError(
            f"cannot write to the cache folder {root}; set REINFORCER_TP_CACHE to a writable folder"
        )
    return root


def _prepare(
    section: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    encode: EncodeOptions,
    cache_dir: Path,
) -> dict[str, Any]:
    """Folders of the sets and the report, as JSON: what the waiting ranks get."""
    dataset = load_preference_dataset(section)
    spec = task_spec_of(dataset, section)
    options = SetOptions(
        encode=encode,
        ties=section.get("ties", "drop"),
        on_bad_row=getattr(dataset, "on_bad_row", "error"),
        num_workers=section.get("num_workers", 1),
    )
    ignored, columns = section.get("ignore_columns") or [], set()
    folders, report = {}, {"dataset": spec.dataset_name, "train": None, "validation": None}
    for name, key in (("train", "train_data_path"), ("validation", "val_data_path")):
        rows = dataset.formatted_ds.get(name)
        if rows is None:
            continue
        path = section.get(key)
        folder, report[name] = tokenize_set(
            _without_columns(rows, ignored, columns) if ignored else rows,
            f"the {name} rows of {spec.dataset_name}" if path is None else f"data.{key}={path}",
            spec=spec,
            tokenizer=tokenizer,
            options=options,
            cache_dir=cache_dir,
        )
        folders[name] = str(folder)
    _check_ignored(ignored, columns)
    keys = [Path(folder).name for folder in folders.values()]
    report["fingerprint"] = hashlib.sha256("\n".join(keys).encode()).hexdigest()
    return {"folders": folders, "report": report}


def _without_columns(
    rows: Iterable[Mapping[str, Any]], ignored: Sequence[str], columns: set[str]
) -> Iterator[Mapping[str, Any]]:
    """`rows` without the columns of those names; `columns` learns which there are."""
    for row in each_row(rows):
        if isinstance(row, Mapping):
            columns.update(row)
            row = {name: value for name, value in row.items() if name not in ignored}
        yield row


def _check_ignored(ignored: Sequence[str], columns: set[str]) -> None:
    unknown = [name for name in ignored if name not in columns]
    if unknown:
        near = difflib.get_close_matches(unknown[0], map(str, columns), n=1)
        fix = f"did you mean {near[0]}?" if near else "take it out of the list"
        raise ValueError(
            f"data.ignore_columns has {unknown[0]}, but no row has such a column; expected names "
            f"among {', '.join(sorted(map(str, columns)))}; {fix}"
        )
