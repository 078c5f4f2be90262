"""What a process must not do on its way to the first step: the time to it is mostly imports."""

import gc
import json
import subprocess
import sys

import pytest
import torch

from reinforcer_tp.train import no_garbage

# Loaded by nothing that the first step needs, and 3 of the 11 s that a rank then took.
COMPILER = ("torch._inductor.compile_fx", "torch._inductor.lowering", "torch._inductor.codegen")
# Of what only a chosen logger, another model's code or a plot needs.
OPTIONAL = ("wandb", "mlflow", "swanlab", "trackio", "matplotlib", "transformers.modeling_utils")
MODULES = """
import json, sys
from reinforcer_tp.inputs import open_inputs
from reinforcer_tp.run import run
import torch
print(json.dumps([sorted(sys.modules), torch.compile.__module__]))
"""


@pytest.fixture(scope="module")
def imported():
    done = subprocess.run(
        [sys.executable, "-c", MODULES], capture_output=True, text=True, check=True
    )
    modules, compile_module = json.loads(done.stdout.splitlines()[-1])
    return set(modules), compile_module


@pytest.mark.skipif(torch.cuda.is_available(), reason="on CUDA Megatron may compile its functions")
def test_the_compiler_of_torch_is_not_loaded(imported):
    modules, compile_module = imported
    assert "megatron.core.fusions.fused_bias_swiglu" in modules  # one that decorates with it
    assert not modules.intersection(COMPILER)
    assert compile_module == "torch"  # the real one is back


@pytest.mark.parametrize("name", OPTIONAL)
def test_what_is_optional_is_not_loaded(imported, name):
    assert name not in imported[0]


def test_nothing_heavy_is_loaded_to_read_the_command_line():
    code = "import json, sys; import reinforcer_tp.train; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "datasets", "megatron", "numpy", "pandas", "rich"}
    assert not heavy.intersection(json.loads(done.stdout))


def test_garbage_is_collected_again_after_the_imports():
    before = gc.get_freeze_count()
    try:
        with pytest.raises(ImportError), no_garbage():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()
