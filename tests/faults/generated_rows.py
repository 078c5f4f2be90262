"""G4, part one: generated rows through the real preparation, against an oracle of their ids."""

import random
from collections import Counter
from pathlib import Path

from reinforcer_tp.data import prepare_data
from tests.faults.bad_rows import BROKEN, LIMIT, Case, make_cases
from tests.faults.row_oracle import TEMPLATE, wrong_with
from tests.unit.toy_tokenizer import toy_tokenizer

BATCH = 250  # rows of a preparation
MERGES = [("a", "b"), ("b", "c"), ("ab", "c"), ("e", "s"), ("\u0120", "6"), ("s", "\u0120")]


def check_rows(count: int, seed: int, folder: Path) -> tuple[Counter, list[str]]:
    """Counts and failures of `count` rows, in batches that drop what is wrong."""
    counts, failures = Counter(), []
    for start in range(0, count, BATCH):
        number = min(BATCH, count - start)
        name = f"{seed + start}:{number}"
        try:
            found, wrong = _check_batch(name, make_cases(seed + start, number), start, folder)
        except Exception as error:
            wrong, found = [f"{type(error).__name__}: {str(error)[:300]!r}"], {}
        counts.update(found)
        failures += [f"rows {name}: {text}" for text in wrong]
    return counts, failures


def prepare_rows(class_name: str, path: str, tokenizer, folder: Path, **section):
    return prepare_data(
        {"dataset_name": f"tests.faults.bad_rows.{class_name}", "train_data_path": path} | section,
        tokenizer=tokenizer,
        max_total_sequence_length=LIMIT,
        cache_dir=folder / "rows",
    )


def _check_batch(name: str, cases: list[Case], start: int, folder: Path):
    adds_bos = (start // BATCH) % 2 == 0
    tokenizer = toy_tokenizer(
        merges=MERGES, adds_bos=adds_bos, adds_eos=adds_bos, chat_template=TEMPLATE
    )
    bos = [tokenizer.bos_token_id] if adds_bos else []
    data = prepare_rows("GeneratedRows", name, tokenizer, folder)
    report, used = data.report["train"], {pair.row: pair for pair in data.train}
    failures = _wrong_counts(report, cases, data.train.rows.tolist())
    for row, case in enumerate(cases):
        if row in used and "" in case.fates:
            wrong = wrong_with(tokenizer, bos, case, used[row])
        elif (row in used) == (case.fates == {""}):
            continue
        else:
            wrong = "is used" if row in used else "is dropped"
        if wrong:
            failures.append(f"row {row} {wrong}: {case.fates or ''} {_shown(case)}")
    counts = {"rows": len(cases), "rows_used": len(used), "rows_dropped": len(cases) - len(used)}
    return counts, failures


def _wrong_counts(report: dict, cases: list[Case], rows: list[int]) -> list[str]:
    """Each row once, and as often for each reason as rows were made for it."""
    failures, dropped = [], report["dropped"]
    if report["rows_read"] != len(cases) or report["used"] != len(rows):
        failures.append(f"{report['rows_read']} read, {report['used']} used of {len(cases)}")
    if report["used"] + sum(dropped.values()) != len(cases) or sorted(set(rows)) != rows:
        failures.append(f"the rows do not add up: {report['used']} used, {dropped}")
    for reason in {*dropped, *(fate for case in cases for fate in case.fates)} - {""}:
        least = sum(case.fates == {reason} for case in cases)
        most = sum(reason in case.fates for case in cases)
        if not least <= dropped.get(reason, 0) <= most:
            failures.append(f"{dropped.get(reason, 0)} {reason}, expected {least} to {most}")
    return failures


def check_mistakes(each: int, seed: int, folder: Path) -> tuple[Counter, list[str]]:
    """Every kind of broken row `each` times beside a sound one: one line names it, or it is
    dropped and counted."""
    tokenizer = toy_tokenizer(merges=MERGES, adds_bos=True, chat_template=TEMPLATE)
    counts, failures = Counter(), []
    for number in range(len(BROKEN)):
        for attempt in range(each):
            path = f"{number}:{random.Random(f'{seed}{number}{attempt}').randrange(2**32)}"
            try:
                report = prepare_rows("StrictRows", path, tokenizer, folder).report["train"]
                wrong = "" if (report["used"], report["rows_read"]) == (1, 2) else str(report)
                counts["mistakes_dropped"] += 1
            except Exception as error:
                wrong = unclear(error, "row 1 (counted from 0)")
                counts["mistakes_refused"] += 1
            if wrong:
                failures.append(f"broken row {path} {BROKEN[number][1]}: {wrong}")
    return counts, failures


def unclear(error: Exception, *parts: str) -> str:
    """Why an error is no clear message to a user; "" where it is one line with all `parts`."""
    text = str(error)
    if not isinstance(error, ValueError):
        return f"{type(error).__name__}: {text[:200]!r}"
    missing = [part for part in parts if part not in text]
    if missing:
        return f"{missing[0]!r} is not in {text[:300]!r}"
    if not text.isprintable() or not 20 < len(text) < 1500:
        return f"no clear line ({len(text)} characters): {text[:300]!r}"
    return ""


def _shown(case: Case) -> str:
    try:
        return ascii(case.row)[:200]
    except (RecursionError, RuntimeError, ValueError) as error:
        return type(error).__name__
