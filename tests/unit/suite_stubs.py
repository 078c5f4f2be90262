"""Stand-ins for the parts of the GPU suite, and a suite of them."""

import json
from pathlib import Path

from benchmarks import gpu_suite
from benchmarks.suite_parts import Part
from benchmarks.suite_report import about_machine


def python(name: str, code: str, limit_s: float = 60, **keys) -> Part:
    return Part(name=name, arguments=["-c", code], limit_s=limit_s, **keys)


def run(parts: list[Part], folder: Path, budget_s: float = 300) -> tuple[int, dict, str]:
    """(exit code, the JSON, the Markdown)"""
    code = gpu_suite.run_suite(parts, folder / "gpu" / "a-b", about_machine(), budget_s)
    read = [(folder / "gpu" / f"a-b.{kind}").read_text() for kind in ("json", "md")]
    return code, json.loads(read[0]), read[1]
