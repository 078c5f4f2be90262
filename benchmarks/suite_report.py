"""What a suite says of its machine, and the Markdown table of a run of the GPU suite."""

from __future__ import annotations

import os
import shutil
import subprocess

import torch

from benchmarks.measure import default_device, machine
from benchmarks.suite_targets import GIB, shown
from reinforcer_tp.environment import environment_info, package_versions

RIVAL_PACKAGES = ("liger-kernel", "cut-cross-entropy")
# (key of the DPO run's summary, what the table calls it, format)
DPO_ROWS = (
    ("step_s", "step", "{:.3f} s"),
    ("tokens_per_s", "tokens/s", "{:,.0f}"),
    ("pairs_per_s", "pairs/s", "{:.2f}"),
    ("tflops_per_gpu", "TFLOP/s", "{:.1f}"),
    ("mfu", "MFU", "{:.1%}"),
    ("peak_gib", "peak memory", "{:.2f} GiB"),
    ("sweep_s", "reference sweep", "{:.2f} s"),
    ("first_loss", "first loss", "{:.6f}"),
    ("last_loss", "last loss", "{:.4f}"),
)
FORMATS = {"step_s": "{:.3f} s", "peak_gib": "{:.2f} GiB"}


def about_machine() -> dict:
    """Devices, driver, versions and commit; no host name. What cannot be known is None."""
    info, device = environment_info({}), default_device()
    found = machine(device) | {key: info[key] for key in ("python", "platform", "cuda", "nccl")}
    found["versions"] = info["versions"] | package_versions(RIVAL_PACKAGES)
    found |= {"num_devices": len(info["devices"]), "driver": _driver(), "cores": os.cpu_count()}
    found["host_memory_gib"] = host_memory_gib()
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["memory_gib"] = round(properties.total_memory / GIB, 1)
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = properties.multi_processor_count
    return found


def host_memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1)


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def markdown(report: dict) -> str:
    """One table: every part, what it measured, what was expected, and whether it holds."""
    about, versions = report["machine"], report["machine"]["versions"]
    named = [f"{name} {version}" for name, version in versions.items() if version]
    rows = [row for name in report["parts"] for row in _part_rows(name, report)]
    lines = [
        f"# {about['device']}, {about['date']}",
        "",
        f"Commit {about['commit']}, driver {about['driver'] or 'unknown'}, "
        f"CUDA {about['cuda'] or 'none'}, {', '.join(named)}; "
        f"{report['seconds']:.0f} of {report['budget_s']:.0f} s.",
        "",
        "| what | measured | expected | |",
        "|---|---|---|---|",
    ]
    return "\n".join([*lines, *("| " + " | ".join(map(_cell, row)) + " |" for row in rows)]) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _part_rows(name: str, report: dict) -> list[tuple[str, str, str, str]]:
    part = report["parts"][name]
    limit = f"at most {part['limit_s']:.0f} s" if part["limit_s"] else ""
    head = (f"**{name}**", f"{part['seconds']:.0f} s", limit, part["verdict"])
    of = {"tests": _test_rows, "dpo": _dpo_rows, "plan": _plan_rows, "codegen": _codegen_rows}
    if name == "benchmark":
        return [head, *_target_rows(report["targets"]), *_speed_rows(part["found"].get("rows", []))]
    return [head, *(of[name](part["found"]) if name in of and part["found"] else [])]


def _test_rows(found: dict) -> list[tuple[str, str, str, str]]:
    wrong = found["failed"] + found["error"]
    counts = f"{found['passed']} passed, {wrong} failed, {found['skipped']} skipped"
    ran = found["passed"] + wrong + found["skipped"]
    lost = (found["selected"] or ran) - ran
    rows = [("gpu tests", counts, "none fails", f"{lost} did not run" if lost else "")]
    rows += [("failed", name, "", "") for name in found["failures"]]
    return rows + ([("killed in", found["killed_in"], "", "")] if found["killed_in"] else [])


def _dpo_rows(found: dict) -> list[tuple[str, str, str, str]]:
    expected = {
        "first_loss": f"{found['expected_first_loss']:.6f}",
        "peak_gib": f"{found['device_gib']} GiB" if found["device_gib"] else "",
    }
    rows = [("DPO run", found["what"], "", "")]
    for key, name, form in DPO_ROWS:
        value = found.get(key)
        measured = "-" if value is None else form.format(value)
        rows.append((f"DPO {name}", measured, expected.get(key, ""), ""))
    return rows


def _plan_rows(found: dict) -> list[tuple[str, str, str, str]]:
    rows = []
    for key, form in FORMATS.items():
        measured, predicted = (found[side].get(key) for side in ("measured", "predicted"))
        both = None not in (measured, predicted)
        rows.append(
            (
                f"plan {key}",
                "-" if measured is None else form.format(measured),
                "-" if predicted is None else form.format(predicted),
                f"{measured / predicted:.2f} of the plan" if both and predicted else "",
            )
        )
    return rows


def _codegen_rows(found: dict) -> list[tuple[str, str, str, str]]:
    return [("codegen gate", line, "no limit broken", "") for line in found["compiled"]]


def _target_rows(targets: list[dict]) -> list[tuple[str, str, str, str]]:
    return [
        (
            f"{target['shape']} {target['contender']} {target['pass_name']}",
            shown(target["measured"], target["key"]),
            shown(target["limit"], target["key"]),
            f"{target['verdict']}; {target['note']}",
        )
        for target in targets
    ]


def _speed_rows(rows: list[dict]) -> list[tuple[str, str, str, str]]:
    """Everyone's forward + backward, without an expectation."""
    return [
        (
            f"{row['shape']} {row['contender']} both",
            shown(row["median_s"], "median_s"),
            "",
            f"{row['tflops']:.0f} TFLOP/s, {shown(row['extra_bytes'], 'extra_bytes')} extra",
        )
        for row in rows
        if row["pass"] == "both"
    ]
