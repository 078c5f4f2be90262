"""DPO by this project and by TRL, side by side on one machine's CPU.

    python -m benchmarks.vs_trl --model FOLDER --data PAIRS.jsonl[.gz] [--quick]

Both trainers run in processes of their own on the same model, pairs, order, precision, optimizer
and number of threads, taking turns. TRL gets an environment of its own (made on the first call;
--trl-python takes one at hand). Rows are prompt, chosen and rejected, lists of messages; those of
more than 512 tokens are left out for both, and the token ids that each was given are compared.
Appends to benchmarks/results/vs_trl: a row for each run, a table and a plot.

Exit code: 0; 1 a run failed or the trainers did not do the same (other ids, losses apart by more
than 1e-4 relative in float32 or 3e-2 absolute in bfloat16: then no speed is told); 3 a bar was
missed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.measure import RESULTS, append_rows, machine, slug
from benchmarks.trl_environment import ensure_trl
from benchmarks.vs_trl_report import draw, summarize, table, verdicts
from benchmarks.vs_trl_rows import (
    Pair,
    first_wrong_pair,
    select_pairs,
    shared_tokens,
    steps_of_ours,
    steps_of_trl,
)
from benchmarks.vs_trl_runs import (
    CONTENDERS,
    MAX_LENGTH,
    OPTIMIZER,
    ROOT,
    TRL_MICRO_BATCH_PAIRS,
    Case,
    Result,
    Setting,
    our_overrides,
    run_contender,
)
from reinforcer_tp.data.tokenizer import load_tokenizer
from reinforcer_tp.environment import package_versions

REFERENCES = ("resident", "precomputed")
CONFIG = ROOT / "configs" / "dpo.yaml"


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    torch.set_num_threads(args.threads)  # what the runs get, for the rows
    cases = choose_cases(args)
    needed = max(case.pairs * case.steps for case in cases)
    try:
        tokenizer = load_tokenizer(str(args.model), None)
        pairs, passed_over = select_pairs(args.data, tokenizer, needed, MAX_LENGTH)
        needs_trl = any(name != "ours" for name in args.contenders)
        python = args.trl_python or (ensure_trl() if needs_trl else "")
        with tempfile.TemporaryDirectory() as folder:
            results = run_all(cases, pairs, args, python, Path(folder))
        about = _about(args, results, len(pairs), passed_over)
        rows = [about | {"benchmark": "vs_trl"} | result.to_row() for result in results]
        summaries = summarize(rows)
    except (RuntimeError, ValueError) as error:
        print(f"FAILED {error}")
        return 1
    return _report(args, rows, summaries, about)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vs_trl",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--data", type=Path, required=True, help="jsonl or jsonl.gz")
    parser.add_argument("--pairs", type=int, nargs="+", default=[4, 16], help="in a step")
    parser.add_argument(
        "--precision", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"]
    )
    parser.add_argument("--reference", nargs="+", choices=REFERENCES)
    parser.add_argument(
        "--all", action="store_true", help="more than 4 pairs in float32 and precomputed, too"
    )
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=["ours", "trl"])
    parser.add_argument("--steps", type=int, default=3, help="of a run of up to 4 pairs a step")
    parser.add_argument("--large-steps", type=int, default=2, help="of a run of more pairs a step")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each contender")
    parser.add_argument("--quick", action="store_true", help="4 pairs, 2 steps, 1 round, resident")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--micro-batch-tokens", type=int, default=2048, help="ours: most tokens in a micro-batch"
    )
    parser.add_argument("--trl-python", help="the python of an environment that has TRL")
    parser.add_argument("--results", type=Path, default=RESULTS / "vs_trl")
    args = parser.parse_args(argv)
    if args.quick:
        args.pairs, args.steps, args.rounds = [4], 2, 1
    args.reference = args.reference or list(REFERENCES[:1] if args.quick else REFERENCES)
    if min(args.steps, args.large_steps) < 2:
        parser.error("a run needs 2 steps: the first is not timed")
    for pairs in args.pairs:
        if pairs < 1 or (pairs > TRL_MICRO_BATCH_PAIRS and pairs % TRL_MICRO_BATCH_PAIRS):
            parser.error(f"--pairs {pairs}: expected up to {TRL_MICRO_BATCH_PAIRS} or a multiple")
    return args


def choose_cases(args: argparse.Namespace) -> list[Case]:
    """Many pairs take TRL minutes a step: by default of them bfloat16, resident, alone."""
    cases = []
    for pairs, precision, reference in itertools.product(
        args.pairs, args.precision, args.reference
    ):
        is_large = pairs > TRL_MICRO_BATCH_PAIRS
        usual = precision == "bfloat16" and reference == "resident"
        if not is_large or args.all or usual or len(args.pairs) == 1:
            steps = args.large_steps if is_large else args.steps
            cases.append(Case(pairs=pairs, precision=precision, reference=reference, steps=steps))
    return cases


def turns(rounds: int, contenders: list[str]) -> Iterator[tuple[int, str]]:
    """A B A B: what drifts on the machine meets all of them alike."""
    return itertools.product(range(rounds), contenders)


def run_all(
    cases: list[Case], pairs: list[Pair], args: argparse.Namespace, trl_python: str, folder: Path
) -> list[Result]:
    """Every run of every case. RuntimeError where one fails or is given other token ids."""
    results = []
    for number, case in enumerate(cases):
        wanted = pairs[: case.pairs * case.steps]
        rows = folder / f"case{number}.jsonl"
        rows.write_text("".join(json.dumps(pair.row) + "\n" for pair in wanted), encoding="utf-8")
        setting = Setting(
            model=str(args.model.resolve()),
            rows=str(rows),
            threads=args.threads,
            micro_batch_tokens=args.micro_batch_tokens,
            trl_python=trl_python,
        )
        for round_, name in turns(args.rounds, args.contenders):
            work = folder / f"case{number}-{name}-{round_}"
            result = run_contender(name, round_, case, setting, work)
            check_pairs(result, wanted, setting, work)
            print(_line(result), flush=True)
            results.append(result)
    return results


def check_pairs(result: Result, expected: list[Pair], setting: Setting, folder: Path) -> None:
    """RuntimeError where a run was not given the expected token ids in the expected order."""
    case = result.case
    if result.contender == "ours":
        found = steps_of_ours(our_overrides(case, setting, folder), CONFIG, case.steps)
        tokens = [sum(map(shared_tokens, pairs)) for pairs in found]
        counted = [step["tokens"] for step in result.steps]
        if result.info["pairs_used"] != len(expected) or counted != tokens:
            raise RuntimeError(
                f"ours used {result.info['pairs_used']} pairs and {counted} tokens a step, "
                f"expected {len(expected)} and {tokens}"
            )
    else:
        found = steps_of_trl(result.steps)
    wrong = first_wrong_pair(found, expected, case.pairs)
    if wrong is not None:
        raise RuntimeError(f"{result.contender} was given other tokens: {wrong}")


def _line(result: Result) -> str:
    case, losses = result.case, [f"{step['loss']:.6f}" for step in result.steps]
    norms = [f"{step['grad_norm']:.4f}" for step in result.steps]
    seconds = [f"{s:.2f}" for s in result.step_s]
    return (
        f"{result.contender:18} {case.precision} {case.pairs} pairs {case.reference}, run "
        f"{result.round}: steps {', '.join(seconds)} s, first after {result.stamps[0]:.1f} s, "
        f"{result.peak_gib:.2f} GiB, loss {' '.join(losses)}, gradient norm {' '.join(norms)}"
    )


def _about(
    args: argparse.Namespace, results: list[Result], num_pairs: int, passed_over: int
) -> dict:
    versions = package_versions(("torch", "megatron-core", "transformers"))
    found = next((r.info["versions"] for r in results if "versions" in r.info), {})
    versions |= {f"TRL's {name}" if name in versions else name: v for name, v in found.items()}
    return machine("cpu") | {
        "threads": args.threads,
        "versions": versions,
        "model": args.model.name,
        "data": args.data.name,
        "num_pairs": num_pairs,
        "passed_over": passed_over,
        "max_length": MAX_LENGTH,
        "lr": OPTIMIZER["lr"],
        "rounds": args.rounds,
        "micro_batch_tokens": args.micro_batch_tokens,
        "trl_micro_batch": TRL_MICRO_BATCH_PAIRS,
    }


def _report(args: argparse.Namespace, rows: list[dict], summaries: list[dict], about: dict) -> int:
    path = append_rows(args.results, rows)
    stem = args.results / slug(str(about["device"]))
    text = table(summaries, about)
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    draw(rows, summaries, stem.with_suffix(".png"))
    print(text)
    bars = verdicts(summaries)
    for met, said in bars:
        print(f"{'met   ' if met else 'MISSED'} {said}")
    print(f"appended to {path}; table and plot beside it")
    return 0 if all(met for met, _ in bars) else 3


if __name__ == "__main__":
    sys.exit(main())
