"""Speed, memory and error of the fused log-prob operator beside its rivals and bare GEMMs.

    python -m benchmarks.linear_logprob [--device cuda|cpu] [--shape llama8b ...] [--tokens N ...]

Contenders take turns. Nothing is timed before the operator has passed its parity check against
float64 on the same inputs. Rows are appended to benchmarks/results; benchmarks.plot draws them.
Exit code: 0, 1 parity failed (no speed is printed for that shape), 2 bad arguments or no CUDA
device, 3 a bar of the CPU benchmark was missed.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.contenders import (
    DTYPES,
    RIVALS,
    SHAPES,
    Contender,
    Inputs,
    make_contenders,
    make_inputs,
)
from benchmarks.measure import (
    PASSES,
    RESULTS,
    Probe,
    append_rows,
    cpu_flags,
    cpu_gemm_rates,
    machine,
    probe,
    rounds_within,
    statistics,
    time_interleaved,
)
from benchmarks.parity import Errors, errors_of, exact_results, failures, is_something_else

# Times of 2 NDV that a pass needs when no logit is computed twice.
USEFUL_GEMMS = {"forward": 1, "backward": 2, "both": 3}
FORMULA = (
    "TFLOP/s: 2NDV forward, 4NDV backward, 6NDV both, over the median time (logits computed again "
    "are not counted).\nof GEMM: time of the same number of bare GEMMs in this run (3 where logits "
    "or exponentials are kept,\n4 where they are computed again), over the time. "
    "extra: most bytes that lived at once beside inputs and results."
)
# Forward + backward, smallest time, against (materialised, bare GEMMs): CPU, smollm2. In bfloat16
# they hold where exact logits come out of the bfloat16 units: a float32 GEMM of bfloat16 values
# reaches those with AMX only; elsewhere it runs at float32 speed (AVX512_BF16: printed, not
# asserted).
CPU_BARS = {
    ("float32", "ours-cached"): (0.9, 1.25),
    ("float32", "ours-strict"): (1.1, 1.25),
    ("bfloat16", "ours-cached"): (0.6, 1.6),
    ("bfloat16", "ours-strict"): (0.75, 1.6),
}
STRICT_MEMORY_BAR = 0.25
CPU_BAR_TOKENS = (512, 2048)


@dataclass(frozen=True, kw_only=True)
class Case:
    shape: str
    n: int
    d: int
    v: int
    dtype: str
    device_type: str


@dataclass(frozen=True, kw_only=True)
class Ratio:
    text: str
    value: float | None  # None: one of the two did not run
    bar: float | None
    asserted: bool

    def is_met(self) -> bool:
        return self.value is not None and self.bar is not None and self.value <= self.bar

    def missed(self) -> bool:
        return self.asserted and not self.is_met()


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda, but there is no CUDA device; use --device cpu")
        return 2
    if args.impl == "triton" and args.device != "cuda":
        print("error: --impl triton needs --device cuda; the interpreter's speed says nothing")
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    codes = set()
    for shape in args.shape or _default_shapes(args.device):
        default_n, d, v = SHAPES[shape]
        for n in args.tokens or [default_n]:
            for dtype in args.dtype or _default_dtypes(args.device):
                case = Case(shape=shape, n=n, d=d, v=v, dtype=dtype, device_type=args.device)
                codes.add(run_case(case, args))
    return next((code for code in (1, 3) if code in codes), 0)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.linear_logprob",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if cuda else "cpu")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, help="default: all on CUDA")
    parser.add_argument("--tokens", nargs="+", type=_positive, help="default: the shape's own")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: bfloat16; CPU: both")
    parser.add_argument("--threads", type=_positive, help="CPU threads (default: torch's)")
    parser.add_argument("--repeats", type=_positive, help="rounds (default: 20; CPU: 7)")
    parser.add_argument("--skip", nargs="+", choices=RIVALS, default=[], help="rivals to leave out")
    parser.add_argument(
        "--budget-s", type=float, default=20, help="for a slow rival's rounds, one at least"
    )
    parser.add_argument("--impl", choices=("auto", "triton", "torch"), default="auto")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where rows are appended")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}; expected at least 1")
    return value


def _default_shapes(device: str) -> list[str]:
    return [name for name in SHAPES if name != "tiny"] if device == "cuda" else ["smollm2"]


def _default_dtypes(device: str) -> list[str]:
    return ["bfloat16"] if device == "cuda" else ["bfloat16", "float32"]


def run_case(case: Case, args: argparse.Namespace) -> int:
    print(f"\n{case.shape}: N={case.n} D={case.d} V={case.v} {case.dtype} on {case.device_type}")
    inputs = make_inputs(case.n, case.d, case.v, DTYPES[case.dtype], case.device_type)
    found, absent = make_contenders(inputs, args.impl, args.skip)
    running, probes, errors, failed = _check(found, absent, inputs)
    for name, why in absent.items():
        print(f"  {name}: not run: {why}")
    if failed:
        for line in failed:
            print(f"  PARITY FAILED: {line}")
        print("  no speed is reported for this shape")
        return 1
    if case.device_type == "cpu":
        _print_cpu(inputs)
    repeats = args.repeats or (20 if case.device_type == "cuda" else 7)
    rounds = {
        c.name: rounds_within(args.budget_s, probes[c.name].round_s, repeats)
        if c.rival
        else repeats
        for c in running
    }
    samples = time_interleaved(running, inputs, rounds)
    rows = make_rows(case, running, samples, probes, errors)
    print_table(rows)
    ratios = make_ratios(case, rows)
    print_ratios(ratios)
    where = machine(case.device_type)
    print(f"  appended to {append_rows(args.results, [where | row for row in rows])}")
    return 3 if any(ratio.missed() for ratio in ratios) else 0


def _check(
    found: list[Contender], absent: dict[str, str], inputs: Inputs
) -> tuple[list[Contender], dict[str, Probe], dict[str, Errors], list[str]]:
    """Runs each contender once; those that cannot go to `absent`. The last of the four says
    which numbers of ours are wrong."""
    exact = exact_results(inputs)
    running, probes, errors = [], {}, {}
    for contender in found:
        # Whatever another package raises is its own affair.
        tolerated = Exception if contender.rival else (NotImplementedError, torch.OutOfMemoryError)
        try:
            results, probes[contender.name] = probe(contender, inputs)
        except tolerated as error:
            absent[contender.name] = (
                f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]}"
            )
            continue
        if not contender.bare:
            errors[contender.name] = errors_of(exact, *results)
            if contender.rival and is_something_else(errors[contender.name]):
                absent[contender.name] = f"wrong results: {errors.pop(contender.name)}"
                continue
        running.append(contender)
    plain = errors.get("materialised")
    failed = [
        f"{c.name}: {line}"
        for c in running
        if c.ours
        for line in failures(errors[c.name], plain, inputs.hidden.dtype)
    ]
    return running, probes, errors, failed


def _print_cpu(inputs: Inputs) -> None:
    rates = cpu_gemm_rates(inputs)
    has = ", ".join(f"{name} {'yes' if it else 'no'}" for name, it in cpu_flags().items())
    print(f"  CPU: {has}; {torch.get_num_threads()} threads; forward GEMM in TFLOP/s: ", end="")
    print(", ".join(f"{name} {rate:.3f}" for name, rate in rates.items()))


def make_rows(case: Case, running, samples, probes, errors) -> list[dict]:
    """One row a contender and pass, in the order of the table."""
    stats = {c.name: {p: statistics(samples[c.name][p]) for p in PASSES} for c in running}
    rows = []
    for contender in running:
        for name in PASSES:
            row = {"benchmark": "linear_logprob", **asdict(case)}
            row |= {"contender": contender.name, "pass": name}
            row |= stats[contender.name][name]
            flops = 2 * case.n * case.d * case.v
            gemms = USEFUL_GEMMS[name]
            computed = gemms if name == "forward" else gemms + contender.gemms - 3
            floor_s = stats[f"gemms-{contender.gemms}"][name]["median_s"]
            row["tflops"] = gemms * flops / row["median_s"] / 1e12
            row["tflops_executed"] = computed * flops / row["median_s"] / 1e12
            row["of_gemm"] = floor_s / row["median_s"]
            row["extra_bytes"] = probes[contender.name].extra_bytes.get(name)
            if contender.name in errors:
                row |= asdict(errors[contender.name])
            rows.append(row)
    return rows


def print_table(rows: list[dict]) -> None:
    print("  " + FORMULA.replace("\n", "\n  "))
    print(
        f"  {'contender':15}{'pass':9}{'median ms':>10}{'p20':>9}{'p80':>9}{'min':>9}{'runs':>5}"
        f"{'TFLOP/s':>9}{'of GEMM':>8}{'extra MiB':>10}{'logp err':>10}{'dh p99':>9}"
    )
    for row in rows:
        times = [1e3 * row[key] for key in ("median_s", "p20_s", "p80_s", "min_s")]
        extra = "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 2**20:.1f}"
        wrong = [f"{row[k]:.1e}" if k in row else "" for k in ("logp_max", "dhidden_p99")]
        print(
            f"  {row['contender']:15}{row['pass']:9}{times[0]:10.2f}"
            + "".join(f"{t:9.2f}" for t in times[1:])
            + f"{row['repeats']:5}{row['tflops']:9.3f}{row['of_gemm']:8.2f}"
            + f"{extra:>10}{wrong[0]:>10}{wrong[1]:>9}"
        )


def make_ratios(case: Case, rows: list[dict]) -> list[Ratio]:
    """Ours over materialised logits and over the bare GEMMs: smallest times of one run."""
    both = {row["contender"]: row for row in rows if row["pass"] == "both"}
    barred = case.device_type == "cpu" and case.shape == "smollm2" and case.n in CPU_BAR_TOKENS
    fast = case.dtype == "float32" or cpu_flags()["amx"]
    ratios = []

    def add(name: str, other: str, key: str, bar: float | None, asserted: bool) -> None:
        a, b = (both.get(which, {}).get(key) for which in (name, other))
        unit = {"min_s": "time", "extra_bytes": "extra memory"}[key]
        text = f"{unit}, forward + backward: {name} / {other}"
        value = None if a is None or not b else a / b
        asserted = barred and asserted and bar is not None
        ratios.append(Ratio(text=text, value=value, bar=bar if barred else None, asserted=asserted))

    for name, gemms in (("ours-cached", "gemms-3"), ("ours-strict", "gemms-4")):
        bars = CPU_BARS.get((case.dtype, name), (None, None))
        add(name, "materialised", "min_s", bars[0], fast)
        add(name, gemms, "min_s", bars[1], fast)
    add("ours-strict", "materialised", "extra_bytes", STRICT_MEMORY_BAR, True)
    return ratios


def print_ratios(ratios: list[Ratio]) -> None:
    print("  ratios (smallest times of this run)")
    for ratio in ratios:
        value = "not run" if ratio.value is None else f"{ratio.value:.3f}"
        verdict = ""
        if ratio.bar is not None:
            verdict = f"bar {ratio.bar}: "
            if ratio.asserted:
                verdict += "FAIL" if ratio.missed() else "PASS"
            else:
                verdict += ("met" if ratio.is_met() else "missed") + ", not asserted without AMX"
        print(f"    {ratio.text:62}{value:>8}  {verdict}")


if __name__ == "__main__":
    sys.exit(main())
