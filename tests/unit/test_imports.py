"""Imports point one way, and no file of ours shadows an installed module."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [*ROOT.glob("reinforcer_tp/**/*.py"), *ROOT.glob("kernels/**/*.py")]
# What a part may import of ours, besides itself.
ALLOWED = {
    "kernels": (),
    "reinforcer_tp/preference_losses.py": (),
    "reinforcer_tp/loss.py": ("reinforcer_tp.preference_losses",),
    "reinforcer_tp/health.py": ("reinforcer_tp.loss",),
    "reinforcer_tp/first_step.py": (
        "reinforcer_tp.data",
        "reinforcer_tp.loss",
        "reinforcer_tp.mcore",
    ),
    "reinforcer_tp/data": (
        "reinforcer_tp.config_check",
        "reinforcer_tp.embedded",
        "reinforcer_tp.strict_json",
        "reinforcer_tp.untrusted",
    ),
    "reinforcer_tp/secrecy.py": (),
    "reinforcer_tp/strict_json.py": (),
    "reinforcer_tp/untrusted.py": ("reinforcer_tp.strict_json",),
    "reinforcer_tp/events.py": ("reinforcer_tp.secrecy",),
    "reinforcer_tp/report": (
        "reinforcer_tp.config_yaml",
        "reinforcer_tp.events",
        "reinforcer_tp.secrecy",
        "reinforcer_tp.strict_json",
        "reinforcer_tp.whole_files",
    ),
    "reinforcer_tp/metrics.py": (
        "reinforcer_tp.config",
        "reinforcer_tp.environment",
        "reinforcer_tp.progress",
        "reinforcer_tp.trackers",
    ),
    "reinforcer_tp/mcore": (
        "kernels",
        "reinforcer_tp.checkpoint_folder",
        "reinforcer_tp.config_check",
        "reinforcer_tp.data.packed_batch",
        "reinforcer_tp.faultpoints",
        "reinforcer_tp.fp8",
        "reinforcer_tp.pipeline_layout",
        "reinforcer_tp.untrusted",
    ),
    "reinforcer_tp/reference": (
        "reinforcer_tp.config",
        "reinforcer_tp.config_check",
        "reinforcer_tp.data",
        "reinforcer_tp.embedded",
        "reinforcer_tp.hf_files",
        "reinforcer_tp.mcore",
        "reinforcer_tp.nonfinite",
        "reinforcer_tp.secrecy",
        "reinforcer_tp.strict_json",
        "reinforcer_tp.untrusted",
        "reinforcer_tp.whole_files",
    ),
    "reinforcer_tp/loop.py": (
        "reinforcer_tp.batches",
        "reinforcer_tp.checkpoint_folder",
        "reinforcer_tp.config",
        "reinforcer_tp.config_check",
        "reinforcer_tp.data",
        "reinforcer_tp.events",
        "reinforcer_tp.faultpoints",
        "reinforcer_tp.first_step",
        "reinforcer_tp.flops",
        "reinforcer_tp.health",
        "reinforcer_tp.loss",
        "reinforcer_tp.mcore",
        "reinforcer_tp.memory",
        "reinforcer_tp.metrics",
        "reinforcer_tp.nonfinite",
        "reinforcer_tp.peak_rates",
        "reinforcer_tp.lifecycle.stops",
        "reinforcer_tp.throughput",
    ),
    "reinforcer_tp/nonfinite.py": (
        "reinforcer_tp.config_check",
        "reinforcer_tp.data",
        "reinforcer_tp.loss",
        "reinforcer_tp.mcore",
    ),
}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
    return found


def is_below(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_point_one_way(part):
    files = [
        f
        for f in FILES
        if is_below(f.relative_to(ROOT).as_posix().replace("/", "."), part.replace("/", "."))
    ]
    assert files, part
    own = part.removesuffix(".py").replace("/", ".")
    for file in files:
        for module in imported(file):
            if not (is_below(module, "reinforcer_tp") or is_below(module, "kernels")):
                continue
            assert any(is_below(module, allowed) for allowed in (own, *ALLOWED[part])), (
                f"{file.relative_to(ROOT)} imports {module}; {part} may import {ALLOWED[part]}"
            )


def test_only_mcore_imports_megatron():
    for file in FILES:
        if "mcore" not in file.parts:
            assert not any(is_below(m, "megatron") for m in imported(file)), file


@pytest.mark.parametrize("name", ["loss", "preference_losses", "health"])
def test_the_losses_import_torch_and_the_standard_library_only(name):
    modules = imported(ROOT / "reinforcer_tp" / f"{name}.py")
    others = {m.split(".")[0] for m in modules} - set(sys.stdlib_module_names)
    assert others <= {"torch", "reinforcer_tp"}


def test_nobody_imports_train():
    for file in FILES:
        assert "reinforcer_tp.train" not in imported(file), file


def test_no_file_shadows_an_installed_module(monkeypatch):
    """`torchrun reinforcer_tp/train.py` puts this folder first on sys.path."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p or ".").resolve() != ROOT])
    for path in (ROOT / "reinforcer_tp").iterdir():
        name = path.stem
        if path.name.startswith("__") or not (path.suffix == ".py" or path.is_dir()):
            continue
        assert name not in sys.stdlib_module_names, path
        assert importlib.util.find_spec(name) is None, f"{path} shadows an installed {name}"


def test_transformers_does_not_take_our_kernels_for_its_own():
    from transformers.utils import is_kernels_available

    import kernels

    assert not hasattr(kernels, "__version__")
    assert not is_kernels_available()
