"""A Python environment for TRL, made once and used again: for benchmarks.vs_trl.

Beside ours, so that TRL's requirements change nothing here; the versions that both have are ours
(constraints.txt).
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TRL = "1.16.0"
SHARED = ("transformers", "datasets", "accelerate")


def ensure_trl(folder: Path | None = None) -> str:
    """The Python of an environment with TRL at `folder` (None: in the user's cache).

    The first call installs, 5 minutes or so and 1.4 GB. RuntimeError where pip fails.
    """
    folder = folder or default_folder()
    python, stamp = folder / "bin" / "python", folder / ".installed"
    pins = (ROOT / "constraints.txt").read_bytes()  # of torch and transformers, too
    wanted = f"trl=={TRL} constraints {hashlib.sha256(pins).hexdigest()}\n"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return str(python)
    print(f"installing TRL {TRL} into {folder}: some minutes, once", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write(_constraints())
        constraints.flush()
        _install_torch(python, constraints.name)
        _pip(python, constraints.name, f"trl=={TRL}", *SHARED)
    stamp.write_text(wanted, encoding="utf-8")
    return str(python)


def default_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "reinforcer_tp" / f"trl-{TRL}-python{sys.version_info[1]}"


def _constraints() -> str:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith(("torch==", "triton=="))) + "\n"


def _install_torch(python: Path, constraints: str) -> None:
    """First, and its CPU build where an index has one: TRL alone would bring gigabytes of CUDA."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    torch = next(line for line in text.splitlines() if line.startswith("torch=="))
    try:
        _pip(python, constraints, f"{torch}+cpu")
    except RuntimeError:
        _pip(python, constraints, torch)


def _pip(python: Path, constraints: str, *packages: str) -> None:
    command = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "-c", constraints, *packages], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"pip install {' '.join(packages)}: {done.stderr.strip()[-800:]}")
