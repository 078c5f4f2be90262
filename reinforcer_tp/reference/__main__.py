"""Looks after a store of reference log-probs.

    python -m reinforcer_tp.reference inspect STORE
    python -m reinforcer_tp.reference verify STORE --pairs 16
    python -m reinforcer_tp.reference prune STORE --older-than 90 --dry-run

STORE is what reference.store_dir names. Exit status: 0 all is well, 1 verify found other numbers,
65 something in the store or in the model's files is damaged, 78 no such store, reference or model,
130 interrupted.
"""

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from reinforcer_tp.config_check import ConfigError
from reinforcer_tp.reference.prune import remove, waste, whole_reference
from reinforcer_tp.reference.shards import DamagedShard, StoreError
from reinforcer_tp.reference.store import (
    DESCRIPTION,
    read_description,
    read_folder,
    reference_folders,
)
from reinforcer_tp.secrecy import RedactingParser, make_files_private, redact

_EXIT_DIFFERS, _EXIT_DATA, _EXIT_CONFIG, _EXIT_INTERRUPTED = 1, 65, 78, 130


def main(argv: list[str]) -> int:
    make_files_private()
    arguments = parse_arguments(argv)
    try:
        return arguments.command(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _EXIT_INTERRUPTED
    except (ValueError, StoreError) as error:
        print(redact(f"error: {error}"), file=sys.stderr)
        return _EXIT_CONFIG if isinstance(error, ConfigError) else _EXIT_DATA


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = RedactingParser(
        prog="python -m reinforcer_tp.reference",
        description="Looks after a store of reference log-probs (reference.store_dir).",
    )
    commands = parser.add_subparsers(required=True, metavar="inspect|verify|prune")
    inspecting = commands.add_parser("inspect", help="what is in it, and is it whole?")
    verifying = commands.add_parser("verify", help="recompute a random sample and compare")
    pruning = commands.add_parser("prune", help="remove leftovers, damaged and old shards")
    for command, function in ((inspecting, inspect), (verifying, verify), (pruning, prune)):
        command.add_argument("store", metavar="STORE", type=Path)
        command.set_defaults(command=function)
    prefix = {"metavar": "DIGEST-PREFIX", "help": "only this one, by the start of its name"}
    verifying.add_argument("--reference", **prefix)
    verifying.add_argument("--model", help="folder of its weights (default: as recorded)")
    verifying.add_argument("--pairs", type=_count, default=16, help="to recompute (default 16)")
    verifying.add_argument("--seed", type=int, default=0, help="of the sample (default 0)")
    pruning.add_argument(
        "--reference",
        metavar="DIGEST-PREFIX",
        help="only in this one; without --older-than the whole of it",
    )
    pruning.add_argument(
        "--older-than", type=_days, metavar="DAYS", help="also shards that were written before"
    )
    pruning.add_argument("--dry-run", action="store_true", help="say what, remove nothing")
    pruning.add_argument("--yes", action="store_true", help="do not ask")
    return parser.parse_args(argv)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number of at least 1")
    return int(text)


def _days(text: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = -1.0
    if not 0 <= days < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number of days of at least 0")
    return days


def choose(root: Path, prefix: str | None) -> list[Path]:
    """The folders of the references whose name begins with `prefix` (None = all).

    Raises ConfigError where `root` is no store or has no such reference.
    """
    if not root.is_dir():
        raise ConfigError(f"{root} is no folder; expected what reference.store_dir names")
    folders = reference_folders(root)
    if not folders:
        inside = (root / DESCRIPTION).is_file()
        hint = f"; it is one reference of the store {root.parent}" if inside else ""
        raise ConfigError(f"{root} is no reference store: it holds no reference{hint}")
    chosen = [folder for folder in folders if folder.name.startswith(prefix or "")]
    if not chosen:
        names = ", ".join(folder.name for folder in folders)
        raise ConfigError(f"no reference in {root} begins with {prefix!r}; there are {names}")
    return chosen


def choose_one(root: Path, prefix: str | None) -> Path:
    folders = choose(root, prefix)
    if len(folders) > 1:
        names = ", ".join(folder.name for folder in folders)
        raise ConfigError(f"{root} holds {len(folders)} of them, say which: --reference {names}")
    return folders[0]


def inspect(arguments: argparse.Namespace) -> int:
    """Prints a table of each reference and a line on everything that is damaged."""
    console = _console()
    problems: list[str] = []
    for folder in choose(arguments.store, None):
        table = Table(box=SIMPLE, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        try:
            rows, damaged = survey(folder)
        except ValueError as error:  # of reference.json: nothing else can be judged
            problems.append(str(error))
            continue
        for name, value in rows:
            table.add_row(name, Text(value))
        console.print(folder.name, markup=False)
        console.print(table)
        problems += damaged
    for line in problems:
        console.print(f"damaged: {line}", soft_wrap=True, markup=False)
    return _EXIT_DATA if problems else 0


def survey(folder: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """What there is to say of a reference, and a line on each damaged shard.

    Raises ValueError where its reference.json is damaged.
    """
    description = read_description(folder)
    seen: set[bytes] = set()
    num_pairs = num_tokens = num_bytes = 0
    shards, damaged = [], []
    for path, shard in read_folder(folder, description.key):
        if isinstance(shard, DamagedShard):
            damaged.append(f"{path}: {shard}")
            continue
        shards.append(path.name)
        num_bytes += path.stat().st_size if path.exists() else 0
        num_pairs += len(shard.keys)
        for key, count in zip(shard.keys, shard.num_responses.tolist(), strict=True):
            num_tokens += 0 if key in seen else count
            seen.add(key)
    return [
        ("model", description.model),
        ("numerics", description.key.numerics),
        ("shards", f"{len(shards):,}"),
        ("pairs", f"{len(seen):,}"),
        ("duplicate pairs", f"{num_pairs - len(seen):,}"),
        ("response tokens", f"{num_tokens:,}"),
        ("MiB", f"{num_bytes / 2**20:,.2f}"),
        ("first written", _written(shards[0]) if shards else "-"),
        ("last written", _written(shards[-1]) if shards else "-"),
        ("damaged shards", f"{len(damaged):,}"),
    ], damaged


def _written(name: str) -> str:
    moment = datetime.fromtimestamp(int(name[:20]) / 1e9, tz=UTC)
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def verify(arguments: argparse.Namespace) -> int:
    """Prints how far a random sample is from what its model computes now."""
    folder = choose_one(arguments.store, arguments.reference)
    description = read_description(folder)
    from reinforcer_tp.reference.verify import verify as recompute  # torch and Megatron: seconds

    verdict = recompute(
        folder,
        description,
        model=arguments.model,
        num_pairs=arguments.pairs,
        seed=arguments.seed,
    )
    print(verdict.text)
    for line in verdict.damaged:
        print(f"damaged: {line}")
    if not verdict.agrees:
        print(
            f"if its values are wrong: python -m reinforcer_tp.reference prune {arguments.store} "
            f"--reference {folder.name}"
        )
        return _EXIT_DIFFERS
    return _EXIT_DATA if verdict.damaged else 0


def prune(arguments: argparse.Namespace) -> int:
    """Says what goes, asks, and removes it."""
    if arguments.reference is not None and arguments.older_than is None:
        doomed = whole_reference(choose_one(arguments.store, arguments.reference))
    else:
        folders = choose(arguments.store, arguments.reference)
        days = arguments.older_than
        doomed = [file for folder in folders for file in waste(folder, older_than_days=days)]
    for file in doomed:
        print(f"{file.path}: {file.reason}, {file.num_bytes / 2**20:.1f} MiB")
    total = f"{len(doomed)} files, {sum(file.num_bytes for file in doomed) / 2**20:,.1f} MiB"
    if arguments.dry_run or not doomed:
        print(f"to remove: {total}")
    elif arguments.yes or _confirmed(total):
        remove(doomed)
        print(f"removed: {total}")
    else:
        print("nothing was removed")
    return 0


def _confirmed(total: str) -> bool:
    if not sys.stdin.isatty():
        raise ConfigError(f"{total} would be removed; say --yes where nobody can be asked")
    return input(f"remove {total}? [y/N] ").strip().lower() in ("y", "yes")


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # a file has no width
    return console


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
