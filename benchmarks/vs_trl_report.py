"""Judges the runs of benchmarks.vs_trl, and writes what they say as a table and a plot.

Works on rows (Result.to_row and the machine), so that the table can be made again from the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# What losses of one step may differ by: (relative?, limit).
SAME_LOSS = {"float32": (True, 1e-4), "bfloat16": (False, 3e-2)}
# Of the mean log-probs of a side, relative: the first loss is ln 2 whatever a model computes.
SAME_LOGPS = {"float32": 1e-4, "bfloat16": 2e-2}
FASTER = {"float32": 2.0, "bfloat16": 3.0}  # times TRL's pairs/s
SMALLER = 0.4  # of TRL's peak memory, in bfloat16
COLORS = {"ours": "#1b6ca8", "trl": "#d08a3c", "trl-checkpointing": "#9a9a9a"}
WEIGHTS = {
    ("ours", "bfloat16"): "bf16 + float32 masters",
    ("trl", "bfloat16"): "bf16, no masters",
    ("trl-checkpointing", "bfloat16"): "bf16, no masters",
    ("trl-autocast", "bfloat16"): "float32, bf16 autocast",
}


def loss_difference(precision: str, ours: float, theirs: float) -> float:
    """In the unit of SAME_LOSS: relative in float32, absolute in bfloat16."""
    relative, _ = SAME_LOSS[precision]
    return abs(ours - theirs) / (abs(theirs) if relative else 1.0)


def find_loss_difference(precision: str, ours: dict, theirs: dict) -> str | None:
    """The first step in which two runs' losses or log-probs are too far apart; None = none."""
    relative, limit = SAME_LOSS[precision]
    kind = "relative" if relative else "absolute"
    both = zip(ours["steps"], theirs["steps"], strict=True)
    for number, (a, b) in enumerate(both, start=1):
        difference = loss_difference(precision, a["loss"], b["loss"])
        if not difference <= limit:  # NaN, too
            return (
                f"step {number}: the loss is {a['loss']:.7g} ({ours['contender']}) and "
                f"{b['loss']:.7g} ({theirs['contender']}), {kind} difference {difference:.2g}, "
                f"at most {limit:g} expected"
            )
        for side in ("logps_chosen", "logps_rejected"):
            difference = abs(a[side] - b[side]) / abs(b[side])
            if not difference <= SAME_LOGPS[precision]:
                return (
                    f"step {number}: {side} is {a[side]:.7g} ({ours['contender']}) and "
                    f"{b[side]:.7g} ({theirs['contender']}), relative difference "
                    f"{difference:.2g}, at most {SAME_LOGPS[precision]:g} expected"
                )
    return None


def summarize(rows: Sequence[dict]) -> list[dict]:
    """One summary for each (case, contender), from the rows of one call of the benchmark.

    Speed-ups compare sums of the same steps. ValueError where losses differ: no speed is told.
    """
    groups: dict[tuple, dict[str, list[dict]]] = {}
    for row in rows:
        key = tuple(row["case"][name] for name in ("pairs", "precision", "reference", "steps"))
        groups.setdefault(key, {}).setdefault(row["contender"], []).append(row)
    return [line for group in groups.values() for line in _summarize_case(group)]


def _summarize_case(group: dict[str, list[dict]]) -> list[dict]:
    lines, ours = [], group.get("ours")
    for contender, rows in group.items():
        case, seconds = rows[0]["case"], [s for row in rows for s in row["step_s"]]
        p20, median, p80 = np.percentile(seconds, [20, 50, 80])
        line = {name: case[name] for name in ("pairs", "precision", "reference")}
        line |= {
            "contender": contender,
            "weights": WEIGHTS.get((contender, case["precision"]), case["precision"]),
            "timed_steps": len(seconds),
            "median_s": float(median),
            "p20_s": float(p20),
            "p80_s": float(p80),
            "pairs_per_s": case["pairs"] * len(seconds) / sum(seconds),
            "peak_gib": max(row["peak_gib"] for row in rows),
            "first_step_s": float(np.median([row["first_step_s"] for row in rows])),
            "prepare_s": float(np.median([row["prepare_s"] for row in rows])),
        }
        if contender != "ours" and ours:
            line |= _compare(case["precision"], ours, rows, line)
        lines.append(line)
    return lines


def _compare(precision: str, ours: list[dict], theirs: list[dict], line: dict) -> dict:
    for a in ours:
        for b in theirs:
            wrong = find_loss_difference(precision, a, b)
            if wrong is not None:
                raise ValueError(f"{describe(b['case'])}: {wrong}: no speed-up is reported")
    steps = [pair for a in ours for b in theirs for pair in zip(a["steps"], b["steps"])]
    seconds = sum(s for row in ours for s in row["step_s"])
    rate = line["pairs"] * sum(len(row["step_s"]) for row in ours) / seconds
    return {
        "speed_up": rate / line["pairs_per_s"],
        "memory_share": max(row["peak_gib"] for row in ours) / line["peak_gib"],
        "first_step_speed_up": line["first_step_s"]
        / float(np.median([row["first_step_s"] for row in ours])),
        "loss_difference": max(loss_difference(precision, a["loss"], b["loss"]) for a, b in steps),
        "grad_norm_difference": max(
            abs(a["grad_norm"] - b["grad_norm"]) / b["grad_norm"] for a, b in steps
        ),
        "logps_difference": max(
            abs(a[f"logps_{side}"] - b[f"logps_{side}"]) / abs(b[f"logps_{side}"])
            for a, b in steps
            for side in ("chosen", "rejected")
        ),
    }


def describe(case: dict) -> str:
    return f"{case['precision']}, {case['pairs']} pairs, {case['reference']} reference"


def verdicts(summaries: Sequence[dict]) -> list[tuple[bool, str]]:
    """(met, text) of each bar, against every TRL contender that was run."""
    found = []
    for line in summaries:
        if "speed_up" not in line:
            continue
        where = f"{describe(line)}, against {line['contender']}"
        bar = FASTER[line["precision"]]
        found.append((line["speed_up"] >= bar, f"{where}: {line['speed_up']:.2f}x, bar {bar:g}x"))
        if line["precision"] == "bfloat16":
            share = line["memory_share"]
            text = f"{where}: {share:.2f} of its peak memory, bar {SMALLER:g}"
            found.append((share <= SMALLER, text))
    return found


HEADER = (
    "case", "trainer", "weights", "s a step (p20-p80)", "pairs/s", "ours is faster", "peak GiB",
    "ours takes", "first step after", "largest difference of loss",
    "of log-probs", "of gradient norm",
)  # fmt: skip


def table(summaries: Sequence[dict], about: dict) -> str:
    """Markdown."""
    rows = [list(HEADER), ["---"] * len(HEADER)]
    for line in summaries:
        compared = "speed_up" in line
        relative = SAME_LOSS[line["precision"]][0]
        rows.append(
            [
                describe(line),
                line["contender"],
                line["weights"],
                f"{line['median_s']:.2f} ({line['p20_s']:.2f}-{line['p80_s']:.2f})",
                f"{line['pairs_per_s']:.3f}",
                f"{line['speed_up']:.2f}x" if compared else "",
                f"{line['peak_gib']:.2f}",
                f"{line['memory_share']:.2f} of it" if compared else "",
                f"{line['first_step_s']:.1f} s",
                f"{line['loss_difference']:.1e} {'relative' if relative else 'absolute'}"
                if compared
                else "",
                f"{line['logps_difference']:.1e}" if compared else "",
                f"{line['grad_norm_difference']:.1e}" if compared else "",
            ]
        )
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    parts = ["# Side by side with TRL", _about(about), text, *as_each_comes(summaries)]
    return "\n\n".join([*parts, _notes(about)]) + "\n"


def as_each_comes(summaries: Sequence[dict]) -> list[str]:
    """Our default, a reference that is read, beside TRL's, one that runs in every step."""
    by_name = {
        (line["pairs"], line["precision"], line["reference"], line["contender"]): line
        for line in summaries
    }
    said = []
    for (pairs, precision, reference, contender), trl in by_name.items():
        ours = by_name.get((pairs, precision, "precomputed", "ours"))
        if reference == "resident" and contender != "ours" and ours is not None:
            said.append(
                f"As each comes ({precision}, {pairs} pairs; ours reads its reference, {contender} "
                f"runs it): {ours['pairs_per_s'] / trl['pairs_per_s']:.2f}x the pairs/s, "
                f"{ours['peak_gib'] / trl['peak_gib']:.2f} of the peak memory; our sweep before "
                f"the first step took {ours['prepare_s']:.1f} s."
            )
    return said


def _about(about: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    flags = ", ".join(name for name, has in about["cpu_flags"].items() if has) or "no bf16 units"
    return (
        f"{about['device']} ({flags}), {about['threads']} threads, {about['date']}, commit "
        f"{about['commit']}; {versions}.\n\nModel {about['model']}, the first {about['num_pairs']} "
        f"pairs of {about['data']} of at most {about['max_length']} tokens a side "
        f"({about['passed_over']} longer or undecided ones passed over), the same ids in the same "
        f"order for both. AdamW, lr {about['lr']:g}, constant; {about['rounds']} runs of each, "
        "taking turns."
    )


def _notes(about: dict) -> str:
    return "\n".join(
        [
            "- A step is all that lies between the ends of two optimizer steps, seen from outside. "
            'The first of each run is left out of the times; "first step after" is the time from '
            "the start of the process to its end, imports, tokenizing and the precompute included.",
            "- Peak memory is of the whole run (VmHWM, and the memory of child processes).",
            f"- TRL takes {about['trl_micro_batch']} pairs at once and accumulates; ours packs at "
            f"most {about['micro_batch_tokens']} tokens in a micro-batch, prompts once.",
            "- In bfloat16 TRL (`trl`) holds bf16 weights and no float32 masters, so its memory is "
            "less and its small updates are rounded away; ours holds float32 masters. "
            "`trl-autocast` holds float32 weights, as ours does.",
            "- `trl` does not recompute activations; `trl-checkpointing` does, TRL's default.",
            '- "Resident": a second model runs in every step. "Precomputed": TRL\'s '
            "precompute_ref_log_probs, our reference.mode=store, swept before the first step.",
        ]
    )


def draw(rows: Sequence[dict], summaries: Sequence[dict], target: Path) -> Path:
    """Pairs/s and peak memory of every case, and how far losses are apart step by step."""
    figure, axes = plt.subplots(
        1, 3, figsize=(16, 1.6 + 0.5 * len(summaries)), layout="constrained"
    )
    names = [f"{describe(line)}\n{line['contender']}" for line in summaries]
    colors = [COLORS.get(line["contender"], "#5a9367") for line in summaries]
    for ax, key, title in ((axes[0], "pairs_per_s", "pairs/s"), (axes[1], "peak_gib", "peak GiB")):
        bars = ax.barh(range(len(names)), [line[key] for line in summaries], color=colors)
        ax.bar_label(bars, fmt="%.3g", fontsize=7, padding=2)
        ax.set_yticks(range(len(names)), names if ax is axes[0] else [], fontsize=7)
        ax.invert_yaxis()
        ax.margins(x=0.15)
        ax.set_title(title)
    _draw_losses(axes[2], rows)
    about = rows[0]
    figure.suptitle(f"{about['device']}, {about['threads']} threads, {about['commit']}", fontsize=9)
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return target


def _draw_losses(ax, rows: Sequence[dict]) -> None:
    ours = {_key(row): row for row in rows if row["contender"] == "ours"}
    for row in rows:
        other = ours.get(_key(row))
        if row["contender"] == "ours" or other is None:
            continue
        precision = row["case"]["precision"]
        both = zip(other["steps"], row["steps"], strict=True)
        differences = [loss_difference(precision, a["loss"], b["loss"]) for a, b in both]
        label = f"{describe(row['case'])}, {row['contender']}" if row["round"] == 0 else None
        steps = range(1, 1 + len(differences))
        ax.plot(steps, [max(d, 1e-9) for d in differences], "o-", label=label, markersize=3)
    for precision, (relative, limit) in SAME_LOSS.items():
        ax.axhline(limit, color="#c03030", lw=0.8, ls="--")
        kind = "relative" if relative else "absolute"
        ax.text(1, limit * 1.1, f"limit, {precision}, {kind}", fontsize=7, color="#c03030")
    ax.set_yscale("log")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.margins(y=0.15)
    ax.set_title("difference of the losses")
    ax.set_xlabel("step")
    if ax.lines[len(SAME_LOSS) :]:
        ax.legend(fontsize=6)


def _key(row: dict) -> tuple:
    return (*row["case"].values(), row["round"])
