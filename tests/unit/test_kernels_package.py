"""`kernels` stands alone, and transformers does not take it for the PyPI package of that name."""

from __future__ import annotations

import subprocess
import sys

import kernels


def test_transformers_does_not_mistake_it_for_its_optional_package():
    from transformers.utils import is_kernels_available

    assert not is_kernels_available()
    assert not hasattr(kernels, "__version__")


def test_it_imports_torch_and_nothing_of_ours():
    program = """
import sys
sys.modules["triton"] = None  # importing it fails
import kernels
names = {name.partition(".")[0] for name in sys.modules}
print(sorted(names & {"reinforcer_tp", "megatron", "transformers", "datasets"}))
print("torch" in names)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split("\n")[:2] == ["[]", "True"]
