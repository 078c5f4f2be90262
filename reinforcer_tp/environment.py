"""What a run ran on: commit, versions, devices, layout. No environment variable is dumped."""

import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "reinforcer-tp",
    "torch",
    "triton",
    "megatron-core",
    "transformer-engine",
    "transformers",
    "tokenizers",
    "datasets",
    "safetensors",
    "numpy",
)


def environment_info(layout: Mapping[str, Any]) -> dict[str, Any]:
    """The content of environment.json; what cannot be known is None.

    `layout` is the parallel layout, recorded as it is. Devices are those of this node.
    """
    return {
        "git": git_state(Path(__file__).resolve().parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": package_versions(_PACKAGES),
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if _has_nccl() else None,
        "hostname": socket.gethostname(),
        "num_nodes": int(os.environ.get("GROUP_WORLD_SIZE", "1")),  # set by torchrun
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "devices": _devices(),
        "layout": dict(layout),
    }


def package_versions(names: Sequence[str]) -> dict[str, str | None]:
    return {name: _version(name) for name in names}


def git_state(package: Path) -> dict[str, Any]:
    """{"commit", "dirty"} of the checkout that tracks the folder `package`.

    Both are None without git, without a commit, and for an installed copy that merely lies
    inside some other repository (a .venv in a project). Untracked files are not dirt.
    """
    unknown = {"commit": None, "dirty": None}
    if shutil.which("git") is None:
        return unknown
    commit = _git(package, "rev-parse", "--verify", "HEAD")
    if commit is None or _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return unknown
    changes = _git(package, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else changes != ""}


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a read-only git command, None when it fails."""
    done = subprocess.run(
        ["git", "--no-optional-locks", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    return next((found.version for found in metadata.distributions(name=package)), None)


def _has_nccl() -> bool:
    return torch.cuda.is_available() and torch.distributed.is_nccl_available()


def _devices() -> list[str]:
    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [f"cpu ({os.cpu_count()} cores, {platform.machine()}, {_cpu_name() or 'unknown'})"]


def _cpu_name() -> str | None:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line[:10] == "model name"), None)
