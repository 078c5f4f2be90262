"""What happened in a run, for who reads it later: <log_dir>/events.jsonl, a line for each.

{"time": seconds since 1970, "step": the step it came after, "kind": of KINDS, "text": one line}

Nothing is ever removed, unlike metrics.jsonl, which loses what a resumed run computes again. How
an attempt ended is in its exit.json, see lifecycle/attempts.py.
"""

import contextlib
import json
import os
import time
from pathlib import Path

from reinforcer_tp.secrecy import redact

FILE = "events.jsonl"
KINDS = ("resume", "save", "hint", "warning", "skip")  # skip: a step that changed no weight


def append_event(log_dir: Path, kind: str, step: int, text: str) -> None:
    """Adds a line. Raises nothing for the disk: a run must not fail for its records."""
    assert kind in KINDS, kind
    event = {"time": time.time(), "step": step, "kind": kind, "text": redact(text)}
    line = json.dumps(event).encode() + b"\n"
    with contextlib.suppress(OSError), open(log_dir / FILE, "ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a run was killed while it wrote
                line = b"\n" + line
        file.write(line)
