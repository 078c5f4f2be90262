"""What a run needs, before a GPU is spent: memory of every stage, seconds of a step, GPU-hours.

    python -m reinforcer_tp.plan --config configs/dpo_llama70b.yaml --gpus 64 --gpu h100 [key=value]
    python -m reinforcer_tp.plan --config configs/dpo_llama70b.yaml --gpus 64 --gpu h100 --search
    python -m reinforcer_tp.plan --compare logs/dpo

Builds the configured model on a fake process group with tensors that have no data, one rank of
each kind of stage, and takes a step. Needs neither a GPU nor weights, and no hub for the models
whose shapes lie in configs/models. Exit status: 0 it fits, 1 it does not, 65 data or model files,
78 configuration, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from reinforcer_tp.config import Config, ConfigError, load_config
from reinforcer_tp.plan.devices import RATES, Device, find_device
from reinforcer_tp.secrecy import RedactingParser, make_files_private, redact

if TYPE_CHECKING:
    from reinforcer_tp.plan.estimate import Subject
    from reinforcer_tp.plan.rows import Assumed
    from reinforcer_tp.plan.search import Candidate

_EXIT_TOO_BIG, _EXIT_DATA, _EXIT_CONFIG, _EXIT_INTERRUPTED = 1, 65, 78, 130
_SHOWN = 25  # layouts of a search
_FIXES = 5  # that fit, among which the quickest counts


def main(argv: list[str]) -> int:
    make_files_private()
    arguments = parse_arguments(argv)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anybody imports torch
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=UserWarning)
    try:
        with no_rendezvous():
            return plan(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _EXIT_INTERRUPTED
    except ValueError as error:
        if not isinstance(error, ConfigError) and "REINFORCER_TP_TRACEBACK" in os.environ:
            raise
        print(redact(f"error: {error}"), file=sys.stderr)
        return _EXIT_CONFIG if isinstance(error, ConfigError) else _EXIT_DATA


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = RedactingParser(
        prog="python -m reinforcer_tp.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="YAML file of the run")
    parser.add_argument("--gpus", type=int, help="in all; default: the cluster section's")
    parser.add_argument("--gpus-per-node", type=int, help="default: the cluster section's, or 8")
    parser.add_argument(
        "--gpu", help="name, or any name with rates, or cpu; default: h100, or the run's"
    )
    for rate, what in zip(RATES, ("TFLOP/s dense", "GiB", "GB/s", "GB/s", "GB/s"), strict=True):
        parser.add_argument(f"--{rate.replace('_', '-')}", type=float, metavar=what)
    parser.add_argument("--efficiency", type=float, help="share of the rate in matrix products")
    parser.add_argument("--headroom", type=float, default=0.1, help="share of a card to keep free")
    parser.add_argument("--price", type=float, help="of a GPU-hour")
    parser.add_argument("--prompt-tokens", type=int, help="mean, where the data cannot be read")
    parser.add_argument("--response-tokens", type=int, help="mean, likewise")
    parser.add_argument("--pairs", type=int, help="of the training set, likewise")
    parser.add_argument("--search", action="store_true", help="rank the layouts of these GPUs")
    parser.add_argument("--compare", type=Path, metavar="RUN_DIR", help="a run beside its plan")
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(argv)


@contextlib.contextmanager
def no_rendezvous():
    """torchrun's variables, where there are any, say nothing of a fake cluster."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def plan(arguments: argparse.Namespace) -> int:
    check_numbers(arguments)
    if arguments.compare is not None:
        return compare(arguments)
    device = find_device(arguments.gpu or "h100", given_rates(arguments))
    config = load_config(arguments.config, arguments.overrides)
    world_size, per_node = cluster_size(config, arguments)
    config = on_cluster(config, world_size, per_node)
    config.validate(world_size, per_node)
    subject = open_subject(config, arguments, device, world_size, per_node)
    from reinforcer_tp.plan import show
    from reinforcer_tp.plan.estimate import make_plan
    from reinforcer_tp.plan.search import search

    if arguments.search:
        return show_search(arguments, config, subject, list(told(search(config, subject))))
    planned = make_plan(config, subject)
    fix = None if planned.fits else cheapest_fix(config, subject)
    if arguments.json:
        say_json(show.as_json(planned, arguments.price) | {"fix": fix})
        return 0 if planned.fits else _EXIT_TOO_BIG
    for line in show.headline(planned):
        print(line)
    print(f"\nGiB of one rank\n{show.memory_table(planned)}\n\n{show.time_table(planned)}\n")
    for line in show.run_lines(planned, arguments.price):
        print(line)
    print("\nassumed:")
    for line in show.assumptions(planned):
        print(f"  - {line}")
    if fix is not None:
        print(f"\n{fix}")
    return 0 if planned.fits else _EXIT_TOO_BIG


def given_rates(arguments: argparse.Namespace) -> dict[str, float | None]:
    return {rate: getattr(arguments, rate) for rate in RATES}


def check_numbers(arguments: argparse.Namespace) -> None:
    """Before anything heavy is imported."""
    for name in ("gpus", "gpus_per_node", "pairs", "prompt_tokens", "response_tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}={value}: expected at least 1")
    if arguments.efficiency is not None and not 0 < arguments.efficiency <= 1:
        raise ConfigError(f"--efficiency={arguments.efficiency:g}: expected more than 0, up to 1")
    if not 0 <= arguments.headroom < 1:
        raise ConfigError(f"--headroom={arguments.headroom:g}: expected from 0 to below 1")
    if arguments.price is not None and not 0 <= arguments.price < math.inf:
        raise ConfigError(f"--price={arguments.price:g}: expected a finite number from 0")


def cluster_size(config: Config, arguments: argparse.Namespace) -> tuple[int, int]:
    """(GPUs in all, GPUs of a node)."""
    world_size = arguments.gpus or config.planned_world_size
    per_node = arguments.gpus_per_node or config.cluster.gpus_per_node or 8
    per_node = min(per_node, world_size)
    if world_size % per_node:
        raise ConfigError(
            f"--gpus={world_size} is no multiple of {per_node} GPUs of a node; give a multiple, or "
            "--gpus-per-node"
        )
    return world_size, per_node


def on_cluster(config: Config, world_size: int, per_node: int) -> Config:
    cluster = dataclasses.replace(
        config.cluster, gpus_per_node=per_node, num_nodes=world_size // per_node
    )
    return dataclasses.replace(config, cluster=cluster)


def open_subject(
    config: Config, arguments: argparse.Namespace, device: Device, world_size: int, per_node: int
) -> Subject:
    from reinforcer_tp.plan import estimate, timing

    efficiency = timing.Efficiency()
    if arguments.efficiency is not None:
        efficiency = timing.Efficiency(matrices=arguments.efficiency)
    return estimate.open_subject(
        config,
        device,
        efficiency,
        assumed_lengths(arguments),
        headroom=arguments.headroom,
        world_size=world_size,
        gpus_per_node=per_node,
    )


def assumed_lengths(arguments: argparse.Namespace) -> Assumed:
    from reinforcer_tp.plan.rows import Assumed

    given = {
        "prompt_tokens": arguments.prompt_tokens,
        "response_tokens": arguments.response_tokens,
        "num_pairs": arguments.pairs,
    }
    return Assumed(**{name: value for name, value in given.items() if value is not None})


def told(candidates: Iterable[Candidate]) -> Iterator[Candidate]:
    """Says on a terminal how far the search is; it takes minutes."""
    for number, candidate in enumerate(candidates, 1):
        if sys.stderr.isatty():
            print(f"\r{number} layouts", end="", file=sys.stderr, flush=True)
        yield candidate
    if sys.stderr.isatty():
        print(file=sys.stderr)


def say_json(value: dict | list) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def show_search(
    arguments: argparse.Namespace, config: Config, subject: Subject, candidates: list
) -> int:
    from reinforcer_tp.plan import show
    from reinforcer_tp.plan.estimate import make_plan
    from reinforcer_tp.plan.search import changed

    candidates.sort(key=show.rank)
    if arguments.json:
        say_json([show.candidate_json(each) for each in candidates])
        return 0 if any(each.plan and each.plan.fits for each in candidates) else _EXIT_TOO_BIG
    print(show.candidates_table(candidates, _SHOWN))
    fitting = [each for each in candidates if each.plan is not None and each.plan.fits]
    print(f"\n{len(candidates)} layouts, {len(fitting)} fit on {subject.device.name}")
    for candidate in fitting:
        planned = make_plan(changed(config, candidate.overrides), subject)
        if planned.fits:
            print("the quickest, every stage built:", *show.headline(planned), sep="\n  ")
            print(f"to take it: {show.changes_text(candidate.overrides) or '(as configured)'}")
            return 0
    return _EXIT_TOO_BIG


def cheapest_fix(config: Config, subject: Subject) -> str:
    """The quickest of the first few changes that make it fit."""
    from reinforcer_tp.plan import show
    from reinforcer_tp.plan.search import fixes

    fitting = (each for each in fixes(config, subject) if each.plan is not None and each.plan.fits)
    found = list(itertools.islice(fitting, _FIXES))
    if not found:
        return (
            f"no layout of {subject.world_size} x {subject.device.name} holds it with these rows; "
            "take more GPUs (--gpus), or lower policy.micro_batch_tokens"
        )
    best = min(found, key=lambda each: each.plan.time.step_s)
    return (
        f"cheapest fix: {show.changes_text(best.overrides)}\n"
        f"  ({best.plan.peak_gib:.1f} GiB, {best.plan.time.step_s:.2f} s a step)"
    )


def compare(arguments: argparse.Namespace) -> int:
    from reinforcer_tp.plan.compare import comparison, comparison_lines, open_run

    beside = ("config", "overrides", "search", "gpus", "gpus_per_node", "price")
    if any(getattr(arguments, name) for name in beside):
        raise ConfigError(
            "--compare takes configuration and layout from the run's folder; give no --config, "
            "--gpus, --gpus-per-node, --search, --price or key=value beside it"
        )
    run = open_run(arguments.compare)
    device = find_device(arguments.gpu or run.card, given_rates(arguments))
    if device.is_gpu != (run.card != "cpu"):
        raise ConfigError(
            f"--gpu={arguments.gpu}, but {arguments.compare} ran on {run.card}; leave --gpu out, "
            "or name that card"
        )
    from reinforcer_tp.plan import show
    from reinforcer_tp.plan.estimate import make_plan

    subject = open_subject(run.config, arguments, device, run.world_size, run.per_node)
    planned = make_plan(run.config, subject)
    found = comparison(planned, run.measured)
    if arguments.json:
        say_json(found)
        return 0
    print(*show.headline(planned), *comparison_lines(found), sep="\n")
    print("\nassumed:", *(f"  - {line}" for line in show.assumptions(planned)), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
