"""Proves on the CPU that a layout does not change the numbers.

    python -m reinforcer_tp.selftest
    python -m reinforcer_tp.selftest --config configs/dpo.yaml key=value ...

Runs one global batch in every layout that this machine can hold and compares each with tp=1, one
process, one micro-batch, nothing shared, in float32: loss, gradient norm, the gradient of every
parameter, the log-prob of every response token. Exit status: 0 all agree, 1 some do not, 65 data
or model files, 78 configuration, 130 interrupted.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from reinforcer_tp.config import ConfigError
from reinforcer_tp.secrecy import RedactingParser, make_files_private, redact
from reinforcer_tp.selftest.batch import Case, fit, of_configuration, own_making
from reinforcer_tp.selftest.compare import BOUNDS, Deviation, Measured, compare, relative
from reinforcer_tp.selftest.layouts import Layout, choose, free_memory, layouts, tied_layouts
from reinforcer_tp.selftest.processes import RankError, Ranks, Task

if TYPE_CHECKING:
    from reinforcer_tp.data.tokenized import TokenizedSet

_EXIT_DEVIATES, _EXIT_DATA, _EXIT_CONFIG, _EXIT_INTERRUPTED = 1, 65, 78, 130
MEASURE = "reinforcer_tp.selftest.measure:measure"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the table says of a layout that was run."""

    layout: Layout
    found: Sequence[Measured] = ()  # by rank; () = it failed
    deviation: Deviation | None = None  # None = a baseline, or it failed
    problems: tuple[str, ...] = ()  # why it does not agree
    details: str = ""  # a traceback


def main(argv: list[str]) -> int:
    make_files_private()
    arguments = parse_arguments(argv)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anybody imports torch
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with tempfile.TemporaryDirectory(prefix="reinforcer_tp_selftest_") as folder:
            return selftest(arguments, Path(folder))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _EXIT_INTERRUPTED
    except ValueError as error:
        is_config = isinstance(error, ConfigError)
        if not is_config and "REINFORCER_TP_TRACEBACK" in os.environ:
            raise
        print(redact(f"error: {error}"), file=sys.stderr)
        return _EXIT_CONFIG if is_config else _EXIT_DATA


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    known = [*layouts(8, np.ones((1, 3))), *tied_layouts(8)]
    parser = RedactingParser(
        prog="python -m reinforcer_tp.selftest",
        description="Runs one global batch on the CPU, in float32, in every layout that this "
        "machine can hold, and compares loss, gradients and log-probs with those of one process.",
        epilog=f"Layouts: {', '.join(layout.name for layout in known)}. With --config the tied_ "
        "ones are left out and `own` is the configuration's own.",
    )
    parser.add_argument(
        "--config", help="YAML file of a run: its model and the first of its global batches"
    )
    parser.add_argument("--layouts", metavar="NAME,...", help="only these and their baseline")
    parser.add_argument(
        "--pairs", type=int, default=15, help="of the configuration's batch at most (default 15)"
    )
    parser.add_argument(
        "--timeout", type=float, default=300.0, help="seconds that a layout may take (default 300)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="over the configuration, as for training"
    )
    arguments = parser.parse_intermixed_args(argv)
    if arguments.pairs < 1:
        parser.error(f"argument --pairs: {arguments.pairs}, expected at least 1")
    return arguments


def selftest(arguments: argparse.Namespace, folder: Path) -> int:
    """The table of contents: batch, layouts that fit, runs, table. Returns the exit status."""
    begin = time.monotonic()
    if arguments.config is None:
        batch = own_making(folder, arguments.overrides)
    else:
        batch = of_configuration(arguments.config, arguments.overrides, arguments.pairs)
    free_bytes = free_memory()
    wanted = choose(batch.layouts, arguments.layouts)
    fitted = [fit(layout, batch, free_bytes) for layout in wanted]
    cases = [case for case in fitted if isinstance(case, Case)]
    skipped = [layout for layout in fitted if isinstance(layout, Layout)]
    if not cases or (len(cases) < 2 <= len(fitted)):
        reasons = "; ".join(f"{layout.name}: {layout.skip}" for layout in skipped)
        raise ConfigError(f"no layout could be compared with the baseline: {reasons}")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # a file has no width; nothing of the table is cut
    console.print(batch.note, soft_wrap=True)
    rows = run_cases(cases, batch.pairs, folder, timeout_s=arguments.timeout, console=console)
    return report(rows, skipped, len(cases), time.monotonic() - begin, console)


def run_cases(
    cases: Sequence[Case],
    pairs: TokenizedSet,
    folder: Path,
    *,
    timeout_s: float,
    console: Console,
    measure: str = MEASURE,
) -> list[Row]:
    """Each case in the processes of its layout, compared with the first case of its model.

    `measure` is what a process does, `module:function` of a Task.
    """
    rows: list[Row] = []
    baselines: dict[bool, Measured] = {}
    count = max(case.layout.processes for case in cases)
    with Ranks(count, folder, measure) as ranks, console.status("starting") as status:
        for index, case in enumerate(cases, start=1):
            layout = case.layout
            status.update(f"{layout.name} ({index} of {len(cases)})")
            baseline = baselines.get(layout.tied)
            task = Task(
                config=case.config,
                pairs=pairs,
                gradients=str(folder / f"gradients_{layout.tied}.safetensors"),
                is_baseline=baseline is None,
            )
            try:
                found = ranks.run(task, world_size=layout.processes, timeout_s=timeout_s)
            except RankError as error:
                rows.append(Row(layout=layout, problems=(str(error),), details=error.details))
                if baseline is None:
                    break  # nothing to compare with
                continue
            if baseline is None:
                baselines[layout.tied] = found[0]
            rows.append(judge(layout, found, baseline))
    return rows


def judge(layout: Layout, found: Sequence[Measured], baseline: Measured | None) -> Row:
    """The row of a layout that has run; `baseline` None = it is the baseline.

    A baseline is held against itself: the optimizer's norm must be that of the gradients.
    """
    if baseline is not None:
        deviation = compare(found, baseline)
        problems = deviation.problems()
        return Row(layout=layout, found=found, deviation=deviation, problems=problems)
    [own] = found
    off = relative(own.grad_norm, math.hypot(*own.gradients.values()))
    message = f"gradient norm off by {off:.2e} from the norm of the gradients"
    return Row(layout=layout, found=found, problems=() if off <= BOUNDS.grad_norm else (message,))


def report(
    rows: Sequence[Row],
    skipped: Sequence[Layout],
    num_cases: int,
    seconds: float,
    console: Console,
) -> int:
    """Prints the table, the reasons below it and the summary. Returns the exit status."""
    console.print(table(rows))
    for layout in skipped:
        console.print(f"skipped {layout.name}: {layout.skip}", soft_wrap=True, markup=False)
    failed = [row for row in rows if row.problems]
    for row in failed:
        text = f"{row.layout.name}: {'; '.join(row.problems)}"
        console.print(text, soft_wrap=True, markup=False)
        if row.details:
            print(row.details, file=sys.stderr)
    num_agree = sum(row.deviation is not None and not row.problems for row in rows)
    bounds = (
        f"log-probs {BOUNDS.logps:.0e}, loss and gradient norm {BOUNDS.loss:.0e}, gradients "
        f"{BOUNDS.gradient:.0e}"
    )
    all_agree = not failed and len(rows) == num_cases
    if any(layout.name == "own" for layout in skipped):
        console.print("the configuration's own layout was NOT run")
    verdict = "all agree" if all_agree else "NOT all agree"
    console.print(
        f"{verdict}: {num_agree} layouts within the bounds ({bounds}), {len(failed)} failed, "
        f"{num_cases - len(rows)} not run, {len(skipped)} skipped; {seconds:.0f} s",
        soft_wrap=True,
    )
    return 0 if all_agree else _EXIT_DEVIATES


def table(rows: Sequence[Row]) -> Table:
    """One line a layout; "off" is the largest deviation from the baseline."""
    drawn = Table("layout", "verdict", box=SIMPLE_HEAD)
    for name in (
        "processes",
        "micro-batches",
        "loss",
        "gradient\nnorm",
        "gradients\noff",
        "log-probs\noff",
    ):
        drawn.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        drawn.add_row(row.layout.name, *_cells(row))
    return drawn


def _cells(row: Row) -> list[str]:
    deviation, processes = row.deviation, str(row.layout.processes)
    if not row.found:
        return ["[red]FAILED[/red]", processes]
    first = row.found[0]
    num_empty = max(measured.num_empty for measured in row.found)
    cells = [
        processes,
        f"{first.num_micro_batches}, {num_empty} empty"
        if num_empty
        else f"{first.num_micro_batches}",
        f"{first.loss:.6f}",
        f"{first.grad_norm:.6f}",
    ]
    if deviation is not None:
        cells += [f"{deviation.gradient:.1e}", f"{deviation.logps:.1e}"]
    if row.problems:
        return ["[red]DEVIATES[/red]", *cells]
    return ["baseline" if deviation is None else "agrees", *cells]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
